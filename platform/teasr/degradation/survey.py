"""What recipes say, for people: each in words, and many as distributions beside their preset.

The distributions of a sound dataset agree with its preset's ranges and probabilities up to chance.
They are computed from the preset's numbers, never by drawing again: a mistake in `steps.draw` would
otherwise be its own witness.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from teasr.degradation.kernels import PLATEAUS
from teasr.degradation.operators import RESIZE_MODES
from teasr.degradation.presets import PRESETS, BlurSettings, DegradationSettings, StageSettings
from teasr.errors import UsageError
from teasr.plots import Choices, Numbers, Plot

Params = Mapping[str, Any]
Piece = tuple[float, float, float]

_WORDS = {
    "isotropic": "Gaussian",
    "anisotropic": "anisotropic Gaussian",
    "generalized_isotropic": "generalised Gaussian",
    "generalized_anisotropic": "generalised anisotropic",
    "plateau_isotropic": "plateau",
    "plateau_anisotropic": "plateau anisotropic",
    "sinc": "sinc",
}
_NOISES = {"gaussian_noise": "Gaussian", "poisson_noise": "Poisson"}


@dataclass(frozen=True)
class Stages:
    """The steps of a recipe by the part of the degradation that drew them.

    Attributes:
        first, second: blur (not always), resize, noise, and for the first the JPEG.
        last: the resize to the LR size, the final sinc (not always) and the JPEG, in their order;
            then the colour steps, if any.
    """

    first: Sequence[tuple[str, Params]]
    second: Sequence[tuple[str, Params]]
    last: Sequence[tuple[str, Params]]


def stages(recipe: Mapping[str, Any]) -> Stages:
    """The parts of `recipe`: the first ends with its JPEG, the second with its noise.

    Raises:
        UsageError: when the recipe is not one of the two-stage degradation.
    """
    try:
        steps = [(str(step["operator"]), dict(step["params"])) for step in recipe["steps"]]
        names = [name for name, _ in steps]
        jpeg = names.index("jpeg") + 1
        noise = next(i for i in range(jpeg, len(names)) if names[i] in _NOISES) + 1
    except (KeyError, TypeError, ValueError, StopIteration):
        raise UsageError("The recipe is not one of a two-stage degradation.") from None
    return Stages(steps[:jpeg], steps[jpeg:noise], steps[noise:])


# ---------------------------------------------------------------- one recipe, in words


def describe(operator: str, params: Params, width: int = 0) -> str:
    """One step in words: the operator and its parameters with their units.

    A resize is told with its factor when the `width` in pixels that it is relative to is given.
    Whatever the parameters are, something is said: recipes come from files.
    """
    try:
        words = _DESCRIBE[operator](params)
        factor = f" (× {params['width'] / width:.2f})" if operator == "resize" and width else ""
        # A sign and its number stay on one line.
        return re.sub("([σβ×]) (?=[0-9])", "\\1\N{NO-BREAK SPACE}", words + factor)
    except (KeyError, TypeError, ValueError):
        return f"{operator}: " + ", ".join(f"{name} {value}" for name, value in params.items())


def short(recipe: Mapping[str, Any]) -> str:
    """The recipe in one line of ASCII, for captions: strengths and sizes, stages parted by '|'."""
    try:
        parts = stages(recipe)
        return " | ".join(
            ", ".join(_SHORT[name](params) for name, params in part)
            for part in (parts.first, parts.second, parts.last)
        )
    except (UsageError, KeyError, TypeError, ValueError):
        return "no recipe of a two-stage degradation"


def _blur(params: Params) -> str:
    words = f"blur: {_WORDS[params['shape']]}, {params['size']} px"
    if "cutoff" in params:
        return f"{words}, cut-off {params['cutoff'] / math.pi:.2f} π"
    words += f", σ {params['sigma_x']:.2f}"
    if "anisotropic" in params["shape"]:
        words += f" × {params['sigma_y']:.2f}, {math.degrees(params['rotation']):.0f}°"
    if "beta" in params:
        words += f", β {params['beta']:.2f}"
    return words


def _grey(params: Params) -> str:
    return ", grey" if params["grey"] else ", colour"


_DESCRIBE = {
    "blur": _blur,
    "resize": lambda p: f"resize: {p['width']} × {p['height']}, {p['mode']}",
    "gaussian_noise": lambda p: f"Gaussian noise: σ {p['sigma']:.1f} of 255{_grey(p)}",
    "poisson_noise": lambda p: f"Poisson noise: scale {p['scale']:.2f}{_grey(p)}",
    "jpeg": lambda p: f"JPEG: quality {p['quality']:d}",
    "unsharp_mask": lambda p: "unsharp mask",
    "colour_jitter": lambda p: f"colour cast: {', '.join(f'{s:+.0f}' for s in p['shift'])} of 255",
    "greyscale": lambda p: "made grey",
}
_SHORT = {
    "blur": lambda p: f"sinc {p['cutoff']:.1f}" if "cutoff" in p else f"blur {p['sigma_x']:.1f}",
    "resize": lambda p: f"{p['width']:d} {p['mode']}",
    "gaussian_noise": lambda p: f"Gauss {p['sigma']:.0f}",
    "poisson_noise": lambda p: f"Poisson {p['scale']:.1f}",
    "jpeg": lambda p: f"JPEG {p['quality']:d}",
    "unsharp_mask": lambda p: "sharpen",
    "colour_jitter": lambda p: "colour cast",
    "greyscale": lambda p: "grey",
}


# ---------------------------------------------------------------- many recipes, as distributions


@dataclass
class _Tally:
    """What one part of the degradation drew, over many recipes."""

    blurred: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    sizes: list[float] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    rotations: list[float] = field(default_factory=list)
    generalized_betas: list[float] = field(default_factory=list)
    plateau_betas: list[float] = field(default_factory=list)
    cutoffs: list[float] = field(default_factory=list)
    directions: Counter[str] = field(default_factory=Counter)
    factors: list[float] = field(default_factory=list)
    pixels: list[float] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    inverse_sides: list[float] = field(default_factory=list)
    noises: Counter[str] = field(default_factory=Counter)
    greys: Counter[str] = field(default_factory=Counter)
    noise_sigmas: list[float] = field(default_factory=list)
    noise_scales: list[float] = field(default_factory=list)
    qualities: list[float] = field(default_factory=list)
    orders: Counter[str] = field(default_factory=Counter)
    casts: Counter[str] = field(default_factory=Counter)
    made_grey: Counter[str] = field(default_factory=Counter)
    shifts: list[float] = field(default_factory=list)

    def add(self, steps: Sequence[tuple[str, Params]], side: float) -> None:
        """Count a part whose picture came in with a longer side of `side` (0: not resized by a
        factor)."""
        names = [name for name, _ in steps]
        self.blurred["yes" if "blur" in names else "no"] += 1
        self.casts["yes" if "colour_jitter" in names else "no"] += 1
        self.made_grey["yes" if "greyscale" in names else "no"] += 1
        if "jpeg" in names and "resize" in names:
            before = names.index("resize") < names.index("jpeg")
            self.orders["resize, then JPEG" if before else "JPEG, then resize"] += 1
        for name, params in steps:
            if name == "blur":
                self._blur(params)
            elif name == "resize":
                self._resize(params, side)
            elif name in _NOISES:
                self._noise(name, params)
            elif name == "jpeg":
                self.qualities.append(float(params["quality"]))
            elif name == "colour_jitter":
                self.shifts.extend(float(shift) for shift in params["shift"])

    def _blur(self, params: Params) -> None:
        shape = str(params["shape"])
        self.shapes[shape] += 1
        self.sizes.append(float(params["size"]))
        if "cutoff" in params:
            self.cutoffs.append(params["cutoff"] / math.pi)
            return
        self.sigmas.append(float(params["sigma_x"]))
        if "anisotropic" in shape:
            self.sigmas.append(float(params["sigma_y"]))
            self.rotations.append(math.degrees(params["rotation"]))
        if "beta" in params:
            betas = self.plateau_betas if shape in PLATEAUS else self.generalized_betas
            betas.append(float(params["beta"]))

    def _resize(self, params: Params, side: float) -> None:
        self.modes[str(params["mode"])] += 1
        if not side:
            return
        longer = max(params["width"], params["height"])
        direction = "up" if longer > side else "down" if longer < side else "keep"
        self.directions[direction] += 1
        # Sizes are rounded down: an enlargement by less than a pixel looks like none.
        self.inverse_sides.append(1 / side)
        if direction != "keep":
            self.factors.append(longer / side)
            self.pixels.append(1 / side)

    def _noise(self, name: str, params: Params) -> None:
        self.noises[_NOISES[name]] += 1
        self.greys["grey" if params["grey"] else "colour"] += 1
        if name == "gaussian_noise":
            self.noise_sigmas.append(float(params["sigma"]))
        else:
            self.noise_scales.append(float(params["scale"]))


def survey(
    recipes: Iterable[tuple[Mapping[str, Any], int, int]], preset: DegradationSettings | None
) -> tuple[dict[str, list[Plot]], int]:
    """The drawn parameters of `recipes` as plots, by part of the degradation, and a count.

    Args:
        recipes: of each pair the recipe and the ground truth's height and width in pixels.
        preset: states the expected ranges and probabilities; None leaves them out.

    Returns:
        Plots under 'Stage one', 'Stage two' and 'The end'; and how many recipes were not of a
        two-stage degradation, which are left out.
    """
    first, second, last = _Tally(), _Tally(), _Tally()
    others = 0
    for recipe, height, width in recipes:
        try:
            parts = stages(recipe)
            low = max(height // recipe["scale"], width // recipe["scale"])
            tallies = _Tally(), _Tally(), _Tally()
            # Into fresh tallies first: a recipe counts as a whole or not at all.
            for target, part, side in zip(
                tallies, (parts.first, parts.second, parts.last), (max(height, width), low, 0)
            ):
                target.add(part, side)
        except (UsageError, KeyError, TypeError, ValueError, ZeroDivisionError):
            others += 1
            continue
        for total, one in zip((first, second, last), tallies):
            _merge(total, one)
    known = preset or next(iter(PRESETS.values()))
    groups = {
        "Stage one": _stage_plots(first, known.first),
        "Stage two": _stage_plots(second, known.second),
        "The end": _last_plots(last, known),
    }
    if preset is None:
        groups = {name: [_unmarked(plot) for plot in group] for name, group in groups.items()}
    return groups, others


def _unmarked(plot: Plot) -> Plot:
    if isinstance(plot, Choices):
        return replace(plot, probabilities=None)
    return replace(plot, pieces=None)


def _merge(total: _Tally, one: _Tally) -> None:
    for name, value in vars(one).items():
        if isinstance(value, Counter):
            getattr(total, name).update(value)
        else:
            getattr(total, name).extend(value)


def _stage_plots(tally: _Tally, stage: StageSettings) -> list[Plot]:
    blur, noise = stage.blur, stage.noise
    mixture = {
        _WORDS[name]: share * (1 - blur.sinc_probability)
        for name, share in blur.kernels.model_dump().items()
    }
    mixture[_WORDS["sinc"]] = blur.sinc_probability
    shapes = Counter({_WORDS.get(name, name): count for name, count in tally.shapes.items()})
    directions, factors = _directions(tally, stage)
    plots: list[Plot] = [
        Choices("blurred at all", tally.blurred, _two("yes", "no", stage.blur_probability)),
        Choices("kernel shape", shapes, mixture),
        Numbers("kernel size, pixels", _array(tally.sizes), 0, _sizes(blur), step=2),
        Numbers("blur σ, pixels", _array(tally.sigmas), 0, _flat(blur.sigma_range)),
        Numbers("rotation, °", _array(tally.rotations), 0, _flat((-180, 180))),
        Numbers(
            "β of generalised Gaussians",
            _array(tally.generalized_betas),
            0,
            _around_one(blur.generalized_beta_range),
        ),
        Numbers(
            "β of plateau kernels",
            _array(tally.plateau_betas),
            0,
            _around_one(blur.plateau_beta_range),
        ),
        Numbers("sinc cut-off, π per pixel", _array(tally.cutoffs), 0, _cutoffs(blur)),
        Choices("resize", tally.directions, directions),
        Numbers(
            "resize factor, when not kept", _array(tally.factors), _array(tally.pixels), factors
        ),
        _modes(tally),
        Choices("noise", tally.noises, _two("Gaussian", "Poisson", noise.gaussian_probability)),
        Choices("noise is", tally.greys, _two("grey", "colour", noise.grey_probability)),
        Numbers(
            "Gaussian noise σ, of 255",
            _array(tally.noise_sigmas),
            0,
            _flat(noise.gaussian_sigma_range),
        ),
        Numbers(
            "Poisson noise scale", _array(tally.noise_scales), 0, _flat(noise.poisson_scale_range)
        ),
    ]
    # The second stage's JPEG belongs to the end.
    return [*plots, _qualities(tally, stage)] if tally.qualities else plots


def _last_plots(tally: _Tally, preset: DegradationSettings) -> list[Plot]:
    blur, colour = preset.second.blur, preset.colour
    plots: list[Plot] = [
        Choices("order", tally.orders, _two("resize, then JPEG", "JPEG, then resize", 0.5)),
        _modes(tally),
        Choices("final sinc", tally.blurred, _two("yes", "no", preset.final_sinc_probability)),
        Numbers("final sinc size, pixels", _array(tally.sizes), 0, _sizes(blur), step=2),
        Numbers("final sinc cut-off, π per pixel", _array(tally.cutoffs), 0, _flat((1 / 3, 1))),
        _qualities(tally, preset.second),
    ]
    if colour.jitter_probability or tally.casts["yes"]:
        most = colour.jitter_shift
        plots.append(
            Choices("colour cast", tally.casts, _two("yes", "no", colour.jitter_probability))
        )
        plots.append(Numbers("colour cast, of 255", _array(tally.shifts), 0, _flat((-most, most))))
    if colour.grey_probability or tally.made_grey["yes"]:
        plots.append(
            Choices("made grey", tally.made_grey, _two("yes", "no", colour.grey_probability))
        )
    return plots


def _directions(
    tally: _Tally, stage: StageSettings
) -> tuple[dict[str, float], tuple[Piece, ...] | None]:
    """Probabilities of up, down and keep as they look after rounding; density of the factors."""
    low, high = stage.resize.scale_range
    given: dict[str, float] = stage.resize.directions.model_dump()
    pixel = float(np.mean(tally.inverse_sides)) if tally.inverse_sides else 0.0
    # An enlargement by less than a pixel, or any at all when the range ends at 1, keeps the size.
    lost = min(1.0, pixel / (high - 1)) if high > 1 else 1.0
    up = given["up"] * (1 - lost)
    down = given["down"] if low < 1 else 0.0
    pieces = [(low, 1.0, down), (1.0 + pixel, high, up)]
    moved = up + down
    factors = tuple((a, b, share / moved) for a, b, share in pieces if share > 0 and b > a)
    return {"up": up, "down": down, "keep": 1 - up - down}, factors or None


def _qualities(tally: _Tally, stage: StageSettings) -> Numbers:
    low, high = stage.jpeg.quality_range
    pieces = ((low - 0.5, high + 0.5, 1.0),)
    return Numbers("JPEG quality", _array(tally.qualities), 0, pieces, step=1)


def _modes(tally: _Tally) -> Choices:
    even = {name: 1 / len(RESIZE_MODES) for name in RESIZE_MODES}
    return Choices("interpolation", tally.modes, even)


def _array(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(values, dtype=np.float64)


def _two(one: str, other: str, probability: float) -> dict[str, float]:
    return {one: probability, other: 1 - probability}


def _flat(limits: Sequence[float]) -> tuple[Piece, ...]:
    return ((float(limits[0]), float(limits[1]), 1.0),)


def _around_one(limits: Sequence[float]) -> tuple[Piece, ...]:
    """Below and above 1 with probability 1/2 each."""
    return ((float(limits[0]), 1.0, 0.5), (1.0, float(limits[1]), 0.5))


def _sizes(blur: BlurSettings) -> tuple[Piece, ...]:
    """Odd sizes, equally likely; each stands for the two pixels around it."""
    return ((blur.size_range[0] - 1.0, blur.size_range[1] + 1.0, 1.0),)


def _cutoffs(blur: BlurSettings) -> tuple[Piece, ...]:
    """Kernels below 13 pixels are cut off at pi / 3 or higher, the others at pi / 5 or higher."""
    sizes = range(blur.size_range[0], blur.size_range[1] + 1, 2)
    small = sum(size < 13 for size in sizes) / len(sizes)
    pieces = ((1 / 3, 1.0, small), (1 / 5, 1.0, 1 - small))
    return tuple(piece for piece in pieces if piece[2] > 0)
