"""A training of two workers on nodes that break: its losses are those of a calm run, to the last
digit, and every pair comes once."""

from __future__ import annotations

import itertools
import math
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from jobs.record import LOSSES_FILE, STATE_FILE, read_losses
from teasr.images import encode
from teasr.shards import Manifest, Sample, write_manifest, write_shard
from tests.chaos.nodes import Nodes, hog, skewed
from tests.chaos.outcomes import Outcome, Pulse

pytestmark = pytest.mark.chaos

STEPS = 60
CUT = 20.0
STORE = "--object-store-memory=100000000"
DATA = ("--num-cpus=1", '--resources={"teasr_data": 1}')
TRAINING = ("--num-cpus=1", '--resources={"teasr_training": 1}')
SETTINGS = [
    *("backbone=teasr-xs", "init=scratch", "feed.crop=32", "training.minutes=null"),
    *("training.batch=4", "training.threads=1", "training.log_every=5", "engine.precision=fp32"),
    *("training.preview_minutes=0", "training.checkpoint_minutes=0.05", "training.workers=2"),
    "engine.zero_stage=2",
]


@dataclass
class Stage:
    """A cluster of a head without CPUs, a data node and three training nodes, one of them idle."""

    nodes: Nodes
    tell: Callable[[Outcome], None]
    folder: Path
    calm: list[dict[str, Any]] = field(default_factory=list)
    calm_pause: float = 0.0
    said: str = ""

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        given = [f"data={self.folder / 'hr'}", *SETTINGS, f"training.steps={STEPS}", *more]
        return self.nodes.start("distill", "quickstart", "--name", name, *given)

    def losses(self, name: str) -> list[dict[str, Any]]:
        return list(read_losses(self.folder / "home" / "runs" / name / LOSSES_FILE))

    def checkpoints(self, name: str) -> list[str]:
        """Names of those that are complete."""
        folders = (self.folder / "home" / "runs" / name / "train").glob("checkpoint_*")
        return sorted(f.name for f in folders if (f / STATE_FILE).exists())

    def steps(self, name: str) -> int:
        lines = self.losses(name)
        return int(lines[-1]["step"]) if lines else 0

    @contextmanager
    def running(self, name: str, *more: str) -> Iterator[tuple[subprocess.Popen[str], Pulse]]:
        """A training that has made some steps and a checkpoint; on leaving, its good end is
        awaited."""
        process = self.start(name, *more)
        try:
            with Pulse(lambda: self.steps(name)) as pulse:
                self.await_steps(process, name, random.randint(15, 25))
                yield process, pulse
                self.said, _ = process.communicate(timeout=600)
                assert process.returncode == 0 and "Traceback" not in self.said, self.said
        finally:
            process.kill()

    def await_steps(self, process: subprocess.Popen[str], name: str, steps: int) -> None:
        deadline = time.monotonic() + 300
        while self.steps(name) < steps:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def conclude(
        self,
        name: str,
        pulse: Pulse,
        began: float,
        fault: str,
        seen: str,
        calm: tuple[list[dict[str, Any]], float] | None = None,
    ) -> None:
        """The losses are the calm run's, every pair came once, and that becomes a row."""
        expected, calm_pause = calm or (self.calm, self.calm_pause)
        lines = self.losses(name)
        lost, duplicated = gaps(lines)
        assert lost == duplicated == 0
        assert lines == expected
        pauses = pulse.longest_pause(began), calm_pause
        self.tell(Outcome(fault, seen, *pauses, lost, duplicated, "losses equal"))

    def trainers(self) -> dict[str, psutil.Process]:
        """The workers, by node."""
        found = {}
        for name in self.nodes.processes:
            for process in self.nodes.workers(name, "RayTrainWorker"):
                found[name] = process
        return found


def gaps(lines: list[dict[str, Any]]) -> tuple[int, int]:
    """Samples that no step, or more than one, was made of."""
    lost = duplicated = end = 0
    for line in lines:
        first, last = line["samples"]
        lost, duplicated = lost + max(first - end, 0), duplicated + max(end - first, 0)
        end = last
    return lost, duplicated


