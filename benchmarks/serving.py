"""Serving: `teasr serve` against plain `mlflow models serve`, the same model under the same load.

    python benchmarks/serving.py [--model teasr-s] [--sides 64,128,256] [--clients 1,4,8] [--quick]

Clients in this process ask for one picture after another (a closed loop) by MLflow's protocol, all
servers being given the same bytes. Every setting is measured in rounds in which the servers take
turns; throughput and processor time per picture, which says what a neighbour's load hides, are
medians of the rounds, latencies are of all requests together. Servers have as many threads as there
are cores: plain MLflow in one process, `mlflow, spread` in a process of one thread for each core.
Then ours answers many small requests while its memory is read. The last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pictures import picture

from teasr.errors import TeasrError
from teasr.images import encode
from teasr.serving import ScoringServer

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0))
TEASR, PLAIN, SPREAD = "teasr", "mlflow", "mlflow, spread"
PERCENTILES = (50, 95, 99)


@dataclass
class Server:
    """A running server.

    Attributes:
        process: of its own or the first of its group.
    """

    name: str
    port: int
    process: int

    def memory(self) -> float:
        """Resident megabytes of all its processes."""
        pages = sum(int(line.split()[1]) for line in self._files("statm"))
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def processor(self) -> float:
        """Seconds of processor time that all its processes have taken."""
        ticks = 0
        for line in self._files("stat"):
            ticks += sum(int(field) for field in line.rpartition(")")[2].split()[11:13])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _files(self, name: str) -> Iterator[str]:
        for file in Path("/proc").glob(f"[0-9]*/{name}"):
            with contextlib.suppress(OSError):
                if os.getpgid(int(file.parent.name)) == self.process:
                    yield file.read_text()


@dataclass
class Load:
    """What clients saw of a server.

    Attributes:
        rates: pictures per second, of each round.
        seconds: of each request.
        processor: milliseconds of processor time per picture, of each round.
    """

    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        found = np.percentile(np.array(self.seconds) * 1000, PERCENTILES)
        figures = {f"p{p}": round(float(x), 1) for p, x in zip(PERCENTILES, found)}
        processor = round(statistics.median(self.processor), 1)
        return {"rate": round(statistics.median(self.rates), 3), **figures, "processor": processor}


@contextlib.contextmanager
def scoring_server(name: str, model: str, workers: int) -> Iterator[Server]:
    os.environ["OMP_NUM_THREADS"] = str(CORES // workers)
    with ScoringServer(model, workers=workers) as running:
        assert running.port is not None
        yield Server(name, running.port, running._process.pid)


@contextlib.contextmanager
def teasr_server(model: str, port: int) -> Iterator[Server]:
    os.environ["OMP_NUM_THREADS"] = str(CORES)
    command = [sys.executable, "-m", "jobs.cli", "serve", model, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            if process.poll() is not None:
                raise TeasrError("teasr serve did not start.")
            time.sleep(0.2)
        yield Server(TEASR, port, process.pid)
    finally:
        process.terminate()
        process.wait()


def bodies(side: int, count: int = 8) -> list[bytes]:
    """Requests that differ in their pictures."""
    split = [
        {"columns": ["image"], "data": [[base64.b64encode(encode(rgb)).decode()]]}
        for rgb in (picture(side, side, seed) for seed in range(count))
    ]
    return [json.dumps({"dataframe_split": one, "params": {"steps": 1}}).encode() for one in split]


def run(server: Server, requests: list[bytes], count: int, clients: int, load: Load) -> None:
    """`clients` that together ask `count` times, each when it has its last answer."""
    places = iter(range(count))
    lock = threading.Lock()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                break
            begin = time.perf_counter()
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/invocations", requests[place % len(requests)], headers)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise TeasrError(f"{server.name} answered {answer.status}: {body[:200]!r}")
            load.seconds.append(time.perf_counter() - begin)
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    before, processor = len(load.seconds), server.processor()
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(load.seconds) - before != count:
        raise TeasrError(f"{server.name} did not answer every request.")
    load.rates.append(count / (time.perf_counter() - begin))
    load.processor.append(1000 * (server.processor() - processor) / count)


def memory(server: Server, requests: list[bytes], count: int) -> list[float]:
    """Resident megabytes after a tenth of the requests, and so on."""
    found = []
    for _ in range(10):
        run(server, requests, count // 10, 4, Load())
        found.append(round(server.memory(), 1))
    return found


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="teasr-s", help="[default: teasr-s]")
    parser.add_argument("--sides", default=[64, 128, 256], type=numbers, help="of the pictures")
    parser.add_argument("--clients", default=[1, 4, 8], type=numbers, help="at once")
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--requests", default=24, type=int, help="a round, at the smallest side")
    parser.add_argument("--memory", default=2000, type=int, help="requests while memory is read")
    parser.add_argument("--port", default=5055, type=int, help="of teasr serve")
    parser.add_argument("--quick", action="store_true", help="one round of few requests")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.requests, chosen.memory = 1, 8, 40
    try:
        measure(chosen)
    except TeasrError as error:
        sys.exit(str(error))


def measure(chosen: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(scoring_server(PLAIN, chosen.model, 1)),
            stack.enter_context(scoring_server(SPREAD, chosen.model, CORES)),
            stack.enter_context(teasr_server(chosen.model, chosen.port)),
        ]
        loads: dict[tuple[int, int, str], Load] = {}
        for side in chosen.sides:
            requests = bodies(side)
            count = max(chosen.requests * chosen.sides[0] ** 2 // side**2, 4)
            for server in servers:
                run(server, requests, 2, 1, Load())  # to warm up
            for clients in chosen.clients:
                for number in range(chosen.rounds):
                    turn = number % len(servers)
                    for server in (*servers[turn:], *servers[:turn]):
                        load = loads.setdefault((side, clients, server.name), Load())
                        run(server, requests, max(count, 2 * clients), clients, load)
                    told = f"{side} pixels, {clients} clients: round {number + 1}"
                    print(f"\r{told}   ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        one, *_ = (server for server in servers if server.name == TEASR)
        resident = memory(one, bodies(32), chosen.memory)
    report(loads, resident, chosen)


def report(
    loads: dict[tuple[int, int, str], Load], resident: list[float], chosen: argparse.Namespace
) -> None:
    print(f"{CORES} cores, load {os.getloadavg()[0]:.1f} at the end; milliseconds\n")
    print("| picture | clients | server | pictures/s | p50 | p95 | p99 | processor |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    result: dict[str, dict[str, float]] = {}
    for (side, clients, name), load in loads.items():
        row = result[f"{side} {clients} {name}"] = load.row()
        print(
            f"| {side} x {side} | {clients} | {name} | {row['rate']:.2f} | "
            f"{row['p50']:.0f} | {row['p95']:.0f} | {row['p99']:.0f} | {row['processor']:.0f} |"
        )
    print("\n| picture | clients | throughput | p95 |\n|---|---:|---:|---:|")
    speedups = {}
    for side in chosen.sides:
        for clients in chosen.clients:
            ours, plain = (loads[side, clients, name] for name in (TEASR, PLAIN))
            rates = [a / b for a, b in zip(ours.rates, plain.rates)]
            speedup = speedups[f"{side} {clients}"] = round(statistics.median(rates), 3)
            late = ours.row()["p95"] / plain.row()["p95"]
            print(f"| {side} x {side} | {clients} | {speedup:.2f} | {late:.2f} |")
    print(f"\nmemory over {chosen.memory} requests, MB: {', '.join(map(str, resident))}")
    print(json.dumps({"figures": result, "speedup": speedups, "memory_mb": resident}))


if __name__ == "__main__":
    main()
