"""The only importer of numba beside `sppnet.ops`: loops compiled to machine code that is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

Function = Callable[..., Any]


def compiled(**options: Any) -> Callable[[Function], Any]:
    """A decorator: compiled on the first call, run without the interpreter lock; options of numba.njit."""

    def decorate(function: Function) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache is writable: compile in every process
            return numba.njit(nogil=True, **options)(function)

    return decorate
