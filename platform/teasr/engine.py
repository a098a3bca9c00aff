"""One class over DeepSpeed: ZeRO stages 0 to 3, parameters and optimizer in host memory or on NVMe,
on GPUs or on a CPU, by settings alone.

The method knows nothing of DeepSpeed; it is handed `Engine.network`, a callable, and gives back a
loss. All that must be said to DeepSpeed (its backward, its learning rate, its collective saves)
is said here. Parameters that do not require gradients are the caller's: they take no optimizer
state, and no checkpoint holds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from teasr import checkpoints
from teasr.backbones.base import Backbone
from teasr.backbones.folder import compute_dtype
from teasr.config import Settings
from teasr.errors import TeasrError, UsageError

log = logging.getLogger(__name__)

SWAPPED_BYTES = 1 << 20
"""DeepSpeed leaves smaller partitions of parameters in host memory, whatever it is told."""
TRAINED_IN_MEMORY = 1_000_000_000
"""Trained elements per worker that DeepSpeed keeps in host memory beside NVMe (its `max_in_cpu`).
Those beyond it cannot be loaded from a checkpoint (DeepSpeed 0.19)."""
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>


class EngineSettings(Settings):
    """Optimisation and memory settings."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO: 1 shards the optimizer, 2 also gradients, 3 also parameters."""
    offload_parameters: Literal["none", "cpu", "nvme", "stream"] = "none"
    """Where parameters wait for their turn: `none` on the device; `cpu` in host memory or `nvme` in
    files under `nvme_path`, both with `zero_stage` 3; `stream`: the frozen ones of a pretrained
    backbone in the files that they came in, read block by block (`teasr.streaming`), by one worker
    with `zero_stage` 0. Each pass streams all of them."""
    stream_cache_gb: float = Field(0.0, ge=0)
    """With `stream`, gigabytes (1e9 bytes) of blocks that stay where they compute: on the device,
    or on a CPU in the page cache."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep optimizer states and fp32 weights on the device (`none`) or in host memory (`cpu`)."""
    nvme_path: str | None = None
    """Folder on a fast local disk with room for all parameters, for `offload_parameters: nvme`."""
    gradient_checkpointing: bool = False
    """Compute the activations of each block a second time in backward instead of keeping them."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type; `auto` takes bf16 where the hardware multiplies it faster."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's averaging constants."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_share: float = Field(0.02, ge=0, lt=1)
    """Share of the run over which the learning rate rises from zero."""
    final_learning_rate_share: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of the run over its peak (cosine decay)."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 turns clipping off. DeepSpeed's own default has moved."""
    gradient_accumulation: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the average of the weights that is evaluated and registered; 0 keeps none."""

    @field_validator("offload_optimizer", mode="before")
    @classmethod
    def _not_to_nvme(cls, value: Any) -> Any:
        if value == "nvme":
            raise ValueError(
                "'none' or 'cpu' is expected: DeepSpeed 0.19 loses the moments of an optimizer on "
                "NVMe when it loads a checkpoint, so that a resumed run would be another one; "
                "parameters may go there, by offload_parameters=nvme"
            )
        if isinstance(value, bool):
            return "cpu" if value else "none"
        return value

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> EngineSettings:
        streamed = self.offload_parameters == "stream"
        if streamed and self.zero_stage != 0:
            raise ValueError(
                "offload_parameters=stream needs zero_stage 0: one worker reads the weights from "
                "their files, and nothing is sharded"
            )
        if self.stream_cache_gb and not streamed:
            raise ValueError("stream_cache_gb needs offload_parameters=stream")
        if self.offload_optimizer != "none" and self.zero_stage == 0 and not streamed:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters in ("cpu", "nvme") and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters={self.offload_parameters} needs zero_stage 3: the other "
                "stages keep whole parameters on the device"
            )
        if self.offload_parameters == "nvme" and not self.nvme_path:
            raise ValueError("offload_parameters=nvme needs nvme_path, a folder on a fast disk")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Compute type on this machine."""
        fixed = {"bf16": torch.bfloat16, "fp32": torch.float32}
        return fixed.get(self.precision) or compute_dtype()

    def learning_rate_at(self, progress: float) -> float:
        """Linear rise over `warmup_share`, then a cosine down to the final share of the peak."""
        if progress < self.warmup_share:
            return self.learning_rate * max(progress / self.warmup_share, 1e-2)
        done = min(max((progress - self.warmup_share) / (1 - self.warmup_share), 0.0), 1.0)
        low = self.final_learning_rate_share
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))

    def ema_decay_at(self, steps: int) -> float:
        """Decay of the average after `steps` optimizer steps: a short history first, so that it
        forgets the initial weights as fast as a mean would."""
        return min(self.ema_decay, (1 + steps) / (10 + steps))

    def deepspeed_config(
        self, micro_batch: int, buffers: NvmeBuffers | None = None
    ) -> dict[str, Any]:
        """The configuration that is handed to `deepspeed.initialize`.

        Args:
            buffers: of the network, for `offload_parameters: nvme`.
        """
        pin = torch.cuda.is_available()  # of use only for copies to a device
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if self.offload_optimizer != "none":
            zero["offload_optimizer"] = {"device": self.offload_optimizer, "pin_memory": pin}
        if self.offload_parameters != "none":
            zero["offload_param"] = {"device": self.offload_parameters, "pin_memory": pin}
        if self.offload_parameters == "nvme":
            assert self.nvme_path is not None
            buffers = buffers or NvmeBuffers()
            zero["offload_param"] |= {
                "nvme_path": self.nvme_path,
                "max_in_cpu": TRAINED_IN_MEMORY,
                "buffer_count": buffers.count,
                "buffer_size": buffers.elements,
            }
            # DeepSpeed 0.19 fails when it reads ahead a parameter that a pass uses twice, such as
            # the modulation of Z-Image's blocks by both levels.
            zero["stage3_prefetch_bucket_size"] = 0
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self.gradient_accumulation,
            "gradient_clipping": self.gradient_clipping,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": self.learning_rate,
                    "betas": list(self.betas),
                    "weight_decay": self.weight_decay,
                    "torch_adam": True,  # no compilation; the fused kernel is the GPU's default
                },
            },
            "steps_per_print": 10**9,
        }


