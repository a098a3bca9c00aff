"""Pictures of any size through tiles: seams, noise, padding, colour."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from teasr.backbones import PRESETS, DualBranchDiT
from teasr.backbones.base import Backbone, velocity_from_image
from teasr.errors import UsageError
from teasr.images import Picture, bicubic_upsample, decode
from teasr.restoration import (
    NOISE_BLOCK,
    RestorationSettings,
    blend_weights,
    match_low_frequencies,
    match_statistics,
    noise_field,
    pad_to_multiple,
    restore,
    restore_picture,
    tile_spans,
)

SCALE = 4
SIZES = [(1, 1), (1, 13), (13, 1), (2, 3), (7, 11), (12, 16), (17, 23), (40, 8), (9, 61)]


class Toy(Backbone):
    """A network with one parameter that nobody uses."""

    scale = SCALE
    multiple = 4
    period = 8

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


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 4), (9, 1), (16, 3), (21, 9), (64, 8)])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_network_that_ignores_tiles_restores_identically_with_any_tiling(
    height: int, width: int, tile: int, overlap: int
) -> None:
    lr = picture(height, width)
    settings = RestorationSettings(tile=tile, overlap=overlap)
    np.testing.assert_array_equal(restore(Nearest(), lr, settings), nearest(lr))


def test_tiles_have_extents_that_the_network_can_take() -> None:
    network = Nearest()
    restore(network, picture(21, 30), RestorationSettings(tile=18, overlap=2))
    assert set(network.asked) == {(1, 3, h, w) for h in (16, 16) for w in (16, 16)}
    network = Nearest()
    restore(network, picture(26, 13), RestorationSettings(tile=18, overlap=2))
    assert network.asked == [(1, 3, 16, 16), (1, 3, 16, 16), (1, 3, 12, 16)]


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 2), (8, 4), (16, 5), (24, 1), (32, 12)])
@pytest.mark.parametrize(("height", "width"), [(37, 29), (8, 50), (50, 5), (31, 16)])
def test_pixels_written_at_once_equal_a_naive_whole_canvas(
    height: int, width: int, tile: int, overlap: int
) -> None:
    lr, network = picture(height, width), Mean()
    settings = RestorationSettings(tile=tile, overlap=overlap)
    canvas = np.zeros((height * SCALE, width * SCALE, 3))
    total = np.zeros((height * SCALE, width * SCALE, 1))
    rows, columns = (tile_spans(side, network, settings) for side in (height, width))
    for row, column in itertools.product(rows, columns):
        weight = np.ones((len(row) * SCALE, len(column) * SCALE, 1))
        for axis, span, spans in ((0, row, rows), (1, column, columns)):
            shared = (spans[0].stop - spans[1].start) * SCALE if len(spans) > 1 else 0
            inside = np.arange(len(span) * SCALE) + 0.5
            fade = np.ones(len(inside))
            if shared and span is not spans[0]:
                fade = np.minimum(fade, inside / shared)
            if shared and span is not spans[-1]:
                fade = np.minimum(fade, inside[::-1] / shared)
            weight *= np.expand_dims(fade, (1 - axis, 2))
        padded = pad_to_multiple(lr[row.start : row.stop, column.start : column.stop], 4)
        down = slice(row.start * SCALE, row.stop * SCALE)
        across = slice(column.start * SCALE, column.stop * SCALE)
        canvas[down, across] += weight * padded.mean(axis=(0, 1))
        total[down, across] += weight
    np.testing.assert_allclose(total, 1)
    restored = restore(network, lr, settings)
    assert restored.shape == canvas.shape
    assert float(np.abs(restored - canvas).max()) <= 0.501  # rounding to bytes


def test_a_network_in_tiles_makes_no_seam() -> None:
    """Of a smooth picture by a network that draws detail: the tiled result parts from the one in
    one piece no faster where tiles begin and end than elsewhere. Tiles cut hard do, 20 times."""
    torch.manual_seed(0)
    settings = PRESETS["teasr-xs"].model_copy(update={"depth": 4})
    network = DualBranchDiT(settings).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    network.head[-1].weight.data *= 0.1
    rows, columns = np.mgrid[0:96, 0:200]
    waves = [np.sin(rows * a + columns * b) for a, b in ((0.05, 0.08), (0.09, 0.03), (0.02, 0.1))]
    lr = (128 + 90 * np.stack(waves, axis=2)).astype(np.uint8)
    tiles = RestorationSettings(tile=96, overlap=8)
    spans = tile_spans(200, network, tiles)
    assert [span.start for span in spans] == [0, 64, 128]
    whole = restore(network, lr, RestorationSettings()).astype(float)
    apart = restore(network, lr, tiles) - whole
    assert np.abs(np.diff(whole, axis=1)).mean() > 10 and np.abs(apart).mean() < 0.5
    steps = np.abs(np.diff(apart, axis=1)).mean(axis=(0, 2))
    for place in (64, 96, 128, 160):
        assert steps[place * SCALE - 1] < 1.5 * steps.mean()


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_does_not_depend_on_the_tiling(steps: int) -> None:
    lr = picture(22, 27)
    shared = {"steps": steps, "stochastic_share": 0.5, "seed": 3}
    whole = restore(Noise(), lr, RestorationSettings(tile=64, **shared)).astype(int)
    assert whole.std() > 50
    for tile, overlap in ((8, 4), (12, 2), (16, 0)):
        settings = RestorationSettings(tile=tile, overlap=overlap, **shared)
        assert np.abs(restore(Noise(), lr, settings).astype(int) - whole).max() <= 1


def test_noise_is_a_function_of_the_seed_and_differs_between_rows() -> None:
    lr = picture(8, 8)
    first, again, other = (
        restore(Noise(), lr, RestorationSettings(seed=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    assert (first[:SCALE] != first[SCALE : 2 * SCALE]).mean() > 0.5


def test_noise_is_standard_normal_and_independent_between_places() -> None:
    side = 2 * NOISE_BLOCK
    whole = noise_field(5, 2, range(side), range(side), 2)
    assert whole.shape == (2, 3, 2 * side, 2 * side)
    assert float(whole.mean()) == pytest.approx(0, abs=0.01)
    assert float(whole.std()) == pytest.approx(1, abs=0.01)
    part = noise_field(5, 2, range(11, 45), range(20, 64), 2)
    assert torch.equal(part, whole[..., 22:90, 40:128])
    half = whole.shape[-1] // 2
    blocks = torch.stack([*whole[:, :, :half].flatten(2), *whole[:, :, half:].flatten(2)])
    correlation = torch.corrcoef(blocks.unflatten(2, (half, -1))[..., :half].flatten(2)[0])
    assert float((correlation - torch.eye(len(correlation))).abs().max()) < 0.05


def test_progress_counts_tiles() -> None:
    seen: list[tuple[int, int]] = []
    lr = picture(20, 6)
    settings = RestorationSettings(tile=8, overlap=2)
    restore(Nearest(), lr, settings, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    plain = Picture(lr, None, False, 8, "png")
    restore_picture(Nearest(), plain, settings, progress=lambda d, t: seen.append((d, t)))
    assert seen[4:] == seen[:4]


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


@pytest.mark.parametrize("period", [4, 8, 32])
def test_tiles_cover_everything_and_share_the_overlap(period: int) -> None:
    network = Toy()
    network.period = period
    for tile, overlap in itertools.product((8, 9, 16, 40, 64, 100), (0, 1, 3, 4)):
        unit = period if tile >= 2 * period else 4
        for length in range(1, 300):
            spans = tile_spans(length, network, RestorationSettings(tile=tile, overlap=overlap))
            assert spans[0].start == 0 and spans[-1].stop == length
            assert all(0 < len(span) <= tile and span.start % unit == 0 for span in spans)
            shared = {a.stop - b.start for a, b in itertools.pairwise(spans)}
            assert len(shared) <= 1 and all(overlap <= pixels < overlap + unit for pixels in shared)
            assert all(a.stop <= b.start for a, b in zip(spans, spans[2:]))
            if len(spans) > 1:
                (pixels,) = shared
                size = len(spans[0])
                assert len(spans) == math.ceil(
                    (-(-length // unit) * unit - pixels) / (size - pixels)
                )


@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
@pytest.mark.parametrize("length", [8, 9, 17, 64, 101])
def test_blend_weights_sum_to_one_and_fade_in(length: int, overlap: int) -> None:
    spans = [
        range(at, min(at + 8, length)) for at in range(0, max(length - overlap, 1), 8 - overlap)
    ]
    total = torch.zeros(length * SCALE)
    for i, (span, weight) in enumerate(zip(spans, blend_weights(spans, SCALE), strict=True)):
        assert weight.shape == (len(span) * SCALE,) and bool((weight > 0).all())
        total[span.start * SCALE : span.stop * SCALE] += weight
        if overlap and i:
            assert float(weight[0]) == pytest.approx(0.5 / (overlap * SCALE))
        if overlap and i + 1 < len(spans):
            assert float(weight[-1]) == pytest.approx(0.5 / (overlap * SCALE))
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


@pytest.mark.parametrize(("format", "side"), [("webp", 4096), ("jpeg", 16_376)])
def test_a_side_that_the_format_has_not_is_refused_before_the_work(format: str, side: int) -> None:
    network = Nearest()
    source = Picture(np.zeros((1, side, 3), np.uint8), None, False, 8, "png")
    with pytest.raises(UsageError, match=rf"{side * SCALE} x 4 pixels.*Write png"):
        restore_picture(network, source, RestorationSettings(), format)
    assert not network.asked


def test_a_result_that_no_memory_holds_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Nearest()
    source = Picture(picture(50, 40), None, False, 8, "png")
    monkeypatch.setattr("teasr.restoration._memory", lambda: 319_999)
    with pytest.raises(UsageError, match=r"160 x 200 pixels, takes .* GB.*Cut the picture"):
        restore_picture(network, source, RestorationSettings())
    assert not network.asked
    monkeypatch.setattr("teasr.restoration._memory", lambda: 320_000)
    assert restore_picture(network, source, RestorationSettings())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (30, 41), (64, 1)])
def test_wavelet_colour_removes_a_cast_and_keeps_the_detail(height: int, width: int) -> None:
    lr = (picture(height, width) // 8 + 100).astype(np.uint8)
    plain = restore(Nearest(0.3), lr, RestorationSettings(tile=16))
    matched = restore(Nearest(0.3), lr, RestorationSettings(tile=16, colour="wavelet"))
    assert float((plain - nearest(lr).astype(float)).mean()) == pytest.approx(38, abs=0.5)
    np.testing.assert_array_equal(matched, nearest(lr))


@pytest.mark.parametrize("period", [8, 32, 128])
def test_wavelet_colour_takes_what_passes_a_gaussian(period: int) -> None:
    """A wave of `period` LR pixels that the input has not loses exp(-(2 pi sigma / period)^2 / 2)
    of its amplitude, sigma = 4."""
    lr = np.full((64, 256, 3), 120, np.uint8)
    wave = 60 * np.sin(2 * np.pi * (np.arange(256 * SCALE) + 0.5) / SCALE / period)
    restored = np.rint(120 + wave)[None, :, None].repeat(64 * SCALE, 0).repeat(3, 2)
    matched = restored.astype(np.uint8)
    match_low_frequencies(matched, lr)
    middle = slice(64 * SCALE, 192 * SCALE)  # whole periods, away from the mirrored ends
    left = (matched[100, middle, 0].astype(float) - 120) @ wave[middle]
    left /= wave[middle] @ wave[middle]
    assert left == pytest.approx(1 - math.exp(-((2 * math.pi * 4 / period) ** 2) / 2), abs=0.02)


def test_adain_colour_gives_the_mean_and_the_deviation_of_the_magnified_input() -> None:
    lr = (picture(40, 30) // 4 + np.uint8([20, 90, 120])).astype(np.uint8)
    restored = (picture(160, 120, seed=1) // 2 + np.uint8([60, 0, 30])).astype(np.uint8)
    matched = restored.copy()
    match_statistics(matched, lr)
    large = bicubic_upsample(lr, SCALE)
    for channel in range(3):
        got, wanted = (pixels[..., channel].astype(float) for pixels in (matched, large))
        assert got.mean() == pytest.approx(wanted.mean(), abs=0.05)
        assert got.std() == pytest.approx(wanted.std(), abs=0.05)
        was = restored[..., channel].astype(float).ravel()
        assert np.corrcoef(was, got.ravel())[0, 1] > 0.999  # a linear map
    cast = restore(Nearest(0.3), lr, RestorationSettings(tile=16, colour="adain"))
    assert np.abs(cast.mean(axis=(0, 1)) - large.mean(axis=(0, 1))).max() < 0.05


@pytest.mark.parametrize("match", [match_low_frequencies, match_statistics])
def test_colour_of_a_faithful_result_is_left_alone(match) -> None:
    lr = np.full((12, 20, 3), (10, 130, 250), np.uint8)
    restored = nearest(lr)
    match(restored, lr)
    np.testing.assert_array_equal(restored, nearest(lr))


@pytest.mark.parametrize("match", [match_low_frequencies, match_statistics])
def test_colour_does_not_depend_on_the_strips(match, monkeypatch: pytest.MonkeyPatch) -> None:
    lr, restored = picture(50, 30), picture(200, 120, seed=1)
    whole, striped = restored.copy(), restored.copy()
    match(whole, lr)
    monkeypatch.setattr("teasr.restoration._STRIP_PIXELS", 7 * 30 * SCALE**2)
    match(striped, lr)
    assert np.abs(whole.astype(int) - striped).max() <= 1


_PEAK = """
import resource, sys
import numpy as np
sys.path[:0] = {path!r}
from tests.test_restoration import Nearest, RestorationSettings, restore
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
lr = np.full(({height}, {width}, 3), 99, np.uint8)
settings = RestorationSettings(tile=64, colour={colour!r})
restore(Nearest(), lr[:256, :256], settings)
before = peak()
restore(Nearest(), lr, settings)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("height", "width", "colour"),
    [(50, 10_000, "none"), (10_000, 50, "none"), (800, 1000, "wavelet"), (800, 1000, "adain")],
)
def test_memory_is_that_of_the_result(height: int, width: int, colour: str) -> None:
    """In MiB: the result, a strip as high as the overlap, and less than the input in float32 twice;
    a canvas of the picture in float32 would be four times the result."""
    path = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "platform")]
    program = _PEAK.format(path=path, height=height, width=width, colour=colour)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    result, strip = 48 * height * width / 2**20, 3 * 4 * 8 * SCALE * width * SCALE / 2**20
    assert float(done.stdout) < result + strip + 24 * height * width / 2**20 + 40
