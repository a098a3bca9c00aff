"""Look at every byte of a dataset: is it what its manifest says, and can all of it be used?

One task of Ray Data per shard, which our own reader and WebDataset's go through. Whatever has
become of a dataset, the answer is a list of problems.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipelines.each_shard import each_shard
from pipelines.runtime import prepare_process
from pipelines.shard_job import STATS_SUFFIX
from teasr import images
from teasr.degradation import SCALE, replay
from teasr.errors import TeasrError, UsageError
from teasr.shards import (
    MANIFEST_NAME,
    SHARD_PICTURES,
    Manifest,
    Sample,
    absolute_url,
    join_url,
    manifest_document,
    manifest_of,
    read_shard,
)
from teasr.storage import patiently

KINDS: Mapping[str, str] = {
    "manifest": "the manifest",
    "missing": "shards that are not there",
    "unreadable": "shards that cannot be read",
    "changed": "shards of another size or hash than the manifest lists",
    "structure": "shards that are damaged",
    "count": "shards with another number of samples than the manifest lists",
    "json": "what is written about samples",
    "picture": "pictures that cannot be decoded",
    "agreement": "pictures that are not what is written about them",
    "replay": "LR pictures that their recipe does not give",
    "unlisted": "files that the manifest does not list",
}
"""Kinds of problems, in the order in which they are told."""

_FORMATS = {"png": "png", "jpg": "jpeg", "webp": "webp"}
# What jobs keep in a dataset's folder beside shards and their stats.
_KEPT = re.compile(r"manifest\.json|quarantine\.jsonl|layout\.json|scan-\d+\.jsonl")
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its kind (of `KINDS`), the shard and the key ('' for none), and
    what, in words. All text can be printed."""

    kind: str
    shard: str
    key: str
    text: str


@dataclass(frozen=True)
class Report:
    """What `validate` found.

    Attributes:
        folder: URL of the dataset.
        manifest: as it stands; None when it is none.
        samples: how many were looked at.
        bytes: how much was read.
        problems: in order of kind, shard and place.
    """

    folder: str
    manifest: Manifest | None
    samples: int
    bytes: int
    problems: tuple[Problem, ...]


def validate(
    folder: str,
    *,
    replaying: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check the dataset at `folder`, a folder or a URL, and list what is wrong.

    Args:
        folder: the dataset.
        replaying: make the LR picture of each pair again from its recipe and compare the bytes.
        progress: called as (shards done, shards).

    Raises:
        UsageError: when there is no manifest, so no dataset, at `folder`; or `replaying` is asked
            for pictures without recipes.
        TeasrError: when the storage is away.
    """
    folder = absolute_url(folder)
    manifest, problems = _load_manifest(folder)
    if manifest is None:
        return Report(folder, None, 0, 0, tuple(problems))
    if replaying and manifest.kind != "pairs":
        raise UsageError(f"{folder} holds no pairs, so there is nothing to replay.")
    scale = None if manifest.kind == "hr" else manifest.scale or SCALE
    rows = [
        {"url": join_url(folder, shard.name), **shard.model_dump()} for shard in manifest.shards
    ]
    samples = size = 0
    check = _CheckShard(manifest.kind, scale, replaying)
    for done, found in enumerate(each_shard(rows, check, "checked it"), 1):
        problems += [Problem(**problem) for problem in found["problems"]]
        samples, size = samples + found["samples"], size + found["bytes"]
        if progress:
            progress(done, len(rows))
    problems += _unlisted(folder, manifest)
    order = list(KINDS)
    problems.sort(key=lambda problem: (order.index(problem.kind), problem.shard))
    return Report(folder, manifest, samples, size, tuple(problems))


def printable(text: object) -> str:
    """`text` with what a terminal cannot show, or would obey, written as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def _problem(kind: str, text: object, shard: str = "", key: str = "") -> Problem:
    return Problem(kind, printable(shard), printable(key), printable(text))


# ---------------------------------------------------------------- the folder


def _load_manifest(folder: str) -> tuple[Manifest | None, list[Problem]]:
    """The manifest, also one that does not match its fingerprint, and what is wrong with it."""
    data = manifest_document(folder)
    if data is None:
        return None, [_problem("manifest", f"{MANIFEST_NAME} is not a JSON object.")]
    try:
        manifest = manifest_of(data, MANIFEST_NAME)
        stated = {"samples": manifest.samples, "bytes": manifest.bytes}
        fingerprint = manifest.fingerprint
    except (UsageError, RecursionError) as error:
        return None, [_problem("manifest", error)]
    problems = [
        _problem("manifest", f"It states {data.get(name)!r} {name}; its shards have {value}.")
        for name, value in stated.items()
        if data.get(name) != value
    ]
    if data.get("fingerprint") != fingerprint:
        problems.append(
            _problem("manifest", "It does not match its fingerprint: it was changed by hand.")
        )
    return manifest, problems


def _unlisted(folder: str, manifest: Manifest) -> Iterator[Problem]:
    """Files beside those of the dataset: what globs for shards would take them in."""
    filesystem, path = url_to_fs(folder)
    filesystem.invalidate_cache()
    listing = patiently(f"list {folder}", partial(filesystem.ls, path, detail=True))
    files = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] for entry in listing}
    listed = {shard.name for shard in manifest.shards}
    known = {*listed, *(name + STATS_SUFFIX for name in listed)}
    for name in sorted(name for name in set(files) - known if not _KEPT.fullmatch(name)):
        shard = name.removesuffix(STATS_SUFFIX)
        # All of a shard's samples may have been quarantined: it is kept, but not listed.
        if shard + STATS_SUFFIX in files and _is_empty(filesystem, f"{path}/{shard}{STATS_SUFFIX}"):
            continue
        yield _problem("unlisted", name + ("/" if files[name] == "directory" else ""))


