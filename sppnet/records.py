"""The named values that travel between the steps of the pipeline, and arithmetic on boxes.

Boxes are float (R, 4) arrays of (x1, y1, x2, y2), zero-based, half-open: width is x2 - x1. With these corners the plain
intersection over union equals the VOC devkit's, whose inclusive corners need "+ 1"; there is none in this package.
Sizes are (height, width).

Whatever is made here is checked when it is made: arrays, tensors and lists are accepted alike and copied, and what is
impossible is a SppnetError.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.checks import (
    as_column,
    check_boxes,
    check_classes,
    check_lengths,
    check_names,
    check_scores,
    check_thresholds,
    is_whole,
    rows_of,
)
from sppnet.errors import SppnetError
from sppnet.paths import fitting_name

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
Boxes = NDArray[np.floating]
Corners = tuple[float, float, float, float]


class AnnotatedObject(NamedTuple):
    """One object of an `Annotation`."""

    box: Corners
    name: str
    difficult: bool


class Detection(NamedTuple):
    """One of `Detections`; `label` is the place of `name` in their classes."""

    box: Corners
    score: float
    label: int
    name: str


class _Rows:
    """What has boxes: its length is their number, and it equals what holds the same values."""

    boxes: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.boxes)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(np.array_equal(value, vars(other)[name]) for name, value in vars(self).items())

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Annotation(_Rows):
    """The objects of one image: boxes float32 (R, 4) xyxy half-open, one class name and flag each.

    Without `difficult` no object is. ``annotation[1]`` is one object, ``annotation[mask]`` and slices are annotations,
    iterating gives the objects. Objects of the classes in `unknown` were not labelled: the image may show some.
    SppnetError for boxes that are not finite or not ordered and for unequal lengths.
    """

    boxes: NDArray[np.float32]
    names: tuple[str, ...]
    difficult: NDArray[np.bool_] = None  # type: ignore[assignment]  # an array once it is made
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        boxes, names = check_boxes(self.boxes, "boxes", np.float32), check_names(self.names, "names")
        flags = np.zeros(len(names), bool) if self.difficult is None else as_column(self.difficult, "difficult", "biu")
        if not np.isin(flags, (0, 1)).all():
            raise SppnetError(f"difficult: expected true or false for each object, got {flags.tolist()}")
        check_lengths(boxes=boxes, names=names, difficult=flags)
        unknown = check_names(self.unknown, "unknown")
        if not set(unknown).isdisjoint(names):
            raise SppnetError(f"unknown: expected classes of no object here, got {unknown} and objects of {names}")
        _set(self, boxes=boxes, names=names, difficult=flags.astype(bool), unknown=unknown)

    @overload
    def __getitem__(self, index: int) -> AnnotatedObject: ...
    @overload
    def __getitem__(self, index: slice | ArrayLike) -> Annotation: ...
    def __getitem__(self, index: Any) -> AnnotatedObject | Annotation:
        rows = rows_of(index, len(self))
        if isinstance(rows, int):
            return AnnotatedObject(tuple(self.boxes[rows].tolist()), self.names[rows], bool(self.difficult[rows]))
        return Annotation(self.boxes[rows], tuple(self.names[row] for row in rows), self.difficult[rows], self.unknown)

    def __iter__(self) -> Iterator[AnnotatedObject]:
        return (self[row] for row in range(len(self)))

    def of(self, names: Sequence[str] | Set[str]) -> Annotation:
        """Only the objects of these classes."""
        wanted = check_names(tuple(names) if isinstance(names, Set) else names, "names")
        return self[np.array([name in wanted for name in self.names], dtype=bool)]

    def easy(self) -> Annotation:
        """Only the objects not marked difficult."""
        return self[~self.difficult]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; ``Annotation(**values)`` is equal to this one."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set: where it lies, how large it is, what is in it (None = not annotated)."""

    id: str  # unique in the data set: "<year folder>/<stem>", e.g. "VOC2007/000005"
    path: Path
    size: tuple[int, int]  # (height, width) of the upright image, read from the file's header
    digest: str  # content of the image file: 16 hexadecimal digits of its SHA-256
    annotation: Annotation | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id or not isinstance(self.digest, str):
            raise SppnetError(f"id and digest of an image must be text, got {self.id!r} and {self.digest!r}")
        if self.id.startswith("/") or ".." in self.id.split("/") or "\0" in self.id:  # it becomes a path below a run
            raise SppnetError(f"{self.id!r}: an id must be '<year folder>/<stem>', without .. and a slash in front")
        if not isinstance(self.path, str | os.PathLike):
            raise SppnetError(f"{self.id}: path must be that of an image file, got {self.path!r}")
        sides = tuple(self.size) if isinstance(self.size, Sequence) else ()
        if len(sides) != 2 or not all(is_whole(side) and side > 0 for side in sides):
            raise SppnetError(f"{self.id}: size must be (height, width) in whole pixels, got {self.size!r}")
        if not isinstance(self.annotation, Annotation | None):
            raise SppnetError(f"{self.id}: expected an Annotation or None, got {type(self.annotation).__name__}")
        _set(self, path=Path(self.path), size=(int(sides[0]), int(sides[1])))

    def path_in(self, folder: Path, flip: bool = False) -> Path:
        """Where what was computed for the image, or for its mirror image, lies; the name carries the content."""
        name = Path(self.id)
        return folder / name.parent / fitting_name(name.name, f"-{self.digest}{'-flip' if flip else ''}.npz")


