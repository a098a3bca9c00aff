"""`teasr data sheet`: a contact sheet and a page with samples, recipes and distributions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.look import Document, Documents, choose, documents, parse, sides
from teasr.degradation import PRESETS, DegradationSettings, load_preset
from teasr.degradation.survey import describe, short, stages, survey
from teasr.errors import UsageError
from teasr.gallery import Card, page
from teasr.images import BadPicture, Bytes, decode, encode
from teasr.plots import Choices, Numbers, Plot
from teasr.shards import SHARD_PICTURES, Manifest, Sample, write_bytes
from teasr.sheets import Tile, contact_sheet

SHEET_FILE = "sheet.png"
PAGE_FILE = "index.html"

# Sides of what is shown of a pair, HR pixels: small enough to see single LR pixels.
PAGE_CUT, SHEET_CUT = 384, 256
THUMBNAIL = 420

_NUMBERS = {
    "jpeg_quality": ("JPEG quality of the file", 1.0),
    "sharpness": ("sharpness", None),
    "shrunk_by": ("shrunk by", None),
}


@dataclass(frozen=True)
class Sheets:
    """What was written, and what of the dataset it shows."""

    sheet: Path
    page: Path
    samples: int
    shards: int


def data_sheet(
    folder: str,
    out: Path,
    *,
    samples: int = 12,
    seed: int = 0,
    max_shards: int = 64,
    preset: str | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Sheets:
    """Write `sheet.png` and `index.html` of the dataset at `folder` into `out`.

    Args:
        samples: how many are shown, drawn at random by `seed`.
        max_shards: how many shards the distributions are of, spread over the dataset.
        preset: a preset's name or YAML file whose ranges are marked; by default the one that the
            manifest names, where it is known.

    Raises:
        UsageError: no dataset, or an empty one, or an unknown preset.
        TeasrError: a shard cannot be read, or a picture cannot be decoded.
    """
    told = progress or (lambda done, note: None)
    settings = load_preset(preset) if preset else None
    found = documents(folder, max_shards)
    manifest = found.manifest
    if not manifest.samples:
        raise UsageError(f"{folder} holds no samples to look at.")
    if settings is None:
        settings = PRESETS.get(manifest.preset or "")
    told(0.3, "parameters read")
    tiles, cards = [], []
    make = _pair if manifest.kind == "pairs" else _picture
    for index, sample in enumerate(choose(folder, samples, seed), 1):
        try:
            tile, card = make(sample)
        except BadPicture as error:
            raise UsageError(
                f"The sample '{sample.key}' cannot be shown: {error.message}",
                f"See: teasr data validate {folder}",
            ) from None
        tiles.append(tile)
        cards.append(card)
        told(0.3 + 0.5 * index / samples, f"{index} samples read")
    name = folder.rstrip("/").rpartition("/")[2] or folder
    title = f"{name}: {len(tiles)} of {manifest.samples} samples"
    if manifest.kind == "pairs":
        title += "; HR at the left, LR at the right, its pixels enlarged"
    image = contact_sheet(tiles, 3 if manifest.kind == "pairs" else 6, title)
    plots, about = _plots(found, settings)
    text = page(name, facts(manifest), cards, plots, about)
    out.mkdir(parents=True, exist_ok=True)
    image.save(out / SHEET_FILE)
    write_bytes(str((out / PAGE_FILE).absolute()), text.encode())
    return Sheets(out / SHEET_FILE, out / PAGE_FILE, len(found.documents), found.shards)


def facts(manifest: Manifest) -> dict[str, str]:
    """What the manifest says, for people: name and value."""
    kind = {"hr": "HR pictures", "pairs": "LR/HR pairs"}[manifest.kind]
    lines = {
        "kind": kind,
        "samples": f"{manifest.samples} in {len(manifest.shards)} shards, "
        f"{manifest.bytes / 1e6:.1f} MB",
        "fingerprint": manifest.fingerprint,
        "parent": manifest.parent or "",
        "preset": manifest.preset or "",
        "seed": "" if manifest.seed is None else str(manifest.seed),
        "scale": "" if manifest.scale is None else str(manifest.scale),
        "options": _listed(manifest.options),
        "versions": _listed(manifest.versions),
        "quarantined": _listed(manifest.quarantined) or "none",
    }
    return {name: value for name, value in lines.items() if value}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {'none' if v is None else v}" for name, v in values.items())


# ---------------------------------------------------------------- samples


def _pair(sample: Sample) -> tuple[Tile, Card]:
    hr, lr = decode(sample.members["hr.png"]).rgb, decode(sample.members["lr.png"]).rgb
    recipe = parse(sample.members["json"]).get("recipe")
    recipe = recipe if isinstance(recipe, Mapping) else {}
    tile = Tile([*_cut(hr, lr, SHEET_CUT)], sample.key, short(recipe))
    cut_hr, cut_lr = _cut(hr, lr, PAGE_CUT)
    size = cut_hr.shape[1], cut_hr.shape[0]
    whole = hr.shape[1], hr.shape[0]
    note = f"{whole[0]} × {whole[1]}"
    if size != whole:
        note = f"the middle {size[0]} × {size[1]} of {note}"
    card = Card(sample.key, encode(cut_hr), size, encode(cut_lr), note, _parts(recipe, hr, lr))
    return tile, card


def _cut(hr: Bytes, lr: Bytes, side: int) -> tuple[Bytes, Bytes]:
    """The same middle of HR and LR, `side` HR pixels at most."""
    scale = max(1, hr.shape[0] // max(lr.shape[0], 1))
    low = max(1, side // scale)
    height, width = min(low, lr.shape[0]), min(low, lr.shape[1])
    top, left = (lr.shape[0] - height) // 2, (lr.shape[1] - width) // 2
    cut_lr = lr[top : top + height, left : left + width]
    rows = slice(top * scale, (top + height) * scale)
    columns = slice(left * scale, (left + width) * scale)
    return np.ascontiguousarray(hr[rows, columns]), np.ascontiguousarray(cut_lr)


def _parts(recipe: Mapping[str, Any], hr: Bytes, lr: Bytes) -> dict[str, list[str]]:
    try:
        parts = stages(recipe)
    except UsageError:
        return {"Recipe": ["none of a two-stage degradation"]}
    sharpened = ["ground truth sharpened"] if recipe.get("sharpened") else []
    return {
        "Before": sharpened,
        "Stage one": [describe(*step, hr.shape[1]) for step in parts.first],
        "Stage two": [describe(*step, lr.shape[1]) for step in parts.second],
        "The end": [describe(*step) for step in parts.last],
    }


def _picture(sample: Sample) -> tuple[Tile, Card]:
    suffix = next(suffix for suffix in sample.members if suffix in SHARD_PICTURES)
    rgb = decode(sample.members[suffix]).rgb
    about = parse(sample.members["json"])
    height, width = rgb.shape[:2]
    small = Image.fromarray(rgb)
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    shown = np.asarray(small)
    size = f"{width} x {height}, {suffix}"
    lines = [f"{_NUMBERS[name][0]}: {about[name]:.4g}" for name in _NUMBERS if _number(about, name)]
    if why := about.get("encoded_because"):
        lines.append(f"stored as PNG because: {', '.join(map(str, why))}")
    if source := about.get("source"):
        lines.append(f"source: {source}")
    card = Card(
        sample.key,
        encode(shown, "jpeg", quality=88),
        small.size,
        note=f"{width} × {height}, {len(sample.members[suffix]) / 1e6:.2f} MB {suffix}",
        parts={"": lines},
    )
    return Tile([shown], sample.key, size), card


def _number(about: Mapping[str, Any], name: str) -> bool:
    return isinstance(about.get(name), int | float) and not isinstance(about[name], bool)


# ---------------------------------------------------------------- distributions


def _plots(
    found: Documents, settings: DegradationSettings | None
) -> tuple[Mapping[str, Sequence[Plot]], str]:
    manifest = found.manifest
    of = f"Of all {len(found.documents)} samples."
    if found.shards < len(manifest.shards):
        of = (
            f"Of {len(found.documents)} samples in {found.shards} of {len(manifest.shards)} shards,"
            " spread evenly."
        )
    if manifest.kind == "hr":
        return {"Pictures": _picture_plots(found.documents)}, of
    measured = sides(found.documents)
    recipes = [
        (document.about["recipe"], height, width)
        for document, height, width in zip(
            [d for d in found.documents if sides([d])["width"]],
            measured["height"],
            measured["width"],
        )
        if isinstance(document.about.get("recipe"), Mapping)
    ]
    groups, others = survey(recipes, settings)
    others += len(found.documents) - len(recipes)
    if others:
        of += f" {others} have no recipe of a two-stage degradation and are left out."
    if settings:
        of += (
            f" Bars: what was drawn. Line: what the preset '{settings.name}' says; the band around "
            "it holds 95 % of what chance gives. Hold the pointer over a bar for its numbers."
        )
    else:
        of += f" The preset '{manifest.preset}' is not known here, so nothing is marked."
    return {**groups, "Ground truth": _side_plots(measured)}, of


def _side_plots(measured: Mapping[str, Sequence[int]]) -> list[Plot]:
    return [
        Numbers(f"{name}, pixels", np.asarray(values, dtype=np.float64), step=1)
        for name, values in measured.items()
    ]


def _picture_plots(found: Sequence[Document]) -> list[Plot]:
    measured = sides(found)
    plots = _side_plots(measured)
    pixels = np.asarray(measured["width"], np.float64) * np.asarray(measured["height"], np.float64)
    plots.append(Numbers("size, megapixels", pixels / 1e6))
    came = Counter(str(document.about.get("format", "not stated")) for document in found)
    plots.append(Choices("format of the file that came", dict(came.most_common())))
    stored = Counter(document.formats[0] for document in found if document.formats)
    plots.append(Choices("format in the shard", dict(stored.most_common())))
    whys = Counter(
        str(why) for document in found for why in document.about.get("encoded_because") or ()
    )
    plots.append(Choices("encoded anew because", dict(whys.most_common())))
    for name, (title, step) in _NUMBERS.items():
        values = [float(d.about[name]) for d in found if _number(d.about, name)]
        plots.append(Numbers(title, np.asarray(values, dtype=np.float64), step=step))
    return plots
