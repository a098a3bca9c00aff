"""Pictures in and out: encoded bytes to arrays and back, checked before a pixel is decoded.

Uploads and crawled folders hold anything. `decode` looks at the first bytes, then at the header
(type, size, number of pixels and of frames, colour model), and only then decodes. What is refused
is a `BadPicture` with a short reason for counting and a message for people. Colour profiles are
ignored: samples are taken as sRGB.
"""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from teasr.errors import TeasrError, UsageError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")

Bytes = NDArray[np.uint8]

# The plugins are called directly: `Image.open` would judge the size by a process-wide limit of its
# own (warning first, error at twice that) instead of the caller's.
_OPENERS: dict[str, type[ImageFile.ImageFile]] = {
    "png": PngImageFile,
    "jpeg": JpegImageFile,  # also reads the first picture of a phone's MPO
    "webp": WebPImageFile,
    "tiff": TiffImageFile,
    "bmp": BmpImageFile,
}
_ACCEPTED = "PNG, JPEG, WebP, TIFF and BMP are accepted."
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
_WIDE_GREY_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_ORIENTATION = 274  # EXIF and TIFF tag
_BITS_PER_SAMPLE = 258  # TIFF tag
_PHOTOMETRIC = 262  # TIFF tag
_guard_lock = threading.Lock()


class BadPicture(TeasrError):  # noqa: N818 - a verdict on the picture, named for the quarantine list
    """A picture that is refused.

    Args:
        reason: a short slug to count by: `not-an-image`, `unsupported-format`, `too-small`,
            `too-many-pixels`, `animated`, `cmyk`, `truncated`, `unreadable`, `out-of-memory`.
        message: what is wrong, one sentence.
        hint: what is accepted or what to do.
    """

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason


@dataclass
class Picture:
    """A decoded picture, upright (EXIF orientation applied).

    Attributes:
        rgb: uint8 (H, W, 3); the three channels are equal when `grey`.
        alpha: uint8 (H, W), straight (not premultiplied); None when every pixel is opaque.
        grey: the file stores grey samples; a palette or a colour file never counts as grey.
        bits: per sample in the file, 8 (also for 1, 2, 4) or 16 (rounded to 8 in `rgb`, `alpha`).
        format: `png`, `jpeg`, `webp`, `tiff` or `bmp`.
    """

    rgb: Bytes
    alpha: Bytes | None
    grey: bool
    bits: int
    format: str


def header(data: bytes) -> tuple[int, int, str]:
    """Width and height in pixels as stored (before orientation) and format, from the header alone.

    Raises:
        BadPicture: `not-an-image`, `unsupported-format`, or `unreadable` for a damaged header.
    """
    format = _sniff(data)
    if format == "webp":
        return *_webp_size(data), format
    with _decoder_errors("header"):
        opened = _OPENERS[format](io.BytesIO(data))
        # Pillow gives a TIFF's size after turning it.
        width, height = opened.size
        if format == "tiff" and _orientation(opened) >= 5:
            width, height = height, width
        return width, height, format


def decode(data: bytes, *, min_side: int = 1, max_pixels: int = 200_000_000) -> Picture:
    """The picture in `data`; type, size and pixel count are checked before any pixel is decoded.

    Args:
        data: an encoded PNG, JPEG, WebP, TIFF or BMP.
        min_side: the shorter side must have this many pixels.
        max_pixels: width x height must not exceed this.

    Raises:
        BadPicture: see there for the reasons. A truncated file is refused, never padded.
    """
    width, height, format = header(data)
    if width * height > max_pixels:
        raise BadPicture(
            "too-many-pixels",
            f"The picture has {width} x {height} = {width * height:,} pixels.",
            f"At most {max_pixels:,} are accepted.",
        )
    if min(width, height) < min_side:
        raise BadPicture(
            "too-small",
            f"The picture has {width} x {height} pixels.",
            f"Each side must have at least {min_side}.",
        )
    if format == "webp" and len(data) < struct.unpack_from("<I", data, 4)[0] + 8:
        raise BadPicture("truncated", "The WebP file is shorter than its header says.")
    with _pillow_guard_lifted(width * height):
        with _decoder_errors("header"):
            opened = _OPENERS[format](io.BytesIO(data))
        _check_kind(opened, format)
        wide = _is_wide(opened, data, format)
        with _decoder_errors("pixels"):
            opened.load()
            rgb, alpha = _wide_pixels(opened, data) if wide else _pixels(opened)
            orientation = _orientation(opened)
    grey = opened.mode in ("1", "L", "LA", *_WIDE_GREY_MODES)
    if format == "png":  # Pillow widens 16-bit grey with alpha to colour; ask the header
        grey = data[25] in (0, 4)
    if alpha is not None and bool((alpha == 255).all()):
        alpha = None
    return Picture(
        rgb=_upright(rgb, orientation),
        alpha=None if alpha is None else _upright(alpha, orientation),
        grey=grey,
        bits=16 if wide else 8,
        format=format,
    )


