from __future__ import annotations

import math

import numpy as np
import pytest

from teasr.metrics import bootstrap_interval, luma, paired_bootstrap, psnr_y, score, ssim_y


def noise(seed: int, height: int = 24, width: int = 21) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_luma_of_the_studio_range() -> None:
    """MATLAB's rgb2ycbcr of white, black and the three primaries."""
    colours = np.array(
        [[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8
    )
    np.testing.assert_allclose(luma(colours), [235, 16, 81.481, 144.553, 40.966], rtol=1e-12)
    with pytest.raises(ValueError, match="float"):
        luma(colours / 255)


@pytest.mark.parametrize("offset", [1, 7, 50])
def test_psnr_of_a_constant_offset(offset: int) -> None:
    """A grey offset d moves Y by 219 d / 255, so PSNR = 20 log10(255^2 / (219 d))."""
    original = noise(0) // 2
    restored = original + np.uint8(offset)
    assert psnr_y(restored, original) == pytest.approx(20 * math.log10(255**2 / (219 * offset)))


def test_psnr_of_equal_pictures_is_infinite() -> None:
    assert psnr_y(noise(0), noise(0)) == math.inf


@pytest.mark.parametrize("metric", [psnr_y, ssim_y])
@pytest.mark.parametrize("place", [(3, 10), (20, 10), (10, 3), (10, 17)])
def test_border_is_cut_from_all_sides(metric, place: tuple[int, int]) -> None:
    original = noise(1)
    restored = original.copy()
    restored[place] = 255 - restored[place]
    assert metric(restored, original, border=4) == metric(original, original, border=4)
    assert metric(restored, original, border=3) < metric(original, original, border=3)


@pytest.mark.parametrize("metric", [psnr_y, ssim_y])
def test_shapes_must_agree_and_suffice(metric) -> None:
    with pytest.raises(ValueError, match="one shape"):
        metric(noise(0, 24, 21), noise(0, 21, 24))
    with pytest.raises(ValueError, match="border of 4"):
        metric(noise(0, 8, 24), noise(0, 8, 24))
    with pytest.raises(ValueError, match="one shape"):
        metric(noise(0)[..., 0], noise(0)[..., 0])


def test_ssim_against_a_brute_force_implementation() -> None:
    """Window by window with weighted moments about the mean, as the paper's equation 13 reads."""
    original = noise(2)
    restored = np.clip(original + np.random.default_rng(3).normal(0, 30, original.shape), 0, 255)
    restored = restored.astype(np.uint8)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    first, second = luma(restored)[2:-2, 2:-2], luma(original)[2:-2, 2:-2]
    values = []
    for row in range(first.shape[0] - 10):
        for column in range(first.shape[1] - 10):
            x = first[row : row + 11, column : column + 11]
            y = second[row : row + 11, column : column + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 6.5025, 58.5225
            luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
            values.append(luminance * (2 * cov + c2) / (vx + vy + c2))
    assert ssim_y(restored, original, border=2) == pytest.approx(np.mean(values), abs=1e-10)


def test_ssim_of_equal_pictures_is_one_and_of_inverted_ones_is_negative() -> None:
    picture = noise(4, 32, 32)
    assert ssim_y(picture, picture) == pytest.approx(1)
    assert ssim_y(255 - picture, picture) < 0


def test_score_reports_a_missing_lpips_as_missing() -> None:
    restored, original = noise(5), noise(6)
    scores = score(restored, original)
    assert scores.lpips is scores.dists is scores.niqe is scores.musiq is None
    assert scores.psnr_y == psnr_y(restored, original)
    assert scores.ssim_y == ssim_y(restored, original)


def test_score_asks_the_measures_that_need_no_original() -> None:
    restored, original = noise(5), noise(6)
    asked = {"niqe": lambda rgb: float(rgb[0, 0, 0]), "musiq": lambda rgb: None}
    scores = score(restored, original, no_reference=asked)
    assert scores.niqe == restored[0, 0, 0] and scores.musiq is None


def test_bootstrap_interval_covers_the_true_mean() -> None:
    """Of 200 samples of 50 from an exponential, about 95 % of the intervals hold its mean, 1.

    The percentile method is known to cover a few per cent less on skewed samples of this size.
    """
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.exponential(1, 50).tolist(), trial, draws=500)
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.98


def test_bootstrap_interval_matches_the_normal_one() -> None:
    values = np.random.default_rng(8).normal(30, 2, 400)
    low, high = bootstrap_interval(values.tolist(), seed=0, draws=4000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    narrow = bootstrap_interval(values.tolist(), seed=0, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = noise(9).ravel()[:40].tolist()
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1)
    assert bootstrap_interval(values, 1) != bootstrap_interval(values, 2)


def test_bootstrap_draws_are_the_same_in_parts() -> None:
    """Resamples drawn one by one, as the percentile bootstrap is defined."""
    values = np.random.default_rng(11).normal(30, 2, 300)
    generator = np.random.default_rng(5)
    means = [values[generator.integers(300, size=300)].mean() for _ in range(4000)]
    found = bootstrap_interval(values.tolist(), 5, draws=4000)
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-9)


@pytest.mark.parametrize("values", [[], [1.0, math.inf], [math.nan]])
def test_bootstrap_refuses_what_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(values, 0)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0, 2.0], 0, confidence=95)


def test_pairing_sees_a_small_gain_among_pictures_that_vary_much() -> None:
    generator = np.random.default_rng(10)
    champion = generator.normal(27, 4, 60)
    candidate = champion + 0.2 + generator.normal(0, 0.1, 60)
    difference = paired_bootstrap(candidate.tolist(), champion.tolist(), seed=0)
    assert difference.mean == pytest.approx((candidate - champion).mean())
    assert 0.15 < difference.low < difference.mean < difference.high < 0.25
    opposite = paired_bootstrap(champion.tolist(), candidate.tolist(), seed=0)
    assert opposite.low == pytest.approx(-difference.high, abs=0.01)
    with pytest.raises(ValueError, match="59 candidate"):
        paired_bootstrap(candidate[1:].tolist(), champion.tolist(), seed=0)
