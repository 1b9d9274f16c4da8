"""Greedy non-maximum suppression, per class.

A box leaves when it overlaps a better one of its class by more than the threshold (sec. 4.1: 0.3). Boxes are
half-open, so the plain IoU here equals the "+ 1" IoU of inclusive corners. Everything is computed in float64 on
the CPU: the kept boxes then do not depend on the device or on the precision in which the boxes arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms as suppress

from sppnet.checks import as_boxes, as_column, check_boxes, check_overlap, is_whole
from sppnet.errors import SppnetError
from sppnet.records import Detections, pairwise_iou

Array = TypeVar("Array", NDArray[np.generic], Tensor)


def nms(boxes: Array, scores: Array, threshold: float, limit: int | None = None) -> Array:
    """Indices of the boxes that survive, best first, ties by the lower index; at most `limit` of them.

    boxes (R, 4) half-open, scores (R,). A box is suppressed where its IoU with a kept one is above `threshold`
    (strictly). Arrays and lists give an int64 array, tensors an int64 tensor on the device of `boxes`.
    Raises ValueError for other shapes, for boxes that are not finite or whose corners are reversed (one without area
    overlaps nothing), for scores that are NaN, a threshold outside [0, 1] and a negative limit.
    """
    corners, values = check_boxes(boxes, extent=False), as_column(scores, "scores")
    if limit is not None and not (is_whole(limit) and limit >= 0):
        raise SppnetError(f"limit must be a count of boxes or None, got {limit!r}")
    kept = _nms(corners, values, check_overlap(threshold, "threshold"), limit)
    return torch.from_numpy(kept).to(boxes.device) if isinstance(boxes, Tensor) else cast(Array, kept)


def nms_per_class(
    boxes: NDArray[np.floating], scores: NDArray[np.floating], threshold: float, max_per_class: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What remains of every class, best first over all classes: (indices, labels), both (S,) int64.

    boxes (R, 4), scores (R, K). Scores of -inf take no part, and a class keeps at most `max_per_class`. Ties go to the
    lower label, then the lower index.
    """
    boxes, scores = np.asarray(boxes), np.asarray(scores)
    if scores.ndim != 2 or boxes.shape != (len(scores), 4):
        raise ValueError(f"expected scores (R, K) with boxes (R, 4), got {scores.shape} with {boxes.shape}")
    indices, labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for label in range(scores.shape[1]):
        candidates = np.flatnonzero(scores[:, label] > -np.inf)
        kept = candidates[_nms(boxes[candidates], scores[candidates, label], threshold, max_per_class)]
        indices.append(kept)
        labels.append(np.full(len(kept), label, np.int64))
    index, label_of = np.concatenate(indices), np.concatenate(labels)
    order = np.argsort(-scores[index, label_of], kind="stable")
    return index[order], label_of[order]


def unite_detections(each: Sequence[Detections]) -> Detections:
    """What several detectors of the same classes found, one after the other; classes in the order of the first."""
    classes = each[0].classes
    boxes, scores = (np.concatenate([getattr(own, name) for own in each]) for name in ("boxes", "scores"))
    labels = np.array([classes.index(name) for own in each for name in own.class_names], np.int64)
    return Detections(boxes, scores, labels, classes)


def suppress_detections(
    found: Detections, overlap: float, limit: int | None = None
) -> tuple[Detections, tuple[str, ...]]:
    """What survives, class by class, best first; at most `limit` of a class, and the classes that have more."""
    table = np.where(found.labels[:, None] == np.arange(len(found.classes)), found.scores[:, None], -np.inf)
    kept, label = nms_per_class(found.boxes, table, overlap)
    stay, more = first_of_class(label, len(label) if limit is None else limit)
    return found[kept[stay]], tuple(found.classes[own] for own in more)


def soften(found: Detections, overlap: float) -> Detections:
    """Soft-NMS (ours; linear, Bodla et al. 2017) of probabilities: neighbours lose score instead of going.

    From the best on, those of a class whose IoU with one is above `overlap` keep the share 1 - IoU of their score.
    """
    scores = found.scores.astype(np.float64)
    for label in np.unique(found.labels):
        left = np.flatnonzero(found.labels == label)
        while len(left):
            best = left[scores[left].argmax()]
            left = left[left != best]
            iou = pairwise_iou(found.boxes[best : best + 1].astype(np.float64), found.boxes[left].astype(np.float64))[0]
            scores[left] *= np.where(iou > overlap, 1 - iou, 1)
    return replace(found, scores=scores.astype(np.float32))[np.argsort(-scores, kind="stable")]


def first_of_class(labels: NDArray[np.int64], limit: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of (S,) are among the first `limit` of their label, and the labels that have more."""
    every = np.arange(labels.max(initial=0) + 1)
    place = (labels[:, None] == every).cumsum(axis=0)[np.arange(len(labels)), labels]
    return place <= limit, np.unique(labels[place > limit])


def _nms(
    boxes: NDArray[np.generic], scores: NDArray[np.generic], threshold: float, limit: int | None
) -> NDArray[np.int64]:
    boxes64, scores64 = as_boxes(boxes), scores.astype(np.float64)
    if scores64.shape != (len(boxes64),):
        raise ValueError(f"scores must have shape ({len(boxes64)},), one for each box, got {scores64.shape}")
    if np.isnan(scores64).any():
        raise ValueError(f"scores must be numbers, got NaN at index {np.isnan(scores64).argmax()}; leave such out")
    order = np.argsort(-scores64, kind="stable")
    limit = len(order) if limit is None else limit
    # What survives of the best boxes does not depend on the rest, so the first few often suffice.
    for count in (4 * limit, len(order)):
        first = torch.from_numpy(boxes64[order[:count]])
        kept = suppress(first, torch.arange(len(first), 0, -1, dtype=torch.float64, device="cpu"), threshold).numpy()
        if len(kept) >= limit or count >= len(order):
            break
    return order[kept[:limit]]
