"""Small random networks of the classes that the pretrained backbones wrap."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from torch import Tensor

from teasr.backbones.branch_lora import BRANCHES, Branch, branch_linears
from teasr.backbones.folder import Model, save_model
from teasr.backbones.latent import LatentBackbone
from teasr.backbones.pretrained import PROMPT_FILE, load_pretrained
from teasr.backbones.qwen_image import QwenImageBackbone
from teasr.backbones.z_image import ZImageBackbone

KIND_NAMES = ("qwen-image", "z-image")
both_kinds = pytest.mark.parametrize("kind", KIND_NAMES)
WIDTH, RANK = 24, 4
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen-image": {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
        "in_channels": 16,
        "out_channels": 4,
    },
    "z-image": {
        "in_channels": 4,
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 64, 64],
    },
}
FIRST_BLOCK = {"qwen-image": "transformer_blocks.0", "z-image": "layers.0"}
"""Where image and prompt tokens first meet."""


@lru_cache
def _plain(kind: str) -> Any:
    torch.manual_seed(0)
    made = QwenImageTransformer2DModel if kind == "qwen-image" else ZImageTransformer2DModel
    network = made(**CONFIGS[kind]).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():  # the learned fill tokens start at zero, norms at one
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return network


def plain(kind: str) -> Any:
    """A transformer as diffusers makes it."""
    return copy.deepcopy(_plain(kind))


def prompt() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))


def backbone(kind: str, *, live: bool = False, **options: Any) -> LatentBackbone:
    """The same with branches; `live`: as if it had been trained."""
    network = plain(kind)
    kinds: dict[str, Any] = {"qwen-image": QwenImageBackbone, "z-image": ZImageBackbone}
    torch.manual_seed(3)
    made = kinds[kind](network, prompt(), **{"rank": RANK, **options})
    if live:
        enliven(made)
    return made


def enliven(made: LatentBackbone) -> None:
    """Move what is trained off its initial values."""
    for i, branch in enumerate(BRANCHES):
        perturb(made, branch, seed=i)
    generator = torch.Generator().manual_seed(4)
    for parameter in made.target_embedder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def perturb(made: LatentBackbone, branch: Branch, seed: int = 0, only: str = "") -> None:
    """Move the B matrices of one branch off zero, in layers whose name starts with `only`."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in branch_linears(made.transformer).items():
        if name.startswith(only):
            weight = getattr(layer, branch).lora_B.weight
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator).to(weight)


def inputs(count: int = 2, rows: int = 8, columns: int = 12) -> tuple[Tensor, ...]:
    """x_t, t, r, condition; 24 tokens by default, which Z-Image fills up to 32."""
    generator = torch.Generator().manual_seed(5)
    x_t, condition = torch.randn(2, count, 4, rows, columns, generator=generator)
    return x_t, torch.linspace(0.8, 0.5, count), torch.linspace(0.3, 0.1, count), condition


def autoencoder(kind: str) -> Any:
    """A small autoencoder of the kind's class: factor 8, 4 channels."""
    torch.manual_seed(6)
    if kind == "qwen-image":
        return AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 2],
            num_res_blocks=1,
            latents_mean=[-0.5, 0.25, 0.0, 1.0],
            latents_std=[2.0, 0.5, 1.5, 3.0],
        )
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4, 4, 4, 8],
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def base_folder(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """`folder` as diffusers lays one out, of the networks of this module."""
    plain(kind).to(dtype).save_pretrained(folder / "transformer")
    autoencoder(kind).save_pretrained(folder / "vae")
    save_file({"embedding": prompt()}, folder / PROMPT_FILE)
    return folder


def model_folder(kind: str, root: Path) -> Model:
    """`root / "model"`, as training leaves it, of a base in `root / "base"`; what was saved."""
    base = base_folder(kind, root / "base")
    made = load_pretrained(kind, base, rank=RANK, alpha=6.0, dtype=torch.float32)  # type: ignore[arg-type]
    enliven(made.backbone)
    weights = {name: tensor.detach() for name, tensor in made.backbone.trainable().items()}
    save_model(made.backbone, weights, root / "model", training={"steps": 3}, dtype=torch.float32)
    return Model(made.backbone.eval(), made.codec)
