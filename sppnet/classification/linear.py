"""Linear SVMs on full-image features: VOC07's and Caltech-101's protocols (sec. 3.2, 3.3).

The only importer of sklearn. One SVM per class, squared hinge loss, an l2 penalty on weights and bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppnet.errors import SppnetError, counted
from sppnet.evaluation.classification import multi_label_ap

COST = 1.0  # the paper names none; that of scikit-learn, not tuned
TRAIN_IMAGES, TEST_IMAGES, SPLITS = 30, 50, 10  # sec. 3.3

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class LinearResult:
    """How good the SVMs are: AP of each class (VOC07), or its accuracy, the mean over the splits (Caltech-101)."""

    protocol: str
    classes: Mapping[str, float | None]  # None: no image to find
    mean: float
    deviation: float | None  # of the mean, from split to split (n - 1)
    images: int

    def to_dict(self) -> dict[str, Any]:
        return vars(self)

    def table(self) -> str:
        width = max(len("class"), *map(len, self.classes))
        name = "AP" if self.deviation is None else "accuracy"
        rows = {name: "-" if value is None else f"{value:.4f}" for name, value in self.classes.items()}
        rows["mean"] = f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")
        lines = [f"{'class':{width}}  {name}", *(f"{name:{width}}  {value}" for name, value in rows.items())]
        return "\n".join([*lines, f"{self.protocol}, {counted(self.images, 'image')}"])


def voc07(
    features: Floats, shown: NDArray[np.integer], train: int, classes: Sequence[str], cost: float = COST
) -> LinearResult:
    """VOC07's classification task: the first `train` of the images (N, D) train, the others are ranked for each class.

    shown (N, C): 1 where an image shows the class, -1 where not, 0 where it does with difficult objects alone; such an
    image is left out of the class, in training and test. AP at 11 points. SppnetError for a class without both kinds.
    """
    whole = compact(features)
    scores = decision_values(whole[:train], shown[:train], whole[train:], classes, cost)
    found = dict(zip(classes, multi_label_ap(scores, shown[train:]), strict=True))
    known = [value for value in found.values() if value is not None]
    if not known:
        raise SppnetError(f"expected test images of {', '.join(classes)}, got none; name other splits with --test")
    return LinearResult("VOC07, 11-point AP", found, float(np.mean(known)), None, len(features))


def caltech101(
    features: Floats,
    labels: NDArray[np.integer],
    classes: Sequence[str],
    train_images: int = TRAIN_IMAGES,
    splits: int = SPLITS,
    cost: float = COST,
) -> LinearResult:
    """Caltech-101's protocol: features (N, D), labels (N,) places in `classes`; `train_images` of each class train.

    Up to 50 of the others of each class are tested, in `splits` (at least 2) random splits, always the same; an image
    is of the class whose SVM gives most. Accuracy is that of each class, then their mean. SppnetError for a class with
    no image left to test.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() <= train_images:
        rare = f"class {classes[int(counts.argmin())]}: expected more than {train_images} images, got {counts.min()}"
        raise SppnetError(f"{rare}; add images, or set fewer --train-images")
    whole, accuracies = compact(features), list[list[float]]()
    targets = np.where(labels[:, None] == np.arange(len(classes)), 1, -1)
    for seed in range(splits):
        train, test = draw_split(labels, train_images, TEST_IMAGES, seed)
        chosen = decision_values(whole[train], targets[train], whole[test], classes, cost).argmax(axis=1)
        right = chosen == labels[test]
        accuracies.append([float(right[labels[test] == label].mean()) for label in range(len(classes))])
    table = np.array(accuracies)
    found, means = dict(zip(classes, table.mean(axis=0).tolist(), strict=True)), table.mean(axis=1)
    name = f"Caltech-101's protocol, {train_images} images a class train, {splits} splits"
    return LinearResult(name, found, float(means.mean()), float(means.std(ddof=1)), len(features))


def draw_split(
    labels: NDArray[np.integer], train: int, test: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places (N,) to train on and to test: `train` images of every class and up to `test` of its others, by chance."""
    rng = np.random.default_rng(seed)
    mixed = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    both = [own[:train] for own in mixed], [own[train : train + test] for own in mixed]
    return np.concatenate(both[0]), np.concatenate(both[1])


def compact(features: Floats) -> Floats:
    """(N, D) -> (N, at most N) with the same inner products, all that linear SVMs depend on, where D exceeds N."""
    if features.shape[1] <= len(features):
        return features.astype(np.float64)
    exact = features.astype(np.float64)
    values, vectors = np.linalg.eigh(exact @ exact.T)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def decision_values(
    train: Floats, targets: NDArray[np.integer], test: Floats, classes: Sequence[str], cost: float = COST
) -> Floats:
    """Train one SVM per class on (N, D), targets (N, C) of 1, -1 or 0 (left out); its values on (M, D): (M, C)."""
    from sklearn.svm import LinearSVC  # takes a second

    scores = np.empty((len(test), len(classes)))
    for place, name in enumerate(classes):
        used = targets[:, place] != 0
        if len(np.unique(targets[used, place])) < 2:
            expected = f"class {name}: expected training images with it and without, got one kind alone"
            raise SppnetError(f"{expected} (difficult objects do not count); add images, or leave the class out")
        svm = LinearSVC(C=cost, dual=False).fit(train[used], targets[used, place])
        scores[:, place] = svm.decision_function(test)
    return scores
