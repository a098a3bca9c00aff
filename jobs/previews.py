"""Pictures made while a model is trained: a few fixed pairs, always with the same noise.

All workers make them together, since the network may be cut up among them; nothing that training
draws from is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from jobs.networks import Trainee
from jobs.recipe import Recipe
from pipelines.feed import training_pass
from teasr.backbones import Backbone
from teasr.degradation import SCALE
from teasr.images import decode
from teasr.metrics import psnr_y
from teasr.restoration import RestorationSettings, restore
from teasr.shards import join_url, read_manifest, read_shard
from teasr.sheets import Row, sheet

Bytes = NDArray[np.uint8]

SIDE = 256
"""Longest side of a preview in HR pixels; the middle of a larger picture is taken."""


@dataclass(frozen=True)
class Pair:
    """One picture to preview: `hr` (H, W, 3) and `lr` (H/4, W/4, 3), uint8 RGB."""

    key: str
    hr: Bytes
    lr: Bytes


@dataclass(frozen=True)
class Preview:
    """What the model makes of the pairs.

    Attributes:
        psnr_y: mean in dB by number of sampling steps.
        sheet: a row per pair.
    """

    psnr_y: dict[int, float]
    sheet: Image.Image


def preview_pairs(recipe: Recipe) -> list[Pair]:
    """The pairs that previews of `recipe` are made of, always the same.

    They are spread over the benchmark; without one, they are the first crop of each of the first
    photographs that are learned from.
    """
    count = recipe.training.previews
    if recipe.benchmark is not None:
        return list(_benchmark_pairs(recipe.benchmark, count))
    assert recipe.data is not None
    once = recipe.feed.model_copy(update={"crops_per_photo": 1})
    blocks = training_pass(recipe.data, once, rows=1)({"pass": np.array([0])})
    return [
        Pair(f"crop {block['number'][0]}", block["hr"][0], block["lr"][0])
        for block in islice(blocks, count)
    ]


def _benchmark_pairs(pairs: str, count: int) -> Iterator[Pair]:
    manifest = read_manifest(pairs, kind="pairs")
    count = min(count, manifest.samples)
    wanted = {round(i * (manifest.samples - 1) / max(count - 1, 1)) for i in range(count)}
    first = 0
    for shard in manifest.shards:
        inside = {index - first for index in wanted if first <= index < first + shard.samples}
        first += shard.samples
        if not inside:
            continue
        for index, sample in enumerate(read_shard(join_url(pairs, shard.name), kind="pairs")):
            if index in inside:
                hr, lr = (decode(sample.members[name]).rgb for name in ("hr.png", "lr.png"))
                yield Pair(sample.key, *_middle(hr, lr))


def _middle(hr: Bytes, lr: Bytes) -> tuple[Bytes, Bytes]:
    high, wide = (min(side, SIDE // SCALE) for side in lr.shape[:2])
    top, left = (lr.shape[0] - high) // 2, (lr.shape[1] - wide) // 2
    box = slice(top, top + high), slice(left, left + wide)
    large = tuple(slice(part.start * SCALE, part.stop * SCALE) for part in box)
    return np.ascontiguousarray(hr[large]), np.ascontiguousarray(lr[box])


def preview(trainee: Trainee, pairs: Sequence[Pair], steps: Sequence[int]) -> Preview:
    """Restore `pairs` by the average of the weights.

    Collective: every worker calls it, with the same arguments.

    Args:
        steps: numbers of sampling steps, one column each.
    """
    shown = cast(Backbone, _Shown(trainee))
    restored: dict[int, list[Bytes]] = {}
    with trainee.engine.averaged(), _evaluation_mode(trainee.network):
        for count in steps:
            settings = RestorationSettings(steps=count)
            restored[count] = [
                restore(shown, pair.lr, settings, codec=trainee.codec) for pair in pairs
            ]
    scores = {
        count: [psnr_y(picture, pair.hr) for picture, pair in zip(pictures, pairs)]
        for count, pictures in restored.items()
    }
    rows = [
        Row(
            pair.key,
            [pair.lr, *(restored[count][i] for count in steps), pair.hr],
            ["", *(f"{scores[count][i]:.2f} dB" for count in steps), ""],
        )
        for i, pair in enumerate(pairs)
    ]
    names = [f"{count} step{'s' if count > 1 else ''}" for count in steps]
    means = {count: float(np.mean(values)) for count, values in scores.items()}
    return Preview(means, sheet(rows, ["LR", *names, "HR"]))


class _Shown:
    """A network under training as `restore` takes it.

    One that is partitioned has its weights inside its `forward` alone, so that nothing is prepared
    before.
    """

    def __init__(self, trainee: Trainee) -> None:
        self._sizes = trainee.network
        self._network: Callable[..., Tensor] = trainee.engine.network
        self._place = torch.empty(0, device=trainee.engine.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sizes, name)

    def parameters(self) -> Iterator[Tensor]:
        yield self._place

    def prepare(self, condition: Tensor) -> Tensor:
        return condition

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        return self._network(x_t, t, r, condition)


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
