"""`teasr plan`: does a recipe fit on a machine, with which offload, and how long is a step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from jobs.recipe import Recipe
from teasr.backbones import DiTSettings, PretrainedSettings
from teasr.errors import UsageError
from teasr.lpips import find_weights
from teasr.plan import (
    CLEARLY,
    GB,
    LIBRARIES,
    Choice,
    Estimate,
    Job,
    Machine,
    Rate,
    choices,
    count,
    estimate,
    gigabytes,
    parse_size,
    sheet_of,
)
from teasr.plan import host_memory as memory_here
from teasr.rehearsal import shape_of

PER_TRAINED = 60
PER_PIXEL = 100_000
"""Bytes per trained element, and per HR pixel of a micro-batch of `teasr-s`."""


@dataclass(frozen=True)
class Planned:
    """A recipe on a machine.

    Attributes:
        given: the recipe as it is.
        tried: all settings that were tried, the best first.
    """

    machine: Machine
    given: Estimate
    tried: list[Choice]

    @property
    def best(self) -> Choice | None:
        """The fastest setting that fits."""
        return self.tried[0] if self.tried and self.tried[0].estimate.fits else None


def job_of(recipe: Recipe, lpips: bool = True) -> Job:
    """The parts of `recipe` that a plan depends on.

    Args:
        lpips: whether the machine has LPIPS weights.
    """
    backbone = recipe.backbone
    pretrained = isinstance(backbone, PretrainedSettings)
    return Job(
        shape_of(backbone if pretrained else recipe.backbone_settings),
        recipe.objective,
        recipe.engine,
        crop=recipe.feed.crop,
        batch=recipe.training.batch,
        workers=recipe.training.workers,
        gpu=recipe.training.gpu,
        lpips=lpips,
        frozen_bits=backbone.frozen_bits if pretrained else None,
        checkpoints=recipe.training.keep_last + recipe.training.keep_best,
    )


def machine_of(
    folder: Path,
    *,
    gpus: int | None = None,
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    disk: str | None = None,
    tflops: float | None = None,
    host_bandwidth: str | None = None,
    disk_bandwidth: str | None = None,
) -> Machine:
    """This machine, or another one: what is given takes the place of what is here.

    Args:
        folder: whose disk counts; its nearest parent that exists.

    Raises:
        UsageError: a size that cannot be read, or GPUs of unknown memory.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    machine = Machine.here(place)
    memory = parse_size(gpu_memory, "--gpu-memory") if gpu_memory else None
    if gpus is not None or memory is not None:
        machine = machine.with_gpus(1 if gpus is None else gpus, memory)
    if host_memory:
        machine = replace(machine, host_memory=parse_size(host_memory, "--host-memory"))
    if disk:
        machine = replace(machine, disk=parse_size(disk, "--disk"))
    if tflops:
        machine = replace(machine, flops=Rate(tflops * 1e12, "given"))
    if host_bandwidth:
        size = parse_size(host_bandwidth, "--host-bandwidth")
        machine = replace(machine, host_bandwidth=Rate(size, "given"))
    if disk_bandwidth:
        size = parse_size(disk_bandwidth, "--disk-bandwidth")
        machine = replace(machine, disk_bandwidth=Rate(size, "given"))
    return machine


def plan(recipe: Recipe, machine: Machine, workers: int | None = None) -> Planned:
    """`recipe` on `machine`, and what else would fit there.

    Args:
        workers: in place of the recipe's; with GPUs, one each.
    """
    job = job_of(recipe)
    if workers is not None:
        job = replace(job, workers=workers)
    if machine.gpus and not torch.cuda.is_available():  # asked for a machine that has some
        job = replace(job, gpu=True)
    return Planned(machine, estimate(job, machine), choices(job, machine))


def check_fits(recipe: Recipe, machine: Machine) -> None:
    """Refuse a recipe that this machine has no chance with, before anything is loaded.

    Raises:
        UsageError: with what is too large, by how much, and what would fit.
    """
    job = job_of(recipe, lpips=find_weights("vgg", recipe.lpips) is not None)
    if job.workers * _at_most(job) <= (machine.gpu_memory if job.gpu else machine.host_memory):
        return
    sheet = sheet_of(job)
    needs = {
        "host": job.workers * sheet.peak("host"),
        "device": sheet.peak("device"),
    }
    have = {"host": machine.host_memory, "device": machine.gpu_memory}
    if all(needs[place] <= CLEARLY * have[place] for place in needs):
        return
    planned = Planned(machine, estimate(job, machine), choices(job, machine))
    raise UsageError(f"The recipe does not fit here: {why(planned.given)}.", advice(planned))


def _at_most(job: Job) -> float:
    """Bytes that a worker with a native network never comes near, without a rehearsal, which takes
    seconds: a tenth of `PER_PIXEL` was seen, and in sums of weights and their states a third less
    than `PER_TRAINED`."""
    if not isinstance(job.shape, DiTSettings):
        return math.inf
    shape, teasr_s = job.shape, DiTSettings()
    size = _layers(shape) / _layers(teasr_s)
    trained = count(shape, job.dtype, job.workers).trained
    pixels = job.batch * job.crop**2
    return LIBRARIES + PER_TRAINED * trained + PER_PIXEL * size * pixels


def _layers(shape: DiTSettings) -> int:
    """Channels of all blocks."""
    local = shape.local_width * (shape.stem_depth + shape.head_depth)
    return max(shape.depth * shape.width + local, 1)


