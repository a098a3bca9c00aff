"""Pictures in and out: encoded bytes to arrays and back, checked before a pixel is decoded.

Uploads and crawled folders hold anything. `decode` looks at the first bytes, then at the header
(type, size, number of pixels and of frames, colour model), and only then decodes. What is refused
is a `BadPicture` with a short reason for counting and a message for people. Decoding needs about
7 bytes a pixel beside the file; where a caller sets a bound, a JPEG beyond it is read at a half, a
quarter or an eighth of its sides. Colour profiles are ignored: samples are taken as sRGB.
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

# Pixels are copied out of the decoder in strips of about this many, so that no second whole copy
# is made: Pillow keeps 4 bytes a pixel, the array has 3, and 1 where there is transparency.
_STRIP_PIXELS = 1 << 20
_BYTES_PER_PIXEL = {"png": 7, "jpeg": 7, "webp": 19, "tiff": 7, "bmp": 7}  # as measured
_CHECK_BYTES_PER_PIXEL = {"png": 4, "jpeg": 4, "webp": 17}
_WIDE_BYTES_PER_PIXEL = 16  # OpenCV's samples, twice, and the array; a third more with alpha
_LOOK_BYTES_PER_PIXEL = 5
_FIXED_BYTES = 16 << 20
_JPEG_REDUCTIONS = (1, 2, 4, 8)
# Of what is written: Pillow's lines, libjpeg's JPEG_MAX_DIMENSION, 14 bits of WebP.
_LONGEST_SIDES = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}


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
        reduced_by: 2, 4 or 8 when a JPEG was read at that fraction of its sides, else 1.
    """

    rgb: Bytes
    alpha: Bytes | None
    grey: bool
    bits: int
    format: str
    reduced_by: int = 1


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


