"""What steps 5-7 train on: the windows of the training images, their overlaps and their pooled features.

Maps and proposals are read from disk when they are needed, one image at a time, so memory does not grow with the
number of images beyond the rows of the windows that may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.backbones.geometry import Geometry
from sppnet.boxes import flip_boxes, pairwise_iou
from sppnet.config import Config
from sppnet.detection.feature_maps import FeatureMaps, read_maps
from sppnet.detection.hard_negatives import MiningImage, PositiveWindows
from sppnet.detection.sampling import LabelledWindows, class_overlaps, draw_rows, label_windows
from sppnet.detection.window_features import Features, ProjectedWindows, pool_projected, project_at, project_to_maps
from sppnet.detection.windows import merge_windows
from sppnet.errors import SppnetError
from sppnet.proposals.search import read_windows
from sppnet.records import Annotation, ImageRecord, spread


@dataclass(frozen=True)
class ImageWindows:
    """The windows of one image: its objects first, then its proposals; and how they overlap the objects."""

    windows: NDArray[np.float32]  # (G + R, 4)
    objects: NDArray[np.int64]  # (G,) class index of each object
    overlaps: NDArray[np.float32]  # (G + R, K) largest IoU with the objects of each class


@dataclass(frozen=True)
class TrainingWindows:
    """Windows and maps of annotated images, from the folders of the propose and extract stages."""

    records: Sequence[ImageRecord]
    classes: tuple[str, ...]
    windows_folder: Path
    maps_folder: Path
    geometry: Geometry
    config: Config
    device: torch.device

    def annotation(self, index: int) -> Annotation:
        """The objects that count in training: of these classes, difficult ones as data.train_on_difficult says."""
        annotation = self.records[index].annotation
        if annotation is None:
            raise SppnetError(f"image {self.records[index].id} has no annotation; training needs one for every image")
        annotation = annotation.of(self.classes)
        return annotation if self.config.data.train_on_difficult else annotation.easy()

    def windows(self, index: int) -> NDArray[np.float32]:
        """The objects of an image, then its proposals: (G + R, 4)."""
        proposals = read_windows(self.windows_folder, self.records[index])
        return np.concatenate([self.annotation(index).boxes, proposals])

    def image_windows(self, index: int) -> ImageWindows:
        annotation, windows = self.annotation(index), self.windows(index)
        return ImageWindows(windows, self.labels(annotation), class_overlaps(windows, annotation, self.classes))

    def labels(self, annotation: Annotation) -> NDArray[np.int64]:
        return np.array([self.classes.index(name) for name in annotation.names], np.int64)

    def maps(self, index: int, flip: bool = False) -> FeatureMaps:
        return read_maps(self.maps_folder, self.records[index], flip).to(self.device)

    def mirrored(self, index: int, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        return flip_boxes(windows, self.records[index].size[1])

    def project(self, maps: FeatureMaps, windows: NDArray[np.floating]) -> ProjectedWindows:
        return project_to_maps(maps, windows, self.geometry, self.config.pyramid, self.config.maps)

    def pool(self, maps: FeatureMaps, projected: ProjectedWindows) -> Tensor:
        return pool_projected(maps, projected, self.config.pyramid.levels)


class FinetuneWindows:
    """Windows for fine-tuning: every image, and its mirror image when `flips`; see `finetuning.WindowSource`."""

    def __init__(self, source: TrainingWindows, flips: bool) -> None:
        self._source, self._flips = source, flips
        settings = source.config.finetune
        own = [label_windows(source.image_windows(i).overlaps, settings) for i in range(len(source.records))]
        self.labelled: Sequence[LabelledWindows] = own + own if flips else own

    def pool(self, image: int, rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Pyramid vectors of these windows, each from a random scale (release)."""
        source = self._source
        index, flip = image % len(source.records), image >= len(source.records)
        windows = source.windows(index)[rows]
        maps = source.maps(index, flip)
        scales = rng.integers(len(maps.maps), size=len(rows))
        windows = source.mirrored(index, windows) if flip else windows
        return source.pool(maps, project_at(maps, windows, scales, source.geometry, source.config.pyramid))


