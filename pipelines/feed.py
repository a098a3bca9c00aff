"""The training feed: HR shards in, an endless stream of degraded crops out, made while training
runs.

**One order.** The stream is a sequence of numbered pairs. An epoch takes the shards in a shuffled
order; a *pass* over a shard decodes each photograph once, takes several crops of it, degrades each,
and hands out the crops of all its photographs in shuffled order. Which pair has which number, where
its crop lies and how it is degraded are functions of (seed, epoch, key) alone: the stream is the
same with one worker or two hundred, and after a task is retried.

**A position** (`FeedPosition`) is a small JSON object: data set, seed, epoch, pairs consumed. The
feed starts at any of them. Consumers read in lock-step, batch by batch, so that what they have read
together is always a stretch of the stream without a gap: at the same number of consumers each goes
on with its very next pair; at another number every pair of the epoch still comes exactly once.
Ray Data gives no such promise (its splits have "no ordering guarantees"), so each pair carries its
number, and `LockStep` refuses what comes out of order instead of training on it.

    dataset = feed(data, settings, batch=16, consumers=4, position=position)
    shares = split(dataset, consumers=4)

Only passes' numbers, encoded photographs and fixed-size crops move between processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import cv2
import numpy as np
import ray.data
from numpy.typing import NDArray
from pydantic import Field, field_validator
from ray.data import DataIterator, Dataset

from pipelines import telemetry
from pipelines.runtime import nodes_for, prepare_process, without_torch
from teasr.config import Settings
from teasr.degradation import SCALE, DegradationSettings, load_preset, sample_seed
from teasr.errors import TeasrError, UsageError
from teasr.images import BadPicture, decode
from teasr.shards import SHARD_PICTURES, Manifest, ShardInfo, join_url, read_manifest, read_shard

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

BLOCK = 128
"""Pairs in a block where no number of consumers asks for less: each block costs Ray some 4 ms."""

BATCHES_AHEAD = 4
"""Batches that a consumer asks for before it needs them."""

log = logging.getLogger(__name__)


class FeedSettings(Settings):
    """What is cut out of the photographs and how it is degraded."""

    preset: str | dict[str, float] = "teasr"
    """Degradation preset, or a YAML file; a mapping of such to their shares mixes them."""
    crop: int = Field(96, ge=16)
    """Side of an HR crop in pixels, a multiple of 16; the LR crop is a quarter of it."""
    crops_per_photo: int = Field(16, ge=1)
    """Crops taken each time a photograph is decoded; best a multiple of the batch or a part of it,
    see `block_size`."""
    candidates: int = Field(1, ge=1, le=64)
    """Places drawn for each crop; the one with the most detail is taken. Skies and walls teach
    little, and every crop costs the trainer the same."""
    seed: int = Field(0, ge=0)
    """Seed of order, crops and degradations."""

    @field_validator("preset")
    @classmethod
    def _shares(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(value, dict) and not (value and min(value.values()) > 0):
            raise ValueError("shares above 0 of at least one preset are expected")
        return value

    @property
    def presets(self) -> dict[str, float]:
        """Presets and their shares, which sum to 1."""
        shares = {self.preset: 1.0} if isinstance(self.preset, str) else self.preset
        total = sum(shares.values())
        return {name: share / total for name, share in shares.items()}

    @property
    def main_preset(self) -> str:
        """The preset with the largest share: what a benchmark of the same kind is made with."""
        return max(self.presets, key=lambda name: self.presets[name])

    @field_validator("crop")
    @classmethod
    def _whole_tokens(cls, value: int) -> int:
        if value % 16:
            raise ValueError("a multiple of 16 is expected")
        return value


# ---------------------------------------------------------------- the order


def samples_per_epoch(manifest: Manifest, settings: FeedSettings) -> int:
    """Pairs in one pass over the whole dataset."""
    return manifest.samples * settings.crops_per_photo


def shard_order(seed: int, epoch: int, shards: int) -> Numbers:
    """The order of shards in an epoch, as a permutation of their indices."""
    return np.random.default_rng((seed, epoch)).permutation(shards)


class FeedPosition(Settings):
    """Where a stream stands; as JSON, the feed's part of a checkpoint."""

    dataset: str
    """Fingerprint of the HR dataset."""
    seed: int
    """Seed of the stream."""
    epoch: int = Field(0, ge=0)
    """Epochs that are over."""
    consumed: int = Field(0, ge=0)
    """Pairs of this epoch that were consumed, by all consumers together."""

    @classmethod
    def after(cls, samples: int, manifest: Manifest, settings: FeedSettings) -> Self:
        """The position when `samples` pairs were consumed since the beginning."""
        epoch, consumed = divmod(samples, samples_per_epoch(manifest, settings))
        return cls(dataset=manifest.fingerprint, seed=settings.seed, epoch=epoch, consumed=consumed)

    def number(self, manifest: Manifest, settings: FeedSettings) -> int:
        """The number of the next pair.

        Raises:
            UsageError: when the position is in a stream of other data, seed or number of crops.
        """
        length = samples_per_epoch(manifest, settings)
        problem = ""
        if self.dataset != manifest.fingerprint:
            problem = f"the data set {self.dataset[:12]}, not {manifest.fingerprint[:12]}"
        elif self.seed != settings.seed:
            problem = f"seed {self.seed}, not {settings.seed}"
        elif self.consumed >= length:
            problem = f"an epoch of more than {self.consumed} pairs; this one has {length}"
        if problem:
            raise UsageError(
                f"The feed cannot go on: its position is in a stream of {problem}.",
                "Go on with the data and the settings that it was begun with, or start anew.",
            )
        return self.epoch * length + self.consumed


