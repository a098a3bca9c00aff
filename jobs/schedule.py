"""`teasr schedule`: retrainings that nobody has to start."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, cast

import typer

from jobs.console import console, say, suggest
from jobs.options import Home, Overrides, home_folder
from teasr.errors import UsageError

app = typer.Typer(
    name="schedule",
    help="Retrain by time, on new data, on drift; one service for all.",
    no_args_is_help=True,
)

ScheduleName = Annotated[str, typer.Argument(metavar="NAME", help="A schedule, see list.")]


@app.command()
def add(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file or a shipped recipe.")
    ],
    overrides: Overrides = None,
    cron: Annotated[
        str | None, typer.Option(help="When: minute hour day month weekday, '0 3 * * *'.")
    ] = None,
    timezone: Annotated[
        str | None, typer.Option(help="Of --cron, such as Europe/Zurich [default: this machine's].")
    ] = None,
    missed: Annotated[
        str,
        typer.Option(metavar="run|skip", help="A time at which the service did not run."),
    ] = "run",
    on_new_data: Annotated[
        bool, typer.Option("--on-new-data", help="When the recipe's photographs have changed.")
    ] = False,
    on_drift: Annotated[
        bool, typer.Option("--on-drift", help="When inputs differ from the champion's training.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="[default: the recipe's model]")] = None,
    home: Home = None,
) -> None:
    """Have a recipe retrained; `teasr schedule run` does it."""
    root = home_folder(home)
    from jobs.recipe import load_recipe
    from jobs.schedule_store import Missed, Schedule, Store, cron_trigger

    loaded = load_recipe(recipe, overrides or [])
    if missed not in ("run", "skip"):
        raise UsageError(f"--missed {missed} is unknown.", "Give run or skip.")
    if not (cron or on_new_data or on_drift):
        raise UsageError(
            "The schedule has neither times nor events.",
            "Give --cron, --on-new-data, --on-drift, or several of them.",
        )
    if not loaded.photos and (loaded.data is None or loaded.benchmark is None):
        raise UsageError(
            "The recipe has neither photos nor both data and benchmark.",
            "Set photos to a folder of photographs.",
        )
    zone = timezone or "UTC"
    if cron:
        zone = str(cron_trigger(cron, timezone).timezone)
    path = Path(recipe)
    schedule = Schedule(
        name=name or loaded.model,
        recipe=str(path.absolute()) if path.is_file() else recipe,
        overrides=tuple(overrides or []),
        folder=str(Path.cwd()),
        model=loaded.model,
        photos=loaded.photos,
        data=loaded.data,
        cron=cron,
        timezone=zone,
        missed=cast(Missed, missed),
        on_new_data=on_new_data,
        on_drift=on_drift,
        added=datetime.now(UTC).isoformat(),
    )
    if not re.fullmatch(r"[\w.-]+", schedule.name):
        raise UsageError(f"--name {schedule.name}: letters, digits, '.', '_', '-' are accepted.")
    Store(root).add(schedule)
    say(f"'{schedule.name}' retrains {schedule.model}: {schedule.when}")
    suggest("teasr schedule run", "teasr schedule list")


@app.command(name="list")
def list_schedules(home: Home = None) -> None:
    """What is scheduled, when it comes next, and how the last retraining ended."""
    root = home_folder(home)
    from rich.table import Column, Table

    from jobs.locks import holder
    from jobs.schedule_store import Store
    from jobs.scheduler import LOCK_FILE, log_file

    store, moment = Store(root), datetime.now(UTC)
    shown = Table(
        *("schedule", "when", "next"),
        Column("last (UTC)", no_wrap=True),
        *("took", "version", "missed"),
        title=f"Schedules in {root}",
        title_justify="left",
    )
    troubles = []
    for schedule in store.schedules():
        trigger = schedule.trigger
        coming = trigger.get_next_fire_time(None, moment) if trigger else None
        runs = store.runs(schedule.name)
        missed = sum(run.state == "missed" for run in runs)
        last = next((run for run in reversed(runs) if run.state != "missed"), None)
        name = schedule.name + (f"\nof {schedule.model}" if schedule.model != schedule.name else "")
        outcome = took = version = ""
        if last is not None:
            at = datetime.fromisoformat(last.ended or last.started or last.asked)
            outcome = f"{last.state}\n{last.reason}\n{at:%Y-%m-%d}\n{at:%H:%M}"
            version = str(last.version or "")
            if last.seconds is not None:
                took = f"{last.seconds / 60:.1f} min"
            if last.state == "failed":
                troubles.append(f"{schedule.name}: {last.detail} Log: {log_file(root, last)}")
        shown.add_row(
            name,
            schedule.when.replace(", ", "\n"),
            f"{coming:%Y-%m-%d}\n{coming:%H:%M}" if coming else "",
            outcome,
            took,
            version,
            str(missed or ""),
        )
    console.print(shown)
    say(*troubles)
    running = holder(root / LOCK_FILE)
    say(f"service: {running or 'does not run'}")
    if not running:
        suggest("teasr schedule run")


@app.command()
def remove(name: ScheduleName, home: Home = None) -> None:
    """Forget a schedule. A retraining that runs goes on."""
    root = home_folder(home)
    from jobs.schedule_store import Store

    Store(root).remove(name)
    say(f"'{name}' is removed")


@app.command()
def run(
    look: Annotated[
        float, typer.Option(help="Seconds between looks for new data and drift.", min=0.1)
    ] = 60.0,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port on which Prometheus reads retrainings and champions.", min=1),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(help="Address; anything but loopback is open to the network.")
    ] = "127.0.0.1",
    home: Home = None,
) -> None:
    """Serve the schedules until interrupted; a retraining that runs then ends resumably."""
    root = home_folder(home)
    from jobs.scheduler import Service

    if metrics_port is not None:
        from jobs.schedule_metrics import serve_metrics

        serve_metrics(root, metrics_host, metrics_port)
        say(f"metrics at http://{metrics_host}:{metrics_port}/metrics")
    Service(root, look).run()
