"""What makes a photograph worth less to learn from: copies, benchmark pictures in it, blur.

All is judged on the quick look of `teasr.images.look`, so that a hundred thousand photographs are
compared in minutes. Copies are found by a perceptual hash and then confirmed by correlation;
benchmark pictures that were cut out of a photograph, by template matching from coarse to fine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from teasr.images import Bytes

LOOK_SIDE = 1024
"""Longer side, pixels, of the look that everything here is measured on."""

THUMBNAIL_SIDE = 32

# Copies after another compression, another size or a crop of up to 5 % differ in at most 16 of the
# 63 bits (94 % of real photographs with the worst of these); of unrelated ones, 1 pair in 1600.
HASH_DISTANCE = 16
# Confirmed copies correlate above this; the most alike pair of 209 different photographs has 0.91.
COPY_CORRELATION = 0.95
# Below these, as they are and at a few sizes, they do not, however they are laid on each other.
_HOPELESS = (0.4, 0.75)
# A copy may be cropped by up to a tenth, which changes the proportions by no more.
ASPECT_RATIO = 1.25
# Grey levels: a picture without structure resembles every other and is compared to none.
LEAST_DEVIATION = 2.0

# Photograph pixels that one benchmark pixel covers: cut out as it is, or reduced as `shrink` does.
LEAK_SCALES = (1.0, 1.5, 2.0)
_COARSE_SIDE = 256
_FINE_SIDE = 128
_COARSE_CORRELATION = 0.7
_LEAK_CORRELATION = 0.85
_LEAK_DETAIL_CORRELATION = 0.8
_LEAST_TEMPLATE = 10  # pixels: in less than this much of the coarse look nothing can be recognised


def thumbnail_of(grey: Bytes) -> Bytes:
    """`grey` uint8 (H, W) as uint8 (32, 32), each pixel the mean of what it covers."""
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def perceptual_hash(thumbnail: Bytes) -> int:
    """63 bits of a (32, 32) thumbnail: which of its lowest 8 x 8 cosine coefficients, without the
    mean, are above their median. Alike pictures differ in few bits (C. Zauner, "Implementation and
    benchmarking of perceptual image hash functions", 2010, section 3.2.1)."""
    lowest = cv2.dct(thumbnail.astype(np.float32))[:8, :8].ravel()
    bits = lowest > np.median(lowest[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def sharpness(grey: Bytes) -> float:
    """How sharp a look, uint8 (H, W), is: 0 (no detail is lost by another blur) to 1.

    One minus the blur effect of F. Crete et al., "The blur effect: perception and estimation with
    a new no-reference perceptual blur metric", SPIE 6492, 2007: the share of the differences
    between neighbours that a mean over 9 pixels removes, along the axis where it is smaller. A
    share, so contrast hardly matters; noise counts as detail. One grey level of each difference is
    left out: it may be rounding, whose steps would look like detail in smooth pictures.
    """
    values = grey.astype(np.float32)
    shares = []
    for axis, size in ((0, (1, 9)), (1, (9, 1))):
        before = np.maximum(np.abs(np.diff(values, axis=axis)) - 1, 0)
        after = np.abs(np.diff(cv2.blur(values, size, borderType=cv2.BORDER_REPLICATE), axis=axis))
        total = float(before.sum())
        shares.append(float(np.maximum(before - after, 0).sum()) / total if total else 0.0)
    return min(shares)


# ---------------------------------------------------------------- copies


@dataclass(frozen=True)
class Compared:
    """A picture among those that are searched for copies.

    Attributes:
        name: decides between equals.
        sha256: of the file.
        width, height: pixels.
        hash: from `perceptual_hash`.
        thumbnail: from `thumbnail_of`.
        settled: it is in the dataset already and stays, whatever resembles it.
    """

    name: str
    sha256: str
    width: int
    height: int
    hash: int
    thumbnail: Bytes
    settled: bool = False


@dataclass(frozen=True)
class Copy:
    """A picture that is left out: `index` of it and of the one that is `kept` instead."""

    index: int
    kept: int
    exact: bool


def find_copies(pictures: Sequence[Compared], kinds: Literal["exact", "near"]) -> list[Copy]:
    """Which of `pictures` are copies of one that is kept.

    Settled pictures are all kept. Of the others, one is kept unless it resembles one that is kept
    already, taken in order of size (pixels, largest first) and then of name. The result depends on
    nothing else. All pairs with an unsettled picture are compared by their hashes, in numpy, about
    4 ns a pair on one core (100,000 new pictures: 20 s); of the pairs with near hashes, one in
    2000, most are told apart in 0.1 to 1 ms (100,000 new pictures: some 15 minutes).
    """
    order = sorted(
        range(len(pictures)),
        key=lambda i: (
            not pictures[i].settled,
            -pictures[i].width * pictures[i].height,
            pictures[i].name,
        ),
    )
    copies: dict[int, Copy] = {}
    first: dict[str, int] = {}
    for i in order:
        kept = first.setdefault(pictures[i].sha256, i)
        if kept != i and not pictures[i].settled:
            copies[i] = Copy(i, kept, exact=True)
    if kinds == "near":
        rest = [i for i in order if i not in copies]
        for later, earlier in _near_hashes(rest, pictures):
            i, kept = rest[later], rest[earlier]
            if i in copies or kept in copies or not _is_copy(pictures[i], pictures[kept]):
                continue
            copies[i] = Copy(i, kept, exact=False)
        for i, copy in copies.items():  # an exact copy of what is a near copy itself
            if copy.kept in copies:
                copies[i] = Copy(i, copies[copy.kept].kept, exact=False)
    return [copies[i] for i in sorted(copies)]


def _near_hashes(
    order: Sequence[int], pictures: Sequence[Compared], rows: int = 32
) -> Iterator[tuple[int, int]]:
    """Places (later, earlier) in `order` of pictures with near hashes, the later not settled."""
    hashes = np.array([pictures[i].hash for i in order], np.uint64)
    start = sum(pictures[i].settled for i in order)
    for top in range(start, len(order), rows):
        block = hashes[top : top + rows, None]
        distance = np.bitwise_count(block ^ hashes[None, : top + rows])
        for row, column in np.argwhere(distance <= HASH_DISTANCE):
            if column < top + row:
                yield int(top + row), int(column)


def _is_copy(one: Compared, other: Compared) -> bool:
    proportions = one.width * other.height / (one.height * other.width)
    if not 1 / ASPECT_RATIO <= proportions <= ASPECT_RATIO:
        return False
    return similarity(one.thumbnail, other.thumbnail) >= COPY_CORRELATION


def similarity(one: Bytes, other: Bytes) -> float:
    """Largest normalised correlation, -1 to 1, of two (32, 32) thumbnails, when either may be the
    other without up to a sixth of its sides; 0 for pictures without structure. Where it is far
    below `COPY_CORRELATION`, an estimate."""
    if min(float(one.std()), float(other.std())) < LEAST_DEVIATION:
        return 0.0
    as_they_are = _best_match(one, other)
    if as_they_are < _HOPELESS[0]:
        return as_they_are
    side = 2 * THUMBNAIL_SIDE  # crops move the content by fractions of a thumbnail's pixel
    large = [_to_size(thumbnail, side) for thumbnail in (one, other)]

    def best(sides: Iterable[int]) -> float:
        return max(
            _best_match(whole, _to_size(part, reduced))
            for part, whole in (large, large[::-1])
            for reduced in sides
        )

    estimate = best((side - 9, side - 4, side))
    return estimate if estimate < _HOPELESS[1] else best(range(side - 10, side + 1))


def _to_size(square: Bytes, side: int) -> Bytes:
    method = cv2.INTER_AREA if side < len(square) else cv2.INTER_CUBIC
    return cv2.resize(square, (side, side), interpolation=method).astype(np.uint8, copy=False)


def _best_match(whole: Bytes, template: Bytes) -> float:
    matches = cv2.matchTemplate(whole, template, cv2.TM_CCOEFF_NORMED)
    return float(np.nan_to_num(matches, posinf=0, neginf=0).max())


# ---------------------------------------------------------------- benchmark pictures


@dataclass(frozen=True)
class BenchmarkPicture:
    """A picture that must not be learned from.

    Attributes:
        name: what the report calls it.
        grey: its look, uint8 (H, W).
        width, height: of the whole picture, pixels.
    """

    name: str
    grey: Bytes
    width: int
    height: int


class Benchmark:
    """Finds benchmark pictures in photographs; costs about 5 ms a photograph and picture.

    A benchmark picture is found when it is the photograph itself, at any size or compression, or
    was cut out of it upright and stored as it was, or reduced by 1.5 or 2 (`LEAK_SCALES`). Its
    part must cover about a twenty-fifth of the photograph's longer side and have some detail.
    Rotated, mirrored or otherwise scaled crops are not found.
    """

    def __init__(self, pictures: Sequence[BenchmarkPicture]) -> None:
        self._pictures = pictures
        self._thumbnails = [thumbnail_of(picture.grey) for picture in pictures]
        self._hashes = np.array([perceptual_hash(t) for t in self._thumbnails], np.uint64)

    def find(self, grey: Bytes, width: int, height: int) -> str | None:
        """Name of the first benchmark picture that is in a photograph, or None.

        Args:
            grey: the photograph's look, uint8 (H, W).
            width, height: of the whole photograph, pixels.
        """
        thumbnail = thumbnail_of(grey)
        distance = np.bitwise_count(np.uint64(perceptual_hash(thumbnail)) ^ self._hashes)
        reduction = max(grey.shape) / max(width, height)
        coarse = _resized(grey, min(1.0, _COARSE_SIDE / max(grey.shape)))
        for picture, own, bits in zip(self._pictures, self._thumbnails, distance):
            if bits <= HASH_DISTANCE and similarity(thumbnail, own) >= COPY_CORRELATION:
                return picture.name
            if any(_contains(grey, coarse, picture, reduction * s) for s in LEAK_SCALES):
                return picture.name
        return None


def _contains(grey: Bytes, coarse: Bytes, picture: BenchmarkPicture, scale: float) -> bool:
    """Whether `picture` is in the look `grey`, where each of its own pixels has `scale` pixels."""
    own = max(picture.grey.shape) / max(picture.width, picture.height)
    step = max(coarse.shape) / max(grey.shape)
    template = _resized(picture.grey, scale * step / own)
    if min(template.shape) < _LEAST_TEMPLATE or template.std() < LEAST_DEVIATION:
        return False
    if template.shape[0] > coarse.shape[0] or template.shape[1] > coarse.shape[1]:
        return False
    _, best, _, (left, top) = cv2.minMaxLoc(
        cv2.matchTemplate(coarse, template, cv2.TM_CCOEFF_NORMED)
    )
    if best < _COARSE_CORRELATION:
        return False
    # The same at the place that was found, as fine as the looks allow.
    fine = min(1.0, own / scale, _FINE_SIDE / (scale * max(picture.width, picture.height)))
    margin = 2
    rows, columns = (
        slice(max(0, int((start - margin) / step)), int((start + length + margin) / step) + 1)
        for start, length in zip((top, left), template.shape)
    )
    window = _resized(grey[rows, columns], fine)
    template = _resized(picture.grey, scale * fine / own)
    if template.shape[0] > window.shape[0] or template.shape[1] > window.shape[1]:
        return False
    plain = cv2.matchTemplate(window, template, cv2.TM_CCOEFF_NORMED)
    # Any two slopes or edges correlate; detail of a few pixels is what tells pictures apart.
    details = cv2.matchTemplate(_details(window), _details(template), cv2.TM_CCOEFF_NORMED)
    _, best, _, (left, top) = cv2.minMaxLoc(np.nan_to_num(details, posinf=0, neginf=0))
    return bool(best >= _LEAK_DETAIL_CORRELATION and plain[top, left] >= _LEAK_CORRELATION)


def _details(grey: Bytes) -> NDArray[np.floating]:
    values = grey.astype(np.float32)
    return cv2.GaussianBlur(values, (0, 0), 0.7) - cv2.GaussianBlur(values, (0, 0), 2.5)


def _resized(grey: Bytes, factor: float) -> Bytes:
    height, width = (max(1, round(side * factor)) for side in grey.shape)
    if (height, width) == grey.shape:
        return grey
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return cv2.resize(grey, (width, height), interpolation=method).astype(np.uint8, copy=False)
