"""A frozen base larger than the memory: its weights stay on disk and pass by, block by block.

Distillation with LoRA reads the base and never writes it. So its weights need no memory of their
own: parameters are views of memory-mapped safetensors files, and the operating system's page cache
is the only buffer. While block i computes, the next block in the direction of travel (i + 1 going
forward, i - 1 when gradients come back) is read ahead, and blocks that lie behind are let go, so
that about two blocks are resident at any time, whatever the size of the model. On a GPU the same
window is copied to the device through pinned memory, on a stream of its own.

What is trained (LoRA, a second timestep embedder) lives beside the base in ordinary memory, with
its optimizer states. `StreamedEngine` trains it in one process with the interface of
`teasr.engine.Engine`.

A pass over all blocks is a *sweep*. A step with F forward passes, G of them with gradient, under
gradient checkpointing, costs F + G sweeps: a block that is computed again on the way back is still
there for its own backward.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from teasr.backbones.safetensors_files import DTYPES, INDEX_SUFFIX, STEM, Place, find_tensors
from teasr.engine import Averaged, EngineSettings, Stopwatch, set_gradient_checkpointing
from teasr.errors import TeasrError, UsageError

CHECKPOINT_FILE = "streamed.pt"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PAGE = mmap.PAGESIZE
_READ_AHEAD = 128 << 10  # a kernel may cut a longer request to its read-ahead window
_ALIGNMENT = 256  # of tensors in a copied block


# ------------------------------------------------------------------------------- weights on disk


class _MappedFile:
    """A file in the address space, read-only; pages come when they are touched and go on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
            self._descriptor = os.dup(stream.fileno())

    def tensor(self, place: Place) -> Tensor:
        """The values at `place`, not copied. Writing to them ends the process."""
        if place.size == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                self._map,
                dtype=place.dtype,
                count=place.size // place.dtype.itemsize,
                offset=place.start,
            )
        return flat.view(place.shape)

    def fetch(self, start: int, end: int, wanted: Callable[[], bool]) -> None:
        """Read [start, end) into the page cache, for as long as `wanted`."""
        if hasattr(os, "posix_fadvise"):
            for offset in range(start, end, _READ_AHEAD):
                if not wanted():
                    return
                length = min(_READ_AHEAD, end - offset)
                os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def release(self, start: int, end: int) -> None:
        """Let the whole pages in [start, end) go; touched again, they are read again."""
        start, end = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if start < end:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
            if hasattr(os, "posix_fadvise"):
                advice = os.POSIX_FADV_DONTNEED
                os.posix_fadvise(self._descriptor, start, end - start, advice)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._descriptor)


# ------------------------------------------------------------------------------ the streamed base


@dataclass
class Traffic:
    """What has passed by.

    Attributes:
        block_bytes: frozen bytes of each block.
        visits: how often each block was visited, forward or backward.
        fetches: how often each was read ahead or on demand, because it was not held.
    """

    block_bytes: list[int]
    visits: list[int] = field(default_factory=list)
    fetches: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from zero again."""
        self.visits = [0] * len(self.block_bytes)
        self.fetches = [0] * len(self.block_bytes)

    @property
    def sweeps(self) -> float:
        """Passes over all blocks: visits / blocks."""
        return sum(self.visits) / len(self.visits)

    @property
    def bytes_visited(self) -> int:
        """Bytes of weights that were computed with."""
        return sum(count * size for count, size in zip(self.visits, self.block_bytes))

    @property
    def bytes_fetched(self) -> int:
        """Bytes asked of the disk, whether or not the page cache still had them."""
        return sum(count * size for count, size in zip(self.fetches, self.block_bytes))


@dataclass
class _Copy:
    """A block's tensors where they compute; `ready` is a CUDA event, None on a CPU."""

    tensors: list[Tensor]
    flat: Tensor
    ready: Any = None


