"""From a recipe to what trains: the network, the codec of what it works on, and the engine.

A native network and a pretrained one differ here and nowhere else in training: how they are made,
what they start from, and which engine holds them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.recipe import Recipe
from teasr.backbones import (
    Backbone,
    Codec,
    DiTSettings,
    DualBranchDiT,
    Pixels,
    PretrainedSettings,
    check_pretrained,
    load_adapters,
    load_model,
    load_pretrained,
    read_adapters,
)
from teasr.backbones.folder import NATIVE, read_description
from teasr.backbones.pretrained import fingerprint, prepare_pretrained
from teasr.dmd import TeacherStudent
from teasr.engine import Engine, give_back_freed_memory
from teasr.errors import TeasrError, UsageError
from teasr.streaming import StreamedBase, StreamedEngine


@dataclass(frozen=True)
class Trainee:
    """What a worker trains.

    Attributes:
        network: as `save_model` takes it; its parameters may be partitioned.
        codec: of what the network works on, on the engine's device and no part of the engine.
        engine: trains the network.
    """

    network: Backbone
    codec: Codec
    engine: Engine | StreamedEngine


# --------------------------------------------------------------------------- before workers start


def check_network(recipe: Recipe, init: Path | None) -> None:
    """Find what is wrong with a recipe's network and what it starts from, without loading either.

    Args:
        init: folder of the model to start from.

    Raises:
        UsageError, TeasrError: weights are missing, damaged or of another network; `feed.crop` does
            not divide into tokens; the model to start from has another shape.
    """
    backbone = recipe.backbone
    if not isinstance(backbone, PretrainedSettings):
        _check_start(recipe, init)
        return
    streamed = recipe.engine.dtype if recipe.engine.offload_parameters == "stream" else None
    try:
        multiple = check_pretrained(backbone, cache=_cache(), streamed=streamed)
    except TeasrError as error:
        if not Path(backbone.source).expanduser().is_dir():
            raise
        raise UsageError(error.message, error.hint) from None  # the folder is what was given
    if recipe.feed.crop % multiple:
        raise UsageError(
            f"feed.crop is {recipe.feed.crop}; a token of {backbone.source} spans {multiple} "
            "pixels.",
            f"Set feed.crop to a multiple of {multiple}.",
        )
    _check_adapters(recipe, backbone, init)


def absolute_source(recipe: Recipe) -> Recipe:
    """`recipe` with the folder of its pretrained network as an absolute path: workers have another
    working folder."""
    backbone = recipe.backbone
    if not isinstance(backbone, PretrainedSettings):
        return recipe
    folder = Path(backbone.source).expanduser()
    if not folder.is_dir():
        return recipe
    backbone = backbone.model_copy(update={"source": str(folder.absolute())})
    return recipe.model_copy(update={"backbone": backbone})


def _check_start(recipe: Recipe, init: Path | None) -> None:
    if init is None:
        return
    description = read_description(init)
    if description.backbone != NATIVE:
        raise UsageError(
            f"init: '{recipe.init}' was trained on a {description.backbone}, and the recipe's "
            "backbone is a native network.",
            "Set backbone to the kind and source it was trained on, or init to another model.",
        )
    found = DiTSettings.from_mapping(description.settings, str(init))
    if found != recipe.backbone_settings:
        raise TeasrError(
            f"The weights of '{recipe.init}' are of another shape than the recipe's backbone.",
            f"Set backbone to {found.model_dump()}, or init to another model.",
        )


def _check_adapters(recipe: Recipe, backbone: PretrainedSettings, init: Path | None) -> None:
    if init is None:
        return
    description = read_description(init)
    if description.backbone != backbone.kind:
        raise UsageError(
            f"init: '{recipe.init}' is a {description.backbone}, and the recipe's backbone a "
            f"{backbone.kind}.",
            "Set init to scratch, or to a model that was trained on this backbone.",
        )
    adapters = read_adapters(init)
    alpha = backbone.rank if backbone.alpha is None else backbone.alpha
    if (adapters.rank, adapters.alpha) != (backbone.rank, alpha):
        raise UsageError(
            f"init: the adapters of '{recipe.init}' have rank {adapters.rank} and alpha "
            f"{adapters.alpha:g}; the recipe's rank {backbone.rank} and alpha {alpha:g}.",
            "Set backbone.rank and backbone.alpha to those of the model.",
        )
    folder, base = Path(backbone.source).expanduser(), adapters.base
    if folder.is_dir() and base and base.fingerprint != fingerprint(folder / "transformer"):
        raise TeasrError(
            f"init: '{recipe.init}' was trained on other weights than those in {folder}.",
            f"It belongs to {base.source}.",
        )


# --------------------------------------------------------------------------- in a worker


def build(recipe: Recipe, init: Path | None) -> Trainee:
    """Network, codec and engine of `recipe`; collective.

    Must be called where `torch.distributed` is initialised, or RANK, WORLD_SIZE and MASTER_ADDR are
    set.

    Args:
        init: folder of the model to start from.

    Raises:
        UsageError, TeasrError: see `check_network`, `Engine` and `StreamedBase`.
    """
    torch.manual_seed(recipe.training.seed)
    if isinstance(recipe.backbone, PretrainedSettings):
        return _pretrained(recipe, recipe.backbone, init)
    _check_start(recipe, init)
    network: Backbone = DualBranchDiT(recipe.backbone_settings)
    if init is not None:
        network = load_model(init, torch.float32).network.train()
    trained = TeacherStudent(network) if recipe.objective.teacher else network
    engine = Engine(trained, recipe.engine, recipe.training.batch)
    return Trainee(network, Pixels(network.scale), engine)


def _pretrained(recipe: Recipe, backbone: PretrainedSettings, init: Path | None) -> Trainee:
    settings = recipe.engine
    streamed = settings.offload_parameters == "stream"
    gpu = torch.cuda.is_available()
    if not gpu:
        give_back_freed_memory()
    cache = _cache()
    with _in_turn(cache):
        prepare_pretrained(backbone, cache)
    # DeepSpeed has rank 0 overwrite what it does not partition, on a CPU in place.
    overwritten = settings.zero_stage < 3 and recipe.training.workers > 1 and not gpu
    made = load_pretrained(
        **backbone.model_dump(),
        dtype=settings.dtype,
        cache=cache,
        mapped=not overwritten,
        blocks_on_meta=streamed,
    )
    if init is not None:
        load_adapters(made.backbone, init)
    engine: Engine | StreamedEngine
    if streamed:
        base = StreamedBase(
            made.backbone,
            made.weights,
            made.backbone.blocks,
            device="cuda" if gpu else "cpu",
            names=made.backbone.stored_name,
            keep_bytes=int(settings.stream_cache_gb * 1e9),
        )
        engine = StreamedEngine(base, settings)
    else:
        engine = Engine(made.backbone, settings, recipe.training.batch)
    return Trainee(made.backbone, made.codec.to(engine.device), engine)


def _cache() -> Path:
    """Where a machine keeps the prompt's embedding."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "teasr"


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Inside is one process of this machine at a time: what the first downloads and computes, the
    others find."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("w")
    except OSError as error:
        raise TeasrError(
            f"Cannot write to {folder}: {error.strerror}.",
            "Set XDG_CACHE_HOME to a folder where files can be kept.",
        ) from None
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
