"""Ingest, on a real Ray: pictures keep their bytes, bad ones are counted, restarts finish."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest
import ray
from PIL import Image, ImageFilter

from pipelines.ingest import LAYOUT_NAME, _IngestShard, ingest, plan
from pipelines.shard_job import JobPlan, Rejected, ShardTask, _BuildShard, plan_job, run_job
from pipelines.synthesize import synthesize
from teasr.errors import TeasrError, UsageError
from teasr.images import decode
from teasr.shards import Manifest, Sample, read_manifest, read_shard

pytestmark = pytest.mark.usefixtures("ray_session")

# Ray's workers cannot import a test file: what it hands them travels whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

Photo = Callable[..., np.ndarray]


def saved(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header announces 50000 x 50000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, photo: Photo) -> Path:
    """A folder with every kind of file, good and bad."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "sub").mkdir()
    rgb = Image.fromarray(photo())
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "good.jpg": saved(rgb, "JPEG", quality=90),
        "sub/good one.png": saved(rgb, "PNG"),
        "good.webp": saved(rgb, "WEBP"),
        "grey.png": saved(rgb.convert("L"), "PNG"),
        "palette.png": saved(rgb.quantize(32), "PNG"),
        "alpha.png": saved(Image.fromarray(np.dstack([photo(), photo()[..., 0]])), "PNG"),
        "deep.png": saved(Image.fromarray(photo()[..., 0].astype(np.uint16) * 257), "PNG"),
        "rotated.jpg": saved(rgb, "JPEG", exif=turned),
        "scan.tif": saved(rgb, "TIFF"),
        "truncated.jpg": saved(rgb, "JPEG")[:-400],
        "empty.png": b"",
        "text.jpg": b"this is not a picture",
        "print.jpg": saved(rgb.convert("CMYK"), "JPEG"),
        "moving.gif": saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
        "moving.webp": saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(9)]),
        "tiny.png": saved(rgb.resize((20, 20)), "PNG"),
        "bomb.png": bomb(),
        "notes.txt": b"read me",
        ".hidden.png": saved(rgb, "PNG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "sub" / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    return folder


def album(folder: Path, photo: Photo, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"p{i}.png").write_bytes(saved(Image.fromarray(photo(seed=i)), "PNG"))
    return folder


def all_samples(destination: Path) -> dict[str, Sample]:
    shards = read_manifest(str(destination), "hr").shards
    return {s.key: s for shard in shards for s in read_shard(str(destination / shard.name))}


def quarantine(destination: Path) -> dict[str, str]:
    lines = (destination / "quarantine.jsonl").read_text().splitlines()
    return {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}


def test_every_kind_of_file(zoo: Path, tmp_path: Path, photo: Photo) -> None:
    summary = ingest([str(zoo)], str(tmp_path / "hr"), shard_size=4, duplicates="keep")
    assert quarantine(tmp_path / "hr") == {
        "truncated.jpg": "truncated",
        "empty.png": "not-an-image",
        "text.jpg": "not-an-image",
        "print.jpg": "cmyk",
        "moving.gif": "unsupported-format",
        "moving.webp": "animated",
        "tiny.png": "too-small",
        "bomb.png": "too-many-pixels",
        "notes.txt": "not-an-image",
    }
    samples = all_samples(tmp_path / "hr")
    assert summary.samples == len(samples) == 9
    assert sum(summary.quarantined.values()) == 9
    assert summary.quarantined["not-an-image"] == 3
    assert summary.manifest == read_manifest(str(tmp_path / "hr"))
    about = {key: json.loads(sample.members["json"]) for key, sample in samples.items()}
    sources = {entry["source"]: key for key, entry in about.items()}
    for source in ("good.jpg", "good.webp", "sub/good one.png"):  # byte for byte
        data = (zoo / source).read_bytes()
        assert samples[sources[source]].members[source.rpartition(".")[2]] == data
        assert about[sources[source]]["sha256"] == hashlib.sha256(data).hexdigest()
    why = {entry["source"]: entry["encoded_because"] for entry in about.values()}
    assert {source: reasons for source, reasons in why.items() if reasons} == {
        "grey.png": ["grey"],
        "palette.png": ["palette"],
        "alpha.png": ["alpha"],
        "deep.png": ["16-bit", "grey"],
        "rotated.jpg": ["exif-rotated"],
        "scan.tif": ["tiff"],
    }
    for source, reasons in why.items():
        if reasons:
            stored = samples[sources[source]].members["png"]
            with Image.open(io.BytesIO(stored)) as opened:
                assert opened.mode == "RGB"
                shown = np.asarray(opened)
            np.testing.assert_array_equal(shown, decode((zoo / source).read_bytes()).rgb)
    assert (about["rotated"]["width"], about["rotated"]["height"]) == (96, 128)
    # "good" is the stem of two pictures: both keys tell which.
    assert {key[:5] for key in samples if key.startswith("good")} == {"good-"}
    assert str(zoo) not in (tmp_path / "hr" / "manifest.json").read_text()
    assert all(str(zoo) not in sample.members["json"].decode() for sample in samples.values())


def test_equal_bytes_with_one_task_or_many_and_a_moved_source(tmp_path: Path, photo: Photo) -> None:
    first = album(tmp_path / "one" / "photos", photo)
    one = ingest([str(first)], str(tmp_path / "a"), shard_size=6)
    many = ingest([str(first)], str(tmp_path / "b"), shard_size=2)
    assert (one.shards, many.shards) == (1, 3)
    assert all_samples(tmp_path / "a") == all_samples(tmp_path / "b")
    first.rename(tmp_path / "elsewhere")
    again = ingest([str(tmp_path / "elsewhere")], str(tmp_path / "c"), shard_size=2)
    assert again.manifest == many.manifest
    moved = ingest([str(tmp_path / "elsewhere")], str(tmp_path / "b"), shard_size=2)
    assert (moved.shards, moved.skipped_shards) == (0, 3)


def test_a_rerun_does_only_what_is_missing(tmp_path: Path, photo: Photo) -> None:
    source, target = album(tmp_path / "photos", photo), tmp_path / "hr"
    first = ingest([str(source)], str(target), shard_size=2)
    times = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    dry = plan([str(source)], str(target), shard_size=2)
    assert (dry.missing, dry.samples, len(dry.done)) == ((), 6, 3)
    second = ingest([str(source)], str(target), shard_size=2)
    assert (second.shards, second.skipped_shards) == (0, 3)

    (target / "hr-00001.tar").unlink()
    third = ingest([str(source)], str(target), shard_size=2)
    assert (third.shards, third.skipped_shards) == (1, 2)
    os.truncate(target / "hr-00002.tar", 5000)
    (target / "hr-00000.tar.stats.json").write_text("{")
    fourth = ingest([str(source)], str(target), shard_size=2)
    assert (fourth.shards, fourth.skipped_shards) == (2, 1)
    assert first.manifest == second.manifest == third.manifest == fourth.manifest
    assert (target / "hr-00001.tar").stat().st_mtime_ns != times["hr-00001.tar"]


def test_new_and_lost_photographs(tmp_path: Path, photo: Photo) -> None:
    source, target = album(tmp_path / "photos", photo), tmp_path / "hr"
    before = ingest([str(source)], str(target), shard_size=2)
    Image.fromarray(photo(seed=9)).save(source / "p9.png")
    more = ingest([str(source)], str(target), shard_size=2)
    assert (more.samples, more.shards, more.skipped_shards) == (7, 1, 3)
    (source / "p9.png").unlink()
    back = ingest([str(source)], str(target), shard_size=2)
    assert back.manifest == before.manifest
    assert len(list(target.glob("*.tar"))) == 3  # the fourth is gone, also for a reader that globs


def test_a_changed_option_rebuilds(tmp_path: Path, photo: Photo) -> None:
    source, target = album(tmp_path / "photos", photo, 2), tmp_path / "hr"
    ingest([str(source)], str(target), min_side=40)
    halved = ingest([str(source)], str(target), min_side=40, shrink=2)
    assert halved.skipped_shards == 0
    for sample in all_samples(target).values():
        about = json.loads(sample.members["json"])
        assert decode(sample.members["png"]).rgb.shape == (48, 64, 3)
        assert (about["width"], about["height"], about["encoded_because"]) == (64, 48, ["shrunk"])
    with pytest.raises(TeasrError, match="2 too-small"):  # 96 / 2 is less than 64
        ingest([str(source)], str(tmp_path / "none"), shrink=2)


def test_a_bad_picture_moves_no_other(tmp_path: Path, photo: Photo) -> None:
    source = album(tmp_path / "photos", photo)
    good = ingest([str(source)], str(tmp_path / "a"), shard_size=2)
    (source / "p1.png").write_bytes(b"")
    worse = ingest([str(source)], str(tmp_path / "b"), shard_size=2)
    assert [shard.samples for shard in worse.manifest.shards] == [2, 1, 2]
    assert worse.manifest.shards[::2] == good.manifest.shards[::2]


def test_nothing_usable_fails_with_counts(tmp_path: Path) -> None:
    source, target = tmp_path / "photos", tmp_path / "hr"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.jpg").write_bytes(b"nothing")
    with pytest.raises(TeasrError, match=r"3 of 3 .*: 3 not-an-image\..*quarantine\.jsonl"):
        ingest([str(source)], str(target))
    assert not (target / "manifest.json").exists()
    assert not list(target.glob(".*"))


def test_above_the_share_no_manifest_and_below_it_at_once(tmp_path: Path, photo: Photo) -> None:
    source, target = album(tmp_path / "photos", photo, 3), tmp_path / "hr"
    (source / "bad.jpg").write_bytes(b"bad")
    for i in range(9):
        (source / f"{i}.txt").write_text("a caption")  # set aside, but not counted as bad
    with pytest.raises(TeasrError, match=r"1 of 4 samples \(25%\).*20% are accepted"):
        ingest([str(source)], str(target), max_bad_share=0.2)
    assert not (target / "manifest.json").exists()
    accepted = ingest([str(source)], str(target), max_bad_share=0.3)
    assert (accepted.samples, accepted.skipped_shards) == (3, 1)
    assert accepted.quarantined == {"not-an-image": 10}


def test_the_default_share_applies_from_twenty_pictures(tmp_path: Path, photo: Photo) -> None:
    source = album(tmp_path / "photos", photo, 4)
    for i in range(5):
        (source / f"b{i}.jpg").write_bytes(b"bad")
    assert ingest([str(source)], str(tmp_path / "few")).samples == 4
    for i in range(11):
        (source / f"c{i}.jpg").write_bytes(b"bad")
    with pytest.raises(TeasrError, match="50% are accepted"):
        ingest([str(source)], str(tmp_path / "many"))


def test_globs_single_pictures_and_overlaps(tmp_path: Path, photo: Photo) -> None:
    source = album(tmp_path / "photos", photo)
    other = album(tmp_path / "other", photo, 2)
    named = plan(
        [str(source / "p[0-2].png"), str(source / "p0.png"), str(other), str(other / "p1.png")],
        str(tmp_path / "hr"),
    )
    entries = named.tasks[0].payload["entries"]
    assert [entry["source"] for entry in entries] == [
        "other/p0.png",
        "other/p1.png",
        "p0.png",
        "p1.png",
        "p2.png",
    ]
    bracket = tmp_path / "p[9].png"  # a file of that name is meant, not a pattern
    bracket.write_bytes((source / "p0.png").read_bytes())
    assert plan([str(bracket)], str(tmp_path / "hr")).samples == 1


def test_equal_names_in_two_folders_get_two_keys(tmp_path: Path, photo: Photo) -> None:
    folders = [album(tmp_path / name / "photos", photo, 2) for name in ("x", "y")]
    summary = ingest([str(folder) for folder in folders], str(tmp_path / "hr"), duplicates="keep")
    assert summary.samples == len(all_samples(tmp_path / "hr")) == 4


def test_a_remote_source_is_listed_by_the_same_code(tmp_path: Path, photo: Photo) -> None:
    files = fsspec.filesystem("memory")
    for path in album(tmp_path / "photos", photo, 2).iterdir():
        files.pipe_file(f"/bucket/album/sub/{path.name}", path.read_bytes())
    (task,) = plan(["memory://bucket/album"], str(tmp_path / "hr")).tasks
    assert [entry["source"] for entry in task.payload["entries"]] == ["sub/p0.png", "sub/p1.png"]
    builder = _IngestShard(min_side=64, max_pixels=10**6, shrink=1.0)
    assert all(isinstance(item, Sample) for item in builder(task))
    with pytest.raises(UsageError, match="is inside the source"):
        plan(["memory://bucket/album"], "memory://bucket/album/hr")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_pictures_in_a_tar(suffix: str, tmp_path: Path, photo: Photo) -> None:
    source = album(tmp_path / "photos", photo, 4)
    archive = tmp_path / f"photos{suffix}"
    with tarfile.open(archive, "w:gz" if suffix.endswith("gz") else "w") as tar:
        tar.add(source, arcname="inside")
    summary = ingest([str(archive)], str(tmp_path / "hr"), shard_size=3)
    stored = {sample.members["png"] for sample in all_samples(tmp_path / "hr").values()}
    assert stored == {path.read_bytes() for path in source.iterdir()}
    assert (summary.samples, summary.shards) == (4, 2)
    os.truncate(archive, archive.stat().st_size // 2)
    cut = ingest([str(archive)], str(tmp_path / "cut"))
    assert 0 < cut.samples < 4
    assert cut.quarantined["damaged-tar"] == 1


def test_our_own_shards_are_a_source(tmp_path: Path, photo: Photo) -> None:
    source = album(tmp_path / "photos", photo, 3)
    ingest([str(source)], str(tmp_path / "hr"))
    again = ingest([str(tmp_path / "hr")], str(tmp_path / "again"))
    assert again.samples == 3


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_a_name_that_is_no_text(tmp_path: Path, photo: Photo) -> None:
    source = album(tmp_path / "photos", photo, 2)
    data = saved(Image.fromarray(photo(seed=7)), "PNG")
    with open(os.fsencode(source) + b"/\xff\xfe.png", "wb") as file:  # noqa: PTH123
        file.write(data)
    assert ingest([str(source)], str(tmp_path / "hr")).samples == 3


def test_a_picture_that_could_not_be_fetched_is_tried_again(tmp_path: Path, photo: Photo) -> None:
    source = album(tmp_path / "photos", photo, 2)
    job = plan([str(source)], str(tmp_path / "hr"))
    (source / "p0.png").rename(tmp_path / "away.png")
    builder = _IngestShard(min_side=64, max_pixels=10**6, shrink=1.0)
    assert run_job(job, builder, title="test").quarantined == {"read-error": 1}
    (tmp_path / "away.png").rename(source / "p0.png")  # the same file again, of the same time
    assert ingest([str(source)], str(tmp_path / "hr")).samples == 2


def test_requests_that_are_wrong(tmp_path: Path, photo: Photo) -> None:
    source = album(tmp_path / "photos", photo, 2)
    target = str(tmp_path / "hr")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no pictures")
    with pytest.raises(UsageError, match="nowhere does not exist"):
        ingest([str(tmp_path / "nowhere")], target)
    with pytest.raises(UsageError, match="does not exist"):
        ingest([str(source / "*.tiff")], target)
    with pytest.raises(UsageError, match="no picture in"):
        ingest([str(empty)], target)
    with pytest.raises(UsageError, match="No source"):
        ingest([], target)
    for inside in (source, source / "hr", tmp_path / "x" / ".." / "photos" / "hr"):
        with pytest.raises(UsageError, match="is inside the source"):
            ingest([str(source)], str(inside))
    with pytest.raises(UsageError, match="is a file"):
        ingest([str(source)], str(empty / "notes.txt"))
    wrongs = ({"shard_size": 0}, {"shrink": 0.5}, {"min_side": 0}, {"max_bad_share": 2})
    more = (
        {"shrink": "much"},
        {"duplicates": "all"},
        {"min_sharpness": 2},
        {"min_jpeg_quality": -1},
    )
    for wrong in (*wrongs, *more):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            ingest([str(source)], target, **wrong)
    assert not (tmp_path / "hr").exists()


# ---------------------------------------------------------------- growth


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("hr-*.tar*")}


def members_of(folder: Path) -> dict[str, list[str]]:
    return json.loads((folder / LAYOUT_NAME).read_text())["shards"]


def add(folder: Path, photo: Photo, *names: str) -> None:
    for name in names:
        Image.fromarray(photo(seed=sum(name.encode()))).save(folder / f"{name}.png")


def test_new_photographs_get_new_shards_and_nothing_else_changes(
    tmp_path: Path, photo: Photo
) -> None:
    source, target = album(tmp_path / "photos", photo), tmp_path / "hr"
    first = ingest([str(source)], str(target), shard_size=4)
    before = files_of(target)
    add(source, photo, "a-first", "p2-middle", "zz-last")
    assert [task.name for task in plan([str(source)], str(target), shard_size=4).missing] == [
        "hr-00002.tar"
    ]
    grown = ingest([str(source)], str(target), shard_size=4)
    assert (grown.samples, grown.written, grown.shards, grown.skipped_shards) == (9, 3, 1, 2)
    after = files_of(target)
    assert {name: after[name] for name in before} == before
    assert grown.manifest.shards[:2] == first.manifest.shards
    assert grown.manifest.fingerprint != first.manifest.fingerprint
    assert [s.key for s in read_shard(str(target / "hr-00002.tar"))] == [
        "a-first",
        "p2-middle",
        "zz-last",
    ]
    again = ingest([str(source)], str(target), shard_size=4)
    assert (again.shards, again.written, again.manifest) == (0, 0, grown.manifest)
    anew = ingest([str(source)], str(tmp_path / "anew"), shard_size=4)
    assert [shard.samples for shard in anew.manifest.shards] == [3, 3, 3]


def test_removed_and_changed_photographs_leave_only_their_own_shards(
    tmp_path: Path, photo: Photo
) -> None:
    source, target = album(tmp_path / "photos", photo, 8), tmp_path / "hr"
    ingest([str(source)], str(target), shard_size=2)
    before = files_of(target)
    (source / "p0.png").unlink()
    Image.fromarray(photo(seed=77)).save(source / "p5.png")
    os.utime(source / "p5.png", ns=(1, 1))
    for name in ("p2", "p6"):  # a whole shard
        (source / f"{name}.png").unlink()
    changed = ingest([str(source)], str(target), shard_size=2)
    after = files_of(target)
    assert after["hr-00003.tar"] == before["hr-00003.tar"]
    assert "hr-00002.tar" not in after and "hr-00002.tar.stats.json" not in after
    held = {n: [s.key for s in read_shard(str(target / n))] for n in after if n.endswith("tar")}
    assert held == {
        "hr-00000.tar": ["p4"],
        "hr-00001.tar": ["p1"],
        "hr-00003.tar": ["p3", "p7"],
        "hr-00004.tar": ["p5"],
    }
    assert (changed.shards, changed.skipped_shards, changed.samples) == (3, 1, 5)


def test_keys_stay_and_new_ones_differ(tmp_path: Path, photo: Photo) -> None:
    source, target = album(tmp_path / "photos", photo, 2), tmp_path / "hr"
    ingest([str(source)], str(target))
    for seed, name in enumerate(("P0.webp", "p1.jpg", "p1.webp"), 40):
        Image.fromarray(photo(seed=seed)).save(source / name)
    ingest([str(source)], str(target))
    sources = {json.loads(s.members["json"])["source"]: k for k, s in all_samples(target).items()}
    assert (sources["p0.png"], sources["p1.png"]) == ("p0", "p1")
    assert all(len(sources[name]) == 13 for name in ("P0.webp", "p1.jpg", "p1.webp"))
    assert len({key.lower() for key in sources.values()}) == 5


def test_a_grown_job_that_is_cut_short_goes_on_with_the_same_members(
    tmp_path: Path, photo: Photo
) -> None:
    source, target = album(tmp_path / "photos", photo), tmp_path / "hr"
    ingest([str(source)], str(target), shard_size=2)
    add(source, photo, "a", "m", "n")
    whole = ingest([str(source)], str(target), shard_size=2)
    members = members_of(target)
    for name in ("hr-00001.tar", "hr-00003.tar", "hr-00004.tar.stats.json", "manifest.json"):
        (target / name).unlink()
    add(source, photo, "b")  # and meanwhile there is another one
    finished = ingest([str(source)], str(target), shard_size=2)
    assert finished.manifest.shards[:5] == whole.manifest.shards
    assert {name: members_of(target)[name] for name in members} == members
    assert (finished.shards, finished.skipped_shards) == (4, 2)


def test_other_options_deal_anew(tmp_path: Path, photo: Photo) -> None:
    source, target = album(tmp_path / "photos", photo, 4), tmp_path / "hr"
    ingest([str(source)], str(target), shard_size=2)
    add(source, photo, "a")
    ingest([str(source)], str(target), shard_size=2)
    anew = ingest([str(source)], str(target), shard_size=3)
    fresh = ingest([str(source)], str(tmp_path / "fresh"), shard_size=3)
    assert anew.manifest == fresh.manifest


def test_pairs_grow_with_their_photographs(tmp_path: Path, photo: Photo) -> None:
    source, hr, pairs = album(tmp_path / "photos", photo), tmp_path / "hr", tmp_path / "pairs"
    ingest([str(source)], str(hr), shard_size=2)
    first = synthesize(str(hr), str(pairs))
    before = {path.name: path.read_bytes() for path in pairs.glob("pairs-*.tar")}
    add(source, photo, "a", "p3-b", "z")
    ingest([str(source)], str(hr), shard_size=2)
    grown = synthesize(str(hr), str(pairs))
    assert (grown.samples, grown.shards, grown.skipped_shards) == (9, 2, 3)
    assert grown.manifest.shards[:3] == first.manifest.shards
    assert {name: (pairs / name).read_bytes() for name in before} == before
    (source / "p1.png").unlink()
    (source / "p4.png").unlink()  # a shard in the middle vanishes
    ingest([str(source)], str(hr), shard_size=2)
    shrunk = synthesize(str(hr), str(pairs))
    assert (shrunk.samples, shrunk.shards, shrunk.skipped_shards) == (7, 0, 4)


# ---------------------------------------------------------------- hygiene


def scene(seed: int) -> Image.Image:
    """Blobs of every size, which a perceptual hash tells apart."""
    random = np.random.default_rng(seed)
    total = np.zeros((480, 640, 3), np.float32)
    for cells in (3, 8, 20, 60, 160):
        coarse = random.normal(0, 1, (cells, cells * 4 // 3, 3)).astype(np.float32)
        total += cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC) * 40 / cells**0.4
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))


