"""Whole degradations against BasicSR's: two programs, each drawing by itself, one distribution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp

from teasr.degradation import PRESETS, Degradation
from tests.reference.basicsr import BasicSR

CROP = 128
COUNT = 1000
LUMA = np.array([0.299, 0.587, 0.114])
MEASURES = ("psnr", "noise", "sharpness")


@functools.cache
def crops(count: int, seed: int) -> list[np.ndarray]:
    """Textures with the spectrum of photographs, cut by edges of other colours, uint8 RGB."""
    return list(_crops(count, seed))


def _crops(count: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:CROP, :CROP]
    frequency = np.hypot(np.fft.fftfreq(CROP)[:, None], np.fft.fftfreq(CROP))
    frequency[0, 0] = 1 / CROP
    for _ in range(count):
        spectrum = np.fft.fft2(random.normal(size=(3, CROP, CROP)))
        texture = np.fft.ifft2(spectrum / frequency ** random.uniform(1, 1.5)).real
        texture /= texture.std()
        image = random.uniform(5, 45) * texture[:1] + 5 * texture  # little of it is chroma
        for _ in range(random.integers(1, 5)):
            angle, (row, column) = random.uniform(0, 2 * np.pi), random.uniform(0, CROP, 2)
            beyond = (rows - row) * np.sin(angle) + (columns - column) * np.cos(angle) > 0
            colour = random.normal(0, 40) + random.normal(0, 12, (3, 1, 1))
            image = image + colour * beyond
        image += random.normal(128, 25) - image.mean()
        yield image.transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8)


def measure(hr: np.ndarray, lr: np.ndarray) -> tuple[float, float, float]:
    """PSNR against the bicubic LR picture (dB); noise sigma (levels); variance of the Laplacian.

    All of luma: libjpeg interpolates chroma where the reference's JPEG repeats it, which is worth
    0.1 to 0.3 dB in RGB (`test_parity.py` takes that apart).
    """
    height, width = lr.shape[:2]
    bicubic = np.asarray(Image.fromarray(hr).resize((width, height), Image.Resampling.BICUBIC))
    grey = lr @ LUMA
    psnr = 10 * np.log10(255**2 / ((bicubic @ LUMA - grey) ** 2).mean())
    # The diagonal of the Haar transform holds little of a picture: its median is the noise's.
    diagonal = (grey[:-1, :-1] - grey[1:, :-1] - grey[:-1, 1:] + grey[1:, 1:]) / 2
    noise = np.median(np.abs(diagonal)) / 0.6745
    return psnr, noise, cv2.Laplacian(grey, cv2.CV_64F).var()


def measures(degrade: Callable[[np.ndarray, int], np.ndarray], count: int, seed: int) -> np.ndarray:
    """`MEASURES` of `count` crops, `(count, 3)`."""
    return np.array([measure(hr, degrade(hr, i)) for i, hr in enumerate(crops(count, seed))])


def compare(reference: BasicSR, preset: str, count: int, seed: int) -> dict[str, float]:
    """The p value of each measure: two-sample Kolmogorov-Smirnov, on crops that are not shared.

    The reference's first resize drifts (`test_parity.py`), which costs it about 0.1 dB.
    """
    own = Degradation(preset, seed)
    ours = measures(lambda hr, index: own(hr, str(index)).lr, count, 2 * seed)
    theirs = measures(
        lambda hr, index: reference.random_degrade(hr, preset, seed * count + index),
        count,
        2 * seed + 1,
    )
    return {
        name: float(ks_2samp(ours[:, column], theirs[:, column]).pvalue)
        for column, name in enumerate(MEASURES)
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_recipes_cost_equally_much(reference: BasicSR, preset: str) -> None:
    """The same crops by the same drawn parameters: means of paired differences, all but bias-free.

    OpenCV's area mode in the place of the reference's, for one, would sharpen by a tenth.
    """
    own = Degradation(preset, seed=11)
    pairs = [(hr, own(hr, str(i))) for i, hr in enumerate(crops(150, seed=5))]
    ours = np.array([measure(hr, pair.lr) for hr, pair in pairs])
    theirs = np.array(
        [measure(hr, reference.degrade(hr, pair.recipe["steps"])) for hr, pair in pairs]
    )
    psnr = ours[:, 0] - theirs[:, 0]
    sharpness = np.log(ours[:, 2] / theirs[:, 2])
    assert abs(psnr.mean()) < 0.12  # dB; its standard error is 0.04
    assert abs(sharpness.mean()) < 0.05  # 0.014
    assert abs((ours - theirs)[:, 1].mean()) < 0.15  # levels; 0.05


@pytest.mark.journey
@pytest.mark.parametrize("preset", PRESETS)
def test_degraded_pictures_are_distributed_as_the_references(
    reference: BasicSR, preset: str
) -> None:
    values = compare(reference, preset, COUNT, seed=0)
    assert all(value > 0.01 for value in values.values()), values
