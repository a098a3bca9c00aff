"""Qwen-Image (arXiv 2508.02324) with two branches: 20 billion frozen parameters.

diffusers' `QwenImageTransformer2DModel` is a two-stream transformer: image tokens and prompt tokens
have their own weights and meet in attention. Its clock is ours (time t in [0, 1], 1 is noise) and
so is its sign: it predicts noise minus data. Its blocks can modulate two kinds of image tokens
differently (`zero_cond_t`, made for editing); here the second kind is the condition branch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teasr.backbones.branch_lora import BranchTokens
from teasr.backbones.latent import LatentBackbone, check_prompt, from_tokens, to_tokens
from teasr.errors import UsageError

LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("img_mlp.net.0.proj", "img_mlp.net.2"),
)
"""Linear layers of a block's image stream, but for the modulation."""


class QwenImageBackbone(LatentBackbone):
    """F(x_t, t, r | y) by `QwenImageTransformer2DModel`; latents (N, 16, h, w), h and w even."""

    kind = "qwen-image"
    adapted = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|img_mlp\.net\.(0\.proj|2))"
    )

    @staticmethod
    def patch_of(transformer: Any) -> int:
        return int(transformer.config.patch_size)

    def _check(self, transformer: Any, prompt: Tensor) -> None:
        config = transformer.config
        for name in ("use_additional_t_cond", "use_layer3d_rope", "guidance_embeds"):
            if config.get(name):
                raise UsageError(
                    f"This Qwen-Image transformer is a variant ({name}) that teasr cannot run.",
                    "Use Qwen/Qwen-Image or weights trained from it.",
                )
        check_prompt(prompt, config.joint_attention_dim)

    def _level_embedder(self) -> nn.Module:
        return self.transformer.time_text_embed

    def _block_names(self) -> list[str]:
        return [
            f"transformer.transformer_blocks.{i}"
            for i in range(len(self.transformer.transformer_blocks))
        ]

    def _adapted_names(self) -> list[str]:
        return [
            f"transformer_blocks.{i}.{layer}"
            for i in range(len(self.transformer.transformer_blocks))
            for layer in LAYERS
        ]

    def _velocity(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor | None) -> Tensor:
        network, patch = self.transformer, self.patch_of(self.transformer)
        count = len(x_t)
        rows, columns = (side // patch for side in x_t.shape[-2:])

        image = network.img_in(to_tokens(x_t, patch))
        length = image.shape[1]
        level = network.time_text_embed(t.abs(), image)
        prompt = network.txt_in(network.txt_norm(self.prompt.expand(count, -1, -1)))
        positions, prompt_positions = network.pos_embed(
            [(1, rows, columns)], max_txt_seq_len=prompt.shape[1], device=image.device
        )

        modulation, kinds = level, None
        tokens = BranchTokens(length, 0)
        if condition is not None:
            image = torch.cat([image, network.img_in(to_tokens(condition, patch))], dim=1)
            positions = torch.cat([positions, positions])
            modulation = torch.cat([level, self.target_embedder(r, image)])
            kinds = torch.arange(2, device=image.device).repeat_interleave(length)
            kinds = kinds.expand(count, -1)
            tokens = BranchTokens(length, length)

        for block in network.transformer_blocks:
            prompt, image = self._run(
                block,
                tokens,
                partial(_two_kinds, block, condition is not None),
                *(image, prompt, None, modulation, (positions, prompt_positions), None, kinds),
            )
        noise = network.norm_out(image[:, :length], level)
        return from_tokens(network.proj_out(noise), rows, columns, patch)


def _two_kinds(block: Any, two: bool) -> None:
    """Whether `block` takes a second half of its modulation for the tokens of the second kind."""
    block.zero_cond_t = two
