"""`teasr status`: what runs, what ran and what is live, collected in one look.

Each part is asked for at the same time as the others and fails by itself: what a store that is away
would have told is one line in `troubles`. Nothing is written, created or started.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from jobs.locks import holder
from jobs.record import LOSSES_FILE, PROGRESS_FILE, RUN_FILE, last_loss, seconds_left
from teasr.errors import TeasrError, UsageError
from teasr.shards import MANIFEST_NAME, manifest_document, manifest_of
from teasr.tracking import first_line, mask_credentials

PATIENCE_SECONDS = 20.0
"""So long each part may take."""
RECENT = timedelta(days=7)
"""Over which growth is told."""
STALE = timedelta(days=1)
"""Trainings that stopped longer ago are only counted."""
_LIVE_SECONDS = 120.0
_LIVE_STEPS = 5
_DEPTH = 3
"""Folders within `data` in which datasets are looked for."""
_LAST = 5


@dataclass(frozen=True)
class Node:
    """A machine of the cluster; sizes in bytes, None where its exporter did not tell.

    Attributes:
        cpus, gpus: that Ray gives out here, and of them those in use.
        memory: of the machine.
        store: the object store; what did not fit into it was spilled to disk.
    """

    address: str
    cpus: float
    cpus_used: float
    gpus: float
    gpus_used: float
    memory: float | None
    memory_used: float | None
    store: float
    store_used: float | None
    spilled: float | None


@dataclass(frozen=True)
class Cluster:
    """A Ray.

    Attributes:
        nodes: that are alive; dead: how many others there were.
    """

    address: str
    nodes: tuple[Node, ...]
    dead: int

    @classmethod
    def from_mapping(cls, document: Mapping[str, Any]) -> Cluster:
        """Of what was printed."""
        nodes = tuple(Node(**node) for node in document["nodes"])
        return cls(document["address"], nodes, document["dead"])


@dataclass(frozen=True)
class Job:
    """A Ray job. `started`: UTC, ISO 8601; `exit_code`: None while it runs."""

    job: str
    command: str
    status: str
    started: str | None
    seconds: float | None
    exit_code: int | None


@dataclass(frozen=True)
class Training:
    """A run that was begun and is not finished.

    Attributes:
        trains: whether a step was done lately: within two minutes, or within five steps' time.
        idle_seconds: since the last step.
        progress: share that is done, in [0, 1].
        seconds_left: of training, at the pace so far.
        not_finite: term whose loss was not finite in the last step.
    """

    name: str
    trains: bool
    idle_seconds: float
    step: int | None = None
    progress: float | None = None
    samples_per_second: float | None = None
    waiting_for_data: float | None = None
    seconds_left: float | None = None
    loss: float | None = None
    not_finite: str | None = None


@dataclass(frozen=True)
class Trainings:
    """Those of the working folder; `stale`: how many stopped unfinished more than a day ago."""

    open: tuple[Training, ...]
    stale: int


@dataclass(frozen=True)
class Retraining:
    """One that a schedule asked for; times in UTC, ISO 8601."""

    schedule: str
    state: str
    reason: str
    at: str
    seconds: float | None
    version: int | None
    detail: str


@dataclass(frozen=True)
class Scheduled:
    """A schedule; `coming`: its next time, UTC, ISO 8601."""

    name: str
    model: str
    when: str
    coming: str | None


@dataclass(frozen=True)
class Retrainings:
    """What schedules asked for, and what runs.

    Attributes:
        running: models that are retrained now, and by whom.
        last: newest first.
        results: how many ended, by schedule, then state.
        service: the process of `teasr schedule run`; None when it does not run.
    """

    running: dict[str, str]
    last: tuple[Retraining, ...]
    results: dict[str, dict[str, int]]
    schedules: tuple[Scheduled, ...]
    service: str | None


@dataclass(frozen=True)
class Change:
    """The last promotion, refusal or rollback of a model."""

    action: str
    state: str
    version: int
    at: str
    by: str


@dataclass(frozen=True)
class Model:
    """A registered model.

    Attributes:
        champion: version; since: UTC, ISO 8601; by: who promoted it. None without one.
        challenger: version that waits for the gate.
        changes: how many there were, by outcome: promoted, refused, rolled back.
        last: the newest change.
    """

    model: str
    champion: int | None
    since: str | None
    by: str | None
    challenger: int | None
    changes: dict[str, int]
    last: Change | None


@dataclass(frozen=True)
class Dataset:
    """A dataset in the working folder.

    Attributes:
        newest: when its newest shard was written, UTC, ISO 8601.
        recent_samples, recent_bytes: in shards that were written in the last 7 days.
    """

    name: str
    kind: str
    samples: int
    bytes: int
    quarantined: int
    newest: str | None
    recent_samples: int
    recent_bytes: int


@dataclass(frozen=True)
class Data:
    """Datasets; `disk_free`: bytes, where the working folder is."""

    datasets: tuple[Dataset, ...]
    disk_free: int | None


@dataclass
class Status:
    """One look. A part is None where there is nothing of it, or `troubles` says why by its name.

    Attributes:
        at: UTC, ISO 8601.
    """

    home: str
    at: str
    cluster: Cluster | None = None
    jobs: tuple[Job, ...] | None = None
    trainings: Trainings | None = None
    retrainings: Retrainings | None = None
    models: tuple[Model, ...] | None = None
    data: Data | None = None
    troubles: dict[str, str] = field(default_factory=dict)


def collect(home: Path, patience: float = PATIENCE_SECONDS) -> Status:
    """Look at everything, for at most `patience` seconds."""
    now = datetime.now(UTC)
    parts: dict[str, Callable[[], Any]] = {
        "cluster": partial(cluster, patience),
        "jobs": jobs,
        "trainings": partial(trainings, home, now),
        "retrainings": partial(retrainings, home, now),
        "models": partial(models, home),
        "data": partial(data, home, now),
    }
    # Each writes into a dictionary of its own look: a late one must not change what was told.
    found: dict[str, Any] = {}
    troubles: dict[str, str] = {}
    threads = {
        name: threading.Thread(target=_ask, args=(name, part, found, troubles), daemon=True)
        for name, part in parts.items()
    }
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + patience
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    told, failed = dict(found), dict(troubles)
    for name in parts:
        if name not in told and name not in failed:
            failed[name] = f"no answer within {patience:g} s"
    at = now.isoformat(timespec="seconds")
    return Status(str(home), at, **told, troubles={n: failed[n] for n in parts if n in failed})


def _ask(
    name: str, part: Callable[[], Any], found: dict[str, Any], troubles: dict[str, str]
) -> None:
    try:
        found[name] = part()
    except TeasrError as error:
        troubles[name] = error.message
    except Exception as error:  # of any store: the others are to be seen all the same
        troubles[name] = mask_credentials(first_line(error))


def cluster(patience: float = PATIENCE_SECONDS) -> Cluster | None:
    """See `jobs.cluster_state.look`.

    Raises:
        TeasrError: as it; or when there is no answer within `patience` seconds.
    """
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "jobs.cluster_state"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience - 1,
        )
    except subprocess.TimeoutExpired as late:
        noise = (late.stderr or b"").decode(errors="replace")
        raise TeasrError(_why(noise) or f"no answer within {patience - 1:g} s") from None
    if asked.returncode:
        raise TeasrError(_why(asked.stderr) or asked.stderr.strip().rpartition("\n")[2])
    document = json.loads(asked.stdout.strip().rpartition("\n")[2])
    if document is None:
        return None
    return Cluster.from_mapping(document)


def _why(noise: str) -> str:
    if "InvalidAuthToken" in noise:
        return "the cluster asks for a token: put it into ~/.ray/auth_token"
    return ""


def jobs() -> tuple[Job, ...] | None:
    """The newest jobs of the cluster whose dashboard answers; None where none does.

    Raises:
        TeasrError: when the dashboard that the environment names does not answer.
    """
    try:
        from jobs import ray_jobs
    except ImportError:  # Ray without its dashboard
        return None
    named = "RAY_API_SERVER_ADDRESS" in os.environ
    named |= os.environ.get("RAY_ADDRESS", "").startswith("http")
    try:
        client = ray_jobs.connect(None)
    except TeasrError:
        if named:
            raise
        return None
    finally:
        if not named:
            os.environ.pop(
                "RAY_API_SERVER_ADDRESS", None
            )  # or the next look would take it for named
    with ray_jobs.asking(client):
        listed = [job for job in client.list_jobs() if job.submission_id]
    listed.sort(key=lambda job: (not job.status.is_terminal(), job.start_time or 0))
    return tuple(
        Job(
            job=job.submission_id or "",
            command=ray_jobs.command_of(job),
            status=job.status.lower(),
            started=_iso(job.start_time / 1000) if job.start_time else None,
            seconds=((job.end_time or time.time() * 1000) - job.start_time) / 1000
            if job.start_time
            else None,
            exit_code=ray_jobs.exit_code(job) if job.status.is_terminal() else None,
        )
        for job in reversed(listed[-_LAST:])
    )


def trainings(home: Path, now: datetime) -> Trainings:
    """Runs that were begun and are not finished, those that train first."""
    found, stale = [], 0
    for path in home.glob(f"runs/*/{RUN_FILE}"):
        if json.loads(path.read_text()).get("finished"):
            continue
        one = _training(path.parent, now)
        if one.idle_seconds > STALE.total_seconds():
            stale += 1
        else:
            found.append(one)
    return Trainings(tuple(sorted(found, key=lambda one: one.idle_seconds)), stale)


def _training(folder: Path, now: datetime) -> Training:
    files = [folder / name for name in (RUN_FILE, LOSSES_FILE, PROGRESS_FILE)]
    idle = now.timestamp() - max(file.stat().st_mtime for file in files if file.is_file())
    line = last_loss(folder / LOSSES_FILE) or {}
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text())
    except FileNotFoundError:  # it has only just begun
        progress = None
    told: dict[str, Any] = {}
    live = _LIVE_SECONDS
    if progress is not None:
        values, steps = progress["values"], max(progress["steps"], 1)
        live = max(live, _LIVE_STEPS * progress["seconds"] / steps)
        told = {
            "progress": progress["progress"],
            "samples_per_second": values["samples_per_second"],
            "waiting_for_data": values["share_waiting_for_data"],
            "seconds_left": seconds_left(progress),
        }
    return Training(
        name=folder.name,
        trains=idle < live,
        idle_seconds=max(idle, 0.0),
        step=line.get("step"),
        loss=line.get("total"),
        not_finite=line.get("not_finite"),
        **told,
    )


def retrainings(home: Path, now: datetime) -> Retrainings | None:
    """What `teasr schedule` knows, and which models are retrained now; None without either."""
    from jobs.schedule_store import DATABASE, OPEN, Store
    from jobs.scheduler import LOCK_FILE

    locks = {path.stem: holder(path) for path in home.glob("*.lock") if path.name != LOCK_FILE}
    running = {model: who for model, who in locks.items() if who and not model.endswith(".db")}
    if not (home / DATABASE).is_file():
        return Retrainings(running, (), {}, (), None) if running else None
    store = Store(home)
    runs, schedules = store.runs(), store.schedules()
    last = tuple(
        Retraining(
            schedule=run.schedule,
            state=run.state,
            reason=run.reason,
            at=run.ended or run.started or run.asked,
            seconds=run.seconds,
            version=run.version,
            detail=run.detail,
        )
        for run in reversed(runs)
    )
    results: dict[str, dict[str, int]] = {}
    for run in runs:
        if run.state not in OPEN:
            of = results.setdefault(run.schedule, {})
            of[run.state] = of.get(run.state, 0) + 1
    times = {s.name: s.trigger.get_next_fire_time(None, now) for s in schedules if s.trigger}
    coming = {name: _iso(time.timestamp()) for name, time in times.items() if time}
    return Retrainings(
        running=running,
        last=last[:_LAST],
        results=results,
        schedules=tuple(Scheduled(s.name, s.model, s.when, coming.get(s.name)) for s in schedules),
        service=holder(home / LOCK_FILE),
    )


def models(home: Path) -> tuple[Model, ...] | None:
    """Every registered model; None where there is no store yet.

    Raises:
        TeasrError: when the store does not answer.
    """
    from teasr import registry, tracking

    if not tracking.store_exists(home):
        return None
    client = tracking.connect(home)
    return tuple(_model(client, model) for model in registry.registered_models(client))


def _model(client: Any, model: Any) -> Model:
    from teasr import promotion

    aliases = {alias: int(version) for alias, version in model.aliases.items()}
    champion = aliases.get(promotion.CHAMPION)
    records = promotion.history(client, model.name)
    made = next((r for r in records if r.state == "done" and r.version == champion), None)
    changes = {"promoted": 0, "refused": 0, "rolled back": 0}
    for record in records:
        if record.state in ("done", "refused"):
            changes[outcome(record.action, record.state)] += 1
    newest = records[0] if records else None
    return Model(
        model=model.name,
        champion=champion,
        since=made.at if made else None,
        by=made.by if made else None,
        challenger=aliases.get("challenger"),
        changes=changes,
        last=newest and Change(newest.action, newest.state, newest.version, newest.at, newest.by),
    )


def outcome(action: str, state: str) -> str:
    """Of a promotion record, in two words."""
    if state != "done":
        return state
    return "promoted" if action == "promote" else "rolled back"


def data(home: Path, now: datetime) -> Data | None:
    """The datasets in `HOME/data`; None where there is no working folder."""
    if not home.is_dir():
        return None
    since = (now - RECENT).timestamp()
    found = (_dataset(home, folder, since) for folder in _dataset_folders(home / "data", _DEPTH))
    room = os.statvfs(home)
    return Data(tuple(sorted(found, key=lambda one: one.name)), room.f_bavail * room.f_frsize)


def _dataset_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / MANIFEST_NAME).is_file():
        yield folder
    elif depth and folder.is_dir():
        for inner in folder.iterdir():
            yield from _dataset_folders(inner, depth - 1)


def _dataset(home: Path, folder: Path, since: float) -> Dataset:
    url = str(folder)
    document = manifest_document(url)
    if document is None:
        raise UsageError(f"{url}/{MANIFEST_NAME} is not a manifest.")
    manifest = manifest_of(document, url)
    with os.scandir(folder) as entries:
        written = {entry.name: entry.stat().st_mtime for entry in entries}
    shards = [(shard, written[shard.name]) for shard in manifest.shards if shard.name in written]
    recent = [shard for shard, at in shards if at >= since]
    return Dataset(
        name=str(folder.relative_to(home / "data")),
        kind=manifest.kind,
        samples=manifest.samples,
        bytes=manifest.bytes,
        quarantined=sum(manifest.quarantined.values()),
        newest=_iso(max(at for _, at in shards)) if shards else None,
        recent_samples=sum(shard.samples for shard in recent),
        recent_bytes=sum(shard.bytes for shard in recent),
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
