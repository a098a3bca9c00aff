"""Shards: pictures and what is known of them, in WebDataset tar files with a manifest beside them.

A dataset is a folder, local or remote (`s3://bucket/name`), of shards and one `manifest.json`. An
HR shard holds `KEY.png|jpg|webp` and `KEY.json` for every sample, a pair shard `KEY.hr.png`,
`KEY.lr.png` and `KEY.json`. Encoded bytes travel untouched. Equal samples give equal shards, byte
for byte; a shard or a manifest is visible whole or not at all; a reader is told of anything that is
missing or out of place; and storage that fails for a while is waited for (`teasr.storage`).

The format is WebDataset's, and `teasr data validate` has WebDataset itself read every shard. It is
written and read here by `tarfile`, since importing that library imports torch: two seconds and 190
MB in each worker that makes data.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import unicodedata
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal, cast

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, field_validator

import teasr
from teasr.config import Settings
from teasr.errors import TeasrError, UsageError
from teasr.storage import advice_on, patiently, reason_of

Kind = Literal["hr", "pairs"]

MANIFEST_NAME = "manifest.json"
SHARD_PICTURES = ("png", "jpg", "webp")
"""The picture formats that shards carry, as member suffixes."""

# A ustar header has 100 bytes for a name; longer ones would need headers that not every reader
# knows. 80 leave room for the suffix, 64 also for what `synthesize` appends to a key.
KEY_BYTES = 80
SAFE_KEY_BYTES = 64

_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_SUFFIX = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)*")
_PARTIAL = ".partial"
_COPY_BYTES = 1 << 20

# Stores of objects know no folders: asked to make one, s3fs makes a bucket of a mistyped name.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"}


class BadKey(TeasrError):  # noqa: N818 - named as `images.BadPicture` is
    """A sample key that cannot be a file name in a shard; the message shows the key."""


class BadShard(TeasrError):  # noqa: N818 - named as `images.BadPicture` is
    """A shard that is cut short, or whose members are not whole samples; names shard and key."""


@dataclass(frozen=True)
class Sample:
    """One sample: `members` maps a suffix ('png', 'hr.png', 'json') to encoded bytes."""

    key: str
    members: dict[str, bytes]


class ShardInfo(Settings):
    """What a manifest says of one shard.

    Attributes:
        name: file name in the dataset's folder.
        samples: how many samples it holds.
        bytes: size of the file.
        sha256: hash of the file, in hexadecimal.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class Manifest(Settings):
    """What a dataset is made of.

    Attributes:
        kind: 'hr' for pictures, 'pairs' for LR/HR pairs.
        shards: the shards that hold samples, in order of their names.
        quarantined: how many samples were left out, by reason.
        preset, seed: of the degradation, for pairs.
        scale: how many times larger HR is than LR along a side, for pairs.
        parent: fingerprint of the dataset that this one was made from.
        options: the other settings of the job that wrote it, for the record.
        versions: of the libraries that wrote it, for the record.
    """

    kind: Kind
    shards: tuple[ShardInfo, ...]
    quarantined: dict[str, int] = Field(default_factory=dict)
    preset: str | None = None
    seed: int | None = None
    scale: int | None = None
    parent: str | None = None
    options: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    @field_validator("shards")
    @classmethod
    def _each_once(cls, shards: tuple[ShardInfo, ...]) -> tuple[ShardInfo, ...]:
        names = [shard.name for shard in shards]
        if len(set(names)) < len(names):
            raise ValueError("a shard is listed twice")
        return shards

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """The dataset's name: a sha256 over kind, shards (name, sha256), preset, seed and parent.

        Neither time nor library versions nor the place take part, so that equal data has an equal
        fingerprint wherever and whenever it was made.
        """
        return content_hash(
            {
                "kind": self.kind,
                "shards": [[shard.name, shard.sha256] for shard in self.shards],
                "preset": self.preset,
                "seed": self.seed,
                "parent": self.parent,
            }
        )


def content_hash(value: Any) -> str:
    """sha256, in hexadecimal, of the canonical JSON of `value` (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a dataset's bytes."""
    names = ("numpy", "pillow", "opencv-python-headless", "albumentations", "webdataset")
    versions = {"teasr": teasr.__version__}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


# ---------------------------------------------------------------- places


def absolute_url(url: str) -> str:
    """`url` such that every process reads it alike: local folders become absolute paths.

    Raises:
        UsageError: for a protocol that is unknown or whose driver is not installed.
    """
    filesystem, path = _open_place(url)
    if _is_local(filesystem):
        return os.path.abspath(path)  # noqa: PTH100 - `Path.resolve` would follow links as well
    return url_of(filesystem, path)


def url_of(filesystem: Any, path: str) -> str:
    """The URL of `path` on an fsspec `filesystem`; of a local one, the path itself."""
    return path if _is_local(filesystem) else str(filesystem.unstrip_protocol(path))


