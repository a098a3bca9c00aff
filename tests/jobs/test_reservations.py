"""What a killed command left reserved is given back, by Ray's own coordinator."""

from __future__ import annotations

import time
from pathlib import Path

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.v2._internal.execution.context import TrainRunContext

from jobs.reservations import RESERVATION_FILE, NoteReservation, give_back


def reserved(coordinator: ray.actor.ActorHandle, name: str) -> float:
    """CPUs."""
    found = ray.get(coordinator.get_reserved_resources.remote(name))
    return sum(node.get("CPU", 0) for node in found.values())


def test_a_reservation_is_given_back(ray_session: None, tmp_path: Path) -> None:
    give_back(tmp_path)  # of a run that has none
    context = TrainRunContext.__new__(TrainRunContext)
    object.__setattr__(context, "run_id", "killed")
    NoteReservation(tmp_path).after_controller_start(context)
    coordinator = get_or_create_autoscaling_coordinator()
    for name in ("train-killed", "train-other"):
        ray.get(
            coordinator.request_resources.remote(
                requester_id=name, resources=[{"CPU": 1}], expire_after_s=180
            )
        )
    deadline = time.monotonic() + 30
    while reserved(coordinator, "train-killed") != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    give_back(tmp_path)
    assert not (tmp_path / RESERVATION_FILE).exists()
    assert reserved(coordinator, "train-killed") == 0
    assert reserved(coordinator, "train-other") == 1
    ray.get(coordinator.cancel_request.remote("train-other"))
