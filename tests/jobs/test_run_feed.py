"""The feed of a run: where it starts, and what the processes that make it are spared."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.record import STATE_FILE
from jobs.run_feed import Ahead, last_state


def test_the_last_state_is_that_of_the_listed_checkpoint(tmp_path: Path) -> None:
    assert last_state(tmp_path) is None
    for steps in (5, 9):  # the second was written, and Ray ended before it listed it
        folder = tmp_path / "train" / f"checkpoint_{steps}"
        folder.mkdir(parents=True)
        (folder / STATE_FILE).write_text(json.dumps({"steps": steps}))
    listed = tmp_path / "train" / "checkpoint_manager_snapshot.json"
    listed.write_text(json.dumps({"latest_checkpoint_result": None}))
    assert last_state(tmp_path) is None
    listed.write_text(
        json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": "checkpoint_5"}})
    )
    assert last_state(tmp_path) == {"steps": 5}


def test_the_first_item_is_made_before_it_is_asked_for() -> None:
    made = threading.Event()

    def items() -> Iterator[int]:
        made.set()
        yield from range(5)

    ahead = Ahead(items())
    assert made.wait(10)
    assert list(ahead) == [0, 1, 2, 3, 4]


def test_an_error_waits_for_who_asks() -> None:
    def items() -> Iterator[int]:
        raise OSError("no disk")
        yield

    ahead = Ahead(items())
    with pytest.raises(OSError, match="no disk"):
        next(iter(ahead))


def test_making_it_takes_no_torch() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import sys, jobs.run_feed; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert said.stdout.split() == ["False"]
