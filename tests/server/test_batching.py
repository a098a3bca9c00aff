"""The queue: results are those of the library, whatever they are worked on with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from teasr.backbones.folder import load_model
from teasr.images import Picture
from teasr.registry import Found
from teasr.restoration import RestorationSettings, restore
from teasr.server import batching
from teasr.server.batching import Batcher, Job
from teasr.server.models import Served

Photo = Callable[..., NDArray[np.uint8]]


@pytest.fixture(scope="module")
def served(weights: Path) -> Served:
    return Served(str(weights), Found("a model", str(weights)), "", load_model(weights))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The network waits until the event is set."""
    go = threading.Event()
    work = batching.restore_tiles

    def wait(*arguments: object) -> object:
        assert go.wait(60)
        return work(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(batching, "restore_tiles", wait)
    yield go
    go.set()


def job(served: Served, rgb: NDArray[np.uint8], **settings: int) -> Job:
    picture = Picture(rgb, None, False, 8, "png")
    return Job(served, picture, RestorationSettings(**settings))


def test_a_batch_gives_what_each_picture_gives_alone(
    served: Served, photo: Photo, held: threading.Event
) -> None:
    sizes: list[int] = []
    batcher = Batcher(100_000, told=sizes.append, cores=1)
    pictures = [photo(40, 24, seed=i) for i in range(5)] + [photo(30, 70, seed=9)]
    settings = [{"steps": 2, "seed": i, "tile": 32} for i in range(6)]
    jobs = [job(served, rgb, **chosen) for rgb, chosen in zip(pictures, settings)]
    blocker = job(served, photo(9, 9))
    for one in (blocker, *jobs):
        batcher.submit(one)
    held.set()
    for one, rgb, chosen in zip(jobs, pictures, settings):
        alone = restore(served.model.network, rgb, RestorationSettings(**chosen))
        difference = np.abs(one.result.result(60).astype(int) - alone)
        # Matrix products of another size may add in another order: a value that lies between two
        # levels can then be rounded to the other one.
        assert difference.max() <= 1 and (difference > 0).mean() < 0.001
        batcher.release(one)
    assert max(sizes) >= 4 and jobs[0].batch >= 4
    batcher.close()


def test_work_that_nobody_waits_for_is_dropped(
    served: Served, photo: Photo, held: threading.Event
) -> None:
    sizes: list[int] = []
    batcher = Batcher(100_000, told=sizes.append, cores=1)
    jobs = [job(served, photo(64, 64, seed=i), tile=32) for i in range(4)]
    for one in jobs:
        batcher.submit(one)
    for one in jobs[:3]:  # one of them is being worked on
        batcher.release(one)
    held.set()
    assert jobs[3].result.result(60).shape == (256, 256, 3)
    batcher.close()
    assert sum(sizes) <= 9 + 9 and all(one.result.cancelled() for one in jobs[1:3])


def test_small_pictures_do_not_wait_for_large_ones(served: Served, photo: Photo) -> None:
    batcher = Batcher(160 * 160, cores=1)
    large = [job(served, photo(160, 160, seed=i), tile=16) for i in range(2)]
    small = job(served, photo(16, 16))
    for one in (*large, small):
        batcher.submit(one)
    assert small.result.result(60).shape == (64, 64, 3)
    assert not large[1].batch  # no memory is given to the second before the first is released
    assert not any(one.result.done() for one in large)
    for one in large:
        batcher.release(one)
    batcher.close()


def test_a_failure_is_its_own_pictures_alone(
    served: Served, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = Batcher(100_000, cores=2)
    work = batching.restore_tiles
    calls = iter(range(100))

    def fail_once(*arguments: object) -> object:
        if next(calls) == 0:
            raise RuntimeError("no luck")
        return work(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(batching, "restore_tiles", fail_once)
    first, second = job(served, photo(16, 16)), job(served, photo(16, 16))
    batcher.submit(first)
    with pytest.raises(RuntimeError, match="no luck"):
        first.result.result(60)
    batcher.submit(second)
    assert second.result.result(60).shape == (64, 64, 3)
    batcher.close()
