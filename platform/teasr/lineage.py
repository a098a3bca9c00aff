"""Where a version came from, and what became of it: data, recipe, code, figures, gate, changes.

What is known is spread over the version's tags, its training run and the records of promotions;
here it is one document, which `teasr history` shows and MLflow's own page of the version holds as
its description.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from teasr.evaluation import LABELS, Evaluation, summary_rows
from teasr.promotion import Record, history
from teasr.registry import aliases_of, evaluation_of, iso_time, version_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)

Sections = Mapping[str, Mapping[str, str]]
"""Names and values under headings."""

_LONGEST = 5000
"""Characters of a description that MLflow's databases hold."""
_EVENTS = 12
"""Latest changes that a description holds."""


@dataclass
class VersionDetails:
    """Where a version came from, and what became of it.

    Attributes:
        aliases: such as `champion`.
        run_id: of the training.
        dataset, benchmark: fingerprints.
        tags: the version's other tags that teasr wrote (`recipe`, ...).
        training: the training run's tags that teasr wrote (`commit`, `versions`, ...); empty when
            the run is gone.
        metrics: means by system, then metric; empty without an evaluation.
        evaluation: None without one.
        records: promotions, refusals and rollbacks that made it live or ended that, oldest first.
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
    training: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    records: list[Record] = field(default_factory=list)

    @property
    def judged(self) -> Record | None:
        """The gate's last word on it."""
        asked = [r for r in self.records if r.action == "promote" and r.version == self.version]
        return asked[-1] if asked else None


def version_details(client: MlflowClient, name: str, version: int) -> VersionDetails:
    """All of version `version` of `name` (`UsageError` when there is none)."""
    found = version_of(client, name, version)
    tags = _ours(found.tags)
    noted_benchmark = tags.pop("benchmark", None)
    evaluation = evaluation_of(client, found)  # may have been made anew since
    records = [r for r in reversed(history(client, name)) if version in (r.version, r.replaced)]
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
        training=_ours(_run_tags(client, found.run_id)),
        metrics=dict(summary_rows(evaluation)) if evaluation else {},
        evaluation=evaluation,
        records=[r for r in records if r.version == version or r.state == "done"],
    )


def sections(details: VersionDetails) -> Sections:
    """What is known of a version but its figures, for people; what is not known is left out."""
    tags, training, judged = details.tags, details.training, details.judged
    base = " ".join(filter(None, (tags.get("base"), _in_brackets(tags.get("base_fingerprint")))))
    resolved = f"resolved in runs:/{details.run_id}/recipe.yaml" if training else ""
    found = details.evaluation
    pictures = len(next(iter(found.scores.values()), ())) if found else 0
    commit = training.get("commit") or details.commit
    registered_with = details.commit if details.commit != commit else None
    gate: dict[str, str | None] = {"verdict": "not asked yet"}
    if judged is not None:
        against = f"version {judged.replaced}" if judged.replaced else "none, as the first"
        gate = {
            "verdict": judged.verdict,
            "champion then": against,
            "report": judged.report,
            "record": f"run {judged.run_id}",
        }
    everything: dict[str, dict[str, str | None]] = {
        "Data": {
            "dataset": details.dataset or training.get("data_fingerprint"),
            "size": tags.get("data_size"),
            "kept in": training.get("data"),
            "degradation": tags.get("degradation"),
            "benchmark": _joined(details.benchmark, f"{pictures} pictures" if pictures else None),
            "benchmark in": tags.get("benchmark_location"),
        },
        "Training": {
            "run": details.run_id,
            "recipe": _joined(details.recipe, resolved),
            "started from": training.get("parent") or tags.get("init"),
            "champion then": tags.get("champion"),
            "frozen base": base,
            "commit": commit,
            "registered with": registered_with,
            "libraries": training.get("versions"),
            "weights": _prefixed("sha256 ", tags.get("sha256")),
            "command": training.get("command"),
        },
        "Gate": gate,
        "Changes": _events(details),
    }
    known = {
        heading: {name: text for name, text in lines.items() if text}
        for heading, lines in everything.items()
    }
    return {heading: lines for heading, lines in known.items() if lines}


