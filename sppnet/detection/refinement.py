"""Boxes that vote for better ones (ours; box voting of Gidaris and Komodakis 2015, ICCV)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sppnet.checks import check_overlap
from sppnet.detection.nms import soften, suppress_detections
from sppnet.errors import SppnetError
from sppnet.records import Detections, pairwise_iou

LOOSE = 0.6  # NMS overlap of those that vote: nearly the same proposals have one vote
LOWEST = -1.0  # the margin: what scores less is background to the SVM and has no vote
UNLIKELY, CLOSE = 0.05, 0.65  # of a joint head: the same of probabilities, and the IoU from which boxes vote
CROWDED = 0.6  # IoU up to which boxes of a class may be two objects to a joint head, before they are softened
IMPROBABLE = 0.01  # a probability up to which nothing is evaluated: nearly all windows have one for every class


def vote(found: Detections, candidates: Detections, overlap: float = 0.5, probabilities: bool = False) -> Detections:
    """Each box found becomes the mean of the candidates of its class whose IoU with it is at least `overlap`.

    A box has a vote of its own where it is among the candidates; one without any vote stays as it is. Scores of SVMs
    may be negative, so a candidate weighs exp(2 · score), the odds that boosting reads from a margin (Friedman et al.
    2000): only differences of scores count. With `probabilities` it weighs its score. SppnetError for candidates of
    other classes.
    """
    if found.classes != candidates.classes:
        raise SppnetError(f"candidates: expected the classes {found.classes}, got {candidates.classes}")
    boxes, others = found.boxes.astype(np.float64), candidates.boxes.astype(np.float64)
    overlap = check_overlap(overlap, "overlap")
    for label in np.unique(found.labels):
        mine, theirs = np.flatnonzero(found.labels == label), np.flatnonzero(candidates.labels == label)
        near = pairwise_iou(boxes[mine], others[theirs]) >= overlap
        mine, near = mine[near.any(axis=1)], near[near.any(axis=1)]
        scores = candidates.scores[theirs].astype(np.float64)
        exponents = np.where(near, np.log(np.maximum(scores, 1e-9)) if probabilities else 2 * scores, -np.inf)
        weights = np.exp(exponents - exponents.max(axis=1, initial=-np.inf, keepdims=True))  # the best weighs 1
        boxes[mine] = (weights / weights.sum(axis=1, keepdims=True)) @ others[theirs]
    return replace(found, boxes=boxes.astype(np.float32))


def settle(
    every: Detections, shown: NDArray[np.bool_], overlap: float, limit: int | None = None, votes: bool = True
) -> tuple[Detections, tuple[str, ...]]:
    """What joint heads found, of all regressed windows; also the classes of which `limit` left some out (ours).

    A joint head gives the box of every window with its score, so what is suppressed is where objects are, not where
    windows were: those `shown` (R,) that are nearly the same as a better one go, the others become means of all
    around them, and then neighbours whose IoU is above `overlap` lose score.
    """
    found, cut = suppress_detections(every[shown], max(overlap, CROWDED), limit)
    found = vote(found, every.above(UNLIKELY), CLOSE, probabilities=True) if votes else found
    return soften(found, overlap), cut
