"""Ending a run so that nothing of it is lost: who is asked to end, and how the workers hear of it.

The command that started a run may get SIGTERM or SIGINT (`StopRequest`): it leaves a file beside
the run, which rank 0 looks for (`StopFile`). A worker may get SIGTERM itself (`leaving`), and Ray
may know that a machine is about to go (`ray.train.get_preemption_info`). Workers act on any of
these together, after the step that they are in.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TypeVar

# Ray has no public word for what runs in a worker's main thread; only there signals are handled.
from ray.train.v2._internal.execution.callback import WorkerCallback

from jobs.console import errors
from teasr.errors import TeasrError

STOP_FILE = "stop"
_LOOK_SECONDS = 1.0  # between two looks for the file, which may be on a disk of the network
_leaving = threading.Event()
Result = TypeVar("Result")


class Preempted(TeasrError):  # noqa: N818
    """The run was asked to end and has ended with a checkpoint (exit 75, `EX_TEMPFAIL`)."""

    exit_code = os.EX_TEMPFAIL


class StopRequest:
    """Within this block, SIGTERM and SIGINT ask the run in `folder` to end; a second ends at once.

    Handlers stay as they are where this is not the main thread.

    Attributes:
        signal: name of the first signal that came; empty for none.
    """

    def __init__(self, folder: Path) -> None:
        self._path = (folder / STOP_FILE).absolute()
        self._kept: dict[signal.Signals, signal.Handlers | Callable | int | None] = {}
        self.signal = ""

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)  # of a run that was killed while it ended
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._kept[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)
        self._path.unlink(missing_ok=True)

    def while_running(self, work: Callable[[], Result]) -> Result:
        """The result of `work()`, which runs in a thread: this one waits for signals.

        Ray Train would else put a handler of its own in place of ours, which throws away what was
        learned since the last checkpoint.
        """
        results: list[Result] = []
        problems: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                problems.append(error)

        # A daemon: a second signal must not wait for it.
        thread = threading.Thread(target=run, name="run", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
        if problems:
            raise problems[0]
        return results[0]

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = signal.Signals(number).name
        self._path.write_text(self.signal)
        errors.print(
            f"[yellow]teasr:[/] {self.signal}: the run ends after this step, with a checkpoint; "
            "once more ends it at once.",
            highlight=False,
            soft_wrap=True,
        )


class StopFile:
    """Whether the run in `folder` was asked to end; cheap enough to ask after every step."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STOP_FILE
        self._next = 0.0

    def asked(self) -> bool:
        """Whether the file was there at the last look, a second ago at most."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _LOOK_SECONDS
        return self._path.exists()


class HearSigterm(WorkerCallback):
    """Has a worker's first SIGTERM set `leaving` instead of ending it; the second ends it."""

    def after_init_train_context(self) -> None:
        before = signal.getsignal(signal.SIGTERM)

        def heard(number: int, frame: FrameType | None) -> None:
            _leaving.set()
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, heard)


def leaving() -> bool:
    """Whether this worker got SIGTERM."""
    return _leaving.is_set()
