"""What the method asks of a network, and nothing more.

The objective and the sampler see a network only through `Velocity`; everything else about a
backbone (its tokens, its adapters, where its weights live) is its own business. A backbone is
built from its settings, so that a checkpoint folder of settings and weights is enough to have it
back.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

MINIMUM_TIME = 0.1
"""Below this noise level the division in `velocity_from_image` is held constant."""


class Velocity(Protocol):
    """F(x_t, t, r | y): the average velocity from noise level `t` to target level `r`.

    Shapes and ranges:
        x_t: (N, C, H, W), noisy image or latent, x_t = (1 - |t|) x + |t| z.
        t: (N,) in [-1, 1]; `|t|` is the noise level. Negative: the twin (fake) trajectory.
        r: (N,) target level, |r| <= |t|, of the sign of `t` (zero belongs to the real trajectory).
        condition: of N low-resolution pictures, in the backbone's own form.
        returns: (N, C, H, W) float32.
    """

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Any) -> Tensor: ...


class Backbone(nn.Module):
    """A network that predicts `Velocity` and knows how to size its inputs.

    Attributes:
        scale: magnification from the low-resolution picture to the restored one.
        multiple: low-resolution sides must be multiples of this many pixels.
        period: low-resolution pixels after which the network's division of a picture repeats, a
            multiple of `multiple`: tiles that start at multiples of it are divided alike.
        tile, overlap, warp: what `RestorationSettings` take where they leave it to the model. The
            levels stay near 1 here, where a small network's one-step pictures are best: each step
            restores anew, knowing the last result.
    """

    scale: int
    multiple: int
    period: int
    tile: int = 384
    overlap: int = 8
    warp: tuple[float, float] = (0.05, 1.0)

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Any) -> Tensor:
        raise NotImplementedError

    def prepare(self, condition: Tensor) -> Any:
        """What `forward` takes in place of `condition`, so that evaluations that differ in x_t, t
        and r only share the work that depends on nothing else."""
        return condition

    def fuse(self) -> None:
        """Get ready to be called many times without gradient, where there is something to gain;
        results stay equal up to rounding."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute type: that of the weights."""
        return next(self.parameters()).dtype


def velocity_from_image(x_t: Tensor, image: Tensor, t: Tensor) -> Tensor:
    """F = (x_t - x_hat) / |t|, the velocity that reaches `image` in one step (METHOD: section 2).

    The divisor is held at `MINIMUM_TIME` from below, so that a small error of the image never
    becomes an unbounded velocity; the one-step image x_t - t F is then x_t + (x_hat - x_t) t /
    MINIMUM_TIME.

    Args:
        x_t, image: (N, C, H, W) float32. t: (N,), sign ignored.
    """
    return (x_t - image) / t.abs().clamp(min=MINIMUM_TIME).view(-1, 1, 1, 1)
