"""Data sets of PASCAL VOC's layout, written file by file."""

from pathlib import Path

import numpy as np
from PIL import Image

from sppnet.artifacts import digest_of
from sppnet.records import Annotation, ImageRecord


def xml_of(*objects: str, size: str = "") -> str:
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def thing(name: str, *corners: object, difficult: int | str | None = 0) -> str:
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    bndbox = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name>{flag}<bndbox>{bndbox}</bndbox></object>"


def stated(height: int, width: int) -> str:
    return f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"


def make_devkit(root: Path, year: str = "VOC2007", names=("a", "b"), image_set: str = "train", ending=".jpg") -> Path:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / year / folder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(root / year / "JPEGImages" / f"{name}{ending}")
        objects = thing("cat", 1, 1, 10 + number, 20), thing("dog", 5, 5, 40, 30, difficult=1)
        (root / year / "Annotations" / f"{name}.xml").write_text(xml_of(*objects))
    (root / year / "ImageSets/Main" / f"{image_set}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def record(name: str, annotation: Annotation | None = None) -> ImageRecord:
    """An image whose content is another for every stem: "A/copy" and "B/copy" are copies."""
    digest = digest_of(name.rpartition("/")[2])
    return ImageRecord(name, Path(f"{name}.jpg"), (30, 40), digest, annotation)


def things(*names: str) -> Annotation:
    boxes = np.tile(np.float32([1, 2, 3, 4]), (len(names), 1))
    return Annotation(boxes, names, np.zeros(len(names), dtype=bool))
