"""Operators: exact where there is a reference value, statistics where there is noise."""

from __future__ import annotations

import io
import math

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.special import ndtri

from teasr.degradation import operators
from teasr.degradation.kernels import build_kernel
from teasr.errors import UsageError


@pytest.fixture
def picture(photo) -> np.ndarray:
    return operators.to_float(photo(64, 80, 1))


KERNELS = [
    ("isotropic", 21, {"sigma_x": 2.9, "sigma_y": 2.9}),
    ("isotropic", 21, {"sigma_x": 0.3, "sigma_y": 0.3}),  # trimmed
    ("anisotropic", 9, {"sigma_x": 2.5, "sigma_y": 0.6, "rotation": 0.7}),  # filtered directly
    ("anisotropic", 21, {"sigma_x": 2.9, "sigma_y": 1.9, "rotation": 1.0}),  # several terms
    ("anisotropic", 21, {"sigma_x": 2.9, "sigma_y": 0.2, "rotation": 0.8}),  # by DFT
    ("plateau_isotropic", 19, {"sigma_x": 1.8, "sigma_y": 1.8, "beta": 1.3}),
    ("sinc", 21, {"cutoff": 1.1}),
]


@pytest.mark.parametrize(("shape", "size", "numbers"), KERNELS)
def test_blur_equals_a_plain_convolution(picture, shape, size, numbers) -> None:
    kernel = build_kernel(shape, size, **numbers)
    half = size // 2
    padded = np.pad(picture.astype(np.float64), ((half, half), (half, half), (0, 0)), "reflect")
    expected = np.zeros(picture.shape)
    for row in range(size):
        for column in range(size):
            window = padded[row : row + picture.shape[0], column : column + picture.shape[1]]
            expected += kernel[row, column] * window
    result = operators.blur(picture, shape, size, **numbers)
    assert result.dtype == np.float32
    # 1/100 of a grey level: the error that the choice of a faster filter may make.
    np.testing.assert_allclose(result, expected, atol=0.01 / 255)


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(16, 20), (50, 33), (90, 100), (64, 80), (1, 1)])
def test_resize_gives_the_size_and_keeps_a_constant(mode: str, size: tuple[int, int]) -> None:
    flat = np.full((64, 80, 3), 0.3, dtype=np.float32)
    result = operators.resize(flat, *size, mode)
    assert result.shape == (*size, 3)
    np.testing.assert_allclose(result, 0.3, atol=1e-5)


def test_area_resize_is_the_mean_of_blocks(picture) -> None:
    result = operators.resize(picture, 16, 20, "area")
    blocks = picture.reshape(16, 4, 20, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(result, blocks, atol=1e-6)


@pytest.mark.parametrize("size", [(41, 29), (13, 80), (64, 7), (91, 133)])
def test_area_resize_is_the_mean_of_every_pixel_that_a_window_touches(picture, size) -> None:
    height, width = size
    expected = np.zeros((height, width, 3))
    for row in range(height):
        for column in range(width):
            top, bottom = row * 64 // height, math.ceil((row + 1) * 64 / height)
            left, right = column * 80 // width, math.ceil((column + 1) * 80 / width)
            expected[row, column] = picture[top:bottom, left:right].mean(axis=(0, 1))
    np.testing.assert_allclose(operators.resize(picture, *size, "area"), expected, atol=1e-6)


def test_unknown_resize_mode_names_the_known_ones(picture) -> None:
    with pytest.raises(UsageError, match=r"'lanczos'.*area, bilinear, bicubic"):
        operators.resize(picture, 8, 8, "lanczos")


GREY = np.full((256, 256, 3), 0.5, dtype=np.float32)


@pytest.mark.parametrize("sigma", [1.0, 12.5, 30.0])
def test_gaussian_noise_has_its_sigma_and_independent_channels(sigma: float) -> None:
    noise = (operators.gaussian_noise(GREY, sigma, False, 5) - GREY) * 255
    assert noise.std() == pytest.approx(sigma, rel=0.01)
    assert abs(noise.mean()) < 4 * sigma / np.sqrt(noise.size)
    # Kurtosis of a normal distribution, from 196608 values: 3 +- 0.011.
    assert ((noise / noise.std()) ** 4).mean() == pytest.approx(3, abs=0.06)
    correlation = np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)
    assert np.abs(correlation).max() < 0.02


@pytest.mark.parametrize("operator", ["gaussian", "poisson"])
def test_grey_noise_is_equal_across_channels(operator: str) -> None:
    ramp = np.indices((64, 64)).sum(0) * 2
    grey = operators.to_float(ramp[..., None].repeat(3, 2).astype(np.uint8))
    noisy = {
        "gaussian": lambda flag: operators.gaussian_noise(grey, 10.0, flag, 3),
        "poisson": lambda flag: operators.poisson_noise(grey, 1.0, flag, 3),
    }[operator]
    shared, coloured = noisy(True), noisy(False)
    assert np.ptp(shared, axis=2).max() < 1e-6
    assert np.ptp(coloured, axis=2).mean() > 0.005
    assert not np.array_equal(shared, grey)


def test_grey_poisson_noise_of_a_colour_picture_adds_one_value_to_a_pixel() -> None:
    colours = np.empty((64, 64, 3), dtype=np.float32)
    colours[:] = (0.3, 0.5, 0.6)
    noise = operators.poisson_noise(colours, 0.05, True, 2) - colours
    assert noise.std() > 0.001
    assert np.ptp(noise, axis=2).max() < 1e-6


def all_levels(value: int) -> np.ndarray:
    """A picture of one value, with a strip that holds every one of the 256 levels."""
    picture = np.full((257, 256, 3), value, dtype=np.uint8)
    picture[-1] = np.arange(256, dtype=np.uint8)[:, None]
    return operators.to_float(picture)


