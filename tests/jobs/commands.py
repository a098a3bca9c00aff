"""The command line in processes of its own, and settings that make a training tiny."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TINY = [
    "backbone=teasr-xs",
    "init=scratch",
    "shrink=1",
    "feed.crop=32",
    "training.minutes=null",
    "training.batch=4",
    "training.log_every=1",
    "training.preview_minutes=0",
    "evaluation.crop=64",
    "evaluation.copies=2",
    "evaluation.pictures=2",
    # An untrained network is bicubic: near it, not better. What is tested is the journey.
    "gate.rules.better than bicubic={metric: psnr_y, not_worse_than: bicubic, by: 3}",
    "gate.rules.fidelity.by=3",
    "gate.rules.any-step.by=9",
]


def environment(home: Path) -> dict[str, str]:
    """This process's, with `home` as the working folder and no store from outside."""
    kept = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return kept | {"TEASR_HOME": str(home), "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", *arguments]


def teasr(*arguments: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, beside `home`. `more`: environment variables."""
    return subprocess.run(
        command(*arguments),
        cwd=home.parent,
        env=environment(home) | more,
        capture_output=True,
        text=True,
        timeout=600,
    )
