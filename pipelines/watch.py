"""Work that never ends: a worker that hangs is killed, and Ray does its task again elsewhere.

Ray knows of workers that die, not of those that are stuck in a read or a decoder: it would wait
for them for ever. So each task leaves a note with its worker's place in Ray's own key-value store
for as long as it works, and the driver looks at the notes. How long a task may take is learned from
those that have ended. A worker may hang before its note, in an import: when nothing ends and there
are no notes, those that Ray gave a task all the same are looked for on their nodes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator

import psutil
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
        self._moved = time.monotonic()
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
        self._moved = time.monotonic()

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
            _end_on(node).remote(int(pid))
        if notes:
            self._moved = now
        elif now - self._moved >= self.patience:
            silent, self._moved = now - self._moved, now
            self._end_silent(silent)

    def _end_silent(self, seconds: float) -> None:
        job = ray.get_runtime_context().get_job_id()
        asked = [_end_on(node["NodeID"]).remote(None, job) for node in ray.nodes() if node["Alive"]]
        for ended in ray.get(asked, timeout=60):
            for pid in ended:
                log.warning("Worker %d is ended: no task begun in %.0f s.", pid, seconds)


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
def _end(pid: int | None, job: str = "") -> list[int]:
    """Kills the worker `pid` of this node, or all that have a row of the job's; those it killed."""
    ended = []
    for worker in psutil.Process(os.getppid()).children():  # the raylet's
        with contextlib.suppress(psutil.Error):
            title = " ".join(worker.cmdline())  # of one that has just ended, nothing
            if pid is None:
                named = "Map(" in title and worker.environ().get("RAY_JOB_ID") == job
            else:
                named = worker.pid == pid  # and nobody else's by now
            if named and title.startswith("ray::"):
                worker.kill()
                ended.append(worker.pid)
    return ended


def _end_on(node: str) -> ray.remote_function.RemoteFunction:
    """`_end` on that node."""
    return _end.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
