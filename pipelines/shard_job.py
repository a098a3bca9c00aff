"""The machine that `ingest` and `synthesize` share: many tasks, each of which writes one shard.

Each task is one row of a Ray Data dataset, in a block of its own. Where it runs it builds its
shard sample by sample, writes it whole, and then `NAME.stats.json` beside it; only those figures
travel back. The same command again finds the stats and does only what is missing. The list
`quarantine.jsonl` and, last of all, `manifest.json` turn the folder into a dataset.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.data
import ray.exceptions
from fsspec.core import url_to_fs
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines import telemetry
from pipelines.runtime import (
    MAX_LOST_WORKERS,
    ensure_ray,
    nodes_for,
    quiet_ray_data,
    workers_lost,
)
from pipelines.watch import Watch, at_work
from teasr.config import Settings
from teasr.errors import TeasrError, UsageError
from teasr.shards import (
    MANIFEST_NAME,
    Manifest,
    Sample,
    ShardInfo,
    absolute_url,
    join_url,
    read_manifest,
    remove_partials,
    write_bytes,
    write_manifest,
    write_shard,
)
from teasr.storage import StorageRefused, patiently

QUARANTINE_NAME = "quarantine.jsonl"
STATS_SUFFIX = ".stats.json"

READ_ERROR = "read-error"
"""Reason of a picture that could not be fetched: tried again by the next run."""

# More bad pictures than good ones: the source is not what it was taken for, and the person who
# gave it should look before a model learns from the rest. Of a handful of pictures a share says
# little, so the default is applied from 20 up; a share that was asked for is always applied.
DEFAULT_MAX_BAD_SHARE = 0.5
JUDGED_FROM = 20


class Rejected(Settings):
    """A sample that was left out: `source` names it, `reason` is a slug, `message` a sentence."""

    source: str
    reason: str
    message: str


class ShardTask(Settings):
    """One shard to write.

    Attributes:
        name: its file name.
        samples: how many samples go in; as many come out, written or rejected.
        payload: what the builder needs, as JSON values.
        fingerprint: names everything that decides the shard's bytes.
    """

    name: str
    samples: int
    payload: dict[str, Any]
    fingerprint: str


class ShardStats(Settings):
    """What became of a task; kept beside its shard as `NAME.stats.json`."""

    fingerprint: str
    shard: ShardInfo
    quarantined: tuple[Rejected, ...]


Builder = Callable[[ShardTask], Iterator[Sample | Rejected]]
"""Yields each sample of a task, or why it is left out. It is sent to Ray workers."""


@dataclass(frozen=True)
class JobPlan:
    """What a job will do: every task, those already done, and what is refused without a look.

    Attributes:
        destination: URL of the dataset's folder.
        tasks: all shards of the dataset.
        done: stats of the shards that are there already, by name.
        set_aside: files that go into no shard (no pictures, copies, what a filter keeps out); they
            are quarantined too, but do not count toward the bad share.
        manifest: what the manifest will say, still without shards.
        unseen: pictures that are still to be looked at, which may set some of them aside.
    """

    destination: str
    tasks: tuple[ShardTask, ...]
    done: dict[str, ShardStats]
    set_aside: tuple[Rejected, ...]
    manifest: Manifest
    unseen: int = 0

    @property
    def missing(self) -> tuple[ShardTask, ...]:
        """The shards that are to be written."""
        return tuple(task for task in self.tasks if task.name not in self.done)

    @property
    def samples(self) -> int:
        """Samples that go in, over all tasks."""
        return sum(task.samples for task in self.tasks)


@dataclass(frozen=True)
class JobSummary:
    """What a job did.

    Attributes:
        destination: URL of the dataset's folder.
        samples: samples in the dataset.
        quarantined: how many inputs were left out, by reason.
        bytes: size of all shards.
        seconds: wall time of this run.
        shards: shards that this run wrote.
        skipped_shards: shards that were there already.
        manifest: as written.
        written: samples in the shards that this run wrote.
    """

    destination: str
    samples: int
    quarantined: dict[str, int]
    bytes: int
    seconds: float
    shards: int
    skipped_shards: int
    manifest: Manifest
    written: int = 0

    @property
    def rate(self) -> float:
        """Samples that this run wrote, per second."""
        return self.written / self.seconds if self.seconds else 0.0


def plan_job(
    destination: str,
    tasks: Iterable[ShardTask],
    manifest: Manifest,
    set_aside: Iterable[Rejected] = (),
) -> JobPlan:
    """Compare `tasks` with what is at `destination`; writes nothing.

    Raises:
        UsageError: when `destination` is a file or holds a dataset of another kind.
    """
    destination = absolute_url(destination)
    filesystem, path = url_to_fs(destination)
    tasks = tuple(tasks)
    sizes = patiently(f"list {destination}", partial(_sizes, filesystem, path, destination))
    if MANIFEST_NAME in sizes:
        kind = read_manifest(destination).kind
        if kind != manifest.kind:
            raise UsageError(
                f"{destination} holds a dataset of another kind ('{kind}', not '{manifest.kind}').",
                "Give a new folder as the destination.",
            )
    there_already = [t for t in tasks if t.name in sizes and t.name + STATS_SUFFIX in sizes]
    paths = [f"{path}/{task.name}{STATS_SUFFIX}" for task in there_already]
    with ThreadPoolExecutor(16) as pool:  # a remote store answers slowly, but many at once
        found = list(pool.map(partial(_read_stats, filesystem), paths))
    done = {
        task.name: stats
        for task, stats in zip(there_already, found)
        if stats is not None
        and stats.fingerprint == task.fingerprint
        and stats.shard.bytes == sizes[task.name]
        and not any(rejected.reason == READ_ERROR for rejected in stats.quarantined)
    }
    return JobPlan(destination, tasks, done, tuple(set_aside), manifest)


def _sizes(filesystem: Any, path: str, destination: str) -> dict[str, int]:
    """Sizes of the files in the folder `path`, by name; none when there is no folder."""
    # fsspec keeps remote listings; a restart has to see what is there now.
    filesystem.invalidate_cache()
    if not filesystem.exists(path):
        return {}
    if filesystem.isfile(path):
        raise UsageError(f"{destination} is a file.", "Give a folder as the destination.")
    entries = filesystem.ls(path, detail=True)
    return {
        entry["name"].rstrip("/").rpartition("/")[2]: entry["size"]
        for entry in entries
        if entry["type"] == "file"
    }


def _read_stats(filesystem: Any, path: str) -> ShardStats | None:
    try:
        read = patiently(f"read {path}", partial(filesystem.cat_file, path))
        return ShardStats.model_validate_json(read)
    except (OSError, StorageRefused, ValidationError):
        return None  # of another version or damaged: the shard is written again


def run_job(
    plan: JobPlan, builder: Builder, *, title: str, max_bad_share: float | None = None
) -> JobSummary:
    """Write what `plan` still misses, then the quarantine list and the manifest.

    Args:
        plan: from `plan_job`.
        builder: makes the samples of a task; runs on Ray workers.
        title: what the progress bar says.
        max_bad_share: the share of samples (0 to 1) that may be left out; the default is 0.5,
            applied from 20 samples up.

    Raises:
        TeasrError: when too many samples, or all of them, are unusable (no manifest is written
            then), or a shard cannot be written.
    """
    if max_bad_share is not None and not 0 <= max_bad_share <= 1:
        raise UsageError(f"max_bad_share: {max_bad_share} is not a share.", "Give 0 to 1.")
    started = time.monotonic()
    missing = plan.missing
    filesystem, path = url_to_fs(plan.destination)
    if missing:
        # A folder whose shards are being replaced is no dataset until the end.
        _remove(filesystem, f"{path}/{MANIFEST_NAME}")
        remove_partials(plan.destination)
    stats = dict(plan.done)
    with job_progress(shown=bool(missing)) as progress:
        total = sum(task.samples for task in missing)
        shards_bar = progress.add_task(f"{title}: shards", total=len(missing))
        samples_bar = progress.add_task(f"{title}: samples", total=total)
        for one in _build_all(missing, builder, plan.destination):
            stats[one.shard.name] = one
            reasons = Counter(entry.reason for entry in one.quarantined)
            telemetry.stage(title, one.shard.samples, reasons)
            progress.advance(shards_bar)
            progress.advance(samples_bar, one.shard.samples + len(one.quarantined))
    if missing:
        remove_partials(plan.destination)  # of workers that were killed, and whose work was redone
    ordered = [stats[task.name] for task in plan.tasks]
    rejected = [entry for one in ordered for entry in one.quarantined]
    samples = sum(one.shard.samples for one in ordered)
    everything = sorted((*rejected, *plan.set_aside), key=lambda entry: entry.source)
    lines = [json.dumps(entry.model_dump(), ensure_ascii=False) + "\n" for entry in everything]
    write_bytes(join_url(plan.destination, QUARANTINE_NAME), "".join(lines).encode())
    _check_share(samples, rejected if samples else everything, plan, max_bad_share)
    counts = dict(sorted(Counter(entry.reason for entry in everything).items()))
    manifest = plan.manifest.model_copy(
        update={
            "shards": tuple(one.shard for one in ordered if one.shard.samples),
            "quarantined": counts,
        }
    )
    write_manifest(plan.destination, manifest)
    _remove_stale(filesystem, path, plan)
    return JobSummary(
        destination=plan.destination,
        samples=samples,
        quarantined=counts,
        bytes=manifest.bytes,
        seconds=time.monotonic() - started,
        shards=len(missing),
        skipped_shards=len(plan.done),
        manifest=manifest,
        written=sum(stats[task.name].shard.samples for task in missing),
    )


def _check_share(
    samples: int, rejected: list[Rejected], plan: JobPlan, max_bad_share: float | None
) -> None:
    bad = len(rejected)
    share = bad / max(samples + bad, 1)
    if max_bad_share is None:
        limit = DEFAULT_MAX_BAD_SHARE if samples + bad >= JUDGED_FROM else 1.0
    else:
        limit = max_bad_share
    if samples and share <= limit:
        return
    counts = Counter(entry.reason for entry in rejected).most_common()
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
    accepted = f", {limit:.0%} are accepted" if samples else ""
    raise TeasrError(
        f"{bad} of {samples + bad} samples ({share:.0%}) cannot be used{accepted}: {reasons}.",
        f"{join_url(plan.destination, QUARANTINE_NAME)} names each of them"
        + ("; a higher max_bad_share accepts what is left." if samples else "."),
    )


def _remove_stale(filesystem: Any, path: str, plan: JobPlan) -> None:
    """Remove shards of an earlier, longer run: a reader that globs must not find them."""
    current = {task.name for task in plan.tasks}
    pattern = re.compile(rf"({re.escape(plan.manifest.kind)}-\d+\.tar)({re.escape(STATS_SUFFIX)})?")
    listing = partial(_sizes, filesystem, path, plan.destination)
    for name in patiently(f"list {plan.destination}", listing):
        match = pattern.fullmatch(name)
        if match and match[1] not in current:
            _remove(filesystem, f"{path}/{name}")


def _remove(filesystem: Any, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        patiently(f"remove {path}", partial(filesystem.rm_file, path))


def shard_name(kind: str, index: int) -> str:
    """The file name of shard `index` (0, 1, ...) of a dataset of `kind`."""
    return f"{kind}-{index:05d}.tar"


def sibling_name(name: str, kind: str) -> str:
    """The name of the shard of `kind` that is made of shard `name`, or that it was made of: the
    same number, so that a shard that goes or comes renames no other."""
    return f"{kind}-{name.rpartition('-')[2]}"


def job_progress(*, shown: bool) -> Progress:
    """Bars on the terminal, where there is one and they are to be `shown`."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )


