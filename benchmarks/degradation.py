"""Images per second of the degradation on one core, over BasicSR's operators (torch, CPU).

    python benchmarks/degradation.py [--quick]

Both sides degrade the same crops with the same drawn parameters, one thread each, turn by turn; the
medians of the ratios are compared. BasicSR 1.4.2 runs as its data sets use it, a crop at a time
with parameters of its own, and also as one batch of crops that share all parameters, which suits it
best. Its source distribution is fetched with pip. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tests`, which is not installed

import cv2
import numpy as np
import torch

from benchmarks.pictures import picture
from teasr.degradation import PRESETS, Step, apply, draw
from teasr.degradation.steps import OPERATORS
from tests.reference import basicsr

BATCH = 8


def drawn(preset: str, size: int, seed: int) -> list[Step]:
    return draw(PRESETS[preset], size, size, np.random.default_rng(seed))


def seconds(work) -> float:  # type: ignore[no-untyped-def]
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare(
    reference: basicsr.BasicSR, preset: str, size: int, crops: int
) -> tuple[list[float], list[float]]:
    """Seconds of each crop: ours, theirs."""
    ours, theirs = [], []
    for seed in range(-2, crops):  # two to warm up
        hr, steps = picture(size, size, abs(seed)), drawn(preset, size, abs(seed))
        ours.append(seconds(lambda hr=hr, steps=steps: apply(hr, steps)))
        theirs.append(seconds(lambda hr=hr, steps=steps: reference.degrade(hr, steps)))
    return ours[2:], theirs[2:]


@torch.no_grad()
def batched(reference: basicsr.BasicSR, images: torch.Tensor, steps: list[Step]) -> None:
    """Run `steps` on a batch, with a tensor of one number per picture, as the reference has it."""
    for step in steps:
        params = dict(step.params)
        each = partial(torch.full, (len(images),))
        if step.operator == "jpeg":
            quality = each(min(float(params["quality"]), 99.9))  # NaN at 100
            images = reference._jpeg(images.clamp(0, 1), quality=quality)
        elif step.operator == "gaussian_noise":
            images = reference.degradations.add_gaussian_noise_pt(
                images, each(params["sigma"]), each(float(params["grey"]))
            )
        elif step.operator == "poisson_noise":
            images = reference.degradations.add_poisson_noise_pt(
                images, each(params["scale"]), gray_noise=each(float(params["grey"]))
            )
        else:
            images = getattr(reference, step.operator)(images.contiguous(), **params)


def compare_batches(
    reference: basicsr.BasicSR, preset: str, size: int, batches: int
) -> tuple[list[float], list[float]]:
    """Seconds of each batch: ours in a loop, theirs at once."""
    ours, theirs = [], []
    crops = [picture(size, size, seed) for seed in range(BATCH)]
    images = torch.cat([basicsr.to_tensor(crop) for crop in crops])
    for seed in range(-1, batches):
        steps = drawn(preset, size, 1000 + abs(seed))
        ours.append(seconds(lambda steps=steps: [apply(crop, steps) for crop in crops]))
        theirs.append(seconds(lambda steps=steps: batched(reference, images, steps)))
    return ours[1:], theirs[1:]


def by_operator(reference: basicsr.BasicSR, preset: str, size: int, crops: int) -> None:
    """Print where the time of each side goes."""
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for seed in range(crops):
        hr = picture(size, size, seed).astype(np.float32) / 255
        image = basicsr.to_tensor(hr)
        for step in drawn(preset, size, seed):
            row = spent[step.operator]
            begin = time.perf_counter()
            hr = OPERATORS[step.operator](hr, **step.params)
            middle = time.perf_counter()
            with torch.no_grad():
                image = getattr(reference, step.operator)(image, **step.params)
            row[0] += middle - begin
            row[1] += time.perf_counter() - middle
            row[2] += 1
    print(f"\n{preset}, {size} px: milliseconds per crop by operator")
    print(f"{'':16}{'calls':>8}{'teasr':>10}{'BasicSR':>10}{'ratio':>8}")
    for name, (ours, theirs, calls) in sorted(spent.items(), key=lambda item: -item[1][1]):
        print(
            f"{name:16}{calls / crops:8.2f}{1e3 * ours / crops:10.2f}{1e3 * theirs / crops:10.2f}"
            f"{theirs / ours:8.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer crops")
    crops = 24 if parser.parse_args().quick else 160
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    reference = basicsr.load()
    figures: dict[str, float] = {}
    print(f"{'':34}{'teasr':>9}{'BasicSR':>9}{'ratio':>8}   (images per second; ratio of medians)")
    for size in (256, 400):
        ratios: list[float] = []
        for preset in PRESETS:
            ours, theirs = compare(reference, preset, size, crops)
            each = [b / a for a, b in zip(ours, theirs)]
            ratios += each
            print(
                f"{f'{preset}, {size} px':34}{len(ours) / sum(ours):9.1f}"
                f"{len(theirs) / sum(theirs):9.1f}{statistics.median(each):8.1f}"
            )
        figures[f"speedup_{size}"] = statistics.median(ratios)
        ours, theirs = compare_batches(reference, "realesrgan", size, crops // BATCH)
        each = [b / a for a, b in zip(ours, theirs)]
        figures[f"speedup_batch_{size}"] = statistics.median(each)
        print(
            f"{f'realesrgan, {size} px, batch of {BATCH}':34}{BATCH * len(ours) / sum(ours):9.1f}"
            f"{BATCH * len(theirs) / sum(theirs):9.1f}{statistics.median(each):8.1f}"
        )
    by_operator(reference, "realesrgan", 256, crops // 2)
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