def check_offload(settings: EngineSettings) -> None:
    """Refuse an offload that this machine cannot do.

    Raises:
        UsageError: `nvme_path` is no folder or not writable; or its files need asynchronous I/O,
            and there is no C++ compiler or no libaio to compile it with.
    """
    if settings.offload_parameters != "nvme":
        return  # host memory needs nothing: torch's AdamW is not compiled
    remains = "Or set engine.offload_parameters=cpu, which needs neither."
    path = Path(str(settings.nvme_path))
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        problem = "is not writable" if path.is_dir() else "is not a folder on this machine"
        raise UsageError(
            f"'engine.nvme_path': {path} {problem}.",
            "Give a writable folder on a fast local disk. " + remains,
        )
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        raise UsageError(
            "engine.offload_parameters=nvme: there is no C++ compiler, and DeepSpeed compiles its "
            "asynchronous I/O on first use.",
            f"Install one (Debian, Ubuntu: apt-get install g++). {remains}",
        )
    if not _asynchronous_io().is_compatible():
        raise UsageError(
            "engine.offload_parameters=nvme: libaio or its headers are missing, which DeepSpeed's "
            "asynchronous I/O is made with.",
            f"Install them (Debian, Ubuntu: apt-get install libaio-dev). {remains}",
        )


def prepare_offload(settings: EngineSettings) -> None:
    """`check_offload`, then compile what the offload needs, once per machine.

    To be called before workers start: together they would wait for one compilation for minutes.

    Raises:
        UsageError: see `check_offload`. TeasrError: when it does not compile.
    """
    check_offload(settings)
    if settings.offload_parameters != "nvme":
        return
    free_extensions()
    builder, begin = _asynchronous_io(), time.monotonic()
    log.warning("DeepSpeed's asynchronous I/O is loaded; on first use it compiles some 4 minutes.")
    try:
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):  # noqa: PTH123
            builder.load(verbose=False)
    except Exception as error:  # whatever a compiler can meet
        raise TeasrError(
            f"DeepSpeed's asynchronous I/O does not compile: {str(error).splitlines()[-1]}",
            "Set engine.offload_parameters=cpu, which does not need it.",
        ) from error
    log.warning("DeepSpeed's asynchronous I/O is ready, %.0f s.", time.monotonic() - begin)


