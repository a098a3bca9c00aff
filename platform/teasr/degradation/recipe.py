"""LR/HR pairs that anyone can make again: the same bytes from (seed, preset, key, variant) alone.

A pair's **recipe** is a JSON object with every drawn parameter. `replay` makes the LR picture again
from the ground truth and the recipe, whatever has become of the preset.

Equal bytes hold for equal library versions on one kind of processor: OpenCV's filters may round the
last bit of a float otherwise on another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teasr.degradation import operators
from teasr.degradation.operators import Bytes
from teasr.degradation.presets import SCALE, DegradationSettings, load_preset
from teasr.degradation.steps import Step, apply, draw
from teasr.errors import UsageError

RECIPE_VERSION = 2  # 2: the resize mode "area" became the reference's adaptive average


@dataclass(frozen=True)
class Pair:
    """A training pair.

    Attributes:
        hr: ground truth, `(H, W, 3)` uint8 RGB; sharpened when the settings say so.
        lr: degraded picture, `(H / 4, W / 4, 3)` uint8 RGB.
        recipe: JSON object: `version`, `preset`, `seed`, `key`, `variant`, `scale`, `sharpened` and
            `steps`. `replay(hr, recipe)` equals `lr`.
    """

    hr: Bytes
    lr: Bytes
    recipe: dict[str, Any]


def sample_seed(seed: int, preset: str, key: str, variant: int) -> int:
    """63-bit seed of one sample: BLAKE2b over the JSON array of the four arguments.

    JSON quotes and separates, so no two different samples share an encoding.
    """
    encoded = json.dumps([int(seed), preset, key, int(variant)]).encode()
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big") >> 1


class Degradation:
    """Degrades ground truth to LR, reproducibly per sample.

    Each call draws from a generator of its own, started from the sample's seed: no state is carried
    over, so order, workers, threads and retries change nothing. The result is that of the
    `RealESRGAN` albumentations transform after `set_random_seed(sample_seed(...))`: both run
    `steps.draw` and `steps.apply`. The transform itself is not run, since one per call, as threads
    would need, adds 12% to a 128-pixel crop.

    Args:
        settings: settings, a preset's name or a YAML file.
        seed: seed of the data set.

    Raises:
        UsageError: when the preset is unknown or its file is wrong.
    """

    def __init__(self, settings: DegradationSettings | str | Path, seed: int = 0) -> None:
        loaded = settings if isinstance(settings, DegradationSettings) else load_preset(settings)
        self.settings = loaded
        self.seed = seed
        # The pair's ground truth is sharpened before anything is drawn; a step would do it again.
        self._unsharpened = loaded.model_copy(update={"sharpen_ground_truth": False})

    def __call__(self, hr: Bytes, key: str, variant: int = 0) -> Pair:
        """The pair of `hr`, `(H, W, 3)` uint8 RGB, both sides multiples of 4.

        Args:
            hr: ground truth.
            key: name of the sample in its data set.
            variant: number of the copy, when a sample is degraded more than once.

        Raises:
            UsageError: when `hr` is no such picture.
        """
        _check(hr)
        name = self.settings.name
        if self.settings.sharpen_ground_truth:
            hr = operators.to_uint8(operators.unsharp_mask(operators.to_float(hr)))
        generator = np.random.default_rng(sample_seed(self.seed, name, key, variant))
        steps = draw(self._unsharpened, hr.shape[0], hr.shape[1], generator)
        recipe = {
            "version": RECIPE_VERSION,
            "preset": name,
            "seed": int(self.seed),
            "key": key,
            "variant": int(variant),
            "scale": SCALE,
            "sharpened": self.settings.sharpen_ground_truth,
            "steps": [step.to_dict() for step in steps],
        }
        return Pair(hr=hr, lr=apply(hr, steps), recipe=recipe)


def replay(hr: Bytes, recipe: Mapping[str, Any]) -> Bytes:
    """The LR picture of `recipe`, from the pair's ground truth (`Pair.hr`), `(H, W, 3)` uint8 RGB.

    Raises:
        UsageError: when the recipe is incomplete or of another version, or `hr` is of another size.
    """
    _check(hr)
    if recipe.get("version") != RECIPE_VERSION:
        raise UsageError(
            f"A recipe of version {recipe.get('version')!r} cannot be replayed.",
            f"This release reads version {RECIPE_VERSION}.",
        )
    if "steps" not in recipe:
        raise UsageError("The recipe has no 'steps'.")
    lr: Bytes = apply(hr, [Step.from_dict(step) for step in recipe["steps"]])
    if lr.shape[0] * SCALE != hr.shape[0] or lr.shape[1] * SCALE != hr.shape[1]:
        raise UsageError(
            f"The recipe is for a ground truth of {lr.shape[1] * SCALE}x{lr.shape[0] * SCALE} "
            f"pixels; this one has {hr.shape[1]}x{hr.shape[0]}."
        )
    return lr


def _check(hr: Bytes) -> None:
    if hr.dtype != np.uint8 or hr.ndim != 3 or hr.shape[2] != 3:
        raise UsageError(
            f"A ground truth of type {hr.dtype} and shape {hr.shape} cannot be degraded.",
            "Expected (height, width, 3) uint8 RGB.",
        )
