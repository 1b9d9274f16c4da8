"""Room 6: hard-negative mining, one pass over the images for the detectors of all classes (sec. 4.1; the release).

Ground-truth windows are the positives, and proposals close to them where the images give these too. Negatives of a
class are the windows whose overlap with all its objects is below 0.3. All negatives of the first image train the first
detector; later only those that score above −1.0001 enter the cache. A class is fitted again after 2,000 new negatives
and at the end, and after each fit those cached that score below −1.2 leave. Features are read image by image and never
stored beyond the bounded cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from sppnet.boxes import as_boxes, pairwise_iou
from sppnet.config import SVMSettings
from sppnet.detection.linear_svm import LinearDetectors, fit_linear_svm, objective_of_scores
from sppnet.detection.negative_cache import CachedKeys, NegativeCache
from sppnet.detection.reservoir import Reservoir
from sppnet.progress import progress_bar

logger = logging.getLogger("sppnet")

NEVER = -1e3  # bias of a class that could not be trained: below any threshold on scores


@dataclass(frozen=True)
class MiningImage:
    """The windows of one image: its proposals, one for each distinct window of cells, and its ground-truth windows.

    Windows that fall on the same cells of the same scale have the same features; whoever reads the image keeps one
    of them (release). Ground-truth windows are each kept, as a row with its label.
    """

    features: Tensor  # (R, D), unscaled, on any device
    overlaps: NDArray[np.floating]  # (R, K) highest IoU with an object of each class, 0 where there is none
    labels: NDArray[np.int64]  # (R,) class of a ground-truth window, -1 for a proposal
    windows: NDArray[np.floating]  # (R, 4) half-open pixels; used where svm.duplicates is "overlap"


class MiningImages(Protocol):
    """The training images. Reading the same image again gives the same values in the same order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> MiningImage: ...

    def read_positives(self, index: int) -> tuple[Tensor, NDArray[np.int64], int]:
        """Only the positives: features (P, D), unscaled, labels (P,), how many are ground truth: the first."""
        ...


@dataclass(frozen=True)
class MiningState:
    """All that mining needs to go on, without features: those are read again. `to_arrays` suits an .npz file."""

    classes: tuple[str, ...]
    images: int  # how many there are
    scale: float
    position: int  # images visited so far, over all epochs
    weight: NDArray[np.float32]  # (K, D)
    bias: NDArray[np.float32]  # (K,)
    retrains: NDArray[np.int64]  # (K,)
    fresh: NDArray[np.int64]  # (K,) negatives since the last fit
    displaced: int
    keys: CachedKeys

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        own = {name: np.asarray(value) for name, value in vars(self).items() if name != "keys"}
        return own | {f"cached_{name}": value for name, value in vars(self.keys).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> MiningState:
        try:
            return cls(
                classes=tuple(arrays["classes"].tolist()),
                images=int(arrays["images"]),
                scale=float(arrays["scale"]),
                position=int(arrays["position"]),
                displaced=int(arrays["displaced"]),
                keys=CachedKeys(*(arrays[f"cached_{name}"] for name in CachedKeys.__dataclass_fields__)),
                **{name: arrays[name] for name in ("weight", "bias", "retrains", "fresh")},
            )
        except KeyError as error:
            raise ValueError(f"a mining checkpoint needs the array {error} too; mine from the start") from None


@dataclass(frozen=True)
class MinedDetectors:
    """What mining gives: the detectors, and what it could not or did not do."""

    detectors: LinearDetectors
    untrained: dict[str, str]  # class -> reason; its detector never fires
    retrains: tuple[int, ...]  # fits of each class
    displaced: int  # negatives that left because the cache was full


def mine_detectors(
    images: MiningImages,
    classes: Sequence[str],
    settings: SVMSettings | None = None,
    scale: float = 1.0,
    state: MiningState | None = None,
    save: Callable[[MiningState], object] | None = None,
    save_every: int = 500,
) -> MinedDetectors:
    """Detectors of all classes from one pass (or ``settings.epochs``) over the images, in their order.

    `scale` multiplies all features, here and in the detectors (see `mean_norm_scale`). `save` receives a state after
    every `save_every` images; passed back as `state`, with the same images and settings, mining goes on from there
    and ends with the same detectors. A class without positives or negatives is reported and never fires.
    Memory: the cache, the positives (at most ``max_positives`` objects of a class, and proposals in as many bytes as
    the cache), one image, and one fit.
    Raises ValueError for no images, for values of wrong shapes, and for a state of other images or classes.
    """
    if len(images) == 0:
        raise ValueError("expected at least one image to mine, got none; check data.train")
    miner = _Miner(images, tuple(classes), settings or SVMSettings(), scale)
    first = miner.resume(state) if state is not None else 0
    total = len(images) * miner.settings.epochs
    for position in progress_bar(range(first, total), "mining", "image", total, first):
        miner.visit(position % len(images))
        if save is not None and (position + 1) % save_every == 0:
            save(miner.state(position + 1))
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
        self.fresh = np.zeros(len(classes), np.int64)
        self.cache = NegativeCache(width, len(classes), settings.cache_gigabytes)
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in zip(classes, self.positives, strict=True))
        logger.info(
            "svm mining %d images; positives %s; cache for %d windows", len(images), counts, self.cache.capacity
        )

    def visit(self, index: int) -> None:
        """Let the hard negatives of one image enter the cache; fit what is due."""
        image = self._read(index)
        scores = self._scores(image.features)
        wanted = self._negatives(image) & (scores > self.settings.mine_above)
        self.fresh += self.cache.add(index, image.features, wanted, scores, self.scale)
        first = (self.retrains == 0) & (self.cache.counts() > 0)
        for label in np.flatnonzero(first | (self.fresh >= self.settings.retrain_after)):
            self._fit(int(label))

    def finish(self) -> MinedDetectors:
        trainable = self.active & (self.cache.counts() > 0)
        for label in np.flatnonzero(trainable):
            self._fit(int(label))
        untrained = {
            name: "no negatives" if self.active[label] else "no positives"
            for label, name in enumerate(self.classes)
            if self.retrains[label] == 0
        }
        for name, reason in untrained.items():
            logger.warning("svm %s has %s in the training images; its detector never fires", name, reason)
        if self.cache.displaced:
            logger.warning(
                "the cache of %g GB was full: %d negatives left it, the lowest scores of the largest classes first; "
                "svm.cache_gigabytes raises it",
                self.settings.cache_gigabytes,
                self.cache.displaced,
            )
        detectors = LinearDetectors(self.weight, self.bias, self.scale, self.classes)
        return MinedDetectors(detectors, untrained, tuple(self.retrains.tolist()), self.cache.displaced)

    def state(self, position: int) -> MiningState:
        return MiningState(
            classes=self.classes,
            images=len(self.images),
            scale=self.scale,
            position=position,
            weight=self.weight.numpy().copy(),
            bias=self.bias.numpy().copy(),
            retrains=self.retrains.copy(),
            fresh=self.fresh.copy(),
            displaced=self.cache.displaced,
            keys=self.cache.keys(),
        )

    def resume(self, state: MiningState) -> int:
        """Take over a state and read the cached features again; returns the position to go on from."""
        theirs = (state.classes, state.images, state.scale, state.weight.shape)
        ours = (self.classes, len(self.images), self.scale, tuple(self.weight.shape))
        if theirs != ours:
            raise ValueError(
                f"the checkpoint is of classes, images, scale and weights {theirs}, expected {ours}; "
                "mine from the start"
            )
        self.weight, self.bias = torch.from_numpy(state.weight.copy()), torch.from_numpy(state.bias.copy())
        self.retrains, self.fresh = state.retrains.copy(), state.fresh.copy()
        self.cache.restore(state.keys)
        self.cache.displaced = state.displaced
        for index in np.unique(state.keys.images):
            self.cache.restore_features(int(index), self._read(int(index)).features, self.scale)
        return state.position

    def _read(self, index: int) -> MiningImage:
        image = self.images.read(index)
        _check_image(image, index, len(self.classes), self.weight.shape[1])
        return image

    def _scores(self, features: Tensor) -> NDArray[np.float32]:
        """(R, K); infinite for a class without a detector, so that all its negatives enter."""
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
        self.cache.rescore(label, scores[positives:])
        evicted = self.cache.evict(label, self.settings.evict_below)
        self.retrains[label] += 1
        self.fresh[label] = 0
        logger.info(
            "svm %s retrain %d: %s | cache %d pos %d neg, evicted %d",
            self.classes[label],
            self.retrains[label],
            objective_of_scores(svm, scores, signs, self.settings),
            positives,
            negatives - evicted,
            evicted,
        )


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


