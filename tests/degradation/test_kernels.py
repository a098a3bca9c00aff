"""Kernels against their formulas, worked out cell by cell, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import j1

from teasr.degradation.kernels import (
    SHAPES,
    build_kernel,
    circular_lowpass,
    gaussian,
    generalized_gaussian,
    plateau,
    separable_terms,
    sigma_matrix,
    trimmed,
)
from teasr.errors import UsageError

NUMBERS = {"sigma_x": 2.1, "sigma_y": 0.7, "rotation": 0.6}


def by_hand(size: int, profile: str, beta: float) -> np.ndarray:
    """The kernel by rotating each cell into the principal axes: no matrix, no inverse."""
    kernel = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            x, y = column - size // 2, row - size // 2
            angle = NUMBERS["rotation"]
            along = x * math.cos(angle) + y * math.sin(angle)
            across = -x * math.sin(angle) + y * math.cos(angle)
            q = (along / NUMBERS["sigma_x"]) ** 2 + (across / NUMBERS["sigma_y"]) ** 2
            kernel[row, column] = (
                math.exp(-0.5 * q**beta) if profile == "gaussian" else 1 / (q**beta + 1)
            )
    return kernel / kernel.sum()


@pytest.mark.parametrize("size", [7, 13, 21])
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.3])
def test_bivariate_kernels_equal_their_formulas(size: int, beta: float) -> None:
    general = generalized_gaussian(size, **NUMBERS, beta=beta)
    np.testing.assert_allclose(general, by_hand(size, "gaussian", beta), atol=1e-12)
    flat = plateau(size, **NUMBERS, beta=beta)
    np.testing.assert_allclose(flat, by_hand(size, "plateau", beta), atol=1e-12)
    if beta == 1:
        np.testing.assert_allclose(gaussian(size, **NUMBERS), general, atol=1e-12)


def test_isotropic_gaussian_is_an_outer_product() -> None:
    line = np.exp(-0.5 * (np.arange(-7, 8) / 1.7) ** 2)
    line /= line.sum()
    np.testing.assert_allclose(gaussian(15, 1.7, 1.7), np.outer(line, line), atol=1e-15)


def test_gaussian_covariance_is_the_one_asked_for() -> None:
    kernel = gaussian(41, 2.5, 1.2, 0.8)
    axis = np.arange(41) - 20
    x, y = np.meshgrid(axis, axis)
    measured = [[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)]
    np.testing.assert_allclose(measured, sigma_matrix(2.5, 1.2, 0.8), rtol=1e-4)


def test_plateau_falls_to_half_at_one_sigma() -> None:
    kernel = plateau(9, 2.0, 2.0, beta=1.6)
    assert kernel[4, 6] / kernel[4, 4] == pytest.approx(0.5)


def test_sinc_equals_its_formula_and_passes_constants() -> None:
    size, cutoff = 11, 1.4
    expected = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            radius = math.hypot(row - 5, column - 5)
            expected[row, column] = (
                cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
                if radius
                else cutoff**2 / (4 * math.pi)
            )
    kernel = circular_lowpass(size, cutoff)
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=1e-14)
    assert kernel.min() < 0  # the rings that a Gaussian does not have


def test_sinc_passes_below_its_cutoff_and_stops_above() -> None:
    kernel = circular_lowpass(21, math.pi / 2)
    axis = np.arange(-10, 11)

    def gain(frequency: float) -> float:
        return float((kernel * np.cos(frequency * axis)[None, :]).sum())

    assert gain(0) == pytest.approx(1)
    assert gain(math.pi / 4) == pytest.approx(1, abs=0.1)
    assert abs(gain(0.8 * math.pi)) < 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [7, 21])
def test_every_kernel_sums_to_one_and_is_point_symmetric(shape: str, size: int) -> None:
    if shape == "sinc":
        numbers = {"cutoff": 1.3}
    else:
        numbers = dict(NUMBERS) | ({"beta": 1.5} if "_" in shape else {})
    kernel = build_kernel(shape, size, **numbers)
    assert kernel.shape == (size, size)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-15)


def test_separable_terms_add_up_to_the_kernel() -> None:
    kernel = plateau(21, 2.0, 2.0, beta=1.2)
    terms = separable_terms(kernel, 8, 1e-6)
    assert terms is not None and len(terms) > 1
    total = sum(np.outer(column, row) for column, row in terms)
    assert np.abs(total - kernel).sum() <= 1e-6
    assert all(np.array_equal(np.abs(row), np.abs(row[::-1])) for _, row in terms)
    assert separable_terms(kernel, 1, 1e-6) is None


def test_trimming_keeps_what_has_weight() -> None:
    narrow = gaussian(21, 0.5, 0.5)
    cut = trimmed(narrow, 1e-5)
    assert len(cut) < 9
    margin = (21 - len(cut)) // 2
    assert np.abs(np.pad(cut, margin) - narrow).sum() < 2.1e-5
    wide = plateau(21, 3.0, 3.0)
    np.testing.assert_allclose(trimmed(wide, 1e-5), wide)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: gaussian(8, 1, 1), "size 8"),
        (lambda: gaussian(7, 0, 1), "sigma"),
        (lambda: plateau(7, 1, 1, beta=0), "beta"),
        (lambda: circular_lowpass(7, 4), "cut-off"),
        (lambda: build_kernel("box", 7), "'box'"),
        (lambda: build_kernel("sinc", 7, sigma_x=1.0), "sigma_x"),
    ],
)
def test_impossible_kernels_are_refused_by_name(call, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        call()
