"""Ray, quietly: the one that is running, the cluster at `RAY_ADDRESS`, or one in this process."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Literal, TextIO

import cv2
import ray
import ray.data
from ray._private.authentication import authentication_token_setup as token_setup
from ray._private.internal_api import get_memory_info_reply
from ray._private.state import state
from ray._private.worker import global_worker

from pipelines.head import HeadWatch
from teasr.errors import TeasrError

# The pipelines pass names and figures through the object store, never pictures.
OBJECT_STORE_BYTES = 1_000_000_000

MAX_LOST_WORKERS = 5
"""So many workers may be lost to one task, before the task is taken for the cause."""

Role = Literal["data", "training"]
_SHARE_OF_A_ROLE = 0.001  # so that CPUs and GPUs decide how much work a node takes

# Names of the C library's parameters (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_ACTOR_LINE = b"has constructor arguments in the object store and max_restarts > 0"


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
        # Ray looks for a token when it starts a cluster, and not when it joins one.
        logging.getLogger(token_setup.__name__).setLevel(logging.ERROR)
        token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise TeasrError(
                f"No Ray cluster answers at {address}: {str(error).splitlines()[0]}",
                "Start it, or unset RAY_ADDRESS to work on this machine alone.",
            ) from None
        HeadWatch(ray.get_runtime_context().gcs_address).start()
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


def capacity() -> dict[str, float]:
    """CPUs, GPUs and the rest of the Ray in use, with the nodes that its autoscaler may start."""
    have = ray.cluster_resources()
    # Ray has no public word for it. None where nothing is autoscaled.
    may_have = state.get_max_resources_from_cluster_config() or {}
    return {name: max(have.get(name, 0), may_have.get(name, 0)) for name in {*have, *may_have}}


def room_for(request: Mapping[str, float]) -> int:
    """How many workers or tasks that each `request` so much find a node, were all nodes idle.

    Where an autoscaler may start nodes, the sum over all of them decides.
    """
    growing = bool(state.get_max_resources_from_cluster_config())
    nodes = [capacity()] if growing else [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return sum(min(int(node.get(k, 0) // v) for k, v in request.items()) for node in nodes)


def nodes_for(role: Role) -> dict[str, float]:
    """What work of a role asks of its node beside CPUs and GPUs, as Ray's custom resources.

    Nodes take a role by the resource `teasr_data` or `teasr_training` (`ray start
    --resources='{"teasr_data": 1}'`). Where any node has it, or may be started with it, only such
    nodes do that work; where none has, all do.
    """
    name = f"teasr_{role}"
    return {name: _SHARE_OF_A_ROLE} if capacity().get(name, 0) else {}


def spilled_bytes() -> int:
    """Bytes that the nodes have moved from their object stores to disk since they started; 0 where
    the nodes do not tell."""
    # Ray has no public word for it but its exporter.
    try:
        return int(get_memory_info_reply(state, timeout_seconds=10).store_stats.spilled_bytes_total)
    except Exception:  # no answer, or a Ray without grpc: no figure is worth a training
        return 0


def workers_lost() -> int:
    """How many workers were lost to the task that this is (of actors Ray keeps no count).

    Ray Data starts a task again without an end: a picture on which a decoder crashes, or for which
    the memory does not suffice, would be tried for ever. Compare with `MAX_LOST_WORKERS`.
    """
    # Ray counts, but has no public word for it.
    worker = getattr(global_worker, "core_worker", None)
    count = getattr(worker, "get_current_task_attempt_number", None)
    return int(count()) if count else 0


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


@contextmanager
def quiet_actor_start() -> Iterator[None]:
    """Within the block one line of Ray's is kept from the terminal; everything else passes.

    Ray Data lets its actors be restarted and gives them arguments in the object store, and Ray
    calls that an error with every actor that is started. The line is written by compiled code, past
    Python's logging and without a setting, so it is taken out of the stream itself. `sys.stderr`
    reaches the terminal directly meanwhile, so that progress bars still see one.
    """
    before = sys.stderr
    before.flush()
    terminal = os.dup(2)
    read_end, write_end = os.pipe()

    def pass_on() -> None:
        with os.fdopen(read_end, "rb") as lines, os.fdopen(terminal, "wb", buffering=0) as out:
            for line in lines:
                if _ACTOR_LINE not in line:
                    out.write(line)

    direct = os.fdopen(os.dup(2), "w", buffering=1) if _descriptor(before) == 2 else before
    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    os.dup2(write_end, 2)
    os.close(write_end)
    sys.stderr = direct
    try:
        yield
    finally:
        os.dup2(terminal, 2)  # the pipe has no writer left, and the thread ends
        thread.join(timeout=1)  # unless a process that was started meanwhile holds it
        sys.stderr = before
        if direct is not before:
            direct.close()


def _descriptor(stream: TextIO) -> int:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # a stream in memory
        return -1


@contextmanager
def without_torch() -> Iterator[None]:
    """Within the block, imports that would bring torch along for what is not used here go without.

    Where torch is there already, nothing changes.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        yield
    finally:
        del sys.modules["torch"]


@cache
def prepare_process() -> None:
    """Make this process fit to run tasks of one core each that go through large arrays.

    OpenCV gets one thread. The C library (glibc) keeps up to 64 MB of what is freed: arrays of a
    few megabytes that go back to the system each time and are asked for again cost a task an eighth
    of its time in page faults.
    """
    cv2.setNumThreads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