def free_extensions(patience: float = 120.0) -> None:
    """Remove locks of processes that were killed while they compiled or loaded a C++ extension.

    torch's lock is a file, and everybody after a dead holder would wait for ever. A holder has the
    file open: one that nobody on this machine has open, and that is older than `patience` seconds,
    is nobody's. It may be younger where machines share a home, and another one is compiling.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            while not _is_open(lock):
                age = time.time() - lock.stat().st_mtime
                if age > patience:
                    log.warning("%s was left by a process that was killed; it is removed.", lock)
                    lock.unlink()
                    break
                time.sleep(min(1.0, patience))


def _is_open(path: Path) -> bool:
    """Whether a process of ours has `path` open. True where that cannot be known."""
    if not Path("/proc/self/fd").is_dir():
        return True
    target = str(path.resolve())
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            if os.readlink(handle) == target:  # noqa: PTH115
                return True
    return False


def _asynchronous_io() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


@dataclass(frozen=True)
class NvmeBuffers:
    """Host memory through which parameters pass on their way from NVMe.

    Attributes:
        count: partitions that are in memory at a time.
        elements: elements of each, enough for the largest.
    """

    count: int = 5
    elements: int = 100_000_000

    @classmethod
    def for_network(cls, network: nn.Module, element_bytes: int, workers: int) -> NvmeBuffers:
        """Room for the parameters of the largest block (an element of a `ModuleList`), each in a
        buffer of its own, and for as many that are held back for backward.

        Backward through one pass, or through several with gradient checkpointing, lets go of each
        block when it is done; through several passes without, it holds all until the last is.
        """

        def swapped(module: nn.Module) -> list[int]:
            parts = (-(-p.numel() // workers) for p in module.parameters())
            return [elements for elements in parts if elements * element_bytes >= SWAPPED_BYTES]

        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        blocks = [len(swapped(block)) for blocks in lists for block in blocks]
        everything = swapped(network)
        count = min(2 * max(blocks, default=0), len(everything)) or len(everything)
        return cls(max(count, 5), max(everything, default=SWAPPED_BYTES))


class Stopwatch:
    """Seconds that the phases of a step take, by the clock of the device that does the work.

    A GPU runs behind the host: marks are left in its queue, and it is waited for only when
    `seconds` are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forget the step before, and begin another."""
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        """What happened since the last mark was `phase`."""
        self._marks.append((phase, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, of the step last begun."""
        if self._device.type != "cuda":
            return {name: now - then for (_, then), (name, now) in pairwise(self._marks)}
        if self._marks:
            self._marks[-1][1].synchronize()
        return {
            name: then.elapsed_time(now) / 1000 for (_, then), (name, now) in pairwise(self._marks)
        }

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Averaged(ABC):
    """A trained network whose weights give place to their average for as long as one asks.

    Attributes:
        network: the trained network, callable as a `Velocity`.
    """

    network: Any

    @abstractmethod
    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network computes with the average of its weights; take no step in here."""

    def averaged_network(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Any) -> Tensor:
        """The network with the average of its weights, as a `Velocity`; call it without gradient.

        No forward pass that is to be differentiated may be pending: weights change place for the
        length of the call.
        """
        with self.averaged():
            result: Tensor = self.network(x_t, t, r, condition)
        return result


_INFERENCE_KERNEL = "deepspeed_shm_comm"


class Engine(Averaged):
    """A backbone under training.

    Must be built in a process where `torch.distributed` is initialised or RANK, WORLD_SIZE and
    MASTER_ADDR are set (Ray Train sets them). All methods are collective: every rank calls them.

    Attributes:
        network: the trained network, callable as a `Velocity`.
        stopwatch: seconds that `backward` and `optimizer` took in the last step.
    """

    def __init__(self, network: Backbone, settings: EngineSettings, micro_batch: int) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed  # seconds to import, and it reads the environment when it does

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # It compiles, for minutes, a kernel for an all-reduce that only its inference calls.
        deepspeed.ops.__compatible_ops__[_INFERENCE_KERNEL] = False
        self.settings = settings
        _prepare(network, settings)
        workers = int(os.environ.get("WORLD_SIZE", "1"))
        if torch.distributed.is_initialized():
            workers = torch.distributed.get_world_size()
        _check_trained_size(network, settings, workers)
        buffers = NvmeBuffers.for_network(network, settings.dtype.itemsize, workers)
        config = settings.deepspeed_config(micro_batch, buffers)
        if settings.zero_stage == 3:
            _partition(network, settings.dtype, config)
        free_extensions()
        self._engine, *_ = deepspeed.initialize(
            model=network,
            model_parameters=[p for p in network.parameters() if p.requires_grad],
            config=config,
            dist_init_required=not torch.distributed.is_initialized(),
        )
        self.network = self._engine
        self._average = (
            [part.detach().float().clone() for part in self._parts()]
            if settings.ema_decay > 0
            else None
        )
        self.steps = 0
        self.stopwatch = Stopwatch(self.device)

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return torch.device(self._engine.device)

    @property
    def accumulated(self) -> int:
        """Micro-batches since the last optimizer step; a checkpoint keeps no gradients of them."""
        return int(self._engine.micro_steps) % self.settings.gradient_accumulation

    def step(self, loss: Tensor, progress: float) -> float | None:
        """Backward, and at an accumulation boundary one optimizer step.

        Args:
            loss: scalar of this rank's micro-batch.
            progress: share of the run that is done, for the learning rate.

        Returns:
            The norm of the gradient before clipping, or None between boundaries.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(progress)
        self.stopwatch.start()
        self._engine.backward(loss)
        self.stopwatch.mark("backward")
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            self.stopwatch.mark("optimizer")
            return None
        norm = None
        if self.settings.zero_stage == 0:  # DeepSpeed keeps the norm only where it shards
            gradients = [p.grad for p in self._trainable() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        self.steps += 1
        self._update_average()
        self.stopwatch.mark("optimizer")
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def state_dict(self, average: bool = True) -> dict[str, Tensor]:
        """Whole float32 weights by parameter name, the average of the weights if there is one;
        without frozen parameters, which are as they were."""
        import deepspeed

        with self.averaged() if average else contextlib.nullcontext():
            result = {}
            for name, parameter in self._named_trainable():
                with deepspeed.zero.GatheredParameters(
                    [parameter], enabled=self.settings.zero_stage == 3
                ):
                    result[name] = parameter.detach().float().cpu().clone()
        self._forget_order()
        return result

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network computes with the average of its weights; take no step in here."""
        if self._average is None:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint: trained weights, optimizer, average, and `state`, each rank its part;
        readable back by `load`."""
        rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._engine.save_checkpoint(
            str(folder),
            tag=checkpoints.ENGINE_FOLDER,
            client_state={"teasr": state},
            exclude_frozen_parameters=True,
        )
        sharded = self.settings.zero_stage == 3
        if self._average is not None and (sharded or rank == 0):
            names = [name for name, _ in self._named_trainable()]
            checkpoints.save_average(folder, dict(zip(names, self._average)), rank)
        if rank == 0:
            checkpoints.Layout(
                workers=workers,
                zero_stage=self.settings.zero_stage,
                average=self._average is not None,
            ).write(folder)

    def load(self, folder: Path) -> dict[str, Any]:
        """Take up a checkpoint of `save`, at whatever number of workers, and return its `state`.

        Frozen parameters stay as they are. Written by another number of workers, it is converted
        first (DeepSpeed's universal checkpoint), in a temporary folder.

        Raises:
            TeasrError: when the folder holds no checkpoint that fits.
        """
        layout = checkpoints.Layout.read(folder)
        if layout.zero_stage != self.settings.zero_stage or (
            self._average is not None and not layout.average
        ):
            raise TeasrError(
                f"{folder} holds a checkpoint of other engine settings: "
                f"zero_stage={layout.zero_stage}, "
                f"{'an' if layout.average else 'no'} average of the weights.",
                "engine.zero_stage and engine.ema_decay must be those of the run that wrote it.",
            )
        # Without ZeRO every rank has everything: any number of workers reads it.
        if self.settings.zero_stage and layout.workers != torch.distributed.get_world_size():
            with checkpoints.universal(folder) as converted:
                client = self._load(converted, universal=True)
        else:
            client = self._load(folder, universal=False)
        if self._average is not None:
            self._load_average(folder, layout)
        self.steps = int(self._engine.global_steps)
        state: dict[str, Any] = client["teasr"]
        return state

    def _load(self, folder: Path, universal: bool) -> dict[str, Any]:
        config = self._engine._config
        config.load_universal_checkpoint = universal
        try:
            _, client = self._engine.load_checkpoint(
                str(folder), tag=checkpoints.ENGINE_FOLDER, custom_load_fn=_load_trained
            )
        finally:
            config.load_universal_checkpoint = False
        result: dict[str, Any] = client
        return result

    def _load_average(self, folder: Path, layout: checkpoints.Layout) -> None:
        assert self._average is not None
        rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        saved = checkpoints.load_average(folder, layout)
        for average, (name, parameter) in zip(self._average, self._named_trainable()):
            whole = saved[name]
            if self.settings.zero_stage == 3:
                whole = checkpoints.partition(whole, _elements(parameter), rank, workers)
            average.copy_(whole.view_as(average))

    def _forget_order(self) -> None:
        """Have ZeRO-3 learn anew in which order parameters are used.

        Parameters that were gathered apart from a pass are otherwise looked for in a queue that no
        longer has them ("tracing error"; seen in the second step after a load).
        """
        if self.settings.zero_stage == 3:
            coordinator = self._engine.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def _named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        named = self._engine.module.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._named_trainable()]

    def _parts(self) -> list[Tensor]:
        """What this rank holds of each trained parameter: all of it, or under ZeRO-3 a flat slice
        of the fp32 weights, which never leave memory."""
        if self.settings.zero_stage < 3:
            return [parameter.data for parameter in self._trainable()]
        optimizer = self._engine.optimizer
        return [
            optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)[0].data
            for parameter in self._trainable()
        ]

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None:
            return
        decay = self.settings.ema_decay_at(self.steps)
        for average, part in zip(self._average, self._parts()):
            average.lerp_(part.float(), 1 - decay)

    @torch.no_grad()
    def _swap(self) -> None:
        assert self._average is not None
        if self._kept is None:
            self._kept = [part.clone() for part in self._parts()]
            source = self._average
        else:
            source, self._kept = self._kept, None
        for part, value in zip(self._parts(), source):
            part.copy_(value)
        if self.settings.zero_stage < 3:
            return
        optimizer = self._engine.optimizer
        for group in range(len(optimizer.fp16_groups)):  # of whatever type
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay gathered on every rank: drop those copies, now stale.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)

    _kept: list[Tensor] | None = None


