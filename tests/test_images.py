from __future__ import annotations

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, _webp

from teasr.errors import UsageError
from teasr.images import (
    PICTURE_SUFFIXES,
    BadPicture,
    bicubic_upsample,
    decode,
    encode,
    header,
    is_plain,
    jpeg_quality,
    look,
)


@pytest.fixture
def rgb() -> np.ndarray:
    """Noise over a slope: every pixel differs, no symmetry hides a wrong turn."""
    generator = np.random.default_rng(0)
    slope = np.linspace(0, 180, 24 * 16).reshape(16, 24, 1)
    return (slope + generator.integers(0, 60, (16, 24, 3))).astype(np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    samples: np.ndarray, colour_type: int, extra: bytes = b"", size: tuple | None = None
) -> bytes:
    """A PNG written by hand: Pillow cannot write 16-bit colour."""
    height, width = samples.shape[:2]
    width, height = size or (width, height)
    bits = samples.dtype.itemsize * 8
    big_endian = samples.astype(samples.dtype.newbyteorder(">"))
    body = b"".join(b"\0" + line.tobytes() for line in big_endian)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
        + extra
        + png_chunk(b"IDAT", zlib.compress(body))
        + png_chunk(b"IEND", b"")
    )


def tiff(
    samples: np.ndarray, orientation: int = 1, photometric: int = 2, order: str = "<"
) -> bytes:
    """A baseline TIFF of one strip written by hand, 8 or 16 bits, 1 or 3 channels."""
    height, width, channels = samples.shape
    body = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    bits = samples.dtype.itemsize * 8
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0)]
    tags += [(274, orientation), (277, channels), (278, height), (279, len(body))]
    lists = 8 + 2 + 12 * len(tags) + 4
    directory = struct.pack(order + "H", len(tags))
    for tag, value in tags:
        if tag == 258 and channels == 3:  # three values do not fit into the entry
            directory += struct.pack(order + "HHII", tag, 3, 3, lists)
        else:
            directory += struct.pack(order + "HHII", tag, 4, 1, lists + 8 if tag == 273 else value)
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    return magic + directory + bytes(4) + struct.pack(order + "4H", *[bits] * 4) + body


def refused(data: bytes, **limits: int) -> str:
    with pytest.raises(BadPicture) as caught:
        decode(data, **limits)
    assert caught.value.message.endswith(".")
    return caught.value.reason


@pytest.mark.parametrize("format", ["png", "webp", "tiff", "bmp"])
def test_lossless_formats_return_the_same_pixels(rgb: np.ndarray, format: str) -> None:
    options = {"lossless": True} if format == "webp" else {}
    picture = decode(saved(Image.fromarray(rgb), format, **options))
    np.testing.assert_array_equal(picture.rgb, rgb)
    assert (picture.alpha, picture.grey, picture.bits, picture.format) == (None, False, 8, format)
    assert picture.rgb.flags.c_contiguous and picture.rgb.flags.writeable


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("options", [{}, {"lossless": True}])
def test_header_tells_stored_size_and_format(format: str, options: dict) -> None:
    data = saved(Image.new("RGB", (37, 21)), format, **options)
    assert header(data) == (37, 21, format)


def test_header_of_an_extended_webp() -> None:
    data = saved(Image.new("RGBA", (37, 21), (1, 2, 3, 4)), "webp", exif=Image.Exif())
    assert data[12:16] == b"VP8X"
    assert header(data) == (37, 21, "webp")


