"""Restoration where the network works on latents: their grid, tiles, sizes, colour."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn

from teasr.backbones import Codec, KLCodec, Pixels, QwenImageCodec
from teasr.backbones.base import Backbone, velocity_from_image
from teasr.backbones.dit import upsample
from teasr.backbones.latent import LatentBackbone
from teasr.images import bicubic_upsample
from teasr.restoration import RestorationSettings, noise_field, restore, tile_spans
from tests.backbones.latents import KIND_NAMES, autoencoder, backbone
from tests.backbones.networks import network as native

SCALE, FACTOR = 4, 8
both_kinds = pytest.mark.parametrize("kind", KIND_NAMES)


class Blocks:
    """A codec without loss: a latent is the pixels of a square."""

    scale, factor, channels = SCALE, FACTOR, 3 * FACTOR**2

    def encode(self, pictures: Tensor) -> Tensor:
        return functional.pixel_unshuffle(pictures, FACTOR)

    def condition(self, lr: Tensor) -> Tensor:
        return self.encode(upsample(lr, SCALE))

    def decode(self, latents: Tensor) -> Tensor:
        return functional.pixel_shuffle(latents, FACTOR)


class Toy(Backbone):
    """Restores to its condition, or to its own noise; takes latents in patches of two."""

    scale, multiple, period = SCALE, 4, 4

    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.noise = noise
        self.asked: set[tuple[int, ...]] = set()

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        assert x_t.shape == condition.shape
        self.asked.add(tuple(x_t.shape))
        return torch.zeros_like(x_t) if self.noise else velocity_from_image(x_t, condition, t)


@lru_cache
def tiny(kind: str) -> tuple[LatentBackbone, Codec]:
    """A random network and a random autoencoder of a kind, whose pictures vary."""
    codec = (QwenImageCodec if kind == "qwen-image" else KLCodec)(autoencoder(kind))
    return backbone(kind, live=True).eval(), codec


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows * a + columns * b) for a, b in ((0.05, 0.08), (0.09, 0.03), (0.02, 0.1))]
    return (128 + 90 * np.stack(waves, axis=2)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (13, 30), (37, 61)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 4), (18, 3), (32, 8), (None, None)])
def test_tiles_of_latents_make_one_picture(
    height: int, width: int, tile: int | None, overlap: int | None
) -> None:
    """Of a network that returns its condition: the bicubic picture, whatever the tiles, but for the
    two pixels at a tile's edge, where the kernel sees no neighbour."""
    lr, network = smooth(height, width), Toy()
    settings = RestorationSettings(tile=tile, overlap=overlap)
    restored = restore(network, lr, settings, codec=Blocks())
    assert restored.shape == (height * SCALE, width * SCALE, 3)
    apart = np.abs(restored.astype(int) - bicubic_upsample(lr, SCALE).astype(int))
    assert apart.max() <= (1 if tile is None and min(lr.shape[:2]) > 4 else 8)
    assert all(channels == 192 and not side % 2 for _, channels, *s in network.asked for side in s)


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_of_latents_does_not_depend_on_the_tiling(steps: int) -> None:
    lr = smooth(38, 75)
    shared = {"steps": steps, "stochastic_share": 0.5, "seed": 3}
    whole = restore(Toy(noise=True), lr, RestorationSettings(tile=96, **shared), codec=Blocks())
    assert whole.std() > 50
    for tile, overlap in ((8, 4), (12, 4), (40, 8)):
        settings = RestorationSettings(tile=tile, overlap=overlap, **shared)
        tiled = restore(Toy(noise=True), lr, settings, codec=Blocks())
        assert np.abs(tiled.astype(int) - whole).max() <= 1


def test_noise_of_latents_is_a_function_of_their_place() -> None:
    whole = noise_field(5, 2, range(96), range(64), SCALE, 16, FACTOR)
    assert whole.shape == (2, 16, 48, 32)
    assert float(whole.std()) == pytest.approx(1, abs=0.02)
    part = noise_field(5, 2, range(20, 72), range(4, 40), SCALE, 16, FACTOR)
    assert torch.equal(part, whole[..., 10:36, 2:20])


@both_kinds
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 18), (33, 21)])
def test_odd_sizes_come_back_at_exactly_four_times_their_size(
    kind: str, height: int, width: int
) -> None:
    network, codec = tiny(kind)
    lr = smooth(height, width)
    for settings in (RestorationSettings(), RestorationSettings(tile=16, overlap=4, steps=2)):
        first, again = (restore(network, lr, settings, codec=codec) for _ in range(2))
        assert first.shape == (height * SCALE, width * SCALE, 3)
        np.testing.assert_array_equal(first, again)


@both_kinds
def test_a_latent_network_in_tiles_makes_no_seam(kind: str) -> None:
    """As in pixels: the tiled result parts from the whole one no faster where tiles begin and end
    than elsewhere. Tiles cut hard do, 7 times."""
    network, codec = tiny(kind)
    lr = smooth(48, 112)
    whole = restore(network, lr, RestorationSettings(tile=128), codec=codec).astype(float)

    def seams(overlap: int, *places: int) -> list[float]:
        tiles = RestorationSettings(tile=48, overlap=overlap)
        assert {span.start for span in tile_spans(112, network, tiles)} <= {0, *places}
        apart = restore(network, lr, tiles, codec=codec) - whole
        steps = np.abs(np.diff(apart, axis=1)).mean(axis=(0, 2))
        return [float(steps[place * SCALE - 1] / steps.mean()) for place in places]

    assert max(seams(16, 32, 48, 64, 80)) < 2
    assert min(seams(0, 48, 96)) > 3


@both_kinds
def test_colour_is_taken_from_the_input(kind: str) -> None:
    network, codec = tiny(kind)
    lr = (smooth(24, 30) // 2 + 60).astype(np.uint8)
    plain, wavelet, adain = (
        restore(network, lr, RestorationSettings(colour=colour), codec=codec).astype(float)
        for colour in ("none", "wavelet", "adain")
    )
    means = lr.mean(axis=(0, 1))
    assert np.abs(plain.mean(axis=(0, 1)) - means).max() > 5
    for matched in (wavelet, adain):
        assert np.abs(matched.mean(axis=(0, 1)) - means).max() < 1


def test_what_settings_leave_open_is_the_networks_choice() -> None:
    """One picture by default and by the choices spelled out; another by other levels."""
    lr = smooth(9, 140)
    for network, codec, tile, overlap, warp, other in (
        (*tiny("z-image"), 128, 32, (1.0, 1.0), (0.05, 1.0)),
        (native(1), Pixels(), 384, 8, (0.05, 1.0), (1.0, 1.0)),
    ):
        default = restore(network, lr, RestorationSettings(steps=3), codec=codec)
        said = RestorationSettings(steps=3, tile=tile, overlap=overlap, warp=warp)
        np.testing.assert_array_equal(default, restore(network, lr, said, codec=codec))
        levels = said.model_copy(update={"warp": other})
        assert (default != restore(network, lr, levels, codec=codec)).any()
        assert len(tile_spans(140, network, RestorationSettings())) == (2 if tile == 128 else 1)
