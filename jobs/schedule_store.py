"""What `teasr schedule` remembers: schedules, and every retraining that they asked for.

All of it is in `HOME/schedule.db`, beside the jobs of APScheduler, and written before and after
anything is done; so a service that is killed goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import sqlalchemy as sql
from apscheduler.triggers.cron import CronTrigger

from teasr.errors import UsageError

DATABASE = "schedule.db"
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS = "minute hour day-of-month month day-of-week, such as '0 3 * * *'"

Missed = Literal["run", "skip"]
State = Literal[
    "waiting", "running", "promoted", "refused", "nothing new", "failed", "interrupted", "missed"
]
OPEN = ("waiting", "running")
"""States of what is not over."""


@dataclass(frozen=True)
class Schedule:
    """When a recipe is retrained.

    Attributes:
        folder: where the command is run, for relative paths.
        model, photos, data: of the recipe, as it was when the schedule was added.
        cron: five fields; None without a time.
        missed: what becomes of a time at which the service did not run.
        added: ISO 8601; tells a schedule from an earlier one of its name.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    folder: str
    model: str
    photos: tuple[str, ...] = ()
    data: str | None = None
    cron: str | None = None
    timezone: str = "UTC"
    missed: Missed = "run"
    on_new_data: bool = False
    on_drift: bool = False
    added: str = ""

    @property
    def trigger(self) -> CronTrigger | None:
        """Its times, or None."""
        return None if self.cron is None else cron_trigger(self.cron, self.timezone)

    @property
    def when(self) -> str:
        """For people."""
        parts = [f"{self.cron} {self.timezone}"] if self.cron else []
        parts += ["new data"] * self.on_new_data + ["drift"] * self.on_drift
        return ", ".join(parts)


@dataclass(frozen=True)
class Run:
    """A retraining that a schedule asked for.

    Attributes:
        reason: `time`, `missed time`, `new data` or `drift`.
        asked, started, ended: UTC, ISO 8601.
        stamps: names the data as they were when it started.
        version: that it registered.
        detail: what it came to, for people.
    """

    id: int
    schedule: str
    reason: str
    state: State
    asked: str
    started: str | None = None
    ended: str | None = None
    stamps: str | None = None
    version: int | None = None
    detail: str = ""

    @property
    def seconds(self) -> float | None:
        """How long it took, when it is over."""
        if self.started is None or self.ended is None:
            return None
        ends = (datetime.fromisoformat(text) for text in (self.ended, self.started))
        return (next(ends) - next(ends)).total_seconds()


_tables = sql.MetaData()
_schedules = sql.Table(
    "schedules",
    _tables,
    sql.Column("name", sql.String, primary_key=True),
    sql.Column("document", sql.JSON, nullable=False),
)
_runs = sql.Table(
    "runs",
    _tables,
    sql.Column("id", sql.Integer, primary_key=True),
    *(sql.Column(name, sql.String) for name in ("schedule", "reason", "state", "asked")),
    *(sql.Column(name, sql.String) for name in ("started", "ended", "stamps", "detail")),
    sql.Column("version", sql.Integer),
)


