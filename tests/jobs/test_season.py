"""A season without anybody watching: three retrainings on growing data, one of them cut off and one
worse than what is live, a race of promotions and a rollback, under a server that follows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.run_feed import last_state
from teasr import promotion, tracking
from teasr.images import encode
from teasr.serving import request
from tests.jobs.commands import TINY, command, environment, teasr
from tests.ports import free_port

pytestmark = pytest.mark.long

POLL = "0.2"


class Season:
    """A home, a folder of photographs that grows, and what serves the champion."""

    def __init__(self, folder: Path, photo: Callable[..., np.ndarray]) -> None:
        self.home, self.photos, self._photo = folder / "home", folder / "photos", photo
        self.photos.mkdir()
        self.url = ""

    def add_photos(self, count: int) -> None:
        first = len(list(self.photos.iterdir()))
        for i in range(first, first + count):
            picture = encode(self._photo(90 + i, 100, seed=i), "jpeg")
            (self.photos / f"p{i}.jpg").write_bytes(picture)

    def retraining(self, *more: str) -> list[str]:
        return ["retrain", "quickstart", f"photos=[{self.photos}]", *TINY, *more]

    def served(self) -> int:
        with urllib.request.urlopen(f"{self.url}/version", timeout=30) as answer:
            return int(json.load(answer)["version"].removeprefix("teasr version "))

    def await_served(self, version: int) -> None:
        deadline = time.monotonic() + 60
        while self.served() != version:
            assert time.monotonic() < deadline, f"{self.served()} is served, not {version}"
            time.sleep(0.1)
        picture = encode(self._photo(16, 20, seed=1))
        assert request(self.url, picture).version.endswith(f"version {version}")

    def serve(self, stopping: list[subprocess.Popen[Any]]) -> None:
        """Serve the champion, and wait until it answers."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        model = "models:/teasr@champion"
        server = subprocess.Popen(
            command("serve", model, "--port", str(port), "--poll", POLL),
            env=environment(self.home),
            cwd=self.home.parent,
        )
        stopping.append(server)
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline
            try:
                self.served()
                return
            except OSError:
                time.sleep(0.2)


@pytest.fixture
def season(tmp_path: Path, photo: Callable[..., np.ndarray]) -> Season:
    return Season(tmp_path, photo)


@pytest.fixture
def stopping() -> Iterator[list[subprocess.Popen[Any]]]:
    """Processes that are ended with the test."""
    started: list[subprocess.Popen[Any]] = []
    yield started
    for process in started:
        process.terminate()
        process.wait(60)


def test_a_season(season: Season, stopping: list[subprocess.Popen[Any]]) -> None:
    home = season.home
    season.add_photos(8)
    first = teasr(*season.retraining("training.steps=2"), home=home)
    assert first.returncode == 0, first.stderr + first.stdout
    season.serve(stopping)
    season.await_served(1)

    # ---- more photographs; everything, Ray too, is killed in the middle of the training ---------
    season.add_photos(3)
    longer = season.retraining(
        "training.steps=60", "training.checkpoint_minutes=0.01", "warm_start=true"
    )
    running = subprocess.Popen(
        command(*longer),
        cwd=home.parent,
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    before, deadline = set(home.glob("runs/*")), time.monotonic() + 240
    while True:  # a checkpoint counts once it is listed
        new = set(home.glob("runs/*")) - before
        if new and (state := last_state(next(iter(new)))) is not None:
            break
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert 0 < state["steps"] < 60 and season.served() == 1

    second = teasr(*longer, home=home)
    assert second.returncode == 0, second.stderr + second.stdout
    assert second.stdout.count("as before") == 2  # ingest and benchmark
    run = json.loads((next(iter(new)) / "run.json").read_text())["position"]
    assert (run["steps"], run["samples"]) == (60, 240)  # every pair once
    season.await_served(2)
    nothing = teasr(*longer, home=home)
    assert nothing.returncode == 0 and "nothing new to learn from" in nothing.stdout
    origin = teasr("history", "teasr", "--version", "2", home=home).stdout
    assert "version 1" in origin  # what it started from, and what it replaced

    # ---- a training that spoils the weights is refused, and what is live stays -------------------
    season.add_photos(3)
    worse = teasr(
        *season.retraining("training.steps=12", "engine.learning_rate=0.5"),
        *("engine.ema_decay=0", "engine.warmup_share=0"),
        home=home,
    )
    assert worse.returncode == 1 and "refused by the gate" in worse.stderr, worse.stderr
    assert "Traceback" not in worse.stderr
    assert season.served() == 2

    # ---- two promotions at once ------------------------------------------------------------------
    client = tracking.connect(home)
    anything = home.parent / "anything.yaml"
    off = "better than bicubic: null, fidelity: null, perception: null, any-step: null"
    anything.write_text(f"rules: {{{off}, floor: {{metric: psnr_y, at_least: 0}}}}\n")
    racers = [
        subprocess.Popen(
            command("promote", "teasr", "--version", str(version), "--gate", str(anything)),
            env=environment(home),
            stderr=subprocess.PIPE,
            text=True,
        )
        for version in (1, 3)
    ]
    told = {version: racer.communicate(timeout=300)[1] for version, racer in zip((1, 3), racers)}
    codes = {version: racer.returncode for version, racer in zip((1, 3), racers)}
    live = promotion.champion_version(client, "teasr")
    done = [r for r in promotion.history(client, "teasr") if r.state == "done"]
    assert live == done[0].version and codes[live] == 0, told
    # They may not have met: then the second replaced the first. What is recorded is a chain.
    assert [r.replaced for r in done] == [*(r.version for r in done[1:]), None]
    assert list(codes.values()).count(0) == len(done) - 2, told
    season.await_served(live)

    # ---- and back --------------------------------------------------------------------------------
    heard = home.parent / "heard"
    hook = f"echo $TEASR_VERSION > '{heard}'"
    back = teasr("rollback", "teasr", "--to", "2", home=home, TEASR_ON_CHANGE=hook)
    assert back.returncode == 0, back.stderr
    season.await_served(2)
    assert heard.read_text().strip() == "2"
    record = teasr("history", "teasr", home=home).stdout
    for part in ("rollback", "refused", "passed", "champion"):
        assert part in record
