"""One whole optimizer step of TEASR at full size, on a machine with less memory than weights.

    python benchmarks/giant.py --folder DIR [--model qwen-image|z-image] [--crop 64] [--keep]
    python benchmarks/giant.py --engine zero3 --model z-image

The weights are random and of the published shapes: 20.4 billion parameters of Qwen-Image or 6.2
billion of Z-Image. What is measured does not depend on their values: memory, bytes, time, and
whether every loss is a finite number.

`--engine streamed` (the default) writes them to DIR once, in bfloat16, and streams them from there
(`teasr.streaming`): every term of the objective, LoRA on both branches, AdamW with float32 masters,
an average of the weights, gradient checkpointing. A sweep is one pass over all blocks.

`--engine zero3` holds them in host memory through DeepSpeed ZeRO-3 with parameters and optimizer
offloaded, and compares with distillation from a teacher (`teasr.dmd`: student, fake network and
frozen teacher). At the full size the other side is computed from the shapes; with a few layers both
run and are measured, each in a process of its own.

Memory is anonymous memory (RssAnon): what a process needs for itself, without the pages of files,
which the system drops when others need room. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch import Tensor, nn

from teasr.backbones.branch_lora import LoraPair
from teasr.backbones.codec import AutoencoderCodec
from teasr.backbones.latent import LatentBackbone
from teasr.backbones.pretrained import KINDS, meta_backbone
from teasr.backbones.safetensors_files import find_tensors
from teasr.dmd import TeacherStudent, judges
from teasr.engine import Engine, EngineSettings
from teasr.errors import TeasrError
from teasr.lpips import Lpips, find_weights
from teasr.objective import Objective, ObjectiveSettings
from teasr.rehearsal import AUTOENCODERS, LAYERS
from teasr.streaming import StreamedBase, StreamedEngine, write_random

GIB = 2**30
BYTES_PER_TRAINED = {"bfloat16 weight": 2, "gradient": 2, "float32 master": 4, "moments": 8}


# --------------------------------------------------------------------------------- this process


def memory(key: str = "RssAnon") -> int:
    """Bytes by `key` of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 0


def disk_reads() -> int:
    """Bytes that this process has had read from a disk."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1])
    return 0


class Watch:
    """Samples memory every 20 ms, and says when a sweep is done."""

    def __init__(self, base: StreamedBase | None = None) -> None:
        self.peak = self.mapped = 0
        self.swept: list[float] = []
        self._base = base
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._begin = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, memory())
        self.mapped = max(self.mapped, memory("RssFile"))
        if self._base and self._base.traffic.sweeps >= len(self.swept) + 1:
            self.swept.append(time.perf_counter() - self._begin)
            note(f"sweep {len(self.swept)} ends after {self.swept[-1]:.0f} s")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def disk_rate(path: Path, size: int = GIB) -> float:
    """Bytes per second of reading the beginning of `path` past the page cache."""
    buffer = mmap.mmap(-1, 16 << 20)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without it
        return 0.0
    try:
        done, begin = 0, time.perf_counter()
        while done < size and (read := os.preadv(descriptor, [buffer], done)):
            done += read
        return done / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------- what is trained


def settings_of(model: str, layers: int | None) -> dict[str, Any]:
    """Settings of the transformer that are not the published model's."""
    return {} if layers is None else {LAYERS[model]: layers}


def plain_transformer(model: str, layers: int | None) -> nn.Module:
    """diffusers' own network on `meta`: names and shapes of what is on disk."""
    import diffusers

    with torch.device("meta"):
        made: nn.Module = getattr(diffusers, KINDS[model].transformer)(**settings_of(model, layers))
    return made


