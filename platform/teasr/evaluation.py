"""What an evaluation found: figures per picture and system, on a named benchmark.

A *system* is a way to get from the low-resolution picture to the restored one: `bicubic`, or the
model at a number of steps (`1 step`, `4 steps`). The evaluation of a model is kept whole, per
picture: the promotion gate compares two models picture by picture, not by their means.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from teasr.errors import TeasrError
from teasr.metrics import Scores, bootstrap_interval

BICUBIC = "bicubic"
METRICS = {
    "psnr_y": "higher",
    "ssim_y": "higher",
    "lpips": "lower",
    "dists": "lower",
    "niqe": "lower",
    "musiq": "higher",
    "maniqa": "higher",
    "clipiqa": "higher",
}
"""Metrics of a picture by name, and which way is better."""
COSTS = ("seconds_per_megapixel", "peak_memory_mb")
"""What restoring takes, by system and not by picture; less is better."""
LABELS = {
    "psnr_y": ("PSNR-Y", "dB", 2),
    "ssim_y": ("SSIM-Y", "", 4),
    "lpips": ("LPIPS", "", 4),
    "dists": ("DISTS", "", 4),
    "niqe": ("NIQE", "", 2),
    "musiq": ("MUSIQ", "", 2),
    "maniqa": ("MANIQA", "", 4),
    "clipiqa": ("CLIP-IQA", "", 4),
    "seconds_per_megapixel": ("time", "s / megapixel", 2),
    "peak_memory_mb": ("memory", "MB", 0),
}
"""Of metrics and costs: what people call them, the unit, and digits after the point."""
DEFAULT_METRICS = ("psnr_y", "ssim_y", "lpips", "dists", "niqe")
"""What is measured when nothing else is asked for; the others want the package pyiqa."""
CONFIDENCE = 0.95
DRAWS = 10_000
"""Resamples of the pictures that an interval is of."""


def system_name(steps: int) -> str:
    """`1 step`, `4 steps`: the model's name in tables."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"


@dataclass
class Evaluation:
    """Scores of a benchmark's pictures.

    Attributes:
        benchmark: fingerprint of the pair dataset.
        scores: by system, then by picture's key, in one order of keys for every system.
        seconds_per_megapixel: by system, of restored pixels on the machine that evaluated.
        peak_memory_mb: by system, the most that the evaluating process held: allocated on a GPU,
            else resident, Python and libraries included. Empty when not measured.
        machine: processor or GPU that evaluated; empty when unknown.
    """

    benchmark: str
    scores: dict[str, dict[str, Scores]]
    seconds_per_megapixel: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: dict[str, float] = field(default_factory=dict)
    machine: str = ""

    def values(self, system: str, metric: str) -> list[float]:
        """A metric of every picture, in the order of keys; empty when it was not measured.

        Raises:
            TeasrError: when the system was not evaluated.
        """
        if system not in self.scores:
            raise TeasrError(
                f"The evaluation has no '{system}'.", f"It has: {', '.join(self.scores)}."
            )
        values = [getattr(scores, metric) for scores in self.scores[system].values()]
        return [] if any(value is None for value in values) else values

    def mean(self, system: str, metric: str) -> float | None:
        """Mean over the pictures, or None when the metric was not measured."""
        values = self.values(system, metric)
        return statistics.fmean(values) if values else None

    def interval(self, system: str, metric: str) -> tuple[float, float] | None:
        """95% bootstrap interval of the mean: how far it would move with other pictures like these.

        Equal values give equal intervals. None when the metric was not measured, for fewer than
        two pictures, and where a value is infinite.
        """
        values = self.values(system, metric)
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return None
        return bootstrap_interval(values, 0, CONFIDENCE, DRAWS)

    def measured(self) -> list[str]:
        """The metrics that every picture has by at least one system."""
        return [name for name in METRICS if any(self.values(s, name) for s in self.scores)]

    def to_json(self) -> str:
        """Everything, readable back by `from_json`; and the intervals, which follow from it."""
        scores = {
            system: {key: vars(score) for key, score in pictures.items()}
            for system, pictures in self.scores.items()
        }
        document = {
            "benchmark": self.benchmark,
            "seconds_per_megapixel": self.seconds_per_megapixel,
            "peak_memory_mb": self.peak_memory_mb,
            "machine": self.machine,
            "intervals": {
                system: {
                    name: interval
                    for name in METRICS
                    if (interval := self.interval(system, name)) is not None
                }
                for system in self.scores
            },
            "scores": scores,
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The inverse of `to_json`. What the document does not name was not measured.

        Raises:
            TeasrError: when the text is not an evaluation.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            scores = {
                system: {key: Scores(**values) for key, values in pictures.items()}
                for system, pictures in document["scores"].items()
            }
            return cls(
                document["benchmark"],
                scores,
                document["seconds_per_megapixel"],
                document.get("peak_memory_mb", {}),
                document.get("machine", ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TeasrError("This is not an evaluation written by teasr.") from None

    def to_csv(self) -> str:
        """One line per picture and system, for spreadsheets; a metric not measured is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        measured = self.measured()
        metrics = [name for name in METRICS if name in DEFAULT_METRICS or name in measured]
        writer.writerow(["picture", "system", *metrics])
        for system, pictures in self.scores.items():
            for key, scores in pictures.items():
                writer.writerow([key, system, *(_cell(getattr(scores, name)) for name in metrics)])
        return text.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def summary_rows(evaluation: Evaluation) -> Iterable[tuple[str, dict[str, float | None]]]:
    """(system, mean of each metric), in the order of evaluation."""
    for system in evaluation.scores:
        yield system, {metric: evaluation.mean(system, metric) for metric in METRICS}
