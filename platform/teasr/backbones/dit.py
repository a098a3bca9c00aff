"""The native dual-branch diffusion transformer: pixel space, trains from nothing on a CPU.

Two token streams on one grid (TEASR, arXiv 2606.16188; joint attention as in MM-DiT, arXiv
2403.03206): the **noise branch** holds patches of x_t and is modulated by an embedding of |t|,
where we are; the **condition branch** holds patches of the low-resolution picture and is
modulated by a second embedder of r, where we are going, whose sign tells real from twin
trajectory. Each branch has its own weights; they meet in attention.

A transformer of 16-pixel patches alone is slow to learn fine local structure, so convolutions at
the low-resolution grid stand beside the tokens: a stem before the condition branch and a head
after the noise branch. On a CPU this division is also the cheap one: four times fewer tokens than
8-pixel patches, and most of the time goes to matrix products. The head predicts the clean image
as a residual on the bicubic picture, and `velocity_from_image` converts it. Its last layer starts
at zero: an untrained network is bicubic.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as functional
from pydantic import Field, model_validator
from torch import Tensor, nn

from teasr.backbones.base import Backbone, velocity_from_image
from teasr.config import Settings


class DiTSettings(Settings):
    """Shape of a `DualBranchDiT`."""

    width: int = Field(256, ge=32)
    """Channels of a token."""
    depth: int = Field(6, ge=1)
    """Dual-branch blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads; `width / heads` must be a multiple of 4 (two axes of rotary pairs)."""
    mlp_ratio: float = Field(2.0, gt=0)
    """Hidden width of the feed-forward layers over `width`."""
    local_width: int = Field(64, ge=8)
    """Channels of the convolutional features at the low-resolution grid."""
    local_depth: int = Field(4, ge=0)
    """Residual convolution blocks in the stem, and again in the head."""
    patch: int = Field(4, ge=1)
    """Low-resolution pixels along a side of a token (times `scale` in the restored picture)."""
    scale: int = Field(4, ge=1)
    """Magnification."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DiTSettings:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError("width / heads must be a whole multiple of 4")
        return self


PRESETS = {
    "teasr-xs": DiTSettings(width=48, depth=2, heads=3, local_width=16, local_depth=1),
    "teasr-s": DiTSettings(),
    "teasr-b": DiTSettings(width=640, depth=10, heads=10, mlp_ratio=4.0, local_width=128),
}


class TimestepEmbedding(nn.Module):
    """(N,) times in [-1, 1] -> (N, width): sinusoids in float32, then two layers.

    Sine is odd, so the sign of a time is part of its embedding.
    """

    def __init__(self, width: int, frequencies: int = 64) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.layers = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, time: Tensor) -> Tensor:
        exponents = torch.arange(self.frequencies, device=time.device) / self.frequencies
        angles = time.float()[:, None] * (1000.0 * torch.exp(-math.log(1e4) * exponents))
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.layers(embedding.to(next(self.parameters()).dtype))


class Branch(nn.Module):
    """One stream's own weights within a block.

    Args:
        updates: False for a stream that nothing reads after this block: it gives keys and values
            and is left as it is.
    """

    def __init__(self, width: int, hidden: int, head_width: int, updates: bool) -> None:
        super().__init__()
        self.updates = updates
        self.key_norm = nn.RMSNorm(head_width)
        if not updates:
            self.modulation = nn.Parameter(torch.zeros(2, width))
            self.qkv = nn.Linear(width, 2 * width)
            return
        offsets = torch.zeros(6, width)
        offsets[[2, 5]] = 0.2  # the gates: a small, live residual
        self.modulation = nn.Parameter(offsets)
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.RMSNorm(head_width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )


