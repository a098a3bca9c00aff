"""`teasr distill`: a Ray Train job that runs the TEASR objective, recorded in MLflow.

A run lives in a folder of its own (`<home>/runs/NAME`): Ray Train's checkpoints, the finished
model. Running the same command again takes up an unfinished run from its last checkpoint, at the
pair after the last one that the checkpoint counted, and returns a finished one as it is.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.data import DataIterator, Dataset
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.console import progress_bar
from jobs.recipe import Recipe
from jobs.training import MODEL_FOLDER, PROGRESS_FILE, STATE_FILE, train
from pipelines.feed import FeedPosition, feed, split
from pipelines.runtime import ensure_ray, quiet_ray_data
from teasr import registry, tracking
from teasr.engine import prepare_offload
from teasr.errors import TeasrError, UsageError
from teasr.lpips import find_weights
from teasr.shards import absolute_url, content_hash, read_manifest, write_bytes

EXPERIMENT = "teasr"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Distilled:
    """A finished run.

    Attributes:
        run_id: MLflow run.
        model: folder with `model.safetensors` and `model.json`.
        position: steps, samples and seconds of training, and steps left out.
        reused: whether the run was already finished.
    """

    run_id: str
    model: Path
    position: dict[str, Any]
    reused: bool = False


def distill(recipe: Recipe, folder: Path) -> Distilled:
    """Train as `recipe` says, in `folder`.

    Raises:
        UsageError: no dataset, an unknown model to start from, too few CPUs or GPUs, or a folder
            that holds a run of another recipe; an offload that this machine cannot do.
        TeasrError: the MLflow server is away, or training failed.
    """
    if recipe.data is None:
        raise UsageError("The recipe has no data.", "Set data to a folder made by 'teasr ingest'.")
    manifest = read_manifest(recipe.data, kind="hr")
    init = None if recipe.init == "scratch" else registry.resolve(recipe.init)
    find_weights("vgg", recipe.lpips)  # a wrong path is told before anything starts
    identity = content_hash([recipe.model_dump(mode="json"), manifest.fingerprint])
    client = tracking.connect()
    ensure_ray()
    _check_resources(recipe)
    prepare_offload(recipe.engine)  # before workers start, who would all wait for a compiler

    folder.mkdir(parents=True, exist_ok=True)
    run = _run(client, folder, identity, recipe, manifest.fingerprint)
    model = folder / MODEL_FOLDER
    if run["finished"]:
        return Distilled(run["run_id"], model, run["position"], reused=True)

    # Workers have another working folder.
    lpips = recipe.lpips and str(Path(recipe.lpips).absolute())
    recipe = recipe.model_copy(update={"data": absolute_url(recipe.data), "lpips": lpips})
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "init": str(init) if init else None,
            "tracking_uri": client.tracking_uri,
            "run": run["run_id"],
            "folder": str(folder.absolute()),
        },
        scaling_config=ScalingConfig(
            num_workers=recipe.training.workers,
            use_gpu=recipe.training.gpu,
            resources_per_worker={
                "CPU": recipe.training.cpus_per_worker,
                **({"GPU": 1} if recipe.training.gpu else {}),
            },
        ),
        datasets={"train": _Feed(recipe, str(folder.absolute()))},
        dataset_config=_InOrder(),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder.absolute()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=recipe.training.max_failures),
        ),
    )
    with quiet_ray_data(), _live_line(folder, recipe):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            client.set_terminated(run["run_id"], "FAILED")
            raise _explain(error, folder) from None
    assert result.checkpoint is not None  # the loop ends with one
    with result.checkpoint.as_directory() as checkpoint:
        position = json.loads((Path(checkpoint) / STATE_FILE).read_text())
        del position["feed"]  # of no use once the run is over
        shutil.copytree(Path(checkpoint) / MODEL_FOLDER, model, dirs_exist_ok=True)
    _write_run(folder, {**run, "finished": True, "position": position})
    for name, value in position.items():
        client.log_metric(run["run_id"], f"training/{name}", value)
    return Distilled(run["run_id"], model, position)


@dataclass(frozen=True)
class _Feed:
    """Makes the feed anew when Ray Train (re)starts its workers, where the checkpoint stands."""

    recipe: Recipe
    folder: str

    def __call__(self) -> Dataset:
        recipe = self.recipe
        assert recipe.data is not None
        state = _last_state(Path(self.folder))
        position = FeedPosition.from_mapping(state["feed"], STATE_FILE) if state else None
        training = recipe.training
        return feed(
            recipe.data,
            recipe.feed,
            batch=training.batch,
            consumers=training.workers,
            position=position,
        )


class _InOrder(DataConfig):
    """Has Ray Train split the feed in order: its own configuration drops that of the dataset."""

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        output: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            for shares, share in zip(output, split(dataset, world_size)):
                shares[name] = share
        return output


def _last_state(folder: Path) -> dict[str, Any] | None:
    """State in the checkpoint that Ray Train goes on from; None when it has none.

    That is the last one in its list, not the newest folder: a run that was killed may have left a
    folder, whole or not, that it had not listed yet.
    """
    try:
        listed = json.loads((folder / "train" / "checkpoint_manager_snapshot.json").read_text())
        name = listed["latest_checkpoint_result"]["checkpoint_dir_name"]
    except (FileNotFoundError, TypeError):  # no run, or none of its checkpoints was listed
        return None
    state: dict[str, Any] = json.loads((folder / "train" / name / STATE_FILE).read_text())
    return state


def _check_resources(recipe: Recipe) -> None:
    """Ray would wait for ever for what a cluster does not have: say so instead."""
    training, have = recipe.training, ray.cluster_resources()
    cpus = training.workers * training.cpus_per_worker
    if have.get("CPU", 0) < cpus + 1:
        raise UsageError(
            f"training.workers={training.workers} with {training.cpus_per_worker} CPU(s) each "
            f"leave no CPU for the feed: this Ray has {have.get('CPU', 0):.0f}, {cpus + 1} are "
            "needed.",
            "Lower training.workers or training.cpus_per_worker, or add machines.",
        )
    if training.gpu and have.get("GPU", 0) < training.workers:
        raise UsageError(
            f"training.workers={training.workers} need as many GPUs; this Ray has "
            f"{have.get('GPU', 0):.0f}.",
            "Lower training.workers, or set training.gpu=false to train on CPUs.",
        )


def _run(
    client: Any, folder: Path, identity: str, recipe: Recipe, fingerprint: str
) -> dict[str, Any]:
    """The run of this folder: the one that was begun here, or a new one."""
    path = folder / RUN_FILE
    if path.is_file():
        run: dict[str, Any] = json.loads(path.read_text())
        if run["identity"] != identity:
            raise UsageError(
                f"{folder} holds a run of another recipe or of other data.",
                "Give another --name, or delete the folder.",
            )
        return run
    created = client.create_run(
        tracking.experiment_id(client, EXPERIMENT),
        run_name=folder.name,
        tags={
            "teasr.data": recipe.data or "",
            "teasr.data_fingerprint": fingerprint,
            "teasr.commit": tracking.git_commit() or "",
            "teasr.lpips": "present" if find_weights("vgg", recipe.lpips) else "missing",
        },
    )
    for name, value in _flat(recipe.model_dump(mode="json")):
        client.log_param(created.info.run_id, name, value)
    client.log_dict(created.info.run_id, recipe.model_dump(mode="json"), "recipe.yaml")
    run = {"run_id": created.info.run_id, "identity": identity, "finished": False}
    _write_run(folder, run)
    return run


def _write_run(folder: Path, run: dict[str, Any]) -> None:
    write_bytes(str((folder / RUN_FILE).absolute()), (json.dumps(run, indent=1) + "\n").encode())


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


@contextmanager
def _live_line(folder: Path, recipe: Recipe) -> Iterator[None]:
    """A progress bar from what rank 0 writes beside the run."""
    path = folder / PROGRESS_FILE
    stop = threading.Event()

    def follow() -> None:
        with progress_bar("distill", total=1.0) as update:
            while not stop.wait(0.5):
                try:
                    document = json.loads(path.read_text())
                except (OSError, ValueError):
                    continue
                values = document["values"]
                update(
                    document["progress"],
                    f"step {document['steps']}, {values['samples_per_second']:.1f} pairs/s, "
                    f"loss {values['loss/total']:.4f}",
                )

    path.unlink(missing_ok=True)
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _explain(error: ray.train.TrainingFailedError, folder: Path) -> TeasrError:
    """The user's error if a worker met one; else a short word and the place of the traceback."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        if isinstance(failure, TeasrError):
            return failure
    log = folder / f"failure-{time.strftime('%Y%m%d-%H%M%S')}.log"
    log.write_text(str(error))
    last = str(error).strip().splitlines()[-1].strip()
    return TeasrError(
        f"Training failed: {last}",
        f"The traceback is in {log}. The same command resumes from the last checkpoint.",
    )
