"""Pretrained backbones: from a diffusers folder or a pinned hub repository to what trains.

Everything that can be wrong is found before weights are read: the class and the configuration, the
index and its shards, the name and shape of every tensor in their headers. Then the network is built
on the meta device and takes its weights from memory-mapped files, so that they are never held
twice: in the files' own type they need no memory of their own at all, in another type one tensor at
a time is converted.

The prompt is empty, always. Its embedding is read from `empty_prompt.safetensors` beside the model
or from the cache; else it is computed once, by the text encoder, and the encoder is let go.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teasr.backbones.branch_lora import BaseReference
from teasr.backbones.codec import AutoencoderCodec, KLCodec, QwenImageCodec
from teasr.backbones.latent import LatentBackbone
from teasr.backbones.qwen_image import QwenImageBackbone
from teasr.backbones.safetensors_files import INDEX_SUFFIX, STEM, Place, read_header
from teasr.backbones.z_image import ZImageBackbone
from teasr.config import Settings
from teasr.errors import TeasrError, UsageError

Kind = Literal["qwen-image", "z-image"]

INSTALL = "Install what large backbones need: pip install 'teasr[large]'."
PROMPT_FILE = "empty_prompt.safetensors"
INDEX_FILE = f"{STEM}{INDEX_SUFFIX}"
SINGLE_FILE = f"{STEM}.safetensors"


@dataclass(frozen=True)
class KindSpec:
    """What belongs to one kind of backbone."""

    backbone: type[LatentBackbone]
    codec: type[AutoencoderCodec]
    transformer: str
    """Class name in diffusers, and in `transformer/config.json`."""
    autoencoder: str
    prompt_width: str
    """The transformer's setting that is the width of a prompt token."""
    prompt_tokens: int
    """Tokens of the empty prompt, with the template around it."""


KINDS: dict[str, KindSpec] = {
    "qwen-image": KindSpec(
        QwenImageBackbone,
        QwenImageCodec,
        "QwenImageTransformer2DModel",
        "AutoencoderKLQwenImage",
        "joint_attention_dim",
        5,
    ),
    "z-image": KindSpec(
        ZImageBackbone, KLCodec, "ZImageTransformer2DModel", "AutoencoderKL", "cap_feat_dim", 8
    ),
}


class PretrainedSettings(Settings):
    """A pretrained network, and the adapters that are trained on it."""

    kind: Kind
    """What the network is."""
    source: str = Field(min_length=1)
    """A diffusers folder, under the same path on every machine, or a hub repository
    `owner/name`."""
    revision: str | None = None
    """Commit of the hub repository, 40 hex digits; a folder has none."""
    rank: int = Field(128, ge=1)
    """Rank of the adapters of both branches."""
    alpha: float | None = Field(None, gt=0)
    """Adapters are scaled by alpha / rank; None: by 1."""
    frozen_bits: Literal[8] | None = None
    """8 holds the frozen weights of the blocks in int8, half of bfloat16; None as they are."""

    @field_validator("revision")
    @classmethod
    def _commit(cls, value: str | None) -> str | None:
        if value is not None and not _is_commit(value):
            raise ValueError("a commit, 40 hex digits, is expected (branches and tags move)")
        return value


@dataclass(frozen=True)
class Pretrained:
    """A backbone, the codec of what it works on, and the folder of its frozen weights' files."""

    backbone: LatentBackbone
    codec: AutoencoderCodec
    weights: Path


# --------------------------------------------------------------------------- loading


