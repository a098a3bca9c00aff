"""A look at a Ray cluster: `python -m jobs.cluster_state` prints one JSON document.

It is a process of its own for `teasr status`: Ray's client tries for half a minute to reach who
does not answer, writes to the terminal from compiled code, and may end its process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families
from ray._private import services, state

from jobs.status import Cluster, Node
from pipelines.runtime import ensure_ray
from teasr.errors import TeasrError

ANSWER_SECONDS = 2.0
"""So long a node's exporter may take."""
MOST_ASKED = 64
"""Nodes whose exporters are asked: each sends some 300 kB."""
_MEASURED = ("ray_node_mem_used", "ray_node_mem_total", "ray_object_store_used_memory")
_OBJECTS = "ray_object_store_memory"


def look() -> Cluster | None:
    """The cluster at `RAY_ADDRESS`, else a Ray that runs on this machine; None without one.

    Raises:
        TeasrError: when it does not answer.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given.startswith("http"):  # a dashboard's
        given = ""
    if not given:
        if not services.find_gcs_addresses():
            return None
        os.environ["RAY_ADDRESS"] = "auto"
    address = services.canonicalize_bootstrap_address("auto") or ""
    if not address.startswith("ray://"):
        _check_answer(address, address if given in ("", "auto") else given)
    ensure_ray()
    listed = ray.nodes()
    alive = [node for node in listed if node["Alive"]]
    # Ray has no public word for what is free on each node.
    free = state.available_resources_per_node()
    with ThreadPoolExecutor(16) as pool:
        measured = [*pool.map(_measured, alive[:MOST_ASKED]), *[{}] * len(alive[MOST_ASKED:])]
    nodes = tuple(
        _node(node, free.get(node["NodeID"], {}), figures)
        for node, figures in zip(alive, measured, strict=True)
    )
    return Cluster(address, nodes, len(listed) - len(alive))


def _check_answer(address: str, told: str) -> None:
    """Fail at once, where Ray would try for half a minute; `told` is the address for people."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
    except (OSError, ValueError):
        raise TeasrError(f"No Ray cluster answers at {told}.") from None


def _node(node: Mapping[str, Any], free: Mapping[str, float], figures: Mapping[str, float]) -> Node:
    have = node["Resources"]
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    return Node(
        address=node["NodeManagerAddress"],
        cpus=cpus,
        cpus_used=cpus - free.get("CPU", 0.0),
        gpus=gpus,
        gpus_used=gpus - free.get("GPU", 0.0),
        memory=figures.get("ray_node_mem_total"),
        memory_used=figures.get("ray_node_mem_used"),
        store=have.get("object_store_memory", 0.0),
        store_used=figures.get("ray_object_store_used_memory"),
        spilled=figures.get("spilled"),
    )


def _measured(node: Mapping[str, Any]) -> dict[str, float]:
    """What a node's exporter tells; nothing when it does not answer."""
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            text = answer.read().decode()
    except (OSError, ValueError):
        return {}
    found: dict[str, float] = {}
    for name, labels, value in _samples(text):
        if name in _MEASURED:
            found[name] = value
        elif labels.get("Location") == "SPILLED":
            found["spilled"] = found.get("spilled", 0.0) + value
    return found


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    wanted = tuple(f"{name}{{" for name in (*_MEASURED, _OBJECTS))
    lines = [line for line in text.splitlines() if line.startswith(wanted)]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def main() -> None:
    """Print the cluster, or null; exit code 1 with a sentence when it does not answer."""
    try:
        cluster = look()
    except TeasrError as error:
        sys.exit(str(error))
    print(json.dumps(cluster and asdict(cluster)))


if __name__ == "__main__":
    main()
