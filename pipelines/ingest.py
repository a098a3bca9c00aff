"""Photographs in, HR shards out: every picture is looked at once, and kept byte for byte.

    photo → **ingest** → HR shard → synthesize → ...

The listing is sorted and dealt out to shards before any picture is opened, so a bad one leaves its
shard a sample short and moves no other. A picture goes into its shard as the bytes it came as. Only
what other readers of shards would see differently (16 bits, grey, palette, alpha, a rotation in
EXIF, TIFF, BMP) is stored as RGB PNG instead, and its JSON says why.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO, Any

import cv2
import fsspec
import numpy as np
from fsspec.core import url_to_fs
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipelines.shard_job import (
    READ_ERROR,
    JobPlan,
    JobSummary,
    Rejected,
    ShardTask,
    plan_job,
    run_job,
    shard_name,
)
from teasr import images
from teasr.errors import UsageError
from teasr.shards import (
    SAFE_KEY_BYTES,
    Manifest,
    Sample,
    absolute_url,
    content_hash,
    library_versions,
    safe_key,
    url_of,
)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

# Pictures too, of formats that are refused: they count as bad, and decoding says what they are.
REFUSED_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd")

# A file is read whole before it is decoded; this bounds the memory of a task. The largest picture
# that is accepted, 200 megapixels, has 600 MB as an uncompressed TIFF.
MAX_FILE_BYTES = 1 << 30

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
class _File:
    """One file of a source, or one member of a tar in it.

    `source` is what the sample's JSON names it by: its path inside the source. `stamp` changes
    when the content does. `offset` and `size` are bytes in the (decompressed) tar, for a member.
    """

    url: str
    source: str
    stamp: str
    size: int
    offset: int | None = None


def ingest(
    sources: Sequence[str],
    destination: str,
    *,
    shard_size: int = 16,
    min_side: int = 64,
    max_pixels: int = 200_000_000,
    shrink: float = 1.0,
    max_bad_share: float | None = None,
) -> JobSummary:
    """Make an HR dataset of pictures.

    Unusable pictures (unreadable, truncated, tiny, huge, CMYK, animated) are left out and listed
    with the reason in `quarantine.jsonl`. Files without a picture's suffix are listed there too,
    as `not-an-image`, but do not count as bad; hidden files are passed over.

    Args:
        sources: folders (with all below them), glob patterns, pictures, tar files; local or URLs.
        destination: folder for the shards, local or a URL. Running the same call again writes
            only the shards that are missing or whose sources changed.
        shard_size: pictures per shard.
        min_side: smallest accepted width and height, pixels, of what is stored.
        max_pixels: largest accepted width times height, pixels.
        shrink: divide width and height by this (averaging areas) before storing; 2 or more hides
            the JPEG damage of web pictures.
        max_bad_share: share of pictures (0 to 1) that may be unusable; by default 0.5, applied
            from 20 pictures up.

    Raises:
        UsageError: a source that is missing or empty, a destination inside a source or with a
            dataset of another kind, a setting out of range.
        TeasrError: too many pictures are unusable; a shard cannot be written.
    """
    job = plan(
        sources,
        destination,
        shard_size=shard_size,
        min_side=min_side,
        max_pixels=max_pixels,
        shrink=shrink,
    )
    builder = _IngestShard(min_side=min_side, max_pixels=max_pixels, shrink=shrink)
    return run_job(job, builder, title="ingest", max_bad_share=max_bad_share)


def plan(
    sources: Sequence[str],
    destination: str,
    *,
    shard_size: int = 16,
    min_side: int = 64,
    max_pixels: int = 200_000_000,
    shrink: float = 1.0,
) -> JobPlan:
    """What `ingest` would do; lists the sources, opens no picture and writes nothing.

    Raises:
        UsageError: as `ingest`.
    """
    for name, value, least in (
        ("shard_size", shard_size, 1),
        ("min_side", min_side, 1),
        ("max_pixels", max_pixels, 1),
        ("shrink", shrink, 1),
    ):
        if not (math.isfinite(value) and value >= least):
            raise UsageError(f"{name}: {value} is out of range.", f"Give {least} or more.")
    pictures, set_aside = _list_sources(sources, destination)
    options = {"min_side": min_side, "max_pixels": max_pixels, "shrink": float(shrink)}
    versions = library_versions()
    keyed = list(zip(_keys(pictures), pictures))
    tasks: list[ShardTask] = []
    for start in range(0, len(keyed), shard_size):
        part = keyed[start : start + shard_size]
        entries = [
            {"key": key, "url": f.url, "source": f.source, "offset": f.offset, "size": f.size}
            for key, f in part
        ]
        # Not the URL: a source that moved as a whole is still the same source. Library versions
        # take part: what two versions encoded must not mix in one dataset.
        inputs = [[key, f.source, f.stamp, f.offset, f.size] for key, f in part]
        tasks.append(
            ShardTask(
                name=shard_name("hr", len(tasks)),
                samples=len(part),
                payload={"entries": entries},
                fingerprint=content_hash(["ingest", options, versions, inputs]),
            )
        )
    manifest = Manifest(
        kind="hr",
        shards=(),
        options={**options, "shard_size": shard_size},
        versions=versions,
    )
    return plan_job(destination, tasks, manifest, set_aside)


# ---------------------------------------------------------------- listing


def file_stamps(sources: Sequence[str]) -> dict[str, str]:
    """All files that `ingest` would look at in `sources`: URL and a stamp that changes with the
    file, in order of URLs. Tar files are not opened.

    Raises:
        UsageError: when a source does not exist.
    """
    files = {file.url: file.stamp for s in sources for file in _list_source(s, "", named=True)}
    return dict(sorted(files.items()))


def is_picture(url: str) -> bool:
    """Whether a file's name says that it is a picture."""
    return url.lower().endswith((*images.PICTURE_SUFFIXES, *REFUSED_SUFFIXES))


def _list_sources(sources: Sequence[str], destination: str) -> tuple[list[_File], list[Rejected]]:
    """Pictures in a fixed order, and the files that are not pictures."""
    if not sources:
        raise UsageError("No source is given.", "Give folders, globs, pictures or tar files.")
    target = absolute_url(destination)
    found: dict[str, _File] = {}
    for source in sources:
        for file in _list_source(source, target, named=len(sources) > 1):
            found.setdefault(file.url, file)  # sources may overlap
    pictures: list[_File] = []
    set_aside: list[Rejected] = []
    for file in found.values():
        if file.source.lower().endswith(TAR_SUFFIXES):
            members = _list_tar(file, set_aside)
        else:
            members = [file]
        for member in members:
            if is_picture(member.source):
                pictures.append(member)
            else:
                set_aside.append(
                    Rejected(
                        source=member.source,
                        reason="not-an-image",
                        message="Its name has no picture's suffix.",
                    )
                )
    if not pictures:
        names = ", ".join(sources)
        raise UsageError(
            f"There is no picture in {names}.",
            f"Pictures are files that end in {', '.join(sorted(images.PICTURE_SUFFIXES))}.",
        )
    return sorted(pictures, key=lambda file: file.source), set_aside


def _list_source(source: str, target: str, *, named: bool) -> Iterator[_File]:
    """The files of one source; `named` puts the folder's name before their relative paths."""
    url = absolute_url(source)
    filesystem, path = url_to_fs(url)
    filesystem.invalidate_cache()
    if filesystem.exists(path):
        found = {path: filesystem.info(path)}
    elif fsspec.core.has_magic(path):
        found = filesystem.glob(path, detail=True)
    else:
        found = {}
    if not found:
        raise UsageError(f"The source {source} does not exist.", "Give a folder, glob or file.")
    root = _listing_root(filesystem, path)
    prefix = f"{PurePosixPath(root).name}/" if named and filesystem.isdir(path) else ""
    files: dict[str, dict[str, Any]] = {}
    for name, info in found.items():
        if info["type"] == "directory":
            if f"{target}/".startswith(f"{url_of(filesystem, name).rstrip('/')}/"):
                raise UsageError(
                    f"The destination {target} is inside the source {source}.",
                    "Give a folder beside the source.",
                )
            files.update(filesystem.find(name, detail=True))
        else:
            files[name] = info
    for name, info in files.items():
        relative = name[len(root) :].lstrip("/")
        if any(part.startswith(".") for part in relative.split("/")):
            continue
        if info["type"] != "file":
            if not (info.get("islink") and filesystem.isfile(name)):
                continue  # a pipe, a socket, a link to a folder: nothing to read
            info = filesystem.info(name)  # of what the link points to
        source = _shown(prefix + relative)
        yield _File(url_of(filesystem, name), source, _stamp(info), info["size"] or 0)


def _listing_root(filesystem: Any, path: str) -> str:
    """The folder that paths are relative to: the folder, a file's own, a glob's fixed part."""
    if filesystem.isdir(path):
        return path.rstrip("/")
    if filesystem.exists(path):
        return _parent(path)
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if fsspec.core.has_magic(part))
    return "/".join(parts[:fixed])


