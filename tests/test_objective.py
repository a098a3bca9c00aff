"""Every term against closed forms, finite differences and flows whose velocity is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from teasr.backbones.base import Velocity
from teasr.lpips import Lpips
from teasr.objective import (
    Losses,
    Objective,
    ObjectiveSettings,
    draw_times,
    interpolate,
    mean_square,
    one_step_image,
    pixel_weight,
    rcgm_integral,
    rcgm_target,
    rectification_target,
    rectification_weight,
)

N, SIDE = 6, 4
WEIGHTS = (
    "any_step",
    "end_to_end",
    "flow_matching",
    "self_adversarial",
    "rectification",
    "pixel_mse",
    "pixel_lpips",
)


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


def run(network: Velocity, seed: int = 5, progress: float = 1.0, **settings: object) -> Losses:
    x, condition = batch()
    generator = torch.Generator().manual_seed(seed)
    objective = Objective(ObjectiveSettings.model_validate(settings))
    return objective(network, x, condition, generator, progress=progress)


def only(**weights: float) -> dict[str, float]:
    return dict.fromkeys(WEIGHTS, 0.0) | weights


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
    t_m = torch.maximum(t - step, r)
    x_t, v = interpolate(x, z, t), z - x
    x_m = x_t - column(t - t_m) * v
    integral = rcgm_integral(network, x_m, t_m, r, x, order)
    prediction = network(x_t, t, r, x)
    return prediction - rcgm_target(prediction, v, integral, t, t_m, r)


@pytest.mark.parametrize("order", [1, 2, 3, 8])
def test_integral_of_a_constant_velocity_is_exact(order: int) -> None:
    t_m, r = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.2, 0.5]).double()
    integral = rcgm_integral(Constant(3.0), torch.zeros(2, 3, 2, 2).double(), t_m, r, t_m, order)
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
        abs(float(rcgm_integral(instantaneous, x, t_m, r, x, order)) - exact)
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
    integral = rcgm_integral(recorder, x, t_m, r, x, 3)
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
    integral = rcgm_integral(Constant(50.0), x, t_m, r, x, 2)
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


# ----------------------------------------------------------------------------------- the whole step


def test_the_exact_solution_is_a_fixed_point_of_every_term() -> None:
    """Data are one point and the network is exact: no term has anything to say."""
    x = torch.full((N, 3, SIDE, SIDE), 0.3, dtype=torch.float64)
    losses = Objective(ObjectiveSettings())(PointFlow(0.3), x, x, torch.Generator().manual_seed(0))
    assert set(losses.terms) == set(WEIGHTS) - {"pixel_lpips"}
    for name, values in losses.terms.items():
        assert float(values.max()) < 1e-9, name


def test_twin_trajectory_is_asked_at_negative_times_on_exactly_the_fakes() -> None:
    recorder = Recorder(Smooth())
    losses = run(recorder, fake_time_range=(0.3, 0.6))
    first, second, rows, twin, real = recorder.calls
    assert [call.gradient for call in recorder.calls] == [False, False, True, True, False]
    for call in (first, second, rows, real):
        assert bool((call.t >= 0).all()) and bool((call.r >= 0).all())
        assert bool((call.r <= call.t).all())
    assert bool((twin.t <= -0.3).all()) and bool((twin.t >= -0.6).all())
    assert torch.equal(twin.r, twin.t)
    assert torch.equal(real.t, -twin.t) and torch.equal(real.r, real.t)
    assert torch.equal(real.x_t, twin.x_t)
    # The fakes are the end-to-end rows' one-step images, noised afresh to |t|.
    assert not rows.r[N : 2 * N].any()
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
    assert [len(c) for c in conditions] == [2 * N, 2 * N, 3 * N, N, N]
    assert all(torch.equal(chunk, batch()[1]) for c in conditions for chunk in c.split(N))


def reference(calls: list[Call], settings: ObjectiveSettings, network: Velocity) -> Tensor:
    """The total written out from the equations, targets and fakes held at the recorded values."""
    x, _ = batch()
    first, second, rows = calls[:3]
    t, r, prediction, x_t = rows.t.double(), rows.r.double(), rows.output, rows.x_t
    now = network(x_t, rows.t, rows.r, rows.condition)
    any_end, flow = slice(0, 2 * N), slice(2 * N, 3 * N)

    t_m, middle = first.t.double(), second.t.double()
    t_ae, r_ae = t[any_end], r[any_end]
    gap = column(t_ae - t_m)
    v = (x_t[any_end] - first.x_t) / gap
    integral = column(t_m - middle) * first.output + column(middle - r_ae) * second.output
    residual = (column(t_ae - r_ae) * prediction[any_end] - integral) / gap - v
    target = prediction[any_end] - residual.clamp(-1, 1)
    target = torch.where(column(t_m <= r_ae), v, target)
    consistent = (now[any_end] - target).square().flatten(1).mean(1)
    total = settings.any_step * consistent[:N].mean()
    total = total + settings.end_to_end * consistent[N:].mean()

    v_flow = (x_t[flow] - x) / column(t[flow])
    total = total + settings.flow_matching * (now[flow] - v_flow).square().mean()

    end_t, end = t[N : 2 * N], now[N : 2 * N]
    x_hat = x_t[N : 2 * N] - column(end_t) * end
    pixels = (x_hat - x).square().flatten(1).mean(1)
    total = total + settings.pixel_mse * ((1 - end_t) * pixels).mean()
    if len(calls) > 3:
        twin, real = calls[3:]
        fixed = x_t[N : 2 * N] - column(end_t) * prediction[N : 2 * N]
        level = column(twin.t.abs().double())
        v_twin = (twin.x_t - fixed) / level
        error = network(twin.x_t, twin.t, twin.r, twin.condition) - v_twin
        total = total + settings.self_adversarial * error.square().mean()
        difference = twin.output - real.output
        aim = prediction[N : 2 * N] - difference
        weight = end_t / difference.abs().flatten(1).mean(1).clamp(min=0.1)
        moved = (end - aim).square().flatten(1).mean(1)
        total = total + settings.rectification * (weight * moved).mean()
    return total


@pytest.mark.parametrize("term", [*WEIGHTS[:-1], "all"])
def test_gradient_of_each_term_against_finite_differences(term: str) -> None:
    """d total / d theta equals finite differences of the term with its target held fixed."""
    weights = {} if term == "all" else only(**{term: 0.7})
    settings = ObjectiveSettings.model_validate(weights)
    network = Smooth()
    recorder = Recorder(network)
    total = run(recorder, **weights).total
    total.backward()
    torch.testing.assert_close(
        total, reference(recorder.calls, settings, network), rtol=1e-6, atol=0
    )
    parameters = list(network.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ways = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope = sum(float((p.grad * way).sum()) for p, way in zip(parameters, ways))
        values, h = [], 1e-5
        for sign in (1, -1):
            with torch.no_grad():
                for p, way in zip(parameters, ways):
                    p.add_(way, alpha=sign * h)
                values.append(float(reference(recorder.calls, settings, network)))
                for p, way in zip(parameters, ways):
                    p.sub_(way, alpha=sign * h)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("name", WEIGHTS[:-1])
def test_a_weight_scales_its_term_and_no_other(name: str) -> None:
    alone = run(Smooth(), **only(**{name: 1.0})).total
    rest = run(Smooth(), **{name: 0.0}).total
    both = run(Smooth(), **{name: 3.0}).total
    assert float(alone.detach()) > 0
    torch.testing.assert_close(both, rest + 3 * alone)


def test_both_twin_terms_at_zero_save_two_passes() -> None:
    def passes(**weights: float) -> tuple[int, set[str]]:
        recorder = Recorder(Smooth())
        losses = run(recorder, **weights)
        return len(recorder.calls), set(losses.terms)

    twin = {"self_adversarial", "rectification"}
    assert passes()[0] == 5
    assert passes(self_adversarial=0.0)[0] == 5
    assert passes(rectification=0.0)[0] == 5
    saved, terms = passes(self_adversarial=0.0, rectification=0.0)
    assert saved == 3 and not terms & twin


def test_consistency_step_and_order_are_honoured() -> None:
    recorder = Recorder(Smooth())
    run(recorder, consistency_order=4, consistency_step=0.125)
    assert len(recorder.calls) == 4 + 1 + 2
    rows = recorder.calls[4]
    t, r, t_m = rows.t[: 2 * N], rows.r[: 2 * N], recorder.calls[0].t
    assert torch.equal(t_m, torch.maximum(t - 0.125, r))
    assert float((t - t_m).max()) == pytest.approx(0.125)


def test_rectification_bound_and_pixel_floor_reach_the_total() -> None:
    losses = run(Smooth(), **only(rectification=1.0), rectification_bound=1e-3)
    recorder = Recorder(Smooth())
    run(recorder, **only(rectification=1.0))
    end_t = recorder.calls[2].t[N : 2 * N]
    expected = (end_t * 1e-3 * losses.terms["rectification"]).mean()
    torch.testing.assert_close(losses.total, expected)
    floored = run(Smooth(), **only(pixel_mse=1.0), pixel_floor=1.0)
    torch.testing.assert_close(floored.total, floored.terms["pixel_mse"].mean())


def test_target_network_serves_the_consistency_target_only() -> None:
    x, condition = batch()
    trained, average = Recorder(Smooth(0)), Recorder(Smooth(1))
    losses = Objective(ObjectiveSettings())(
        trained, x, condition, torch.Generator().manual_seed(5), target_network=average
    )
    assert [call.gradient for call in average.calls] == [False, False]
    assert [call.gradient for call in trained.calls] == [True, True, False]
    plain = run(Smooth(0))
    assert not torch.equal(losses.terms["any_step"], plain.terms["any_step"])
    for name in ("flow_matching", "self_adversarial", "rectification", "pixel_mse"):
        assert torch.equal(losses.terms[name], plain.terms[name])


def test_before_self_adversarial_after_only_pixels_train_in_one_pass() -> None:
    recorder = Recorder(Smooth())
    losses = run(recorder, progress=0.59, self_adversarial_after=0.6, pixel_mse=2.0)
    (call,) = recorder.calls
    assert call.gradient and not call.r.any() and set(losses.terms) == {"pixel_mse"}
    x, _ = batch()
    error = (call.x_t - column(call.t) * call.output - x).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.terms["pixel_mse"], error)
    torch.testing.assert_close(losses.total, (2 * (1 - call.t) * error).mean())
    losses.total.backward()
    assert all(p.grad.abs().sum() > 0 for p in recorder.network.parameters())
    assert len(run(Smooth(), progress=0.6, self_adversarial_after=0.6).terms) == 6


def test_equal_seeds_give_equal_losses_and_other_seeds_others() -> None:
    first, again, other = run(Smooth(), seed=1), run(Smooth(), seed=1), run(Smooth(), seed=2)
    assert torch.equal(first.total, again.total)
    for name in first.terms:
        assert torch.equal(first.terms[name], again.terms[name])
        assert not torch.equal(first.terms[name], other.terms[name])


class Poisoned:
    """NaN where `where(t, r)` holds."""

    def __init__(self, where: str) -> None:
        self.where, self.network = where, Smooth()

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        bad = {"twin": t < 0, "real": (r == t) & (t > 0), "flow": (r > 0.9 * t) & (r < t)}
        output = self.network(x_t, t, r, condition)
        return output.masked_fill(column(bad[self.where]), math.nan)


@pytest.mark.parametrize(
    ("where", "term"),
    [("twin", "self_adversarial"), ("real", "rectification"), ("flow", "flow_matching")],
)
def test_a_term_that_is_not_finite_is_named(where: str, term: str) -> None:
    # d above the largest gap keeps the Euler steps out of the poisoned region.
    losses = run(Poisoned(where), consistency_step=0.5, seed=2)
    assert losses.not_finite() == term
    assert not losses.is_finite()
    assert run(Smooth()).is_finite() and run(Smooth()).not_finite() == ""


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
    rows = recorder.calls[2]
    end = slice(2, 4)
    x_hat = one_step_image(rows.x_t[end], rows.output[end], rows.t[end])
    torch.testing.assert_close(losses.terms["pixel_lpips"], lpips(x_hat, x))
    weight = (1 - rows.t[end]).clamp(min=0.25)
    torch.testing.assert_close(losses.total, (3 * weight * lpips(x_hat, x)).mean())
    losses.total.backward()
    assert float(network.last.bias.grad.abs().sum()) > 0
    without = Objective(ObjectiveSettings(pixel_lpips=0.0), lpips)
    assert without.lpips is None
