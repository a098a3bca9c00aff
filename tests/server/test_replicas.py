"""Several processes behind Ray Serve's proxy."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from teasr.backbones import load_model
from teasr.images import decode, encode
from teasr.restoration import RestorationSettings, restore
from teasr.serving import request
from tests.server.conftest import serving


@pytest.mark.journey
def test_replicas_share_requests(
    weights: Path, tmp_path: Path, photo: Callable[..., NDArray[np.uint8]]
) -> None:
    rgb = photo(20, 28)
    expected = restore(load_model(weights).network, rgb, RestorationSettings())
    options = ("--replicas", "2", "--max-pixels", "10000")
    with serving(str(weights), tmp_path, *options) as server:
        deadline = time.monotonic() + 240
        while "answers at" not in server.log.read_text():  # the last replica is up
            assert time.monotonic() < deadline
            time.sleep(0.2)

        # The proxy keeps to a replica whose queue it knows as long as the other has not answered
        # it in time, which on a busy machine is more than a few requests: asked until both came.
        processes: set[float] = set()
        while len(processes) < 2:
            assert time.monotonic() < deadline, processes
            processes.add(server.metric("process_start_time_seconds"))
        for _ in range(6):
            answer = request(server.url, encode(rgb))
            assert np.abs(decode(answer.png).rgb.astype(int) - expected).max() <= 1
        assert server.restore(encode(photo(200, 100))).status == 413
        assert b"<h1>teasr</h1>" in server.ask("GET", "/").body
    assert "Traceback" not in server.log.read_text()