def decode(
    data: bytes,
    *,
    min_side: int = 1,
    max_pixels: int = 200_000_000,
    max_memory: int | None = None,
) -> Picture:
    """The picture in `data`; type, size and pixel count are checked before any pixel is decoded.

    Args:
        data: an encoded PNG, JPEG, WebP, TIFF or BMP.
        min_side: the shorter side must have this many pixels, as it is stored and as it is read.
        max_pixels: width x height must not exceed this.
        max_memory: bytes that `data` and its decoding may take. A JPEG that needs more is read at
            1/2, 1/4 or 1/8 of its sides, the largest that fits; other formats are refused.

    Raises:
        BadPicture: see there for the reasons. A truncated file is refused, never padded.
    """
    with _opened(data, min_side, max_pixels) as (opened, format):
        wide = _is_wide(opened, data, format)
        per_pixel = _bytes_per_pixel(opened, format, wide)
        reduced_by = _reduction(opened, per_pixel, len(data), max_memory)
        if reduced_by > 1:
            _check_side(opened.width // reduced_by, opened.height // reduced_by, min_side)
            opened.draft(None, (opened.width // reduced_by, opened.height // reduced_by))
        with _decoder_errors("pixels"):
            opened.load()
            orientation = _orientation(opened)
            read = _wide_pixels if wide else _pixels
            rgb, alpha = read(opened, data, orientation)
    grey = opened.mode in ("1", "L", "LA", *_WIDE_GREY_MODES)
    if format == "png":  # Pillow widens 16-bit grey with alpha to colour; ask the header
        grey = data[25] in (0, 4)
    if alpha is not None and bool((alpha == 255).all()):
        alpha = None
    return Picture(rgb, alpha, grey, 16 if wide else 8, format, reduced_by)


def is_plain(
    data: bytes,
    *,
    min_side: int = 1,
    max_pixels: int = 200_000_000,
    max_memory: int | None = None,
) -> bool:
    """Whether every reader shows the picture in `data` alike: a PNG, JPEG or WebP of 8-bit RGB,
    opaque and upright. It is decoded whole, in 4 bytes a pixel beside the file, and let go.

    False also when it cannot be decoded whole in `max_memory`; see `decode` for the arguments.

    Raises:
        BadPicture: as `decode`.
    """
    with _opened(data, min_side, max_pixels) as (opened, format):
        if format not in _CHECK_BYTES_PER_PIXEL or opened.mode != "RGB":
            return False
        if _is_wide(opened, data, format) or opened.has_transparency_data:
            return False
        if _orientation(opened) != 1:
            return False
        if _reduction(opened, _CHECK_BYTES_PER_PIXEL[format], len(data), max_memory) != 1:
            return False
        with _decoder_errors("pixels"):
            opened.load()
        return True


@dataclass
class Look:
    """A quick look at a picture: enough to compare it, not to keep it.

    Attributes:
        grey: uint8 (H, W), upright; the longer side has the pixels that were asked for, or fewer.
        width, height: of the whole picture, upright, pixels.
        format: as of `Picture`.
    """

    grey: Bytes
    width: int
    height: int
    format: str


def look(
    data: bytes,
    side: int,
    *,
    min_side: int = 1,
    max_pixels: int = 200_000_000,
    max_memory: int | None = None,
) -> Look:
    """The picture in `data` in grey, its longer side reduced to `side` pixels when it has more.

    A JPEG is decoded no larger than that needs. Transparency is ignored, 16 bits are cut to 8.

    Raises:
        BadPicture: as `decode`; a file that is cut short is refused here too.
    """
    with _opened(data, min_side, max_pixels) as (opened, format):
        width, height = opened.size
        per_pixel = _LOOK_BYTES_PER_PIXEL if format != "webp" else _CHECK_BYTES_PER_PIXEL[format]
        reduced_by = _reduction(opened, per_pixel, len(data), max_memory)
        if isinstance(opened, JpegImageFile):
            enough = (r for r in _JPEG_REDUCTIONS if max(width, height) >= r * side)
            reduced_by = max(reduced_by, *enough, 1)
            opened.draft("L", (max(1, width // reduced_by), max(1, height // reduced_by)))
        with _decoder_errors("pixels"):
            opened.load()
            orientation = _orientation(opened)
            grey = _empty(opened, orientation)
            target = _as_stored(grey, orientation)
            for rows, strip in _strips(opened):
                if opened.mode in _WIDE_GREY_MODES:
                    target[rows] = _wide_grey(opened, strip) >> 8
                else:
                    strip.info.pop("transparency", None)
                    target[rows] = np.asarray(strip.convert("L"))
    if isinstance(opened, TiffImageFile):
        width, height = opened.size  # turned on loading
    elif orientation >= 5:
        width, height = height, width
    scale = side / max(grey.shape)
    if scale < 1:
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return Look(grey, width, height, format)


# ITU-T T.81, table K.1: luminance quantisation at quality 50 of the Independent JPEG Group's scale.
_LUMINANCE_TABLE = np.array(
    [
        *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
        *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
        *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
        *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
    ]
)
_qualities = np.arange(1, 101)[:, None]
_scales = np.where(_qualities < 50, 5000 // _qualities, 200 - 2 * _qualities)
_LUMINANCE_TABLES = ((_LUMINANCE_TABLE * _scales + 50) // 100).clip(1, 255)  # row q - 1: quality q
del _qualities, _scales


def jpeg_quality(data: bytes) -> int | None:
    """Quality 1 to 100 of a JPEG, on the scale of the Independent JPEG Group; None of other files.

    The standard table whose 64 luminance steps are nearest (least squares) to the file's. Files
    written by libjpeg give the quality they were written with; of other encoders' tables it is
    the standard one that quantises alike. It tells of the last time that the picture was saved.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    with _decoder_errors("header"):
        opened = JpegImageFile(io.BytesIO(data))
        table = opened.quantization.get(opened.layer[0][3])
    if table is None or len(table) != 64:
        return None
    distance = ((_LUMINANCE_TABLES - np.array(table)) ** 2).sum(axis=1)
    return int(distance.argmin()) + 1


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
        UsageError: as `check_format`.
        ValueError: for arrays of another type or shape.
    """
    check_format(format, rgb.shape[1], rgb.shape[0], alpha is not None)
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


def check_format(format: str, width: int, height: int, alpha: bool = False) -> None:
    """Whether `encode` can write such a picture.

    Raises:
        UsageError: for another format than its own, alpha with `jpeg`, or a side that is longer
            than the format has.
    """
    if format not in _LONGEST_SIDES:
        raise UsageError(f"'{format}' is not written.", f"Formats: {', '.join(_LONGEST_SIDES)}.")
    if format == "jpeg" and alpha:
        raise UsageError("JPEG cannot hold transparency.", "Write png or webp, or drop the alpha.")
    if max(width, height) > _LONGEST_SIDES[format]:
        raise UsageError(
            f"{width} x {height} pixels do not fit into a {format.upper()}, whose sides have at "
            f"most {_LONGEST_SIDES[format]}.",
            "Write png.",
        )


def bicubic_upsample(lr: Bytes, scale: int = 4) -> Bytes:
    """`lr` uint8 (H, W, 3) or (H, W), its sides `scale` times as long, by bicubic interpolation.

    Pillow's kernel (a = -0.5), for enlargement the same as MATLAB's `imresize`: the baseline of the
    field.
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


@contextmanager
def _opened(
    data: bytes, min_side: int, max_pixels: int
) -> Iterator[tuple[ImageFile.ImageFile, str]]:
    """The picture and its format, checked by its header, within Pillow's guard lifted."""
    width, height, format = header(data)
    if width * height > max_pixels:
        raise BadPicture(
            "too-many-pixels",
            f"The picture has {width} x {height} = {width * height:,} pixels.",
            f"At most {max_pixels:,} are accepted.",
        )
    _check_side(width, height, min_side)
    if format == "webp" and len(data) < struct.unpack_from("<I", data, 4)[0] + 8:
        raise BadPicture("truncated", "The WebP file is shorter than its header says.")
    with _pillow_guard_lifted(width * height):
        with _decoder_errors("header"):
            opened = _OPENERS[format](io.BytesIO(data))
        _check_kind(opened, format)
        yield opened, format


def _check_side(width: int, height: int, min_side: int) -> None:
    if min(width, height) < min_side:
        raise BadPicture(
            "too-small",
            f"The picture has {width} x {height} pixels.",
            f"Each side must have at least {min_side}.",
        )


def _bytes_per_pixel(opened: ImageFile.ImageFile, format: str, wide: bool) -> int:
    """What `decode` needs at its peak, beside the file."""
    clear = opened.has_transparency_data
    if wide and opened.mode not in _WIDE_GREY_MODES:  # these need no OpenCV
        return _WIDE_BYTES_PER_PIXEL + 4 * clear
    return _BYTES_PER_PIXEL[format] + clear


def _reduction(
    opened: ImageFile.ImageFile, per_pixel: int, size: int, max_memory: int | None
) -> int:
    """The smallest reduction of the sides at which `size` bytes can be decoded in `max_memory`."""
    if max_memory is None:
        return 1
    pixels = opened.width * opened.height
    fixed = size + _FIXED_BYTES
    if isinstance(opened, JpegImageFile) and opened.info.get("progressive"):
        # All coefficients, 2 bytes each, are kept until the last scan, at any reduction.
        largest = max(h * v for _, h, v, _ in opened.layer)
        fixed += 2 * pixels * sum(h * v for _, h, v, _ in opened.layer) // largest
    for reduction in _JPEG_REDUCTIONS if isinstance(opened, JpegImageFile) else (1,):
        if fixed + per_pixel * pixels // reduction**2 <= max_memory:
            return reduction
    raise BadPicture(
        "too-many-pixels",
        f"The picture has {opened.width} x {opened.height} pixels; decoding it would take "
        f"{(fixed + per_pixel * pixels) / 1e6:,.0f} MB.",
        f"At most {max_memory / 1e6:,.0f} MB are used. A baseline JPEG would be read reduced.",
    )


def _strips(opened: ImageFile.ImageFile) -> Iterator[tuple[slice, Image.Image]]:
    """The loaded picture in strips: their rows, and a copy of each."""
    for rows in _row_slices(opened.width, opened.height):
        yield rows, opened.crop((0, rows.start, opened.width, rows.stop))


def _row_slices(width: int, height: int) -> Iterator[slice]:
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        yield slice(top, min(height, top + step))


def _empty(opened: ImageFile.ImageFile, orientation: int, *channels: int) -> Bytes:
    """An array for the pixels of `opened`, of the shape that they have when upright."""
    sides = (opened.height, opened.width)
    return np.empty((*(sides[::-1] if orientation >= 5 else sides), *channels), np.uint8)


def _pixels(
    opened: ImageFile.ImageFile, data: bytes, orientation: int
) -> tuple[Bytes, Bytes | None]:
    rgb = _empty(opened, orientation, 3)
    target = _as_stored(rgb, orientation)
    if not opened.has_transparency_data:
        for rows, strip in _strips(opened):
            target[rows] = np.asarray(strip.convert("RGB"))
        return rgb, None
    alpha = _empty(opened, orientation)
    alpha_target = _as_stored(alpha, orientation)
    for rows, strip in _strips(opened):
        rgba = np.asarray(strip.convert("RGBA"))
        target[rows], alpha_target[rows] = rgba[..., :3], rgba[..., 3]
    return rgb, alpha


def _wide_pixels(
    opened: ImageFile.ImageFile, data: bytes, orientation: int
) -> tuple[Bytes, Bytes | None]:
    """16-bit samples rounded to 8. Pillow has them for grey; of colour it drops the low byte."""
    key = opened.info.get("transparency")  # one colour declared transparent, as 16-bit samples
    rgb = _empty(opened, orientation, 3)
    target = _as_stored(rgb, orientation)
    alpha = None if key is None else _empty(opened, orientation)
    if opened.mode in _WIDE_GREY_MODES:
        for rows, strip in _strips(opened):
            samples = _wide_grey(opened, strip)[..., None]
            target[rows] = _round_to_8_bits(samples)
            if alpha is not None:
                _as_stored(alpha, orientation)[rows] = _opaque_but(samples, key)
        return rgb, alpha
    for rows, strip in _strips(opened):
        target[rows] = np.asarray(strip)[..., :3]
    size = opened.size
    opened.close()  # frees its pixels: OpenCV needs the room
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if (
        decoded is None
        or decoded.dtype != np.uint16
        or decoded.ndim != 3
        or decoded.shape[1::-1] != size
    ):
        raise BadPicture("unreadable", "The 16-bit picture is of a kind that cannot be read.")
    if decoded.shape[2] == 4:
        alpha = np.empty(rgb.shape[:2], np.uint8)
    for rows in _row_slices(*size):
        strip16 = decoded[rows].astype(np.uint16, copy=False)
        samples = strip16[..., [2, 1, 0, 3][: decoded.shape[2]]]
        # OpenCV pads damaged files and has its own view of rare layouts: Pillow's high bytes tell.
        if not np.array_equal(samples[..., :3] >> 8, target[rows]):
            raise BadPicture("unreadable", "The 16-bit picture is damaged or of an unusual layout.")
        target[rows] = _round_to_8_bits(samples[..., :3])
        if decoded.shape[2] == 4:
            assert alpha is not None
            _as_stored(alpha, orientation)[rows] = _round_to_8_bits(samples[..., 3])
        elif alpha is not None:
            _as_stored(alpha, orientation)[rows] = _opaque_but(samples, key)
    return rgb, alpha


def _wide_grey(opened: ImageFile.ImageFile, strip: Image.Image) -> NDArray[np.uint16]:
    samples = np.asarray(strip).astype(np.uint16)
    if isinstance(opened, TiffImageFile) and opened.tag_v2.get(_PHOTOMETRIC) == 0:
        return ~samples  # "white is zero", which Pillow leaves as it is
    return samples


def _opaque_but(samples: NDArray[np.integer], key: object) -> Bytes:
    return np.where((samples == np.array(key)).all(axis=2), 0, 255).astype(np.uint8)


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


def _as_stored(upright: Bytes, orientation: int) -> Bytes:
    """A view of the upright (H, W, ...) in which pixels lie as in a file of this EXIF orientation
    (EXIF 2.32, tag 274)."""
    if orientation >= 5:
        upright = upright.swapaxes(0, 1)
    if orientation in (2, 3, 7, 8):
        upright = upright[:, ::-1]
    if orientation in (3, 4, 6, 7):
        upright = upright[::-1]
    return upright


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
