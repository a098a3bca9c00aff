"""Serving over HTTP with MLflow's scoring server, and asking it.

`ScoringServer` runs `mlflow models serve` on loopback. A running server never notices that an alias
moved, so the alias is resolved to a version at start, and every answer names that version. Whoever
serves a model so runs the code stored inside it: write access to the registry is access to the
server. `teasr.server` reads weights alone.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teasr.errors import TeasrError, UsageError
from teasr.processes import check_port, free_port, start_mlflow, stop_group
from teasr.registry import checked_weights, find, save_model

if TYPE_CHECKING:
    from mlflow import MlflowClient

VERSION_VARIABLE = "TEASR_SERVED_VERSION"
"""Tells the served model what to call itself; read in `serving_model.py`."""

_LOG_TAIL = 15  # lines shown when a server dies


@dataclass
class RestoredResponse:
    """A restored picture.

    Attributes:
        png: the encoded picture.
        width, height: of it, in pixels.
        version: of the model that made it, `teasr version 3`.
    """

    png: bytes
    width: int
    height: int
    version: str


class ScoringServer:
    """`mlflow models serve` as a context manager: up on entry, every process of it gone on exit.

    Args:
        model: as for `teasr.registry.resolve`, such as `models:/teasr@champion`.
        port: default: a free one.
        host: address to listen on; anything but loopback is open to the network, without a
            password.
        workers: processes, each with its own copy of the network.
        timeout: seconds to wait for the server to come up.
        request_timeout: seconds that one request may take.
        client: default `connect()`, when MLflow is needed to find the model.

    Attributes:
        url: `http://127.0.0.1:PORT`, once entered.
        version: `teasr version 3`, once entered.
        log: file with the server's output; removed on a clean exit.
    """

    def __init__(
        self,
        model: str,
        port: int | None = None,
        *,
        host: str = "127.0.0.1",
        workers: int = 1,
        timeout: float = 180,
        request_timeout: int = 600,
        client: MlflowClient | None = None,
    ) -> None:
        self.model = model
        self.host = host
        self.port = port
        self.workers = workers
        self.timeout = timeout
        self.request_timeout = request_timeout
        self.client = client
        self.url = ""
        self.version = ""
        self.log = Path()

    def __enter__(self) -> ScoringServer:
        """Start the server and wait until it answers.

        Raises:
            UsageError: for an unknown model.
            TeasrError: when the port is taken, or the server dies or stays silent, with its last
            lines.
        """
        if self.port is not None:
            check_port(self.host, self.port)
        found = find(self.model, self.client)
        with contextlib.ExitStack() as on_exit:
            folder = Path(on_exit.enter_context(tempfile.TemporaryDirectory(prefix="teasr-serve-")))
            weights = checked_weights(found)
            served = found.fetch()
            if served.resolve() == weights.resolve():  # bare weights: give them the serving code
                served = folder / "model"
                save_model(weights, served)
            self.port = self.port or free_port(self.host)
            self.url = f"http://{self.host}:{self.port}"
            self.version = found.label
            self.log = folder / "server.log"
            process = self._start(served)
            on_exit.callback(stop_group, process)
            self._await(process)
            self._on_exit = on_exit.pop_all()
        self._process = process
        return self

    def __exit__(self, *_: object) -> None:
        self._on_exit.close()

    def wait(self) -> None:
        """Block until the server ends by itself.

        Raises:
            TeasrError: when it does, with its last lines.
        """
        status = self._process.wait()
        raise TeasrError(f"The server ended (status {status}).", self._tail())

    def _start(self, served: Path) -> subprocess.Popen[bytes]:
        arguments = ["models", "serve", "--model-uri", str(served), "--env-manager", "local"]
        arguments += ["--host", self.host, "--port", str(self.port)]
        arguments += ["--workers", str(self.workers), "--timeout", str(self.request_timeout)]
        environment = os.environ | {VERSION_VARIABLE: self.version}
        return start_mlflow(arguments, self.log, environment)

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise TeasrError(
                    f"The server of {self.version} did not start (status {process.returncode}).",
                    self._tail(),
                )
            if _pings(self.url):
                return
            time.sleep(0.2)
        raise TeasrError(
            f"The server of {self.version} did not answer within {self.timeout:.0f} s.",
            self._tail(),
        )

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        if lines and lines[-1].startswith("Exception: Command "):
            # The starter's own traceback, which only says that the server ended.
            starts = [i for i, line in enumerate(lines) if line.startswith("Traceback ")]
            lines = lines[: starts[-1]] if starts else lines
        return "Its last lines:\n" + "\n".join(lines[-_LOG_TAIL:])


def request(
    url: str, image: bytes, steps: int = 1, seed: int = 0, timeout: float = 600
) -> RestoredResponse:
    """Have an encoded picture restored by the server at `url` (`http://127.0.0.1:5001`).

    Args:
        steps, seed: as in `RestorationSettings`.
        timeout: seconds to wait.

    Raises:
        UsageError: when the server refuses the request; its sentence.
        TeasrError: when it does not answer or fails.
    """
    body = {
        "dataframe_split": {
            "columns": ["image"],
            "data": [[base64.b64encode(image).decode("ascii")]],
        },
        "params": {"steps": steps, "seed": seed},
    }
    question = urllib.request.Request(
        f"{url.rstrip('/')}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(question, timeout=timeout) as response:
            (answer,) = json.load(response)["predictions"]
    except urllib.error.HTTPError as error:
        reason = _reason(error.read())
        if error.code in (400, 413):
            raise UsageError(reason) from None
        raise TeasrError(f"The server at {url} failed (HTTP {error.code}): {reason}") from None
    except TimeoutError:
        raise TeasrError(f"The server at {url} did not answer within {timeout:.0f} s.") from None
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise TeasrError(f"No server answers at {url} ({cause}).") from None
    return RestoredResponse(
        base64.b64decode(answer["image"]), answer["width"], answer["height"], answer["version"]
    )


def _reason(body: bytes) -> str:
    """The sentence inside MLflow's error, which repeats the request in front of it."""
    try:
        document: Any = json.loads(body)
        message = str(document["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500].strip()
    return message.rpartition("\nError: ")[2].strip()


def _pings(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ping", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
