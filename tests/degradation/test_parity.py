"""Every operator against BasicSR's, for equal parameters.

Where the two are not one function, the test says why, takes the cause away and shows that nothing
else is left: a difference is explained when the rest agrees.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from teasr.degradation import PRESETS, Degradation, Step, apply, operators
from teasr.degradation.kernels import SHAPES, build_kernel
from teasr.degradation.steps import draw_blur
from tests.reference.basicsr import BasicSR, to_array, to_tensor

SIZES = range(7, 22, 2)


def parameters(shape: str, random: np.random.Generator) -> dict[str, float]:
    """Parameters of a kernel, over the ranges of both presets."""
    if shape == "sinc":
        return {"cutoff": random.uniform(np.pi / 5, np.pi)}
    sigma_x, sigma_y = random.uniform(0.2, 3, 2)
    numbers = {"sigma_x": sigma_x, "sigma_y": sigma_x, "rotation": 0.0}
    if "anisotropic" in shape:
        numbers |= {"sigma_y": sigma_y, "rotation": random.uniform(-np.pi, np.pi)}
    if "_" in shape:
        numbers["beta"] = random.uniform(0.5, 4)
    return numbers


@pytest.fixture(params=range(3))
def picture(photo, request) -> np.ndarray:
    """Waves with an edge and a patch of noise, float32 (96, 112, 3)."""
    image = photo(96, 112, request.param)
    image[:, 60:] //= 3
    image[:40, :40] = np.random.default_rng(request.param).integers(0, 256, (40, 40, 3))
    return operators.to_float(image)


def levels(ours: np.ndarray, theirs: torch.Tensor) -> np.ndarray:
    """Absolute difference in grey levels of 255."""
    return 255 * np.abs(ours - to_array(theirs))


# Kernels and filters


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_equal(reference: BasicSR, shape: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(25):
        for size in SIZES:
            numbers = parameters(shape, random)
            theirs = reference.kernel(shape, size, **numbers)
            np.testing.assert_allclose(build_kernel(shape, size, **numbers), theirs, atol=1e-12)


def test_the_presets_reach_every_shape_at_every_size() -> None:
    random = np.random.default_rng(1)
    for settings in PRESETS.values():
        for stage in (settings.first, settings.second):
            steps = [draw_blur(stage.blur, random).params for _ in range(4000)]
            reached = {(params["shape"], params["size"]) for params in steps}
            assert reached == {(shape, size) for shape in SHAPES for size in SIZES}


@pytest.mark.parametrize("shape", SHAPES)
def test_filters_are_equal_borders_included(reference: BasicSR, picture, shape: str) -> None:
    random = np.random.default_rng(2)
    for size in SIZES:
        for _ in range(3):
            numbers = parameters(shape, random)
            theirs = reference.blur(to_tensor(picture), shape, size, **numbers)
            # 1/100 of a level is what the choice of a faster filter may cost.
            assert levels(operators.blur(picture, shape, size, **numbers), theirs).max() < 0.01


def test_unsharp_masks_are_equal(reference: BasicSR, picture) -> None:
    sharp = operators.unsharp_mask(picture)
    assert levels(sharp, reference.unsharp_mask(to_tensor(picture))).max() < 0.01
    assert levels(sharp, to_tensor(picture)).max() > 5  # it did something


# Resizing


@pytest.mark.parametrize("mode", operators.RESIZE_MODES)
def test_resizes_to_a_size_are_equal(reference: BasicSR, picture, mode: str) -> None:
    height, width = picture.shape[:2]
    sizes = [(int(height * factor), int(width * factor)) for factor in np.arange(0.15, 1.5, 0.03)]
    for size in [*sizes, (24, 28), (192, 224), (96, 60), (1, 1), (96, 112)]:
        theirs = reference.resize(to_tensor(picture), *size, mode)
        assert levels(operators.resize(picture, *size, mode), theirs).max() < 0.01, size


@pytest.mark.parametrize(("mode", "tolerance"), [("bilinear", 1e-3), ("bicubic", 0.15)])
def test_the_first_resize_is_the_references_up_to_its_drift(mode: str, tolerance: float) -> None:
    """It passes torch a factor, and so samples at `j / factor`; we sample at `j * size / new size`.

    The new size is rounded down, so its grid ends up to one new pixel before the border: its LR
    picture lags the ground truth by a distance that grows from left to right, ours covers the
    ground truth. A ramp, which interpolation reproduces (bicubic, a = -0.75, all but), shows the
    two grids themselves.
    """
    count = 160
    ramp = np.zeros((8, count, 3), dtype=np.float32)
    ramp[:] = (np.arange(count) / count)[None, :, None]
    for factor in (0.15, 0.31, 0.5, 0.77, 1.23, 1.49):
        new = int(count * factor)
        theirs = functional.interpolate(to_tensor(ramp), scale_factor=factor, mode=mode)
        ours = operators.resize(ramp, theirs.shape[2], new, mode)
        assert theirs.shape[3] == new
        inner = slice(int(2 * factor) + 2, new - int(2 * factor) - 3)  # clear of the border
        drift = (np.arange(new)[inner] + 0.5) * (count / new - 1 / factor)
        measured = (ours - to_array(theirs))[0, inner, 0] * count
        np.testing.assert_allclose(measured, drift, atol=tolerance)
        assert 0 <= drift.max() < 1 / factor  # less than one new pixel
        if count * factor == new:
            np.testing.assert_allclose(ours, to_array(theirs), atol=1e-6)


# Noise


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("sigma", [1.0, 11.3, 30.0])
def test_gaussian_noise_of_one_field_is_equal(
    reference: BasicSR, picture, sigma: float, grey: bool
) -> None:
    """torch is handed our field in place of its own; what is done with it has to agree."""
    middle = np.full_like(picture, 0.5)
    field = to_tensor((operators.gaussian_noise(middle, 10.0, grey, 4) - middle) * 25.5)

    def randn(*size: int, **_: object) -> torch.Tensor:
        return field[0, 0] if len(size) == 2 else field  # grey is drawn as (H, W)

    with mock.patch.object(torch, "randn", randn):
        theirs = reference.gaussian_noise(to_tensor(picture), sigma, grey, 0)
    ours = operators.gaussian_noise(picture, sigma, grey, 4)
    assert levels(ours, theirs).max() < 0.001
    assert (ours == 1).any() or sigma < 30  # it clips


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_poisson_noise_of_one_count_is_equal(
    reference: BasicSR, picture, scale: float, grey: bool
) -> None:
    """torch is handed our counts, read off a run so faint that nothing is clipped."""
    image = 0.2 + 0.6 * picture
    source = image @ np.float32([0.2989, 0.587, 0.114]) if grey else image
    source = operators.to_uint8(source).reshape(96, 112, -1) / 255
    count = 2 ** np.ceil(np.log2(len(np.unique(source))))
    noise = (operators.poisson_noise(image, 0.1, grey, 6) - image) / 0.1
    counts = (noise[..., : source.shape[2]] + source) * count
    np.testing.assert_allclose(counts, np.rint(counts), atol=0.01)
    wanted = to_tensor(np.rint(counts).astype(np.float32))

    def poisson(mean: torch.Tensor) -> torch.Tensor:
        if mean.shape != wanted.shape:
            return mean  # colour noise is drawn in any case, and not used where noise is grey
        torch.testing.assert_close(mean, to_tensor(source * count).float())
        return wanted

    with mock.patch.object(torch, "poisson", poisson):
        theirs = reference.poisson_noise(to_tensor(image), scale, grey, 0)
    ours = operators.poisson_noise(image, scale, grey, 6)
    assert levels(ours, theirs).max() < 0.01
    assert ((ours == 1).any() or (ours == 0).any()) == (scale == 3)  # it clips


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("operator", ["gaussian_noise", "poisson_noise"])
def test_noise_fields_have_equal_moments(reference: BasicSR, operator: str, grey: bool) -> None:
    """Mean, variance, third moment and channel correlation by grey level, from each generator.

    Bounds are five standard errors of a difference of two estimates from 24,576 values a level.
    """
    steps = np.arange(16, 240, 28)
    image = np.repeat(steps, 32)[:, None, None] * np.ones((1, 256, 3))
    image = operators.to_float(image.astype(np.uint8))
    strength = {"gaussian_noise": 4.0, "poisson_noise": 1.0}[operator]
    ours = getattr(operators, operator)(image, strength, grey, 8) - image
    theirs = to_array(getattr(reference, operator)(to_tensor(image), strength, grey, 8)) - image
    for noise in (ours, theirs):
        assert (np.ptp(noise, axis=2).max() < 1e-6) == grey
    independent = 32 * 256 * (1 if grey else 3)
    for band in range(len(steps)):
        a, b = (noise[band * 32 : band * 32 + 32].reshape(-1, 3) * 255 for noise in (ours, theirs))
        deviation = b.std()
        error = 5 * np.sqrt(2 / independent)
        assert abs(a.mean() - b.mean()) < error * deviation
        assert a.var() == pytest.approx(b.var(), rel=error * np.sqrt(3))
        thirds = [((side - side.mean()) ** 3).mean() / deviation**3 for side in (a, b)]
        assert thirds[0] == pytest.approx(thirds[1], abs=error * np.sqrt(20))
        correlation = np.corrcoef(a.T) - np.corrcoef(b.T)
        assert np.abs(correlation).max() < 5 * np.sqrt(2 / (32 * 256))


# JPEG


class Rounded(nn.Module):
    """RGB to 8-bit YCbCr at 4:2:0: libjpeg works on whole numbers, DiffJPEG on floats."""

    def __init__(self, colours: nn.Module, subsampling: nn.Module) -> None:
        super().__init__()
        self.colours, self.subsampling = colours, subsampling

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        planes = self.subsampling(self.colours(image.round()).round().clamp(0, 255))
        return tuple(plane.round() for plane in planes)


class Triangle(nn.Module):
    """libjpeg's "fancy" chroma upsampling, 3/4 near and 1/4 far: bilinear. DiffJPEG repeats."""

    def forward(self, y: torch.Tensor, cb: torch.Tensor, cr: torch.Tensor) -> torch.Tensor:
        chroma = torch.stack([cb, cr], dim=1).round().clamp(0, 255)
        chroma = functional.interpolate(chroma, scale_factor=2, mode="bilinear").round()
        return torch.cat([y.round().clamp(0, 255)[:, None], chroma], dim=1).permute(0, 2, 3, 1)


