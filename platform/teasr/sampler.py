"""Any-step sampling: one network, any number of steps.

Levels fall from t_0 = 1 (noise) to t_K = 0 (picture). Four ways to take a step (UCGM sampler,
arXiv 2505.07447; METHOD section 5):

- `few`: jump to the picture, x_hat = x_t - t F(x_t, t, 0), then noise it again to the next level;
- `any`: jump to the next level, x_next = x_t - (t - t_next) F(x_t, t, t_next);
- `multi`: integrate the instantaneous velocity F(x_t, t, t) by Euler steps;
- `heun`: by Heun's steps, of second order (EDM, arXiv 2206.00364, algorithm 1): two evaluations
  each but for the last, which is Euler's, because the picture has no velocity at t = 0.

At K = 1, `few` and `any` are the same single evaluation F(z, 1, 0). Noise comes in as an
argument, so that sampling is a pure function and a picture does not depend on how it was cut into
tiles.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from teasr.backbones.base import Velocity
from teasr.config import Settings

Style = Literal["few", "any", "multi", "heun"]
MAX_STEPS = 64


class SamplerSettings(Settings):
    """How a picture is sampled."""

    steps: int = Field(1, ge=1, le=MAX_STEPS)
    """K; evaluations of the network, but for `heun` with its 2 K - 1."""
    style: Style = "few"
    """`few`, `any`, `multi` or `heun`, see the module's text."""
    stochastic_share: float = Field(0.0, ge=0, le=1)
    """rho of `few`: share of fresh noise when noising again; 0 keeps the predicted noise."""
    warp: tuple[float, float] | None = None
    """(a, b) of a Kumaraswamy warp of the uniform levels; None leaves them uniform."""

    @field_validator("warp")
    @classmethod
    def _positive(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not min(value) > 0:  # else the levels would not end at 0
            raise ValueError("two numbers above 0 are expected")
        return value


def levels(steps: int, warp: tuple[float, float] | None = None) -> list[float]:
    """`steps` + 1 falling levels from 1 to 0; warped to 1 - (1 - u^a)^b (Kumaraswamy)."""
    uniform = [1 - i / steps for i in range(steps + 1)]
    if warp is None:
        return uniform
    a, b = warp
    return [1 - (1 - u**a) ** b for u in uniform]


def noise_draws(settings: SamplerSettings) -> int:
    """Independent noise fields that `sample` needs: the first, one per re-noising that adds any."""
    fresh = settings.style == "few" and settings.stochastic_share > 0
    return settings.steps if fresh else 1


@torch.no_grad()
def sample(network: Velocity, condition: Any, noise: Tensor, settings: SamplerSettings) -> Tensor:
    """Restored pictures (N, C, H, W), nominally in [-1, 1], not clamped.

    Args:
        condition: of the N low-resolution pictures, as `network` takes it.
        noise: (`noise_draws(settings)`, N, C, H, W), independent standard normal fields.
    """
    path = levels(settings.steps, settings.warp)

    def velocity(x_t: Tensor, t: float, r: float) -> Tensor:
        times, targets = (torch.full((len(x_t),), time, device=x_t.device) for time in (t, r))
        return network(x_t, times, targets, condition)

    x_t = noise[0]
    for i, (start, end) in enumerate(pairwise(path)):
        if settings.style == "few":
            average = velocity(x_t, start, 0.0)
            image = x_t - start * average
            if end == 0:
                return image
            predicted = x_t + (1 - start) * average
            share = settings.stochastic_share
            if share > 0:  # keeps unit variance: the two noises are independent
                predicted = (1 - share) ** 0.5 * predicted + share**0.5 * noise[i + 1]
            x_t = (1 - end) * image + end * predicted
        elif settings.style == "any":
            x_t = x_t - (start - end) * velocity(x_t, start, end)
        else:
            slope = velocity(x_t, start, start)
            if settings.style == "heun" and end > 0:
                euler = x_t - (start - end) * slope
                slope = (slope + velocity(euler, end, end)) / 2
            x_t = x_t - (start - end) * slope
    return x_t
