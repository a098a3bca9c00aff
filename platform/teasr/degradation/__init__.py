"""Real-ESRGAN degradations as albumentations transforms, reproducible per sample.

    from teasr.degradation import Degradation

    pair = Degradation("teasr", seed=7)(photograph, key="0001")   # pair.hr, pair.lr, pair.recipe

The transforms are imported when first asked for: albumentations imports torch with it (two seconds
and 200 MB), which a worker that only calls `Degradation` does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from teasr.degradation.operators import unsharp_mask
from teasr.degradation.presets import (
    PRESETS,
    SCALE,
    BlurSettings,
    ColourSettings,
    DegradationSettings,
    JPEGSettings,
    KernelMixture,
    NoiseSettings,
    ResizeMixture,
    ResizeSettings,
    StageSettings,
    load_preset,
)
from teasr.degradation.recipe import Degradation, Pair, replay, sample_seed
from teasr.degradation.steps import Step, apply, draw

if TYPE_CHECKING:
    from teasr.degradation.transforms import (
        ColourDegradation,
        JPEGCompression,
        RandomResize,
        RealESRGAN,
        RealESRGANBlur,
        RealESRGANNoise,
    )

__all__ = [
    "PRESETS",
    "SCALE",
    "BlurSettings",
    "ColourDegradation",
    "ColourSettings",
    "Degradation",
    "DegradationSettings",
    "JPEGCompression",
    "JPEGSettings",
    "KernelMixture",
    "NoiseSettings",
    "Pair",
    "RandomResize",
    "RealESRGAN",
    "RealESRGANBlur",
    "RealESRGANNoise",
    "ResizeMixture",
    "ResizeSettings",
    "StageSettings",
    "Step",
    "apply",
    "draw",
    "load_preset",
    "replay",
    "sample_seed",
    "unsharp_mask",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from teasr.degradation import transforms

    return getattr(transforms, name)
