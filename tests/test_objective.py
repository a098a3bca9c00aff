"""Every term against closed forms, finite differences and flows whose velocity is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from teasr.backbones import PRESETS, DualBranchDiT
from teasr.backbones.base import Velocity
from teasr.errors import UsageError
from teasr.lpips import Lpips
from teasr.objective import (
    ROLES,
    TERMS,
    Ask,
    Losses,
    MicroBatch,
    Objective,
    ObjectiveSettings,
    Rows,
    deal_roles,
    detail,
    draw_times,
    in_step,
    interpolate,
    mean_square,
    one_step_image,
    pixel_weight,
    rcgm_integral,
    rcgm_target,
    rectification_target,
    rectification_weight,
    sharpened,
    step_back,
)

N, SIDE = 6, 4
WITHOUT_LPIPS = TERMS[:-1]
ALL: dict[str, object] = {"pixel_l1": 1.0, "pixel_even": 1.0, "pixel_detail": 5.0}
"""What the defaults leave out."""


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


class PointFlow:
    """The exact velocity when all data are one point: (x_t - a) / |t|, whatever the target."""

    def __init__(self, point: float, offset: float = 0.0) -> None:
        self.point, self.offset = point, offset

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        return (x_t - self.point) / column(t.abs()) + self.offset


class GaussianFlow:
    """The exact average velocity for data N(0, sigma^2): x_r = x_t s(r) / s(t)."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def spread(self, t: Tensor) -> Tensor:
        return ((1 - t).square() * self.sigma**2 + t.square()).sqrt()

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        return x_t * column((1 - self.spread(r) / self.spread(t)) / (t - r))


class Constant:
    """F = k."""

    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        return torch.full_like(x_t, self.k)


class Smooth(nn.Module):
    """A small network in float64, differentiable everywhere, of all four inputs."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 5, 3, padding=1)
        self.times = nn.Linear(3, 5)
        self.last = nn.Conv2d(5, 3, 1)
        self.double()
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.4 * values

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        times = self.times(torch.stack([t, r, t * r], dim=1).double())
        hidden = torch.tanh(self.first(torch.cat([x_t, condition], 1)) + times[:, :, None, None])
        return self.last(hidden)


@dataclass
class Call:
    x_t: Tensor
    t: Tensor
    r: Tensor
    condition: Tensor
    output: Tensor
    gradient: bool


class Recorder:
    """A velocity that writes down what it was asked."""

    def __init__(self, network: Velocity) -> None:
        self.network = network
        self.calls: list[Call] = []

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        output = self.network(x_t, t, r, condition)
        taken = (value.detach().clone() for value in (x_t, t, r, condition, output))
        self.calls.append(Call(*taken, gradient=torch.is_grad_enabled()))
        return output


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, condition = torch.randn(2, N, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return x.clamp(-1, 1), condition


def run(
    network: Velocity,
    seed: int = 5,
    progress: float = 1.0,
    others: dict[str, Velocity] | None = None,
    **settings: object,
) -> Losses:
    x, condition = batch()
    generator = torch.Generator().manual_seed(seed)
    objective = Objective(ObjectiveSettings.model_validate(ALL | settings))
    return objective(network, x, condition, generator, progress=progress, **(others or {}))


def only(**weights: float) -> dict[str, float]:
    return dict.fromkeys(TERMS, 0.0) | weights


def integral_of(
    network: Velocity, x_m: Tensor, t_m: Tensor, r: Tensor, condition: Tensor, order: int
) -> Tensor:
    def evaluate(asked: Sequence[Ask]) -> list[Tensor]:
        return [other(at.x_t, at.t, at.r, at.condition) for other, at in asked]

    chain = rcgm_integral(network, Rows(x_m, t_m, r, condition), order)
    integral: Tensor = in_step(evaluate, {"one": chain})["one"]
    return integral


def uniform(seed: int, count: int = 500) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------- flow basics


def test_interpolation_runs_from_data_to_noise_and_ignores_the_sign_of_time() -> None:
    x, z = batch()
    ends = torch.tensor([0.0, 1.0, 0.25, -0.25, -1.0, 0.5])
    x_t = interpolate(x, z, ends)
    assert torch.equal(x_t[0], x[0])
    assert torch.equal(x_t[1], z[1])
    torch.testing.assert_close(x_t[2], 0.75 * x[2] + 0.25 * z[2])
    torch.testing.assert_close(x_t[3], 0.75 * x[3] + 0.25 * z[3])
    assert torch.equal(x_t[4], z[4])


def test_one_step_image_undoes_interpolation() -> None:
    x, z = batch()
    t = torch.linspace(0, 1, N)
    torch.testing.assert_close(one_step_image(interpolate(x, z, t), z - x, t), x)


def test_mean_square_is_per_sample() -> None:
    prediction = torch.tensor([1.0, -2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 5)
    assert mean_square(prediction, torch.zeros(2, 3, 4, 5)).tolist() == [1.0, 4.0]


# ------------------------------------------------------------------------- the consistency target


def consistency(
    network: Velocity, x: Tensor, z: Tensor, t: Tensor, r: Tensor, step: float, order: int
) -> Tensor:
    """The residual e = F - target of the recursion, by the module's functions."""
    x_t, v = interpolate(x, z, t), z - x
    start = step_back(Rows(x_t, t, r, x), v, step)
    t_m = start.t
    assert torch.equal(t_m, torch.maximum(t - step, r))
    integral = integral_of(network, start.x_t, t_m, r, x, order)
    prediction = network(x_t, t, r, x)
    return prediction - rcgm_target(prediction, v, integral, t, t_m, r)


@pytest.mark.parametrize("order", [1, 2, 3, 8])
def test_integral_of_a_constant_velocity_is_exact(order: int) -> None:
    t_m, r = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.2, 0.5]).double()
    integral = integral_of(Constant(3.0), torch.zeros(2, 3, 2, 2).double(), t_m, r, t_m, order)
    torch.testing.assert_close(integral, column(3 * (t_m - r)).expand(2, 3, 2, 2))


