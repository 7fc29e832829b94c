# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Labelled grids of small pictures, enlarged without smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

__all__ = ["PictureRow", "PictureSection", "picture_grid"]

Pixels = np.ndarray[Any, Any]

INK, SOFT, PALE, PAPER, LINE = "#1f2933", "#616e7c", "#9aa5b1", "#ffffff", "#cbd2d9"
MARGIN, GAP, LABEL_WIDTH, CAPTION, HEADING = 20, 8, 180, 20, 40
LABEL_SIZE, NOTE_SIZE, HEADING_SIZE = 17, 13, 19


@dataclass(frozen=True)
class PictureRow:
    """
    A row of a grid.

    :param str label: What the row is, shown on its left.
    :param pictures: uint8 arrays of shape ``(height, width, 3)`` or ``(height, width)``, which is
        grey.
    :param captions: A short text below each picture, or none at all.
    :param notes: Lines below the label.
    :param int faded: Draw the last so many pictures pale, for those that are shown but not meant.
    """

    label: str
    pictures: Sequence[Pixels]
    captions: Sequence[str] = ()
    notes: Sequence[str] = ()
    faded: int = 0


@dataclass(frozen=True)
class PictureSection:
    """
    Rows that belong together, below a heading.

    :param rows: The rows.
    :param str heading: The heading; empty for none.
    """

    rows: Sequence[PictureRow]
    heading: str = ""


def picture_grid(sections: Sequence[PictureSection], *, cell: int = 96) -> Image:
    """
    Draws rows of pictures with their labels.

    Pictures are enlarged by a whole factor, so that every pixel is a sharp square, to at most
    ``cell`` pixels; larger ones are shrunk.

    :param sections: The sections from top to bottom.
    :param int cell: The side of a picture on the grid, in pixels.
    :returns: The picture, in RGB; save it with ``.save("grid.png")``.
    :rtype: ~PIL.Image.Image
    :raises ValueError: If there is no picture at all, or a row has other captions than pictures.
    """
    from PIL import Image, ImageDraw

    rows = [row for section in sections for row in section.rows]
    _check(rows)
    image = Image.new("RGB", _size(sections, rows, cell), PAPER)
    draw = ImageDraw.Draw(image)
    top = MARGIN
    for section in sections:
        if section.heading:
            _text(draw, (MARGIN, top + 4), section.heading, HEADING_SIZE, INK)
            top += HEADING
        for row in section.rows:
            _draw_row(image, draw, row, top, cell)
            top += _row_height(row, cell)
    return image


def _check(rows: Sequence[PictureRow]) -> None:
    if not any(row.pictures for row in rows):
        raise ValueError("there are no pictures to draw; give at least one row with a picture")
    for row in rows:
        if row.captions and len(row.captions) != len(row.pictures):
            raise ValueError(
                f"row {row.label!r} has {len(row.captions)} captions for {len(row.pictures)} "
                "pictures; give one each, or none"
            )


def _row_height(row: PictureRow, cell: int) -> int:
    return cell + (CAPTION if row.captions else 0) + GAP


def _size(
    sections: Sequence[PictureSection], rows: Sequence[PictureRow], cell: int
) -> tuple[int, int]:
    widest = max(len(row.pictures) for row in rows)
    headings = sum(HEADING for section in sections if section.heading)
    height = sum(_row_height(row, cell) for row in rows) + headings
    return 2 * MARGIN + LABEL_WIDTH + widest * (cell + GAP), 2 * MARGIN + height


def _draw_row(image: Image, draw: ImageDraw, row: PictureRow, top: int, cell: int) -> None:
    _text(draw, (MARGIN, top + 6), row.label, LABEL_SIZE, INK)
    for line, note in enumerate(row.notes):
        _text(draw, (MARGIN, top + 32 + 18 * line), note, NOTE_SIZE, SOFT)
    for place, pixels in enumerate(row.pictures):
        left = MARGIN + LABEL_WIDTH + place * (cell + GAP)
        pale = place >= len(row.pictures) - row.faded
        picture = _enlarged(pixels, cell, pale)
        corner = (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2)
        image.paste(picture, corner)
        draw.rectangle((left - 1, top - 1, left + cell, top + cell), outline=LINE)
        if row.captions:
            middle = (left + cell // 2, top + cell + 3)
            _text(draw, middle, row.captions[place], NOTE_SIZE, PALE if pale else SOFT, anchor="ma")


def _enlarged(pixels: Pixels, cell: int, pale: bool) -> Image:
    from PIL import Image

    picture = Image.fromarray(pixels).convert("RGB")
    longest = max(picture.size)
    if longest > cell:
        picture.thumbnail((cell, cell))
    else:
        factor = cell // longest
        size = (picture.width * factor, picture.height * factor)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    if pale:
        return Image.blend(picture, Image.new("RGB", picture.size, PAPER), 0.62)
    return picture


def _text(
    draw: ImageDraw, at: tuple[int, int], text: str, size: int, fill: str, anchor: str = "la"
) -> None:
    from PIL import ImageFont

    draw.text(at, text, fill=fill, font=ImageFont.load_default(size), anchor=anchor)
