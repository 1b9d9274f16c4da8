"""The door to numba, as `network.vectors`: loops compiled to machine code that is kept on disk, and their threads.

Threads are plain Python threads around a loop that releases the interpreter lock: unlike numba's own
threading layers they survive fork and may be used from several threads at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import logging
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
from numba.core import event

Function = Callable[..., Any]

log = logging.getLogger("sppnet")
PARTS_PER_THREAD = 8  # parts take different times: several per thread even out the work


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


def in_parts(run: Callable[[int, int], None], count: int, threads: int, least: int) -> None:
    """Call run(start, stop) over `count` things, in parts of at least `least` shared by the threads."""
    parts = max(1, min(threads * PARTS_PER_THREAD if threads > 1 else 1, count // least))
    bounds = [count * part // parts for part in range(parts + 1)]
    if parts == 1:
        run(0, count)
        return
    waiting = deque(itertools.pairwise(bounds))

    def work() -> None:
        while waiting:
            try:
                start, stop = waiting.popleft()
            except IndexError:  # the last one went to another thread
                return
            try:
                run(start, stop)
            except BaseException:
                waiting.clear()  # nobody begins another part
                raise

    rest_torch_threads()
    # The caller works too: a thread takes a fifth of a millisecond to start, and a small map not much longer.
    with ThreadPoolExecutor(min(threads, parts) - 1) as pool:
        others = [pool.submit(work) for _ in range(min(threads, parts) - 1)]
        work()
        for other in others:
            other.result()


def rest_torch_threads() -> None:
    """Give torch's worker threads back to the system; its next operation starts new ones, in a tenth of a millisecond.

    After an operation they wait for the next one by spinning, 5 ms and longer, on the cores that other threads need.
    OpenMP's own call, for the workers of the calling thread alone. Nothing happens where torch brings no GNU OpenMP,
    nor in a forked process, which has none of these workers and would wait for them for ever.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.__file__ or _forked:
        return
    library = _gnu_openmp(Path(torch.__file__).parent)
    if library is not None:
        library.omp_pause_resource_all(1)  # omp_pause_soft: settings stay


_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


@functools.cache
def _gnu_openmp(torch: Path) -> ctypes.CDLL | None:
    """The library of the torch in this folder, which has loaded it."""
    for path in [*torch.glob("lib/libgomp*.so*"), *torch.parent.glob("torch.libs/libgomp*.so*")]:
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            library.omp_pause_resource_all.argtypes = [ctypes.c_int]
            return library
    return None
