"""The training loop that every Ray Train worker runs.

One step is one fenced block; logging, checkpoints and the final export are others. Whatever is
random comes from (seed, samples consumed, rank), so a run taken up from a checkpoint draws what it
would have drawn.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from torch import Tensor

from jobs.recipe import Recipe, TrainingSettings
from pipelines.feed import FeedPosition, LockStep, block_size
from teasr.backbones import Backbone, DualBranchDiT, load_backbone, save_backbone
from teasr.dmd import TeacherStudent, judges, student_weights
from teasr.engine import Engine
from teasr.errors import TeasrError
from teasr.lpips import Lpips, find_weights
from teasr.objective import Objective
from teasr.shards import read_manifest, write_bytes
from teasr.tracking import RunLogger, connect

log = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
MODEL_FOLDER = "model"
STATE_FILE = "teasr.json"


@dataclass
class Position:
    """How far a run is; the readable part of a checkpoint (`teasr.json`)."""

    steps: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Pairs consumed, over all workers."""
    seconds: float = 0.0
    """Training time spent, over interruptions."""
    bad_steps: int = 0
    """Steps left out because a loss was not finite."""
    peak_mb: float = 0.0
    """Most memory that rank 0 has had: allocated on a GPU, else resident in its process."""

    def share_of(self, training: TrainingSettings) -> float:
        """Share of the run that is done, in [0, 1]."""
        if training.steps is not None:
            return min(self.steps / training.steps, 1.0)
        assert training.minutes is not None
        return min(self.seconds / (60 * training.minutes), 1.0)


def train(config: Mapping[str, Any]) -> None:
    """Body of a worker; `config` holds `recipe`, `init` (folder or None), `tracking_uri`, `run`
    and `folder`."""
    recipe = Recipe.from_mapping(config["recipe"], "recipe")
    training = recipe.training
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    _set_threads(training, context.get_local_world_size())

    network: Backbone = _network(recipe, config["init"])
    if recipe.objective.teacher:
        network = TeacherStudent(network)
    engine = Engine(network, recipe.engine, training.batch)
    objective = Objective(recipe.objective, _lpips(recipe, engine.device, engine.settings.dtype))
    agree = partial(_agree, workers=workers, device=engine.device)
    others: dict[str, Any] = {
        "target_network": engine.averaged_network if recipe.engine.ema_decay > 0 else None,
        **(judges(engine.network) if recipe.objective.teacher else {}),
    }
    position = Position()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            position = Position(**engine.load(Path(folder)))

    lock_step = LockStep(
        start=position.samples,
        rank=rank,
        consumers=workers,
        batch=training.batch,
        rows=block_size(training.batch, recipe.feed, consumers=workers, number=position.samples),
    )

    os.environ["MLFLOW_TRACKING_URI"] = config["tracking_uri"]
    logger = RunLogger(connect(), config["run"]) if rank == 0 else None
    window = _Window()
    saved = time.monotonic()
    batches = ray.train.get_dataset_shard("train").iter_torch_batches(
        batch_size=training.batch, prefetch_batches=4, drop_last=True
    )
    before, started = position.seconds, None  # the clock starts with the first batch
    waiting = time.monotonic()
    for batch in batches:
        if started is None:
            waiting = started = time.monotonic()
        window.waited += time.monotonic() - waiting
        progress = agree(position.share_of(training))
        if progress >= 1:
            break

        # ---- one step -------------------------------------------------------------------------
        lock_step.check(batch["number"])
        hr, lr = (_to_network(batch[name], engine.device) for name in ("hr", "lr"))
        generator = _generator(training.seed, position.samples, rank)
        losses = objective(engine.network, hr, lr, generator, progress=progress, **others)
        norm = None
        if agree(float(losses.is_finite())) == 1:
            norm = engine.step(losses.total, progress)
            position.steps = engine.steps
            window.add(losses.terms, losses.total, norm, training.batch * workers)
        else:
            position.bad_steps += 1
            _check_bad_steps(position, losses.not_finite(), training)
        position.samples += training.batch * workers
        # ---------------------------------------------------------------------------------------

        now = time.monotonic()
        position.seconds = before + now - started
        position.peak_mb = max(position.peak_mb, _peak_memory(engine.device))
        if logger and norm is not None and position.steps % training.log_every == 0:
            values = window.take()
            values["learning_rate"] = engine.settings.learning_rate_at(progress)
            values["memory/peak_mb"] = position.peak_mb
            logger.log(position.steps, values)
            _write_progress(Path(config["folder"]), position, progress, values)
        if agree(float(now - saved > 60 * training.checkpoint_minutes)) == 1:
            _report(engine, position, recipe)
            saved = time.monotonic()
        waiting = time.monotonic()

    _report(engine, position, recipe)
    if logger and (lost := logger.close()):
        log.warning("Run %s: %s", config["run"], lost)