def markdown(details: VersionDetails) -> str:
    """Everything as markdown, for the page of the version in MLflow."""
    told = dict(sections(details))
    changes = told.pop("Changes")
    latest = dict(list(changes.items())[-_EVENTS:])
    blocks = [_list("Changes", latest), *_figures(details)]
    blocks += [_list(heading, lines) for heading, lines in told.items()]
    text = "\n\n".join(blocks) + "\n"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]}…\n"


def describe(client: MlflowClient, name: str, *versions: int | None) -> None:
    """Bring MLflow's own pages of `versions` up to date: tags and description; None is passed over.

    A page that could not be written is logged: what it tells of has happened all the same, and the
    next call writes it.
    """
    from mlflow.exceptions import MlflowException

    for version in versions:
        if version is None:
            continue
        try:
            details = version_details(client, name, version)
            for key, value in _noted(details).items():
                client.set_model_version_tag(name, str(version), f"teasr.{key}", value)
            client.update_model_version(name, str(version), description=markdown(details))
        except MlflowException as error:
            code = error.error_code
            _log.warning("The page of %s version %d was not written: %s", name, version, code)


def _noted(details: VersionDetails) -> dict[str, str]:
    """Tags that say how the version became what it is."""
    judged = details.judged
    made = [r for r in details.records if r.version == details.version and r.state == "done"]
    tags = {}
    if judged is not None:
        tags = {"gate": judged.verdict, "report": judged.report or ""}
    if made:
        latest = made[-1]
        tags |= {"live_by": f"{latest.action} by {latest.by}", "live_at": latest.at}
        tags["replaced"] = str(latest.replaced or "")
    return {key: value for key, value in tags.items() if value}


def _events(details: VersionDetails) -> dict[str, str | None]:
    """What happened to the version, by time."""
    lines = [(details.created, "registered as challenger")]
    for record in details.records:
        replaced = f", replacing version {record.replaced}" if record.replaced else ""
        if record.version == details.version:
            told = {
                "done": f"became champion{replaced}",
                "refused": "refused by the gate",
                "interrupted": "a change was interrupted; nothing came of it",
                "unfinished": "a change is under way, or was cut off",
            }[record.state]
        else:
            told = f"replaced by version {record.version}"
        lines.append((record.at, f"{told} ({record.action} by {record.by})"))
    events: dict[str, str | None] = {}
    for at, told in lines:
        when = f"{at[:10]} {at[11:19]} UTC"
        before = events.get(when)
        events[when] = told if before is None else f"{before}; {told}"
    return events


def _figures(details: VersionDetails) -> list[str]:
    """A table of means and intervals; none without an evaluation."""
    found = details.evaluation
    if found is None:
        return []
    metrics = found.measured()
    lines = [
        f"| | {' | '.join(LABELS[metric][0] for metric in metrics)} |",
        f"|---|{'---|' * len(metrics)}",
    ]
    for system in found.scores:
        cells = [_cell(found, system, metric) for metric in metrics]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return ["\n".join(lines)]


def _cell(evaluation: Evaluation, system: str, metric: str) -> str:
    mean, interval = evaluation.mean(system, metric), evaluation.interval(system, metric)
    digits = LABELS[metric][2]
    if mean is None:
        return "not measured"
    around = "" if interval is None else f" ({interval[0]:.{digits}f}–{interval[1]:.{digits}f})"
    return f"{mean:.{digits}f}{around}"


def _list(heading: str, lines: Mapping[str, str]) -> str:
    return "\n".join([f"**{heading}**", "", *(f"- {name}: {text}" for name, text in lines.items())])


def _run_tags(client: MlflowClient, run_id: str | None) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    if not run_id:
        return {}
    try:
        return dict(client.get_run(run_id).data.tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}  # purged


def _ours(tags: Mapping[str, str]) -> dict[str, str]:
    return {
        key.removeprefix("teasr."): value for key, value in tags.items() if key.startswith("teasr.")
    }


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _in_brackets(text: str | None) -> str | None:
    return text and f"({text})"


def _prefixed(prefix: str, text: str | None) -> str | None:
    return text and prefix + text