@pytest.fixture(scope="module")
def stage(
    folder: Path,
    nodes: Nodes,
    photo: Callable[..., np.ndarray],
    tell: Callable[[Outcome], None],
) -> Iterator[Stage]:
    infos = []
    for i in range(2):
        samples = [
            Sample(f"p{i}-{k}", {"png": encode(photo(90, 100, seed=9 * i + k)), "json": b"{}"})
            for k in range(16)
        ]
        infos.append(write_shard(str(folder / "hr" / f"hr-{i:05d}.tar"), samples))
    write_manifest(str(folder / "hr"), Manifest(kind="hr", shards=tuple(infos)))
    nodes.add("head", "--num-cpus=0", STORE)
    nodes.add("data", *DATA, STORE)
    for i in range(3):
        nodes.add(f"train-{i}", *TRAINING, STORE)
    made = Stage(nodes, tell, folder)
    with made.running("calm") as (_, pulse):
        assert set(made.trainers()) < {"train-0", "train-1", "train-2"}
    made.calm, made.calm_pause = made.losses("calm"), pulse.longest_pause()
    assert len(made.calm) == STEPS and gaps(made.calm) == (0, 0)
    yield made
    for name in reversed(list(nodes.processes)):
        nodes.kill(name)


def test_a_training_node_is_killed(stage: Stage) -> None:
    with stage.running("killed") as (_, pulse):
        victim = random.choice(list(stage.trainers()))
        began = time.monotonic()
        stage.nodes.kill(victim)
    assert "marked dead" in stage.said
    fault = "a training node is killed"
    seen = "Ray's lines that the node is dead; the workers start again from the last checkpoint"
    stage.conclude("killed", pulse, began, fault, seen)
    stage.nodes.add(victim, *TRAINING, STORE)


def test_a_training_node_is_taken_back(stage: Stage) -> None:
    """A spot machine: the notice comes first, and after it the only checkpoint before the end."""
    notice, steps = 30, 600  # which take longer than the notice
    more = (f"training.steps={steps}", "training.checkpoint_minutes=60")
    with stage.running("leisurely", *more) as (_, pulse):
        pass
    calm, calm_pause = stage.losses("leisurely"), pulse.longest_pause()
    with stage.running("spot", *more) as (process, pulse):
        victim = random.choice(list(stage.trainers()))
        began = time.monotonic()
        stage.nodes.announce(victim, "aws", notice)
        while not (saved := stage.checkpoints("spot")):
            assert process.poll() is None and time.monotonic() < began + notice
            time.sleep(0.1)
        time.sleep(max(0.0, began + notice - time.monotonic()))
        assert stage.steps("spot") < steps, "the run was over before the notice"
        stage.nodes.kill(victim)
    assert "Traceback" not in stage.said and set(saved) < set(stage.checkpoints("spot"))
    fault = f"a spot machine of a training is taken back {notice} s after its notice"
    seen = "a pause; the workers start again from the checkpoint that they made at the notice"
    stage.conclude("spot", pulse, began, fault, seen, calm=(calm, calm_pause))
    stage.nodes.add(victim, *TRAINING, STORE)


def test_a_node_is_cut_off(stage: Stage) -> None:
    with stage.running("cut") as (_, pulse):
        victim = random.choice(list(stage.trainers()))
        began = time.monotonic()
        stage.nodes.cut(victim)
        time.sleep(CUT)
        stage.nodes.mend(victim)
    fault = f"a training node is cut off for {CUT:.0f} s"
    seen = "a pause"
    stage.conclude("cut", pulse, began, fault, seen)


def test_the_data_node_is_killed(stage: Stage) -> None:
    with stage.running("fed") as (_, pulse):
        began = time.monotonic()
        stage.nodes.kill("data")
        stage.nodes.add("data", *DATA, STORE)
    fault = "the only data node is killed in a training; another comes"
    seen = "a pause"
    stage.conclude("fed", pulse, began, fault, seen)


def test_the_driver_is_killed(stage: Stage) -> None:
    process = stage.start("driver")
    stage.await_steps(process, "driver", 20)
    process.kill()
    process.communicate()
    began = time.monotonic()
    with stage.running("driver") as (_, pulse):
        pass
    fault = "the command of a training is killed and run again"
    seen = "the second run goes on from the last checkpoint"
    stage.conclude("driver", pulse, began, fault, seen)


