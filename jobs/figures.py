"""Figures of an evaluation for people: in the terminal, and as texts and pictures for pages."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.table import Table

from teasr.evaluation import DEFAULT_METRICS, LABELS, METRICS, Evaluation
from teasr.images import Bytes, decode, encode

ORIGINAL = "original"
"""What pages call the ground truth."""


def table(evaluation: Evaluation, title: str = "") -> Table:
    """The summary for people: means over 95% intervals; what was not measured is named."""
    measured, missing = evaluation.measured(), not_measured(evaluation)
    caption = "Under each mean its 95% interval."
    if missing:
        caption += f" Not measured: {missing}."
    result = Table(
        title=title or None, title_justify="left", caption=caption, caption_justify="left"
    )
    for name in ("", *map(heading, measured), "s / megapixel"):
        result.add_column(name, justify="left" if not name else "right")
    for system in evaluation.scores:
        cells = []
        for name in measured:
            mean, *interval = mean_and_interval(evaluation, system, name)
            cells.append("\n".join([mean, *(f"[dim]{text}[/]" for text in interval)]))
        seconds = evaluation.seconds_per_megapixel.get(system, 0)
        result.add_row(system, *cells, f"{seconds:.2f}")
    return result


def mean_and_interval(evaluation: Evaluation, system: str, metric: str) -> list[str]:
    """`28.77`, and `27.9–29.6` where there is an interval."""
    mean, interval = evaluation.mean(system, metric), evaluation.interval(system, metric)
    lines = [figure(metric, mean)]
    if interval is not None:
        digits = LABELS[metric][2] - 1
        lines.append(f"{interval[0]:.{digits}f}–{interval[1]:.{digits}f}")
    return lines


def figure(metric: str, value: float | None) -> str:
    """A metric's value with the digits that it deserves."""
    return "not measured" if value is None else f"{value:.{LABELS[metric][2]}f}"


def heading(metric: str) -> str:
    """A metric's name and unit: `PSNR-Y (dB)`."""
    name, unit, _ = LABELS[metric]
    return f"{name} ({unit})" if unit else name


def directed_heading(metric: str) -> str:
    """`heading` and which way is better."""
    return f"{heading(metric)} {'↑' if METRICS[metric] == 'higher' else '↓'}"


def not_measured(evaluation: Evaluation) -> str:
    """The usual metrics that the evaluation lacks; empty when it has all."""
    measured = evaluation.measured()
    return ", ".join(LABELS[name][0] for name in DEFAULT_METRICS if name not in measured)


def cut_for_page(
    pictures: Mapping[str, bytes], side: int
) -> tuple[tuple[int, int], dict[str, bytes], str]:
    """The middle, `side` pixels a side at most, of encoded pictures of one size.

    Returns:
        Width and height; the pictures; and what is shown, for people.
    """
    decoded = {name: decode(data).rgb for name, data in pictures.items()}
    height, width = next(iter(decoded.values())).shape[:2]
    cut = min(side, width), min(side, height)
    note = f"{width} × {height}"
    if cut == (width, height):
        return cut, dict(pictures), note
    note = f"the middle {cut[0]} × {cut[1]} of {note}"
    return cut, {name: encode(_middle(rgb, *cut)) for name, rgb in decoded.items()}, note


def _middle(rgb: Bytes, width: int, height: int) -> Bytes:
    top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
    return np.ascontiguousarray(rgb[top : top + height, left : left + width])
