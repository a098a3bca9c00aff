"""Replay, on a real Ray: the same bytes from recipes alone, and the truth about what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.ingest import ingest
from pipelines.replay import plan, replay
from pipelines.synthesize import synthesize
from teasr.errors import TeasrError, UsageError
from teasr.images import decode, encode
from teasr.shards import Sample, read_manifest, read_shard, write_manifest, write_shard

pytestmark = pytest.mark.usefixtures("ray_session")

Photo = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def pairs(hr: str, album: Path) -> str:
    return synthesize(hr, str(album.parent / "pairs"), copies=2, seed=7, crop=64).destination


def rewrite(folder: str, change: Callable[[Sample], Sample | None]) -> None:
    """Put every sample of a dataset through `change`, and write shards and manifest anew."""
    manifest = read_manifest(folder)
    infos = []
    for shard in manifest.shards:
        url = str(Path(folder) / shard.name)
        infos.append(write_shard(url, [new for s in [*read_shard(url)] if (new := change(s))]))
    write_manifest(folder, manifest.model_copy(update={"shards": tuple(infos)}))


@pytest.mark.parametrize(
    ("preset", "crop", "sharpen"),
    [("teasr", 64, False), ("realesrgan", None, False), ("teasr", None, True)],
)
def test_the_same_bytes_when_the_preset_is_gone(
    hr: str, tmp_path: Path, preset: str, crop: int | None, sharpen: bool
) -> None:
    made_by = preset
    if sharpen:
        file = tmp_path / "gone.yaml"
        file.write_text(f"extends: {preset}\nsharpen_ground_truth: true\n")
        made_by = str(file)
    pairs = str(tmp_path / "pairs")
    made = synthesize(hr, pairs, preset=made_by, copies=2, seed=3, crop=crop)
    if sharpen:
        file.unlink()
    again = replay(hr, str(tmp_path / "again"), pairs)
    assert again.exact
    assert again.summary.manifest.fingerprint == made.manifest.fingerprint
    for shard in made.manifest.shards:
        there, here = tmp_path / "pairs" / shard.name, tmp_path / "again" / shard.name
        assert there.read_bytes() == here.read_bytes()


def test_photographs_are_found_in_other_shards_and_among_more(
    album: Path, pairs: str, tmp_path: Path, photo: Photo
) -> None:
    grown = tmp_path / "grown"
    shutil.copytree(album, grown)
    Image.fromarray(photo(80, 80, seed=9)).save(grown / "a0.png")
    source = ingest([str(grown)], str(tmp_path / "hr"), shard_size=4).destination
    assert replay(source, str(tmp_path / "again"), pairs).exact


def test_a_rerun_does_only_what_is_missing(hr: str, pairs: str, tmp_path: Path) -> None:
    target = tmp_path / "again"
    assert len(plan(hr, str(target), pairs).missing) == 3 and not target.exists()
    assert replay(hr, str(target), pairs).summary.shards == 3
    next(target.glob("*-00001.tar")).unlink()
    result = replay(hr, str(target), pairs)
    assert (result.summary.shards, result.summary.skipped_shards) == (1, 2)
    assert result.exact


def test_missing_and_changed_photographs_are_quarantined(
    hr: str, pairs: str, tmp_path: Path
) -> None:
    source = str(tmp_path / "hr")
    shutil.copytree(hr, source)

    def change(sample: Sample) -> Sample | None:
        if sample.key == "p0":
            return None
        if sample.key == "p1":  # by one grey level, in one corner
            rgb = decode(sample.members["png"]).rgb
            rgb[:, :, 0] ^= 1
            return Sample(sample.key, {**sample.members, "png": encode(rgb)})
        if sample.key == "p3":  # too small for where the pair was cut
            return Sample(sample.key, {**sample.members, "png": encode(np.zeros((8, 8, 3), "u1"))})
        return sample

    rewrite(source, change)
    result = replay(source, str(tmp_path / "again"), pairs)
    assert not result.exact
    assert result.summary.quarantined == {"source-changed": 4, "source-missing": 2}
    assert result.summary.samples == 4
    lines = (tmp_path / "again" / "quarantine.jsonl").read_text().splitlines()
    left_out = {json.loads(line)["source"]: json.loads(line)["message"] for line in lines}
    assert set(left_out) == {f"p{i}-v{v}" for i in (0, 1, 3) for v in (0, 1)}
    assert "differs by up to 1 of 255" in left_out["p1-v0"]
    assert result.comparison.keys_only_a == tuple(sorted(left_out))


def test_what_differs_is_said_with_how_much(hr: str, pairs: str, tmp_path: Path) -> None:
    """Pairs as another library would have made them: one LR pixel three levels off."""
    other = str(tmp_path / "pairs")
    shutil.copytree(pairs, other)

    def change(sample: Sample) -> Sample:
        if sample.key != "p4-v1":
            return sample
        rgb = decode(sample.members["lr.png"]).rgb
        rgb[0, 0, 0] = rgb[0, 0, 0] + 3 if rgb[0, 0, 0] < 128 else rgb[0, 0, 0] - 3
        return Sample(sample.key, {**sample.members, "lr.png": encode(rgb)})

    rewrite(other, change)
    result = replay(hr, str(tmp_path / "again"), other)
    assert not result.exact and result.summary.samples == 10
    assert [(s.key, s.members) for s in result.comparison.samples] == [("p4-v1", {"lr.png": 3})]
    assert len(result.comparison.same) == 2


def test_damaged_pairs_are_mended_as_far_as_their_recipes_stand(
    hr: str, pairs: str, tmp_path: Path
) -> None:
    damaged = tmp_path / "pairs"
    shutil.copytree(pairs, damaged)
    name = read_manifest(pairs).shards[0].name
    sample = next(read_shard(str(damaged / name)))
    data = bytearray((damaged / name).read_bytes())
    place = data.index(sample.members["lr.png"]) + 60
    data[place] ^= 255
    (damaged / name).write_bytes(data)
    result = replay(hr, str(tmp_path / "again"), str(damaged))
    assert result.exact
    assert (tmp_path / "again" / name).read_bytes() == (Path(pairs) / name).read_bytes()


def test_recipes_that_cannot_be_run_are_quarantined(hr: str, pairs: str, tmp_path: Path) -> None:
    other = str(tmp_path / "pairs")
    shutil.copytree(pairs, other)

    def change(sample: Sample) -> Sample:
        about = json.loads(sample.members["json"])
        match sample.key:
            case "p0-v0":
                about["recipe"]["version"] = 999
            case "p0-v1":
                about["recipe"]["steps"][0] = {"operator": "resize", "params": {"height": -3}}
            case "p1-v0":
                about["crop"] = "the middle"
            case "p1-v1":
                for step in about["recipe"]["steps"]:
                    if step["operator"] == "resize":
                        step["params"]["width"] = "wide"
            case "p2-v0":
                about = []
            case "p2-v1":
                about["recipe"]["steps"] = [7]
        return Sample(sample.key, {**sample.members, "json": json.dumps(about).encode()})

    rewrite(other, change)
    summary = replay(hr, str(tmp_path / "again"), other).summary
    assert (summary.samples, summary.quarantined) == (4, {"bad-recipe": 5, "recipe-version": 1})


def test_requests_that_are_wrong(hr: str, pairs: str, tmp_path: Path) -> None:
    target = str(tmp_path / "again")
    for arguments, told in (
        ((hr, target, str(tmp_path)), "not a dataset"),
        ((hr, target, hr), "LR/HR pairs are needed"),
        ((pairs, target, pairs), "HR pictures are needed"),
        ((hr, pairs + "/", pairs), "read and written at once"),
        ((hr, hr, pairs), "read and written at once"),
    ):
        with pytest.raises(UsageError, match=told):
            replay(*arguments)
    assert not Path(target).exists()
    lost = tmp_path / "pairs"
    shutil.copytree(pairs, lost)
    (lost / read_manifest(pairs).shards[1].name).unlink()
    with pytest.raises(TeasrError, match="no shard"):
        replay(hr, target, str(lost))
    assert not (tmp_path / "again" / "manifest.json").exists()
