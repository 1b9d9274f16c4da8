"""Memory for large arrays that come and go, one after the other."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sppnet.network.vectors import LINE


class ReusedMemory:
    """Memory for large arrays, that of an earlier one once nobody holds it any longer.

    Filling 100 MB that are fresh from the system takes twice as long as filling 100 MB that were used before, and far
    longer where memory is in pieces. One block stays, of at most `largest` bytes.
    """

    def __init__(self, smallest: int = 2**20, largest: int = 2**28) -> None:
        self.smallest, self.largest = smallest, largest
        self._lock = threading.Lock()
        self._block = np.empty(0, np.uint8)
        self._free = sys.getrefcount(self._block)  # every array on the block, and every view of one, adds to it

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """As np.empty; from `smallest` bytes on the array starts on a cache line."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if not self.smallest <= size <= self.largest:
            return np.empty(shape, dtype)
        with self._lock:
            # Not a much larger block: whoever keeps a small result would keep all of it.
            whole = size + LINE
            if not whole <= self._block.nbytes <= 2 * whole or sys.getrefcount(self._block) > self._free:
                self._block = np.empty(whole, np.uint8)  # huge pages where they are to be had, unlike torch.empty
            first = -self._block.ctypes.data % LINE
            return self._block[first : first + size].view(dtype).reshape(shape)
