"""Options that several groups of commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path | None,
    typer.Option(
        "--home", help="Folder of runs and models [default: $TEASR_HOME or ./teasr-home]."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe: training.minutes=30."),
]


def home_folder(given: Path | None) -> Path:
    """The working folder: `--home`, $TEASR_HOME or the default; set for all that runs below us."""
    if given is not None:
        os.environ["TEASR_HOME"] = str(given.expanduser().absolute())
    return Path(os.environ.get("TEASR_HOME") or "teasr-home").expanduser().absolute()
