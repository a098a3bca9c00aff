"""Restore many pictures: a folder or shards in, pictures of the same names out.

One bad picture never stops the work: it is reported with its reason. A result is written aside and
renamed, and a picture whose result exists is left alone, so the same command continues a job that
was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data

from pipelines.runtime import ensure_ray, network_of_this_process, quiet_ray_data
from teasr.backbones import load_backbone
from teasr.errors import TeasrError, UsageError
from teasr.images import PICTURE_SUFFIXES, decode
from teasr.restoration import RestorationSettings, restore_picture
from teasr.shards import (
    MANIFEST_NAME,
    SHARD_PICTURES,
    join_url,
    read_manifest,
    read_shard,
    write_bytes,
)


@dataclass(frozen=True)
class Restored:
    """What became of the pictures: names of `done` and of `skipped` (a result was there), and
    `failed` as (name, reason)."""

    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]


def restore_many(
    model: Path,
    source: str,
    destination: Path,
    settings: RestorationSettings,
    *,
    format: str = "png",
    progress: Callable[[int, int], None] | None = None,
) -> Restored:
    """Restore the pictures of a folder or an HR dataset into the folder `destination`.

    A dataset's pictures keep their keys, a folder's pictures their relative paths; the suffix
    becomes that of `format`.

    Args:
        model: folder of weights.
        progress: called as (pictures done, pictures).

    Raises:
        UsageError: when there is nothing to restore, or two pictures would get one name.
    """
    load_backbone(model)
    jobs = list(_jobs(source, destination, format))
    names = [job["target"] for job in jobs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f"Several pictures would be written to {twice[0]}.", "Rename one of them.")
    missing = [job for job in jobs if not Path(job["target"]).exists()]
    skipped = tuple(job["name"] for job in jobs if Path(job["target"]).exists())
    done: list[str] = []
    failed: list[tuple[str, str]] = []
    if missing:
        ensure_ray()
        with quiet_ray_data():
            rows = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
                _Restorer(model, settings, format), num_cpus=1
            )
            for row in rows.iter_rows():
                if row["error"]:
                    failed.append((row["name"], row["error"]))
                else:
                    done.append(row["name"])
                if progress:
                    progress(len(done) + len(failed), len(missing))
    return Restored(tuple(sorted(done)), skipped, tuple(sorted(failed)))


def _jobs(source: str, destination: Path, format: str) -> Iterator[dict[str, Any]]:
    suffix = ".jpg" if format == "jpeg" else f".{format}"
    folder = Path(source)
    if (folder / MANIFEST_NAME).is_file() or "://" in source:
        for shard in read_manifest(source, kind="hr").shards:
            url = join_url(source, shard.name)
            for sample in read_shard(url):
                target = destination / f"{sample.key}{suffix}"
                yield {"name": sample.key, "path": url, "target": str(target), "shard": True}
        return
    if not folder.is_dir():
        raise UsageError(f"There is no picture and no folder {source}.")
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file():
            target = destination / relative.with_suffix(suffix)
            yield {"name": str(relative), "path": str(path), "target": str(target), "shard": False}


@dataclass(frozen=True)
class _Restorer:
    """Restores one picture; travels to Ray's tasks."""

    model: Path
    settings: RestorationSettings
    format: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        error = ""
        try:
            picture = decode(_bytes(row))
            network = network_of_this_process(self.model)
            restored = restore_picture(network, picture, self.settings, self.format)
            target = Path(row["target"]).absolute()
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(str(target), restored)
        except (TeasrError, OSError) as problem:
            error = str(problem)
        return {"name": row["name"], "error": error}


def _bytes(row: dict[str, Any]) -> bytes:
    if not row["shard"]:
        return Path(row["path"]).read_bytes()
    sample = next(sample for sample in read_shard(row["path"]) if sample.key == row["name"])
    return next(sample.members[s] for s in SHARD_PICTURES if s in sample.members)


def output_format(path: Path) -> str:
    """Format of a result by its suffix.

    Raises:
        UsageError: for a suffix that is not written.
    """
    formats: dict[str, str] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if path.suffix.lower() not in formats:
        raise UsageError(
            f"'{path.name}' has no suffix that can be written.", f"Use one of {', '.join(formats)}."
        )
    return formats[path.suffix.lower()]