def _is_empty(filesystem: Any, path: str) -> bool:
    try:
        stats = json.loads(patiently(f"read {path}", partial(filesystem.cat_file, path)))
        return bool(stats["shard"]["samples"] == 0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


# ---------------------------------------------------------------- one shard, on a worker


@contextlib.contextmanager
def _local(url: str) -> Iterator[Path]:
    """The file at `url` on this machine: itself, or a copy for as long as the block lasts."""
    filesystem, path = url_to_fs(url)
    if isinstance(filesystem, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="teasr-") as place:
        copy = Path(place) / path.rpartition("/")[2]
        patiently(f"read {url}", partial(filesystem.get_file, path, str(copy)))
        yield copy


@dataclass(frozen=True)
class _CheckShard:
    """Everything that can be said of one shard."""

    kind: str
    scale: int | None
    replaying: bool

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prepare_process()
        name = row["name"]
        problems: list[Problem] = []
        samples = size = 0
        try:
            with _local(row["url"]) as path:
                with path.open("rb") as file:
                    digest = hashlib.sha256()
                    while block := file.read(_COPY_BYTES):
                        size += len(block)
                        digest.update(block)
                if size != row["bytes"]:
                    text = f"It has {size} bytes; the manifest lists {row['bytes']}."
                    problems.append(_problem("changed", text, name))
                elif digest.hexdigest() != row["sha256"]:
                    text = "Its bytes are not those of the hash (sha256) that the manifest lists."
                    problems.append(_problem("changed", text, name))
                whole = True
                names: list[tuple[str, list[str]]] = []
                try:
                    for sample in read_shard(str(path)):
                        samples += 1
                        names.append((sample.key, sorted(sample.members)))
                        problems += self._sample(name, sample)
                except Exception as error:  # whatever damage makes a tar reader raise
                    whole = False
                    text = error.message if isinstance(error, TeasrError) else _said(error)
                    problems.append(_problem("structure", text, name))
                if whole and samples != row["samples"]:
                    text = f"It holds {samples} samples; the manifest lists {row['samples']}."
                    problems.append(_problem("count", text, name))
                if whole and _by_webdataset(path) != names:
                    text = "WebDataset does not read the same samples from it."
                    problems.append(_problem("structure", text, name))
        except FileNotFoundError:
            problems.append(_problem("missing", "There is no such file.", name))
        except OSError as error:
            problems.append(_problem("unreadable", error.strerror or _said(error), name))
        return {
            "samples": samples,
            "bytes": size,
            "problems": [asdict(problem) for problem in problems],
        }

    def _sample(self, shard: str, sample: Sample) -> Iterator[Problem]:
        problem = partial(_problem, shard=shard, key=sample.key)
        roles = {"", "hr", "lr"} & {suffix.rpartition(".")[0] for suffix in sample.members}
        is_pair = "hr" in roles
        if is_pair != (self.kind == "pairs"):
            yield problem("structure", f"It is {'a pair' if is_pair else 'a single picture'}.")
            return
        try:
            about = json.loads(sample.members["json"])
            if not isinstance(about, dict):
                raise ValueError
        except (ValueError, RecursionError):
            yield problem("json", "Its .json member is not a JSON object.")
            about = None
        pixels: dict[str, images.Bytes] = {}
        for suffix, data in sample.members.items():
            role, _, ending = suffix.rpartition(".")
            if ending not in SHARD_PICTURES:
                continue
            try:
                picture = images.decode(data)
            except images.BadPicture as error:
                yield problem("picture", f".{suffix}: {error.message}")
                continue
            if picture.format != _FORMATS[ending]:
                yield problem("picture", f".{suffix} holds a {picture.format.upper()}.")
            pixels[role] = picture.rgb
            if not is_pair and about is not None:
                for text in _disagreements(about, data, picture.rgb):
                    yield problem("agreement", text)
        if is_pair and len(pixels) == 2 and self.scale is not None:
            for kind, text in self._pair(sample, about, pixels["hr"], pixels["lr"]):
                yield problem(kind, text)

    def _pair(
        self,
        sample: Sample,
        about: dict[str, Any] | None,
        hr: images.Bytes,
        lr: images.Bytes,
    ) -> Iterator[tuple[str, str]]:
        assert self.scale is not None
        if hr.shape[:2] != (lr.shape[0] * self.scale, lr.shape[1] * self.scale):
            yield "agreement", f"HR is {_size(hr)} and LR {_size(lr)}: not {self.scale} to 1."
        if about is None:
            return
        crop = about.get("crop")
        stated = (crop.get("height"), crop.get("width")) if isinstance(crop, Mapping) else ()
        if stated and None not in stated and stated != hr.shape[:2]:
            text = f"HR is {_size(hr)}; its JSON states a crop of {stated[1]} x {stated[0]}."
            yield "agreement", text
        if not self.replaying:
            return
        if not isinstance(about.get("recipe"), Mapping):
            yield "json", "It has no recipe to replay."
            return
        try:
            again = replay(hr, about["recipe"])
        except UsageError as error:
            yield "replay", str(error)
            return
        except Exception as error:  # whatever parameters that were edited make OpenCV raise
            yield "replay", f"The recipe cannot be run: {_said(error)}"
            return
        if images.encode(again) != sample.members["lr.png"]:
            yield "replay", _difference(again, lr)


def _by_webdataset(path: Path) -> list[tuple[str, list[str]]]:
    """Key and suffixes of each sample as the library WebDataset groups them, which others read
    shards with."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch

    with path.open("rb") as stream:
        samples = group_by_keys(tar_file_expander([{"stream": stream, "url": path.name}]))
        return [
            (sample["__key__"], sorted(name for name in sample if not name.startswith("__")))
            for sample in samples
        ]


def _disagreements(about: Mapping[str, Any], data: bytes, rgb: images.Bytes) -> Iterator[str]:
    """What the JSON of an HR picture says that is not so; what it does not say is no mistake."""
    stated = about.get("width"), about.get("height")
    if None not in stated and stated != (rgb.shape[1], rgb.shape[0]):
        yield f"It is {_size(rgb)}; its JSON states {stated[0]} x {stated[1]}."
    untouched = about.get("encoded_because") == []
    if untouched and about.get("sha256") != hashlib.sha256(data).hexdigest():
        yield "Its bytes are not those of the hash (sha256) in its JSON."


def _difference(again: images.Bytes, lr: images.Bytes) -> str:
    if again.shape != lr.shape:
        return f"Replayed it is {_size(again)}, not {_size(lr)}."
    most = int(np.abs(again.astype(np.int16) - lr).max())
    if most == 0:
        return "The pixels are equal; the PNG is encoded in another way."
    return f"Replayed it differs by up to {most} of 255 grey levels."


def _size(rgb: images.Bytes) -> str:
    return f"{rgb.shape[1]} x {rgb.shape[0]}"


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
