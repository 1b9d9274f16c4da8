"""What may be wrong in a picture, by its detections: these themselves, or its labels where it has some (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.checks import check_thresholds
from sppnet.records import Annotation, Detections, pairwise_iou

LOWEST = 0.1  # certainty below which a detection is nothing
NEAR, HALF, WELL = 0.3, 0.5, 0.6  # IoU: about the same place, the same object, well placed
STEEP = 4.0  # of the margins of SVMs: 1 above a threshold is a certainty of 0.98


class Doubt(NamedTuple):
    """How much may be wrong, 0 to 1, why, and where; None is everywhere."""

    value: float
    reason: str
    box: tuple[float, ...] | None = None


def certainties(found: Detections, thresholds: ArrayLike, probabilities: bool) -> NDArray[np.float64]:
    """Of each detection 0 to 1 (R,): the logistic function of its score above the threshold of its class, there 0.5.

    `thresholds`: one, or one for each class. Probabilities count by their log-odds, other scores by `STEEP`.
    """
    own: Sequence[NDArray[np.float64]]
    own = found.scores.astype(np.float64), check_thresholds(thresholds, found.classes)[found.labels]
    if probabilities:
        kept = [np.clip(values, 1e-6, 1 - 1e-6) for values in own]
        scores, least = (np.log(values / (1 - values)) for values in kept)
    else:
        scores, least = (STEEP * values for values in own)
    return 1 / (1 + np.exp(np.clip(least - scores, -50, 50)))


def unlabelled_doubts(found: Detections, certain: NDArray[np.float64], usual: float = 0.0) -> list[Doubt]:
    """Of a picture without labels. Their values add up to the mistakes to expect where a certainty is a probability.

    A detection of certainty c is doubtful by the lesser of c and 1 − c, from `LOWEST` on; by c where a more certain one
    of another class is at the same place. A picture without any of 0.5 or more is, by `usual`, the share of pictures
    with some.
    """
    doubts = [] if (certain >= 0.5).any() or not usual else [Doubt(usual, "nothing found")]
    order = [row for row in np.argsort(-certain, kind="stable") if certain[row] >= LOWEST]
    overlaps, names = pairwise_iou(found.boxes, found.boxes), found.class_names
    for place, row in enumerate(order):
        better = [o for o in order[:place] if names[o] != names[row] and overlaps[o, row] >= HALF]
        value = float(certain[row]) if better else float(min(certain[row], 1 - certain[row]))
        reason = f"{names[better[0]]} or {names[row]}" if better else f"uncertain {names[row]}"
        doubts.append(Doubt(value, reason, tuple(found.boxes[row].tolist())))
    return doubts


def label_doubts(found: Detections, certain: NDArray[np.float64], annotation: Annotation) -> list[Doubt]:
    """Of the labels of a picture, by detections of certainty c from 0.5 on, each by its excess 2 c − 1.

    A detection that overlaps no label by `NEAR`: not labelled. One on a label of another class by `HALF`, and on none
    of its own by `NEAR`: that label is of a wrong class, less where detections agree with it. One that overlaps a label
    of its class by `NEAR` to `WELL`, and no better one does: badly placed, less the more it overlaps. A label that no
    detection of certainty c overlaps by `NEAR`: nothing is seen there, by 1 − 2 c. Difficult labels are no mistakes.
    """
    truth, names, doubts = annotation.easy(), found.class_names, list[Doubt]()
    overlaps = pairwise_iou(found.boxes, truth.boxes)
    same = np.array(names, object)[:, None] == np.array(truth.names, object)
    sure = certain >= 0.5
    hard = pairwise_iou(found.boxes, annotation[annotation.difficult].boxes).max(axis=1, initial=0) >= NEAR

    def best(values: NDArray[np.floating]) -> tuple[float, int]:
        return (float(values.max()), int(values.argmax())) if len(values) else (0.0, -1)

    for row in np.flatnonzero(sure & ~hard):
        excess, box = 2 * float(certain[row]) - 1, tuple(found.boxes[row].tolist())
        own, label = best(np.where(same[row], overlaps[row], 0))
        other, wrong = best(np.where(same[row], 0, overlaps[row]))
        if own >= NEAR:
            if not (sure & same[:, label] & (overlaps[:, label] >= max(own, WELL))).any() and own < WELL:
                doubts.append(Doubt(excess * (WELL - own) / (WELL - NEAR), f"{names[row]} badly placed", box))
        elif other >= HALF:
            agreeing = certain[same[:, wrong] & (overlaps[:, wrong] >= HALF)].max(initial=0)
            reason = f"{truth.names[wrong]} labelled, {names[row]} seen"
            doubts.append(Doubt(excess * (1 - float(agreeing)), reason, box))
        elif other < NEAR:
            doubts.append(Doubt(excess, f"{names[row]} not labelled", box))
    for label, name in enumerate(truth.names):
        seen = float(certain[overlaps[:, label] >= NEAR].max(initial=0))
        if seen < 0.5:
            doubts.append(Doubt(1 - 2 * seen, f"{name} labelled, nothing seen", tuple(truth.boxes[label].tolist())))
    return [doubt for doubt in doubts if doubt.value > 0]
