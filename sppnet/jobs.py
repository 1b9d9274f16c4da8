"""Long jobs over many things: how far one is, and images in processes of their own. The only importer of tqdm.

One image, one core: threads inside one image meet after every layer, and where another program keeps a core busy all of
them wait for the one that it delays. Processes that share nothing lose that core's share alone.
"""

from __future__ import annotations

import io
import itertools
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import wait as wait_for
from operator import length_hint
from pathlib import Path
from typing import Any, TypeVar, cast

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sppnet.distributed import environment_number, is_main
from sppnet.errors import SppnetError, counted

T = TypeVar("T")
R = TypeVar("R")

SECONDS = 60  # between two lines in the log, and before the first one
FEW = 32  # items below which all is done in this process: starting another one takes seconds
MOST = 8  # processes; each holds weights of its own. More cores are threads of these
BYTES = 2**31  # of memory for each of them
WAITING = 4  # items handed out per process ahead of their turn

log = logging.getLogger("sppnet")


class _LogLines(io.TextIOBase):
    """A stream for tqdm that makes a log message of each of its lines."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


def progress_bar(
    things: Iterable[T], what: str, unit: str, total: int | None = None, done: int = 0, shown: bool = True
) -> tqdm[T]:
    """tqdm over the things; `done` of `total` were there before.

    Silent where not `shown`, and under torchrun in all processes but the first. Where standard error is no terminal a
    job of less than a minute says nothing. Within `one_bar` it moves that bar and shows none of its own.
    """
    if _whole:
        return cast("tqdm[T]", tqdm(_moving(things, *_whole[-1], what), total=total, initial=done, disable=True))
    count = length_hint(things) if total is None else total
    options = {"unit": unit, "total": total, "initial": done, **_lines("{n_fmt} of " + counted(count, unit))}
    return cast("tqdm[T]", tqdm(things, desc=what, disable=not (shown and count and is_main()), **options))


def _lines(progress: str) -> dict[str, Any]:
    """What makes lines in the log of a bar, where standard error is no terminal."""
    if sys.stderr.isatty():
        return {}
    form = f"{{desc}}: {progress}, {{elapsed}} so far, {{remaining}} left{{postfix}}"
    pace = {"delay": SECONDS, "mininterval": SECONDS, "maxinterval": 2 * SECONDS, "miniters": 1}
    return {"file": _LogLines(), "leave": False, "bar_format": form, **pace}


_whole: list[tuple[tqdm[Any], Mapping[str, float]]] = []  # the bar of several jobs, where there is one


@contextmanager
def one_bar(items: Mapping[str, float], total: float, shown: bool = True) -> Iterator[tqdm[Any]]:
    """One bar for all jobs within: an item of the job `what` is items[what] of `total` estimated seconds.

    The time left is the estimated rest, by the pace so far. Who opens it names the job with `set_description`.
    """
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left{postfix}"
    options = {"bar_format": form, "smoothing": 0, **_lines("{percentage:.0f} % of the training")}
    bar = tqdm(total=total, disable=not (shown and is_main()), **options)
    with bar, logging_redirect_tqdm([log]) if sys.stderr.isatty() else nullcontext():
        _whole.append((bar, items))
        try:
            yield bar
        finally:
            _whole.pop()


def _moving(things: Iterable[T], bar: tqdm[Any], items: Mapping[str, float], what: str) -> Iterator[T]:
    for thing in things:
        yield thing
        bar.update(min(items.get(what, 0), max(0, (bar.total or 0) - bar.n)))


def map_in_workers(
    make: Callable[[], Callable[[T], R]], items: Sequence[T], what: str, unit: str, workers: int = 0, shown: bool = True
) -> list[tuple[T, R]]:
    """(item, make()(item)) of every item, in the order in which they were done; see `iterate_in_workers`.

    `what` and `unit` name the work in its progress bar, which is there where `shown`.
    """
    return list(progress_bar(iterate_in_workers(make, items, workers), what, unit, len(items), shown=shown))


def iterate_in_workers(
    make: Callable[[], Callable[[T], R]], items: Sequence[T], workers: int = 0
) -> Iterator[tuple[T, R]]:
    """(item, make()(item)) of every item, as soon as it is done.

    `make` is called once in every process and must be picklable; so must items and results. `workers`: 0 = one a core.
    Few items are done in this process, and all in that of a script from standard input. An error ends the iteration:
    items not begun are dropped, begun ones finish; so does Ctrl-C.
    """
    count = worker_count(len(items), workers)
    if count <= 1:
        if items:
            work = make()
            for item in items:
                yield item, work(item)
        return
    # spawn: a forked copy of a process in which torch or OpenCV has started threads can hang.
    context = multiprocessing.get_context("spawn")
    threads = max(1, available_cores() // count)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(make, threads)) as pool:
        try:
            yield from _hand_out(pool, items, count)
        except BrokenProcessPool:
            why = "out of memory, or a script that lacks the line 'if __name__ == \"__main__\":'"
            raise SppnetError(f"a worker process died: {why}; repair that, or end other programs") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def worker_count(items: int, workers: int = 0) -> int:
    """How many processes `iterate_in_workers` takes for so many items; 1 = this one."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    from_stdin = script is not None and not Path(script).exists()  # which a new process could not read again
    return 1 if items < FEW or from_stdin else min(workers or min(available_cores(), MOST, _room()), items)


def available_cores() -> int:
    """The cores this process may use, shared with its siblings under torchrun."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // max(1, environment_number("LOCAL_WORLD_SIZE")))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this says that there was no memory left; torch, OpenVINO and OpenCV have words of their own for it."""
    words = r"out of memory|insufficient memory|bad_alloc|alloc_failed|can't allocate"
    return isinstance(error, MemoryError) or re.search(words, str(error), re.IGNORECASE) is not None


def _room() -> int:
    """Processes that the machine's memory has room for."""
    if not hasattr(os, "sysconf"):
        return MOST
    return max(1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // BYTES)


def _hand_out(pool: ProcessPoolExecutor, items: Sequence[T], count: int) -> Iterator[tuple[T, Any]]:
    left, running = iter(items), dict[Future[Any], T]()
    running |= {pool.submit(_do, item): item for item in itertools.islice(left, WAITING * count)}
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()
            running |= {pool.submit(_do, item): item for item in itertools.islice(left, 1)}


_make: list[Callable[[], Callable[[Any], Any]]] = []  # of this worker process
_work: list[Callable[[Any], Any]] = []


def _do(item: Any) -> Any:
    if not _work:
        _work.append(_make[0]())  # here, so that its errors reach the parent as they are
    return _work[0](item)


def _start(make: Callable[[], Callable[[Any], Any]], threads: int) -> None:
    """Prepare a worker process; what it sets is its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; workers finish their image
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Images of many sizes must not fill the memory: oneDNN, torch's convolutions on a CPU, keeps what it prepared for
    # the last 1024 of them, megabytes each. Read before its first convolution.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(threads)
    _make.append(make)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers; they end themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)
