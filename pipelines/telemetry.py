"""The platform's own figures for Prometheus: every name, and what it means, in one place.

Drivers and workers note figures; Ray sends them to their node's exporter every 10 seconds and when
a process ends, and Prometheus reads them there: with `ray_` before the name, and with `_total`
behind that of a counter. A counter keeps what ended processes counted, as long as the node's Ray
lives; a gauge goes 20 seconds after its process. Outside a Ray nothing is noted.

What outlives a Ray, retrainings and promotions, is told by `jobs.schedule_metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import ray
from ray.util import metrics


@dataclass(frozen=True)
class Figure:
    """What is noted under one name.

    Attributes:
        labels: that tell its series apart.
    """

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    labels: tuple[str, ...]

    @property
    def exported(self) -> str:
        """As Prometheus knows it."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


SAMPLES = Figure(
    "teasr_samples",
    "counter",
    "Samples made, by stage: ingest, synthesize, replay, feed (pairs for a training), restore.",
    ("stage",),
)
QUARANTINED = Figure(
    "teasr_quarantined", "counter", "Samples left out, by stage and reason.", ("stage", "reason")
)

_RUN = ("run",)
STEP = Figure("teasr_training_step", "gauge", "Optimizer steps done.", _RUN)
BAD_STEPS = Figure(
    "teasr_training_bad_steps", "gauge", "Steps left out: a loss was not finite.", _RUN
)
PROGRESS = Figure("teasr_training_progress", "gauge", "Share of the run that is done.", _RUN)
SAMPLES_PER_SECOND = Figure(
    "teasr_training_samples_per_second", "gauge", "Pairs consumed, over all workers.", _RUN
)
SWEEPS_PER_SECOND = Figure(
    "teasr_training_sweeps_per_second",
    "gauge",
    "Passes over the network's weights, forward and backward, of one worker.",
    _RUN,
)
FEED_WAIT = Figure(
    "teasr_training_feed_wait_share",
    "gauge",
    "Share of the time in which rank 0 waited for data.",
    _RUN,
)
LOSS = Figure("teasr_training_loss", "gauge", "Mean of the last steps, by term.", ("run", "term"))
MEMORY = Figure(
    "teasr_training_memory_bytes",
    "gauge",
    "Of rank 0: resident in its process, allocated on its GPU, and the most so far.",
    ("run", "kind"),
)

FIGURES = (
    *(SAMPLES, QUARANTINED, STEP, BAD_STEPS, PROGRESS, SAMPLES_PER_SECOND, SWEEPS_PER_SECOND),
    *(FEED_WAIT, LOSS, MEMORY),
)

_OF_MLFLOW = {
    "samples_per_second": SAMPLES_PER_SECOND,
    "sweeps_per_second": SWEEPS_PER_SECOND,
    "share_waiting_for_data": FEED_WAIT,
}


def count(figure: Figure, more: int, **labels: str) -> None:
    """Add to a counter; nothing outside a Ray."""
    if more > 0 and ray.is_initialized():
        _made(figure).inc(more, labels)


def show(figure: Figure, value: float, **labels: str) -> None:
    """Set a gauge; nothing outside a Ray."""
    if ray.is_initialized():
        _made(figure).set(float(value), labels)


def stage(name: str, made: int, reasons: Mapping[str, int]) -> None:
    """Count what a stage made, and what it left out by reason."""
    count(SAMPLES, made, stage=name)
    for reason, number in reasons.items():
        count(QUARANTINED, number, stage=name, reason=reason)


def training(run: str, progress: float, values: Mapping[str, float]) -> None:
    """Show the means that a training also logs to MLflow, under the names that they have there."""
    show(PROGRESS, progress, run=run)
    for name, value in values.items():
        group, _, rest = name.partition("/")
        if name in _OF_MLFLOW:
            show(_OF_MLFLOW[name], value, run=run)
        elif group == "loss":
            show(LOSS, value, run=run, term=rest)
        elif group == "memory":
            show(MEMORY, value * 1e6, run=run, kind=rest.removesuffix("_mb"))


@cache
def _made(figure: Figure) -> Any:
    kind = metrics.Counter if figure.kind == "counter" else metrics.Gauge
    return kind(figure.name, figure.description, figure.labels)
