"""Blur kernels of the Real-ESRGAN degradation model (arXiv 2107.10833, sections 3.1 and 3.2).

Conventions follow BasicSR's `degradations.py`, so that published settings mean the same here. Every
kernel is a float64 array of odd size `n x n`, point-symmetric about its centre, that sums to 1. The
reference pads all kernels with zeros to 21 x 21 to stack them in a batch; padding changes no
picture, so a kernel keeps its own size here.

With `q(x, y) = (x, y) S^-1 (x, y)^T` for the covariance `S = R(theta) diag(sigma_x^2, sigma_y^2)
R(theta)^T`, the shapes are

    Gaussian              exp(-q / 2)
    generalised Gaussian  exp(-q^beta / 2)
    plateau               1 / (q^beta + 1)
    circular low-pass     w J1(w r) / (2 pi r)      (the 2-D "sinc"; w^2 / (4 pi) at r = 0)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import j1

from teasr.errors import UsageError

Kernel = NDArray[np.float64]

# The mixture's six shapes, in BasicSR's order, and the low-pass filter that may replace them.
GAUSSIANS = ("isotropic", "anisotropic")
GENERALIZED = ("generalized_isotropic", "generalized_anisotropic")
PLATEAUS = ("plateau_isotropic", "plateau_anisotropic")
SHAPES = (*GAUSSIANS, *GENERALIZED, *PLATEAUS, "sinc")


def mesh_grid(size: int) -> tuple[Kernel, Kernel]:
    """Coordinates `x` (along columns) and `y` (along rows), each `(size, size)`, 0 at the centre.

    Raises:
        UsageError: when `size` is even or not positive.
    """
    if size < 1 or size % 2 == 0:
        raise UsageError(f"Kernel size {size} has no centre pixel.", "Use an odd size, 1 or more.")
    axis = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def sigma_matrix(sigma_x: float, sigma_y: float, rotation: float = 0.0) -> Kernel:
    """Covariance `R diag(sigma_x^2, sigma_y^2) R^T`, `(2, 2)`, in pixels squared.

    Args:
        sigma_x: standard deviation along the first principal axis, pixels, above 0.
        sigma_y: the same along the second axis.
        rotation: angle of the first axis against the x axis, radians.

    Raises:
        UsageError: when a standard deviation is not positive.
    """
    if sigma_x <= 0 or sigma_y <= 0:
        raise UsageError(f"Blur sigma ({sigma_x}, {sigma_y}) is not positive.")
    cosine, sine = math.cos(rotation), math.sin(rotation)
    axes = np.array([[cosine, -sine], [sine, cosine]])
    return axes @ np.diag([sigma_x**2, sigma_y**2]) @ axes.T


def _squared_distance(size: int, covariance: Kernel) -> Kernel:
    """Mahalanobis distance squared, `q(x, y)`, of every kernel cell, `(size, size)`."""
    x, y = mesh_grid(size)
    inverse = np.linalg.inv(covariance)
    return inverse[0, 0] * x * x + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y * y


def _normalized(kernel: Kernel) -> Kernel:
    return kernel / kernel.sum()


def gaussian(size: int, sigma_x: float, sigma_y: float, rotation: float = 0.0) -> Kernel:
    """Bivariate Gaussian `exp(-q / 2)`; isotropic when both sigmas are equal."""
    q = _squared_distance(size, sigma_matrix(sigma_x, sigma_y, rotation))
    return _normalized(np.exp(-0.5 * q))


def generalized_gaussian(
    size: int, sigma_x: float, sigma_y: float, rotation: float = 0.0, beta: float = 1.0
) -> Kernel:
    """Generalised Gaussian `exp(-q^beta / 2)`: heavier tails below `beta = 1`, flatter above."""
    q = _squared_distance(size, sigma_matrix(sigma_x, sigma_y, rotation))
    return _normalized(np.exp(-0.5 * q ** _positive_beta(beta)))


def plateau(
    size: int, sigma_x: float, sigma_y: float, rotation: float = 0.0, beta: float = 1.0
) -> Kernel:
    """Plateau-shaped `1 / (q^beta + 1)` (called a bounded generalised kernel in BasicSR)."""
    q = _squared_distance(size, sigma_matrix(sigma_x, sigma_y, rotation))
    return _normalized(1.0 / (q ** _positive_beta(beta) + 1.0))


def _positive_beta(beta: float) -> float:
    if beta <= 0:
        raise UsageError(f"Kernel shape beta {beta} is not positive.")
    return beta


def circular_lowpass(size: int, cutoff: float) -> Kernel:
    """Ideal circular low-pass filter, cut to `size` (rings and overshoots as real sharpening does).

    Args:
        size: odd kernel size.
        cutoff: frequency `w` in radians per pixel, in `(0, pi]`.

    Raises:
        UsageError: when the cut-off lies outside `(0, pi]`.
    """
    if not 0 < cutoff <= math.pi:
        raise UsageError(f"Sinc cut-off {cutoff} is outside (0, pi] radians per pixel.")
    x, y = mesh_grid(size)
    radius = np.hypot(x, y)
    centre = size // 2
    radius[centre, centre] = 1.0  # any value but 0: the cell takes its limit below
    kernel = cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[centre, centre] = cutoff**2 / (4 * math.pi)
    return _normalized(kernel)


def build_kernel(shape: str, size: int, **numbers: float) -> Kernel:
    """The kernel that a recipe describes: one of `SHAPES`, its size and that shape's parameters.

    Raises:
        UsageError: when the shape is unknown or its parameters are not the ones it takes.
    """
    try:
        if shape in GAUSSIANS:
            return gaussian(size, **numbers)
        if shape in GENERALIZED:
            return generalized_gaussian(size, **numbers)
        if shape in PLATEAUS:
            return plateau(size, **numbers)
        if shape == "sinc":
            return circular_lowpass(size, **numbers)
    except TypeError:
        given = ", ".join(sorted(numbers)) or "none"
        raise UsageError(f"Kernel '{shape}' does not take these parameters: {given}.") from None
    raise UsageError(f"Unknown kernel shape '{shape}'.", f"Known shapes: {', '.join(SHAPES)}.")


def trimmed(kernel: Kernel, tolerance: float) -> Kernel:
    """`kernel` without the outer rings whose absolute weights sum to at most `tolerance`.

    A narrow Gaussian in a 21 x 21 frame is zeros for the most part; filtering pays for the frame.
    """
    size = len(kernel)
    distance = np.abs(np.arange(size) - size // 2)
    ring = np.maximum(distance[:, None], distance[None, :])
    weights = np.bincount(ring.ravel(), np.abs(kernel).ravel())
    outside = weights.sum() - np.cumsum(weights)  # weight beyond ring r
    radius = int(np.argmax(outside <= tolerance))
    margin = size // 2 - radius
    return _normalized(kernel[margin : size - margin, margin : size - margin])


def separable_terms(
    kernel: Kernel, max_terms: int, tolerance: float
) -> list[tuple[Kernel, Kernel]] | None:
    """`kernel` as a sum of at most `max_terms` outer products `column row^T`, or None.

    The absolute weights of what is left out sum to at most `tolerance`, which bounds the error of a
    filtered picture with values in [0, 1]. An isotropic Gaussian needs one term, a plateau six.
    """
    left, values, right = np.linalg.svd(kernel)
    terms: list[tuple[Kernel, Kernel]] = []
    residual = kernel.copy()
    for index in range(min(max_terms, len(kernel))):
        terms.append((_mirrored(left[:, index] * values[index]), _mirrored(right[index])))
        residual -= np.outer(*terms[-1])
        if np.abs(residual).sum() <= tolerance:
            return terms
    return None


def _mirrored(vector: Kernel) -> Kernel:
    """A singular vector of a point-symmetric kernel, which is even or odd, made exactly so.

    OpenCV's filters are half as fast again when mirrored coefficients are equal to the last bit.
    """
    mirror = vector[::-1]
    return (vector + math.copysign(1.0, float(vector @ mirror)) * mirror) / 2
