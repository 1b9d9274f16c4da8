"""Many pictures of detections on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sppnet.records import Detections
from sppnet.report.drawing import draw_detections

MARGIN = 8
CAPTION_HEIGHT = 20
PAPER, INK, GREY = (255, 255, 255), (40, 40, 40), (238, 238, 238)


@dataclass(frozen=True)
class Picture:
    """An image (H, W, 3) RGB uint8, what was found in it, and a line below it."""

    image: NDArray[np.uint8]
    detections: Detections
    caption: str = ""


def contact_sheet(
    pictures: Sequence[Picture], threshold: float = -np.inf, columns: int = 4, cell: tuple[int, int] = (270, 360)
) -> Image.Image:
    """Pictures row by row, each shrunk to fit a cell of (height, width) and then drawn on, so that tags stay legible.

    Small images are not enlarged. No pictures give a sheet that says so.
    """
    if columns < 1 or min(cell) < 16:
        raise ValueError(f"a sheet needs at least 1 column and cells of at least 16 x 16, got {columns} and {cell}")
    columns = min(columns, max(len(pictures), 1))
    height, width = cell[0] + CAPTION_HEIGHT + MARGIN, cell[1] + MARGIN
    rows = max(math.ceil(len(pictures) / columns), 1)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), PAPER)
    for index, picture in enumerate(pictures):
        corner = (MARGIN + index % columns * width, MARGIN + index // columns * height)
        _fill_cell(sheet, corner, cell, picture, threshold)
    if not pictures:
        _write_line(ImageDraw.Draw(sheet), (MARGIN, MARGIN), "no pictures", cell[1])
    return sheet


def _fill_cell(
    sheet: Image.Image, corner: tuple[int, int], cell: tuple[int, int], picture: Picture, threshold: float
) -> None:
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + cell[1] - 1, top + cell[0] - 1), fill=GREY)
    small = _shrink(picture, cell)
    drawn = draw_detections(small.image, small.detections, threshold)
    sheet.paste(drawn, (left + (cell[1] - drawn.width) // 2, top + (cell[0] - drawn.height) // 2))
    _write_line(draw, (left, top + cell[0] + 3), picture.caption, cell[1])


def _shrink(picture: Picture, cell: tuple[int, int]) -> Picture:
    height, width = picture.image.shape[:2]
    factor = min(cell[0] / height, cell[1] / width, 1.0)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = np.asarray(Image.fromarray(picture.image).resize(size, Image.Resampling.LANCZOS))
    boxes = picture.detections.boxes * np.float32(factor)
    return replace(picture, image=image, detections=replace(picture.detections, boxes=boxes))


def _write_line(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int) -> None:
    """One line of text, cut with an ellipsis where it is wider than `width`."""
    font = ImageFont.load_default(13)
    if draw.textlength(text, font=font) > width:
        while text and draw.textlength(text + "…", font=font) > width:
            text = text[:-1]
        text += "…"
    draw.text(corner, text, fill=INK, font=font)
