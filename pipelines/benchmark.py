"""Measure a model on a frozen benchmark: pair shards in, figures per picture out.

A picture's figures depend on the model, the pair and the number of steps alone, so any number of
workers gives the same evaluation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from numpy.typing import NDArray

from pipelines.runtime import ensure_ray, quiet_ray_data
from teasr.backbones import DualBranchDiT, load_backbone
from teasr.errors import TeasrError
from teasr.evaluation import BICUBIC, Evaluation, system_name
from teasr.images import bicubic_upsample, decode, encode
from teasr.lpips import Lpips
from teasr.metrics import Scores, score
from teasr.restoration import RestorationSettings, restore
from teasr.shards import Manifest, join_url, read_manifest, read_shard

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Comparison:
    """One picture by every system, for picture sheets: uint8 RGB arrays."""

    key: str
    lr: Bytes
    restored: dict[str, Bytes]
    hr: Bytes


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
    lpips_weights: Path | None = None,
    pictures: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> BenchmarkResult:
    """Restore every LR picture of `pairs` by bicubic and by the model, and score it against HR.

    Args:
        model: folder of weights.
        pairs: URL of a pair dataset.
        steps: numbers of sampling steps to measure.
        settings: how to restore; `steps` is overridden.
        lpips_weights: file of LPIPS weights; None leaves that metric unmeasured.
        pictures: how many comparisons to return, spread over the dataset.
        progress: called as (pictures done, pictures).

    Raises:
        UsageError: when there is no pair dataset or no model.
        TeasrError: when a shard is damaged, or there is no pair to measure on.
    """
    manifest = read_manifest(pairs, kind="pairs")
    load_backbone(model)  # a wrong model is told here, not by a task
    ensure_ray()
    chosen = {round(i * (manifest.samples - 1) / max(pictures - 1, 1)) for i in range(pictures)}
    with quiet_ray_data():
        rows = ray.data.from_items(
            [
                {"shard": join_url(pairs, shard.name), "first": first}
                for shard, first in zip(manifest.shards, _firsts(manifest))
            ],
            override_num_blocks=len(manifest.shards),
        )
        scored = (
            rows.flat_map(_read, num_cpus=0.1)
            .repartition(target_num_rows_per_block=1)
            .map(
                _Scorer(
                    model,
                    tuple(steps),
                    settings or RestorationSettings(),
                    lpips_weights,
                    frozenset(chosen),
                ),
                num_cpus=1,
            )
        )
        results: list[dict[str, Any]] = []
        for row in scored.iter_rows():
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
class _Scorer:
    """Scores one pair by every system; travels to Ray's tasks."""

    model: Path
    steps: tuple[int, ...]
    settings: RestorationSettings
    lpips: Path | None
    shown: frozenset[int]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        hr, lr = decode(row["hr"]).rgb, decode(row["lr"]).rgb
        lpips = _lpips_of_this_process(self.lpips) if self.lpips else None
        figures: dict[str, Any] = {}
        pictures: dict[str, bytes] = {}
        for system, restored, seconds in self._systems(lr):
            scores = score(restored, hr, lpips)
            figures[system] = {"scores": vars(scores), "seconds": seconds}
            pictures[system] = encode(restored) if row["index"] in self.shown else b""
        megapixels = hr.shape[0] * hr.shape[1] / 1e6
        document = json.dumps({"systems": figures, "megapixels": megapixels})
        return {**row, **pictures, "figures": document}

    def _systems(self, lr: Bytes) -> Iterator[tuple[str, Bytes, float]]:
        network = _network_of_this_process(self.model)
        begin = time.perf_counter()
        yield BICUBIC, bicubic_upsample(lr, network.scale), time.perf_counter() - begin
        for steps in self.steps:
            settings = self.settings.model_copy(update={"steps": steps})
            begin = time.perf_counter()
            restored = restore(network, lr, settings)
            yield system_name(steps), restored, time.perf_counter() - begin


@lru_cache(maxsize=1)
def _network_of_this_process(model: Path) -> DualBranchDiT:
    """The network, loaded once per Ray worker and kept for its next tasks; one thread each."""
    torch.set_num_threads(1)
    return load_backbone(model)


@lru_cache(maxsize=1)
def _lpips_of_this_process(weights: Path) -> Lpips:
    return Lpips.load(weights)


def _collect(benchmark: str, rows: list[dict[str, Any]]) -> Evaluation:
    scores: dict[str, dict[str, Scores]] = {}
    seconds: dict[str, float] = {}
    megapixels = 0.0
    for row in rows:
        figures = json.loads(row["figures"])
        megapixels += figures["megapixels"]
        for system, figure in figures["systems"].items():
            scores.setdefault(system, {})[row["key"]] = Scores(**figure["scores"])
            seconds[system] = seconds.get(system, 0.0) + figure["seconds"]
    rates = {system: total / megapixels for system, total in seconds.items()}
    return Evaluation(benchmark, scores, rates)


def _comparison(row: dict[str, Any]) -> Comparison:
    systems = json.loads(row["figures"])["systems"]
    return Comparison(
        key=row["key"],
        lr=decode(row["lr"]).rgb,
        restored={system: decode(row[system]).rgb for system in systems},
        hr=decode(row["hr"]).rgb,
    )
