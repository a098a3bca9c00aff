"""Figures of a Ray that works, as Prometheus would read them."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from prometheus_client.parser import text_string_to_metric_families

from jobs import status
from jobs.plan import job_of
from jobs.recipe import load_recipe
from jobs.sweeps import SweepCounter
from pipelines import telemetry
from pipelines.ingest import ingest
from pipelines.synthesize import synthesize
from teasr.backbones import PRESETS, DualBranchDiT
from teasr.images import encode
from teasr.objective import MicroBatch, Objective
from tests.jobs.commands import TINY, command, environment
from tests.test_monitoring import SEEN, expressions, names

Told = dict[tuple[str, ...], float]
TUNED = [setting for setting in TINY if not setting.startswith("training.minutes")]


def exported() -> Told:
    """Values by name, stage or run, and reason, term or kind; summed over processes."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: Told = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = (sample.labels.get(n) for n in ("stage", "run", "reason", "term", "kind"))
            key = (sample.name, *(label for label in labels if label))
            found[key] = found.get(key, 0.0) + sample.value
    return found


def wait_for(
    wanted: Callable[[Told], bool],
) -> Told:
    """What is exported once it is as `wanted`: processes send their figures every 10 seconds."""
    deadline = time.monotonic() + 240
    while not wanted(found := exported()):
        assert time.monotonic() < deadline, [key for key in found if "teasr" in key[0]]
        time.sleep(0.5)
    return found


def test_outside_a_ray_nothing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    telemetry._made.cache_clear()
    telemetry.stage("ingest", 3, {"truncated": 1})
    telemetry.training("tiny", 0.5, {"loss/total": 1.0, "samples_per_second": 2.0})
    assert telemetry._made.cache_info().currsize == 0


def test_sweeps_are_those_of_the_step() -> None:
    """As `teasr plan` counts them, from a rehearsal."""
    recipe = load_recipe("quickstart", ["backbone=teasr-xs", "feed.crop=32", "training.batch=4"])
    job = job_of(recipe, lpips=False)
    network = DualBranchDiT(PRESETS["teasr-xs"])
    sweeps = SweepCounter(network)
    objective = Objective(recipe.objective, None, lambda x: x)
    hr, lr = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 8, 8)
    losses = objective(
        network,
        hr,
        lr,
        torch.Generator().manual_seed(0),
        pictures=hr,
        progress=0.5,
        micro_batch=MicroBatch(0, 1, 0),
        target_network=torch.no_grad()(network.__call__),
    )
    assert torch.isfinite(losses.total)
    assert sweeps.take() == job.rehearsal().sweeps and sweeps.take() == 0


@pytest.mark.journey
def test_a_synthesis_and_a_training_are_told(
    ray_session: None,
    tmp_path: Path,
    photo: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos, data, home = tmp_path / "photos", tmp_path / "data", tmp_path / "home"
    photos.mkdir()
    for i in range(4):
        (photos / f"{i}.png").write_bytes(encode(photo(90, 100, seed=i)))
    (photos / "broken.png").write_bytes(b"no picture")
    before = exported()
    ingest([str(photos)], str(data))
    synthesize(str(data), str(tmp_path / "pairs"), copies=2, crop=64)

    def made(found: Told, stage: str) -> float:
        key = ("ray_teasr_samples_total", stage)
        return found.get(key, 0) - before.get(key, 0)

    found = wait_for(lambda now: made(now, "synthesize") == 8 and made(now, "ingest") == 4)
    assert ("ray_teasr_quarantined_total", "ingest", "not-an-image") in found

    address, log = ray.get_runtime_context().gcs_address, tmp_path / "distill.log"
    training = subprocess.Popen(
        command(
            *("distill", "quickstart", f"data={data}", *TUNED, "training.minutes=5"),
            *("--name", "told", "--home", str(home)),
        ),
        cwd=tmp_path,
        env=environment(home) | {"RAY_ADDRESS": address},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        sure = {figure.exported for figure in telemetry.FIGURES}
        sure -= {telemetry.QUARANTINED.exported}
        found = wait_for(
            lambda now: (
                now.get(("ray_teasr_training_step", "told"), 0) > 1
                and made(now, "feed") > 0
                and sure <= {key[0] for key in now}
            )
        )
        # The cluster and what trains on it, on one screen.
        monkeypatch.setenv("RAY_ADDRESS", address)
        cluster = status.cluster(60)
        (one,) = status.trainings(home, status.datetime.now(status.UTC)).open
    finally:
        training.terminate()
        training.wait(60)
    assert found["ray_teasr_training_loss", "told", "total"] > 0
    assert found["ray_teasr_training_memory_bytes", "told", "resident"] > 1e8
    assert found["ray_teasr_training_sweeps_per_second", "told"] > 0
    assert 0 < found["ray_teasr_training_progress", "told"] < 1
    assert one.name == "told" and one.trains and one.step and one.loss
    assert cluster is not None and cluster.address == address and cluster.dead == 0
    (node,) = cluster.nodes
    assert (node.cpus, node.cpus_used, node.gpus) == (2, pytest.approx(1, abs=1), 0)
    assert node.memory and node.memory_used and node.store_used is not None
    assert node.spilled is not None

    # Whatever the rules and the dashboard ask of Ray itself is there.
    asked = {name for one in expressions() for name in names(one) if name.startswith("ray_")}
    assert asked - {"ray_teasr_quarantined_total"} <= {key[0] for key in found} and asked >= SEEN
