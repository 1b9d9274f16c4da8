"""The only importer of numba beside `sppnet.ops`: loops compiled to machine code that is kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
from numba.core import event

Function = Callable[..., Any]

log = logging.getLogger("sppnet")


def compiled(**options: Any) -> Callable[[Function], Any]:
    """A decorator: compiled on the first call, run without the interpreter lock; options of numba.njit."""

    def decorate(function: Function) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache is writable: compile in every process
            return numba.njit(nogil=True, **options)(function)

    return decorate


class _Announcement(event.Listener):
    """Says that compiling has begun, once."""

    said = False

    def on_start(self, event: Any) -> None:
        if not self.said:
            self.said = True
            log.info("compiling loops for this machine: seconds to half a minute, and once, where they can be kept")

    def on_end(self, event: Any) -> None:
        """Nothing to say."""


def announce_compiling() -> None:
    """From now on the log says so when a loop has to be compiled, which keeps a first call waiting."""
    event.register("numba:compile", _Announcement())