def join_url(folder: str, name: str) -> str:
    """The URL of `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}"


def write_bytes(url: str, data: bytes) -> None:
    """Put `data` at `url`, whole or not at all.

    Raises:
        TeasrError: when it cannot be written, for instance because the disk is full, or the store
            stays away.
    """
    with _atomic_file(url) as stream:
        stream.write(data)


def remove_partials(folder: str) -> None:
    """Remove what writers that were killed left in the local folder `folder`."""
    filesystem, path = _open_place(folder)
    if _is_local(filesystem):
        for left in Path(path).glob(f".*{_PARTIAL}"):
            left.unlink(missing_ok=True)


def _open_place(url: str) -> tuple[Any, str]:
    try:
        filesystem, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"'{url}' cannot be opened: {error}.",
            "Give a folder, or a URL whose fsspec driver is installed (s3fs for s3://).",
        ) from None
    return filesystem, path


def _is_local(filesystem: Any) -> bool:
    return isinstance(filesystem, LocalFileSystem)


@contextlib.contextmanager
def _atomic_file(url: str) -> Iterator[IO[bytes]]:
    """A file to write that appears at `url` when the block ends well, and never otherwise.

    Locally it is written aside in the same folder, flushed to the disk and renamed; for a remote
    place it is written to a temporary file and uploaded whole.
    """
    filesystem, path = _open_place(url)
    aside: Path | None = None
    try:
        if _is_local(filesystem):
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{_PARTIAL}")
            with aside.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(target)
        else:
            handle, name = tempfile.mkstemp(prefix="teasr-", suffix=_PARTIAL)
            aside = Path(name)
            with os.fdopen(handle, "wb") as stream:
                yield stream
            patiently(f"write {url}", partial(_upload, filesystem, name, path))
    except OSError as error:
        raise TeasrError(f"Cannot write {url}: {reason_of(error)}.", advice_on(error)) from None
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def _upload(filesystem: Any, name: str, path: str) -> None:
    parent = path.rpartition("/")[0]
    if parent and not _OBJECT_STORES.intersection(_protocols(filesystem)):
        filesystem.makedirs(parent, exist_ok=True)
    filesystem.put_file(name, path)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    given = filesystem.protocol
    return (given,) if isinstance(given, str) else tuple(given)


@contextlib.contextmanager
def _whole_file(url: str) -> Iterator[IO[bytes]]:
    """The file at `url`, opened; a remote one is copied to a temporary file first.

    A copy is one large sequential read, which can be done again from its start before anything is
    made of it; what a network mount does in the middle of a read is the kernel's to repeat. The
    copy has no name any more when the block begins, so that a process that is killed leaves none.
    """
    filesystem, path = _open_place(url)
    doing = f"read {url}"
    if _is_local(filesystem):
        file: IO[bytes] = patiently(doing, lambda: Path(path).open("rb"))  # noqa: SIM115
    else:
        handle, name = tempfile.mkstemp(prefix="teasr-", suffix=_PARTIAL)
        os.close(handle)
        try:
            patiently(doing, partial(filesystem.get_file, path, name))
            file = Path(name).open("rb")  # noqa: SIM115 - closed below
        finally:
            Path(name).unlink(missing_ok=True)
    with file:
        yield file


# ---------------------------------------------------------------- keys


def check_key(key: str) -> None:
    """Refuse a key that would not survive as a file name in a shard.

    WebDataset splits a member's name at its first dot; a separator would make folders of keys.

    Raises:
        BadKey: showing the key and what is wrong with it.
    """
    problem = ""
    if not key:
        problem = "it is empty"
    elif "." in key:
        problem = "it has a dot"
    elif "/" in key or "\\" in key:
        problem = "it has a path separator"
    elif any(unicodedata.category(character).startswith("C") for character in key):
        problem = "it has a control character or one that cannot be encoded"
    elif len(key.encode()) > KEY_BYTES:
        problem = f"it has {len(key.encode())} bytes"
    if problem:
        raise BadKey(
            f"The key {key!r} cannot be used: {problem}.",
            f"Keys are letters, digits, '-' and '_', up to {KEY_BYTES} bytes.",
        )


def safe_key(text: str) -> str:
    """A key made of `text`, such as a relative path without its suffix.

    Accents are dropped and everything but ASCII letters, digits, '-' and '_' becomes '_', so
    different texts may give one key: the caller settles collisions. At most 64 bytes.
    """
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    return re.sub(r"[^A-Za-z0-9_-]+", "_", plain)[:SAFE_KEY_BYTES] or "_"


def _problem_of_members(members: Iterable[str], kind: Kind | None = None) -> str:
    """Why these member suffixes are not one sample (of `kind`), or an empty text."""
    names = set(members)
    if "json" not in names:
        return f"has no .json member (members: {', '.join(sorted(names))})"
    pictures = names - {"json"}
    roles = sorted(name.rpartition(".")[0] for name in pictures)
    if not all(name.rpartition(".")[2] in SHARD_PICTURES for name in pictures):
        return f"has unknown members ({', '.join(sorted(names))})"
    if roles not in ([""], ["hr", "lr"]):
        return f"is neither a picture nor an LR/HR pair (members: {', '.join(sorted(names))})"
    if kind == "hr" and roles != [""]:
        return f"is no HR picture (members: {', '.join(sorted(names))})"
    if kind == "pairs" and pictures != {"hr.png", "lr.png"}:
        return f"is no pair of hr.png and lr.png (members: {', '.join(sorted(names))})"
    return ""


# ---------------------------------------------------------------- shards


@dataclass
class _HashedStream:
    """Passes bytes on to `target` and keeps their count and hash."""

    target: IO[bytes]
    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def write(self, data: bytes) -> int:
        self.target.write(data)
        self.size += len(data)
        self.digest.update(data)
        return len(data)


def write_shard(url: str, samples: Iterable[Sample]) -> ShardInfo:
    """Write `samples`, in their order, as one shard; one sample is in memory at a time.

    Members are sorted by suffix; times, owners and modes are fixed. On any exception, also one
    that `samples` raises, what was at `url` before is unchanged and nothing else is left behind.

    Raises:
        BadKey, BadShard: for a key that cannot be used or is there twice, or members that are
            not a sample.
        TeasrError: when the shard cannot be written, for instance because the disk is full.
    """
    name = url.rstrip("/").rpartition("/")[2]
    keys: set[str] = set()
    with _atomic_file(url) as file:
        stream = _HashedStream(file)
        # A stream that is only written to needs no more than `write`.
        with tarfile.open(fileobj=cast(Any, stream), mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                check_key(sample.key)
                if sample.key in keys:
                    raise BadShard(f"Shard {name}: the key '{sample.key}' is there twice.")
                if problem := _problem_of_members(sample.members):
                    raise BadShard(f"Shard {name}: the sample '{sample.key}' {problem}.")
                keys.add(sample.key)
                for suffix, data in sorted(sample.members.items()):
                    tar.addfile(_tar_entry(f"{sample.key}.{suffix}", len(data)), io.BytesIO(data))
    return ShardInfo(
        name=name, samples=len(keys), bytes=stream.size, sha256=stream.digest.hexdigest()
    )


def _tar_entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size, 0, 0o444
    entry.uname = entry.gname = "teasr"
    return entry


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member, split at the first dot of its last part as WebDataset splits it;
    None when there is no dot."""
    match = _MEMBER_NAME.fullmatch(name)
    return (match[1], match[2]) if match else None


