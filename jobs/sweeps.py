"""How often a training goes over its network's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SweepCounter:
    """Counts the passes over a network's weights, as `teasr.rehearsal` does: a forward pass is one,
    and one that is differentiated is two."""

    def __init__(self, network: nn.Module) -> None:
        self._passes = 0
        network.register_forward_pre_hook(self._count)

    def take(self) -> int:
        """Passes since the last call."""
        passes, self._passes = self._passes, 0
        return passes

    def _count(self, *_: Any) -> None:
        self._passes += 1 + torch.is_grad_enabled()
