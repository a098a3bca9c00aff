"""Restore many pictures: a folder or shards in, pictures of the same names out.

Encoded pictures stream through a pool of Ray actors, each of which loads the model once; a shard is
read once, whatever the number of its pictures. One bad picture never stops the work: it is reported
with its reason. A result is written aside and renamed, and a picture whose result exists is left
alone, so the same command continues a job that was interrupted, and what a lost actor was doing is
done again by another.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.data
import ray.exceptions
import torch

from pipelines import telemetry
from pipelines.runtime import MAX_LOST_WORKERS, ensure_ray, quiet_actor_start, quiet_ray_data
from teasr.backbones import load_model, named_base
from teasr.errors import TeasrError, UsageError
from teasr.images import PICTURE_SUFFIXES, BadPicture, decode
from teasr.restoration import RestorationSettings, restore_picture
from teasr.shards import (
    MANIFEST_NAME,
    SHARD_PICTURES,
    BadShard,
    ShardInfo,
    absolute_url,
    join_url,
    read_manifest,
    read_shard,
    write_bytes,
)
from teasr.storage import reason_of

# Shards that are read at the same time. Reading takes no CPU from Ray, or a pool of actors on
# every CPU would wait for ever for the pictures that readers without a CPU cannot bring.
READERS = 2

_PARTIAL = ".partial"


class Failure(NamedTuple):
    """A picture that could not be restored: `reason` to count by, `message` for people."""

    name: str
    reason: str
    message: str


@dataclass(frozen=True)
class Restored:
    """What became of the pictures.

    Attributes:
        done: names of the pictures that were restored.
        skipped: names of those whose result was there.
        failed: the others, with why; a damaged shard stands for the pictures that it hides.
        seconds: wall time of this run.
        pixels: of the restored pictures together.
    """

    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: tuple[Failure, ...]
    seconds: float
    pixels: int

    @property
    def failed_by_reason(self) -> dict[str, int]:
        """How many pictures failed, by reason."""
        return dict(sorted(Counter(failure.reason for failure in self.failed).items()))

    @property
    def megapixels_per_second(self) -> float:
        """Restored megapixels per second of this run, all actors together."""
        return self.pixels / 1e6 / self.seconds if self.seconds else 0.0


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
        TeasrError: when Ray's workers are lost for good.
    """
    started = time.monotonic()
    load_model(model)  # a wrong model is told here, not by an actor
    place = _Place(destination.absolute(), ".jpg" if format == "jpeg" else f".{format}")
    from_shards = (Path(source) / MANIFEST_NAME).is_file() or "://" in source
    outcomes: list[_Outcome] = []
    if from_shards:
        manifest = read_manifest(source, kind="hr")
        total = manifest.samples
        tasks = [
            json.dumps({"url": join_url(absolute_url(source), s.name), "shard": s.model_dump()})
            for s in manifest.shards
        ]
    else:
        pictures = list(_pictures(source, place))
        outcomes = [
            _Outcome(entry.name, entry.target, "skipped") for entry in pictures if _is_there(entry)
        ]
        tasks = [json.dumps(entry._asdict()) for entry in pictures if not _is_there(entry)]
        total = len(tasks)
    place.sweep()
    if tasks:
        restorer = {
            "model": model.absolute(),
            "settings": settings,
            "place": place,
            "base": named_base(),
        }
        for count, outcome in enumerate(_restore_all(tasks, from_shards, restorer, total), 1):
            outcomes.append(outcome)
            telemetry.count(telemetry.SAMPLES, outcome.state == "done", stage="restore")
            if progress:
                progress(min(count, total), total)
        place.sweep()
    if from_shards:  # told late: the keys are known when the shards were read
        _refuse_doubles([outcome.target for outcome in outcomes if outcome.target])
    by_state: dict[str, list[_Outcome]] = {"done": [], "skipped": [], "failed": []}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.name):
        by_state[outcome.state].append(outcome)
    return Restored(
        done=tuple(outcome.name for outcome in by_state["done"]),
        skipped=tuple(outcome.name for outcome in by_state["skipped"]),
        failed=tuple(Failure(o.name, o.reason, o.message) for o in by_state["failed"]),
        seconds=time.monotonic() - started,
        pixels=sum(outcome.pixels for outcome in outcomes),
    )


class _Picture(NamedTuple):
    """A picture of a folder: what it is called, where it is and where its result goes."""

    name: str
    path: str
    target: str


def _is_there(picture: _Picture) -> bool:
    return Path(picture.target).exists()


@dataclass(frozen=True)
class _Place:
    """Where results go."""

    folder: Path
    suffix: str

    def target(self, name: str) -> str:
        return str(self.folder / f"{name}{self.suffix}")

    def sweep(self) -> None:
        """Remove what actors that were lost had begun to write."""
        for left in self.folder.rglob(f".*{_PARTIAL}"):
            left.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Outcome:
    """What became of one picture (or, as `failed`, of one shard); travels back as JSON."""

    name: str
    target: str = ""
    state: str = "done"
    reason: str = ""
    message: str = ""
    pixels: int = 0


def _pictures(source: str, place: _Place) -> Iterator[_Picture]:
    folder = Path(source)
    if not folder.is_dir():
        raise UsageError(f"There is no picture and no folder {source}.")
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    ]
    targets = [place.target(str(path.relative_to(folder).with_suffix(""))) for path in paths]
    _refuse_doubles(targets)
    for path, target in zip(paths, targets):
        yield _Picture(str(path.relative_to(folder)), str(path.absolute()), target)


