"""A synthesis on three nodes that break: the pairs are those of a calm run, byte for byte."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from teasr.images import encode
from teasr.shards import Manifest, Sample, read_manifest, read_shard, write_manifest, write_shard
from tests.chaos.nodes import Nodes, skewed
from tests.chaos.outcomes import Outcome, Pulse

pytestmark = pytest.mark.chaos

SHARDS, PHOTOS, COPIES = 24, 2, 8
STORE = "--object-store-memory=100000000"
CUT = 20.0


@dataclass
class Stage:
    """A cluster of a head without CPUs and two data nodes, and photographs."""

    nodes: Nodes
    tell: Callable[[Outcome], None]
    hr: Path
    calm: Path
    disk: Path
    calm_pause: float = 0.0
    said: str = ""

    def bring_up(self) -> None:
        self.nodes.add("head", "--num-cpus=0", STORE)
        for name in ("data-1", "data-2"):
            self.nodes.add(name, "--num-cpus=1", STORE)

    def start(self, pairs: Path, **environment: str) -> subprocess.Popen[str]:
        arguments = ("synthesize", str(self.hr), str(pairs), "--copies", str(COPIES), "--seed", "7")
        return self.nodes.start(*arguments, **environment)

    @contextmanager
    def running(self, pairs: Path, **environment: str) -> Iterator[tuple[subprocess.Popen, Pulse]]:
        """A synthesis that has written some shards, and still has most to write; on leaving, its
        good end is awaited."""
        process = self.start(pairs, **environment)
        try:
            with Pulse(lambda: written(pairs)) as pulse:
                await_shards(process, pairs, random.randint(2, 5))
                yield process, pulse
                self.said, _ = process.communicate(timeout=600)
                assert process.returncode == 0 and "Traceback" not in self.said, self.said
        finally:
            process.kill()

    def finish(self, pairs: Path) -> Pulse:
        """Run the command again: it does what is missing, to a good end."""
        there = written(pairs)
        with Pulse(lambda: written(pairs)) as pulse:
            again = self.start(pairs)
            said, _ = again.communicate(timeout=600)
        assert again.returncode == 0 and "Traceback" not in said, said
        assert f"{there} shards were there" in said, said
        return pulse

    def conclude(self, pairs: Path, pulse: Pulse, began: float, fault: str, seen: str) -> None:
        """What is in `pairs` is what the calm run made, and becomes the fault's row."""
        expected, found = Counter(keys(self.calm)), Counter(keys(pairs))
        lost, duplicated = (expected - found).total(), (found - expected).total()
        assert lost == duplicated == 0
        assert read_manifest(str(pairs)).shards == read_manifest(str(self.calm)).shards
        names = {path.name for path in pairs.iterdir()}
        assert names == {path.name for path in self.calm.iterdir()}
        pauses = pulse.longest_pause(began), self.calm_pause
        self.tell(Outcome(fault, seen, *pauses, lost, duplicated, "checksums equal"))


def written(pairs: Path) -> int:
    return len(list(pairs.glob("*.stats.json")))


