"""Pictures that wait are worked on together, tile by tile.

There is a worker thread for each core. While several pictures wait each worker keeps to one core,
which wastes nothing on waiting for the other; a picture that is alone gets all cores. Tiles of one
size, of one model and with as many steps go through the network as one batch, as far as that is
faster than one after the other. Pictures take turns by tiles, so that a large one does not hold up
small ones, and one that nobody waits for any more is left after its tile.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teasr.backbones.codec import Pixels
from teasr.images import Picture
from teasr.restoration import RestorationSettings, Tile, restore_tiles, restoring
from teasr.server.models import Served

BATCH_PIXELS = 64 * 64
"""Low-resolution pixels of the tiles that are stacked, on a CPU: beyond, the network is as fast
with one at a time, and a batch only makes its first picture wait for its last."""
_SMALL_SHARE = 16  # pictures of up to 1/16 of the largest do not wait for larger ones


class Job:
    """A picture on its way.

    Args:
        served: the model that restores it, whatever is in use by then.

    Attributes:
        result: (scale h, scale w, 3) uint8, to come; cancel it to drop the work.
        waited: seconds before its first tile. worked: seconds since, up to the result.
        batch: largest number of tiles that one of its own went through the network with.
    """

    def __init__(self, served: Served, picture: Picture, settings: RestorationSettings) -> None:
        self.served = served
        self.picture = picture
        self.settings = settings
        self.result: Future[NDArray[np.uint8]] = Future()
        self.pixels = picture.rgb.shape[0] * picture.rgb.shape[1]
        self.waited = self.worked = 0.0
        self.batch = 0
        self._arrived = time.monotonic()
        self._began = 0.0
        self._work: Generator[Tile, Tensor, NDArray[np.uint8]] | None = None
        self.tile: Tile

    def begin(self) -> None:
        """Make the first tile."""
        model = self.served.model
        self._work = restoring(model.network, self.picture.rgb, self.settings, model.codec)
        self.tile = next(self._work)

    def advance(self, restored: Tensor) -> bool:
        """Take in what became of `tile` and make the next; whether there is one."""
        assert self._work is not None
        try:
            self.tile = self._work.send(restored)
        except StopIteration as finished:
            self.worked = time.monotonic() - self._began
            if self.result.set_running_or_notify_cancel():
                self.result.set_result(finished.value)
            return False
        return True

    def fail(self, error: BaseException) -> None:
        if self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)

    def in_batch(self, size: int) -> None:
        if not self.batch:
            self._began = time.monotonic()
            self.waited = self._began - self._arrived
        self.batch = max(self.batch, size)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for jobs whose tiles can be stacked."""
        return id(self.served), self.settings.steps, self.tile.lr.shape

    @property
    def exclusive(self) -> bool:
        """Whether the network must not be called from two threads: pretrained autoencoders keep
        what they work on in themselves."""
        return not isinstance(self.served.model.codec, Pixels)


class Batcher:
    """The queue and its workers.

    Args:
        max_pixels: of the largest picture; bounds what is in memory of results at a time.
        batch_pixels: low-resolution pixels that are stacked at most.
        told: called with the size of each batch.
        cores: workers; default: torch's number of threads.
    """

    def __init__(
        self,
        max_pixels: int,
        batch_pixels: int = BATCH_PIXELS,
        told: Callable[[int], None] = lambda size: None,
        cores: int | None = None,
    ) -> None:
        self._batch_pixels = batch_pixels
        self._told = told
        self._cores = cores or torch.get_num_threads()
        self._changed = threading.Condition()
        self._ready: deque[Job] = deque()
        # Large pictures and small ones have lanes of their own, each with a bound in pixels.
        self._small = max_pixels // _SMALL_SHARE
        self._bounds = {True: 4 * self._small, False: max_pixels}
        self._waiting: dict[bool, deque[Job]] = {True: deque(), False: deque()}
        self._begun: dict[bool, set[Job]] = {True: set(), False: set()}
        self._running = 0
        self._alone = False
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"worker {i}", daemon=True)
            for i in range(self._cores)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue a picture. `release` must follow, when its result is no longer held."""
        with self._changed:
            self._waiting[job.pixels <= self._small].append(job)
        self._begin()

    def release(self, job: Job) -> None:
        """Say that the result of `job` is encoded, or that nobody waits for it."""
        job.result.cancel()
        with self._changed:
            self._begun[job.pixels <= self._small].discard(job)
        self._begin()

    def close(self) -> None:
        """Let the workers end after what they are at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _begin(self) -> None:
        """Make ready what there is memory for."""
        while job := self._next_to_begin():
            try:
                job.begin()
            except Exception as error:
                job.fail(error)
                continue
            with self._changed:
                self._ready.append(job)
                self._changed.notify()

    def _next_to_begin(self) -> Job | None:
        with self._changed:
            for lane, waiting in self._waiting.items():
                while waiting and waiting[0].result.cancelled():
                    waiting.popleft()
                begun = self._begun[lane]
                total = sum(job.pixels for job in begun)
                if waiting and (not begun or total + waiting[0].pixels <= self._bounds[lane]):
                    begun.add(waiting[0])
                    return waiting.popleft()
        return None

    def _run(self) -> None:
        while batch := self._take():
            jobs, threads = batch
            torch.set_num_threads(threads)
            model = jobs[0].served.model
            try:
                tiles = [job.tile for job in jobs]
                restored = restore_tiles(model.network, tiles, jobs[0].settings, model.codec)
                going_on = [job for job, tile in zip(jobs, restored) if job.advance(tile)]
            except Exception as error:
                going_on = []
                for job in jobs:
                    job.fail(error)
            self._told(len(jobs))
            with self._changed:
                self._running -= 1
                self._alone = False
                self._ready.extend(going_on)
                self._changed.notify_all()
            del jobs, batch, going_on  # a waiting worker holds no picture

    def _take(self) -> tuple[list[Job], int] | None:
        """Jobs whose tiles go through the network together, and the threads for them; None at the
        end."""
        with self._changed:
            while True:
                self._ready = deque(job for job in self._ready if not job.result.cancelled())
                if self._closed:
                    return None
                if self._ready and not self._alone:
                    first = self._ready[0]
                    if not first.exclusive or not self._running:
                        break
                self._changed.wait()
            alike = [job for job in self._ready if job.key == first.key]
            idle = 1 if first.exclusive else self._cores - self._running
            _, height, width = first.tile.lr.shape
            most = max(1, self._batch_pixels // (height * width))
            jobs = alike[: min(most, -(-len(alike) // idle))]
            for job in jobs:
                self._ready.remove(job)
                job.in_batch(len(jobs))
            self._running += 1
            self._alone = first.exclusive
            busy = self._running > 1 or self._ready
            return jobs, 1 if busy and not first.exclusive else self._cores
