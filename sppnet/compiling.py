"""Loops compiled by numba, with the machine code kept on disk: the door to it, next to `network.vectors`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

Function = Callable[..., Any]


def compiled(**options: Any) -> Callable[[Function], Any]:
    """A decorator: the loop is compiled on its first call and runs without the interpreter lock; options of numba.njit.

    Without `fastmath` among them the arithmetic is IEEE's, in the order of the source.
    """

    def decorate(function: Function) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache is writable: compile in every process
            return numba.njit(nogil=True, **options)(function)

    return decorate
