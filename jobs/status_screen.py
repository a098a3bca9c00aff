"""`teasr status`, drawn: what `jobs.status` collected, on one screen."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jobs.console import console
from jobs.status import (
    Cluster,
    Data,
    Job,
    Model,
    Node,
    Retrainings,
    Status,
    Training,
    Trainings,
    collect,
    outcome,
)

_TITLES = {
    "cluster": "Cluster",
    "jobs": "Jobs",
    "trainings": "Trainings",
    "retrainings": "Retrainings",
    "models": "Models",
    "data": "Data",
}
_MOST_NODES = 8


def show(home: Path, as_json: bool = False, every: float | None = None) -> None:
    """Look at `home` and print it; with `every`, again and again after so many seconds."""
    if as_json or every is None or not console.is_terminal:
        while True:
            status = collect(home)
            if as_json:
                print(json.dumps(asdict(status)), flush=True)
            else:
                console.print(screen(status))
            if every is None:
                return
            time.sleep(every)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(screen(collect(home)), refresh=True)
            time.sleep(every)


def screen(status: Status) -> Group:
    """All parts, each a few lines under its name; what is not there is said in a word."""
    bodies: dict[str, list[RenderableType]] = {
        "cluster": _cluster(status.cluster),
        "jobs": _jobs(status.jobs),
        "trainings": _trainings(status.trainings),
        "retrainings": _retrainings(status.retrainings, status.at),
        "models": _models(status.models, status.at),
        "data": _data(status.data, status.at),
    }
    parts: list[RenderableType] = [Text(f"{status.home}, {_time(status.at)} UTC", "dim")]
    for name, body in bodies.items():
        trouble = status.troubles.get(name)
        shown = [Text(trouble, "red")] if trouble else body
        parts += [Text(_TITLES[name], "bold"), *(Padding(one, (0, 0, 0, 2)) for one in shown)]
    return Group(*parts)


def _cluster(cluster: Cluster | None) -> list[RenderableType]:
    if cluster is None:
        return [Text("no Ray cluster here", "dim")]
    nodes = cluster.nodes
    gone = f", {cluster.dead} gone" if cluster.dead else ""
    count = f"{len(nodes)} nodes" if len(nodes) > 1 else "1 node"
    rows = [("", "CPUs", "GPUs", "memory", "object store", "spilled")]
    if len(nodes) > 1:
        everything = Node(
            address="all",
            cpus=sum(node.cpus for node in nodes),
            cpus_used=sum(node.cpus_used for node in nodes),
            gpus=sum(node.gpus for node in nodes),
            gpus_used=sum(node.gpus_used for node in nodes),
            memory=_sum(node.memory for node in nodes),
            memory_used=_sum(node.memory_used for node in nodes),
            store=sum(node.store for node in nodes),
            store_used=_sum(node.store_used for node in nodes),
            spilled=_sum(node.spilled for node in nodes),
        )
        rows.append(_node(everything))
    rows += [_node(node) for node in nodes[:_MOST_NODES]]
    more = len(nodes) - _MOST_NODES
    return [
        Text(f"{cluster.address}, {count}{gone}"),
        _grid(rows),
        *([Text(f"and {more} more nodes", "dim")] if more > 0 else []),
    ]


def _node(node: Node) -> tuple[str, ...]:
    return (
        node.address,
        f"{node.cpus_used:g}/{node.cpus:g}",
        f"{node.gpus_used:g}/{node.gpus:g}",
        f"{size(node.memory_used)} of {size(node.memory)}",
        f"{size(node.store_used)} of {size(node.store)}",
        size(node.spilled),
    )


def _jobs(jobs: tuple[Job, ...] | None) -> list[RenderableType]:
    if jobs is None:
        return [Text("no dashboard here: see teasr jobs list --address URL", "dim")]
    rows = [
        (
            job.job,
            job.command,
            job.status if job.exit_code in (None, 0) else f"{job.status}, {job.exit_code}",
            duration(job.seconds),
        )
        for job in jobs
    ]
    return [_grid(rows)] if rows else [Text("none", "dim")]


def _trainings(trainings: Trainings | None) -> list[RenderableType]:
    if trainings is None or not (trainings.open or trainings.stale):
        return [Text("none", "dim")]
    shown: list[RenderableType] = []
    if trainings.open:
        shown.append(_grid([_training(one) for one in trainings.open]))
    if trainings.stale:
        shown.append(Text(f"{trainings.stale} stopped unfinished more than a day ago", "dim"))
    return shown


def _training(one: Training) -> Sequence[str]:
    loss = f"loss {one.loss:.4f}" if one.loss is not None else ""
    if one.not_finite:
        loss = f"the {one.not_finite} term is not finite"
    if not one.trains:
        at = "no step yet" if one.step is None else f"step {one.step}"
        return (one.name, at, f"no step for {duration(one.idle_seconds)}", loss, "", "")
    if one.progress is None:
        return (one.name, "begins" if one.step is None else f"step {one.step}", "", loss, "", "")
    return (
        one.name,
        f"step {one.step}, {one.progress:.0%}",
        f"{one.samples_per_second:.1f} samples/s",
        loss,
        f"{duration(one.seconds_left)} left",
        f"feed wait {one.waiting_for_data:.0%}",
    )


def _retrainings(found: Retrainings | None, now: str) -> list[RenderableType]:
    if found is None:
        return [Text("none scheduled: see teasr schedule add", "dim")]
    rows = [(model, "is retrained now", who, "", "") for model, who in found.running.items()]
    rows += [
        (one.schedule, one.state, f"{ago(one.at, now)}, {one.reason}", duration(one.seconds), said)
        for one in found.last
        for said in [one.detail or (f"version {one.version}" if one.version else "")]
    ]
    rows += [
        (one.name, "next", f"{_time(one.coming)} UTC" if one.coming else one.when, "", "")
        for one in found.schedules
    ]
    shown: list[RenderableType] = [_grid(rows)] if rows else []
    if found.schedules and found.service is None:
        shown.append(Text("the schedule service does not run: teasr schedule run", "yellow"))
    return shown


def _models(models: tuple[Model, ...] | None, now: str) -> list[RenderableType]:
    if not models:
        return [Text("none registered", "dim")]
    return [_grid([_model(one, now) for one in models])]


def _model(one: Model, now: str) -> Sequence[str]:
    champion = "no champion" if one.champion is None else f"version {one.champion}"
    since = f"since {_time(one.since)} ({ago(one.since, now)})" if one.since else ""
    by = f"by {one.by}" if one.by else ""
    waiting = f"challenger: version {one.challenger}" if one.challenger else ""
    last = ""
    if one.last and (one.last.version != one.champion or one.last.state != "done"):
        what = outcome(one.last.action, one.last.state)
        last = f"last: version {one.last.version} {what} {ago(one.last.at, now)}"
    return (one.model, champion, since, by, waiting, last)


def _data(data: Data | None, now: str) -> list[RenderableType]:
    if data is None:
        return [Text("no working folder yet", "dim")]
    rows = [("", "samples", "size", "quarantined", "newest", "last 7 days")]
    rows += [
        (
            one.name,
            f"{one.samples} {'photographs' if one.kind == 'hr' else 'pairs'}",
            size(one.bytes),
            str(one.quarantined),
            ago(one.newest, now) if one.newest else "",
            f"{one.recent_samples}, {size(one.recent_bytes)}",
        )
        for one in data.datasets
    ]
    free = f"{size(data.disk_free)} free on its disk"
    return [*([_grid(rows)] if data.datasets else [Text("no datasets", "dim")]), Text(free, "dim")]


def _grid(rows: Iterable[Sequence[str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _sum(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None when none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def size(count: float | None) -> str:
    """Bytes for people; `?` for what is not known."""
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float | None) -> str:
    """`12 s`, `3 min`, `5.1 h` or `2 d`; empty for None."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def ago(at: str, now: str) -> str:
    """From an ISO time to another."""
    seconds = (datetime.fromisoformat(now) - datetime.fromisoformat(at)).total_seconds()
    return f"{duration(max(seconds, 0))} ago"


def _time(at: str | None) -> str:
    return (at or "")[:16].replace("T", " ")
