"""One low-rank adapter per branch on the same frozen linear layers, and both on disk.

A pretrained transformer has one set of weights for its image stream. Noise and condition tokens
both go through it, side by side along the sequence, and each branch has a LoRA pair of its own
(LoRA, arXiv 2106.09685) on the same layers:

    noise tokens       W x + (alpha / rank) B_noise A_noise x
    condition tokens   W x + (alpha / rank) B_condition A_condition x
    all other tokens   W x

Which tokens are whose is said once around each block (`branch_tokens`), inside of what a gradient
checkpoint repeats, so that a repetition in the backward pass meets the division of its own forward
pass. The matrices are called as `nn.Linear`, never read by another module: whoever gathers
partitioned weights by hooks of modules (ZeRO-3) finds them in place.

On disk a branch is what peft and diffusers read: `pytorch_lora_weights.safetensors` with keys
`transformer.<module>.lora_A.weight` and an `adapter_config.json`. `adapters.json` beside them says
which weights they were trained on.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teasr.config import Settings
from teasr.errors import TeasrError, UsageError

if TYPE_CHECKING:
    from teasr.backbones.latent import LatentBackbone

Branch = Literal["noise", "condition"]
BRANCHES: tuple[Branch, Branch] = ("noise", "condition")

ADAPTERS_FILE = "adapters.json"
EMBEDDER_FILE = "target_embedder.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_CONFIG_FILE = "adapter_config.json"
ADAPTERS_FILES = (
    *(f"{branch}/{name}" for branch in BRANCHES for name in (LORA_FILE, LORA_CONFIG_FILE)),
    EMBEDDER_FILE,
    ADAPTERS_FILE,
)
"""What `save_adapters` writes, as paths in its folder."""
FORMAT = 1

# --------------------------------------------------------------------------- layers


class BranchTokens(NamedTuple):
    """How a sequence is divided: first the noise tokens, then the condition tokens, then the rest,
    which belongs to neither branch."""

    noise: int
    condition: int


_TOKENS: ContextVar[BranchTokens] = ContextVar("branch_tokens")


@contextmanager
def branch_tokens(tokens: BranchTokens) -> Iterator[None]:
    """Within: every `BranchLinear` divides its sequence by `tokens`. Per thread and task."""
    before = _TOKENS.set(tokens)
    try:
        yield
    finally:
        _TOKENS.reset(before)


class LoraPair(nn.Module):
    """x (..., in) -> (alpha / rank) B A x (..., out). A starts as in peft (Kaiming uniform, a =
    sqrt 5), B at zero: an untrained pair adds nothing."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        alpha: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.scaling = alpha / rank
        self.lora_A = nn.Linear(inputs, rank, bias=False, dtype=dtype, device=device)
        self.lora_B = nn.Linear(rank, outputs, bias=False, dtype=dtype, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * self.lora_B(self.lora_A(x))

    @torch.no_grad()
    def delta(self) -> Tensor:
        """(out, in) float32: what the pair adds to the weight."""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())


class BranchLinear(nn.Module):
    """A frozen linear layer with one LoRA pair per branch.

    Args:
        base: `nn.Linear` (its weight may be quantised); frozen here.
        rank: of both pairs. alpha: both pairs are scaled by alpha / rank.
        dtype, device: of the pairs; None: those of the base's weight.

    x is (N, tokens, in) within `branch_tokens`; returns (N, tokens, out).
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        dtype, device = dtype or base.weight.dtype, device or base.weight.device
        self.noise, self.condition = (
            LoraPair(base.in_features, base.out_features, rank, alpha, dtype, device)
            for _ in BRANCHES
        )
        self.merged: Branch | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = _TOKENS.get(None)
        if tokens is None:
            raise RuntimeError("BranchLinear was called outside of branch_tokens().")
        frozen = self.base(x)
        parts = []
        sizes = (tokens.noise, tokens.condition, x.shape[1] - sum(tokens))
        for branch, ours, through in zip(
            (*BRANCHES, None), x.split(sizes, 1), frozen.split(sizes, 1)
        ):
            if not ours.shape[1]:
                continue
            if branch != self.merged:
                through = through + self._added(branch, ours)
            parts.append(through)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _added(self, branch: Branch | None, x: Tensor) -> Tensor | float:
        """What tokens of `branch` get beyond the base layer: their own pair's share, less that of
        the pair which is merged into the base."""
        added: Tensor | float = 0.0
        if branch is not None:
            added = getattr(self, branch)(x)
        if self.merged is not None:
            added = added - getattr(self, self.merged)(x)
        return added

    @torch.no_grad()
    def merge(self, branch: Branch) -> None:
        """Add the pair of `branch` to the base weight; see `merge`."""
        self._shift(branch, 1)
        self.merged = branch

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take it out again."""
        if self.merged is not None:
            self._shift(self.merged, -1)
        self.merged = None

    def _shift(self, branch: Branch, sign: int) -> None:
        weight = self.base.weight
        pair: LoraPair = getattr(self, branch)
        # A new tensor: the old one may be a read-only view of a mapped file.
        weight.data = (weight.float() + sign * pair.delta().to(weight.device)).to(weight.dtype)


