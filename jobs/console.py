"""What the commands print: tables, progress, and one-line errors."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

console = Console()
errors = Console(stderr=True)

SECONDS_BETWEEN_LINES = 10


@contextmanager
def progress_bar(title: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A bar on the terminal; yields `update(done, note)`.

    Where there is no terminal, nothing; with TEASR_PROGRESS=lines, as for what `teasr submit` runs,
    a line every 10 seconds.
    """
    if os.environ.get("TEASR_PROGRESS") == "lines" and not errors.is_terminal:
        yield _progress_lines(title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=total, note="")

        def update(done: float, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield update


def _progress_lines(title: str, total: float) -> Callable[[float, str], None]:
    told, line_before = -math.inf, ""

    def update(done: float, note: str = "") -> None:
        nonlocal told, line_before
        line = f"{title} {done / total:4.0%} {note}".rstrip()
        if line != line_before and time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told, line_before = time.monotonic(), line
            errors.print(line, highlight=False, soft_wrap=True, markup=False)

    return update


def say(*lines: str) -> None:
    """Print lines as they are: no markup, no wrapping."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def suggest(*commands: str) -> None:
    """Say what to run next, in words that run from here: the environment may not be on the path."""
    prefix = "" if shutil.which("teasr") else f"{os.path.relpath(Path(sys.executable).parent)}/"
    console.print("[dim]next:[/]")
    for command in commands:
        runnable = re.sub(r"(^|(?<= ))(teasr|mlflow) ", rf"{prefix}\2 ", command, count=1)
        console.print(f"  {runnable}", highlight=False, soft_wrap=True, markup=False)
