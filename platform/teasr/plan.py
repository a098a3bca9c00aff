"""A plan: what a training step needs of a machine, before anything is loaded.

Memory is a sheet of parts. Some are held throughout (weights, optimizer states, libraries); others
come and go with the phases of a step, and the largest phase counts. Weights, states and buffers
follow from the network's shapes and from what DeepSpeed allocates for each ZeRO stage; activations
from a rehearsal of the step (`teasr.rehearsal`). On a CPU the device is the host.

Sizes that no shape tells are constants below, each with where it comes from. Rates are measured
here or given; times that follow from them are estimates: the slowest of computing, copying and
reading, which go on side by side, and the optimizer after them.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch

from teasr.backbones import DiTSettings
from teasr.backbones.folder import compute_dtype
from teasr.backbones.latent import LatentBackbone
from teasr.engine import EngineSettings, NvmeBuffers
from teasr.errors import UsageError
from teasr.objective import ObjectiveSettings
from teasr.rehearsal import (
    Rehearsal,
    Shape,
    codec_of,
    network_of,
    perceptual_network,
    rehearse,
)

GB = 10**9
MB = 10**6

LIBRARIES = 450 * MB
"""Anonymous memory of a worker with torch, Ray, DeepSpeed and MLflow that trains next to nothing:
measured (`benchmarks/plan.py`, its first row, without LPIPS)."""
RAY = 1500 * MB
"""Anonymous memory of Ray's own processes (0.3 GB), of actors that drive a training and its feed
(0.9 GB) and of one feed worker (0.3 GB), summed up while one ran."""
CUDA_CONTEXT = 600 * MB
"""Device memory of a CUDA context with cuBLAS and cuDNN; not measured here."""
DEVICE_SHARE = 0.92
"""Share of a GPU's memory that tensors can have: the rest is lost between the allocator's blocks;
not measured here."""
BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, elements."""
SUB_GROUP = 1_000_000_000
"""DeepSpeed's default `sub_group_size`: elements that ZeRO-3 updates at a time."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`: elements gathered on the device at a time."""
PREFETCH = 50_000_000
"""DeepSpeed's default `stage3_prefetch_bucket_size`, elements."""
UTILISATION = 0.4
"""Share of the rate of large matrix products that a step reaches (measured, teasr-s on a CPU)."""
OPTIMIZER_BYTES = 60
"""Bytes that AdamW moves through memory per element, operation by operation."""
HEAP_VARIABLE = "MALLOC_MMAP_THRESHOLD_"
"""Set to 65536 it leaves hardly a heap (see `teasr.rehearsal`): memory on a CPU is what is
alive. Of pretrained backbones that is so without it (`teasr.engine.give_back_freed_memory`)."""
CLEARLY = 1.1
"""A run is refused when it needs this many times the memory there is."""

Place = Literal["device", "host", "mapped", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "mapped", "disk")


# --------------------------------------------------------------------------- machine


@dataclass(frozen=True)
class Rate:
    """Something per second, and how one knows: `measured here`, `given` or `assumed`."""

    value: float
    origin: str


