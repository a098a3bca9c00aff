"""Photographs in, HR shards out: every picture is looked at, and kept byte for byte.

    photo → **ingest** → HR shard → synthesize → ...

The sorted listing is dealt out to shards like cards; who is where is kept in `layout.json`, so that
later photographs get shards of their own and no other shard changes. Copies, blurred pictures and
what a benchmark holds are set aside before, by what `pipelines.scan` found. A bad picture leaves
its shard a sample short and moves no other. A picture goes into its shard as the bytes it came as.
Only what other readers of shards would see differently (16 bits, grey, palette, alpha, a rotation
in EXIF, TIFF, BMP), and what is too large for the memory of a worker, is stored as RGB PNG instead,
and its JSON says why.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Literal

import cv2
import numpy as np
from fsspec.core import url_to_fs
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pydantic import ValidationError

from pipelines.runtime import prepare_process
from pipelines.scan import (
    DECODE_BYTES,
    Finding,
    Identity,
    known_findings,
    list_benchmark,
    name_of_benchmark,
    scan,
)
from pipelines.shard_job import (
    JobPlan,
    JobSummary,
    Rejected,
    ShardTask,
    plan_job,
    run_job,
    shard_name,
)
from pipelines.sources import File, list_sources, read
from pipelines.sources import file_stamps as file_stamps  # what `retrain` asks for
from pipelines.sources import is_picture as is_picture
from teasr import images
from teasr.config import Settings
from teasr.errors import UsageError
from teasr.hygiene import find_copies
from teasr.shards import (
    SAFE_KEY_BYTES,
    Manifest,
    Sample,
    absolute_url,
    content_hash,
    join_url,
    library_versions,
    safe_key,
    write_bytes,
)
from teasr.storage import StorageRefused, patiently

LAYOUT_NAME = "layout.json"

Duplicates = Literal["keep", "exact", "near"]
DUPLICATES = ("keep", "exact", "near")

# What hides the damage that a JPEG of this quality has, at least.
_AUTO_SHRINK = ((90, 1.0), (75, 1.5), (1, 2.0))
MOST_SHRINK = 2.0
"""The most that `shrink="auto"` shrinks by."""

# Formats that shards carry, with the member suffix of each.
_MEMBER_SUFFIX = {"png": "png", "jpeg": "jpg", "webp": "webp"}

# Called directly: `Image.open` judges the number of pixels by a limit of its own.
_OPENERS: dict[str, Callable[[IO[bytes]], ImageFile]] = {
    "png": PngImageFile,
    "jpeg": JpegImageFile,
    "webp": WebPImageFile,
}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class IngestSettings:
    """What decides which pictures are kept, and how; see `ingest` for each.

    Raises:
        UsageError: for a value out of range.
    """

    shard_size: int = 16
    min_side: int = 64
    max_pixels: int = 200_000_000
    shrink: float | Literal["auto"] = 1.0
    duplicates: Duplicates = "near"
    min_sharpness: float = 0.0
    min_jpeg_quality: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("shard_size", 1, math.inf),
            ("min_side", 1, math.inf),
            ("max_pixels", 1, math.inf),
            ("shrink", 1, math.inf),
            ("min_sharpness", 0, 1),
            ("min_jpeg_quality", 0, 100),
        ):
            value = getattr(self, name)
            if name == "shrink" and value == "auto":
                continue
            fits = isinstance(value, int | float) and math.isfinite(value)
            if not (fits and least <= value <= most):
                accepted = f"{least} or more" if most == math.inf else f"{least} to {most}"
                also = " or 'auto'" if name == "shrink" else ""
                raise UsageError(f"{name}: {value} is out of range.", f"Give {accepted}{also}.")
        if self.duplicates not in DUPLICATES:
            raise UsageError(
                f"duplicates: '{self.duplicates}' is unknown.", f"Give {', '.join(DUPLICATES)}."
            )

    @property
    def of_bytes(self) -> dict[str, int | float | str]:
        """Those that decide the bytes of a shard of given pictures."""
        shrink = self.shrink if self.shrink == "auto" else float(self.shrink)
        return {"min_side": self.min_side, "max_pixels": self.max_pixels, "shrink": shrink}

    @property
    def least_side(self) -> int:
        """Smallest side, pixels, that a picture may come with."""
        return self.min_side if self.shrink == "auto" else math.ceil(self.min_side * self.shrink)


class Layout(Settings):
    """Who is in which shard, kept as `layout.json`.

    Attributes:
        settings: names the settings and library versions; with others all is dealt anew.
        shards: of each shard by name, its members: key, source, stamp, offset, size.
    """

    settings: str
    shards: dict[str, tuple[tuple[str, str, str, int | None, int], ...]]


def ingest(
    sources: Sequence[str],
    destination: str,
    *,
    shard_size: int = 16,
    min_side: int = 64,
    max_pixels: int = 200_000_000,
    shrink: float | Literal["auto"] = 1.0,
    duplicates: Duplicates = "near",
    against: Sequence[str] = (),
    min_sharpness: float = 0.0,
    min_jpeg_quality: int = 0,
    max_bad_share: float | None = None,
) -> JobSummary:
    """Make an HR dataset of pictures, or add what is new to one.

    Unusable pictures (unreadable, truncated, tiny, huge, CMYK, animated) are left out and listed
    with the reason in `quarantine.jsonl`. Set aside and listed there too, but not counted as bad,
    are copies, what the options below keep out, and files without a picture's suffix
    (`not-an-image`). Hidden files are passed over.

    Args:
        sources: folders (with all below them), glob patterns, pictures, tar files; local or URLs.
        destination: folder for the shards, local or a URL. Running the same call again writes
            only the shards that are missing. Photographs that were added get new shards; those
            that were removed or changed leave the ones they were in. Other options or library
            versions deal everything anew.
        shard_size: pictures per shard.
        min_side: smallest accepted width and height, pixels, of what is stored.
        max_pixels: largest accepted width times height, pixels.
        shrink: divide width and height by this (averaging areas) before storing; 2 or more hides
            the JPEG damage of web pictures. `auto` decides by the estimated quality of each JPEG:
            1 from 90 up, 1.5 from 75 up, else 2, or the largest of these that leaves `min_side`.
        duplicates: `near` keeps one of pictures that are alike but for compression, size,
            brightness or a slight crop, `exact` one of files with equal bytes, `keep` all. The
            one kept is in the dataset already, else has most pixels, else comes first by name.
        against: benchmarks, as datasets or as `sources`. Photographs that one of their pictures is
            or was cut from (see `teasr.hygiene.Benchmark`) are set aside as `benchmark-leak`.
        min_sharpness: 0 to 1, see `teasr.hygiene.sharpness`; below it `blurred`.
        min_jpeg_quality: 0 to 100, see `teasr.images.jpeg_quality`; below it `jpeg-damage`.
        max_bad_share: share of pictures (0 to 1) that may be unusable; by default 0.5, applied
            from 20 pictures up.

    Raises:
        UsageError: a source or benchmark that is missing or empty, a destination inside a source
            or with a dataset of another kind, a setting out of range.
        TeasrError: too many pictures are unusable; a shard cannot be written.
    """
    settings = IngestSettings(
        shard_size, min_side, max_pixels, shrink, duplicates, min_sharpness, min_jpeg_quality
    )
    if max_bad_share is not None and not 0 <= max_bad_share <= 1:
        raise UsageError(f"max_bad_share: {max_bad_share} is not a share.", "Give 0 to 1.")
    started = time.monotonic()
    listing = _list(sources, destination, settings, against)
    if listing.unseen:
        plan_job(destination, (), Manifest(kind="hr", shards=()))  # refuses, before the work
        found = scan(listing.unseen, destination, listing.benchmark)
        listing = replace(listing, findings={**listing.findings, **found})
    job, layout = _plan(listing, destination, settings)
    if layout != _read_layout(destination):
        # Before any shard: a run that is killed goes on with the same members.
        url = join_url(job.destination, LAYOUT_NAME)
        write_bytes(url, (layout.model_dump_json() + "\n").encode())
    builder = _IngestShard(min_side=min_side, max_pixels=max_pixels, shrink=shrink)
    summary = run_job(job, builder, title="ingest", max_bad_share=max_bad_share)
    return replace(summary, seconds=time.monotonic() - started)  # with the scan


def plan(
    sources: Sequence[str],
    destination: str,
    *,
    shard_size: int = 16,
    min_side: int = 64,
    max_pixels: int = 200_000_000,
    shrink: float | Literal["auto"] = 1.0,
    duplicates: Duplicates = "near",
    against: Sequence[str] = (),
    min_sharpness: float = 0.0,
    min_jpeg_quality: int = 0,
) -> JobPlan:
    """What `ingest` would do; lists the sources, opens no picture and writes nothing.

    `unseen` of the plan counts the pictures that were not looked at yet: which of them are set
    aside is not known, and they are planned as if none were.

    Raises:
        UsageError: as `ingest`.
    """
    settings = IngestSettings(
        shard_size, min_side, max_pixels, shrink, duplicates, min_sharpness, min_jpeg_quality
    )
    return _plan(_list(sources, destination, settings, against), destination, settings)[0]


@dataclass(frozen=True)
class _Listing:
    """What is there to be dealt out.

    Attributes:
        pictures: in order.
        set_aside: files that are no pictures.
        benchmark: pictures that must not be learned from.
        looks: whether the settings need findings.
        findings: of those pictures that were looked at.
    """

    pictures: list[File]
    set_aside: list[Rejected]
    benchmark: tuple[File, ...]
    looks: bool
    findings: Mapping[Identity, Finding]

    @property
    def unseen(self) -> list[File]:
        if not self.looks:
            return []
        return [file for file in self.pictures if file.identity not in self.findings]


def _list(
    sources: Sequence[str], destination: str, settings: IngestSettings, against: Sequence[str]
) -> _Listing:
    pictures, set_aside = list_sources(sources, destination)
    benchmark = list_benchmark(against)
    looks = bool(
        settings.duplicates != "keep"
        or benchmark
        or settings.min_sharpness
        or settings.min_jpeg_quality
    )
    findings = known_findings(destination, name_of_benchmark(benchmark)) if looks else {}
    return _Listing(pictures, set_aside, benchmark, looks, findings)


def _plan(listing: _Listing, destination: str, settings: IngestSettings) -> tuple[JobPlan, Layout]:
    versions = library_versions()
    named = content_hash(["ingest", asdict(settings), versions])
    before = _read_layout(destination)
    settled = _settled(listing.pictures, before if before and before.settings == named else None)
    verdicts = _verdicts(listing, settled, settings)
    dealt = _deal(listing.pictures, settled, verdicts, settings.shard_size)
    assert sum(map(len, dealt.values())) + len(verdicts) == len(listing.pictures)
    tasks = []
    for name, members in dealt.items():
        # Not the URL: a source that moved as a whole is still the same source. Library versions
        # take part: what two versions encoded must not mix in one dataset.
        inputs = [[key, *file.identity] for key, file in members]
        tasks.append(
            ShardTask(
                name=name,
                samples=len(members),
                payload={"entries": [{"key": key, **asdict(file)} for key, file in members]},
                fingerprint=content_hash(["ingest-2", settings.of_bytes, versions, inputs]),
            )
        )
    manifest = Manifest(
        kind="hr",
        shards=(),
        options={
            **asdict(settings),
            **settings.of_bytes,
            "against": name_of_benchmark(listing.benchmark) or None,
        },
        versions=versions,
    )
    job = plan_job(destination, tasks, manifest, [*listing.set_aside, *verdicts.values()])
    layout = Layout(
        settings=named,
        shards={
            name: tuple((key, f.source, f.stamp, f.offset, f.size) for key, f in members)
            for name, members in dealt.items()
        },
    )
    return replace(job, unseen=len(listing.unseen)), layout


# ---------------------------------------------------------------- who goes where


def _read_layout(destination: str) -> Layout | None:
    filesystem, path = url_to_fs(join_url(absolute_url(destination), LAYOUT_NAME))
    try:
        data = patiently(f"read {path}", partial(filesystem.cat_file, path))
        return Layout.model_validate_json(data)
    except (OSError, StorageRefused, ValidationError):
        return None  # none, or of another version: everything is dealt anew


def _settled(pictures: Sequence[File], layout: Layout | None) -> dict[int, tuple[str, str]]:
    """Of the pictures, by index, that have a place: shard and key."""
    places: dict[Identity, list[tuple[str, str]]] = {}
    for name, members in (layout.shards if layout else {}).items():
        for key, *identity in members:
            places.setdefault(tuple(identity), []).append((name, key))  # type: ignore[arg-type]
    settled = {}
    for index, file in enumerate(pictures):
        if places.get(file.identity):  # two sources may each have a file of this name
            settled[index] = places[file.identity].pop(0)
    return settled


def _verdicts(
    listing: _Listing, settled: Mapping[int, object], settings: IngestSettings
) -> dict[int, Rejected]:
    """Of the pictures, by index, that are set aside for what a look at them found."""
    if not listing.looks:
        return {}
    verdicts: dict[int, Rejected] = {}
    usable: list[tuple[int, Finding]] = []
    for index, file in enumerate(listing.pictures):
        finding = listing.findings.get(file.identity)
        if finding is None or finding.bad:
            continue  # whoever builds its shard will say what is wrong with it
        if min(finding.width, finding.height) < settings.least_side:
            continue
        if finding.width * finding.height > settings.max_pixels:
            continue
        if verdict := _own_verdict(finding, settings, checked=bool(listing.benchmark)):
            verdicts[index] = verdict
        else:
            usable.append((index, finding))
    if settings.duplicates == "keep":
        return verdicts
    compared = [finding.compared(settled=index in settled) for index, finding in usable]
    for copy in find_copies(compared, settings.duplicates):
        index, finding = usable[copy.index]
        kept = usable[copy.kept][1]
        kind = "Its bytes are those" if copy.exact else "It is a near-duplicate"
        verdicts[index] = Rejected(
            source=finding.source,
            reason="duplicate" if copy.exact else "near-duplicate",
            message=f"{kind} of {kept.source} ({kept.width} x {kept.height}), which is kept.",
        )
    return verdicts


def _own_verdict(finding: Finding, settings: IngestSettings, *, checked: bool) -> Rejected | None:
    quality = finding.jpeg_quality
    if checked and finding.leak is not None:
        reason, message = "benchmark-leak", f"The benchmark picture {finding.leak} is in it."
    elif finding.sharpness < settings.min_sharpness:
        reason = "blurred"
        message = f"Its sharpness is {finding.sharpness:.2f}, less than {settings.min_sharpness}."
    elif quality is not None and quality < settings.min_jpeg_quality:
        reason = "jpeg-damage"
        message = f"Its JPEG quality is about {quality}, less than {settings.min_jpeg_quality}."
    else:
        return None
    return Rejected(source=finding.source, reason=reason, message=message)


def _deal(
    pictures: Sequence[File],
    settled: Mapping[int, tuple[str, str]],
    verdicts: Mapping[int, Rejected],
    shard_size: int,
) -> dict[str, list[tuple[str, File]]]:
    """The members, key and file, of each shard: settled ones where they are, others after them."""
    dealt: dict[str, list[tuple[str, File]]] = {}
    places = {place: index for index, place in settled.items() if index not in verdicts}
    for (name, key), index in sorted(places.items(), key=lambda item: (item[0][0], item[1])):
        dealt.setdefault(name, []).append((key, pictures[index]))
    new = [index for index in range(len(pictures)) if index not in settled]
    keys = _keys([pictures[index] for index in new], {key for _, key in settled.values()})
    fresh = [(key, pictures[i]) for key, i in zip(keys, new) if i not in verdicts]
    first = 1 + max((_number(name) for name in dealt), default=-1)
    # Like cards: neighbours in a listing are alike, and each shard should have some of everything.
    shards = math.ceil(len(fresh) / shard_size)
    for place in range(shards):
        dealt[shard_name("hr", first + place)] = fresh[place::shards]
    return dealt


def _number(name: str) -> int:
    return int(name.removeprefix("hr-").removesuffix(".tar"))


def _keys(files: Sequence[File], taken: set[str]) -> list[str]:
    """A key for each file, of its path, other than those `taken`; files whose keys would collide
    all get a hash as well.

    Case does not tell keys apart: a shard may be unpacked where it does not count.
    """
    plain = [safe_key(str(PurePosixPath(file.source).with_suffix(""))) for file in files]
    used = {key.lower() for key in taken}
    shared = Counter(key.lower() for key in plain)
    seen: Counter[str] = Counter()
    keys = []
    for key, file in zip(plain, files):
        if shared[key.lower()] > 1 or key.lower() in used:
            stem = key[: SAFE_KEY_BYTES - 11]
            while True:
                # Two sources may each have a file of this name: the count tells them apart.
                key = f"{stem}-{content_hash([file.source, seen[file.source]])[:10]}"
                seen[file.source] += 1
                if key.lower() not in used:
                    break
        used.add(key.lower())
        keys.append(key)
    return keys


# ---------------------------------------------------------------- on the workers


@dataclass(frozen=True)
class _IngestShard:
    """Reads, checks and, where needed, re-encodes the pictures of a task."""

    min_side: int
    max_pixels: int
    shrink: float | Literal["auto"]

    def __call__(self, task: ShardTask) -> Iterator[Sample | Rejected]:
        prepare_process()
        for entry in task.payload["entries"]:
            fields = dict(entry)
            yield self._sample(fields.pop("key"), File(**fields))

    def _sample(self, key: str, file: File) -> Sample | Rejected:
        data = read(file)
        if isinstance(data, Rejected):
            return data
        digest = hashlib.sha256(data).hexdigest()
        try:
            width, height, format = images.header(data)
            quality = images.jpeg_quality(data)
            wanted = self._shrink(quality, min(width, height))
            limits = {
                "min_side": math.ceil(self.min_side * wanted),
                "max_pixels": self.max_pixels,
                "max_memory": DECODE_BYTES,
            }
            why: list[str] = []
            shrunk_by = 1.0
            suffix = _MEMBER_SUFFIX.get(format, "png")
            if wanted > 1 or not images.is_plain(data, **limits):
                picture = images.decode(data, **limits)
                rgb, format = picture.rgb, picture.format
                why = _reasons_to_encode(data, picture)
                # What the decoder reduced counts toward what is asked for.
                shrink = max(1.0, wanted / picture.reduced_by)
                shrunk_by = picture.reduced_by * shrink
                if shrink > 1:
                    size = (round(rgb.shape[1] / shrink), round(rgb.shape[0] / shrink))
                    rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
                    why.append("shrunk")
                height, width = rgb.shape[:2]
                del picture
                if why:
                    suffix, data = "png", b""  # the encoder needs the room
                    data = images.encode(rgb)
        except images.BadPicture as error:
            return Rejected(source=file.source, reason=error.reason, message=str(error))
        about = {
            "source": file.source,
            "sha256": digest,
            "width": width,
            "height": height,
            "format": format,
            "encoded_because": why,
            "jpeg_quality": quality,
            "shrunk_by": shrunk_by,
        }
        members = {
            suffix: data,
            "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
        }
        return Sample(key, members)

    def _shrink(self, quality: int | None, side: int) -> float:
        """How much to shrink a picture of this JPEG quality and shorter side, pixels."""
        if self.shrink != "auto":
            return self.shrink
        if quality is None:
            return 1.0
        wanted = next(factor for least, factor in _AUTO_SHRINK if quality >= least)
        factors = [factor for _, factor in _AUTO_SHRINK if factor <= wanted]
        return max((f for f in factors if side >= self.min_side * f), default=1.0)


def _reasons_to_encode(data: bytes, picture: images.Picture) -> list[str]:
    """Why another decoder, given these bytes, might not show `picture.rgb`."""
    if picture.format not in _OPENERS:
        return [picture.format]
    with _OPENERS[picture.format](io.BytesIO(data)) as opened:
        mode = opened.mode
        try:
            orientation = opened.getexif().get(_EXIF_ORIENTATION, 1)
        except Exception:  # metadata that cannot be parsed turns no picture
            orientation = 1
    why = {
        "16-bit": picture.bits > 8,
        "palette": mode in ("P", "PA"),
        "grey": picture.grey,
        "alpha": picture.alpha is not None or mode in ("LA", "PA", "RGBA"),
        "exif-rotated": orientation in range(2, 9),
        "reduced": picture.reduced_by > 1,
    }
    return [reason for reason, applies in why.items() if applies]
