"""`teasr drift`: do the pictures that come in still look like those the champion learned from?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from teasr import promotion, registry
from teasr.drift import (
    COMPARED,
    REFERENCE_FILE,
    SIZES,
    Difference,
    DriftSettings,
    Inputs,
    Reference,
    compare,
    inputs_file,
    read_inputs,
)
from teasr.errors import UsageError
from teasr.gallery import Figures, figures_page
from teasr.plots import Overlaid

if TYPE_CHECKING:
    from mlflow import MlflowClient

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_HEADINGS = ("training", "inputs", "KS", "chance", "PSI", "outside", "drift")
_ABOUT = (
    "Medians of the training and of the inputs; KS: Kolmogorov-Smirnov distance; chance: of one as "
    "large when nothing changed; PSI: population stability index; outside: share of inputs beyond "
    "the central 99% of the training. Sizes are shown, not judged."
)


@dataclass(frozen=True)
class Drifted:
    """A comparison of inputs with a reference.

    Attributes:
        reference_name: whose pictures the reference is of, for people.
        differences: figure by figure.
    """

    model: str
    reference_name: str
    reference: Reference
    inputs: Inputs
    differences: list[Difference]

    @property
    def figures(self) -> list[str]:
        """Names of the figures that drifted."""
        return [found.figure for found in self.differences if found.drifted]


def drift(
    client: MlflowClient,
    name: str,
    home: Path,
    *,
    inputs: Path | None = None,
    since: datetime | None = None,
    reference: Path | None = None,
    settings: DriftSettings | None = None,
) -> Drifted:
    """Compare what came in with what the champion of `name` was trained on.

    Args:
        inputs: recorded inputs; default those of the model in `home`.
        since: inputs before it are left out.
        reference: compare with the inputs recorded there instead, of a time that was well.

    Raises:
        UsageError: no inputs, too few of them, an unknown model, no champion, or one whose training
            kept no reference.
    """
    recorded = read_inputs(inputs or inputs_file(home, name), since)
    if reference is not None:
        known = read_inputs(reference)
        whose, of = str(reference), Reference(known.figures, f"inputs recorded in {reference}")
    else:
        version = promotion.champion_version(client, name)
        if version is None:
            raise UsageError(
                f"'{name}' has no champion to compare with.",
                "Promote a version, or give --reference.",
            )
        text = registry.artifact_text(
            client, registry.version_of(client, name, version), REFERENCE_FILE
        )
        if text is None:
            raise UsageError(
                f"The training of '{name}' version {version} kept no {REFERENCE_FILE}.",
                "teasr retrain keeps one; or compare with earlier inputs: --reference FILE.",
            )
        whose, of = f"{name} version {version}", Reference.from_json(text)
    return Drifted(name, whose, of, recorded, compare(of, recorded, settings))


def ago(text: str, now: datetime | None = None) -> datetime:
    """The moment `text`, such as `7d`, `12h` or `30m`, before now.

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"(\d{1,6})([mhdw])", text)
    if match is None:
        raise UsageError(f"--since {text}: a time such as 30m, 12h, 7d or 4w is expected.")
    seconds = int(match[1]) * _UNITS[match[2]]
    try:
        return (now or datetime.now(UTC)) - timedelta(seconds=seconds)
    except OverflowError:
        raise UsageError(f"--since {text} is before all time.") from None


def table(result: Drifted) -> Table:
    """The comparison for the terminal."""
    shown = Table("", *_HEADINGS, title=_title(result), title_justify="left")
    for found, cells in zip(result.differences, _rows(result).values()):
        name = found.figure.replace("_", " ")  # no room for units
        shown.add_row(name, *cells, style="bold red" if found.drifted else "")
    return shown


def page(result: Drifted) -> str:
    """The comparison as HTML text, with both distributions of every figure."""
    inputs = result.inputs
    facts = {
        "answer": f"drift in {', '.join(result.figures)}" if result.figures else "no drift",
        "inputs": f"{inputs.pictures} pictures{_period(inputs)}",
        "training": f"{result.reference_name}: {result.reference.about}",
    }
    plots: dict[str, list[Overlaid]] = {"Compared": [], "Sizes": []}
    for found in result.differences:
        group = "Compared" if found.figure in COMPARED else "Sizes"
        sets = {
            "inputs": np.array(inputs.figures[found.figure]),
            "training": np.array(result.reference.figures[found.figure]),
        }
        plots[group].append(Overlaid((COMPARED | SIZES)[found.figure], sets))
    about = "Shares of the inputs and of the training's pictures; how many, in brackets."
    return figures_page(
        _title(result), facts, Figures(_HEADINGS, _rows(result)), _ABOUT, plots, about
    )


def _title(result: Drifted) -> str:
    return f"Inputs of {result.model} against {result.reference_name}"


def _period(inputs: Inputs) -> str:
    if inputs.first is None or inputs.last is None:
        return ""
    return f", {inputs.first:%Y-%m-%d %H:%M} to {inputs.last:%Y-%m-%d %H:%M} UTC"


def _rows(result: Drifted) -> dict[str, list[str]]:
    rows = {}
    for found in result.differences:
        medians = [f"{found.reference_median:.4g}", f"{found.median:.4g}"]
        if found.distance is None:
            cells = [*medians, "", "", "", "", ""]
        else:
            assert found.chance is not None and found.stability is not None
            assert found.outside is not None
            chance = "< 0.0001" if found.chance < 1e-4 else f"{found.chance:.4f}"
            cells = [
                *medians,
                f"{found.distance:.2f}",
                chance,
                f"{found.stability:.2f}",
                f"{found.outside:.0%}",
                "yes" if found.drifted else "no",
            ]
        rows[(COMPARED | SIZES)[found.figure]] = cells
    return rows
