"""Z-Image with branches against diffusers' own forward, and its conventions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teasr.backbones.z_image import ZImageBackbone
from teasr.errors import UsageError
from tests.backbones.latents import WIDTH, backbone, inputs, plain, prompt

KIND = "z-image"


@torch.no_grad()
def own_forward(x_t: Tensor, t: Tensor) -> Tensor:
    """As diffusers' pipeline calls it: the clock is 1 - t, the output is turned round."""
    frames = list(x_t.unsqueeze(2))
    output = plain(KIND)(frames, 1 - t, [prompt()] * len(x_t), return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (8, 16), (10, 14)])  # tokens: 24, 32, 35
def test_without_condition_it_is_the_pretrained_network_to_the_bit(
    checkpointing: bool, size: tuple[int, int]
) -> None:
    x_t, t, r, _ = inputs(2, *size)
    made = backbone(KIND)
    made.gradient_checkpointing = checkpointing
    assert torch.equal(made(x_t, t, r, None), own_forward(x_t, t))
    assert torch.equal(made(x_t, -t, -r, None), own_forward(x_t, t))  # its level is |t|


def test_the_embedders_are_asked_on_the_networks_own_clock() -> None:
    """1 - |t| for the level; 1 - r for the target, beyond 1 for the twin trajectory."""
    x_t, t, r, condition = inputs()
    made = backbone(KIND)
    asked: list[Tensor] = []
    made.target_embedder.register_forward_pre_hook(lambda _, given: asked.append(given[0]))
    made.transformer.t_embedder.register_forward_pre_hook(lambda _, given: asked.append(given[0]))
    made(x_t, -t, -r, condition)
    assert torch.equal(asked[0], 1000 * (1 - t)) and torch.equal(asked[1], 1000 * (1 + r))


def test_fill_tokens_belong_to_the_branch_that_they_complete() -> None:
    """24 tokens are filled up to 32 in each branch; kinds and positions say so."""
    x_t, t, r, condition = inputs()
    made = backbone(KIND)
    seen: list[tuple[Tensor, ...]] = []
    made.transformer.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given))
    made(x_t, t, r, condition)
    sequence, _, positions, _, kinds, *_ = seen[0]
    assert sequence.shape[1] == positions.shape[1] == kinds.shape[1] == 32 + 32 + 32
    assert kinds[0].tolist() == [1] * 32 + [0] * 32 + [1] * 32
    assert torch.equal(positions[:, :32], positions[:, 32:64])


def test_omni_variants_are_refused() -> None:
    network = plain(KIND)
    network.register_to_config(siglip_feat_dim=8)
    with pytest.raises(UsageError, match="variant"):
        ZImageBackbone(network, prompt())


def test_a_prompt_of_another_width_is_refused() -> None:
    with pytest.raises(UsageError, match=rf"\(tokens, {WIDTH}\) is expected"):
        ZImageBackbone(plain(KIND), torch.zeros(5, WIDTH + 1))
