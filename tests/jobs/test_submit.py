"""`teasr submit`: what travels, and jobs on a Ray of its own with a dashboard."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from jobs import ray_jobs
from teasr.errors import UsageError
from teasr.processes import stop_group
from tests.jobs.commands import command, environment, teasr
from tests.ports import free_port


def test_archive_holds_the_packages_and_is_the_same_each_time(tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text("model: teasr\n")
    packed = ray_jobs.archive({"my.yaml": recipe})
    assert packed == ray_jobs.archive({"my.yaml": recipe})
    names = set(zipfile.ZipFile(BytesIO(packed)).namelist())
    assert {
        *("my.yaml", "jobs/cli.py", "jobs/recipes/quickstart.yaml", "pipelines/ingest.py"),
        *("teasr/registry.py", "teasr/weights/teasr-s/model.safetensors"),
    } <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("platform")]


def test_archive_runs_where_nothing_of_teasr_is_installed(tmp_path: Path) -> None:
    zipfile.ZipFile(BytesIO(ray_jobs.archive({}))).extractall(tmp_path)
    script = "import sys, jobs.cli, teasr; from importlib import metadata; print(teasr.__file__); "
    script += "print(metadata.version('teasr'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    where, version = done.stdout.decode().split()
    assert Path(where) == tmp_path / "teasr" / "__init__.py"
    assert version == ray_jobs.metadata.version("teasr")


def test_yaml_files_go_with_the_command_and_what_they_extend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "base.yaml").write_text("model: teasr\n")
    (folder / "mine.yaml").write_text("extends: base\n")
    (folder / "noise.yaml").write_text("{}\n")
    sent = ["distill", "recipes/mine.yaml", "feed.preset=recipes/noise.yaml", "training.batch=4"]
    arguments, files = ray_jobs.shipped(sent)
    assert arguments == ["distill", "mine.yaml", "feed.preset=noise.yaml", "training.batch=4"]
    assert set(files) == {"mine.yaml", "base.yaml", "noise.yaml"}
    (tmp_path / "mine.yaml").write_text("{}\n")
    with pytest.raises(UsageError, match="one name"):
        ray_jobs.shipped(["distill", "recipes/mine.yaml", "feed.preset=mine.yaml"])


def test_variables_go_by_name_alone(run: Callable[..., tuple[int, str, str]]) -> None:
    here = {"MLFLOW_TRACKING_URI": "http://m:5000", "TOKEN": "s3cret", "TEASR_HOME": "/x", "A": "b"}
    given = ray_jobs.environment(here, ["TOKEN"])
    assert given["TOKEN"] == "s3cret" and given["MLFLOW_TRACKING_URI"] == "http://m:5000"
    assert not {"TEASR_HOME", "A"} & set(given)
    code, out, err = run("submit", "--env", "TOKEN=s3cret", "doctor")
    assert code == 2 and "name alone" in err and "s3cret" not in out + err
    code, _, err = run("submit", "--env", "NOT_SET_HERE", "doctor")
    assert code == 2 and "NOT_SET_HERE" in err
    code, out, err = run("submit", "ingest", "s3://key:s3cret@bucket/x", "s3://bucket/y")
    assert code == 2 and "no secret" in err and "s3cret" not in out + err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["submit", "distil", "x"], "no command for a cluster"),
        (["submit", "jobs", "list"], "no command for a cluster"),
        (["submit", "--address", "127.0.0.1:6379", "doctor"], "the address of a dashboard"),
        (["jobs", "list", "--address", "http://127.0.0.1:9"], "No Ray cluster answers"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], told: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = run(*arguments)
    assert code in (1, 2) and told in err


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Ray of two CPUs in processes of its own: what its users have in their environment."""
    ports = [
        *("--port", "--dashboard-port", "--dashboard-agent-listen-port"),
        *("--dashboard-agent-grpc-port", "--runtime-env-agent-port", "--ray-client-server-port"),
    ]
    chosen = {port: str(free_port()) for port in ports}
    programs = Path(sys.executable).parent
    # Paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        process = subprocess.Popen(
            [
                *(str(programs / "ray"), "start", "--head", "--block", "--num-cpus=2"),
                *(f"--temp-dir={folder}", "--object-store-memory=100000000"),
                "--disable-usage-stats",
                *(f"{name}={port}" for name, port in chosen.items()),
            ],
            env=environment(Path(folder))
            | {"PATH": f"{programs}:{os.environ['PATH']}", "RAY_AUTH_TOKEN_PATH": str(token)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{chosen['--dashboard-port']}"
        client = {
            **{"RAY_API_SERVER_ADDRESS": address, "RAY_AUTH_TOKEN_PATH": str(token)},
            **{"SECRET": "s3cret", "COLUMNS": "200"},
        }
        try:
            for _ in range(120):
                listed = teasr("jobs", "list", home=Path(folder, "home"), **client)
                if listed.returncode == 0:
                    break
                assert process.poll() is None
            assert "no jobs" in listed.stdout
            yield client
        finally:
            stop_group(process)


def job_in(text: str) -> str:
    return text.split("job ", 1)[1].split()[0]


@pytest.mark.journey
def test_jobs_run_fail_are_stopped_and_outlive_who_follows(
    cluster: dict[str, str], tmp_path: Path, photo: Callable[..., NDArray[np.uint8]]
) -> None:
    home = tmp_path / "home"

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return teasr(*arguments, home=home, **{**cluster, **more})

    photographs, shards = tmp_path / "photographs", tmp_path / "shards"
    photographs.mkdir()
    for seed in range(3):
        cv2.imwrite(str(photographs / f"{seed}.png"), photo(96, 96, seed))

    # It runs on the cluster, is followed, and ends as the command did.
    done = run("submit", "--env", "SECRET", "ingest", str(photographs), str(shards))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 samples in 1 shards" in done.stdout and "SECRET" in done.stdout
    assert (shards / "manifest.json").is_file()
    failed = run("submit", "ingest", str(tmp_path / "none"), str(shards))
    assert failed.returncode == 2 and "failed with exit code 2" in failed.stderr

    # A follower that is interrupted leaves the job running; another one reads all of it.
    with (tmp_path / "followed").open("w+") as output:
        follower = subprocess.Popen(
            command("submit", "schedule", "run", "--home", str(home)),
            env=environment(home) | cluster,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        text = wait_for(tmp_path / "followed", "Running entrypoint")
        follower.send_signal(signal.SIGINT)
        assert follower.wait(30) == 130
        assert "The job goes on" in (tmp_path / "followed").read_text()
    job = job_in(text)
    assert "running" in run("jobs", "list").stdout

    # Stopped, it ends through its own clean-up, and its log is still there.
    stopped = run("jobs", "stop", job)
    assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped")
    assert "had ended before" in run("jobs", "stop", job).stdout
    again = run("jobs", "logs", job, "--follow")
    assert again.returncode == 1 and "was stopped" in again.stderr
    assert "Running entrypoint" in run("jobs", "logs", job).stdout
    unknown = run("jobs", "logs", "none")
    assert unknown.returncode == 2 and "There is no job none" in unknown.stderr

    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    refused = run("jobs", "list", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode == 1 and "asks for a token" in refused.stderr

    listed = run("jobs", "list").stdout
    for told in ("succeeded", "failed", "stopped", "schedule run"):
        assert told in listed
    everything = done.stdout + done.stderr + listed + text
    assert "s3cret" not in everything and "Traceback" not in everything


def wait_for(path: Path, words: str) -> str:
    for _ in range(300):
        if words in path.read_text():
            return path.read_text()
        time.sleep(0.1)
    raise AssertionError(path.read_text())
