"""Pairs made again from their recipes: HR shards and the recipes of a pair dataset in, the same
pair dataset out, byte for byte.

    HR shard + the recipes of pairs → **replay** → the same pairs

Neither preset nor seed is needed: every drawn parameter is in the recipe. Each shard of the pairs
gives one shard of the same name. What cannot be the same, because another release of a library or
another kind of processor rounds otherwise, is found and said by how much.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec
import numpy as np

from pipelines.compare import Comparison, compare
from pipelines.each_shard import each_shard
from pipelines.runtime import prepare_process
from pipelines.shard_job import (
    JobPlan,
    JobSummary,
    Rejected,
    ShardTask,
    plan_job,
    run_job,
    sibling_name,
)
from teasr import degradation, images
from teasr.degradation.recipe import RECIPE_VERSION
from teasr.errors import TeasrError, UsageError
from teasr.shards import (
    SHARD_PICTURES,
    Manifest,
    Sample,
    absolute_url,
    content_hash,
    join_url,
    library_versions,
    read_manifest,
    read_shard,
    split_name,
)
from teasr.storage import patiently

# Releases of JPEG and WebP decoders, and of the filter that sharpens, differ by rounding; a
# photograph that was edited differs by more.
ROUNDING = 2

_CROP = ("top", "left", "height", "width")


@dataclass(frozen=True)
class Replayed:
    """What `replay` made.

    Attributes:
        summary: of the job.
        comparison: of the pairs (A) with what was made (B).
    """

    summary: JobSummary
    comparison: Comparison

    @property
    def exact(self) -> bool:
        """The dataset is the same: equal fingerprints, so equal bytes of every shard."""
        return self.comparison.equal


def replay(
    source: str,
    destination: str,
    pairs: str,
    *,
    max_bad_share: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Replayed:
    """Make the dataset `pairs` again from the HR dataset it was made of and its recipes.

    A pair is left out, and listed in `quarantine.jsonl`, when its photograph is not in `source`
    (`source-missing`), is another one now (`source-changed`) or cannot be decoded, or its recipe is
    of another release (`recipe-version`) or cannot be run (`bad-recipe`).

    Args:
        source: folder of an HR dataset, local or a URL. It may have other shards than it had, and
            more photographs.
        destination: folder for the pairs. Running the same call again writes what is missing.
        pairs: folder of the pair dataset whose recipes are replayed.
        max_bad_share: as `pipelines.synthesize.synthesize`.
        progress: of the comparison, called as (shards read, shards to read); shards that came out
            the same are not read.

    Raises:
        UsageError: no such datasets, a destination that is `source` or `pairs` itself or holds
            another kind.
        TeasrError: too many pairs cannot be made; a shard cannot be read or written.
    """
    job = plan(source, destination, pairs)
    builder = _ReplayShard(
        source=absolute_url(source),
        pairs=absolute_url(pairs),
        places=_places(source, pairs) if job.missing else {},
    )
    summary = run_job(job, builder, title="replay", max_bad_share=max_bad_share)
    return Replayed(summary, compare(pairs, destination, progress=progress))


def plan(source: str, destination: str, pairs: str) -> JobPlan:
    """What `replay` would do; reads two manifests and writes nothing.

    Raises:
        UsageError: as `replay`.
    """
    hr, made = read_manifest(source, "hr"), read_manifest(pairs, "pairs")
    if absolute_url(destination).rstrip("/") in {
        absolute_url(folder).rstrip("/") for folder in (source, pairs)
    }:
        raise UsageError(
            f"{destination} would be read and written at once.", "Give a new folder for the pairs."
        )
    versions = library_versions()
    tasks = [
        ShardTask(
            name=shard.name,
            samples=shard.samples,
            payload={"shard": shard.name},
            fingerprint=content_hash(["replay", versions, hr.fingerprint, shard.sha256]),
        )
        for shard in made.shards
    ]
    manifest = Manifest(
        kind="pairs",
        shards=(),
        preset=made.preset,
        seed=made.seed,
        scale=made.scale,
        parent=made.parent,
        options=made.options,
        versions=versions,
    )
    return plan_job(destination, tasks, manifest)


def _places(source: str, pairs: str) -> dict[str, str]:
    """The HR shard of every key; none when the HR dataset is the very parent of the pairs, where
    the names tell."""
    hr, made = read_manifest(source, "hr"), read_manifest(pairs, "pairs")
    names = {shard.name for shard in hr.shards}
    if hr.fingerprint == made.parent and {sibling_name(s.name, "hr") for s in made.shards} <= names:
        return {}
    folder = absolute_url(source)
    rows = [{"url": join_url(folder, shard.name), "shard": shard.name} for shard in hr.shards]
    return {
        key: out["shard"]
        for out in each_shard(rows, _keys, "read its names")
        for key in out["keys"]
    }


def _keys(row: dict[str, Any]) -> dict[str, Any]:
    """The keys of a shard, from its headers alone."""
    names = patiently(f"read {row['url']}", partial(_member_names, row["url"]))
    keys = [parts[0] for name in names if (parts := split_name(name)) and parts[1] == "json"]
    return {"shard": row["shard"], "keys": keys}


def _member_names(url: str) -> list[str]:
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return tar.getnames()
    except FileNotFoundError:
        raise TeasrError(f"There is no shard {url}.") from None
    except (tarfile.TarError, EOFError) as error:
        raise TeasrError(f"Shard {url} cannot be read: {error}.") from None


# ---------------------------------------------------------------- on the workers


@dataclass(frozen=True)
class _ReplayShard:
    """Makes the pairs of one shard again."""

    source: str
    pairs: str
    places: Mapping[str, str]

    def __call__(self, task: ShardTask) -> Iterator[Sample | Rejected]:
        prepare_process()
        photographs = _Photographs(self.source, self.places, sibling_name(task.name, "hr"))
        for pair in read_shard(join_url(self.pairs, task.payload["shard"])):
            try:
                yield _remake(pair, photographs)
            except _LeftOut as error:
                yield Rejected(source=pair.key, reason=error.reason, message=str(error))
            except images.BadPicture as error:
                yield Rejected(source=pair.key, reason=error.reason, message=str(error))


class _LeftOut(TeasrError):  # noqa: N818 - a verdict on the pair, named for the quarantine list
    """A pair that cannot be made again; `reason` is a slug to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class _Photograph:
    """A decoded HR picture: uint8 (H, W, 3), and whether every decoder gives just these pixels."""

    rgb: images.Bytes
    exact: bool