def load_pretrained(
    kind: Kind,
    source: str | Path,
    *,
    revision: str | None = None,
    rank: int = 128,
    alpha: float | None = None,
    frozen_bits: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    prompt: Path | None = None,
    mapped: bool = True,
    blocks_on_meta: bool = False,
) -> Pretrained:
    """The pretrained network with untrained branches, and its codec, on `device`.

    Args:
        source: a diffusers folder (transformer/, vae/, text_encoder/ and tokenizer/ where the
            prompt's embedding is not yet there), or a hub repository `owner/name`.
        revision: commit of the hub repository, 40 hex digits.
        rank, alpha: of the adapters; alpha None: equal to the rank.
        frozen_bits: 8 holds the blocks' frozen linear weights in int8, one factor per output
            channel, by torchao: half of bfloat16. For one device; partitioning (ZeRO-3) needs None.
        dtype: compute type, and type of all other weights.
        cache: folder for the prompt's embedding when it has to be computed; None: it is computed
            again each time.
        prompt: file of the prompt's embedding, as `empty_prompt.safetensors`; None: see the
            module's text.
        mapped: on the CPU, leave frozen weights that are stored in `dtype` in the mapped files.
            They are read-only: writing into them in place kills the process, as an engine does that
            broadcasts weights to other processes without partitioning them; give it False.
        blocks_on_meta: leave the weights of `backbone.blocks` on the meta device, for a loader
            that streams them from `weight_files` by `backbone.stored_name`.

    Raises:
        UsageError: no such source, a hub source that is not pinned, another model than `kind`.
        TeasrError: a package, file, shard or tensor is missing or damaged; no prompt embedding.
    """
    if kind not in KINDS:
        raise UsageError(f"'{kind}' is no kind of backbone.", f"Known: {', '.join(KINDS)}.")
    spec = KINDS[kind]
    if frozen_bits not in (None, 8):
        raise UsageError(f"frozen_bits is {frozen_bits}.", "8, or none at all, is accepted.")
    if frozen_bits and blocks_on_meta:
        raise UsageError("Blocks that are streamed stay as they are stored; leave out frozen_bits.")
    _diffusers()
    if frozen_bits:
        _torchao()
    folder = _resolve(source, revision, cache, prompt is None)
    transformer, _ = _described(kind, folder)
    files = weight_files(folder / "transformer")
    _check_tensors(transformer, files, folder / "transformer")
    reference = BaseReference(
        source=str(folder.absolute()) if revision is None else str(source),
        revision=revision,
        fingerprint=fingerprint(folder / "transformer"),
    )
    width = transformer.config[spec.prompt_width]
    if prompt is None:
        embedding = empty_prompt(kind, folder, width, cache)
    else:
        embedding = _read_prompt(prompt, width)

    at = torch.device(device)
    _assign(transformer, files, dtype, at, mapped=mapped, blocks_on_meta=blocks_on_meta)
    if frozen_bits:
        _to_8_bits(transformer)
    autoencoder = _load_autoencoder(folder / "vae", spec.autoencoder, dtype)
    codec = spec.codec(autoencoder).to(device)
    backbone = spec.backbone(
        transformer,
        embedding.to(device),
        rank=rank,
        alpha=alpha,
        scale=codec.scale,
        factor=codec.factor,
        base=reference,
    )
    return Pretrained(backbone, codec, folder / "transformer")


def check_pretrained(
    settings: PretrainedSettings, *, cache: Path | None = None, streamed: torch.dtype | None = None
) -> int:
    """Find what is wrong with a pretrained network before anything is loaded.

    Descriptions and the headers of weights are read, no values. Of a hub repository the
    descriptions are fetched, if they are not on this machine yet, and nothing else.

    Args:
        cache: as in `load_pretrained`.
        streamed: compute type, where blocks are streamed: what they must be stored in.

    Returns:
        Pixels that the sides of a restored picture must be a multiple of.

    Raises:
        UsageError, TeasrError: as `load_pretrained`.
    """
    spec = KINDS[settings.kind]
    _diffusers()
    if settings.frozen_bits:
        _torchao()
    local = Path(settings.source).expanduser().is_dir()
    folder = _resolve(settings.source, settings.revision, cache, False, with_values=False)
    transformer, autoencoder = _described(settings.kind, folder)
    if local:
        files = weight_files(folder / "transformer")
        _check_tensors(transformer, files, folder / "transformer", streamed)
        for path in weight_files(folder / "vae"):
            read_header(path)
        _check_prompt_source(folder, cache)
    return spec.codec(autoencoder).factor * spec.backbone.patch_of(transformer)


def prepare_pretrained(settings: PretrainedSettings, cache: Path) -> None:
    """Bring to this machine what `load_pretrained` reads: the files of a hub repository, and in
    `cache` the embedding of the empty prompt, if it is not beside the model.

    Raises:
        UsageError, TeasrError: as `load_pretrained`.
    """
    _diffusers()
    folder = _resolve(settings.source, settings.revision, cache, True)
    if not any(path.is_file() for path in _prompt_places(folder, cache)):
        transformer, _ = _described(settings.kind, folder)
        width = transformer.config[KINDS[settings.kind].prompt_width]
        empty_prompt(settings.kind, folder, width, cache)


