"""The feed: one stream whatever runs it, and the pairs that the degradation promises."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import albumentations as A
import numpy as np
import pytest

from pipelines.feed import FeedSettings, feed, locate, samples_per_epoch, shard_order
from pipelines.ingest import ingest
from pipelines.runtime import quiet_ray_data
from teasr.degradation import Degradation, sample_seed
from teasr.errors import UsageError
from teasr.images import encode
from teasr.shards import Manifest, ShardInfo, read_manifest

SETTINGS = FeedSettings(crop=32, crops_per_photo=4, seed=3)
PHOTOS = 5


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., np.ndarray], ray_session: None
) -> str:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(PHOTOS):
        (folder / f"p{i}.png").write_bytes(encode(photo(80 + i, 90, seed=i)))
    target = tmp_path_factory.mktemp("data") / "hr"
    ingest([str(folder)], str(target), shard_size=2)
    return str(target)


def _stream(data: str, count: int, first_pass: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    with quiet_ray_data():
        rows = feed(data, SETTINGS, count, first_pass).iter_rows()
        return [(row["hr"], row["lr"]) for row in islice(rows, count)]


def test_equal_settings_give_an_equal_stream(data: str) -> None:
    first, second = _stream(data, 30), _stream(data, 30)
    assert len(first) == 30
    for (hr, lr), (hr_again, lr_again) in zip(first, second):
        assert hr.shape == (32, 32, 3) and lr.shape == (8, 8, 3)
        assert np.array_equal(hr, hr_again) and np.array_equal(lr, lr_again)


def test_stream_goes_on_from_a_later_pass(data: str) -> None:
    epoch = samples_per_epoch(read_manifest(data), SETTINGS)
    passes, rest = locate(read_manifest(data), SETTINGS, epoch)
    assert (passes, rest) == (3, 0)
    whole = _stream(data, epoch + 8)
    tail = _stream(data, 8, first_pass=passes)
    for (hr, lr), (hr_again, lr_again) in zip(whole[epoch:], tail):
        assert np.array_equal(hr, hr_again) and np.array_equal(lr, lr_again)


def test_two_epochs_differ_and_each_photo_comes_equally_often(data: str) -> None:
    epoch = samples_per_epoch(read_manifest(data), SETTINGS)
    pairs = _stream(data, 2 * epoch)
    crops = {hr.tobytes() for hr, _ in pairs}
    assert len(crops) == len(pairs) == 2 * PHOTOS * 4


def test_pairs_are_those_of_the_degradation(data: str, photo: Callable[..., np.ndarray]) -> None:
    """Crop and degrade again, outside Ray, from the keys alone: the same bytes."""
    epoch = samples_per_epoch(read_manifest(data), SETTINGS)
    expected = {}
    place = A.Compose([A.RandomCrop(32, 32), A.D4(p=1.0)])
    degradation = Degradation("teasr", seed=SETTINGS.seed)
    for i in range(PHOTOS):
        for variant in range(4):
            place.set_random_seed(sample_seed(SETTINGS.seed, "place", f"p{i}", variant))
            hr = np.ascontiguousarray(place(image=photo(80 + i, 90, seed=i))["image"])
            expected[hr.tobytes()] = degradation(hr, f"p{i}", variant).lr
    pairs = _stream(data, epoch)
    for hr, lr in pairs:
        assert np.array_equal(lr, expected.pop(hr.tobytes()))
    assert not expected


def test_locate_agrees_with_counting() -> None:
    shards = tuple(
        ShardInfo(name=f"{i}", samples=n, bytes=1, sha256="") for i, n in enumerate((3, 1, 2))
    )
    manifest = Manifest(kind="hr", shards=shards)
    settings = FeedSettings(crops_per_photo=2, seed=5)
    ends, total = [], 0
    for epoch in range(3):
        for index in shard_order(5, epoch, 3):
            total += 2 * shards[index].samples
            ends.append(total)
    for consumed in range(30):
        passes = sum(end <= consumed for end in ends)
        into = consumed - (ends[passes - 1] if passes else 0)
        assert locate(manifest, settings, consumed) == (passes, into)


def test_unknown_preset_and_missing_dataset_are_told(data: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="teasr"):
        feed(data, FeedSettings(preset="tease"), 1)
    with pytest.raises(UsageError, match="ingest"):
        feed(str(tmp_path), SETTINGS, 1)
