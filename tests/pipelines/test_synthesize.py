"""Synthesize, on a real Ray: same bytes anywhere, recipes that replay, corrupt pictures counted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.ingest import ingest
from pipelines.synthesize import plan, synthesize
from teasr.degradation import Degradation, replay
from teasr.errors import TeasrError, UsageError
from teasr.images import decode, encode
from teasr.shards import (
    Manifest,
    Sample,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)

pytestmark = pytest.mark.usefixtures("ray_session")

Photo = Callable[..., np.ndarray]


def original(album: Path, key: str) -> np.ndarray:
    return decode(next(album.glob(f"{key}.*")).read_bytes()).rgb


def all_pairs(folder: str | Path) -> dict[str, Sample]:
    shards = read_manifest(str(folder), "pairs").shards
    return {s.key: s for shard in shards for s in read_shard(str(Path(folder) / shard.name))}


def test_pairs_sizes_recipes_and_manifest(hr: str, album: Path, tmp_path: Path) -> None:
    summary = synthesize(hr, str(tmp_path / "pairs"), copies=2, seed=7)
    pairs = all_pairs(tmp_path / "pairs")
    assert sorted(pairs) == [f"p{i}-v{v}" for i in range(5) for v in range(2)]
    for key, pair in pairs.items():
        about = json.loads(pair.members["json"])
        high, low = decode(pair.members["hr.png"]).rgb, decode(pair.members["lr.png"]).rgb
        whole = original(album, about["key"])
        height, width = whole.shape[0] // 4 * 4, whole.shape[1] // 4 * 4
        np.testing.assert_array_equal(high, whole[:height, :width])
        assert low.shape == (height // 4, width // 4, 3)
        assert key == f"{about['key']}-v{about['variant']}"
        assert encode(replay(high, about["recipe"])) == pair.members["lr.png"]
    assert pairs["p0-v0"].members["lr.png"] != pairs["p0-v1"].members["lr.png"]
    manifest = read_manifest(str(tmp_path / "pairs"), "pairs")
    assert manifest == summary.manifest
    assert (manifest.preset, manifest.seed, manifest.scale) == ("teasr", 7, 4)
    assert manifest.parent == read_manifest(hr).fingerprint
    assert (summary.samples, summary.quarantined) == (10, {})


def test_same_bytes_whatever_the_shards_and_outside_ray(
    hr: str, album: Path, tmp_path: Path
) -> None:
    one = ingest([str(album)], str(tmp_path / "one"), shard_size=5).destination
    synthesize(hr, str(tmp_path / "a"), seed=7)
    synthesize(one, str(tmp_path / "b"), seed=7)
    assert all_pairs(tmp_path / "a") == all_pairs(tmp_path / "b")
    high = decode((album / "p3.png").read_bytes()).rgb[:100, :124]
    pair = Degradation("teasr", seed=7)(high, key="p3", variant=0)
    assert all_pairs(tmp_path / "a")["p3-v0"].members["lr.png"] == encode(pair.lr)


def test_another_run_has_the_same_fingerprint_and_another_seed_has_not(
    hr: str, tmp_path: Path
) -> None:
    first = synthesize(hr, str(tmp_path / "a"))
    second = synthesize(hr, str(tmp_path / "b"))
    other = synthesize(hr, str(tmp_path / "c"), seed=1)
    assert first.manifest == second.manifest
    assert first.manifest.fingerprint != other.manifest.fingerprint


def test_a_rerun_does_only_what_is_missing(hr: str, tmp_path: Path) -> None:
    target = tmp_path / "pairs"
    first = synthesize(hr, str(target))
    assert synthesize(hr, str(target)).skipped_shards == 3
    (target / "pairs-00001.tar").unlink()
    assert [task.name for task in plan(hr, str(target)).missing] == ["pairs-00001.tar"]
    again = synthesize(hr, str(target))
    assert (again.shards, again.skipped_shards, again.manifest) == (1, 2, first.manifest)
    assert len(plan(hr, str(target), seed=1).missing) == 3
    assert len(plan(hr, str(target), preset="realesrgan").missing) == 3


def test_random_crops_lie_in_the_picture(hr: str, album: Path, tmp_path: Path) -> None:
    synthesize(hr, str(tmp_path / "pairs"), copies=2, crop=64)
    places = set()
    for pair in all_pairs(tmp_path / "pairs").values():
        about = json.loads(pair.members["json"])
        top, left = about["crop"]["top"], about["crop"]["left"]
        whole = original(album, about["key"])
        high = decode(pair.members["hr.png"]).rgb
        np.testing.assert_array_equal(high, whole[top : top + 64, left : left + 64])
        assert decode(pair.members["lr.png"]).rgb.shape == (16, 16, 3)
        places.add((top, left))
    assert len(places) > 5
    with pytest.raises(TeasrError, match=r"5 of 5 .* 5 too-small"):
        synthesize(hr, str(tmp_path / "none"), crop=256)


def test_a_corrupt_picture_is_counted_for_each_copy(tmp_path: Path, photo: Photo) -> None:
    good = Sample("good", {"png": encode(photo()), "json": b"{}"})
    jpeg = io.BytesIO()
    Image.fromarray(photo()).save(jpeg, "JPEG")
    bad = Sample("bad", {"jpg": jpeg.getvalue()[:-300], "json": b"{}"})
    source = tmp_path / "hr"
    info = write_shard(str(source / "hr-00000.tar"), [bad, good])
    write_manifest(str(source), Manifest(kind="hr", shards=(info,)))
    summary = synthesize(str(source), str(tmp_path / "pairs"), copies=3)
    assert (summary.samples, summary.quarantined) == (3, {"truncated": 3})
    lines = (tmp_path / "pairs" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["bad-v0", "bad-v1", "bad-v2"]


def test_requests_that_are_wrong(hr: str, tmp_path: Path) -> None:
    target = str(tmp_path / "pairs")
    with pytest.raises(UsageError, match="not a dataset"):
        synthesize(str(tmp_path), target)
    with pytest.raises(UsageError, match="of another kind"):
        synthesize(hr, hr)
    with pytest.raises(UsageError, match="copies"):
        synthesize(hr, target, copies=0)
    with pytest.raises(UsageError, match="crop"):
        synthesize(hr, target, crop=30)
    with pytest.raises(UsageError, match="nope"):
        synthesize(hr, target, preset="nope")
    assert not (tmp_path / "pairs").exists()


def test_a_lost_source_shard_is_named(hr: str, album: Path, tmp_path: Path) -> None:
    source = ingest([str(album)], str(tmp_path / "hr"), shard_size=2).destination
    (Path(source) / "hr-00001.tar").unlink()
    with pytest.raises(TeasrError, match=r"no shard .*hr-00001\.tar"):
        synthesize(source, str(tmp_path / "pairs"))
    assert not (tmp_path / "pairs" / "manifest.json").exists()
