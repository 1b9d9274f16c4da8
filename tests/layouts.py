"""Data sets of the other formats, written file by file: a picture of 60 × 40 with a cat at (6, 4, 30, 24)."""

import json
from pathlib import Path

import numpy as np
from devkit import thing, xml_of
from PIL import Image

BOX = (6, 4, 30, 24)
XML = thing("cat", 7, 5, 30, 24)
LINE = "0 0.3 0.35 0.4 0.5\n"


def picture(path: Path, size=(60, 40), **options) -> Path:
    """Pixels that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(path.as_posix().encode())).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def xml(path: Path, *objects: str) -> Path:
    return text(path, xml_of(*(objects or (XML,))))


def coco_of(*names: str, boxes=((6, 4, 24, 20),), categories=("cat",)) -> dict:
    """Each image has all the boxes, of categories in turn; ids from 1."""
    images = [{"id": i, "file_name": name, "width": 60, "height": 40} for i, name in enumerate(names, 1)]
    objects = [(image["id"], box, 1 + k % len(categories)) for image in images for k, box in enumerate(boxes)]
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for i, (image, box, category) in enumerate(objects, 1)
    ]
    listed = [{"id": i, "name": name} for i, name in enumerate(categories, 1)]
    return {"images": images, "annotations": annotations, "categories": listed}


def coco(path: Path, values: object) -> Path:
    return text(path, json.dumps(values))