class _Block:
    """A block's frozen parameters and where their values lie."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.homes: list[Tensor] = []
        self.ranges: list[tuple[_MappedFile, int, int]] = []

    def add(self, parameter: nn.Parameter, file: _MappedFile, place: Place) -> None:
        self.parameters.append(parameter)
        self.homes.append(parameter.data)
        self.ranges.append((file, place.start, place.start + place.size))

    def join_ranges(self) -> None:
        """Make one range of those that touch."""
        joined: list[tuple[_MappedFile, int, int]] = []
        for file, start, end in sorted(self.ranges, key=lambda part: (part[0].path, *part[1:])):
            if joined and joined[-1][0] is file and start - joined[-1][2] < _PAGE:
                joined[-1] = (file, joined[-1][1], max(end, joined[-1][2]))
            else:
                joined.append((file, start, end))
        self.ranges = joined

    @property
    def size(self) -> int:
        """Bytes of its frozen parameters."""
        return sum(home.nbytes for home in self.homes)

    @property
    def padded_size(self) -> int:
        """Bytes of a copy."""
        return sum(map(_padded, self.homes))

    def fetch(self, wanted: Callable[[], bool]) -> None:
        for file, start, end in self.ranges:
            file.fetch(start, end, wanted)

    def release(self) -> None:
        for file, start, end in self.ranges:
            file.release(start, end)


class StreamedBase:
    """Gives a module on `meta` its frozen weights from disk, and moves them past as it computes.

    Parameters of the blocks become read-only views of the files, in the files' own type. All other
    frozen tensors are read into ordinary memory. Tensors that already have values, among them all
    that is trained, are left as they are, moved to `device` at most. Nothing is loaded before all
    of it is found to be there.

    With copies (on a GPU) use gradient checkpointing per block: without it autograd holds on to
    each block's copy until its backward, correctly, but with no bound on the device's memory.

    Args:
        module: with its frozen tensors on `meta`.
        source: a safetensors file, or a folder with one, or with shards and their index.
        blocks: names of the submodules that are visited one after another.
        device: where to compute.
        dtype: type that frozen parameters must have on disk; None: that of the module's.
        names: from a tensor's name in `module` to its name on disk.
        keep_bytes: memory for blocks that stay, taken from the first on: a sweep reads that much
            less. Page cache on a CPU, device memory with copies.
        copies: copy blocks to `device` in place of computing with the mapped files; None: on any
            device but the CPU.

    Attributes:
        module: the module, ready to be called.
        device: where it computes.
        traffic: counts.

    Raises:
        UsageError: when a block, a shard or a tensor is missing, is of another shape or type, or
            something that the files cannot give is on `meta`.
        TeasrError: when a file is damaged or cut off.
    """

    def __init__(
        self,
        module: nn.Module,
        source: Path,
        blocks: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        names: Callable[[str], str] | None = None,
        keep_bytes: int = 0,
        copies: bool | None = None,
    ) -> None:
        self.module = module
        self.device = torch.device(device)
        copies = self.device.type != "cpu" if copies is None else copies
        modules = _submodules(module, blocks)
        places = _match(module, find_tensors(source), source, dtype, names or str)
        self._blocks = [_Block() for _ in blocks]
        self._assign(places, blocks)
        self.traffic = Traffic([block.size for block in self._blocks])

        sizes = itertools.accumulate(self.traffic.block_bytes)
        self._kept = {i for i, total in enumerate(sizes) if total <= keep_bytes}
        self._at: tuple[int, bool] | None = None
        self._wanted: set[int] = set()
        self._held: dict[int, Future[_Copy | None]] = {}
        largest = max(block.padded_size for block in self._blocks)
        self._stage = _Stage(self.device, largest) if copies else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._hooks: list[Any] = []
        for i, block in enumerate(modules):
            self._hooks.append(block.register_forward_pre_hook(self._before(i)))
            self._hooks.append(block.register_forward_hook(self._after(i)))

    def close(self) -> None:
        """Stop reading ahead and let all blocks go. The module still computes on a CPU."""
        for hook in self._hooks:
            hook.remove()
        self._wanted = set()
        self._worker.shutdown()
        for i in list(self._held):
            self._release(i)

    # ---- where tensors come from

    def _assign(self, places: Mapping[str, Place], blocks: Sequence[str]) -> None:
        files = {path: _MappedFile(path) for path in {place.path for place in places.values()}}
        owners = {name: i for i, name in enumerate(blocks)}
        made: dict[int, nn.Parameter] = {}
        for name, place in places.items():
            parent, _, leaf = name.rpartition(".")
            owner = self.module.get_submodule(parent)
            home = files[place.path].tensor(place)
            if leaf in owner._buffers:
                owner._buffers[leaf] = home.clone().to(self.device)
                continue
            old = owner._parameters[leaf]
            if id(old) in made:  # one tensor under several names
                owner._parameters[leaf] = made[id(old)]
                continue
            block = next((owners[part] for part in _prefixes(name) if part in owners), None)
            if block is None:
                home = home.clone().to(self.device)
            new = made[id(old)] = nn.Parameter(home, requires_grad=False)
            owner._parameters[leaf] = new
            if block is not None:
                self._blocks[block].add(new, files[place.path], place)
        for streamed in self._blocks:
            streamed.join_ranges()
        self._files = list(files.values())
        for file in self._files:
            file.release(0, file.path.stat().st_size)
        if self.device.type != "cpu":
            at_home = {id(p) for streamed in self._blocks for p in streamed.parameters}
            for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
                if id(tensor) not in at_home:
                    tensor.data = tensor.data.to(self.device)

    # ---- where the module is, and what it needs next

    def _before(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._visit(index, backward=_in_backward())

        return hook

    def _after(self, index: int) -> Callable[..., None]:
        def arrives(gradient: Tensor) -> None:
            self._visit(index, backward=True)

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled() and not _in_backward():
                for tensor in _tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(arrives)

        return hook

    def _visit(self, index: int, backward: bool) -> None:
        """Block `index` is about to compute."""
        if backward and self._at == (index, True):
            return  # the gradient of a second output, or the recomputation that it asked for
        self._at = (index, backward)
        self.traffic.visits[index] += 1
        following = (index + (-1 if backward else 1)) % len(self._blocks)
        self._wanted = {index, following} | self._kept
        for other in [other for other in self._held if other not in self._wanted]:
            self._release(other)
        for needed in (index, following):
            if needed not in self._held:
                self.traffic.fetches[needed] += 1
                self._held[needed] = self._worker.submit(self._fetch, needed)
        if self._stage:
            copy = self._held[index].result()
            assert copy is not None
            self._stage.hand_over(copy)
            for parameter, tensor in zip(self._blocks[index].parameters, copy.tensors):
                parameter.data = tensor

    def _fetch(self, index: int) -> _Copy | None:
        """In the worker: bring a block to where it computes."""
        block = self._blocks[index]
        block.fetch(lambda: index in self._wanted)
        if not self._stage:
            return None
        copy = self._stage.copy(block.homes)
        block.release()
        return copy

    def _release(self, index: int) -> None:
        fetched, block = self._held.pop(index), self._blocks[index]
        if not self._stage:
            block.release()
            return
        fetched.cancel()
        for parameter, home in zip(block.parameters, block.homes):
            parameter.data = home


class _Stage:
    """Copies blocks to a device, through pinned memory and beside what computes there."""

    def __init__(self, device: torch.device, largest: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._largest = largest
        self._buffers: list[tuple[Tensor, Any]] = []  # host memory; the event that frees it

    def copy(self, homes: Sequence[Tensor]) -> _Copy:
        """Start the copy of `homes`; its values count once `hand_over` has returned."""
        offsets = list(itertools.accumulate(map(_padded, homes), initial=0))
        host = self._buffer() if self._stream else torch.empty(offsets[-1], dtype=torch.uint8)
        flat = host[: offsets[-1]]
        for home, offset in zip(homes, offsets):
            flat[offset : offset + home.nbytes].copy_(home.reshape(-1).view(torch.uint8))
        ready = None
        if self._stream:
            with torch.cuda.stream(self._stream):
                flat = flat.to(self._device, non_blocking=True)
                ready = torch.cuda.Event()
                ready.record(self._stream)
            self._buffers.append((host, ready))
        elif self._device.type != "cpu":
            flat = flat.to(self._device)
        tensors = [
            flat[offset : offset + home.nbytes].view(home.dtype).view(home.shape)
            for home, offset in zip(homes, offsets)
        ]
        return _Copy(tensors, flat, ready)

    def hand_over(self, copy: _Copy) -> None:
        """Make the stream that computes wait for `copy`, and its memory live as long as it does."""
        if copy.ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copy.ready)
            copy.flat.record_stream(current)

    def _buffer(self) -> Tensor:
        """Pinned memory that no copy is being made from; two take turns."""
        if len(self._buffers) < 2:
            return torch.empty(self._largest, dtype=torch.uint8, pin_memory=True)
        buffer, event = self._buffers.pop(0)
        event.synchronize()
        return buffer


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _submodules(module: nn.Module, blocks: Sequence[str]) -> list[nn.Module]:
    if not blocks:
        raise UsageError("No blocks to stream.", "Name the submodules that are visited in order.")
    result = []
    for name in blocks:
        try:
            result.append(module.get_submodule(name))
        except AttributeError:
            raise UsageError(
                f"The network has no block '{name}'.",
                f"Its parts: {', '.join(name for name, _ in module.named_children())}.",
            ) from None
    return result


def _match(
    module: nn.Module,
    places: Mapping[str, Place],
    source: Path,
    dtype: torch.dtype | None,
    names: Callable[[str], str],
) -> dict[str, Place]:
    """The place of each tensor of `module` that has no values yet.

    A tensor with several names is known on disk by one of them at least.
    """
    result: dict[str, Place] = {}
    known: dict[int, Place] = {}
    valueless = list(_valueless(module))
    for name, tensor, _ in valueless:
        if names(name) in places:
            known.setdefault(id(tensor), places[names(name)])
    for name, tensor, stored in valueless:
        if getattr(tensor, "requires_grad", False):
            raise UsageError(
                f"'{name}' is trained but has no values: it is on the meta device.",
                "Give it its values in ordinary memory first, or freeze it.",
            )
        if not stored:
            raise UsageError(
                f"'{name}' is on the meta device and no weights file holds it.",
                "Build that part of the network in ordinary memory.",
            )
        place = known.get(id(tensor))
        if place is None:
            raise UsageError(
                f"'{names(name)}' is missing in {source}.",
                "Give the weights of this very architecture, of all its layers.",
            )
        if place.shape != tuple(tensor.shape):
            raise UsageError(
                f"'{names(name)}' in {place.path} has shape {_sides(place.shape)}; the network "
                f"expects {_sides(tensor.shape)}.",
                "Give the weights of this very architecture.",
            )
        expected = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        if place.dtype != expected:
            raise UsageError(
                f"'{names(name)}' in {place.path} is {_short(place.dtype)}; {_short(expected)} is "
                "expected.",
                "Streamed weights are computed with as they are stored: convert the files.",
            )
        result[name] = place
    return result


def _valueless(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Every tensor on `meta`: its name, itself, and whether a state dict holds its values."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        found: Iterable[tuple[str, Any, bool]] = itertools.chain(
            ((leaf, value, True) for leaf, value in owner._parameters.items()),
            (
                (leaf, value, leaf not in owner._non_persistent_buffers_set)
                for leaf, value in owner._buffers.items()
            ),
            ((leaf, value, False) for leaf, value in vars(owner).items()),
        )
        for leaf, value, stored in found:
            if isinstance(value, Tensor) and value.is_meta:
                yield (f"{prefix}.{leaf}" if prefix else leaf), value, stored


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _in_backward() -> bool:
    """Whether autograd is running: a forward pass now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _sides(shape: Iterable[int]) -> str:
    return "×".join(str(side) for side in shape) or "()"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------- random weights


