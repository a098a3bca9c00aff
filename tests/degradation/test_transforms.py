"""The albumentations transforms: repeatable, serialisable, and equal to `Degradation`."""

from __future__ import annotations

import json
from pathlib import Path

import albumentations as A
import numpy as np
import pytest

from teasr.degradation import (
    PRESETS,
    ColourDegradation,
    Degradation,
    JPEGCompression,
    RandomResize,
    RealESRGAN,
    RealESRGANBlur,
    RealESRGANNoise,
    replay,
    sample_seed,
)
from teasr.errors import UsageError

TRANSFORMS = {
    "blur": lambda: RealESRGANBlur(sigma_range=(0.5, 1.5), sinc_probability=0.3),
    "resize": lambda: RandomResize(scale_range=(0.4, 1.3)),
    "noise": lambda: RealESRGANNoise(gaussian_sigma_range=(2, 20), p=0.9),
    "jpeg": lambda: JPEGCompression(quality_range=(20, 40)),
    "colour": lambda: ColourDegradation(jitter_probability=0.9, grey_probability=0.3),
    "all": lambda: RealESRGAN("realesrgan"),
    "own": lambda: RealESRGAN(
        PRESETS["teasr"].model_dump()
        | {"name": "own", "sharpen_ground_truth": True, "colour": {"jitter_probability": 0.5}}
    ),
}


def run(compose: A.Compose, image: np.ndarray, count: int = 4) -> list[bytes]:
    return [compose(image=image)["image"].tobytes() for _ in range(count)]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_equal_seeds_give_equal_bytes(photo, name: str) -> None:
    image = photo(64, 64, 7)
    compose = A.Compose([TRANSFORMS[name]()])
    compose.set_random_seed(3)
    first = run(compose, image)
    compose.set_random_seed(3)
    assert run(compose, image) == first
    compose.set_random_seed(4)
    assert run(compose, image) != first
    assert len(set(first)) > 1  # a stream of degradations, not one repeated


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_survives_serialisation(photo, name: str) -> None:
    image = photo(64, 64, 8)
    compose = A.Compose([TRANSFORMS[name]()])
    again = A.from_dict(json.loads(json.dumps(A.to_dict(compose))))
    assert again[0].settings == compose[0].settings
    assert again[0].p == compose[0].p
    for side in (compose, again):
        side.set_random_seed(11)
    assert run(again, image) == run(compose, image)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_replay_compose_replays(photo, name: str) -> None:
    image = photo(64, 64, 9)
    compose = A.ReplayCompose([TRANSFORMS[name]()])
    for _ in range(4):
        result = compose(image=image)
        saved = json.loads(json.dumps(result["replay"]))
        repeated = A.ReplayCompose.replay(saved, image=image)["image"]
        np.testing.assert_array_equal(repeated, result["image"])


def test_the_whole_transform_equals_degradation(photo) -> None:
    image = photo(64, 64, 10)
    transform = RealESRGAN("teasr")
    for variant in range(6):
        pair = Degradation("teasr", seed=2)(image, "k", variant)
        transform.set_random_seed(sample_seed(2, "teasr", "k", variant))
        np.testing.assert_array_equal(transform(image=image)["image"], pair.lr)
        assert transform.get_applied_params()["steps"] == pair.recipe["steps"]


def test_float_pictures_stay_float_in_range_and_agree_with_bytes(photo) -> None:
    image = photo(64, 64, 11)
    for make in TRANSFORMS.values():
        transform = make()
        transform.set_random_seed(1)
        of_bytes = transform(image=image)["image"]
        transform.set_random_seed(1)
        of_floats = transform(image=(image / 255).astype(np.float32))["image"]
        assert of_bytes.dtype == np.uint8 and of_floats.dtype == np.float32
        assert of_floats.min() >= 0 and of_floats.max() <= 1
        # Half a level of rounding; a value on the edge of a JPEG rounding may go either way.
        assert np.abs(of_floats * 255 - of_bytes).mean() < 0.5


def test_a_preset_of_ones_own_survives_its_file(photo, tmp_path: Path) -> None:
    path = tmp_path / "faces.yaml"
    path.write_text(
        "extends: teasr\nsharpen_ground_truth: true\n"
        "colour: {jitter_probability: 0.3, grey_probability: 0.5}\n"
    )
    image = photo(64, 64, 12)
    compose = A.Compose([RealESRGAN(path)])
    saved = json.loads(json.dumps(A.to_dict(compose)))
    degrade = Degradation(path, seed=3)
    path.unlink()
    again = A.from_dict(saved)
    for side in (compose, again):
        side.set_random_seed(2)
    assert run(again, image) == run(compose, image)
    names = [step["operator"] for step in again[0].get_applied_params()["steps"]]
    assert names[0] == "unsharp_mask"
    pairs = [degrade(image, "k", variant) for variant in range(8)]
    assert all(replay(pair.hr, pair.recipe).tobytes() == pair.lr.tobytes() for pair in pairs)
    assert {pair.recipe["steps"][-1]["operator"] for pair in pairs} > {"greyscale"}


def test_it_composes_with_albumentations_own(photo) -> None:
    compose = A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(), RealESRGAN("teasr")], seed=5)
    assert compose(image=photo(64, 64))["image"].shape == (8, 8, 3)


def test_the_factor_of_a_resize_is_in_its_range(photo) -> None:
    transform = RandomResize(scale_range=(0.5, 1.25))
    widths = [transform(image=photo(40, 40))["image"].shape[1] for _ in range(60)]
    assert 20 <= min(widths) < 30 and 40 < max(widths) <= 50


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UsageError, match=r"RealESRGANBlur: .*'sigma_rnge'.*'sigma_range'"):
        RealESRGANBlur(sigma_rnge=(1, 2))
    with pytest.raises(UsageError, match=r"ColourDegradation: .*'jitter_shift'"):
        ColourDegradation(jitter_shift=300)
    with pytest.raises(UsageError, match=r"JPEGCompression: 'quality_range'"):
        JPEGCompression(quality_range=(0, 101))
    with pytest.raises(UsageError, match="Accepted: realesrgan, teasr"):
        RealESRGAN("bsrgan")


def test_an_odd_size_is_refused_by_the_whole_transform(photo) -> None:
    with pytest.raises(UsageError, match="multiples of 4"):
        RealESRGAN()(image=photo(63, 64))
