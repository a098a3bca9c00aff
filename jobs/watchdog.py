"""A worker that hangs ends itself, so that Ray Train starts all anew from the last checkpoint.

A worker that waits for one that is stuck, for a disk that is gone, or in a deadlock answers Ray's
questions all the while: nobody but the worker knows that no step is made any more.
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path


class Watchdog:
    """Ends this process when there was no `beat` for so many minutes; they count from the first.

    Args:
        minutes: of silence that are too many.
        stacks: file to which goes, last of all, where each thread of the process was, behind what
            is in it; stderr where there is no such folder.
    """

    def __init__(self, minutes: float, stacks: Path) -> None:
        self._seconds = 60 * minutes
        self._path = stacks
        self._file = stacks.open("a") if stacks.parent.is_dir() else sys.stderr

    def beat(self) -> None:
        """All is well: a step was made."""
        # Python's own watchdog is a thread in C: it ends a process too that holds the GIL for ever.
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def stop(self) -> None:
        """There will be no more steps."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is not sys.stderr:
            self._file.close()
            if self._path.stat().st_size == 0:
                self._path.unlink()
