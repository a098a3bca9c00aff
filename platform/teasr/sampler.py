"""Any-step sampling: one network, any number of steps.

Levels fall from t_0 = 1 (noise) to t_K = 0 (picture). Three ways to take a step (UCGM sampler,
arXiv 2505.07447; METHOD section 5):

- `few`: jump to the picture, x_hat = x_t - t F(x_t, t, 0), then noise it again to the next level;
- `any`: jump to the next level, x_next = x_t - (t - t_next) F(x_t, t, t_next);
- `multi`: integrate the instantaneous velocity F(x_t, t, t) by Euler steps.

At K = 1, `few` and `any` are the same single evaluation F(z, 1, 0). Noise comes in as an
argument, so that sampling is a pure function and a picture does not depend on how it was cut into
tiles.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from teasr.backbones.base import Velocity
from teasr.config import Settings

Style = Literal["few", "any", "multi"]
MAX_STEPS = 64


class SamplerSettings(Settings):
    """How a picture is sampled."""

    steps: int = Field(1, ge=1, le=MAX_STEPS)
    """K, evaluations of the network."""
    style: Style = "few"
    """`few`, `any` or `multi`, see the module's text."""
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
def sample(
    network: Velocity, condition: Tensor, noise: Tensor, settings: SamplerSettings
) -> Tensor:
    """Restored pictures (N, C, H, W), nominally in [-1, 1], not clamped.

    Args:
        condition: (N, ...) of the low-resolution pictures.
        noise: (`noise_draws(settings)`, N, C, H, W), independent standard normal fields.
    """
    path = levels(settings.steps, settings.warp)
    x_t = noise[0]
    for i, (start, end) in enumerate(pairwise(path)):
        t = torch.full((len(x_t),), start, device=x_t.device)
        target = {"few": 0.0, "any": end, "multi": start}[settings.style]
        velocity = network(x_t, t, torch.full_like(t, target), condition)
        if settings.style != "few":
            x_t = x_t - (start - end) * velocity
            continue
        image = x_t - start * velocity
        if end == 0:
            return image
        predicted = x_t + (1 - start) * velocity
        share = settings.stochastic_share
        if share > 0:  # keeps unit variance: the two noises are independent
            predicted = (1 - share) ** 0.5 * predicted + share**0.5 * noise[i + 1]
        x_t = (1 - end) * image + end * predicted
    return x_t
