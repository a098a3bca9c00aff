"""Training workers talk to each other at the addresses at which Ray knows their nodes.

Gloo takes the address that the machine's own name stands for, which on Debian and Ubuntu is one
that only the machine itself can reach (127.0.1.1).
"""

from __future__ import annotations

import os

import psutil
import ray

# Ray has no public word for what runs in a worker before its process group is made.
from ray.train.v2._internal.execution.callback import WorkerCallback

_VARIABLE = "GLOO_SOCKET_IFNAME"


class UseRaysAddress(WorkerCallback):
    """Has gloo use the network interface that has Ray's address; what the node sets stays."""

    def after_init_train_context(self) -> None:
        address = ray.util.get_node_ip_address()
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address == address for entry in addresses):
                os.environ.setdefault(_VARIABLE, name)
