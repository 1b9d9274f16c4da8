"""Hard-negative mining, one pass over the images for the SVMs of all classes (sec. 4.1; the release).

Objects are the positives, and proposals close to them where the settings say so. Negatives of a class are the windows
whose overlap with all its objects is below 0.3. All negatives of the first image train the first SVM; later only those
that score above −1.0001 enter the cache. A class is fitted again after 2,000 new negatives and at the end. After each
fit the cached negatives that score below −1.2 leave. Features are computed image by image.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sppnet.checks import as_numbers, as_rows, as_scale, check_finite
from sppnet.config import SVMSettings, checked_settings
from sppnet.detection.linear_svm import LinearSVMs, fit_linear_svm, svm_objective, typical_norm_scale
from sppnet.detection.torch_state import undisturbed
from sppnet.detection.training_windows import ImageWindows, MiningWindows, PositiveWindows, draw_rows
from sppnet.errors import SppnetError
from sppnet.jobs import progress_bar
from sppnet.records import pairwise_iou

logger = logging.getLogger("sppnet")

NEVER = -1e3  # bias of a class that could not be trained: below any threshold on scores


@dataclass(frozen=True, eq=False)
class MinedSVMs:
    svms: LinearSVMs
    untrained: dict[str, str]  # class -> reason; its SVM never fires
    retrains: tuple[int, ...]  # fits of each class
    dropped: int  # negatives that the full cache dropped


@undisturbed()
def mine_detectors(
    images: Sequence[tuple[ArrayLike, ArrayLike]] | MiningWindows,
    classes: Sequence[str],
    settings: SVMSettings | None = None,
    scale: float | None = None,
    progress: bool = True,
) -> MinedSVMs:
    """SVMs of all classes from one pass over the images, in their order.

    `images` is a list with a pair for each image: the features (R, D) of its windows, its objects among them, and
    overlaps (R, K), the largest IoU of each window with the objects of each class (`class_overlaps` computes them).
    Windows of overlap 1, or at least ``positive_overlap``, are positives of the class, those below ``negative_overlap``
    its negatives. Instead it may be anything with the methods of `MiningWindows`, read from disk image by image;
    reading an image again gives the same values.
    `scale` multiplies all features, here and in the SVMs. None measures it on the pairs as `fit_linear_svm` does, and
    is 1 for images read from disk (see `mean_norm_scale`). A class without positives or negatives is reported and never
    fires.
    Memory: the cache, the positives (at most ``max_positives`` objects of a class, and proposals in as many bytes as
    the cache), one image, and one fit.
    Raises SppnetError for no images, features that are not finite, and pairs that do not fit each other or the classes.
    """
    settings = checked_settings(SVMSettings, settings)
    names = tuple(classes) if isinstance(classes, Iterable) and not isinstance(classes, str) else ()
    if not names or len(set(names)) < len(names) or not all(isinstance(n, str) and "\n" not in n for n in names):
        raise SppnetError(f"classes must be a list of distinct names of one line, at least one, got {classes!r}")
    source: Any = images if hasattr(images, "read") else _Pairs(images, len(names), settings)
    if len(source) == 0:
        raise SppnetError("expected at least one image to mine, got none; check data.train")
    if scale is None:
        scale = source.scale(settings.feature_norm) if isinstance(source, _Pairs) else 1.0
    scale = as_scale(scale)
    positives = _collect_positives(source, len(names), settings, scale, progress)
    miner = _Miner(source, names, settings, scale, positives)
    mined = getattr(source, "mined", len(source))
    for index in progress_bar(range(mined), "mining", "image", shown=progress):
        miner.visit(index)
    for label in np.flatnonzero(miner.active & (miner.cache.counts() > 0)):
        miner.fit(int(label))
    untrained = {
        name: "no negatives" if miner.active[label] else "no positives"
        for label, name in enumerate(names)
        if miner.retrains[label] == 0
    }
    for name, reason in untrained.items():
        logger.warning("svm %s has %s in the training images; it never fires", name, reason)
    if miner.cache.dropped:
        logger.warning(
            f"the cache of {miner.settings.cache_gigabytes:g} GB was full and dropped {miner.cache.dropped} negatives, "
            "the lowest scores of the largest classes first; svm.cache_gigabytes raises it"
        )
    return MinedSVMs(miner.svms, untrained, tuple(miner.retrains.tolist()), miner.cache.dropped)


def distinct_negatives(
    windows: NDArray[np.floating], negatives: NDArray[np.bool_], overlap: float
) -> NDArray[np.bool_]:
    """Per class, the negatives without those that overlap an earlier row that stays by more than `overlap` (sec. 4.1).

    windows (R, 4), negatives (R, K) -> (R, K).
    """
    kept, corners = negatives.copy(), windows.astype(np.float64)
    earlier, later = np.nonzero(np.triu(pairwise_iou(corners, corners) > overlap, k=1))
    rows, starts = np.unique(earlier, return_index=True)
    for row, close in zip(rows, np.split(later, starts[1:]), strict=False):
        kept[close] &= ~kept[row]
    return kept


class _Pairs:
    """Pairs of features and overlaps, read as `MiningWindows` are; instead of corners a window has its row, (R, 1)."""

    def __init__(self, images: Sequence[tuple[ArrayLike, ArrayLike]], classes: int, settings: SVMSettings) -> None:
        if not isinstance(images, Sequence):
            raise SppnetError(f"images must be a list of pairs (features, overlaps), got {type(images).__name__}")
        if settings.duplicates == "overlap":
            raise SppnetError("svm.duplicates=overlap needs the windows themselves; leave it at cells for pairs")
        self._pairs = [_checked_pair(f"image {index}", pair, classes) for index, pair in enumerate(images)]
        widths = sorted({features.shape[1] for features, _ in self._pairs})
        if len(widths) > 1:
            raise SppnetError(f"features of all images must have one width, got {widths}; take them from one layer")
        self._threshold = settings.positive_overlap
        if self._pairs and not any((overlaps >= self._threshold).any() for _, overlaps in self._pairs):
            least = f"no window has an overlap of {self._threshold:g} with any class, so there are no positives"
            raise SppnetError(f"{least}; put the objects among the windows, or lower svm.positive_overlap")

    def scale(self, target: float) -> float:
        return typical_norm_scale(torch.cat([features.norm(dim=1) for features, _ in self._pairs]).numpy(), target)

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, index: int) -> tuple[ImageWindows, Tensor]:
        features, overlaps = self._pairs[index]
        rows = np.arange(len(features), dtype=np.float32)[:, None]
        return ImageWindows(rows, np.zeros(0, np.int64), overlaps), features

    def positives(self, index: int) -> PositiveWindows:
        overlaps = self._pairs[index][1]
        rows, labels = np.nonzero(overlaps >= self._threshold)
        close = overlaps[rows, labels] < 1
        order = np.argsort(close, kind="stable")  # objects first
        return PositiveWindows(rows[order, None].astype(np.float32), labels[order], int((~close).sum()))

    def features(self, index: int, windows: NDArray[np.floating]) -> Tensor:
        return self._pairs[index][0][torch.from_numpy(windows[:, 0].astype(np.int64))]


def _checked_pair(name: str, pair: tuple[ArrayLike, ArrayLike], classes: int) -> tuple[Tensor, NDArray[np.float32]]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise SppnetError(f"{name} must be a pair (features, overlaps), got {type(pair).__name__}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        features = np.require(as_rows(pair[0], name=f"{name}: features"), np.float32, ["C", "W"])
    check_finite(features, f"{name}: features")
    overlaps = as_numbers(pair[1], f"{name}: overlaps")
    if overlaps.shape != (len(features), classes):
        raise SppnetError(
            f"{name}: overlaps must have shape {(len(features), classes)}, a column for each class, got "
            f"{overlaps.shape}; for labels that are -1 beside objects pass numpy.eye({classes + 1})[labels][:, :-1]"
        )
    if not ((overlaps >= 0) & (overlaps <= 1)).all():
        raise SppnetError(f"{name}: overlaps must lie in 0 … 1, got {overlaps.min()} to {overlaps.max()}")
    return torch.from_numpy(features), overlaps.astype(np.float32)


class _Miner:
    """The SVMs so far, and the examples of each class."""

    def __init__(
        self, images: Any, classes: tuple[str, ...], settings: SVMSettings, scale: float, positives: list[Tensor]
    ) -> None:
        self.images, self.settings, self.positives = images, settings, positives
        width = positives[0].shape[1]
        self.active = np.array([len(rows) > 0 for rows in positives])
        weight = torch.zeros(len(classes), width, dtype=torch.float32)
        self.svms = LinearSVMs(weight, torch.full((len(classes),), NEVER, dtype=torch.float32), scale, classes)
        self.retrains = np.zeros(len(classes), np.int64)
        self.fresh = np.zeros(len(classes), np.int64)  # negatives since the last fit
        self.cache = NegativeCache(width, len(classes), settings.cache_gigabytes)
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in zip(classes, positives, strict=True))
        logger.info(f"svm mining {len(images)} images; positives {counts}; cache for {self.cache.capacity} windows")

    def visit(self, index: int) -> None:
        """Let the hard negatives of one image enter the cache; fit the classes that are due."""
        image, features = self.images.read(index)
        _check_finite(f"image {index}", features)
        scores = self.svms.score(features.detach()).cpu().numpy()
        scores[:, self.retrains == 0] = np.inf  # all negatives enter the first fit of a class
        negatives = (image.overlaps < self.settings.negative_overlap) & self.active
        negatives[np.arange(len(image.objects)), image.objects] = False  # an object is no negative of its own class
        if self.settings.duplicates == "overlap":
            negatives = distinct_negatives(image.windows, negatives, self.settings.duplicate_overlap)
        wanted = negatives & (scores > self.settings.mine_above)
        self.fresh += self.cache.add(features.detach(), wanted, scores, self.svms.scale)
        first = (self.retrains == 0) & (self.cache.counts() > 0)
        for label in np.flatnonzero(first | (self.fresh >= self.settings.retrain_after)):
            self.fit(int(label))

    def fit(self, label: int) -> None:
        positives, examples = len(self.positives[label]), self.cache.features_of(label, first=self.positives[label])
        negatives = len(examples) - positives
        signs = np.repeat([1, -1], [positives, negatives])
        svm = fit_linear_svm(examples, signs, self.settings, scale=1.0)
        weight = self.svms.weight[label] = torch.from_numpy(svm.weight).float()
        self.svms.bias[label] = svm.bias
        scores = (examples @ weight + svm.bias).numpy()
        evicted = self.cache.rescore(label, scores[positives:], self.settings.evict_below)
        self.retrains[label] += 1
        self.fresh[label] = 0
        objective = svm_objective(svm, scores, signs, self.settings)
        kept = f"cache {positives} pos {negatives - evicted} neg, evicted {evicted}"
        logger.info(f"svm {self.svms.classes[label]} retrain {self.retrains[label]}: {objective} | {kept}")


class NegativeCache:
    """Features (D wide, float32) of negatives of K classes, in at most `gigabytes` (10⁹ bytes).

    A window that is a negative of several classes is kept once, in a slot, with its score in each; a slot is free once
    no class holds it. A window stays in its slot, because the result of a fit depends, within its tolerance, on the
    order of the examples.
    Where the cache is full, the window is dropped that is furthest down the list of scores of every class that holds
    it: so the largest classes give way, and none loses its hardest negatives. (Scores of two classes do not compare.)
    """

    def __init__(self, width: int, classes: int, gigabytes: float) -> None:
        bytes_per_slot = 4 * width + 5 * classes
        self.capacity = int(gigabytes * 1e9 // bytes_per_slot)
        if self.capacity < 1:
            raise SppnetError(f"svm.cache_gigabytes={gigabytes} holds no window of {bytes_per_slot} bytes; raise it")
        # Pages are touched only as slots fill. (torch.empty would fill them under deterministic algorithms.)
        self._features = torch.from_numpy(np.empty((self.capacity, width), np.float32))
        self._members = np.zeros((self.capacity, classes), np.bool_)
        self._scores = np.zeros((self.capacity, classes), np.float32)  # meaningless outside `_members`
        self._used = 0  # slots from here on were never filled
        self.dropped = 0  # windows that the full cache gave up or did not take

    def counts(self) -> NDArray[np.int64]:
        """Negatives of each class, (K,)."""
        return self._members[: self._used].sum(axis=0)

    def add(
        self, features: Tensor, wanted: NDArray[np.bool_], scores: NDArray[np.float32], scale: float = 1.0
    ) -> NDArray[np.int64]:
        """Features (R, D), times `scale`, enter where wanted (R, K), with scores (R, K); returns how many did, (K,)."""
        entering = self._free_slots(np.flatnonzero(wanted.any(axis=1)), wanted, scores)
        free = np.flatnonzero(~self._members[: self._used].any(axis=1))
        fresh = np.arange(self._used, min(self.capacity, self._used + len(entering)))
        slots = np.concatenate([free, fresh])[: len(entering)]
        chosen = features[torch.from_numpy(entering).to(features.device)]
        self._features[torch.from_numpy(slots)] = chosen.float().mul(scale).cpu()
        self._members[slots], self._scores[slots] = wanted[entering], scores[entering]
        self._used = max(self._used, int(slots.max(initial=-1)) + 1)
        return wanted[entering].sum(axis=0)

    def features_of(self, label: int, first: Tensor) -> Tensor:
        """The rows of `first` (P, D), then the negatives of a class in the order of their slots: (P + N, D) float32."""
        slots = torch.from_numpy(np.flatnonzero(self._members[: self._used, label]))
        rows = torch.from_numpy(np.empty((len(first) + len(slots), self._features.shape[1]), np.float32))
        rows[: len(first)] = first
        torch.index_select(self._features, 0, slots, out=rows[len(first) :])
        return rows

    def rescore(self, label: int, scores: NDArray[np.float32], evict_below: float) -> int:
        """Scores (N,) of the negatives of a class by its new SVM; those below the limit leave it: returns how many."""
        slots = np.flatnonzero(self._members[: self._used, label])
        self._scores[slots, label] = scores
        leaving = scores < evict_below
        self._members[slots[leaving], label] = False
        return int(leaving.sum())

    def _free_slots(
        self, entering: NDArray[np.int64], wanted: NDArray[np.bool_], scores: NDArray[np.float32]
    ) -> NDArray[np.int64]:
        """Make slots free for the entering rows; returns those rows that do enter."""
        held = np.flatnonzero(self._members[: self._used].any(axis=1))
        excess = len(held) + len(entering) - self.capacity
        if excess <= 0:
            return entering
        members = np.concatenate([self._members[held], wanted[entering]])
        places = _best_places(np.concatenate([self._scores[held], scores[entering]]), members)
        leaving = np.argsort(-places, kind="stable")[:excess]
        self._members[held[leaving[leaving < len(held)]]] = False
        self.dropped += excess
        return np.delete(entering, leaving[leaving >= len(held)] - len(held))


def _best_places(scores: NDArray[np.float32], members: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(M,): the place of each window in the list of scores, highest first, of the class where it stands highest."""
    places = np.full(len(scores), len(scores))
    for label in range(members.shape[1]):
        own = np.flatnonzero(members[:, label])
        order = own[np.argsort(-scores[own, label], kind="stable")]
        places[order] = np.minimum(places[order], np.arange(len(own)))
    return places


