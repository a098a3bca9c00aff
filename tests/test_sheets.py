from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from teasr.sheets import Row, sheet

BACKGROUND = (236, 236, 236)


def solid(colour: tuple[int, int, int], height: int = 64, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def find(canvas: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounding box (left, top, right, bottom) of the pixels of exactly this colour."""
    rows, columns = np.where((np.asarray(canvas) == colour).all(axis=2))
    assert len(rows), f"{colour} is nowhere"
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    drawn: list[str] = []
    original = ImageDraw.ImageDraw.text

    def record(self, xy, text, *args, **kwargs):  # type: ignore[no-untyped-def]
        drawn.append(text)
        return original(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


def test_cells_stand_in_rows_and_columns() -> None:
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    rows = [Row(str(i), [solid(colour) for colour in row]) for i, row in enumerate(colours)]
    canvas = sheet(rows, ["a", "b"], cell=100)
    (red, green), (blue, yellow) = [[find(canvas, colour) for colour in row] for row in colours]
    for box in (red, green, blue, yellow):
        assert (box[2] - box[0], box[3] - box[1]) == (100, 100)
    assert red[1] == green[1] and blue[1] == yellow[1] and blue[1] > red[3]
    assert red[0] == blue[0] and green[0] == yellow[0] and green[0] > red[2]
    assert canvas.getpixel((0, 0)) == BACKGROUND
    right, bottom = yellow[2:]
    assert right < canvas.width and bottom < canvas.height


def test_everything_written_is_drawn_inside_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = texts(monkeypatch)
    row = Row("street.png", [solid((200, 0, 0)), solid((0, 200, 0))], ["27.31 dB", "x" * 300])
    canvas = np.asarray(sheet([row], ["bicubic", "ours"], cell=100)).astype(int)
    assert drawn[:4] == ["bicubic", "ours", "street.png", "27.31 dB"]
    assert drawn[4].startswith("xxx") and drawn[4].endswith("...") and len(drawn[4]) < 30
    for edge in (canvas[:3], canvas[-3:], canvas[:, :3], canvas[:, -3:]):
        assert (edge == BACKGROUND).all()
    assert (canvas.sum(axis=2) < 150).any()  # dark ink on the light ground


def test_lr_pixels_show_as_squares() -> None:
    """A 4x4 checkerboard in a cell of 64 is 16-pixel squares of exactly its two colours."""
    board = (np.indices((4, 4)).sum(axis=0) % 2)[..., None] * np.uint8([90, 30, 60])
    canvas = sheet(
        [Row("", [board.astype(np.uint8), solid((0, 200, 0), 16, 16)])], ["", ""], cell=64
    )
    left, top, *_ = find(canvas, (90, 30, 60))
    left = find(canvas, (0, 0, 0))[0]
    shown = np.asarray(canvas)[top : top + 64, left : left + 64]
    np.testing.assert_array_equal(shown, board.repeat(16, axis=0).repeat(16, axis=1))


def test_zoom_shows_the_same_part_at_every_size_and_marks_it() -> None:
    hr = solid((10, 10, 10), 64, 96)
    hr[16:32, 48:64] = (200, 0, 0)
    lr = solid((10, 10, 10), 16, 24)
    lr[4:8, 12:16] = (0, 200, 0)
    canvas = sheet([Row("", [lr, hr], zoom=(48, 16, 16, 16))], ["LR", "HR"], cell=96)
    green, yellow = find(canvas, (0, 200, 0)), find(canvas, (255, 214, 10))
    assert (green[2] - green[0], green[3] - green[1]) == (96, 96)
    # The overview shows 96 x 64 at its own size, centred, and the mark lies on the red square.
    left, top = 12, green[1] + 16
    assert yellow == (left + 48 + 1, top + 16 + 1, left + 64, top + 32)
    pixels = np.asarray(canvas)[green[1] : green[3], green[2] :]
    assert ((pixels == (200, 0, 0)).all(axis=2)).sum() == 96 * 96


def test_whole_pictures_are_cut_to_the_centred_square() -> None:
    wide = solid((0, 0, 250), 32, 96)
    wide[:, 32:64] = (200, 0, 0)
    canvas = sheet([Row("", [wide])], [""], cell=128)
    left, top, right, bottom = find(canvas, (200, 0, 0))
    assert (right - left, bottom - top) == (128, 128)
    assert not (np.asarray(canvas) == (0, 0, 250)).all(axis=2).any()


def test_equal_rows_give_equal_pixels() -> None:
    rows = [Row("a", [solid((1, 2, 3))], ["1"], zoom=(0, 0, 8, 8))]
    np.testing.assert_array_equal(sheet(rows, ["x"]), sheet(rows, ["x"]))


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        sheet([], ["a"])
    with pytest.raises(ValueError, match="row 'r': 1 pictures"):
        sheet([Row("r", [solid((0, 0, 0))])], ["a", "b"])
    with pytest.raises(ValueError, match="2 captions"):
        sheet([Row("r", [solid((0, 0, 0))], ["1", "2"])], ["a"])
    for zoom in [(60, 0, 8, 8), (-1, 0, 8, 8), (0, 0, 0, 8)]:
        with pytest.raises(ValueError, match="zoom"):
            sheet([Row("r", [solid((0, 0, 0))], zoom=zoom)], ["a"])
