"""How far a long job is: a bar on a terminal, elsewhere a line in the log every minute; the only importer of tqdm."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, TypeVar, cast

from tqdm import tqdm

from sppnet.distributed import is_main

T = TypeVar("T")
SECONDS = 60  # between two lines, and before the first one

log = logging.getLogger("sppnet")


class _LogLines:
    """A stream for tqdm that makes a log message of each of its lines."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            log.info("%s", line)

    def flush(self) -> None:
        """Nothing is kept back."""


def progress_bar(
    things: Iterable[T], what: str, unit: str, total: int | None = None, done: int = 0, shown: bool = True
) -> tqdm[T]:
    """tqdm over the things; `done` of `total` were there before.

    Silent where not `shown`, and under torchrun in all processes but the first. Where standard error is no terminal a
    job of less than a minute says nothing.
    """
    options: dict[str, Any] = {
        "desc": what,
        "unit": unit,
        "total": total,
        "initial": done,
        "disable": not (shown and is_main()),
    }
    if not sys.stderr.isatty():
        options |= {
            "file": _LogLines(),
            "delay": SECONDS,
            "mininterval": SECONDS,
            "maxinterval": 2 * SECONDS,
            "miniters": 1,
            "leave": False,
            "bar_format": "{desc}: {n_fmt} of {total_fmt} " + unit + "s, {elapsed} so far, {remaining} left{postfix}",
        }
    return cast("tqdm[T]", tqdm(things, **options))