def test_integral_converges_with_the_order() -> None:
    """Euler steps on the instantaneous velocity x s'/s of a Gaussian: error falls as 1 / N."""
    flow = GaussianFlow(0.5)

    def instantaneous(x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        slope = (t - (1 - t) * flow.sigma**2) / flow.spread(t).square()
        return x_t * column(slope)

    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    t_m, r = torch.tensor([0.95]).double(), torch.tensor([0.3]).double()
    exact = float(1 - flow.spread(r) / flow.spread(t_m))
    errors = [
        abs(float(integral_of(instantaneous, x, t_m, r, x, order)) - exact)
        for order in (8, 16, 32, 64)
    ]
    ratios = [first / second for first, second in itertools.pairwise(errors)]
    assert ratios == pytest.approx([2, 2, 2], abs=0.2)


def test_integral_passes_the_target_of_each_step_and_telescopes_for_an_exact_network() -> None:
    """The exact average velocity needs one step: any order ends at the same point."""
    flow = GaussianFlow(0.5)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    t_m, r = torch.tensor([0.95]).double(), torch.tensor([0.1]).double()
    exact = 1 - flow.spread(r) / flow.spread(t_m)
    recorder = Recorder(flow)
    integral = integral_of(recorder, x, t_m, r, x, 3)
    torch.testing.assert_close(integral.flatten(), exact)
    starts = [float(call.t) for call in recorder.calls]
    ends = [float(call.r) for call in recorder.calls]
    assert starts == pytest.approx([0.95, 2 / 3 * 0.95 + 1 / 30, 0.95 / 3 + 2 / 30])
    assert ends == pytest.approx([*starts[1:], 0.1])


@pytest.mark.parametrize("order", [1, 2, 5])
def test_residual_vanishes_for_the_exact_network_of_point_data(order: int) -> None:
    t = 0.05 + 0.95 * uniform(0)
    x = torch.full((len(t), 3, 2, 2), 0.3, dtype=torch.float64)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for r in (t * uniform(2), torch.zeros_like(t)):
        residual = consistency(PointFlow(0.3), x, z, t, r, 0.01, order)
        assert float(residual.abs().max()) < 1e-9


def test_residual_for_the_exact_network_of_gaussian_data() -> None:
    """e = x_t s_r (1 / s_m - 1 / s_t) / d - v s_r / s_m per sample, clamped; and E[e] = O(d)."""
    flow, step = GaussianFlow(0.6), 0.01
    count = 4000
    t = torch.full((count,), 0.6, dtype=torch.float64)
    r = torch.full_like(t, 0.15)
    generator = torch.Generator().manual_seed(3)
    z, normal = torch.randn(2, count, 3, 4, 4, generator=generator, dtype=torch.float64)
    x = flow.sigma * normal
    residual = consistency(flow, x, z, t, r, step, 2)
    s_t, s_m, s_r = (column(flow.spread(level)) for level in (t, t - step, r))
    exact = interpolate(x, z, t) * s_r * (1 / s_m - 1 / s_t) / step - (z - x) * s_r / s_m
    torch.testing.assert_close(residual, exact.clamp(-1, 1))
    assert float(residual.mean().abs()) < 4 * float(residual.std()) / math.sqrt(residual.numel())
    # E[e | x_t] = 0 as well: the residual does not correlate with x_t beyond discretisation.
    x_t = interpolate(x, z, t)
    assert abs(float((exact * x_t).mean() / x_t.square().mean())) < 2 * step


@pytest.mark.parametrize("k", [-1.5, 0.0, 0.4])
def test_residual_of_a_constant_network_is_k_minus_v_clamped(k: float) -> None:
    x, z = batch()
    t = torch.linspace(0.3, 1, N).double()
    residual = consistency(Constant(k), x, z, t, t / 3, 0.01, 2)
    torch.testing.assert_close(residual, (k - (z - x)).clamp(-1, 1))
    assert float(residual.abs().max()) == 1.0


def test_residual_of_an_offset_network() -> None:
    """F = v + c on point data: e = c for one Euler step; two amplify it and the clamp holds."""
    x = torch.full((N, 3, 2, 2), 0.3, dtype=torch.float64)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.linspace(0.5, 1, N).double()
    r, c, d = 0.3 * t, 0.002, 0.01
    one = consistency(PointFlow(0.3, c), x, z, t, r, d, 1)
    torch.testing.assert_close(one, torch.full_like(one, c))
    t_m = t - d
    middle = (t_m + r) / 2
    exact = c + (middle - r) * c * (t_m - middle) / (middle * d)
    two = consistency(PointFlow(0.3, c), x, z, t, r, d, 2)
    torch.testing.assert_close(two, column(exact).expand_as(two))
    far = consistency(PointFlow(0.3, -3.0), x, z, t, r, d, 1)
    assert torch.equal(far, torch.full_like(far, -1.0))


def test_target_is_the_velocity_when_the_gap_is_at_most_one_step() -> None:
    t = torch.tensor([0.5, 0.5, 0.005, 0.0, 0.5, 1.0]).double()
    r = torch.tensor([0.495, 0.5, 0.0, 0.0, 0.1, 0.0]).double()
    x, z = batch()
    prediction = torch.full_like(x, 7.0)
    t_m = torch.maximum(t - 0.01, r)
    integral = integral_of(Constant(50.0), x, t_m, r, x, 2)
    assert not integral[:4].any()
    target = rcgm_target(prediction, z - x, integral, t, t_m, r)
    assert torch.equal(target[:4], (z - x)[:4])
    assert torch.isfinite(target).all()
    assert torch.equal(target[4:], prediction[4:] + 1)  # I is huge: e is clamped at -1


# ------------------------------------------------------------------------ rectification and pixels


def test_rectification_moves_nothing_when_velocities_agree() -> None:
    prediction, velocity = batch()
    assert torch.equal(rectification_target(prediction, velocity, velocity), prediction)


def test_rectification_moves_the_image_from_fake_to_real() -> None:
    """x_hat - t (target) - x_hat = t (F_fake - F_real): towards the real, away from the fake."""
    prediction, _ = batch()
    fake, real = torch.full_like(prediction, 0.7), torch.full_like(prediction, 0.2)
    t = torch.full((N,), 0.5)
    x_t = torch.zeros_like(prediction)
    moved = one_step_image(x_t, rectification_target(prediction, fake, real), t)
    torch.testing.assert_close(
        moved - one_step_image(x_t, prediction, t), torch.full_like(x_t, 0.25)
    )


def test_rectification_weight_is_t_times_a_bounded_normaliser() -> None:
    t = torch.tensor([1.0, 0.5, 0.5, 0.0])
    size = torch.tensor([4.0, 0.5, 0.0, 1.0])
    sign = torch.tensor([1.0, -1.0]).repeat(6).view(3, 2, 2)  # a mean of signed values would be 0
    fake = column(size) * sign
    weight = rectification_weight(fake, torch.zeros_like(fake), t, 10.0)
    assert weight.tolist() == pytest.approx([0.25, 1.0, 5.0, 0.0])
    bounded = rectification_weight(fake, torch.zeros_like(fake), t, 1.5)
    assert bounded.tolist() == pytest.approx([0.25, 0.75, 0.75, 0.0])


def test_pixel_weight_has_a_floor() -> None:
    t = torch.tensor([0.0, 0.4, 0.9, 1.0])
    assert pixel_weight(t, 0.0).tolist() == pytest.approx([1.0, 0.6, 0.1, 0.0])
    assert pixel_weight(t, 0.5).tolist() == pytest.approx([1.0, 0.6, 0.5, 0.5])


# -------------------------------------------------------------------------------------------- times


def fine_detail(x: Tensor) -> Tensor:
    """x less its blur of deviation 1.5, as one matrix per axis: borders are repeated."""
    side = x.shape[-1]
    offsets = torch.arange(-4, 5)
    kernel = torch.exp(-offsets.square() / (2 * 1.5**2)).double()
    matrix = torch.zeros(side, side, dtype=torch.float64)
    for i, (j, share) in itertools.product(range(side), zip(offsets, kernel / kernel.sum())):
        matrix[i, min(max(i + int(j), 0), side - 1)] += share
    return x - torch.einsum("ai,bj,ncij->ncab", matrix, matrix, x)


def step_edge(low: float, high: float) -> Tensor:
    x = torch.full((1, 3, 24, 24), low)
    x[..., 12:] = high
    return x


def test_sharpening_leaves_evenness_ramps_and_faint_noise_alone() -> None:
    even = torch.full((1, 3, 24, 24), 0.3)
    ramp = torch.linspace(-0.9, 0.9, 24).expand(1, 3, 24, 24)
    torch.testing.assert_close(sharpened(even, 2.0), even)
    inside = (..., slice(6, -6), slice(6, -6))  # at the borders a ramp has a kink
    torch.testing.assert_close(sharpened(ramp, 2.0)[inside], ramp[inside], atol=1e-6, rtol=0)
    faint = even + 0.004 * torch.randn(even.shape, generator=torch.Generator().manual_seed(0))
    moved = (sharpened(faint, 1.0) - faint).abs().mean() / (faint - even).abs().mean()
    assert moved < 0.2  # half a level of 255: an unsharp mask without threshold moves it by 0.9
    assert sharpened(faint, 0.0) is faint


def test_sharpening_steepens_an_edge_within_the_range_of_pictures() -> None:
    for amount in (0.5, 1.0):
        edge = step_edge(-0.5, 0.5)
        sharp = sharpened(edge, amount)
        # Beside a step, a blur is off by the share of its kernel that lies across.
        offsets = torch.arange(-4, 5, dtype=torch.float64)
        kernel = torch.exp(-offsets.square() / (2 * 1.5**2))
        tail = float(kernel[offsets > 0].sum() / kernel.sum())
        torch.testing.assert_close(
            sharp[0, :, 12, 12], torch.full((3,), 0.5 + amount * tail), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(sharp.flip(3), -sharp)
    assert float(sharpened(step_edge(-1.0, 1.0), 5.0).abs().max()) == 1.0


def test_detail_is_fine_texture_and_edges_not_ramps() -> None:
    generator = torch.Generator().manual_seed(0)
    texture = 0.2 * torch.randn(1, 3, 32, 32, generator=generator)
    assert float(detail(texture, 0.05).min()) > 0.99
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    torch.testing.assert_close(
        detail(ramp, 0.05)[..., 12:-12], torch.zeros(1, 1, 32, 8), atol=1e-6, rtol=0
    )
    edge = detail(step_edge(-0.5, 0.5), 0.05)[0, 0, 12]
    assert float(edge[12]) > 0.99 and float(edge[0]) < 1e-6
    assert torch.equal(detail(ramp, 0.0), torch.ones(1, 1, 32, 32))
    # Between a third of the level and the level it rises with the root mean square.
    half = torch.full((1, 3, 32, 32), 0.0)
    half[..., ::2, ::2] = half[..., 1::2, 1::2] = 0.02  # a chequerboard of +-0.01 about its mean
    size = 0.01 * float(1 - _chequer_gain())
    torch.testing.assert_close(
        float(detail(half, 0.016)[0, 0, 16, 16]), 1.5 * size / 0.016 - 0.5, atol=1e-3, rtol=0
    )


def _chequer_gain() -> float:
    """What a Gaussian of deviation 1.5, cut at 4 pixels, leaves of a chequerboard."""
    offsets = torch.arange(-4, 5)
    kernel = torch.exp(-offsets.square() / (2 * 1.5**2))
    return float(((kernel / kernel.sum()) * (-1.0) ** offsets).sum()) ** 2


def test_lpips_sees_detail_alone_and_pixels_a_sharpened_target() -> None:
    """Left half even, right half textured: LPIPS has no gradient on the left."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 3, 64, 64)
    x[..., 40:] = 0.3 * torch.randn(1, 3, 64, 24, generator=generator)
    seen = detail(x, 0.05)
    assert float(seen[..., :24].max()) == 0 and float(seen[..., 48:].min()) == 1
    x_hat = (x + 0.1 * torch.randn(x.shape, generator=generator)).requires_grad_()

    def network(x_t: Tensor, t: Tensor, r: Tensor, condition: object) -> Tensor:
        return (x_t - x_hat) / t.view(-1, 1, 1, 1)

    settings = ObjectiveSettings.model_validate(
        only(pixel_lpips=1.0) | {"pixel_detail": 0.05, "pixel_floor": 1.0, "pure_noise_share": 1.0}
    )
    losses = Objective(settings, tiny_lpips())(network, x, x, torch.Generator().manual_seed(0))
    losses.total.backward()
    assert x_hat.grad is not None
    assert float(x_hat.grad[..., :24].abs().max()) == 0
    assert float(x_hat.grad[..., 48:].abs().min(1).values.max()) > 0
    settings = ObjectiveSettings.model_validate(
        only(pixel_l1=1.0) | {"pixel_sharpen": 0.5, "pixel_floor": 1.0, "pure_noise_share": 1.0}
    )
    losses = Objective(settings)(network, x, x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        losses.terms["pixel_l1"], (x_hat - sharpened(x, 0.5)).abs().flatten(1).mean(1)
    )
    # Grain counts in even areas, an error of tone and anything in textured areas does not.
    settings = ObjectiveSettings.model_validate(
        only(pixel_even=1.0) | {"pixel_detail": 0.05, "pixel_floor": 1.0, "pure_noise_share": 1.0}
    )
    for error, expected in (
        (0.1 * (x_hat.detach() - x).sign() * (seen == 0), True),
        (torch.full_like(x, 0.1), False),
        (0.1 * (x_hat.detach() - x).sign() * (seen == 1), False),
    ):
        x_hat = x + error
        losses = Objective(settings)(network, x, x, torch.Generator().manual_seed(0))
        assert (float(losses.terms["pixel_even"]) > 1e-3) == expected


def test_times_keep_their_ranges() -> None:
    settings = ObjectiveSettings()
    times = draw_times(20_000, settings, torch.Generator().manual_seed(0))
    assert bool((times.any_r < times.any_t).all())
    share = times.any_r / times.any_t
    for values in (times.any_t, times.end_t, times.flow_t, share):
        assert 0 <= float(values.min()) < 0.001 < 0.999 < float(values.max()) <= 1
        assert float(values.mean()) == pytest.approx(0.5, abs=0.01)
    closeness = times.flow_r / times.flow_t
    assert 0.95 <= float(closeness.min()) < 0.951 < 0.999 < float(closeness.max()) <= 1
    assert 0.02 <= float(times.fake_t.min()) < 0.021 < 0.979 < float(times.fake_t.max()) <= 0.98
    columns = torch.stack([times.any_t, times.end_t, times.flow_t, times.fake_t])
    correlation = torch.corrcoef(columns) - torch.eye(4)
    assert float(correlation.abs().max()) < 0.03


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_pure_noise_share_places_end_rows_at_one(share: float) -> None:
    settings = ObjectiveSettings(pure_noise_share=share)
    times = draw_times(20_000, settings, torch.Generator().manual_seed(0))
    assert float((times.end_t == 1).float().mean()) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("bounds", [(0.0, 0.9), (0.1, 1.0), (0.5, 0.5), (0.9, 0.1)])
def test_fake_time_range_is_refused_at_the_boundaries(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="strictly between 0 and 1"):
        ObjectiveSettings(fake_time_range=bounds)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, -0.1) for name in TERMS),
        *(("pixel_floor", value) for value in (-0.1, 1.1)),
        *(("pure_noise_share", value) for value in (-0.1, 1.1)),
        *(("self_adversarial_after", value) for value in (-0.1, 1.1)),
        *(("pixel_lpips_after", value) for value in (-0.1, 1.1)),
        *(("consistency_step", value) for value in (0.0, 0.6)),
        ("consistency_order", 0),
        ("rectification_bound", 0.0),
        ("passes", "both"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"'{field}'"):
        ObjectiveSettings.from_mapping({field: value}, "recipe")


@pytest.mark.parametrize(
    "settings",
    [
        only(),
        only(any_step=1.0) | {"self_adversarial_after": 0.1},
        only(pixel_lpips=1.0) | {"pixel_lpips_after": 0.1},
    ],
)
def test_a_start_without_any_term_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="nothing is trained at the start"):
        ObjectiveSettings.model_validate(settings)


def test_lpips_alone_without_its_weights_is_refused() -> None:
    settings = ObjectiveSettings.model_validate(only(pixel_lpips=1.0))
    with pytest.raises(UsageError, match="no LPIPS weights"):
        Objective(settings)
    assert Objective(settings, tiny_lpips()).lpips is not None


@pytest.mark.parametrize("missing", ["self_adversarial", "rectification"])
def test_a_teacher_without_its_terms_is_refused(missing: str) -> None:
    with pytest.raises(ValidationError, match="teacher needs"):
        ObjectiveSettings.model_validate({"teacher": True, missing: 0.0})


# ----------------------------------------------------------------------------------- the whole step


def test_the_exact_solution_is_a_fixed_point_of_every_term() -> None:
    """Data are one point and the network is exact: no term has anything to say."""
    x = torch.full((N, 3, SIDE, SIDE), 0.3, dtype=torch.float64)
    losses = Objective(ObjectiveSettings.model_validate(ALL))(
        PointFlow(0.3), x, x, torch.Generator().manual_seed(0)
    )
    assert set(losses.terms) == set(WITHOUT_LPIPS)
    for name, values in losses.terms.items():
        assert float(values.max()) < 1e-9, name


def test_twin_trajectory_is_asked_at_negative_times_on_exactly_the_fakes() -> None:
    recorder = Recorder(Smooth())
    losses = run(recorder, fake_time_range=(0.3, 0.6))
    first, second, rows, twin = parts(recorder.calls)
    assert [call.gradient for call in recorder.calls] == [False, False, True]
    for call in (first, second, rows):
        assert bool((call.t >= 0).all()) and bool((call.r >= 0).all())
        assert bool((call.r <= call.t).all())
    assert bool((twin.t <= -0.3).all()) and bool((twin.t >= -0.6).all())
    assert torch.equal(twin.r, twin.t)
    # The real velocity is of the same points, and shares a pass with the second Euler step.
    third = slice(2 * N, 3 * N)
    assert torch.equal(second.t[third], -twin.t) and torch.equal(second.r[third], -twin.t)
    assert torch.equal(second.x_t[third], twin.x_t)
    # The fakes are the end-to-end rows' one-step images, noised afresh to |t|; without gradient
    # they share a pass with the first Euler step.
    assert not rows.r[N : 2 * N].any()
    for one, other in zip(vars(first).values(), vars(rows).values()):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one[third], other[N : 2 * N])
    x_hat = one_step_image(rows.x_t, rows.output, rows.t)[N : 2 * N]
    noise = (twin.x_t - (1 - column(-twin.t)) * x_hat) / column(-twin.t)
    assert float(noise.std()) == pytest.approx(1, abs=0.15)
    error = (twin.output - (noise - x_hat)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.terms["self_adversarial"], error)
    used = (rows.x_t - (1 - column(rows.t)) * batch()[0].repeat(3, 1, 1, 1)) / column(rows.t)
    fields = [*used.split(N), noise]
    for i, one in enumerate(fields):  # four independent noise fields
        for other in fields[:i]:
            both = torch.stack([one.flatten(), other.flatten()])
            assert abs(float(torch.corrcoef(both)[0, 1])) < 0.2
    conditions = [call.condition for call in recorder.calls]
    assert [len(c) for c in conditions] == [3 * N, 3 * N, 4 * N]
    assert all(torch.equal(chunk, batch()[1]) for c in conditions for chunk in c.split(N))


def parts(calls: list[Call]) -> tuple[Call, Call, Call, Call]:
    """The two passes without gradient of a step with every term, and the last one's rows on the
    real and on the twin trajectory."""
    first, second, last = calls
    values = [value.split([3 * N, N]) for value in vars(last).values() if isinstance(value, Tensor)]
    rows, twin = (Call(*part, gradient=last.gradient) for part in zip(*values))
    return first, second, rows, twin


def reference(calls: list[Call], settings: ObjectiveSettings, network: Velocity) -> Tensor:
    """The total written out from the equations, targets and fakes held at the recorded values.

    Args:
        calls: of a step with every term (their times and noise do not depend on the weights).
        settings: whose weights count.
    """
    x, _ = batch()
    first, second, rows, twin = parts(calls)
    t, r, prediction, x_t = rows.t.double(), rows.r.double(), rows.output, rows.x_t
    now = network(x_t, rows.t, rows.r, rows.condition)
    any_end, end, flow = slice(0, 2 * N), slice(N, 2 * N), slice(2 * N, 3 * N)

    t_m, middle = first.t.double()[any_end], second.t.double()[any_end]
    t_ae, r_ae = t[any_end], r[any_end]
    gap = column(t_ae - t_m)
    v = (x_t[any_end] - first.x_t[any_end]) / gap
    integral = column(t_m - middle) * first.output[any_end]
    integral = integral + column(middle - r_ae) * second.output[any_end]
    residual = (column(t_ae - r_ae) * prediction[any_end] - integral) / gap - v
    target = prediction[any_end] - residual.clamp(-1, 1)
    target = torch.where(column(t_m <= r_ae), v, target)
    consistent = (now[any_end] - target).square().flatten(1).mean(1)
    total = settings.any_step * consistent[:N].mean()
    total = total + settings.end_to_end * consistent[N:].mean()

    v_flow = (x_t[flow] - x) / column(t[flow])
    total = total + settings.flow_matching * (now[flow] - v_flow).square().mean()

    x_hat = x_t[end] - column(t[end]) * now[end]
    pixels = (x_hat - x).square().flatten(1).mean(1)
    total = total + settings.pixel_mse * ((1 - t[end]) * pixels).mean()
    absolute = (x_hat - x).abs().flatten(1).mean(1)
    total = total + settings.pixel_l1 * ((1 - t[end]) * absolute).mean()
    grain = (fine_detail(x_hat) - fine_detail(x)).abs().flatten(1).mean(1)
    total = total + settings.pixel_even * ((1 - t[end]) * grain).mean()

    fixed = x_t[end] - column(t[end]) * prediction[end]
    v_twin = (twin.x_t - fixed) / column(twin.t.abs().double())
    error = network(twin.x_t, twin.t, twin.r, twin.condition) - v_twin
    total = total + settings.self_adversarial * error.square().mean()
    difference = twin.output - second.output[2 * N :]
    aim = prediction[end] - difference
    weight = t[end] / difference.abs().flatten(1).mean(1).clamp(min=0.1)
    moved = (now[end] - aim).square().flatten(1).mean(1)
    return total + settings.rectification * (weight * moved).mean()


def slopes(parameters: list[Tensor], value: Callable[[], Tensor], h: float = 1e-5) -> list[float]:
    """Finite differences of `value` along three directions; see `slopes_of_gradient`."""
    result = []
    for ways in directions(parameters):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, way in zip(parameters, ways):
                    p.add_(way, alpha=sign * h)
                values.append(float(value()))
                for p, way in zip(parameters, ways):
                    p.sub_(way, alpha=sign * h)
        result.append((values[0] - values[1]) / (2 * h))
    return result


def slopes_of_gradient(parameters: list[Tensor]) -> list[float]:
    return [
        sum(float((p.grad * way).sum()) for p, way in zip(parameters, ways) if p.grad is not None)
        for ways in directions(parameters)
    ]


def directions(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


@pytest.mark.parametrize("term", [*WITHOUT_LPIPS, "all"])
def test_gradient_of_each_term_against_finite_differences(term: str) -> None:
    """d total / d theta equals finite differences of the term with its target held fixed."""
    settings = ObjectiveSettings.model_validate({} if term == "all" else only(**{term: 0.7}))
    recorder = Recorder(Smooth())
    run(recorder)
    network = Smooth()
    total = run(network, **settings.model_dump()).total
    total.backward()
    torch.testing.assert_close(
        total, reference(recorder.calls, settings, network), rtol=1e-6, atol=0
    )
    parameters = list(network.parameters())
    expected = slopes(parameters, lambda: reference(recorder.calls, settings, network))
    assert slopes_of_gradient(parameters) == pytest.approx(expected, rel=1e-5)
    assert max(map(abs, expected)) > 1e-4


@pytest.mark.parametrize(
    # LPIPS computes in float32 and has kinks.
    ("term", "h", "tolerance"),
    [("pixel_mse", 1e-5, 1e-5), ("pixel_l1", 1e-6, 1e-5), ("pixel_lpips", 1e-3, 1e-2)],
)
def test_gradient_of_pixels_against_finite_differences_of_the_loss_itself(
    term: str, h: float, tolerance: float
) -> None:
    """Nothing is held fixed here: the whole step is differentiated."""
    lpips = tiny_lpips()
    settings = ObjectiveSettings.model_validate(only(**{term: 0.7}))
    generator = torch.Generator().manual_seed(0)
    x, condition = torch.rand(2, 2, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    network = Smooth()

    def total() -> Tensor:
        chosen = torch.Generator().manual_seed(3)
        return Objective(settings, lpips)(network, x, condition, chosen).total

    total().backward()
    parameters = list(network.parameters())
    expected = slopes(parameters, total, h)
    assert slopes_of_gradient(parameters) == pytest.approx(expected, rel=tolerance)


# ------------------------------------------------------------------------ stacked and sequential


def both_forms(
    network: nn.Module, others: dict[str, Velocity], lpips: Lpips | None, **settings: object
) -> list[tuple[Losses, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    condition = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    x = torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1
    results = []
    for passes in ("stacked", "sequential"):
        chosen = ObjectiveSettings.model_validate(ALL | settings | {"passes": passes})
        network.zero_grad()
        losses = Objective(chosen, lpips)(
            network, x, condition, torch.Generator().manual_seed(7), **others
        )
        losses.total.backward()
        gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
        results.append((losses, gradients))
    return results


def moved_network(seed: int) -> DualBranchDiT:
    torch.manual_seed(seed)
    network = DualBranchDiT(PRESETS["teasr-xs"])
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return network


@pytest.mark.parametrize("settings", [{}, {"timestep_aware": False}, {"self_adversarial": 0.0}])
@pytest.mark.parametrize("average", [False, True])
def test_stacked_and_sequential_passes_are_equal(
    average: bool, settings: dict[str, object]
) -> None:
    """Every term's values and the gradient of every weight, on a real network."""
    others: dict[str, Velocity] = {"target_network": moved_network(1)} if average else {}
    (stacked, first), (sequential, second) = both_forms(
        moved_network(0), others, tiny_lpips(), **settings
    )
    expected = {name for name in TERMS if settings.get(name) != 0}
    assert set(stacked.terms) == set(sequential.terms) == expected
    for name, values in stacked.terms.items():
        torch.testing.assert_close(values, sequential.terms[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stacked.total, sequential.total, rtol=1e-5, atol=0)
    for name, gradient in first.items():
        scale = float(second[name].abs().max())
        assert scale > 0, name
        assert float((gradient - second[name]).abs().max()) < 2e-4 * scale, name


def test_stacked_and_sequential_gradients_are_equal_to_rounding() -> None:
    networks = [Smooth(), Smooth()]
    totals = [run(net, passes=p).total for net, p in zip(networks, ("stacked", "sequential"))]
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)
    for total in totals:
        total.backward()
    for one, other in zip(*(list(network.parameters()) for network in networks)):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "average", "passes", "with_gradient"),
    [
        ({}, False, 3, 1),
        ({}, True, 5, 1),
        ({"passes": "sequential"}, False, 10, 4),
        ({"passes": "sequential"}, True, 10, 4),
        ({"passes": "partitioned"}, False, 3, 1),
        ({"passes": "partitioned"}, True, 5, 1),
        ({"consistency_order": 4}, False, 5, 1),
        ({"timestep_aware": False}, False, 3, 1),
        ({"self_adversarial": 0.0}, False, 3, 1),
        ({"rectification": 0.0}, False, 3, 1),
        ({"rectification": 0.0, "self_adversarial": 0.0}, False, 3, 1),
        ({"rectification": 0.0, "consistency_order": 1}, False, 2, 1),
        ({"any_step": 0.0, "end_to_end": 0.0}, False, 3, 1),
        ({"any_step": 0.0, "end_to_end": 0.0}, True, 3, 1),
        (only(flow_matching=1.0, pixel_mse=1.0), True, 1, 1),
        (only(self_adversarial=1.0), True, 2, 1),
    ],
)
def test_passes_over_the_weights(
    settings: dict[str, object], average: bool, passes: int, with_gradient: int
) -> None:
    recorder = Recorder(Smooth())
    others: dict[str, Velocity] = {"target_network": lambda *inputs: recorder(*inputs)}
    run(recorder, others=others if average else None, **settings)
    assert len(recorder.calls) == passes
    assert sum(call.gradient for call in recorder.calls) == with_gradient


