"""Full-image features of pretrained backbones and linear SVMs on them: the paper's Tables 6 and 7.

    python benchmarks/full_image.py CONFIG.yaml … --classes FOLDER [--side 224] [--images N] [--train-images 30]
    python benchmarks/full_image.py CONFIG.yaml … --voc VOCdevkit [--train VOC2007/train] [--test VOC2007/val]
                                    [--names bus,car,…] [--sides 224 392] [--images N]

CONFIG: settings of a classifier, or the folder of a run. --classes: Caltech-101's protocol, mean accuracy ± deviation
over 10 splits, for the central crop and the full image, one level (6 × 6) and four (1, 2, 3, 6), of one map each.
--voc: mean AP of VOC07's classification task for each side, of the layer pool and of fc6 and fc7 where the network has
them. --images: so many of each class (of the first class an image shows), to try it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from machine import describe

from sppnet.classification.classifier import Classifier
from sppnet.classification.features import folder_features, open_classifier
from sppnet.classification.linear import caltech101, voc07
from sppnet.data.class_folder import read_class_folder
from sppnet.data.presence import read_presence

LEVELS = (1, 2, 3, 6)
NAMES = "bus,car,cat,cow,dog,horse,person,sheep,train"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    print(describe(), flush=True)
    classifiers = {path.stem: open_classifier(path, torch.device("cpu")) for path in options.configs}
    if options.classes:
        print_table7(classifiers, options)
    if options.voc:
        print_table6(classifiers, options)
    return 0


def print_table7(classifiers: dict[str, Classifier], options: argparse.Namespace) -> None:
    """Crop against full image, one level against four."""
    folder = read_class_folder(options.classes)
    folder = folder.part(first_of_each(folder.labels, options.images))
    print(f"{folder}, shorter side {options.side}, {options.train_images} images a class train")
    print("| network | crop, 6 × 6 | crop, 4 levels | full, 6 × 6 | full, 4 levels |")
    print("|---|---|---|---|---|", flush=True)
    for name, classifier in classifiers.items():
        if classifier.network.levels != LEVELS:
            raise SystemExit(f"{name}: expected pyramid.levels={list(LEVELS)}, got {classifier.network.levels}")
        cells = []
        for crop in (True, False):
            found = folder_features(classifier, folder.images, "pool", options.side, False, crop)
            last = found.features[:, -36 * classifier.network.backbone.channels :]  # level after level
            for own in (last / np.linalg.norm(last, axis=1, keepdims=True), found.features):
                result = caltech101(own, folder.labels[found.places], folder.classes, options.train_images)
                cells.append(f"{100 * result.mean:.2f} ± {100 * (result.deviation or 0):.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_table6(classifiers: dict[str, Classifier], options: argparse.Namespace) -> None:
    """Mean AP by side and layer."""
    data = read_presence(options.voc, options.train, options.test, options.names.split(","))
    train, test = np.split(np.arange(len(data.images)), [data.train])
    if options.images:
        kinds = (data.shown == 1).argmax(axis=1)
        train, test = (part[first_of_each(kinds[part], options.images)] for part in (train, test))
    places = np.concatenate([train, test])
    print(f"{len(train)} images of {', '.join(options.train)} train, {len(test)} of {', '.join(options.test)} test")
    print(f"| network | layer | {' | '.join(f'side {side}' for side in options.sides)} |")
    print("|---|---|" + "---|" * len(options.sides), flush=True)
    for name, classifier in classifiers.items():
        bare = not classifier.classes and classifier.config.head.init == "random"
        for layer in ("pool",) if bare else ("pool", "fc6", "fc7"):
            cells = []
            for side in options.sides:
                found = folder_features(classifier, [data.images[i] for i in places], layer, side, False)
                count = int((found.places < len(train)).sum())
                result = voc07(found.features, data.shown[places[found.places]], count, data.classes)
                cells.append(f"{100 * result.mean:.2f}")
            print(f"| {name} | {layer} | {' | '.join(cells)} |", flush=True)


def first_of_each(labels: np.ndarray, count: int | None) -> np.ndarray:
    """Places of the first `count` images of each class; of all for None."""
    seen: Counter[int] = Counter()
    kept = []
    for place, label in enumerate(labels.tolist()):
        seen[label] += 1
        if count is None or seen[label] <= count:
            kept.append(place)
    return np.array(kept, np.int64)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG|RUN")
    parser.add_argument("--classes", type=Path, metavar="FOLDER")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--train-images", type=int, default=30)
    parser.add_argument("--images", type=int)
    parser.add_argument("--voc", type=Path, metavar="VOCdevkit")
    parser.add_argument("--train", nargs="+", default=["VOC2007/train"])
    parser.add_argument("--test", nargs="+", default=["VOC2007/val"])
    parser.add_argument("--names", default=NAMES)
    parser.add_argument("--sides", nargs="+", type=int, default=[224, 392])
    options = parser.parse_args(arguments)
    if not options.classes and not options.voc:
        parser.error("name --classes FOLDER or --voc VOCdevkit")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
