"""The training feed: HR shards in, an endless stream of degraded crops out, made while training
runs.

One row of the Ray dataset is one *pass* over one shard: decode each photograph once, take several
crops of it, degrade each, and hand out the crops of all the shard's photographs in shuffled order.
Only encoded photographs and fixed-size crops move between processes. Which shard comes when, where
a crop lies and how it is degraded are functions of (seed, epoch, key) alone: the stream is the same
with one worker or two hundred, and after a task is retried.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import albumentations as A
import numpy as np
import ray.data
from numpy.typing import NDArray
from pydantic import Field, field_validator
from ray.data import Dataset

from teasr.config import Settings
from teasr.degradation import DegradationSettings, RealESRGAN, load_preset, sample_seed
from teasr.errors import TeasrError
from teasr.images import BadPicture, decode
from teasr.shards import SHARD_PICTURES, Manifest, join_url, read_manifest, read_shard

Bytes = NDArray[np.uint8]

MAX_BLOCKS = 128
OUTPUT_BYTES = 4 << 20
log = logging.getLogger(__name__)


class FeedSettings(Settings):
    """What is cut out of the photographs and how it is degraded."""

    preset: str = "teasr"
    """Degradation preset, or a YAML file."""
    crop: int = Field(96, ge=16)
    """Side of an HR crop in pixels, a multiple of 16; the LR crop is a quarter of it."""
    crops_per_photo: int = Field(16, ge=1)
    """Crops taken each time a photograph is decoded."""
    seed: int = Field(0, ge=0)
    """Seed of order, crops and degradations."""

    @field_validator("crop")
    @classmethod
    def _whole_tokens(cls, value: int) -> int:
        if value % 16:
            raise ValueError("a multiple of 16 is expected")
        return value


def feed(data: str, settings: FeedSettings, samples: int, first_pass: int = 0) -> Dataset:
    """At least `samples` training pairs of the stream, from pass `first_pass` on.

    Args:
        data: URL of an HR dataset.
        samples: how many pairs the consumer may ask for; the stream is lazy, asking is free.
        first_pass: passes over shards that are skipped, see `locate`.

    Returns:
        A dataset with columns `hr` (crop, crop, 3) and `lr` (crop/4, crop/4, 3), uint8 RGB.

    Raises:
        UsageError: when there is no HR dataset at `data`, or the preset is unknown.
    """
    manifest = read_manifest(data, kind="hr")
    epochs = -(-samples // samples_per_epoch(manifest, settings)) + 1
    count = epochs * len(manifest.shards)
    # Ray plans every block before the first one runs: a long run gets few blocks of many passes.
    # Crops leave a task in small blocks while it goes on, and in order, so that the stream is one.
    passes = ray.data.range(count, override_num_blocks=min(count, MAX_BLOCKS))
    passes.context.target_max_block_size = OUTPUT_BYTES
    passes.context.execution_options.preserve_order = True
    plan = training_pass(data, settings, first_pass)
    return passes.map_batches(plan, batch_size=1, zero_copy_batch=True, num_cpus=1)


def training_pass(data: str, settings: FeedSettings, first_pass: int = 0) -> TrainingPass:
    """What the feed runs in its tasks, for `data` and `settings`."""
    return TrainingPass(
        data=data,
        shards=tuple(shard.name for shard in read_manifest(data, kind="hr").shards),
        degradation=load_preset(settings.preset),
        settings=settings,
        first=first_pass,
    )


def samples_per_epoch(manifest: Manifest, settings: FeedSettings) -> int:
    """Pairs in one pass over the whole dataset."""
    return manifest.samples * settings.crops_per_photo


def locate(manifest: Manifest, settings: FeedSettings, consumed: int) -> tuple[int, int]:
    """Where the stream stands after `consumed` pairs: (passes finished, pairs into the next)."""
    epochs, rest = divmod(consumed, samples_per_epoch(manifest, settings))
    passes = epochs * len(manifest.shards)
    for index in shard_order(settings.seed, epochs, len(manifest.shards)):
        size = manifest.shards[index].samples * settings.crops_per_photo
        if rest < size:
            break
        passes, rest = passes + 1, rest - size
    return passes, rest


def shard_order(seed: int, epoch: int, shards: int) -> NDArray[np.int64]:
    """The order of shards in an epoch, as a permutation of their indices."""
    return np.random.default_rng((seed, epoch)).permutation(shards)


@dataclass(frozen=True)
class TrainingPass:
    """Makes the pairs of one pass over one shard; a plain object that travels to Ray's tasks.

    Called with `{"id": [i]}` for the i-th pass from `first` on, it yields blocks of the feed's
    columns.
    """

    data: str
    shards: tuple[str, ...]
    degradation: DegradationSettings
    settings: FeedSettings
    first: int = 0

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, Bytes]]:
        epoch, place = divmod(self.first + int(batch["id"][0]), len(self.shards))
        seed = self.settings.seed
        shard = self.shards[shard_order(seed, epoch, len(self.shards))[place]]
        pairs = list(self._pairs(join_url(self.data, shard), epoch))
        if not pairs:
            raise TeasrError(
                f"No photograph of shard {shard} is as large as a crop "
                f"({self.settings.crop} pixels).",
                "Use larger photographs or a smaller crop.",
            )
        np.random.default_rng((seed, epoch, place)).shuffle(pairs)  # type: ignore[arg-type]
        for i in range(0, len(pairs), 32):
            chunk = pairs[i : i + 32]
            yield {"hr": np.stack([hr for hr, _ in chunk]), "lr": np.stack([lr for _, lr in chunk])}

    def _pairs(self, url: str, epoch: int) -> Iterator[tuple[Bytes, Bytes]]:
        settings = self.settings
        place = A.Compose([A.RandomCrop(settings.crop, settings.crop), A.D4(p=1.0)])
        degrade = A.Compose([RealESRGAN(self.degradation)])
        for sample in read_shard(url):
            encoded = next(
                sample.members[suffix] for suffix in SHARD_PICTURES if suffix in sample.members
            )
            try:
                photo = decode(encoded).rgb
            except BadPicture as error:  # checked at ingest: the shard was damaged since
                log.warning("Left out %s: %s", sample.key, error)
                continue
            if min(photo.shape[:2]) < settings.crop:
                log.warning("Left out %s: smaller than a crop of %d", sample.key, settings.crop)
                continue
            for i in range(settings.crops_per_photo):
                variant = epoch * settings.crops_per_photo + i
                place.set_random_seed(sample_seed(settings.seed, "place", sample.key, variant))
                degrade.set_random_seed(
                    sample_seed(settings.seed, self.degradation.name, sample.key, variant)
                )
                hr = np.ascontiguousarray(place(image=photo)["image"])
                yield hr, degrade(image=hr)["image"]
