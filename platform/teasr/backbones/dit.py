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

Attention stays within square windows of the extent that training crops have. Every second block
shifts them by half a window (Swin, arXiv 2103.14030), and positions are rotary, hence relative: a
picture of any size is made of what was trained, at a cost that grows with its area. A grid that
fits into a window is attended to as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import torch
import torch.nn.functional as functional
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    stem_depth: int = Field(8, ge=0)
    """Residual convolution blocks before the condition branch."""
    head_depth: int = Field(12, ge=0)
    """Residual convolution blocks after the noise branch."""
    patch: int = Field(4, ge=1)
    """Low-resolution pixels along a side of a token (times `scale` in the restored picture)."""
    window: int = Field(8, ge=2, multiple_of=2)
    """Tokens along a side of an attention window: `patch * window` low-resolution pixels, best the
    side of a training crop."""
    scale: int = Field(4, ge=1)
    """Magnification."""
    timesteps: Literal["decoupled", "summed"] = "decoupled"
    """`decoupled`: an embedding of the level for the noise branch, one of the target for the
    condition branch. `summed`, for comparison: their sum for both."""
    branches: Literal["dual", "single"] = "dual"
    """`dual`: two streams that meet in attention. `single`, for comparison: their tokens are added
    at the input, and so are their modulations; half the blocks' weights."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DiTSettings:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError("width / heads must be a whole multiple of 4")
        return self


PRESETS = {
    "teasr-xs": DiTSettings(width=48, depth=2, heads=3, local_width=16, stem_depth=1, head_depth=1),
    "teasr-s": DiTSettings(),
    "teasr-b": DiTSettings(
        width=640,
        depth=10,
        heads=10,
        mlp_ratio=3.0,
        local_width=128,
        stem_depth=16,
        head_depth=24,
    ),
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
    """Joint attention over both streams (or over a single one), then a feed-forward layer in each.

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
        if settings.branches == "dual":
            # The output is read from the noise branch: the last block leaves the condition alone.
            self.condition = Branch(settings.width, hidden, head_width, updates=not last)

    def forward(
        self,
        streams: tuple[Tensor, ...],
        modulations: tuple[Tensor, ...],
        rotary: Tensor,
        windows: Windows,
    ) -> tuple[Tensor, ...]:
        branches = (self.noise,) if len(streams) == 1 else (self.noise, self.condition)
        parts = [
            (shared[:, : len(branch.modulation)] + branch.modulation).unsqueeze(2).unbind(1)
            for branch, shared in zip(branches, modulations)
        ]
        queries, keys, values = [], [], []
        for branch, stream, (shift, scale, *_) in zip(branches, streams, parts):
            projected = windows.split(branch.qkv(self._modulate(stream, shift, scale)))
            head_width = self.width // self.heads
            *query, key, value = projected.unflatten(2, (-1, self.heads, head_width)).unbind(2)
            if branch.updates:
                queries.append(rotate(branch.query_norm(query[0]), rotary))
            keys.append(rotate(branch.key_norm(key), rotary))
            values.append(value)
        query, key, value = (
            torch.cat(both, dim=1).transpose(1, 2) for both in (queries, keys, values)
        )
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=windows.mask(len(queries), len(keys), query)
        )
        mixed = [
            windows.join(part)
            for part in attended.transpose(1, 2).flatten(2).chunk(len(queries), dim=1)
        ]
        updated = map(self._update, branches, streams, mixed, parts)
        # What is left over is a stream that nothing reads any more.
        return (*updated, *streams[len(mixed) :])

    def _update(
        self, branch: Branch, stream: Tensor, mixed: Tensor, part: tuple[Tensor, ...]
    ) -> Tensor:
        _, _, gate, shift, scale, mlp_gate = part
        stream = torch.addcmul(stream, gate, branch.project(mixed))
        return torch.addcmul(stream, mlp_gate, branch.mlp(self._modulate(stream, shift, scale)))

    def _modulate(self, stream: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, functional.layer_norm(stream, (self.width,)), 1 + scale)