def write_random(
    module: nn.Module,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    *,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write random weights for `module` to shards with an index, a few megabytes at a time.

    Matrices are uniform with standard deviation 1 / sqrt(fan-in), gains of norms are 1, biases are
    small. Values depend on (seed, name) alone. The index is written last: a folder that has one is
    complete and left as it is; without one, whole shards are kept and the others written anew.

    Args:
        module: gives names and shapes, usually on `meta`.
        folder: made if missing.
        dtype: of floating-point tensors.
        shard_bytes: largest size of a shard, unless a single tensor is larger.
        progress: called with bytes done and bytes in all after each shard.

    Returns:
        The index.

    Raises:
        UsageError: when the folder holds other weights.
        TeasrError: when the disk has too little room.
    """
    shapes = {
        name: (tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in module.state_dict().items()
    }
    shards = _shard(shapes, shard_bytes)
    total = sum(_nbytes(*shapes[name]) for name in shapes)
    files = [
        folder / f"{STEM}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    headers = [_header({name: shapes[name] for name in names}, seed) for names in shards]
    index = folder / f"{STEM}{INDEX_SUFFIX}"
    described = {
        "metadata": {"total_size": total, "random_seed": seed},
        "weight_map": {name: path.name for names, path in zip(shards, files) for name in names},
    }
    if index.is_file():
        found = _read_json(index)
        if found == described and all(map(_holds, files, headers)):
            return index
        if "random_seed" not in found.get("metadata", {}):
            raise _occupied(folder)
        index.unlink()
        for name in set(found["weight_map"].values()) - {path.name for path in files}:
            (folder / name).unlink(missing_ok=True)
    elif any(path not in files for path in folder.glob("*.safetensors")):
        raise _occupied(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.partial"):
        left.unlink()
    missing = [i for i, path in enumerate(files) if not _holds(path, headers[i])]
    need = sum(len(headers[i]) + sum(_nbytes(*shapes[n]) for n in shards[i]) for i in missing)
    free = shutil.disk_usage(folder).free + sum(
        files[i].stat().st_size for i in missing if files[i].exists()
    )
    if need > free:
        raise TeasrError(
            f"{folder} needs {need / 1e9:.3g} GB for the weights; {free / 1e9:.3g} GB are free.",
            "Make room, or choose a folder on another disk.",
        )
    done = total - sum(_nbytes(*shapes[name]) for i in missing for name in shards[i])
    for i in missing:
        files[i].unlink(missing_ok=True)
        _write_shard(files[i], headers[i], {name: shapes[name] for name in shards[i]}, seed)
        done += sum(_nbytes(*shapes[name]) for name in shards[i])
        if progress:
            progress(done, total)
    partial = index.with_suffix(".partial")
    partial.write_text(json.dumps(described, indent=1))
    partial.rename(index)
    return index


_Kind = tuple[tuple[int, ...], torch.dtype]


def _shard(shapes: Mapping[str, _Kind], largest: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, kind in shapes.items():
        size = _nbytes(*kind)
        if shards[-1] and used + size > largest:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _header(shapes: Mapping[str, _Kind], seed: int) -> bytes:
    """A safetensors header, filled up so that values start on a page."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "random_seed": str(seed)}}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        end = offset + _nbytes(shape, dtype)
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // _PAGE) * _PAGE - 8)
    return len(text).to_bytes(8, "little") + text


def _holds(path: Path, header: bytes) -> bool:
    """Whether `path` is a whole shard with this very header."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        if stream.read(len(header)) != header:
            return False
    entries = json.loads(header[8:])
    end = max((e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"), default=0)
    return path.stat().st_size == len(header) + end


def _write_shard(path: Path, header: bytes, shapes: Mapping[str, _Kind], seed: int) -> None:
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(header)
            for name, (shape, dtype) in shapes.items():
                for values in _random(name, shape, dtype, seed):
                    stream.write(values.view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TeasrError(f"Cannot write {path}: {error.strerror}.") from None
    partial.rename(path)


def _random(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, piece: int = 1 << 22
) -> Iterator[Tensor]:
    """Values of the tensor `name`, flat, in pieces."""
    words = np.frombuffer(hashlib.sha256(f"{seed} {name}".encode()).digest(), np.uint32)
    generator = np.random.Generator(np.random.SFC64(words.tolist()))
    count = math.prod(shape)
    gain = len(shape) == 1 and name.rpartition(".")[2] == "weight"
    scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02
    for start in range(0, count, piece):
        length = min(piece, count - start)
        if not dtype.is_floating_point:
            yield torch.zeros(length, dtype=dtype)
        elif gain:
            yield torch.ones(length, dtype=dtype)
        else:
            bits = generator.integers(0, 2**64, -(-length // 4), np.uint64, endpoint=False)
            values = torch.from_numpy(bits.view(np.int16)[:length])
            yield values.to(dtype).mul_(scale * math.sqrt(3) / 2**15)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _occupied(folder: Path) -> UsageError:
    return UsageError(f"{folder} holds other weights.", "Choose an empty folder.")


# ------------------------------------------------------------------------------------- the trainer


class StreamedEngine(Averaged):
    """Trains what is not frozen in a streamed network; the interface is `teasr.engine.Engine`'s.

    One process, plain torch: AdamW on float32 copies of the trained parameters (on themselves where
    they are float32), on the device or, by `offload_optimizer`, in host memory. `settings` that are
    about sharding have no meaning here.

    Args:
        base: the streamed network; its `module` is callable as a `Velocity`.
        settings: learning rate, clipping, accumulation, averaging, gradient checkpointing, and
            where the optimizer is.

    Attributes:
        network: the trained network.
        device: where batches must be.
        steps: optimizer steps done.
        stopwatch: seconds that `backward` and `optimizer` took in the last step.

    Raises:
        UsageError: when nothing is trained, several workers would share the work, or gradient
            checkpointing is asked of a network that knows none.
    """

    def __init__(self, base: StreamedBase, settings: EngineSettings) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UsageError(
                "A streamed base is trained by one worker.",
                "Set training.workers to 1, or shard the weights over workers with "
                "engine.zero_stage 3.",
            )
        self.base = base
        self.settings = settings
        self.network = base.module
        self.device = base.device
        self.steps = 0
        self.stopwatch = Stopwatch(base.device)
        self._micro_steps = 0
        self._trained = {n: p for n, p in base.module.named_parameters() if p.requires_grad}
        if not self._trained:
            raise UsageError("The network has no trained parameters.", "Add LoRA to it first.")
        set_gradient_checkpointing(base.module, settings)
        self._home = torch.device("cpu") if settings.offload_optimizer == "cpu" else base.device
        self._masters = [p.data.to(self._home, torch.float32) for p in self._trained.values()]
        self._optimizer = torch.optim.AdamW(
            self._masters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self._average = [m.clone() for m in self._masters] if settings.ema_decay > 0 else None

    @property
    def accumulated(self) -> int:
        """Micro-batches since the last optimizer step; a checkpoint keeps no gradients of them."""
        return self._micro_steps % self.settings.gradient_accumulation

    def step(self, loss: Tensor, progress: float) -> float | None:
        """Backward, and at an accumulation boundary one optimizer step.

        Args:
            loss: scalar of this micro-batch.
            progress: share of the run that is done, for the learning rate.

        Returns:
            The norm of the gradient before clipping, or None between boundaries.
        """
        self.stopwatch.start()
        (loss / self.settings.gradient_accumulation).backward()
        self.stopwatch.mark("backward")
        self._micro_steps += 1
        if self._micro_steps % self.settings.gradient_accumulation:
            self.stopwatch.mark("optimizer")
            return None
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(progress)
        norm = self._optimize()
        self.steps += 1
        self._update_average()
        self.stopwatch.mark("optimizer")
        return norm

    def state_dict(self, average: bool = True) -> dict[str, Tensor]:
        """Float32 weights of what is trained by parameter name, averaged if there is an average."""
        chosen = self._average if average and self._average is not None else self._masters
        return {name: value.cpu().clone() for name, value in zip(self._trained, chosen)}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network computes with the average of its weights; take no step in here."""
        if self._average is None:
            yield
            return
        kept = [p.detach().clone() for p in self._trained.values()]
        self._set(self._average)
        try:
            yield
        finally:
            self._set(kept)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint: weights, optimizer, average, and `state`, readable back by `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{CHECKPOINT_FILE}.partial"
        content = {
            "weights": dict(zip(self._trained, self._masters)),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average,
            "steps": self.steps,
            "state": state,
        }
        try:
            torch.save(content, partial)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise TeasrError(f"Cannot write {folder / CHECKPOINT_FILE}: {error}.") from None
        partial.rename(folder / CHECKPOINT_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> dict[str, Any]:
        """Take up a checkpoint of `save` and return its `state`.

        Raises:
            TeasrError: when the folder holds no checkpoint that fits.
        """
        path = folder / CHECKPOINT_FILE
        saved: dict[str, Any] = {}
        if path.is_file():
            saved = torch.load(path, map_location=self._home, weights_only=True)
        shapes = {name: value.shape for name, value in zip(self._trained, self._masters)}
        found = {name: value.shape for name, value in saved.get("weights", {}).items()}
        if shapes != found or (saved["average"] is None) != (self._average is None):
            raise TeasrError(
                f"{folder} holds no checkpoint of this run.",
                "LoRA and engine.ema_decay must be those of the run that wrote it.",
            )
        for master, value in zip(self._masters, saved["weights"].values()):
            master.copy_(value)
        self._set(self._masters)
        self._optimizer.load_state_dict(saved["optimizer"])
        self._average = saved["average"]
        self.steps = saved["steps"]
        self._micro_steps = 0
        state: dict[str, Any] = saved["state"]
        return state

    @torch.no_grad()
    def _optimize(self) -> float:
        """One optimizer step on the gradients at hand; their norm before clipping."""
        parameters = list(self._trained.values())
        for master, parameter in zip(self._masters, parameters):
            gradient = parameter.grad
            master.grad = None if gradient is None else gradient.to(self._home, torch.float32)
            parameter.grad = None
        gradients = [master.grad for master in self._masters if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        limit = self.settings.gradient_clipping
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(self._masters, limit, norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._set(self._masters)
        return float(norm)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._trained.values(), values):
            if parameter.data_ptr() != value.data_ptr():
                parameter.copy_(value)

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None:
            return
        decay = self.settings.ema_decay_at(self.steps)
        for average, master in zip(self._average, self._masters):
            average.lerp_(master, 1 - decay)
