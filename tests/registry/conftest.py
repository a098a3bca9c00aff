from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from teasr import registry, tracking
from teasr.backbones.dit import PRESETS, DualBranchDiT
from teasr.backbones.folder import save_model
from tests.registry.figures import evaluation

_names = (f"model-{i}" for i in itertools.count())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    settings = PRESETS["teasr-xs"]
    network = DualBranchDiT(settings)
    save_model(network, network.state_dict(), folder)
    (folder / "notes.txt").write_text("what else lies in a checkpoint's folder")
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking.connect(tmp_path_factory.mktemp("home"))


@pytest.fixture
def name() -> str:
    """A model's name that no other test uses."""
    return next(_names)


@pytest.fixture
def add(client: MlflowClient, weights: Path, name: str) -> Callable[..., int]:
    """`add(gain)` trains, evaluates and registers the next version of `name`."""

    def one(gain: float, benchmark: str = "bench-1", **tags: str) -> int:
        run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
        uri = registry.log_model(client, run, weights)
        return registry.register(client, run, uri, name, evaluation(gain, benchmark), tags)

    return one
