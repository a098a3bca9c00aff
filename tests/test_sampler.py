"""Samplers on flows whose average velocity is known in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from teasr.sampler import SamplerSettings, levels, noise_draws, sample

SHAPE = (2, 3, 8, 8)


class PointFlow:
    """Exact for data that are one point; remembers where it was asked."""

    def __init__(self, point: float) -> None:
        self.point = point
        self.asked: list[tuple[float, float, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        assert t.shape == r.shape == (len(x_t),)
        self.asked.append((float(t[0]), float(r[0]), x_t.clone()))
        return (x_t - self.point) / t.view(-1, 1, 1, 1)


class GaussianFlow:
    """Exact for data N(0, sigma^2): x_r = x_t s(r) / s(t); at r = t the slope of log s."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def spread(self, t: Tensor) -> Tensor:
        return ((1 - t).square() * self.sigma**2 + t.square()).sqrt()

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        slope = (t - (1 - t) * self.sigma**2) / self.spread(t).square()
        average = (1 - self.spread(r) / self.spread(t)) / (t - r)
        return x_t * torch.where(t == r, slope, average).view(-1, 1, 1, 1)


class PosteriorMean:
    """F = (x_t - E[x | x_t]) / t of data N(0, sigma^2): the best one-step picture in the mean."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t).square() * self.sigma**2 + t.square()
        return (x_t - x_t * (1 - t) * self.sigma**2 / variance) / t


def field(draws: int = 1, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((draws, *shape), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("warp", [None, (1.0, 1.0), (2.0, 3.0), (0.5, 0.7)])
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_levels_fall_from_one_to_zero(steps: int, warp: tuple[float, float] | None) -> None:
    path = levels(steps, warp)
    assert len(path) == steps + 1 and path[0] == 1.0 and path[-1] == 0.0
    assert all(first > second for first, second in itertools.pairwise(path))


def test_levels_are_uniform_or_warped_by_kumaraswamy() -> None:
    assert levels(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert levels(4, (1.0, 1.0)) == pytest.approx(levels(4))
    assert levels(2, (2.0, 3.0))[1] == pytest.approx(1 - (1 - 0.25) ** 3)


@pytest.mark.parametrize("warp", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (1.0, -2.0)])
def test_a_warp_that_would_not_end_at_zero_is_refused(warp: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="warp"):
        SamplerSettings(warp=warp)


@pytest.mark.parametrize("warp", [None, (2.0, 1.5)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("style", ["few", "any", "multi", "heun"])
def test_point_data_are_found_exactly(
    style: str, steps: int, share: float, warp: tuple[float, float] | None
) -> None:
    settings = SamplerSettings.model_validate(
        {"style": style, "steps": steps, "stochastic_share": share, "warp": warp}
    )
    flow = PointFlow(0.3)
    result = sample(flow, torch.zeros(2), field(noise_draws(settings)), settings)
    torch.testing.assert_close(result, torch.full_like(result, 0.3), rtol=0, atol=1e-6)
    path = levels(steps, warp)
    twice = [t for t in path[1:-1] for _ in range(2)]
    asked = {
        "few": [(t, 0.0) for t in path[:-1]],
        "any": list(itertools.pairwise(path)),
        "multi": [(t, t) for t in path[:-1]],
        "heun": [(t, t) for t in [1.0, *twice]],
    }[style]
    for got, expected in zip(flow.asked, asked, strict=True):
        assert got[:2] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 16])
def test_any_is_exact_on_gaussian_data_at_every_number_of_steps(steps: int) -> None:
    noise = field()
    result = sample(
        GaussianFlow(0.4), torch.zeros(2), noise, SamplerSettings(steps=steps, style="any")
    )
    torch.testing.assert_close(result, 0.4 * noise[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("style", "order"), [("multi", 1), ("heun", 2)])
@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_integration_converges_on_gaussian_data_with_its_order(
    style: str, order: int, sigma: float
) -> None:
    noise = field()
    errors = []
    for steps in (16, 32, 64):
        settings = SamplerSettings.model_validate({"steps": steps, "style": style})
        result = sample(GaussianFlow(sigma), torch.zeros(2), noise, settings)
        errors.append(float((result - sigma * noise[0]).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_heun_is_eulers_method_at_one_step() -> None:
    noise = field()
    euler, heun = (
        sample(GaussianFlow(0.4), torch.zeros(2), noise, SamplerSettings(style=style))
        for style in ("multi", "heun")
    )
    assert torch.equal(euler, heun)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_with_fresh_noise_keeps_the_distribution_of_gaussian_data(steps: int) -> None:
    settings = SamplerSettings(steps=steps, stochastic_share=1.0)
    noise = field(noise_draws(settings), (4, 3, 128, 128))
    result = sample(GaussianFlow(0.4), torch.zeros(4), noise, settings)
    assert float(result.std()) == pytest.approx(0.4, rel=0.01)
    assert float(result.mean()) == pytest.approx(0, abs=0.004)


def test_few_that_keeps_its_noise_widens_gaussian_data_by_a_known_factor() -> None:
    """The kept noise is not independent of the image: (1 + sigma) / sqrt(1 + sigma^2) at K = 2."""
    noise, sigma = field(), 0.4
    result = sample(GaussianFlow(sigma), torch.zeros(2), noise, SamplerSettings(steps=2))
    factor = (1 + sigma) / math.sqrt(1 + sigma**2)
    torch.testing.assert_close(result, sigma * factor * noise[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_with_the_posterior_mean_is_eulers_method(steps: int) -> None:
    """With E[x | x_t] the kept noise is E[z | x_t], and the step is along E[z - x | x_t]."""
    noise, sigma = field(), 0.4
    settings = SamplerSettings(steps=steps)
    few = sample(PosteriorMean(sigma), torch.zeros(2), noise, settings)
    euler = sample(
        GaussianFlow(sigma), torch.zeros(2), noise, settings.model_copy(update={"style": "multi"})
    )
    torch.testing.assert_close(few, euler, rtol=1e-5, atol=1e-6)
    if steps == 1:  # pure noise says nothing of the data but their mean, 0
        torch.testing.assert_close(few, torch.zeros_like(few), rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_few_with_the_posterior_mean_has_a_known_deviation(share: float) -> None:
    """x_t = a z with a_0 = 1; each kept or fresh noise adds its own coefficient."""
    sigma, steps = 0.4, 4
    settings = SamplerSettings(steps=steps, stochastic_share=share)
    noise = field(noise_draws(settings), (4, 3, 128, 128))
    result = sample(PosteriorMean(sigma), torch.zeros(4), noise, settings)
    variance = 1.0
    for t, end in itertools.pairwise(levels(steps)):
        mean = (1 - t) * sigma**2 / ((1 - t) ** 2 * sigma**2 + t**2)  # E[x | x_t] / x_t
        kept = (1 - mean * (1 - t)) / t  # E[z | x_t] / x_t
        gain = (1 - end) * mean + end * math.sqrt(1 - share) * kept
        variance = gain**2 * variance + end**2 * share
    assert float(result.std()) == pytest.approx(math.sqrt(variance), rel=0.01)


def test_few_and_any_are_one_evaluation_at_one_step() -> None:
    noise = field().float()
    flow = GaussianFlow(0.7)
    few, any_ = (
        sample(flow, torch.zeros(2), noise, SamplerSettings(style=style))
        for style in ("few", "any")
    )
    assert torch.equal(few, any_)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_renoising_keeps_unit_variance_and_its_share_of_the_old_noise(share: float) -> None:
    settings = SamplerSettings(steps=2, stochastic_share=share)
    noise = field(noise_draws(settings), (2, 3, 128, 128))
    flow = PointFlow(0.0)
    sample(flow, torch.zeros(2), noise, settings)
    level, _, x_t = flow.asked[1]
    renoised = x_t / level
    assert float(renoised.std()) == pytest.approx(1, rel=0.01)
    both = torch.stack([renoised.flatten(), noise[0].flatten()])
    assert float(torch.corrcoef(both)[0, 1]) == pytest.approx(math.sqrt(1 - share), abs=0.01)


def test_noise_draws() -> None:
    assert noise_draws(SamplerSettings(steps=4)) == 1
    assert noise_draws(SamplerSettings(steps=4, stochastic_share=0.5)) == 4
    assert noise_draws(SamplerSettings(steps=1, stochastic_share=0.5)) == 1
    for style in ("any", "multi", "heun"):
        settings = SamplerSettings.model_validate(
            {"style": style, "steps": 4, "stochastic_share": 1}
        )
        assert noise_draws(settings) == 1


def test_sampling_is_a_pure_function() -> None:
    settings = SamplerSettings(steps=3, stochastic_share=0.5)
    noise = field(3)
    kept = noise.clone()
    torch.manual_seed(0)
    first = sample(GaussianFlow(0.4), torch.zeros(2), noise, settings)
    torch.manual_seed(1)
    assert torch.equal(first, sample(GaussianFlow(0.4), torch.zeros(2), noise, settings))
    assert torch.equal(noise, kept)
    other = sample(GaussianFlow(0.4), torch.zeros(2), field(3, seed=1), settings)
    assert not torch.equal(first, other)
