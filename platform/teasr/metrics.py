"""Figures of a picture by the field's conventions, and how far they can be trusted.

Pictures are uint8 (H, W, 3) RGB. PSNR and SSIM are taken on the luma channel with a border cut off,
as in the published tables; the border equals the scale, 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from teasr.dists import Dists
    from teasr.lpips import Lpips

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

_WINDOW = 11
_SIGMA = 1.5


@dataclass
class Scores:
    """Figures of one restored picture; None is not measured.

    Attributes:
        psnr_y: dB, higher is better; `inf` for equal pictures.
        ssim_y: at most 1, higher is better.
        lpips, dists: distances from the original, lower is better.
        niqe: of the restored picture alone, as all that follow; lower is better.
        musiq, maniqa, clipiqa: by pyiqa, higher is better.
    """

    psnr_y: float
    ssim_y: float
    lpips: float | None = None
    dists: float | None = None
    niqe: float | None = None
    musiq: float | None = None
    maniqa: float | None = None
    clipiqa: float | None = None


@dataclass
class Difference:
    """Mean of candidate minus champion over the same pictures, with its confidence interval."""

    mean: float
    low: float
    high: float


def luma(rgb: Bytes) -> Floats:
    """Y of uint8 (..., 3) RGB as float64 in [16, 235], unrounded.

    ITU-R BT.601 studio range, as MATLAB's `rgb2ycbcr` and BasicSR's `to_y_channel`:
    Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255.

    Raises:
        ValueError: when `rgb` is not uint8 (..., 3).
    """
    if rgb.dtype != np.uint8 or rgb.shape[-1:] != (3,):
        raise ValueError(f"uint8 (..., 3) RGB expected, {rgb.dtype} {rgb.shape} given")
    weighted: Floats = rgb @ (np.array([65.481, 128.553, 24.966]) / 255)
    return 16 + weighted


def psnr_y(restored: Bytes, original: Bytes, border: int = 4) -> float:
    """10 log10(255^2 / MSE) on luma, in dB, `border` pixels cut from each side; `inf` when equal.

    As BasicSR's `calculate_psnr(crop_border=border, test_y_channel=True)`.

    Raises:
        ValueError: when the shapes differ or nothing is left inside the border.
    """
    first, second = _luma_pair(restored, original, border, smallest=1)
    error = float(np.mean((first - second) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim_y(restored: Bytes, original: Bytes, border: int = 4) -> float:
    """Mean structural similarity on luma, `border` pixels cut from each side.

    Wang et al. 2004 (IEEE TIP 13:4) with their constants: 11x11 Gaussian window, sigma 1.5, only
    windows that lie inside ('valid'), C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2. As BasicSR's
    `calculate_ssim(crop_border=border, test_y_channel=True)`.

    Raises:
        ValueError: when the shapes differ or less than one window is left inside the border.
    """
    first, second = _luma_pair(restored, original, border, smallest=_WINDOW)
    mean_1, mean_2 = _window_mean(first), _window_mean(second)
    variance_1 = _window_mean(first * first) - mean_1 * mean_1
    variance_2 = _window_mean(second * second) - mean_2 * mean_2
    covariance = _window_mean(first * second) - mean_1 * mean_2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_1 * mean_2 + c1) * (2 * covariance + c2)) / (
        (mean_1**2 + mean_2**2 + c1) * (variance_1 + variance_2 + c2)
    )
    return float(similarity.mean())


def score(
    restored: Bytes,
    original: Bytes,
    lpips: Lpips | None = None,
    dists: Dists | None = None,
    no_reference: Mapping[str, Callable[[Bytes], float | None]] | None = None,
) -> Scores:
    """All figures of one picture; LPIPS and DISTS are taken on RGB and without cutting a border.

    Args:
        lpips, dists: None leaves the metric unmeasured, as does a picture too small for LPIPS.
        no_reference: by field of `Scores`, what gives the figure of `restored` alone.

    Raises:
        ValueError: as `psnr_y` and `ssim_y`.
    """
    if lpips is not None and min(restored.shape[:2]) < lpips.smallest:
        lpips = None
    return Scores(
        psnr_y=psnr_y(restored, original),
        ssim_y=ssim_y(restored, original),
        lpips=None if lpips is None else lpips.distance(restored, original),
        dists=None if dists is None else dists.distance(restored, original),
        **{name: measure(restored) for name, measure in (no_reference or {}).items()},
    )


def bootstrap_interval(
    values: Sequence[float], seed: int, confidence: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (Efron & Tibshirani 1993, chapter 13).

    Raises:
        ValueError: when `values` is empty or holds a number that is not finite, or `confidence` is
            not inside (0, 1).
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0 or not np.isfinite(numbers).all():
        raise ValueError("an interval needs at least one value, all of them finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, not {confidence}")
    generator = np.random.default_rng(seed)
    # In parts: all draws at once would hold draws x values numbers.
    part = max(1, 1_000_000 // numbers.size)
    means = np.concatenate(
        [
            numbers[generator.integers(numbers.size, size=(size, numbers.size))].mean(axis=1)
            for size in (min(part, draws - start) for start in range(0, draws, part))
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_bootstrap(
    candidate: Sequence[float],
    champion: Sequence[float],
    seed: int,
    confidence: float = 0.95,
    draws: int = 2000,
) -> Difference:
    """Mean of `candidate[i] - champion[i]` over the same pictures in the same order, with interval.

    Pairing takes out how hard each picture is, which varies far more than two models differ.

    Raises:
        ValueError: when the lengths differ, or as `bootstrap_interval`.
    """
    if len(candidate) != len(champion):
        raise ValueError(
            f"{len(candidate)} candidate values against {len(champion)} of the champion"
        )
    differences = np.asarray(candidate, np.float64) - np.asarray(champion, np.float64)
    low, high = bootstrap_interval(differences.tolist(), seed, confidence, draws)
    return Difference(mean=float(differences.mean()), low=low, high=high)


def _luma_pair(
    restored: Bytes, original: Bytes, border: int, smallest: int
) -> tuple[Floats, Floats]:
    if restored.shape != original.shape or restored.ndim != 3:
        raise ValueError(
            "two pictures (H, W, 3) of one shape expected, "
            f"{restored.shape} and {original.shape} given"
        )
    if border < 0 or min(restored.shape[:2]) - 2 * border < smallest:
        raise ValueError(
            f"{restored.shape[0]} x {restored.shape[1]} pixels leave less than "
            f"{smallest} x {smallest} inside a border of {border}"
        )
    height, width = restored.shape[:2]
    inner = slice(border, height - border), slice(border, width - border)
    return luma(restored[inner]), luma(original[inner])


def _window_mean(channel: Floats) -> Floats:
    kernel = cv2.getGaussianKernel(_WINDOW, _SIGMA, cv2.CV_64F)
    half = _WINDOW // 2
    filtered = cv2.sepFilter2D(channel, cv2.CV_64F, kernel, kernel)
    return np.asarray(filtered[half:-half, half:-half], np.float64)