def _network(recipe: Recipe, init: str | None) -> DualBranchDiT:
    torch.manual_seed(recipe.training.seed)
    if init is None:
        return DualBranchDiT(recipe.backbone_settings)
    network = load_backbone(Path(init), torch.float32).train()
    if network.settings != recipe.backbone_settings:
        raise TeasrError(
            f"The weights of '{recipe.init}' are of another shape than the recipe's backbone.",
            f"Set backbone to {network.settings.model_dump()}, or init to another model.",
        )
    return network


def _lpips(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Lpips | None:
    path = find_weights("vgg", recipe.lpips)
    if path is None or recipe.objective.pixel_lpips == 0:
        return None
    return Lpips.load(path, dtype).to(device)


def _set_threads(training: TrainingSettings, local_workers: int) -> None:
    # One core is left to the feed: matrix products that wait for a core are slower than on fewer.
    free = max(1, ((os.cpu_count() or 1) - 1) // local_workers)
    torch.set_num_threads(training.threads or free)


def _peak_memory(device: torch.device) -> float:
    """Most megabytes so far, see `Position.peak_mb`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _to_network(pictures: Tensor, device: torch.device) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return pictures.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _generator(seed: int, samples: int, rank: int) -> torch.Generator:
    words = np.random.SeedSequence((seed, samples, rank)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)


def _agree(value: float, workers: int, device: torch.device) -> float:
    """The smallest value over all workers: one decision, however their clocks differ."""
    if workers == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN)
    return float(tensor)


def _check_bad_steps(position: Position, term: str, training: TrainingSettings) -> None:
    total = position.steps + position.bad_steps
    if total >= 20 and position.bad_steps > training.max_bad_steps * total:
        raise TeasrError(
            f"The run diverges: {position.bad_steps} of {total} steps had a loss that is not "
            f"finite, last the {term} term.",
            "Lower engine.learning_rate, or start from other weights.",
        )


class _Window:
    """Means of what happened since the last record."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._reset()

    def _reset(self) -> None:
        self._began = time.monotonic()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._samples = 0
        self.waited = 0.0

    def add(
        self, terms: Mapping[str, Tensor], total: Tensor, norm: float | None, samples: int
    ) -> None:
        values = {f"loss/{name}": float(value.mean()) for name, value in terms.items()}
        values["loss/total"] = float(total.detach())
        if norm is not None:
            values["gradient_norm"] = norm
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._samples += samples

    def take(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._began, 1e-9)
        values = {name: total / self._counts[name] for name, total in self._sums.items()}
        values["samples_per_second"] = self._samples / seconds
        values["share_waiting_for_data"] = self.waited / seconds
        self._reset()
        return values


def _report(engine: Engine, position: Position, recipe: Recipe) -> None:
    """Hand Ray Train a checkpoint: engine state, readable position, and the model as it stands."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        engine.save(folder, vars(position))
        weights = engine.state_dict()
        if recipe.objective.teacher:
            weights = student_weights(weights)
        if ray.train.get_context().get_world_rank() == 0:
            assert recipe.data is not None
            manifest = read_manifest(recipe.data, kind="hr")
            feed = FeedPosition.after(position.samples, manifest, recipe.feed)
            state = {**vars(position), "feed": feed.model_dump()}
            (folder / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
            description = {"recipe": recipe.model_dump(mode="json"), **vars(position)}
            save_backbone(
                recipe.backbone_settings, weights, folder / MODEL_FOLDER, training=description
            )
        ray.train.report(
            {"steps": position.steps}, checkpoint=ray.train.Checkpoint.from_directory(temporary)
        )


def _write_progress(
    folder: Path, position: Position, progress: float, values: Mapping[str, float]
) -> None:
    """For the live line in the terminal that started the run, when it shares this disk."""
    if folder.is_dir():
        document = {"progress": progress, **vars(position), "values": dict(values)}
        write_bytes(str(folder / PROGRESS_FILE), json.dumps(document).encode())
