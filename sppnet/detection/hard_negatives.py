"""Step 6: hard-negative mining, one pass over the images for the SVMs of all classes (sec. 4.1; the release).

Ground-truth windows are the positives, and proposals close to them where the images give these too. Negatives of a
class are the windows whose overlap with all its objects is below 0.3. All negatives of the first image train the first
SVM; later only those that score above −1.0001 enter the cache. A class is fitted again after 2,000 new negatives and
at the end. After each fit the cached negatives that score below −1.2 leave. Features are computed image by image and
kept only in the bounded cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from sppnet.config import SVMSettings
from sppnet.detection.linear_svm import LinearSVMs, fit_linear_svm, svm_objective
from sppnet.detection.negative_cache import NegativeCache
from sppnet.detection.sampling import distinct_negatives, draw_rows
from sppnet.errors import SppnetError
from sppnet.progress import progress_bar

logger = logging.getLogger("sppnet")

NEVER = -1e3  # bias of a class that could not be trained: below any threshold on scores


@dataclass(frozen=True)
class PositiveWindows:
    """The positives of one image, known from overlaps alone: its objects, then proposals that cover one."""

    windows: NDArray[np.floating]  # (P, 4) half-open pixels
    labels: NDArray[np.int64]  # (P,) class
    objects: int  # how many are objects: the first


@dataclass(frozen=True)
class MiningImage:
    """All windows of one image: its objects, and its proposals, one for each distinct window of cells.

    Proposals on the same cells of the same scale have the same features; one of them is kept (release).
    """

    features: Tensor  # (R, D), unscaled, on any device
    overlaps: NDArray[np.floating]  # (R, K) highest IoU with an object of each class, 0 where there is none
    labels: NDArray[np.int64]  # (R,) class of an object, -1 for a proposal
    windows: NDArray[np.floating]  # (R, 4) half-open pixels; used where svm.duplicates is "overlap"


class MiningImages(Protocol):
    """The training images. The same call gives the same values in the same order every time."""

    def __len__(self) -> int: ...

    def positives(self, index: int) -> PositiveWindows:
        """The positives of an image; no features are computed."""
        ...

    def features(self, index: int, windows: NDArray[np.floating]) -> Tensor:
        """Features (R, D), unscaled, of windows (R, 4) of an image."""
        ...

    def read(self, index: int) -> MiningImage: ...


@dataclass(frozen=True)
class MinedSVMs:
    """What mining gives: the SVMs, and what it could not or did not do."""

    svms: LinearSVMs
    untrained: dict[str, str]  # class -> reason; its SVM never fires
    retrains: tuple[int, ...]  # fits of each class
    dropped: int  # negatives that the full cache dropped


def mine_detectors(
    images: MiningImages, classes: Sequence[str], settings: SVMSettings | None = None, scale: float = 1.0
) -> MinedSVMs:
    """SVMs of all classes from one pass (or ``settings.epochs``) over the images, in their order.

    `scale` multiplies all features, here and in the SVMs (see `mean_norm_scale`). A class without positives or
    negatives is reported and never fires.
    Memory: the cache, the positives (at most ``max_positives`` objects of a class, and proposals in as many bytes as
    the cache), one image, and one fit.
    Raises SppnetError for no images, for wrong shapes or labels, and for features that are not finite.
    """
    if len(images) == 0:
        raise SppnetError("expected at least one image to mine, got none; check data.train")
    miner = _Miner(images, tuple(classes), settings or SVMSettings(), scale)
    for position in progress_bar(range(len(images) * miner.settings.epochs), "mining", "image"):
        miner.visit(position % len(images))
    return miner.finish()


class _Miner:
    def __init__(self, images: MiningImages, classes: tuple[str, ...], settings: SVMSettings, scale: float) -> None:
        self.images, self.classes, self.settings, self.scale = images, classes, settings, scale
        self.positives = _collect_positives(images, len(classes), settings, scale)
        width = self.positives[0].shape[1]
        self.active = np.array([len(rows) > 0 for rows in self.positives])
        self.weight = torch.zeros(len(classes), width)
        self.bias = torch.full((len(classes),), NEVER)
        self.retrains = np.zeros(len(classes), np.int64)
        self.fresh = np.zeros(len(classes), np.int64)  # negatives since the last fit
        self.cache = NegativeCache(width, len(classes), settings.cache_gigabytes)
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in zip(classes, self.positives, strict=True))
        logger.info(
            "svm mining %d images; positives %s; cache for %d windows", len(images), counts, self.cache.capacity
        )

    def visit(self, index: int) -> None:
        """Let the hard negatives of one image enter the cache; fit the classes that are due."""
        image = self.images.read(index)
        count = len(image.features)
        _check_shape(f"overlaps of image {index}", image.overlaps, (count, len(self.classes)))
        _check_shape(f"labels of image {index}", image.labels, (count,))
        _check_shape(f"windows of image {index}", image.windows, (count, 4))
        _check_features(f"image {index}", image.features, (count, self.weight.shape[1]))
        scores = self._scores(image.features)
        wanted = self._negatives(image) & (scores > self.settings.mine_above)
        self.fresh += self.cache.add(index, image.features, wanted, scores, self.scale)
        first = (self.retrains == 0) & (self.cache.counts() > 0)
        for label in np.flatnonzero(first | (self.fresh >= self.settings.retrain_after)):
            self._fit(int(label))

    def finish(self) -> MinedSVMs:
        """Fit every class once more, and report what was left out."""
        for label in np.flatnonzero(self.active & (self.cache.counts() > 0)):
            self._fit(int(label))
        untrained = {
            name: "no negatives" if self.active[label] else "no positives"
            for label, name in enumerate(self.classes)
            if self.retrains[label] == 0
        }
        for name, reason in untrained.items():
            logger.warning("svm %s has %s in the training images; it never fires", name, reason)
        if self.cache.dropped:
            logger.warning(
                "the cache of %g GB was full and dropped %d negatives, the lowest scores of the largest classes first; "
                "svm.cache_gigabytes raises it",
                self.settings.cache_gigabytes,
                self.cache.dropped,
            )
        svms = LinearSVMs(self.weight, self.bias, self.scale, self.classes)
        return MinedSVMs(svms, untrained, tuple(self.retrains.tolist()), self.cache.dropped)

    def _scores(self, features: Tensor) -> NDArray[np.float32]:
        """(R, K); infinite for a class that was never fitted, so that all its negatives enter."""
        weight, bias = (self.weight * self.scale).to(features.device), self.bias.to(features.device)
        scores = linear(features.detach().float(), weight, bias).cpu().numpy()
        scores[:, self.retrains == 0] = np.inf
        return scores

    def _negatives(self, image: MiningImage) -> NDArray[np.bool_]:
        """(R, K): which window is a negative of which class."""
        far = image.overlaps < self.settings.negative_overlap
        negatives = far & (image.labels[:, None] != np.arange(len(self.classes))) & self.active
        if self.settings.duplicates == "overlap":
            return distinct_negatives(image.windows, negatives, self.settings.duplicate_overlap)
        return negatives

    def _fit(self, label: int) -> None:
        positives = len(self.positives[label])
        examples = self.cache.features_of(label, first=self.positives[label])
        negatives = len(examples) - positives
        signs = np.repeat([1, -1], [positives, negatives])
        svm = fit_linear_svm(examples, signs, self.settings)
        self.weight[label], self.bias[label] = torch.from_numpy(svm.weight), svm.bias
        scores = (examples @ self.weight[label] + svm.bias).numpy()
        evicted = self.cache.rescore(label, scores[positives:], self.settings.evict_below)
        self.retrains[label] += 1
        self.fresh[label] = 0
        logger.info(
            "svm %s retrain %d: %s | cache %d pos %d neg, evicted %d",
            self.classes[label],
            self.retrains[label],
            svm_objective(svm, scores, signs, self.settings),
            positives,
            negatives - evicted,
            evicted,
        )


def _collect_positives(images: MiningImages, classes: int, settings: SVMSettings, scale: float) -> list[Tensor]:
    """Scaled features of the positives of each class: K tensors (P, D) float32 on the CPU.

    Objects come first, at most ``max_positives`` of a class; then as many proposals, which over all classes take no
    more bytes than the cache of negatives. Where there are more they are drawn evenly, before any feature is computed.
    """
    found = [images.positives(index) for index in progress_bar(range(len(images)), "positives", "image")]
    for index, image in enumerate(found):
        _check_shape(f"positives of image {index}", image.windows, (len(image.labels), 4))
        if not np.isin(image.labels, np.arange(classes)).all():
            raise SppnetError(
                f"positives of image {index}: expected labels in 0 … {classes - 1}, got {image.labels.tolist()}; "
                "leave out objects of other classes"
            )
    labels = np.concatenate([image.labels for image in found])
    is_object = np.concatenate([np.arange(len(image.labels)) < image.objects for image in found])
    width = images.features(0, np.zeros((0, 4), np.float32)).shape[1]
    room = max(1, int(settings.cache_gigabytes * 1e9 // (4 * width * classes)))
    rng = np.random.default_rng(settings.seed)
    places = np.full(len(labels), -1)  # row of each positive that is kept among those of its class
    kept = []
    for label in range(classes):
        objects = draw_rows(np.flatnonzero((labels == label) & is_object), settings.max_positives, rng)
        close = draw_rows(np.flatnonzero((labels == label) & ~is_object), min(settings.max_positives, room), rng)
        rows = np.concatenate([objects, close])
        places[rows] = np.arange(len(rows))
        kept.append(torch.empty(len(rows), width))
    parts = np.split(places, np.cumsum([len(image.labels) for image in found])[:-1])
    for index, own in enumerate(progress_bar(parts, "features of positives", "image")):
        chosen = np.flatnonzero(own >= 0)
        if len(chosen):
            features = images.features(index, found[index].windows[chosen])
            _check_features(f"positives of image {index}", features, (len(chosen), width))
            features = features.detach().float().mul(scale).cpu()
            for row, place, label in zip(features, own[chosen], found[index].labels[chosen], strict=True):
                kept[label][place] = row
    return kept


def _check_features(what: str, features: Tensor, shape: tuple[int, ...]) -> None:
    _check_shape(f"features of {what}", features, shape)
    if not bool(torch.isfinite(features).all()):
        raise SppnetError(f"{what}: features must be finite; check the image and the network's weights")


def _check_shape(what: str, values: Tensor | NDArray[Any], shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape:
        raise SppnetError(
            f"{what}: expected shape {shape}, got {tuple(values.shape)}; one row for each window, one overlap a class"
        )