def await_shards(process: subprocess.Popen[str], pairs: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while written(pairs) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def keys(pairs: Path) -> list[str]:
    shards = read_manifest(str(pairs), "pairs").shards
    return [s.key for shard in shards for s in read_shard(str(pairs / shard.name), shard, "pairs")]


@pytest.fixture(scope="module")
def stage(
    folder: Path,
    nodes: Nodes,
    photo: Callable[..., np.ndarray],
    tell: Callable[[Outcome], None],
) -> Iterator[Stage]:
    disk, infos = folder / "disk", []
    disk.mkdir()
    for i in range(SHARDS):
        samples = [
            Sample(f"p{i:02d}-{k}", {"png": encode(photo(400, 500, seed=9 * i + k)), "json": b"{}"})
            for k in range(PHOTOS)
        ]
        infos.append(write_shard(str(folder / "hr" / f"hr-{i:05d}.tar"), samples))
    write_manifest(str(folder / "hr"), Manifest(kind="hr", shards=tuple(infos)))
    resize(disk, "1g", mounted=False)  # before the nodes start, which keep the mounts they see
    try:
        made = Stage(nodes, tell, folder / "hr", folder / "calm", disk)
        made.bring_up()
        with made.running(made.calm) as (_, pulse):
            pass
        made.calm_pause = pulse.longest_pause()
        yield made
        for name in ("data-2", "data-1", "head"):
            nodes.kill(name)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def resize(disk: Path, size: str, *, mounted: bool = True) -> None:
    """Have a disk of so many bytes at `disk`."""
    options = f"{'remount,' if mounted else ''}size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)


def test_a_data_node_is_killed(stage: Stage, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    with stage.running(pairs) as (_, pulse):
        began = time.monotonic()
        stage.nodes.kill("data-2")
    assert "marked dead" in stage.said
    fault = "a data node is killed in a synthesis"
    seen = "lines of Ray's that the node is dead; the other node does its shards"
    stage.conclude(pairs, pulse, began, fault, seen)
    stage.nodes.add("data-2", "--num-cpus=1", STORE)


def test_a_node_is_cut_off(stage: Stage, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    with stage.running(pairs) as (_, pulse):
        began = time.monotonic()
        stage.nodes.cut("data-2")
        time.sleep(CUT)
        stage.nodes.mend("data-2")
    fault = f"a data node is cut off for {CUT:.0f} s in a synthesis"
    seen = "nothing; its shards come when it is back"
    stage.conclude(pairs, pulse, began, fault, seen)


def test_the_driver_is_killed(stage: Stage, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    process = stage.start(pairs)
    await_shards(process, pairs, 5)
    process.kill()
    process.communicate()
    assert not (pairs / "manifest.json").exists()
    began = time.monotonic()
    pulse = stage.finish(pairs)
    fault = "the command of a synthesis is killed and run again"
    seen = "the second run does what is missing"
    stage.conclude(pairs, pulse, began, fault, seen)


def test_a_node_is_taken_back(stage: Stage, tmp_path: Path) -> None:
    """A spot machine: it gets no new work after the notice, and is gone some seconds later."""
    pairs, notice = tmp_path / "pairs", 3
    with stage.running(pairs) as (_, pulse):
        began = time.monotonic()
        stage.nodes.announce("data-2", "gcp", notice)
        time.sleep(notice)
        stage.nodes.kill("data-2")
    fault = f"a spot machine of a synthesis is taken back {notice} s after its notice"
    lines = "lines of Ray's that the node is dead" if "marked dead" in stage.said else "nothing"
    seen = f"{lines}; the other node does its shards"
    stage.conclude(pairs, pulse, began, fault, seen)
    stage.nodes.add("data-2", "--num-cpus=1", STORE)


def test_the_head_is_killed(stage: Stage, tmp_path: Path) -> None:
    """The cluster is gone with it; the same command on another goes on."""
    pairs = tmp_path / "pairs"
    process = stage.start(pairs)
    await_shards(process, pairs, 5)
    began = time.monotonic()
    stage.nodes.kill("head")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in said, said
    assert said.count("has not answered for") == 2 and "the same command does the rest" in said
    for name in ("data-1", "data-2"):
        stage.nodes.kill(name)
    stage.bring_up()
    pulse = stage.finish(pairs)
    fault = "the head is killed in a synthesis; the command is run again on a new cluster"
    seen = "that the head does not answer, among Ray's lines; exit 1; the second run does the rest"
    stage.conclude(pairs, pulse, began, fault, seen)


def test_the_disk_is_full(stage: Stage) -> None:
    size, pairs = read_manifest(str(stage.calm)).bytes, stage.disk / "pairs"
    resize(stage.disk, str(size // 2))
    process = stage.start(pairs)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1 and "Traceback" not in said, said
    assert "No space left on device" in said, said
    assert not (pairs / "manifest.json").exists() and written(pairs)
    resize(stage.disk, str(4 * size))
    began = time.monotonic()
    with Pulse(lambda: written(pairs)) as pulse:
        again = stage.start(pairs)
        said, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and "Traceback" not in said, said
    fault = "the disk that a synthesis writes to is full"
    seen = "“No space left on device” and where, exit 1; with room the same command goes on"
    stage.conclude(pairs, pulse, began, fault, seen)


def test_a_worker_hangs(stage: Stage, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    with stage.running(pairs, TEASR_HANG_SECONDS="15") as (process, pulse):
        stopped: list[psutil.Process] = []
        while not stopped:
            stopped = stage.nodes.workers("data-2", "ray::Map(")
            assert process.poll() is None
        began = time.monotonic()
        stopped[0].suspend()
    assert not stopped[0].is_running() and "is ended" in stage.said
    fault = "a worker of a synthesis hangs (SIGSTOP; 15 s are allowed)"
    seen = "a warning that its worker is ended; Ray does its shard again"
    stage.conclude(pairs, pulse, began, fault, seen)


def test_a_clock_is_wrong(stage: Stage, tmp_path: Path) -> None:
    stage.nodes.kill("data-2")
    stage.nodes.add("data-2", "--num-cpus=1", STORE, **skewed(tmp_path, seconds=3600))
    pairs = tmp_path / "pairs"
    with stage.running(pairs) as (_, pulse):
        pass
    fault = "a data node's clock is an hour ahead"
    stage.conclude(pairs, pulse, pulse.changes[0], fault, "nothing")
