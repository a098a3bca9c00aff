"""`teasr distill`: a Ray Train job that runs the TEASR objective, recorded in MLflow.

A run lives in a folder of its own (`<home>/runs/NAME`): Ray Train's checkpoints, the losses of each
step, the best models by their previews, the finished model. Running the same command again takes up
an unfinished run from its last checkpoint, at the pair after the last one that the checkpoint
counted, and returns a finished one as it is. Where and how long it runs may change meanwhile.
"""

from __future__ import annotations

import json
import logging
import platform
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.addresses import UseRaysAddress
from jobs.console import progress_bar
from jobs.networks import absolute_source, check_network
from jobs.plan import check_fits, this_machine
from jobs.preemption import HearSigterm, Preempted, StopRequest
from jobs.previews import preview_pairs
from jobs.recipe import Recipe, TrainingSettings
from jobs.record import BEST_FOLDER, PROGRESS_FILE, RUN_FILE, STATE_FILE, BestModels, seconds_left
from jobs.reservations import NoteReservation, give_back
from jobs.run_feed import InOrder, RunFeed, last_state
from jobs.training import MODEL_FOLDER, Position, train
from pipelines.feed import bytes_in_flight
from pipelines.runtime import (
    capacity,
    ensure_ray,
    nodes_for,
    quiet_ray_data,
    room_for,
    spilled_bytes,
)
from teasr import registry, tracking
from teasr.checkpoints import Layout
from teasr.engine import prepare_offload
from teasr.errors import TeasrError, UsageError
from teasr.lpips import find_weights
from teasr.shards import absolute_url, content_hash, read_manifest, write_bytes

log = logging.getLogger(__name__)

EXPERIMENT = "teasr"


@dataclass(frozen=True)
class Distilled:
    """A finished run.

    Attributes:
        run_id: MLflow run.
        model: folder with `model.safetensors` and `model.json`.
        position: steps, samples and seconds of training, and steps left out.
        best: the model whose preview had the highest PSNR, as `step`, `psnr_y` in dB and `model`, a
            folder; None when there were no previews. The run's own model is its last.
        reused: whether the run was already finished.
        spilled: bytes that Ray moved from object stores to disks meanwhile, of other jobs too.
    """

    run_id: str
    model: Path
    position: dict[str, Any]
    best: dict[str, Any] | None = None
    reused: bool = False
    spilled: int = 0