def read_shard(
    url: str, expected: ShardInfo | None = None, kind: Kind | None = None
) -> Iterator[Sample]:
    """The samples of a shard, in order, one in memory at a time.

    A remote shard is copied whole to a temporary file before its first sample is handed out, so
    that a connection that breaks costs a second copy and never a sample twice.

    Args:
        url: of the shard.
        expected: what the dataset's manifest says of it. A shard that is another one by its hash
            gives no sample at all.
        kind: what the samples have to be; by default either.

    Raises:
        BadShard: when the tar is cut short or damaged, a sample's members are incomplete or not
            adjacent, a key is there twice, a member is no file of a sample, or the shard is not
            what is expected.
        TeasrError: when there is no such shard or it cannot be read.
    """
    name = url.rstrip("/").rpartition("/")[2]
    try:
        with _whole_file(url) as file:
            if expected is not None and _sha256(file) != expected.sha256:
                for _ in _samples(name, file, kind):
                    pass  # damage is told by its place
                raise BadShard(
                    f"Shard {name} is not the one that the manifest lists: its hash differs.",
                    "Delete it and run the command that made the dataset again.",
                )
            count = 0
            for sample in _samples(name, file, kind):
                count += 1
                yield sample
            if expected is not None and count != expected.samples:
                raise BadShard(
                    f"Shard {name} holds {count} samples; the manifest lists {expected.samples}.",
                    "Delete the manifest and run the command that made the dataset again.",
                )
    except FileNotFoundError:
        raise TeasrError(
            f"There is no shard {url}.", "Run the command that made the dataset again."
        ) from None
    except OSError as error:
        raise TeasrError(f"Cannot read {url}: {reason_of(error)}.", advice_on(error)) from None


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return digest