@pytest.mark.parametrize("passes", ["stacked", "sequential", "partitioned"])
def test_no_pass_without_gradient_comes_after_one_that_waits_for_it(passes: str) -> None:
    """An average's weights change place with those of the network (`Engine.averaged_network`)."""
    recorder = Recorder(Smooth())

    def average(*inputs: Tensor) -> Tensor:
        return recorder(*inputs)

    run(recorder, others={"target_network": average}, passes=passes)
    waiting = [call.gradient for call in recorder.calls]
    assert waiting == sorted(waiting)


# --------------------------------------------------------------------------------- one role each


@pytest.mark.parametrize(
    ("samples", "count", "roles"),
    [(4, 1, 4), (6, 1, 4), (1, 4, 4), (1, 7, 4), (3, 3, 5), (2, 1, 1)],
)
def test_deals_take_every_sample_through_every_role(samples: int, count: int, roles: int) -> None:
    """The mean over P deals of what an optimizer step sums is the mean over samples and roles."""
    names, total = ROLES[:roles], samples * count
    values = torch.rand(roles, count, samples, generator=torch.Generator().manual_seed(0)).double()
    mean = 0.0
    for step in range(total):
        seen: dict[str, int] = {}
        for index in range(count):
            shares = deal_roles(names, samples, MicroBatch(index, count, step))
            assert sum(len(share.samples) for share in shares.values()) == samples
            for name, share in shares.items():
                own = values[names.index(name), index, share.samples]
                mean += share.weight * float(own.mean()) / (count * total)
                seen[name] = seen.get(name, 0) + len(own)
        assert set(seen) == set(names) and max(seen.values()) - min(seen.values()) <= 1
    assert mean == pytest.approx(float(values.mean((1, 2)).sum()), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "average", "samples"),
    [
        ({}, False, 6),
        ({}, True, 2),
        ({}, False, 1),
        ({"timestep_aware": False}, False, 6),
        ({"timestep_aware": False, "consistency_order": 3}, True, 2),
        ({"self_adversarial": 0.0, "pixel_sharpen": 0.5, "pixel_floor": 0.3}, False, 3),
        ({"rectification": 0.0, "pure_noise_share": 0.5, "pixel_detail": 0.0}, False, 6),
        (only(rectification=1.0, flow_matching=0.5), False, 1),
    ],
    ids=str,
)
def test_partitioned_gradients_are_the_stacked_ones_in_expectation(
    settings: dict[str, object], average: bool, samples: int
) -> None:
    """Over all deals of a step of 6 samples, in micro-batches of `samples`: not by drawing, all."""
    x, condition = batch()
    others: dict[str, Velocity] = {"target_network": Smooth(1)} if average else {}
    count = N // samples

    def gradients(passes: str, steps: int) -> tuple[float, list[Tensor]]:
        network = Smooth()
        objective = Objective(ObjectiveSettings.model_validate(ALL | settings | {"passes": passes}))
        total = torch.zeros((), dtype=torch.float64)
        for step, index in itertools.product(range(steps), range(count)):
            own = slice(index * samples, (index + 1) * samples)
            part, generator = MicroBatch(index, count, step), torch.Generator().manual_seed(index)
            losses = objective(
                network, x[own], condition[own], generator, micro_batch=part, **others
            )
            total = total + losses.total / (count * steps)
        total.backward()
        return float(total.detach()), [p.grad for p in network.parameters() if p.grad is not None]

    total, found = gradients("partitioned", N)
    expected, whole = gradients("stacked", 1)
    assert total == pytest.approx(expected, rel=1e-12)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    one_deal, _ = gradients("partitioned", 1)
    assert one_deal != pytest.approx(expected, rel=1e-4)


