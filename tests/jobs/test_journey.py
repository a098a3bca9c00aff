"""The whole journey through the real Ray, DeepSpeed and MLflow, on tiny settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs.distill import _last_state
from teasr.images import decode, encode
from teasr.shards import read_manifest

pytestmark = pytest.mark.journey

TINY = [
    "backbone=teasr-xs",
    "init=scratch",
    "shrink=1",
    "feed.crop=32",
    "training.minutes=null",
    "training.batch=4",
    "training.log_every=1",
    "evaluation.crop=64",
    "evaluation.copies=2",
    "evaluation.pictures=2",
    # An untrained network is bicubic: near it, not better. What is tested is the journey.
    "gate.rules.better than bicubic={metric: psnr_y, not_worse_than: bicubic, by: 3}",
    "gate.rules.fidelity.by=3",
    "gate.rules.any-step.by=9",
]


def _teasr(*arguments: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=home.parent,
        env=environment | {"TEASR_HOME": str(home), "OMP_NUM_THREADS": "1"} | more,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(8):
        (folder / f"p{i}.jpg").write_bytes(encode(photo(90 + i, 100, seed=i), "jpeg"))
    (folder / "broken.jpg").write_bytes((folder / "p1.jpg").read_bytes()[:400])
    (folder / "tiny.png").write_bytes(encode(photo(20, 20)))
    return folder


def test_quickstart_twice_then_every_command(photos: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    given = ["--photos", str(photos), "--dir", str(home), *TINY, "training.steps=3"]
    first = _teasr("quickstart", *given, home=home)
    assert first.returncode == 0, first.stderr + first.stdout
    for part in ("quarantined", "champion", "answered over HTTP", "PSNR-Y", "4 steps", "next:"):
        assert part in first.stdout
    before, after = (
        decode((home / "pictures" / f"{n}.png").read_bytes()) for n in ("before", "after")
    )
    assert after.rgb.shape[0] == 4 * before.rgb.shape[0]
    assert not [path for path in home.rglob("*") if path.suffix in (".pkl", ".pickle")]
    reasons = [
        json.loads(line)["reason"]
        for name in ("train", "held-out")
        for line in (home / "data" / name / "quarantine.jsonl").read_text().splitlines()
    ]
    assert sorted(reasons) == ["too-small", "truncated"]

    again = _teasr("quickstart", *given, home=home)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("as before") == 7

    # A second training: a new version, a promotion, and back again.
    recipe = [f"photos=[{photos}]", *TINY, "training.steps=4"]
    second = _teasr("retrain", "quickstart", *recipe, home=home)
    assert second.returncode == 0, second.stderr + second.stdout
    assert "version 2 of 'teasr' is the champion" in second.stdout
    nothing = _teasr("retrain", "quickstart", *recipe, home=home)
    assert nothing.returncode == 0 and "nothing new" in nothing.stdout
    assert _teasr("rollback", "teasr", home=home).returncode == 0
    record = _teasr("history", "teasr", home=home).stdout
    assert "rollback" in record and "promote" in record and "champion" in record
    refused = _teasr("promote", "teasr", "--version", "1", home=home)
    assert refused.returncode == 2 and "is the champion" in refused.stderr

    picture = tmp_path / "odd.png"
    picture.write_bytes(encode(np.full((7, 41, 3), 80, np.uint8)))
    restored = _teasr(
        "restore", "models:/teasr@champion", str(picture), str(tmp_path / "big.png"), home=home
    )
    assert restored.returncode == 0, restored.stderr
    assert decode((tmp_path / "big.png").read_bytes()).rgb.shape == (28, 164, 3)
    benchmark = str(home / "data" / "benchmark")
    out = str(tmp_path / "figures")
    measured = _teasr(
        "evaluate",
        "models:/teasr/2",
        "--data",
        benchmark,
        "--steps",
        "1,2",
        "--out",
        out,
        home=home,
    )
    assert measured.returncode == 0 and "2 steps" in measured.stdout, measured.stderr
    assert {path.name for path in Path(out).iterdir()} == {
        "evaluation.json",
        "per-image.csv",
        "index.html",
        "sheet.png",
    }


def test_a_gate_that_is_not_passed_says_so(photos: Path, tmp_path: Path) -> None:
    floor = "gate.rules.floor={metric: psnr_y, at_least: 90}"
    recipe = [f"photos=[{photos}]", *TINY, "training.steps=1", floor]
    done = _teasr("retrain", "quickstart", *recipe, home=tmp_path / "home")
    assert done.returncode == 1, done.stderr
    assert "refused by the gate" in done.stderr and "Traceback" not in done.stderr


def test_a_killed_run_goes_on_from_its_checkpoint(photos: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert _teasr("ingest", str(photos), str(tmp_path / "hr"), home=home).returncode == 0
    command = [
        *("distill", "quickstart", f"data={tmp_path / 'hr'}", *TINY, "training.steps=400"),
        *("training.checkpoint_minutes=0.02", "objective.self_adversarial_after=1"),
    ]
    running = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *command],
        cwd=tmp_path,
        env=os.environ | {"TEASR_HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run = home / "runs" / "quickstart"
    deadline = time.monotonic() + 240
    # A checkpoint counts once it is listed: the newest folder may be half written at the kill.
    while _last_state(run) is None:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    begun = _last_state(run)
    assert begun is not None and 0 < begun["steps"] < 400

    done = _teasr(*command, home=home)
    assert done.returncode == 0, done.stderr
    end = json.loads((run / "run.json").read_text())["position"]
    assert end["steps"] == 400 and end["samples"] == 1600
    assert end["seconds"] > begun["seconds"]
    assert (run / "model" / "model.safetensors").is_file()
    last = json.loads(sorted(run.glob("train/checkpoint_*/teasr.json"))[-1].read_text())
    epoch = read_manifest(str(tmp_path / "hr")).samples * 16  # crops of each photograph
    assert (last["feed"]["epoch"], last["feed"]["consumed"]) == divmod(1600, epoch)
    assert "was finished before" in _teasr(*command, home=home).stdout


def test_two_workers_under_zero_3(photos: Path, tmp_path: Path) -> None:
    """The complete objective, parameters sharded over two processes, in a Ray of four CPUs."""
    home = tmp_path / "home"
    assert _teasr("ingest", str(photos), str(tmp_path / "hr"), home=home).returncode == 0
    two = ["training.workers=2", "training.threads=1", "engine.zero_stage=3"]
    overrides = [
        *TINY,
        *two,
        "training.steps=3",
        "engine.precision=fp32",
        f"data={tmp_path / 'hr'}",
    ]
    script = f"""
import ray
from pathlib import Path
ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR",
         log_to_driver=False, object_store_memory=200_000_000)
from jobs.distill import distill
from jobs.recipe import load_recipe
from teasr.errors import UsageError
try:
    greedy = load_recipe("quickstart", {[*overrides, "training.cpus_per_worker=2"]!r})
    distill(greedy, Path({str(home / "runs" / "greedy")!r}))
except UsageError as error:
    print(error)
result = distill(load_recipe("quickstart", {overrides!r}), Path({str(home / "runs" / "two")!r}))
print(result.position)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TEASR_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "leave no CPU for the feed: this Ray has 4, 5 are needed" in done.stdout
    assert "'steps': 3" in done.stdout and "'samples': 24" in done.stdout
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    run_id = json.loads((home / "runs" / "two" / "run.json").read_text())["run_id"]
    for term in (
        *("any_step", "end_to_end", "flow_matching"),
        *("self_adversarial", "rectification", "pixel_l1"),
    ):
        values = [m.value for m in client.get_metric_history(run_id, f"loss/{term}")]
        assert len(values) == 3 and np.isfinite(values).all()
