from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from teasr.backbones.dit import PRESETS, DualBranchDiT
from teasr.backbones.folder import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    built_in_models,
    compute_dtype,
    load_model,
    read_description,
    save_model,
)
from teasr.errors import TeasrError, UsageError

SETTINGS = PRESETS["teasr-xs"]


@pytest.fixture
def network() -> DualBranchDiT:
    torch.manual_seed(0)
    made = DualBranchDiT(SETTINGS)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return made


@pytest.fixture
def folder(tmp_path: Path, network: DualBranchDiT) -> Path:
    path = tmp_path / "deep" / "model"
    save_model(network, network.state_dict(), path, training={"steps": 3}, dtype=torch.float32)
    return path


def edit(folder: Path, **changes: object) -> None:
    path = folder / DESCRIPTION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_exact_in_float32(folder: Path, network: DualBranchDiT) -> None:
    loaded = load_model(folder, torch.float32).network
    assert loaded.settings == SETTINGS and not loaded.training
    for (name, first), (other, second) in zip(
        network.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(first, second)
    assert read_description(folder).training == {"steps": 3}


def test_weights_travel_in_bfloat16_by_default(tmp_path: Path, network: DualBranchDiT) -> None:
    save_model(network, network.state_dict(), tmp_path)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    loaded = load_model(tmp_path).network
    assert loaded.dtype == compute_dtype()
    again = load_model(tmp_path, torch.float32).network.state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(again[name], tensor.bfloat16().float())


def test_a_folder_without_a_model_says_what_it_should_hold(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no model.*model.json.*model.safetensors"):
        load_model(tmp_path / "nowhere")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(UsageError, match="holds no model"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_weights_are_called_damaged(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TeasrError, match=r"model.safetensors is damaged"):
        load_model(folder)


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe\x00"])
def test_a_damaged_description_is_named(folder: Path, text: bytes) -> None:
    (folder / DESCRIPTION_FILE).write_bytes(text)
    with pytest.raises(TeasrError, match=r"model.json is damaged"):
        load_model(folder)


@pytest.mark.parametrize("text", ["[]", "3", "{}"])
def test_a_description_without_a_format_is_refused(folder: Path, text: str) -> None:
    (folder / DESCRIPTION_FILE).write_text(text)
    with pytest.raises(TeasrError, match="format None; this version of teasr reads format 2"):
        load_model(folder)


@pytest.mark.parametrize("format", [1, 3, "2"])
def test_another_format_version_is_named(folder: Path, format: object) -> None:
    edit(folder, format=format, something_new=True)
    with pytest.raises(
        TeasrError, match=f"of format {format}; this version of teasr reads format 2"
    ):
        load_model(folder)


def test_settings_of_format_1_under_a_new_number_are_named(folder: Path) -> None:
    old = {"width": 48, "depth": 2, "heads": 3, "local_width": 16, "local_depth": 1}
    edit(folder, settings=old)
    with pytest.raises(UsageError, match=r"model\.json: unknown key 'local_depth'"):
        load_model(folder)


def test_another_backbone_is_named(folder: Path) -> None:
    edit(folder, backbone="unet")
    with pytest.raises(TeasrError, match=r"'unet'.*'dual-branch-dit', 'qwen-image', 'z-image'"):
        load_model(folder)


def test_wrong_settings_are_named(folder: Path) -> None:
    edit(folder, settings=SETTINGS.model_dump() | {"dept": 3})
    with pytest.raises(UsageError, match=r"model.json: unknown key 'dept'. Did you mean 'depth'"):
        load_model(folder)
    edit(folder, settings=SETTINGS.model_dump() | {"depth": 0})
    with pytest.raises(UsageError, match=r"'depth'.*greater than or equal to 1"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"depth": 3}, "blocks.2"), ({"depth": 1}, "blocks.1"), ({"width": 96}, "96")],
)
def test_weights_of_another_architecture_are_named(folder: Path, change: dict, named: str) -> None:
    edit(folder, settings=SETTINGS.model_dump() | change)
    with pytest.raises(TeasrError, match=r"does not fit its model\.json") as caught:
        load_model(folder)
    assert named in str(caught.value)


def test_built_in_models_are_models() -> None:
    for name, path in built_in_models().items():
        assert path.name == name
        assert read_description(path).backbone == "dual-branch-dit"
