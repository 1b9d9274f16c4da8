"""ImageNet's layout: a folder that holds one folder of images for each class."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sppnet.data.folder import find_images
from sppnet.errors import SppnetError, counted


@dataclass(frozen=True)
class ClassFolder:
    """Images (N) and the class of each: labels (N,) are places in `classes`."""

    root: Path
    classes: tuple[str, ...]
    images: tuple[Path, ...]
    labels: NDArray[np.int64]

    def __str__(self) -> str:
        return f"{self.root}: {counted(len(self.images), 'image')} of {counted(len(self.classes), 'class')}"

    def part(self, places: NDArray[np.integer]) -> ClassFolder:
        """The images at these places."""
        return ClassFolder(self.root, self.classes, tuple(self.images[i] for i in places), self.labels[places])


def read_class_folder(root: Path, classes: Sequence[str] | None = None) -> ClassFolder:
    """The images below the folders of the classes, at any depth, in the order of their names.

    `classes`: those that a classifier knows; folders of some of them will do. Nothing is decoded. SppnetError for a
    folder that is not there, holds no folders, or holds one without images or of a class that is not known.
    """
    expected = "expected a folder that holds one folder of images for each class"
    if not root.is_dir():
        raise SppnetError(f"{root}: {expected}, but there is no such folder; check the path")
    folders = {unicodedata.normalize("NFC", path.name): path for path in sorted(root.iterdir()) if _is_class(path)}
    if not folders:
        raise SppnetError(f"{root}: {expected}, but it holds no folder; sort the images into folders by class")
    unknown = sorted(set(folders) - set(classes)) if classes is not None else []
    if classes is not None and unknown:
        known = ", ".join(list(classes)[:8]) + ", …" * (len(classes) > 8)
        raise SppnetError(f"{folders[unknown[0]]}: expected a class that was trained ({known}); rename or remove it")
    names = tuple(folders) if classes is None else tuple(classes)
    images, labels = list[Path](), list[int]()
    for name, folder in folders.items():
        found = find_images([folder])
        if not found.images:
            raise SppnetError(f"{folder}: expected images, found none that can be read; remove the folder or fill it")
        images += found.images
        labels += [names.index(name)] * len(found.images)
    return ClassFolder(root, names, tuple(images), np.array(labels, np.int64))


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")