def _samples(name: str, file: IO[bytes], kind: Kind | None) -> Iterator[Sample]:
    keys: set[str] = set()
    current: Sample | None = None
    last = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                last = member.name
                parts = split_name(member.name)
                is_plain = member.isreg() and not member.issparse()
                if parts is None or not is_plain or not _SUFFIX.fullmatch(parts[1]):
                    raise BadShard(f"Shard {name}: {member.name!r} is no file of a sample.")
                key, suffix = parts
                if current is None or key != current.key:
                    if current is not None:
                        yield _whole(name, current, kind)
                    check_key(key)
                    if key in keys:
                        raise BadShard(
                            f"Shard {name}: the key '{key}' is there twice, or its members are "
                            "not adjacent."
                        )
                    keys.add(key)
                    current = Sample(key, {})
                if suffix in current.members:
                    raise BadShard(f"Shard {name}: {member.name!r} is there twice.")
                extracted = tar.extractfile(member)
                assert extracted is not None  # a regular file, see above
                current.members[suffix] = extracted.read()
            _check_end(file, tar.offset)
    except BadKey as error:
        raise BadShard(f"Shard {name}: {error}") from None
    except (tarfile.TarError, EOFError) as error:
        where = f" after {last!r}" if last else ""
        raise BadShard(
            f"Shard {name} is cut short or damaged{where}: {error}.",
            "Delete it and run the command that made it again.",
        ) from None
    if current is not None:
        yield _whole(name, current, kind)


def _whole(name: str, sample: Sample, kind: Kind | None) -> Sample:
    if problem := _problem_of_members(sample.members, kind):
        raise BadShard(f"Shard {name}: the sample '{sample.key}' {problem}.")
    return sample


def _check_end(file: IO[bytes], offset: int) -> None:
    """Require the end mark: `tarfile` takes a lost tail or a damaged header for the end.

    The end of a tar is at least two empty blocks of 512 bytes, and nothing after them.
    """
    file.seek(offset)
    size = 0
    while block := file.read(_COPY_BYTES):
        size += len(block)
        if block.strip(b"\0"):
            raise tarfile.ReadError("an unreadable header")
    if size < 1024:
        raise tarfile.ReadError("the end mark is missing")


# ---------------------------------------------------------------- manifests


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`, whole or not at all: this makes it a dataset."""
    data = {
        **manifest.model_dump(mode="json"),
        "samples": manifest.samples,
        "bytes": manifest.bytes,
        "fingerprint": manifest.fingerprint,
    }
    write_bytes(join_url(folder, MANIFEST_NAME), json.dumps(data, indent=2).encode() + b"\n")


def read_manifest(url: str, kind: Kind | None = None) -> Manifest:
    """The manifest of the dataset at `url`, a folder or its `manifest.json`.

    Raises:
        UsageError: when there is no manifest, it is not one, it was changed by hand, or the
            dataset is not of the `kind` that is asked for.
    """
    folder = url.removesuffix(MANIFEST_NAME).rstrip("/") or "/"
    data = manifest_document(folder)
    if data is None:
        raise UsageError(
            f"{folder}/{MANIFEST_NAME} is not a manifest: a JSON object is expected.",
            "Delete it and run the command that made the dataset again.",
        )
    manifest = manifest_of(data, f"{folder}/{MANIFEST_NAME}")
    if data.get("fingerprint") != manifest.fingerprint:
        raise UsageError(
            f"{folder}/{MANIFEST_NAME} does not match its fingerprint: it was changed by hand.",
            "Delete it and run the command that made the dataset again.",
        )
    if kind is not None and manifest.kind != kind:
        words = {"hr": "HR pictures", "pairs": "LR/HR pairs"}
        made_by = {"hr": "ingest", "pairs": "synthesize"}
        raise UsageError(
            f"{folder} holds {words[manifest.kind]}; {words[kind]} are needed.",
            f"Give a dataset made by `teasr {made_by[kind]}`.",
        )
    return manifest


def manifest_document(folder: str) -> dict[str, Any] | None:
    """What stands in a folder's `manifest.json`, unchecked; None when it is no JSON object.

    Raises:
        UsageError: when there is none, so that the folder is not a dataset.
    """
    url = join_url(folder, MANIFEST_NAME)
    filesystem, path = _open_place(url)
    filesystem.invalidate_cache()
    try:
        data = json.loads(patiently(f"read {url}", partial(filesystem.cat_file, path)))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder} is not a dataset: it has no {MANIFEST_NAME}.",
            "Make one with `teasr ingest`, or run the command that was writing it again.",
        ) from None
    except (ValueError, RecursionError, IsADirectoryError):
        return None
    return data if isinstance(data, dict) else None


def manifest_of(document: Mapping[str, Any], where: str) -> Manifest:
    """The manifest in a document, whatever fingerprint that states.

    Raises:
        UsageError: naming `where` and the field that is wrong.
    """
    derived = ("samples", "bytes", "fingerprint")
    fields = {name: value for name, value in document.items() if name not in derived}
    return Manifest.from_mapping(fields, where)
