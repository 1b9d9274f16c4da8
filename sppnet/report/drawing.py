"""Detections drawn on their image, a box per detection with name and score on a tag; and many pictures on one sheet."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from sppnet.artifacts import write_atomically
from sppnet.images import check_pixels
from sppnet.records import Detections, clip_boxes
from sppnet.report.fonts import Font, font_for, legible

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # pixels, half-open

PIXELS_PER_LINE = 220  # ours: a line of one pixel per so many pixels of the image's longer side
PIXELS_PER_FONT = 38  # ours: likewise for the height of the letters
SMALLEST_FONT = 10  # ours: below, letters cannot be read
PALETTE: tuple[Colour, ...] = (
    *((230, 40, 50), (30, 100, 240), (40, 160, 60), (255, 140, 0), (140, 40, 190)),
    *((0, 195, 215), (240, 50, 220), (170, 230, 40), (150, 90, 30), (255, 165, 195)),
    *((0, 120, 115), (255, 220, 0), (70, 60, 160), (160, 15, 70), (190, 150, 255)),
    *((120, 125, 0), (140, 255, 190), (255, 115, 85), (110, 190, 255), (95, 95, 95)),
)
MARGIN = 8
CAPTION_HEIGHT = 20
PAPER, INK, GREY = (255, 255, 255), (40, 40, 40), (238, 238, 238)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
LONGEST_JPEG = 65_500  # pixels; libjpeg writes no more
MARK = "drawn by sppnet"


def class_colour(index: int) -> Colour:
    """The RGB colour of a class, always the same; the first twenty are chosen to be told apart."""
    if index < len(PALETTE):
        return PALETTE[index]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.7, 0.9)  # the golden ratio never returns to a hue
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(image: NDArray[np.uint8], detections: Detections, threshold: float = -np.inf) -> Image.Image:
    """A copy of `image` (H, W, 3) RGB uint8 with the detections that score at least `threshold`.

    Boxes are clipped to the image, and those outside it left out. Better detections are drawn over worse ones.
    Lines and letters grow with the image.
    """
    canvas = Image.fromarray(check_pixels(image))
    draw = ImageDraw.Draw(canvas)
    line = max(1, round(max(canvas.size) / PIXELS_PER_LINE))
    found = detections.above(threshold)
    boxes = np.rint(clip_boxes(found.boxes, image.shape[:2])).astype(int)
    shown = []  # rectangle, text and colour, best first
    for row in np.argsort(-found.scores, kind="stable"):
        x1, y1, x2, y2 = boxes[row].tolist()
        if x2 > x1 and y2 > y1:
            text = f"{legible(found.classes[found.labels[row]])} {found.scores[row]:.2f}"
            shown.append(((x1, y1, x2, y2), text, class_colour(int(found.labels[row]))))
    for (x1, y1, x2, y2), _, colour in reversed(shown):
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colour, width=min(line, x2 - x1, y2 - y1))
    _draw_tags(draw, shown, canvas.size)
    return canvas


def save_image(image: Image.Image, path: Path) -> None:
    """Write a .png or .jpg, complete or not at all, with a mark that `is_drawn` finds.

    A .jpg holds 65,500 pixels a side: a longer picture is shrunk to that.
    """
    name = FORMATS.get(path.suffix.lower())
    if name is None:
        raise ValueError(f"{path}: a picture is written as {', '.join(FORMATS)}, got {path.suffix!r}; choose one")
    if name == "JPEG" and max(image.size) > LONGEST_JPEG:
        image = image.copy()
        image.thumbnail((LONGEST_JPEG, LONGEST_JPEG))
    comment = PngInfo()
    comment.add_text("Comment", MARK)
    write_atomically(path, lambda file: image.save(file, name, quality=90, comment=MARK, pnginfo=comment))


def is_drawn(path: Path) -> bool:
    """Whether `save_image` wrote this file: it is no photo. Reads its first bytes alone."""
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            return MARK.encode() in file.read(256)
    except OSError:
        return False


def _draw_tags(draw: ImageDraw.ImageDraw, shown: list[tuple[Rectangle, str, Colour]], size: tuple[int, int]) -> None:
    """The best get their place first; in a crowd a tag that finds none is left out, for nobody could read it."""
    wanted = max(SMALLEST_FONT, round(max(size) / PIXELS_PER_FONT))
    tags: list[tuple[Rectangle, str, Colour, Font]] = []
    for rectangle, text, colour in shown:
        font = _font_that_fits(draw, text, wanted, size[0])
        tag = _place(rectangle, _tag_size(draw, text, font), size, [other[0] for other in tags])
        if tag is not None:
            tags.append((tag, text, colour, font))
    for tag, text, colour, font in tags:
        draw.rectangle((tag[0], tag[1], tag[2] - 1, tag[3] - 1), fill=colour)
        middle = (tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2
        luma = np.dot(colour, (0.299, 0.587, 0.114))  # ITU-R BT.601
        draw.text(middle, text, fill="black" if luma > 140 else "white", font=font, anchor="mm")


def _font_that_fits(draw: ImageDraw.ImageDraw, text: str, wanted: int, width: int) -> Font:
    """The largest font up to `wanted` in which the tag is no wider than the image."""
    for points in range(wanted, 4, -1):
        font = font_for(text, points)
        if _tag_size(draw, text, font)[0] <= width:
            break
    return font


def _tag_size(draw: ImageDraw.ImageDraw, text: str, font: Font) -> tuple[int, int]:
    """(width, height) of the text with a margin; the height does not depend on the letters."""
    _, top, _, bottom = draw.textbbox((0, 0), "Ágj", font=font)
    height = round((bottom - top) * 1.15)
    return round(draw.textlength(text, font=font) + height * 0.5), height


def _place(box: Rectangle, tag: tuple[int, int], size: tuple[int, int], taken: list[Rectangle]) -> Rectangle | None:
    """Above the box, inside it or below it: the first place in the image that hides no other tag."""
    left = max(0, min(box[0], size[0] - tag[0]))
    for top in (box[1] - tag[1], box[1], box[3] - tag[1], box[3]):
        right, bottom = left + tag[0], top + tag[1]
        hidden = any(left < other[2] and other[0] < right and top < other[3] and other[1] < bottom for other in taken)
        if 0 <= top <= size[1] - tag[1] and not hidden:
            return left, top, right, bottom
    return None


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
    columns = min(columns, max(len(pictures), 1))
    height, width = cell[0] + CAPTION_HEIGHT + MARGIN, cell[1] + MARGIN
    rows = max(math.ceil(len(pictures) / columns), 1)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left, top = MARGIN + index % columns * width, MARGIN + index // columns * height
        draw.rectangle((left, top, left + cell[1] - 1, top + cell[0] - 1), fill=GREY)
        small = Image.fromarray(picture.image)
        small.thumbnail(cell[::-1], Image.Resampling.LANCZOS, reducing_gap=None)
        factors = np.array([small.width / picture.image.shape[1], small.height / picture.image.shape[0]] * 2, "f4")
        boxes = picture.detections.boxes * factors
        solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        found = replace(picture.detections[solid], boxes=boxes[solid])
        drawn = draw_detections(np.asarray(small), found, threshold)
        sheet.paste(drawn, (left + (cell[1] - drawn.width) // 2, top + (cell[0] - drawn.height) // 2))
        _write_line(draw, (left, top + cell[0] + 3), picture.caption, cell[1])
    if not pictures:
        _write_line(draw, (MARGIN, MARGIN), "no pictures", cell[1])
    return sheet


def _write_line(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int) -> None:
    """One line of text, cut with an ellipsis where it is wider than `width`."""
    whole = shown = legible(text)
    font = font_for(whole, 13)
    while whole and draw.textlength(shown, font=font) > width:
        whole = whole[:-1]
        shown = whole + "…"
    draw.text(corner, shown, fill=INK, font=font)
