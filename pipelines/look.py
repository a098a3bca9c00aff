"""What a dataset holds, to look at: figures, a few samples, and what their JSON says.

Figures come from the JSON members alone, which lie between pictures that are passed over, and from
a bounded number of shards; so looking is quick however large the dataset is.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import fsspec

from teasr.errors import TeasrError
from teasr.shards import (
    SHARD_PICTURES,
    BadShard,
    Manifest,
    Sample,
    absolute_url,
    join_url,
    read_manifest,
    read_shard,
)
from teasr.storage import patiently

MAX_SHARDS = 64
"""Shards whose JSON is read by default."""


@dataclass(frozen=True)
class Document:
    """What is written about a sample.

    Attributes:
        key: the sample's name.
        about: its JSON object.
        formats: suffixes of its pictures.
    """

    key: str
    about: Mapping[str, Any]
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Documents:
    """The JSON of the samples in `shards` of the dataset's shards, in order."""

    manifest: Manifest
    shards: int
    documents: tuple[Document, ...]


def documents(folder: str, max_shards: int = MAX_SHARDS) -> Documents:
    """The JSON of the samples in up to `max_shards` shards, spread evenly over the dataset.

    Raises:
        UsageError: when there is no dataset at `folder`.
        TeasrError: when a shard is missing or damaged.
    """
    folder = absolute_url(folder)
    manifest = read_manifest(folder)
    count = len(manifest.shards)
    last = max(max_shards - 1, 1)
    spread = {round(index * (count - 1) / last) for index in range(max_shards)}
    chosen = sorted(spread) if max_shards < count else range(count)
    urls = [join_url(folder, manifest.shards[index].name) for index in chosen]
    with ThreadPoolExecutor(8) as pool:  # a remote store answers slowly, but many at once
        found = list(pool.map(_documents_of, urls))
    return Documents(manifest, len(chosen), tuple(one for shard in found for one in shard))


def choose(folder: str, count: int, seed: int = 0) -> Iterator[Sample]:
    """`count` samples drawn at random from the whole dataset, in its order; equal seeds, equal
    samples. At most `count` shards are read.

    Raises:
        UsageError: when there is no dataset at `folder`.
        TeasrError: when a shard is missing or damaged.
    """
    folder = absolute_url(folder)
    manifest = read_manifest(folder)
    drawn = random.Random(seed).sample(range(manifest.samples), min(count, manifest.samples))
    firsts = list(accumulate((shard.samples for shard in manifest.shards), initial=0))
    wanted: dict[int, set[int]] = defaultdict(set)
    for index in sorted(drawn):
        shard = next(i for i, first in enumerate(firsts[1:]) if index < first)
        wanted[shard].add(index - firsts[shard])
    for shard, places in wanted.items():
        url = join_url(folder, manifest.shards[shard].name)
        for place, sample in enumerate(_advised(url, read_shard(url))):
            if place in places:
                yield sample
            if place >= max(places):
                break


def sides(found: Sequence[Document]) -> dict[str, list[int]]:
    """Width and height in pixels of the (ground truth) pictures whose JSON states them."""
    result: dict[str, list[int]] = {"width": [], "height": []}
    for document in found:
        crop = document.about.get("crop")
        stated = crop if isinstance(crop, Mapping) else document.about
        pair = stated.get("width"), stated.get("height")
        if all(isinstance(side, int) and side > 0 for side in pair):
            for name, side in zip(result, pair):
                assert isinstance(side, int)
                result[name].append(side)
    return result


def parse(data: bytes) -> Mapping[str, Any]:
    """The JSON object in `data`; empty for anything else."""
    try:
        about = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _documents_of(url: str) -> list[Document]:
    try:
        return patiently(f"read {url}", partial(_scan, url))
    except FileNotFoundError:
        raise TeasrError(f"There is no shard {url}.", _advice(url)) from None


def _scan(url: str) -> list[Document]:
    """Seeks from header to header; only the JSON members are read."""
    abouts: dict[str, Mapping[str, Any]] = {}
    formats: dict[str, list[str]] = defaultdict(list)
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix == "json" and member.isreg():
                    extracted = tar.extractfile(member)
                    assert extracted is not None  # a regular file
                    abouts[key] = parse(extracted.read())
                elif suffix.rpartition(".")[2] in SHARD_PICTURES:
                    formats[key].append(suffix)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        name = url.rpartition("/")[2]
        raise BadShard(f"Shard {name} cannot be read: {error}.", _advice(url)) from None
    return [Document(key, about, tuple(formats[key])) for key, about in abouts.items()]


def _advised(url: str, samples: Iterator[Sample]) -> Iterator[Sample]:
    try:
        yield from samples
    except BadShard as error:
        raise BadShard(error.message, _advice(url)) from None


def _advice(url: str) -> str:
    return f"See: teasr data validate {url.rpartition('/')[0]}"
