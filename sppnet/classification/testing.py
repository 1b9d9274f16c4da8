"""Testing classifiers: softmax averaged over the views of an image and over several networks (sec. 3.1).

Views are pooled from windows of one map for each scale, as a detector's are, or cut out and run one by one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.backbones.windows import project_windows
from sppnet.classification.classifier import Classifier, of_images, usable
from sppnet.classification.views import View, list_views
from sppnet.data.class_folder import ClassFolder
from sppnet.errors import SppnetError
from sppnet.evaluation.classification import top_k_error
from sppnet.jobs import progress_bar
from sppnet.ops.pyramid import pool_windows, spatial_pyramid_pool
from sppnet.paths import as_text

CROPPED = ("centre", "ten")  # of image crops, as the paper tests them; full and multiview are pooled from maps


@dataclass(frozen=True, eq=False)
class ClassificationResult:
    """Probabilities (N, K) of the images that could be read, their classes (N,), and the others with the reason."""

    views: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    skipped: dict[Path, str]
    seconds: float  # wall time of all images, with reading

    @property
    def top1_error(self) -> float:
        return top_k_error(self.probabilities, self.labels, 1)

    @property
    def top5_error(self) -> float:
        """0 where there are five classes or fewer."""
        return top_k_error(self.probabilities, self.labels, 5)

    @property
    def class_errors(self) -> dict[str, float | None]:
        """Top-1 error of the images of each class; None where there are none."""
        own = [self.labels == label for label in range(len(self.classes))]
        errors = [top_k_error(self.probabilities[at], self.labels[at], 1) if at.any() else None for at in own]
        return dict(zip(self.classes, errors, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Without the probabilities, as JSON can hold it."""
        return {
            "views": self.views,
            "top1_error": self.top1_error,
            "top5_error": self.top5_error,
            "classes": self.class_errors,
            "images": len(self.labels),
            "seconds": self.seconds,
            "skipped": [as_text(path) for path in self.skipped],
        }


def load_classifiers(runs: Sequence[Path], device: torch.device) -> list[Classifier]:
    """Those of the runs; SppnetError where their classes differ, and for a run that is named twice."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise SppnetError(f"{', '.join(map(str, runs))}: expected different runs; name each once")
    first, *others = classifiers = [Classifier.load(run, device) for run in runs]
    for run, other in zip(runs[1:], others, strict=True):
        differ = sorted(set(other.classes) ^ set(first.classes))
        if other.classes != first.classes:
            found = f"{differ[0]!r} is of one of them alone" if differ else "their order differs"
            raise SppnetError(f"{runs[0]}, {run}: expected runs of the same classes, but {found}; test them one by one")
    return classifiers


def classify_image(
    classifier: Classifier, image: NDArray[np.uint8], views: Sequence[View], on_maps: bool = True
) -> NDArray[np.float64]:
    """Softmax of the classes, averaged over views of an image (H, W, 3) uint8 RGB: (K,).

    `on_maps`: the backbone runs once for a scale, and once for the mirrored image; a view is the window of that map
    that the detector's projection gives it (sec. 3.1.4), the whole map where it is the whole image. Otherwise each view
    is cut out and runs on its own, whose borders see padding and not the image around.
    """
    pooled, by_map = [], sorted(views, key=lambda view: (view.scale, view.flip, view.box[2] - view.box[0]))
    for scale, of_scale in itertools.groupby(by_map, key=lambda view: view.scale):
        pixels = classifier.pixels(image, scale)
        for flip, own in itertools.groupby(of_scale, key=lambda view: view.flip):
            boxes = np.array([view.box for view in own])
            if flip:
                boxes[:, [0, 2]] = pixels.shape[3] - boxes[:, [2, 0]]
            pool = _pool_maps if on_maps else _pool_crops
            pooled.append(pool(classifier, pixels.flip(3) if flip else pixels, boxes))
    with torch.inference_mode():
        return classifier.network.head(torch.cat(pooled)).double().softmax(1).mean(0).cpu().numpy()


def classify_files(
    classifiers: Sequence[Classifier], paths: Sequence[Path], views: str
) -> Iterator[tuple[Path, list[Tensor] | str]]:
    """Every file and [the mean of the classifiers' probabilities (K,)], or why it cannot be used; see `of_images`."""

    def classify(image: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
        size, on_maps = (image.shape[0], image.shape[1]), views not in CROPPED
        found = [classify_image(each, image, views_of(each, views, size), on_maps) for each in classifiers]
        return [np.mean(found, axis=0)]

    return of_images(paths, classify)


def views_of(classifier: Classifier, views: str, image_size: tuple[int, int]) -> list[View]:
    """The views of an image, of the size that the classifier was trained with."""
    training = classifier.config.training
    return list_views(views, image_size, max(training.sizes), training.whole_side)


def evaluate_classifiers(
    classifiers: Sequence[Classifier], folder: ClassFolder, views: str = "full", progress: bool = True
) -> ClassificationResult:
    """Errors of one classifier, or of the mean of several of the same classes, on a folder of their classes.

    Images that cannot be read or are too narrow are left out. Processes of torchrun share the images, and all get the
    result. SppnetError where no image could be used.
    """
    start = time.perf_counter()
    done = classify_files(classifiers, folder.images, views)
    found, skipped = usable(progress_bar(done, "test", "image", len(folder.images), shown=progress))
    probabilities, seconds = np.stack([row.numpy() for (row,) in found.values()]), time.perf_counter() - start
    return ClassificationResult(views, folder.classes, folder.labels[[*found]], probabilities, skipped, seconds)


def _pool_maps(classifier: Classifier, pixels: Tensor, boxes: NDArray[np.int64]) -> Tensor:
    """Pixels (1, 3, h, w) and boxes (V, 4) in them -> pooled windows of their map (V, D)."""
    height, width = pixels.shape[2:]
    feature_map, geometry = classifier.maps(pixels)[0], classifier.network.backbone.geometry
    cells = (feature_map.shape[1], feature_map.shape[2])
    windows = project_windows(boxes, (height, width), min(height, width), geometry, cells)
    windows[(boxes == (0, 0, width, height)).all(axis=1)] = 0, 0, cells[1], cells[0]
    return pool_windows(feature_map, windows, classifier.network.levels)


def _pool_crops(classifier: Classifier, pixels: Tensor, boxes: NDArray[np.int64]) -> Tensor:
    """The same, each box cut out: those of one size, which are neighbours, run together."""
    pooled = []
    for _, own in itertools.groupby(boxes.tolist(), key=lambda box: (box[2] - box[0], box[3] - box[1])):
        crops = torch.cat([pixels[..., y1:y2, x1:x2] for x1, y1, x2, y2 in own])
        pooled.append(spatial_pyramid_pool(classifier.maps(crops), classifier.network.levels))
    return torch.cat(pooled)
