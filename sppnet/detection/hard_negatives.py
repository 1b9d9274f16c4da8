"""Hard-negative mining, one pass over the images for the SVMs of all classes (sec. 4.1; the release).

Objects are the positives, and proposals close to them where the settings say so. Negatives of a class are the windows
whose overlap with all its objects is below 0.3. All negatives of the first image train the first SVM; later only those
that score above −1.0001 enter the cache. A class is fitted again after 2,000 new negatives and at the end. After each
fit the cached negatives that score below −1.2 leave. Features are computed image by image. Under torchrun a process
keeps and fits its classes alone; all see the same features in the same order, so that the SVMs are those of one.
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
from sppnet.config import SVMSettings
from sppnet.detection.linear_svm import LinearSVMs, fit_linear_svm, typical_norm_scale
from sppnet.detection.negative_cache import NegativeCache
from sppnet.detection.torch_state import undisturbed
from sppnet.detection.training_windows import ImageWindows, MiningWindows, PositiveWindows, draw_rows
from sppnet.distributed import in_order, is_main, shard, world_size
from sppnet.errors import SppnetError
from sppnet.jobs import progress_bar
from sppnet.records import pairwise_iou
from sppnet.settings import checked_settings

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
    the cache), one image, and one fit; under torchrun in every process, for its share of the classes.
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
    positives, counts = _collect_positives(source, len(names), settings, scale, progress)
    miner, mined = _Miner(names, settings, scale, positives), getattr(source, "mined", len(source))
    shown = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    logger.info(f"svm mining {mined} images; positives {shown}; cache for {miner.cache.capacity} windows")

    def read(index: int) -> tuple[Any, ...]:
        image, features = source.read(index)
        _check_finite(f"image {index}", features)
        return *vars(image).values(), features.detach()

    for *parts, features in progress_bar(in_order(read, mined), "mining", "image", mined, shown=progress):
        miner.visit(ImageWindows(*(part.numpy() for part in parts)), features)
    for label in np.flatnonzero(miner.active & (miner.cache.counts() > 0)):
        miner.fit(int(label))
    dropped = miner.gather()
    each = zip(names, counts, miner.retrains, strict=True)
    untrained = {name: f"no {'negatives' if count else 'positives'}" for name, count, fits in each if not fits}
    for name, reason in untrained.items() if is_main() else ():
        logger.warning("svm %s has %s in the training images; it never fires", name, reason)
    if dropped and is_main():
        logger.warning(
            f"the cache of {settings.cache_gigabytes:g} GB was full and dropped {dropped} negatives, "
            "the lowest scores of the largest classes first; svm.cache_gigabytes raises it"
        )
    return MinedSVMs(miner.svms, untrained, tuple(miner.retrains.tolist()), dropped)


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
    """The SVMs so far, and the examples of each class of this process."""

    def __init__(self, classes: tuple[str, ...], settings: SVMSettings, scale: float, positives: list[Tensor]) -> None:
        self.settings, self.positives = settings, positives
        width = positives[0].shape[1]
        self.active = np.array([len(rows) > 0 for rows in positives])
        weight = torch.zeros(len(classes), width, dtype=torch.float32)
        self.svms = LinearSVMs(weight, torch.full((len(classes),), NEVER, dtype=torch.float32), scale, classes)
        self.retrains = np.zeros(len(classes), np.int64)
        self.fresh = np.zeros(len(classes), np.int64)  # negatives since the last fit
        self.cache = NegativeCache(width, len(classes), settings.cache_gigabytes)

    def visit(self, image: ImageWindows, features: Tensor) -> None:
        """Let the hard negatives of one image enter the cache; fit the classes that are due."""
        scores = self.svms.score(features).cpu().numpy()
        scores[:, self.retrains == 0] = np.inf  # all negatives enter the first fit of a class
        negatives = (image.overlaps < self.settings.negative_overlap) & self.active
        negatives[np.arange(len(image.objects)), image.objects] = False  # an object is no negative of its own class
        if self.settings.duplicates == "overlap":
            negatives = distinct_negatives(image.windows, negatives, self.settings.duplicate_overlap)
        wanted = negatives & (scores > self.settings.mine_above)
        self.fresh += self.cache.add(features, wanted, scores, self.svms.scale)
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
        kept = f"cache {positives} pos {negatives - evicted} neg, evicted {evicted}"
        logger.info(f"svm {self.svms.classes[label]} retrain {self.retrains[label]}: {kept}")

    def gather(self) -> int:
        """Take over the SVMs of the other processes' classes; returns how many negatives all caches dropped."""
        every = [self.svms.weight, self.svms.bias, torch.from_numpy(self.retrains)]
        for label, fitted in enumerate(in_order(lambda label: [part[label] for part in every], len(self.retrains))):
            for part, own in zip(every, fitted, strict=True):
                part[label] = own
        return sum(int(dropped) for (dropped,) in in_order(lambda _: [self.cache.dropped], world_size()))


def _collect_positives(
    images: MiningWindows | _Pairs, classes: int, settings: SVMSettings, scale: float, progress: bool
) -> tuple[list[Tensor], list[int]]:
    """Scaled features of the positives of each class of this process: K tensors (P, D) float32 on the CPU.

    Those of other processes' classes are empty; after them the number of positives of every class. Objects come first,
    at most ``max_positives`` of a class; then as many proposals, which over all classes take no more bytes than the
    cache of negatives. Where there are more they are drawn evenly, before any feature is computed.
    """
    own_classes, every = shard(range(classes)), in_order(lambda i: vars(images.positives(i)).values(), len(images))
    found = [
        PositiveWindows(windows.numpy(), labels.numpy(), int(objects))
        for windows, labels, objects in progress_bar(every, "positives", "image", len(images), shown=progress)
    ]
    labels = np.concatenate([image.labels for image in found])
    is_object = np.concatenate([np.arange(len(image.labels)) < image.objects for image in found])
    width = images.features(0, np.zeros((0, 4), np.float32)).shape[1]
    most = max(1, int(settings.cache_gigabytes * 1e9 // (4 * width * classes)))
    rng = np.random.default_rng(settings.seed)
    places = np.full(len(labels), -1)  # row of each positive that is kept among those of its class
    kept, counts = [], []
    for label in range(classes):
        objects = draw_rows(np.flatnonzero((labels == label) & is_object), settings.max_positives, rng)
        close = draw_rows(np.flatnonzero((labels == label) & ~is_object), min(settings.max_positives, most), rng)
        rows = np.concatenate([objects, close])
        places[rows] = np.arange(len(rows))
        counts.append(len(rows))
        kept.append(torch.empty(len(rows) if label in own_classes else 0, width, dtype=torch.float32))
    parts = np.split(places, np.cumsum([len(image.labels) for image in found])[:-1])

    def read(index: int) -> tuple[Tensor, ...]:
        windows = found[index].windows[parts[index] >= 0]
        if not len(windows):
            return ()
        features = images.features(index, windows)
        _check_finite(f"positives of image {index}", features)
        return (features.detach().float().mul(scale).cpu(),)

    rows_of = progress_bar(in_order(read, len(images)), "features of positives", "image", len(images), shown=progress)
    for image, own, shared in zip(found, parts, rows_of, strict=True):
        chosen = own >= 0
        for features in shared:
            for row, place, label in zip(features, own[chosen], image.labels[chosen], strict=True):
                if label in own_classes:
                    kept[label][place] = row
    return kept, counts


def _check_finite(what: str, features: Tensor) -> None:
    if not bool(torch.isfinite(features).all()):
        raise SppnetError(f"{what}: features must be finite; check the image and the network's weights")