def distill(recipe: Recipe, folder: Path, parent: str | None = None) -> Distilled:
    """Train as `recipe` says, in `folder`.

    Args:
        parent: model to start a new run from, in place of the recipe's `init`. A run that was begun
            goes on from what it began with.

    Raises:
        UsageError: no dataset, an unknown model to start from, too few CPUs or GPUs, or a folder
            that holds a run of another recipe; an offload that this machine cannot do.
        Preempted: SIGTERM or SIGINT came, and the run has ended with a checkpoint.
        TeasrError: the MLflow server is away, training failed, or diverges.
    """
    if recipe.data is None:
        raise UsageError("The recipe has no data.", "Set data to a folder made by 'teasr ingest'.")
    manifest = read_manifest(recipe.data, kind="hr")
    begun = _begun(folder)
    parent = begun.get("parent") if begun else parent
    start = parent or (None if recipe.init == "scratch" else recipe.init)
    init = registry.resolve(start) if start else None
    # What is wrong is told before anything starts.
    check_network(recipe.model_copy(update={"init": start or "scratch"}), init)
    find_weights("vgg", recipe.lpips)
    identity = content_hash([recipe.trajectory, manifest.fingerprint])
    client = tracking.connect()
    ensure_ray()
    _check_resources(recipe)
    check_fits(recipe, this_machine())
    prepare_offload(recipe.engine)  # before workers start, who would all wait for a compiler

    folder.mkdir(parents=True, exist_ok=True)
    _mend_list(folder)
    give_back(folder)
    run = _run(client, folder, identity, recipe, manifest.fingerprint, parent)
    model = folder / MODEL_FOLDER
    # More minutes or steps than a finished run was given make it go on.
    if run["finished"] and Position(**run["position"]).share_of(recipe.training) >= 1:
        _close(client, folder, run)
        return Distilled(run["run_id"], model, run["position"], _best(folder), reused=True)
    run = _begin(client, folder, run, recipe)

    # Workers have another working folder.
    lpips = recipe.lpips and str(Path(recipe.lpips).absolute())
    recipe = absolute_source(recipe).model_copy(
        update={"data": absolute_url(recipe.data), "lpips": lpips}
    )
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "init": str(init) if init else None,
            "tracking_uri": client.tracking_uri,
            "run": run["run_id"],
            "folder": str(folder.absolute()),
            "pairs": preview_pairs(recipe) if recipe.training.minutes_between_previews else [],
        },
        scaling_config=ScalingConfig(
            num_workers=_workers(recipe.training),
            use_gpu=recipe.training.gpu,
            resources_per_worker=_worker(recipe.training),
        ),
        datasets={
            "train": RunFeed(recipe.data, recipe.feed, recipe.training.batch, folder.absolute())
        },
        dataset_config=InOrder(),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder.absolute()),
            checkpoint_config=CheckpointConfig(num_to_keep=recipe.training.keep_last),
            failure_config=FailureConfig(max_failures=recipe.training.max_failures),
            callbacks=[HearSigterm(), UseRaysAddress(), NoteReservation(folder)],
        ),
    )
    spilled = spilled_bytes()
    with quiet_ray_data(), _live_line(folder, recipe), StopRequest(folder) as request:
        try:
            result = request.while_running(trainer.fit)
        # The second comes of Ray Train itself: its controller is killed, or finds no node.
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            _note_end(client, run, "FAILED")
            raise _explain(error, folder) from None
    if result.return_value is not None:
        _note_end(client, run, "FAILED")
        raise _diverges(folder, **result.return_value)
    assert result.checkpoint is not None  # the loop ends with one
    with result.checkpoint.as_directory() as checkpoint:
        position = json.loads((Path(checkpoint) / STATE_FILE).read_text())
        del position["feed"]  # of no use once the run is over
        if Position(**position).share_of(recipe.training) < 1:
            _note_end(client, run, "KILLED")
            raise Preempted(
                f"{request.signal or 'The stop file'} ended the run after step "
                f"{position['steps']}, with a checkpoint.",
                "The same command goes on from there.",
            )
        shutil.copytree(Path(checkpoint) / MODEL_FOLDER, model, dirs_exist_ok=True)
    run = {**run, "finished": True, "closed": False, "position": position}
    _write_run(folder, run)
    client = tracking.connect()
    spilled = max(0, spilled_bytes() - spilled)  # a node that has gone took its count with it
    client.log_metric(run["run_id"], "object_store/spilled_mb", spilled / 1e6)
    _close(client, folder, run)
    return Distilled(run["run_id"], model, position, _best(folder), spilled=spilled)


def _note_end(client: Any, run: dict[str, Any], status: str) -> None:
    """Note how the run ended; a store that is away is not waited for."""
    if tracking.answers(client.tracking_uri):
        client.set_terminated(run["run_id"], status)


def _close(client: Any, folder: Path, run: dict[str, Any]) -> None:
    """Note the end of a finished run; once, but again where the store was away."""
    if run.get("closed", True):
        return
    for name, value in run["position"].items():
        client.log_metric(run["run_id"], f"training/{name}", value)
    best = _best(folder)
    if best is not None:
        client.set_tag(run["run_id"], "teasr.best_step", best["step"])
    client.set_terminated(run["run_id"])
    _write_run(folder, {**run, "closed": True})


def _best(folder: Path) -> dict[str, Any] | None:
    entries = BestModels(folder).entries()
    if not entries:
        return None
    return {**entries[0], "model": str(folder / BEST_FOLDER / entries[0]["model"])}


