"""A model on disk: `model.json` and safetensors, never a pickle.

`model.json` says which backbone the weights belong to and holds its settings. The native network's
weights are `model.safetensors`, so that the folder is all that is needed to have it back. Of a
pretrained backbone the folder holds what was trained (`save_adapters`), the embedding of the empty
prompt, and a reference to the frozen base, which is tens of gigabytes that many models share: where
it came from and the fingerprint that it must have. Weights travel in bfloat16 unless told
otherwise: half the size, and what training computes in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from teasr.backbones.base import Backbone
from teasr.backbones.branch_lora import (
    ADAPTERS_FILES,
    BaseReference,
    load_adapters,
    save_adapters,
)
from teasr.backbones.codec import Codec, Pixels
from teasr.backbones.dit import DiTSettings, DualBranchDiT
from teasr.backbones.latent import LatentBackbone
from teasr.backbones.pretrained import KINDS, PROMPT_FILE, load_pretrained
from teasr.config import Settings
from teasr.errors import TeasrError, UsageError

NATIVE = "dual-branch-dit"
WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"
BASE_VARIABLE = "TEASR_BASE"
"""Names the folder of a frozen base that is not where it was when the model was trained."""
FORMAT = 2


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode, and the codec of what it works on."""

    network: Backbone
    codec: Codec


class ModelDescription(Settings):
    """Content of `model.json`."""

    format: int = FORMAT
    """Version of this folder's layout."""
    backbone: str
    """Kind of network: `dual-branch-dit`, `qwen-image` or `z-image`."""
    settings: dict[str, Any]
    """Settings of that network: `DiTSettings`, or `AdaptedSettings` of a pretrained one."""
    training: dict[str, Any] = Field(default_factory=dict)
    """What the weights were made of: recipe, data, steps. Read by people, not by code."""


class AdaptedSettings(Settings):
    """What gives a pretrained backbone back, with the adapters beside."""

    rank: int = Field(ge=1)
    """Of the adapters."""
    alpha: float = Field(gt=0)
    """The adapters are scaled by alpha / rank."""
    base: BaseReference
    """The frozen weights; no part of the folder."""


# --------------------------------------------------------------------------- out


