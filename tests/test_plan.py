"""The planner: bytes against closed forms and against what a process allocates; rehearsals against
real steps; what it proposes fits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from teasr.backbones import DiTSettings, DualBranchDiT
from teasr.engine import EngineSettings
from teasr.errors import UsageError
from teasr.objective import Objective, ObjectiveSettings
from teasr.plan import (
    GB,
    LIBRARIES,
    Job,
    Machine,
    Rate,
    choices,
    count,
    estimate,
    parse_size,
    sheet_of,
)
from teasr.rehearsal import HEAP_HOLES, LatentShape, Rehearsal, rehearse

SMALL = DiTSettings(
    width=48, depth=2, heads=3, local_width=16, stem_depth=1, head_depth=1, patch=4, window=8
)
PIXELS = ObjectiveSettings(pixel_l1=1.0, pixel_lpips=0.0)
LATENT = LatentShape("z-image", 4, (("n_layers", 2), ("dim", 256), ("n_heads", 2)))


def machine(gpu_memory: float = 24, host: float = 64, gpus: int = 1, disk: float = 1000) -> Machine:
    rate = Rate(10e9, "given")
    sizes = [int(size * GB) for size in (gpu_memory, host, disk)]
    return Machine(gpus, *sizes, Rate(1e14, "given"), rate, rate, rate)


def job(shape: DiTSettings | LatentShape = SMALL, **changes: object) -> Job:
    engine = EngineSettings.model_validate({"precision": "fp32", "zero_stage": 1})
    base = Job(shape, PIXELS, engine, crop=128, batch=2, lpips=False)
    return replace(base, **changes)  # type: ignore[arg-type]


def engine(**changes: object) -> EngineSettings:
    return EngineSettings.model_validate({"precision": "fp32", **changes})


def rehearsed(shape: DiTSettings = SMALL, batch: int = 2, **changes: object) -> Rehearsal:
    options: dict[str, object] = {
        "crop": 128,
        "batch": batch,
        "dtype": torch.float32,
        "lpips": False,
        "averaged": False,
        "gradient_checkpointing": False,
    }
    return rehearse(shape, PIXELS, **(options | changes))  # type: ignore[arg-type]


def allocated(checkpointing: bool) -> int:
    """Most bytes alive in a real step on this CPU, by torch's own profiler."""
    network = DualBranchDiT(SMALL)
    network.gradient_checkpointing = checkpointing
    x, lr = torch.rand(2, 3, 128, 128), torch.rand(2, 3, 32, 32)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        losses = Objective(PIXELS)(network, x, lr, torch.Generator().manual_seed(0))
        losses.total.backward()
    assert profile.profiler is not None
    found = profile.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events)) + x.nbytes + lr.nbytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rehearsal_holds_what_torch_really_allocates(checkpointing: bool) -> None:
    phases = rehearsed(gradient_checkpointing=checkpointing).phases
    peak = max(phase.with_gradients for phase in phases)
    assert peak == pytest.approx(allocated(checkpointing), rel=0.03)


def test_a_heap_keeps_what_is_freed() -> None:
    alive, kept = rehearsed(batch=2), rehearsed(batch=2, heap=True)
    assert (alive.heap, alive.flops) == (0, kept.flops)
    peak = max(phase.activations for phase in alive.phases)
    # Nothing here is large enough for a piece of its own: the heap is all, at any time.
    assert kept.heap == pytest.approx((1 + HEAP_HOLES) * peak)
    assert {phase.activations for phase in kept.phases} == {kept.heap}


def test_rehearsal_counts_passes_as_the_objective_makes_them() -> None:
    calls: list[bool] = []
    network = DualBranchDiT(SMALL)

    def velocity(*inputs: Tensor) -> Tensor:
        result: Tensor = network(*inputs)
        calls.append(result.requires_grad)
        return result

    x, lr = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 16, 16)
    Objective(PIXELS)(velocity, x, lr, torch.Generator().manual_seed(0))
    found = rehearsed(crop=64)
    assert (found.passes, found.gradient_passes) == (len(calls), sum(calls))
    assert found.sweeps == len(calls) + sum(calls)


def test_a_deep_network_is_continued_in_a_straight_line() -> None:
    whole = rehearsed(SMALL.model_copy(update={"depth": 4}))
    deeper = SMALL.model_copy(update={"depth": 8})
    continued = rehearsed(deeper)
    two = rehearsed(SMALL)
    for low, high, far in zip(two.phases, whole.phases, continued.phases, strict=True):
        assert far.activations == pytest.approx(
            low.activations + 3 * (high.activations - low.activations)
        )
    assert continued.flops == pytest.approx(two.flops + 3 * (whole.flops - two.flops))


