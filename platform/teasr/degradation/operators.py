"""The degradation operators: picture and explicit parameters in, picture out; no hidden randomness.

**Convention.** Between operators a picture is float32, `(height, width, 3)`, RGB, nominally in
[0, 1]. Blur and bicubic resize may overshoot, as in the reference; noise clips its result; JPEG
clips, and rounds to 8 bits, its input. Every parameter is a JSON value, so a list of (operator,
parameters) is a complete record: noise carries the integer seed of its own generator.

Noise is built from the raw bits of SFC64 instead of `Generator.normal` and `.poisson`: NumPy
promises stable bit streams, not stable distributions, so a recipe replays under another NumPy, and
it is several times faster.

Source: Real-ESRGAN (arXiv 2107.10833), section 3; BasicSR for units and rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, pdtr

from teasr.degradation.kernels import Kernel, build_kernel, separable_terms, trimmed
from teasr.errors import UsageError

Image = NDArray[np.float32]
Bytes = NDArray[np.uint8]

RESIZE_MODES = {
    "area": cv2.INTER_AREA,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
}
# Luma weights of torchvision's `rgb_to_grayscale`, which the reference uses.
_GREY_WEIGHTS = np.array([[0.2989, 0.587, 0.114]], dtype=np.float32)
# A kernel may lose this much absolute weight to a faster filter: 1/200 of a grey level at most.
_KERNEL_TOLERANCE = 1e-5
# OpenCV filters directly up to 11 x 11 and by a slower DFT above, worth 4 to 20 separable passes by
# the picture's size (measured). So a small kernel is split only when one pass does it.
_DIRECT_SIZE = 11
_MAX_TERMS = 7
_REMAP_LIMIT = 1 << 15  # OpenCV's remap counts in 16 bits
# Noise is made for so many values at a time: all of them would fill the memory of large pictures.
_STRIP = 1 << 17
# Below this mean a Poisson count is drawn from its own distribution, above it from the expansion.
_SMALL_MEAN = 16.0


def to_float(image: NDArray[Any]) -> Image:
    """An RGB picture, uint8 in [0, 255] or float32 in [0, 1], as float32 in [0, 1].

    Raises:
        UsageError: when the array is no such picture.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UsageError(
            f"A picture of shape {image.shape} cannot be degraded.",
            "Expected (height, width, 3) RGB.",
        )
    if image.dtype == np.uint8:
        return np.multiply(image, np.float32(1 / 255), dtype=np.float32)
    if image.dtype == np.float32:
        return image
    raise UsageError(
        f"A picture of type {image.dtype} cannot be degraded.", "Expected uint8 or float32 RGB."
    )


def to_uint8(image: NDArray[Any]) -> Bytes:
    """Clip to [0, 1] and round to the nearest of 256 levels (half to even), `(H, W, 3)` uint8."""
    # One saturating pass of OpenCV in place of multiply, round, clip and cast.
    return np.asarray(cv2.addWeighted(image, 255.0, image, 0.0, 0.0, dtype=cv2.CV_8U))


def convolve(image: Image, kernel: Kernel) -> Image:
    """Filter with any odd `kernel` that sums to 1; the border is mirrored without its edge pixel.

    The cheapest way that is exact to 1/100 of a grey level is taken: the kernel cut to where it has
    weight, as a few one-dimensional passes, or directly.
    """
    kernel = trimmed(kernel, _KERNEL_TOLERANCE)
    most = 1 if len(kernel) <= _DIRECT_SIZE else _MAX_TERMS
    terms = separable_terms(kernel, most, _KERNEL_TOLERANCE)
    if terms is None:
        return np.asarray(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101))
    (column, row), *others = terms
    result = cv2.sepFilter2D(image, -1, row, column, borderType=cv2.BORDER_REFLECT_101)
    for column, row in others:
        term = cv2.sepFilter2D(image, -1, row, column, borderType=cv2.BORDER_REFLECT_101)
        cv2.add(result, term, dst=result)
    return np.asarray(result)


def blur(image: Image, shape: str, size: int, **numbers: float) -> Image:
    """Filter with `build_kernel(shape, size, **numbers)`; "sinc" is one of the shapes."""
    return convolve(image, build_kernel(shape, size, **numbers))


def resize(image: Image, height: int, width: int, mode: str) -> Image:
    """Resize to `(height, width)` by "area", "bilinear" or "bicubic" (a = -0.75), no antialiasing.

    "area" is `adaptive_average`.
    """
    if mode not in RESIZE_MODES:
        raise UsageError(f"Unknown resize mode '{mode}'.", f"Known: {', '.join(RESIZE_MODES)}.")
    # OpenCV weighs partly covered pixels by their share; whole factors cover none in part.
    if mode == "area" and (image.shape[0] % height or image.shape[1] % width):
        return adaptive_average(image, height, width)
    return np.asarray(cv2.resize(image, (width, height), interpolation=RESIZE_MODES[mode]))


