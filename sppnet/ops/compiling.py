"""Loops compiled by numba to machine code that is kept on disk; beside window pooling its only importer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compiled on the first call, run without the interpreter lock; options of numba.njit."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache is writable: compile in every process
            return numba.njit(nogil=True, **options)(function)

    return decorate