def scenes(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"s{i}.jpg").write_bytes(saved(scene(i), "JPEG", quality=95))
    return folder


def reasons(destination: Path) -> dict[str, str]:
    lines = (destination / "quarantine.jsonl").read_text().splitlines()
    return {e["source"]: f"{e['reason']}: {e['message']}" for e in map(json.loads, lines)}


def test_copies_are_set_aside_and_say_of_what(tmp_path: Path) -> None:
    source, target = scenes(tmp_path / "photos"), tmp_path / "hr"
    (source / "a-same.jpg").write_bytes((source / "s1.jpg").read_bytes())
    (source / "b-small.jpg").write_bytes(saved(scene(2).resize((320, 240)), "JPEG", quality=60))
    near = ingest([str(source)], str(target))
    assert reasons(target) == {
        "s1.jpg": "duplicate: Its bytes are those of a-same.jpg (640 x 480), which is kept.",
        "b-small.jpg": "near-duplicate: It is a near-duplicate of s2.jpg (640 x 480), which is "
        "kept.",
    }
    assert (near.samples, near.quarantined) == (4, {"duplicate": 1, "near-duplicate": 1})
    assert near.samples + sum(near.quarantined.values()) == 6
    exact = ingest([str(source)], str(tmp_path / "exact"), duplicates="exact")
    assert (exact.samples, exact.quarantined) == (5, {"duplicate": 1})
    kept = ingest([str(source)], str(tmp_path / "kept"), duplicates="keep")
    assert (kept.samples, kept.quarantined) == (6, {})
    assert not list((tmp_path / "kept").glob("scan-*"))