def meta_backbone(
    kind: Kind,
    config: Mapping[str, Any] | None = None,
    *,
    rank: int = 128,
    alpha: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> LatentBackbone:
    """A backbone of shapes without values, on the meta device: what a planner counts.

    Args:
        config: settings of the transformer that differ from the published model's.
    """
    if kind not in KINDS:
        raise UsageError(f"'{kind}' is no kind of backbone.", f"Known: {', '.join(KINDS)}.")
    _diffusers()
    spec = KINDS[kind]
    transformer = _on_meta(kind, config or {}).to(dtype)
    width = transformer.config[spec.prompt_width]
    prompt = torch.empty(spec.prompt_tokens, width, device="meta")
    with torch.device("meta"):
        return spec.backbone(transformer, prompt, rank=rank, alpha=alpha)


# --------------------------------------------------------------------------- packages


def _diffusers() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao tells of each part that it cannot load, unasked
    try:
        import diffusers

        for spec in KINDS.values():  # what it holds is imported on use only
            getattr(diffusers, spec.transformer)
    except ImportError as error:
        raise TeasrError(f"diffusers cannot be imported: {error}.", INSTALL) from None
    finally:
        logging.disable(before)
    return diffusers


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise TeasrError(f"frozen_bits needs torchao, but: {error}.", INSTALL) from None
    return torchao.quantization


# --------------------------------------------------------------------------- where files are


def _resolve(
    source: str | Path,
    revision: str | None,
    cache: Path | None,
    with_prompt: bool,
    with_values: bool = True,
) -> Path:
    """The folder of `source`, downloaded if it is a hub repository; `with_prompt`: and what its
    prompt's embedding comes from; `with_values`: weights, not descriptions alone."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UsageError(
                f"{source} is a folder; it has no revision.", "Leave out the revision."
            )
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UsageError(
            f"There is no folder {source}, and it is no hub repository.",
            "Give a diffusers folder, or owner/name with a revision.",
        )
    if not _is_commit(revision or ""):
        given = f"the revision '{revision}'" if revision else "no revision"
        raise UsageError(
            f"There is no folder {source}; as a hub repository it has {given}, which may mean "
            "other weights tomorrow.",
            "Give the commit: the 40 hex digits on the repository's history page.",
        )
    assert revision is not None
    return _download(str(source), revision, cache, with_prompt, with_values)


def _is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _download(
    repository: str, revision: str, cache: Path | None, with_prompt: bool, with_values: bool
) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise TeasrError(f"huggingface_hub cannot be imported: {error}.", INSTALL) from None
    wanted = ["transformer/*.json", "vae/*.json"]
    if with_values:
        wanted += ["transformer/*.safetensors", "vae/*.safetensors"]

    def fetch(patterns: list[str]) -> Path:
        try:
            found = snapshot_download(repository, revision=revision, allow_patterns=patterns)
        except Exception as error:  # of many kinds: no network, no such commit, no permission
            raise TeasrError(
                f"{repository} at {revision} cannot be downloaded: {error}",
                "Check name, commit, network and permission, or give a folder.",
            ) from None
        return Path(found)

    folder = fetch([*wanted, PROMPT_FILE])
    if with_prompt and not any(path.is_file() for path in _prompt_places(folder, cache)):
        fetch(["text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*"])
    return folder


def _check_class(folder: Path, expected: str) -> dict[str, Any]:
    """`config.json` of `folder`, of the class `expected`."""
    config = _read_json(folder / "config.json")
    found = config.get("_class_name")
    if found != expected:
        raise UsageError(
            f"{folder} holds a {found}; a {expected} is asked for.",
            "Give the folder of that model, or the backbone's kind that belongs to this one.",
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{path} is missing.", "A diffusers folder with transformer/ and vae/ is expected."
        ) from None
    except (ValueError, UnicodeDecodeError):
        raise TeasrError(f"{path} is damaged: it is not valid JSON.") from None
    if not isinstance(data, dict):
        raise TeasrError(f"{path} is damaged: a JSON object is expected.")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers model, in the order of their names.

    Raises:
        TeasrError: when a shard of the index is missing, or the index itself, or everything.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if not index.is_file():
        if single.is_file():
            return [single]
        shards = sorted(folder.glob("*.safetensors"))
        lost = f"the index of {shards[0].name} and others" if shards else "weights"
        raise TeasrError(
            f"{folder} lacks {lost}.", f"{SINGLE_FILE}, or {INDEX_FILE} and shards are expected."
        )
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise TeasrError(f"{index} is damaged: it maps no weights.")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise TeasrError(
            f"{folder} lacks {len(missing)} of {len(files)} shards, first {missing[0].name}.",
            "Copy or download it again.",
        )
    return files


def fingerprint(folder: Path) -> str:
    """A hash that tells one set of weights from another without reading all of it: over each
    file's name, size, header and the mebibyte at either end of its data."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            digest.update(file.read(start + 2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------- weights


def _on_meta(kind: str, config: Mapping[str, Any]) -> Any:
    """The transformer without values; what is computed and not stored has its values."""
    made = getattr(_diffusers(), KINDS[kind].transformer)
    known = inspect.signature(made.__init__).parameters
    with torch.device("meta"):
        transformer = made(**{name: value for name, value in config.items() if name in known})
    position = getattr(transformer, "pos_embed", None)
    if position is not None:  # plain attributes, in no file
        transformer.pos_embed = type(position)(
            theta=position.theta, axes_dim=position.axes_dim, scale_rope=position.scale_rope
        )
    return transformer


def _described(kind: Kind, folder: Path) -> tuple[Any, Any]:
    """Transformer and autoencoder of the model in `folder`, on meta.

    Raises:
        UsageError: when they are of other classes than `kind`'s.
    """
    spec = KINDS[kind]
    config = _check_class(folder / "transformer", spec.transformer)
    other = _check_class(folder / "vae", spec.autoencoder)
    with torch.device("meta"):
        autoencoder = getattr(_diffusers(), spec.autoencoder).from_config(other)
    return _on_meta(kind, config), autoencoder


def _check_tensors(
    transformer: nn.Module, files: list[Path], folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Refuse files whose tensors are not those of the configured network, or not of `dtype`."""
    found: dict[str, Place] = {}
    for path in files:
        found |= read_header(path)
    wanted = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    for what, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("also holds", found.keys() - wanted.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise TeasrError(
                f"{folder} {what} {min(names)}{more}: its config.json describes another network.",
                "Both must come from the same model.",
            )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise TeasrError(
                f"{folder}: {name} is {found[name].shape}, its config.json says {shape}.",
                "Both must come from the same model.",
            )
        if dtype is not None and found[name].dtype != dtype:
            raise UsageError(
                f"{folder}: {name} is stored in {_short(found[name].dtype)}; weights that are "
                f"streamed are computed with as they are, and the engine computes in "
                f"{_short(dtype)}.",
                "Set engine.precision to the files' type, or engine.offload_parameters to another "
                "value.",
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mapped(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file, as a read-only view of the mapped file."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        whole = torch.from_numpy(data)
    for name, place in read_header(path).items():
        view = whole[place.start : place.start + place.size]
        if place.start % place.dtype.itemsize:
            view = view.clone()
        yield name, view.view(place.dtype).view(place.shape)


def _assign(
    transformer: Any,
    files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    *,
    mapped: bool,
    blocks_on_meta: bool,
) -> None:
    """Give the parameters of `transformer` their values, but for those that stay on meta."""
    repeated = tuple(transformer._repeated_blocks)
    blocks = tuple(
        f"{name}." for name, part in transformer.named_modules() if type(part).__name__ in repeated
    )
    for path in files:
        tensors = {
            name: tensor.to(device, dtype, copy=not mapped)
            for name, tensor in _mapped(path)
            if not (blocks_on_meta and name.startswith(blocks))
        }
        transformer.load_state_dict(tensors, strict=False, assign=True)
    if blocks_on_meta:  # in their compute type, as those that have values
        for parameter in transformer.parameters():
            if parameter.is_meta:
                parameter.data = parameter.data.to(dtype)
    else:
        assert not any(p.is_meta for p in transformer.parameters())


def _to_8_bits(transformer: Any) -> None:
    """Hold the weights of the linear layers in the blocks in int8, one factor per output channel.

    One block at a time, so that both forms are never there for more than one. They become buffers:
    an engine broadcasts, casts and stores parameters as if they were plain tensors.
    """
    torchao = _torchao()
    repeated = tuple(transformer._repeated_blocks)
    transformer.requires_grad_(False)
    for block in transformer.modules():
        if type(block).__name__ in repeated:
            torchao.quantize_(block, torchao.Int8WeightOnlyConfig())
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    weight = layer.weight.detach()
                    del layer.weight
                    layer.register_buffer("weight", weight, persistent=False)


def _load_autoencoder(folder: Path, name: str, dtype: torch.dtype) -> Any:
    try:
        return getattr(_diffusers(), name).from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TeasrError(
            f"The autoencoder in {folder} cannot be read: {error}.", "Copy or download it again."
        ) from None


# --------------------------------------------------------------------------- the prompt


def empty_prompt(kind: Kind, folder: Path, width: int, cache: Path | None) -> Tensor:
    """(T, `width`) embedding of the empty prompt, as the kind's diffusers pipeline makes it.

    Args:
        folder: of the model. cache: where a computed one is kept; None: nowhere.
    """
    for path in _prompt_places(folder, cache):
        if path.is_file():
            return _read_prompt(path, width)
    _check_prompt_source(folder, cache)
    embedding = _compute_prompt(kind, folder).float().cpu().contiguous()
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise TeasrError(
            f"The text encoder in {folder} makes embeddings of {tuple(embedding.shape)}; the "
            f"transformer takes (tokens, {width}).",
            "Both must come from the same model.",
        )
    if cache is not None:
        path = _prompt_places(folder, cache)[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embedding": embedding}, path, metadata={"kind": kind})
    return embedding


def _check_prompt_source(folder: Path, cache: Path | None) -> None:
    """Refuse a folder in which the empty prompt's embedding can neither be read nor computed."""
    if any(path.is_file() for path in _prompt_places(folder, cache)):
        return
    if not (folder / "text_encoder").is_dir() or not (folder / "tokenizer").is_dir():
        raise TeasrError(
            f"{folder} holds neither {PROMPT_FILE} nor text_encoder/ and tokenizer/.",
            "Copy the two folders of the model there once; the embedding of the empty prompt is "
            "computed and kept, and they are needed no more.",
        )


def _prompt_places(folder: Path, cache: Path | None) -> list[Path]:
    """Where the embedding may be stored: beside the model, or in the cache by its fingerprint."""
    beside = [folder / PROMPT_FILE]
    if cache is None:
        return beside
    return [*beside, cache / f"{fingerprint(folder / 'transformer')}.{PROMPT_FILE}"]


def _read_prompt(path: Path, width: int) -> Tensor:
    try:
        embedding = load_file(path)["embedding"]
    except (SafetensorError, OSError) as error:
        raise TeasrError(f"{path} is damaged: {error}.", "Remove it.") from None
    except KeyError:
        raise TeasrError(f"{path} holds no tensor 'embedding'.", "Remove it.") from None
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise TeasrError(
            f"{path} holds {tuple(embedding.shape)}; an embedding (tokens, {width}) is expected.",
            "It belongs to another model; remove it.",
        )
    return embedding


@torch.no_grad()
def _compute_prompt(kind: Kind, folder: Path) -> Tensor:
    """By the pipeline's own code, with a text encoder that is let go again."""
    diffusers = _diffusers()
    try:
        import transformers
    except ImportError as error:
        raise TeasrError(f"transformers cannot be imported: {error}.", INSTALL) from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder / "tokenizer", local_files_only=True
        )
        made: Any = transformers.AutoModel
        if kind == "qwen-image":
            made = transformers.Qwen2_5_VLForConditionalGeneration
        encoder = made.from_pretrained(
            folder / "text_encoder", dtype="auto", local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TeasrError(
            f"The text encoder in {folder} cannot be read: {error}.", "Copy or download it again."
        ) from None
    parts = {"scheduler": None, "vae": None, "transformer": None}
    if kind == "qwen-image":
        pipeline = diffusers.QwenImagePipeline(text_encoder=encoder, tokenizer=tokenizer, **parts)
        embedding = pipeline.encode_prompt("", device=torch.device("cpu"))[0][0]
    else:
        pipeline = diffusers.ZImagePipeline(text_encoder=encoder, tokenizer=tokenizer, **parts)
        embedding = pipeline.encode_prompt(
            "", device=torch.device("cpu"), do_classifier_free_guidance=False
        )[0][0]
    del pipeline, encoder
    gc.collect()
    return embedding.clone()