def test_a_sample_with_one_role_has_the_terms_of_a_sample_with_all() -> None:
    generator = torch.Generator().manual_seed(0)
    x, condition = torch.rand(2, 5, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    found = {}
    for passes in ("stacked", "partitioned"):
        settings = ObjectiveSettings.model_validate(ALL | {"passes": passes})
        recorder = Recorder(Smooth())
        losses = Objective(settings, tiny_lpips())(
            recorder, x, condition, torch.Generator().manual_seed(3), micro_batch=MicroBatch(step=2)
        )
        assert set(losses.terms) == set(TERMS)
        found[passes] = losses.terms
    # Sample i is in place i + 2 of a ring of 5: it has roles 2, 3, 0, 0, 1 of 4.
    owners = {"any_step": [2, 3], "flow_matching": [0], "self_adversarial": [1]}
    for term, values in found["partitioned"].items():
        own = owners.get(term, [4])
        torch.testing.assert_close(values, found["stacked"][term][own], rtol=1e-6, atol=1e-9)
    rows = [len(call.t) for call in recorder.calls]
    assert rows == [2 + 1 + 1 + 1, 2 + 1 + 2, 5]  # stacked: 15, 15 and 20


def test_too_few_samples_to_partition_are_refused() -> None:
    x, condition = batch()
    objective = Objective(ObjectiveSettings(passes="partitioned"))

    def step(samples: int, part: MicroBatch) -> Losses:
        generator = torch.Generator().manual_seed(0)
        return objective(Smooth(), x[:samples], condition[:samples], generator, micro_batch=part)

    said = r"one of 4 roles .*has 3 samples per worker.*engine\.gradient_accumulation"
    for samples, count in ((3, 1), (1, 3)):
        with pytest.raises(UsageError, match=said):
            step(samples, MicroBatch(count=count))
    names = [set(step(1, MicroBatch(index, 4)).terms) for index in range(4)]
    end_to_end = {"end_to_end", "rectification", "pixel_mse"}
    assert names == [{"any_step"}, end_to_end, {"flow_matching"}, {"self_adversarial"}]


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 4),
        ({"timestep_aware": False}, 5),
        ({"flow_matching": 0.0}, 3),
        ({"end_to_end": 0.0}, 4),
        (only(pixel_mse=1.0), 1),
        ({"passes": "stacked"}, 1),
    ],
)
def test_a_term_of_weight_0_has_no_role(settings: dict[str, object], least: int) -> None:
    chosen = ObjectiveSettings.model_validate({"passes": "partitioned"} | settings)
    assert chosen.least_samples == least
    x, condition = batch()
    losses = Objective(chosen)(
        Smooth(), x[:least], condition[:least], torch.Generator().manual_seed(0)
    )
    expected = {name for name in TERMS if getattr(chosen, name) > 0} - {"pixel_lpips"}
    assert set(losses.terms) == expected


