"""Where a version came from: data, recipe, code, figures, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from teasr.evaluation import summary_rows
from teasr.registry import aliases_of, evaluation_of, iso_time, version_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass
class VersionDetails:
    """Where a version came from.

    Attributes:
        aliases: such as `champion`.
        run_id: of the training.
        dataset, benchmark: fingerprints.
        tags: the version's other tags that teasr wrote (`recipe`, ...).
        metrics: means by system, then metric; empty without an evaluation.
        created: UTC, ISO 8601.
    """

    model: str
    version: int
    aliases: list[str]
    run_id: str
    dataset: str | None
    benchmark: str | None
    commit: str | None
    recipe: str | None
    created: str
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)


def version_details(client: MlflowClient, name: str, version: int) -> VersionDetails:
    """Where version `version` of `name` came from (`UsageError` when there is none)."""
    found = version_of(client, name, version)
    tags = {
        key.removeprefix("teasr."): value
        for key, value in found.tags.items()
        if key.startswith("teasr.")
    }
    noted_benchmark = tags.pop("benchmark", None)
    evaluation = evaluation_of(client, found)  # may have been made anew since
    return VersionDetails(
        model=name,
        version=version,
        aliases=sorted(
            alias for alias, held in aliases_of(client, name).items() if held == version
        ),
        run_id=found.run_id or "",
        dataset=tags.pop("dataset", None),
        benchmark=evaluation.benchmark if evaluation else noted_benchmark,
        commit=tags.pop("commit", None),
        recipe=tags.pop("recipe", None),
        created=iso_time(found.creation_timestamp),
        tags=tags,
        metrics=dict(summary_rows(evaluation)) if evaluation else {},
    )
