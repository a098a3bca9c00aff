"""Models that are quick to run, and one server process that many tests ask."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from teasr.backbones.dit import PRESETS, DualBranchDiT
from teasr.backbones.folder import save_model
from tests.ports import free_port


def make_weights(folder: Path, seed: int = 0) -> Path:
    """A small model that draws something."""
    torch.manual_seed(seed)
    network = DualBranchDiT(PRESETS["teasr-xs"])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_model(network, network.state_dict(), folder)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights"))


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def message(self) -> str:
        return str(json.loads(self.body)["message"])


@dataclass
class Running:
    """A `teasr serve` process."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, named, answer.read())
        finally:
            connection.close()

    def restore(self, picture: bytes, query: str = "") -> Answer:
        return self.ask("POST", f"/restore{query}", picture)

    def metric(self, name: str) -> float:
        """The sum of a metric's values over its labels."""
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rpartition(" ")[2]) for line in found)


@contextlib.contextmanager
def serving(
    model: str, folder: Path, *options: str, command: tuple[str, ...] = ("-m", "jobs.cli", "serve")
) -> Iterator[Running]:
    """`teasr serve MODEL OPTIONS`, up on entry and asked to end on exit."""
    port = free_port()
    arguments = [sys.executable, *command, model, "--port", str(port), *options]
    log = folder / "serve.log"
    environment = os.environ | {"TEASR_HOME": str(folder / "home"), "OMP_NUM_THREADS": "2"}
    with log.open("ab") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment)
    running = Running(port, process, log)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                if running.ask("GET", "/health").status == 200:
                    break
            time.sleep(0.1)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with tight limits."""
    limits = ("--max-pixels", "20000", "--max-megabytes", "1", "--queue", "8", "--timeout", "20")
    with serving(str(weights), tmp_path_factory.mktemp("server"), *limits) as running:
        yield running
