"""Figures of a restored picture alone: NIQE, and three learned ones of the optional package pyiqa.

pyiqa fetches the weights of a metric when it is first made.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

from teasr.metrics import Bytes
from teasr.niqe import niqe

Measure = Callable[[Bytes], float | None]
"""uint8 (H, W, 3) RGB to a figure; None, not measured, of a picture that is too small."""

PYIQA = ("musiq", "maniqa", "clipiqa")
_SMALLEST = 224  # pixels a side of what their networks were trained on


def has_pyiqa() -> bool:
    """Whether pyiqa can be imported."""
    return importlib.util.find_spec("pyiqa") is not None


def measure(name: str) -> Measure:
    """`niqe`, or one of `PYIQA`, which wants that package.

    Pictures of less than 224 pixels a side are not measured by those of pyiqa.
    """
    if name == "niqe":
        return niqe
    metric = importlib.import_module("pyiqa").create_metric(name, device="cpu")

    @torch.no_grad()
    def figure(rgb: Bytes) -> float | None:
        if min(rgb.shape[:2]) < _SMALLEST:
            return None
        batch = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 255
        with torch.random.fork_rng(devices=[]):  # some look at random crops
            torch.manual_seed(0)
            return float(metric(batch))

    return figure