def locate(manifest: Manifest, settings: FeedSettings, number: int) -> tuple[int, int]:
    """The pass that makes pair `number`, counted over all epochs, and the pair's place in it."""
    epochs, rest = divmod(number, samples_per_epoch(manifest, settings))
    passes = epochs * len(manifest.shards)
    for index in shard_order(settings.seed, epochs, len(manifest.shards)):
        size = manifest.shards[index].samples * settings.crops_per_photo
        if rest < size:
            break
        passes, rest = passes + 1, rest - size
    return passes, rest


def block_size(batch: int, settings: FeedSettings, *, consumers: int = 1, number: int = 0) -> int:
    """Pairs in a block of a stream that begins at pair `number`.

    For several consumers the largest size that divides a batch and every pass: then blocks dealt
    out in turn are batches dealt out in turn. A batch that shares no factor with `crops_per_photo`
    makes blocks of one pair, which cost more to move. One consumer takes whatever comes.
    """
    if consumers == 1:
        return BLOCK
    return math.gcd(batch, settings.crops_per_photo, number)


def bytes_in_flight(settings: FeedSettings, batch: int, consumers: int) -> int:
    """What the feed has in object stores at most, beside what its tasks are about to hand over:
    the batches that consumers have and have asked for ahead, and two blocks of each task."""
    rows = block_size(batch, settings, consumers=consumers)
    return _row_bytes(settings) * (consumers * batch * (1 + BATCHES_AHEAD) + 2 * rows)


# ---------------------------------------------------------------- the feed


def feed(
    data: str,
    settings: FeedSettings,
    *,
    batch: int,
    consumers: int = 1,
    position: FeedPosition | None = None,
) -> Dataset:
    """The endless stream of training pairs from `position` on.

    Args:
        data: URL of an HR dataset.
        batch: pairs that a consumer takes at a time.
        consumers: how many read it in lock-step, see `split`.
        position: where to start; None is the beginning.

    Returns:
        A dataset with columns `number` (), int64, `hr` (crop, crop, 3) and `lr` (crop/4, crop/4,
        3), uint8 RGB, in blocks of `block_size` pairs, in order.

    Raises:
        UsageError: when there is no HR dataset at `data`, the preset is unknown, or `position` is
            in another stream.
    """
    manifest = read_manifest(data, kind="hr")
    start = position.number(manifest, settings) if position else 0
    rows = block_size(batch, settings, consumers=consumers, number=start)
    make = training_pass(data, settings, start=start, rows=rows)
    # One row that a single task deals out pass by pass, as they are asked for: Ray would plan every
    # block of a longer dataset before the first one runs.
    passes = ray.data.from_items([{"first": make.first}])
    # Ray cuts blocks by size, at more than the target and less than 1.5 times of it.
    passes.context.target_max_block_size = int(0.8 * rows * _row_bytes(settings))
    passes.context.execution_options.preserve_order = True
    # The dealer waits most of the time, and must not hold the CPU that it waits for.
    deal = _DealPasses(passes.context.target_max_block_size + 1)
    dealt = passes.map_batches(deal, batch_size=None, num_cpus=0)
    return dealt.map_batches(
        make, batch_size=1, zero_copy_batch=True, num_cpus=1, resources=nodes_for("data")
    )


