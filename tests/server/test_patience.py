"""Slow clients: what they hold is given back, and others are served meanwhile."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from teasr.images import encode
from tests.server.conftest import Running, serving

pytestmark = pytest.mark.journey

HURRIED = """
import sys
from teasr.server import run
from teasr.server.settings import ServerSettings
run._HEADER_SECONDS = 1
settings = ServerSettings(body_timeout=1, record_inputs=RECORDS)
run.serve(sys.argv[1], settings, "127.0.0.1", int(sys.argv[3]), print)
"""


@pytest.fixture(scope="module")
def hurried(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that waits for no more than a second."""
    folder = tmp_path_factory.mktemp("hurried")
    script = HURRIED.replace("RECORDS", repr(str(folder / "inputs.jsonl")))
    with serving(str(weights), folder, command=("-c", script)) as running:
        yield running


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /restore HTTP/1.1\r\nHost: x\r\n",
        b"POST /restore HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n\x89PNG",
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_a_slow_client_is_told_and_let_go(
    hurried: Running, sent: bytes, used: bool, photo: Callable[..., NDArray[np.uint8]]
) -> None:
    if used and not sent:
        pytest.skip("an idle connection is kept for a while")
    with socket.create_connection(("127.0.0.1", hurried.port), timeout=20) as slow:
        if used:
            slow.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in slow.recv(4096)
        begin = time.monotonic()
        slow.sendall(sent)
        assert hurried.restore(encode(photo(16, 16))).status == 200
        answer = b""
        while part := slow.recv(4096):  # until the server closes
            answer += part
        assert b" 408 " in answer and (b"in time" in answer or b"within 1 s" in answer)
        assert time.monotonic() - begin < 10


def test_statistics_of_inputs_are_recorded(
    hurried: Running, photo: Callable[..., NDArray[np.uint8]]
) -> None:
    records = hurried.log.parent / "inputs.jsonl"
    hurried.restore(encode(photo(18, 16)))
    deadline = time.monotonic() + 20
    while not (records.exists() and '"height": 18' in records.read_text().replace(":1", ": 1")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
