"""The training loop that every Ray Train worker runs.

One step is one fenced block; logging, checkpoints and the final export are others. Whatever is
random comes from (seed, samples consumed, rank), so a run taken up from a checkpoint draws what it
would have drawn.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from torch import Tensor

from jobs.networks import Trainee, build
from jobs.preemption import StopFile, leaving
from jobs.previews import Pair, Preview, preview
from jobs.recipe import Recipe, TrainingSettings
from jobs.record import (
    LOSSES_FILE,
    PROGRESS_FILE,
    STATE_FILE,
    BestModels,
    Growth,
    LossFile,
    read_losses,
)
from jobs.run_feed import Ahead, batches_of_worker
from jobs.sweeps import SweepCounter
from jobs.watchdog import Watchdog
from pipelines import telemetry
from pipelines.feed import FeedPosition, LockStep, block_size
from teasr.backbones import save_model
from teasr.dmd import judges, student_weights
from teasr.errors import TeasrError
from teasr.lpips import Lpips, find_weights
from teasr.machine import peak_memory_mb
from teasr.objective import MicroBatch, Objective
from teasr.shards import read_manifest, write_bytes
from teasr.tracking import RunLogger, connect

log = logging.getLogger(__name__)

MODEL_FOLDER = "model"
ASK_SECONDS = 5.0
"""Between two questions to Ray whether a machine is going away."""


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


def train(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Body of a worker.

    Args:
        config: `recipe`, `init` (folder or None), `tracking_uri`, `run`, `folder`, and `pairs` to
            preview, none for no previews.

    Returns:
        Nothing; or what was wrong with a run that diverges, `problem` and `good_step`. It is no
        error: Ray would restart the workers, which would come to the same end.
    """
    recipe = Recipe.from_mapping(config["recipe"], "recipe")
    training = recipe.training
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    folder = Path(config["folder"])
    _set_threads(training, context.get_local_world_size())

    batches = iter(Ahead(batches_of_worker(training.batch)))  # starts while the network is made
    trainee = build(recipe, config["init"] and Path(config["init"]))
    engine, codec = trainee.engine, trainee.codec
    lpips = _lpips(recipe, engine.device, engine.settings.dtype)
    objective = Objective(recipe.objective, lpips, codec.decode)
    others: dict[str, Any] = {
        "target_network": engine.averaged_network if recipe.engine.ema_decay > 0 else None,
        **(judges(engine.network) if recipe.objective.teacher else {}),
    }
    position = Position()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            position = Position(**engine.load(Path(saved)))

    lock_step = LockStep(
        start=position.samples,
        rank=rank,
        consumers=workers,
        batch=training.batch,
        rows=block_size(training.batch, recipe.feed, consumers=workers, number=position.samples),
    )
    together = _Together(workers, engine.device)
    decide = _Decisions(training, folder, rank, together)
    record = _Record(config, training, position) if rank == 0 else None
    model = _Model(trainee, recipe, folder, together)
    window, sweeps = _Window(), SweepCounter(engine.network)
    watchdog = Watchdog(training.max_silence_minutes, folder / f"hung-{rank}.txt")
    # The clock starts with the first batch, and stands still for previews.
    before, started = position.seconds, None
    between = False  # two micro-batches of one optimizer step
    problem: dict[str, Any] | None = None
    orders = decide(position.share_of(training))
    while not orders.over:
        waiting = time.monotonic()
        batch = next(batches)
        began = time.monotonic()
        if started is None:
            window.leave_out(began - waiting)
            waiting = started = began
        progress = orders.progress

        # ---- one step -------------------------------------------------------------------------
        lock_step.check(batch["number"])
        hr, lr = (_to_network(batch[name], engine.device) for name in ("hr", "lr"))
        generator = _generator(training.seed, position.samples, rank)
        x, condition = codec.encode(hr), codec.condition(lr)
        part = MicroBatch(engine.accumulated, recipe.engine.gradient_accumulation, engine.steps)
        losses = objective(
            engine.network,
            x,
            condition,
            generator,
            pictures=hr,
            progress=progress,
            micro_batch=part,
            **others,
        )
        figures = together.mean({"total": losses.total, **losses.terms})
        wrong = next((name for name, value in figures.items() if not math.isfinite(value)), None)
        norm = None
        if wrong is None:
            norm = engine.step(losses.total, progress)
            position.steps = engine.steps
        else:
            position.bad_steps += 1
        first, position.samples = position.samples, position.samples + training.batch * workers
        # ---------------------------------------------------------------------------------------

        watchdog.beat()
        now = time.monotonic()
        position.seconds = before + now - started
        position.peak_mb = max(position.peak_mb, peak_memory_mb(engine.device))
        if record:
            problem = record.write(first, position, figures, norm, wrong)
        if wrong is not None:
            problem = _too_many_bad_steps(position, wrong, training)
        else:
            between = norm is None
            optimizer = engine.stopwatch.seconds["optimizer"]
            window.add(
                {f"loss/{name}": value for name, value in figures.items()}
                | ({} if norm is None else {"gradient_norm": norm}),
                samples=training.batch * workers,
                sweeps=sweeps.take(),
                waiting_for_data=began - waiting,
                in_sweeps=now - began - optimizer,
                in_optimizer=optimizer,
            )
        if record and norm is not None and position.steps % training.log_every == 0:
            values = window.take() | _memory(engine.device)
            values["learning_rate"] = engine.settings.learning_rate_at(progress)
            values["memory/peak_mb"] = position.peak_mb
            record.log(position, progress, values)
        if between:
            continue  # no checkpoint could hold the gradients that are summed up so far
        orders = decide(position.share_of(training), problem is not None)
        if config["pairs"] and (orders.finished or (orders.preview and not orders.over)):
            seconds, preview = model.preview(config["pairs"], position)
            started += seconds
            window.leave_out(seconds)
            if record:
                record.show(position, preview)
        if orders.save and not orders.over:
            _report(model, position, record)
            decide.has_saved()

    watchdog.stop()
    if not orders.diverged:
        _report(model, position, record)
    if record:
        record.close()
    if orders.leave and not (orders.finished or orders.stop or orders.diverged):
        # Until Ray has it in its list, a checkpoint of workers that fail is lost.
        ray.train.get_all_reported_checkpoints()
        raise TeasrError(
            "The machine of a worker is going away (SIGTERM).",
            "The same command resumes from the last checkpoint.",
        )
    return problem if orders.diverged else None


