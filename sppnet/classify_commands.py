"""What `sppnet classify` does: it calls the library and prints the result."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping
from typing import Any

from sppnet import distributed
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.training import HISTORY, train_classifier
from sppnet.config_files import load_settings
from sppnet.distributed import choose_device
from sppnet.errors import SppnetError, counted

# What differs from the paper's settings where a folder alone is given: the head of a trained backbone, in minutes.
FOLDER: dict[str, Any] = {
    "backbone": {"name": "efficientnet_lite0", "weights": {"source": "package"}},
    "head": {"fc6": 512, "fc7": 512, "input_norm": 300},
    "training": {"train_backbone": False, "epochs": 15, "batch": 32, "patience": 3},
}


def classify(options: argparse.Namespace) -> int:
    return ACTIONS[options.action](options)


def _train(options: argparse.Namespace) -> int:
    source, run = options.source, options.run
    values = {**FOLDER, "data": {"train": str(source)}} if source.is_dir() else None
    config = load_settings(ClassifierConfig, source, options.overrides, values)
    classifier = train_classifier(config, run, choose_device(options.device), options.epochs)
    if distributed.is_main():
        *_, last = csv.DictReader((run / HISTORY).read_text().splitlines())
        errors = f"top-1 error {float(last['top1_error']):.3f}, top-5 error {float(last['top5_error']):.3f}"
        print(f"classifier of {counted(len(classifier.classes), 'class')} in {run}; validation images: {errors}")
        print(f"next: sppnet classify test {run} FOLDER")
    return 0


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
