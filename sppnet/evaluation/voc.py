"""Average precision of detections, by the rules of the PASCAL VOC devkit, or by that of ILSVRC's.

A detection, in order of descending score, is compared with the object of its class and image that it overlaps most,
difficult and already found objects included. Below the IoU threshold it is a false positive; on a difficult object it
is ignored; on an object that a better detection found before it is a false positive; otherwise it is a true positive.
Only objects that are not difficult count as missed. Boxes are half-open, so plain IoU is the devkit's plus-one IoU.

By the rule "ilsvrc" a detection finds the object that it overlaps most among those that none found before it and that
it overlaps enough: by the IoU threshold, or by less where an object is so small that a border of 5 pixels around it is
more. No object is difficult. AP is "area". The rule "coco" is in `sppnet.evaluation.coco`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.checks import as_boxes, as_column, check_classes, check_overlap, first_bad_box
from sppnet.errors import SppnetError
from sppnet.evaluation.coco import evaluate_coco
from sppnet.evaluation.results import Checked, ClassResult, CurveMetric, Floats, Metric, PRCurve, VOCEvaluation
from sppnet.records import Annotation, Detections, pairwise_iou

T = TypeVar("T")
Flags = NDArray[np.bool_]
Scene = tuple[Annotation, NDArray[np.int64], NDArray[np.floating]]  # objects, detections and their IoU
FlatDetections = tuple[Sequence[str], ArrayLike, ArrayLike]  # image ids, scores (R,), boxes (R, 4) of one class

RECALL_TOLERANCE = 1e-9  # recall is a fraction of two counts: 3 of 10 must reach the threshold 0.3


def evaluate_voc(
    detections: Mapping[str, Detections] | Sequence[Detections],
    annotations: Mapping[str, Annotation] | Sequence[Annotation],
    classes: Sequence[str],
    metric: Metric = "11point",
    iou: float = 0.5,
    use_difficult: bool = False,
) -> VOCEvaluation:
    """AP per class from image id -> what was found and image id -> what is there, or from two sequences of images.

    Every annotated image counts, also without detections, but not for classes `unknown` in it. Equal scores keep the
    order of `annotations`, then the order inside the image. Classes go by name; detections of other classes than
    `classes` are left out. SppnetError, which names the image, for an image with detections but without annotation, for
    values that are no Detections and Annotation (which check their numbers), and for a class that no detections know.
    Metric coco: no `iou`.
    """
    names = check_rules(classes, metric, iou, use_difficult)
    found_in, truth_of = check_images(detections, annotations, names)
    images = [image for image in truth_of if image in found_in]
    ids, said = (
        np.array([(image, name) for image in images for name in found_in[image].class_names], object).reshape(-1, 2).T
    )
    scores = np.concatenate([np.zeros(0), *(found_in[image].scores for image in images)])
    boxes = np.concatenate([np.zeros((0, 4)), *(found_in[image].boxes for image in images)])
    judged = np.array([name not in truth_of[image].unknown for image, name in zip(ids, said, strict=True)], bool)
    own = {name: np.flatnonzero((said == name) & judged) for name in names}
    flat = {name: (ids[rows].tolist(), scores[rows], boxes[rows]) for name, rows in own.items()}
    return evaluate_flat(flat, truth_of, names, metric, iou, use_difficult)


def evaluate_flat(
    detections: Mapping[str, FlatDetections],
    annotations: Mapping[str, Annotation],
    classes: Sequence[str],
    metric: Metric = "11point",
    iou: float = 0.5,
    use_difficult: bool = False,
) -> VOCEvaluation:
    """AP per class from class -> (image ids, scores, boxes), the content of one comp4 file per class."""
    names, truth_of = check_rules(classes, metric, iou, use_difficult), _by_image(annotations, Annotation)
    if not isinstance(detections, Mapping):
        raise SppnetError(f"expected class -> (image ids, scores, boxes), got {type(detections).__name__}")
    missing = [name for name in names if name not in detections]
    if missing:
        raise SppnetError(f"no detections given for {', '.join(missing)}; pass empty arrays for a class without any")
    if use_difficult or metric == "ilsvrc":
        use_difficult, truth_of = True, all_counted(truth_of)
    flat = {name: _check_flat(*detections[name], truth_of, name) for name in names}
    if metric == "coco":
        results, iou = evaluate_coco(flat, truth_of), 0.5  # that of its curves
    else:
        results = {name: _evaluate_class(flat[name], truth_of, name, metric, iou) for name in names}
    return VOCEvaluation(results, metric, iou, use_difficult)


def _evaluate_class(
    found: Checked, annotations: Mapping[str, Annotation], name: str, metric: CurveMetric, iou: float
) -> ClassResult:
    image_ids, values, rows = found
    order = np.argsort(-values, kind="stable")
    positive, ignored, total = np.zeros(len(values), bool), np.zeros(len(values), bool), 0
    for objects, own, overlaps in _scenes([image_ids[row] for row in order], rows[order], annotations, name):
        if metric == "ilsvrc":
            positive[own] = _match_ilsvrc(overlaps, objects.boxes, iou)
        else:
            positive[own], ignored[own] = match_voc(overlaps, objects.difficult, iou)
        total += int((~objects.difficult).sum())
    true = np.cumsum(positive[~ignored], dtype=np.float64)
    curve = PRCurve(true / max(total, 1), true / np.arange(1, len(true) + 1), values[order][~ignored])
    ap = average_precision(curve.recall, curve.precision, metric)
    return ClassResult(ap if total else None, curve, total, len(values))


def average_precision(recall: ArrayLike, precision: ArrayLike, metric: CurveMetric = "11point") -> float:
    """AP of a curve, both (R,), best score first: `11point` (VOC07) or `area` (VOC10 on, ILSVRC); 0 for an empty curve.

    11point: mean over recall 0, 0.1, ... 1 of the best precision at that recall or more. area, ilsvrc: the area under
    the precision made monotone from the right.
    """
    reached, exact = np.asarray(recall, dtype=np.float64), np.asarray(precision, dtype=np.float64)
    if reached.shape != exact.shape or reached.ndim != 1:
        raise SppnetError(f"recall and precision must both have shape (R,), got {reached.shape} and {exact.shape}")
    _check_metric(metric, CurveMetric)
    envelope = np.maximum.accumulate(exact[::-1])[::-1]
    if metric != "11point":
        return float(np.sum(np.diff(reached, prepend=0.0) * envelope))
    first = np.searchsorted(reached, np.arange(11) / 10 - RECALL_TOLERANCE)
    return float(np.append(envelope, 0.0)[first].sum() / 11)


def _check_metric(metric: object, known: object = Metric) -> None:
    if metric not in get_args(known):
        raise SppnetError(f"metric must be one of {', '.join(get_args(known))}, got {metric!r}")


def check_rules(classes: Sequence[str], metric: object, iou: object, use_difficult: object) -> tuple[str, ...]:
    """The classes to evaluate; SppnetError for what no evaluation can be made by."""
    names = check_classes(classes)
    if not names:
        raise SppnetError("classes must be distinct names, at least one, got none")
    if not isinstance(use_difficult, bool | np.bool_):
        raise SppnetError(f"use_difficult must be true or false, got {use_difficult!r}")
    _check_metric(metric)
    if not check_overlap(iou, "iou") > 0:
        raise SppnetError(f"iou must lie above 0, got {iou!r}; VOC takes 0.5")
    return names


def check_images(
    detections: Mapping[str, Detections] | Sequence[Detections],
    annotations: Mapping[str, Annotation] | Sequence[Annotation],
    names: Sequence[str],
) -> tuple[dict[str, Detections], dict[str, Annotation]]:
    """Both by image id, as `evaluate_voc` takes them; SppnetError for what cannot be evaluated."""
    found_in, truth_of = _by_image(detections, Detections), _by_image(annotations, Annotation)
    if isinstance(detections, Mapping) != isinstance(annotations, Mapping):
        raise SppnetError("detections and annotations must both be mappings by image id, or both be sequences")
    if not isinstance(detections, Mapping) and len(detections) != len(annotations):
        counts = f"{len(detections)} detections and {len(annotations)} annotations"
        raise SppnetError(f"{counts}: sequences must hold one of each for every image; Detections may be empty")
    _require_annotations(found_in, truth_of, "detections")
    known = {name for found in found_in.values() for name in found.classes}
    unknown = [name for name in names if found_in and name not in known]
    if unknown:
        raise SppnetError(f"class {unknown[0]!r} is none of the detections' classes: {', '.join(sorted(known))}")
    return found_in, truth_of


def all_counted(annotations: Mapping[str, Annotation]) -> dict[str, Annotation]:
    """The same objects, none of them difficult."""
    return {image: Annotation(own.boxes, own.names, unknown=own.unknown) for image, own in annotations.items()}


def _by_image(values: Mapping[str, T] | Sequence[T], kind: type[T]) -> dict[str, T]:
    """Image id -> value, each of this kind."""
    if isinstance(values, str) or not isinstance(values, Mapping | Sequence):
        raise SppnetError(f"expected {kind.__name__} by image id or a sequence, got {type(values).__name__}")
    pairs = values.items() if isinstance(values, Mapping) else ((str(place), one) for place, one in enumerate(values))
    found = dict(pairs)
    for image_id, value in found.items():
        if not isinstance(image_id, str):
            raise SppnetError(f"image {image_id!r}: ids must be texts, got {type(image_id).__name__}; use str(id)")
        if not isinstance(value, kind):
            raise SppnetError(f"image {image_id}: expected sppnet.{kind.__name__}, got {type(value).__name__}")
    return found


def _check_flat(
    image_ids: Sequence[str], scores: ArrayLike, boxes: ArrayLike, annotations: Mapping[str, Annotation], name: str
) -> Checked:
    values, rows = as_column(scores, f"{name}: scores").astype(np.float64), as_boxes(boxes, f"{name}: boxes")
    if not len(image_ids) == len(values) == len(rows):
        counts = f"{len(image_ids)} image ids, {len(values)} scores and {len(rows)} boxes"
        raise SppnetError(f"{name}: {counts}; give one of each per detection")
    _require_annotations(image_ids, annotations, f"{name}: detections")
    bad = first_bad_box(np.where(np.isfinite(values)[:, None], rows, np.nan))
    if bad is not None:
        raise SppnetError(
            f"{name}: detection {bad}, in image {image_ids[bad]}, has the score {values[bad]} and the box "
            f"{rows[bad].tolist()}; expected finite numbers, x1 < x2 and y1 < y2"
        )
    return image_ids, values, rows


def _require_annotations(image_ids: Iterable[str], annotations: Mapping[str, Annotation], what: str) -> None:
    unknown = sorted(set(image_ids) - annotations.keys(), key=str)
    if unknown:
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        advice = "evaluate on the images that were searched, or drop its detections"
        raise SppnetError(f"{what} for image {unknown[0]}{others}, which has no annotation; {advice}")


def _scenes(ids: Sequence[str], boxes: Floats, truth: Mapping[str, Annotation], name: str) -> Iterator[Scene]:
    """Of every image with objects of the class: these (G), the rows of its detections (r,), and the IoU (r, G)."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, image_id in enumerate(ids):
        rows_of[image_id].append(row)
    for image_id, annotation in truth.items():
        if name in annotation.names:
            objects, rows = annotation.of((name,)), np.array(rows_of.get(image_id, ()), dtype=np.int64)
            yield objects, rows, pairwise_iou(boxes[rows], as_boxes(objects.boxes))


def match_voc(overlaps: NDArray[Any], difficult: NDArray[np.bool_], iou: float) -> tuple[Flags, Flags]:
    """Which detections, best first, find an object and which are ignored (r,), by their IoU with the objects (r, G)."""
    best = overlaps.argmax(axis=1)
    hits = overlaps.max(axis=1) >= iou
    ignored = hits & difficult[best]
    claims, positive = np.flatnonzero(hits & ~ignored), np.zeros(len(hits), dtype=bool)
    positive[claims[np.unique(best[claims], return_index=True)[1]]] = True  # the best of each object
    return positive, ignored


def _match_ilsvrc(overlaps: NDArray[Any], boxes: NDArray[np.floating], iou: float) -> Flags:
    """Which detections, best first, find an object by the rule of ILSVRC (r,)."""
    width, height = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]).T
    free = np.where(overlaps >= np.minimum(iou, width * height / ((width + 10) * (height + 10))), overlaps, 0)
    positive = np.zeros(len(free), dtype=bool)
    for row, own in enumerate(free):
        positive[row] = own.any()
        if own.any():
            free[:, own.argmax()] = 0
    return positive
