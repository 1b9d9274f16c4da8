"""The negatives that the detectors of all classes are trained on, in bounded memory.

A window that is a negative of several classes is kept once. It lies in a slot, with its features, the image and
row that it came from, and for each class whether it is a negative there and how it scored. A slot is free once no
class holds it. Order matters to the solver, so a window stays in its slot, and the slots are part of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class CachedKeys:
    """What a cache holds, without the features: M windows, sorted by slot."""

    slots: NDArray[np.int64]  # (M,)
    images: NDArray[np.int64]  # (M,)
    rows: NDArray[np.int64]  # (M,) row of the window in its image
    members: NDArray[np.bool_]  # (M, K)
    scores: NDArray[np.float32]  # (M, K), under the detector of the last fit; meaningless outside `members`


class NegativeCache:
    """Features (D wide, float32) of negatives of K classes, in at most `gigabytes` (10⁹ bytes)."""

    def __init__(self, width: int, classes: int, gigabytes: float) -> None:
        bytes_per_slot = 4 * width + 5 * classes + 16
        self.capacity = int(gigabytes * 1e9 // bytes_per_slot)
        if self.capacity < 1:
            raise ValueError(
                f"a cache of {gigabytes} gigabytes does not hold one window of {bytes_per_slot} bytes; "
                "raise svm.cache_gigabytes"
            )
        # Pages are touched only as slots fill. (torch.empty would fill them under deterministic algorithms.)
        self._features = torch.from_numpy(np.empty((self.capacity, width), np.float32))
        self._images = np.zeros(self.capacity, np.int64)
        self._rows = np.zeros(self.capacity, np.int64)
        self._members = np.zeros((self.capacity, classes), np.bool_)
        self._scores = np.zeros((self.capacity, classes), np.float32)
        self._used = 0  # slots from here on were never filled
        self.displaced = 0  # windows that left because the cache was full

    def __len__(self) -> int:
        """Windows held."""
        return int(self._members[: self._used].any(axis=1).sum())

    def counts(self) -> NDArray[np.int64]:
        """Negatives of each class, (K,)."""
        return self._members[: self._used].sum(axis=0)

    def add(
        self,
        image: int,
        features: Tensor,
        wanted: NDArray[np.bool_],
        scores: NDArray[np.float32],
        scale: float = 1.0,
    ) -> NDArray[np.int64]:
        """Let the windows of an image enter: features (R, D) on any device, wanted and scores (R, K).

        Returns how many negatives are new to each class, (K,); what a class holds already does not enter twice.
        Where the cache is full, the window goes first, or does not enter, that is furthest down the list of scores of
        every class that holds it: so the largest classes give way, and none is left without its hardest negatives.
        (Scores of two classes say nothing about each other.) Only entering rows are copied, times `scale`.
        """
        wanted = wanted.copy()
        slots = np.flatnonzero((self._images[: self._used] == image) & self._members[: self._used].any(axis=1))
        rows = self._rows[slots]
        new = wanted[rows] & ~self._members[slots]
        self._members[slots] |= new
        self._scores[slots] = np.where(new, scores[rows], self._scores[slots])
        wanted[rows] = False
        entering = self._make_room(np.flatnonzero(wanted.any(axis=1)), wanted, scores)
        self._fill(image, entering, features, wanted, scores, scale)
        return new.sum(axis=0) + wanted[entering].sum(axis=0)

    def features_of(self, label: int, first: Tensor | None = None) -> Tensor:
        """The negatives of a class, (N, D) float32, in the order of their slots; after the rows of `first` (P, D)."""
        slots = torch.from_numpy(self._slots_of(label))
        count = 0 if first is None else len(first)
        rows = torch.from_numpy(np.empty((count + len(slots), self._features.shape[1]), np.float32))
        if first is not None:
            rows[:count] = first
        torch.index_select(self._features, 0, slots, out=rows[count:])
        return rows

    def rescore(self, label: int, scores: NDArray[np.float32]) -> None:
        """Take over what the new detector of a class gives its negatives: (N,), in the order of their slots."""
        self._scores[self._slots_of(label), label] = scores

    def evict(self, label: int, below: float) -> int:
        """Drop the negatives of a class that score below; returns how many."""
        slots = self._slots_of(label)
        leaving = slots[self._scores[slots, label] < below]
        self._members[leaving, label] = False
        return len(leaving)

    def keys(self) -> CachedKeys:
        slots = np.flatnonzero(self._members[: self._used].any(axis=1))
        return CachedKeys(
            slots, self._images[slots], self._rows[slots], self._members[slots], self._scores[slots].copy()
        )

    def restore(self, keys: CachedKeys) -> None:
        """Take over these keys; the features of each image then follow by `restore_features`."""
        if len(keys.slots) and keys.slots.max() >= self.capacity:
            raise ValueError(
                f"the checkpoint needs {keys.slots.max() + 1} slots but the cache has {self.capacity}; "
                "keep svm.cache_gigabytes as it was, or mine from the start"
            )
        self._used = int(keys.slots.max()) + 1 if len(keys.slots) else 0
        self._images[keys.slots], self._rows[keys.slots] = keys.images, keys.rows
        self._members[keys.slots], self._scores[keys.slots] = keys.members, keys.scores

    def restore_features(self, image: int, features: Tensor, scale: float = 1.0) -> None:
        """Fill in the features of the windows held of one image from all its rows (R, D)."""
        held = self._members[: self._used].any(axis=1) & (self._images[: self._used] == image)
        slots = np.flatnonzero(held)
        self._features[torch.from_numpy(slots)] = _copied(features, self._rows[slots], scale)

    def _slots_of(self, label: int) -> NDArray[np.int64]:
        return np.flatnonzero(self._members[: self._used, label])

    def _make_room(
        self, entering: NDArray[np.int64], wanted: NDArray[np.bool_], scores: NDArray[np.float32]
    ) -> NDArray[np.int64]:
        """Free slots for the entering rows; returns those rows that do enter."""
        occupied = np.flatnonzero(self._members[: self._used].any(axis=1))
        excess = len(occupied) + len(entering) - self.capacity
        if excess <= 0:
            return entering
        members = np.concatenate([self._members[occupied], wanted[entering]])
        places = _best_places(np.concatenate([self._scores[occupied], scores[entering]]), members)
        leaving = np.argsort(-places, kind="stable")[:excess]
        self._members[occupied[leaving[leaving < len(occupied)]]] = False
        self.displaced += excess
        return np.delete(entering, leaving[leaving >= len(occupied)] - len(occupied))

    def _fill(
        self,
        image: int,
        entering: NDArray[np.int64],
        features: Tensor,
        wanted: NDArray[np.bool_],
        scores: NDArray[np.float32],
        scale: float,
    ) -> None:
        free = np.flatnonzero(~self._members[: self._used].any(axis=1))
        fresh = np.arange(self._used, min(self.capacity, self._used + len(entering)))
        slots = np.concatenate([free, fresh])[: len(entering)]
        self._features[torch.from_numpy(slots)] = _copied(features, entering, scale)
        self._images[slots], self._rows[slots] = image, entering
        self._members[slots], self._scores[slots] = wanted[entering], scores[entering]
        self._used = max(self._used, int(slots.max()) + 1) if len(slots) else self._used


def _copied(features: Tensor, rows: NDArray[np.int64], scale: float) -> Tensor:
    chosen = features.detach()[torch.from_numpy(rows).to(features.device)]
    return chosen.float().mul(scale).cpu()


def _best_places(scores: NDArray[np.float32], members: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(M,): the place of each window in the list of scores, highest first, of the class where it stands highest."""
    places = np.full(len(scores), len(scores))
    for label in range(members.shape[1]):
        own = np.flatnonzero(members[:, label])
        order = own[np.argsort(-scores[own, label], kind="stable")]
        places[order] = np.minimum(places[order], np.arange(len(own)))
    return places
