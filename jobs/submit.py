"""`teasr submit` and `teasr jobs`: the same commands on a Ray cluster, through Ray Jobs."""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from jobs.console import console, say, suggest
from teasr.errors import UsageError

app = typer.Typer(
    name="jobs", help="Jobs of teasr submit: list them, read along, stop.", no_args_is_help=True
)

Address = Annotated[
    str | None,
    typer.Option(
        help="Of the cluster's dashboard; else $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS if it is "
        "http, or http://127.0.0.1:8265."
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job, see list.")]


def submit(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="Any command of teasr, as here.")
    ],
    follow: Annotated[bool, typer.Option(help="Show what it prints, and end as it ends.")] = True,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Variable to pass with its value here; repeatable."),
    ] = None,
    address: Address = None,
) -> None:
    """Run a command on a Ray cluster. Ctrl-C leaves it running; see teasr jobs."""
    from jobs import ray_jobs

    program: Any = context.find_root().command
    if command[0] not in {*program.commands} - {"submit", "jobs"}:
        raise UsageError(f"'{command[0]}' is no command for a cluster.", "See: teasr --help")
    variables = ray_jobs.environment(os.environ, env or [])
    arguments, files = ray_jobs.shipped(command)
    client = ray_jobs.connect(address)
    job = ray_jobs.send(client, arguments, files, variables)
    say(f"job {job} at {client.get_address()}", f"variables: {', '.join(sorted(variables))}")
    if follow:
        ray_jobs.follow(client, job)
    else:
        suggest(f"teasr jobs logs {job} --follow", f"teasr jobs stop {job}")


@app.command(name="list")
def list_jobs(address: Address = None) -> None:
    """The cluster's jobs, the newest last: what they run, since when, how they ended."""
    from rich.table import Column, Table

    from jobs import ray_jobs

    client = ray_jobs.connect(address)
    with ray_jobs.asking(client):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    shown = Table(
        Column("job", overflow="fold"),
        Column("command", overflow="fold"),
        *("status", "started (UTC)", "took", "exit code"),
    )
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        began, ended = job.start_time or 0, job.end_time or int(time.time() * 1000)
        code = ray_jobs.exit_code(job) if job.status.is_terminal() else None
        shown.add_row(
            job.submission_id,
            ray_jobs.command_of(job),
            job.status.lower(),
            f"{datetime.fromtimestamp(began / 1000, UTC):%Y-%m-%d %H:%M:%S}" if began else "",
            f"{(ended - began) / 60_000:.1f} min" if began else "",
            "" if code is None else str(code),
        )
    if jobs:
        console.print(shown)
    else:
        say(f"no jobs at {client.get_address()}")


@app.command()
def logs(
    job: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show what comes too, and end as the job ends.")
    ] = False,
    address: Address = None,
) -> None:
    """What a job has printed."""
    from jobs import ray_jobs

    client = ray_jobs.connect(address)
    with ray_jobs.asking(client, job):
        printed = client.get_job_logs(job)
    if follow:
        ray_jobs.follow(client, job)
    else:
        sys.stdout.write(printed)


@app.command()
def stop(job: JobName, address: Address = None) -> None:
    """End a job: a training writes a checkpoint first, and the same command goes on later."""
    from jobs import ray_jobs

    client = ray_jobs.connect(address)
    with ray_jobs.asking(client, job):
        say(f"{job}: asked to end" if client.stop_job(job) else f"{job}: had ended before")
        while not (status := client.get_job_status(job)).is_terminal():
            time.sleep(0.5)
    say(f"{job}: {status.lower()}")