def training_pass(
    data: str, settings: FeedSettings, *, start: int = 0, rows: int = 32
) -> TrainingPass:
    """What the feed runs in its tasks: passes over `data` from pair `start` on, in blocks of
    `rows` pairs."""
    manifest = read_manifest(data, kind="hr")
    first, skipped = locate(manifest, settings, start)
    return TrainingPass(
        data=data,
        shards=manifest.shards,
        degradations=tuple(load_preset(name) for name in settings.presets),
        settings=settings,
        first=first,
        skipped=skipped,
        rows=rows,
    )


def split(dataset: Dataset, consumers: int) -> list[DataIterator]:
    """The shares of `consumers` that read in lock-step; each must take the feed's `batch` rows at
    a time.

    Blocks of equal size that come in order go to the consumers in turn; where one runs plays no
    part.
    """
    shares: list[DataIterator] = dataset.streaming_split(consumers, equal=False)
    return shares


@dataclass
class LockStep:
    """The numbers that one of several consumers must see, and where they all stand together.

    Args:
        start: number of the stream's first pair.
        rank, consumers: which consumer of how many.
        batch: pairs that each takes at a time.
        rows: the stream's `block_size`; of no account for one consumer.
    """

    start: int
    rank: int
    consumers: int
    batch: int
    rows: int
    batches: int = 0

    def check(self, numbers: Iterable[int]) -> None:
        """Count one batch, given the `number` column of it.

        Raises:
            TeasrError: when these are not the pairs that this consumer has to see next.
        """
        expected, seen = self.expected(), np.asarray(numbers)
        if not np.array_equal(seen, expected):
            raise TeasrError(
                f"The feed gave worker {self.rank} of {self.consumers} the pairs from {seen[0]} on "
                f"where {expected[0]} was next: its order is broken.",
                "Nothing was learned from them; the same command goes on from the last checkpoint.",
            )
        self.batches += 1

    def expected(self) -> Numbers:
        """Numbers of this consumer's next batch."""
        if self.consumers == 1:
            return self.number + np.arange(self.batch)
        blocks = self.batch // self.rows
        mine = np.arange(self.batches * blocks, (self.batches + 1) * blocks)
        first = self.start + (mine * self.consumers + self.rank) * self.rows
        return (first[:, None] + np.arange(self.rows)).ravel()

    @property
    def number(self) -> int:
        """The stream's next pair, once every consumer has taken as many batches as this one."""
        return self.start + self.batches * self.batch * self.consumers


# ---------------------------------------------------------------- on the workers


@dataclass(frozen=True)
class _DealPasses:
    """Numbers of passes, without end, each in a block of its own.

    Ray fills a block up to its target size: the ballast makes one row enough.
    """

    ballast: int

    def __call__(self, batch: dict[str, Numbers]) -> Iterator[dict[str, NDArray[Any]]]:
        for number in count(int(batch["first"][0])):
            yield {"pass": np.array([number]), "ballast": np.zeros((1, self.ballast), np.uint8)}


