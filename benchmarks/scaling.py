"""Synthesis and feed on 1, 2 and 4 nodes: how much of each further node arrives.

    sudo .venv/bin/python benchmarks/scaling.py [--quick]

Nodes are Ray nodes in network namespaces of this machine, each with a fixed share of a core
(--cores), so that four of them and the driver fit into it. The work grows with the nodes. Sizes
alternate, medians are compared. Beside the rates: how busy the nodes' cores were, the processor
time that a pair took on the nodes and in the driver, and what went over the network. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "platform"))

import psutil

from benchmarks.pictures import picture
from tests.chaos.nodes import PREFIX, Nodes, missing

ROOT = Path(__file__).parents[1]
SIZES = (1, 2, 4)
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD = 100_000  # microseconds
STORE = "--object-store-memory=200000000"
SHARDS, PHOTOS = 32, 4
CROP = 96


class Shares:
    """Shares of a core for nodes, by control groups (version 1, or 2 with the cpu controller)."""

    def __init__(self, cores: float) -> None:
        self.cores = cores
        self.made: list[Path] = []

    def limit(self, nodes: Nodes, name: str) -> None:
        """Have the node and what it starts from now on share so much of a core."""
        group = (CPU_GROUPS if CPU_GROUPS.is_dir() else CPU_GROUPS.parent) / (PREFIX + name)
        if group not in self.made:
            group.mkdir()
            self.made.append(group)
        quota = int(self.cores * PERIOD)
        if CPU_GROUPS.is_dir():
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {PERIOD}")
        node = psutil.Process(nodes.processes[name].pid)
        for process in (node, *node.children(recursive=True)):
            (group / "cgroup.procs").write_text(str(process.pid))

    def remove(self) -> None:
        """Take the groups away; their nodes are gone."""
        for group in self.made:
            group.rmdir()


def seconds_of(nodes: Nodes, names: list[str]) -> float:
    """Processor time that the living processes of these nodes have taken."""
    total = 0.0
    for name in names:
        node = psutil.Process(nodes.processes[name].pid)
        for process in (node, *node.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
    return total


def bytes_of(nodes: Nodes, names: list[str]) -> int:
    """Bytes that these nodes have sent and received."""
    total = 0
    for name in names:
        read = subprocess.run(
            [*nodes.inside(name), "cat", "/proc/net/dev"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (line,) = (line for line in read.splitlines() if "eth0:" in line)
        fields = line.split(":")[1].split()
        total += int(fields[0]) + int(fields[8])
    return total


# ---------------------------------------------------------------- what runs on the head


def drive(what: str, folder: Path, nodes: int, seconds: float) -> None:
    """Read words from stdin, `go` for a measurement; print `ready` and figures as JSON."""
    from pipelines.feed import FeedSettings, feed
    from pipelines.runtime import ensure_ray, quiet_ray_data
    from pipelines.synthesize import synthesize

    ensure_ray()
    data = str(folder / "hr")

    def one_synthesis(copies: int, crop: int | None = None) -> tuple[int, float]:
        with tempfile.TemporaryDirectory(dir=folder) as target:
            begin = time.perf_counter()
            made = synthesize(data, target, copies=copies, crop=crop).samples
            return made, time.perf_counter() - begin

    @contextmanager
    def one_feed() -> Iterator[Any]:
        settings = FeedSettings(crop=CROP, crops_per_photo=16)
        with quiet_ray_data():
            yield iter(feed(data, settings, batch=16).iter_torch_batches(batch_size=16))

    if what == "synthesis":
        one_synthesis(1, crop=32)  # workers start, libraries load
        print("ready", flush=True)
        input()
        pairs, took = one_synthesis(nodes)
        print(json.dumps([pairs, took]), flush=True)
    else:
        with one_feed() as batches:
            warm = time.perf_counter() + seconds  # until every node is at work and buffers are full
            while time.perf_counter() < warm:
                next(batches)
            print("ready", flush=True)
            input()
            begin, pairs = time.perf_counter(), 0
            while time.perf_counter() - begin < 2 * seconds:
                pairs += len(next(batches)["hr"])
            print(json.dumps([pairs, time.perf_counter() - begin]), flush=True)
    input()


def measure(
    nodes: Nodes, what: str, folder: Path, names: list[str], seconds: float
) -> dict[str, float]:
    """Figures of one measurement on the nodes `names`."""
    driver = subprocess.Popen(
        [
            *nodes.inside("head"),
            *(sys.executable, __file__, "--drive", what, "--folder", str(folder)),
            *("--nodes", str(len(names)), "--seconds", str(seconds)),
        ],
        env=nodes.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin and driver.stdout

    def say(word: str) -> None:
        driver.stdin.write(word + "\n")
        driver.stdin.flush()

    if driver.stdout.readline().strip() != "ready":
        raise SystemExit(f"The driver of the {what} has ended.")
    process = psutil.Process(driver.pid)
    family = [process, *process.children(recursive=True)]
    before = (
        seconds_of(nodes, names),
        bytes_of(nodes, names),
        sum(sum(p.cpu_times()[:2]) for p in family) + seconds_of(nodes, ["head"]),
    )
    say("go")
    pairs, took = json.loads(driver.stdout.readline())
    after = (
        seconds_of(nodes, names),
        bytes_of(nodes, names),
        sum(sum(p.cpu_times()[:2]) for p in family) + seconds_of(nodes, ["head"]),
    )
    say("end")
    driver.wait()
    return {
        "rate": pairs / took,
        "node_ms": 1e3 * (after[0] - before[0]) / pairs,
        "head_ms": 1e3 * (after[2] - before[2]) / pairs,
        "kilobytes": (after[1] - before[1]) / pairs / 1e3,
        "cores": (after[0] - before[0]) / took / len(names),
    }


def photographs(folder: Path) -> None:
    """Pictures of 0.3 megapixels as an HR dataset."""
    from teasr.images import encode
    from teasr.shards import Manifest, Sample, write_manifest, write_shard

    infos = []
    for shard in range(SHARDS):
        samples = []
        for i in range(shard * PHOTOS, (shard + 1) * PHOTOS):
            data = encode(picture(480, 640, seed=i), "jpeg", quality=90)
            samples.append(Sample(f"p{i:03d}", {"jpg": data, "json": b"{}"}))
        infos.append(write_shard(str(folder / "hr" / f"hr-{shard:05d}.tar"), samples))
    write_manifest(str(folder / "hr"), Manifest(kind="hr", shards=tuple(infos)))


def cost_of_ingest(folder: Path, count: int) -> tuple[float, float]:
    """Seconds of a core, and bytes, of a photograph of 1.2 megapixels that is ingested."""
    import ray

    from pipelines.ingest import ingest
    from teasr.images import encode

    (folder / "photos").mkdir()
    for i in range(count):
        data = encode(picture(960, 1280, seed=i), "jpeg", quality=90)
        (folder / "photos" / f"{i:03d}.jpg").write_bytes(data)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    ingest([str(folder / "photos")], str(folder / "first"))  # workers start, libraries load
    begin = time.perf_counter()
    made = ingest([str(folder / "photos")], str(folder / "second"))
    seconds = time.perf_counter() - begin
    ray.shutdown()
    return seconds / count, made.bytes / made.samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short measurement of each size")
    parser.add_argument("--cores", type=float, default=0.4, help="share of a core per node")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--nodes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=10, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive(given.drive, given.folder, given.nodes, given.seconds)
        return
    if reason := missing():
        raise SystemExit(f"Nodes cannot be made: {reason}.")
    repeats, seconds = (1, 4.0) if given.quick else (3, 10.0)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
    }
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds_each, bytes_each = cost_of_ingest(folder, 32 if given.quick else 128)
        photographs(folder)
        for _ in range(repeats):
            shares = Shares(given.cores)
            try:
                with Nodes(folder, environment) as nodes:
                    nodes.add("head", "--num-cpus=0", STORE)
                    for size in SIZES:
                        names = [f"data-{i}" for i in range(size)]
                        for name in set(names) - set(nodes.processes):
                            nodes.add(name, "--num-cpus=1", STORE)
                            shares.limit(nodes, name)
                        for what in ("synthesis", "feed"):
                            one = measure(nodes, what, folder, names, seconds)
                            found.setdefault((what, size), []).append(one)
                            print(what, size, one, file=sys.stderr)
            finally:
                shares.remove()
    figures: dict[str, float] = {}
    names = "pairs/s | efficiency | busy | ms a pair, nodes | ms a pair, head | kB a pair"
    print(f"| | nodes | {names} |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for what in ("synthesis", "feed"):
        for size in SIZES:
            middle = {
                name: statistics.median(one[name] for one in found[what, size])
                for name in found[what, size][0]
            }
            base = statistics.median(one["rate"] for one in found[what, 1])
            efficiency = middle["rate"] / (size * base)
            busy = middle["cores"] / given.cores
            figures[f"{what}_{size}"] = round(efficiency, 3)
            print(
                f"| {what} | {size} | {middle['rate']:.1f} | {efficiency:.2f} | {busy:.0%} | "
                f"{middle['node_ms']:.1f} | {middle['head_ms']:.2f} | {middle['kilobytes']:.1f} |"
            )
    print(f"\ningest: {1e3 * seconds_each:.0f} ms and {bytes_each / 1e3:.0f} kB per photograph")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
