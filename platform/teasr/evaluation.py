"""What an evaluation found: figures per picture and system, on a named benchmark.

A *system* is a way to get from the low-resolution picture to the restored one: `bicubic`, or the
model at a number of steps (`1 step`, `4 steps`). The evaluation of a model is kept whole, per
picture: the promotion gate compares two models picture by picture, not by their means.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from teasr.errors import TeasrError
from teasr.metrics import Scores

BICUBIC = "bicubic"
METRICS = {"psnr_y": "higher", "ssim_y": "higher", "lpips": "lower"}
"""Metrics by name, and which way is better."""


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
    """

    benchmark: str
    scores: dict[str, dict[str, Scores]]
    seconds_per_megapixel: dict[str, float] = field(default_factory=dict)

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

    def to_json(self) -> str:
        """Everything, readable back by `from_json`."""
        scores = {
            system: {key: vars(score) for key, score in pictures.items()}
            for system, pictures in self.scores.items()
        }
        document = {
            "benchmark": self.benchmark,
            "seconds_per_megapixel": self.seconds_per_megapixel,
            "scores": scores,
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The inverse of `to_json`.

        Raises:
            TeasrError: when the text is not an evaluation.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            scores = {
                system: {key: Scores(**values) for key, values in pictures.items()}
                for system, pictures in document["scores"].items()
            }
            return cls(document["benchmark"], scores, document["seconds_per_megapixel"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TeasrError("This is not an evaluation written by teasr.") from None

    def to_csv(self) -> str:
        """One line per picture and system, for spreadsheets."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["picture", "system", *METRICS])
        for system, pictures in self.scores.items():
            for key, scores in pictures.items():
                writer.writerow([key, system, *(_cell(getattr(scores, name)) for name in METRICS)])
        return text.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def summary_rows(evaluation: Evaluation) -> Iterable[tuple[str, dict[str, float | None]]]:
    """(system, mean of each metric), in the order of evaluation."""
    for system in evaluation.scores:
        yield system, {metric: evaluation.mean(system, metric) for metric in METRICS}
