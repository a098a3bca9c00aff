"""Shards: what is written is read, equal inputs give equal bytes, damage is never silent."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import webdataset
from webdataset.writer import TarWriter

from teasr.errors import TeasrError, UsageError
from teasr.shards import (
    BadKey,
    BadShard,
    Manifest,
    Sample,
    ShardInfo,
    check_key,
    read_manifest,
    read_shard,
    safe_key,
    write_manifest,
    write_shard,
)


def samples(count: int = 3) -> list[Sample]:
    return [
        Sample(f"key-{i}", {"png": bytes([i]) * (700 * i + 1), "json": b'{"i": %d}' % i})
        for i in range(count)
    ]


def raw_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_round_trip_and_figures(tmp_path: Path) -> None:
    info = write_shard(str(tmp_path / "new" / "hr-00000.tar"), iter(samples()))
    data = (tmp_path / "new" / "hr-00000.tar").read_bytes()
    assert list(read_shard(str(tmp_path / "new" / "hr-00000.tar"))) == samples()
    assert (info.name, info.samples, info.bytes) == ("hr-00000.tar", 3, len(data))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["hr-00000.tar"]


def test_a_shard_is_what_webdataset_would_write(tmp_path: Path) -> None:
    samples = [Sample(f"k{i}", {"webp": bytes([i]) * 700, "json": b"{}"}) for i in range(5)]
    write_shard(str(tmp_path / "ours.tar"), samples)
    with (tmp_path / "theirs.tar").open("wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0, user="teasr", group="teasr")
        for sample in samples:
            writer.write({"__key__": sample.key, **sample.members})
        writer.close()
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    write_shard(str(tmp_path / "s.tar"), samples())
    read = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False))
    assert [(s["__key__"], s["png"]) for s in read] == [
        (s.key, s.members["png"]) for s in samples()
    ]


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    turned = [Sample(s.key, dict(reversed(s.members.items()))) for s in samples()]
    first = write_shard(str(tmp_path / "a" / "s.tar"), samples())
    second = write_shard(str(tmp_path / "b" / "s.tar"), turned)
    assert first == second


def test_remote_place_by_the_same_code() -> None:
    url = "memory://bucket/data/s.tar"
    info = write_shard(url, samples())
    assert list(read_shard(url)) == samples()
    write_manifest("memory://bucket/data", Manifest(kind="hr", shards=(info,)))
    assert read_manifest("memory://bucket/data").shards == (info,)
    names = fsspec.filesystem("memory").ls("/bucket/data", detail=False)
    assert sorted(names) == ["/bucket/data/manifest.json", "/bucket/data/s.tar"]


def test_an_interrupted_writer_leaves_what_was_there(tmp_path: Path) -> None:
    def broken() -> Iterator[Sample]:
        yield from samples(2)
        raise KeyboardInterrupt

    target = tmp_path / "s.tar"
    with pytest.raises(KeyboardInterrupt):
        write_shard(str(target), broken())
    assert list(tmp_path.iterdir()) == []
    before = write_shard(str(target), samples(1))
    with pytest.raises(KeyboardInterrupt):
        write_shard(str(target), broken())
    assert target.stat().st_size == before.bytes
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def on_full_disk(self: Path, mode: str = "r", *rest: object) -> object:
        if self.name.endswith(".partial"):
            real(self, mode).close()
            return real(Path("/dev/full"), "wb")
        return real(self, mode, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", on_full_disk)
    with pytest.raises(TeasrError, match="No space left on device"):
        write_shard(str(tmp_path / "s.tar"), samples())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["", "a.b", "a/b", "..", "a\\b", "a\nb", "a\0b", "x" * 81, "é" * 41, "\udcff"]
)
def test_bad_keys_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(BadKey) as caught:
        check_key(key)
    assert repr(key) in str(caught.value)
    with pytest.raises(BadKey):
        write_shard(str(tmp_path / "s.tar"), [Sample(key, {"png": b"", "json": b""})])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("holiday 2024/IMG_0001", "holiday_2024_IMG_0001"),
        ("../Žluťoučký.kůň", "_Zlutoucky_kun"),
        ("图", "_"),
        ("", "_"),
    ],
)
def test_safe_key(text: str, key: str) -> None:
    assert safe_key(text) == key
    check_key(safe_key(text))
    check_key(safe_key(text * 100))


@pytest.mark.parametrize("keep", [0, 100, 512, 600, 2048, 3000, "all members"])
def test_a_truncated_shard_is_named(keep: int | str, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    write_shard(str(path), samples())
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    # Only the end mark is lost in the last case: a member may have followed.
    os.truncate(path, keep if isinstance(keep, int) else end)
    with pytest.raises(BadShard, match=r"cut\.tar"):
        list(read_shard(str(path)))


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    path = tmp_path / "damaged.tar"
    write_shard(str(path), samples())
    data = bytearray(path.read_bytes())
    place = data.index(b"key-1.json")
    data[place : place + 4] = b"KEY-"  # the header's checksum no longer holds
    path.write_bytes(data)
    with pytest.raises(BadShard, match=r"after 'key-0\.png'"):
        list(read_shard(str(path)))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.png", "a.json", "b.png"], "'b' has no .json"),
        (["a.json", "b.png", "b.json"], "'a' is neither"),
        (["a.png", "b.png", "a.json", "b.json"], "'a' has no .json"),
        (["a.png", "a.json", "b.png", "b.json", "a.png", "a.json"], "'a' is there twice"),
        (["a.png", "a.png", "a.json"], "'a.png' is there twice"),
        (["a.hr.png", "a.json"], "'a' is neither"),
        (["a.hr.png", "a.lr.png", "a.txt", "a.json"], "'a' has unknown members"),
        (["a", "b.png"], "'a' is no file of a sample"),
        (["f/a.png", "f/a.json"], "'f/a'"),
        (["../a.png", "../a.json"], "'../a'"),
        (["/etc/a.png", "/etc/a.json"], "'/etc/a'"),
        (["a.b.png", "a.b.json"], "'a' has no .json member (members: b.json, b.png)"),
        (["a.png", "a.jpg", "a.json"], "'a' is neither"),
        (["a.png", "a.hr.png", "a.lr.png", "a.json"], "'a' is neither"),
        (["x" * 90 + ".png", "x" * 90 + ".json"], "it has 90 bytes"),
        (["\udcff.png", "\udcff.json"], r"'\udcff' cannot be used"),
        (["a.\udcff", "a.json"], r"'a.\udcff' is no file of a sample"),
    ],
)
def test_orphans_and_duplicates_are_named(names: list[str], said: str, tmp_path: Path) -> None:
    url = raw_tar(tmp_path / "odd.tar", [(name, b"x") for name in names])
    with pytest.raises(BadShard) as caught:
        list(read_shard(url))
    assert "odd.tar" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_other_writers_headers_are_read_and_their_names_held_to_the_rules(
    format: int, tmp_path: Path
) -> None:
    for key, said in (("kůň", ""), ("long" * 30, "it has 120 bytes")):
        path = tmp_path / "other.tar"
        with tarfile.open(path, "w", format=format) as tar:
            for suffix in ("png", "json"):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = 1
                member.pax_headers = {"comment": "of another writer"}
                tar.addfile(member, io.BytesIO(b"x"))
        if said:
            with pytest.raises(BadShard, match=rf"other\.tar: The key '{key}'.*{said}"):
                list(read_shard(str(path)))
        else:
            assert list(read_shard(str(path))) == [Sample(key, {"png": b"x", "json": b"x"})]


@pytest.mark.parametrize(
    "type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_what_is_no_file_is_refused(type: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = type, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(BadShard, match=r"link\.tar: 'a\.png' is no file of a sample"):
        list(read_shard(str(tmp_path / "link.tar")))


def test_a_shard_is_held_to_its_manifest(tmp_path: Path) -> None:
    url = str(tmp_path / "hr-00000.tar")
    info = write_shard(url, samples())
    assert list(read_shard(url, info, "hr")) == samples()
    with pytest.raises(BadShard, match=r"hr-00000\.tar holds 3 samples; the manifest lists 4"):
        list(read_shard(url, info.model_copy(update={"samples": 4})))
    with pytest.raises(BadShard, match=r"hr-00000\.tar: the sample 'key-0' is no pair"):
        list(read_shard(url, info, "pairs"))
    write_shard(url, samples(2))
    with pytest.raises(BadShard, match=r"hr-00000\.tar is not the one that the manifest lists"):
        next(read_shard(url, info))
    os.truncate(url, 1200)
    with pytest.raises(BadShard, match=r"cut short or damaged after 'key-0\.json'"):
        next(read_shard(url, info))
    pair = {"hr.png": b"x", "lr.png": b"x", "json": b"{}"}
    write_shard(url, [Sample("a", pair)])
    with pytest.raises(BadShard, match=r"'a' is no HR picture \(members: hr\.png, json, lr\.png"):
        list(read_shard(url, kind="hr"))


def test_the_writer_refuses_what_the_reader_would(tmp_path: Path) -> None:
    url = str(tmp_path / "s.tar")
    with pytest.raises(BadShard, match="'key-1' is there twice"):
        write_shard(url, [*samples(2), samples(2)[1]])
    with pytest.raises(BadShard, match=r"'a' has no \.json"):
        write_shard(url, [Sample("a", {"png": b"x"})])
    with pytest.raises(TeasrError, match="no shard"):
        list(read_shard(url))


def manifest(**fields: object) -> Manifest:
    shard = ShardInfo(name="hr-00000.tar", samples=3, bytes=10240, sha256="ab")
    return Manifest.model_validate({"kind": "hr", "shards": (shard,), **fields})


def test_manifest_round_trip(tmp_path: Path) -> None:
    written = manifest(quarantined={"truncated": 2}, options={"min_side": 64})
    write_manifest(str(tmp_path), written)
    assert read_manifest(str(tmp_path), "hr") == written
    assert read_manifest(str(tmp_path / "manifest.json")) == written
    assert (written.samples, written.bytes) == (3, 10240)


def test_the_fingerprint_is_of_the_data_alone() -> None:
    assert manifest().fingerprint == manifest(versions={"numpy": "9"}).fingerprint
    for change in (
        {"seed": 1},
        {"preset": "x"},
        {"parent": "y"},
        {"kind": "pairs"},
        {"shards": ()},
    ):
        assert manifest(**change).fingerprint != manifest().fingerprint


def test_manifest_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a dataset.*teasr ingest"):
        read_manifest(str(tmp_path))
    write_manifest(str(tmp_path), manifest())
    with pytest.raises(UsageError, match="holds HR pictures; LR/HR pairs are needed"):
        read_manifest(str(tmp_path), "pairs")
    path = tmp_path / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "seed": 5}))
    with pytest.raises(UsageError, match="changed by hand"):
        read_manifest(str(tmp_path))
    for shards, told in (
        ([{"name": "s.tar", "samples": -1, "bytes": 1, "sha256": "ab"}], "samples"),
        ([{"name": "s.tar", "samples": 1, "bytes": -1, "sha256": "ab"}], "bytes"),
        ([{"name": "../s.tar", "samples": 1, "bytes": 1, "sha256": "ab"}], "name"),
        ([{"name": "/s.tar", "samples": 1, "bytes": 1, "sha256": "ab"}], "name"),
        ([{"name": "s.tar", "samples": 1, "bytes": 1}], "sha256"),
        ([data["shards"][0], data["shards"][0]], "listed twice"),
        ("none", "shards"),
    ):
        path.write_text(json.dumps({**data, "shards": shards}))
        with pytest.raises(UsageError, match=rf"(?s)manifest\.json.*{told}") as caught:
            read_manifest(str(tmp_path))
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not a manifest"):
        read_manifest(str(tmp_path))
    path.write_text("{")
    with pytest.raises(UsageError, match="is not a manifest"):
        read_manifest(str(tmp_path))
    with pytest.raises(UsageError, match="cannot be opened"):
        read_manifest("nonsense://bucket")
