"""A head that goes away and comes back, as who waits for it hears."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from pipelines.head import HeadWatch
from tests.ports import free_port


def test_silence_is_told_twice_and_the_return_once(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    head = socket.create_server(("127.0.0.1", port))
    left = threading.Event()
    watch = HeadWatch(
        f"127.0.0.1:{port}", lambda: not left.is_set(), look=0.2, tell_after=(1.0, 1.5)
    )
    watch.start()
    time.sleep(2)
    assert not caplog.messages
    head.close()
    await_messages(caplog, 2)
    time.sleep(1)
    first, second = caplog.messages
    assert f"127.0.0.1:{port} has not answered" in first and "the same command" in second
    with socket.create_server(("127.0.0.1", port)):
        await_messages(caplog, 3)
    assert caplog.messages[2].endswith("answers again.")
    left.set()
    watch.join(30)
    assert not watch.is_alive()


def await_messages(caplog: pytest.LogCaptureFixture, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(caplog.messages) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
