"""Memory that ends where an array ends: a loop that reads or writes behind it stops the program."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np


def fenced(values: np.ndarray) -> np.ndarray:
    """A copy behind whose last byte no memory may be read or written."""
    page = mmap.PAGESIZE
    end = -(-values.nbytes // page) * page
    block = np.frombuffer(mmap.mmap(-1, end + page), np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(block.ctypes.data + end), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
    copy = block[end - values.nbytes : end].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy
