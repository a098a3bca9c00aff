"""What a person names as the source of pictures, listed and read: folders, globs, tars, URLs.

A listing opens no picture. It gives every file a stamp that changes when the file does, and it is
in a fixed order, so that equal sources give equal datasets.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from pipelines.shard_job import READ_ERROR, Rejected
from teasr import images
from teasr.errors import UsageError
from teasr.shards import absolute_url, url_of
from teasr.storage import StorageAway, StorageRefused, patiently, reason_of

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

# Pictures too, of formats that are refused: they count as bad, and decoding says what they are.
REFUSED_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd")

# A file is read whole before it is decoded; this bounds the memory of a task.
MAX_FILE_BYTES = 300_000_000


@dataclass(frozen=True)
class File:
    """One file of a source, or one member of a tar in it.

    `source` is what the sample's JSON names it by: its path inside the source. `stamp` changes
    when the content does. `offset` and `size` are bytes in the (decompressed) tar, for a member.
    """

    url: str
    source: str
    stamp: str
    size: int
    offset: int | None = None

    @property
    def identity(self) -> tuple[str, str, int | None, int]:
        """What a later run knows the file by. Not the URL: a source that moved is the same."""
        return self.source, self.stamp, self.offset, self.size


def read(file: File) -> bytes | Rejected:
    """The bytes of `file`, or why it is left out: too large, or it cannot be read.

    Raises:
        StorageAway: the storage of all files is away, not this file.
    """
    if file.size > MAX_FILE_BYTES:
        message = f"The file has {file.size} bytes; at most {MAX_FILE_BYTES} are read."
        return Rejected(source=file.source, reason="file-too-large", message=message)
    try:
        return patiently(f"read {file.url}", lambda: _read_once(file))
    except StorageAway:
        raise
    except (OSError, StorageRefused, EOFError, ValueError, zlib.error) as error:
        message = f"It cannot be read: {reason_of(error)}."
        return Rejected(source=file.source, reason=READ_ERROR, message=message)


def _read_once(file: File) -> bytes:
    if file.offset is None:
        filesystem, path = url_to_fs(file.url)
        return bytes(filesystem.cat_file(path))
    with _open_tar(file.url) as stream:
        stream.seek(file.offset)
        return bytes(stream.read(file.size))


def file_stamps(sources: Sequence[str]) -> dict[str, str]:
    """All files that `ingest` would look at in `sources`: URL and a stamp that changes with the
    file, in order of URLs. Tar files are not opened.

    Raises:
        UsageError: when a source does not exist.
    """
    files = {file.url: file.stamp for s in sources for file in _files_of(s, "", named=True)}
    return dict(sorted(files.items()))


def is_picture(url: str) -> bool:
    """Whether a file's name says that it is a picture."""
    return url.lower().endswith((*images.PICTURE_SUFFIXES, *REFUSED_SUFFIXES))


def list_sources(
    sources: Sequence[str], destination: str | None = None
) -> tuple[list[File], list[Rejected]]:
    """Pictures in a fixed order, and the files that are not pictures.

    Raises:
        UsageError: a source does not exist, holds the `destination`, or none has a picture.
    """
    if not sources:
        raise UsageError("No source is given.", "Give folders, globs, pictures or tar files.")
    target = "" if destination is None else absolute_url(destination)
    found: dict[str, File] = {}
    for source in sources:
        for file in _files_of(source, target, named=len(sources) > 1):
            found.setdefault(file.url, file)  # sources may overlap
    pictures: list[File] = []
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


def _files_of(source: str, target: str, *, named: bool) -> list[File]:
    """As `_list_source`, with patience for the store."""
    return patiently(f"list {source}", lambda: list(_list_source(source, target, named=named)))


def _list_source(source: str, target: str, *, named: bool) -> Iterator[File]:
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
        yield File(url_of(filesystem, name), source, _stamp(info), info["size"] or 0)


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


def _list_tar(tar_file: File, set_aside: list[Rejected]) -> list[File]:
    """The files in a tar. Where it is cut short the rest is set aside, and said so."""
    members: list[File] = []
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
