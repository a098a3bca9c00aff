"""deploy/on-premise.yaml, brought up on three machines of this one: a retraining on it, whose
followers lose their connection and their terminal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from teasr.images import encode
from tests.jobs.commands import command

pytestmark = pytest.mark.chaos

SCRIPT = Path(__file__).parent.parent / "deploy" / "try-on-premise.sh"
CUT_SECONDS = 20
RECIPE = """
model: kitchen
photos: [{photos}]
backbone: teasr-xs
feed: {{crop: 32}}
training:
  {{workers: 2, cpus_per_worker: {cpus}, steps: 400, batch: 4, log_every: 1, preview_minutes: 0}}
evaluation: {{crop: 64, copies: 2, pictures: 0, steps: [1]}}
gate:
  rules:
    floor: {{metric: psnr_y, at_least: 1}}
"""


def missing() -> str:
    """Why the cluster cannot be tried here; empty when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in ("sshd", "rsync", "ip") if not shutil.which(name, path=search)]
    return f"not installed: {', '.join(absent)}" if absent else ""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The cluster, up; what a command beside it has in its environment. Taken down afterwards."""
    if reason := missing():
        pytest.skip(reason)
    told, log = tmp_path / "environment", tmp_path / "cluster.log"
    with log.open("w") as output:
        trial = subprocess.Popen(
            [SCRIPT, "bash", "-c", 'env -0 > "$0.new" && mv "$0.new" "$0" && cat', told],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: told.is_file() or trial.poll() is not None, 400, lambda: True)
        assert "3 nodes are alive" in log.read_text(), log.read_text()
        yield dict(entry.split("=", 1) for entry in told.read_text().split("\0") if entry)
        assert trial.stdin is not None
        trial.stdin.close()
        assert trial.wait(120) == 0, log.read_text()
        assert "teasr-try" not in subprocess.check_output(["ip", "netns"], text=True)
        assert "teasr-try" not in subprocess.check_output(["ip", "link"], text=True)
        assert not list(Path("/var/tmp").glob("teasr-try.*"))
    finally:
        trial.terminate()
        trial.wait(60)


def until(true: Callable[[], bool], seconds: float, possible: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert possible() and time.monotonic() < deadline
        time.sleep(0.2)


def test_retraining_goes_on_through_a_cut_cable_and_a_lost_terminal(
    cluster: dict[str, str], tmp_path: Path, photo: Callable[..., np.ndarray]
) -> None:
    shared = Path(cluster["SHARED"])
    photos = shared / "photos"
    photos.mkdir()
    for i in range(6):
        (photos / f"p{i}.jpg").write_bytes(encode(photo(90 + i, 100, seed=i), "jpeg"))
    # A worker takes a whole machine, so that they are on two.
    (tmp_path / "own.yaml").write_text(RECIPE.format(photos=photos, cpus=os.cpu_count()))

    def start(name: str, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
        path = tmp_path / name
        with path.open("w") as output:
            process = subprocess.Popen(
                command(*arguments), cwd=tmp_path, env=cluster, stdout=output, text=True
            )
        return process, path

    def logs(path: Path) -> str:
        """All that the job followed in `path` has printed."""
        job = path.read_text().split("job ", 1)[1].split()[0]
        done = subprocess.run(
            command("jobs", "logs", job), env=cluster, capture_output=True, text=True, check=True
        )
        return done.stdout

    follower, output = start("first", "submit", "retrain", "own.yaml")
    until(lambda: "distill " in output.read_text(), 400, lambda: follower.poll() is None)
    _cable("down")
    try:
        before = output.read_text()
        time.sleep(CUT_SECONDS)
        assert output.read_text() == before and follower.poll() is None
    finally:
        _cable("up")
    assert follower.wait(400) == 0, output.read_text()
    followed = output.read_text()
    assert "version 1 is the champion" in followed and "succeeded" in followed
    assert logs(output) in followed  # no line lost, none twice
    assert len([*shared.glob("home/runs/*/run.json")]) == 1

    # Nothing new; and the terminal of who asks is lost.
    follower, output = start("second", "submit", "retrain", "own.yaml")
    until(lambda: "Running" in output.read_text(), 120, lambda: follower.poll() is None)
    follower.send_signal(signal.SIGKILL)
    follower.wait()
    job = output.read_text().split("job ", 1)[1].split()[0]
    follower, again = start("again", "jobs", "logs", job, "--follow")
    assert follower.wait(120) == 0
    assert "nothing new to learn from" in again.read_text()
    assert logs(output) in again.read_text()

    follower, output = start("status", "submit", "status")
    assert follower.wait(120) == 0, output.read_text()
    screen = output.read_text()
    for seen in (", 3 nodes", "retrain own.yaml  succeeded", "kitchen  version 1"):
        assert seen in screen, screen


def _cable(state: str) -> None:
    subprocess.run(["ip", "link", "set", "teasr-try-plug", state], check=True)
