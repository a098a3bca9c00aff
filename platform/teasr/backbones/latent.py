"""Dual branches on a frozen pretrained transformer, in the latent space of its autoencoder.

Noise tokens (of x_t) and condition tokens (of the low-resolution picture's latents) go through the
pretrained image stream side by side, with shared positions, and meet in its attention. Noise tokens
are modulated by the pretrained embedding of |t|, where we are; condition tokens by that of a second
embedder, a trainable copy of the first, of the target r, whose sign tells real from twin
trajectory. The output is read from the noise tokens.

What is trained: a LoRA pair per branch (`branch_lora`) and the second embedder. The prompt is
empty, its embedding a constant; prompt tokens go with the noise tokens' level and no adapter.

As in the native backbone, r goes into its embedder as it is, continuous through zero: the twin
trajectory continues the real one at negative times, and zero belongs to the real one. Where a
network's own clock runs backwards (1 - t), so does r's: 1 - r, from 0 to 1 for the real trajectory
and on to 2 for the twin one, so that no two targets share an embedding at either end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teasr.backbones.base import Backbone
from teasr.backbones.branch_lora import BaseReference, BranchTokens, add_branches, branch_tokens
from teasr.errors import UsageError


class LatentBackbone(Backbone):
    """F(x_t, t, r | y) by a pretrained transformer with two branches (see the module's text).

    x_t and condition are latents (N, C, h, w) of one grid, h and w multiples of `patch`. Without a
    condition (None) the noise branch is alone: with untrained adapters that is the pretrained
    network, in this project's convention of time and sign.

    Args:
        transformer: a plain diffusers model; its layers are frozen and wrapped here, in place.
        prompt: (T, D) embedding of the empty prompt.
        rank, alpha: of the adapters; alpha None: equal to the rank.
        scale: magnification from the low-resolution picture to the restored one.
        factor: pixels along a side of a latent.
        base: where the transformer's weights come from.

    Attributes:
        blocks: names of the submodules that hold nearly all weights, in the order in which a
            forward calls them, each once. What is outside of them is small and needed throughout.
        adapted: regular expression of the names of the layers with adapters, in the transformer.
        gradient_checkpointing: whether the backward pass repeats each block's forward pass instead
            of keeping its activations.
    """

    kind: ClassVar[str]
    adapted: ClassVar[str]
    prompt: Tensor
    tile = 128  # of 512 pixels restored, the crops that such a network is trained on
    overlap = 32  # every token sees the whole tile, so neighbours differ by more than at an edge
    warp = (1.0, 1.0)  # pretraining taught it to draw detail at low levels too

    def __init__(
        self,
        transformer: nn.Module,
        prompt: Tensor,
        *,
        rank: int = 128,
        alpha: float | None = None,
        scale: int = 4,
        factor: int = 8,
        base: BaseReference | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise UsageError(f"rank is {rank}; 1 or more is expected.")
        self._check(transformer, prompt)
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.scale = scale
        self.factor = factor
        self.multiple = self.period = max(1, factor * self.patch_of(transformer) // scale)
        self.base = base
        self.gradient_checkpointing = False

        self.transformer: Any = transformer.requires_grad_(False).eval()
        embedder = copy.deepcopy(self._level_embedder())
        self.target_embedder: Any = embedder.requires_grad_(True)
        # Where the second embedder is, not where the base is: that may be on the meta device still.
        device = next(self.target_embedder.parameters()).device
        names = self._adapted_names()
        add_branches(self.transformer, names, rank, self.alpha, self.dtype, device)
        self.register_buffer("prompt", prompt.detach().to(self.dtype), persistent=False)
        self.blocks: list[str] = self._block_names()

    # ------------------------------------------------------------- what a kind says about itself

    @staticmethod
    def patch_of(transformer: Any) -> int:
        """Latents along a side of a token."""
        raise NotImplementedError

    def _check(self, transformer: Any, prompt: Tensor) -> None:
        """Refuse variants whose forward pass is another, and prompts of another width."""
        raise NotImplementedError

    def _level_embedder(self) -> nn.Module:
        raise NotImplementedError

    def _adapted_names(self) -> list[str]:
        """Linear layers of the image stream, by name in the transformer."""
        raise NotImplementedError

    def _block_names(self) -> list[str]:
        raise NotImplementedError

    def _velocity(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor | None) -> Tensor:
        """F in the compute type; x_t and condition in it already, t and r in float32."""
        raise NotImplementedError

    # ------------------------------------------------------------- what all kinds share

    @property
    def dtype(self) -> torch.dtype:
        """Compute type: that of the trained weights (frozen ones may be stored in 8 bits)."""
        return next(self.target_embedder.parameters()).dtype

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: the adapters and the second embedder."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @staticmethod
    def stored_name(name: str) -> str:
        """What the frozen parameter `name` of this backbone is called in the pretrained files."""
        return name.removeprefix("transformer.").replace(".base.", ".")

    def train(self, mode: bool = True) -> LatentBackbone:
        """The frozen transformer stays in evaluation mode; nothing in it depends on `mode`."""
        super().train(mode)
        self.transformer.eval()
        return self

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor | None) -> Tensor:
        patch = self.patch_of(self.transformer)
        if any(side % patch for side in x_t.shape[-2:]):
            raise UsageError(
                f"Latents of {x_t.shape[-2]}x{x_t.shape[-1]} do not divide into patches of {patch}."
            )
        if condition is not None and condition.shape != x_t.shape:
            raise UsageError(
                f"The condition is {tuple(condition.shape)}, x_t is {tuple(x_t.shape)}.",
                "Both are latents of pictures of one size (Codec.condition upsamples first).",
            )
        dtype = self.dtype
        latents = None if condition is None else condition.to(dtype)
        return self._velocity(x_t.to(dtype), t.float(), r.float(), latents).float()

    def _run(
        self,
        block: Callable[..., Any],
        tokens: BranchTokens,
        prepare: Callable[[], None] | None,
        *inputs: Any,
    ) -> Any:
        """`block(*inputs)` with its sequence divided by `tokens`; `prepare` is called before it,
        again when a checkpoint repeats it."""

        def run(*inputs: Any) -> Any:
            if prepare is not None:
                prepare()
            with branch_tokens(tokens):
                return block(*inputs)

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
        return run(*inputs)


def check_prompt(prompt: Tensor, width: int) -> None:
    """Refuse a prompt embedding that is not (tokens, `width`)."""
    if prompt.ndim != 2 or prompt.shape[1] != width:
        raise UsageError(
            f"The prompt's embedding is {tuple(prompt.shape)}; (tokens, {width}) is expected.",
            "It was made by another text encoder; remove the stored file to have it made again.",
        )


def to_tokens(latents: Tensor, patch: int) -> Tensor:
    """(N, C, h, w) -> (N, h w / patch^2, C patch^2), channels before the pixels of a patch."""
    return functional.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of `to_tokens`; `rows` and `columns` of tokens."""
    grid = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return functional.pixel_shuffle(grid, patch)
