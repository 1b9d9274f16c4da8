"""Room 5: which windows are foreground, which are background, by their overlap with the objects (sec. 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sppnet.boxes import as_boxes, pairwise_iou
from sppnet.config import FinetuneSettings
from sppnet.records import Annotation

T = TypeVar("T")


def spread(things: Sequence[T], count: int) -> list[T]:
    """At most `count` of the things, at even distances."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


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
    rows = [_draw_positive(images, i, settings.balance, rng) for i in _spread(has_positives, wanted, rng)]
    others = settings.batch - wanted
    rows += [(i, rng.choice(images[i].negatives), background) for i in _spread(has_negatives, others, rng)]
    image, row, label = np.array(rows, np.int64).reshape(-1, 3).T
    return Batch(image, row, label)


def _draw_positive(
    images: Sequence[LabelledWindows], index: int, balance: bool, rng: np.random.Generator
) -> tuple[int, int, int]:
    labels = images[index].labels
    candidates = np.flatnonzero(labels == rng.choice(np.unique(labels))) if balance else np.arange(len(labels))
    chosen = candidates[rng.integers(len(candidates))]
    return index, int(images[index].positives[chosen]), int(labels[chosen])


def _spread(choices: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """`count` of the choices, each as often as any other, give or take one."""
    if not choices:
        return []
    rounds = [rng.permutation(choices) for _ in range(-(-count // len(choices)))]
    return [int(choice) for choice in np.concatenate(rounds)[:count]] if rounds else []