def make_backbone(model: str, layers: int | None, rank: int, values: Path | None) -> LatentBackbone:
    """The network with values for what is trained; frozen weights stay on `meta` where `values`
    has them, else they are drawn here."""
    backbone = meta_backbone(model, settings_of(model, layers), rank=rank)  # type: ignore[arg-type]
    torch.manual_seed(0)
    # Every frozen value first: the second embedder is a copy of the first.
    if values is None:
        draw(backbone)
    for module in list(backbone.modules()):
        if isinstance(module, LoraPair):
            for layer in (module.lora_A, module.lora_B):
                layer.to_empty(device="cpu")
            nn.init.kaiming_uniform_(module.lora_A.weight, a=5**0.5)
            nn.init.zeros_(module.lora_B.weight)
    backbone.prompt = torch.randn(backbone.prompt.shape).to(backbone.dtype)
    embedder = backbone.target_embedder.to_empty(device="cpu")
    level = backbone._level_embedder()
    own = next(name for name, part in backbone.named_modules() if part is level)
    places = find_tensors(values) if values else {}
    with torch.no_grad():
        for name, parameter in embedder.named_parameters():
            if values:
                place = places[backbone.stored_name(f"{own}.{name}")]
                data = bytearray(place.size)
                with place.path.open("rb") as stream:
                    stream.seek(place.start)
                    stream.readinto(data)
                source = torch.frombuffer(data, dtype=place.dtype).view(place.shape)
            else:
                source = level.get_parameter(name)
            parameter.copy_(source)
    return backbone


def draw(backbone: nn.Module) -> None:
    """Values in ordinary memory for everything frozen: scaled as `write_random` scales."""
    made: dict[int, nn.Parameter] = {}
    for module in backbone.modules():
        for name, old in module._parameters.items():
            if old is None or old.requires_grad:
                continue
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype)
                if old.ndim > 1:
                    bound = (3 / old[0].numel()) ** 0.5
                    new.uniform_(-bound, bound)
                else:
                    new.fill_(1.0 if name == "weight" else 0.0)
                made[id(old)] = nn.Parameter(new, requires_grad=False)
            module._parameters[name] = made[id(old)]


def make_codec(model: str) -> AutoencoderCodec:
    """The autoencoder of the published shape with random weights."""
    import diffusers

    torch.manual_seed(1)
    spec = KINDS[model]
    autoencoder = getattr(diffusers, spec.autoencoder)(**AUTOENCODERS[model])
    return spec.codec(autoencoder.to(torch.bfloat16))


class DecodedLpips:
    """LPIPS of latents: both are decoded first."""

    def __init__(self, codec: AutoencoderCodec, lpips: Lpips) -> None:
        self.codec, self.lpips = codec, lpips

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.codec.decode(y)
        distance: Tensor = self.lpips(self.codec.decode(x), target)
        return distance


def engine_settings(**changes: Any) -> EngineSettings:
    return EngineSettings(
        precision="bf16",
        learning_rate=1e-4,
        warmup_share=0.0,
        gradient_checkpointing=True,
        **changes,
    )


def one_step(
    engine: Any, codec: AutoencoderCodec, objective: Objective, crop: int
) -> dict[str, Any]:
    """Losses by term and the norm of the gradient of one step on a random picture, and which of the
    trained tensors it moved."""
    before = engine.state_dict(average=False)
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, crop, crop, generator=generator) * 2 - 1
    low = nn.functional.interpolate(picture, scale_factor=1 / codec.scale, mode="area")
    x, condition = codec.encode(picture), codec.condition(low)
    others: dict[str, Any] = {}
    if objective.settings.teacher:
        others = dict(judges(engine.network))
    begin, worked = time.perf_counter(), time.process_time()
    losses = objective(engine.network, x, condition, generator, **others)
    norm = engine.step(losses.total, 0.0)
    seconds, worked = time.perf_counter() - begin, time.process_time() - worked
    after = engine.state_dict(average=False)
    moved = sum(not torch.equal(after[name], value) for name, value in before.items())
    terms = {name: round(float(value.mean()), 4) for name, value in losses.terms.items()}
    return {
        "losses": terms,
        "gradient_norm": norm,
        "finite": losses.is_finite()
        and norm is not None
        and bool(torch.isfinite(torch.tensor(norm))),
        "tensors_moved": moved,
        "tensors_trained": len(before),
        "seconds": seconds,
        "processor_seconds": worked,
    }


def make_objective(codec: AutoencoderCodec, teacher: bool, lpips: Path | None) -> Objective:
    terms: dict[str, Any] = {"pixel_l1": 1.0}
    if teacher:  # distribution matching has no consistency terms
        terms |= {"teacher": True, "any_step": 0.0, "end_to_end": 0.0, "flow_matching": 0.0}
    found = find_weights("vgg", lpips)
    distance = DecodedLpips(codec, Lpips.load(found, torch.bfloat16)) if found else None
    return Objective(ObjectiveSettings(**terms), distance)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ streamed from disk