def test_the_controller_is_killed(stage: Stage) -> None:
    """Ray Train's own actor, of which Ray starts no other."""
    process = stage.start("controller")
    stage.await_steps(process, "controller", 20)
    (controller,) = stage.nodes.workers("head", "TrainController")
    began = time.monotonic()
    controller.kill()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in said, said
    assert "Training failed" in said and "same command resumes from the last checkpoint" in said
    with stage.running("controller") as (_, pulse):
        pass
    fault = "Ray Train's controller is killed, and the command run again"
    seen = "“Training failed”, why, exit 1; the second run goes on from the last checkpoint"
    stage.conclude("controller", pulse, began, fault, seen)


def test_a_worker_hangs(stage: Stage) -> None:
    with stage.running("hung", "training.max_silence_minutes=0.25") as (_, pulse):
        victim = random.choice(list(stage.trainers().values()))
        began = time.monotonic()
        victim.suspend()
    assert not victim.is_running()
    assert list((stage.folder / "home" / "runs" / "hung").glob("hung-*.txt"))
    fault = "a training worker hangs (SIGSTOP; 15 s are allowed)"
    seen = "a pause, and where each thread was in `hung-RANK.txt`"
    stage.conclude("hung", pulse, began, fault, seen)


def test_another_job_fills_the_object_store(stage: Stage) -> None:
    with hog(stage.nodes, "data") as spilled:
        with stage.running("pressed") as (_, pulse):
            began = time.monotonic()
        moved = spilled()
    fault = "another job fills the data node's object store"
    seen = f"nothing; {moved / 1e6:.0f} MB, the other job's, were moved to the node's disk"
    stage.conclude("pressed", pulse, began, fault, seen)


def test_a_clock_is_wrong(stage: Stage, tmp_path: Path) -> None:
    victim = "train-0"
    stage.nodes.kill(victim)
    stage.nodes.add(victim, *TRAINING, STORE, **skewed(tmp_path, seconds=3600))
    stage.nodes.kill("train-2")  # two nodes for two workers: one is the one with the clock
    with stage.running("skewed") as (_, pulse):
        assert victim in stage.trainers()
        began = time.monotonic()
    stage.nodes.kill(victim)
    for name in (victim, "train-2"):
        stage.nodes.add(name, *TRAINING, STORE)
    fault = "a training node's clock is an hour ahead"
    seen = "nothing; times in MLflow are that node's"
    stage.conclude("skewed", pulse, began, fault, seen)


def test_workers_come_and_go(stage: Stage) -> None:
    """2, 1 and 2 workers, as nodes go and come: every pair is learned from once."""
    name, elastic = "elastic", ("training.min_workers=1", "training.steps=100000")
    process = stage.start(name, *elastic)
    with Pulse(lambda: stage.steps(name)) as pulse:
        stage.await_steps(process, name, 20)
        busy = stage.trainers()
        for spare in {"train-0", "train-1", "train-2"} & set(stage.nodes.processes) - set(busy):
            stage.nodes.kill(spare)
        went, victim = time.monotonic(), random.choice(list(busy))
        stage.nodes.kill(victim)
        await_size(stage, process, name, 4)
        stage.await_steps(process, name, stage.steps(name) + 20)
        back = time.monotonic()
        stage.nodes.add(victim, *TRAINING, STORE)
        await_size(stage, process, name, 8)
        stage.await_steps(process, name, stage.steps(name) + 10)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75 and "Traceback" not in said, said
    lines = stage.losses(name)
    sizes = [line["samples"][1] - line["samples"][0] for line in lines]
    assert [size for size, _ in itertools.groupby(sizes)] == [8, 4, 8]
    assert all(math.isfinite(line["total"]) for line in lines)
    lost, duplicated = gaps(lines)
    assert lost == duplicated == 0
    for fault, since, until in (
        ("a training node goes; one worker is enough (`min_workers`)", went, back),
        ("the node comes back", back, math.inf),
    ):
        seen = "a pause; the workers that there is room for go on from the last checkpoint"
        pause = pulse.longest_pause(since, until)
        stage.tell(
            Outcome(fault, seen, pause, stage.calm_pause, 0, 0, "every pair once, losses finite")
        )


def await_size(stage: Stage, process: subprocess.Popen[str], name: str, pairs: int) -> None:
    """Wait for a step of so many pairs."""
    deadline = time.monotonic() + 300
    while True:
        lines = stage.losses(name)
        if lines and lines[-1]["samples"][1] - lines[-1]["samples"][0] == pairs:
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
