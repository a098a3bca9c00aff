"""What Ray costs: the feed and the synthesis end to end, over their own transforms run bare;
whether a pair costs the same after a hundred thousand; and how much memory a worker takes.

    python benchmarks/pipeline.py [--quick]

Both sides do the same work on the same photographs on one core: read a shard, decode, crop, degrade
(and, for the synthesis, encode and write). Bare, they run in a plain loop in this process; end to
end, as Ray Data runs them. Sides alternate, medians are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1]))

import cv2
import numpy as np
import psutil
import ray

from benchmarks.pictures import picture
from pipelines.feed import FeedSettings, feed, training_pass
from pipelines.ingest import ingest
from pipelines.runtime import quiet_ray_data
from pipelines.synthesize import synthesize
from teasr.degradation import Degradation
from teasr.images import decode, encode
from teasr.shards import Sample, join_url, read_manifest, read_shard, write_shard

SETTINGS = FeedSettings(crop=96, crops_per_photo=16)


def photographs(folder: Path, count: int) -> None:
    """Pictures of 1.2 megapixels, as JPEG."""
    for i in range(count):
        data = encode(picture(960, 1280, seed=i), "jpeg", quality=90)
        (folder / f"photo-{i:03d}.jpg").write_bytes(data)


def large_photographs(folder: Path) -> None:
    """JPEGs of 191 and 42 megapixels, and a PNG of 38."""
    tile = picture(512, 512, seed=0)
    for name, rows, columns in (("huge.jpg", 27, 27), ("large.jpg", 10, 16), ("wide.png", 3, 48)):
        format = "jpeg" if name.endswith("jpg") else "png"
        data = encode(np.tile(tile, (rows, columns, 1)), format, quality=85)
        (folder / name).write_bytes(data)


def bare_feed(data: str, pairs: int) -> float:
    """Pairs per second of the feed's own function in a loop."""
    one = training_pass(data, SETTINGS)
    begin, done, index = time.perf_counter(), 0, 0
    while done < pairs:
        for block in one({"pass": np.array([index])}):
            done += len(block["hr"])
        index += 1
    return done / (time.perf_counter() - begin)


def ray_feed(data: str, pairs: int) -> float:
    """Pairs per second out of Ray Data, after the first batch has come."""
    with quiet_ray_data():
        batches = iter(feed(data, SETTINGS, batch=16).iter_torch_batches(batch_size=16))
        next(batches)
        begin, done = time.perf_counter(), 0
        for batch in batches:
            done += len(batch["hr"])
            if done >= pairs:
                break
        del batches
    return done / (time.perf_counter() - begin)


def bare_synthesis(data: str, target: Path, copies: int) -> float:
    """Pairs per second of decode, degrade, encode and write in a loop."""
    begin, done = time.perf_counter(), 0
    degradation = Degradation("teasr", 0)
    for shard in read_manifest(data).shards:
        samples = []
        for sample in read_shard(join_url(data, shard.name)):
            rgb = decode(sample.members["jpg"]).rgb
            for variant in range(copies):
                pair = degradation(rgb, sample.key, variant)
                members = {
                    "hr.png": encode(pair.hr),
                    "lr.png": encode(pair.lr),
                    "json": json.dumps(pair.recipe).encode(),
                }
                samples.append(Sample(f"{sample.key}-v{variant}", members))
                done += 1
        write_shard(str(target / shard.name), samples)
    return done / (time.perf_counter() - begin)


def ray_synthesis(data: str, target: Path, copies: int) -> float:
    """Pairs per second of `synthesize`, start to manifest."""
    begin = time.perf_counter()
    summary = synthesize(data, str(target), copies=copies)
    return summary.samples / (time.perf_counter() - begin)


def cost_over_a_stream(data: str, marks: list[int]) -> dict[int, float]:
    """Milliseconds per pair up to each mark, since the mark before it."""
    costs: dict[int, float] = {}
    settings = FeedSettings(crop=64, crops_per_photo=64)
    with quiet_ray_data():
        batches = iter(feed(data, settings, batch=64).iter_torch_batches(batch_size=64))
        for _ in range(8):
            next(batches)  # Ray starts its workers
        done, before, begin = 0, 0, time.perf_counter()
        for batch in batches:
            done += len(batch["hr"])
            if done >= marks[0]:
                now = time.perf_counter()
                costs[marks.pop(0)] = 1e3 * (now - begin) / (done - before)
                before, begin = done, now
            if not marks:
                break
        del batches
    return costs


