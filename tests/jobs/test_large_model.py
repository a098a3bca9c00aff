"""A model of a pretrained backbone through every command that takes a model."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from numpy.typing import NDArray

from teasr import lineage, promotion, registry, tracking
from teasr.backbones import load_model
from teasr.backbones.branch_lora import LORA_FILE
from teasr.backbones.folder import BASE_VARIABLE, DESCRIPTION_FILE, model_files
from teasr.errors import TeasrError
from teasr.evaluation import Evaluation
from teasr.images import decode, encode
from teasr.metrics import Scores
from teasr.restoration import RestorationSettings, restore
from teasr.shards import Manifest, Sample, write_manifest, write_shard
from tests.backbones.latents import KIND_NAMES, model_folder

Photo = Callable[..., NDArray[np.uint8]]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each kind a folder with `model` and the `base` it refers to."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KIND_NAMES}
    for kind, root in made.items():
        model_folder(kind, root)
    return made


def by_hand(root: Path, lr: NDArray[np.uint8], **settings: int) -> NDArray[np.uint8]:
    """What the library makes of `lr`, on one thread as Ray's workers do."""
    model = load_model(root / "model")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return restore(
            model.network, lr, RestorationSettings.model_validate(settings), codec=model.codec
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_restore_makes_one_picture(
    kind: str, roots: dict[str, Path], run: Run, tmp_path: Path, photo: Photo
) -> None:
    lr = photo(21, 34)
    (tmp_path / "in.png").write_bytes(encode(lr))
    code, out, err = run("restore", str(roots[kind] / "model"), "in.png", "out.png", "--steps", "2")
    assert code == 0 and "136 x 84 from in.png, 2 step(s)" in out and "Traceback" not in err
    made = decode((tmp_path / "out.png").read_bytes()).rgb
    assert made.shape == (84, 136, 3)
    assert np.abs(made.astype(int) - by_hand(roots[kind], lr, steps=2)).max() <= 1


def test_a_model_that_cannot_be_run_is_one_line(
    roots: dict[str, Path], run: Run, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.png").write_bytes(encode(photo(8, 8)))
    monkeypatch.setenv(BASE_VARIABLE, str(tmp_path / "gone"))
    for arguments in (
        ("restore", str(roots["z-image"] / "model"), "in.png", "out.png"),
        ("restore", str(roots["z-image"] / "model"), str(tmp_path), "out"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and "TEASR_BASE names" in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out.png").exists()


def test_shards_are_restored_by_workers(
    roots: dict[str, Path],
    run: Run,
    tmp_path: Path,
    photo: Photo,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a base that moved: workers, who started before, have not the variable that names it."""
    shutil.copytree(roots["z-image"] / "model", tmp_path / "model")
    path = tmp_path / "model" / DESCRIPTION_FILE
    path.write_text(path.read_text().replace(str(roots["z-image"]), "/moved"))
    (tmp_path / "base").symlink_to(roots["z-image"] / "base")
    monkeypatch.setenv(BASE_VARIABLE, "base")
    pictures = {f"p{i}": photo(9 + i, 12, seed=i) for i in range(3)}
    (tmp_path / "hr").mkdir()
    samples = [Sample(name, {"png": encode(lr), "json": b"{}"}) for name, lr in pictures.items()]
    info = write_shard(str(tmp_path / "hr" / "hr-0.tar"), samples)
    write_manifest(str(tmp_path / "hr"), Manifest(kind="hr", shards=(info,)))
    code, out, err = run("restore", "model", "hr", "out")
    assert code == 0, err
    assert "3 restored to out" in out
    for name, lr in pictures.items():
        made = decode((tmp_path / "out" / f"{name}.png").read_bytes()).rgb
        np.testing.assert_array_equal(made, by_hand(tmp_path, lr))


def test_evaluate_measures_it(
    roots: dict[str, Path], run: Run, tmp_path: Path, photo: Photo, ray_session: None
) -> None:
    samples = [
        Sample(
            f"p{i}", {"hr.png": encode(hr), "lr.png": encode(hr[::4, ::4].copy()), "json": b"{}"}
        )
        for i, hr in enumerate(photo(64, 80, seed=seed) for seed in (1, 2))
    ]
    (tmp_path / "pairs").mkdir()
    info = write_shard(str(tmp_path / "pairs" / "pairs-0.tar"), samples)
    write_manifest(str(tmp_path / "pairs"), Manifest(kind="pairs", shards=(info,)))
    code, out, err = run(
        *("evaluate", str(roots["qwen-image"] / "model"), "--data", "pairs", "--steps", "1,2"),
        *("--metrics", "psnr_y"),
    )
    assert code == 0, err
    assert "2 steps" in out
    found = Evaluation.from_json((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert list(found.scores) == ["bicubic", "1 step", "2 steps"]
    assert found.values("1 step", "psnr_y") != found.values("2 steps", "psnr_y")
    assert (tmp_path / "evaluation" / "sheet.png").is_file()


def test_a_champion_is_adapters_and_a_reference(
    roots: dict[str, Path],
    run: Run,
    tmp_path: Path,
    photo: Photo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pandas
    from mlflow.pyfunc import load_model as load_pyfunc

    root = roots["qwen-image"]
    client: MlflowClient = tracking.connect(tmp_path / "home")
    experiment = tracking.experiment_id(client, "trainings")
    run_id = client.create_run(experiment).info.run_id
    (root / "model" / "optimizer.pt").write_bytes(b"what else lies in a checkpoint's folder")
    uri = registry.log_model(client, run_id, root / "model")
    (root / "model" / "optimizer.pt").unlink()
    scores = {"bicubic": {"p": Scores(20, 0.5, None)}, "1 step": {"p": Scores(21, 0.5, None)}}
    assert registry.register(client, run_id, uri, "large", Evaluation("bench", scores), {}) == 1
    assert promotion.promote(client, "large").promoted

    stored = registry.find("models:/large@champion", client).fetch()
    artifacts = stored / "artifacts"
    files = {p.relative_to(artifacts).as_posix() for p in artifacts.rglob("*") if p.is_file()}
    assert files == set(model_files(root / "model"))
    sizes = [
        sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
        for folder in (stored, root / "base")
    ]
    assert sizes[0] < sizes[1] / 4
    assert "diffusers==" in (stored / "requirements.txt").read_text()
    tags = lineage.version_details(client, "large", 1).tags
    assert tags["base"] == str(root / "base") and len(tags["base_fingerprint"]) == 16

    lr = photo(10, 12)
    (tmp_path / "in.png").write_bytes(encode(lr))
    code, _, err = run("restore", "models:/large@champion", "in.png", "out.png")
    assert code == 0, err
    made = decode((tmp_path / "out.png").read_bytes()).rgb

    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow puts the model's code in front
    served = load_pyfunc(str(stored))
    table = pandas.DataFrame({"image": [base64.b64encode(encode(lr)).decode()]})
    (answer,) = served.predict(table)
    np.testing.assert_array_equal(decode(base64.b64decode(answer["image"])).rgb, made)
    (tiled,) = served.predict(table, params={"tile": 8})
    assert (tiled["width"], tiled["height"]) == (48, 40) and tiled["image"] != answer["image"]

    # Whoever writes into the store is found out: a pickle beside, another base, other weights.
    stray = artifacts / "noise" / "weights.pkl"
    stray.write_bytes(b"")
    with pytest.raises(TeasrError, match=r"does not put into a model: noise/weights\.pkl"):
        registry.resolve("models:/large@champion", client)
    stray.unlink()
    for name in (DESCRIPTION_FILE, f"noise/{LORA_FILE}"):
        kept = (artifacts / name).read_bytes()
        if name == DESCRIPTION_FILE:
            document = json.loads(kept)
            document["settings"]["base"]["fingerprint"] = "0" * 16
            (artifacts / name).write_text(json.dumps(document))
        else:
            (artifacts / name).write_bytes(kept[:-4] + b"\0\0\0\0")
        with pytest.raises(TeasrError, match="weights of large version 1 are not those"):
            registry.resolve("models:/large@champion", client)
        (artifacts / name).write_bytes(kept)
    assert registry.resolve("models:/large@champion", client) == artifacts.resolve()
