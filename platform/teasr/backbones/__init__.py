"""Networks that predict F(x_t, t, r | y), and their folders of weights."""

from teasr.backbones.base import Backbone, Velocity, velocity_from_image
from teasr.backbones.dit import PRESETS, DiTSettings, DualBranchDiT
from teasr.backbones.folder import built_in_models, load_backbone, save_backbone

__all__ = [
    "PRESETS",
    "Backbone",
    "DiTSettings",
    "DualBranchDiT",
    "Velocity",
    "built_in_models",
    "load_backbone",
    "save_backbone",
    "velocity_from_image",
]