@dataclass(frozen=True)
class TrainingPass:
    """Makes the pairs of one pass over one shard; a plain object that travels to Ray's tasks.

    Called with `{"pass": [i]}` it yields blocks of the feed's columns for the i-th pass since the
    beginning; of pass `first` it leaves out the `skipped` pairs that were consumed before.
    """

    data: str
    shards: tuple[ShardInfo, ...]
    degradations: tuple[DegradationSettings, ...]
    settings: FeedSettings
    first: int
    skipped: int
    rows: int

    def __call__(self, batch: dict[str, Numbers]) -> Iterator[dict[str, NDArray[Any]]]:
        prepare_process()
        number = int(batch["pass"][0])
        epoch, place = divmod(number, len(self.shards))
        seed, crops, side = self.settings.seed, self.settings.crops_per_photo, self.settings.crop
        order = shard_order(seed, epoch, len(self.shards))
        shard = self.shards[order[place]]
        sizes = [one.samples * crops for one in self.shards]
        begin = epoch * sum(sizes) + sum(sizes[index] for index in order[:place])

        # Slot s of the pass is crop s % crops of photograph s // crops; it leaves at place_of[s].
        slots = np.random.default_rng((seed, epoch, place)).permutation(shard.samples * crops)
        place_of = np.argsort(slots)
        skipped = self.skipped if number == self.first else 0
        hr = np.empty((len(slots), side, side, 3), np.uint8)
        lr = np.empty((len(slots), side // SCALE, side // SCALE, 3), np.uint8)
        cut = _Cut(self.settings, self.degradations)
        for photo, key, rgb in self._photographs(shard):
            for i in range(crops):
                there = place_of[photo * crops + i]
                if there >= skipped:
                    hr[there], lr[there] = cut(rgb, key, epoch * crops + i)
        for row in range(skipped, len(slots), self.rows):
            part = slice(row, row + self.rows)
            numbers = np.arange(begin + row, begin + row + len(hr[part]))
            telemetry.count(telemetry.SAMPLES, len(numbers), stage="feed")
            yield {"number": numbers, "hr": hr[part], "lr": lr[part]}

    def _photographs(self, shard: ShardInfo) -> Iterator[tuple[int, str, Bytes]]:
        """Index, key and pixels of as many photographs as the manifest counts.

        One that cannot be used is replaced by another, if possible of its shard, under a key of its
        own, so that the numbers of all later pairs stay what they are.
        """
        replaced: list[tuple[int, str]] = []
        last: tuple[str, Bytes] | None = None
        photo = -1
        for photo, (key, rgb) in enumerate(self._decoded(shard)):
            if rgb is None:
                replaced.append((photo, key))
            else:
                last = key, rgb
                yield photo, key, rgb
        if photo + 1 != shard.samples:
            raise TeasrError(
                f"Shard {shard.name} holds {photo + 1} photographs; the manifest lists "
                f"{shard.samples}.",
                f"See what is wrong: teasr data validate {self.data}",
            )
        if replaced:
            key, rgb = last or self._first_usable(after=shard)
            for photo, bad in replaced:
                yield photo, f"{key} in place of {bad}", rgb

    def _decoded(self, shard: ShardInfo) -> Iterator[tuple[str, Bytes | None]]:
        """Keys of a shard, and pixels where they can be used."""
        # Not hashed: once is enough, and `teasr data validate` does it.
        for sample in read_shard(join_url(self.data, shard.name), kind="hr"):
            encoded = next(sample.members[s] for s in SHARD_PICTURES if s in sample.members)
            try:
                yield sample.key, decode(encoded, min_side=self.settings.crop).rgb
            except BadPicture as error:
                log.warning("Another is taken in place of %s: %s", sample.key, error)
                yield sample.key, None

    def _first_usable(self, after: ShardInfo) -> tuple[str, Bytes]:
        """Key and pixels of the next photograph beyond a shard that can be used."""
        start = self.shards.index(after) + 1
        for shard in (*self.shards[start:], *self.shards[:start]):
            for key, rgb in self._decoded(shard):
                if rgb is not None:
                    return key, rgb
        raise TeasrError(
            f"No photograph of {self.data} is as large as a crop ({self.settings.crop} pixels).",
            "Use larger photographs or a smaller feed.crop.",
        )


class _Cut:
    """Cuts a crop out of a photograph and degrades it; both drawn from the sample's seed."""

    def __init__(
        self, settings: FeedSettings, degradations: tuple[DegradationSettings, ...]
    ) -> None:
        # Here, since the processes that only deal out blocks have no use for it. It asks for torch
        # and does without, which is a third of the time and of the memory.
        with without_torch():
            import albumentations as A

            from teasr.degradation import RealESRGAN

        self._seed = settings.seed
        self._candidates = settings.candidates
        self._place = A.Compose([A.RandomCrop(settings.crop, settings.crop), A.D4(p=1.0)])
        self._names = [degradation.name for degradation in degradations]
        self._bounds = np.cumsum(list(settings.presets.values()))[:-1]
        self._degrade = [A.Compose([RealESRGAN(degradation)]) for degradation in degradations]

    def __call__(self, photo: Bytes, key: str, variant: int) -> tuple[Bytes, Bytes]:
        self._place.set_random_seed(sample_seed(self._seed, "place", key, variant))
        crops = [self._place(image=photo)["image"] for _ in range(self._candidates)]
        hr = np.ascontiguousarray(max(crops, key=_detail) if len(crops) > 1 else crops[0])
        which = 0
        if len(self._names) > 1:
            draw = np.random.default_rng(sample_seed(self._seed, "preset", key, variant)).random()
            which = int(np.searchsorted(self._bounds, draw, side="right"))
        degrade = self._degrade[which]
        degrade.set_random_seed(sample_seed(self._seed, self._names[which], key, variant))
        return hr, degrade(image=hr)["image"]


def _detail(picture: Bytes) -> float:
    """Mean step between neighbouring means of 2x2 pixels: less moved by noise than by structure."""
    side = picture.shape[0] // 2
    small = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA).astype(np.int16)
    return float(np.abs(np.diff(small, axis=0)).mean() + np.abs(np.diff(small, axis=1)).mean())


def _row_bytes(settings: FeedSettings) -> int:
    return 8 + 3 * settings.crop**2 + 3 * (settings.crop // SCALE) ** 2
