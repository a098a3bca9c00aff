"""Servers that are processes of ours: where they may listen, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from teasr.errors import TeasrError, UsageError


def check_port(host: str, port: int) -> None:
    """Whether a server may listen there: `UsageError` for no port, `TeasrError` for a taken one."""
    if not 1 <= port <= 65535:
        raise UsageError(f"{port} is not a port.", "Ports go from 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TeasrError(
                f"Port {port} of {host} cannot be used: {error.strerror}.", "Give another port."
            ) from None


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def start_mlflow(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start `mlflow ARGUMENTS...` in a process group of its own; its output goes to `log`."""
    # It starts `uvicorn` by name: that must be found beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, "PATH": path},
            start_new_session=True,
        )


def stop_group(process: subprocess.Popen[bytes], patience: float = 10) -> None:
    """End a process and everything it started: asked first, killed after `patience` seconds."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