def save_model(
    network: Backbone,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    training: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write what was trained of `network` to `folder`, made if missing.

    Args:
        network: read for its settings alone: its own parameters may be partitioned.
        weights: by parameter name; of the native network its state dict, of a pretrained one at
            least what is trained.
        training: what the weights were made of, for people.
        dtype: of the weights on disk.

    Raises:
        UsageError: for a pretrained backbone whose base came from no file, and for a network of no
            known kind.
    """
    if isinstance(network, DualBranchDiT):
        kind, settings = NATIVE, network.settings.model_dump()
    elif isinstance(network, LatentBackbone):
        if network.base is None:
            raise UsageError(
                f"The frozen weights of this '{network.kind}' came from no file: a model that "
                "refers to them could not be loaded.",
                "Make the network by load_pretrained.",
            )
        adapted = AdaptedSettings(rank=network.rank, alpha=network.alpha, base=network.base)
        kind, settings = network.kind, adapted.model_dump()
    else:
        raise UsageError(f"A {type(network).__name__} is no kind of network that has a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
    if isinstance(network, LatentBackbone):
        save_adapters(network, folder, weights=chosen)
        prompt = {"embedding": network.prompt.detach().cpu().contiguous()}
        save_file(prompt, folder / PROMPT_FILE, metadata={"kind": kind})
    else:
        tensors = {name: tensor.contiguous() for name, tensor in chosen.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    description = ModelDescription(backbone=kind, settings=settings, training=training or {})
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2) + "\n")


# --------------------------------------------------------------------------- in


def read_description(folder: Path) -> ModelDescription:
    """`model.json` of `folder`.

    Raises:
        UsageError: when the folder holds no model.
        TeasrError: when the file is damaged, or of another version or an unknown backbone.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise _no_model(folder, WEIGHTS_FILE)
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
    description = ModelDescription.from_mapping(data, str(path))
    if description.backbone not in (NATIVE, *KINDS):
        raise TeasrError(
            f"{folder} holds a '{description.backbone}'; this version of teasr runs "
            f"{', '.join(repr(kind) for kind in (NATIVE, *KINDS))}."
        )
    return description


def model_files(folder: Path) -> list[str]:
    """The files of the model in `folder`, as paths in it, its description first.

    Raises:
        UsageError: when one is missing.
        TeasrError: as `read_description`.
    """
    native = read_description(folder).backbone == NATIVE
    weights = [WEIGHTS_FILE] if native else [*ADAPTERS_FILES, PROMPT_FILE]
    for name in weights:
        if not (folder / name).is_file():
            raise _no_model(folder, name)
    return [DESCRIPTION_FILE, *weights]


def base_of(folder: Path) -> BaseReference | None:
    """The frozen weights that the model in `folder` refers to; None for the native network, which
    needs none. Errors as of `read_description`."""
    description = read_description(folder)
    return None if description.backbone == NATIVE else _adapted(description, folder).base


def _no_model(folder: Path, missing: str) -> UsageError:
    return UsageError(
        f"{folder} holds no model.", f"A {DESCRIPTION_FILE} and a {missing} are expected there."
    )


def named_base() -> Path | None:
    """The folder that $TEASR_BASE names, absolute: for workers, whose environment and working
    folder are others. None when it names none."""
    given = os.environ.get(BASE_VARIABLE)
    return Path(given).expanduser().absolute() if given else None


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    base: Path | None = None,
) -> Model:
    """The model in `folder`, in evaluation mode, on `device`.

    Args:
        base: folder of a pretrained backbone's frozen weights; None: `named_base()`, else where
            they were when the model was trained.
        dtype: compute type; None: `compute_dtype()`, of a pretrained backbone bfloat16, in which
            its base can stay in the mapped files.

    Raises:
        UsageError: no model there, or settings that are none.
        TeasrError: a damaged file, weights of another architecture; the base is not found, or has
            another fingerprint.
    """
    description = read_description(folder)
    model_files(folder)
    if description.backbone == NATIVE:
        network = _load_native(description, folder).to(device, dtype or compute_dtype())
        return Model(network.eval(), Pixels(network.scale))
    settings = _adapted(description, folder)
    source, revision = _where_is(settings.base, folder, base or named_base())
    made = load_pretrained(
        description.backbone,  # type: ignore[arg-type]  # a kind, `read_description` has checked
        source,
        revision=revision,
        rank=settings.rank,
        alpha=settings.alpha,
        dtype=dtype or torch.bfloat16,
        device=device,
        prompt=folder / PROMPT_FILE,
    )
    found = made.backbone.base
    assert found is not None
    if found.fingerprint != settings.base.fingerprint:
        raise TeasrError(
            f"{folder} was trained on other frozen weights than those of {found.source}.",
            f"It belongs to {_told(settings.base)}; those have {found.fingerprint}. Name the right "
            f"folder by {BASE_VARIABLE}.",
        )
    load_adapters(made.backbone, folder)
    return Model(made.backbone.eval(), made.codec)


def _load_native(description: ModelDescription, folder: Path) -> DualBranchDiT:
    """In float32."""
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
    return network


def _adapted(description: ModelDescription, folder: Path) -> AdaptedSettings:
    return AdaptedSettings.from_mapping(description.settings, str(folder / DESCRIPTION_FILE))


def _where_is(base: BaseReference, folder: Path, given: Path | None) -> tuple[str, str | None]:
    """Folder or hub repository of the frozen weights, and the commit of the latter."""
    if given:
        if not given.is_dir():
            raise UsageError(
                f"{BASE_VARIABLE} names {given}, which is no folder.",
                f"The diffusers folder that {folder} was trained on is expected: {_told(base)}.",
            )
        return str(given), None
    if base.revision is None and not Path(base.source).is_dir():
        raise TeasrError(
            f"{folder} was trained on frozen weights that are no longer there: {_told(base)}.",
            f"Set {BASE_VARIABLE} to the folder where they are now.",
        )
    return base.source, base.revision


def _told(base: BaseReference) -> str:
    at = f" at revision {base.revision}" if base.revision else ""
    return f"{base.source}{at} (fingerprint {base.fingerprint})"


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
