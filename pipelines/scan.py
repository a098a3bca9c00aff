"""A quick look at every photograph before shards are dealt: what is a copy is known only of all.

The findings are kept beside the dataset in `scan-NNNNN.jsonl`, a line for each picture, and
written as the scan goes on: a run that was killed, or comes after photographs were added, looks
only at those that are new. Everything that depends on a setting is decided from the findings later,
so that another setting needs no other scan; only another benchmark does.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from pydantic import ValidationError

from pipelines.runtime import prepare_process
from pipelines.shard_job import READ_ERROR, OnRay, Rejected, job_progress, map_on_ray
from pipelines.sources import File, list_sources, read
from teasr import hygiene, images
from teasr.config import Settings
from teasr.errors import UsageError
from teasr.hygiene import Benchmark, BenchmarkPicture
from teasr.shards import absolute_url, content_hash, join_url, write_bytes
from teasr.storage import patiently

DECODE_BYTES = 350_000_000
"""Memory for a file and its pixels. A Ray worker has 255 MB of its own, and writing a PNG may take
a fifth more than reading: so none exceeds 700 MB."""

_BATCH = 32  # pictures of a task: a second's work
_BATCHES_OF_A_PART = 64
_BENCHMARK_SIDE = 256
# Of other pixels a look says nothing: the pixel limit is a setting, and judged later.
_ANY_PIXELS = 1 << 62

Identity = tuple[str, str, int | None, int]


class Finding(Settings):
    """What a quick look found.

    Attributes:
        source, stamp, offset, size: of the file, see `sources.File`.
        benchmark: names the benchmark that it was compared with; empty when with none.
        leak: the benchmark picture that it holds, or None.
        bad: it cannot be decoded; nothing below is known then.
        sha256: of the file.
        width, height: pixels, upright.
        hash, thumbnail: from `teasr.hygiene`, as hexadecimal and base 64.
        sharpness: 0 to 1, see `teasr.hygiene.sharpness`.
        jpeg_quality: 1 to 100, see `teasr.images.jpeg_quality`; None of other formats.
    """

    source: str
    stamp: str
    offset: int | None
    size: int
    benchmark: str = ""
    leak: str | None = None
    bad: bool = False
    sha256: str = ""
    width: int = 0
    height: int = 0
    hash: str = ""
    thumbnail: str = ""
    sharpness: float = 0.0
    jpeg_quality: int | None = None

    @property
    def identity(self) -> Identity:
        """As `sources.File.identity`."""
        return self.source, self.stamp, self.offset, self.size

    def compared(self, *, settled: bool) -> hygiene.Compared:
        """For the search for copies."""
        side = hygiene.THUMBNAIL_SIDE
        pixels = np.frombuffer(base64.b64decode(self.thumbnail), np.uint8)
        return hygiene.Compared(
            name=self.source,
            sha256=self.sha256,
            width=self.width,
            height=self.height,
            hash=int(self.hash, 16),
            thumbnail=pixels.reshape(side, side),
            settled=settled,
        )


def list_benchmark(urls: Sequence[str]) -> tuple[File, ...]:
    """The pictures of the benchmarks at `urls`: datasets of `teasr`, or any source of pictures.

    Of LR/HR pairs the HR picture counts.

    Raises:
        UsageError: when there is no picture.
    """
    if not urls:
        return ()
    files, _ = list_sources(urls)
    return tuple(file for file in files if not file.source.endswith(".lr.png"))


def name_of_benchmark(files: Sequence[File]) -> str:
    """Names the set of benchmark pictures `files`; empty for none."""
    return content_hash([file.identity for file in files])[:16] if files else ""


def known_findings(destination: str, benchmark: str) -> dict[Identity, Finding]:
    """What scans for the dataset at `destination` found, where it answers for `benchmark` too."""
    filesystem, path = url_to_fs(absolute_url(destination))
    findings: dict[Identity, Finding] = {}
    for name in _parts(filesystem, path):
        for line in patiently(f"read {name}", partial(filesystem.cat_file, name)).splitlines():
            try:
                finding = Finding.model_validate_json(line)
            except ValidationError:
                continue  # of another version: that picture is looked at again
            if benchmark in ("", finding.benchmark):
                findings[finding.identity] = finding
    return findings


def scan(
    files: Iterable[File], destination: str, benchmark: Sequence[File] = ()
) -> dict[Identity, Finding]:
    """Look at `files` on Ray and keep what is found beside the dataset at `destination`.

    Pictures that cannot be read now are not among the findings: the next run tries again.

    Raises:
        UsageError: a benchmark picture cannot be used.
        TeasrError: Ray lost the workers, or the findings cannot be written.
    """
    pending = list(files)
    if not pending:
        return {}
    look = LookAtFiles(_load_benchmark(benchmark), name_of_benchmark(benchmark))
    batches = [
        json.dumps([asdict(file) for file in pending[start : start + _BATCH]])
        for start in range(0, len(pending), _BATCH)
    ]
    filesystem, path = url_to_fs(absolute_url(destination))
    names = [name.rpartition("scan-")[2] for name in _parts(filesystem, path)]
    part = 1 + max((int(name.partition(".")[0]) for name in names), default=-1)
    found: dict[Identity, Finding] = {}
    unwritten: list[str] = []
    with job_progress(shown=True) as progress:
        bar = progress.add_task("ingest: looking", total=len(pending))
        for done, lines in enumerate(map_on_ray(look, batches, "looked at the sources"), 1):
            for line in lines.splitlines():
                finding = Finding.model_validate_json(line)
                found[finding.identity] = finding
                unwritten.append(line + "\n")
            progress.update(bar, completed=min(len(pending), done * _BATCH))
            if unwritten and (done % _BATCHES_OF_A_PART == 0 or done == len(batches)):
                url = join_url(destination, f"scan-{part:05d}.jsonl")
                write_bytes(url, "".join(unwritten).encode())
                part, unwritten = part + 1, []
    return found


def _parts(filesystem: Any, path: str) -> list[str]:
    def listing() -> list[str]:
        filesystem.invalidate_cache()
        names = filesystem.ls(path, detail=False) if filesystem.isdir(path) else []
        return sorted(name for name in names if _is_part(name.rstrip("/").rpartition("/")[2]))

    return patiently(f"list {path}", listing)


def _is_part(name: str) -> bool:
    number = name.removeprefix("scan-").removesuffix(".jsonl")
    return name == f"scan-{number}.jsonl" and number.isascii() and number.isdigit()


def _load_benchmark(files: Sequence[File]) -> tuple[BenchmarkPicture, ...]:
    pictures = []
    for file in files:
        data = read(file)
        if isinstance(data, Rejected):
            raise UsageError(f"The benchmark picture {file.source}: {data.message}")
        try:
            look = images.look(data, _BENCHMARK_SIDE)
        except images.BadPicture as error:
            raise UsageError(f"The benchmark picture {file.source}: {error}") from None
        pictures.append(BenchmarkPicture(file.source, look.grey, look.width, look.height))
    return tuple(pictures)


@dataclass(frozen=True)
class LookAtFiles(OnRay):
    """Looks at the files of a batch: their list in, a line of JSON for each finding out."""

    pictures: tuple[BenchmarkPicture, ...] = ()
    benchmark: str = ""

    def __call__(self, given: str) -> str:
        prepare_process()
        against = Benchmark(self.pictures) if self.pictures else None
        files = (File(**fields) for fields in json.loads(given))
        return "\n".join(f.model_dump_json() for f in self._findings(files, against))

    def name(self, given: str) -> str:
        files = json.loads(given)
        return f"{files[0]['source']} to {files[-1]['source']}"

    def _findings(self, files: Iterable[File], against: Benchmark | None) -> Iterator[Finding]:
        for file in files:
            data = read(file)
            about: dict[str, Any] = {
                "source": file.source,
                "stamp": file.stamp,
                "offset": file.offset,
                "size": file.size,
                "benchmark": self.benchmark,
            }
            if isinstance(data, Rejected):
                if data.reason != READ_ERROR:
                    yield Finding(**about, bad=True)
                continue
            try:
                look = images.look(
                    data, hygiene.LOOK_SIDE, max_pixels=_ANY_PIXELS, max_memory=DECODE_BYTES
                )
                quality = images.jpeg_quality(data)
            except images.BadPicture:
                yield Finding(**about, bad=True)
                continue
            thumbnail = hygiene.thumbnail_of(look.grey)
            yield Finding(
                **about,
                leak=against and against.find(look.grey, look.width, look.height),
                sha256=hashlib.sha256(data).hexdigest(),
                width=look.width,
                height=look.height,
                hash=f"{hygiene.perceptual_hash(thumbnail):016x}",
                thumbnail=base64.b64encode(thumbnail.tobytes()).decode(),
                sharpness=round(hygiene.sharpness(look.grey), 4),
                jpeg_quality=quality,
            )
