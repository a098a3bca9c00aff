"""NIQE, how unlike photographs a picture's local statistics are (Mittal, Soundararajan, Bovik 2013,
IEEE Signal Processing Letters 20:3); no original is needed.

Luma is brought to local mean 0 and deviation 1. Of every 96x96 block, at full and at half size, 18
parameters of generalized Gaussians describe the normalised pixels and the products of neighbours.
The figure is the distance of their distribution from that of 125 undistorted photographs:

    sqrt((m1 - m2)^T ((S1 + S2) / 2)^-1 (m1 - m2))

With the conventions of BasicSR's `calculate_niqe(crop_border=border, convert_to='y')`, which are
those of the authors' MATLAB release.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from teasr.metrics import Bytes, Floats, luma

BLOCK = 96
_PRISTINE = Path(__file__).parent / "weights" / "niqe" / "pristine.safetensors"
_WINDOW, _SIGMA = 7, 7 / 6
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
# MATLAB's antialiased bicubic at 1/2: the kernel (a = -0.5) stretched by 2, at the 8 pixels around.
_HALVE = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
# Below this a deviation from the local mean is the rounding error of a flat area.
_FLAT = 1e-9


def niqe(rgb: Bytes, border: int = 4) -> float | None:
    """NIQE of uint8 (H, W, 3) RGB, `border` pixels cut from each side; 0 or more, lower is better.

    None, not measured, when fewer than two whole blocks of 96x96 with some texture lie inside the
    border.
    """
    height, width = (max(side - 2 * border, 0) // BLOCK * BLOCK for side in rgb.shape[:2])
    if height * width < 2 * BLOCK**2:
        return None
    pixels = luma(rgb[border : border + height, border : border + width]).round()
    halved = cv2.sepFilter2D(
        pixels, cv2.CV_64F, _HALVE, _HALVE, anchor=(3, 3), borderType=cv2.BORDER_REFLECT
    )[::2, ::2]
    features = np.concatenate(
        [_features(pixels, BLOCK), _features(np.ascontiguousarray(halved), BLOCK // 2)], axis=1
    )
    complete = features[np.isfinite(features).all(axis=1)]
    if len(complete) < 2:
        return None
    mean, covariance = _pristine()
    difference = mean - np.nanmean(features, axis=0)
    pooled = (covariance + np.cov(complete, rowvar=False)) / 2
    return math.sqrt(difference @ np.linalg.pinv(pooled) @ difference)


def _features(pixels: Floats, block: int) -> Floats:
    """(blocks, 18) of luma (H, W); NaN where a block has no texture to fit."""
    kernel = cv2.getGaussianKernel(_WINDOW, _SIGMA, cv2.CV_64F)

    def local_mean(values: Floats) -> Floats:
        filtered = cv2.sepFilter2D(
            values, cv2.CV_64F, kernel, kernel, borderType=cv2.BORDER_REPLICATE
        )
        return np.asarray(filtered, np.float64)

    mean = local_mean(pixels)
    deviation = np.sqrt(np.abs(local_mean(pixels**2) - mean**2))
    centred = pixels - mean
    centred[np.abs(centred) < _FLAT] = 0
    rows, columns = pixels.shape[0] // block, pixels.shape[1] // block
    blocks = (centred / (deviation + 1)).reshape(rows, block, columns, block).swapaxes(1, 2)
    blocks = blocks.reshape(rows * columns, block, block)
    shape, left, right = _fit(blocks)
    features = [shape, (left + right) / 2]
    for shift in _NEIGHBOURS:
        shape, left, right = _fit(blocks * np.roll(blocks, shift, axis=(1, 2)))
        gammas = np.array([math.gamma(2 / a) / math.gamma(1 / a) for a in shape])
        features += [shape, (right - left) * gammas, left, right]
    return np.stack(features, axis=1)


def _fit(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Shape, left and right scale of an asymmetric generalized Gaussian for each of (N, H, W).

    By moments (the paper's equations 4 to 7; Lasmar et al. 2009). Values all of one sign have no
    scale, NaN, and the smallest shape, as in the authors' release.
    """
    shapes, ratios = _ratios()
    left, right = (_deviation(values, side) for side in (values < 0, values > 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        skew = left / right
        ratio = np.abs(values).mean(axis=(1, 2)) ** 2 / (values**2).mean(axis=(1, 2))
        ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    # The ratio rises with the shape: the nearest of the table is one of two.
    above = np.searchsorted(ratios, ratio).clip(1, len(ratios) - 1)
    nearest = above - (ratio - ratios[above - 1] < ratios[above] - ratio)
    shape = np.where(np.isnan(ratio), shapes[0], shapes[nearest])
    scale = np.array([math.sqrt(math.gamma(1 / a) / math.gamma(3 / a)) for a in shape])
    return shape, left * scale, right * scale


def _deviation(values: Floats, side: NDArray[np.bool_]) -> Floats:
    """Root mean square of each of (N, H, W) over `side`; NaN where that is empty."""
    with np.errstate(invalid="ignore"):
        squares = np.where(side, values**2, 0).sum(axis=(1, 2)) / side.sum(axis=(1, 2))
    return np.sqrt(squares)


@lru_cache(maxsize=1)
def _ratios() -> tuple[Floats, Floats]:
    """Shapes 0.2, 0.201 ... 10, and Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)) of each."""
    shapes = np.arange(0.2, 10.001, 0.001)
    ratios = [math.gamma(2 / a) ** 2 / (math.gamma(1 / a) * math.gamma(3 / a)) for a in shapes]
    return shapes, np.array(ratios)


@lru_cache(maxsize=1)
def _pristine() -> tuple[Floats, Floats]:
    """Mean (36,) and covariance (36, 36) of undistorted photographs; see the README beside."""
    tensors = load_file(_PRISTINE)
    return tensors["mean"], tensors["covariance"]