def test_a_teacher_is_not_partitioned() -> None:
    with pytest.raises(ValidationError, match="teacher needs passes=stacked or sequential"):
        ObjectiveSettings(teacher=True, passes="partitioned")


# --------------------------------------------------------- a setting changes what it says it does


@pytest.mark.parametrize("name", WITHOUT_LPIPS)
def test_a_weight_scales_its_term_and_no_other(name: str) -> None:
    alone = run(Smooth(), **only(**{name: 1.0})).total
    rest = run(Smooth(), **{name: 0.0})
    both = run(Smooth(), **{name: 3.0}).total
    assert float(alone.detach()) > 0
    assert set(rest.terms) == set(WITHOUT_LPIPS) - {name}
    torch.testing.assert_close(both, rest.total + 3 * alone)


def test_consistency_step_and_order_are_honoured() -> None:
    recorder = Recorder(Smooth())
    run(recorder, consistency_order=4, consistency_step=0.125)
    first, rows = recorder.calls[0], recorder.calls[-1]
    t, r, t_m = rows.t[: 2 * N], rows.r[: 2 * N], first.t[: 2 * N]
    assert torch.equal(t_m, torch.maximum(t - 0.125, r))
    assert float((t - t_m).max()) == pytest.approx(0.125)
    assert len(recorder.calls) == 4 + 1


