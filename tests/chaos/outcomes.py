"""What became of a fault: a row of the table that `make chaos` prints."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Self


@dataclass(frozen=True)
class Outcome:
    """A fault, and the run that met it.

    Attributes:
        seen: what the user was told, or that there was nothing to see.
        pause: seconds of the longest time without a result, from the fault on.
        calm_pause: the same in the run that nothing happened to.
        lost, duplicated: samples.
        result: what was compared with the calm run, and is equal.
    """

    fault: str
    seen: str
    pause: float
    calm_pause: float
    lost: int
    duplicated: int
    result: str


def table(outcomes: list[Outcome]) -> str:
    """In Markdown."""
    lines = [
        "| fault | what the user sees | longest pause (calm) | lost | duplicated | result |",
        "|---|---|---:|---:|---:|---|",
    ]
    for one in outcomes:
        pause = f"{one.pause:.0f} s ({one.calm_pause:.0f} s)"
        lines.append(
            f"| {one.fault} | {one.seen} | {pause} | {one.lost} | {one.duplicated} | {one.result} |"
        )
    return "\n".join(lines)


class Pulse:
    """Watches a growing number, as a context manager: when did it stand still for how long?

    Args:
        count: called twenty times a second.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._over = threading.Event()
        self.changes: list[float] = []

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.changes.append(time.monotonic())  # the end is awaited as much as the last result

    def _watch(self) -> None:
        last = self._count()
        while not self._over.wait(0.05):
            if (count := self._count()) != last:
                last = count
                self.changes.append(time.monotonic())

    def longest_pause(self, since: float = 0.0, until: float = math.inf) -> float:
        """Seconds between two changes, between `since` and the first, or the last and the end."""
        times = [t for t in self.changes if since < t < until]
        starts = [since, *times] if since else times
        return max((later - earlier for earlier, later in pairwise(starts)), default=0.0)
