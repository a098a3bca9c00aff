"""Settings of the two-stage degradation, and the presets `realesrgan` and `teasr`.

Each operator has its own section, which its albumentations transform takes as keyword arguments; a
stage nests one of each. The sections' defaults are Real-ESRGAN x4plus's first stage (2107.10833).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from teasr.config import Settings, read_yaml
from teasr.errors import UsageError

SCALE = 4  # the factor between ground truth and LR, of both presets and of every model here


def _ordered(low: float, high: float = math.inf) -> Callable[[Any], Any]:
    def check(pair: Any) -> Any:
        if not low <= pair[0] <= pair[1] <= high:
            top = "" if high == math.inf else f" and at most {high:g}"
            raise ValueError(f"expected [low, high] with low <= high, at least {low:g}{top}")
        return pair

    return check


def _around_one(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= 1 <= pair[1] < math.inf:
        raise ValueError("expected [low, high] with 0 < low <= 1 <= high")
    return pair


def _odd(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] % 2 == 0 or pair[1] % 2 == 0:
        raise ValueError("kernel sizes are odd")
    return pair


Probability = Annotated[float, Field(ge=0, le=1)]
SigmaRange = Annotated[tuple[float, float], AfterValidator(_ordered(0.05, 100))]
AroundOne = Annotated[tuple[float, float], AfterValidator(_around_one)]
NoiseRange = Annotated[tuple[float, float], AfterValidator(_ordered(0, 255))]
SizeRange = Annotated[tuple[int, int], AfterValidator(_ordered(3, 101)), AfterValidator(_odd)]
QualityRange = Annotated[tuple[int, int], AfterValidator(_ordered(1, 100))]


class _Section(Settings):
    model_config = ConfigDict(use_attribute_docstrings=True)


class _Mixture(_Section):
    """Probabilities of exclusive choices; they sum to 1."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = sum(self.model_dump().values())
        if abs(total - 1) > 1e-6:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"the probabilities of {names} sum to {total:g}; they must sum to 1")
        return self


class KernelMixture(_Mixture):
    """Probability of each blur kernel shape, given that the kernel is no sinc."""

    isotropic: Probability = 0.45
    """Isotropic Gaussian."""
    anisotropic: Probability = 0.25
    """Gaussian with two sigmas and a rotation."""
    generalized_isotropic: Probability = 0.12
    """Generalised Gaussian, one sigma."""
    generalized_anisotropic: Probability = 0.03
    """Generalised Gaussian, two sigmas and a rotation."""
    plateau_isotropic: Probability = 0.12
    """Plateau kernel, one sigma."""
    plateau_anisotropic: Probability = 0.03
    """Plateau kernel, two sigmas and a rotation."""


class ResizeMixture(_Mixture):
    """Probability that a random resize enlarges, shrinks or keeps the size."""

    up: Probability = 0.2
    """Enlarge, by U(1, high)."""
    down: Probability = 0.7
    """Shrink, by U(low, 1)."""
    keep: Probability = 0.1
    """Leave the size."""


class BlurSettings(_Section):
    """A kernel of random size, shape and width. The rotation is always U(-pi, pi)."""

    kernels: KernelMixture = KernelMixture()
    """Shapes of the kernel."""
    sinc_probability: Probability = 0.1
    """Probability of a sinc filter in place of the shapes above."""
    size_range: SizeRange = (7, 21)
    """Smallest and largest kernel size, pixels; every odd size between is equally likely."""
    sigma_range: SigmaRange = (0.2, 3.0)
    """Standard deviation of each axis, pixels."""
    generalized_beta_range: AroundOne = (0.5, 4.0)
    """Exponent of generalised Gaussians: below and above 1 with probability 1/2 each."""
    plateau_beta_range: AroundOne = (1.0, 2.0)
    """Exponent of plateau kernels, drawn in the same way."""


class ResizeSettings(_Section):
    """A random resize by area, bilinear or bicubic interpolation, equally likely."""

    directions: ResizeMixture = ResizeMixture()
    """Enlarge, shrink or keep."""
    scale_range: AroundOne = (0.15, 1.5)
    """Smallest and largest factor."""


class NoiseSettings(_Section):
    """Gaussian or Poisson noise."""

    gaussian_probability: Probability = 0.5
    """Probability of Gaussian noise; Poisson noise otherwise."""
    gaussian_sigma_range: NoiseRange = (1.0, 30.0)
    """Standard deviation of Gaussian noise, grey levels of 255."""
    poisson_scale_range: NoiseRange = (0.05, 3.0)
    """Strength of Poisson noise; 1 is the physical one."""
    grey_probability: Probability = 0.4
    """Probability that the three channels share the noise."""


class JPEGSettings(_Section):
    """JPEG compression."""

    quality_range: QualityRange = (30, 95)
    """Lowest and highest quality; every integer between is equally likely."""


