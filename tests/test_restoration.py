"""Pictures of any size through tiles: seams, noise, padding, colour."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from teasr.backbones.base import Backbone, velocity_from_image
from teasr.errors import UsageError
from teasr.images import Picture, decode
from teasr.restoration import (
    RestorationSettings,
    blend_weights,
    match_colour,
    pad_to_multiple,
    restore,
    restore_picture,
    tile_starts,
)

SCALE = 4
SIZES = [(1, 1), (1, 13), (13, 1), (2, 3), (7, 11), (12, 16), (17, 23), (40, 8), (9, 61)]


class Toy(Backbone):
    """A network with one parameter that nobody uses."""

    scale = SCALE
    multiple = 4

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.asked: list[tuple[int, ...]] = []

    def image(self, x_t: Tensor, condition: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        self.asked.append(tuple(condition.shape))
        return velocity_from_image(x_t, self.image(x_t, condition), t)


class Nearest(Toy):
    """Each pixel repeated, with a colour cast."""

    def __init__(self, cast: float = 0.0) -> None:
        super().__init__()
        self.cast = cast

    def image(self, x_t: Tensor, condition: Tensor) -> Tensor:
        wide = condition.repeat_interleave(SCALE, dim=-2).repeat_interleave(SCALE, dim=-1)
        return wide + self.cast


class Mean(Toy):
    """The mean of the tile everywhere: as dependent on the tiling as can be."""

    def image(self, x_t: Tensor, condition: Tensor) -> Tensor:
        return condition.mean(dim=(2, 3), keepdim=True).expand_as(x_t)


class Noise(Toy):
    """F = 0: what is restored is the noise itself."""

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        return torch.zeros_like(x_t)


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def nearest(lr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return lr.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 4), (9, 1), (12, 3), (64, 8)])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_network_that_ignores_tiles_restores_identically_with_any_tiling(
    height: int, width: int, tile: int, overlap: int
) -> None:
    lr = picture(height, width)
    settings = RestorationSettings(tile=tile, overlap=overlap, batch=3)
    np.testing.assert_array_equal(restore(Nearest(), lr, settings), nearest(lr))


def test_tiles_have_one_extent_that_the_network_can_take() -> None:
    network = Nearest()
    restore(network, picture(21, 30), RestorationSettings(tile=10, overlap=2, batch=2))
    assert {shape[1:] for shape in network.asked} == {(3, 12, 12)}
    assert max(shape[0] for shape in network.asked) == 2


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 2), (8, 4), (16, 5)])
@pytest.mark.parametrize(("height", "width"), [(37, 29), (8, 50), (50, 5), (31, 16)])
def test_rows_written_at_once_equal_a_naive_whole_canvas(
    height: int, width: int, tile: int, overlap: int
) -> None:
    lr = picture(height, width)
    padded = pad_to_multiple(lr, 4)
    rows, columns = padded.shape[:2]
    tall, wide = min(tile, rows), min(tile, columns)
    canvas = np.zeros((rows * SCALE, columns * SCALE, 3))
    total = np.zeros((rows * SCALE, columns * SCALE, 1))
    ramps = []
    for size in (tall * SCALE, wide * SCALE):
        middle = (np.arange(size) + 0.5) / size
        ramps.append(np.minimum(middle, 1 - middle))
    weight = np.outer(*ramps)[..., None]
    for top in tile_starts(rows, tall, overlap):
        for left in tile_starts(columns, wide, overlap):
            mean = padded[top : top + tall, left : left + wide].mean(axis=(0, 1))
            down = slice(top * SCALE, (top + tall) * SCALE)
            across = slice(left * SCALE, (left + wide) * SCALE)
            canvas[down, across] += weight * mean
            total[down, across] += weight
    naive = (canvas / total)[: height * SCALE, : width * SCALE]
    settings = RestorationSettings(tile=tile, overlap=overlap, batch=2)
    restored = restore(Mean(), lr, settings)
    assert restored.shape == naive.shape
    assert float(np.abs(restored - naive).max()) <= 0.501  # rounding to bytes


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_does_not_depend_on_the_tiling(steps: int) -> None:
    lr = picture(22, 27)
    shared = {"steps": steps, "stochastic_share": 0.5, "seed": 3}
    whole = restore(Noise(), lr, RestorationSettings(tile=64, **shared)).astype(int)
    assert whole.std() > 50
    for tile, overlap, batch in ((8, 4, 1), (12, 2, 5), (16, 0, 16)):
        settings = RestorationSettings(tile=tile, overlap=overlap, batch=batch, **shared)
        assert np.abs(restore(Noise(), lr, settings).astype(int) - whole).max() <= 1


def test_noise_is_a_function_of_the_seed_and_differs_between_rows() -> None:
    lr = picture(8, 8)
    first, again, other = (
        restore(Noise(), lr, RestorationSettings(seed=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    assert (first[:SCALE] != first[SCALE : 2 * SCALE]).mean() > 0.5


def test_progress_counts_rows_of_tiles() -> None:
    seen: list[tuple[int, int]] = []
    lr = picture(20, 9)
    settings = RestorationSettings(tile=8, overlap=2)
    restore(Nearest(), lr, settings, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    plain = Picture(lr, None, False, 8, "png")
    restore_picture(Nearest(), plain, settings, progress=lambda d, t: seen.append((d, t)))
    assert seen[3:] == seen[:3]


@pytest.mark.parametrize("multiple", [1, 4, 7])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_padding_extends_bottom_and_right_only(height: int, width: int, multiple: int) -> None:
    lr = picture(height, width)
    padded = pad_to_multiple(lr, multiple)
    assert padded.shape[0] % multiple == padded.shape[1] % multiple == 0
    assert padded.shape[0] - height < multiple and padded.shape[1] - width < multiple
    np.testing.assert_array_equal(padded[:height, :width], lr)
    if padded.shape[0] > height:
        np.testing.assert_array_equal(padded[height, :width], lr[-1])


def test_tile_starts_cover_everything_with_at_least_the_overlap() -> None:
    for tile, overlap in itertools.product((8, 9, 12, 32), (0, 1, 3, 4)):
        for length in range(1, 200):
            starts = tile_starts(length, tile, overlap)
            assert starts[0] == 0 and starts == sorted(set(starts))
            assert starts[-1] + tile == max(length, tile)
            for first, second in itertools.pairwise(starts):
                assert second - first <= tile - overlap
            fewest = max(1, -(-(length - overlap) // (tile - overlap)))
            assert len(starts) == fewest


@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
@pytest.mark.parametrize("length", [8, 9, 17, 64, 101])
def test_blend_weights_sum_to_one_and_fade_in(length: int, overlap: int) -> None:
    starts = tile_starts(length, 8, overlap)
    total = torch.zeros(length * SCALE)
    shift = min((b - a for a, b in itertools.pairwise(starts)), default=0)
    first_step = 0.5 / (max(min(overlap, shift), 1) * SCALE) + 1e-6
    for start, weight in zip(starts, blend_weights(starts, 8, length, SCALE)):
        assert weight.shape == (8 * SCALE,) and bool((weight > 0).all())
        total[start * SCALE : (start + 8) * SCALE] += weight
        if overlap and start > 0:
            assert float(weight[0]) <= first_step
        if overlap and start + 8 < length:
            assert float(weight[-1]) <= first_step
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(("tile", "overlap"), [(16, 9), (8, 8)])
def test_overlap_of_more_than_half_a_tile_is_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ValidationError, match="half of tile"):
        RestorationSettings(tile=tile, overlap=overlap)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_alpha_and_grey_survive(format: str) -> None:
    grey = picture(9, 6)[:, :, :1].repeat(3, axis=2)
    alpha = np.full((9, 6), 40, np.uint8)
    source = Picture(grey, alpha, True, 8, "png")
    settings = RestorationSettings(tile=8, overlap=2)
    restored = decode(restore_picture(Nearest(), source, settings, format))
    np.testing.assert_array_equal(restored.rgb, nearest(grey))
    assert restored.alpha is not None and restored.alpha.shape == (36, 24)
    assert (restored.alpha == 40).all()
    assert restored.format == format and restored.grey == (format == "png")
    colour = decode(
        restore_picture(Nearest(), Picture(picture(5, 5), None, False, 8, "png"), settings)
    )
    assert colour.alpha is None and not colour.grey
    np.testing.assert_array_equal(colour.rgb, nearest(picture(5, 5)))


def test_alpha_is_magnified_with_the_picture() -> None:
    alpha = np.zeros((6, 6), np.uint8)
    alpha[:, 3:] = 255
    source = Picture(picture(6, 6), alpha, False, 8, "png")
    restored = decode(restore_picture(Nearest(), source, RestorationSettings())).alpha
    assert restored is not None
    assert (restored[:, :6] == 0).all() and (restored[:, -6:] == 255).all()


def test_alpha_does_not_fit_a_jpeg() -> None:
    source = Picture(picture(4, 4), np.zeros((4, 4), np.uint8), False, 8, "png")
    with pytest.raises(UsageError, match="transparency"):
        restore_picture(Nearest(), source, RestorationSettings(), "jpeg")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (30, 41)])
def test_wavelet_colour_takes_low_frequencies_from_the_input_and_keeps_the_rest(
    height: int, width: int
) -> None:
    lr = (picture(height, width) // 8 + 100).astype(np.uint8)
    plain = restore(Nearest(0.3), lr, RestorationSettings(tile=16))
    matched = restore(Nearest(0.3), lr, RestorationSettings(tile=16, colour="wavelet"))
    target = nearest(lr).astype(float)
    assert float((plain - target).mean()) == pytest.approx(0.3 * 127.5, abs=0.5)
    assert abs(float((matched - target).mean())) < 1

    def detail(pixels: NDArray) -> NDArray:
        smooth = cv2.GaussianBlur(
            pixels.astype(np.float32), (0, 0), 16, borderType=cv2.BORDER_REFLECT
        )
        return pixels - smooth

    assert float(np.abs(detail(matched) - detail(target)).mean()) < 1.5


def test_colour_of_a_faithful_result_is_left_alone() -> None:
    lr = np.full((12, 20, 3), (10, 130, 250), np.uint8)
    np.testing.assert_array_equal(match_colour(nearest(lr), lr, SCALE), nearest(lr))
