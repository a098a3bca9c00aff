"""A process that hangs ends itself, and says where it was."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from jobs.watchdog import Watchdog

HANGS = """
import sys, time
from pathlib import Path
from jobs.watchdog import Watchdog

def stuck_here():
    time.sleep(60)

watchdog = Watchdog(0.01, Path(sys.argv[1]))
time.sleep(1)  # before the first beat it may take its time
for _ in range(4):
    watchdog.beat()
    time.sleep(0.3)
stuck_here()
"""


def test_silence_ends_the_process_and_leaves_its_stacks(tmp_path: Path) -> None:
    stacks = tmp_path / "hung-0.txt"
    stacks.write_text("of an earlier one\n")
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", HANGS, str(stacks)], timeout=30)
    assert ended.returncode == 1 and time.monotonic() - began > 2.2
    assert "of an earlier one" in stacks.read_text() and "stuck_here" in stacks.read_text()


def test_who_stops_in_time_leaves_nothing(tmp_path: Path) -> None:
    watchdog = Watchdog(0.01, tmp_path / "hung-0.txt")
    watchdog.beat()
    watchdog.stop()
    time.sleep(0.8)
    assert not list(tmp_path.iterdir())