def _refuse_doubles(targets: list[str]) -> None:
    twice = sorted(target for target, count in Counter(targets).items() if count > 1)
    if twice:
        raise UsageError(f"Several pictures would be written to {twice[0]}.", "Rename one of them.")


# ---------------------------------------------------------------- Ray


def _restore_all(
    tasks: list[str], from_shards: bool, restorer: dict[str, Any], pictures: int
) -> Iterator[_Outcome]:
    """The outcome of each picture as it is known, in no fixed order."""
    ensure_ray()
    actors = max(1, min(pictures, int(ray.cluster_resources().get("CPU", 1))))
    # Plain ASCII JSON: a path on Linux may hold bytes that are no UTF-8.
    rows = [{"picture": task, "data": b""} for task in tasks]
    try:
        with quiet_ray_data():
            # A picture leaves a reader as a block of its own as soon as it is read: it can go to
            # any actor, and a shard is never in memory whole.
            ray.data.DataContext.get_current().target_max_block_size = 1
            dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
            if from_shards:
                dataset = dataset.flat_map(
                    _Reader(restorer["place"]),
                    num_cpus=0,
                    compute=ray.data.TaskPoolStrategy(size=min(READERS, len(rows))),
                )
            dataset = dataset.map(
                _Restorer,  # type: ignore[arg-type]
                fn_constructor_kwargs=restorer,
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=1,
            )
            results = iter(dataset.iter_rows())
            with quiet_actor_start():
                first = list(islice(results, 1))
            for row in chain(first, results):
                yield _Outcome(**json.loads(row["outcome"]))
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
        raise TeasrError(
            f"Ray lost the actors that restore pictures: {str(error).splitlines()[0]}",
            "When memory ran out, start Ray with fewer CPUs; then run the same command again.",
        ) from None


@dataclass(frozen=True)
class _Reader:
    """Hands out a shard's pictures that have no result yet; travels to Ray's tasks."""

    place: _Place

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        task = json.loads(row["picture"])
        expected = ShardInfo.model_validate(task["shard"])
        try:
            for sample in read_shard(task["url"], expected, "hr"):
                picture = _Picture(sample.key, "", self.place.target(sample.key))
                if _is_there(picture):
                    yield _about(_Outcome(picture.name, picture.target, "skipped"))
                else:
                    data = next(sample.members[s] for s in SHARD_PICTURES if s in sample.members)
                    yield {"picture": json.dumps(picture._asdict()), "data": data}
        except TeasrError as error:
            reason = "damaged-shard" if isinstance(error, BadShard) else "read-error"
            yield _about(_Outcome(expected.name, "", "failed", reason, str(error)))


def _about(outcome: _Outcome) -> dict[str, Any]:
    return {"picture": json.dumps({"outcome": asdict(outcome)}), "data": b""}


class _Restorer:
    """Restores one picture after another with one model; lives in an actor."""

    def __init__(
        self,
        model: Path,
        settings: RestorationSettings,
        place: _Place,
        base: Path | None = None,
    ) -> None:
        torch.set_num_threads(1)  # an actor has one of Ray's CPUs
        self.model = load_model(model, base=base)
        self.settings = settings
        self.format = {".jpg": "jpeg"}.get(place.suffix, place.suffix[1:])

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        task = json.loads(row["picture"])
        if "outcome" in task:  # settled by the reader
            return {"outcome": json.dumps(task["outcome"])}
        outcome = self._restore(_Picture(**task), row["data"])
        return {"outcome": json.dumps(asdict(outcome))}

    def _restore(self, picture: _Picture, data: bytes) -> _Outcome:
        # Ray starts the work of a lost actor again without an end and without counting. A picture
        # on which every actor is lost is known by what they left beside its place.
        target = Path(picture.target)
        tries = target.with_name(f".{target.name}.tries{_PARTIAL}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tries.open("ab") as file:
                lost = file.tell()
                file.write(b".")
        except OSError as error:
            return _failed(picture, "not-written", f"It cannot be written: {reason_of(error)}.")
        try:
            if lost >= MAX_LOST_WORKERS:
                message = f"{lost} workers were lost while they worked on it."
                return _failed(picture, "worker-lost", message)
            return self._try(picture, data)
        finally:
            tries.unlink(missing_ok=True)

    def _try(self, picture: _Picture, data: bytes) -> _Outcome:
        try:
            decoded = decode(data or Path(picture.path).read_bytes())
            restored = restore_picture(
                self.model.network, decoded, self.settings, self.format, codec=self.model.codec
            )
        except BadPicture as error:
            return _failed(picture, error.reason, str(error))
        except TeasrError as error:
            return _failed(picture, "not-encoded", str(error))
        except OSError as error:
            return _failed(picture, "read-error", f"It cannot be read: {reason_of(error)}.")
        try:
            write_bytes(picture.target, restored)
        except TeasrError as error:
            return _failed(picture, "not-written", str(error))
        height, width = decoded.rgb.shape[:2]
        pixels = height * width * self.model.network.scale**2
        return _Outcome(picture.name, picture.target, "done", pixels=pixels)


def _failed(picture: _Picture, reason: str, message: str) -> _Outcome:
    return _Outcome(picture.name, picture.target, "failed", reason, message)


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
