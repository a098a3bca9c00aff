"""What a model's training looked like from its input's side: figures of low-resolution pictures.

A training sees small crops; a window as `teasr.drift` measures it is cut out of the same
photographs and degraded by the same presets, so that the figures compare with those of whole
pictures that come in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np

from pipelines.feed import FeedSettings
from pipelines.look import choose
from teasr.degradation import SCALE, Degradation, sample_seed
from teasr.drift import WINDOW, Reference, looks, sizes
from teasr.images import BadPicture, Bytes, decode
from teasr.shards import SHARD_PICTURES, read_manifest


def training_inputs(data: str, settings: FeedSettings, count: int = 500) -> Reference:
    """Figures of `count` low-resolution windows of the photographs at `data`, one of each
    photograph while there are enough. Equal arguments give equal figures.

    Raises:
        UsageError: when there is no HR dataset at `data`.
        TeasrError: when a shard cannot be read.
    """
    figures: dict[str, list[float]] = {}
    for window in islice(_windows(data, settings, count), count):
        for name, value in window.items():
            figures.setdefault(name, []).append(value)
    manifest = read_manifest(data, kind="hr")
    presets = ", ".join(settings.presets)
    about = (
        f"windows of {manifest.samples} photographs ({manifest.fingerprint}), degraded: {presets}"
    )
    return Reference(figures, about)


def _windows(data: str, settings: FeedSettings, count: int) -> Iterator[dict[str, float]]:
    photographs = read_manifest(data, kind="hr").samples
    degradations = [Degradation(name, settings.seed) for name in settings.presets]
    shares = [*settings.presets.values()]
    for sample in choose(data, count, settings.seed):
        encoded = next(sample.members[s] for s in SHARD_PICTURES if s in sample.members)
        try:
            photo = decode(encoded, min_side=SCALE).rgb
        except BadPicture:  # the feed replaces it too
            continue
        for variant in range(math.ceil(count / max(photographs, 1))):
            random = np.random.default_rng(
                sample_seed(settings.seed, "inputs", sample.key, variant)
            )
            degrade = degradations[random.choice(len(degradations), p=shares)]
            yield _window(photo, degrade, sample.key, variant, random)


def _window(
    photo: Bytes, degrade: Degradation, key: str, variant: int, random: np.random.Generator
) -> dict[str, float]:
    height, width = photo.shape[:2]
    rows, columns = (min(side // SCALE, WINDOW) * SCALE for side in (height, width))
    top, left = int(random.integers(height - rows + 1)), int(random.integers(width - columns + 1))
    hr = np.ascontiguousarray(photo[top : top + rows, left : left + columns])
    pair = degrade(hr, key, variant)
    figures = sizes(width // SCALE, height // SCALE) | looks(pair.lr)
    # What a file would say of itself: the last time that it was saved.
    for step in pair.recipe["steps"]:
        if step["operator"] == "jpeg":
            figures["jpeg_quality"] = float(step["params"]["quality"])
    return figures