@dataclass(frozen=True, eq=False)
class Detections(_Rows):
    """What was found in one image: boxes (R, 4) float32, scores (R,) float32, labels (R,) int64 into classes.

    A detector gives them best first. ``found[0]`` is one detection; ``found[mask]``, slices and arrays of indices give
    Detections; iterating gives (box, score, label, name). SppnetError for boxes that are not finite or not
    x1 < x2, y1 < y2, for scores that are not finite, labels that are no place in `classes`, and unequal lengths.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        boxes, scores = check_boxes(self.boxes, "boxes", np.float32), check_scores(self.scores)
        labels, classes = as_column(self.labels, "labels", "iu"), check_classes(self.classes)
        check_lengths(boxes=boxes, scores=scores, labels=labels)
        if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            got = f"{int(labels.min())} to {int(labels.max())}; give the classes that these labels count"
            raise SppnetError(f"labels: expected 0 to {len(classes) - 1}, places in {classes}, got {got}")
        _set(self, boxes=boxes, scores=scores, labels=labels.astype(np.int64), classes=classes)

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: slice | ArrayLike) -> Detections: ...
    def __getitem__(self, index: Any) -> Detection | Detections:
        rows = rows_of(index, len(self))
        if isinstance(rows, int):
            label = int(self.labels[rows])
            box, score = tuple(self.boxes[rows].tolist()), float(self.scores[rows])
            return Detection(box, score, label, self.classes[label])
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], self.classes)

    def __iter__(self) -> Iterator[Detection]:
        return (self[row] for row in range(len(self)))

    @property
    def class_names(self) -> list[str]:
        """The class of each detection."""
        return [self.classes[label] for label in self.labels]

    def above(self, threshold: float | ArrayLike) -> Detections:
        """Those that score at least `threshold`: one number, or one for each of `classes`."""
        return self[self.scores >= check_thresholds(threshold, self.classes)[self.labels]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; ``Detections(**values)`` is equal to this one."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    def to_torchvision(self) -> dict[str, Any]:
        """The tensors boxes, scores and labels, as torchvision's detectors give them.

        Labels stay places in `classes`, from 0; torchvision's own models keep 0 for the background.
        """
        import torch

        return {name: torch.tensor(getattr(self, name), device="cpu") for name in ("boxes", "scores", "labels")}

    def to_supervision(self) -> Any:
        """The same as ``supervision.Detections``, names under ``data["class_name"]``."""
        try:
            import supervision
        except ImportError as error:
            remedy = "pip install --no-deps supervision, since it brings another OpenCV; pip install requests"
            raise SppnetError(f"to_supervision needs the package supervision ({error}): {remedy}") from None
        names = {"class_name": np.array(self.class_names, dtype=str)}
        boxes, scores, labels = self.boxes.copy(), self.scores.copy(), self.labels.copy()
        return supervision.Detections(xyxy=boxes, confidence=scores, class_id=labels, data=names)

    def to_coco(
        self, image_id: int | str, category_ids: Sequence[int] | Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Entries of a COCO result file: image_id, category_id, bbox (x, y, width, height), score.

        `category_ids`: one for each of `classes`, in their order or by name; by default 1, 2, … in their order.
        """
        given: Any = range(1, len(self.classes) + 1) if category_ids is None else category_ids
        given = [given.get(name) for name in self.classes] if isinstance(given, Mapping) else given
        ids: list[Any] = list(given) if isinstance(given, Iterable) else []
        if len(ids) != len(self.classes) or not all(is_whole(number) for number in ids):
            raise SppnetError(f"category_ids: expected a whole number for each of {self.classes}, got {category_ids!r}")
        if not isinstance(image_id, str) and not is_whole(image_id):
            raise SppnetError(f"image_id: expected a whole number or text, got {image_id!r}")
        image = image_id if isinstance(image_id, str) else operator.index(image_id)
        entries = []
        for (x1, y1, x2, y2), score, label, _ in self:
            box, category = [x1, y1, x2 - x1, y2 - y1], operator.index(ids[label])
            entries.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
        return entries

    def draw(self, image: Any) -> Image.Image:
        """A picture of the detections on their image, which is all that `SPPDetector.detect` takes."""
        from sppnet.images import read_pixels
        from sppnet.report.drawing import draw_detections  # the one import upwards: drawing is not to be looked for

        return draw_detections(read_pixels(image), self)


