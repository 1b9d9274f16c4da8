"""What `sppnet classify` does: it calls the library and prints the result."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppnet import distributed
from sppnet.artifacts import check_writable, write_arrays, write_json
from sppnet.classification.classifier import Classifier
from sppnet.classification.features import folder_features, open_classifier
from sppnet.classification.linear import caltech101, voc07
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.strongest import draw_responses, strongest_responses
from sppnet.classification.testing import classify_files, evaluate_classifiers, load_classifiers
from sppnet.classification.training import HISTORY, train_classifier
from sppnet.classification.views import list_views
from sppnet.config_files import load_settings
from sppnet.data.class_folder import read_class_folder
from sppnet.data.folder import find_images
from sppnet.data.presence import is_voc, read_presence
from sppnet.distributed import choose_device
from sppnet.errors import SppnetError, counted
from sppnet.paths import as_text
from sppnet.report.drawing import save_image

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
    if not source.exists() and source.suffix not in (".yaml", ".yml"):
        raise SppnetError(f"{source}: no such folder; name one with a folder of pictures per class, or a .yaml file")
    values = {**FOLDER, "data": {"train": str(source)}} if source.is_dir() else None
    config = load_settings(ClassifierConfig, source, options.overrides, values)
    classifier = train_classifier(config, run, choose_device(options.device), options.epochs)
    if distributed.is_main():
        *_, last = csv.DictReader((run / HISTORY).read_text().splitlines())
        one, five = (100 * float(last[name]) for name in ("top1_error", "top5_error"))
        errors = f"top-1 error {one:.2f} %, top-5 error {five:.2f} %"
        print(f"classifier of {counted(len(classifier.classes), 'class')} in {run}; validation images: {errors}")
        print(f"next: sppnet classify test {run} FOLDER")
    return 0


def _test(options: argparse.Namespace) -> int:
    *runs, root = options.sources
    if not runs:
        raise SppnetError(f"{root}: expected runs and then the folder of classes; add RUN before or FOLDER after it")
    classifiers = load_classifiers(runs, choose_device(options.device))
    folder = read_class_folder(root, classifiers[0].classes)
    if options.json:
        _check_out(options.json, ".json")
    result = evaluate_classifiers(classifiers, folder, options.views)
    if not distributed.is_main():
        return 0
    number = len(list_views(options.views, (1, 1)))
    print(f"{folder}, {counted(len(classifiers), 'run')}, views {options.views} ({number} an image)")
    print(f"top-1 error {100 * result.top1_error:.2f} %, top-5 error {100 * result.top5_error:.2f} %")
    print(f"{counted(len(result.labels), 'image')}, {result.seconds / len(folder.images):.3f} s an image")
    empty = [name for name, error in result.class_errors.items() if error is None]
    if empty:
        print(f"classes without images: {', '.join(empty)}")
    if options.json:
        write_json(options.json, result.to_dict())
    return _report(result.skipped)


def _predict(options: argparse.Namespace) -> int:
    classifier = Classifier.load(options.run, choose_device(options.device))
    named = find_images(options.images)
    skipped = dict(named.unusable)
    for path, found in classify_files([classifier], named.images, options.views):
        if isinstance(found, str):
            skipped[path] = found
        elif distributed.is_main():
            best = found[0].sort(descending=True, stable=True).indices[:3].tolist()
            classes = ", ".join(f"{classifier.classes[label]} {found[0][label]:.3f}" for label in best)
            print(f"{path}: {classes}", flush=True)
    return _report(skipped) if distributed.is_main() else 0


def _features(options: argparse.Namespace) -> int:
    _check_out(options.out, ".npz")
    classifier = open_classifier(options.run, choose_device(options.device))
    images, labels, classes, _ = _labelled(options.data, options.split, ())
    found = folder_features(classifier, images, options.layer, options.side)
    if not distributed.is_main():
        return 0
    paths = np.array([as_text(images[place]) for place in found.places])
    labels, names = labels[found.places], np.array(classes)
    write_arrays(options.out, features=found.features, paths=paths, labels=labels, classes=names)
    count, length = found.features.shape
    print(f"{counted(count, 'feature')} of length {length:,} written to {options.out}")
    return _report(found.skipped)


def _linear(options: argparse.Namespace) -> int:
    if options.json:
        _check_out(options.json, ".json")
    classifier, voc = open_classifier(options.run, choose_device(options.device)), is_voc(options.data)
    images, labels, classes, train = _labelled(options.data, options.train, options.test, options.classes)
    found = folder_features(classifier, images, options.layer, options.side)
    if not distributed.is_main():
        return 0
    labels = labels[found.places]
    if voc:
        result = voc07(found.features, labels, int((found.places < train).sum()), classes)
    else:
        result = caltech101(found.features, labels, classes, options.train_images)
    print(f"{result.table()}; {options.layer} at a shorter side of {options.side}")
    if options.json:
        own = {"layer": options.layer, "side": options.side, "skipped": [as_text(path) for path in found.skipped]}
        write_json(options.json, result.to_dict() | own)
    return _report(found.skipped)


def _strongest(options: argparse.Namespace) -> int:
    _check_out(options.out, ".png")
    classifier = open_classifier(options.run, choose_device(options.device))
    named, side = find_images([options.images]), classifier.config.training.whole_side
    images = named.images
    responses, skipped = strongest_responses(classifier, images, options.filter, side)
    if not distributed.is_main():
        return 0
    save_image(draw_responses(responses, options.filter), options.out)
    for response in responses:
        print(f"{response.value:10.4g}  {as_text(response.path)}")
    used = counted(len(images) - len(skipped), "image")
    print(f"filter {options.filter}: the best {len(responses)} of {used} in {options.out}")
    return _report(named.unusable | skipped)


def _labelled(
    root: Path, train: Sequence[str], test: Sequence[str], classes: Sequence[str] | None = None
) -> tuple[Sequence[Path], NDArray[Any], tuple[str, ...], int]:
    """Images, their labels and classes; of VOC's folders (N, C), and how many of them are of the training splits."""
    if not is_voc(root):
        if classes is not None:
            raise SppnetError(f"--classes: {root} holds a folder for each class; leave the option or a folder out")
        folder = read_class_folder(root)
        return folder.images, folder.labels, folder.classes, len(folder.images)
    found = read_presence(root, train, test, classes)
    for line in found.skips:
        print(f"left out: {line}", file=sys.stderr)
    return found.images, found.shown, found.classes, found.train


def _check_out(path: Path, ending: str) -> None:
    """SppnetError, before anything is computed, where a file cannot be written."""
    if path.suffix.lower() != ending or path.is_dir():
        raise SppnetError(f"{path}: expected the name of a {ending} file to write, got another one; end it in {ending}")
    check_writable(path.parent)


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
