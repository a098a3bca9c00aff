"""Work that never ends: a worker that hangs is killed, and Ray does its task again elsewhere.

Ray knows of workers that die, not of those that are stuck in a read or a decoder: it would wait
for them for ever. So each task leaves a note with its worker's place in Ray's own key-value store
for as long as it works, and the driver looks at the notes. How long a task may take is learned from
those that have ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.experimental import internal_kv  # Ray has no public word for it
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)

SECONDS_VARIABLE = "TEASR_HANG_SECONDS"
LEAST_SECONDS = 600.0
"""No task is taken to hang before that."""
FIRST_SECONDS = 3600.0
"""Nor, as long as none has ended from which to learn, before that."""
TIMES_LONGEST = 5.0
"""Nor in so many times what the longest that has ended took."""
_LOOK_SECONDS = 5.0


class Watch:
    """Within this block, tasks that are `at_work` for too long lose their workers."""

    def __init__(self) -> None:
        self.job = f"teasr-at-work:{uuid.uuid4().hex}:"
        given = os.environ.get(SECONDS_VARIABLE)
        self._least, self._first = (float(given),) * 2 if given else (LEAST_SECONDS, FIRST_SECONDS)
        self._longest: float | None = None
        self._seen: dict[bytes, float] = {}
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(1)

    def ended(self, seconds: float) -> None:
        """A task has ended, and took so long."""
        self._longest = max(self._longest or 0.0, seconds)

    @property
    def patience(self) -> float:
        """Seconds after which a task is taken to hang, by what is known now."""
        if self._longest is None:
            return self._first
        return max(self._least, TIMES_LONGEST * self._longest)

    def _run(self) -> None:
        while not self._over.wait(min(_LOOK_SECONDS, self._least / 4)):
            try:
                self._look()
            except Exception as error:  # the cluster is away: what is on it is told elsewhere
                log.debug("No look at the work: %s", error)

    def _look(self) -> None:
        now = time.monotonic()
        # Of the driver's clock alone: those of the nodes differ.
        notes = internal_kv._internal_kv_list(self.job.encode())
        self._seen = {note: self._seen.get(note, now) for note in notes}
        for note, since in list(self._seen.items()):
            if now - since < self.patience:
                continue
            *_, what, node, pid = note.decode().split(":")
            log.warning("Task %s has worked for %.0f s: its worker is ended.", what, now - since)
            del self._seen[note]
            internal_kv._internal_kv_del(note)
            _kill.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(int(pid))


@contextlib.contextmanager
def at_work(job: str, what: int) -> Iterator[None]:
    """Within this block, the watch of `job` knows where its task number `what` is worked on."""
    node = ray.get_runtime_context().get_node_id()
    for left in internal_kv._internal_kv_list(f"{job}{what}:".encode()):
        internal_kv._internal_kv_del(left)  # by a worker that was lost
    note = f"{job}{what}:{node}:{os.getpid()}".encode()
    internal_kv._internal_kv_put(note, b"")
    try:
        yield
    finally:
        internal_kv._internal_kv_del(note)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> Any:
    with contextlib.suppress(OSError):
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():  # and nobody else's by now
            os.kill(pid, signal.SIGKILL)