class DualBranchBlock(nn.Module):
    """Joint attention over both streams, then a feed-forward layer in each.

    Modulation is one vector per branch and sample, not per token: a shared projection of the
    branch's timestep embedding plus this block's own offset (PixArt-alpha, arXiv 2310.00426,
    section 2.3).
    """

    def __init__(self, settings: DiTSettings, last: bool) -> None:
        super().__init__()
        self.heads = settings.heads
        self.width = settings.width
        hidden = int(settings.width * settings.mlp_ratio)
        head_width = settings.width // settings.heads
        self.noise = Branch(settings.width, hidden, head_width, updates=True)
        # The output is read from the noise branch: the last block leaves the condition as it is.
        self.condition = Branch(settings.width, hidden, head_width, updates=not last)

    def forward(
        self, streams: tuple[Tensor, Tensor], modulations: tuple[Tensor, Tensor], rotary: Tensor
    ) -> tuple[Tensor, Tensor]:
        branches = (self.noise, self.condition)
        parts = [
            (shared[:, : len(branch.modulation)] + branch.modulation).unsqueeze(2).unbind(1)
            for branch, shared in zip(branches, modulations)
        ]
        queries, keys, values = [], [], []
        for branch, stream, (shift, scale, *_) in zip(branches, streams, parts):
            projected = branch.qkv(self._modulate(stream, shift, scale))
            head_width = self.width // self.heads
            *query, key, value = projected.unflatten(2, (-1, self.heads, head_width)).unbind(2)
            if branch.updates:
                queries.append(rotate(branch.query_norm(query[0]), rotary))
            keys.append(rotate(branch.key_norm(key), rotary))
            values.append(value)
        query, key, value = (
            torch.cat(both, dim=1).transpose(1, 2) for both in (queries, keys, values)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        mixed = attended.transpose(1, 2).flatten(2).chunk(len(queries), dim=1)
        noise = self._update(self.noise, streams[0], mixed[0], parts[0])
        if not self.condition.updates:
            return noise, streams[1]
        return noise, self._update(self.condition, streams[1], mixed[1], parts[1])

    def _update(
        self, branch: Branch, stream: Tensor, mixed: Tensor, part: tuple[Tensor, ...]
    ) -> Tensor:
        _, _, gate, shift, scale, mlp_gate = part
        stream = torch.addcmul(stream, gate, branch.project(mixed))
        return torch.addcmul(stream, mlp_gate, branch.mlp(self._modulate(stream, shift, scale)))

    def _modulate(self, stream: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, functional.layer_norm(stream, (self.width,)), 1 + scale)


def rotate(features: Tensor, rotary: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of (N, tokens, heads, head width).

    Args:
        rotary: (2, tokens, 1, head width / 2), cosines and sines of each token's angles.
    """
    first, second = features.chunk(2, dim=-1)
    cosine, sine = rotary
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


@lru_cache(maxsize=32)
def rotary_table(
    rows: int, columns: int, head_width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(2, rows * columns, 1, head_width / 2): half of the angles turn by row, half by column."""
    quarter = head_width // 4
    frequencies = 100.0 ** -(torch.arange(quarter, device=device) / quarter)
    down = torch.arange(rows, device=device)[:, None] * frequencies
    across = torch.arange(columns, device=device)[:, None] * frequencies
    angles = torch.cat(
        [
            down[:, None].expand(rows, columns, quarter),
            across[None].expand(rows, columns, quarter),
        ],
        dim=-1,
    ).reshape(rows * columns, 1, 2 * quarter)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


class LocalBlock(nn.Module):
    """x + conv(gelu(conv(x))) at the low-resolution grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(functional.gelu(self.first(features), approximate="tanh"))


class DualBranchDiT(Backbone):
    """F(x_t, t, r | y) in pixel space (see the module's text).

    `condition` is the low-resolution picture (N, 3, h, w) in [-1, 1], its sides multiples of
    `settings.patch`; x_t is (N, 3, scale * h, scale * w).
    """

    def __init__(self, settings: DiTSettings) -> None:
        super().__init__()
        self.settings = settings
        self.scale = settings.scale
        self.multiple = settings.patch
        width, local, patch = settings.width, settings.local_width, settings.patch
        fine = 3 * settings.scale**2  # channels of x_t folded to the low-resolution grid

        self.stem = nn.Sequential(
            nn.Conv2d(3, local, 3, padding=1),
            *(LocalBlock(local) for _ in range(settings.local_depth)),
        )
        self.condition_tokens = nn.Linear(local * patch**2, width)
        self.noise_tokens = nn.Linear(fine * patch**2, width)
        self.level_embedding = TimestepEmbedding(width)
        self.target_embedding = TimestepEmbedding(width)
        self.level_modulation = nn.Linear(width, 6 * width)
        self.target_modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            DualBranchBlock(settings, last=i == settings.depth - 1) for i in range(settings.depth)
        )
        self.output_tokens = nn.Linear(width, local * patch**2)
        self.fine_features = nn.Conv2d(fine, local, 1)
        self.fine_gain = nn.Linear(width, local)
        self.head = nn.Sequential(
            *(LocalBlock(local) for _ in range(settings.local_depth)),
            nn.Conv2d(local, fine, 3, padding=1),
        )
        self._initialise()

    def _initialise(self) -> None:
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for modulation in (self.level_modulation, self.target_modulation):
            nn.init.normal_(modulation.weight, std=0.02)
        last = cast(nn.Conv2d, self.head[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        settings, dtype = self.settings, self.dtype
        bicubic = upsample(condition.float(), settings.scale)
        rows, columns = (side // settings.patch for side in condition.shape[-2:])

        local = self.stem(condition.to(dtype, memory_format=torch.channels_last))
        fine = functional.pixel_unshuffle(x_t.to(dtype), settings.scale)
        streams = (
            self.noise_tokens(_to_tokens(fine, settings.patch)),
            self.condition_tokens(_to_tokens(local, settings.patch)),
        )
        level = functional.silu(self.level_embedding(t.abs()))
        target = functional.silu(self.target_embedding(r))
        modulations = (
            self.level_modulation(level).unflatten(1, (6, -1)),
            self.target_modulation(target).unflatten(1, (6, -1)),
        )
        rotary = rotary_table(rows, columns, settings.width // settings.heads, x_t.device, dtype)
        for block in self.blocks:
            streams = block(streams, modulations, rotary)

        features = functional.layer_norm(streams[0], (settings.width,))
        features = _from_tokens(self.output_tokens(features), rows, columns, settings.patch)
        gain = self.fine_gain(level)[:, :, None, None]
        features = features + local + gain * self.fine_features(fine)
        features = features.contiguous(memory_format=torch.channels_last)
        residual = functional.pixel_shuffle(self.head(features), settings.scale)
        return velocity_from_image(x_t.float(), bicubic + residual.float(), t)


def upsample(picture: Tensor, scale: int) -> Tensor:
    """Bicubic (a = -0.5, as Pillow and MATLAB) magnification of (N, C, h, w)."""
    size = [side * scale for side in picture.shape[-2:]]
    return functional.interpolate(
        picture, size=size, mode="bicubic", align_corners=False, antialias=True
    )


def _to_tokens(features: Tensor, patch: int) -> Tensor:
    """(N, C, h, w) -> (N, h w / patch^2, C patch^2)."""
    return functional.pixel_unshuffle(features, patch).flatten(2).transpose(1, 2)


def _from_tokens(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of `_to_tokens`."""
    folded = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return functional.pixel_shuffle(folded, patch)
