"""Runs that are killed, stopped and moved, under the real Ray: their history must be the one of a
run that nothing happened to, to the last digit.

All commands run on one Ray of three CPUs, which another process holds.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from jobs.preemption import STOP_FILE
from jobs.recipe import Recipe, load_recipe
from jobs.record import LOSSES_FILE, read_losses
from jobs.run_feed import last_state
from jobs.training import _generator, _to_network
from pipelines.feed import LockStep, block_size, training_pass
from teasr.backbones import load_model
from teasr.images import encode
from teasr.objective import Objective
from tests.chaos.nodes import SHARE_EXPIRES

pytestmark = pytest.mark.journey

STEPS = 120
EPOCH = 8 * 16  # photographs, crops of each
SETTINGS = [
    *("backbone=teasr-xs", "init=scratch", "feed.crop=32", "objective.self_adversarial_after=1"),
    *("training.minutes=null", "training.batch=4", "training.threads=1", "training.log_every=5"),
    *("training.previews=2", "training.checkpoint_minutes=0.02", "engine.precision=fp32"),
]
HOLD = """
import ray
ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="ERROR",
         log_to_driver=False, object_store_memory=300_000_000)
print(ray.get_runtime_context().gcs_address, flush=True)
input()
"""

MOVE = """
import json, sys
from pathlib import Path
from jobs.distill import distill
from jobs.recipe import load_recipe
from teasr.errors import UsageError
folder = Path.cwd() / "home" / "runs" / "moved"
given = [*json.loads(sys.argv[1]), "engine.zero_stage=3", "engine.ema_decay=0",
         "engine.learning_rate=1e-3"]
for i, workers in enumerate([2, 1, 2]):
    length = [f"training.workers={workers}", f"training.steps={6 * (i + 1)}"]
    distill(load_recipe("quickstart", [*given, *length]), folder)
    (folder / "model").rename(Path.cwd() / f"moved-{i}")
for wrong, name in (("training.batch=8", "moved"), ("training.cpus_per_worker=2", "greedy")):
    try:
        distill(load_recipe("quickstart", [*given, *length, wrong]), folder.parent / name)
    except UsageError as error:
        print(error)