def this_machine() -> Machine:
    """Memory of this machine for `check_fits`; rates are of no account there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = torch.cuda.get_device_properties(0).total_memory if gpus else 0
    some = Rate(10.0 * GB, "assumed")
    computes = Rate(1e12, "assumed")
    return Machine(gpus, memory, memory_here(), 10**18, computes, some, some, some)


# --------------------------------------------------------------------------- for people


def why(one: Estimate) -> str:
    """Why it does not fit."""
    return "; ".join(map(str, one.shortages))


def advice(planned: Planned) -> str:
    """What to do."""
    if planned.best is not None:
        return f"What would fit: {' '.join(planned.best.overrides)}"
    return (
        "Nothing that was tried fits: not in smaller micro-batches, nor with checkpointing and "
        "offloading. Lower feed.crop, take a smaller backbone, or a larger machine."
    )


def sentence(planned: Planned) -> str:
    """The plan in a sentence."""
    given, best = planned.given, planned.best
    if not given.fits:
        return f"does not fit: {why(given)}. {advice(planned)}"
    where = f"{gigabytes(given.needs['host'])} of {gigabytes(given.have['host'])} in host memory"
    if given.job.gpu:
        device = f"{gigabytes(given.needs['device'])} of {gigabytes(given.have['device'])}"
        where = f"{device} on the GPU, {where}"
    text = f"fits: {where}; about {_seconds(given.step_seconds)} per optimizer step"
    if best and best.overrides and best.estimate.step_seconds < 0.9 * given.step_seconds:
        faster = _seconds(best.estimate.step_seconds)
        text += f". Faster here, about {faster}: {' '.join(best.overrides)}"
    return text


def parts_table(one: Estimate) -> Table:
    """What is where when most of it is there, of one worker."""
    table = Table(title="Memory of one worker at its peak", title_justify="left")
    table.add_column("")
    places = [place for place in one.needs if one.sheet.at_peak(place)]
    for place in places:
        table.add_column(place, justify="right")
    rows: dict[str, dict[str, float]] = {}
    for place in places:
        for part in one.sheet.at_peak(place):
            row = rows.setdefault(part.name, {})
            row[place] = row.get(place, 0.0) + part.size
    for name, row in sorted(rows.items(), key=lambda item: -sum(item[1].values())):
        table.add_row(name, *(gigabytes(row[p]) if p in row else "" for p in places))
    table.add_section()
    table.add_row("one worker", *(gigabytes(one.sheet.peak(p)) for p in places))
    total = {**one.needs}
    table.add_row("the machine", *(gigabytes(total[p]) for p in places))
    table.add_row("has", *(gigabytes(one.have[p]) for p in places))
    return table


def choices_table(planned: Planned, count: int = 8) -> Table:
    """The best settings that fit, then those that miss by least; memory in GB."""
    table = Table(title="Settings that were tried", title_justify="left")
    table.add_column("setting", overflow="fold")
    for name in ("GPU", "host", "streamed", "s/step", "fits"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in planned.tried[:count]:
        one = choice.estimate
        moved = one.traffic.disk + one.traffic.link + one.traffic.workers
        table.add_row(
            setting(one.job) if choice.overrides else f"as given: {setting(one.job)}",
            f"{one.needs['device'] / GB:.1f}" if one.job.gpu else "-",
            f"{one.needs['host'] / GB:.1f}",
            f"{moved / GB:.1f}",
            f"{one.step_seconds:.1f}",
            "yes" if one.fits else "no",
        )
    return table


def setting(job: Job) -> str:
    """Where a job has what, in words."""
    engine = job.engine
    words = [f"ZeRO-{engine.zero_stage}"]
    if engine.offload_parameters != "none":
        words.append(f"parameters: {engine.offload_parameters}")
    if engine.offload_optimizer != "none":
        words.append(f"optimizer: {engine.offload_optimizer}")
    if job.frozen_bits:
        words.append(f"{job.frozen_bits} bits")
    words.append("checkpointing" if engine.gradient_checkpointing else "no checkpointing")
    return f"{', '.join(words)}, batch {job.batch} x {engine.gradient_accumulation}"


def rates(machine: Machine) -> str:
    """The rates that times rest on, and where they come from."""
    return (
        f"rates: {machine.flops.value / 1e12:.2f} TFLOP/s ({machine.flops.origin}), host to GPU "
        f"{machine.host_bandwidth.value / GB:.1f} GB/s ({machine.host_bandwidth.origin}), disk "
        f"{machine.disk_bandwidth.value / GB:.1f} GB/s ({machine.disk_bandwidth.origin})"
    )


def document(planned: Planned) -> dict[str, Any]:
    """All of it as JSON."""

    def told(one: Estimate) -> dict[str, Any]:
        return {
            "fits": one.fits,
            "needs": {place: round(size) for place, size in one.needs.items()},
            "have": {place: round(size) for place, size in one.have.items()},
            "parts": [
                {"name": part.name, "place": part.place, "bytes": round(part.size)}
                for place in one.needs
                for part in one.sheet.at_peak(place)
            ],
            "sweeps": one.traffic.sweeps,
            "disk_bytes": round(one.traffic.disk),
            "link_bytes": round(one.traffic.link),
            "worker_bytes": round(one.traffic.workers),
            "flops": one.flops,
            "seconds": {name: round(value, 3) for name, value in one.seconds.items()},
            "step_seconds": round(one.step_seconds, 3),
            "shortages": [str(shortage) for shortage in one.shortages],
        }

    best = planned.best
    return {
        "machine": asdict(planned.machine),
        "given": told(planned.given),
        "best": {"overrides": list(best.overrides), **told(best.estimate)} if best else None,
        "sentence": sentence(planned),
    }


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"