def test_rectification_bound_and_pixel_floor_reach_the_total() -> None:
    losses = run(Smooth(), **only(rectification=1.0), rectification_bound=1e-3)
    recorder = Recorder(Smooth())
    run(recorder, **only(rectification=1.0))
    expected = (recorder.calls[-1].t * 1e-3 * losses.terms["rectification"]).mean()
    torch.testing.assert_close(losses.total, expected)
    floored = run(Smooth(), **only(pixel_mse=1.0), pixel_floor=1.0)
    torch.testing.assert_close(floored.total, floored.terms["pixel_mse"].mean())


def test_pure_noise_share_reaches_the_rows() -> None:
    recorder = Recorder(Smooth())
    run(recorder, **only(pixel_mse=1.0), pure_noise_share=1.0)
    assert bool((recorder.calls[0].t == 1).all())


def test_without_timestep_awareness_fakes_come_from_pure_noise_alone() -> None:
    aware, plain = Recorder(Smooth()), Recorder(Smooth())
    usual = run(aware)
    losses = run(plain, timestep_aware=False)
    rows = plain.calls[-1]
    pure = slice(3 * N, 4 * N)  # rows of their own: those of the other terms stay
    assert len(rows.t) == 5 * N and len(aware.calls[-1].t) == 4 * N
    assert torch.equal(rows.t[: 3 * N], aware.calls[-1].t[: 3 * N])
    assert bool((rows.t[pure] == 1).all()) and not rows.r[pure].any()
    x_hat = (rows.x_t - rows.output)[pure]
    x_t, t, output = (values[4 * N :] for values in (rows.x_t, rows.t, rows.output))
    noise = (x_t - (1 - column(-t)) * x_hat) / column(-t)
    error = (output - (noise - x_hat)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.terms["self_adversarial"], error)
    for name in set(WITHOUT_LPIPS) - {"self_adversarial", "rectification"}:
        assert torch.equal(losses.terms[name], usual.terms[name])
    # The weight has no t: only the normaliser is left.
    alone = run(Smooth(), **only(rectification=1.0), timestep_aware=False, rectification_bound=1e-3)
    torch.testing.assert_close(alone.total, 1e-3 * alone.terms["rectification"].mean())


