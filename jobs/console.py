"""What the commands print: tables, progress, and one-line errors."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

console = Console()
errors = Console(stderr=True)


@contextmanager
def progress_bar(title: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A bar on the terminal; yields `update(done, note)`. Silent where there is no terminal."""
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
