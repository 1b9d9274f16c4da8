"""What may be wrong in a picture, by its detections: these themselves, or its labels where it has some (ours)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.checks import check_thresholds
from sppnet.records import Annotation, Detections, pairwise_iou

LOWEST, SURE = 0.1, 0.5  # certainties: below, nothing is seen; from here on, something
LEAST = 0.05  # doubts below are none
NEAR, SAME, WELL = 0.3, 0.5, 0.6  # IoU: about the same place, the same object, well placed
STEEP = 4.0  # of the margins of SVMs: 1 above a threshold is a certainty of 0.98


class Doubt(NamedTuple):
    """How much may be wrong, 0 to 1, why, and where; None is everywhere."""

    value: float
    reason: str
    box: tuple[float, ...] | None = None


def certainties(found: Detections, thresholds: ArrayLike, probabilities: bool) -> NDArray[np.float64]:
    """Of each detection (R,), 0 to 1: the logistic function of its score above the threshold of its class, there 0.5.

    `thresholds`: one, or one for each class. Probabilities count by their log-odds, other scores by `STEEP`.
    """
    both: Any = np.stack([found.scores, check_thresholds(thresholds, found.classes)[found.labels]]).astype(np.float64)
    odds = np.log(np.clip(both, 1e-6, 1) / np.clip(1 - both, 1e-6, 1)) if probabilities else STEEP * both
    return 1 / (1 + np.exp(np.clip(odds[1] - odds[0], -50, 50)))


def unlabelled_doubts(found: Detections, certain: NDArray[np.float64], usual: float = 0.0) -> list[Doubt]:
    """Of a picture without labels; they add up to the mistakes to expect, where certainties are probabilities.

    A detection of certainty c counts the lesser of c and 1 − c, from `LOWEST` on; c where a more certain one of another
    class is the same object. A picture without any that is `SURE` counts `usual`, the share of pictures with some.
    """
    doubts = [] if (certain >= SURE).any() else [Doubt(usual, "nothing found")]
    order = [row for row in np.argsort(-certain, kind="stable") if certain[row] >= LOWEST]
    overlaps, names = pairwise_iou(found.boxes, found.boxes), found.class_names
    for place, row in enumerate(order):
        other = [names[o] for o in order[:place] if names[o] != names[row] and overlaps[o, row] >= SAME]
        value = float(certain[row] if other else min(certain[row], 1 - certain[row]))
        reason = f"{other[0]} or {names[row]}" if other else f"uncertain {names[row]}"
        doubts.append(Doubt(value, reason, tuple(found.boxes[row].tolist())))
    return [doubt for doubt in doubts if doubt.value >= LEAST]


def label_doubts(found: Detections, certain: NDArray[np.float64], annotation: Annotation) -> list[Doubt]:
    """Of the labels of a picture; detections near difficult ones count nothing.

    A detection of certainty c that is `SURE` counts its excess 2 c − 1 where it is near no label: not labelled. Where
    it is the same object as a label of another class, and near none of its own: times 1 − c of the best detection that
    agrees with the label. Where it is near a label of its class, but not well placed, and none is better: times its way
    to `WELL`. A label counts 1 − c / `LOWEST` of the best detection near it: nothing is seen there.
    """
    truth, names, doubts = annotation.easy(), np.array(found.class_names, object), list[Doubt]()
    overlaps = np.pad(pairwise_iou(found.boxes, truth.boxes), ((0, 0), (0, 1)))  # argmax needs a column
    same, sure = names[:, None] == np.array([*truth.names, ""], object), certain >= SURE
    hard = pairwise_iou(found.boxes, annotation[annotation.difficult].boxes).max(axis=1, initial=0) >= NEAR
    for row in np.flatnonzero(sure & ~hard):
        excess, name, box = 2 * float(certain[row]) - 1, names[row], tuple(found.boxes[row].tolist())
        near, far = np.where(same[row], overlaps[row], 0), np.where(same[row], 0, overlaps[row])
        own, other, label, wrong = float(near.max()), float(far.max()), int(near.argmax()), int(far.argmax())
        if NEAR <= own < WELL and not (sure & same[:, label] & (overlaps[:, label] > own)).any():
            doubts.append(Doubt(excess * (WELL - own) / (WELL - NEAR), f"{name} badly placed", box))
        elif own < NEAR and other >= SAME:
            agreed = float(certain[same[:, wrong] & (overlaps[:, wrong] >= SAME)].max(initial=0))
            doubts.append(Doubt(excess * (1 - agreed), f"{truth.names[wrong]} labelled, {name} seen", box))
        elif max(own, other) < NEAR:
            doubts.append(Doubt(excess, f"{name} not labelled", box))
    for label, name in enumerate(truth.names):
        seen = float(certain[overlaps[:, label] >= NEAR].max(initial=0))
        doubts.append(Doubt(1 - seen / LOWEST, f"{name} labelled, nothing seen", tuple(truth.boxes[label].tolist())))
    return [doubt for doubt in doubts if doubt.value >= LEAST]
