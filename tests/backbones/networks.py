"""Small networks with every weight alive, something to feed them, and what they add to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teasr.backbones.base import MINIMUM_TIME
from teasr.backbones.dit import PRESETS, DualBranchDiT, upsample


def network(seed: int | None = None, **changes: Any) -> DualBranchDiT:
    """The smallest preset; with a seed, every parameter is moved off its initial value."""
    torch.manual_seed(0)
    made = DualBranchDiT(PRESETS["teasr-xs"].model_copy(update=changes)).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def inputs(rows: int = 8, columns: int = 8, count: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    condition = torch.rand(count, 3, rows, columns, generator=generator) * 2 - 1
    x_t = torch.randn(count, 3, 4 * rows, 4 * columns, generator=generator)
    t, r = torch.full((count,), 0.8), torch.full((count,), 0.3)
    return x_t, t, r, condition


CHANGES = ("x_t", "t", "r", "sign of r", "condition")


def with_other(
    changed: str, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor
) -> tuple[Tensor, ...]:
    """The inputs with one of `CHANGES` made to them."""
    return {
        "x_t": (x_t.flip(-1), t, r, condition),
        "t": (x_t, t - 0.1, r, condition),
        "r": (x_t, t, r - 0.1, condition),
        "sign of r": (x_t, t, -r, condition),
        "condition": (x_t, t, r, condition.flip(-1)),
    }[changed]


@torch.no_grad()
def residual(made: DualBranchDiT, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
    """What the network adds to the bicubic picture: free of the t in the conversion."""
    velocity = made(x_t, t, r, condition)
    level = t.abs().clamp(min=MINIMUM_TIME).view(-1, 1, 1, 1)
    return x_t - level * velocity - upsample(condition, 4)