def streamed(arguments: argparse.Namespace) -> dict[str, Any]:
    layers = f"-{arguments.layers}-layers" if arguments.layers else ""
    folder = arguments.folder / (arguments.model + layers)
    plain = plain_transformer(arguments.model, arguments.layers)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    begin = time.perf_counter()

    def progress(done: int, total: int) -> None:
        note(
            f"written {done / 1e9:.1f} of {total / 1e9:.1f} GB, {time.perf_counter() - begin:.0f} s"
        )

    index = write_random(plain, folder, progress=progress)
    rate = disk_rate(sorted(folder.glob("*.safetensors"))[0])
    codec = make_codec(arguments.model)
    objective = make_objective(codec, False, arguments.lpips)
    libraries = memory()
    reads = disk_reads()
    with Watch() as building:
        backbone = make_backbone(arguments.model, arguments.layers, arguments.rank, folder)
        base = StreamedBase(
            backbone,
            folder,
            backbone.blocks,
            names=backbone.stored_name,
            keep_bytes=int(arguments.cache * GIB),
        )
        engine = StreamedEngine(base, engine_settings())
    loaded = disk_reads() - reads
    note(f"ready; {sum(base.traffic.block_bytes) / 1e9:.1f} GB in {len(backbone.blocks)} blocks")
    reads = disk_reads()
    with Watch(base) as watch:
        step = one_step(engine, codec, objective, arguments.crop)
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    sweeps = base.traffic.sweeps
    result = {
        "model": arguments.model,
        "engine": "streamed",
        "parameters": parameters,
        "trained_parameters": trained,
        "rank": arguments.rank,
        "crop": arguments.crop,
        "peak_anonymous_gib": round(max(building.peak, watch.peak) / GIB, 2),
        "libraries_gib": round(libraries / GIB, 2),
        "peak_mapped_gib": round(watch.mapped / GIB, 2),
        "weights_gib": round(sum(p.size for p in find_tensors(folder).values()) / GIB, 2),
        "sweeps": round(sweeps, 2),
        "seconds_per_step": round(step["seconds"], 1),
        "seconds_per_sweep": round(step["seconds"] / sweeps, 1),
        "processor_seconds_per_sweep": round(step["processor_seconds"] / sweeps, 1),
        "visited_gb": round(base.traffic.bytes_visited / 1e9, 1),
        "fetched_gb": round(base.traffic.bytes_fetched / 1e9, 1),
        "read_from_disk_gb": round((disk_reads() - reads) / 1e9, 1),
        "read_before_gb": round(loaded / 1e9, 2),
        "disk_gb_per_s": round(rate / 1e9, 2),
        **{name: value for name, value in step.items() if "seconds" not in name},
    }
    base.close()
    if not arguments.keep:
        index.unlink()  # first, so that what is left is never taken for whole
        shutil.rmtree(folder)
    return result


# ------------------------------------------------------------------- in host memory, through ZeRO-3


def in_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """One measured step of one design in this process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed  # noqa: F401  seconds, and memory that is not the design's

    teacher = arguments.measure == "dmd"
    codec = make_codec(arguments.model)
    objective = make_objective(codec, teacher, arguments.lpips)
    before = memory()
    with Watch() as watch:
        backbone = make_backbone(arguments.model, arguments.layers, arguments.rank, None)
        frozen = sum(
            p.numel() for p in set(backbone.transformer.parameters()) if not p.requires_grad
        )
        network = TeacherStudent(backbone) if teacher else backbone
        note(f"{frozen:,} parameters drawn; {memory() / GIB:.1f} GiB")
        settings = engine_settings(zero_stage=3, offload_parameters="cpu", offload_optimizer="cpu")
        engine = Engine(network, settings, micro_batch=1)
        note(f"engine ready; {memory() / GIB:.1f} GiB")
        step = one_step(engine, codec, objective, arguments.crop)
    return {
        "parameters": frozen,
        "trained_parameters": sum(v.numel() for v in engine.state_dict(average=False).values()),
        "peak_anonymous_gib": round(watch.peak / GIB, 2),
        "design_gib": round((watch.peak - before) / GIB, 3),
        **step,
    }


def measured(arguments: argparse.Namespace, design: str, layers: int | None) -> dict[str, Any]:
    """`in_memory` in a process of its own."""
    command = [sys.executable, __file__, "--engine", "zero3", "--measure", design]
    command += ["--model", arguments.model, "--crop", str(arguments.crop)]
    command += ["--rank", str(arguments.rank)]
    command += [] if layers is None else ["--layers", str(layers)]
    command += [] if arguments.lpips is None else ["--lpips", str(arguments.lpips)]
    note(f"{design}, {layers or 'all'} layers")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise TeasrError(f"The {design} step ended with code {done.returncode}.")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def needs(frozen: int, trained: int) -> float:
    """GiB of a design's weights, gradients and optimizer states."""
    return (2 * frozen + sum(BYTES_PER_TRAINED.values()) * trained) / GIB