def add_branches(
    module: nn.Module,
    names: list[str],
    rank: int,
    alpha: float,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Replace each linear layer of `module` that is in `names` by a `BranchLinear` around it."""
    for name in names:
        parent, _, last = name.rpartition(".")
        base = module.get_submodule(name)
        assert isinstance(base, nn.Linear), name
        setattr(module.get_submodule(parent), last, BranchLinear(base, rank, alpha, dtype, device))


def branch_linears(module: nn.Module) -> dict[str, BranchLinear]:
    """The layers of `module` that have branches, by their name in it."""
    return {name: part for name, part in module.named_modules() if isinstance(part, BranchLinear)}


def merge(module: nn.Module, branch: Branch) -> None:
    """Add one branch's adapters to the frozen weights, in place; the module computes the same.

    That branch's tokens then cost no more than in the plain network. Both branches share the
    layers, so only one can be merged at a time: tokens outside of it pay for taking its share out
    again. Adapters must not be trained while merged. In bfloat16 merging rounds, and `unmerge` does
    not return to the last bit.

    Raises:
        TeasrError: when a branch is merged already, or the weights are quantised.
    """
    layers = branch_linears(module)
    for name, layer in layers.items():
        if layer.merged is not None:
            raise TeasrError(
                f"The {layer.merged} branch is merged already; both share the layers.",
                "Unmerge it first.",
            )
        if type(layer.base.weight.data) is not Tensor:
            raise TeasrError(
                f"{name} holds its weight in 8 bits; an adapter cannot be added to it.",
                "Load the base without frozen_bits to merge.",
            )
    for layer in layers.values():
        layer.merge(branch)


def unmerge(module: nn.Module) -> None:
    """Take the merged branch, if any, out of the frozen weights."""
    for layer in branch_linears(module).values():
        layer.unmerge()


# --------------------------------------------------------------------------- on disk


class BaseReference(Settings):
    """Which frozen weights adapters belong to."""

    source: str
    """Folder or hub id they were loaded from; for people."""
    revision: str | None = None
    """Commit of the hub repository."""
    fingerprint: str
    """Hash over the weights' files (`pretrained.fingerprint`); what is compared."""


class AdaptersDescription(Settings):
    """Content of `adapters.json`."""

    format: int = FORMAT
    """Version of this folder's layout."""
    backbone: str
    """Kind of backbone: `qwen-image` or `z-image`."""
    base: BaseReference | None
    """What the adapters were trained on; None for weights that came from no file."""
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the packages that wrote the folder; for people."""
    training: dict[str, Any] = Field(default_factory=dict)
    """What the adapters were made of: recipe, data, steps. Read by people, not by code."""


def adapter_tensors(backbone: LatentBackbone, branch: Branch) -> dict[str, Tensor]:
    """`<module>.lora_A.weight` and `.lora_B.weight` of one branch; modules named as in the plain
    transformer. The live parameters, not copies."""
    return {
        f"{name}.{side}.weight": getattr(getattr(layer, branch), side).weight
        for name, layer in branch_linears(backbone.transformer).items()
        for side in ("lora_A", "lora_B")
    }


def save_adapters(
    backbone: LatentBackbone,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write what is trained to `folder`, made if missing: a folder per branch, the second timestep
    embedder, and `adapters.json`.

    In Z-Image prompt and image share their layers: a plain network with a branch's adapter adapts
    the prompt's tokens too, which the backbone leaves alone. In Qwen-Image they do not, and the
    plain network with the noise branch's adapter is the noise branch.

    Args:
        weights: tensors by their names in `backbone.trainable()`, where the backbone's own
            parameters are not whole (partitioned) or not what is wanted (an average); None takes
            the backbone's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {id(parameter): name for name, parameter in backbone.trainable().items()}

    def stored(tensor: Tensor) -> Tensor:
        chosen = tensor if weights is None else weights[own[id(tensor)]]
        return chosen.detach().to("cpu").clone(memory_format=torch.contiguous_format)

    config = _peft_config(backbone)
    header = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    for branch in BRANCHES:
        (folder / branch).mkdir(exist_ok=True)
        tensors = {
            f"transformer.{name}": stored(tensor)
            for name, tensor in adapter_tensors(backbone, branch).items()
        }
        metadata = {"format": "pt", "lora_adapter_metadata": header}
        save_file(tensors, folder / branch / LORA_FILE, metadata=metadata)
        source = backbone.base.source if backbone.base else None
        peft = {"peft_type": "LORA", "base_model_name_or_path": source, **config}
        (folder / branch / LORA_CONFIG_FILE).write_text(json.dumps(peft, indent=2) + "\n")
    embedder = {
        name: stored(parameter) for name, parameter in backbone.target_embedder.named_parameters()
    }
    save_file(embedder, folder / EMBEDDER_FILE, metadata={"format": "pt"})
    description = AdaptersDescription(
        backbone=backbone.kind,
        base=backbone.base,
        rank=backbone.rank,
        alpha=backbone.alpha,
        versions={name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
        training=training or {},
    )
    # Last, so that a folder with a description is whole.
    (folder / ADAPTERS_FILE).write_text(description.model_dump_json(indent=2) + "\n")


def _peft_config(backbone: LatentBackbone) -> dict[str, Any]:
    """The fields of peft's `LoraConfig` that say what a branch's file holds."""
    alpha = backbone.alpha
    return {
        "r": backbone.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": backbone.adapted,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def read_adapters(folder: Path) -> AdaptersDescription:
    """`adapters.json` of `folder`.

    Raises:
        UsageError: when the folder holds no adapters.
        TeasrError: when the file is damaged or of another format.
    """
    path = folder / ADAPTERS_FILE
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no adapters.", f"A folder with an {ADAPTERS_FILE} is expected."
        )
    try:
        data = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        raise TeasrError(f"{path} is damaged: it is not valid JSON.") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise TeasrError(
            f"{path} is of format {found}; this version of teasr reads format {FORMAT}.",
            "Train the adapters again, or use the version of teasr that wrote them.",
        )
    return AdaptersDescription.from_mapping(data, str(path))


def load_adapters(backbone: LatentBackbone, folder: Path) -> AdaptersDescription:
    """Read adapters and second timestep embedder into `backbone`, in its type; all or nothing.

    Raises:
        UsageError: no adapters there.
        TeasrError: of another backbone, other base weights, rank or alpha; damaged or incomplete.
    """
    description = read_adapters(folder)
    _check_fit(backbone, folder, description)
    pairs: list[_Pair] = []
    for branch in BRANCHES:
        wanted = {
            f"transformer.{name}": tensor
            for name, tensor in adapter_tensors(backbone, branch).items()
        }
        pairs += _pair_up(folder / branch / LORA_FILE, wanted)
    pairs += _pair_up(folder / EMBEDDER_FILE, dict(backbone.target_embedder.named_parameters()))
    with torch.no_grad():
        for pair in pairs:
            pair.ours.copy_(pair.read)
    return description


def _check_fit(backbone: LatentBackbone, folder: Path, description: AdaptersDescription) -> None:
    if description.backbone != backbone.kind:
        raise TeasrError(
            f"{folder} holds adapters of a '{description.backbone}'; this is a '{backbone.kind}'."
        )
    ours, theirs = backbone.base, description.base
    if ours and theirs and ours.fingerprint != theirs.fingerprint:
        at = f" at revision {theirs.revision}" if theirs.revision else ""
        raise TeasrError(
            f"{folder} was trained on other weights than those of {ours.source}.",
            f"It belongs to {theirs.source}{at} (fingerprint {theirs.fingerprint}; loaded is "
            f"{ours.fingerprint}).",
        )
    for name in ("rank", "alpha"):
        asked, found = getattr(backbone, name), getattr(description, name)
        if asked != found:
            raise TeasrError(
                f"{folder} holds adapters of {name} {found:g}; the backbone was built with "
                f"{name} {asked:g}.",
                f"Build it with {name} {found:g}.",
            )
    if any(layer.merged for layer in branch_linears(backbone.transformer).values()):
        raise TeasrError("A branch is merged into the frozen weights.", "Unmerge it first.")


@dataclass(frozen=True)
class _Pair:
    ours: Tensor
    read: Tensor


def _pair_up(path: Path, wanted: Mapping[str, Tensor]) -> list[_Pair]:
    """The tensors in `path` beside the parameters `wanted` of the same names and shapes."""
    try:
        with safe_open(path, "pt") as opened:
            names = set(opened.keys())
        tensors = load_file(path)
    except FileNotFoundError:
        raise TeasrError(f"{path} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise TeasrError(f"{path} is damaged: {error}.") from None
    for what, gone in (("lacks", wanted.keys() - names), ("also holds", names - wanted.keys())):
        if gone:
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            raise TeasrError(
                f"{path} does not fit the backbone: it {what} {min(gone)}{more}.",
                "Adapters of another architecture or another writer cannot be read.",
            )
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise TeasrError(
                f"{path} does not fit the backbone: {name} is {tuple(tensors[name].shape)}, "
                f"{tuple(parameter.shape)} is expected."
            )
    return [_Pair(parameter, tensors[name]) for name, parameter in wanted.items()]
