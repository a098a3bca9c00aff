"""Where runs live, and a logger that outlives its server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from teasr import tracking
from teasr.errors import TeasrError, UsageError
from tests.ports import free_port

SOURCES = Path(tracking.__file__).parent.parent


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder of its own, with a space in its name, and no settings from outside."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("TEASR_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "TEASR_COMMIT"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def mlflow_server(port: int, folder: Path) -> Iterator[None]:
    """A real server on loopback whose runs are in `folder`, gone on exit."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "files")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven processes of no use here
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while not tracking.answers(f"http://127.0.0.1:{port}", timeout=1):
            assert server.poll() is None and time.monotonic() < deadline, "no server"
            time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_home_and_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.home() == Path.cwd() / "teasr-home"
    monkeypatch.setenv("TEASR_HOME", str(tmp_path / "elsewhere"))
    assert tracking.home() == tmp_path / "elsewhere"
    uri = tracking.tracking_uri(tracking.home())
    assert uri == f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert tracking.tracking_uri(tracking.home()) == "https://mlflow.example"


def test_runs_and_files_stay_in_home() -> None:
    client = tracking.connect()
    experiment = tracking.experiment_id(client, "trainings")
    assert tracking.experiment_id(client, "trainings") == experiment
    run = client.create_run(experiment).info.run_id
    client.log_text(run, "hello", "note.txt")
    (note,) = (Path.cwd() / "teasr-home" / "artifacts").rglob("note.txt")
    assert note.read_text() == "hello"
    assert [path.name for path in Path.cwd().iterdir()] == ["teasr-home"]  # no mlruns

    client.delete_experiment(experiment)
    with pytest.raises(TeasrError, match="trash"):
        tracking.experiment_id(client, "trainings")


def test_one_process_may_use_two_stores(tmp_path: Path) -> None:
    """MLflow exports the URI of the first, which must not be taken for the user's setting."""
    first, second = (tracking.connect(tmp_path / name) for name in ("one", "two"))
    tracking.experiment_id(first, "only in one")
    assert second.get_experiment_by_name("only in one") is None
    second.create_registered_model("only-in-two")
    assert first.search_registered_models() == []
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.journey
def test_processes_that_create_one_store_at_once_agree() -> None:
    program = (
        "from teasr import tracking; client = tracking.connect();"
        "print(tracking.experiment_id(client, 'shared'))"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    ids = {process.communicate(timeout=120)[0].decode().split()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(ids) == 1


def test_a_folder_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UsageError, match=r"\./mlruns is a folder"):
        tracking.connect()


def test_a_server_that_is_away_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(TeasrError) as caught:
        tracking.connect()
    assert time.monotonic() - start < 10
    assert str(caught.value).startswith(
        f"The MLflow server at http://***@127.0.0.1:{port} does not answer. Start it"
    )
    assert "\n" not in str(caught.value)


def test_credentials_never_show() -> None:
    for url in ("https://me:s3@cret@host/x", "postgresql://me:s3cret@db:5432/mlflow"):
        masked = tracking.mask_credentials(f"cannot reach {url} now")
        assert "cret" not in masked and "me" not in masked and masked.endswith("now")


def test_a_server_that_hangs_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(TeasrError, match="does not answer"):
            tracking.connect()
        assert time.monotonic() - start < 15


def test_a_damaged_database_is_one_sentence() -> None:
    home = Path("teasr-home")
    home.mkdir()
    (home / "mlflow.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(TeasrError, match=r"cannot be opened: .*not a database"):
        tracking.connect()


def test_commit_is_of_this_code_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEASR_COMMIT", "abc123")
    assert tracking.git_commit() == "abc123"
    monkeypatch.delenv("TEASR_COMMIT")
    # A copy of the package inside somebody else's repository.
    subprocess.run(["git", "init", "-q", "."], check=True)
    copy = Path("teasr")
    copy.mkdir()
    for name in ("__init__", "tracking", "errors", "shards", "config", "images"):
        (copy / f"{name}.py").write_bytes((SOURCES / "teasr" / f"{name}.py").read_bytes())
    program = "from teasr import tracking; print(tracking.__file__, tracking.git_commit())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == f"{Path.cwd()}/teasr/tracking.py None", done.stderr


def test_versions_name_what_trains() -> None:
    assert {"teasr", "torch", "mlflow", "ray", "numpy"} <= set(tracking.versions())


def test_logger_writes_every_step() -> None:
    client = tracking.connect()
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    logger = tracking.RunLogger(client, run, interval=0.05)
    for step in range(1500):
        logger.log(step, {"loss": 1 / (step + 1), "rate": 1e-4})
    assert logger.close() == ""
    written = client.get_metric_history(run, "loss")
    assert [(m.step, m.value) for m in written] == [(s, 1 / (s + 1)) for s in range(1500)]


def test_logger_writes_pictures_to_the_artifacts() -> None:
    client = tracking.connect()
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    with tracking.RunLogger(client, run, interval=0.05) as logger:
        for step in (1, 2):
            logger.log_image(f"previews/step-{step}.png", Image.new("RGB", (3, 2), (step, 0, 0)))
    found = sorted((Path.cwd() / "teasr-home" / "artifacts").rglob("step-*.png"))
    assert [path.name for path in found] == ["step-1.png", "step-2.png"]
    assert [Image.open(path).getpixel((0, 0)) for path in found] == [(1, 0, 0), (2, 0, 0)]


def test_logger_gives_up_a_picture_that_is_refused_and_no_metric() -> None:
    client = tracking.connect()
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    logger = tracking.RunLogger(client, run, interval=0.05)
    logger.log_image("no-picture.suffix", Image.new("RGB", (3, 2)))
    logger.log(1, {"loss": 0.5})
    assert logger.close() == ""
    assert [m.value for m in client.get_metric_history(run, "loss")] == [0.5]


def test_logger_keeps_the_newest_and_says_what_was_lost() -> None:
    from mlflow import MlflowClient

    away = MlflowClient(f"http://127.0.0.1:{free_port()}")
    logger = tracking.RunLogger(away, "some-run", capacity=10, interval=3600)
    start = time.monotonic()
    for step in range(25):
        logger.log(step, {"loss": 0.0})
    assert time.monotonic() - start < 10  # MLflow itself asks a server that is away for minutes
    assert (logger.lost, logger.waiting) == (15, 10)
    said = logger.close(timeout=1)
    assert said.startswith("25 metrics of run some-run were lost (the MLflow server did not answer")


def test_logger_does_not_retry_for_ever_what_is_refused() -> None:
    client = tracking.connect()
    logger = tracking.RunLogger(client, "0" * 32, interval=0.05)
    logger.log(0, {"loss": 0.0})
    start = time.monotonic()
    assert logger.close().startswith("1 metrics")
    assert time.monotonic() - start < 10


@pytest.mark.journey
def test_logger_outlives_a_server_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with mlflow_server(port, tmp_path / "server"):
        client = tracking.connect()
        run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
        logger = tracking.RunLogger(client, run, interval=0.1)
        logger.log(0, {"loss": 0.0})
        deadline = time.monotonic() + 30
        while logger.waiting and time.monotonic() < deadline:
            time.sleep(0.05)
    for step in range(1, 6):  # the server was killed
        logger.log(step, {"loss": float(step)})
    time.sleep(1)
    assert (logger.waiting, logger.lost) == (5, 0)
    with mlflow_server(port, tmp_path / "server"):
        assert logger.close() == ""
        assert [m.value for m in client.get_metric_history(run, "loss")] == [0, 1, 2, 3, 4, 5]