def test_what_is_in_the_dataset_is_not_thrown_out_for_a_better_copy(tmp_path: Path) -> None:
    source, target = tmp_path / "photos", tmp_path / "hr"
    source.mkdir()
    (source / "small.jpg").write_bytes(saved(scene(1).resize((320, 240)), "JPEG"))
    ingest([str(source)], str(target))
    before = files_of(target)
    (source / "large.jpg").write_bytes(saved(scene(1), "JPEG", quality=95))
    (source / "other.jpg").write_bytes(saved(scene(2), "JPEG", quality=95))
    grown = ingest([str(source)], str(target))
    assert (grown.shards, grown.quarantined) == (1, {"near-duplicate": 1})
    assert list(quarantine(target)) == ["large.jpg"]
    assert {name: files_of(target)[name] for name in before} == before
    (source / "small.jpg").unlink()  # the copy takes its place, in a shard of its own
    ingest([str(source)], str(target))
    assert sorted(all_samples(target)) == ["large", "other"]
    assert quarantine(target) == {}


def test_a_rerun_looks_only_at_what_is_new(tmp_path: Path) -> None:
    source, target = scenes(tmp_path / "photos"), tmp_path / "hr"
    assert plan([str(source)], str(target)).unseen == 4
    assert not target.exists()
    ingest([str(source)], str(target))
    (source / "copy.jpg").write_bytes((source / "s0.jpg").read_bytes())
    assert plan([str(source)], str(target)).unseen == 1
    ingest([str(source)], str(target))
    dry = plan([str(source)], str(target))
    assert (dry.unseen, [entry.source for entry in dry.set_aside]) == (0, ["copy.jpg"])
    parts = sorted(target.glob("scan-*.jsonl"))
    assert [len(part.read_text().splitlines()) for part in parts] == [4, 1]


