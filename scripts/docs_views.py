"""Draws docs/pictures/views.jpg: where the views of multiview lie at three of its scales.

    python scripts/docs_views.py

The photograph is scikit-learn's china.jpg by danielbuechele, CC BY 2.0 (sklearn/datasets/images/README.txt).
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from sklearn.datasets import load_sample_image

from sppnet.classification.views import View, list_views
from sppnet.images import scaled_size

TARGET = Path(__file__).resolve().parents[1] / "docs/pictures/views.jpg"
SCALES = (224, 300, 448)
DRAWN = 0.8  # of the scaled image's size
MARGIN, CAPTION = 12, 22
COLOURS = {"centre": "#ffffff", "corners": "#ffb000", "middles of the sides": "#38c8ff"}


def main() -> None:
    photo = Image.fromarray(load_sample_image("china.jpg"))
    panels = [draw(photo, scale) for scale in SCALES]
    width = sum(panel.width + MARGIN for panel in panels) + MARGIN
    sheet = Image.new("RGB", (width, max(panel.height for panel in panels) + 2 * MARGIN), "white")
    left = MARGIN
    for panel in panels:
        sheet.paste(panel, (left, MARGIN))
        left += panel.width + MARGIN
    legend, top, font = ImageDraw.Draw(sheet), sheet.height - MARGIN - 3 * CAPTION, ImageFont.load_default(14)
    for place, (kind, colour) in enumerate(COLOURS.items()):
        y = top + place * CAPTION
        legend.rectangle((MARGIN, y, MARGIN + 28, y + CAPTION - 1), fill="#505050")
        legend.rectangle((MARGIN + 4, y + 4, MARGIN + 24, y + CAPTION - 5), outline=colour, width=2)
        legend.text((MARGIN + 36, y + 2), kind, fill="black", font=font)
    sheet.save(TARGET, quality=85, optimize=True)
    print(f"{TARGET}: {sheet.width} × {sheet.height}, {TARGET.stat().st_size:,} bytes")


def draw(photo: Image.Image, scale: int) -> Image.Image:
    """The photograph at a scale, darkened, with the outline and the middle of every view; the flips lie upon them."""
    (height, width), _ = scaled_size((photo.height, photo.width), scale)
    own = {view.box: view for view in list_views("multiview", (photo.height, photo.width)) if view.scale == scale}
    size = round(width * DRAWN), round(height * DRAWN)
    panel = Image.new("RGB", (size[0], size[1] + CAPTION), "white")
    panel.paste(ImageEnhance.Brightness(photo.resize(size, Image.Resampling.LANCZOS)).enhance(0.7))
    pen = ImageDraw.Draw(panel)
    for view in own.values():
        kind = kind_of(view, width, height)
        inset = 2 + 4 * list(COLOURS).index(kind)  # so that outlines do not hide each other
        x1, y1, x2, y2 = (round(edge * DRAWN) for edge in view.box)
        pen.rectangle((x1 + inset, y1 + inset, x2 - inset - 1, y2 - inset - 1), outline=COLOURS[kind], width=2)
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS[kind], outline="black")
    text = f"scale {scale}: {width} x {height} px, {2 * len(own)} views"  # the font has no ×
    pen.text((2, size[1] + 4), text, fill="black", font=ImageFont.load_default(14))
    return panel


def kind_of(view: View, width: int, height: int) -> str:
    x1, y1, x2, y2 = view.box
    ends = (x1 == 0 or x2 == width) + (y1 == 0 or y2 == height)
    if view.scale == SCALES[0]:  # as high as the image
        ends -= 1
        return ("centre", "middles of the sides")[ends]
    return list(COLOURS)[0 if ends == 0 else 2 if ends == 1 else 1]


if __name__ == "__main__":
    main()
