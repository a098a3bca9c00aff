"""Hygiene: copies are found and different pictures are not, crops are found, measures measure."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from teasr.hygiene import (
    LOOK_SIDE,
    Benchmark,
    BenchmarkPicture,
    Compared,
    find_copies,
    perceptual_hash,
    sharpness,
    thumbnail_of,
)
from teasr.images import look

Scene = NDArray[np.uint8]


def scene(seed: int, height: int = 900, width: int = 1200) -> Scene:
    """Blobs of every size, (H, W, 3): structure at all scales, as photographs have."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells in (3, 8, 20, 60, 200):
        coarse = random.normal(0, 1, (cells, cells * 4 // 3, 3)).astype(np.float32)
        layer = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        total += layer * (40 / cells**0.4)
    return (128 + total).clip(0, 255).astype(np.uint8)


def jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def compared(name: str, data: bytes, settled: bool = False) -> Compared:
    seen = look(data, LOOK_SIDE)
    thumbnail = thumbnail_of(seen.grey)
    return Compared(
        name=name,
        sha256=str(hash(data)),
        width=seen.width,
        height=seen.height,
        hash=perceptual_hash(thumbnail),
        thumbnail=thumbnail,
        settled=settled,
    )


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "compressed": lambda p: jpeg(p, 30),
    "halved": lambda p: jpeg(p.resize((p.width // 2, p.height // 2))),
    "cropped": lambda p: jpeg(p.crop((20, 15, p.width - 20, p.height - 15))),
    "cropped at a corner": lambda p: jpeg(p.crop((24, 18, p.width, p.height))),
    "brightened": lambda p: jpeg(p.point(lambda level: min(255, int(level * 1.15 + 5)))),
    "without colour": lambda p: jpeg(p.convert("L")),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found_among_others(kind: str) -> None:
    originals = [Image.fromarray(scene(seed)) for seed in range(5)]
    pictures = [compared(f"p{i}", jpeg(p, 95), settled=True) for i, p in enumerate(originals)]
    for i, original in enumerate(originals):
        (copy,) = find_copies([*pictures, compared("a copy", COPIES[kind](original))], "near")
        assert (copy.index, copy.kept, copy.exact) == (5, i, False)


def test_different_pictures_are_not_copies() -> None:
    pictures = [compared(f"p{seed}", jpeg(Image.fromarray(scene(seed)))) for seed in range(60)]
    assert find_copies(pictures, "near") == []


def test_pictures_without_structure_are_copies_of_none() -> None:
    flat = [compared(f"{v}", jpeg(Image.new("RGB", (99, 99), (v, v, v)))) for v in (90, 91, 250)]
    assert find_copies(flat, "near") == []
    assert (
        len(
            find_copies(
                [flat[0], compared("again", jpeg(Image.new("RGB", (99, 99), (90,) * 3)))], "exact"
            )
        )
        == 1
    )


def test_the_largest_is_kept_then_the_first_but_what_is_settled_stays() -> None:
    original = Image.fromarray(scene(1))
    small = jpeg(original.resize((400, 300)))
    pictures = [compared("b", small), compared("a", small), compared("z", jpeg(original))]
    assert [(c.index, c.kept, c.exact) for c in find_copies(pictures[:2], "exact")] == [
        (0, 1, True)
    ]
    assert [(c.index, c.kept) for c in find_copies(pictures, "near")] == [(0, 2), (1, 2)]
    assert [c.index for c in find_copies(pictures[::-1], "near")] == [1, 2]
    settled = [compared("b", small, settled=True), *pictures[1:]]
    assert [(c.index, c.kept) for c in find_copies(settled, "near")] == [(1, 0), (2, 0)]
    both = [compared("b", small, settled=True), pictures[1], compared("z", jpeg(original), True)]
    assert [c.index for c in find_copies(both, "near")] == [1]


def test_sharpness_falls_with_blur_and_does_not_depend_on_contrast() -> None:
    noise = np.random.default_rng(0).normal(0, 15, (900, 1200))
    grey = (cv2.cvtColor(scene(3), cv2.COLOR_RGB2GRAY) + noise).clip(0, 255).astype(np.uint8)
    values = [sharpness(grey)]
    for sigma in (0.7, 1.5, 3, 6):
        values.append(sharpness(cv2.GaussianBlur(grey, (0, 0), sigma).astype(np.uint8)))
    assert all(before > after for before, after in pairwise(values))
    assert values[0] > 0.7 and values[-1] < 0.05
    low_contrast = (64 + grey / 2).astype(np.uint8)
    assert sharpness(low_contrast) == pytest.approx(values[0], abs=0.05)
    assert sharpness(np.full((50, 50), 7, np.uint8)) == 0


def crops() -> Iterator[tuple[int, float, tuple[int, int]]]:
    for scale in (1.0, 1.5, 2.0):
        for side in (256, 400):
            if side * scale < 900:
                yield side, scale, (57, 131)


@pytest.mark.parametrize(("side", "scale", "place"), crops())
def test_a_crop_is_found_in_its_photograph_only(
    side: int, scale: float, place: tuple[int, int]
) -> None:
    photographs = [scene(seed, 1500, 2000) for seed in range(4)]
    top, left = place
    covered = int(side * scale)
    part = Image.fromarray(photographs[2][top : top + covered, left : left + covered])
    seen = look(jpeg(part.resize((side, side), Image.Resampling.BOX)), 256)
    benchmark = Benchmark([BenchmarkPicture("crop", seen.grey, seen.width, seen.height)])
    found = []
    for photograph in photographs:
        its = look(jpeg(Image.fromarray(photograph), 75), LOOK_SIDE)
        found.append(benchmark.find(its.grey, its.width, its.height))
    assert found == [None, None, "crop", None]


def test_the_whole_picture_at_another_size_is_found() -> None:
    whole = Image.fromarray(scene(5))
    seen = look(jpeg(whole.resize((500, 375))), 256)
    benchmark = Benchmark([BenchmarkPicture("whole", seen.grey, seen.width, seen.height)])
    its = look(jpeg(whole), LOOK_SIDE)
    assert benchmark.find(its.grey, its.width, its.height) == "whole"