def cost_of_syntheses(folder: Path, sizes: list[int]) -> dict[int, float]:
    """Milliseconds per pair of syntheses of so many pairs, start to manifest."""
    (folder / "small").mkdir()
    for i in range(125):
        data = encode(picture(96, 96, seed=i))
        (folder / "small" / f"{i:03d}.png").write_bytes(data)
    ingest([str(folder / "small")], str(folder / "small-hr"), shard_size=25)
    costs: dict[int, float] = {}
    for size in (125, *sizes):  # the first starts Ray's workers
        begin = time.perf_counter()
        synthesize(str(folder / "small-hr"), str(folder / f"small-{size}"), copies=size // 125)
        costs[size] = 1e3 * (time.perf_counter() - begin) / size
    return {size: costs[size] for size in sizes}


def worker_peaks() -> list[float]:
    """Peak resident memory of Ray's workers since they started, MB."""
    peaks = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.name().startswith("ray::") or "ray::" in " ".join(process.info["cmdline"] or []):
            status = Path(f"/proc/{process.pid}/status").read_text()
            (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
            peaks.append(int(line.split()[1]) / 1024)
    return peaks


def memory_of_workers(folder: Path) -> float:
    """Peak MB of a worker that ingests and degrades the largest photographs."""
    (folder / "large").mkdir()
    large_photographs(folder / "large")
    photos, data = str(folder / "large"), str(folder / "large-hr")
    summary = ingest([photos], data, shard_size=3, duplicates="exact")
    assert summary.samples == 3, summary
    synthesize(data, str(folder / "large-pairs"), copies=4)
    return max(worker_peaks())


def drift(costs: dict[int, float]) -> float:
    """How much more the last pairs cost than the first."""
    values = list(costs.values())
    return values[-1] / values[0] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer pictures and repetitions")
    quick = parser.parse_args().quick
    count, pairs, copies, repeats = (8, 512, 1, 1) if quick else (32, 4096, 4, 3)
    cv2.setNumThreads(1)
    # One CPU for Ray: as many as the loop has.
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=500_000_000,
        log_to_driver=False,
        logging_level="ERROR",
    )
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "photos").mkdir()
        photographs(folder / "photos", count)
        data = str(folder / "hr")
        ingest([str(folder / "photos")], data, shard_size=8)
        for i in range(repeats):
            for name, rate in (
                ("feed, bare", lambda: bare_feed(data, pairs)),
                ("feed, Ray", lambda: ray_feed(data, pairs)),
                ("synthesis, bare", lambda i=i: bare_synthesis(data, folder / f"bare{i}", copies)),
                ("synthesis, Ray", lambda i=i: ray_synthesis(data, folder / f"ray{i}", copies)),
            ):
                rates.setdefault(name, []).append(rate())
        marks = [1000, 2000] if quick else [1000, 10_000, 100_000]
        syntheses = cost_of_syntheses(folder, list(marks))
        stream = cost_over_a_stream(data, marks)
        peak = memory_of_workers(folder)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'':22}{'pairs/s':>10}")
    for name, value in medians.items():
        print(f"{name:22}{value:10.1f}")
    print("\nmilliseconds per pair")
    for mark, cost in stream.items():
        print(f"{f'feed, up to pair {mark:,}':32}{cost:10.2f}")
    for size, cost in syntheses.items():
        print(f"{f'synthesis of {size:,} pairs':32}{cost:10.2f}")
    print(f"\npeak memory of a worker: {peak:.0f} MB (JPEGs of 191 and 42 megapixels, a PNG of 38)")
    figures = {
        "feed_efficiency": medians["feed, Ray"] / medians["feed, bare"],
        "synthesize_efficiency": medians["synthesis, Ray"] / medians["synthesis, bare"],
        "feed_cost_drift": drift(stream),
        "synthesize_cost_drift": drift(syntheses),
        "worker_peak_mb": peak,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
