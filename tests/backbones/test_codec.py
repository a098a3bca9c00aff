"""Pictures to latents and back, on small random autoencoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teasr.backbones.codec import AutoencoderCodec, Codec, KLCodec, Pixels, QwenImageCodec
from teasr.backbones.dit import upsample
from teasr.errors import UsageError
from tests.backbones.latents import autoencoder

CODECS: dict[str, type[AutoencoderCodec]] = {"qwen-image": QwenImageCodec, "z-image": KLCodec}
both_kinds = pytest.mark.parametrize("kind", CODECS)


def codec(kind: str, **options: Any) -> AutoencoderCodec:
    return CODECS[kind](autoencoder(kind), **options)


def pictures(rows: int = 16, columns: int = 24) -> Tensor:
    return torch.rand(2, 3, rows, columns, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_pixels_stay_as_they_are() -> None:
    made: Codec = Pixels()
    x = pictures()
    assert made.encode(x) is x and made.decode(x) is x and made.condition(x) is x
    assert (made.scale, made.factor, made.channels) == (4, 1, 3)


@both_kinds
def test_shapes_and_types(kind: str) -> None:
    made = codec(kind)
    assert made.factor == 8 and made.channels == 4 and made.scale == 4
    latents = made.encode(pictures())
    assert latents.shape == (2, 4, 2, 3) and latents.dtype == torch.float32
    decoded = made.decode(latents)
    assert decoded.shape == (2, 3, 16, 24) and decoded.dtype == torch.float32
    assert made.condition(pictures(4, 6)).shape == latents.shape
    assert torch.equal(made.encode(pictures()), latents)  # the mode, not a sample


@both_kinds
def test_latents_are_normalised_as_in_the_pipeline_and_back(kind: str) -> None:
    made = codec(kind)
    config, network = made.autoencoder.config, made.autoencoder
    x = pictures()
    with torch.no_grad():
        if kind == "qwen-image":
            raw = network.encode(x[:, :, None]).latent_dist.mode()
            mean = torch.tensor(config.latents_mean).view(1, 4, 1, 1, 1)
            std = torch.tensor(config.latents_std).view(1, 4, 1, 1, 1)
            expected, decoded = ((raw - mean) / std)[:, :, 0], network.decode(raw).sample[:, :, 0]
        else:
            raw = network.encode(x).latent_dist.mode()
            expected = (raw - config.shift_factor) * config.scaling_factor
            decoded = network.decode(raw).sample
    torch.testing.assert_close(made.encode(x), expected)
    torch.testing.assert_close(made.decode(made.encode(x)), decoded, rtol=1e-4, atol=1e-4)


@both_kinds
def test_the_condition_is_the_bicubic_picture(kind: str) -> None:
    lr = pictures(4, 6)
    for scale in (4, 2):
        if scale == 2:
            lr = pictures(8, 12)
        made = codec(kind, scale=scale)
        expected = made.encode(upsample(lr, scale).clamp(-1, 1))
        assert torch.equal(made.condition(lr), expected)


@both_kinds
def test_decoding_is_differentiable_and_nothing_in_it_is_trained(kind: str) -> None:
    made = codec(kind)
    made.autoencoder.train()  # what wraps it sets the mode; a new codec sets it back
    made = CODECS[kind](made.autoencoder)
    assert not made.autoencoder.training and not isinstance(made, nn.Module)
    assert not any(p.requires_grad for p in made.autoencoder.parameters())
    made.autoencoder.double()
    generator = torch.Generator().manual_seed(1)
    latents = (0.3 * made.encode(pictures())).double().requires_grad_()
    direction = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 3, 16, 24, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((made.decode(latents) * weights).sum(), latents)
    step = 1e-3
    with torch.no_grad():
        ahead, behind = (made.decode(latents + sign * step * direction) for sign in (1, -1))
    slope = float(((ahead.double() - behind.double()) * weights).sum() / (2 * step))
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.02) and slope != 0
    assert not made.encode(pictures().requires_grad_()).requires_grad


def test_what_decodes_beyond_the_range_is_cut_by_qwen_image_only() -> None:
    latents = 1e3 * torch.ones(1, 4, 2, 2)
    assert float(codec("qwen-image").decode(latents).abs().max()) <= 1


@both_kinds
def test_other_types_compute_and_float32_comes_out(kind: str) -> None:
    exact = codec(kind)
    coarse = CODECS[kind](autoencoder(kind).to(torch.bfloat16))
    latents = coarse.encode(pictures())
    assert latents.dtype == coarse.decode(latents).dtype == torch.float32
    difference = latents - exact.encode(pictures())
    assert 0 < float(difference.std()) < 0.05 * float(exact.encode(pictures()).std() + 1)


@both_kinds
def test_sides_that_make_no_whole_latents_are_refused(kind: str) -> None:
    with pytest.raises(UsageError, match=r"24x12 has no whole latents.*multiples of 8"):
        codec(kind).encode(pictures(12, 24))
