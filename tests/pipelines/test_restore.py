"""Restoring many pictures: names kept, bad ones told, finished ones left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.ingest import ingest
from pipelines.restore import output_format, restore_many
from teasr.backbones import PRESETS, DualBranchDiT, load_backbone, save_backbone
from teasr.errors import UsageError
from teasr.images import decode, encode
from teasr.restoration import RestorationSettings, restore

SETTINGS = RestorationSettings(tile=16, overlap=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    network = DualBranchDiT(PRESETS["teasr-xs"])
    save_backbone(network.settings, network.state_dict(), folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path, photo: Callable[..., np.ndarray]) -> Path:
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    (folder / "a.png").write_bytes(encode(photo(20, 30, seed=1)))
    (folder / "below" / "b.jpg").write_bytes(encode(photo(17, 9, seed=2), "jpeg"))
    (folder / "broken.jpg").write_bytes(encode(photo(40, 40, seed=3), "jpeg")[:300])
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_pictures_keep_their_names_and_bad_ones_are_told(
    model: Path, pictures: Path, tmp_path: Path, ray_session: None
) -> None:
    out = tmp_path / "out"
    result = restore_many(model, str(pictures), out, SETTINGS)
    assert result.done == ("a.png", "below/b.jpg")
    assert [name for name, _ in result.failed] == ["broken.jpg"]
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == ["a.png", "below/b.png"]
    restored = decode((out / "a.png").read_bytes()).rgb
    alone = restore(load_backbone(model), decode((pictures / "a.png").read_bytes()).rgb, SETTINGS)
    assert np.array_equal(restored, alone)

    before = (out / "a.png").stat().st_mtime_ns
    (out / "below" / "b.png").unlink()
    again = restore_many(model, str(pictures), out, SETTINGS)
    assert again.skipped == ("a.png",) and again.done == ("below/b.jpg",)
    assert (out / "a.png").stat().st_mtime_ns == before


def test_shards_are_restored_by_key(
    model: Path, pictures: Path, tmp_path: Path, ray_session: None
) -> None:
    (pictures / "broken.jpg").unlink()
    ingest([str(pictures)], str(tmp_path / "hr"), min_side=8)
    result = restore_many(model, str(tmp_path / "hr"), tmp_path / "out", SETTINGS)
    assert len(result.done) == 2 and not result.failed
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(result.done)


def test_two_pictures_of_one_name_are_refused(
    model: Path, tmp_path: Path, photo: Callable[..., np.ndarray]
) -> None:
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes(encode(photo(20, 20), "png" if "png" in name else "jpeg"))
    with pytest.raises(UsageError, match="Several pictures"):
        restore_many(model, str(tmp_path), tmp_path / "out", SETTINGS)


def test_formats_go_by_suffix() -> None:
    assert output_format(Path("x.JPG")) == "jpeg"
    with pytest.raises(UsageError, match=r"\.png"):
        output_format(Path("x.gif"))
