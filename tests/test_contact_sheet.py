"""Contact sheets: each picture whole in its cell, in order, LR pixels as squares."""

from __future__ import annotations

import numpy as np
import pytest

from teasr.sheets import Tile, contact_sheet


def plain(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def test_pictures_stand_side_by_side_in_rows() -> None:
    tiles = [
        Tile([plain(100, 50, (255, 0, 0)), plain(25, 12, (0, 255, 0))], f"a{i}", "words " * 40)
        for i in range(3)
    ]
    sheet = np.asarray(contact_sheet(tiles, across=2, title="three", cell=96)).astype(int)
    reds = (sheet == (255, 0, 0)).all(axis=2)
    greens = (sheet == (0, 255, 0)).all(axis=2)
    # Whole pictures: 96 x 48 pixels of each, three times; two rows and two columns of them.
    assert abs(reds.sum() - 3 * 96 * 48) < 10 and abs(greens.sum() - 3 * 96 * 46) < 300
    assert (np.diff(reds.any(axis=1).astype(int)) == 1).sum() == 2
    assert (np.diff(reds.any(axis=0).astype(int)) == 1).sum() == 2
    assert np.flatnonzero(reds.any(axis=0))[0] < np.flatnonzero(greens.any(axis=0))[0]


def test_pixels_are_enlarged_as_squares() -> None:
    board = np.zeros((4, 4, 3), np.uint8)
    board[::2, ::2] = 255
    sheet = np.asarray(contact_sheet([Tile([board], "board")], across=5, cell=64))
    cell = sheet[14:78, 14:78]
    np.testing.assert_array_equal(cell, board.repeat(16, axis=0).repeat(16, axis=1))


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], across=3)
