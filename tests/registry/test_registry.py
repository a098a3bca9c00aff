"""Versions and their weights, on a real MLflow store."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient

from teasr import lineage, promotion, registry, tracking
from teasr.backbones.dit import PRESETS
from teasr.backbones.folder import load_model
from teasr.errors import TeasrError, UsageError
from tests.ports import free_port
from tests.registry.figures import evaluation
from tests.test_tracking import mlflow_server


def test_a_version_can_be_explained(
    client: MlflowClient, add: Callable[..., int], name: str
) -> None:
    assert add(1.0, dataset="data-7", recipe="recipes/a.yaml", commit="abc") == 1
    details = lineage.version_details(client, name, 1)
    assert (details.dataset, details.benchmark, details.commit, details.recipe) == (
        "data-7",
        "bench-1",
        "abc",
        "recipes/a.yaml",
    )
    assert details.aliases == ["challenger"]
    assert details.metrics["1 step"]["psnr_y"] == pytest.approx(25.5)
    run = client.get_run(details.run_id)
    assert run.data.metrics["eval/1_step/psnr_y"] == pytest.approx(25.5)
    assert {f.path for f in client.list_artifacts(details.run_id)} == {
        "evaluation.json",
        "evaluation.csv",
    }


def test_registering_again_makes_no_second_version(
    client: MlflowClient, weights: Path, name: str
) -> None:
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    uri = registry.log_model(client, run, weights)
    assert registry.log_model(client, run, weights) == uri
    for tags in ({}, {"dataset": "data-8"}):
        assert registry.register(client, run, uri, name, evaluation(1), tags) == 1
    assert registry.list_versions(client, name) == {1: ["challenger"]}
    assert lineage.version_details(client, name, 1).dataset == "data-8"


def test_a_model_is_text_and_safetensors_with_its_own_code(
    client: MlflowClient, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    uri = registry.log_model(client, run, weights)
    assert list(tmp_path.iterdir()) == []  # nothing in the current folder, such as mlruns
    folder = registry.find(uri, client).fetch()
    assert {path.name for path in folder.iterdir()} == {
        "MLmodel",
        "artifacts",
        "code",
        "conda.yaml",
        "python_env.yaml",
        "requirements.txt",
        "serving_model.py",
    }
    assert {path.name for path in (folder / "artifacts").iterdir()} == {
        "model.json",
        "model.safetensors",
    }
    assert (folder / "code/teasr/restoration.py").is_file()
    assert not list(folder.rglob("*.pkl")) + list((folder / "code/teasr").glob("weights"))
    assert (
        f"torch=={torch.__version__.partition('+')[0]}" in (folder / "requirements.txt").read_text()
    )


def test_every_way_to_name_a_model_leads_to_the_same_weights(
    client: MlflowClient, weights: Path, add: Callable[..., int], name: str
) -> None:
    add(1.0)
    run = lineage.version_details(client, name, 1).run_id
    for uri in (f"models:/{name}/1", f"models:/{name}@challenger", f"runs:/{run}/model"):
        found = registry.resolve(uri, client)
        assert (found / "model.safetensors").read_bytes() == (
            weights / "model.safetensors"
        ).read_bytes()
        assert found == registry.resolve(uri, client)  # read where it lies, not copied
    assert registry.describe(f"models:/{name}@challenger", client) == f"{name} version 1"
    assert registry.resolve(str(weights)) == weights
    assert registry.describe(str(weights)) == str(weights)


def test_what_does_not_exist_is_answered_with_what_does(
    client: MlflowClient, add: Callable[..., int], name: str
) -> None:
    add(1.0)
    for uri, said in {
        "no-such-model": rf"no model 'no-such-model'.*Registered:.*{name} \(@challenger = 1\)",
        "models:/no-such-model/1": rf"No model 'no-such-model'.*{name}",
        f"models:/{name}/7": r"no version 7. Versions: 1 \(challenger\)",
        f"models:/{name}@champion": r"no alias 'champion'. Versions: 1 \(challenger\)",
        f"models:/{name}": rf"names no version. Write models:/{name}@ALIAS",
        f"models:/{name}/Production": "'Production' is not a version",
        "models:/m-0123456789": "There is no model",
        "runs:/0123456789/model": "There is no model",
    }.items():
        with pytest.raises(UsageError, match=said):
            registry.resolve(uri, client)
    for call in (promotion.promote, promotion.rollback, promotion.history, registry.list_versions):
        with pytest.raises(UsageError, match=rf"No model 'nobody' is registered.*{name}"):
            call(client, "nobody")


def test_a_name_must_fit_a_uri(client: MlflowClient, weights: Path) -> None:
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    for bad in ("a/b", "it's", "a@b", ""):
        with pytest.raises(UsageError, match="cannot be a model's name"):
            registry.register(client, run, "models:/m-1", bad, evaluation(1), {})


def test_asking_for_what_is_not_there_creates_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TEASR_HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match=r"no model 'nothing'.*Registered: none"):
        registry.resolve("nothing")
    assert not (tmp_path / "home").exists()


def test_a_champion_without_evaluation_is_told(
    client: MlflowClient, weights: Path, add: Callable[..., int], name: str
) -> None:
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    uri = registry.log_model(client, run, weights)
    client.create_registered_model(name)
    client.create_model_version(name, uri, run_id=run, model_id=uri.removeprefix("models:/"))
    client.set_registered_model_alias(name, "challenger", "1")
    with pytest.raises(TeasrError, match=rf"no evaluation to judge by. Evaluate models:/{name}/1"):
        promotion.promote(client, name)


def test_weights_changed_in_the_store_are_refused(
    client: MlflowClient, add: Callable[..., int], name: str
) -> None:
    add(1.0)
    uri = f"models:/{name}/1"
    stored = registry.resolve(uri, client) / "model.safetensors"
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    with pytest.raises(TeasrError, match=f"weights of {name} version 1 are not those"):
        registry.resolve(uri, client)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_loaded(client: MlflowClient, weights: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    registry.save_model(weights, good)
    assert load_model(registry.resolve(str(good))).network.settings == PRESETS["teasr-xs"]
    sprung = tmp_path / "sprung"
    payload = pickle.dumps(Trap(sprung))

    def tampered(kind: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / kind))

    pickled = tampered("pickled")
    (pickled / "python_model.pkl").write_bytes(payload)
    beside = tampered("beside")
    (beside / "artifacts" / "optimizer.pt").write_bytes(payload)
    for folder in (pickled, beside):
        with pytest.raises(TeasrError, match="does not put into a model"):
            registry.resolve(str(folder))

    for key, value in {
        "loader_module": "mlflow.sklearn",
        "python_model": "python_model.pkl",
        "artifacts": {"model.safetensors": {"path": "../good/artifacts/model.safetensors"}},
    }.items():
        other = tampered(key)
        described = yaml.safe_load((other / "MLmodel").read_text())
        described["flavors"]["python_function"][key] = value
        (other / "MLmodel").write_text(yaml.safe_dump(described))
        with pytest.raises(TeasrError, match="another kind"):
            registry.resolve(str(other))

    disguised = tampered("disguised")
    (disguised / "artifacts" / "model.safetensors").write_bytes(payload)
    with pytest.raises(TeasrError, match="damaged"):
        load_model(registry.resolve(str(disguised)))
    assert not sprung.exists()


@pytest.mark.journey
def test_a_server_s_models_are_downloaded_once(
    client: MlflowClient, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("TEASR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with mlflow_server(port, tmp_path / "server"):
        remote = tracking.connect()
        run = remote.create_run(tracking.experiment_id(remote, "trainings")).info.run_id
        uri = registry.log_model(remote, run, weights)
        assert registry.register(remote, run, uri, "teasr", evaluation(1), {"dataset": "d"}) == 1
        assert registry.register(remote, run, uri, "teasr", evaluation(1), {"dataset": "d"}) == 1
        assert promotion.promote(remote, "teasr").promoted
        assert [record.state for record in promotion.history(remote, "teasr")] == ["done"]
        assert lineage.version_details(remote, "teasr", 1).metrics["1 step"]["psnr_y"] == 25.5
        folder = registry.resolve("models:/teasr@champion")
        assert folder.is_relative_to(tmp_path / "home" / "downloads")
        assert load_model(folder).network.settings == PRESETS["teasr-xs"]
        modified = folder.stat().st_mtime_ns
        assert registry.resolve("models:/teasr/1").stat().st_mtime_ns == modified
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    tracking.connect()  # other tests go on with the module's own store