def _prepare(network: nn.Module, settings: EngineSettings) -> None:
    """What the settings say about the network itself."""
    for parameter in network.parameters():
        if not parameter.requires_grad and parameter.dtype in (torch.float32, torch.bfloat16):
            parameter.data = parameter.data.to(settings.dtype)
    set_gradient_checkpointing(network, settings)


@torch.no_grad()
def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Copy what is trained from a state dict; frozen weights may be read-only files."""
    for name, parameter in dst.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(src[name])


def _partition(network: nn.Module, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Cut the parameters up for ZeRO-3, one after the other.

    Left alone, DeepSpeed moves the whole network to the device before it cuts anything, which a
    network for several devices does not fit. Then it has rank 0 overwrite each parameter on all
    ranks: weights that are mapped files, read-only, must be copied first, one at a time.
    """
    import deepspeed

    parameters: list[Any] = list(network.parameters())
    convert: Any = None
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype, copy=True)
        if convert is None:
            first = nn.Module()
            first.register_parameter("parameter", parameter)
            deepspeed.zero.Init(module=first, config_dict_or_path=config)
            convert = parameter.convert_to_zero_parameters  # by the same group and swapper
        else:
            convert(param_list=[parameter])
    device = deepspeed.get_accelerator().current_device_name()
    for buffer in network.buffers():
        buffer.data = buffer.data.to(device)