@dataclass(frozen=True)
class Machine:
    """What a job runs on.

    Attributes:
        gpus: GPUs. gpu_memory: bytes of each.
        host_memory: bytes. disk: free bytes.
        flops: per second and worker, of large matrix products in the compute type.
        host_bandwidth: bytes per second between host memory and a GPU.
        disk_bandwidth: bytes per second of reading.
        memory_bandwidth: bytes per second of host memory, for the optimizer.
    """

    gpus: int
    gpu_memory: int
    host_memory: int
    disk: int
    flops: Rate
    host_bandwidth: Rate
    disk_bandwidth: Rate
    memory_bandwidth: Rate

    @classmethod
    def here(cls, folder: Path | None = None) -> Machine:
        """This machine, its rates measured in a second; a disk's is assumed.

        Args:
            folder: on the disk that counts; None: the working folder.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        memory = torch.cuda.get_device_properties(0).total_memory if gpus else 0
        device = torch.device("cuda" if gpus else "cpu")
        return cls(
            gpus,
            memory,
            host_memory(),
            shutil.disk_usage(folder or Path.cwd()).free,
            Rate(_matrix_rate(device), "measured here"),
            Rate(_copy_rate(device), "measured here") if gpus else Rate(25 * GB, "assumed"),
            Rate(2 * GB, "assumed"),
            Rate(_copy_rate(torch.device("cpu")), "measured here"),
        )

    def with_gpus(self, count: int, memory: int | None) -> Machine:
        """Another machine with `count` GPUs of `memory` bytes; rates of GPUs that are not here are
        assumed."""
        if count == 0:
            return replace(self, gpus=0, gpu_memory=0)
        if memory is None and not self.gpu_memory:
            raise UsageError(
                "--gpus: how much memory each GPU has is not said, and there is none here.",
                "Add --gpu-memory, such as --gpu-memory 24GB.",
            )
        if self.gpus:
            return replace(self, gpus=count, gpu_memory=memory or self.gpu_memory)
        return replace(
            self, gpus=count, gpu_memory=cast(int, memory), flops=Rate(150e12, "assumed")
        )


def host_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            total = min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):
            continue
    return total


def _matrix_rate(device: torch.device, side: int = 2048) -> float:
    dtype = compute_dtype()
    a = torch.ones(side, side, dtype=dtype, device=device)
    best = 0.0
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - begin))
    return best


def _copy_rate(device: torch.device, size: int = 256 * MB) -> float:
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.ones(size, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - begin))
    return best


# --------------------------------------------------------------------------- job


@dataclass(frozen=True)
class Job:
    """What is trained and how; the parts of a recipe that a plan depends on.

    Attributes:
        batch: samples per worker and micro-batch.
        crop: side of the HR crops in pixels.
        gpu: one GPU per worker; else the CPU computes.
        lpips: whether the perceptual term has its weights.
        frozen_bits: 8 holds the frozen linear weights of the blocks in int8.
        checkpoints: those that are on disk at a time.
    """

    shape: Shape
    objective: ObjectiveSettings
    engine: EngineSettings
    crop: int
    batch: int
    workers: int = 1
    gpu: bool = False
    lpips: bool = True
    frozen_bits: int | None = None
    checkpoints: int = 3

    @property
    def pretrained(self) -> bool:
        """Whether a frozen base carries what is trained."""
        return not isinstance(self.shape, DiTSettings)

    @property
    def dtype(self) -> torch.dtype:
        """Compute type."""
        fixed = {"bf16": torch.bfloat16, "fp32": torch.float32}
        chosen = fixed.get(self.engine.precision)
        return chosen or (torch.bfloat16 if self.gpu else compute_dtype())

    def rehearsal(self) -> Rehearsal:
        """Its micro-batch by shapes alone."""
        return rehearse(
            self.shape,
            self.objective,
            crop=self.crop,
            batch=self.batch,
            dtype=self.dtype,
            lpips=self.lpips and self.objective.pixel_lpips > 0,
            averaged=self.engine.ema_decay > 0,
            gradient_checkpointing=self.engine.gradient_checkpointing,
            heap=not (self.gpu or self.pretrained or HEAP_VARIABLE in os.environ),
        )


@dataclass(frozen=True)
class Counts:
    """Elements and bytes of a network.

    Attributes:
        trained, frozen: elements.
        largest: elements of the largest trained tensor.
        block_bytes: frozen bytes of each block that can be streamed, in the compute type.
        linear: elements of the blocks' frozen matrices, which may be held in 8 bits.
        codec_bytes, lpips_bytes: of the frozen networks beside it.
    """

    trained: int
    frozen: int
    largest: int
    block_bytes: tuple[int, ...]
    linear: int
    codec_bytes: int
    lpips_bytes: int
    buffers: NvmeBuffers


@lru_cache(maxsize=64)
def count(shape: Shape, dtype: torch.dtype, workers: int) -> Counts:
    """Of the network `shape` on `meta`."""
    network = network_of(shape, dtype)
    parameters = list(network.parameters())
    trained = [p.numel() for p in parameters if p.requires_grad]
    blocks: list[int] = []
    linear = 0
    if isinstance(network, LatentBackbone):
        for name in network.blocks:
            frozen = [p for p in network.get_submodule(name).parameters() if not p.requires_grad]
            blocks.append(sum(p.nbytes for p in frozen))
            linear += sum(p.numel() for p in frozen if p.ndim == 2)
    autoencoder = getattr(codec_of(shape, dtype), "autoencoder", None)
    return Counts(
        trained=sum(trained),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        largest=max(trained),
        block_bytes=tuple(blocks),
        linear=linear,
        codec_bytes=sum(p.nbytes for p in autoencoder.parameters()) if autoencoder else 0,
        lpips_bytes=sum(p.nbytes for p in perceptual_network(dtype).parameters()),
        buffers=NvmeBuffers.for_network(network, dtype.itemsize, workers),
    )


# --------------------------------------------------------------------------- the sheet


@dataclass(frozen=True)
class Part:
    """Bytes of one thing in one place, of one worker."""

    name: str
    place: Place
    size: float


@dataclass
class Sheet:
    """Memory of one worker.

    Attributes:
        held: what is there throughout.
        phases: what comes and goes, by the name of the phase.
        gpu: whether the device has memory of its own.
    """

    gpu: bool
    held: list[Part] = field(default_factory=list)
    phases: dict[str, list[Part]] = field(default_factory=dict)

    def hold(self, name: str, place: Place, size: float) -> None:
        """Add what is there throughout."""
        self._add(self.held, name, place, size)

    def phase(self, phase: str, *parts: tuple[str, Place, float]) -> None:
        """Add a phase."""
        chosen = self.phases.setdefault(phase, [])
        for part in parts:
            self._add(chosen, *part)

    def peak(self, place: Place) -> float:
        """Most bytes at a time in `place`."""
        return sum(part.size for part in self.at_peak(place))

    def peak_phase(self, place: Place) -> str:
        """The phase in which `place` holds most."""
        return max(self.phases, key=lambda name: _sum(self.phases[name], place), default="")

    def at_peak(self, place: Place) -> list[Part]:
        """What is in `place` then, the largest first."""
        parts = [*self.held, *self.phases.get(self.peak_phase(place), [])]
        return sorted((p for p in parts if p.place == place), key=lambda part: -part.size)

    def _add(self, parts: list[Part], name: str, place: Place, size: float) -> None:
        if size > 0:
            where: Place = "host" if place == "device" and not self.gpu else place
            parts.append(Part(name, where, size))


def _sum(parts: Iterable[Part], place: Place) -> float:
    return sum(part.size for part in parts if part.place == place)


def sheet_of(job: Job) -> Sheet:
    """Memory of one worker of `job`."""
    engine, counts = job.engine, count(job.shape, job.dtype, job.workers)
    rehearsal = job.rehearsal()
    sheet = Sheet(job.gpu)
    sheet.hold("libraries", "host", LIBRARIES)
    sheet.hold("CUDA context", "device", CUDA_CONTEXT if job.gpu else 0)
    sheet.hold("autoencoder", "device", counts.codec_bytes)
    if job.lpips and job.objective.pixel_lpips > 0:
        sheet.hold("LPIPS", "device", counts.lpips_bytes)
    _hold_frozen(sheet, job, counts)
    if engine.offload_parameters == "stream":
        _streamed(sheet, job, counts, rehearsal)
    elif engine.zero_stage == 0:
        _stage_0(sheet, job, counts, rehearsal)
    elif engine.zero_stage < 3:
        _stage_1_and_2(sheet, job, counts, rehearsal)
    else:
        _stage_3(sheet, job, counts, rehearsal)
    return sheet


def _hold_frozen(sheet: Sheet, job: Job, counts: Counts) -> None:
    engine, size = job.engine, counts.frozen * job.dtype.itemsize
    name = "frozen weights"
    if not size:
        return
    if engine.offload_parameters == "stream":
        blocks = sum(counts.block_bytes)
        window = 2 * max(counts.block_bytes) + engine.stream_cache_gb * GB
        sheet.hold(f"{name} beside the blocks", "device", size - blocks)
        sheet.hold(f"{name}, files", "disk", size)
        if job.gpu:
            sheet.hold(f"{name}, window", "device", min(window, blocks))
            sheet.hold("pinned buffers", "host", 2 * max(counts.block_bytes))
        else:
            sheet.hold(f"{name}, window", "mapped", min(window, blocks))
        return
    if job.frozen_bits == 8:
        size -= counts.linear * (job.dtype.itemsize - 1)
    if engine.zero_stage == 3:
        place: Place = {"none": "device", "cpu": "host", "nvme": "disk"}[engine.offload_parameters]  # type: ignore[assignment]
        sheet.hold(name, place, size / job.workers)
    elif job.gpu or job.frozen_bits:
        sheet.hold(name, "device", size)
    else:
        sheet.hold(name, "mapped", size)


def _compute_phases(
    sheet: Sheet, rehearsal: Rehearsal, beside: tuple[tuple[str, Place, float], ...], kept: float
) -> tuple[str, Place, float]:
    """The passes, with gradients as they come into being.

    Args:
        kept: bytes of the weights that are set aside while their average is asked.

    Returns:
        What the heap has in the end, whatever is freed.
    """
    averaged = any(phase.name == "averaged" for phase in rehearsal.phases) and rehearsal.heap > 0
    before = max(kept - rehearsal.heap_with_gradients, 0.0) if averaged else 0.0
    for index, phase in enumerate(rehearsal.phases):
        gradients = phase.with_gradients - phase.activations
        own: list[tuple[str, Place, float]] = [
            ("activations", "device", phase.activations),
            ("gradients so far", "device", gradients),
        ]
        if phase.name == "averaged":
            own.append(("weights that the average stands in for", "device", kept))
        else:
            own.append(_heap(before))
        sheet.phase(f"{phase.name} {index}", *own, *beside)
    return _heap(rehearsal.heap_with_gradients + before)


def _without_gradients(rehearsal: Rehearsal) -> Rehearsal:
    """For engines that hold the gradients elsewhere."""
    phases = tuple(replace(p, with_gradients=p.activations) for p in rehearsal.phases)
    return replace(rehearsal, phases=phases, heap_with_gradients=rehearsal.heap)


def _heap(size: float) -> tuple[str, Place, float]:
    """What the heap keeps of activations and gradients that are gone."""
    return "freed pieces that the heap keeps", "device", max(size, 0.0)


def _adam(elements: float, gpu: bool) -> float:
    """Bytes that torch's AdamW needs for the moment: a root and, one tensor at a time on a CPU, a
    quotient beside it."""
    return elements * (4 if gpu else 8)


def _stage_0(sheet: Sheet, job: Job, counts: Counts, rehearsal: Rehearsal) -> None:
    """Everything whole on every worker; gradients are averaged in one flat copy."""
    trained, size = counts.trained, job.dtype.itemsize
    sheet.hold("trained weights", "device", trained * size)
    sheet.hold("moments", "device", 8 * trained)
    _hold_average(sheet, job, trained, "device")
    accumulated: tuple[tuple[str, Place, float], ...] = ()
    if job.engine.gradient_accumulation > 1:
        accumulated = (("gradients", "device", trained * size),)
        rehearsal = _without_gradients(rehearsal)
    heap = _compute_phases(sheet, rehearsal, accumulated, trained * size)
    gradients: tuple[str, Place, float] = ("gradients", "device", trained * size)
    if not accumulated:  # they are pieces of that heap
        heap = _heap(heap[2] - trained * size)
    bucket = min(trained, BUCKET) * size
    if size == 4:
        sheet.phase("reduce", gradients, heap, ("flat gradients", "device", bucket))
        temporary = _adam(trained if job.gpu else counts.largest, job.gpu)
        sheet.phase("optimizer", gradients, heap, ("AdamW's temporaries", "device", temporary))
        return
    sheet.hold("masters", "device", 4 * trained)
    sheet.phase("reduce", gradients, heap, ("flat gradients", "device", bucket))
    sheet.phase(
        "optimizer",
        heap,
        ("gradients in float32", "device", 4 * trained),
        ("AdamW's temporaries", "device", _adam(trained, job.gpu)),
    )


def _stage_1_and_2(sheet: Sheet, job: Job, counts: Counts, rehearsal: Rehearsal) -> None:
    """Optimizer states of a share; at stage 2 gradients of a share once they are reduced."""
    trained, size = counts.trained, job.dtype.itemsize
    share = trained / job.workers
    offload = job.engine.offload_optimizer == "cpu"
    states: Place = "host" if offload else "device"
    sheet.hold("trained weights", "device", trained * size)
    sheet.hold("masters", states, 4 * share)
    sheet.hold("moments", states, 8 * share)
    _hold_average(sheet, job, trained, "device")
    if offload:
        sheet.hold("gradients in float32", "host", 4 * share)
        sheet.hold("weights on their way back", "host", size * share)
        sheet.hold("offload buffers", "host", size * counts.largest)
        sheet.hold("offload buffers on the device", "device", size * counts.largest)
    bucket = BUCKET * size if job.gpu else min(trained, BUCKET) * size
    beside: tuple[tuple[str, Place, float], ...] = ()
    if job.engine.zero_stage == 2:  # reduced while they come
        beside = (("reduction bucket", "device", bucket), ("gradients", "device", size * share))
        rehearsal = _without_gradients(rehearsal)
    elif job.engine.gradient_accumulation > 1:
        beside = (("gradients", "device", size * trained),)
        rehearsal = _without_gradients(rehearsal)
    heap = _compute_phases(sheet, rehearsal, beside, trained * size)
    partition = 0.0 if offload else size * share
    held = size * trained if job.gpu and job.engine.zero_stage == 1 else 0
    sheet.phase(
        "reduce",
        heap,
        ("gradients", "device", held),
        ("reduction bucket", "device", bucket),
        ("reduced gradients", "device", partition),
    )
    if not offload:
        flat = ("gradients in float32", states, 4 * share)
        copies = 1 if size == 4 else 2  # flat in the compute type, before it is float32
        sheet.phase("flatten", heap, ("reduced gradients", "device", copies * size * share), flat)
        sheet.phase("optimizer", heap, flat, ("AdamW's temporaries", states, _adam(share, job.gpu)))
    else:
        sheet.phase("optimizer", heap, ("AdamW's temporaries", "host", _adam(share, gpu=False)))


def _stage_3(sheet: Sheet, job: Job, counts: Counts, rehearsal: Rehearsal) -> None:
    """A share of everything; parameters are gathered as they are needed."""
    engine, size = job.engine, job.dtype.itemsize
    share = counts.trained / job.workers
    offload = engine.offload_optimizer == "cpu"
    states: Place = "host" if offload else "device"
    away = engine.offload_parameters
    sheet.hold("trained weights", "host" if away != "none" else "device", size * share)
    sheet.hold("masters", states, 4 * share)
    sheet.hold("moments", states, 8 * share)
    _hold_average(sheet, job, share, states)
    sheet.hold("reduced gradients", states, size * share)
    if offload:
        sheet.hold("gradients in float32", "host", 4 * share)
    bucket = BUCKET if job.gpu else min(counts.trained, BUCKET)
    sheet.hold("reduction bucket", "device", size * bucket)
    if job.workers > 1 or (job.gpu and away != "none"):
        everything = counts.trained + counts.frozen
        gathered = min(everything, LIVE_PARAMETERS + PREFETCH)
        sheet.hold("gathered weights", "device", size * gathered)
    if away == "nvme":
        sheet.hold("NVMe buffers", "host", size * counts.buffers.count * counts.buffers.elements)
        sheet.hold("swapped weights", "disk", size * share)
    heap = _compute_phases(sheet, _without_gradients(rehearsal), (), 4 * share)
    group = min(share, SUB_GROUP)
    if not offload:
        flat = ("gradients in float32", states, 4 * group)
        sheet.phase("optimizer", heap, flat, ("AdamW's temporaries", states, _adam(group, job.gpu)))
        if size < 4:
            sheet.phase("flatten", heap, ("flat gradients", states, size * group), flat)
    else:
        sheet.phase("optimizer", heap, ("AdamW's temporaries", "host", _adam(group, gpu=False)))


def _streamed(sheet: Sheet, job: Job, counts: Counts, rehearsal: Rehearsal) -> None:
    """`teasr.streaming.StreamedEngine`: plain torch, one tensor of the adapters at a time."""
    trained, size = counts.trained, job.dtype.itemsize
    states: Place = "host" if job.engine.offload_optimizer == "cpu" else "device"
    sheet.hold("trained weights", "device", trained * size)
    apart = size < 4 or (job.gpu and states == "host")
    sheet.hold("masters", states, 4 * trained if apart else 0)
    sheet.hold("moments", states, 8 * trained)
    _hold_average(sheet, job, trained, states)
    beside: tuple[tuple[str, Place, float], ...] = ()
    if job.engine.gradient_accumulation > 1:
        beside = (("gradients", "device", trained * size),)
        rehearsal = _without_gradients(rehearsal)
    heap = _compute_phases(sheet, rehearsal, beside, trained * size)
    if not beside:  # each gradient gives way to its float32 copy
        heap = _heap(heap[2] - trained * size)
    grouped = job.gpu and states == "device"
    sheet.phase(
        "optimizer",
        heap,
        ("gradients in float32", states, 4 * trained),
        ("AdamW's temporaries", states, _adam(trained if grouped else counts.largest, grouped)),
    )


def _hold_average(sheet: Sheet, job: Job, elements: float, place: Place) -> None:
    if job.engine.ema_decay > 0:
        sheet.hold("average of the weights", place, 4 * elements)


# --------------------------------------------------------------------------- the estimate


@dataclass(frozen=True)
class Traffic:
    """Bytes that move per optimizer step and worker.

    Attributes:
        sweeps: passes over all weights, forward and backward.
        disk: read from disk. link: copied between host memory and the device. workers: gathered
            from other workers.
    """

    sweeps: int
    disk: float
    link: float
    workers: float


@dataclass(frozen=True)
class Shortage:
    """What does not fit.

    Attributes:
        place: where. need, have: bytes.
        largest: the part that takes most there.
    """

    place: Place
    need: float
    have: float
    largest: Part

    def __str__(self) -> str:
        where = {"device": "the GPU", "host": "host memory", "disk": "the disk"}[self.place]
        return (
            f"{where} would have to hold {gigabytes(self.need)} and has {gigabytes(self.have)} "
            f"({gigabytes(self.need - self.have)} too little); the largest part is "
            f"{self.largest.name}, {gigabytes(self.largest.size)}"
        )


@dataclass(frozen=True)
class Estimate:
    """A job on a machine.

    Attributes:
        needs: bytes by place: `device` of one GPU, `host` of all workers and Ray, `mapped` pages of
            files that the system may drop, `disk`.
        have: bytes by place.
        seconds: of an optimizer step by what takes them: `compute`, `disk`, `link`, `optimizer`.
        shortages: what does not fit.
    """

    job: Job
    sheet: Sheet
    needs: dict[Place, float]
    have: dict[Place, float]
    traffic: Traffic
    flops: float
    seconds: dict[str, float]
    shortages: tuple[Shortage, ...]

    @property
    def fits(self) -> bool:
        """Whether all of it fits."""
        return not self.shortages

    @property
    def step_seconds(self) -> float:
        """Of an optimizer step: computing, reading and copying go on side by side."""
        others = [value for name, value in self.seconds.items() if name != "optimizer"]
        return max(others) + self.seconds["optimizer"]


def estimate(job: Job, machine: Machine) -> Estimate:
    """What `job` needs, whether `machine` has it, and how long a step takes.

    Raises:
        UsageError: more workers with a GPU than the machine has GPUs.
    """
    if job.gpu and job.workers > machine.gpus:
        raise UsageError(
            f"training.workers={job.workers} with a GPU each; the machine has {machine.gpus}.",
            "Lower training.workers, or set training.gpu=false.",
        )
    sheet = sheet_of(job)
    have: dict[Place, float] = {
        "device": machine.gpu_memory * DEVICE_SHARE if job.gpu else 0,
        "host": machine.host_memory,
        "mapped": machine.host_memory,
        "disk": machine.disk,
    }
    needs: dict[Place, float] = {
        "device": sheet.peak("device"),
        "host": job.workers * sheet.peak("host") + RAY,
        "mapped": sheet.peak("mapped"),
        "disk": sheet.peak("disk") * (job.workers if job.engine.zero_stage == 3 else 1)
        + _checkpoints(job),
    }
    traffic = _traffic(job)
    flops = job.rehearsal().flops * job.engine.gradient_accumulation
    counts = count(job.shape, job.dtype, job.workers)
    on_host = not job.gpu or job.engine.offload_optimizer == "cpu"
    share = counts.trained / (job.workers if job.engine.zero_stage else 1)
    seconds = {
        "compute": flops / (machine.flops.value * UTILISATION),
        "disk": traffic.disk * job.workers / machine.disk_bandwidth.value,
        "link": (traffic.link + traffic.workers) / machine.host_bandwidth.value if job.gpu else 0.0,
        "optimizer": OPTIMIZER_BYTES * share / machine.memory_bandwidth.value if on_host else 0.0,
    }
    checked: tuple[Place, ...] = ("device", "host", "disk")
    shortages = tuple(
        Shortage(place, needs[place], have[place], _largest(sheet, place, job))
        for place in checked
        if needs[place] > have[place]
    )
    return Estimate(job, sheet, needs, have, traffic, flops, seconds, shortages)


def _largest(sheet: Sheet, place: Place, job: Job) -> Part:
    parts = sheet.at_peak(place)
    if place == "disk":
        parts = [*parts, Part("checkpoints", "disk", _checkpoints(job))]
    return max(parts, key=lambda part: part.size)


def _checkpoints(job: Job) -> float:
    """Bytes of the checkpoints that are kept, and of the one that is being written."""
    trained = count(job.shape, job.dtype, job.workers).trained
    average = 4 if job.engine.ema_decay > 0 else 0
    return job.checkpoints * trained * (job.dtype.itemsize + 12 + average + 4)


def _traffic(job: Job) -> Traffic:
    engine, counts = job.engine, count(job.shape, job.dtype, job.workers)
    sweeps = job.rehearsal().sweeps * engine.gradient_accumulation
    size = job.dtype.itemsize
    everything = (counts.trained + counts.frozen) * size
    disk = link = gathered = 0.0
    if engine.offload_parameters == "stream":
        blocks = sum(counts.block_bytes)
        moved = max(blocks - engine.stream_cache_gb * GB, 0.0)
        disk = sweeps * moved
        link = disk if job.gpu else 0.0
    elif engine.zero_stage == 3:
        if engine.offload_parameters == "nvme":
            disk = sweeps * counts.frozen * size / job.workers
        if engine.offload_parameters != "none" and job.gpu:
            link = sweeps * everything / job.workers
        gathered = sweeps * everything * (job.workers - 1) / job.workers
    elif job.workers > 1:
        gathered = 2 * counts.trained * size * (job.workers - 1) / job.workers
    if engine.offload_optimizer == "cpu" and job.gpu:  # gradients there, weights back
        link += 2 * size * counts.trained / job.workers
    return Traffic(sweeps, disk, link, gathered)


# --------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Choice:
    """Another way to run a job.

    Attributes:
        overrides: what to change in the recipe, to copy; empty: nothing.
    """

    overrides: tuple[str, ...]
    estimate: Estimate


def choices(job: Job, machine: Machine) -> list[Choice]:
    """Every setting that is tried, with the same samples per optimizer step: those that fit first,
    the fastest of them first, among equals the simplest; then those that miss by least."""
    found = [Choice(overrides, estimate(changed, machine)) for overrides, changed in _variants(job)]

    def rank(one: Choice) -> tuple[float, float]:
        missing = sum(short.need - short.have for short in one.estimate.shortages)
        return missing, one.estimate.step_seconds

    return sorted(found, key=rank)


def _variants(job: Job) -> Iterator[tuple[tuple[str, ...], Job]]:
    yield (), job
    batch, accumulation = job.batch, job.engine.gradient_accumulation
    while batch >= 1:
        for checkpointing in (False, True):
            for placement, bits in _placements(job):
                changes = {
                    **placement,
                    "gradient_checkpointing": checkpointing,
                    "gradient_accumulation": accumulation,
                }
                settings = {**job.engine.model_dump(), **changes}
                engine = EngineSettings.model_validate(settings)
                changed = replace(job, engine=engine, batch=batch, frozen_bits=bits)
                if changed != job:
                    yield _overrides(job, changed), changed
        if batch % 2:
            return
        batch, accumulation = batch // 2, accumulation * 2


def _placements(job: Job) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Where weights and states may be, the least trouble first."""
    nothing = {"offload_parameters": "none", "offload_optimizer": "none", "stream_cache_gb": 0.0}
    stage = job.engine.zero_stage
    whole = stage if stage in (1, 2) else 1
    bits = [job.frozen_bits] if not job.pretrained or job.frozen_bits else [None, 8]
    for held in bits:
        yield {**nothing, "zero_stage": whole}, held
        if job.gpu:
            yield {**nothing, "zero_stage": whole, "offload_optimizer": "cpu"}, held
    if job.workers > 1:
        yield {**nothing, "zero_stage": 3}, None
    if job.gpu:
        away = {**nothing, "zero_stage": 3, "offload_optimizer": "cpu"}
        if job.workers > 1:
            yield away, None
        yield {**away, "offload_parameters": "cpu"}, None
        path = job.engine.nvme_path or "/nvme"
        yield {**away, "offload_parameters": "nvme", "nvme_path": path}, None
    if job.pretrained and job.workers == 1:
        streamed = {**nothing, "zero_stage": 0, "offload_parameters": "stream"}
        yield streamed, None
        if job.gpu:
            yield {**streamed, "offload_optimizer": "cpu"}, None


def _overrides(job: Job, changed: Job) -> tuple[str, ...]:
    before, after = job.engine.model_dump(), changed.engine.model_dump()
    found = [
        f"engine.{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in after.items()
        if value != before[name]
    ]
    if changed.batch != job.batch:
        found.insert(0, f"training.batch={changed.batch}")
    if changed.frozen_bits != job.frozen_bits:
        found.append(f"backbone.frozen_bits={changed.frozen_bits or 'null'}")
    return tuple(found)


# --------------------------------------------------------------------------- sizes for people


def gigabytes(size: float) -> str:
    """`size` bytes as people read them."""
    return f"{size / GB:.1f} GB" if size >= 0.05 * GB else f"{size / MB:.0f} MB"


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str, option: str) -> int:
    """Bytes of `24GB`, `24GiB`, `500 MB` or a plain number.

    Raises:
        UsageError: naming `option`.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or (found[3] and not found[2]):
        raise UsageError(f"{option} {text}: a size such as 24GB or 24GiB is expected.")
    unit = _UNITS[found[2].upper()]
    if found[3]:
        unit = 1024 ** "KMGT".index(found[2].upper()) * 1024
    return int(float(found[1]) * unit)