"""


@dataclass(frozen=True)
class Stage:
    """A Ray, a folder with data, and what runs there."""

    folder: Path
    ray: subprocess.Popen[str]
    environment: dict[str, str]

    def run(self, name: str) -> Path:
        return self.folder / "home" / "runs" / name

    def command(self, name: str, *more: str) -> list[str]:
        given = [f"data={self.folder / 'hr'}", *SETTINGS, f"training.steps={STEPS}", *more]
        return [sys.executable, "-m", "jobs.cli", "distill", "quickstart", "--name", name, *given]

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(name, *more),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, name: str, *more: str) -> str:
        """Run to the end, which must be a good one; what was said."""
        return self.ended(self.start(name, *more), 0)

    @staticmethod
    def ended(process: subprocess.Popen[str], code: int) -> str:
        said, complaints = process.communicate(timeout=600)
        assert process.returncode == code, complaints + said
        assert "Traceback" not in complaints
        return said + complaints

    def losses(self, name: str) -> list[dict[str, Any]]:
        return list(read_losses(self.run(name) / LOSSES_FILE))

    def listed(self, name: str) -> dict[str, Any] | None:
        try:
            return last_state(self.run(name))
        except ValueError:  # Ray is writing its list, in place
            return None

    def await_steps(self, name: str, process: subprocess.Popen[str], beyond: int) -> None:
        """Wait for so many steps beyond the first listed checkpoint that the command wrote."""
        begun, first, deadline = self.listed(name), None, time.monotonic() + 300
        while True:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            if first is None and (state := self.listed(name)) != begun:
                first = state
            lines = self.losses(name)
            if first and lines and lines[-1]["step"] >= first["steps"] + beyond and self.workers():
                return
            time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        """The processes of training workers of this Ray."""

        def trains(process: psutil.Process) -> bool:
            try:
                return "RayTrainWorker" in " ".join(process.cmdline())
            except psutil.Error:  # it has ended meanwhile
                return False

        return list(filter(trains, psutil.Process(self.ray.pid).children(recursive=True)))


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., np.ndarray]
) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "photos").mkdir()
    for i in range(8):
        (folder / "photos" / f"p{i}.png").write_bytes(encode(photo(90 + i, 100, seed=i)))
    kept = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    environment = kept | {
        "TEASR_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a checkpoint costs as much
        **SHARE_EXPIRES,
        "RAY_AUTH_MODE": "disabled",  # the token of another Ray may be about
    }
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        environment["RAY_ADDRESS"] = holder.stdout.readline().strip()
        made = Stage(folder, holder, environment)
        ingest = [sys.executable, "-m", "jobs.cli", "ingest", str(folder / "photos")]
        subprocess.run(
            [*ingest, str(folder / "hr"), "--shard-size", "4"],
            env=environment,
            cwd=folder,
            check=True,
            capture_output=True,
        )
        yield made
    finally:
        holder.communicate("\n", timeout=60)


@pytest.fixture(scope="module")
def undisturbed(stage: Stage) -> Callable[[int], list[dict[str, Any]]]:
    """`undisturbed(workers)`: the losses of a run that nothing happened to."""
    kept: dict[int, list[dict[str, Any]]] = {}

    def losses(workers: int) -> list[dict[str, Any]]:
        if workers not in kept:
            said = stage.finish(f"plain-{workers}", f"training.workers={workers}")
            assert "best preview" in said
            kept[workers] = stage.losses(f"plain-{workers}")
        return kept[workers]

    return losses


def test_what_a_run_shows(stage: Stage, undisturbed: Callable[[int], list[dict[str, Any]]]) -> None:
    from mlflow import MlflowClient

    lines = undisturbed(1)
    client = MlflowClient(f"sqlite:///{stage.folder / 'home' / 'mlflow.db'}")
    document = json.loads((stage.run("plain-1") / "run.json").read_text())
    run = client.get_run(document["run_id"])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/pixel_l1")
    assert [metric.step for metric in history] == list(range(5, STEPS + 1, 5))
    last = [line["terms"]["pixel_l1"] for line in lines[-5:]]
    assert history[-1].value == pytest.approx(sum(last) / 5)
    spent = {"waiting_for_data", "in_sweeps", "in_optimizer"}
    shares = [run.data.metrics[f"share_{name}"] for name in spent]
    assert all(share >= 0 for share in shares) and 0.5 < sum(shares) <= 1
    assert run.data.metrics["memory/peak_mb"] >= run.data.metrics["memory/resident_mb"] > 100
    files = {path.name for path in client_files(stage, run.info.run_id)}
    assert {"recipe.yaml", "01.yaml", f"step-{STEPS:06d}.jpg"} <= files
    previews = client.get_metric_history(run.info.run_id, "preview/psnr_y")
    assert previews[-1].step == STEPS and "preview/psnr_y_4_steps" in run.data.metrics
    best = max(previews, key=lambda metric: metric.value)
    (folder,) = stage.run("plain-1").glob("best/step-*")
    assert folder.name == f"step-{best.step:06d}" and load_model(folder)
    for tag in ("command", "commit", "versions", "data_fingerprint", "workers", "best_step"):
        assert run.data.tags[f"teasr.{tag}"]


def client_files(stage: Stage, run_id: str) -> Iterator[Path]:
    return (stage.folder / "home" / "artifacts" / run_id).rglob("*.*")


def assert_every_pair_once(lines: list[dict[str, Any]], pairs: int) -> None:
    """`LockStep` refuses pairs of other numbers than these."""
    spans = [line["samples"] for line in lines]
    assert [span[0] for span in spans] == [0, *(span[1] for span in spans[:-1])]
    assert spans[-1][1] == pairs


def test_a_killed_worker_leaves_no_trace(
    stage: Stage, undisturbed: Callable[[int], list[dict[str, Any]]]
) -> None:
    running = stage.start("killed", "training.workers=2")
    stage.await_steps("killed", running, beyond=random.randint(1, 12))
    processes = stage.workers()
    assert len(processes) == 2
    random.choice(processes).kill()
    stage.ended(running, 0)
    lines = stage.losses("killed")
    assert lines == undisturbed(2)
    assert len(lines) == STEPS and all(math.isfinite(line["total"]) for line in lines)
    assert_every_pair_once(lines, STEPS * 4 * 2)
    # training.keep_last, and one that Ray does not know if the worker died between the two.
    assert len(list(stage.run("killed").glob("train/*/teasr.json"))) in (2, 3)


def test_a_stopped_run_goes_on_as_if_it_had_not(
    stage: Stage, undisturbed: Callable[[int], list[dict[str, Any]]]
) -> None:
    """SIGTERM to the command; SIGINT and SIGTERM, which end it at once; SIGTERM to a worker."""
    running = stage.start("stopped")
    stage.await_steps("stopped", running, beyond=2)
    running.send_signal(signal.SIGTERM)
    said = stage.ended(running, 75)
    state = last_state(stage.run("stopped"))
    assert state and f"SIGTERM ended the run after step {state['steps']}" in said
    assert "The same command goes on from there" in said
    # Nothing is lost, and nothing is done after the checkpoint.
    assert [line["step"] for line in stage.losses("stopped")] == list(range(1, state["steps"] + 1))

    running = stage.start("stopped")
    stage.await_steps("stopped", running, beyond=1)
    running.send_signal(signal.SIGINT)
    while not (stage.run("stopped") / STOP_FILE).exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    stage.ended(running, 143)

    listed = stage.run("stopped") / "train" / "checkpoint_manager_snapshot.json"
    listed.write_bytes(listed.read_bytes()[:100])  # as Ray leaves it when it is killed in mid-write
    running = stage.start("stopped")
    stage.await_steps("stopped", running, beyond=1)
    (worker,) = stage.workers()
    worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    left = last_state(stage.run("stopped"))
    stage.ended(running, 0)
    lines = stage.losses("stopped")
    assert lines == undisturbed(1)
    # What the worker did until it went is in a checkpoint: the first of its own.
    assert left and left["steps"] > state["steps"]


@pytest.mark.long
def test_a_run_is_moved_to_other_numbers_of_workers(stage: Stage) -> None:
    """2, 1 and 2 workers under ZeRO-3, each time with a longer budget: every pair comes once, and
    the first loss is that of the weights that were saved, on the very next pairs."""
    counts, steps = [2, 1, 2], 6
    done = subprocess.run(
        [sys.executable, "-c", MOVE, json.dumps([*SETTINGS, f"data={stage.folder / 'hr'}"])],
        env=stage.environment,
        cwd=stage.folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = stage.losses("moved")
    assert len(lines) == steps * len(counts)
    assert all(math.isfinite(line["total"]) for line in lines)
    assert_every_pair_once(lines, steps * 4 * sum(counts))
    assert lines[-1]["samples"][1] <= EPOCH
    settings = [f"data={stage.folder / 'hr'}", *SETTINGS, "training.steps=1"]
    recipe = load_recipe("quickstart", settings)
    for i in (1, 2):
        line = lines[steps * i]
        expected = loss_of(stage.folder / f"moved-{i - 1}", recipe, line["samples"][0], counts[i])
        assert line["total"] == pytest.approx(expected, rel=5e-3)  # the model is kept in bfloat16
    assert "holds a run of another recipe" in done.stdout
    assert "leave no CPU for the feed: this Ray has 3, 5 are needed" in done.stdout


def loss_of(model: Path, recipe: Recipe, number: int, workers: int) -> float:
    """The loss of the weights in `model` on the pairs from `number` on, as workers draw them."""
    assert recipe.data is not None
    make = training_pass(recipe.data, recipe.feed)
    pairs = {}
    for i in range(2):
        for block in make({"pass": np.array([i])}):
            for row, index in enumerate(block["number"]):
                pairs[int(index)] = block["hr"][row], block["lr"][row]
    network = load_model(model, torch.float32).network
    objective, batch = Objective(recipe.objective), recipe.training.batch
    rows = block_size(batch, recipe.feed, consumers=workers, number=number)
    totals = []
    for rank in range(workers):
        expected = LockStep(number, rank, workers, batch, rows).expected()
        hr, lr = (
            _to_network(torch.from_numpy(np.stack([pairs[i][k] for i in expected])), "cpu")
            for k in (0, 1)
        )
        generator = _generator(recipe.training.seed, number, rank)
        losses = objective(network, hr, lr, generator, progress=0.5)
        totals.append(float(losses.total.detach()))
    return sum(totals) / workers


def test_a_run_that_diverges_names_what_is_left_from_before(
    stage: Stage, undisturbed: Callable[[int], list[dict[str, Any]]]
) -> None:
    """A finished run with a longer budget goes on; any growth of a term is too much for it."""
    undisturbed(1)
    running = stage.start("plain-1", "training.steps=400", "training.max_loss_growth=1.0001")
    said = stage.ended(running, 1)
    assert "The run diverges: the pixel_l1 term has grown" in said
    assert "init=" in said and Path(said.split("init=")[1].split()[0]).is_dir()
    assert len(stage.losses("plain-1")) < 400