# EXIF 2.32: where row 0 and column 0 of the stored array are in the scene.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["png", "tiff", "webp"])
def test_exif_orientation_is_applied(rgb: np.ndarray, orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if format == "webp" else {}
    data = saved(Image.fromarray(rgb), format, exif=exif, **options)
    np.testing.assert_array_equal(decode(data).rgb, UPRIGHT[orientation](rgb))
    assert header(data)[:2] == (24, 16)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_of_jpeg_and_of_alpha(rgb: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(rgb)
    plain = decode(saved(image, "jpeg"))
    np.testing.assert_array_equal(
        decode(saved(image, "jpeg", exif=exif)).rgb, UPRIGHT[orientation](plain.rgb)
    )
    image.putalpha(Image.fromarray(rgb[..., 0]))
    alpha = decode(saved(image, "png", exif=exif)).alpha
    np.testing.assert_array_equal(alpha, UPRIGHT[orientation](rgb[..., 0]))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_refuse_good_pixels(rgb: np.ndarray) -> None:
    data = saved(Image.fromarray(rgb), "png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode(data).rgb, rgb)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_truncated_jpeg_is_refused(options: dict) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "jpeg", **options)
    decode(data)
    for share in (0.3, 0.6, 0.9, 0.99):
        assert refused(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.parametrize("format", ["png", "webp", "tiff", "bmp", "jpeg"])
def test_no_cut_gives_wrong_pixels(format: str) -> None:
    """A file cut anywhere is refused, or (only a trailer missing) still gives every pixel."""
    noise = np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), format)
    whole = decode(data).rgb
    survived = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow remarks on cut TIFF directories
        for length in range(0, len(data), max(1, len(data) // 200)):
            try:
                picture = decode(data[:length])
            except BadPicture:
                continue
            survived += 1
            np.testing.assert_array_equal(picture.rgb, whole)
    assert survived <= 3


def test_truncated_16_bit_png_is_refused(rgb: np.ndarray) -> None:
    data = png(rgb.astype(np.uint16) * 250, 2)
    assert refused(data[: len(data) // 2]) == "truncated"


def test_hostile_bytes_raise_nothing_but_bad_picture(rgb: np.ndarray) -> None:
    generator = np.random.default_rng(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for format in ("png", "jpeg", "webp", "tiff", "bmp"):
            good = np.frombuffer(saved(Image.fromarray(rgb), format), np.uint8)
            for _ in range(100):
                data = good.copy()
                data[generator.integers(len(data), size=8)] = generator.integers(256, size=8)
                with contextlib.suppress(BadPicture):
                    decode(data.tobytes(), max_pixels=10_000)


def bombs() -> dict[str, bytes]:
    tiny = np.zeros((1, 1, 3), np.uint8)
    jpeg = bytearray(saved(Image.fromarray(tiny), "jpeg"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    bmp = bytearray(saved(Image.fromarray(tiny), "bmp"))
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    tif = bytearray(tiff(tiny))
    for entry in (10, 22):  # width and height, the first two of the directory
        tif[entry + 8 : entry + 12] = struct.pack("<I", 60000)
    webp = bytearray(saved(Image.new("RGBA", (3, 3), (1, 2, 3, 4)), "webp", exif=Image.Exif()))
    webp[24:30] = (16382).to_bytes(3, "little") * 2
    return {
        "png": png(tiny, 2, size=(60000, 60000)),
        "jpeg": bytes(jpeg),
        "bmp": bytes(bmp),
        "tiff": bytes(tif),
        "webp": bytes(webp),
    }


@pytest.mark.parametrize("format", ["png", "jpeg", "bmp", "tiff", "webp"])
def test_bomb_is_refused_from_the_header(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bombs()[format]
    width, height, seen = header(data)
    assert width * height > 200_000_000 and seen == format and len(data) < 2000

    def no_pixels(*_: object) -> None:
        raise AssertionError("memory for pixels was asked for")

    for name in ("new", "fill"):
        monkeypatch.setattr(Image.core, name, no_pixels)
    monkeypatch.setattr(_webp, "WebPAnimDecoder", no_pixels)
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused(data) == "too-many-pixels"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("format", ["png", "jpeg", "bmp", "tiff", "webp"])
def test_pillow_guard_neither_warns_nor_refuses(
    rgb: np.ndarray, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(Image.fromarray(rgb), format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 384 pixels are far past its error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data).rgb.shape == (16, 24, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_limits_are_inclusive(rgb: np.ndarray) -> None:
    data = saved(Image.fromarray(rgb), "png")
    decode(data, min_side=16, max_pixels=16 * 24)
    assert refused(data, min_side=17) == "too-small"
    assert refused(data, max_pixels=16 * 24 - 1) == "too-many-pixels"


def nearest_level(samples: np.ndarray) -> np.ndarray:
    return np.floor(samples * (255 / 65535) + 0.5).astype(np.uint8)


@pytest.fixture
def all_levels() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


def test_16_bit_grey_png_is_rounded(all_levels: np.ndarray) -> None:
    picture = decode(png(all_levels[..., None], 0))
    for channel in range(3):
        np.testing.assert_array_equal(picture.rgb[..., channel], nearest_level(all_levels))
    assert picture.grey and picture.bits == 16 and picture.alpha is None


def test_16_bit_colour_png_is_rounded_in_channel_order(all_levels: np.ndarray) -> None:
    samples = np.stack([all_levels, all_levels[::-1], all_levels.T], axis=2)
    picture = decode(png(samples, 2))
    np.testing.assert_array_equal(picture.rgb, nearest_level(samples))
    assert not picture.grey and picture.bits == 16


@pytest.mark.parametrize(("colour_type", "channels"), [(4, 2), (6, 4)])
def test_16_bit_alpha_is_rounded(all_levels: np.ndarray, colour_type: int, channels: int) -> None:
    samples = np.stack([all_levels.T] * (channels - 1) + [all_levels], axis=2)
    picture = decode(png(samples, colour_type))
    np.testing.assert_array_equal(picture.alpha, nearest_level(all_levels))
    np.testing.assert_array_equal(picture.rgb[..., 1], nearest_level(all_levels.T))
    assert picture.grey == (colour_type == 4)


def test_16_bit_colour_declared_transparent() -> None:
    grey = np.array([[[0], [300], [301], [65535]]], np.uint16)
    key = png_chunk(b"tRNS", struct.pack(">H", 300))
    np.testing.assert_array_equal(decode(png(grey, 0, key)).alpha, [[255, 0, 255, 255]])
    colour = np.repeat(grey, 3, axis=2)
    key = png_chunk(b"tRNS", struct.pack(">HHH", 300, 300, 300))
    np.testing.assert_array_equal(decode(png(colour, 2, key)).alpha, [[255, 0, 255, 255]])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [1, 2, 6])
def test_16_bit_tiff(all_levels: np.ndarray, order: str, orientation: int) -> None:
    samples = np.stack([all_levels, all_levels[::-1], all_levels.T], axis=2)[:100]
    expected = nearest_level(UPRIGHT[orientation](samples))
    picture = decode(tiff(samples, orientation, order=order))
    np.testing.assert_array_equal(picture.rgb, expected)
    assert picture.bits == 16 and not picture.grey
    grey = decode(tiff(samples[..., :1], orientation, photometric=1, order=order))
    np.testing.assert_array_equal(grey.rgb[..., 1], expected[..., 0])
    assert grey.bits == 16 and grey.grey


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_tiff_is_inverted(dtype: type) -> None:
    top = np.iinfo(dtype).max
    picture = decode(tiff(np.array([[[0], [top]]], dtype), photometric=0))
    np.testing.assert_array_equal(picture.rgb[..., 0], [[255, 0]])


@pytest.mark.parametrize("format", ["jpeg", "tiff"])
def test_cmyk_is_refused(format: str) -> None:
    assert refused(saved(Image.new("CMYK", (8, 8), (1, 2, 3, 4)), format)) == "cmyk"


@pytest.mark.parametrize("format", ["webp", "png", "tiff"])
def test_animation_and_pages_are_refused(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert refused(data) == "animated"


def test_phone_jpeg_with_a_second_picture_gives_the_first(rgb: np.ndarray) -> None:
    """An MPO is a JPEG with another (depth, second lens) appended: the first is the photograph."""
    first = Image.fromarray(rgb)
    data = saved(first, "mpo", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    picture = decode(data)
    np.testing.assert_array_equal(picture.rgb, decode(saved(first, "jpeg")).rgb)
    assert picture.format == "jpeg"


def test_other_formats_are_refused_by_name() -> None:
    frames = [Image.new("P", (8, 8), colour) for colour in (0, 1)]
    gif = saved(frames[0], "gif", save_all=True, append_images=frames[1:])
    with pytest.raises(BadPicture, match=r"GIF.*PNG, JPEG, WebP, TIFF and BMP") as caught:
        decode(gif)
    assert caught.value.reason == "unsupported-format"
    assert refused(b"\0\0\0\x18ftypheic" + bytes(40)) == "unsupported-format"
    assert refused(saved(Image.new("F", (8, 8)), "tiff")) == "unsupported-format"
    for data in (b"", b"hello", b"<html></html>"):
        assert refused(data) == "not-an-image"
    assert refused(b"\x89PNG\r\n\x1a\n" + bytes(100)) == "unreadable"


def test_memory_error_of_the_decoder(rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.core, "new", exhausted)
    assert refused(saved(Image.fromarray(rgb), "webp")) == "out-of-memory"


def test_palette_with_and_without_transparency(rgb: np.ndarray) -> None:
    image = Image.fromarray(rgb // 64 * 64).quantize(32)
    picture = decode(saved(image, "png"))
    np.testing.assert_array_equal(picture.rgb, np.asarray(image.convert("RGB")))
    assert picture.alpha is None and not picture.grey
    index = np.asarray(image)
    transparent = int(index[0, 0])
    see_through = decode(saved(image, "png", transparency=transparent)).alpha
    np.testing.assert_array_equal(see_through, np.where(index == transparent, 0, 255))


@pytest.mark.parametrize("format", ["png", "tiff", "webp"])
def test_alpha_is_kept_and_opaque_alpha_dropped(rgb: np.ndarray, format: str) -> None:
    image = Image.fromarray(rgb)
    image.putalpha(Image.fromarray(rgb[..., 1]))
    options = {"lossless": True, "exact": True} if format == "webp" else {}
    picture = decode(saved(image, format, **options))
    np.testing.assert_array_equal(picture.rgb, rgb)
    np.testing.assert_array_equal(picture.alpha, rgb[..., 1])
    image.putalpha(255)
    assert decode(saved(image, format, **options)).alpha is None


def test_grey_kinds(rgb: np.ndarray) -> None:
    grey = Image.fromarray(rgb[..., 0])
    for data in (saved(grey, "png"), saved(grey, "tiff"), saved(grey, "bmp")):
        picture = decode(data)
        assert picture.grey
        np.testing.assert_array_equal(picture.rgb, np.repeat(rgb[..., :1], 3, axis=2))
    assert decode(saved(grey, "jpeg")).grey
    with_alpha = grey.copy()
    with_alpha.putalpha(Image.fromarray(rgb[..., 1]))
    picture = decode(saved(with_alpha, "png"))
    assert picture.grey
    np.testing.assert_array_equal(picture.alpha, rgb[..., 1])
    one_bit = Image.fromarray(rgb[..., 0] > 100)
    for format in ("png", "tiff", "bmp"):
        picture = decode(saved(one_bit, format))
        np.testing.assert_array_equal(picture.rgb[..., 2], np.where(rgb[..., 0] > 100, 255, 0))


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("with_alpha", [False, True])
def test_encode_round_trip(rgb: np.ndarray, format: str, grey: bool, with_alpha: bool) -> None:
    pixels = np.repeat(rgb[..., :1], 3, axis=2) if grey else rgb
    alpha = np.where(rgb[..., 2] < 80, 0, rgb[..., 2]) if with_alpha else None
    data = encode(pixels, format, alpha, grey)
    assert data == encode(pixels, format, alpha, grey)
    picture = decode(data)
    np.testing.assert_array_equal(picture.rgb, pixels)
    if with_alpha:
        np.testing.assert_array_equal(picture.alpha, alpha)
    else:
        assert picture.alpha is None
    assert picture.grey == (grey and format == "png")


def test_jpeg_is_not_subsampled_and_obeys_quality(rgb: np.ndarray) -> None:
    data = encode(rgb, "jpeg")
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x11  # luma sampled once by once: 4:4:4
    assert len(encode(rgb, "jpeg", quality=30)) < len(data)
    assert decode(encode(rgb, "jpeg", grey=True)).grey


def test_encode_refuses_what_it_cannot_write(rgb: np.ndarray) -> None:
    with pytest.raises(UsageError, match="transparency"):
        encode(rgb, "jpeg", alpha=rgb[..., 0])
    with pytest.raises(UsageError, match="png, jpeg, webp"):
        encode(rgb, "gif")
    with pytest.raises(ValueError, match="float"):
        encode(rgb.astype(np.float32))
    with pytest.raises(ValueError, match="alpha"):
        encode(rgb, alpha=rgb[:4, :4, 0])


def test_bad_picture_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadPicture("cmyk", "What.", "Do.")))
    assert (error.reason, error.message, error.hint, str(error)) == (
        "cmyk",
        "What.",
        "Do.",
        "What. Do.",
    )


def test_bicubic_has_the_field_s_kernel() -> None:
    """The response to one bright pixel is the cubic of Keys (1981) with a = -0.5."""
    lr = np.zeros((9, 9, 3), np.uint8)
    lr[4, 4] = 200
    lr[lr == 0] = 40  # undershoot stays above 0

    def keys(x: np.ndarray, a: float = -0.5) -> np.ndarray:
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    weights = keys((np.arange(36) + 0.5) / 4 - 4.5)
    expected = 40 + 160 * np.outer(weights, weights)
    upsampled = bicubic_upsample(lr, 4)
    assert upsampled.shape == (36, 36, 3)
    assert np.abs(upsampled[..., 1] - expected).max() <= 1


def test_suffixes_cover_the_formats() -> None:
    registered = Image.registered_extensions()
    assert {registered[suffix] for suffix in PICTURE_SUFFIXES} == {
        "PNG",
        "JPEG",
        "WEBP",
        "TIFF",
        "BMP",
    }


# ---------------------------------------------------------------- large pictures


@pytest.fixture(scope="module")
def large() -> Image.Image:
    """Of several strips; 3.1 megapixels."""
    rows, columns = np.mgrid[0:1400, 0:2200]
    channels = [(rows * 3 + columns) % 256, (rows + columns * 2) % 251, (rows * columns) % 256]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6, 3])
def test_strips_make_the_picture_that_one_piece_makes(large: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    transparent = large.copy()
    transparent.putalpha(large.getchannel(1))
    palette = large.quantize(16)
    for image, mode in ((large, "RGB"), (transparent, "RGBA"), (palette, "RGB")):
        picture = decode(saved(image, "png", exif=exif))
        whole = np.asarray(image.convert(mode))
        np.testing.assert_array_equal(picture.rgb, UPRIGHT[orientation](whole[..., :3]))
        if mode == "RGBA":
            np.testing.assert_array_equal(picture.alpha, UPRIGHT[orientation](whole[..., 3]))


def test_16_bits_in_strips(large: Image.Image) -> None:
    samples = np.asarray(large).astype(np.uint16) * 250
    np.testing.assert_array_equal(decode(png(samples, 2)).rgb, nearest_level(samples))
    grey = decode(png(samples[..., :1], 0)).rgb
    np.testing.assert_array_equal(grey[..., 1], nearest_level(samples[..., 0]))


def test_a_jpeg_beyond_the_memory_is_read_reduced(large: Image.Image) -> None:
    data = saved(large.resize((2200, 1400), Image.Resampling.BOX), "jpeg", quality=80)
    need = len(data) + (16 << 20) + 7 * 2200 * 1400
    assert decode(data, max_memory=need).reduced_by == 1
    for memory, reduced_by in ((need - 1, 2), (need - 6 * 2200 * 1400, 4)):
        picture = decode(data, max_memory=memory)
        assert picture.reduced_by == reduced_by
        assert picture.rgb.shape == (1400 // reduced_by, 2200 // reduced_by, 3)
        opened = Image.open(io.BytesIO(data))
        expected = opened.reduce(reduced_by)
        difference = picture.rgb.astype(int) - np.asarray(expected)
        assert abs(difference.mean()) < 1
    assert refused(data, max_memory=need - 1, min_side=701) == "too-small"
    assert refused(data, max_memory=1 << 20) == "too-many-pixels"
    progressive = saved(large, "jpeg", quality=80, progressive=True, subsampling=0)
    assert decode(progressive, max_memory=need + len(progressive)).reduced_by > 1


@pytest.mark.parametrize("format", ["png", "webp", "tiff", "bmp"])
def test_other_formats_beyond_the_memory_are_refused(large: Image.Image, format: str) -> None:
    data = saved(large, format)
    assert refused(data, max_memory=30_000_000) == "too-many-pixels"


PEAK = """
import re, sys
from teasr import images

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

data = open(sys.argv[1], "rb").read()
images.decode(open(sys.argv[2], "rb").read())  # whatever is loaded on first use
before = peak()
getattr(images, sys.argv[3])(data, max_memory=int(sys.argv[4]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("format", "function", "per_pixel"),
    [("png", "decode", 7), ("jpeg", "decode", 7), ("png", "is_plain", 4), ("jpeg", "is_plain", 4)],
)
def test_peak_memory_of_a_large_picture(
    format: str, function: str, per_pixel: int, large: Image.Image, tmp_path: Path
) -> None:
    pixels = 5000 * 4000
    (tmp_path / "large").write_bytes(saved(large.resize((5000, 4000)), format))
    (tmp_path / "small").write_bytes(saved(large.resize((50, 40)), format))
    peaks = []
    reducible = format == "jpeg" and function == "decode"
    for memory in (1 << 40, 100_000_000) if reducible else (1 << 40,):
        command = [sys.executable, "-c", PEAK, "large", "small", function, str(memory)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout))
        assert peaks[-1] <= min(memory, per_pixel * pixels + (20 << 20))
    assert peaks[0] > 3 * pixels  # it was measured


@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_quality_is_the_one_it_was_written_with(subsampling: int, rgb: np.ndarray) -> None:
    for quality in range(1, 101):
        data = saved(Image.fromarray(rgb), "jpeg", quality=quality, subsampling=subsampling)
        assert jpeg_quality(data) == quality
    assert jpeg_quality(saved(Image.fromarray(rgb[..., 0]), "jpeg", quality=61)) == 61
    assert jpeg_quality(saved(Image.fromarray(rgb), "png")) is None


def test_jpeg_quality_of_tables_that_are_not_standard(rgb: np.ndarray) -> None:
    flat = [[8] * 64, [8] * 64]
    finer = [[2] * 64, [2] * 64]
    qualities = [
        jpeg_quality(saved(Image.fromarray(rgb), "jpeg", qtables=tables))
        for tables in (flat, finer)
    ]
    assert 85 <= qualities[0] < qualities[1] <= 99


def test_a_look_is_grey_upright_and_no_larger_than_asked(large: Image.Image) -> None:
    exif = Image.Exif()
    exif[274] = 6
    smooth = Image.fromarray(np.asarray(large)).reduce(8).resize(large.size)
    expected = np.asarray(smooth.convert("L").resize((512, 326), Image.Resampling.BOX)).astype(int)
    for format in ("jpeg", "png"):
        seen = look(saved(smooth, format, exif=exif), 512)
        assert (seen.width, seen.height, seen.format) == (1400, 2200, format)
        assert seen.grey.shape == (512, 326)
        assert np.abs(seen.grey - np.rot90(expected, -1)).mean() < 2
    assert look(saved(large.resize((40, 30)), "png"), 512).grey.shape == (30, 40)
    with pytest.raises(BadPicture) as caught:
        look(saved(large, "jpeg")[:-3000], 64)
    assert caught.value.reason == "truncated"


def test_plain_pictures_are_those_that_every_reader_shows_alike(rgb: np.ndarray) -> None:
    image = Image.fromarray(rgb)
    turned = Image.Exif()
    turned[274] = 8
    for format in ("png", "jpeg", "webp"):
        assert is_plain(saved(image, format))
        assert not is_plain(saved(image, format, exif=turned))
    for other in (
        saved(image, "tiff"),
        saved(image.convert("L"), "png"),
        saved(image.quantize(8), "png"),
        saved(image.convert("RGBA"), "png"),
        saved(image, "png", transparency=(1, 2, 3)),
        png(rgb.astype(np.uint16), 2),
    ):
        assert not is_plain(other)
    with pytest.raises(BadPicture, match="cut off"):
        is_plain(saved(image, "jpeg")[:-40])
