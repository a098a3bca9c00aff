"""Restoring many pictures: names kept, bad ones told, finished ones left alone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.ingest import ingest
from pipelines.restore import _Picture, _Place, _Restorer, output_format, restore_many
from pipelines.runtime import MAX_LOST_WORKERS, quiet_actor_start
from teasr.backbones import load_model
from teasr.errors import UsageError
from teasr.images import decode, encode
from teasr.restoration import RestorationSettings, restore
from teasr.shards import Manifest, Sample, write_manifest, write_shard

SETTINGS = RestorationSettings(tile=16, overlap=4)


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
    untrained: Path, pictures: Path, tmp_path: Path, ray_session: None
) -> None:
    out = tmp_path / "out"
    result = restore_many(untrained, str(pictures), out, SETTINGS)
    assert result.done == ("a.png", "below/b.jpg")
    assert [(failure.name, failure.reason) for failure in result.failed] == [
        ("broken.jpg", "truncated")
    ]
    assert result.failed_by_reason == {"truncated": 1}
    assert result.pixels == 16 * (20 * 30 + 17 * 9) and result.megapixels_per_second > 0
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == ["a.png", "below/b.png"]
    restored = decode((out / "a.png").read_bytes()).rgb
    alone = restore(
        load_model(untrained).network, decode((pictures / "a.png").read_bytes()).rgb, SETTINGS
    )
    assert np.array_equal(restored, alone)

    before = (out / "a.png").stat().st_mtime_ns
    (out / "below" / "b.png").unlink()
    again = restore_many(untrained, str(pictures), out, SETTINGS)
    assert again.skipped == ("a.png",) and again.done == ("below/b.jpg",)
    assert (out / "a.png").stat().st_mtime_ns == before


def test_shards_are_restored_by_key(
    untrained: Path,
    pictures: Path,
    tmp_path: Path,
    ray_session: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (pictures / "broken.jpg").unlink()
    ingest([str(pictures)], str(tmp_path / "hr"), min_side=8)
    result = restore_many(untrained, str(tmp_path / "hr"), tmp_path / "out", SETTINGS)
    assert len(result.done) == 2 and not result.failed
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(result.done)
    assert "constructor arguments" not in capfd.readouterr().err
    again = restore_many(untrained, str(tmp_path / "hr"), tmp_path / "out", SETTINGS)
    assert (again.skipped, again.done, again.pixels) == (result.done, (), 0)


def test_a_picture_that_every_actor_was_lost_on_is_given_up(
    untrained: Path, pictures: Path, tmp_path: Path
) -> None:
    place = _Place(tmp_path / "out", ".png")
    picture = _Picture("a.png", str(pictures / "a.png"), place.target("a"))
    restorer = _Restorer(untrained, SETTINGS, place)
    left = tmp_path / "out" / ".a.png.tries.partial"
    left.parent.mkdir()
    for lost, state in ((MAX_LOST_WORKERS, "failed"), (MAX_LOST_WORKERS - 1, "done")):
        left.write_bytes(b"." * lost)
        row = {"picture": json.dumps(picture._asdict()), "data": b""}
        outcome = json.loads(restorer(row)["outcome"])
        assert (outcome["state"], outcome["reason"]) == (
            state,
            "worker-lost" if state == "failed" else "",
        )
        assert not left.exists()


def test_one_key_in_two_shards_is_told(
    untrained: Path, tmp_path: Path, photo: Callable[..., np.ndarray], ray_session: None
) -> None:
    sample = Sample("a", {"png": encode(photo(20, 20)), "json": b"{}"})
    infos = [write_shard(str(tmp_path / "hr" / f"hr-{i}.tar"), [sample]) for i in range(2)]
    write_manifest(str(tmp_path / "hr"), Manifest(kind="hr", shards=tuple(infos)))
    with pytest.raises(UsageError, match=r"Several pictures would be written to .*a\.png"):
        restore_many(untrained, str(tmp_path / "hr"), tmp_path / "out", SETTINGS)


def test_one_line_of_rays_is_kept_from_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    line = (
        b"core_worker.cc: Actor has constructor arguments in the object store and max_restarts > 0."
    )
    with quiet_actor_start():
        os.write(2, b"before\n" + line + b"\nafter\n")
        sys.stderr.write("bar\n")
    os.write(2, b"later\n")
    told = capfd.readouterr().err
    assert sorted(told.split()) == ["after", "bar", "before", "later"]


def test_two_pictures_of_one_name_are_refused(
    untrained: Path, tmp_path: Path, photo: Callable[..., np.ndarray]
) -> None:
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes(encode(photo(20, 20), "png" if "png" in name else "jpeg"))
    with pytest.raises(UsageError, match="Several pictures"):
        restore_many(untrained, str(tmp_path), tmp_path / "out", SETTINGS)


def test_formats_go_by_suffix() -> None:
    assert output_format(Path("x.JPG")) == "jpeg"
    with pytest.raises(UsageError, match=r"\.png"):
        output_format(Path("x.gif"))