def _workers(training: TrainingSettings) -> int | tuple[int, int]:
    """How many workers Ray Train starts: so many, or as it finds room for between two numbers."""
    if training.min_workers is None:
        return training.workers
    return training.min_workers, training.workers


def _mend_list(folder: Path) -> None:
    """Make Ray Train's list of checkpoints anew where it is broken, of the newest that is whole.

    Ray writes its list in place: a driver that is killed meanwhile leaves half of it, and Ray would
    refuse the whole run for that. It writes it when a checkpoint is complete on all workers.
    """
    # Ray has no public word for this file.
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager as manager

    path = folder / "train" / "checkpoint_manager_snapshot.json"
    try:
        json.loads(path.read_text())
        return
    except FileNotFoundError:
        return
    except ValueError:
        log.warning("%s is broken and is made anew.", path)
    results = []
    for checkpoint in sorted(path.parent.glob("checkpoint_*"), reverse=True):
        try:
            Layout.read(checkpoint)
            steps = json.loads((checkpoint / STATE_FILE).read_text())["steps"]
        except (TeasrError, OSError, ValueError):
            continue
        results.append(
            manager._TrainingResultState(
                checkpoint_dir_name=checkpoint.name, metrics={"steps": steps}
            )
        )
        break
    state = manager._CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=[0] * len(results),
        latest_checkpoint_result=results[0] if results else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    write_bytes(str(path.absolute()), state.json().encode())


def _check_resources(recipe: Recipe) -> None:
    """Ray would wait for ever for what a cluster does not have: say so instead."""
    training, have = recipe.training, capacity()
    workers = training.min_workers or training.workers
    named = "training.workers" if training.min_workers is None else "training.min_workers"
    cpus = workers * training.cpus_per_worker
    if have.get("CPU", 0) < cpus + 1:
        raise UsageError(
            f"{named}={workers} with {training.cpus_per_worker} CPU(s) each "
            f"leave no CPU for the feed: this Ray has {have.get('CPU', 0):.0f}, {cpus + 1} are "
            "needed.",
            f"Lower {named} or training.cpus_per_worker, or add machines.",
        )
    if training.gpu and have.get("GPU", 0) < workers:
        raise UsageError(
            f"{named}={workers} need as many GPUs; this Ray has {have.get('GPU', 0):.0f}.",
            f"Lower {named}, or set training.gpu=false to train on CPUs.",
        )
    if (places := room_for(_worker(training))) < workers:
        raise UsageError(
            f"{named}={workers}: the nodes of this Ray have room for {places}, each with "
            f"{_in_words(_worker(training))} on one node.",
            f"Lower {named} or training.cpus_per_worker, or add machines.",
        )
    if not room_for(task := {"CPU": 1, **nodes_for("data")}):
        raise UsageError(
            f"No node can run the feed: a task of it takes {_in_words(task)}.",
            "Start a data node with a CPU.",
        )
    # Ray plans a dataset with at most half of what there is.
    need = 2 * bytes_in_flight(recipe.feed, training.batch, workers)
    if need > (store := have.get("object_store_memory", 0)):
        raise UsageError(
            f"The feed needs {need / 1e6:.0f} MB of object store for {workers} workers with "
            f"batches of {training.batch} at {recipe.feed.crop} pixels; this Ray has "
            f"{store / 1e6:.0f} MB.",
            "Start Ray with a larger --object-store-memory, or lower training.batch.",
        )


def _worker(training: TrainingSettings) -> dict[str, float]:
    """What a worker asks of a node."""
    gpu = {"GPU": 1} if training.gpu else {}
    return {"CPU": training.cpus_per_worker, **gpu, **nodes_for("training")}


def _in_words(request: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in request.items())


def _begun(folder: Path) -> dict[str, Any] | None:
    """The run that was begun in this folder, or None."""
    path = folder / RUN_FILE
    run: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return run


