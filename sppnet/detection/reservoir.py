"""A uniform sample of a stream of rows, in bounded memory: training examples of which there may be millions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Reservoir:
    """At most `capacity` rows, each row ever added being equally likely to be among them.

    A row is one entry of several parallel columns (features, box, …), which stay together. The same rows in the
    same order with the same seed give the same sample, however they were split into calls of `add`. Columns lie
    in CPU memory; pages are touched only as rows arrive.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}; it bounds the examples that are kept")
        self.capacity = capacity
        self.seen = 0
        self._generator = np.random.default_rng(seed)
        self._columns: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, *columns: Tensor) -> None:
        """Offer rows: tensors of one length and, at every call, the same widths. Only kept rows are copied."""
        lengths = {len(column) for column in columns}
        if len(lengths) != 1 or (self._columns and len(columns) != len(self._columns)):
            shapes = [tuple(column.shape) for column in columns]
            raise ValueError(f"a reservoir takes the same number of columns of one length at each call, got {shapes}")
        if not self._columns:
            self._columns = tuple(_lazy_rows(self.capacity, column) for column in columns)
        rows, slots = self._choose(lengths.pop())
        for own, column in zip(self._columns, columns, strict=True):
            own[slots] = column.detach()[rows.to(column.device)].to("cpu", own.dtype)

    def columns(self) -> tuple[Tensor, ...]:
        """The sample so far, as views; empty where nothing was ever added."""
        return tuple(column[: len(self)] for column in self._columns)

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
