"""Commands as Ray Jobs: what travels to the cluster, how a job is followed, and how it ended.

What travels is one archive: teasr's packages as they are installed here, laid out as in a wheel,
and the YAML files that the command names. Ray unpacks it on every node and runs the command in its
folder; nodes need teasr's dependencies, and no teasr. Equal archives have equal bytes, and Ray
keeps them by their content: a second job sends nothing. (Ray's own way to take a wheel,
`py_modules`, would install its dependencies anew on every node.)
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import logging
import math
import os
import shlex
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import aiohttp
import typer
from ray._private.authentication import authentication_token_setup
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.console import console, errors, say
from teasr.config import read_yaml
from teasr.errors import TeasrError, UsageError
from teasr.tracking import git_commit, mask_credentials

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PACKAGES = ("teasr", "pipelines", "jobs")

PASSED = (
    *("MLFLOW_TRACKING_URI", "TEASR_STORAGE_PATIENCE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)
"""Variables that a job gets when they are set here: no secrets, and no paths of here."""

STOP_SECONDS = 300
"""So long may a job that is stopped take to end, a checkpoint included, before it is killed."""

PATIENCE_SECONDS = 60
"""So long a cluster that does not answer is asked again while a job is followed."""

SILENCE_SECONDS = 30
"""After so long without a word it is asked whether it is there: a lost connection may be silent."""


class _Client(JobSubmissionClient):
    """Ray's client, which by itself would wait for an answer for ever."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, **{"timeout": SILENCE_SECONDS, **options})


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`, or where the environment says.

    Raises:
        UsageError: for an address that is none of a dashboard.
        TeasrError: when no cluster answers, or it asks for a token that is not here.
    """
    found = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if found is None and os.environ.get("RAY_ADDRESS", "").startswith("http"):
        found = os.environ["RAY_ADDRESS"]
    found = found or DEFAULT_ADDRESS
    if not found.startswith(("http://", "https://")):
        raise UsageError(
            f"--address {found}: the address of a dashboard is expected.",
            f"Such as {DEFAULT_ADDRESS}; 'ray dashboard cluster.yaml' brings it here.",
        )
    os.environ["RAY_API_SERVER_ADDRESS"] = found  # Ray listens to the environment first
    # It looks for a token when it starts or joins a cluster, and not here.
    for module in (authentication_token_setup, dashboard_sdk, sdk):
        logging.getLogger(module.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        return _Client(found)
    except AuthenticationError:
        raise TeasrError(
            f"The Ray cluster at {mask_credentials(found)} refuses: it asks for a token.",
            "Put the cluster's token into ~/.ray/auth_token, or its path in RAY_AUTH_TOKEN_PATH.",
        ) from None
    except (OSError, RuntimeError) as error:
        raise TeasrError(
            f"No Ray cluster answers at {mask_credentials(found)}: {_first_line(error)}",
            "Give its dashboard's address with --address, or start one: ray up cluster.yaml",
        ) from None


def environment(here: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The variables that a job gets: `PASSED`, those in `names`, and a few of our own.

    Raises:
        UsageError: for NAME=VALUE, whose value others could read in the list of processes, and for
            a variable that is not set.
    """
    for name in names:
        if "=" in name:
            raise UsageError(
                f"--env {name.partition('=')[0]}=...: a value on the command line is no secret.",
                "Set the variable here and give its name alone.",
            )
        if name not in here:
            raise UsageError(f"--env {name}: this variable is not set here.")
    variables = {
        "TEASR_PROGRESS": "lines",
        "TEASR_COMMIT": git_commit() or "",
        "COLUMNS": str(console.width),
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        **{name: here[name] for name in (*PASSED, *names) if name in here},
    }
    return {name: value for name, value in variables.items() if value}


def shipped(command: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """`command` as the cluster shall run it, and the YAML files that go with it, by name there.

    A file travels when an argument, or the value of KEY=VALUE, is its path here; so does the recipe
    that it extends. There it lies in the folder in which the command runs.

    Raises:
        UsageError: for two files of one name, and for `user:password@` in an argument.
    """
    arguments, files = [], dict[str, Path]()
    for argument in command:
        if mask_credentials(argument) != argument:
            raise UsageError(
                f"{mask_credentials(argument)}: a password on the command line is no secret.",
                "Pass it as a variable: --env NAME",
            )
        key, equals, value = argument.rpartition("=")
        path = Path(value)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            for file in _with_bases(path):
                if files.setdefault(file.name, file).absolute() != file.absolute():
                    raise UsageError(
                        f"{file} and {files[file.name]} would have one name on the cluster.",
                        "Rename one of them.",
                    )
            value = path.name
        arguments.append(f"{key}{equals}{value}")
    return arguments, files


def _with_bases(path: Path) -> Iterator[Path]:
    """A YAML file and, of a recipe, those that it extends."""
    seen: set[Path] = set()
    while path not in seen and path.is_file():
        seen.add(path)
        yield path
        path = path.parent / f"{read_yaml(path).get('extends')}.yaml"


def archive(files: Mapping[str, Path]) -> bytes:
    """A zip file of teasr's packages and of `files`; equal bytes for equal content."""
    release = metadata.version("teasr")
    found = {
        # For those who ask which teasr this is.
        f"teasr-{release}.dist-info/METADATA": (
            f"Metadata-Version: 2.1\nName: teasr\nVersion: {release}\n".encode()
        )
    }
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found[str(Path(package, path.relative_to(folder)))] = path.read_bytes()
    found |= {name: path.read_bytes() for name, path in files.items()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as target:
        for name in sorted(found):  # each with the same, first, time of the format
            target.writestr(zipfile.ZipInfo(name), found[name], zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def send(
    client: JobSubmissionClient,
    command: Sequence[str],
    files: Mapping[str, Path],
    variables: dict[str, str],
) -> str:
    """Have the cluster run a command of teasr; the job's name.

    Its working folder is the one that its node's TEASR_HOME names, or ~/teasr-home: the folder in
    which it runs goes with the job.
    """
    home = 'TEASR_HOME="${TEASR_HOME:-$HOME/teasr-home}"'
    job = f"teasr-{command[0]}-{uuid.uuid4().hex[:6]}"
    with tempfile.TemporaryDirectory() as folder, asking(client):
        package = Path(folder, "teasr.zip")
        package.write_bytes(archive(files))
        client.submit_job(
            entrypoint=f"{home} python3 -m jobs.cli {shlex.join(command)}",
            submission_id=job,
            runtime_env={"working_dir": str(package), "env_vars": variables},
            metadata={"teasr": shlex.join(command)},
        )
    return job


def follow(client: JobSubmissionClient, job: str) -> None:
    """Show what a job prints until it ends, through losses of the connection.

    Raises:
        TeasrError: with the exit code of a job that failed; when it was stopped; when the cluster
            has not answered for `PATIENCE_SECONDS`.
        typer.Exit: on Ctrl-C; the job goes on.
    """
    again = f"teasr jobs logs {job} --follow"
    shown, lost_since = 0, math.inf

    async def show() -> bool:
        """Whether what it prints has come to an end; False when it was silent for long."""
        nonlocal shown, lost_since
        read = 0  # Ray begins anew with each connection
        tail = cast(AsyncGenerator[str, None], client.tail_job_logs(job))
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(SILENCE_SECONDS) as silence, aclosing(tail) as chunks:
                async for chunk in chunks:
                    sys.stdout.write(chunk[max(0, shown - read) :])
                    sys.stdout.flush()
                    read += len(chunk)
                    shown, lost_since = max(shown, read), math.inf
                    silence.reschedule(now() + SILENCE_SECONDS)
        except TimeoutError:
            return False
        return True

    try:
        while True:
            try:
                whole = asyncio.run(show())
                ended = client.get_job_info(job)
                lost_since = math.inf
                if whole and ended.status.is_terminal():
                    break
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                lost_since = min(lost_since, time.monotonic())
                if time.monotonic() - lost_since > PATIENCE_SECONDS:
                    raise TeasrError(
                        f"{client.get_address()} has not answered for {PATIENCE_SECONDS} s: "
                        f"{_first_line(error)}",
                        f"The job lives as long as its cluster; to follow it again: {again}",
                    ) from None
            time.sleep(1)
    except KeyboardInterrupt:
        errors.print(f"The job goes on. To follow it again: {again}", soft_wrap=True)
        raise typer.Exit(130) from None
    if ended.status == JobStatus.SUCCEEDED:
        say(f"job {job} succeeded")
        return
    if ended.status == JobStatus.STOPPED:
        raise TeasrError(f"Job {job} was stopped.", "The same command goes on where it stopped.")
    code = exit_code(ended)
    if code is None:
        raise TeasrError(f"Job {job} failed: {ended.message}")
    failure = TeasrError(f"Job {job} failed with exit code {code}; its last lines say why.")
    failure.exit_code = code
    raise failure


def exit_code(job: JobDetails) -> int | None:
    """Of a job's command, as a shell tells it; None when it was stopped or never ran."""
    code = job.driver_exit_code
    return code if code is None or code >= 0 else 128 - code


def command_of(job: JobDetails) -> str:
    """What a job runs, without `teasr`; of another program's job, its command."""
    return (job.metadata or {}).get("teasr") or mask_credentials(job.entrypoint)


@contextmanager
def asking(client: JobSubmissionClient, job: str = "") -> Iterator[None]:
    """Within the block, what the cluster refuses is told in a sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if job and "status code 404" in str(error):
            raise UsageError(f"There is no job {job}.", "See: teasr jobs list") from None
        raise TeasrError(f"{client.get_address()}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return mask_credentials(str(error)).strip().partition("\n")[0]
