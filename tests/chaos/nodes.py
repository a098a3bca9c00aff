"""A Ray cluster whose nodes can be broken one by one: each has an address of its own.

A node is a network namespace with a raylet in it, on a bridge with the others. Its processes and
its link can be taken away without the others' noticing in any other way than real machines would.
Files are shared, as on a share of the network. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import psutil

PREFIX = "teasr-chaos-"
BRIDGE = "teasr-chaos"
NETWORK = "10.78.0"
PORT = 6379
SPOT_NOTICE = Path(__file__).parents[2] / "deploy" / "spot-notice.sh"
KEEPALIVE = '--system-config={"grpc_client_keepalive_time_ms":20000}'
"""As in the cluster files: who waits for an answer looks after the connection every 20 s."""
SHARE_EXPIRES = {"RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30"}
"""As in the nodes' environment: for so many seconds a dead feed keeps its share of the CPUs."""


def missing() -> str:
    """Why nodes cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program ip is missing (Debian: iproute2)"
    tried = _ip("netns", "add", f"{PREFIX}try", check=False)
    if tried.returncode:
        return f"network namespaces cannot be made: {tried.stderr.strip()}"
    _ip("netns", "del", f"{PREFIX}try")
    return ""


class Nodes:
    """The cluster, as a context manager: empty on entry, all of it gone on exit.

    The first node that is added is the head.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.address = f"{NETWORK}.1:{PORT}"
        # Without a token: one that lies about here is another cluster's.
        self.environment = environment | {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._made: list[str] = []

    def __enter__(self) -> Self:
        self._remove_links()
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
        self._remove_links()

    def add(self, name: str, *options: str, **environment: str) -> None:
        """Start a node with `options` of `ray start`, and wait until the cluster counts it."""
        if name not in self._made:
            self._make_link(name)
        given = ["--head", f"--port={PORT}", "--include-dashboard=false", KEEPALIVE]
        if self.processes:
            given = [f"--address={self.address}"]
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [
                *self.inside(name),
                *(str(Path(sys.executable).parent / "ray"), "start", "--block", *given),
                *(f"--node-ip-address={self.ip(name)}", "--disable-usage-stats", *options),
            ],
            env=self.environment | environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not self.alive(name):
            assert self.processes[name].poll() is None, (self.folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline, f"{name} did not join"
            time.sleep(0.3)

    def alive(self, name: str) -> bool:
        """Whether the cluster counts the node in."""
        asked = subprocess.run(
            [*self.inside(next(iter(self.processes))), sys.executable, "-c", _ALIVE],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return self.ip(name) in asked.stdout.split()

    def ip(self, name: str) -> str:
        """The node's address."""
        return f"{NETWORK}.{self._made.index(name) + 1}"

    def kill(self, name: str) -> None:
        """End all processes of a node at once, as a machine that loses its power."""
        started = self.processes.pop(name)
        if started.poll() is not None:
            return
        node = psutil.Process(started.pid)
        family = [node, *node.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=20)

    def announce(self, name: str, cloud: str, seconds: int) -> None:
        """Have the script that spot machines run hear from a cloud that the node goes in so many
        seconds; returns once Ray was told."""
        metadata = subprocess.Popen(
            [*self.inside(name), sys.executable, "-c", _METADATA, str(seconds)],
            stdout=subprocess.PIPE,
        )
        try:
            assert metadata.stdout is not None and metadata.stdout.readline()
            subprocess.run(
                [*self.inside(name), "bash", str(SPOT_NOTICE), cloud, self.address],
                env=self.environment
                | {
                    "SPOT_METADATA": "http://127.0.0.1:8000",
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                },
                check=True,
                timeout=60,
            )
        finally:
            metadata.kill()
            metadata.wait()

    def workers(self, name: str, holding: str) -> list[psutil.Process]:
        """Processes of a node whose title has `holding` in it."""
        found = []
        for process in psutil.Process(self.processes[name].pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if holding in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def cut(self, name: str) -> None:
        """Take the node's cable out: what is under way is lost, and nobody is told."""
        _ip("link", "set", self._link(name), "down")

    def mend(self, name: str) -> None:
        """Put the node's cable back."""
        _ip("link", "set", self._link(name), "up")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command of teasr on the head."""
        return subprocess.Popen(
            [
                *self.inside(next(iter(self.processes))),
                *(sys.executable, "-m", "jobs.cli", *arguments),
            ],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def inside(self, name: str) -> Sequence[str]:
        """What makes a command run on the node."""
        return ["ip", "netns", "exec", PREFIX + name]

    def _link(self, name: str) -> str:
        return f"chaos{self._made.index(name) + 1}"  # at most 15 letters

    def _make_link(self, name: str) -> None:
        self._made.append(name)
        space = PREFIX + name
        _ip("netns", "add", space)
        _ip("link", "add", self._link(name), "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", self._link(name), "master", BRIDGE, "up")
        _ip("-n", space, "address", "add", f"{self.ip(name)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")

    @staticmethod
    def _remove_links() -> None:
        """Also what a run that was killed left behind."""
        for line in _ip("netns", "list").stdout.splitlines():
            if line.startswith(PREFIX):
                name = line.split()[0]
                for pid in _ip("netns", "pids", name).stdout.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _ip("netns", "del", name)
        # A namespace lives as long as a process in it, and with it the cable's end on this side.
        for line in _ip("-o", "link", "show", "master", BRIDGE, check=False).stdout.splitlines():
            _ip("link", "del", line.split()[1].partition("@")[0], check=False)
        _ip("link", "del", BRIDGE, check=False)


_ALIVE = f"""
from ray._private.state import state
from ray._raylet import GcsClientOptions
state._initialize_global_state(GcsClientOptions.create("{NETWORK}.1:{PORT}", None, True, False))
print(*(node["NodeManagerAddress"] for node in state.node_table() if node["Alive"]))
"""

_METADATA = """
import http.server, sys, time

class Metadata(http.server.BaseHTTPRequestHandler):
    # What a machine hears from AWS and from Google Cloud when it is taken back.
    def do_PUT(self):
        self.answer("token")
    def do_GET(self):
        gone = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + int(sys.argv[1])))
        answers = {
            "/latest/meta-data/spot/instance-action": '{"action": "stop", "time": "%s"}' % gone,
            "/computeMetadata/v1/instance/preempted": "TRUE",
        }
        self.answer(answers[self.path])
    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

server = http.server.HTTPServer(("127.0.0.1", 8000), Metadata)
print("listens", flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def hog(nodes: Nodes, name: str) -> Iterator[Callable[[], int]]:
    """Have another job hold almost all of a node's object store; yields what tells how many bytes
    the node has moved to its disk by now."""
    process = subprocess.Popen(
        [*nodes.inside(name), sys.executable, "-c", _HOG],
        env=nodes.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    words, answers = process.stdin, process.stdout

    def spilled() -> int:
        words.write("\n")
        words.flush()
        return int(answers.readline())

    try:
        spilled()  # the store is full by now
        yield spilled
    finally:
        process.kill()
        process.wait()


_HOG = """
import sys
import numpy as np
import ray
from ray._private.internal_api import get_memory_info_reply
from ray._private.state import state
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
node = ray.get_runtime_context().get_node_id()
(here,) = (n["Resources"]["object_store_memory"] for n in ray.nodes() if n["NodeID"] == node)
size = 5_000_000
held = [ray.put(np.zeros(size, np.uint8)) for _ in range(int(0.95 * here) // size)]
for _ in sys.stdin:
    print(get_memory_info_reply(state).store_stats.spilled_bytes_total, flush=True)
"""


def skewed(folder: Path, seconds: int) -> dict[str, str]:
    """Environment of a node whose clock is so many seconds ahead."""
    library, source = folder / "skewed_clock.so", Path(__file__).with_name("skewed_clock.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_PRELOAD": str(library), "SKEW_SECONDS": str(seconds)}


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)
