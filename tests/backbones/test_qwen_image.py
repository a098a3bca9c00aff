"""Qwen-Image with branches against diffusers' own forward, and its conventions."""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from teasr.backbones.latent import from_tokens, to_tokens
from teasr.backbones.qwen_image import QwenImageBackbone
from teasr.errors import UsageError
from tests.backbones.latents import WIDTH, backbone, inputs, plain, prompt

KIND = "qwen-image"


@torch.no_grad()
def own_forward(x_t: Tensor, t: Tensor) -> Tensor:
    """As diffusers' pipeline calls it: the clock is ours, and so is the sign."""
    count, channels, rows, columns = x_t.shape
    output = plain(KIND)(
        hidden_states=QwenImagePipeline._pack_latents(x_t, count, channels, rows, columns),
        timestep=t,
        encoder_hidden_states=prompt().expand(count, -1, -1),
        img_shapes=[[(1, rows // 2, columns // 2)]] * count,
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(output, 8 * rows, 8 * columns, 8).squeeze(2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_condition_it_is_the_pretrained_network_to_the_bit(checkpointing: bool) -> None:
    x_t, t, r, _ = inputs()
    made = backbone(KIND)
    made.gradient_checkpointing = checkpointing
    assert torch.equal(made(x_t, t, r, None), own_forward(x_t, t))
    assert torch.equal(made(x_t, -t, -r, None), own_forward(x_t, t))  # its level is |t|


def test_a_forward_with_a_condition_leaves_the_pretrained_network_as_it_was() -> None:
    x_t, t, r, condition = inputs()
    made = backbone(KIND)
    made(x_t, t, r, condition)
    assert torch.equal(made(x_t, t, r, None), own_forward(x_t, t))


def test_tokens_are_packed_as_in_the_pipeline() -> None:
    latents = torch.randn(2, 4, 8, 12)
    tokens = to_tokens(latents, 2)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, 2, 4, 8, 12))
    assert torch.equal(from_tokens(tokens, 4, 6, 2), latents)


def test_the_second_embedder_is_asked_for_r_with_its_sign() -> None:
    x_t, t, r, condition = inputs()
    made = backbone(KIND)
    asked: list[Tensor] = []
    made.target_embedder.register_forward_pre_hook(lambda _, given: asked.append(given[0]))
    made.transformer.time_text_embed.register_forward_pre_hook(
        lambda _, given: asked.append(given[0])
    )
    made(x_t, -t, -r, condition)
    assert torch.equal(asked[0], t) and torch.equal(asked[1], -r)


@pytest.mark.parametrize("variant", ["use_additional_t_cond", "use_layer3d_rope"])
def test_variants_with_another_forward_are_refused(variant: str) -> None:
    network = plain(KIND)
    network.register_to_config(**{variant: True})
    with pytest.raises(UsageError, match=f"variant \\({variant}\\)"):
        QwenImageBackbone(network, prompt())


@pytest.mark.parametrize("shape", [(5, WIDTH + 1), (1, 5, WIDTH)])
def test_a_prompt_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=rf"\(tokens, {WIDTH}\) is expected"):
        QwenImageBackbone(plain(KIND), torch.zeros(shape))
