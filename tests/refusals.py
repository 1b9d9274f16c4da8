"""One way to say that a wrong argument is refused by this package itself, and not somewhere inside a library."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import sppnet

PACKAGE = Path(sppnet.__file__).parent


def refused_here(call: Callable[[], object], match: str = "") -> None:
    """The call ends with a ValueError that the package's own code raised, and whose message fits."""
    with pytest.raises(ValueError, match=match) as caught:
        call()
    innermost = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    assert innermost.is_relative_to(PACKAGE), f"{innermost}: {caught.value}"
