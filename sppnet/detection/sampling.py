"""Step 5: which windows are foreground, which are background, by their overlap with the objects (sec. 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sppnet.boxes import as_boxes, pairwise_iou
from sppnet.config import FinetuneSettings
from sppnet.records import Annotation


def draw_rows(rows: NDArray[np.int64], limit: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The rows (N,), or `limit` of them where there are more: each as likely, in their order."""
    return rows if len(rows) <= limit else rows[np.sort(rng.choice(len(rows), limit, replace=False))]


@dataclass(frozen=True)
class LabelledWindows:
    """The windows of one image that fine-tuning may draw: rows, and the class index of each positive."""

    positives: NDArray[np.int64]
    labels: NDArray[np.int64]
    negatives: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Windows drawn from several images: position of the image in the batch, row in it, class (K = background)."""

    image: NDArray[np.int64]
    row: NDArray[np.int64]
    label: NDArray[np.int64]


def class_overlaps(
    windows: NDArray[np.floating], annotation: Annotation, classes: Sequence[str]
) -> NDArray[np.float32]:
    """Largest IoU of each window with the objects of each class: (R, 4) -> (R, K); 0 where there is none."""
    overlaps = np.zeros((len(windows), len(classes)), np.float32)
    iou = pairwise_iou(as_boxes(windows), as_boxes(annotation.boxes))
    for index, name in enumerate(classes):
        own = np.array([other == name for other in annotation.names], dtype=bool)
        if own.any():
            overlaps[:, index] = iou[:, own].max(axis=1)
    return overlaps


def label_windows(overlaps: NDArray[np.floating], settings: FinetuneSettings) -> LabelledWindows:
    """Positives have IoU >= 0.5 with an object, of the class they overlap most; negatives lie in [0.1, 0.5)."""
    best = overlaps.max(axis=1, initial=0.0)
    positives = np.flatnonzero(best >= settings.positive_overlap)
    low, high = settings.negative_overlap
    negatives = np.flatnonzero((best >= low) & (best < min(high, settings.positive_overlap)))
    return LabelledWindows(positives, overlaps[positives].argmax(axis=1).astype(np.int64), negatives)


def distinct_negatives(
    windows: NDArray[np.floating], negatives: NDArray[np.bool_], overlap: float
) -> NDArray[np.bool_]:
    """Per class, the negatives without those that overlap an earlier one that stays by more than `overlap` (sec. 4.1).

    windows (R, 4), negatives (R, K) -> (R, K). Earlier means by row.
    """
    kept, corners = negatives.copy(), as_boxes(windows, "windows")
    earlier, later = np.nonzero(np.triu(pairwise_iou(corners, corners) > overlap, k=1))
    rows, starts = np.unique(earlier, return_index=True)
    for row, close in zip(rows, np.split(later, starts[1:]), strict=False):
        kept[close] &= ~kept[row]
    return kept


def draw_batch(
    images: Sequence[LabelledWindows], background: int, settings: FinetuneSettings, rng: np.random.Generator
) -> Batch:
    """`settings.batch` windows from these images, `positive_share` of them positive, with replacement.

    Every image gives the same number where it can, so that one crowded image does not fill the batch. With
    `settings.balance` every class of an image is as likely: of a small object few windows are positives. Where the
    images hold no positives (or no negatives) at all the batch is made of the others; it is empty if there are neither.
    """
    wanted = round(settings.batch * settings.positive_share)
    has_positives = [i for i, image in enumerate(images) if len(image.positives)]
    has_negatives = [i for i, image in enumerate(images) if len(image.negatives)]
    if not has_positives:
        wanted = 0
    elif not has_negatives:
        wanted = settings.batch
    rows = [_draw_positive(images, i, settings.balance, rng) for i in _draw_evenly(has_positives, wanted, rng)]
    others = settings.batch - wanted
    rows += [(i, rng.choice(images[i].negatives), background) for i in _draw_evenly(has_negatives, others, rng)]
    image, row, label = np.array(rows, np.int64).reshape(-1, 3).T
    return Batch(image, row, label)


def _draw_positive(
    images: Sequence[LabelledWindows], index: int, balance: bool, rng: np.random.Generator
) -> tuple[int, int, int]:
    labels = images[index].labels
    candidates = np.flatnonzero(labels == rng.choice(np.unique(labels))) if balance else np.arange(len(labels))
    chosen = candidates[rng.integers(len(candidates))]
    return index, int(images[index].positives[chosen]), int(labels[chosen])


def _draw_evenly(choices: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """`count` of the choices, each as often as any other, give or take one."""
    if not choices:
        return []
    rounds = [rng.permutation(choices) for _ in range(-(-count // len(choices)))]
    return [int(choice) for choice in np.concatenate(rounds)[:count]] if rounds else []