@dataclass(frozen=True)
class SkipCounts:
    """Documented skips (zero-area boxes and the like) for the summary: reason -> the image of every occurrence."""

    images: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _set(self, images={reason: images for reason, images in self.images.items() if images})

    @property
    def counts(self) -> dict[str, int]:
        return {reason: len(images) for reason, images in self.images.items()}

    def plus(self, other: SkipCounts) -> SkipCounts:
        keys = dict.fromkeys([*self.images, *other.images])
        return SkipCounts({key: [*self.images.get(key, ()), *other.images.get(key, ())] for key in keys})

    def lines(self) -> list[str]:
        """For every reason the count and an example: "2 × zero-area box, e.g. MINE/t0"."""
        return [f"{len(images)} × {reason}, e.g. {images[0]}" for reason, images in self.images.items()]


def spread(things: Sequence[T], count: int) -> list[T]:
    """At most `count` of the things, at even distances."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def areas(boxes: Boxes) -> NDArray[np.floating]:
    """(R, 4) -> (R,); boxes without extent have area 0."""
    sides = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None)
    return sides[:, 0] * sides[:, 1]


def pairwise_iou(boxes: Boxes, others: Boxes) -> NDArray[np.floating]:
    """Intersection over union of every pair: (R, 4), (S, 4) -> (R, S); 0 where both areas are 0."""
    corner1 = np.maximum(boxes[:, None, :2], others[None, :, :2])
    corner2 = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = np.clip(corner2 - corner1, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    union = areas(boxes)[:, None] + areas(others)[None, :] - intersection
    ratio = np.zeros(intersection.shape, np.result_type(intersection, np.float32))  # whole-pixel boxes come as integers
    return np.divide(intersection, union, out=ratio, where=union > 0)


def clip_boxes(boxes: Boxes, image_size: tuple[int, int]) -> Boxes:
    """Corners moved into the image of (height, width)."""
    height, width = image_size
    return np.clip(boxes, 0, np.array([width, height, width, height], dtype=boxes.dtype))


def flip_boxes(boxes: Boxes, width: float) -> Boxes:
    """The same boxes in the horizontally flipped image."""
    flipped = boxes[:, [2, 1, 0, 3]]
    flipped[:, ::2] = width - flipped[:, ::2]
    return flipped


def _set(frozen: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(frozen, name, value)
