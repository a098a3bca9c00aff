"""Real-ESRGAN's degradations as albumentations transforms, alone or in any `A.Compose`.

albumentations' own blurs and noises are not Real-ESRGAN's (no plateau kernel, shot noise in linear
light). These draw every parameter from `self.random_generator`, so `Compose.set_random_seed`
repeats them, and leave what they drew in `get_applied_params()["steps"]`; `A.to_dict`,
`A.from_dict` and `A.ReplayCompose` work. Pictures are RGB, uint8 or float32 in [0, 1]; `p` is 1
unless given.

    A.Compose([RealESRGANBlur(sigma_range=(0.2, 1.5), p=0.8), JPEGCompression()], seed=7)

This is the one module that imports albumentations.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

# Before the import: albumentations asks PyPI for its newest version otherwise.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A

from teasr.config import Settings
from teasr.degradation.presets import (
    BlurSettings,
    ColourSettings,
    DegradationSettings,
    JPEGSettings,
    NoiseSettings,
    ResizeSettings,
    load_preset,
)
from teasr.degradation.steps import (
    Step,
    apply,
    draw,
    draw_blur,
    draw_colour,
    draw_jpeg,
    draw_noise,
    draw_resize,
)


class DrawnTransform(A.ImageOnlyTransform):
    """Base of the transforms: draws steps for a picture's size, then runs them."""

    settings: Settings

    def draw_steps(self, height: int, width: int) -> list[Step]:
        """The random steps for a picture of `(height, width)`, from `self.random_generator`."""
        raise NotImplementedError

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """`{"steps": [...]}` as plain JSON; only the picture's size is looked at."""
        height, width = params["shape"][:2]
        return {"steps": [step.to_dict() for step in self.draw_steps(height, width)]}

    def apply(
        self, img: NDArray[Any], *args: Any, steps: list[dict[str, Any]], **params: Any
    ) -> NDArray[Any]:
        """Run the drawn steps on one picture."""
        return apply(img, map(Step.from_dict, steps))


class _OperatorTransform(DrawnTransform):
    """A single operator; the keyword arguments are the fields of its settings."""

    settings_class: ClassVar[type[Settings]]

    def __init__(self, p: float = 1.0, **fields: Any) -> None:
        super().__init__(p=p)
        self.settings = self.settings_class.from_mapping(fields, type(self).__name__)

    def get_transform_init_args(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json")


class RealESRGANBlur(_OperatorTransform):
    """Blur with a random kernel of the six-shape mixture, or a sinc; fields: `BlurSettings`.

    Raises:
        UsageError: when a field is unknown or out of range.
    """

    settings_class = BlurSettings
    settings: BlurSettings

    def draw_steps(self, height: int, width: int) -> list[Step]:
        return [draw_blur(self.settings, self.random_generator)]


class RandomResize(_OperatorTransform):
    """Resize by a random factor and interpolation; fields: `ResizeSettings`. The size changes.

    Raises:
        UsageError: when a field is unknown or out of range.
    """

    settings_class = ResizeSettings
    settings: ResizeSettings

    def draw_steps(self, height: int, width: int) -> list[Step]:
        return [draw_resize(self.settings, height, width, self.random_generator)]


class RealESRGANNoise(_OperatorTransform):
    """Gaussian or Poisson noise, coloured or grey; fields: `NoiseSettings`.

    Raises:
        UsageError: when a field is unknown or out of range.
    """

    settings_class = NoiseSettings
    settings: NoiseSettings

    def draw_steps(self, height: int, width: int) -> list[Step]:
        return [draw_noise(self.settings, self.random_generator)]


class JPEGCompression(_OperatorTransform):
    """JPEG (4:2:0) of random quality; fields: `JPEGSettings`.

    Raises:
        UsageError: when a field is unknown or out of range.
    """

    settings_class = JPEGSettings
    settings: JPEGSettings

    def draw_steps(self, height: int, width: int) -> list[Step]:
        return [draw_jpeg(self.settings, self.random_generator)]


class ColourDegradation(_OperatorTransform):
    """A colour cast and the loss of colours; fields: `ColourSettings`, whose probabilities are 0.

        ColourDegradation(jitter_probability=0.3, grey_probability=0.01)   # GFPGAN's

    Raises:
        UsageError: when a field is unknown or out of range.
    """

    settings_class = ColourSettings
    settings: ColourSettings

    def draw_steps(self, height: int, width: int) -> list[Step]:
        return draw_colour(self.settings, self.random_generator)


class RealESRGAN(DrawnTransform):
    """The whole two-stage degradation to a quarter of the size (both sides multiples of 4).

    Args:
        preset: a preset's name, a YAML file, or settings (as an object or a mapping).
        p: probability; a picture that is left alone keeps its size.

    Raises:
        UsageError: when the settings are wrong; on call, when the size is no multiple of 4.
    """

    settings: DegradationSettings

    def __init__(
        self,
        preset: str | Path | Mapping[str, Any] | DegradationSettings = "teasr",
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        if isinstance(preset, DegradationSettings):
            self.settings = preset
        elif isinstance(preset, Mapping):
            self.settings = DegradationSettings.from_mapping(preset, "RealESRGAN")
        else:
            self.settings = load_preset(preset)

    def get_transform_init_args(self) -> dict[str, Any]:
        # The whole settings, not the name: the file that a name stood for may be gone.
        return {"preset": self.settings.model_dump(mode="json")}

    def draw_steps(self, height: int, width: int) -> list[Step]:
        return draw(self.settings, height, width, self.random_generator)
