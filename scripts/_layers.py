"""Draws the pictures of docs/layers.md, and prints its table of the sliding window.

    python scripts/_layers.py [--out docs/pictures]

The photograph is china.jpg of scikit-learn's sample images (CC BY 2.0).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from sppnet.backbones.geometry import Geometry
from sppnet.backbones.windows import project_windows
from sppnet.ops.pyramid import PAPER_LEVELS, sliding_pool
from sppnet.report.drawing import class_colour, save_image
from sppnet.report.fonts import font_for

VGG16, SCALE = Geometry(stride=16, first_centre=7.5), 224
BOX = (48, 14, 262, 270)  # the tower; of the photograph at 480 × 320
SIDES = range(6, 25)  # cells


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "pictures")
    options = parser.parse_args(arguments)
    photo = load_sample_image("china.jpg")
    save_image(draw_projections(photo), options.out / "projections.jpg")
    save_image(draw_bins(photo), options.out / "bins.jpg")
    print(sliding_table())
    return 0


def draw_projections(photo: np.ndarray) -> Image.Image:
    """Where the cells look, and those of a window after the release and after the paper."""
    photo = np.asarray(Image.fromarray(photo).resize((480, 320), Image.Resampling.LANCZOS))
    height, width = photo.shape[:2]
    size = tuple(round(side * SCALE / min(height, width)) // 16 for side in (height, width))
    factor = (SCALE - 1) / (min(height, width) - 1)
    sheet = Image.new("RGB", (2 * width + 8, height), "white")
    for column, projection in enumerate(("release", "paper")):
        canvas = Image.fromarray(photo)
        draw = ImageDraw.Draw(canvas, "RGBA")
        (cells,) = project_windows(np.array([BOX], float), (height, width), SCALE, VGG16, size, projection)
        for y in range(size[0]):
            for x in range(size[1]):
                u, v = ((VGG16.first_centre + VGG16.stride * n) / factor for n in (x, y))
                own = cells[0] <= x < cells[2] and cells[1] <= y < cells[3]
                half = VGG16.stride / factor / 2 - 1
                if own:
                    draw.rectangle((u - half, v - half, u + half, v + half), fill=(*class_colour(0), 80))
                draw.ellipse((u - 2, v - 2, u + 2, v + 2), fill="white")
        draw.rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), outline=class_colour(11), width=3)
        count = f"{projection}: {cells[2] - cells[0]} × {cells[3] - cells[1]} cells"
        draw.rectangle((8, 8, 170, 30), fill="white")
        draw.text((14, 12), count, fill="black", font=font_for(count, 13))
        sheet.paste(canvas, (column * (width + 8), 0))
    return sheet


def draw_bins(photo: np.ndarray) -> Image.Image:
    """The bins of the four levels over the whole photograph: as many, whatever its size."""
    sizes, gap = [(240, 160), (160, 160)], 8
    width, height = sizes[0]
    sheet = Image.new("RGB", (4 * (width + gap) - gap, 2 * height + gap), "white")
    square = photo[:, (photo.shape[1] - photo.shape[0]) // 2 :][:, : photo.shape[0]]
    for row, (image, size) in enumerate(zip((photo, square), sizes, strict=True)):
        for column, n in enumerate(PAPER_LEVELS):
            canvas = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.LANCZOS)
            draw = ImageDraw.Draw(canvas)
            for i in range(n):
                for j in range(n):  # floor(i·H / n) … ceil((i + 1)·H / n), in cells of 8 pixels
                    cells = [side // 8 for side in size]
                    left, right = j * cells[0] // n, -(-(j + 1) * cells[0] // n)
                    top, bottom = i * cells[1] // n, -(-(i + 1) * cells[1] // n)
                    inset = 1 + (i + j) % 2  # neighbours that share cells are told apart
                    corners = (8 * left + inset, 8 * top + inset, 8 * right - 1 - inset, 8 * bottom - 1 - inset)
                    draw.rectangle(corners, outline=class_colour(column), width=2)
            sheet.paste(canvas, (column * (width + gap), row * (height + gap)))
    return sheet


def sliding_table() -> str:
    """The sizes of a map for which the sliding window gives another number of positions than n, as Markdown."""
    lines = ["| cells a | n | window ceil(a / n) | stride floor(a / n) | positions |", "|---|---|---|---|---|"]
    for side in SIDES:
        for n in PAPER_LEVELS:
            window, stride, right = sliding_pool(side, n)
            if not right:
                lines.append(f"| {side} | {n} | {window} | {stride} | {(side - window) // stride + 1} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
