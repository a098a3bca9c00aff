"""Networks that predict F(x_t, t, r | y), and their folders of weights."""

from teasr.backbones.base import Backbone, Velocity, velocity_from_image
from teasr.backbones.branch_lora import load_adapters, merge, read_adapters, save_adapters, unmerge
from teasr.backbones.codec import Codec, KLCodec, Pixels, QwenImageCodec
from teasr.backbones.dit import PRESETS, DiTSettings, DualBranchDiT
from teasr.backbones.folder import built_in_models, load_backbone, save_backbone
from teasr.backbones.latent import LatentBackbone
from teasr.backbones.pretrained import Pretrained, load_pretrained, meta_backbone

__all__ = [
    "PRESETS",
    "Backbone",
    "Codec",
    "DiTSettings",
    "DualBranchDiT",
    "KLCodec",
    "LatentBackbone",
    "Pixels",
    "Pretrained",
    "QwenImageCodec",
    "Velocity",
    "built_in_models",
    "load_adapters",
    "load_backbone",
    "load_pretrained",
    "merge",
    "meta_backbone",
    "read_adapters",
    "save_adapters",
    "save_backbone",
    "unmerge",
    "velocity_from_image",
]
