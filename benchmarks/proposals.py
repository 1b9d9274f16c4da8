"""Selective search, ours beside OpenCV's, and EdgeBoxes: time an image on one core, and how objects are covered.

    python benchmarks/proposals.py [--timed 5] [--rounds 5] [--images N] [--picture docs/pictures/proposals.png]

CPU seconds of the process, image by image in turn, so that a busy machine slows both; ratios are taken round by round.
With SPPNET_SHARED set the images are VOC's; all then search all val images, or --images of them, and recall at IoU 0.5
and mean best overlap with the objects of nine classes are printed, and drawn for the first 100 … 2,000 windows where
--picture names a file (OpenCV takes most of a second an image). Without it generated images are timed. EdgeBoxes takes
the edges of gradients, or of the structured forest that --edge-model names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from machine import alternate, cpu_seconds, describe, milliseconds, ratio
from matplotlib.figure import Figure

from examples import pictures, shared, spread
from sppnet.config import ProposalSettings
from sppnet.data.selection import restrict
from sppnet.data.splits import load_splits
from sppnet.evaluation.proposals import ProposalQuality, proposal_recall
from sppnet.images import read_image
from sppnet.proposals.edge_boxes import edge_boxes
from sppnet.proposals.selective_search import opencv_selective_search, selective_search
from sppnet.records import ImageRecord

CLASSES = ("bus", "car", "cat", "cow", "dog", "horse", "person", "sheep", "train")
COUNTS = (100, 200, 500, 1000, 1500, 2000)
SEARCHES: dict[str, Callable[[np.ndarray, ProposalSettings], np.ndarray]] = {
    "sppnet": selective_search,
    "OpenCV": opencv_selective_search,
    "EdgeBoxes": edge_boxes,
}
OTHERS = ("OpenCV", "EdgeBoxes")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    cv2.setNumThreads(1)
    print(f"{describe()}; one of them")
    settings = ProposalSettings(edge_model=options.edge_model)
    if options.timed:
        time_images(options.timed, options.rounds, settings)
    root = shared("voc/VOCdevkit")
    if root is None:
        print("SPPNET_SHARED is not set: no recall without annotated images")
        return 0
    records = restrict(load_splits(root, ("VOC2007/val", "VOC2012/val"))[0], CLASSES)
    records = spread(records, len(records) if options.images is None else options.images)
    for number, min_side in enumerate(options.min_sides if records else []):
        results = compare_recall(records, settings.model_copy(update={"min_side": min_side}))
        if number == 0 and options.picture is not None:
            draw_recall(results, options.picture)
    return 0


def time_images(count: int, rounds: int, settings: ProposalSettings) -> None:
    """Print CPU times and their ratios for each image, and over all."""
    everything: dict[str, list[float]] = {name: [] for name in SEARCHES}
    names = [f"{name}, ms" for name in SEARCHES] + [f"{name} / sppnet" for name in OTHERS]
    print(f"| image | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    with tempfile.TemporaryDirectory() as folder:
        images = {path.stem: read_image(path) for path in pictures(Path(folder), count)}
    for name, image in images.items():
        runs = {own: partial(cpu_seconds, partial(run, image, settings)) for own, run in SEARCHES.items()}
        times = alternate(runs, rounds)
        print(row(name, times), flush=True)
        for own, values in times.items():
            everything[own] += values
    print(row("all", everything), flush=True)


def row(name: str, times: dict[str, list[float]]) -> str:
    medians = " | ".join(milliseconds(values) for values in times.values())
    ratios = " | ".join(ratio(times[other], times["sppnet"]) for other in OTHERS)
    return f"| {name} | {medians} | {ratios} |"


def compare_recall(records: list[ImageRecord], settings: ProposalSettings) -> dict[str, dict[int, ProposalQuality]]:
    """Quality by number of windows of each search; printed as a table."""
    annotations = {record.id: record.annotation for record in records if record.annotation is not None}
    results = {}
    for name, search in SEARCHES.items():
        found = {record.id: search(read_image(record.path), settings) for record in records}
        results[name] = {count: proposal_recall(found, annotations, max_windows=count) for count in COUNTS}
    objects = len(results["sppnet"][COUNTS[0]].best_overlaps)
    print(f"\n{len(records)} images, {objects} objects, sides of {settings.min_side} px and more")
    columns = [
        f"{value}: {name}" for value in ("recall at IoU 0.5", "mean best overlap", "windows") for name in SEARCHES
    ]
    print(f"| first | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for count in COUNTS:
        own = [of_search[count] for of_search in results.values()]
        recalls, overlaps = ([f"{getattr(q, name):.3f}" for q in own] for name in ("recall", "mean_best_overlap"))
        windows = [f"{quality.mean_windows:.0f}" for quality in own]
        print(f"| {count:,} | {' | '.join([*recalls, *overlaps, *windows])} |", flush=True)
    return results


def draw_recall(results: dict[str, dict[int, ProposalQuality]], path: Path) -> None:
    """Recall and mean best overlap over the number of windows an image may keep."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    for axes, value in zip(figure.subplots(1, 2), ("recall", "mean_best_overlap"), strict=True):
        for name, by_count in results.items():
            axes.plot(list(by_count), [getattr(q, value) for q in by_count.values()], marker="o", label=name)
        axes.set(xlabel="windows per image", title=value.replace("_", " "), ylim=(0, 1.02))
        axes.grid(color="#e6e8eb")
        axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timed", type=int, default=5, help="images that are timed in turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-sides", type=int, nargs="+", default=[20, 16], help="the picture shows the first")
    parser.add_argument("--images", type=int, default=None, help="images searched for recall, default: all val images")
    parser.add_argument("--picture", type=Path, help="where recall by number of windows is drawn")
    parser.add_argument("--edge-model", type=Path, help="a structured forest for EdgeBoxes; without it gradients")
    options = parser.parse_args(arguments)
    if options.timed < 0 or options.rounds < 1:
        parser.error("--timed must be at least 0 and --rounds at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