class _Photographs:
    """The HR pictures that the pairs of a shard ask for, which come mostly in their own order.

    One shard is open at a time and read on as keys are asked for; the last picture stays decoded
    for its next variant. A key that was passed over starts its shard again.
    """

    def __init__(self, source: str, places: Mapping[str, str], sibling: str) -> None:
        self._source = source
        self._places = places
        self._sibling = sibling
        self._shard = ""
        self._samples: Iterator[Sample] = iter(())
        self._key = ""
        self._found: _Photograph | images.BadPicture | None = None

    def __getitem__(self, key: str) -> _Photograph:
        """The photograph `key`.

        Raises:
            _LeftOut: when it is not in the source.
            BadPicture: when it cannot be decoded.
        """
        if key != self._key:
            self._key, self._found = key, self._find(key)
        if self._found is None:
            raise _LeftOut("source-missing", f"The source has no photograph '{key}'.")
        if isinstance(self._found, images.BadPicture):
            raise self._found
        return self._found

    def _find(self, key: str) -> _Photograph | images.BadPicture | None:
        shard = self._places.get(key, "") if self._places else self._sibling
        if not shard:
            return None
        for from_start in (False, True) if shard == self._shard else (True,):
            if from_start:
                self._shard, self._samples = shard, read_shard(join_url(self._source, shard))
            for sample in self._samples:
                if sample.key == key:
                    return _decoded(sample)
        return None


def _decoded(sample: Sample) -> _Photograph | images.BadPicture:
    suffix = next(suffix for suffix in sample.members if suffix in SHARD_PICTURES)
    try:
        return _Photograph(images.decode(sample.members[suffix]).rgb, exact=suffix == "png")
    except images.BadPicture as error:
        return error


def _remake(pair: Sample, photographs: _Photographs) -> Sample:
    try:
        about = json.loads(pair.members["json"])
        key, crop, recipe = str(about["key"]), about["crop"], about["recipe"]
        top, left, height, width = (int(crop[name]) for name in _CROP)
        sharpened = bool(recipe.get("sharpened"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _LeftOut("bad-recipe", "Its JSON has no key, crop and recipe.") from None
    if recipe.get("version") != RECIPE_VERSION:
        raise _LeftOut(
            "recipe-version",
            f"The recipe is of version {recipe.get('version')!r}; this release replays version "
            f"{RECIPE_VERSION}.",
        )
    photograph = photographs[key]
    rgb = photograph.rgb
    hr = np.ascontiguousarray(rgb[max(top, 0) : top + height, max(left, 0) : left + width])
    if hr.shape[:2] != (height, width):
        raise _LeftOut(
            "source-changed",
            f"The photograph '{key}' has {rgb.shape[1]} x {rgb.shape[0]} pixels; the "
            f"pair is a cut of {width} x {height} at ({left}, {top}).",
        )
    if sharpened:
        hr = degradation.apply(hr, [degradation.Step("unsharp_mask", {})])
    tolerance = 0 if photograph.exact and not sharpened else ROUNDING
    _require_same(key, hr, pair.members["hr.png"], tolerance)
    try:
        lr = degradation.replay(hr, recipe)
    except UsageError as error:
        raise _LeftOut("bad-recipe", str(error)) from None
    except Exception as error:  # whatever parameters that were edited make OpenCV raise
        raise _LeftOut("bad-recipe", f"The recipe cannot be run: {error}") from None
    members = {
        "hr.png": images.encode(hr),
        "lr.png": images.encode(lr),
        "json": pair.members["json"],
    }
    return Sample(pair.key, members)


def _require_same(key: str, hr: images.Bytes, stored: bytes, tolerance: int) -> None:
    """Refuse a photograph that is not the one the pair was made of."""
    try:
        before = images.decode(stored).rgb
    except images.BadPicture:
        return  # the pair itself is damaged; what is made here may mend it
    if before.shape != hr.shape:
        raise _LeftOut("source-changed", f"HR of '{key}' is not the size that its JSON states.")
    most = int(np.abs(before.astype(np.int16) - hr).max())
    if most > tolerance:
        raise _LeftOut(
            "source-changed",
            f"The photograph '{key}' is not the one the pair was made of: it differs by up to "
            f"{most} of 255 grey levels.",
        )