# ---------------------------------------------------------------- what the workers do together


@dataclass(frozen=True)
class _Orders:
    """What all workers do next."""

    progress: float
    """Share of the run that is done, the smallest over all workers: their clocks differ."""
    stop: bool
    """The command was asked to end the run."""
    leave: bool
    """A worker was asked to go: all start again elsewhere."""
    diverged: bool
    save: bool
    preview: bool

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    @property
    def over(self) -> bool:
        return self.finished or self.stop or self.leave or self.diverged


class _Decisions:
    """Comes to the same orders on all workers."""

    def __init__(
        self, training: TrainingSettings, folder: Path, rank: int, together: _Together
    ) -> None:
        self._training = training
        self._stop = StopFile(folder) if rank == 0 else None
        self._together = together
        self._warned = False
        self._saved = self._previewed = self._asked = time.monotonic()

    def __call__(self, progress: float, diverged: bool = False) -> _Orders:
        """Orders after a step.

        Args:
            progress: share of the run that is done, by this worker's clock.
            diverged: whether this worker wants the run to end.
        """
        now, interval = time.monotonic(), self._training.minutes_between_previews
        values = self._together.largest(
            [
                -progress,
                self._stop is not None and self._stop.asked(),
                leaving(),
                diverged,
                now - self._saved > 60 * self._training.checkpoint_minutes,
                interval > 0 and now - self._previewed > 60 * interval,
                now - self._asked > ASK_SECONDS,
            ]
        )
        stop, leave, ended, save, preview, ask = (value > 0 for value in values[1:])
        if preview:
            self._previewed = now
        if ask:  # a call that all workers make together, so not in every step
            self._asked = now
            if not self._warned and ray.train.get_preemption_info() is not None:
                self._warned = save = True  # once: Ray ends the workers when their time is up
        return _Orders(-values[0], stop, leave, ended, save, preview)

    def has_saved(self) -> None:
        """A checkpoint was written."""
        self._saved = time.monotonic()


