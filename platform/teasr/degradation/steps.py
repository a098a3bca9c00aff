"""Drawing a degradation and running it: the one place of each Real-ESRGAN rule.

All random parameters are drawn before a pixel is read; the result, a list of `Step`, is plain JSON.
The albumentations transforms and `Degradation` both draw and run through this module.
The order and the rules are those of Real-ESRGAN (arXiv 2107.10833, section 3 and figure 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teasr.degradation import operators
from teasr.degradation.kernels import PLATEAUS
from teasr.degradation.presets import (
    SCALE,
    BlurSettings,
    ColourSettings,
    DegradationSettings,
    JPEGSettings,
    NoiseSettings,
    ResizeSettings,
)
from teasr.errors import UsageError

OPERATORS: Mapping[str, Callable[..., operators.Image]] = {
    "blur": operators.blur,
    "resize": operators.resize,
    "gaussian_noise": operators.gaussian_noise,
    "poisson_noise": operators.poisson_noise,
    "jpeg": operators.jpeg,
    "unsharp_mask": operators.unsharp_mask,
    "colour_jitter": operators.colour_jitter,
    "greyscale": operators.greyscale,
}
# Seeds stay below 2^53: exact in every JSON reader, not only in those with integers.
_NOISE_SEEDS = 2**53


@dataclass(frozen=True)
class Step:
    """One operator of `OPERATORS` with its keyword arguments, all of them JSON values.

    Floats are Python floats, which JSON carries exactly.
    """

    operator: str
    params: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """`{"operator": name, "params": {...}}`."""
        return {"operator": self.operator, "params": dict(self.params)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Step:
        """The inverse of `to_dict`.

        Raises:
            UsageError: when the mapping is no step, or its operator is unknown.
        """
        try:
            step = cls(operator=data["operator"], params=dict(data["params"]))
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{data!r} is not a degradation step.") from None
        if step.operator not in OPERATORS:
            raise UsageError(
                f"Unknown degradation operator '{step.operator}'.",
                f"Known: {', '.join(OPERATORS)}.",
            )
        return step


def draw_blur(settings: BlurSettings, generator: np.random.Generator) -> Step:
    """A sinc filter with its probability, else a kernel of the mixture."""
    low, high = settings.size_range
    size = low + 2 * int(generator.integers((high - low) // 2 + 1))
    if generator.random() < settings.sinc_probability:
        # A small kernel cannot hold the long waves of a low cut-off.
        return _sinc(size, math.pi / 3 if size < 13 else math.pi / 5, generator)
    shape = _choose(settings.kernels.model_dump(), generator)
    sigma_x = sigma_y = generator.uniform(*settings.sigma_range)
    rotation = 0.0
    if "anisotropic" in shape:
        sigma_y = generator.uniform(*settings.sigma_range)
        rotation = generator.uniform(-math.pi, math.pi)
    params = {"sigma_x": sigma_x, "sigma_y": sigma_y, "rotation": rotation}
    if "_" in shape:
        plateau = shape in PLATEAUS
        low_beta, high_beta = (
            settings.plateau_beta_range if plateau else settings.generalized_beta_range
        )
        # Not U(low, high): peaked and flat shapes are equally likely, whatever the range.
        below = generator.random() < 0.5
        params["beta"] = generator.uniform(*((low_beta, 1.0) if below else (1.0, high_beta)))
    return Step("blur", {"shape": shape, "size": size, **params})


def draw_resize(
    settings: ResizeSettings, height: float, width: float, generator: np.random.Generator
) -> Step:
    """A random resize relative to `(height, width)`; sizes are rounded down (the reference's)."""
    low, high = settings.scale_range
    direction = _choose(settings.directions.model_dump(), generator)
    scale = 1.0
    if direction != "keep":
        scale = generator.uniform(*((1.0, high) if direction == "up" else (low, 1.0)))
    return _resize(int(height * scale), int(width * scale), generator)


def draw_noise(settings: NoiseSettings, generator: np.random.Generator) -> Step:
    """Gaussian or Poisson noise, coloured or grey."""
    gaussian = generator.random() < settings.gaussian_probability
    strength = (
        {"sigma": generator.uniform(*settings.gaussian_sigma_range)}
        if gaussian
        else {"scale": generator.uniform(*settings.poisson_scale_range)}
    )
    grey = bool(generator.random() < settings.grey_probability)
    seed = int(generator.integers(_NOISE_SEEDS))
    operator = "gaussian_noise" if gaussian else "poisson_noise"
    return Step(operator, {**strength, "grey": grey, "seed": seed})


def draw_jpeg(settings: JPEGSettings, generator: np.random.Generator) -> Step:
    """JPEG of random quality."""
    low, high = settings.quality_range
    return Step("jpeg", {"quality": int(generator.integers(low, high + 1))})


def draw_colour(settings: ColourSettings, generator: np.random.Generator) -> list[Step]:
    """A colour cast, then grey, each with its probability; what is off draws nothing."""
    steps = []
    if settings.jitter_probability and generator.random() < settings.jitter_probability:
        most = settings.jitter_shift
        steps.append(Step("colour_jitter", {"shift": generator.uniform(-most, most, 3).tolist()}))
    if settings.grey_probability and generator.random() < settings.grey_probability:
        steps.append(Step("greyscale", {}))
    return steps


def draw(
    settings: DegradationSettings, height: int, width: int, generator: np.random.Generator
) -> list[Step]:
    """Every parameter of the two-stage degradation of a `(height, width)` picture.

    Stage one: blur, resize, noise, JPEG. Stage two: blur with its probability, resize relative to
    the LR size, noise; then, by the toss of a coin, [resize to the LR size, final sinc] before or
    after the JPEG; last, the colour steps. With `sharpen_ground_truth` an unsharp mask comes first.

    Raises:
        UsageError: when height or width is no positive multiple of 4.
    """
    if min(height, width) < SCALE or height % SCALE or width % SCALE:
        raise UsageError(
            f"A ground truth of {width}x{height} pixels has no exact 1/{SCALE} size.",
            f"Crop it to multiples of {SCALE}.",
        )
    first, second = settings.first, settings.second
    low_height, low_width = height // SCALE, width // SCALE
    steps = [Step("unsharp_mask", {})] if settings.sharpen_ground_truth else []
    if generator.random() < first.blur_probability:
        steps.append(draw_blur(first.blur, generator))
    steps.append(draw_resize(first.resize, height, width, generator))
    steps.append(draw_noise(first.noise, generator))
    steps.append(draw_jpeg(first.jpeg, generator))
    if generator.random() < second.blur_probability:
        steps.append(draw_blur(second.blur, generator))
    steps.append(draw_resize(second.resize, low_height, low_width, generator))
    steps.append(draw_noise(second.noise, generator))
    compression = draw_jpeg(second.jpeg, generator)
    to_low = [_resize(low_height, low_width, generator)]
    if generator.random() < settings.final_sinc_probability:
        sizes = second.blur.size_range
        size = sizes[0] + 2 * int(generator.integers((sizes[1] - sizes[0]) // 2 + 1))
        to_low.append(_sinc(size, math.pi / 3, generator))
    resize_first = generator.random() < 0.5
    tail = [*to_low, compression] if resize_first else [compression, *to_low]
    return [*steps, *tail, *draw_colour(settings.colour, generator)]


def apply(image: NDArray[Any], steps: Iterable[Step]) -> NDArray[Any]:
    """Run `steps` on an RGB picture `(H, W, 3)`, uint8 or float32 in [0, 1]; the type is kept.

    Raises:
        UsageError: when the array is no such picture, or a step has wrong parameters.
    """
    result = operators.to_float(image)
    for step in steps:
        try:
            result = OPERATORS[step.operator](result, **step.params)
        except TypeError as error:
            raise UsageError(f"Degradation step {step.to_dict()}: {error}.") from None
    if image.dtype == np.uint8:
        return operators.to_uint8(result)
    return np.clip(result, 0.0, 1.0)


def _resize(height: int, width: int, generator: np.random.Generator) -> Step:
    mode = list(operators.RESIZE_MODES)[generator.integers(len(operators.RESIZE_MODES))]
    return Step("resize", {"height": max(1, height), "width": max(1, width), "mode": mode})


def _sinc(size: int, lowest: float, generator: np.random.Generator) -> Step:
    cutoff = generator.uniform(lowest, math.pi)
    return Step("blur", {"shape": "sinc", "size": size, "cutoff": cutoff})


def _choose(probabilities: Mapping[str, float], generator: np.random.Generator) -> str:
    """A key with its probability."""
    mark = generator.random()
    for name, probability in probabilities.items():
        mark -= probability
        if mark < 0:
            return name
    # Rounding left a crumb over: it belongs to the last choice that is possible at all.
    return [name for name, probability in probabilities.items() if probability > 0][-1]