@pytest.mark.parametrize("value", [2, 10, 15, 16, 17, 40, 128])
def test_poisson_noise_is_poisson(value: int) -> None:
    """Mean, variance and third moment of a count, on both sides of the expansion's bound."""
    image = all_levels(value)
    noisy = [operators.poisson_noise(image, 1.0, False, seed)[:-1] for seed in range(8)]
    count = np.stack(noisy).astype(np.float64) * 256  # 256 distinct levels: one is 1/256
    mean = value * 256 / 255
    assert np.abs(count - np.rint(count)).max() < 1e-2  # counts are whole numbers
    deviation = count - mean
    assert deviation.mean() == pytest.approx(0, abs=5 * np.sqrt(mean / count.size))
    assert deviation.var() == pytest.approx(mean, rel=0.005)  # the estimate's own error is 0.0012
    assert (deviation**3).mean() == pytest.approx(mean, abs=0.1 * mean**1.5)


def test_poisson_strength_follows_the_number_of_distinct_levels() -> None:
    """Variance is mean / levels: three levels count as four, so noise is coarser than with 256."""
    few = np.full((128, 128, 3), 0.4, dtype=np.float32)
    few[0, :64], few[0, 64:] = 0.2, 0.8
    noise = operators.poisson_noise(few, 0.5, False, 1)[1:] - few[1:]
    assert noise.std() == pytest.approx(0.5 * np.sqrt(0.4 / 4), rel=0.03)


def test_poisson_scale_zero_changes_nothing(picture) -> None:
    np.testing.assert_array_equal(operators.poisson_noise(picture, 0.0, False, 1), picture)


def test_noise_is_its_seed() -> None:
    once = operators.gaussian_noise(GREY, 5.0, False, 2**53 - 1)
    np.testing.assert_array_equal(once, operators.gaussian_noise(GREY, 5.0, False, 2**53 - 1))
    assert not np.array_equal(once, operators.gaussian_noise(GREY, 5.0, False, 0))


def test_noise_reads_the_bits_of_sfc64_in_one_order_on_every_machine() -> None:
    words = [int(word) for word in np.random.SFC64(7).random_raw(3)]
    uniform = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    quantiles = ndtri((np.array(uniform) + 0.5) / 65536).reshape(2, 2, 3)
    image = np.full((2, 2, 3), 0.5, dtype=np.float32)
    noise = operators.gaussian_noise(image, 1.0, False, 7) - image
    np.testing.assert_allclose(noise * 255, quantiles, atol=1e-3)


def test_noise_clips_to_the_range_of_a_picture(picture) -> None:
    for noisy in (
        operators.gaussian_noise(picture, 200.0, False, 1),
        operators.poisson_noise(picture, 50.0, True, 1),
    ):
        assert noisy.min() == 0 and noisy.max() == 1


def test_jpeg_keeps_colours_in_order_and_loses_more_at_low_quality(picture) -> None:
    red = np.zeros((32, 32, 3), dtype=np.float32)
    red[..., 0] = 1
    np.testing.assert_allclose(operators.jpeg(red, 95).mean(axis=(0, 1)), (1, 0, 0), atol=0.02)
    errors = [np.abs(operators.jpeg(picture, quality) - picture).mean() for quality in (95, 60, 20)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_jpeg_is_an_ordinary_420_jpeg(photo) -> None:
    """Against Pillow: red and blue swapped on both sides, or 4:4:4, would show in the chroma."""
    colours = photo(64, 64, 2)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "JPEG", quality=50, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer)).astype(float)
    result = operators.jpeg(operators.to_float(colours), 50) * 255
    assert np.abs(result - expected).mean() < 0.5


def test_colour_jitter_adds_to_each_channel_and_clips(picture) -> None:
    shifted = operators.colour_jitter(picture, [-20.0, 0.0, 12.5])
    assert shifted.dtype == np.float32
    expected = (picture * 255 + [-20.0, 0.0, 12.5]).clip(0, 255)
    np.testing.assert_allclose(shifted * 255, expected, atol=1e-3)
    with pytest.raises(UsageError, match="2 shifts"):
        operators.colour_jitter(picture, [1.0, 2.0])


def test_greyscale_is_the_luma_in_every_channel(picture) -> None:
    grey = operators.greyscale(picture)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey, luma[..., None].repeat(3, axis=2), atol=1e-6)


def test_rounding_to_bytes() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(operators.to_uint8(operators.to_float(levels)), levels)
    outside = np.array([[[-0.2, 1.3, 0.4999]]], dtype=np.float32)
    assert operators.to_uint8(outside).tolist() == [[[0, 255, 127]]]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float64),
    ],
)
def test_what_is_no_rgb_picture_is_refused(image: np.ndarray) -> None:
    with pytest.raises(UsageError, match="cannot be degraded"):
        operators.to_float(image)


def test_unsharp_mask_sharpens_edges_and_leaves_flat_parts() -> None:
    edge = np.full((128, 256, 3), 0.3, dtype=np.float32)
    edge[:, 128:] = 0.7
    edge = cv2.GaussianBlur(edge, (0, 0), 2)
    sharp = operators.unsharp_mask(edge)
    steepness = [np.abs(np.diff(image, axis=1)).max() for image in (edge, sharp)]
    assert steepness[1] > 1.2 * steepness[0]
    np.testing.assert_allclose(sharp[:, :60], 0.3, atol=1e-4)
    faint = 0.5 + 0.02 * (edge - 0.5)  # below the threshold of 10 grey levels
    np.testing.assert_array_equal(operators.unsharp_mask(faint), faint)
