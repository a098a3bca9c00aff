"""Measure a model on a frozen benchmark: pair shards in, figures per picture out.

A picture's figures depend on the model, the pair and the number of steps alone, so any number of
workers gives the same evaluation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from numpy.typing import NDArray

from pipelines.runtime import ensure_ray, quiet_ray_data
from teasr.backbones import Model, load_model, named_base
from teasr.dists import Dists
from teasr.errors import TeasrError
from teasr.evaluation import BICUBIC, DEFAULT_METRICS, Evaluation, system_name
from teasr.images import bicubic_upsample, decode, encode
from teasr.lpips import Lpips
from teasr.machine import machine_name, peak_memory_mb, restart_peak_memory
from teasr.metrics import Scores, score
from teasr.no_reference import PYIQA, Measure, measure
from teasr.restoration import RestorationSettings, restore
from teasr.shards import Manifest, absolute_url, join_url, read_manifest, read_shard

Bytes = NDArray[np.uint8]

SMALLEST = 19
"""Pixels a side that PSNR and SSIM need: a window of 11 inside a border of 4."""


@dataclass(frozen=True)
class Comparison:
    """One picture by every system, to look at: PNG files, so that many of them fit in memory."""

    key: str
    lr: bytes
    restored: dict[str, bytes]
    hr: bytes


@dataclass
class BenchmarkResult:
    """Figures of all pictures, and some pictures to look at."""

    evaluation: Evaluation
    pictures: list[Comparison] = field(default_factory=list)


def benchmark(
    model: Path,
    pairs: str,
    *,
    steps: Sequence[int] = (1, 4),
    settings: RestorationSettings | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    lpips_weights: Path | None = None,
    dists_weights: Path | None = None,
    pictures: int | None = 4,
    progress: Callable[[int, int], None] | None = None,
) -> BenchmarkResult:
    """Restore every LR picture of `pairs` by bicubic and by the model, and score it against HR.

    Args:
        model: folder of weights.
        pairs: URL of a pair dataset.
        steps: numbers of sampling steps to measure.
        settings: how to restore; `steps` is overridden.
        metrics: names in `teasr.evaluation.METRICS`; PSNR and SSIM are measured in any case.
        lpips_weights, dists_weights: files; None leaves that metric unmeasured.
        pictures: how many comparisons to return, spread over the dataset; None for all.
        progress: called as (pictures done, pictures).

    Raises:
        UsageError: when there is no pair dataset or no model.
        TeasrError: when a shard or a file of weights is damaged, or there is no pair to measure on,
            or one is too small.
    """
    manifest = read_manifest(pairs, kind="pairs")
    measures = _Measures(
        lpips_weights if "lpips" in metrics else None,
        dists_weights if "dists" in metrics else None,
        tuple(name for name in ("niqe", *PYIQA) if name in metrics),
    )
    # What is wrong with a model is told here, not by a task.
    load_model(model)
    measures.load()
    ensure_ray()
    count = manifest.samples if pictures is None else min(pictures, manifest.samples)
    chosen = {round(i * (manifest.samples - 1) / max(count - 1, 1)) for i in range(count)}
    with quiet_ray_data():
        rows = ray.data.from_items(
            [
                {"shard": join_url(absolute_url(pairs), shard.name), "first": first}
                for shard, first in zip(manifest.shards, _firsts(manifest))
            ],
            override_num_blocks=len(manifest.shards),
        )
        scored = (
            rows.flat_map(_read, num_cpus=0.1)
            .repartition(target_num_rows_per_block=1)
            .map(
                _Scorer(
                    model.absolute(),
                    named_base(),
                    tuple(steps),
                    settings or RestorationSettings(),
                    measures,
                    frozenset(chosen),
                ),
                num_cpus=1,
            )
        )
        results: list[dict[str, Any]] = []
        for row in scored.iter_rows():
            if size := json.loads(row["figures"]).get("too_small"):
                raise TeasrError(
                    f"The pair '{row['key']}' of {pairs} has {size} HR pixels; {SMALLEST} or more "
                    "a side can be measured.",
                    "Make the benchmark of larger pictures (teasr ingest --min-side).",
                )
            results.append(row)
            if progress:
                progress(len(results), manifest.samples)
    if not results:
        raise TeasrError(f"{pairs} holds no pairs to measure on.")
    results.sort(key=lambda row: row["key"])
    return BenchmarkResult(
        _collect(manifest.fingerprint, results),
        [_comparison(row) for row in results if row["index"] in chosen],
    )


def _firsts(manifest: Manifest) -> Iterator[int]:
    """Index of each shard's first pair in the dataset."""
    return accumulate((shard.samples for shard in manifest.shards), initial=0)


