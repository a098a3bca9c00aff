"""The head of a cluster that no longer answers, told in a sentence.

A command whose head is gone writes pages of Ray's own lines for a minute, and then Ray ends it in
mid-air: no code of its own runs any more. So a thread looks whether the head still takes
connections, says so when it does not, and once more before Ray ends the command.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

import ray

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
TELL_AFTER = (10.0, 50.0)
"""Seconds of silence after which it is told. Ray gives up after 60
(`RAY_gcs_rpc_server_reconnect_timeout_s`)."""


class HeadWatch(threading.Thread):
    """Looks at the head at `address` (host:port) for as long as this process is connected.

    Args:
        connected: whether it is.
        look: seconds between two looks.
        tell_after: seconds of silence after which it is told, and told again.
    """

    def __init__(
        self,
        address: str,
        connected: Callable[[], bool] = ray.is_initialized,
        look: float = LOOK_SECONDS,
        tell_after: tuple[float, ...] = TELL_AFTER,
    ) -> None:
        super().__init__(name="head watch", daemon=True)
        self._address, self._connected = address, connected
        self._look, self._tell_after = look, tell_after

    def run(self) -> None:
        answered, told = time.monotonic(), 0
        while self._connected():
            time.sleep(self._look)
            if self._answers():
                if told:
                    log.warning("The head of the cluster at %s answers again.", self._address)
                answered, told = time.monotonic(), 0
                continue
            silent = time.monotonic() - answered
            if told < len(self._tell_after) and silent >= self._tell_after[told]:
                told += 1
                log.warning(
                    "The head of the cluster at %s has not answered for %.0f s; Ray ends this "
                    "command after a minute. What is finished is kept: once there is a cluster, "
                    "the same command does the rest.",
                    self._address,
                    silent,
                )

    def _answers(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=self._look):
                return True
        except OSError:
            return False
