"""From a picture's file to its restored file: checks, the queue, the work and its limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from teasr.errors import TeasrError
from teasr.images import BadPicture, decode
from teasr.restoration import RestorationSettings, check_result, encode_restored
from teasr.server.batching import Batcher, Job
from teasr.server.metrics import Metrics
from teasr.server.models import ModelSource, Served
from teasr.server.settings import ServerSettings

_TOO_LARGE = ("too-many-pixels", "out-of-memory")
_log = logging.getLogger(__name__)


class Refusal(TeasrError):  # noqa: N818 - an answer of HTTP, not an error of ours
    """A request that is not served.

    Args:
        status: of HTTP.
        retry_after: seconds after which to ask again; None: asking again is of no use.
    """

    def __init__(
        self, status: int, message: str, hint: str = "", retry_after: int | None = None
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.retry_after = retry_after


class ClientGone(Exception):  # noqa: N818 - no error: nobody is left to tell
    """Whoever asked has hung up."""


class Recorder(Protocol):
    """Keeps statistics of what comes in; see `teasr.drift`."""

    def add(self, encoded: bytes, rgb: NDArray[np.uint8]) -> None: ...


@dataclass(frozen=True)
class Restored:
    """A restored picture.

    Attributes:
        data: the encoded picture.
        width, height: of it, in pixels.
        version: that made it.
        seconds: by stage: `decode`, `wait`, `restore`, `encode`.
        batch: largest number of tiles that one of its own was worked on with.
    """

    data: bytes
    width: int
    height: int
    version: str
    seconds: dict[str, float]
    batch: int


class Service:
    """Restores pictures of many clients with the model that is in use.

    Args:
        source: of the model.
        recorder: is shown every picture that was accepted, off the request's path.
    """

    def __init__(
        self, source: ModelSource, settings: ServerSettings, recorder: Recorder | None = None
    ) -> None:
        self.source = source
        self.settings = settings
        self.stopping = False
        self.metrics = Metrics(
            lambda: self._accepted, lambda: source.current, lambda: source.failure is not None
        )
        self._recorder = recorder
        self._accepted = 0
        self._pace = 1.0  # seconds of work on a picture, lately

    def start(self) -> None:
        """Start the threads."""
        self._batcher = Batcher(self.settings.max_pixels, told=self.metrics.batch)
        self._files = ThreadPoolExecutor(torch.get_num_threads(), "files")
        self._records = ThreadPoolExecutor(1, "records")
        self._to_record = threading.BoundedSemaphore(self.settings.queue)
        self.source.watch(self.settings.poll, self.metrics.reload)

    def stop(self) -> None:
        """End the threads, after what they are at."""
        self.source.close()
        self._batcher.close()
        self._files.shutdown(cancel_futures=True)
        self._records.shutdown(cancel_futures=True)

    @property
    def accepted(self) -> int:
        """Pictures that are waiting or worked on."""
        return self._accepted

    @contextlib.contextmanager
    def room(self, pictures: int = 1) -> Iterator[None]:
        """Accept so many more pictures; to be entered before their bytes are read.

        Raises:
            Refusal: 429 when the queue is full, 503 when the server is being stopped.
        """
        if self.stopping:
            raise Refusal(503, "The server is being stopped.", retry_after=5)
        if self._accepted + pictures > self.settings.queue:
            expected = self._pace * self._accepted / torch.get_num_threads()
            seconds = min(max(math.ceil(expected), 1), 60)
            raise Refusal(
                429,
                f"The queue of {self.settings.queue} pictures is full.",
                f"Ask again in {seconds} s.",
                seconds,
            )
        self._accepted += pictures
        try:
            yield
        finally:
            self._accepted -= pictures

    async def restore(
        self,
        read: Callable[[], bytes],
        settings: RestorationSettings,
        format: str,
        gone: asyncio.Future[None],
    ) -> Restored:
        """Restore one picture for which there is room.

        Args:
            read: gives its file; called in a thread.
            gone: comes to an end when nobody waits any more.

        Raises:
            TeasrError: for a picture that is refused.
            Refusal: 413 for one that is too large or takes too long, 429 when its turn does not
                come in time.
            ClientGone: when `gone` came first.
        """
        loop = asyncio.get_running_loop()
        begin = time.monotonic()
        served = self.source.current
        job = await loop.run_in_executor(self._files, self._accept, read, served, settings, format)
        decoded = time.monotonic()
        self._batcher.submit(job)
        try:
            pixels = await self._wait(job, gone, self.settings.timeout - (decoded - begin))
            back = time.monotonic()
            data = await loop.run_in_executor(
                self._files, encode_restored, pixels, job.picture, format
            )
        finally:
            self._batcher.release(job)
        self._pace += 0.1 * (job.worked - self._pace)
        height, width = pixels.shape[:2]
        self.metrics.restored(height * width)
        seconds = {"decode": decoded - begin, "wait": job.waited, "restore": job.worked}
        return Restored(
            data,
            width,
            height,
            served.version,
            seconds | {"encode": time.monotonic() - back},
            job.batch,
        )

    def _accept(
        self, read: Callable[[], bytes], served: Served, settings: RestorationSettings, format: str
    ) -> Job:
        """Decode and check; in a thread."""
        data = read()
        try:
            picture = decode(data, max_pixels=self.settings.max_pixels)
        except BadPicture as error:
            if error.reason in _TOO_LARGE:
                raise Refusal(413, error.message, error.hint) from None
            raise
        check_result(served.model.network, picture, format)
        if self._recorder and self._to_record.acquire(blocking=False):
            self._records.submit(self._record, data, picture.rgb)
        return Job(served, picture, settings)

    def _record(self, data: bytes, rgb: NDArray[np.uint8]) -> None:
        assert self._recorder is not None
        try:
            self._recorder.add(data, rgb)
        except Exception:  # a full disk takes no request with it
            _log.exception("the statistics of a picture could not be recorded")
        finally:
            self._to_record.release()

    async def _wait(
        self, job: Job, gone: asyncio.Future[None], seconds: float
    ) -> NDArray[np.uint8]:
        result = asyncio.wrap_future(job.result)
        done, _ = await asyncio.wait(
            (result, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if result in done:
            return result.result()
        result.cancel()
        if gone in done:
            raise ClientGone
        height, width = job.picture.rgb.shape[:2]
        if job.batch:
            raise Refusal(
                413,
                f"{width} x {height} pixels in {job.settings.steps} step(s) took longer than the "
                f"{self.settings.timeout:g} s that a request may take.",
                "Send a smaller picture or ask for fewer steps.",
            )
        raise Refusal(
            429,
            f"The picture waited {self.settings.timeout:g} s and its turn had not come.",
            "Ask again later.",
            min(math.ceil(self.settings.timeout), 60),
        )
