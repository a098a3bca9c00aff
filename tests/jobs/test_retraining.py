"""Retraining without anybody watching: new data, crashes, signals, a store that goes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs.locks import holder
from jobs.record import PROGRESS_FILE
from jobs.schedule_store import Store
from teasr import registry, tracking
from teasr.drift import COMPARED, REFERENCE_FILE, Reference
from teasr.images import encode
from tests.jobs.commands import command, environment, teasr
from tests.ports import free_port
from tests.test_tracking import mlflow_server

pytestmark = pytest.mark.long

RECIPE = """
model: kitchen
photos: [photos]
backbone: teasr-xs
warm_start: true
feed: {crop: 32}
training: {steps: 150, batch: 4, log_every: 1, checkpoint_minutes: 0.02, preview_minutes: 0}
evaluation: {crop: 64, copies: 2, pictures: 0, steps: [1]}
gate:
  rules:
    floor: {metric: psnr_y, at_least: 1}
"""


@pytest.fixture
def place(tmp_path: Path, photo: Callable[..., np.ndarray]) -> Path:
    """A folder with a recipe and photographs."""
    (tmp_path / "photos").mkdir()
    for i in range(6):
        add_photo(tmp_path, photo, i)
    (tmp_path / "own.yaml").write_text(RECIPE)
    return tmp_path


def add_photo(place: Path, photo: Callable[..., np.ndarray], number: int) -> None:
    picture = encode(photo(90 + number, 100, seed=number), "jpeg")
    (place / "photos" / f"p{number}.jpg").write_bytes(picture)


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 600
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture
def started(place: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Services that a test started; they and their retraining are gone afterwards."""
    services: list[subprocess.Popen[bytes]] = []
    yield services
    for service in services:
        service.kill()
        service.wait()
    if holder(place / "home" / "kitchen.lock"):
        os.killpg(json.loads((place / "home" / "kitchen.lock.json").read_text())["pid"], 9)


def test_nobody_watches(
    place: Path,
    photo: Callable[..., np.ndarray],
    started: list[subprocess.Popen[bytes]],
) -> None:
    home = place / "home"
    added = teasr("schedule", "add", "own.yaml", "--on-new-data", home=home)
    assert added.returncode == 0, added.stderr
    store = Store(home)

    def service() -> subprocess.Popen[bytes]:
        log = (place / "service.log").open("ab")
        arguments = command("schedule", "run", "--look", "0.5")
        started.append(subprocess.Popen(arguments, cwd=place, env=environment(home), stdout=log))
        return started[-1]

    def trains(number: int) -> bool:
        return len([*home.glob(f"runs/*/{PROGRESS_FILE}")]) == number

    # The first photographs are new data. Everything is killed in the middle of the training.
    first = service()
    until(lambda: trains(1) and [*home.glob("runs/*/train/checkpoint_*/teasr.json")], "no training")
    retraining = json.loads((home / "kitchen.lock.json").read_text())["pid"]
    first.kill()
    os.killpg(retraining, signal.SIGKILL)
    first.wait()
    assert store.runs()[0].state == "running"  # as far as anybody could write down

    second = service()
    until(lambda: store.runs()[0].state == "promoted", "the first version is no champion")
    (run,) = store.runs()
    assert (run.version, run.reason) == (1, "new data")
    log = (home / "logs" / "kitchen-1.log").read_text()
    for step in ("ingest", "benchmark"):
        assert log.count(f"✓ {step}") == 2 and log.count("as before") == 2
    (begun,) = home.glob("runs/*/run.json")
    assert json.loads(begun.read_text())["attempts"] == 2

    # More photographs come; this time the machine is shut down as it should be.
    add_photo(place, photo, 7)
    until(lambda: trains(2), "new data start nothing")
    second.terminate()
    assert second.wait(120) == 0
    assert [run.state for run in store.runs()] == ["promoted", "waiting"]
    assert (
        "ends after this step, with a checkpoint" in (home / "logs" / "kitchen-2.log").read_text()
    )
    third = service()
    until(lambda: store.runs()[1].state == "promoted", "the second version is no champion")
    third.terminate()
    assert third.wait(60) == 0

    # It began from the first, and is not something new itself.
    client = tracking.connect(home)
    version = client.get_model_version("kitchen", "2")
    assert client.get_run(version.run_id).data.tags["teasr.parent"] == "models:/kitchen/1"
    first_run = client.get_run(client.get_model_version("kitchen", "1").run_id)
    assert "teasr.parent" not in first_run.data.tags
    again = teasr("retrain", "own.yaml", home=home)
    assert again.returncode == 0 and "nothing new to learn from" in again.stdout

    # What it was trained on is kept for the drift watch, which these inputs do not resemble.
    text = registry.artifact_text(client, version, REFERENCE_FILE)
    reference = Reference.from_json(text or "")
    assert all(len(reference.figures[name]) == 500 for name in COMPARED)
    inputs = place / "inputs.jsonl"
    line = {"at": "2026-11-28T00:00:00+00:00", **dict.fromkeys(COMPARED, 99.0)}
    inputs.write_text((json.dumps(line) + "\n") * 60)
    page = place / "drift.html"
    drift = teasr("drift", "kitchen", "--inputs", str(inputs), "--out", str(page), home=home)
    assert drift.returncode == 1 and "drifted: noise" in drift.stderr and "kitchen" in drift.stdout
    assert page.read_text().count("<svg") == len(COMPARED)
    few = teasr("drift", "kitchen", "--inputs", str(inputs), "--pictures", "100", home=home)
    assert few.returncode == 2 and "60 pictures are too few" in few.stderr


def test_the_store_goes_away_in_mid_run(place: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    home = place / "home"
    with mlflow_server(port, place / "server"):
        running = subprocess.Popen(
            command("retrain", "own.yaml"),
            cwd=place,
            env=environment(home) | {"MLFLOW_TRACKING_URI": uri},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: [*home.glob(f"runs/*/{PROGRESS_FILE}")], "no training")
    out, err = running.communicate(timeout=400)
    # The training went on to its end; what needs the store says in a sentence why it is not done.
    assert running.returncode == 1 and "Traceback" not in err + out, err
    assert f"The MLflow server at {uri} does not answer." in err
    (model,) = home.glob("runs/*/model/model.safetensors")
    trained = model.stat().st_mtime_ns
    refused = teasr("promote", "kitchen", MLFLOW_TRACKING_URI=uri, home=home)
    assert refused.returncode == 1 and "does not answer" in refused.stderr

    with mlflow_server(port, place / "server"):
        done = teasr("retrain", "own.yaml", MLFLOW_TRACKING_URI=uri, home=home)
        assert done.returncode == 0, done.stderr
        assert "version 1 of 'kitchen' is the champion" in done.stdout
        assert model.stat().st_mtime_ns == trained
        from mlflow import MlflowClient

        client = MlflowClient(uri, uri)
        run = client.get_run(client.get_model_version("kitchen", "1").run_id)
        assert run.info.status == "FINISHED" and run.data.metrics["training/steps"] == 150
