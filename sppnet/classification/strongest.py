"""Where a filter of the last convolutional layer responds most in the images of a folder (figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sppnet.backbones.probing import probe
from sppnet.classification.classifier import Classifier, of_images, usable
from sppnet.errors import SppnetError
from sppnet.images import read_image
from sppnet.jobs import progress_bar
from sppnet.paths import as_text
from sppnet.records import Detections
from sppnet.report.drawing import Picture, contact_sheet


@dataclass(frozen=True, eq=False)
class Response:
    """The strongest response of a filter in one image, and its receptive field there.

    `field`: (4,) xyxy, half-open, in pixels of the image, beyond which it may reach: the network sees zeros there.
    """

    path: Path
    value: float
    field: NDArray[np.float64]


def strongest_responses(
    classifier: Classifier, images: Sequence[Path], filter: int, side: int, count: int = 12, progress: bool = True
) -> tuple[list[Response], dict[Path, str]]:
    """The best place of the `count` images in which channel `filter` of the map responds most, best first.

    Images are seen whole with their shorter side `side` pixels; equal responses keep the order of images and of cells,
    row by row. The receptive field is found by running the network. Beside them the images that cannot be used, with
    the reason. SppnetError for a filter that the map does not have, and where no image can be used.
    """
    channels = classifier.network.backbone.channels
    if not 0 <= filter < channels:
        raise SppnetError(f"filter {filter}: expected one of the last layer's {channels}, from 0 to {channels - 1}")
    grid = probe(classifier.network.backbone)

    def strongest(image: NDArray[np.uint8]) -> tuple[float, NDArray[np.float64]]:
        pixels = classifier.pixels(image, side)
        response = classifier.maps(pixels)[0, filter].cpu().numpy()
        cell = np.array(np.unravel_index(response.argmax(), response.shape))
        low = (grid.first_centre + cell * grid.stride - (grid.field - 1) / 2)[::-1]  # x, y of the scaled image
        scale = np.array(image.shape[1::-1]) / np.array(pixels.shape[:1:-1])
        return float(response.max()), np.concatenate([low * scale, (low + grid.field) * scale])

    results = of_images(images, strongest)
    found, skipped = usable(progress_bar(results, "responses", "image", len(images), shown=progress))
    responses = [Response(images[place], float(value), field.numpy()) for place, (value, field) in found.items()]
    return sorted(responses, key=lambda response: -response.value)[:count], skipped


def draw_responses(responses: Sequence[Response], filter: int) -> Image.Image:
    """The images on one sheet, best first: the receptive field, a dot in its middle, the response, the file's name.

    The field of a deep network may hold the whole image; what is near its middle counts most.
    """
    pictures = []
    for response in responses:
        canvas = Image.fromarray(read_image(response.path))
        middle, radius = (response.field[:2] + response.field[2:]) / 2, max(canvas.size) / 60
        dot = [*(middle - radius), *(middle + radius)]
        ImageDraw.Draw(canvas).ellipse(dot, "white", "black", max(1, round(radius / 3)))
        image = np.array(canvas)
        box = np.clip(response.field, 0, [*image.shape[1::-1]] * 2)[None]
        score, label = np.array([response.value], np.float32), np.zeros(1, np.int64)
        found = Detections(box.astype(np.float32), score, label, (f"filter {filter}:",))
        pictures.append(Picture(image, found, as_text(response.path.name)))
    return contact_sheet(pictures)