def gaussian_noise(image: Image, sigma: float, grey: bool, seed: int) -> Image:
    """Add `N(0, (sigma / 255)^2)`, clipped to [0, 1]; `grey` gives the three channels one value.

    Args:
        image: picture, float32.
        sigma: standard deviation in grey levels of 255.
        grey: one noise field for all channels.
        seed: integer of the noise's own generator.
    """
    channels = 1 if grey else image.shape[2]
    result = np.empty_like(image)
    table = _normal_table() * np.float32(sigma / 255)
    for rows, uniform in _uniform16(image.shape[0], image.shape[1] * channels, seed):
        part = image[rows]
        noise = table.take(uniform).reshape(*part.shape[:2], channels)
        np.add(part, noise, out=result[rows])
        np.clip(result[rows], 0.0, 1.0, out=result[rows])
    return result


def poisson_noise(image: Image, scale: float, grey: bool, seed: int) -> Image:
    """Add `scale * (Poisson(levels * x) / levels - x)`, clipped to [0, 1]: shot noise.

    `x` is the picture in 256 levels and `levels` the number of distinct ones that it has, rounded
    up to a power of two. In `grey` mode both come from the grey picture and the three channels
    share the noise.

    Args:
        image: picture, float32.
        scale: strength; 1 is the physical noise, 0 none.
        grey: one noise field for all channels.
        seed: integer of the noise's own generator.
    """
    source = cv2.transform(image, _GREY_WEIGHTS) if grey else image
    values = to_uint8(source).reshape(image.shape[0], -1)  # channels beside one another
    present = cv2.calcHist([values], [0], None, [256], [0, 256]).ravel() > 0
    levels = 2 ** math.ceil(math.log2(int(present.sum())))
    means = np.arange(256) * (levels / 255)

    # Poisson quantile by Cornish-Fisher: round(m + s z + (z^2 - 1) / 6). The variances of the
    # rounding (1/12) and of the quadratic term (1/18) are taken out of s, so that mean and variance
    # are exact.
    spread = np.sqrt(np.maximum(means - 5 / 36, 0.0)).astype(np.float32)
    centre = (means - 1 / 6).astype(np.float32)
    small = np.flatnonzero(present & (means < _SMALL_MEAN))
    if len(small):
        quantiles = np.concatenate([_poisson_quantiles(float(means[value])) for value in small])
        start = np.zeros(256, dtype=np.intp)
        start[small] = np.arange(len(small)) * 65536
    result = np.empty_like(image)
    for rows, uniform in _uniform16(*values.shape, seed):
        part = values[rows]
        normal = _normal_table().take(uniform)
        noise = normal * np.float32(1 / 6)
        noise += cv2.LUT(part, spread)
        noise *= normal
        noise += cv2.LUT(part, centre)
        np.rint(noise, out=noise)
        if len(small):
            here = np.flatnonzero(part <= small[-1])
            noise.put(here, quantiles.take(start.take(part.take(here)) + uniform.take(here)))
        noise -= cv2.LUT(part, means.astype(np.float32))
        noise *= np.float32(scale / levels)
        np.add(image[rows], noise.reshape(len(part), image.shape[1], -1), out=result[rows])
        np.clip(result[rows], 0.0, 1.0, out=result[rows])
    return result


def jpeg(image: Image, quality: int) -> Image:
    """JPEG (4:2:0) there and back, `quality` in 1..100; clips, and rounds to 8 bits, first."""
    # Asked for by name: OpenCV's own default has changed between builds.
    flags = [
        cv2.IMWRITE_JPEG_QUALITY, quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]  # fmt: skip
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(to_uint8(image), cv2.COLOR_RGB2BGR), flags)
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert decoded is not None, "OpenCV cannot read its own JPEG"
    return to_float(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))


