"""How good the classes of whole images are."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from sppnet.errors import SppnetError
from sppnet.evaluation.results import CurveMetric
from sppnet.evaluation.voc import average_precision


def top_k_error(scores: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Share of images whose class is not among the k that score highest: scores (N, K), labels (N,).

    Of equal scores that of the true class comes last, so a constant score is wrong; so is one that is NaN. 0 for k ≥ K.
    SppnetError for other shapes, for no images, and for labels that are no place in K.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 2 or truth.shape != values.shape[:1] or not values.size or truth.dtype.kind not in "iu" or k < 1:
        shapes = f"{values.shape}, {truth.shape} and {k}"
        raise SppnetError(f"scores, labels and k must be (N, K), whole numbers (N,) and at least 1, got {shapes}")
    if truth.min() < 0 or truth.max() >= values.shape[1]:
        raise SppnetError(f"labels must lie in 0 to {values.shape[1] - 1}, got {truth.min()} to {truth.max()}")
    own = np.take_along_axis(values, truth[:, None].astype(np.int64), axis=1)
    before = np.count_nonzero(~(values < own), axis=1) - 1  # not itself
    return float(np.mean(before >= k))


def multi_label_ap(scores: ArrayLike, presence: ArrayLike, metric: CurveMetric = "11point") -> list[float | None]:
    """AP of each class over images: scores and presence (N, C), VOC's classification task.

    presence: 1 where an image shows the class, -1 where not, 0 where it is ignored (it shows difficult objects alone).
    Equal scores keep the order of the images. None for a class that no image shows.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(presence)
    if values.ndim != 2 or values.shape != truth.shape or not np.isfinite(values).all():
        shapes = f"{values.shape} and {truth.shape}"
        raise SppnetError(f"scores and presence must both be (N, C), scores finite, got {shapes}; give one of each")
    found = list[float | None]()
    for own, shown in zip(values.T, truth.T, strict=True):
        right = shown[np.argsort(-own, kind="stable")]
        right = right[right != 0] > 0
        true = np.cumsum(right, dtype=np.float64)
        curve = true / max(right.sum(), 1), true / np.arange(1, len(true) + 1)
        found.append(average_precision(*curve, metric) if right.any() else None)
    return found