def encode(
    rgb: Bytes,
    format: str = "png",
    alpha: Bytes | None = None,
    grey: bool = False,
    quality: int = 95,
) -> bytes:
    """`rgb` as an encoded picture; equal inputs give equal bytes.

    Args:
        rgb: uint8 (H, W, 3).
        format: `png`, `webp` (both lossless) or `jpeg` (4:4:4).
        alpha: uint8 (H, W), straight; not with `jpeg`.
        grey: write one grey channel, the BT.601 luma (exact where the three channels are equal).
            WebP has no grey: the luma is written three times.
        quality: of `jpeg`, 1 to 100; the others lose nothing.

    Raises:
        UsageError: for another format, or alpha with `jpeg`.
        ValueError: for arrays of another type or shape.
    """
    if format not in ("png", "jpeg", "webp"):
        raise UsageError(f"'{format}' is not written.", "Formats: png, jpeg, webp.")
    if format == "jpeg" and alpha is not None:
        raise UsageError("JPEG cannot hold transparency.", "Write png or webp, or drop the alpha.")
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"uint8 (H, W, 3) expected, {rgb.dtype} {rgb.shape} given")
    picture = Image.fromarray(rgb)
    if grey:
        picture = picture.convert("L")
    if alpha is not None:
        if alpha.dtype != np.uint8 or alpha.shape != rgb.shape[:2]:
            raise ValueError(
                f"alpha: uint8 {rgb.shape[:2]} expected, {alpha.dtype} {alpha.shape} given"
            )
        picture.putalpha(Image.fromarray(alpha))
    buffer = io.BytesIO()
    if format == "png":
        # Two to three times faster than the default level for 4 % more bytes on photographs.
        picture.save(buffer, "PNG", compress_level=3)
    elif format == "jpeg":
        picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        # `exact` keeps the colour of fully transparent pixels.
        picture.save(buffer, "WEBP", lossless=True, exact=True, quality=50)
    return buffer.getvalue()


def bicubic_upsample(lr: Bytes, scale: int = 4) -> Bytes:
    """`lr` uint8 (H, W, 3) enlarged to (H*scale, W*scale, 3) by bicubic interpolation, a = -0.5.

    Pillow's kernel, for enlargement the same as MATLAB's `imresize`: the baseline of the field.
    """
    height, width = lr.shape[:2]
    size = (width * scale, height * scale)
    return np.array(Image.fromarray(lr).resize(size, Image.Resampling.BICUBIC))


