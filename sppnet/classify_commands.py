"""What `sppnet classify` does: it calls the library and prints the result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from sppnet import distributed
from sppnet.artifacts import check_writable, write_json
from sppnet.classification.testing import classify_files, evaluate_classifiers, load_classifiers, views_of
from sppnet.data.class_folder import read_class_folder
from sppnet.data.folder import find_images
from sppnet.distributed import choose_device
from sppnet.errors import SppnetError, counted


def classify(options: argparse.Namespace) -> int:
    return ACTIONS[options.action](options)


def _train(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


def _test(options: argparse.Namespace) -> int:
    *runs, root = options.sources
    if not runs:
        raise SppnetError(f"{root}: expected runs and then the folder of classes; add RUN before or FOLDER after it")
    classifiers = load_classifiers(runs, choose_device(options.device))
    folder = read_class_folder(root, next(iter(classifiers.values())).classes)
    if options.json:
        if options.json.is_dir():
            raise SppnetError(f"--json {options.json}: expected the name of a file, this is a folder; add /test.json")
        check_writable(options.json.parent)
    result = evaluate_classifiers(list(classifiers.values()), folder, options.views)
    if not distributed.is_main():
        return 0
    numbers = {len(views_of(each, options.views, (1, 1))) for each in classifiers.values()}
    print(f"{folder}, {counted(len(classifiers), 'run')}, views {options.views} ({numbers.pop()} an image)")
    print(f"top-1 error {100 * result.top1_error:.2f} %, top-5 error {100 * result.top5_error:.2f} %")
    print(f"{counted(len(result.labels), 'image')}, {result.seconds / len(folder.images):.3f} s an image")
    empty = [name for name, error in result.class_errors.items() if error is None]
    if empty:
        print(f"classes without images: {', '.join(empty)}")
    if options.json:
        write_json(options.json, result.to_dict())
    return _report(result.skipped)


def _predict(options: argparse.Namespace) -> int:
    classifiers = list(load_classifiers([options.run], choose_device(options.device)).values())
    named = find_images(options.images)
    skipped = dict(named.unusable)
    for path, found in classify_files(classifiers, named.images, options.views):
        if isinstance(found, str):
            skipped[path] = found
        elif distributed.is_main():
            best = (-found).argsort(kind="stable")[:3]
            classes = ", ".join(f"{classifiers[0].classes[label]} {found[label]:.3f}" for label in best)
            print(f"{path}: {classes}", flush=True)
    return _report(skipped) if distributed.is_main() else 0


def _features(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


def _linear(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


def _strongest(options: argparse.Namespace) -> int:
    raise SppnetError("not here yet")


def _report(skipped: Mapping[Path, str]) -> int:
    """Name the images that were skipped; the exit status."""
    for reason in skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    if skipped:
        print(f"{counted(len(skipped), 'image')} skipped", file=sys.stderr)
    return 1 if skipped else 0


ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "test": _test,
    "predict": _predict,
    "features": _features,
    "linear": _linear,
    "strongest": _strongest,
}
