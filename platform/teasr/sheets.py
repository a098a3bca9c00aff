"""Picture sheets: what went in, what came out and what it should be, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Bytes = NDArray[np.uint8]
Box = tuple[int, int, int, int]

_BACKGROUND = (236, 236, 236)  # neutral: a tint would change how colours look
_INK = (28, 28, 28)
_FAINT = (96, 96, 96)
_MARK = (255, 214, 10)
_OVERVIEW = "whole picture"


@dataclass
class Row:
    """One scene across the columns.

    Attributes:
        label: written above the row.
        pictures: uint8 (H, W, 3), one per column, all of the same scene. Sizes may differ: the
            largest (the last of them) is the HR frame, the others are that frame shrunk.
        captions: one per picture, such as '27.31 dB'; empty for none.
        zoom: (left, top, width, height) in HR pixels, shown instead of the whole; an extra cell at
            the left then marks it in the largest picture.
    """

    label: str
    pictures: list[Bytes]
    captions: list[str] = field(default_factory=list)
    zoom: Box | None = None


def sheet(rows: list[Row], columns: list[str], cell: int = 256) -> Image.Image:
    """The rows drawn in square cells of `cell` pixels under the headings `columns`.

    Every cell of a row shows the same part of the scene: the zoom, or the largest centred square.
    Pictures are enlarged by nearest neighbour, so that their pixels show, and shrunk by Lanczos.

    Raises:
        ValueError: for no rows, a row that does not match the columns, a zoom outside its frame.
    """
    if not rows:
        raise ValueError("a sheet needs at least one row")
    for row in rows:
        _check(row, len(columns))
    overview = any(row.zoom for row in rows)
    headings = [_OVERVIEW, *columns] if overview else columns
    size = max(12, cell // 15)
    heading, text = ImageFont.load_default(size + 2), ImageFont.load_default(size)
    line, gap, margin = round(size * 1.5), max(6, cell // 24), max(12, cell // 12)
    between = 2 * gap
    heights = [(2 if any(row.captions) else 1) * line + cell + between for row in rows]
    canvas = Image.new(
        "RGB",
        (
            2 * margin + len(headings) * (cell + gap) - gap,
            2 * margin + round(1.5 * line) + sum(heights) - between,
        ),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    lefts = [margin + index * (cell + gap) for index in range(len(headings))]
    for left, name in zip(lefts, headings):
        shown = _fit(name, heading, cell)
        draw.text((left + cell / 2, margin), shown, _INK, heading, anchor="ma")

    top = margin + round(1.5 * line)
    for row, height in zip(rows, heights):
        label = _fit(row.label, text, canvas.width - 2 * margin)
        draw.text((margin, top + line - size * 0.45), label, _INK, text, anchor="ls")
        frame = _frame(row)
        view = row.zoom or _centred_square(frame)
        if overview:
            canvas.paste(_overview(frame, row.zoom, cell), (lefts[0], top + line))
        cells = lefts[1:] if overview else lefts
        for index, (left, picture) in enumerate(zip(cells, row.pictures)):
            canvas.paste(_cell(picture, frame, view, cell), (left, top + line))
            if index < len(row.captions):
                caption = _fit(row.captions[index], text, cell)
                place = (left + cell / 2, top + line + cell + size * 0.3)
                draw.text(place, caption, _FAINT, text, anchor="ma")
        top += height
    return canvas


def _check(row: Row, columns: int) -> None:
    if len(row.pictures) != columns or len(row.captions) not in (0, columns):
        raise ValueError(
            f"row '{row.label}': {len(row.pictures)} pictures and {len(row.captions)} captions "
            f"for {columns} columns"
        )
    if row.zoom is not None:
        height, width = _frame(row).shape[:2]
        left, top, wide, high = row.zoom
        inside = min(left, top) >= 0 and left + wide <= width and top + high <= height
        if not inside or min(wide, high) < 1:
            raise ValueError(f"row '{row.label}': zoom {row.zoom} leaves {width} x {height} pixels")


def _frame(row: Row) -> Bytes:
    # The last of the largest: the original usually stands at the end.
    return max(reversed(row.pictures), key=lambda picture: picture.shape[0] * picture.shape[1])


def _centred_square(frame: Bytes) -> Box:
    height, width = frame.shape[:2]
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side, side


def _cell(picture: Bytes, frame: Bytes, view: Box, cell: int) -> Image.Image:
    """`view` (in pixels of `frame`) of `picture`, fitted into a square of `cell` pixels."""
    across, down = picture.shape[1] / frame.shape[1], picture.shape[0] / frame.shape[0]
    left, top, width, height = view
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    zoom = cell / max(width, height)
    shown = max(1, round(width * zoom)), max(1, round(height * zoom))
    enlarged = shown[0] >= box[2] - box[0]
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    scaled = Image.fromarray(picture).resize(shown, method, box=box)
    square = Image.new("RGB", (cell, cell), _BACKGROUND)
    square.paste(scaled, ((cell - shown[0]) // 2, (cell - shown[1]) // 2))
    return square


def _overview(frame: Bytes, zoom: Box | None, cell: int) -> Image.Image:
    height, width = frame.shape[:2]
    square = _cell(frame, frame, (0, 0, width, height), cell)
    if zoom is None:
        return square
    scale = cell / max(width, height)
    x, y = (cell - width * scale) / 2, (cell - height * scale) / 2
    left, top, wide, high = zoom
    corners = (
        (x + left * scale, y + top * scale),
        (x + (left + wide) * scale, y + (top + high) * scale),
    )
    draw = ImageDraw.Draw(square)
    # A dark line around a bright one shows on any picture.
    draw.rectangle(corners, outline=_INK, width=4)
    (x0, y0), (x1, y1) = corners
    draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=_MARK, width=2)
    return square


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, shortened with an ellipsis to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


@dataclass
class Tile:
    """One sample of a contact sheet.

    Attributes:
        pictures: uint8 (H, W, 3), side by side; sizes may differ.
        label: written under them.
        caption: a second line, fainter; wrapped to two when it is long.
    """

    pictures: list[Bytes]
    label: str
    caption: str = ""


def contact_sheet(tiles: list[Tile], across: int, title: str = "", cell: int = 192) -> Image.Image:
    """The tiles in rows of `across` under a `title`, each picture whole in a square cell of `cell`
    pixels.

    Pictures are enlarged by nearest neighbour and shrunk by Lanczos.

    Raises:
        ValueError: for no tiles.
    """
    if not tiles:
        raise ValueError("a contact sheet needs at least one tile")
    most = max(len(tile.pictures) for tile in tiles)
    size, inner, gap, margin = max(11, cell // 16), 4, max(12, cell // 10), max(14, cell // 10)
    label, text = ImageFont.load_default(size + 1), ImageFont.load_default(size - 1)
    captions = [_wrap(tile.caption, text, most * (cell + inner) - inner) for tile in tiles]
    lines = max(len(lines) for lines in captions)
    line = round(size * 1.35)
    wide, high = most * (cell + inner) - inner, cell + (1 + lines) * line + size // 2
    across = min(across, len(tiles))
    down = -(-len(tiles) // across)
    head = 2 * line if title else 0
    width = 2 * margin + across * (wide + gap) - gap
    height = 2 * margin + head + down * (high + gap) - gap
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), _fit(title, label, width - 2 * margin), _INK, label)
    for index, (tile, caption) in enumerate(zip(tiles, captions)):
        left = margin + index % across * (wide + gap)
        top = margin + head + index // across * (high + gap)
        for place, picture in enumerate(tile.pictures):
            whole = (0, 0, picture.shape[1], picture.shape[0])
            canvas.paste(_cell(picture, picture, whole, cell), (left + place * (cell + inner), top))
        top += cell + size // 3
        draw.text((left, top), _fit(tile.label, label, wide), _INK, label)
        for number, words in enumerate(caption, 1):
            draw.text((left, top + number * line), words, _FAINT, text)
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in up to two lines of `width` pixels, the second shortened when it must be."""
    words = text.split(" ")
    count = len(words)
    while count > 1 and font.getlength(" ".join(words[:count])) > width:
        count -= 1
    rest = " ".join(words[count:])
    lines = [_fit(" ".join(words[:count]), font, width)]
    return [*lines, _fit(rest, font, width)] if rest else [line for line in lines if line]
