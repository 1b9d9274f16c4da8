"""Boxes that vote for better ones (ours; box voting of Gidaris and Komodakis 2015, ICCV)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.checks import as_column, check_boxes, check_overlap, check_scores
from sppnet.errors import SppnetError
from sppnet.records import pairwise_iou

LOOSE = 0.6  # NMS overlap of those that vote: nearly the same proposals have one vote
LOWEST = -1.0  # the margin: what scores less is background to the SVM and has no vote


def vote(
    boxes: ArrayLike,
    labels: ArrayLike,
    candidates: ArrayLike,
    candidate_labels: ArrayLike,
    candidate_scores: ArrayLike,
    overlap: float = 0.5,
) -> NDArray[Any]:
    """Boxes (R, 4), each the mean of the candidates (S, 4) of its label with an IoU of at least `overlap`: (R, 4).

    A box has a vote of its own where it is among the candidates; one without any vote stays as it is. Scores (S,) of
    SVMs may be negative, so a candidate weighs exp(2 · score), the odds that boosting reads from a margin (Friedman et
    al. 2000): only differences of scores count. SppnetError for what is no box or score, and lengths that differ.
    """
    moved, others = check_boxes(boxes, "boxes"), check_boxes(candidates, "candidates")
    own, of = as_column(labels, "labels", "iu"), as_column(candidate_labels, "candidate_labels", "iu")
    scores = check_scores(candidate_scores, "candidate_scores").astype(np.float64)
    if len(own) != len(moved) or not len(of) == len(scores) == len(others):
        counts = (
            f"{len(moved)} boxes, {len(own)} labels; {len(others)} candidates, {len(of)} labels, {len(scores)} scores"
        )
        raise SppnetError(f"expected a label for each box, a label and a score for each candidate, got {counts}")
    for label in np.unique(own):
        mine, theirs = np.flatnonzero(own == label), np.flatnonzero(of == label)
        near = pairwise_iou(moved[mine], others[theirs]) >= check_overlap(overlap, "overlap")
        mine, near = mine[near.any(axis=1)], near[near.any(axis=1)]
        exponents = np.where(near, 2 * scores[theirs], -np.inf)
        weights = np.exp(exponents - exponents.max(axis=1, initial=-np.inf, keepdims=True))  # the best weighs 1
        moved[mine] = (weights / weights.sum(axis=1, keepdims=True)) @ others[theirs]
    return moved