@dataclass(frozen=True)
class Windows:
    """The division of a grid of tokens into attention windows.

    Attributes:
        rows, columns: of the grid; each a multiple of the window's side `height` or `width`.
        shift: tokens by which the windows are moved down and right, along each axis that has more
            than one window. What such windows cut off at one edge shares a window with what they
            cut off at the other; the mask keeps them apart.
    """

    rows: int
    columns: int
    height: int
    width: int
    shift: int

    @property
    def _shifts(self) -> tuple[int, int]:
        return (
            self.shift if self.rows > self.height else 0,
            self.shift if self.columns > self.width else 0,
        )

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return self.rows // self.height, self.height, self.columns // self.width, self.width

    @property
    def count(self) -> int:
        """Windows in the grid."""
        return (self.rows // self.height) * (self.columns // self.width)

    def split(self, tokens: Tensor) -> Tensor:
        """(N, rows columns, C) -> (N count, height width, C)."""
        if self.count == 1:
            return tokens
        down, across = self._shifts
        grid = tokens.unflatten(1, (self.rows, self.columns))
        if down or across:
            grid = grid.roll((-down, -across), (1, 2))
        parts = grid.unflatten(2, self._shape[2:]).unflatten(1, self._shape[:2])
        return parts.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.count == 1:
            return parts
        down, across = self._shifts
        high, height, wide, width = self._shape
        grid = parts.unflatten(1, (height, width)).unflatten(0, (-1, high, wide))
        grid = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if down or across:
            grid = grid.roll((down, across), (1, 2))
        return grid.flatten(1, 2)

    def mask(self, asking: int, streams: int, like: Tensor) -> Tensor | None:
        """What attention adds to its scores, or None where every token may see every other.

        Args:
            asking: how many of the `streams` ask.
            like: (N count, ...), the queries: gives number, type and device.

        Returns:
            (N count, 1, asking height width, streams height width), 0 or -inf.
        """
        if self.count == 1 or not any(self._shifts):
            return None
        mask = _window_mask(self, asking, streams, like.device, like.dtype)
        return mask.repeat(len(like) // self.count, 1, 1, 1)


@lru_cache(maxsize=32)
def _window_mask(
    windows: Windows, asking: int, streams: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(count, 1, asking height width, streams height width): tokens of one side of the picture's
    edge see each other."""
    down, across = windows._shifts
    below = (torch.arange(windows.rows, device=device) < down)[:, None]
    right = (torch.arange(windows.columns, device=device) < across)[None]
    side = (2 * below + right).reshape(1, -1, 1)  # split() rolls, so these are what wraps around
    side = windows.split(side).squeeze(2)
    apart = side[:, :, None] != side[:, None, :]
    mask = torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill_(apart, -math.inf)
    return mask.repeat(1, asking, streams)[:, None]


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
    """x + conv(gelu(conv(x))) at the low-resolution grid.

    Attributes:
        fused: without gradient, have oneDNN apply the activation and the sum within the
            convolutions: a fifth less time on a CPU, equal up to rounding.
    """

    fused = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        if self.fused and not torch.is_grad_enabled():
            return self._fused(features)
        return features + self.second(functional.gelu(self.first(features), approximate="tanh"))

    def _fused(self, features: Tensor) -> Tensor:
        # The operators that torch's compiler puts in the place of these.
        convolve = torch.ops.mkldnn._convolution_pointwise
        shape = ([1, 1], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
        first, second = self.first, self.second
        hidden = convolve(features, first.weight, first.bias, *shape, "gelu", [], "tanh")
        result: Tensor = convolve.binary(
            hidden, features, second.weight, second.bias, *shape, "add", 1.0, None, [], None
        )
        return result


class Magnifier(nn.Conv2d):
    """(N, width, h, w) features -> (N, 3, scale h, scale w) residual, by a convolution whose
    channels are the pixels of a cell.

    Where features are even, all pixels of a cell get the same value, by construction: else a
    perceptual loss is first lowered by drawing a grid. (Aitken et al. 2017, arXiv 1707.02937,
    initialise so; here it holds throughout.)
    """

    def __init__(self, width: int, scale: int) -> None:
        super().__init__(width, 3 * scale**2, 3, padding=1)
        self.magnification = scale

    def forward(self, features: Tensor) -> Tensor:
        cells = (3, self.magnification**2)
        assert self.bias is not None
        weight, bias = self.weight.unflatten(0, cells), self.bias.unflatten(0, cells)
        even = weight.sum((3, 4), keepdim=True)  # the response to features that do not vary
        weight = weight - (even - even.mean(1, keepdim=True)) / 9
        bias = bias.mean(1, keepdim=True).expand(cells)
        pixels = functional.conv2d(features, weight.flatten(0, 1), bias.flatten(), padding=1)
        return functional.pixel_shuffle(pixels, self.magnification)


@dataclass(frozen=True)
class Prepared:
    """What a `DualBranchDiT` makes of low-resolution pictures, whatever the noise and its level.

    Attributes:
        bicubic: (N, 3, scale h, scale w) float32, the magnified pictures.
        features: (N, local width, h', w') of the stem, extended to whole windows.
    """

    bicubic: Tensor
    features: Tensor


class DualBranchDiT(Backbone):
    """F(x_t, t, r | y) in pixel space (see the module's text).

    `condition` is the low-resolution picture (N, 3, h, w) in [-1, 1], its sides multiples of
    `settings.patch`, or what `prepare` made of it; x_t is (N, 3, scale * h, scale * w).

    Attributes:
        gradient_checkpointing: compute a block's activations again in backward, not keep them.
    """

    gradient_checkpointing = False

    def __init__(self, settings: DiTSettings) -> None:
        super().__init__()
        self.settings = settings
        self.scale = settings.scale
        self.multiple = settings.patch
        self.period = settings.patch * settings.window
        width, local, patch = settings.width, settings.local_width, settings.patch
        fine = 3 * settings.scale**2  # channels of x_t folded to the low-resolution grid

        self.stem = nn.Sequential(
            nn.Conv2d(3, local, 3, padding=1),
            *(LocalBlock(local) for _ in range(settings.stem_depth)),
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
        self.output_tokens = nn.Linear(width, local)
        self.fine_features = nn.Conv2d(fine, local, 1)
        self.fine_gain = nn.Linear(width, local)
        self.head = nn.Sequential(
            *(LocalBlock(local) for _ in range(settings.head_depth)),
            Magnifier(local, settings.scale),
        )
        self._initialise()

    def _initialise(self) -> None:
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for modulation in (self.level_modulation, self.target_modulation):
            nn.init.normal_(modulation.weight, std=0.02)
        last = cast(Magnifier, self.head[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))

    def fuse(self) -> None:
        if self.dtype == torch.float32 and next(self.parameters()).device.type == "cpu":
            for block in (module for module in self.modules() if isinstance(module, LocalBlock)):
                block.fused = hasattr(torch.ops.mkldnn, "_convolution_pointwise")

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor | Prepared) -> Tensor:
        prepared = condition if isinstance(condition, Prepared) else self.prepare(condition)
        noisy = self._whole_windows(x_t, self.scale).to(self.dtype)
        residual = self._residual(noisy, t, r, prepared.features)
        residual = residual[..., : x_t.shape[-2], : x_t.shape[-1]]
        return velocity_from_image(x_t.float(), prepared.bicubic + residual.float(), t)

    def prepare(self, condition: Tensor) -> Prepared:
        padded = self._whole_windows(condition, 1).to(self.dtype)
        features = self.stem(padded.contiguous(memory_format=torch.channels_last))
        return Prepared(upsample(condition.float(), self.scale), features)

    def _whole_windows(self, image: Tensor, scale: int) -> Tensor:
        """Repeat the last row and column until the grid is whole windows, or fits into one."""
        low = [side // scale for side in image.shape[-2:]]
        bottom, right = (-side % self.period if side > self.period else 0 for side in low)
        if not bottom and not right:
            return image
        return functional.pad(image, (0, right * scale, 0, bottom * scale), mode="replicate")

    def _residual(self, x_t: Tensor, t: Tensor, r: Tensor, local: Tensor) -> Tensor:
        """(N, 3, scale h, scale w): the clean image less the bicubic picture."""
        settings = self.settings
        rows, columns = (side // settings.patch for side in local.shape[-2:])

        fine = functional.pixel_unshuffle(x_t, settings.scale)
        streams: tuple[Tensor, ...] = (
            self.noise_tokens(_to_tokens(fine, settings.patch)),
            self.condition_tokens(_to_tokens(local, settings.patch)),
        )
        level, target = self.level_embedding(t.abs()), self.target_embedding(r)
        if settings.timesteps == "summed":
            level = target = level + target
        level, target = functional.silu(level), functional.silu(target)
        modulations: tuple[Tensor, ...] = (
            self.level_modulation(level).unflatten(1, (6, -1)),
            self.target_modulation(target).unflatten(1, (6, -1)),
        )
        if settings.branches == "single":
            streams, modulations = (streams[0] + streams[1],), (modulations[0] + modulations[1],)
        high, wide = min(rows, settings.window), min(columns, settings.window)
        head_width = settings.width // settings.heads
        rotary = rotary_table(high, wide, head_width, x_t.device, x_t.dtype)
        for i, block in enumerate(self.blocks):
            shift = settings.window // 2 * (i % 2)
            windows = Windows(rows, columns, high, wide, shift)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                streams = checkpoint(
                    block, streams, modulations, rotary, windows, use_reentrant=False
                )
            else:
                streams = block(streams, modulations, rotary, windows)

        features = functional.layer_norm(streams[0], (settings.width,))
        features = _from_tokens(self.output_tokens(features), rows, columns, settings.patch)
        gain = self.fine_gain(level)[:, :, None, None]
        features = features + local + gain * self.fine_features(fine)
        features = features.contiguous(memory_format=torch.channels_last)
        return cast(Tensor, self.head(features))


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
    """(N, rows columns, C) -> (N, C, patch rows, patch columns), bilinear between tokens.

    Tokens say what kind of place this is, convolutions draw it. Were each token to draw its own
    patch, a perceptual loss would first have it draw the patches' grid.
    """
    grid = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return functional.interpolate(grid, scale_factor=patch, mode="bilinear", align_corners=False)
