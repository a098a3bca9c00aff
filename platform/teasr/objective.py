"""The TEASR objective: every term of self-adversarial any-step distillation, in one model.

Notation (METHOD of TEASR, arXiv 2606.16188, on TwinFlow, arXiv 2512.05150, and RCGM): x clean
image, z ~ N(0, I), x_t = (1 - t) x + t z, velocity v = z - x, and F(x_t, t, r | y) the average
velocity from level t to level r, so that x_r = x_t - (t - r) F and the one-step image is x_hat =
x_t - t F(x_t, t, 0). Negative times are the twin trajectory: F(x'_t, -t, -t) is the velocity of
the flow between noise and the model's own one-step images. sg[.] is stop-gradient.

| term             | network at       | target                                                     |
|------------------|------------------|------------------------------------------------------------|
| any_step         | (x_t, t, r)      | sg[F - e], e the recursive consistency residual            |
| end_to_end       | (x_t, t, 0)      | the same with r = 0, from any t                            |
| flow_matching    | (x_t, t, r ~ t)  | v                                                          |
| self_adversarial | (x'_t, -t', -t') | z' - x_fake, x_fake = sg[x_hat]                            |
| rectification    | (x_t, t, 0)      | sg[F - (F(x'_t, -t', -t') - F(x'_t, t', t'))], times w(t)|
| pixel            | x_hat            | x, by squared error and LPIPS, weighed by 1 - t            |

The rows of one batch that do not depend on each other are stacked into one forward pass. A step is
five passes over the weights in place of ten: the two Euler steps of the consistency target (without
gradient), the any-step + end-to-end + flow-matching rows, then the twin and the real velocity of
the fakes. The fakes of the self-adversarial and of the rectification term are the same points, so
the twin velocity is computed once; its detached value serves the rectification.

Every term is a pure function that returns one value per sample; the caller weighs and averages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field, field_validator
from torch import Tensor

from teasr.backbones.base import Velocity
from teasr.config import Settings
from teasr.lpips import Lpips


class ObjectiveSettings(Settings):
    """Weights and constants of the objective.

    With both twin terms (self_adversarial, rectification) at zero their two passes are saved.
    """

    any_step: float = Field(1.0, ge=0)
    """Weight of the average-velocity term for random r < t."""
    end_to_end: float = Field(0.25, ge=0)
    """Weight of the same with r = 0."""
    flow_matching: float = Field(0.25, ge=0)
    """Weight of the instantaneous velocity."""
    self_adversarial: float = Field(0.25, ge=0)
    """Weight of the twin trajectory's velocity."""
    rectification: float = Field(0.25, ge=0)
    """Weight of the rectification of one-step images."""
    pixel_mse: float = Field(1.0, ge=0)
    """Weight of the squared error of one-step images."""
    pixel_lpips: float = Field(1.0, ge=0)
    """Weight of LPIPS of one-step images; without LPIPS weights the term is left out."""
    pixel_floor: float = Field(0.0, ge=0, le=1)
    """Smallest timestep weight of the pixel terms: they carry max(1 - t, pixel_floor). The
    published 0 suits a pretrained backbone; one that learns from nothing needs pixels at pure
    noise too."""
    pure_noise_share: float = Field(0.0, ge=0, le=1)
    """Share of end-to-end rows placed exactly at t = 1, where one-step restoration starts."""
    consistency_step: float = Field(0.01, gt=0, le=0.5)
    """d of the recursive consistency target."""
    consistency_order: int = Field(2, ge=1)
    """N of the recursive consistency target: Euler steps without gradient."""
    fake_time_range: tuple[float, float] = (0.02, 0.98)
    """Levels of the twin trajectory, kept off 0 and 1: sign and boundary never degenerate."""
    rectification_bound: float = Field(10.0, gt=0)
    """Upper bound of the rectification's per-sample normaliser."""
    self_adversarial_after: float = Field(0.0, ge=0, le=1)
    """Share of the run in which the squared error of one-step images trains alone. A network that
    starts from nothing must first make pictures before it can learn from its own, and one pass a
    step is far cheaper than five; a pretrained network starts at 0."""

    @field_validator("fake_time_range")
    @classmethod
    def _inside(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] < value[1] < 1:
            raise ValueError("two increasing numbers strictly between 0 and 1 are expected")
        return value


@dataclass(frozen=True)
class Times:
    """The times that one step draws per sample; each (N,) float32."""

    any_t: Tensor
    """t of the any-step rows, in (0, 1)."""
    any_r: Tensor
    """r of the any-step rows, 0 <= r < t."""
    end_t: Tensor
    """t of the end-to-end rows, in (0, 1]."""
    flow_t: Tensor
    """t of the flow-matching rows."""
    flow_r: Tensor
    """r of the flow-matching rows, within 5% of t."""
    fake_t: Tensor
    """Level of the fakes, inside `fake_time_range`."""