def _collect_positives(
    images: MiningWindows | _Pairs, classes: int, settings: SVMSettings, scale: float, progress: bool
) -> list[Tensor]:
    """Scaled features of the positives of each class: K tensors (P, D) float32 on the CPU.

    Objects come first, at most ``max_positives`` of a class; then as many proposals, which over all classes take no
    more bytes than the cache of negatives. Where there are more they are drawn evenly, before any feature is computed.
    """
    every = progress_bar(range(len(images)), "positives", "image", shown=progress)
    found = [images.positives(index) for index in every]
    labels = np.concatenate([image.labels for image in found])
    is_object = np.concatenate([np.arange(len(image.labels)) < image.objects for image in found])
    width = images.features(0, np.zeros((0, 4), np.float32)).shape[1]
    most = max(1, int(settings.cache_gigabytes * 1e9 // (4 * width * classes)))
    rng = np.random.default_rng(settings.seed)
    places = np.full(len(labels), -1)  # row of each positive that is kept among those of its class
    kept = []
    for label in range(classes):
        objects = draw_rows(np.flatnonzero((labels == label) & is_object), settings.max_positives, rng)
        close = draw_rows(np.flatnonzero((labels == label) & ~is_object), min(settings.max_positives, most), rng)
        rows = np.concatenate([objects, close])
        places[rows] = np.arange(len(rows))
        kept.append(torch.empty(len(rows), width, dtype=torch.float32))
    parts = np.split(places, np.cumsum([len(image.labels) for image in found])[:-1])
    for index, own in enumerate(progress_bar(parts, "features of positives", "image", shown=progress)):
        chosen = np.flatnonzero(own >= 0)
        if len(chosen):
            features = images.features(index, found[index].windows[chosen])
            _check_finite(f"positives of image {index}", features)
            features = features.detach().float().mul(scale).cpu()
            for row, place, label in zip(features, own[chosen], found[index].labels[chosen], strict=True):
                kept[label][place] = row
    return kept


def _check_finite(what: str, features: Tensor) -> None:
    if not bool(torch.isfinite(features).all()):
        raise SppnetError(f"{what}: features must be finite; check the image and the network's weights")
