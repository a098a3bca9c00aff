"""A port that a test may listen on."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port on which nobody listens, and seconds from now still nobody will.

    It lies below those that the kernel gives to whoever asks for any and above those of Ray's
    workers; what port 0 gives may be another process's by the time a server has started.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")