@dataclass(frozen=True)
class Losses:
    """One step's losses.

    Attributes:
        total: scalar, the weighted mean to differentiate.
        terms: per-sample values (N,) by term, unweighted and detached: what is logged.
    """

    total: Tensor
    terms: dict[str, Tensor]

    def is_finite(self) -> bool:
        """Whether every value of every term is a finite number."""
        return not self.not_finite()

    def not_finite(self) -> str:
        """Name of the first term with a NaN or an infinity, or nothing."""
        for name, values in self.terms.items():
            if not bool(torch.isfinite(values).all()):
                return name
        return ""


# --------------------------------------------------------------------------- the terms, each on
# its own


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - |t|) x + |t| z; x, z (N, C, H, W), t (N,)."""
    level = _column(t.abs())
    return (1 - level) * x + level * z


def one_step_image(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x_hat = x_t - t F(x_t, t, 0)."""
    return x_t - _column(t) * velocity


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error averaged over all but the first axis: (N, ...) -> (N,)."""
    return (prediction - target).square().flatten(1).mean(1)


def rcgm_integral(
    network: Velocity, x_m: Tensor, t_m: Tensor, r: Tensor, condition: Tensor, order: int
) -> Tensor:
    """I = sum_i (s_i - s_{i+1}) F(x_{s_i}, s_i, s_{i+1}), `order` Euler steps from t_m to r.

    Args:
        network: evaluated without gradient.
        x_m: (N, C, H, W), the point at level `t_m` (N,); r: (N,) <= t_m.
    """
    total = torch.zeros_like(x_m)
    point = x_m
    for i in range(order):
        start, end = (torch.lerp(t_m, r, j / order) for j in (i, i + 1))
        moved = _column(start - end) * network(point, start, end, condition)
        point = point - moved
        total = total + moved
    return total


def rcgm_target(
    prediction: Tensor, velocity: Tensor, integral: Tensor, t: Tensor, t_m: Tensor, r: Tensor
) -> Tensor:
    """sg[F - e] with e = clamp(((t - r) F - I) / (t - t_m) - v, -1, 1) (RCGM; METHOD section 3).

    The consistent average velocity satisfies (t - r) F = (t - t_m) v + I; e is the residual on the
    scale of a velocity. Where the gap is a single step (t_m = r) the target is v itself.
    """
    prediction = prediction.detach()
    gap = _column((t - t_m).clamp(min=1e-6))
    residual = (_column(t - r) * prediction - integral) / gap - velocity
    target = prediction - residual.clamp(-1, 1)
    return torch.where(_column(t_m <= r), velocity, target)


def rectification_target(
    prediction: Tensor, fake_velocity: Tensor, real_velocity: Tensor
) -> Tensor:
    """sg[F - (F_fake(x'_t') - F_real(x'_t'))]: where both velocities agree, nothing moves."""
    return (prediction - (fake_velocity - real_velocity)).detach()


def rectification_weight(
    fake_velocity: Tensor, real_velocity: Tensor, t: Tensor, bound: float
) -> Tensor:
    """(N,) weight of the rectification: t * min(1 / mean|correction|, bound).

    The second factor is the normaliser of distribution matching (DMD, arXiv 2311.18828, eq. 8), per
    sample and bounded. The first is the timestep-aware part: a change of F moves the one-step image
    by t times as much, so at low noise there is little to rectify and much to disturb.
    """
    size = (fake_velocity - real_velocity).detach().abs().flatten(1).mean(1)
    return t * (1 / size.clamp(min=1e-6)).clamp(max=bound)


def pixel_weight(t: Tensor, floor: float) -> Tensor:
    """(N,) max(1 - t, floor): pixels are trusted where little noise is left."""
    return (1 - t).clamp(min=floor)


def draw_times(count: int, settings: ObjectiveSettings, generator: torch.Generator) -> Times:
    """Fresh times for `count` samples, in float32 on the CPU."""
    uniform = torch.rand(7, count, generator=generator)
    any_t = uniform[0]
    flow_t = uniform[3]
    low, high = settings.fake_time_range
    at_noise = uniform[6] < settings.pure_noise_share
    return Times(
        any_t=any_t,
        any_r=any_t * uniform[1],
        end_t=torch.where(at_noise, torch.ones(count), uniform[2]),
        flow_t=flow_t,
        flow_r=flow_t * (1 - 0.05 * uniform[4]),
        fake_t=low + (high - low) * uniform[5],
    )


# --------------------------------------------------------------------------- the step


class Objective:
    """All terms of one step, stacked into few passes.

    Args:
        settings: weights and constants.
        lpips: perceptual distance for the pixel term, or None to leave it out.
    """

    def __init__(self, settings: ObjectiveSettings, lpips: Lpips | None = None) -> None:
        self.settings = settings
        self.lpips = lpips if settings.pixel_lpips > 0 else None

    def __call__(
        self,
        network: Velocity,
        x: Tensor,
        condition: Tensor,
        generator: torch.Generator,
        *,
        progress: float = 1.0,
        target_network: Velocity | None = None,
    ) -> Losses:
        """Losses of one batch.

        Args:
            network: what is trained.
            x: (N, C, H, W) clean images in [-1, 1]. condition: (N, ...) of the same pictures.
            generator: source of noise and times, on the CPU.
            progress: share of the run that is done, for `self_adversarial_after`.
            target_network: network without gradient for the consistency target (an average of
                the weights for small models); None takes `network` itself.
        """
        settings = self.settings
        times = _to(draw_times(len(x), settings, generator), x.device)
        if progress < settings.self_adversarial_after:
            return self._first_pictures(network, x, condition, generator, times)

        z_any, z_end, z_flow, z_fake = (_noise_like(x, generator) for _ in range(4))

        # 1. Consistency targets, without gradient: Euler steps of any-step and end-to-end rows.
        t = torch.cat([times.any_t, times.end_t])
        r = torch.cat([times.any_r, torch.zeros_like(times.end_t)])
        x2 = torch.cat([x, x])
        z2 = torch.cat([z_any, z_end])
        v2 = z2 - x2
        x_t = interpolate(x2, z2, t)
        t_m = torch.maximum(t - settings.consistency_step, r)
        x_m = x_t - _column(t - t_m) * v2
        with torch.no_grad():
            integral = rcgm_integral(
                target_network or network,
                x_m,
                t_m,
                r,
                _repeat(condition, 2),
                settings.consistency_order,
            )

        # 2. Rows with gradient: any-step, end-to-end, flow matching.
        x_flow = interpolate(x, z_flow, times.flow_t)
        prediction = network(
            torch.cat([x_t, x_flow]),
            torch.cat([t, times.flow_t]),
            torch.cat([r, times.flow_r]),
            _repeat(condition, 3),
        )
        consistent, flow = prediction.split([2 * len(x), len(x)])
        target = rcgm_target(consistent, v2, integral, t, t_m, r)
        any_step, end_to_end = mean_square(consistent, target).chunk(2)
        end_prediction = consistent[len(x) :]
        end_t = times.end_t
        x_hat = one_step_image(x_t[len(x) :], end_prediction, end_t)

        terms = {
            "any_step": any_step,
            "end_to_end": end_to_end,
            "flow_matching": mean_square(flow, z_flow - x),
            **self._pixel_terms(x_hat, x),
        }
        pixels = pixel_weight(end_t, settings.pixel_floor)
        weights: dict[str, Tensor | float] = {
            "any_step": settings.any_step,
            "end_to_end": settings.end_to_end,
            "flow_matching": settings.flow_matching,
            "pixel_mse": settings.pixel_mse * pixels,
            "pixel_lpips": settings.pixel_lpips * pixels,
        }

        # 3. The model's own images: twin velocity with gradient, real velocity without.
        if settings.self_adversarial > 0 or settings.rectification > 0:
            x_fake, fake_t = x_hat.detach(), times.fake_t
            x_fake_t = interpolate(x_fake, z_fake, fake_t)
            twin = network(x_fake_t, -fake_t, -fake_t, condition)
            with torch.no_grad():
                real = network(x_fake_t, fake_t, fake_t, condition)
            terms["self_adversarial"] = mean_square(twin, z_fake - x_fake)
            terms["rectification"] = mean_square(
                end_prediction, rectification_target(end_prediction, twin, real)
            )
            weights["self_adversarial"] = settings.self_adversarial
            weights["rectification"] = settings.rectification * rectification_weight(
                twin, real, end_t, settings.rectification_bound
            )
        return _weigh(terms, weights)

    def _first_pictures(
        self,
        network: Velocity,
        x: Tensor,
        condition: Tensor,
        generator: torch.Generator,
        times: Times,
    ) -> Losses:
        """The squared error of one-step images alone, of end-to-end rows: one pass."""
        settings, t = self.settings, times.end_t
        x_t = interpolate(x, _noise_like(x, generator), t)
        x_hat = one_step_image(x_t, network(x_t, t, torch.zeros_like(t), condition), t)
        weight = settings.pixel_mse * pixel_weight(t, settings.pixel_floor)
        return _weigh({"pixel_mse": mean_square(x_hat, x)}, {"pixel_mse": weight})

    def _pixel_terms(self, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
        terms = {"pixel_mse": mean_square(x_hat, x)}
        if self.lpips is not None:
            terms["pixel_lpips"] = self.lpips(x_hat, x)
        return terms


def _weigh(terms: dict[str, Tensor], weights: dict[str, Tensor | float]) -> Losses:
    total = sum((weights[name] * values).mean() for name, values in terms.items())
    assert isinstance(total, Tensor)
    return Losses(total, {name: values.detach() for name, values in terms.items()})


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _repeat(condition: Tensor, times: int) -> Tensor:
    return torch.cat([condition] * times)


def _noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(x.device)


def _to(times: Times, device: torch.device) -> Times:
    return Times(**{name: value.to(device) for name, value in vars(times).items()})
