"""What 64 GPUs and a billion photographs would take: a model on paper, of constants measured here.

    python benchmarks/cost_model.py

Nothing is run but arithmetic. Every constant says which benchmark it is from; docs/scaling.md has
the tables and what they show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# benchmarks/degradation.py: seconds of a core per crop of 256 and 400 pixels, preset `teasr`; a
# line in the number of pixels goes through both.
_CROPS = ((256, 1 / 219.4), (400, 1 / 115.0))
# benchmarks/pipeline.py: the feed's pairs per second of a core at 96 pixels and 16 crops to a
# photograph of 1.2 megapixels, of which the line above explains a part: the rest is decoding.
_FEED_96 = 384.2
# benchmarks/pipeline.py and scaling.py: what Ray leaves of a core.
EFFICIENCY = 0.9
# pipelines/feed.py, BLOCK: what a block costs Ray's one split coordinator.
BLOCK_SECONDS = 4e-3
# benchmarks/pipeline.py: whole photographs of 1.2 megapixels, degraded, encoded and written.
SYNTHESIS_SECONDS = 1 / 4.7
# benchmarks/scaling.py: a photograph of 1.2 megapixels that is ingested, start to manifest.
INGEST_SECONDS = 0.062
# Of 1.2 megapixels, as JPEG: the mean of 207 photographs, and the benchmarks' noisy pictures.
PHOTOGRAPH_BYTES = 126e3, 1_493e3
# A manifest of 100,000 shards: bytes, and seconds to read, per shard.
MANIFEST_BYTES, MANIFEST_SECONDS = 177, 11e-6

PHOTOGRAPHS, CROPS = 1e9, 16


@dataclass(frozen=True)
class Training:
    """What one GPU takes: pairs of `crop` pixels, `batch` at a time, by `teasr plan` on a GPU of
    80 GB at 400 TFLOP/s."""

    name: str
    crop: int
    batch: int
    step_seconds: float


TRAININGS = (
    Training("teasr-b, 100M", 128, 32, 0.1),
    Training("Z-Image, 6B", 512, 2, 6.0),
    Training("Qwen-Image, 20B", 512, 2, 8.0),
)


def pair_seconds(crop: int, crops: int = CROPS) -> float:
    """Seconds of a core that a pair of the feed takes: degradation and its share of decoding."""
    (side, least), (other, most) = _CROPS
    slope = (most - least) / (other**2 - side**2)

    def degrade(crop: int) -> float:
        return least + slope * (crop**2 - side**2)

    decode = 16 * (1 / _FEED_96 - degrade(96))
    return degrade(crop) + decode / crops


def feed_row(training: Training, gpus: int) -> str:
    """A row of the table of trainings."""
    demand = gpus * training.batch / training.step_seconds
    cores = demand * pair_seconds(training.crop) / EFFICIENCY
    pair_bytes = 3 * training.crop**2 * (1 + 1 / 16)
    block = math.gcd(training.batch, CROPS)
    busy = demand / block * BLOCK_SECONDS
    days = PHOTOGRAPHS * CROPS / demand / 86_400
    return (
        f"| {training.name} | {gpus} | {demand:,.1f} | {cores:,.1f} | "
        f"{8 * demand * pair_bytes / 1e9:.2f} | {busy:.1%} | {days:,.0f} |"
    )


def main() -> None:
    """Print the two tables."""
    names = "pairs/s | cores for the feed | Gbit/s | coordinator busy | days a pass"
    print(f"| backbone | GPUs | {names} |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for training in TRAININGS:
        for gpus in (1, 8, 64):
            print(feed_row(training, gpus))
    print("\n| a billion photographs | |")
    print("|---|---:|")
    days = PHOTOGRAPHS / 86_400 / EFFICIENCY
    least, most = (PHOTOGRAPHS * each / 1e12 for each in PHOTOGRAPH_BYTES)
    print(f"| on disk | {least:,.0f} to {most:,.0f} TB |")
    print(f"| ingest on 256 cores | {days * INGEST_SECONDS / 256:,.1f} days |")
    print(f"| a pair of each, whole, on 256 cores | {days * SYNTHESIS_SECONDS / 256:,.1f} days |")
    for per_shard in (16, 1_000, 10_000):
        shards = PHOTOGRAPHS / per_shard
        print(
            f"| manifest with {per_shard:,} a shard | {shards * MANIFEST_BYTES / 1e6:,.0f} MB, "
            f"{shards * MANIFEST_SECONDS:,.0f} s to read |"
        )


if __name__ == "__main__":
    main()
