"""Asking a run to end, in processes of their own: signals are for main threads."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.preemption import STOP_FILE, Preempted, StopFile, StopRequest

RUN = """
import sys, time
from pathlib import Path
from jobs.preemption import StopRequest, StopFile
folder = Path(sys.argv[1])
def work():
    stop = StopFile(folder)
    print("begun", flush=True)
    while not stop.asked():
        time.sleep(0.01)
    time.sleep(float(sys.argv[2]))
    return "saved"
with StopRequest(folder) as request:
    print(request.while_running(work), request.signal, flush=True)
"""


def begin(folder: Path, saving: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), str(saving)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def test_a_signal_ends_the_work_in_its_own_time(tmp_path: Path) -> None:
    process = begin(tmp_path, saving=0.1)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "saved SIGINT\n")
    assert "SIGINT: the run ends after this step, with a checkpoint" in told
    assert not list(tmp_path.iterdir())  # the next run is not asked to end


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = begin(tmp_path, saving=600)
    process.send_signal(signal.SIGTERM)
    while not (tmp_path / STOP_FILE).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said == "" and "Traceback" not in told


def test_a_file_left_by_a_killed_run_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).write_text("SIGTERM")
    with StopRequest(tmp_path) as request:
        assert not StopFile(tmp_path).asked()
        assert request.while_running(lambda: 7) == 7 and request.signal == ""
        (tmp_path / STOP_FILE).write_text("by hand")
        assert StopFile(tmp_path).asked()


def test_handlers_and_errors_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest(tmp_path) as request:
        assert signal.getsignal(signal.SIGTERM) != before
        request.while_running(lambda: 1 // 0)
    assert signal.getsignal(signal.SIGTERM) == before
    assert Preempted("The run ended.").exit_code == 75