def test_checkpointing_takes_memory_for_computation() -> None:
    deep = SMALL.model_copy(update={"depth": 4, "width": 192, "heads": 12})
    plain, again = rehearsed(deep), rehearsed(deep, gradient_checkpointing=True)
    peaks = [max(phase.activations for phase in found.phases) for found in (plain, again)]
    assert peaks[1] < peaks[0]
    assert again.flops > plain.flops


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_held_states_are_the_published_formulas(stage: int, workers: int) -> None:
    """ZeRO (arXiv 1910.02054, figure 1) with 12 bytes of fp32 states per trained element, and an
    average of the weights."""
    given = job(engine=engine(zero_stage=stage, precision="bf16"), workers=workers, gpu=True)
    elements = count(SMALL, torch.bfloat16, workers).trained
    held = {part.name: part.size for part in sheet_of(given).held}
    states = workers if stage else 1
    weights = workers if stage == 3 else 1
    assert held["moments"] == 8 * elements / states
    assert held["masters"] == 4 * elements / states
    assert held["trained weights"] == 2 * elements / weights
    assert held["average of the weights"] == 4 * elements / weights


def test_offloads_move_parts_and_lose_none() -> None:
    here = sheet_of(job(LATENT, engine=engine(zero_stage=3), gpu=True, batch=1))
    away = sheet_of(
        job(
            LATENT,
            engine=engine(zero_stage=3, offload_parameters="cpu", offload_optimizer="cpu"),
            gpu=True,
            batch=1,
        )
    )
    places = {part.name: (part.place, part.size) for part in here.held}
    for part in away.held:
        if part.name in ("moments", "masters", "frozen weights", "trained weights"):
            assert (part.place, places[part.name][0]) == ("host", "device")
            assert part.size == places[part.name][1]
    assert away.peak("device") < here.peak("device")


def test_a_streamed_base_needs_two_blocks_and_reads_all_in_every_sweep() -> None:
    given = job(LATENT, engine=engine(zero_stage=0, offload_parameters="stream"), gpu=True, batch=1)
    counts = count(LATENT, torch.float32, 1)
    held = {part.name: part for part in sheet_of(given).held}
    assert held["frozen weights, window"].size == 2 * max(counts.block_bytes)
    found = estimate(given, machine())
    sweeps = given.rehearsal().sweeps
    assert found.traffic.sweeps == sweeps
    assert found.traffic.disk == found.traffic.link == sweeps * sum(counts.block_bytes)


def test_accumulation_repeats_computing_and_reading() -> None:
    once = job(LATENT, engine=engine(zero_stage=0, offload_parameters="stream"), batch=1)
    thrice = replace(once, engine=once.engine.model_copy(update={"gradient_accumulation": 3}))
    one, three = estimate(once, machine()), estimate(thrice, machine())
    assert three.flops == 3 * one.flops
    assert three.traffic.disk == 3 * one.traffic.disk


def test_what_is_chosen_fits_and_makes_the_same_step() -> None:
    given = job(batch=64)
    needed = estimate(given, machine(gpus=0)).needs["host"]
    little = machine(host=0.9 * needed / GB, gpus=0)
    refused = estimate(given, little)
    assert not refused.fits and refused.shortages[0].place == "host"
    best = choices(given, little)[0]
    assert best.estimate.fits and best.overrides
    changed = best.estimate.job
    assert changed.batch * changed.engine.gradient_accumulation == 64
    assert best.estimate.needs["host"] <= best.estimate.have["host"]


def test_a_shortage_names_the_largest_part_and_by_how_much() -> None:
    found = estimate(job(), machine(host=LIBRARIES / GB, gpus=0))
    (shortage,) = found.shortages
    assert shortage.place == "host"
    assert shortage.need - shortage.have == pytest.approx(found.needs["host"] - LIBRARIES)
    assert "libraries" in str(shortage) or "activations" in str(shortage)


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match="the machine has 1"):
        estimate(job(gpu=True, workers=2), machine())


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("1.5TB", 1.5e12), ("512", 512)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_size(text, "--disk") == size


@pytest.mark.parametrize("text", ["24GX", "many", "iB", ""])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--disk"):
        parse_size(text, "--disk")
