"""Models of pretrained backbones on disk: what was trained, and a reference to the frozen base."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from teasr.backbones import load_pretrained
from teasr.backbones.branch_lora import ADAPTERS_FILE, EMBEDDER_FILE, LORA_FILE
from teasr.backbones.folder import (
    BASE_VARIABLE,
    DESCRIPTION_FILE,
    Model,
    base_of,
    load_model,
    model_files,
    read_description,
    save_model,
)
from teasr.backbones.pretrained import PROMPT_FILE, fingerprint
from teasr.errors import TeasrError, UsageError
from tests.backbones.latents import KIND_NAMES, RANK, backbone, inputs, model_folder

both_kinds = pytest.mark.parametrize("kind", KIND_NAMES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Model]]:
    """The folders of each kind, written once, and what was saved."""
    made: dict[str, tuple[Path, Model]] = {}

    def of(kind: str) -> tuple[Path, Model]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            made[kind] = root, model_folder(kind, root)
        return made[kind]

    return of


@pytest.fixture
def root(saved: Callable[[str], tuple[Path, Model]], tmp_path: Path) -> Path:
    """`model` and `base` of a Z-Image, to spoil. The reference still names the first base."""
    return Path(shutil.copytree(saved("z-image")[0], tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@both_kinds
def test_round_trip_is_exact_in_float32(
    kind: str, saved: Callable[[str], tuple[Path, Model]]
) -> None:
    root, was = saved(kind)
    loaded = load_model(root / "model", torch.float32)
    ours, theirs = was.network.state_dict(), loaded.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    arguments = inputs()
    with torch.no_grad():
        assert torch.equal(was.network(*arguments), loaded.network(*arguments))
        latents = arguments[0]
        assert torch.equal(was.codec.decode(latents), loaded.codec.decode(latents))
    assert not loaded.network.training
    description = read_description(root / "model")
    assert (description.backbone, description.training) == (kind, {"steps": 3})
    assert load_model(root / "model").network.dtype == torch.bfloat16


@both_kinds
def test_the_folder_holds_what_was_trained_and_no_base(
    kind: str, saved: Callable[[str], tuple[Path, Model]]
) -> None:
    root, was = saved(kind)
    folder = root / "model"
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == set(model_files(folder)) and len(found) == 8
    stored = sum(
        tensor.numel()
        for path in folder.rglob("*.safetensors")
        if path.name != PROMPT_FILE
        for tensor in load_file(path).values()
    )
    assert stored == sum(p.numel() for p in was.network.parameters() if p.requires_grad)
    base = base_of(folder)
    assert base is not None
    assert base.source == str(root / "base") and base.revision is None
    assert base.fingerprint == fingerprint(root / "base" / "transformer")


def test_a_partitioned_network_is_saved_from_its_weights_alone(
    saved: Callable[[str], tuple[Path, Model]], tmp_path: Path
) -> None:
    """As under ZeRO-3: between forwards the network's own parameters are empty."""
    root, was = saved("qwen-image")
    made = load_pretrained("qwen-image", root / "base", rank=RANK, alpha=6.0).backbone
    for parameter in made.parameters():
        parameter.data = torch.empty(0)
    weights = {n: p.detach() for n, p in was.network.named_parameters() if p.requires_grad}
    save_model(made, weights, tmp_path / "model", dtype=torch.float32)
    again = load_model(tmp_path / "model", torch.float32).network.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    save_model(made, weights, tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / EMBEDDER_FILE).values()} == {
        torch.bfloat16
    }


def test_the_text_encoder_is_not_needed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's embedding travels with the model."""
    monkeypatch.setenv(BASE_VARIABLE, str(root / "base"))
    (root / "base" / PROMPT_FILE).unlink()
    assert load_model(root / "model").network.prompt.shape == (5, 24)


def test_a_network_whose_base_came_from_no_file_is_not_saved(tmp_path: Path) -> None:
    made = backbone("z-image")
    with pytest.raises(UsageError, match="came from no file"):
        save_model(made, made.trainable(), tmp_path / "model")
    with pytest.raises(UsageError, match="Linear is no kind"):
        save_model(torch.nn.Linear(1, 1), {}, tmp_path / "model")  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


# --------------------------------------------------------------------------- what can be wrong


def test_a_base_that_moved_is_named_and_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "model"
    base = base_of(folder)
    assert base is not None
    description = json.loads((folder / DESCRIPTION_FILE).read_text())
    description["settings"]["base"]["source"] = "/nowhere/qwen"
    edit(folder / DESCRIPTION_FILE, **description)
    with pytest.raises(
        TeasrError, match=rf"no longer there: /nowhere/qwen .*{base.fingerprint}"
    ) as e:
        load_model(folder)
    assert "TEASR_BASE" in str(e.value)
    monkeypatch.setenv(BASE_VARIABLE, str(root / "base"))
    assert load_model(folder).network.base.source == str(root / "base")  # type: ignore[union-attr]
    monkeypatch.setenv(BASE_VARIABLE, str(root / "nothing"))
    with pytest.raises(UsageError, match=r"TEASR_BASE names .*nothing, which is no folder"):
        load_model(folder)


def test_another_base_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (root / "base" / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    tensors["layers.0.attention.to_q.weight"] += 1
    save_file(tensors, path)
    monkeypatch.setenv(BASE_VARIABLE, str(root / "base"))
    with pytest.raises(TeasrError, match=r"trained on other frozen weights than those of .*base"):
        load_model(root / "model")


def test_a_base_of_another_kind_is_refused(
    root: Path, saved: Callable[[str], tuple[Path, Model]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BASE_VARIABLE, str(saved("qwen-image")[0] / "base"))
    with pytest.raises(UsageError, match="holds a QwenImageTransformer2DModel"):
        load_model(root / "model")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [f"noise/{LORA_FILE}", EMBEDDER_FILE, PROMPT_FILE])
def test_a_pickle_in_place_of_weights_is_damaged_and_never_loaded(root: Path, name: str) -> None:
    (root / "model" / name).write_bytes(pickle.dumps(Trap(root / "sprung")))
    with pytest.raises(TeasrError, match=rf"{Path(name).name} is damaged"):
        load_model(root / "model")
    assert not (root / "sprung").exists()


def test_tensors_of_other_shapes_are_refused(root: Path) -> None:
    path = root / "model" / "condition" / LORA_FILE
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, path)
    with pytest.raises(TeasrError, match=rf"does not fit the backbone: {name} is"):
        load_model(root / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "adapters of rank 4; the backbone was built with rank 8"),
        ({"alpha": 1.0}, "adapters of alpha 6; the backbone was built with alpha 1"),
        ({"rank": 0}, r"model\.json: 'rank'"),
        ({"depth": 2}, r"model\.json: unknown key 'depth'"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    root: Path, change: dict[str, Any], message: str
) -> None:
    path = root / "model" / DESCRIPTION_FILE
    edit(path, settings=json.loads(path.read_text())["settings"] | change)
    with pytest.raises(TeasrError, match=message):
        load_model(root / "model")


@pytest.mark.parametrize(
    "name", [f"noise/{LORA_FILE}", EMBEDDER_FILE, PROMPT_FILE, ADAPTERS_FILE, DESCRIPTION_FILE]
)
def test_a_missing_file_is_named(root: Path, name: str) -> None:
    (root / "model" / name).unlink()
    with pytest.raises(UsageError, match=r"holds no model"):
        load_model(root / "model")