def set_gradient_checkpointing(network: nn.Module, settings: EngineSettings) -> None:
    """Give every part of the network that can compute its activations again the settings' choice.

    Raises:
        UsageError: when it is asked of a network with no such part.
    """
    able: list[Any] = [
        part for part in network.modules() if hasattr(part, "gradient_checkpointing")
    ]
    if settings.gradient_checkpointing and not able:
        raise UsageError(
            f"engine.gradient_checkpointing: {type(network).__name__} cannot compute its "
            "activations a second time.",
            "Set it to false.",
        )
    for part in able:
        part.gradient_checkpointing = settings.gradient_checkpointing


def _check_trained_size(network: nn.Module, settings: EngineSettings, workers: int) -> None:
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    if settings.offload_parameters == "nvme" and trained > TRAINED_IN_MEMORY * workers:
        raise UsageError(
            f"engine.offload_parameters=nvme: {trained / 1e9:.1f} billion elements are trained; "
            f"DeepSpeed 0.19 cannot load checkpoints of more than {TRAINED_IN_MEMORY / 1e9:.0f} "
            "billion per worker from NVMe.",
            "Set engine.offload_parameters=cpu, train with more workers, or train fewer "
            "parameters (frozen ones may go to NVMe, however many they are).",
        )


def _elements(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 has cut it up."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def give_back_freed_memory(pieces: int = 64 << 10) -> None:
    """Have this process give pieces of memory of so many bytes back to the system when it frees
    them, in place of keeping them in a heap with holes (glibc; elsewhere nothing happens).

    On a CPU a frozen base with adapters takes up to a third less memory then, and a step of a small
    one up to 1.5 times as long (docs/benchmarks.md, the planner): pages come anew each time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, pieces)
