"""A head that goes away and comes back, as who waits for it hears."""

from __future__ import annotations

import socket
import time

import pytest

from pipelines.head import HeadWatch
from tests.ports import free_port


def test_silence_is_told_twice_and_the_return_once(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    head = socket.create_server(("127.0.0.1", port))
    HeadWatch(f"127.0.0.1:{port}", look=0.05, tell_after=(0.2, 0.4)).start()
    time.sleep(0.5)
    assert not caplog.messages
    head.close()
    time.sleep(1.5)
    first, second = caplog.messages
    assert f"127.0.0.1:{port} has not answered" in first and "the same command" in second
    with socket.create_server(("127.0.0.1", port)):
        deadline = time.monotonic() + 30
        while len(caplog.messages) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert caplog.messages[-1].endswith("answers again.")