def _collect_positives(images: MiningImages, classes: int, settings: SVMSettings, scale: float) -> list[Tensor]:
    """Scaled features of the positives of each class: K tensors (P, D) float32 on the CPU.

    Proposals among them take, over all classes, no more bytes than the cache of negatives; ground truth is apart.
    """
    objects = [Reservoir(settings.max_positives, settings.seed) for _ in range(classes)]
    proposals: list[Reservoir] = []
    width = 0
    for index in progress_bar(range(len(images)), "positives", "image"):
        features, labels, count = images.read_positives(index)
        _check_positives(features, labels, count, index, classes)
        if not proposals:
            width = features.shape[1]
            limit = max(1, int(settings.cache_gigabytes * 1e9 // (4 * width * classes)))
            proposals = [Reservoir(min(settings.max_positives, limit), settings.seed) for _ in range(classes)]
        for samples, rows in ((objects, np.arange(count)), (proposals, np.arange(count, len(labels)))):
            for label in np.unique(labels[rows]):
                own = torch.from_numpy(rows[labels[rows] == label]).to(features.device)
                samples[label].add(features.detach()[own].float() * scale)
    nothing = torch.empty(0, width)
    kept = [[sample.rows() for sample in pair if len(sample)] for pair in zip(objects, proposals, strict=True)]
    return [torch.cat([nothing, *parts]) if len(parts) != 1 else parts[0] for parts in kept]


def _check_positives(features: Tensor, labels: NDArray[np.int64], count: int, index: int, classes: int) -> None:
    labels = np.asarray(labels)
    fit = features.ndim == 2 and labels.shape == (len(features),) and 0 <= count <= len(labels)
    if not fit or not np.isin(labels, np.arange(classes)).all():
        raise ValueError(
            f"positives of image {index}: expected features (P, D), labels (P,) in 0 … {classes - 1} and how many are "
            f"objects, got {tuple(features.shape)}, {labels.tolist()} and {count}; leave out objects of other classes"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"positives of image {index}: features must be finite; check the image and the weights")


def _check_image(image: MiningImage, index: int, classes: int, width: int) -> None:
    count = len(image.features)
    expected = ((count, width), (count, classes), (count,), (count, 4))
    got = tuple(tuple(value.shape) for value in (image.features, image.overlaps, image.labels, image.windows))
    if got != expected:
        raise ValueError(
            f"image {index}: expected features, overlaps, labels and windows of shapes {expected}, got {got}; "
            "one row for each window and one overlap for each class"
        )
    if not bool(torch.isfinite(image.features).all()):
        raise ValueError(f"image {index}: features must be finite; check the image and the network's weights")