def test_target_network_serves_the_consistency_target_only() -> None:
    trained, average = Recorder(Smooth(0)), Recorder(Smooth(1))
    losses = run(trained, others={"target_network": average})
    assert [call.gradient for call in average.calls] == [False, False]
    assert [call.gradient for call in trained.calls] == [False, False, True]
    plain = run(Smooth(0))
    assert not torch.equal(losses.terms["any_step"], plain.terms["any_step"])
    for name in ("flow_matching", "self_adversarial", "rectification", "pixel_mse", "pixel_l1"):
        torch.testing.assert_close(losses.terms[name], plain.terms[name])


def test_before_self_adversarial_after_only_pixels_train_in_one_pass() -> None:
    recorder = Recorder(Smooth())
    weights = {"pixel_mse": 2.0, "pixel_l1": 0.0, "pixel_even": 0.0}
    losses = run(recorder, progress=0.59, self_adversarial_after=0.6, **weights)
    (call,) = recorder.calls
    assert call.gradient and not call.r.any() and set(losses.terms) == {"pixel_mse"}
    x, _ = batch()
    error = (call.x_t - column(call.t) * call.output - x).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.terms["pixel_mse"], error)
    torch.testing.assert_close(losses.total, (2 * (1 - call.t) * error).mean())
    losses.total.backward()
    assert all(p.grad.abs().sum() > 0 for p in recorder.network.parameters())
    later = run(Smooth(), progress=0.6, self_adversarial_after=0.6)
    assert set(later.terms) == set(WITHOUT_LPIPS)


