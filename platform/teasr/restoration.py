"""From a picture of any size to its restored self: padding, tiles, blending, colour.

A transformer is used at the extent it was trained for: the picture is cut into overlapping tiles
that are blended by ramps summing to one, so that no seam shows. Tiles are taken row by row and
finished rows are written out at once: memory beyond the result is one row of tiles, whatever the
picture's height. Noise is a function of (seed, row of the picture), not of the tiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from teasr.backbones.base import Backbone
from teasr.images import Picture, bicubic_upsample, encode
from teasr.sampler import SamplerSettings, noise_draws, sample


class RestorationSettings(SamplerSettings):
    """How a picture is restored; the sampler's settings, and:"""

    warp: tuple[float, float] | None = (0.05, 1.0)
    """Levels stay near 1, where a small network's one-step pictures are best: each step restores
    anew, knowing the last result. None spreads them evenly, which suits a network that was trained
    long enough to draw detail from low noise levels."""
    seed: int = Field(0, ge=0)
    """Seed of the noise; equal seeds give equal pictures."""
    tile: int = Field(32, ge=8)
    """Side of a tile in low-resolution pixels; best at the extent the model was trained for."""
    overlap: int = Field(8, ge=0)
    """Low-resolution pixels that neighbouring tiles share."""
    batch: int = Field(16, ge=1)
    """Tiles evaluated at once."""
    colour: Literal["none", "wavelet"] = "none"
    """`wavelet` takes the lowest frequencies of the result from the input (as StableSR, arXiv
    2305.07015); a network that predicts a residual on the bicubic picture seldom needs it."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> RestorationSettings:
        if 2 * self.overlap > self.tile:
            raise ValueError("overlap must be at most half of tile")
        return self


def restore(
    network: Backbone,
    picture: NDArray[np.uint8],
    settings: RestorationSettings,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Restore an (h, w, 3) uint8 RGB picture to (scale h, scale w, 3).

    Args:
        network: in evaluation mode.
        progress: called as (rows of tiles done, rows of tiles) while the work goes on.
    """
    height, width = picture.shape[:2]
    scale = network.scale
    padded = pad_to_multiple(picture, network.multiple)
    tile_height, tile_width = (
        min(-(-settings.tile // network.multiple) * network.multiple, side)
        for side in padded.shape[:2]
    )
    tops = tile_starts(padded.shape[0], tile_height, settings.overlap)
    lefts = tile_starts(padded.shape[1], tile_width, settings.overlap)
    down = blend_weights(tops, tile_height, padded.shape[0], scale)
    across = blend_weights(lefts, tile_width, padded.shape[1], scale)

    device = next(network.parameters()).device
    condition = torch.from_numpy(padded).permute(2, 0, 1).float().div_(127.5).sub_(1)
    result = np.empty((padded.shape[0] * scale, padded.shape[1] * scale, 3), np.uint8)
    canvas = torch.zeros(3, tile_height * scale, padded.shape[1] * scale)
    noise_rows = _NoiseRows(settings, padded.shape[1], scale)
    for i, top in enumerate(tops):
        noise = noise_rows.band(top, tile_height)
        for chunk in _chunks(list(enumerate(lefts)), settings.batch):
            tiles = torch.stack(
                [condition[:, top : top + tile_height, x : x + tile_width] for _, x in chunk]
            )
            fields = torch.stack(
                [noise[..., x * scale : (x + tile_width) * scale] for _, x in chunk], dim=1
            )
            restored = sample(network, tiles.to(device), fields.to(device), settings).float().cpu()
            for (j, x), tile in zip(chunk, restored):
                weight = down[i][:, None] * across[j][None]
                canvas[:, :, x * scale : (x + tile_width) * scale] += weight * tile
        following = tops[i + 1] if i + 1 < len(tops) else top + tile_height
        finished = (following - top) * scale
        rows = canvas[:, :finished].add(1).mul_(127.5).round_().clamp_(0, 255).byte()
        result[top * scale : following * scale] = rows.permute(1, 2, 0).numpy()
        canvas = functional.pad(canvas[:, finished:], (0, 0, 0, finished))
        if progress:
            progress(i + 1, len(tops))
    result = result[: height * scale, : width * scale]
    return match_colour(result, picture, scale) if settings.colour == "wavelet" else result


def restore_picture(
    network: Backbone,
    picture: Picture,
    settings: RestorationSettings,
    format: str = "png",
    progress: Callable[[int, int], None] | None = None,
) -> bytes:
    """Restore a decoded picture and encode it: grey stays grey, alpha is magnified bicubically.

    Args:
        progress: as for `restore`.

    Raises:
        TeasrError: when `format` cannot carry the picture (alpha in a JPEG).
    """
    restored = restore(network, picture.rgb, settings, progress)
    alpha = None
    if picture.alpha is not None:
        stacked = np.repeat(picture.alpha[:, :, None], 3, axis=2)
        alpha = bicubic_upsample(stacked, network.scale)[:, :, 0]
    return encode(restored, format=format, alpha=alpha, grey=picture.grey)


def pad_to_multiple(picture: NDArray[np.uint8], multiple: int) -> NDArray[np.uint8]:
    """Extend bottom and right by mirrored (for a single row or column: repeated) pixels."""
    bottom, right = (-side % multiple for side in picture.shape[:2])
    return np.pad(picture, ((0, bottom), (0, right), (0, 0)), mode="symmetric")


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Evenly spread starts of tiles of `tile` that cover `length` and share at least `overlap`."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def blend_weights(starts: list[int], tile: int, length: int, scale: int) -> list[Tensor]:
    """Per tile a ramp (tile * scale,) such that at every pixel all tiles' ramps sum to one."""
    size = tile * scale
    middle = (torch.arange(size) + 0.5) / size
    window = torch.minimum(middle, 1 - middle)
    total = torch.zeros(length * scale)
    for start in starts:
        total[start * scale : start * scale + size] += window
    return [window / total[start * scale : start * scale + size] for start in starts]


def match_colour(
    restored: NDArray[np.uint8], picture: NDArray[np.uint8], scale: int
) -> NDArray[np.uint8]:
    """Replace the low frequencies of `restored` (H, W, 3) by those of the LR `picture`."""
    sigma = 4.0 * scale
    reference = bicubic_upsample(picture, scale).astype(np.float32)
    difference = reference - restored.astype(np.float32)
    low = cv2.GaussianBlur(difference, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    return np.clip(np.rint(restored + low), 0, 255).astype(np.uint8)


class _NoiseRows:
    """Noise by rows of low-resolution pixels, each from its own seed; a band is kept for reuse."""

    def __init__(self, settings: RestorationSettings, width: int, scale: int) -> None:
        self.shape = (noise_draws(settings), 3, scale, width * scale)
        self.seed = settings.seed
        self.rows: dict[int, Tensor] = {}

    def band(self, top: int, count: int) -> Tensor:
        """(draws, 3, count * scale, width * scale) standard normal noise of the rows from `top`."""
        self.rows = {row: noise for row, noise in self.rows.items() if row >= top}
        for row in range(top, top + count):
            if row not in self.rows:
                words = np.random.SeedSequence((self.seed, row)).generate_state(1, np.uint64)
                generator = torch.Generator().manual_seed(int(words[0]) >> 1)
                self.rows[row] = torch.randn(self.shape, generator=generator)
        return torch.cat([self.rows[row] for row in range(top, top + count)], dim=2)


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))
