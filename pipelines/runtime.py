"""Ray, quietly: the one that is running, the cluster at `RAY_ADDRESS`, or one in this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import ray
import ray.data
import torch

from teasr.backbones import DualBranchDiT, load_backbone
from teasr.errors import TeasrError

# The pipelines pass names and figures through the object store, never pictures.
OBJECT_STORE_BYTES = 1_000_000_000


def ensure_ray(num_cpus: int | None = None) -> None:
    """Have a Ray to run on.

    A Ray that is initialised is used as it is; else the cluster at `RAY_ADDRESS` when that is set;
    else one is started on this machine, without a dashboard, with `num_cpus` (default: the cores
    of this machine, at least 2) and an object store of at most 1 GB or a quarter of the memory.

    Raises:
        TeasrError: when the cluster at `RAY_ADDRESS` does not answer.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray announces a change of this default with every start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise TeasrError(
                f"No Ray cluster answers at {address}: {str(error).splitlines()[0]}",
                "Start it, or unset RAY_ADDRESS to work on this machine alone.",
            ) from None
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ray.init(
        address="local",
        num_cpus=num_cpus or max(2, os.cpu_count() or 2),
        include_dashboard=False,
        object_store_memory=min(OBJECT_STORE_BYTES, memory // 4),
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Within the block Ray Data shows no progress and no announcements; its warnings stay.

    Datasets keep the context they were made in: make and consume them inside the block. The log
    file of Ray's session still gets everything.
    """
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # they judge memory that libraries take once
    # Ray Data warns of the very setting above.
    progress = logging.getLogger("ray.data._internal.progress")
    consoles = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler)
        and not isinstance(handler, logging.FileHandler)
    ]
    watched: list[logging.Logger | logging.Handler] = [progress, *consoles]
    before = [(item, item.level) for item in watched]
    try:
        progress.setLevel(logging.ERROR)
        for handler in consoles:
            handler.setLevel(logging.WARNING)
        with ray.data.DataContext.current(context):
            yield
    finally:
        for item, level in before:
            item.setLevel(level)


@lru_cache(maxsize=1)
def network_of_this_process(model: Path) -> DualBranchDiT:
    """The network in the folder `model`, loaded once per Ray worker and kept for its next tasks.

    Computes on one thread: a task has one of Ray's CPUs.
    """
    torch.set_num_threads(1)
    return load_backbone(model)