# ---------------------------------------------------------------- Ray

_WORKER_LOST = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
)


class OnRay:
    """What Ray maps over rows: a text in, a text out; a user's error comes out as a value.

    Raised on a worker it would reach the user wrapped in Ray's traceback.
    """

    def __call__(self, given: str) -> str:
        """The work itself."""
        raise NotImplementedError

    def name(self, given: str) -> str:
        """What people call this piece of work."""
        raise NotImplementedError

    def run(self, row: dict[str, Any]) -> dict[str, Any]:
        """`__call__` on a row of Ray Data."""
        began = time.monotonic()
        with at_work(row["job"], row["number"]):
            return self._answer(row) | {"seconds": time.monotonic() - began}

    def _answer(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if workers_lost() >= MAX_LOST_WORKERS:
                raise TeasrError(
                    f"{self.name(row['given'])}: {workers_lost()} workers were lost while they "
                    "worked on it.",
                    "Memory ran out (start Ray with fewer CPUs), or a decoder crashes on one of "
                    "its pictures.",
                )
            return {"result": self(row["given"]), "error": ""}
        except TeasrError as error:
            kind = "usage" if isinstance(error, UsageError) else "work"
            about = {"kind": kind, "message": error.message, "hint": error.hint}
            return {"result": "", "error": json.dumps(about)}


@dataclass(frozen=True)
class _BuildShard(OnRay):
    """Writes a shard: its task in, its stats out, both as JSON."""

    builder: Builder
    destination: str

    def __call__(self, given: str) -> str:
        return self.build(ShardTask.model_validate(json.loads(given))).model_dump_json()

    def name(self, given: str) -> str:
        return f"Shard {json.loads(given)['name']}"

    def build(self, task: ShardTask) -> ShardStats:
        rejected: list[Rejected] = []

        def samples() -> Iterator[Sample]:
            for item in self.builder(task):
                if isinstance(item, Rejected):
                    rejected.append(item)
                else:
                    yield item

        url = join_url(self.destination, task.name)
        info = write_shard(url, samples())
        if info.samples + len(rejected) != task.samples:  # without stats it is written again
            raise TeasrError(
                f"Shard {task.name}: {task.samples} samples were to go in, but {info.samples} were "
                f"written and {len(rejected)} rejected.",
                "What it was made from does not agree with its manifest: make that again.",
            )
        stats = ShardStats(fingerprint=task.fingerprint, shard=info, quarantined=tuple(rejected))
        write_bytes(url + STATS_SUFFIX, stats.model_dump_json(indent=1).encode() + b"\n")
        return stats


def _build_all(
    tasks: tuple[ShardTask, ...], builder: Builder, destination: str
) -> Iterator[ShardStats]:
    """The stats of each task as it is finished, in no fixed order."""
    # Plain ASCII JSON: a path on Linux may hold bytes that are no UTF-8.
    texts = [json.dumps(task.model_dump()) for task in tasks]
    for stats in map_on_ray(_BuildShard(builder, destination), texts, f"wrote {destination}"):
        yield ShardStats.model_validate_json(stats)


def map_on_ray(work: OnRay, given: list[str], doing: str) -> Iterator[str]:
    """`work` on each of `given` on Ray's workers, one task each, as they end.

    Args:
        work: is sent to the workers.
        given: at least the texts of a second's work each.
        doing: what the workers did, for the message when they are lost.

    Raises:
        TeasrError, UsageError: that `work` raised; when Ray lost the workers.
    """
    if not given:
        return
    ensure_ray()
    try:
        with quiet_ray_data(), Watch() as watch:
            rows = [{"given": text, "job": watch.job, "number": i} for i, text in enumerate(given)]
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
            mapped = dataset.map(work.run, resources=nodes_for("data"))
            for row in mapped.iter_rows():
                watch.ended(row["seconds"])
                if row["error"]:
                    raise _error_of(json.loads(row["error"]))
                yield row["result"]
    except _WORKER_LOST as error:
        raise TeasrError(
            f"Ray lost the workers that {doing}: {str(error).splitlines()[0]}",
            "When memory ran out, start Ray with fewer CPUs; then run the same command again.",
        ) from None


def _error_of(given: dict[str, str]) -> TeasrError:
    kind = UsageError if given["kind"] == "usage" else TeasrError
    return kind(given["message"], given["hint"])