class MiningWindows:
    """Windows for mining: the objects of an image, then its proposals on distinct cells; see `MiningImages`."""

    def __init__(self, source: TrainingWindows, features: Features) -> None:
        self._source, self._features = source, features

    def __len__(self) -> int:
        return len(self._source.records)

    def read(self, index: int) -> MiningImage:
        source = self._source
        maps = source.maps(index)
        found = self._distinct(source.image_windows(index), maps)
        features = self._features(maps, source.project(maps, found.windows))
        labels = np.full(len(found.windows), -1, np.int64)
        labels[: len(found.objects)] = found.objects
        return MiningImage(features, found.overlaps, labels, found.windows)

    def positives(self, index: int) -> PositiveWindows:
        """The objects; where svm.positive_overlap is below 1, then the proposals that cover one by so much.

        Of the maps only the sizes are used, and only for proposals: of those on the same cells one is kept.
        """
        source, threshold = self._source, self._source.config.svm.positive_overlap
        if threshold == 1:
            annotation = source.annotation(index)
            return PositiveWindows(annotation.boxes, source.labels(annotation), len(annotation.boxes))
        found = self._distinct(source.image_windows(index), source.maps(index))
        rows, labels = positive_rows(found, threshold)
        return PositiveWindows(found.windows[rows], labels, len(found.objects))

    def features(self, index: int, windows: NDArray[np.floating]) -> Tensor:
        maps = self._source.maps(index)
        return self._features(maps, self._source.project(maps, windows))

    def _distinct(self, found: ImageWindows, maps: FeatureMaps) -> ImageWindows:
        """The objects, and one of the proposals on each distinct window of cells."""
        count = len(found.objects)
        proposals = self._source.project(maps, found.windows[count:])
        kept, _ = merge_windows(proposals.scale_index, proposals.cells)
        rows = np.concatenate([np.arange(count), count + kept])
        return ImageWindows(found.windows[rows], found.objects, found.overlaps[rows])


def positive_rows(found: ImageWindows, threshold: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and classes of the objects' own windows, then of the proposals with IoU >= `threshold` with an object."""
    count = len(found.objects)
    near, classes = np.nonzero(found.overlaps[count:] >= threshold)
    return np.concatenate([np.arange(count), count + near]), np.concatenate([found.objects, classes])


def sample_norms(source: TrainingWindows, features: Features, images: int, windows: int) -> NDArray[np.float32]:
    """Norms of the features of the first `windows` proposals of `images` images, spread over all; (0,) without any."""
    norms = [np.zeros(0, np.float32)]
    for index in spread(range(len(source.records)), images):
        proposals = read_windows(source.windows_folder, source.records[index])[:windows]
        if len(proposals):
            maps = source.maps(index)
            norms.append(features(maps, source.project(maps, proposals)).norm(dim=1).cpu().numpy())
    return np.concatenate(norms)


@dataclass(frozen=True)
class BoxExamples:
    """Which proposals train the regressor of one class: image and row (N,), and the object each covers (N, 4)."""

    images: NDArray[np.int64]
    windows: NDArray[np.float32]
    boxes: NDArray[np.float32]


def find_box_examples(source: TrainingWindows) -> list[BoxExamples]:
    """Per class, at most boxes.max_examples of the proposals with IoU >= boxes.overlap with one of its objects.

    Where there are more they are drawn evenly, so that memory is bounded whatever the number of images.
    """
    settings = source.config.boxes
    found: list[list[tuple[int, NDArray[np.float32], NDArray[np.float32]]]] = [[] for _ in source.classes]
    for index in range(len(source.records)):
        image = source.image_windows(index)
        count = len(image.objects)
        objects, proposals = image.windows[:count], image.windows[count:]
        for label in np.unique(image.objects):
            own = objects[image.objects == label]
            rows = np.flatnonzero(image.overlaps[count:, label] >= settings.overlap)
            covered = own[pairwise_iou(proposals[rows], own).argmax(axis=1)] if len(rows) else own[:0]
            found[label].append((index, proposals[rows], covered))
    rng = np.random.default_rng(settings.seed)
    return [_drawn(parts, settings.max_examples, rng) for parts in found]


def pool_box_examples(source: TrainingWindows, examples: BoxExamples, width: int, features: Features) -> Tensor:
    """Features (N, `width`) float32 of the examples, on the CPU, image after image."""
    pooled = torch.zeros(len(examples.images), width)
    for index in np.unique(examples.images):
        rows = np.flatnonzero(examples.images == index)
        maps = source.maps(int(index))
        own = features(maps, source.project(maps, examples.windows[rows]))
        pooled[torch.from_numpy(rows)] = own.cpu()
    return pooled


def _drawn(
    parts: Sequence[tuple[int, NDArray[np.float32], NDArray[np.float32]]], limit: int, rng: np.random.Generator
) -> BoxExamples:
    if not parts:
        return BoxExamples(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))
    images = np.concatenate([np.full(len(windows), index) for index, windows, _ in parts])
    windows = np.concatenate([windows for _, windows, _ in parts])
    boxes = np.concatenate([boxes for _, _, boxes in parts])
    kept = draw_rows(np.arange(len(images)), limit, rng)
    return BoxExamples(images[kept], windows[kept], boxes[kept])