class _Together:
    """Figures of all workers."""

    def __init__(self, workers: int, device: torch.device) -> None:
        self._workers = workers
        self._device = device

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all workers."""
        if self._workers == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean of each, over its elements and all workers; not finite when one element is."""
        means = torch.stack([value.detach().double().mean() for value in values.values()])
        if self._workers > 1:
            torch.distributed.all_reduce(means)
            means /= self._workers
        return dict(zip(values, means.tolist()))


def _lpips(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Lpips | None:
    path = find_weights("vgg", recipe.lpips)
    if path is None or recipe.objective.pixel_lpips == 0:
        return None
    return Lpips.load(path, dtype).to(device)


def _set_threads(training: TrainingSettings, local_workers: int) -> None:
    # One core is left to the feed: matrix products that wait for a core are slower than on fewer.
    free = max(1, ((os.cpu_count() or 1) - 1) // local_workers)
    torch.set_num_threads(training.threads or free)


def _to_network(pictures: Tensor, device: torch.device) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return pictures.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _generator(seed: int, samples: int, rank: int) -> torch.Generator:
    words = np.random.SeedSequence((seed, samples, rank)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)


def _memory(device: torch.device) -> dict[str, float]:
    """Megabytes in use now, by metric: of the worker's process, and of its GPU."""
    values = {}
    pages = Path("/proc/self/statm")
    if pages.is_file():
        resident = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        values["memory/resident_mb"] = resident / 1e6
    if device.type == "cuda":
        values["memory/gpu_mb"] = torch.cuda.memory_allocated(device) / 1e6
    return values


def _too_many_bad_steps(
    position: Position, term: str, training: TrainingSettings
) -> dict[str, Any] | None:
    total = position.steps + position.bad_steps
    if total < 20 or position.bad_steps <= training.max_bad_steps * total:
        return None
    return {
        "problem": f"{position.bad_steps} of {total} steps had a loss that is not finite, last "
        f"the {term} term",
        "good_step": position.steps,
    }


# ---------------------------------------------------------------- what is recorded


class _Window:
    """Means of what happened since the last record."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._began = time.monotonic()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._samples = self._sweeps = 0
        self._seconds: dict[str, float] = {}

    def add(self, values: Mapping[str, float], samples: int, sweeps: int, **seconds: float) -> None:
        """Count a step; `seconds` that it spent, by what on."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        for name, spent in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + spent
        self._samples += samples
        self._sweeps += sweeps

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self._began += seconds

    def take(self) -> dict[str, float]:
        """The means, rates and shares of the time; begins anew."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        values = {name: total / self._counts[name] for name, total in self._sums.items()}
        values["samples_per_second"] = self._samples / seconds
        values["sweeps_per_second"] = self._sweeps / seconds
        values |= {f"share_{name}": spent / seconds for name, spent in self._seconds.items()}
        self._reset()
        return values


class _Record:
    """What rank 0 writes down: each step beside the run, means and pictures to MLflow."""

    def __init__(
        self, config: Mapping[str, Any], training: TrainingSettings, position: Position
    ) -> None:
        os.environ["MLFLOW_TRACKING_URI"] = config["tracking_uri"]
        self._run = config["run"]
        self._folder = Path(config["folder"])
        self._logger = RunLogger(connect(), self._run)
        self._losses = LossFile(self._folder, position.samples)
        self._growth = Growth(training.max_loss_growth)
        self._limit = training.max_loss_growth
        for line in read_losses(self._folder / LOSSES_FILE):
            self._growth.add(line["step"], line.get("terms", {}))

    def write(
        self,
        first: int,
        position: Position,
        figures: Mapping[str, float],
        norm: float | None,
        wrong: str | None,
    ) -> dict[str, Any] | None:
        """Note one step, of the pairs from `first` on; what is wrong with the run, if anything."""
        telemetry.show(telemetry.STEP, position.steps, run=self._folder.name)
        telemetry.show(telemetry.BAD_STEPS, position.bad_steps, run=self._folder.name)
        line: dict[str, Any] = {"step": position.steps, "samples": [first, position.samples]}
        if wrong is not None:
            self._losses.write({**line, "not_finite": wrong})
            return None
        total, *_ = figures.values()
        terms = {name: value for name, value in figures.items() if name != "total"}
        self._losses.write({**line, "total": total, "terms": terms, "gradient_norm": norm})
        grown = self._growth.add(position.steps, terms)
        if grown is None:
            return None
        term, step = grown
        return {
            "problem": f"the {term} term has grown to more than {self._limit:g} times the lowest "
            f"mean that it had, at step {step} (training.max_loss_growth)",
            "good_step": step,
        }

    def log(self, position: Position, progress: float, values: Mapping[str, float]) -> None:
        """Means since the last record."""
        self._logger.log(position.steps, values)
        _write_progress(self._folder, position, progress, values)
        telemetry.training(self._folder.name, progress, values)

    def show(self, position: Position, preview: Preview) -> None:
        """A preview."""
        values = {
            "preview/psnr_y" + (f"_{count}_steps" if count > 1 else ""): value
            for count, value in preview.psnr_y.items()
        }
        self._logger.log(position.steps, values)
        self._logger.log_image(f"previews/step-{position.steps:06d}.jpg", preview.sheet)

    def sync(self) -> None:
        """A checkpoint counts on what was written so far."""
        self._losses.sync()

    def close(self) -> None:
        """Wait for what MLflow has not taken yet."""
        if lost := self._logger.close():
            log.warning("Run %s: %s", self._run, lost)


# ---------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class _Model:
    """The network under training, to look at and to keep; all methods are collective."""

    trainee: Trainee
    recipe: Recipe
    folder: Path
    together: _Together

    def preview(self, pairs: Sequence[Pair], position: Position) -> tuple[float, Preview]:
        """A preview, and the seconds it took; the model is kept if it is among the best."""
        began = time.monotonic()
        made = preview(self.trainee, pairs, self.recipe.evaluation.steps)
        best, keep = BestModels(self.folder), self.recipe.training.keep_best
        # Rank 0 decides: rounding may differ between machines.
        mine = self._is_first and best.wants(made.psnr_y[1], keep)
        if self.together.largest([mine])[0]:
            weights = self.weights()
            if self._is_first:
                with best.place(position.steps, made.psnr_y[1], keep) as folder:
                    self.write(weights, folder, position)
        return time.monotonic() - began, made

    def weights(self) -> dict[str, Tensor]:
        """What was trained, whole, the average of it if there is one."""
        weights = self.trainee.engine.state_dict()
        return student_weights(weights) if self.recipe.objective.teacher else weights

    def write(self, weights: Mapping[str, Tensor], folder: Path, position: Position) -> None:
        """The model as it stands to `folder`; not collective."""
        description = {"recipe": self.recipe.model_dump(mode="json"), **vars(position)}
        save_model(self.trainee.network, weights, folder, training=description)

    @property
    def _is_first(self) -> bool:
        return bool(ray.train.get_context().get_world_rank() == 0)


def _report(model: _Model, position: Position, record: _Record | None) -> None:
    """Hand Ray Train a checkpoint: engine state, readable position, and the model as it stands."""
    recipe = model.recipe
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.trainee.engine.save(folder, vars(position))
        weights = model.weights()
        if record:
            record.sync()
            assert recipe.data is not None
            manifest = read_manifest(recipe.data, kind="hr")
            feed = FeedPosition.after(position.samples, manifest, recipe.feed)
            state = {**vars(position), "feed": feed.model_dump()}
            (folder / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
            model.write(weights, folder / MODEL_FOLDER, position)
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