class ColourSettings(_Section):
    """Colour casts and grey pictures at the LR size, both off unless a probability is given.

    Face restoration degrades so; GFPGAN (arXiv 2101.04061) takes 0.3, 20 and 0.01.
    """

    jitter_probability: Probability = 0.0
    """Probability of a colour cast."""
    jitter_shift: float = Field(20.0, ge=0, le=255)
    """Most that the cast adds to or takes from a channel, grey levels of 255."""
    grey_probability: Probability = 0.0
    """Probability that the picture loses its colours."""


class StageSettings(_Section):
    """One stage: blur, resize, noise, JPEG, in this order."""

    blur_probability: Probability = 1.0
    """Probability that the stage blurs at all."""
    blur: BlurSettings = BlurSettings()
    """Blur kernel."""
    resize: ResizeSettings = ResizeSettings()
    """Random resize; in the second stage relative to the LR size."""
    noise: NoiseSettings = NoiseSettings()
    """Noise."""
    jpeg: JPEGSettings = JPEGSettings()
    """Compression."""


class DegradationSettings(_Section):
    """The whole degradation of a picture to a quarter of its size."""

    name: str = Field(min_length=1)
    """Name of the preset: part of every sample's seed."""
    first: StageSettings
    """First stage, on the ground truth."""
    second: StageSettings
    """Second stage, on the result of the first."""
    final_sinc_probability: Probability = 0.8
    """Probability of the last sinc filter, at the LR size."""
    colour: ColourSettings = ColourSettings()
    """Colour cast and loss of colours, after everything else; off unless asked for."""
    sharpen_ground_truth: bool = False
    """Sharpen the ground truth by unsharp masking first, and degrade the sharpened picture.

    Real-ESRGAN trains its L1 and perceptual targets so, to offset what a GAN smooths. TEASR learns
    the photograph as it is, and fidelity metrics compare with that, so both presets leave it off.
    """


PRESETS: Mapping[str, DegradationSettings] = {
    "realesrgan": DegradationSettings(
        name="realesrgan",
        first=StageSettings(),
        second=StageSettings(
            blur_probability=0.8,
            blur=BlurSettings(sigma_range=(0.2, 1.5)),
            resize=ResizeSettings(
                directions=ResizeMixture(up=0.3, down=0.4, keep=0.3), scale_range=(0.3, 1.2)
            ),
            noise=NoiseSettings(gaussian_sigma_range=(1, 25), poisson_scale_range=(0.05, 2.5)),
        ),
    ),
    "teasr": DegradationSettings(
        name="teasr",
        first=StageSettings(
            resize=ResizeSettings(scale_range=(0.3, 1.5)),
            noise=NoiseSettings(gaussian_sigma_range=(1, 15), poisson_scale_range=(0.05, 2)),
            jpeg=JPEGSettings(quality_range=(60, 95)),
        ),
        second=StageSettings(
            blur_probability=0.5,
            blur=BlurSettings(sigma_range=(0.2, 1.5)),
            resize=ResizeSettings(
                directions=ResizeMixture(up=0.3, down=0.4, keep=0.3), scale_range=(0.6, 1.2)
            ),
            noise=NoiseSettings(gaussian_sigma_range=(1, 12), poisson_scale_range=(0.05, 1)),
            jpeg=JPEGSettings(quality_range=(60, 100)),
        ),
    ),
}


def load_preset(preset: str | Path) -> DegradationSettings:
    """A preset by name, or the settings in a YAML file.

    A file may start from a preset with the key `extends: teasr` and change single fields of it; its
    `name` is the file's stem unless it states one. Without `extends` it states both stages.

    Raises:
        UsageError: when the preset is unknown, the file cannot be read or a field is wrong.
    """
    if isinstance(preset, str) and preset in PRESETS:
        return PRESETS[preset]
    path = Path(preset)
    if path.suffix not in {".yaml", ".yml"}:
        raise _unknown(str(preset))
    data = read_yaml(path)
    base: dict[str, Any] = {}
    if "extends" in data:
        parent = str(data.pop("extends"))
        if parent not in PRESETS:
            raise _unknown(parent, f"{path}: 'extends': ")
        base = PRESETS[parent].model_dump()
    return DegradationSettings.from_mapping(_merged(base, {"name": path.stem, **data}), str(path))


def _unknown(preset: str, where: str = "") -> UsageError:
    close = difflib.get_close_matches(preset, PRESETS, n=1)
    meant = f" Did you mean '{close[0]}'?" if close else ""
    return UsageError(
        f"{where}Unknown degradation preset '{preset}'.{meant}",
        f"Accepted: {', '.join(PRESETS)}" + ("." if where else ", or the path of a .yaml file."),
    )


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        result[key] = value
    return result
