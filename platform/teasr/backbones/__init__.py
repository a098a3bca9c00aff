"""Networks that predict F(x_t, t, r | y), and their folders of weights."""

from teasr.backbones.base import Backbone, Velocity, velocity_from_image
from teasr.backbones.branch_lora import load_adapters, merge, read_adapters, save_adapters, unmerge
from teasr.backbones.codec import Codec, KLCodec, Pixels, QwenImageCodec
from teasr.backbones.dit import PRESETS, DiTSettings, DualBranchDiT
from teasr.backbones.folder import Model, built_in_models, load_model, named_base, save_model
from teasr.backbones.latent import LatentBackbone
from teasr.backbones.pretrained import (
    Pretrained,
    PretrainedSettings,
    check_pretrained,
    load_pretrained,
    meta_backbone,
)

__all__ = [
    "PRESETS",
    "Backbone",
    "Codec",
    "DiTSettings",
    "DualBranchDiT",
    "KLCodec",
    "LatentBackbone",
    "Model",
    "Pixels",
    "Pretrained",
    "PretrainedSettings",
    "QwenImageCodec",
    "Velocity",
    "built_in_models",
    "check_pretrained",
    "load_adapters",
    "load_model",
    "load_pretrained",
    "merge",
    "meta_backbone",
    "named_base",
    "read_adapters",
    "save_adapters",
    "save_model",
    "unmerge",
    "velocity_from_image",
]
