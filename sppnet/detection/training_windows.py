"""What fine-tuning, SVMs and box regressors train on: windows of images, their overlaps with objects, their features.

Maps and proposals are read from disk when they are needed, one image at a time, so memory does not grow with the
number of images beyond the rows of the windows that may be drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.backbones.backbone import Backbone
from sppnet.backbones.runtime import Runtime, make_runtime, resolve_precision
from sppnet.config import Config, FinetuneSettings
from sppnet.detection.feature_maps import FeatureMaps, image_maps, read_maps
from sppnet.detection.window_features import Features, ProjectedWindows, pool_crops, project_to_maps
from sppnet.distributed import in_order
from sppnet.images import scaled_size
from sppnet.proposals.search import read_windows
from sppnet.records import Annotation, ImageRecord, flip_boxes, pairwise_iou, spread


@dataclass(frozen=True)
class ImageWindows:
    """The windows of one image: its objects first, then its proposals; and how they overlap the objects."""

    windows: NDArray[np.float32]  # (G + R, 4)
    objects: NDArray[np.int64]  # (G,) class index of each object
    overlaps: NDArray[np.float32]  # (G + R, K) largest IoU with the objects of each class, also those that do not train


@dataclass(frozen=True)
class LabelledWindows:
    """The windows of one image that fine-tuning may draw: rows, and the class index of each positive."""

    positives: NDArray[np.int64]
    labels: NDArray[np.int64]
    negatives: NDArray[np.int64]
    objects_only: bool = False  # of an image that has no proposals


@dataclass(frozen=True)
class PositiveWindows:
    """The positives of one image for the SVMs, known from overlaps alone: its objects, then proposals near one."""

    windows: NDArray[np.floating]  # (P, 4) half-open pixels
    labels: NDArray[np.int64]  # (P,) class
    objects: int  # how many are objects: the first


@dataclass(frozen=True)
class BoxExamples:
    """Which proposals train the regressor of one class: image and row (N,), and the object each covers (N, 4)."""

    images: NDArray[np.int64]
    windows: NDArray[np.float32]
    boxes: NDArray[np.float32]


@dataclass(frozen=True)
class TrainingWindows:
    """Windows and maps of annotated images, from the folders of the proposals and maps stages."""

    records: Sequence[ImageRecord]
    classes: tuple[str, ...]
    windows_folder: Path
    maps_folder: Path
    backbone: Backbone
    config: Config
    device: torch.device
    objects_only: int = 0  # how many of the records, the last, have no proposals: nothing but their objects trains

    @property
    def searched(self) -> int:
        """How many of the records, the first, have proposals."""
        return len(self.records) - self.objects_only

    def annotation(self, index: int) -> Annotation:
        """The objects that count in training: of these classes, difficult ones as data.train_on_difficult says."""
        annotation = self._annotation(index)
        return annotation if self.config.data.train_on_difficult else annotation.easy()

    def _annotation(self, index: int) -> Annotation:
        annotation = self.records[index].annotation
        if annotation is None:
            raise ValueError(f"image {self.records[index].id} has no annotation; training needs one for every image")
        return annotation.of(self.classes)

    def windows(self, index: int) -> NDArray[np.float32]:
        """The objects of an image, then its proposals: (G + R, 4)."""
        if index >= self.searched:
            return self.annotation(index).boxes
        return np.concatenate([self.annotation(index).boxes, read_windows(self.windows_folder, self.records[index])])

    def image_windows(self, index: int) -> ImageWindows:
        windows = self.windows(index)
        return ImageWindows(windows, self.labels(self.annotation(index)), self.overlaps(index, windows))

    def overlaps(self, index: int, windows: NDArray[np.floating]) -> NDArray[np.float32]:
        """Largest IoU of windows (R, 4) with the objects of each class of an image, also those that do not train."""
        every = self._annotation(index)
        return class_overlaps(windows, every.boxes, self.labels(every), len(self.classes))

    def ignored(self, index: int, windows: NDArray[np.floating]) -> NDArray[np.float32]:
        """Largest IoU of windows (R, 4) with those objects of each class that do not train, being difficult: (R, K).

        A window is neither a positive nor a negative where one of them is the object that it overlaps most.
        """
        found = self._annotation(index)
        rows = found.difficult & (not self.config.data.train_on_difficult)
        return class_overlaps(windows, found.boxes[rows], self.labels(found)[rows], len(self.classes))

    def labels(self, annotation: Annotation) -> NDArray[np.int64]:
        return np.array([self.classes.index(name) for name in annotation.names], np.int64)

    def maps(self, index: int, flip: bool = False) -> FeatureMaps:
        return self.stored_maps(index, flip).to(self.device, torch.float32)

    def stored_maps(self, index: int, flip: bool = False) -> FeatureMaps:
        """Those of the file; they are computed, the same, where maps.budget_gigabytes or a joint head stores none."""
        record, settings = self.records[index], self.config.maps
        all_stored = settings.budget_gigabytes is None and self.config.head.training == "paper"
        if all_stored or record.path_in(self.maps_folder, flip).exists():
            return read_maps(self.maps_folder, record, flip)
        return image_maps(self.runtime, record, flip, settings)

    @cached_property
    def runtime(self) -> Runtime:
        """What computes maps that are not stored."""
        precision = resolve_precision(self.config.precision, self.device)
        return make_runtime(self.backbone, self.config.maps.runtime, precision)

    def empty_maps(self, index: int) -> FeatureMaps:
        """Maps of the right sizes without values, for `project`; nothing is read."""
        size, settings = self.records[index].size, self.config.maps
        sizes, sides = zip(*(scaled_size(size, scale, settings.max_side) for scale in settings.scales), strict=True)
        maps = tuple(torch.empty(1, *self.backbone.map_size(own), device="meta") for own in sizes)
        return FeatureMaps(maps, sides, size)

    def project(
        self, maps: FeatureMaps, windows: NDArray[np.floating], scales: NDArray[np.int64] | None = None
    ) -> ProjectedWindows:
        return project_to_maps(maps, windows, self.backbone.geometry, self.config.pyramid, self.config.maps, scales)

    def features(self, index: int, windows: NDArray[np.floating], features: Features) -> Tensor:
        """`features` (R, D), unscaled, of windows (R, 4) of an image."""
        maps = self.maps(index)
        return features(maps, self.project(maps, windows))


class FinetuneWindows:
    """Labelled windows for fine-tuning: of every image, and of its mirror image when `flips`; `labelled` has each."""

    def __init__(self, source: TrainingWindows, flips: bool) -> None:
        self._source = source
        if source.config.maps.budget_gigabytes is not None:
            _ = source.runtime  # not in `pool`: threads would make it at once, each for one thread of the processor
        settings = source.config.finetune

        def label(index: int) -> Iterable[NDArray[np.int64]]:
            found = source.image_windows(index)
            own = label_windows(found.overlaps, settings, source.ignored(index, found.windows))
            return own.positives, own.labels, own.negatives

        each = enumerate(in_order(label, len(source.records)))
        own = [LabelledWindows(a.numpy(), b.numpy(), c.numpy(), i >= source.searched) for i, (a, b, c) in each]
        self.labelled: Sequence[LabelledWindows] = own + own if flips else own

    def pool(self, image: int, rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Pyramid vectors (R, D) float32, on the CPU, of windows of an image, each from a random scale (release)."""
        source = self._source
        index, flip = image % len(source.records), image >= len(source.records)
        record, windows = source.records[index], source.windows(index)[rows]
        maps = source.stored_maps(index, flip)  # few windows: a fraction of the cells
        scales = rng.integers(len(maps.maps), size=len(rows))
        windows = flip_boxes(windows, record.size[1]) if flip else windows
        return pool_crops(maps, source.project(maps, windows, scales), source.config.pyramid.levels)


