"""The benchmark: figures that follow from the pairs alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.benchmark import benchmark
from pipelines.ingest import ingest
from pipelines.synthesize import synthesize
from teasr.errors import TeasrError, UsageError
from teasr.images import bicubic_upsample, decode, encode
from teasr.metrics import psnr_y
from teasr.niqe import niqe
from teasr.shards import (
    Manifest,
    Sample,
    join_url,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., np.ndarray], ray_session: None
) -> str:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        (folder / f"p{i}.png").write_bytes(encode(photo(96, 96, seed=i)))
    target = tmp_path_factory.mktemp("data")
    ingest([str(folder)], str(target / "hr"), shard_size=2)
    synthesize(str(target / "hr"), str(target / "pairs"), copies=2)
    return str(target / "pairs")


def test_figures_are_those_of_the_pairs(untrained: Path, pairs: str) -> None:
    result = benchmark(untrained, pairs, steps=(1, 2), pictures=2)
    manifest = read_manifest(pairs, "pairs")
    expected = {}
    for shard in manifest.shards:
        for sample in read_shard(join_url(pairs, shard.name)):
            hr, lr = (decode(sample.members[f"{side}.png"]).rgb for side in ("hr", "lr"))
            expected[sample.key] = psnr_y(bicubic_upsample(lr), hr)
    scores = result.evaluation.scores
    assert list(scores) == ["bicubic", "1 step", "2 steps"]
    assert list(scores["bicubic"]) == sorted(expected)
    for key, value in expected.items():
        assert scores["bicubic"][key].psnr_y == pytest.approx(value)
        # Untrained, the network is bicubic up to the rounding of two implementations.
        assert scores["1 step"][key].psnr_y == pytest.approx(value, abs=0.1)
        assert scores["1 step"][key].lpips is None
    assert result.evaluation.benchmark == manifest.fingerprint
    # Of a process that has loaded torch and a tiny model.
    peaks = result.evaluation.peak_memory_mb
    assert list(peaks) == list(scores) and all(50 < peak < 3000 for peak in peaks.values())
    assert result.evaluation.machine.endswith(" cores")
    in_order = list(expected)
    shown = [picture.key for picture in result.pictures]
    assert shown == sorted([in_order[0], in_order[-1]])
    picture = result.pictures[0]
    assert decode(picture.restored["2 steps"]).rgb.shape == decode(picture.hr).rgb.shape


def pairs_of(folder: Path, *pictures: np.ndarray) -> str:
    samples = [
        Sample(
            f"p{i}",
            {"hr.png": encode(hr), "lr.png": encode(hr[::4, ::4].copy()), "json": b"{}"},
        )
        for i, hr in enumerate(pictures)
    ]
    info = write_shard(str(folder / "pairs-0.tar"), samples)
    write_manifest(str(folder), Manifest(kind="pairs", shards=(info,)))
    return str(folder)


def test_niqe_is_of_the_restored_picture_and_all_pictures_may_be_shown(
    untrained: Path, tmp_path: Path, photo: Callable[..., np.ndarray], ray_session: None
) -> None:
    pair = pairs_of(tmp_path, photo(112, 208, seed=1), photo(112, 208, seed=2))
    result = benchmark(untrained, pair, steps=(1,), pictures=None)
    assert [picture.key for picture in result.pictures] == ["p0", "p1"]
    for picture in result.pictures:
        expected = niqe(decode(picture.restored["bicubic"]).rgb)
        assert expected is not None
        assert result.evaluation.scores["bicubic"][picture.key].niqe == pytest.approx(expected)
    asked = benchmark(untrained, pair, steps=(1,), pictures=0, metrics=["psnr_y"])
    assert asked.pictures == [] and asked.evaluation.measured() == ["psnr_y", "ssim_y"]


def test_a_picture_too_small_to_measure_is_named(
    untrained: Path, tmp_path: Path, photo: Callable[..., np.ndarray], ray_session: None
) -> None:
    pair = pairs_of(tmp_path, photo(16, 64))
    with pytest.raises(TeasrError, match=r"pair 'p0' of .* has 64 x 16 HR pixels; 19 or more"):
        benchmark(untrained, pair)


def test_wrong_weights_of_a_metric_are_told(untrained: Path, tmp_path: Path, pairs: str) -> None:
    file = tmp_path / "dists.safetensors"
    file.write_bytes(b"none")
    with pytest.raises(TeasrError, match="Cannot read DISTS weights"):
        benchmark(untrained, pairs, dists_weights=file)


def test_an_hr_dataset_is_no_benchmark(untrained: Path, pairs: str) -> None:
    with pytest.raises(UsageError, match="pairs"):
        benchmark(untrained, str(Path(pairs).parent / "hr"))


def test_a_folder_without_weights_is_no_model(tmp_path: Path, pairs: str) -> None:
    with pytest.raises(UsageError, match="holds no model"):
        benchmark(tmp_path, pairs)