class Store:
    """The database in `home`; safe to use from several processes and threads."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.engine = sql.create_engine(
            f"sqlite:///{home / DATABASE}", connect_args={"timeout": 30}
        )
        _tables.create_all(self.engine)

    def add(self, schedule: Schedule) -> None:
        """Keep a schedule.

        Raises:
            UsageError: when there is one of that name.
        """
        document = json.loads(json.dumps(asdict(schedule)))
        try:
            with self.engine.begin() as connection:
                connection.execute(
                    _schedules.insert().values(name=schedule.name, document=document)
                )
        except sql.exc.IntegrityError:
            raise UsageError(
                f"There is a schedule '{schedule.name}' already.",
                f"Give another --name, or first: teasr schedule remove {schedule.name}",
            ) from None

    def remove(self, name: str) -> None:
        """Forget a schedule; what it did stays on record.

        Raises:
            UsageError: when there is none of that name.
        """
        with self.engine.begin() as connection:
            gone = connection.execute(_schedules.delete().where(_schedules.c.name == name))
        if not gone.rowcount:
            known = ", ".join(schedule.name for schedule in self.schedules()) or "none"
            raise UsageError(f"There is no schedule '{name}'.", f"Schedules: {known}.")

    def schedules(self) -> list[Schedule]:
        """All, by name."""
        with self.engine.connect() as connection:
            rows = connection.execute(sql.select(_schedules).order_by(_schedules.c.name))
            documents = [row.document for row in rows]
        lists = ("overrides", "photos")
        return [Schedule(**{**d, **{name: tuple(d[name]) for name in lists}}) for d in documents]

    def runs(self, schedule: str | None = None, states: tuple[str, ...] = ()) -> list[Run]:
        """Those of a schedule, or of all; in certain states, or in any. Oldest first."""
        query = sql.select(_runs).order_by(_runs.c.id)
        if schedule is not None:
            query = query.where(_runs.c.schedule == schedule)
        if states:
            query = query.where(_runs.c.state.in_(states))
        names = [field.name for field in fields(Run)]
        with self.engine.connect() as connection:
            return [
                Run(**{name: getattr(row, name) for name in names})
                for row in connection.execute(query)
            ]

    def ask(self, schedule: str, reason: str) -> bool:
        """Ask for a retraining; False when one is waiting already, which will do for both."""
        with self.engine.begin() as connection:
            waiting = (_runs.c.schedule == schedule) & (_runs.c.state == "waiting")
            if connection.execute(sql.select(_runs.c.id).where(waiting)).first():
                return False
            self._insert(connection, schedule, reason, "waiting")
            return True

    def note_missed(self, schedule: str, due: str) -> None:
        """Note a time that passed while the service did not run, and is left out."""
        with self.engine.begin() as connection:
            self._insert(connection, schedule, "time", "missed", detail=f"was due {due}")

    def change(self, run: int, **values: Any) -> None:
        """Set fields of a run."""
        with self.engine.begin() as connection:
            connection.execute(_runs.update().where(_runs.c.id == run).values(**values))

    def _insert(
        self, connection: sql.Connection, schedule: str, reason: str, state: State, detail: str = ""
    ) -> None:
        connection.execute(
            _runs.insert().values(
                schedule=schedule, reason=reason, state=state, asked=now(), detail=detail
            )
        )


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cron_trigger(expression: str, timezone: str | None) -> CronTrigger:
    """The times of a cron expression of five fields, in a time zone (None: this machine's).

    As in cron, Sunday is 0 or 7; APScheduler, which counts from Monday, is told the days' names.

    Raises:
        UsageError: for what is no such expression or no time zone. Also where both a day of the
            month and a day of the week are given: cron takes either, APScheduler both.
    """
    parts = expression.split()
    if len(parts) != 5:
        raise UsageError(f"--cron '{expression}' has {len(parts)} fields.", f"Give 5: {_FIELDS}.")
    minute, hour, day, month, weekday = parts
    if day != "*" and weekday != "*":
        raise UsageError(
            f"--cron '{expression}' gives a day of the month and a day of the week.",
            "Give one of them and * for the other.",
        )
    try:
        zone = ZoneInfo(timezone) if timezone else None
    except (ValueError, LookupError, OSError):
        raise UsageError(
            f"--timezone {timezone} is unknown.", "Give one such as Europe/Zurich or UTC."
        ) from None
    try:
        return CronTrigger(
            minute=minute,
            hour=hour,
            day=day,
            month=month,
            day_of_week=_weekdays(weekday),
            timezone=zone,
        )
    except ValueError as error:
        raise UsageError(f"--cron '{expression}': {error}.", f"Give 5 fields: {_FIELDS}.") from None


def _weekdays(field: str) -> str:
    """A day-of-week field of cron as names."""
    if field == "*":
        return field
    days = []
    for part in field.lower().split(","):
        span, _, step = part.partition("/")
        first, dash, last = ("0", "-", "6") if span == "*" else span.partition("-")
        low = _weekday(first)
        high = _weekday(last) if dash else (6 if step else low)
        if high < low:
            high += 7  # fri-mon, or 5-7
        days += [_DAYS[number % 7] for number in range(low, high + 1, int(step or 1))]
    return ",".join(days)


def _weekday(text: str) -> int:
    if text in _DAYS:
        return _DAYS.index(text)
    if not text.isdecimal() or int(text) > 7:
        raise ValueError(f"'{text}' is no day of the week")
    return int(text) % 7
