"""The benchmark: figures that follow from the pairs alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.benchmark import benchmark
from pipelines.ingest import ingest
from pipelines.synthesize import synthesize
from teasr.backbones import PRESETS, DualBranchDiT, save_backbone
from teasr.errors import UsageError
from teasr.images import bicubic_upsample, decode, encode
from teasr.metrics import psnr_y
from teasr.shards import join_url, read_manifest, read_shard


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose last layer is still zero: it is bicubic."""
    folder = tmp_path_factory.mktemp("model")
    network = DualBranchDiT(PRESETS["teasr-xs"])
    save_backbone(network.settings, network.state_dict(), folder)
    return folder


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
    in_order = list(expected)
    shown = [picture.key for picture in result.pictures]
    assert shown == sorted([in_order[0], in_order[-1]])
    assert result.pictures[0].restored["2 steps"].shape == result.pictures[0].hr.shape


def test_an_hr_dataset_is_no_benchmark(untrained: Path, pairs: str) -> None:
    with pytest.raises(UsageError, match="pairs"):
        benchmark(untrained, str(Path(pairs).parent / "hr"))


def test_a_folder_without_weights_is_no_model(tmp_path: Path, pairs: str) -> None:
    with pytest.raises(UsageError, match="holds no model"):
        benchmark(tmp_path, pairs)
