"""The champion changes under load, and what goes wrong then."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from teasr import registry, tracking
from teasr.backbones import load_model
from teasr.evaluation import Evaluation
from teasr.images import decode, encode
from teasr.metrics import Scores
from teasr.restoration import RestorationSettings, restore
from teasr.server.models import ModelSource
from tests.server.conftest import Running, make_weights, serving

Photo = Callable[..., NDArray[np.uint8]]
SCORES = {"bicubic": {"p": Scores(20, 0.5, None)}, "1 step": {"p": Scores(21, 0.5, None)}}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TEASR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tracking.connect(tmp_path / "home")


def register(client, weights: Path) -> int:  # type: ignore[no-untyped-def]
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    uri = registry.log_model(client, run, weights)
    return registry.register(client, run, uri, "teasr", Evaluation("bench", SCORES), {})


def champion(client, version: int) -> None:  # type: ignore[no-untyped-def]
    client.set_registered_model_alias("teasr", "champion", str(version))


def damage(home: Path, version: int, client) -> None:  # type: ignore[no-untyped-def]
    folder = Path(registry.find(f"models:/teasr/{version}", client).fetch())
    (file,) = folder.rglob("model.safetensors")
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))


def test_a_source_follows_its_alias(client, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for seed in range(3):
        register(client, make_weights(tmp_path / f"w{seed}", seed))
    champion(client, 1)
    source = ModelSource("models:/teasr@champion", client)
    first = source.current
    assert (first.version, first.alias) == ("teasr version 1", "champion")
    assert source.refresh() == "same" and source.current is first
    champion(client, 2)
    assert source.refresh() == "new" and source.current.version == "teasr version 2"
    second = source.current

    damage(tmp_path, 3, client)
    champion(client, 3)
    assert source.refresh() == "failed" and source.current is second
    assert source.failure and "teasr version 3 could not be loaded" in source.failure
    assert source.refresh() == "same" and source.failure  # it is not read again and again
    assert source.refresh(force=True) == "failed"
    champion(client, 2)
    assert source.refresh() == "same" and source.failure is None

    client.delete_registered_model_alias("teasr", "champion")
    assert source.refresh() == "away" and source.current is second
    assert "no alias" in str(source.failure)
    champion(client, 1)
    assert source.refresh() == "new" and source.failure is None


@pytest.mark.journey
def test_the_champion_changes_and_no_request_is_dropped(  # type: ignore[no-untyped-def]
    client, tmp_path: Path, photo: Photo
) -> None:
    rgb = photo(24, 24)
    pictures = {}
    for seed in range(3):
        weights = make_weights(tmp_path / f"w{seed}", seed)
        version = register(client, weights)
        network = load_model(weights).network
        pictures[f"teasr version {version}"] = restore(network, rgb, RestorationSettings(steps=2))
    champion(client, 1)
    answers: list[tuple[int, str, bytes]] = []
    ended = threading.Event()

    def ask(server: Running) -> None:
        data = encode(rgb)
        while not ended.is_set():
            answer = server.restore(data, "?steps=2")
            answers.append((answer.status, answer.headers["teasr-version"], answer.body))

    def await_version(server: Running, number: int) -> None:
        deadline = time.monotonic() + 60
        while answers[-1][1] != f"teasr version {number}":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        told = json.loads(server.ask("GET", "/version").body)
        assert (told["version"], told["alias"]) == (f"teasr version {number}", "champion")

    with serving("models:/teasr@champion", tmp_path, "--poll", "0.2") as server:
        askers = [threading.Thread(target=ask, args=[server]) for _ in range(3)]
        for asker in askers:
            asker.start()
        while not answers:
            time.sleep(0.05)
        await_version(server, 1)
        champion(client, 2)
        await_version(server, 2)

        damage(tmp_path, 3, client)
        champion(client, 3)
        deadline = time.monotonic() + 60
        while not (health := json.loads(server.ask("GET", "/health").body))["reload_failure"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert health["ready"] and health["version"] == "teasr version 2"
        assert "not those that were logged" in health["reload_failure"]
        assert server.metric("teasr_reload_failing") == 1
        assert "could not be loaded" in server.log.read_text()

        shutil.move(tmp_path / "home" / "mlflow.db", tmp_path / "away.db")
        count = len(answers)
        while len(answers) < count + 20:
            time.sleep(0.05)
        shutil.move(tmp_path / "away.db", tmp_path / "home" / "mlflow.db")
        champion(client, 1)
        await_version(server, 1)
        server.process.send_signal(signal.SIGHUP)
        before = json.loads(server.ask("GET", "/version").body)["since"]
        time.sleep(1.1)
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while json.loads(server.ask("GET", "/version").body)["since"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ended.set()
        for asker in askers:
            asker.join()

        # Asked to end, it finishes what it has accepted.
        last: list[int] = []
        slow = threading.Thread(
            target=lambda: last.append(server.restore(encode(photo(96, 96)), "?steps=32").status)
        )
        slow.start()
        while not json.loads(server.ask("GET", "/health").body)["queue"]:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        slow.join()
        assert last == [200] and server.process.wait(30) == 0
    for status, version, body in answers:
        assert status == 200
        difference = np.abs(decode(body).rgb.astype(int) - pictures[version])
        assert difference.max() <= 1, version
    assert {version for _, version, _ in answers} == {"teasr version 1", "teasr version 2"}
