"""The switches of the backbone that ablations turn, and the names that must stay."""

from __future__ import annotations

import pytest
import torch

from teasr.backbones.dit import PRESETS, DualBranchDiT
from tests.backbones.networks import inputs, network, residual


def test_summed_timesteps_give_both_branches_one_embedding() -> None:
    """With equal embedders, level and target may change places; decoupled they may not."""
    x_t, t, r, condition = inputs()
    moved = []
    for timesteps in ("summed", "decoupled"):
        made = network(0, timesteps=timesteps)
        made.target_embedding.load_state_dict(made.level_embedding.state_dict())
        swapped = residual(made, x_t, r, t, condition)
        moved.append(float((residual(made, x_t, t, r, condition) - swapped).abs().max()))
    assert moved[0] < 1e-4 < 1e-2 < moved[1]
    assert network(0, timesteps="summed").state_dict().keys() == network(0).state_dict().keys()


def test_a_single_branch_adds_tokens_at_the_input() -> None:
    """What one kind of tokens loses and the other gains, the network does not see."""
    x_t, t, r, condition = inputs()
    single, dual = network(0, branches="single"), network(0)
    assert not [name for name in single.state_dict() if ".condition." in name]
    ratio = sum(p.numel() for p in single.blocks.parameters()) / sum(
        p.numel() for p in dual.blocks.parameters()
    )
    assert 0.5 <= ratio < 0.65  # the dual network's last block has half a condition branch
    for made, same in ((single, True), (dual, False)):
        base = residual(made, x_t, t, r, condition)
        moved = torch.linspace(-1, 1, len(made.noise_tokens.bias))
        made.noise_tokens.bias.data += moved
        made.condition_tokens.bias.data -= moved
        difference = float((residual(made, x_t, t, r, condition) - base).abs().max())
        assert (difference < 1e-4) == same


@pytest.mark.parametrize("switches", [{"branches": "single"}, {"timesteps": "summed"}])
def test_variants_depend_on_every_input_and_train_every_weight(switches: dict[str, str]) -> None:
    made = network(0, **switches)
    x_t, t, r, condition = inputs(40, 40, 1)  # more than one attention window
    base = residual(made, x_t, t, r, condition)
    for other in (
        (x_t.flip(-1), t, r, condition),
        (x_t, t - 0.1, r, condition),
        (x_t, t, -r, condition),
        (x_t, t, r, condition.flip(-1)),
    ):
        assert float((residual(made, *other) - base).std()) > 1e-3 * float(base.std())
    made(x_t, t, r, condition).square().mean().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_names_of_the_default_networks_weights_stay() -> None:
    """Shipped weights and checkpoints are read by these names."""
    names = set(DualBranchDiT(PRESETS["teasr-xs"]).state_dict())
    block = {
        f"blocks.0.{branch}.{part}"
        for branch in ("noise", "condition")
        for part in (
            *("modulation", "key_norm.weight", "query_norm.weight"),
            *(f"{layer}.{kind}" for layer in ("qkv", "project") for kind in ("weight", "bias")),
            *(f"mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
        )
    }
    assert block <= names
    assert {name.split(".")[0] for name in names} == {
        *("stem", "condition_tokens", "noise_tokens", "level_embedding", "target_embedding"),
        *("level_modulation", "target_modulation", "blocks", "output_tokens", "fine_features"),
        *("fine_gain", "head"),
    }
