"""A model on disk: `model.safetensors` and `model.json`, never a pickle.

`model.json` says which backbone the weights belong to and holds its settings, so that a folder is
all that is needed to have the network back. Weights travel in bfloat16 unless told otherwise:
half the size, and what training computes in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from teasr.backbones.dit import DiTSettings, DualBranchDiT
from teasr.config import Settings
from teasr.errors import TeasrError, UsageError

WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"
FORMAT = 2


class ModelDescription(Settings):
    """Content of `model.json`."""

    format: int = FORMAT
    """Version of this folder's layout."""
    backbone: str
    """Kind of network; `dual-branch-dit` is the only one so far."""
    settings: dict[str, Any]
    """Settings of that network."""
    training: dict[str, Any] = Field(default_factory=dict)
    """What the weights were made of: recipe, data, steps. Read by people, not by code."""


def save_backbone(
    settings: DiTSettings,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    training: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a network's `settings` and `weights` (its state dict) to `folder`, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    description = ModelDescription(
        backbone="dual-branch-dit", settings=settings.model_dump(), training=training or {}
    )
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2) + "\n")


def read_description(folder: Path) -> ModelDescription:
    """`model.json` of `folder`.

    Raises:
        UsageError: when the folder holds no model.
        TeasrError: when the file is damaged or of another version.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise UsageError(
            f"{folder} holds no model.",
            f"A {DESCRIPTION_FILE} and a {WEIGHTS_FILE} are expected there.",
        )
    try:
        data = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        raise TeasrError(f"{path} is damaged: it is not valid JSON.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise TeasrError(
            f"{path} is of format {found}; this version of teasr reads format {FORMAT}.",
            "Train the model again, or use the version of teasr that wrote it.",
        )
    return ModelDescription.from_mapping(data, str(path))


def load_backbone(folder: Path, dtype: torch.dtype | None = None) -> DualBranchDiT:
    """The network in `folder`, in evaluation mode, computing in `dtype` (default:
    `compute_dtype()`).

    Raises:
        UsageError, TeasrError: no model there, a damaged file, or weights of another architecture.
    """
    description = read_description(folder)
    if description.backbone != "dual-branch-dit":
        raise TeasrError(
            f"{folder} holds a '{description.backbone}'; this version of teasr runs "
            "'dual-branch-dit'."
        )
    settings = DiTSettings.from_mapping(description.settings, str(folder / DESCRIPTION_FILE))
    network = DualBranchDiT(settings)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (SafetensorError, OSError) as error:
        raise TeasrError(f"{folder / WEIGHTS_FILE} is damaged: {error}.") from None
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise TeasrError(
            f"{folder / WEIGHTS_FILE} does not fit its {DESCRIPTION_FILE}: {first}"
        ) from None
    return network.to(dtype or compute_dtype()).eval()


def compute_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it faster than float32, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = (
        capabilities.get("avx512_bf16")
        or capabilities.get("amx_bf16")
        or capabilities.get("amx_tile")
    )
    return torch.bfloat16 if fast else torch.float32


def built_in_models() -> dict[str, Path]:
    """Models that ship with the package, by name."""
    root = Path(__file__).parent.parent / "weights"
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{DESCRIPTION_FILE}"))}
