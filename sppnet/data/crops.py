"""The objects of a detection data set, and its background, as a folder of pictures for each class.

A classifier learns from them where a backbone has no pretrained weights and no large classification set is at hand; its
checkpoint then starts the detector.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sppnet.artifacts import digest_of, write_atomically
from sppnet.data.selection import annotations_digest
from sppnet.errors import SppnetError
from sppnet.images import prepare, read_image
from sppnet.jobs import progress_bar
from sppnet.paths import fitting_name
from sppnet.records import ImageRecord, pairwise_iou

BACKGROUND = "background"
CONTEXT = 1.4  # side of a crop over the longer side of its object: margin for shifts
BACKGROUND_OVERLAP = 0.3  # a background crop overlaps every object less than this


def write_crops(
    records: Sequence[ImageRecord],
    classes: Sequence[str],
    folder: Path,
    side: int,
    seed: int = 0,
    difficult: bool = True,
) -> Path:
    """Write square crops of `side` pixels: all objects, and at most as many of the background; returns their folder.

    It is <folder>/crops-<digest>, with a folder of PNG files for each class that has objects and one called background.
    It appears only when it is complete; crops of the same images, objects and arguments are reused. Beyond the border
    of an image its edge pixels repeat. Without `difficult` such objects are left out, but are no background either.
    SppnetError for images without objects of the classes, and for a class that no folder can be named after.
    """
    for name in classes:
        if name.casefold() == BACKGROUND:  # many file systems know no case
            raise SppnetError(f"class {name}: crops of what is no object have this name; give the class another one")
        if not name or name.startswith(".") or set(name) & set("/\\\0"):
            raise SppnetError(f"class {name!r}: expected the name of a folder, without slashes and a dot in front")
    path = folder / f"crops-{digest_of(annotations_digest(records, tuple(classes)), side, seed, difficult)}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".crops-", dir=folder) as temporary:
        whole, counts = Path(temporary) / path.name, Counter[str]()
        for name, pixels in _cut_crops(records, tuple(classes), side, seed, difficult):
            file = whole / fitting_name(name, "") / f"{counts[name]:06d}.png"
            write_atomically(file, partial(Image.fromarray(pixels).save, format="PNG"), durable=False)
            counts[name] += 1
        if not counts:
            raise SppnetError("crops: expected annotated objects of the classes, but the images hold none; check both")
        try:
            whole.rename(path)
        except OSError:
            if not path.exists():  # else another process was faster
                raise
    return path


def _cut_crops(
    records: Sequence[ImageRecord], classes: tuple[str, ...], side: int, seed: int, difficult: bool
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(class, crop) image by image."""
    rng = np.random.default_rng(seed)
    for record in progress_bar(records, "crops", "image"):
        if record.annotation is None:
            continue
        annotation = record.annotation.of(classes)
        wanted = annotation if difficult else annotation.easy()
        if not len(wanted):
            continue
        image = read_image(record.path)
        # background: boxes of the sizes of the objects, anywhere in the image away from them
        sides = np.repeat(annotation.boxes[:, 2:] - annotation.boxes[:, :2], 4, axis=0)
        sides = sides * rng.uniform(0.5, 1.2, (len(sides), 1))
        corner = rng.random((len(sides), 2)) * np.maximum(np.array(record.size)[::-1] - sides, 1)
        boxes = np.concatenate([corner, corner + sides], axis=1)
        away = pairwise_iou(boxes, annotation.boxes.astype(np.float64)).max(axis=1) < BACKGROUND_OVERLAP
        background = boxes[away][: len(wanted)]
        names = [*wanted.names, *[BACKGROUND] * len(background)]
        for name, box in zip(names, [*wanted.boxes, *background], strict=True):
            yield name, _cut(image, box, side)


def _cut(image: NDArray[np.uint8], box: NDArray[np.floating], side: int) -> NDArray[np.uint8]:
    """The square around a box, with context, as (side, side, 3)."""
    centre, half = (box[:2] + box[2:]) / 2, max(float((box[2:] - box[:2]).max()), 2.0) * CONTEXT / 2
    (x1, y1), (x2, y2) = np.rint(centre - half).astype(int), np.rint(centre + half).astype(int)
    rows = np.clip(np.arange(y1, max(y2, y1 + 1)), 0, image.shape[0] - 1)
    columns = np.clip(np.arange(x1, max(x2, x1 + 1)), 0, image.shape[1] - 1)
    resized = prepare(image[rows[:, None], columns[None, :]], (side, side), "rgb", (0, 0, 0), (1, 1, 1))[0]
    return resized.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
