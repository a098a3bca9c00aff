"""HR shards in, LR/HR pair shards out.

    ... → HR shard → **synthesize** → LR/HR pairs → feed → ...

Each HR shard gives one pair shard. What is drawn for a pair depends on (seed, preset, key,
variant) alone, never on the shard, the worker or the attempt, and stays with it as its recipe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.runtime import prepare_process
from pipelines.shard_job import (
    JobPlan,
    JobSummary,
    Rejected,
    ShardTask,
    plan_job,
    run_job,
    sibling_name,
)
from teasr import images
from teasr.degradation import SCALE, Degradation, DegradationSettings, load_preset, sample_seed
from teasr.errors import UsageError
from teasr.shards import (
    SHARD_PICTURES,
    Manifest,
    Sample,
    ShardInfo,
    absolute_url,
    content_hash,
    join_url,
    library_versions,
    read_manifest,
    read_shard,
)

# A worker holds several float copies of what it degrades: this many pixels keep it below 700 MB.
MAX_PIXELS = 4_000_000


def synthesize(
    source: str,
    destination: str,
    *,
    preset: str = "teasr",
    copies: int = 1,
    seed: int = 0,
    crop: int | None = None,
    max_bad_share: float | None = None,
) -> JobSummary:
    """Make a dataset of pairs: `copies` degraded variants of every HR picture.

    A pair is `KEY-vN.hr.png`, `KEY-vN.lr.png` (a quarter of the sides) and `KEY-vN.json` with the
    HR picture's `key`, the `variant` N, the `crop` (top, left, height, width, pixels of the source)
    and the `recipe`, which `teasr.degradation.replay` turns into the LR picture again.

    Args:
        source: folder of an HR dataset, local or a URL.
        destination: folder for the pairs. Running the same call again writes what is missing.
        preset: a preset's name or a YAML file.
        copies: variants per picture.
        seed: of everything that is drawn.
        crop: side in pixels, a multiple of 4, of a square cut at random from each picture for each
            variant; smaller pictures are left out. Without it the whole picture is used, but for
            up to 3 pixels at the right and the bottom; of a picture of more than `MAX_PIXELS`, a
            window of its shape and about so many pixels, at random for each variant.
        max_bad_share: share of pairs (0 to 1) that may be left out because their picture cannot be
            used; by default 0.5, applied from 20 pairs up.

    Raises:
        UsageError: no HR dataset at `source`, one of another kind at `destination`, an unknown
            preset, a setting out of range.
        TeasrError: too many pictures are unusable; a shard cannot be read or written.
    """
    job = plan(source, destination, preset=preset, copies=copies, seed=seed, crop=crop)
    builder = _SynthesizeShard(
        settings=load_preset(preset),
        source=absolute_url(source),
        copies=copies,
        seed=seed,
        crop=crop,
    )
    return run_job(job, builder, title="synthesize", max_bad_share=max_bad_share)


def plan(
    source: str,
    destination: str,
    *,
    preset: str = "teasr",
    copies: int = 1,
    seed: int = 0,
    crop: int | None = None,
) -> JobPlan:
    """What `synthesize` would do; reads the source's manifest and writes nothing.

    Raises:
        UsageError: as `synthesize`.
    """
    if copies < 1:
        raise UsageError(f"copies: {copies} is out of range.", "Give 1 or more.")
    if crop is not None and (crop < SCALE or crop % SCALE):
        raise UsageError(f"crop: {crop} cannot be used.", f"Give a positive multiple of {SCALE}.")
    settings = load_preset(preset)
    parent = read_manifest(source, "hr")
    versions = library_versions()
    # Library versions take part: shards of two versions must not mix in one dataset.
    shared = ["synthesize", settings.model_dump(mode="json"), copies, seed, crop, versions]
    tasks = [
        ShardTask(
            name=sibling_name(shard.name, "pairs"),
            samples=shard.samples * copies,
            payload={"shard": shard.model_dump()},
            fingerprint=content_hash([*shared, shard.sha256]),
        )
        for shard in parent.shards
    ]
    manifest = Manifest(
        kind="pairs",
        shards=(),
        preset=settings.name,
        seed=seed,
        scale=SCALE,
        parent=parent.fingerprint,
        options={"copies": copies, "crop": crop},
        versions=versions,
    )
    return plan_job(destination, tasks, manifest)


@dataclass(frozen=True)
class _SynthesizeShard:
    """Degrades the pictures of one HR shard."""

    settings: DegradationSettings
    source: str
    copies: int
    seed: int
    crop: int | None

    def __call__(self, task: ShardTask) -> Iterator[Sample | Rejected]:
        prepare_process()
        degradation = Degradation(self.settings, self.seed)
        shard = ShardInfo.model_validate(task.payload["shard"])
        for sample in read_shard(join_url(self.source, shard.name), shard, "hr"):
            try:
                rgb = _decode_hr(sample, self.crop or SCALE)
            except images.BadPicture as error:
                for variant in range(self.copies):
                    source = f"{sample.key}-v{variant}"
                    yield Rejected(source=source, reason=error.reason, message=str(error))
                continue
            for variant in range(self.copies):
                yield self._pair(degradation, sample.key, variant, rgb)

    def _pair(self, degradation: Degradation, key: str, variant: int, rgb: images.Bytes) -> Sample:
        place = self._place(key, variant, rgb.shape[0], rgb.shape[1])
        rows = slice(place["top"], place["top"] + place["height"])
        columns = slice(place["left"], place["left"] + place["width"])
        hr = np.ascontiguousarray(rgb[rows, columns])
        pair = degradation(hr, key=key, variant=variant)
        about = {"key": key, "variant": variant, "crop": place, "recipe": pair.recipe}
        members = {
            "hr.png": images.encode(pair.hr),
            "lr.png": images.encode(pair.lr),
            "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
        }
        return Sample(f"{key}-v{variant}", members)

    def _place(self, key: str, variant: int, height: int, width: int) -> dict[str, Any]:
        """The part of the picture that becomes HR: sides are multiples of the scale."""
        if self.crop is None:
            share = min(1.0, math.sqrt(MAX_PIXELS / (height * width)))
            rows = max(SCALE, int(height * share) // SCALE * SCALE)
            columns = max(SCALE, int(width * share) // SCALE * SCALE)
        else:
            rows = columns = self.crop
        top = left = 0
        if self.crop is not None or height * width > MAX_PIXELS:
            # A stream of its own: the degradation draws the same with and without a crop.
            name = f"{self.settings.name}/crop"
            random = np.random.default_rng(sample_seed(self.seed, name, key, variant))
            top = int(random.integers(height - rows + 1))
            left = int(random.integers(width - columns + 1))
        return {"top": top, "left": left, "height": rows, "width": columns}


def _decode_hr(sample: Sample, min_side: int) -> images.Bytes:
    data = next(data for suffix, data in sample.members.items() if suffix in SHARD_PICTURES)
    return images.decode(data, min_side=min_side).rgb