def _parent(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0]


def _shown(name: str) -> str:
    """`name` as text: a name on Linux, or in a tar, may hold bytes that are no UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _stamp(info: dict[str, Any]) -> str:
    """What changes when the file does: a hash where the store keeps one, else its time."""
    names = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "last_modified")
    return next((str(info[name]) for name in names if info.get(name)), "")


def _list_tar(tar_file: _File, set_aside: list[Rejected]) -> list[_File]:
    """The files in a tar. Where it is cut short the rest is set aside, and said so."""
    members: list[_File] = []
    try:
        with _open_tar(tar_file.url) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if member.isreg() and not any(part.startswith(".") for part in parts):
                    members.append(
                        replace(
                            tar_file,
                            source=f"{tar_file.source}/{_shown('/'.join(parts).lstrip('/'))}",
                            offset=member.offset_data,
                            size=member.size,
                        )
                    )
            # `tarfile` takes a lost tail or a damaged header for the end.
            stream.seek(tar.offset)
            if stream.read(512) != bytes(512):
                raise tarfile.ReadError("the end mark is missing")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        set_aside.append(
            Rejected(
                source=tar_file.source,
                reason="damaged-tar",
                message=f"It cannot be read beyond its file {len(members)}: {error}.",
            )
        )
    return members


def _open_tar(url: str) -> Any:
    compression = None if url.lower().endswith(".tar") else "gzip"
    return fsspec.open(url, "rb", compression=compression)


def _keys(files: list[_File]) -> list[str]:
    """A key for each file, of its path; files whose keys would collide all get a hash as well.

    Case does not tell keys apart: a shard may be unpacked where it does not count.
    """
    plain = [safe_key(str(PurePosixPath(file.source).with_suffix(""))) for file in files]
    shared = Counter(key.lower() for key in plain)
    seen: Counter[str] = Counter()
    keys = []
    for key, file in zip(plain, files):
        if shared[key.lower()] > 1:
            # Two sources may each have a file of this name: the count tells them apart.
            digest = content_hash([file.source, seen[file.source]])[:10]
            key = f"{key[: SAFE_KEY_BYTES - 11]}-{digest}"
            seen[file.source] += 1
        keys.append(key)
    return keys


# ---------------------------------------------------------------- on the workers


@dataclass(frozen=True)
class _IngestShard:
    """Reads, checks and, where needed, re-encodes the pictures of a task."""

    min_side: int
    max_pixels: int
    shrink: float

    def __call__(self, task: ShardTask) -> Iterator[Sample | Rejected]:
        cv2.setNumThreads(1)  # a task has one core
        for entry in task.payload["entries"]:
            yield self._sample(entry)

    def _sample(self, entry: dict[str, Any]) -> Sample | Rejected:
        source = entry["source"]
        if entry["size"] > MAX_FILE_BYTES:
            message = f"The file has {entry['size']} bytes; at most {MAX_FILE_BYTES} are read."
            return Rejected(source=source, reason="file-too-large", message=message)
        try:
            data = _read(entry)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            return Rejected(
                source=source, reason=READ_ERROR, message=f"It cannot be read: {reason}."
            )
        try:
            picture = images.decode(
                data,
                min_side=math.ceil(self.min_side * self.shrink),
                max_pixels=self.max_pixels,
            )
        except images.BadPicture as error:
            return Rejected(source=source, reason=error.reason, message=str(error))
        rgb = picture.rgb
        why = _reasons_to_encode(data, picture)
        if self.shrink > 1:
            size = (round(rgb.shape[1] / self.shrink), round(rgb.shape[0] / self.shrink))
            rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
            why.append("shrunk")
        suffix = "png" if why else _MEMBER_SUFFIX[picture.format]
        about = {
            "source": source,
            "sha256": hashlib.sha256(data).hexdigest(),
            "width": rgb.shape[1],
            "height": rgb.shape[0],
            "format": picture.format,
            "encoded_because": why,
        }
        members = {
            suffix: images.encode(rgb) if why else data,
            "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
        }
        return Sample(entry["key"], members)


def _read(entry: dict[str, Any]) -> bytes:
    if entry["offset"] is None:
        filesystem, path = url_to_fs(entry["url"])
        return bytes(filesystem.cat_file(path))
    with _open_tar(entry["url"]) as stream:
        stream.seek(entry["offset"])
        return bytes(stream.read(entry["size"]))


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
    }
    return [reason for reason, applies in why.items() if applies]