def test_a_benchmark_is_not_learned_from(tmp_path: Path) -> None:
    source = scenes(tmp_path / "photos")
    crop, whole = scene(1).crop((100, 60, 400, 360)), scene(3).resize((320, 240))
    bench = tmp_path / "bench"
    bench.mkdir()
    crop.save(bench / "crop.png")
    whole.save(bench / "whole.png")
    dataset = ingest([str(bench)], str(tmp_path / "bench-hr")).destination
    pairs = synthesize(dataset, str(tmp_path / "bench-pairs")).destination
    for benchmark in (str(bench), dataset, pairs):
        target = tmp_path / Path(benchmark).name.replace("bench", "hr")
        summary = ingest([str(source)], str(target), against=[benchmark])
        assert (summary.samples, summary.quarantined["benchmark-leak"]) == (2, 2), benchmark
        assert sorted(quarantine(target)) == ["s1.jpg", "s3.jpg"]
    assert "crop.png is in it" in reasons(tmp_path / "hr")["s1.jpg"]
    with pytest.raises(UsageError, match="nowhere does not exist"):
        ingest([str(source)], str(tmp_path / "x"), against=[str(tmp_path / "nowhere")])


def test_blur_and_jpeg_damage_are_filtered_on_request(tmp_path: Path) -> None:
    source = scenes(tmp_path / "photos")
    soft = scene(8).filter(ImageFilter.GaussianBlur(6))
    (source / "soft.jpg").write_bytes(saved(soft, "JPEG", quality=95))
    (source / "crushed.jpg").write_bytes(saved(scene(9), "JPEG", quality=20))
    plain = ingest([str(source)], str(tmp_path / "all"))
    assert (plain.samples, plain.quarantined) == (6, {})
    strict = ingest([str(source)], str(tmp_path / "hr"), min_sharpness=0.1, min_jpeg_quality=50)
    assert reasons(tmp_path / "hr") == {
        "soft.jpg": "blurred: Its sharpness is 0.05, less than 0.1.",
        "crushed.jpg": "jpeg-damage: Its JPEG quality is about 20, less than 50.",
    }
    assert strict.samples == 4
    with pytest.raises(TeasrError, match="6 blurred"):
        ingest([str(source)], str(tmp_path / "none"), min_sharpness=1)
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_automatic_shrinking_by_jpeg_quality(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for i, quality in enumerate((95, 80, 40)):
        (source / f"q{quality}.jpg").write_bytes(saved(scene(i), "JPEG", quality=quality))
    tight = scene(4).resize((240, 160))
    (source / "tight.jpg").write_bytes(saved(tight, "JPEG", quality=40))
    scene(5).save(source / "lossless.png")
    ingest([str(source)], str(tmp_path / "hr"), shrink="auto", min_side=100)
    about = {k: json.loads(s.members["json"]) for k, s in all_samples(tmp_path / "hr").items()}
    assert {k: (a["jpeg_quality"], a["shrunk_by"], a["width"]) for k, a in about.items()} == {
        "q95": (95, 1, 640),
        "q80": (80, 1.5, 427),
        "q40": (40, 2, 320),
        "tight": (40, 1.5, 160),  # halved it would have 80 pixels
        "lossless": (None, 1, 640),
    }
    assert about["q95"]["encoded_because"] == []
    assert about["q40"]["encoded_because"] == ["shrunk"]


# ---------------------------------------------------------------- the common machine


def job(target: Path, count: int = 3) -> JobPlan:
    tasks = [
        ShardTask(name=f"hr-{i:05d}.tar", samples=2, payload={"i": i}, fingerprint=f"f{i}")
        for i in range(count)
    ]
    return plan_job(str(target), tasks, Manifest(kind="hr", shards=()))


def two_samples(task: ShardTask) -> Iterator[Sample | Rejected]:
    for i in range(2):
        yield Sample(f"k{task.payload['i']}-{i}", {"png": b"x" * 1000, "json": b"{}"})


def test_a_failed_job_is_finished_by_the_next(tmp_path: Path) -> None:
    def fails_on_the_second(task: ShardTask) -> Iterator[Sample | Rejected]:
        samples = two_samples(task)
        yield next(samples)
        if task.payload["i"] == 1:
            raise UsageError("The disk of shard 1 is on fire.", "Call someone.")
        yield next(samples)

    target = tmp_path / "hr"
    with pytest.raises(UsageError) as caught:
        run_job(job(target), fails_on_the_second, title="test")
    assert (caught.value.message, caught.value.hint) == (
        "The disk of shard 1 is on fire.",
        "Call someone.",
    )
    assert not (target / "manifest.json").exists()
    assert not (target / "hr-00001.tar").exists()
    summary = run_job(job(target), two_samples, title="test")
    assert (summary.samples, summary.shards + summary.skipped_shards) == (6, 3)
    straight = run_job(job(tmp_path / "straight"), two_samples, title="test")
    assert summary.manifest == straight.manifest


def test_a_killed_worker_is_retried_and_leaves_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "killed"

    def dies_once(task: ShardTask) -> Iterator[Sample | Rejected]:
        samples = two_samples(task)
        yield next(samples)
        if task.payload["i"] == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield next(samples)

    target = tmp_path / "hr"
    summary = run_job(job(target), dies_once, title="test")
    assert marker.exists()
    straight = run_job(job(tmp_path / "straight"), two_samples, title="test")
    assert summary.manifest == straight.manifest
    (target / "hr-00002.tar").unlink()
    run_job(job(target), two_samples, title="test")
    assert not list(target.glob(".*"))  # what the killed one left is swept by the next run


def test_a_folder_in_the_making_is_no_dataset(tmp_path: Path) -> None:
    target = tmp_path / "hr"
    run_job(job(target), two_samples, title="test")
    (target / "hr-00000.tar.stats.json").unlink()

    def looks(task: ShardTask) -> Iterator[Sample | Rejected]:
        assert not (target / "manifest.json").exists()
        yield from two_samples(task)

    assert run_job(job(target), looks, title="test").shards == 1
    assert read_manifest(str(target)).samples == 6


def test_a_remote_destination_by_the_same_code() -> None:
    # The memory file system is one process's own, so the shards are built here and not by workers.
    plan = plan_job("memory://bucket/hr", job(Path("unused")).tasks, Manifest(kind="hr", shards=()))
    build = _BuildShard(two_samples, plan.destination)
    stats = [build.build(task) for task in plan.tasks]
    _BuildShard(two_samples, plan.destination).build(
        plan.tasks[0].model_copy(update={"name": "hr-00009.tar"})
    )
    again = plan_job(plan.destination, plan.tasks, plan.manifest)
    assert list(again.done.values()) == stats
    summary = run_job(again, two_samples, title="test")
    assert read_manifest("memory://bucket/hr") == summary.manifest
    assert not fsspec.filesystem("memory").exists("/bucket/hr/hr-00009.tar")