def _read(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "index": row["first"] + i,
            "key": sample.key,
            "hr": sample.members["hr.png"],
            "lr": sample.members["lr.png"],
        }
        for i, sample in enumerate(read_shard(row["shard"], kind="pairs"))
    ]


@dataclass(frozen=True)
class _Measures:
    """What is measured beside PSNR and SSIM; travels to Ray's tasks by name."""

    lpips: Path | None
    dists: Path | None
    no_reference: tuple[str, ...]

    def load(self) -> tuple[Lpips | None, Dists | None, dict[str, Measure]]:
        """The networks, loaded once per process."""
        return _measures_of_this_process(self)


@dataclass(frozen=True)
class _Scorer:
    """Scores one pair by every system; travels to Ray's tasks."""

    model: Path
    base: Path | None
    steps: tuple[int, ...]
    settings: RestorationSettings
    measures: _Measures
    shown: frozenset[int]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        hr, lr = decode(row["hr"]).rgb, decode(row["lr"]).rgb
        if min(hr.shape[:2]) < SMALLEST:
            # Told by the caller: an error of a task arrives wrapped in Ray's.
            return {**row, "figures": json.dumps({"too_small": f"{hr.shape[1]} x {hr.shape[0]}"})}
        figures: dict[str, Any] = {}
        pictures: dict[str, bytes] = {}
        for system, restored, seconds, peak_mb in self._systems(lr):
            scores = score(restored, hr, *self.measures.load())
            figures[system] = {"scores": vars(scores), "seconds": seconds, "peak_mb": peak_mb}
            pictures[system] = encode(restored) if row["index"] in self.shown else b""
        document = {
            "systems": figures,
            "megapixels": hr.shape[0] * hr.shape[1] / 1e6,
            "machine": machine_name(self._device),
        }
        return {**row, **pictures, "figures": json.dumps(document)}

    @property
    def _device(self) -> torch.device:
        model = _model_of_this_process(self.model, self.base)
        return next(model.network.parameters()).device

    def _systems(self, lr: Bytes) -> Iterator[tuple[str, Bytes, float, float]]:
        """Each system's name and result, the seconds that it took and the peak of memory."""
        model = _model_of_this_process(self.model, self.base)

        def measured(system: str, work: Callable[[], Bytes]) -> tuple[str, Bytes, float, float]:
            restart_peak_memory(self._device)
            begin = time.perf_counter()
            restored = work()
            return system, restored, time.perf_counter() - begin, peak_memory_mb(self._device)

        yield measured(BICUBIC, lambda: bicubic_upsample(lr, model.network.scale))
        for steps in self.steps:
            settings = self.settings.model_copy(update={"steps": steps})
            yield measured(
                system_name(steps),
                partial(restore, model.network, lr, settings, codec=model.codec),
            )


@lru_cache(maxsize=1)
def _model_of_this_process(model: Path, base: Path | None) -> Model:
    """The model, loaded once per Ray worker and kept for its next tasks; one thread each."""
    torch.set_num_threads(1)
    return load_model(model, base=base)


@lru_cache(maxsize=1)
def _measures_of_this_process(
    measures: _Measures,
) -> tuple[Lpips | None, Dists | None, dict[str, Measure]]:
    return (
        Lpips.load(measures.lpips) if measures.lpips else None,
        Dists.load(measures.dists) if measures.dists else None,
        {name: measure(name) for name in measures.no_reference},
    )


def _collect(benchmark: str, rows: list[dict[str, Any]]) -> Evaluation:
    scores: dict[str, dict[str, Scores]] = {}
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    machines: set[str] = set()
    megapixels = 0.0
    for row in rows:
        figures = json.loads(row["figures"])
        megapixels += figures["megapixels"]
        machines.add(figures["machine"])
        for system, figure in figures["systems"].items():
            scores.setdefault(system, {})[row["key"]] = Scores(**figure["scores"])
            seconds[system] = seconds.get(system, 0.0) + figure["seconds"]
            peaks[system] = max(peaks.get(system, 0.0), figure["peak_mb"])
    rates = {system: total / megapixels for system, total in seconds.items()}
    return Evaluation(benchmark, scores, rates, peaks, "; ".join(sorted(machines)))


def _comparison(row: dict[str, Any]) -> Comparison:
    restored = {system: row[system] for system in json.loads(row["figures"])["systems"]}
    return Comparison(row["key"], row["lr"], restored, row["hr"])