class MiningWindows:
    """Windows for mining: the objects of an image, then its proposals, one for each distinct window of cells (release).

    The same call gives the same values in the same order every time.
    """

    def __init__(self, source: TrainingWindows, features: Features) -> None:
        self._source, self._features = source, features

    def __len__(self) -> int:
        return len(self._source.records)

    @property
    def mined(self) -> int:
        """How many of the images, the first, have negatives; the others show objects alone."""
        return self._source.searched

    def read(self, index: int) -> tuple[ImageWindows, Tensor]:
        """The windows of an image and their features (R, D), unscaled, on any device."""
        found = self._distinct(index)
        return found, self.features(index, found.windows)

    def positives(self, index: int) -> PositiveWindows:
        """The objects; where svm.positive_overlap is below 1, then the proposals that cover one by so much.

        A proposal near objects of two classes is a positive of both; of those on the same cells one is kept. No map is
        read.
        """
        source, threshold = self._source, self._source.config.svm.positive_overlap
        if threshold == 1:
            annotation = source.annotation(index)
            return PositiveWindows(annotation.boxes, source.labels(annotation), len(annotation.boxes))
        found = self._distinct(index)
        count = len(found.objects)
        close = (found.overlaps >= threshold) & (found.overlaps > source.ignored(index, found.windows))
        near, classes = np.nonzero(close[count:])
        rows, labels = np.concatenate([np.arange(count), count + near]), np.concatenate([found.objects, classes])
        return PositiveWindows(found.windows[rows], labels, count)

    def features(self, index: int, windows: NDArray[np.floating]) -> Tensor:
        """Features (R, D), unscaled, of windows (R, 4) of an image."""
        return self._source.features(index, windows, self._features)

    def _distinct(self, index: int) -> ImageWindows:
        """The objects, and one of the proposals on each distinct window of cells. No map is read."""
        found = self._source.image_windows(index)
        count = len(found.objects)
        _, unique_row = self._source.project(self._source.empty_maps(index), found.windows[count:]).unique()
        first = np.unique(unique_row, return_index=True)[1]  # the first proposal on each window of cells, in order
        rows = np.concatenate([np.arange(count), count + first])
        return ImageWindows(found.windows[rows], found.objects, found.overlaps[rows])


