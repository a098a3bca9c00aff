"""Z-Image (arXiv 2511.22699) with two branches: 6 billion frozen parameters.

diffusers' `ZImageTransformer2DModel` is a single-stream transformer: image tokens, refined by two
blocks of their own, and prompt tokens, refined by two others, are one sequence that shares all
weights. Its clock is 1 - t (1 is data) and its sign is data minus noise; both are turned here. Its
blocks can modulate two kinds of tokens differently (`noise_mask`, made for editing); here the
second kind is the condition branch.

Each part of the sequence is filled up to a multiple of 32 with a learned token, as in training; the
fill belongs to the branch that it completes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from teasr.backbones.branch_lora import BranchTokens
from teasr.backbones.latent import LatentBackbone, check_prompt
from teasr.errors import UsageError

LAYERS = (
    *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
"""Linear layers of a block, but for the modulation."""


class FillToken(nn.Module):
    """A learned token of the transformer, called as a module of its own: a parameter that sits on
    the transformer itself is gathered only while the transformer's own forward runs (ZeRO-3)."""

    def __init__(self, token: nn.Parameter) -> None:
        super().__init__()
        self.token = token

    def forward(self, tokens: Tensor, missing: Tensor) -> Tensor:
        """`tokens` (N, T, D) with the learned one where `missing` (T,)."""
        return torch.where(missing[:, None], self.token, tokens)


class ZImageBackbone(LatentBackbone):
    """F(x_t, t, r | y) by `ZImageTransformer2DModel`; latents (N, 16, h, w), h and w even."""

    kind = "z-image"
    adapted = (
        r"(noise_refiner|layers)\.\d+\."
        r"(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.(w1|w2|w3))"
    )

    def __init__(self, transformer: nn.Module, prompt: Tensor, **options: Any) -> None:
        super().__init__(transformer, prompt, **options)
        self.image_fill = FillToken(self.transformer.x_pad_token)
        self.prompt_fill = FillToken(self.transformer.cap_pad_token)

    @staticmethod
    def patch_of(transformer: Any) -> int:
        return int(transformer.config.all_patch_size[0])

    def _check(self, transformer: Any, prompt: Tensor) -> None:
        config = transformer.config
        if config.siglip_feat_dim is not None or config.all_f_patch_size[0] != 1:
            raise UsageError(
                "This Z-Image transformer is a variant (Omni or video) that teasr cannot run.",
                "Use Tongyi-MAI/Z-Image, Z-Image-Turbo or weights trained from them.",
            )
        check_prompt(prompt, config.cap_feat_dim)

    def _level_embedder(self) -> nn.Module:
        return self.transformer.t_embedder

    def _block_names(self) -> list[str]:
        return [
            f"transformer.{stage}.{i}"
            for stage in ("noise_refiner", "context_refiner", "layers")
            for i in range(len(getattr(self.transformer, stage)))
        ]

    def _adapted_names(self) -> list[str]:
        return [
            f"{stage}.{i}.{layer}"
            for stage in ("noise_refiner", "layers")
            for i in range(len(getattr(self.transformer, stage)))
            for layer in LAYERS
        ]

    def _velocity(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor | None) -> Tensor:
        network, patch = self.transformer, self.patch_of(self.transformer)
        key, count = f"{patch}-1", len(x_t)
        clock = network.t_scale
        level = network.t_embedder((1 - t.abs()) * clock).type_as(x_t)

        # The model's own division into patches and positions; equal for all samples of a batch.
        noise = network.patchify_and_embed(list(x_t.unsqueeze(2)), [self.prompt] * count, patch, 1)
        patches, prompts, sizes, places, prompt_places, fill, prompt_fill = noise
        embed = network.all_x_embedder[key]
        positions = network.rope_embedder(places[0]).expand(count, -1, -1)
        image = self.image_fill(embed(torch.stack(patches)), fill[0])
        length = image.shape[1]

        kinds, target, tokens = None, None, BranchTokens(length, 0)
        if condition is not None:
            latents = list(condition.unsqueeze(2))
            patches = network.patchify_and_embed(latents, [self.prompt] * count, patch, 1)[0]
            image = torch.cat([image, self.image_fill(embed(torch.stack(patches)), fill[0])], 1)
            positions = torch.cat([positions, positions], dim=1)
            target = self.target_embedder((1 - r) * clock).type_as(x_t)
            tokens = BranchTokens(length, length)
            kinds = torch.zeros(count, 2 * length, dtype=torch.long, device=x_t.device)
            kinds[:, :length] = 1
        for block in network.noise_refiner:
            image = self._run(
                block, tokens, None, image, None, positions, level, kinds, level, target
            )

        prompt = self.prompt_fill(network.cap_embedder(torch.stack(prompts)), prompt_fill[0])
        prompt_places = prompt_places[0][: prompt.shape[1]]  # of more than there are tokens
        prompt_positions = network.rope_embedder(prompt_places).expand(count, -1, -1)
        for block in network.context_refiner:
            prompt = self._run(block, BranchTokens(0, 0), None, prompt, None, prompt_positions)

        sequence = torch.cat([image, prompt], dim=1)
        positions = torch.cat([positions, prompt_positions], dim=1)
        if kinds is not None:  # prompt tokens go with the noise level
            kinds = torch.cat([kinds, kinds.new_ones(count, prompt.shape[1])], dim=1)
        for block in network.layers:
            sequence = self._run(
                block, tokens, None, sequence, None, positions, level, kinds, level, target
            )
        output = network.all_final_layer[key](sequence[:, :length], c=level)
        return -torch.stack(network.unpatchify(list(output), sizes, patch, 1)).squeeze(2)
