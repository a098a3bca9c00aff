"""What Ray costs: the feed and the synthesis end to end, over their own transforms run bare.

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
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import ray

from pipelines.feed import FeedSettings, feed, training_pass
from pipelines.ingest import ingest
from pipelines.runtime import quiet_ray_data
from pipelines.synthesize import synthesize
from teasr.degradation import Degradation
from teasr.images import decode, encode
from teasr.shards import Sample, join_url, read_manifest, read_shard, write_shard

SETTINGS = FeedSettings(crop=96, crops_per_photo=16)


def photographs(folder: Path, count: int) -> None:
    """Pictures of 1.2 megapixels with the spectrum of photographs (1/f noise, seeded)."""
    for i in range(count):
        random = np.random.default_rng(i)
        spectrum = np.fft.rfft2(random.normal(size=(960, 1280, 3)), axes=(0, 1))
        rows, columns = np.fft.fftfreq(960)[:, None], np.fft.rfftfreq(1280)[None]
        spectrum /= np.maximum(np.hypot(rows, columns), 1 / 960)[..., None]
        picture = np.fft.irfft2(spectrum, axes=(0, 1))
        picture = 128 + 55 * picture / picture.std()
        data = encode(picture.clip(0, 255).astype(np.uint8), "jpeg", quality=90)
        (folder / f"photo-{i:03d}.jpg").write_bytes(data)


def bare_feed(data: str, pairs: int) -> float:
    """Pairs per second of the feed's own function in a loop."""
    one = training_pass(data, SETTINGS)
    begin, done, index = time.perf_counter(), 0, 0
    while done < pairs:
        for block in one({"id": np.array([index])}):
            done += len(block["hr"])
        index += 1
    return done / (time.perf_counter() - begin)


def ray_feed(data: str, pairs: int) -> float:
    """Pairs per second out of Ray Data, after the first batch has come."""
    with quiet_ray_data():
        batches = iter(feed(data, SETTINGS, 4 * pairs).iter_torch_batches(batch_size=16))
        next(batches)
        begin, done = time.perf_counter(), 0
        for batch in batches:
            done += len(batch["hr"])
            if done >= pairs:
                break
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
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'':22}{'pairs/s':>10}")
    for name, value in medians.items():
        print(f"{name:22}{value:10.1f}")
    figures = {
        "feed_efficiency": medians["feed, Ray"] / medians["feed, bare"],
        "synthesize_efficiency": medians["synthesis, Ray"] / medians["synthesis, bare"],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