def test_equal_seeds_give_equal_losses_and_other_seeds_others() -> None:
    first, again, other = run(Smooth(), seed=1), run(Smooth(), seed=1), run(Smooth(), seed=2)
    assert torch.equal(first.total, again.total)
    for name in first.terms:
        assert torch.equal(first.terms[name], again.terms[name])
        assert not torch.equal(first.terms[name], other.terms[name])


# ------------------------------------------------------------------------------ what is not finite


class Poisoned:
    """NaN or infinity where `where(t, r)` holds."""

    def __init__(self, where: str, value: float = math.nan) -> None:
        self.where, self.value, self.network = where, value, Smooth()

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        bad = {
            "twin": t < 0,
            "real": (r == t) & (t > 0),
            "flow": (r > 0.9 * t) & (r < t),
            "end": (r == 0) & (t > 0),
        }
        output = self.network(x_t, t, r, condition)
        return output.masked_fill(column(bad[self.where]), self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("where", "term"),
    [
        ("twin", "self_adversarial"),
        ("real", "rectification"),
        ("flow", "flow_matching"),
        ("end", "end_to_end"),
    ],
)
def test_a_term_that_is_not_finite_is_named(where: str, term: str, value: float) -> None:
    # d above the largest gap keeps the Euler steps out of the poisoned region.
    losses = run(Poisoned(where, value), consistency_step=0.5, seed=2)
    assert losses.not_finite() == term
    assert not losses.is_finite()
    assert run(Smooth()).is_finite() and run(Smooth()).not_finite() == ""


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("where", ["clean image", "condition"])
def test_a_batch_with_nan_is_found_by_every_term(where: str, term: str) -> None:
    settings = ObjectiveSettings.model_validate(only(**{term: 1.0}))
    losses = poisoned_step(settings, where, math.nan)
    assert losses.not_finite() == term
    finite = torch.isfinite(losses.terms[term])
    assert bool(finite[0]) and not bool(finite[1])  # the other sample of the batch is sound


def test_a_batch_with_an_infinity_is_found() -> None:
    """The consistency residual is clamped and so bounded; flow matching and pixels are not."""
    losses = poisoned_step(ObjectiveSettings(), "clean image", math.inf)
    assert losses.not_finite() == "flow_matching"


def poisoned_step(settings: ObjectiveSettings, where: str, value: float) -> Losses:
    generator = torch.Generator().manual_seed(0)
    x, condition = torch.rand(2, 2, 3, 32, 32, generator=generator, dtype=torch.float64)
    (x if where == "clean image" else condition)[1, 2, 3, 4] = value
    return Objective(settings, tiny_lpips())(Smooth(), x, condition, generator)


def tiny_lpips() -> Lpips:
    """AlexNet's layout with few channels and random weights."""
    generator = torch.Generator().manual_seed(0)
    widths, kernels, before = [4, 6, 5, 7, 3], [11, 5, 3, 3, 3], 3
    weights: dict[str, Tensor] = {}
    for i, (width, kernel) in enumerate(zip(widths, kernels)):
        shape = (width, before, kernel, kernel)
        weights[f"conv{i}.weight"] = torch.randn(shape, generator=generator) / kernel
        weights[f"conv{i}.bias"] = torch.zeros(width)
        weights[f"lin{i}.weight"] = torch.rand(1, width, 1, 1, generator=generator)
        before = width
    return Lpips(weights)


def test_lpips_of_one_step_images_carries_the_pixel_weight() -> None:
    lpips = tiny_lpips()
    generator = torch.Generator().manual_seed(0)
    x, condition = torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1
    network = Smooth().float()
    recorder = Recorder(lambda x_t, t, r, c: 0.1 * x_t + network.last.bias.view(1, 3, 1, 1))
    settings = ObjectiveSettings.model_validate(only(pixel_lpips=3.0) | {"pixel_floor": 0.25})
    losses = Objective(settings, lpips)(recorder, x, condition, torch.Generator().manual_seed(0))
    (rows,) = recorder.calls
    x_hat = one_step_image(rows.x_t, rows.output, rows.t)
    torch.testing.assert_close(losses.terms["pixel_lpips"], lpips(x_hat, x))
    weight = (1 - rows.t).clamp(min=0.25)
    torch.testing.assert_close(losses.total, (3 * weight * lpips(x_hat, x)).mean())
    losses.total.backward()
    assert float(network.last.bias.grad.abs().sum()) > 0
    without = Objective(ObjectiveSettings(pixel_lpips=0.0), lpips)
    assert without.lpips is None


def test_lpips_joins_after_its_share_of_the_run() -> None:
    generator = torch.Generator().manual_seed(0)
    x, condition = torch.rand(2, 2, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    settings = ObjectiveSettings.model_validate(ALL | {"pixel_lpips_after": 0.3})
    objective = Objective(settings, tiny_lpips())

    def terms(progress: float) -> set[str]:
        return set(objective(Smooth(), x, condition, generator, progress=progress).terms)

    assert terms(0.29) == set(WITHOUT_LPIPS) and terms(0.3) == set(TERMS)
