"""NIQE: the published figures, and none where none can be had."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from teasr.backbones import built_in_models
from teasr.images import bicubic_upsample
from teasr.niqe import _pristine, niqe
from tests.reference import basicsr

Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """BasicSR's module; skips where pip cannot fetch it."""
    pytest.importorskip("scipy")
    try:
        return basicsr.load_niqe(tmp_path_factory.mktemp("niqe"))
    except basicsr.UnavailableError as error:
        pytest.skip(f"BasicSR is not at hand: {error}")


def cloud(height: int = 300, width: int = 420, seed: int = 0) -> Picture:
    """Structure at all scales, as photographs have, uint8 (H, W, 3)."""
    random = np.random.default_rng(seed)
    total = random.normal(0, 4, (height, width, 3)).astype(np.float32)
    for cells in (3, 8, 20, 60):
        coarse = random.normal(0, 40 / cells**0.4, (cells, cells, 3)).astype(np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (128 + total).clip(0, 255).astype(np.uint8)


def with_flat_parts() -> Picture:
    picture = cloud(seed=1)
    picture[:150], picture[:, :60] = 255, 0
    return picture


def jpeg() -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(cloud(seed=2)).save(buffer, "JPEG", quality=20)
    return np.asarray(Image.open(buffer))


def sample(number: int) -> Callable[[], Picture]:
    """A real photograph of 427x640 pixels, of those that come with scikit-learn."""

    def load() -> Picture:
        datasets = pytest.importorskip("sklearn.datasets")
        return datasets.load_sample_images().images[number]

    return load


PICTURES: dict[str, Callable[[], Picture]] = {
    "photograph of a building": sample(0),
    "photograph of a flower": sample(1),
    "enlarged photograph": lambda: bicubic_upsample(
        cv2.resize(sample(0)(), None, fx=0.25, fy=0.25)
    ),
    "cloud": cloud,
    "two blocks": lambda: cloud(105, 203, seed=3),
    "strong JPEG": jpeg,
    "flat parts": with_flat_parts,
    "noise": lambda: np.random.default_rng(0).integers(0, 256, (210, 330, 3), np.uint8),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # means of nothing, in the reference
def test_equals_the_published_implementation(kind: str, reference: ModuleType) -> None:
    picture = PICTURES[kind]()
    expected = reference.calculate_niqe(np.ascontiguousarray(picture[..., ::-1]), crop_border=4)
    assert niqe(picture) == pytest.approx(expected, rel=1e-3)


def test_the_pristine_model_is_the_published_one(reference: ModuleType) -> None:
    published = np.load(Path(reference.__file__ or "").with_name("niqe_pris_params.npz"))
    mean, covariance = _pristine()
    np.testing.assert_array_equal(mean, published["mu_pris_param"][0])
    np.testing.assert_array_equal(covariance, published["cov_pris_param"])


def test_damage_raises_it() -> None:
    picture = sample(0)()
    noisy = picture + np.random.default_rng(0).normal(0, 30, picture.shape)
    blurred = cv2.GaussianBlur(picture, (0, 0), 3)
    clean = niqe(picture)
    assert clean is not None and 3 < clean < 5
    for damaged in (noisy.clip(0, 255).astype(np.uint8), blurred):
        assert (niqe(damaged) or 0) > clean + 1


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((1, 1, 3), np.uint8),
        np.zeros((8, 300, 3), np.uint8),
        cloud(199, 103),
        cloud(103, 999),
        cloud(199, 199),
        np.full((300, 300, 3), 77, np.uint8),
        np.tile(np.arange(300, dtype=np.uint8)[:, None, None], (1, 300, 3)),
    ],
    ids=[
        "a pixel",
        "border alone",
        "one column short",
        "one row short",
        "one block",
        "grey",
        "ramp",
    ],
)
def test_what_has_no_two_blocks_of_texture_is_not_measured(picture: Picture) -> None:
    assert niqe(picture) is None


def test_the_border_is_cut() -> None:
    picture = cloud(204, 300)
    framed = picture.copy()
    framed[:4], framed[:, :4], framed[196:], framed[:, 292:] = 0, 255, 0, 255
    assert niqe(framed) == niqe(picture)
    assert niqe(framed, border=3) != niqe(picture, border=3)


def test_its_folder_is_no_built_in_model() -> None:
    assert "niqe" not in built_in_models()
