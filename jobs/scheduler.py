"""`teasr schedule run`: the service that starts retrainings, by time, on new data and on drift.

APScheduler says when a time has come; its jobs are in `HOME/schedule.db`, so times that pass while
the service does not run are known to the next one. What is asked for waits in the same database
(`jobs.schedule_store`) until no other retraining of the model runs. Each retraining is a process of
its own, `teasr retrain`, with its log in `HOME/logs`; it survives a service that is killed, and the
next service takes it up.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from apscheduler.events import EVENT_JOB_EXECUTED, EVENT_JOB_MISSED, JobExecutionEvent
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler

from jobs.console import say
from jobs.locks import holder, only_one
from jobs.schedule_store import OPEN, Run, Schedule, Store, now
from teasr.errors import TeasrError, UsageError
from teasr.shards import content_hash

LOCK_FILE = "schedule.lock"
LATE = timedelta(seconds=60)
"""A time that is noticed later than this was missed."""
DRIFT_REST = timedelta(days=1)
"""Between two retrainings because of drift: the second would find the same pictures."""
DRIFT_WINDOW = timedelta(days=7)
"""Inputs that are looked at for drift, at most."""
_TICK = 0.5
_STOPPED = (75, 128 + signal.SIGTERM, -signal.SIGTERM)
"""How a retraining ends that was asked to: before or after it knew of checkpoints."""


@dataclass
class _Watched:
    """What the last look at a schedule found."""

    stamps: str | None = None
    inputs: float = 0.0


@dataclass
class Service:
    """Starts what schedules ask for.

    Args:
        home: working folder.
        look: seconds between two looks for new data and drift. Data are new once they differ from
            those of the last retraining, and did not change between two looks.
        command: what a retraining is; changed by tests.
    """

    home: Path
    look: float = 60.0
    command: tuple[str, ...] = (sys.executable, "-m", "jobs.cli", "retrain")
    _children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _watched: dict[tuple[str, str], _Watched] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)
    _ending: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.store = Store(self.home)
        self._scheduler = BackgroundScheduler(
            jobstores={"default": SQLAlchemyJobStore(engine=self.store.engine)}, timezone=UTC
        )
        self._scheduler.add_listener(self._heard, EVENT_JOB_EXECUTED | EVENT_JOB_MISSED)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, which a running retraining is told; a second one ends it
        at once.

        Raises:
            Busy: when another service runs in this folder.
        """
        kept = {
            number: signal.signal(number, self._asked_to_end)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            with only_one(self.home / LOCK_FILE, "A schedule service"):
                self._serve()
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def start(self) -> None:
        """Have times come, those first that were missed."""
        self._scheduler.start(paused=True)
        self._sync()  # what was removed meanwhile must not come
        self._scheduler.resume()

    def stop(self) -> None:
        """No more times come."""
        self._scheduler.shutdown()

    def _serve(self) -> None:
        self.start()
        say(f"{len(self.store.schedules())} schedule(s) in {self.home} (Ctrl-C ends)")
        next_look = time.monotonic()
        try:
            while not self._ending.is_set():
                self._sync()
                self._settle()
                if time.monotonic() >= next_look:
                    self._look()
                    next_look = time.monotonic() + self.look
                self._begin()
                self._ending.wait(min(_TICK, self.look))
        finally:
            self.stop()
            while self._children:
                self._settle()
                time.sleep(0.1)

    def _asked_to_end(self, number: int, frame: FrameType | None) -> None:
        self._ending.set()
        for child in self._children.values():
            child.terminate()

    # ------------------------------------------------------------------ times

    def _sync(self) -> None:
        """APScheduler's jobs are those of the schedules that have times."""
        wanted = {schedule.name: schedule for schedule in self.store.schedules()}
        for job in self._scheduler.get_jobs():
            if job.id not in wanted or wanted[job.id].cron is None:
                self._scheduler.remove_job(job.id)
        for name, schedule in wanted.items():
            known = self._scheduler.get_job(name)
            if schedule.cron is None or (known and known.kwargs == {"added": schedule.added}):
                continue
            self._scheduler.add_job(
                due,
                schedule.trigger,
                id=name,
                kwargs={"added": schedule.added},
                replace_existing=True,
                coalesce=True,
                misfire_grace_time=int(LATE.total_seconds()) if schedule.missed == "skip" else None,
            )

    def _heard(self, event: JobExecutionEvent) -> None:
        if event.code == EVENT_JOB_MISSED:
            self.store.note_missed(event.job_id, event.scheduled_run_time.isoformat())
            say(f"{event.job_id}: the time {event.scheduled_run_time:%Y-%m-%d %H:%M} was missed")
            return
        late = datetime.now(UTC) - event.scheduled_run_time > LATE
        self._ask(event.job_id, "missed time" if late else "time")

    def _ask(self, name: str, reason: str) -> None:
        if self.store.ask(name, reason):
            say(f"{name}: a retraining is asked for ({reason})")

    # ------------------------------------------------------------------ retrainings

    def _begin(self) -> None:
        """Start what waits and whose model is free; the longest waiting first."""
        schedules = {schedule.name: schedule for schedule in self.store.schedules()}
        running = {run.schedule for run in self.store.runs(states=("running",))}
        busy = {schedules[name].model for name in running if name in schedules}
        for run in self.store.runs(states=("waiting",)):
            schedule = schedules.get(run.schedule)
            if schedule is None:
                self._end(run, "interrupted", "the schedule was removed")
            elif schedule.model not in busy and not holder(self.home / f"{schedule.model}.lock"):
                busy.add(schedule.model)
                self._start(run, schedule)

    def _start(self, run: Run, schedule: Schedule) -> None:
        log, result = self._log(run), self._result(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        result.unlink(missing_ok=True)
        try:
            stamps = data_stamps(schedule) if schedule.on_new_data else None
        except TeasrError:
            stamps = None  # the retraining says so itself
        self.store.change(run.id, state="running", started=now(), ended=None, stamps=stamps)
        with log.open("ab") as output:
            child = subprocess.Popen(
                [
                    *self.command,
                    *(schedule.recipe, *schedule.overrides),
                    *("--home", str(self.home), "--result", str(result)),
                ],
                cwd=schedule.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C here must not reach its Ray
            )
        self._children[run.id] = child
        say(f"{schedule.name}: retraining {run.id} started ({run.reason}), log in {log}")
        if self._ending.is_set():
            child.terminate()  # the signal came between

    def _settle(self) -> None:
        """Note what became of the retrainings that run, those of a killed service among them."""
        models = {schedule.name: schedule.model for schedule in self.store.schedules()}
        for run in self.store.runs(states=("running",)):
            child = self._children.get(run.id)
            if child is None:
                model = models.get(run.schedule)
                if model is None or not holder(self.home / f"{model}.lock"):
                    self._take_up(run)
            elif (code := child.poll()) is not None:
                del self._children[run.id]
                if code in _STOPPED:
                    self.store.change(run.id, state="waiting", detail="ended early, goes on")
                    say(f"{run.schedule}: retraining {run.id} was stopped and goes on later")
                else:
                    self._conclude(run, code)

    def _take_up(self, run: Run) -> None:
        """Of a service that was killed: the retraining ended by itself, or goes on now."""
        if self._result(run).exists():
            self._conclude(run, 0)
        else:
            self.store.change(run.id, state="waiting", detail="was cut off, goes on")
            say(f"{run.schedule}: retraining {run.id} was cut off and goes on")

    def _conclude(self, run: Run, code: int) -> None:
        try:
            result: dict[str, Any] = json.loads(self._result(run).read_text())
        except (OSError, ValueError):
            said = last_words(self._log(run))
            self._end(run, "failed", said or f"exit code {code}")
            return
        version = result["version"]
        if not result["new"]:
            self._end(run, "nothing new", f"version {version} stands", version)
        elif result["promoted"]:
            self._end(run, "promoted", f"version {version} is the champion", version)
        else:
            self._end(run, "refused", f"version {version} did not pass the gate", version)

    def _end(self, run: Run, state: str, detail: str, version: int | None = None) -> None:
        self.store.change(run.id, state=state, ended=now(), detail=detail, version=version)
        say(f"{run.schedule}: retraining {run.id} {state}: {detail}")

    def _log(self, run: Run) -> Path:
        return log_file(self.home, run)

    def _result(self, run: Run) -> Path:
        return log_file(self.home, run).with_suffix(".json")

    # ------------------------------------------------------------------ data and drift

    def _look(self) -> None:
        open_ones = {run.schedule for run in self.store.runs(states=OPEN)}
        for schedule in self.store.schedules():
            if schedule.name in open_ones:
                continue
            watched = self._watched.setdefault((schedule.name, schedule.added), _Watched())
            if schedule.on_new_data and self._try(schedule, partial(self._is_new, watched)):
                self._ask(schedule.name, "new data")
            elif schedule.on_drift and self._try(schedule, partial(self._drifts, watched)):
                self._ask(schedule.name, "drift")

    def _try(self, schedule: Schedule, look: Callable[[Schedule], bool]) -> bool:
        """What a look finds; a store or a disk that is away is told once and looked at again."""
        try:
            found = look(schedule)
        except Exception as error:  # of any store; the service outlives it
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            if self._told.get(schedule.name) != said:
                say(f"{schedule.name}: {said}")
                self._told[schedule.name] = said
            return False
        self._told.pop(schedule.name, None)
        return found

    def _is_new(self, watched: _Watched, schedule: Schedule) -> bool:
        stamps = data_stamps(schedule)
        settled, watched.stamps = stamps == watched.stamps, stamps
        last = [run.stamps for run in self.store.runs(schedule.name) if run.stamps]
        return settled and stamps != (last[-1] if last else None)

    def _drifts(self, watched: _Watched, schedule: Schedule) -> bool:
        from teasr.drift import inputs_file

        path = inputs_file(self.home, schedule.model)
        changed = path.stat().st_mtime if path.is_file() else 0.0
        since = drift_since(self.store.runs(schedule.name), datetime.now(UTC))
        if changed == watched.inputs or since is None:
            return False
        watched.inputs = changed
        from jobs.drift import drift
        from teasr.tracking import connect

        try:
            found = drift(connect(self.home), schedule.model, self.home, since=since)
        except UsageError:
            return False  # too few pictures yet, or no champion
        return bool(found.figures)


def due(added: str) -> None:
    """APScheduler's job: that it was carried out is what the service hears of."""


def data_stamps(schedule: Schedule) -> str:
    """Names what a schedule's recipe learns from: its photographs' stamps, or its dataset.

    Raises:
        UsageError: when they are not there.
    """
    if schedule.photos:
        from pipelines.ingest import file_stamps

        sources = [
            source if "://" in source else str(Path(schedule.folder, source))
            for source in schedule.photos
        ]
        return content_hash(file_stamps(sources))
    from teasr.shards import read_manifest

    assert schedule.data is not None  # or it could not be added
    data = schedule.data if "://" in schedule.data else str(Path(schedule.folder, schedule.data))
    return read_manifest(data).fingerprint


def drift_since(runs: list[Run], moment: datetime) -> datetime | None:
    """From when on inputs tell of drift: since the last retraining, and not longer than a week ago.
    None within a day of a retraining because of drift."""
    ended = [run for run in runs if run.ended]
    if not ended:
        return moment - DRIFT_WINDOW
    last = datetime.fromisoformat(ended[-1].ended or "")
    if ended[-1].reason == "drift" and moment - last < DRIFT_REST:
        return None
    return max(last, moment - DRIFT_WINDOW)


def log_file(home: Path, run: Run) -> Path:
    """Where a retraining's output goes."""
    return home / "logs" / f"{run.schedule}-{run.id}.log"


def last_words(log: Path) -> str:
    """The last line of a log: the one sentence with which a command fails."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("teasr: ").strip() if lines else ""
