"""Views on maps against the same views as image crops: time of both, and what differs in the classes.

    python benchmarks/views.py RUN FOLDER [--views ten multiview] [--images N] [--rounds 3] [--device cpu]

On maps the backbone runs once for a scale and once for the mirrored image, as a detector's does; as crops it runs for
every view (sec. 3.1.4). Times are of all images, both in turn and without reading. "differ" counts images whose first
class is another; "largest" is the largest difference of a probability. Nothing is written to the run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
from machine import alternate, describe, in_words, ratio, seconds
from numpy.typing import NDArray

from sppnet.classification.classifier import Classifier
from sppnet.classification.testing import classify_image, views_of
from sppnet.data.class_folder import read_class_folder
from sppnet.distributed import choose_device
from sppnet.evaluation.classification import top_k_error
from sppnet.images import read_image
from sppnet.records import spread


@in_words
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    classifier = Classifier.load(options.run, choose_device(options.device))
    folder = read_class_folder(options.folder, classifier.classes)
    folder = folder.part(np.array(spread(range(len(folder.images)), options.images or len(folder.images))))
    images = [read_image(path) for path in folder.images]
    print(f"{describe(options.device)}; {folder}, {options.rounds} rounds", flush=True)
    print("| views | maps, ms an image | crops, ms an image | maps / crops | top-1, maps | crops | differ | largest |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.views:
        ways = {way: partial(classify, classifier, images, name, way == "maps") for way in ("maps", "crops")}
        times = alternate({way: partial(seconds, run, options.device) for way, run in ways.items()}, options.rounds)
        each = [f"{1e3 * statistics.median(times[way]) / len(images):,.1f}" for way in ways]
        maps, crops = (run() for run in ways.values())
        errors = [f"{100 * top_k_error(found, folder.labels, 1):.2f} %" for found in (maps, crops)]
        differ = np.count_nonzero(maps.argmax(1) != crops.argmax(1))
        cells = [*each, ratio(times["maps"], times["crops"]), *errors, differ, f"{np.abs(maps - crops).max():.3f}"]
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    return 0


def classify(classifier: Classifier, images: list[NDArray[np.uint8]], name: str, on_maps: bool) -> NDArray[np.float64]:
    """Probabilities (N, K) of all images."""
    views = [views_of(classifier, name, image.shape[:2]) for image in images]
    return np.stack([classify_image(classifier, image, own, on_maps) for image, own in zip(images, views, strict=True)])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a trained classifier")
    parser.add_argument("folder", type=Path, help="one folder of images for each class")
    parser.add_argument("--views", nargs="+", default=["ten", "multiview"], choices=("ten", "full", "multiview"))
    parser.add_argument("--images", type=int, help="so many of the folder, evenly spread")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.images or 1) < 1:
        parser.error("--rounds and --images must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