def unsharp_mask(
    image: Image, radius: int = 50, amount: float = 0.5, threshold: float = 10.0
) -> Image:
    """Sharpen where there is an edge: Real-ESRGAN's `USMSharp`, for ground truth.

    `sharp = clip(x + amount (x - G x))`, blended in by the blurred mask of `|x - G x| > threshold`
    (grey levels of 255). `G` is the Gaussian of size `radius` (rounded up to odd), whose sigma
    follows from the size (8 pixels for 51).
    """
    size = (radius // 2 * 2 + 1,) * 2
    detail = image - cv2.GaussianBlur(image, size, 0, borderType=cv2.BORDER_REFLECT_101)
    mask = (np.abs(detail) > threshold / 255).astype(np.float32)
    mask = cv2.GaussianBlur(mask, size, 0, borderType=cv2.BORDER_REFLECT_101)
    sharp = np.clip(image + np.float32(amount) * detail, 0.0, 1.0)
    return np.asarray(image + mask * (sharp - image))


def _uniform16(height: int, width: int, seed: int) -> Iterator[tuple[slice, NDArray[np.uint16]]]:
    """Independent uniform integers in [0, 65535], from the raw bits of SFC64, strip by strip.

    Yields rows and their integers, `(rows, width)`. A strip is small enough to stay in the cache,
    and has a whole number of the generator's 64-bit words.
    """
    generator = np.random.SFC64(seed)
    rows = max(4, _STRIP // width // 4 * 4)
    for top in range(0, height, rows):
        shape = min(rows, height - top), width
        size = math.prod(shape)
        words = generator.random_raw((size + 3) // 4)
        # Little-endian on every machine, so that equal seeds mean equal noise.
        uniform = words.astype("<u8", copy=False).view("<u2")[:size].reshape(shape)
        yield slice(top, top + rows), uniform


@cache
def _normal_table() -> Image:
    """65536 standard normal quantiles: mean 0, variance 1, cut at 4.2 sigma, `(65536,)`."""
    table = ndtri((np.arange(65536) + 0.5) / 65536)
    return (table / table.std()).astype(np.float32)


@lru_cache(maxsize=256)
def _poisson_quantiles(mean: float) -> Bytes:
    """The Poisson counts of 65536 equally likely quantiles; `mean` below `_SMALL_MEAN`."""
    counts = np.arange(128)
    below = np.rint(pdtr(counts, mean) * 65536).astype(np.intp)  # quantiles up to each count
    return np.repeat(counts.astype(np.uint8), np.diff(below, prepend=0))


def adaptive_average(image: Image, height: int, width: int) -> Image:
    """Resize to `(height, width)` by adaptive average pooling, the reference's "area" mode.

    Row `i` of the result is the plain mean of the source rows from `floor(i H / height)` up to
    `ceil((i + 1) H / height)`, and so for columns. A source pixel that two windows share counts in
    full in both, which makes the result softer than OpenCV's `INTER_AREA` does.
    """
    if height >= image.shape[0] and width >= image.shape[1] and max(height, width) < _REMAP_LIMIT:
        # A window has one pixel, or two: the bilinear value half-way between them is their mean.
        y, x = _window_centres(image.shape[0], height), _window_centres(image.shape[1], width)
        maps = np.tile(x, (height, 1)), np.repeat(y[:, None], width, axis=1)
        return np.asarray(cv2.remap(image, *maps, cv2.INTER_LINEAR))
    rows = cv2.transpose(_average_rows(image, height))
    return np.asarray(cv2.transpose(_average_rows(np.asarray(rows), width)))


def _window_centres(size: int, count: int) -> NDArray[np.float32]:
    """Middle of each of `count` windows over `size` pixels, in pixels from the first one's."""
    index = np.arange(count)
    first, last = index * size // count, -(-(index + 1) * size // count) - 1
    return ((first + last) / 2).astype(np.float32)


def _average_rows(image: Image, count: int) -> Image:
    index = np.arange(count)
    first = index * len(image) // count
    lengths = -(-(index + 1) * len(image) // count) - first
    source = image.reshape(len(image), -1)
    total = source.take(first, axis=0)
    shortest = int(lengths.min())
    for offset in range(1, shortest):
        total += source.take(first + offset, axis=0)
    for offset in range(shortest, int(lengths.max())):
        longer = np.flatnonzero(lengths > offset)
        total[longer] += source.take(first[longer] + offset, axis=0)
    total *= np.reciprocal(lengths, dtype=np.float32)[:, None]
    return total.reshape(count, *image.shape[1:])


def colour_jitter(image: Image, shift: Sequence[float]) -> Image:
    """Add `shift / 255` to the channels, clipped to [0, 1]: a colour cast.

    Args:
        image: picture, float32.
        shift: what red, green and blue get, grey levels of 255.

    Raises:
        UsageError: when there are not three shifts.
    """
    if len(shift) != 3:
        raise UsageError(f"Colour jitter by {len(shift)} shifts.", "Give one per channel: 3.")
    return np.clip(image + np.divide(shift, 255, dtype=np.float32), 0.0, 1.0)


def greyscale(image: Image) -> Image:
    """The luma `0.299 R + 0.587 G + 0.114 B` (ITU-R BT.601) in all three channels."""
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))
