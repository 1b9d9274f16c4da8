"""A uniform sample of a stream of rows, in bounded memory: training examples of which there may be millions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Reservoir:
    """At most `capacity` rows, each row ever added being equally likely to be among them.

    The same rows in the same order with the same seed give the same sample, however they were split into calls of
    `add`. Rows lie in CPU memory; pages are touched only as they arrive.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}; it bounds the examples that are kept")
        self.capacity = capacity
        self.seen = 0
        self._generator = np.random.default_rng(seed)
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, rows: Tensor) -> None:
        """Offer rows (R, D), D being the same at every call. Only those that are kept are copied."""
        width = "D" if self._rows is None else self._rows.shape[1]
        if rows.ndim != 2 or width not in ("D", rows.shape[1]):
            raise ValueError(f"a reservoir takes rows of shape (R, {width}), got {tuple(rows.shape)}; add no others")
        if self._rows is None:
            self._rows = _lazy_rows(self.capacity, rows)
        chosen, slots = self._choose(len(rows))
        self._rows[slots] = rows.detach()[chosen.to(rows.device)].to("cpu", self._rows.dtype)

    def rows(self) -> Tensor:
        """The sample so far (N, D), as a view; (0, 0) where nothing was ever added."""
        return torch.empty(0, 0) if self._rows is None else self._rows[: len(self)]

    def _choose(self, count: int) -> tuple[Tensor, Tensor]:
        """Which of the next `count` rows enter, and where (algorithm R: row t replaces slot u, u uniform in 0…t)."""
        position = np.arange(self.seen, self.seen + count)
        drawn = self._generator.integers(0, position + 1)
        slots = np.where(position < self.capacity, position, drawn)
        self.seen += count
        # Where two rows want one slot, the later one has replaced the earlier.
        last = dict(zip(slots.tolist(), range(count), strict=True))
        chosen = [(row, slot) for slot, row in last.items() if slot < self.capacity]
        table = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]


def _lazy_rows(capacity: int, like: Tensor) -> Tensor:
    # Through NumPy: with deterministic algorithms switched on, torch.empty fills, and so occupies, all of it.
    dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
    return torch.from_numpy(np.empty((capacity, *like.shape[1:]), dtype))
