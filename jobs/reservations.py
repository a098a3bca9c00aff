"""What Ray keeps reserved for a training whose command was killed.

Ray Train reserves its workers' CPUs and GPUs with a coordinator of the cluster's, which forgets
them three minutes after the last word from the training, and gives Ray Data the rest. On a full
cluster the feed of the same run, started again, would wait for as long. So a run notes the name of
its reservation, and the next command on it gives that back.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import ray

# Ray has no public word for the name under which it reserves, nor for what holds reservations.
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext

RESERVATION_FILE = "reservation"
_COORDINATOR = "AutoscalingCoordinator"
_PATIENCE_SECONDS = 10.0


class NoteReservation(ControllerCallback):
    """Notes the name of the reservation in the run's folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder.absolute() / RESERVATION_FILE

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        self._path.write_text(f"train-{train_run_context.run_id}")


def give_back(folder: Path) -> None:
    """Give back what the last command on the run in `folder` left reserved.

    That command must have ended. Where Ray does not answer, the reservation ends by itself.
    """
    path = folder / RESERVATION_FILE
    if not path.exists():
        return
    with contextlib.suppress(ValueError, ray.exceptions.RayError):  # nobody has reserved anything
        coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
        ray.get(coordinator.cancel_request.remote(path.read_text()), timeout=_PATIENCE_SECONDS)
    path.unlink()