def class_overlaps(
    windows: NDArray[np.floating], boxes: NDArray[np.floating], labels: NDArray[np.int64], classes: int
) -> NDArray[np.float32]:
    """Largest IoU of windows (R, 4) with the boxes (G, 4) of each label: (R, `classes`); 0 where there is none."""
    overlaps = np.zeros((len(windows), classes), np.float32)
    iou = pairwise_iou(windows.astype(np.float64), boxes.astype(np.float64))
    for label in np.unique(labels):
        overlaps[:, label] = iou[:, labels == label].max(axis=1)
    return overlaps


def label_windows(
    overlaps: NDArray[np.floating], settings: FinetuneSettings, ignored: NDArray[np.floating] | None = None
) -> LabelledWindows:
    """Positives have IoU >= 0.5 with an object, of the class they overlap most; negatives lie in [0.1, 0.5).

    overlaps (R, K) are those with all objects, `ignored` (R, K) with those that do not train: a window that has IoU >=
    0.5 with one of these, and less with the others, is neither.
    """
    best = overlaps.max(axis=1, initial=0.0)
    trained = overlaps if ignored is None else np.where(overlaps > ignored, overlaps, 0)
    positives = np.flatnonzero(trained.max(axis=1, initial=0.0) >= np.maximum(best, settings.positive_overlap))
    low, high = settings.negative_overlap
    negatives = np.flatnonzero((best >= low) & (best < min(high, settings.positive_overlap)))
    return LabelledWindows(positives, trained[positives].argmax(axis=1).astype(np.int64), negatives)


def draw_rows(rows: NDArray[np.int64], limit: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The rows (N,), or `limit` of them where there are more: each as likely, in their order."""
    return rows if len(rows) <= limit else rows[np.sort(rng.choice(len(rows), limit, replace=False))]


def sample_norms(source: TrainingWindows, features: Features, images: int, windows: int) -> NDArray[np.float32]:
    """Norms of the features of the first `windows` proposals of `images` images, spread over all; (0,) without any."""
    chosen = spread(range(len(source.records)), images)

    def norms(place: int) -> list[Tensor]:
        proposals = read_windows(source.windows_folder, source.records[chosen[place]])[:windows]
        return [source.features(chosen[place], proposals, features).norm(dim=1).cpu()] if len(proposals) else []

    found = [norm.numpy() for parts in in_order(norms, len(chosen)) for norm in parts]
    return np.concatenate([np.zeros(0, np.float32), *found])


def find_box_examples(source: TrainingWindows) -> list[BoxExamples]:
    """Per class, at most boxes.max_examples of the proposals with IoU >= boxes.overlap with one of its objects.

    Where there are more they are drawn evenly, so that memory is bounded whatever the number of images.
    """
    settings = source.config.boxes
    none = np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32)
    found = [[none] for _ in source.classes]
    for index in range(len(source.records)):
        image = source.image_windows(index)
        objects, proposals = np.split(image.windows, [len(image.objects)])
        ignored = source.ignored(index, proposals)
        for label in np.unique(image.objects):
            own = objects[image.objects == label]
            overlaps = image.overlaps[len(objects) :, label]
            near = proposals[(overlaps >= settings.overlap) & (overlaps > ignored[:, label])]
            covered = own[pairwise_iou(near, own).argmax(axis=1)]
            found[label].append((np.full(len(near), index), near, covered))
    rng = np.random.default_rng(settings.seed)
    examples = []
    for parts in found:
        images, windows, boxes = (np.concatenate(column) for column in zip(*parts, strict=True))
        rows = draw_rows(np.arange(len(images)), settings.max_examples, rng)
        examples.append(BoxExamples(images[rows], windows[rows], boxes[rows]))
    return examples


def pool_box_examples(source: TrainingWindows, examples: BoxExamples, width: int, features: Features) -> Tensor:
    """Features (N, `width`) float32 of the examples, on the CPU, image after image."""
    pooled = torch.zeros(len(examples.images), width)
    for index in np.unique(examples.images):
        rows = np.flatnonzero(examples.images == index)
        pooled[torch.from_numpy(rows)] = source.features(int(index), examples.windows[rows], features).cpu()
    return pooled