def zero3(arguments: argparse.Namespace) -> dict[str, Any]:
    backbone = meta_backbone(
        arguments.model, settings_of(arguments.model, arguments.layers), rank=arguments.rank
    )
    weights = set(backbone.parameters())
    base = sum(p.numel() for p in weights if not p.requires_grad)
    lora = sum(p.numel() for p in weights if p.requires_grad)
    computed = {
        "teasr": needs(base, lora),
        "dmd, adapters": needs(3 * base + lora, 2 * lora),
        "dmd, all weights": needs(base, 2 * base),
    }
    small = arguments.compare_layers
    pair = {design: measured(arguments, design, small) for design in ("teasr", "dmd")}
    full = measured(arguments, "teasr", arguments.layers)
    ratio = pair["teasr"]["design_gib"] / pair["dmd"]["design_gib"]
    print(f"| weights, gradients, optimizer of {base:,} parameters | GiB | ours over it |")
    print("|---|---|---|")
    for name, size in computed.items():
        print(f"| {name} (computed) | {size:.1f} | {computed['teasr'] / size:.0%} |")
    print(f"| teasr (measured, with all else) | {full['design_gib']:.1f} | |")
    print(
        f"\n{small} layers, measured: teasr {pair['teasr']['design_gib']:.2f} GiB, dmd with "
        f"adapters {pair['dmd']['design_gib']:.2f} GiB: {ratio:.0%}\n"
    )
    return {
        "model": arguments.model,
        "engine": "zero3",
        "rank": arguments.rank,
        "crop": arguments.crop,
        **full,
        "seconds_per_step": round(full["seconds"], 1),
        "computed_gib": {name: round(size, 2) for name, size in computed.items()},
        "ratio_computed_adapters": round(computed["teasr"] / computed["dmd, adapters"], 3),
        "ratio_computed_all_weights": round(computed["teasr"] / computed["dmd, all weights"], 3),
        "ratio_measured": round(ratio, 3),
        "compare_layers": small,
        "compare_finite": all(one["finite"] for one in pair.values()),
    }


def show(result: dict[str, Any], names: Iterable[str]) -> None:
    print("| | |\n|---|---|")
    for name in names:
        if name in result:
            value = result[name]
            print(
                f"| {name.replace('_', ' ')} | {value:,} |"
                if isinstance(value, int | float)
                else f"| {name.replace('_', ' ')} | {value} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen-image", choices=sorted(LAYERS))
    parser.add_argument("--engine", default="streamed", choices=["streamed", "zero3"])
    parser.add_argument("--folder", type=Path, help="where the weights are written (streamed)")
    parser.add_argument("--keep", action="store_true", help="leave them there for the next time")
    parser.add_argument("--crop", type=int, default=64, help="pixels of the HR crop")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--layers", type=int, help="fewer layers than the published model")
    parser.add_argument("--cache", type=float, default=0.0, help="GiB of blocks that stay cached")
    parser.add_argument("--lpips", type=Path, help="folder of lpips_vgg.safetensors")
    parser.add_argument("--compare-layers", type=int, default=2, help="where both designs run")
    parser.add_argument("--quick", action="store_true", help="two layers of the network")
    parser.add_argument("--measure", choices=["teasr", "dmd"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine == "streamed" and arguments.folder is None:
        parser.error("--folder is needed: a folder on a fast local disk")
    if arguments.quick and arguments.layers is None:
        arguments.layers = 2
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        if arguments.measure:
            print(json.dumps(in_memory(arguments)))
            return
        result = streamed(arguments) if arguments.engine == "streamed" else zero3(arguments)
    except TeasrError as error:
        sys.exit(str(error))
    show(result, [name for name in result if not isinstance(result[name], dict)])
    print("\n" + ", ".join(f"{name} {value}" for name, value in result["losses"].items()))
    with suppress(BrokenPipeError):
        print(json.dumps(result))


if __name__ == "__main__":
    main()