def standard_jpeg(reference: BasicSR, quality: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """DiffJPEG with the four things undone in which it is not libjpeg.

    - Its luma table is the standard's transposed: horizontal frequencies are quantised as the
      standard does vertical ones, and the other way about.
    - It scales the tables without rounding them to whole numbers.
    - It does not round between its stages.
    - It repeats chroma to enlarge it, where libjpeg interpolates.
    """
    jpeg = reference.diffjpeg.DiffJPEG(differentiable=False)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality

    def scaled(table: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(((table * scale + 50) / 100).floor().clamp(1, 255))

    luma = scaled(reference.diffjpeg.y_table.T)
    chroma = scaled(reference.diffjpeg.c_table)
    for quantise in (jpeg.compress.y_quantize, jpeg.decompress.y_dequantize):
        quantise.y_table = luma
    for quantise in (jpeg.compress.c_quantize, jpeg.decompress.c_dequantize):
        quantise.c_table = chroma
    jpeg.compress.l1 = Rounded(*jpeg.compress.l1)
    jpeg.decompress.chroma = Triangle()
    # At 50 it takes the tables as they are.
    return lambda image: (jpeg(image, quality=50) * 255).round() / 255


@pytest.mark.parametrize("quality", [30, 50, 60, 75, 90, 95])
def test_jpeg_is_diffjpeg_but_for_four_known_causes(
    reference: BasicSR, picture, quality: int
) -> None:
    """Left over are coefficients on the edge of two steps, which libjpeg's integer DCT may tip."""
    ours = operators.jpeg(picture, quality)
    with torch.no_grad():
        plain = reference.jpeg(to_tensor(picture), quality)
        explained = levels(ours, standard_jpeg(reference, quality)(to_tensor(picture)))
    difference = levels(ours, plain)
    assert 4 < difference.mean() < 8
    assert explained.mean() < 1.1
    assert np.mean(explained < 2.5) > 0.88
    # The strength is the same: what each loses of the picture.
    losses = [10 * np.log10(((side - picture) ** 2).mean()) for side in (ours, to_array(plain))]
    assert losses[0] == pytest.approx(losses[1], abs=0.5)  # dB


@pytest.mark.parametrize("colour", [False, True])
def test_at_the_finest_steps_nothing_is_left_of_the_difference(
    reference: BasicSR, picture, colour: bool
) -> None:
    """At quality 100, a step of 1, a coefficient that tips costs less than a grey level.

    In colour one level of chroma is up to 1.8 levels of blue, and luma adds its own.
    """
    image = picture if colour else picture[..., 1:2].repeat(3, axis=2)
    with torch.no_grad():
        theirs = standard_jpeg(reference, 100)(to_tensor(image))
    difference = levels(operators.jpeg(image, 100), theirs)
    assert np.mean(difference < (3.5 if colour else 1.5)) > 0.999


def test_jpeg_extends_a_picture_by_its_edge_where_diffjpeg_adds_black(reference: BasicSR) -> None:
    """The fifth cause: sizes that are no multiple of 16, within the last 16 pixels."""
    flat = np.full((44, 44, 3), 0.6, dtype=np.float32)
    assert np.abs(operators.jpeg(flat, 30) * 255 - 153).max() < 4
    with torch.no_grad():
        theirs = levels(flat, reference.jpeg(to_tensor(flat), 30))
    assert theirs[:32, :32].max() < 4 < 10 < theirs.max()


# A whole recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_recipes_without_noise_and_jpeg_make_equal_pictures(
    reference: BasicSR, photo, preset: str
) -> None:
    """All that is deterministic and one function on both sides, in the order of the recipe."""
    hr = photo(128, 160, 9)
    degrade = Degradation(preset, seed=4)
    for variant in range(25):
        steps = [
            Step.from_dict(step)
            for step in degrade(hr, "k", variant).recipe["steps"]
            if step["operator"] in ("blur", "resize")
        ]
        difference = np.abs(apply(hr, steps).astype(int) - reference.degrade(hr, steps))
        assert difference.max() <= 1 and np.mean(difference > 0) < 0.01
