"""The cache of hard negatives: windows that the SVMs of some classes score too high, in bounded memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.errors import SppnetError


class NegativeCache:
    """Features (D wide, float32) of negatives of K classes, in at most `gigabytes` (10⁹ bytes).

    A window that is a negative of several classes is kept once, in a slot, with its score in each; a slot is free once
    no class holds it. The negatives of a class keep the order in which they came, whatever other classes hold, because
    the result of a fit depends, within its tolerance, on the order of the examples.
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
        self._arrivals = np.zeros(self.capacity, np.int64)
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
        self._arrivals[slots] = self._arrivals.max() + 1 + np.arange(len(slots))
        self._used = max(self._used, int(slots.max(initial=-1)) + 1)
        return wanted[entering].sum(axis=0)

    def features_of(self, label: int, first: Tensor) -> Tensor:
        """The rows of `first` (P, D), then the negatives of a class as they came: (P + N, D) float32."""
        slots = torch.from_numpy(self._slots_of(label))
        rows = torch.from_numpy(np.empty((len(first) + len(slots), self._features.shape[1]), np.float32))
        rows[: len(first)] = first
        torch.index_select(self._features, 0, slots, out=rows[len(first) :])
        return rows

    def rescore(self, label: int, scores: NDArray[np.float32], evict_below: float) -> int:
        """Scores (N,) of the negatives of a class by its new SVM; those below the limit leave it: returns how many."""
        slots = self._slots_of(label)
        self._scores[slots, label] = scores
        leaving = scores < evict_below
        self._members[slots[leaving], label] = False
        return int(leaving.sum())

    def _slots_of(self, label: int) -> NDArray[np.int64]:
        slots = np.flatnonzero(self._members[: self._used, label])
        return slots[np.argsort(self._arrivals[slots])]

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