def _sniff(data: bytes) -> str:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if data.startswith(b"BM"):
        return "bmp"
    for name, place, magic in (
        ("a GIF", 0, b"GIF8"),
        ("a HEIC or AVIF picture or a video", 4, b"ftyp"),
        ("a Photoshop document", 0, b"8BPS"),
        ("a JPEG 2000 picture", 4, b"jP  "),
        ("a JPEG XL picture", 0, b"\xff\x0a"),
    ):
        if data[place : place + len(magic)] == magic:
            raise BadPicture("unsupported-format", f"The file is {name}.", _ACCEPTED)
    raise BadPicture("not-an-image", "The file is not a picture of a known format.", _ACCEPTED)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size of a WebP (RFC 9649). Pillow would allocate the canvas to open the file."""
    chunk = data[12:16]
    if len(data) < 30 or chunk not in (b"VP8X", b"VP8L", b"VP8 "):
        raise BadPicture("unreadable", "The WebP header is damaged or cut off.")
    if chunk == b"VP8X":
        return (
            1 + int.from_bytes(data[24:27], "little"),
            1 + int.from_bytes(data[27:30], "little"),
        )
    if chunk == b"VP8L":
        packed = int.from_bytes(data[21:25], "little")
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _check_kind(opened: ImageFile.ImageFile, format: str) -> None:
    # `is_animated` is known from the header; counting a TIFF's frames would walk the file.
    if getattr(opened, "is_animated", False):
        raise BadPicture(
            "animated",
            "The file holds several pictures (an animation or pages).",
            "Save the one that is meant.",
        )
    if opened.mode == "CMYK":
        raise BadPicture(
            "cmyk",
            "The picture is CMYK, which needs a colour profile to read.",
            "Convert it to sRGB.",
        )
    bits = opened.tag_v2.get(_BITS_PER_SAMPLE, (1,)) if isinstance(opened, TiffImageFile) else (8,)
    if opened.mode not in _EIGHT_BIT_MODES + _WIDE_GREY_MODES or not set(bits) <= {1, 2, 4, 8, 16}:
        raise BadPicture(
            "unsupported-format",
            f"The {format.upper()} holds samples of an unusual kind ({opened.mode}).",
            "RGB, palette or grey of up to 16 bits are accepted.",
        )


def _is_wide(opened: ImageFile.ImageFile, data: bytes, format: str) -> bool:
    if isinstance(opened, TiffImageFile):
        return 16 in opened.tag_v2.get(_BITS_PER_SAMPLE, (1,))
    return format == "png" and data[24] == 16


def _pixels(opened: ImageFile.ImageFile) -> tuple[Bytes, Bytes | None]:
    if opened.has_transparency_data:
        rgba = np.asarray(opened.convert("RGBA"))
        return rgba[..., :3].copy(), rgba[..., 3].copy()
    return np.array(opened.convert("RGB")), None


def _wide_pixels(opened: ImageFile.ImageFile, data: bytes) -> tuple[Bytes, Bytes | None]:
    """16-bit samples rounded to 8. Pillow has them for grey; of colour it drops the low byte."""
    coarse = np.asarray(opened)
    if opened.mode in _WIDE_GREY_MODES:
        samples = coarse.astype(np.uint16)[..., None]
        if isinstance(opened, TiffImageFile) and opened.tag_v2.get(_PHOTOMETRIC) == 0:
            samples = 65535 - samples  # "white is zero", which Pillow leaves as it is
    else:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
            raise BadPicture("unreadable", "The 16-bit picture is of a kind that cannot be read.")
        samples = decoded.astype(np.uint16, copy=False)[..., [2, 1, 0, 3][: decoded.shape[2]]]
        # OpenCV pads damaged files and has its own view of rare layouts: Pillow's high bytes tell.
        high = (samples[..., :3] >> 8).astype(np.uint8)
        if not np.array_equal(high, coarse[..., :3]):
            raise BadPicture("unreadable", "The 16-bit picture is damaged or of an unusual layout.")
    rgb = _round_to_8_bits(samples[..., :3])
    rgb = np.repeat(rgb, 3, axis=2) if rgb.shape[2] == 1 else rgb
    if samples.shape[2] == 4:
        return rgb, _round_to_8_bits(samples[..., 3])
    key = opened.info.get("transparency")  # one colour declared transparent, as 16-bit samples
    if key is None:
        return rgb, None
    return rgb, np.where((samples == np.array(key)).all(axis=2), 0, 255).astype(np.uint8)


def _round_to_8_bits(samples: NDArray[np.uint16]) -> Bytes:
    """round(v / 257), the nearest 8-bit level: 65535 is 255. The high byte, off by at most one."""
    high, low = samples >> 8, samples & 255
    rounded: Bytes = (high + (low > high + 128) - (high > low + 128)).astype(np.uint8)
    return rounded


def _orientation(opened: ImageFile.ImageFile) -> int:
    """EXIF orientation 1..8; Pillow turns a TIFF on loading and then reports 1."""
    try:
        orientation = opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # metadata that cannot be parsed does not make the pixels bad
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(array: Bytes, orientation: int) -> Bytes:
    """Undo an EXIF orientation (EXIF 2.32, tag 274) of (H, W, ...)."""
    if orientation in (3, 4, 6, 7):
        array = array[::-1]
    if orientation in (2, 3, 7, 8):
        array = array[:, ::-1]
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    return np.ascontiguousarray(array)


@contextmanager
def _decoder_errors(part: str) -> Iterator[None]:
    """Anything a decoder raises on hostile bytes, as a `BadPicture`."""
    try:
        yield
    except BadPicture:
        raise
    except MemoryError:
        raise BadPicture("out-of-memory", "There is not enough memory for the picture.") from None
    except Exception as error:  # plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        if "truncated" in str(error).lower():
            raise BadPicture("truncated", "The file is cut off before its last pixels.") from None
        raise BadPicture(
            "unreadable", f"The picture's {part} cannot be read ({error or type(error).__name__})."
        ) from None


@contextmanager
def _pillow_guard_lifted(pixels: int) -> Iterator[None]:
    """Keep Pillow's process-wide pixel limit out of the way: the caller's own has been checked.

    WebP and TIFF consult it while loading. Only pictures beyond it take the lock.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or pixels <= limit:
        yield
        return
    with _guard_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
