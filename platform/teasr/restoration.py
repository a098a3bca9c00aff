"""From a picture of any size to its restored self: padding, tiles, blending, colour.

A picture that is larger than a tile is cut into tiles that share a margin, across which one fades
into the next. Tiles start where the network's own windows do, so that two neighbours divide their
margin alike, and differ there only by what each sees beyond it: no seam shows. Memory beyond the
result is that of one tile and of a strip as wide as the picture and as high as the margin. Noise
is a function of seed and place in the picture, not of the tiling. Where the network works on
latents, a tile is encoded, sampled and decoded by itself, and what is blended are pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from teasr.backbones.base import Backbone
from teasr.backbones.codec import Codec, Pixels
from teasr.errors import UsageError
from teasr.images import Picture, bicubic_upsample, check_format, encode
from teasr.sampler import SamplerSettings, noise_draws, sample

Bytes = NDArray[np.uint8]
Progress = Callable[[int, int], None]
"""Called as (tiles done, tiles) while the work goes on."""

NOISE_BLOCK = 32
"""Side, in low-resolution pixels, of the blocks whose noise has a seed of its own."""
_COLOUR_SIGMA = 4.0
_BYTES_PER_PIXEL = 10  # of a result that is encoded: the array 3, Pillow's copy 4, the file
_STRIP_PIXELS = 1 << 18  # of the result, for which colour is matched at once


class RestorationSettings(SamplerSettings):
    """How a picture is restored; the sampler's settings, and:"""

    warp: tuple[float, float] | None = None
    """As of the sampler, but None: the model's own choice (`Backbone.warp`). (0.05, 1) stays near
    level 1, as suits a small network; (1, 1) spreads the levels evenly, which suits one that was
    trained long enough to draw detail from low noise levels."""
    seed: int = Field(0, ge=0)
    """Seed of the noise; equal seeds give equal pictures."""
    tile: int | None = Field(None, ge=8, le=1024)
    """Longest side of a tile in low-resolution pixels; None: the model's own, 384 for native ones
    (`teasr-s` takes 2.3 kB a pixel: 0.35 GB), 128 for pretrained ones."""
    overlap: int | None = Field(None, ge=0)
    """Low-resolution pixels that neighbouring tiles share; in tiles of two windows or more it is
    rounded up to whole windows. At most half of `tile`; None: the model's own, 8 for native ones,
    32 for pretrained ones."""
    colour: Literal["none", "wavelet", "adain"] = "none"
    """What the result takes from the input: `wavelet` its lowest frequencies, `adain` each
    channel's mean and standard deviation (both as StableSR, arXiv 2305.07015). A network that
    predicts a residual on the bicubic picture seldom needs it."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> RestorationSettings:
        if self.tile and self.overlap and 2 * self.overlap > self.tile:
            raise ValueError("overlap must be at most half of tile")
        return self


@dataclass(frozen=True)
class Tile:
    """A part of a picture as the network takes it.

    Attributes:
        lr: (3, h, w) float32 in [-1, 1], sides multiples of `Backbone.multiple`.
        noise: (draws, channels, scale h / factor, scale w / factor) float32.
        number, count: its place among the picture's tiles, from 1.
    """

    lr: Tensor
    noise: Tensor
    number: int
    count: int


def restore(
    network: Backbone,
    picture: Bytes,
    settings: RestorationSettings,
    progress: Progress | None = None,
    codec: Codec | None = None,
) -> Bytes:
    """Restore an (h, w, 3) uint8 RGB picture to (scale h, scale w, 3).

    Args:
        network: in evaluation mode.
        codec: of what the network works on; None: pixels.
    """
    work = restoring(network, picture, settings, codec)
    tile = next(work)
    while True:
        (restored,) = restore_tiles(network, [tile], settings, codec)
        if progress:
            progress(tile.number, tile.count)
        try:
            tile = work.send(restored)
        except StopIteration as finished:
            result: Bytes = finished.value
            return result


def restoring(
    network: Backbone,
    picture: Bytes,
    settings: RestorationSettings,
    codec: Codec | None = None,
) -> Generator[Tile, Tensor, Bytes]:
    """What `restore` does around the network, for whoever works on several pictures at a time.

    Yields tile after tile, is sent what `restore_tiles` made of each, and returns the result.
    """
    codec = codec or Pixels(network.scale)
    height, width = picture.shape[:2]
    scale = network.scale
    rows, columns = (tile_spans(side, network, settings) for side in (height, width))
    down, across = (blend_weights(spans, scale) for spans in (rows, columns))
    result = np.empty((height * scale, width * scale, 3), np.uint8)
    above = torch.zeros(3, _shared(rows) * scale, width * scale)
    for i, row in enumerate(rows):
        beside = torch.zeros(3, 0, 0)
        for j, column in enumerate(columns):
            lr, noise = _tile(network, codec, picture, row, column, settings)
            restored = yield Tile(lr, noise, i * len(columns) + j + 1, len(rows) * len(columns))
            tile = restored[:, : len(row) * scale, : len(column) * scale]
            tile *= down[i][:, None] * across[j]
            # What the tiles to the left and above gave to the pixels that they share with this one.
            if j:
                tile[..., : beside.shape[2]] += beside
            top, left = row.start * scale, column.start * scale
            bottom, right = (
                scale * (spans[k + 1].start if k + 1 < len(spans) else spans[k].stop)
                for spans, k in ((rows, i), (columns, j))
            )
            done, beside = tile[..., : right - left], tile[..., right - left :]
            if i:
                done[:, : above.shape[1]] += above[..., left:right]
            if i + 1 < len(rows):
                above[..., left:right] = done[:, bottom - top :]
            done = done[:, : bottom - top].add(1).mul_(127.5).round_().clamp_(0, 255).byte()
            result[top:bottom, left:right] = done.permute(1, 2, 0).numpy()
    if settings.colour == "wavelet":
        match_low_frequencies(result, picture)
    elif settings.colour == "adain":
        match_statistics(result, picture)
    return result


def _tile(
    network: Backbone,
    codec: Codec,
    picture: Bytes,
    row: range,
    column: range,
    settings: RestorationSettings,
) -> tuple[Tensor, Tensor]:
    """`lr` and `noise` of the `Tile` of the pixels in `row` and `column`."""
    pixels = picture[row.start : row.stop, column.start : column.stop]
    padded = pad_to_multiple(pixels, network.multiple)
    lr = torch.from_numpy(padded).permute(2, 0, 1).float().div_(127.5).sub_(1)
    rows, columns = (
        range(span.start, span.start + side) for span, side in zip((row, column), padded.shape)
    )
    draws, channels, factor = noise_draws(settings), codec.channels, codec.factor
    noise = noise_field(settings.seed, draws, rows, columns, network.scale, channels, factor)
    return lr, noise


def restore_tiles(
    network: Backbone,
    tiles: Sequence[Tile],
    settings: RestorationSettings,
    codec: Codec | None = None,
) -> Tensor:
    """Tiles of one size, of one picture or several, to (N, 3, scale h, scale w) float32.

    Args:
        settings: the sampler's count; seed and tiling are in the tiles.
    """
    codec = codec or Pixels(network.scale)
    settings = settings.model_copy(update={"warp": settings.warp or network.warp})
    device = next(network.parameters()).device
    lr = torch.stack([tile.lr for tile in tiles])
    noise = torch.stack([tile.noise for tile in tiles], dim=1)
    with torch.no_grad():
        prepared = network.prepare(codec.condition(lr.to(device)))
        sampled = sample(network, prepared, noise.to(device), settings)
        return codec.decode(sampled).float().cpu()


def restore_picture(
    network: Backbone,
    picture: Picture,
    settings: RestorationSettings,
    format: str = "png",
    progress: Progress | None = None,
    codec: Codec | None = None,
) -> bytes:
    """Restore a decoded picture and encode it: grey stays grey, alpha is magnified bicubically.

    Errors as of `check_result`, before any work.
    """
    check_result(network, picture, format)
    restored = restore(network, picture.rgb, settings, progress, codec)
    return encode_restored(restored, picture, format)


def check_result(network: Backbone, picture: Picture, format: str) -> None:
    """Whether `picture` can be restored and written as `format`.

    Raises:
        UsageError: when `format` cannot carry the result (alpha in a JPEG, too long a side), or
            this machine's memory cannot hold it.
    """
    height, width = (side * network.scale for side in picture.rgb.shape[:2])
    check_format(format, width, height, picture.alpha is not None)
    needed, memory = height * width * _BYTES_PER_PIXEL, _memory()
    if needed > memory:
        raise UsageError(
            f"The result, {width} x {height} pixels, takes {needed / 1e9:.1f} GB of memory; this "
            f"machine has {memory / 1e9:.1f}.",
            "Cut the picture into parts.",
        )


def encode_restored(restored: Bytes, picture: Picture, format: str) -> bytes:
    """What was restored of `picture` as a file, with the transparency that the picture has."""
    alpha = picture.alpha
    if alpha is not None:
        alpha = bicubic_upsample(alpha, len(restored) // len(alpha))
    return encode(restored, format=format, alpha=alpha, grey=picture.grey)


def _memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pad_to_multiple(picture: Bytes, multiple: int) -> Bytes:
    """Extend bottom and right by mirrored (for a single row or column: repeated) pixels."""
    bottom, right = (-side % multiple for side in picture.shape[:2])
    return np.pad(picture, ((0, bottom), (0, right), (0, 0)), mode="symmetric")


def tile_spans(length: int, network: Backbone, settings: RestorationSettings) -> list[range]:
    """Low-resolution pixels of the tiles along a side of `length`, each but the last as long as
    `settings.tile` allows; a tile meets no tile but its neighbours."""
    longest = settings.tile or network.tile
    margin = network.overlap if settings.overlap is None else settings.overlap
    unit = network.period if longest >= 2 * network.period else network.multiple
    tile = max(longest // unit, 1)
    overlap = min(-(-margin // unit), tile // 2)
    if length <= tile * unit:
        return [range(length)]
    starts = range(0, -(-length // unit) - overlap, tile - overlap)
    return [range(i * unit, min((i + tile) * unit, length)) for i in starts]


def blend_weights(spans: list[range], scale: int) -> list[Tensor]:
    """Per tile the weight (len * scale,) of its pixels, ramps where tiles meet; they sum to one."""
    weights = [torch.ones(len(span) * scale) for span in spans]
    size = _shared(spans) * scale
    ramp = (torch.arange(size) + 0.5) / size
    for first, second in pairwise(weights):
        first[len(first) - size :] = 1 - ramp
        second[:size] = ramp
    return weights


def _shared(spans: list[range]) -> int:
    return spans[0].stop - spans[1].start if len(spans) > 1 else 0


def noise_field(
    seed: int,
    draws: int,
    rows: range,
    columns: range,
    scale: int,
    channels: int = 3,
    factor: int = 1,
) -> Tensor:
    """(draws, channels, scale len(rows) / factor, scale len(columns) / factor) of independent
    standard normal numbers.

    Those of a low-resolution pixel depend on `seed` and its place alone.

    Args:
        rows, columns: low-resolution pixels, from and to the edges of latents.
        scale: magnification. factor: restored pixels along a side of a latent.
    """
    high, wide = (
        range(span.start // NOISE_BLOCK, -(-span.stop // NOISE_BLOCK)) for span in (rows, columns)
    )
    side = NOISE_BLOCK * scale // factor
    field = torch.empty(draws, channels, len(high) * side, len(wide) * side)
    generator = torch.Generator()
    for i, row in enumerate(high):
        for j, column in enumerate(wide):
            words = np.random.SeedSequence((seed, row, column)).generate_state(1, np.uint64)
            generator.manual_seed(int(words[0]) >> 1)
            block = torch.randn(draws, channels, side, side, generator=generator)
            field[..., i * side : (i + 1) * side, j * side : (j + 1) * side] = block
    top, left, height, width = (
        pixels * scale // factor
        for pixels in (
            *(span.start % NOISE_BLOCK for span in (rows, columns)),
            *(len(span) for span in (rows, columns)),
        )
    )
    return field[..., top : top + height, left : left + width]


def match_low_frequencies(restored: Bytes, picture: Bytes) -> None:
    """Replace, in place, the low frequencies of `restored` (H, W, 3) by those of the LR `picture`.

    What passes a Gaussian of 4 low-resolution pixels' deviation counts as low, about what the five
    levels of StableSR's wavelets at scale 4 leave.
    """
    height, width = picture.shape[:2]
    scale = len(restored) // height
    small = cv2.resize(restored, (width, height), interpolation=cv2.INTER_AREA)
    low = picture.astype(np.float32)
    low -= small
    cv2.GaussianBlur(low, (0, 0), _COLOUR_SIGMA, dst=low, borderType=cv2.BORDER_REFLECT)

    def enlarge(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        size = (width * scale, len(rows) * scale)
        return np.asarray(cv2.resize(rows, size, interpolation=cv2.INTER_LINEAR), np.float32)

    for strip in _strips(height, width * scale**2):
        rows = restored[strip.start * scale : strip.stop * scale]
        rows[:] = np.clip(np.rint(rows + _magnified(low, strip, scale, enlarge)), 0, 255)


def match_statistics(restored: Bytes, picture: Bytes) -> None:
    """Give, in place, the channels of `restored` (H, W, 3) the mean and the standard deviation that
    they have in the magnified LR `picture` (adaptive instance normalisation, arXiv 1703.06868)."""
    height, width = picture.shape[:2]
    scale = len(restored) // height
    strips = _strips(height, width * scale**2)
    views = [restored[strip.start * scale : strip.stop * scale] for strip in strips]
    mean, deviation = _statistics(views)
    wanted_mean, wanted_deviation = _statistics(
        _magnified(picture, strip, scale, lambda rows: bicubic_upsample(rows, scale))
        for strip in strips
    )
    gain = wanted_deviation / np.maximum(deviation, 1e-3)
    mapped = (np.arange(256)[:, None] - mean) * gain + wanted_mean
    table = np.clip(np.rint(mapped), 0, 255).astype(np.uint8)[None]
    for view in views:
        view[:] = cv2.LUT(view, table)


def _statistics(strips: Iterable[Bytes]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (3,) of each channel, of all pixels together."""
    counts = np.zeros((3, 256))
    for strip in strips:
        counts += [np.bincount(strip[..., i].ravel(), minlength=256) for i in range(3)]
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ np.arange(256.0)
    return mean, np.sqrt(np.maximum(shares @ np.arange(256.0) ** 2 - mean**2, 0))


def _strips(height: int, row_pixels: int) -> list[range]:
    """Rows of the LR picture in strips of about `_STRIP_PIXELS` of the result, one row at least."""
    step = max(_STRIP_PIXELS // row_pixels, 1)
    return [range(top, min(top + step, height)) for top in range(0, height, step)]


def _magnified(
    picture: NDArray[Any], strip: range, scale: int, enlarge: Callable[[NDArray[Any]], NDArray[Any]]
) -> NDArray[Any]:
    """Rows of the enlarged picture that come from `strip`, as if it were enlarged whole by a kernel
    that reaches two rows."""
    first, last = max(strip.start - 2, 0), min(strip.stop + 2, len(picture))
    top = (strip.start - first) * scale
    return enlarge(picture[first:last])[top : top + len(strip) * scale]
