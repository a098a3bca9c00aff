"""Between pictures and what a backbone works on: pixels, or latents of a pretrained autoencoder.

The autoencoder is frozen, in evaluation mode, and not a part of the backbone: an engine that
partitions the backbone's weights must leave it alone. Encoding takes the mode of the posterior, not
a sample: one picture, one latent.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor

from teasr.backbones.dit import upsample
from teasr.errors import UsageError


class Codec(Protocol):
    """Pictures to what a backbone works on, and back.

    Attributes:
        scale: magnification from the low-resolution picture to the restored one.
        factor: pixels along a side of a latent; sides of pictures are multiples of it.
        channels: of a latent.
    """

    scale: int
    factor: int
    channels: int

    def encode(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, channels, H / factor, W / factor) float32, about unit
        variance; without gradient."""
        ...

    def condition(self, lr: Tensor) -> Tensor:
        """(N, 3, h, w) low-resolution pictures in [-1, 1] -> what the backbone's `forward` takes;
        without gradient."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, float32; differentiable with respect to `latents`."""
        ...


class Pixels:
    """The codec of backbones that work on pixels: everything stays as it is."""

    factor = 1
    channels = 3

    def __init__(self, scale: int = 4) -> None:
        self.scale = scale

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def condition(self, lr: Tensor) -> Tensor:
        return lr

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class AutoencoderCodec:
    """What the codecs of pretrained autoencoders share; latents are (z - mean) / std.

    Args:
        autoencoder: of diffusers; frozen here.
        scale: magnification from the low-resolution picture to the restored one.
    """

    factor: int
    channels: int
    mean: Tensor
    """Broadcasts over (N, channels, h, w), float32."""
    std: Tensor

    def __init__(self, autoencoder: Any, scale: int = 4) -> None:
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.scale = scale

    def to(self, device: torch.device | str) -> Self:
        """Move the autoencoder; returns self."""
        self.autoencoder.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        if any(side % self.factor for side in pictures.shape[-2:]):
            raise UsageError(
                f"A picture of {pictures.shape[-1]}x{pictures.shape[-2]} has no whole latents.",
                f"Its sides must be multiples of {self.factor}.",
            )
        return (self._encode(pictures.to(self.autoencoder.dtype)).float() - self.mean) / self.std

    @torch.no_grad()
    def condition(self, lr: Tensor) -> Tensor:
        return self.encode(upsample(lr.float(), self.scale).clamp(-1, 1))

    def decode(self, latents: Tensor) -> Tensor:
        return self._decode((latents * self.std + self.mean).to(self.autoencoder.dtype)).float()

    def _encode(self, pictures: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class QwenImageCodec(AutoencoderCodec):
    """`AutoencoderKLQwenImage`: made for video, a picture is its first frame; mean and standard
    deviation of each channel. Decoded pictures are cut to [-1, 1] by the autoencoder itself, so
    that pixels beyond have no gradient."""

    def __init__(self, autoencoder: Any, scale: int = 4) -> None:
        super().__init__(autoencoder, scale)
        config = autoencoder.config
        self.factor = 2 ** len(config.temperal_downsample)
        self.channels = config.z_dim
        device = autoencoder.device
        self.mean = torch.tensor(config.latents_mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(config.latents_std, device=device).view(1, -1, 1, 1)

    def _encode(self, pictures: Tensor) -> Tensor:
        return self.autoencoder.encode(pictures.unsqueeze(2)).latent_dist.mode().squeeze(2)

    def _decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z.unsqueeze(2)).sample.squeeze(2)


class KLCodec(AutoencoderCodec):
    """`AutoencoderKL`, as Z-Image uses it: one shift and one factor for all channels."""

    def __init__(self, autoencoder: Any, scale: int = 4) -> None:
        super().__init__(autoencoder, scale)
        config = autoencoder.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = config.latent_channels
        self.mean = torch.tensor(float(config.shift_factor or 0.0), device=autoencoder.device)
        self.std = torch.tensor(1.0 / config.scaling_factor, device=autoencoder.device)

    def _encode(self, pictures: Tensor) -> Tensor:
        return self.autoencoder.encode(pictures).latent_dist.mode()

    def _decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z).sample
