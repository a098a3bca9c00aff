"""Validation: sound data has no problem; whatever is done to it has one, and never a traceback."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.ingest import ingest
from pipelines.synthesize import synthesize
from pipelines.validate import Problem, _CheckShard, validate
from teasr.errors import UsageError
from teasr.images import decode, encode
from teasr.shards import (
    Sample,
    ShardInfo,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)

pytestmark = pytest.mark.usefixtures("ray_session")

Photo = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def hr(tmp_path_factory: pytest.TempPathFactory, photo: Photo) -> Path:
    """Four pictures in two HR shards; three travelled untouched."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "album").mkdir()
    for i in range(4):
        data = encode(photo(70 + i, 90, seed=i), "png" if i else "jpeg", grey=i == 3)
        (folder / "album" / f"p{i}.{'png' if i else 'jpg'}").write_bytes(data)
    return Path(ingest([str(folder / "album")], str(folder / "hr"), shard_size=2).destination)


@pytest.fixture(scope="module")
def pairs(hr: Path) -> Path:
    return Path(synthesize(str(hr), str(hr.parent / "pairs"), crop=64).destination)


@pytest.fixture
def copy(pairs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pairs, tmp_path / "pairs"))


def rewrite(folder: Path, key: str, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change the members of one sample; shard and manifest stay in agreement."""
    manifest = read_manifest(str(folder))
    infos = []
    for shard in manifest.shards:
        url = str(folder / shard.name)
        samples = [Sample(s.key, dict(s.members)) for s in read_shard(url)]
        for sample in samples:
            if sample.key == key:
                change(sample.members)
        infos.append(write_shard(url, samples))
    write_manifest(str(folder), manifest.model_copy(update={"shards": tuple(infos)}))


def told(folder: Path, replaying: bool = False) -> dict[str, list[Problem]]:
    kinds: dict[str, list[Problem]] = {}
    for problem in validate(str(folder), replaying=replaying).problems:
        kinds.setdefault(problem.kind, []).append(problem)
    return kinds


def test_sound_data_has_no_problem(hr: Path, pairs: Path) -> None:
    report = validate(str(hr))
    assert (report.samples, report.problems) == (4, ())
    steps: list[tuple[int, int]] = []
    report = validate(str(pairs), replaying=True, progress=lambda *step: steps.append(step))
    assert (report.samples, report.problems) == (4, ())
    assert report.bytes == read_manifest(str(pairs)).bytes
    assert steps == [(1, 2), (2, 2)]
    with pytest.raises(UsageError, match="no pairs"):
        validate(str(hr), replaying=True)
    with pytest.raises(UsageError, match="not a dataset"):
        validate(str(pairs.parent))


def test_a_shard_whose_pictures_were_all_left_out_is_no_problem(
    tmp_path: Path, photo: Photo
) -> None:
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "a.png").write_bytes(b"no picture")
    (tmp_path / "album" / "b.png").write_bytes(encode(photo()))
    ingest([str(tmp_path / "album")], str(tmp_path / "hr"), shard_size=1)
    assert validate(str(tmp_path / "hr")).problems == ()


def test_files_that_are_lost_changed_or_too_many(copy: Path) -> None:
    first, second = (shard.name for shard in read_manifest(str(copy)).shards)
    (copy / first).unlink()
    data = bytearray((copy / second).read_bytes())
    data[700] ^= 1
    (copy / second).write_bytes(data)
    (copy / "pairs-00009.tar").write_bytes(b"")
    (copy / "evil\x1b[2J").write_bytes(b"")
    (copy / "more").mkdir()
    kinds = told(copy)
    assert [problem.shard for problem in kinds["missing"]] == [first]
    assert [problem.shard for problem in kinds["changed"]] == [second]
    assert [p.text for p in kinds["unlisted"]] == ["evil\\x1b[2J", "more/", "pairs-00009.tar"]


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda m: m.update({"lr.png": m["lr.png"][:-40]}), "picture", "lr.png"),
        (lambda m: m.update({"hr.png": b"GIF89a"}), "picture", "GIF"),
        (lambda m: m.update({"json": b"{"}), "json", "not a JSON object"),
        (lambda m: m.update({"json": b"[" * 100_000}), "json", "not a JSON object"),
        (lambda m: m.update({"json": b"{}"}), "json", "no recipe"),
        (
            lambda m: m.update({"lr.png": encode(np.zeros((16, 15, 3), np.uint8))}),
            "agreement",
            "HR is 64 x 64 and LR 15 x 16",
        ),
        (
            lambda m: m.update({"json": m["json"].replace(b'"width": 64', b'"width": 60', 1)}),
            "agreement",
            "states a crop of 60 x 64",
        ),
        (
            lambda m: m.update({"lr.png": encode(decode(m["lr.png"]).rgb ^ 1)}),
            "replay",
            "by up to 1 of 255",
        ),
        (
            lambda m: m.update({"lr.png": encode(decode(m["lr.png"]).rgb, alpha=None, grey=False)
                                + b"tail"}),
            "replay",
            "encoded in another way",
        ),
        (
            lambda m: m.update({"json": m["json"].replace(b'"jpeg"', b'"gif"')}),
            "replay",
            "Unknown degradation operator",
        ),
        (
            lambda m: m.update({"json": m["json"].replace(b'"quality": ', b'"quality": 1e9')}),
            "replay",
            "",
        ),
    ],
)  # fmt: skip
def test_samples_that_are_not_what_is_written(
    copy: Path, change: Callable[[dict[str, bytes]], None], kind: str, said: str
) -> None:
    rewrite(copy, "p2-v0", change)
    kinds = told(copy, replaying=True)
    assert kind in kinds and {p.key for p in kinds[kind]} == {"p2-v0"}
    assert any(said in problem.text for problem in kinds[kind])
    assert not set(kinds) & {"changed", "structure", "count", "missing", "manifest", "unlisted"}


def test_pictures_that_travel_untouched_have_the_hash_in_their_json(
    hr: Path, tmp_path: Path, photo: Photo
) -> None:
    copy = Path(shutil.copytree(hr, tmp_path / "hr"))
    rewrite(copy, "p1", lambda m: m.update({"png": encode(photo(71, 90, seed=8))}))
    rewrite(copy, "p2", lambda m: m.update({"json": m["json"].replace(b": 90", b": 91")}))
    rewrite(copy, "p3", lambda m: m.update({"png": encode(photo(73, 90, seed=8), "jpeg")}))
    kinds = told(copy)
    assert set(kinds) == {"agreement", "picture"}
    found = sorted((p.key, "hash" in p.text) for p in kinds["agreement"])
    assert found == [("p1", True), ("p2", False)]
    assert [p.text for p in kinds["picture"]] == [".png holds a JPEG."]


def test_a_manifest_that_was_edited(copy: Path) -> None:
    path = copy / "manifest.json"
    text = path.read_text()
    data = json.loads(text)
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    assert [p.text for p in told(copy)["manifest"]] == [
        "It does not match its fingerprint: it was changed by hand."
    ]
    data["shards"][0]["samples"] += 1
    path.write_text(json.dumps(data))
    kinds = told(copy)
    assert set(kinds) == {"manifest", "count"} and "samples" in kinds["manifest"][0].text
    data["shards"][0]["name"] = "../../escape.tar"
    path.write_text(json.dumps(data))
    assert set(told(copy)) == {"manifest"}
    for broken in ("", "[]", "{}", "[" * 100_000, '{"kind": "cats", "shards": []}', "\ud800"):
        path.write_bytes(broken.encode(errors="surrogatepass"))
        report = validate(str(copy))
        assert report.manifest is None and [p.kind for p in report.problems] == ["manifest"]


def test_any_damage_to_a_shard_is_found(copy: Path) -> None:
    """Bytes flipped, cut, inserted and doubled anywhere, as the check of one shard sees them."""
    random = np.random.default_rng(0)
    info = read_manifest(str(copy)).shards[0]
    path = copy / info.name
    sound = path.read_bytes()
    check = _CheckShard("pairs", 4, replaying=True)
    row = {"url": str(copy / info.name), **info.model_dump()}
    assert check(row)["problems"] == []
    with tarfile.open(fileobj=io.BytesIO(sound)) as tar:
        headers = [member.offset for member in tar]
    for number in range(240):
        data = bytearray(sound)
        # Half of the damage goes where a tar is tender: into its headers.
        place = int(random.integers(len(data)))
        if number % 2:
            place = int(random.choice(headers)) + int(random.integers(512))
        match number % 4:
            case 0 | 1:
                data[place] ^= 1 << int(random.integers(8))
            case 2:
                del data[place : place + int(random.integers(1, 2000))]
            case 3:
                data[place:place] = data[place : place + 512 * int(random.integers(1, 5))]
        path.write_bytes(data)
        found = check(row)["problems"]
        assert found, f"damage {number} at {place} was not seen"
        # The hash in the manifest is not what finds it alone: also where that was made to agree.
        lying = ShardInfo(name=info.name, samples=2, bytes=len(data), sha256="0" * 64)
        for problem in check({"url": str(path), **lying.model_dump()})["problems"]:
            assert problem["text"].isprintable()


def test_tars_that_are_no_shards(copy: Path) -> None:
    info = read_manifest(str(copy)).shards[0]
    samples = [*read_shard(str(copy / info.name))]

    def tar(*members: tuple[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as file:
            for name, data in members:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                file.addfile(entry, io.BytesIO(data))
        return buffer.getvalue()

    whole = [(f"{s.key}.{suffix}", data) for s in samples for suffix, data in s.members.items()]
    for members, said in (
        ([*whole, whole[0]], "twice"),
        (whole[:-1], samples[-1].key),
        ([*whole, ("../x.json", b"{}")], "key"),
        ([("\udcff.json", b"{}")], "key"),
        ([("a.json", b"{}"), ("a.png", encode(np.zeros((8, 8, 3), np.uint8)))], "single picture"),
    ):
        (copy / info.name).write_bytes(tar(*members))
        row = {"url": str(copy / info.name), **info.model_dump()}
        problems = [Problem(**p) for p in _CheckShard("pairs", 4, replaying=False)(row)["problems"]]
        structure = [p for p in problems if p.kind == "structure"]
        assert structure and any(said in p.text + p.key for p in structure)
        assert all(v.isprintable() for p in problems for v in dataclasses.asdict(p).values())
