"""What `sppnet classify` does: it calls the library and prints the result."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from sppnet.errors import SppnetError


def classify(options: argparse.Namespace) -> int:
    return ACTIONS[options.action](options)


def _train(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


def _test(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


def _predict(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


def _features(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


def _linear(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


def _strongest(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "test": _test,
    "predict": _predict,
    "features": _features,
    "linear": _linear,
    "strongest": _strongest,
}
