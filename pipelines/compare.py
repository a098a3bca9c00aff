"""Compare two datasets by what their manifests say; only shards that differ are read."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.each_shard import each_shard
from teasr import images
from teasr.errors import TeasrError
from teasr.shards import (
    SHARD_PICTURES,
    Manifest,
    ShardInfo,
    absolute_url,
    join_url,
    read_manifest,
    read_shard,
)


@dataclass(frozen=True)
class ChangedSample:
    """A sample that both datasets have, with different bytes.

    Attributes:
        key: its name.
        members: for each member that differs, by suffix: the largest difference of two pixels in
            grey levels of 255, 0 when the pixels are equal and only encoded otherwise; None for
            what is no picture, cannot be decoded, has another size, or is in one of them alone.
    """

    key: str
    members: Mapping[str, int | None]


@dataclass(frozen=True)
class Comparison:
    """How two datasets, A and B, differ.

    Attributes:
        fields: of the manifests, such as 'seed' or 'versions.numpy': the values in A and B.
        same: names (in A) of the shards that both have, byte for byte.
        changed: names of the shards that both have with different bytes.
        only_a, only_b: names of the shards that the other has not.
        keys_only_a, keys_only_b: samples that the other has not, sorted.
        samples: samples that both have with different bytes, in order of their keys.
        equal: the fingerprints are equal.
    """

    fields: dict[str, tuple[Any, Any]]
    same: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    keys_only_a: tuple[str, ...] = ()
    keys_only_b: tuple[str, ...] = ()
    samples: tuple[ChangedSample, ...] = ()
    equal: bool = False


def compare(a: str, b: str, *, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """How the datasets in the folders (or URLs) `a` and `b` differ.

    Samples are matched by key wherever they lie, so that a dataset with other shard sizes is not
    taken for another one.

    Args:
        progress: called as (shards read, shards to read).

    Raises:
        UsageError: when one of them is no dataset.
        TeasrError: when a shard that differs cannot be read.
    """
    a, b = absolute_url(a), absolute_url(b)
    one, other = read_manifest(a), read_manifest(b)
    fields = _fields(one, other)
    same, rest_a, rest_b = _match(one.shards, other.shards)
    names_a, names_b = {s.name for s in rest_a}, {s.name for s in rest_b}
    comparison = Comparison(
        fields=fields,
        same=tuple(same),
        changed=tuple(sorted(names_a & names_b)),
        only_a=tuple(sorted(names_a - names_b)),
        only_b=tuple(sorted(names_b - names_a)),
        equal=one.fingerprint == other.fingerprint,
    )
    if comparison.equal or one.kind != other.kind:
        return comparison
    rows = [{"side": "a", "url": join_url(a, s.name)} for s in rest_a]
    rows += [{"side": "b", "url": join_url(b, s.name)} for s in rest_b]
    found: dict[str, dict[str, tuple[str, dict[str, str]]]] = {"a": {}, "b": {}}
    for done, output in enumerate(each_shard(rows, _digests, "read it"), 1):
        for key, digests in output["samples"].items():
            found[output["side"]][key] = (output["url"], digests)
        if progress:
            progress(done, len(rows))
    in_a, in_b = found["a"], found["b"]
    differing = sorted(key for key in in_a.keys() & in_b.keys() if in_a[key][1] != in_b[key][1])
    return Comparison(
        **{
            **vars(comparison),
            "keys_only_a": tuple(sorted(in_a.keys() - in_b.keys())),
            "keys_only_b": tuple(sorted(in_b.keys() - in_a.keys())),
            "samples": _levels(in_a, in_b, differing),
        }
    )


def _fields(one: Manifest, other: Manifest) -> dict[str, tuple[Any, Any]]:
    """What differs between the manifests beside their shards, the sections by their keys."""
    fields: dict[str, tuple[Any, Any]] = {}
    for name in type(one).model_fields:
        if name == "shards":
            continue
        left, right = getattr(one, name), getattr(other, name)
        if isinstance(left, dict) and isinstance(right, dict):
            for key in sorted(left.keys() | right.keys()):
                if left.get(key) != right.get(key):
                    fields[f"{name}.{key}"] = left.get(key), right.get(key)
        elif left != right:
            fields[name] = left, right
    return fields


def _match(
    one: tuple[ShardInfo, ...], other: tuple[ShardInfo, ...]
) -> tuple[list[str], list[ShardInfo], list[ShardInfo]]:
    """Names of the shards that are equal byte for byte, and the rest of each side."""
    there: dict[str, list[ShardInfo]] = defaultdict(list)
    for shard in other:
        there[shard.sha256].append(shard)
    same, rest = [], []
    for shard in one:
        if there[shard.sha256]:
            there[shard.sha256].pop()
            same.append(shard.name)
        else:
            rest.append(shard)
    return same, rest, [shard for left in there.values() for shard in left]


def _levels(
    in_a: Mapping[str, tuple[str, dict[str, str]]],
    in_b: Mapping[str, tuple[str, dict[str, str]]],
    keys: list[str],
) -> tuple[ChangedSample, ...]:
    """How much the samples `keys` differ; reads each pair of shards that they lie in once."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key in keys:
        groups[in_a[key][0], in_b[key][0]].append(key)
    rows = [{"url": a, "other": b, "keys": group} for (a, b), group in groups.items()]
    levels: dict[str, dict[str, int | None]] = {}
    for output in each_shard(rows, _differences, "read it"):
        levels.update(output["levels"])
    return tuple(ChangedSample(key, levels[key]) for key in keys)


# ---------------------------------------------------------------- on the workers


def _digests(row: dict[str, Any]) -> dict[str, Any]:
    """A hash of every member of a shard."""
    samples = {
        sample.key: {
            suffix: hashlib.blake2b(data, digest_size=12).hexdigest()
            for suffix, data in sample.members.items()
        }
        for sample in _read(row["url"])
    }
    return {"side": row["side"], "url": row["url"], "samples": samples}


def _differences(row: dict[str, Any]) -> dict[str, Any]:
    """The largest difference in grey levels of each member of the samples `keys` that differs."""
    keys = set(row["keys"])
    left = {sample.key: sample.members for sample in _read(row["url"]) if sample.key in keys}
    levels = {}
    for sample in _read(row["other"]):
        if sample.key in keys:
            mine, theirs = left.pop(sample.key), sample.members
            levels[sample.key] = {
                suffix: _largest(suffix, mine.get(suffix), theirs.get(suffix))
                for suffix in sorted(mine.keys() | theirs.keys())
                if mine.get(suffix) != theirs.get(suffix)
            }
    return {"levels": levels}


def _read(url: str) -> Any:
    try:
        yield from read_shard(url)
    except TeasrError as error:
        raise type(error)(
            error.message, f"See: teasr data validate {url.rpartition('/')[0]}"
        ) from None


def _largest(suffix: str, one: bytes | None, other: bytes | None) -> int | None:
    if one is None or other is None or suffix.rpartition(".")[2] not in SHARD_PICTURES:
        return None
    try:
        left, right = images.decode(one).rgb, images.decode(other).rgb
    except images.BadPicture:
        return None
    if left.shape != right.shape:
        return None
    return int(np.abs(left.astype(np.int16) - right).max())