def _run(
    client: Any,
    folder: Path,
    identity: str,
    recipe: Recipe,
    fingerprint: str,
    parent: str | None,
) -> dict[str, Any]:
    """The run of this folder: the one that was begun here, or a new one."""
    run = _begun(folder)
    if run is not None:
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
            "teasr.lpips": "present" if find_weights("vgg", recipe.lpips) else "missing",
            **({"teasr.parent": parent} if parent else {}),
        },
    )
    for name, value in _flat(recipe.model_dump(mode="json")):
        client.log_param(created.info.run_id, name, value)
    run = {
        **{"run_id": created.info.run_id, "identity": identity, "parent": parent},
        **{"finished": False, "attempts": 0},
    }
    _write_run(folder, run)
    return run


def _begin(client: Any, folder: Path, run: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Note what this command brings to the run: artifacts `recipe.yaml` and `attempts/NN.yaml`, and
    the newest of it in tags."""
    have, last = ray.cluster_resources(), last_state(folder)
    attempt = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": tracking.mask_credentials(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "goes_on_from_step": last["steps"] if last else 0,
        "commit": tracking.git_commit() or "",
        "machine": {
            "system": platform.platform(),
            "cpus": have.get("CPU", 0),
            "gpus": have.get("GPU", 0),
            "gpu": next((name for name in have if name.startswith("accelerator_type:")), ""),
            "memory_gb": round(have.get("memory", 0) / 1e9, 1),
        },
        "versions": {"python": platform.python_version(), **tracking.versions()},
    }
    run = {**run, "finished": False, "attempts": run["attempts"] + 1}
    run_id, training = run["run_id"], recipe.training
    tags = {
        "command": attempt["command"],
        "commit": attempt["commit"],
        "attempts": run["attempts"],
        "workers": f"{training.workers} {'GPU' if training.gpu else 'CPU'}",
        "versions": ", ".join(f"{name} {found}" for name, found in attempt["versions"].items()),
    }
    for name, value in tags.items():
        client.set_tag(run_id, f"teasr.{name}", value)
    client.log_dict(run_id, recipe.model_dump(mode="json"), "recipe.yaml")
    client.log_dict(run_id, attempt, f"attempts/{run['attempts']:02d}.yaml")
    client.update_run(run_id, status="RUNNING")
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
                values, done = document["values"], document["progress"]
                left = seconds_left(document) / 60
                update(
                    done,
                    f"step {document['steps']}, {values['samples_per_second']:.1f} pairs/s, "
                    f"loss {values['loss/total']:.4f}, {left:.0f} min left, waited for data "
                    f"{values['share_waiting_for_data']:.0%}",
                )

    path.unlink(missing_ok=True)
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _explain(error: Exception, folder: Path) -> TeasrError:
    """The user's error if a worker met one; else a short word and the place of the traceback."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in (error, *failures.values()):
        if isinstance(failure, TeasrError):
            return failure
    log = folder / f"failure-{time.strftime('%Y%m%d-%H%M%S')}.log"
    log.write_text(str(error))
    last = str(error).strip().splitlines()[-1].strip()
    return TeasrError(
        f"Training failed: {last}",
        f"The traceback is in {log}. The same command resumes from the last checkpoint.",
    )


def _diverges(folder: Path, problem: str, good_step: int) -> TeasrError:
    """What is wrong with the run, and the newest model it left from when it was well."""
    left = {
        json.loads(path.read_text())["steps"]: path.parent / MODEL_FOLDER
        for path in folder.glob(f"train/*/{STATE_FILE}")
    }
    for entry in BestModels(folder).entries():
        left.setdefault(entry["step"], folder / BEST_FOLDER / entry["model"])
    step = max((step for step in left if step <= good_step), default=None)
    return TeasrError(
        f"The run diverges: {problem}.",
        "Lower engine.learning_rate and start another run (--name)"
        + (f" from step {step}: init={left[step]}" if step else ", from other weights."),
    )
