"""Selective search, ours against OpenCV's: time per image on one core, and how well the windows cover the objects.

    python benchmarks/proposals.py [--images 5] [--rounds 5] [--picture proposals.png] [--recall-images N]

Times are taken image by image in pairs, one after the other in every round, so that a busy machine slows both; CPU
seconds of the process, the median of the rounds. With SPPNET_SHARED set the images are VOC's, and recall at IoU 0.5 and
mean best overlap with the objects of nine classes of the val images are printed for the first 100 … 2,000 windows; the
peer's windows are read from there, not computed. Without it one generated image is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from sppnet.config import ProposalSettings
from sppnet.data.proposal_files import match_records
from sppnet.data.voc import load_splits, restrict
from sppnet.detection.proposals import opencv_selective_search as opencv_search
from sppnet.detection.selective_search import selective_search
from sppnet.evaluation.proposals import ProposalQuality, proposal_recall
from sppnet.images import read_image
from sppnet.records import ImageRecord
from sppnet.report.curves import draw_recall_by_windows

CLASSES = ("bus", "car", "cat", "cow", "dog", "horse", "person", "sheep", "train")
COUNTS = (100, 200, 500, 1000, 1500, 2000)
OURS, PEER = "sppnet", "OpenCV"


def val_records(root: Path) -> list[ImageRecord]:
    return restrict(load_splits(root / "VOCdevkit", ("VOC2007/val", "VOC2012/val"))[0], CLASSES)


def generated_image(height: int = 375, width: int = 500) -> np.ndarray:
    """Blobs of all sizes on noise."""
    rng = np.random.default_rng(0)
    image = rng.normal(128, 6, (height, width, 3))
    for scale in (4, 16, 64):
        coarse = rng.normal(0, 40, (height // scale + 2, width // scale + 2, 3))
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255).astype(np.uint8)


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def time_pairs(images: dict[str, np.ndarray], rounds: int, settings: ProposalSettings) -> None:
    ratios = []
    print(f"one core, mode {settings.mode}, median of {rounds} CPU times")
    print(f"{'image':18} {'size':>10} {OURS:>9} {PEER:>9} {'ratio':>7}")
    for name, image in images.items():
        pairs = []
        for _ in range(rounds):
            ours = cpu_seconds(lambda image=image: selective_search(image, settings))  # type: ignore[misc]
            theirs = cpu_seconds(lambda image=image: opencv_search(image, settings))  # type: ignore[misc]
            pairs.append((ours, theirs))
        ours, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratios.append(statistics.median(theirs / ours for ours, theirs in pairs))
        size = f"{image.shape[1]} x {image.shape[0]}"
        print(f"{name:18} {size:>10} {ours:6.1f} ms {theirs:6.0f} ms {ratios[-1]:7.1f}")
    print(f"ratio, pair by pair: median {statistics.median(ratios):.1f}, from {min(ratios):.1f} to {max(ratios):.1f}")


def compare_recall(
    records: list[ImageRecord], root: Path, min_side: int, mode: str
) -> dict[str, dict[int, ProposalQuality]]:
    """Quality by number of windows of both; printed as a table."""
    settings = ProposalSettings(min_side=min_side, mode=mode)
    files = [root / "proposals" / f"selective_search_fast_{year}.npz" for year in ("VOC2007", "VOC2012")]
    theirs = match_records(records, files)
    large = {
        name: windows[(windows[:, 2:] - windows[:, :2] >= min_side).all(axis=1)] for name, windows in theirs.items()
    }
    start = time.process_time()
    ours = {record.id: selective_search(read_image(record.path), settings) for record in records}
    seconds = (time.process_time() - start) / len(records)
    annotations = {record.id: record.annotation for record in records if record.annotation is not None}
    results = {
        name: {count: proposal_recall(windows, annotations, max_windows=count) for count in COUNTS}
        for name, windows in ((OURS, ours), (PEER, large))
    }
    objects = results[OURS][COUNTS[0]].objects
    print(
        f"\n{len(records)} images, {objects} objects, sides >= {min_side}; "
        f"ours {1e3 * seconds:.0f} ms an image with reading"
    )
    print(f"{'':12}{'recall at IoU 0.5':>20}{'mean best overlap':>22}{'windows':>20}")
    print(f"{'first':12}{OURS:>10}{PEER:>10}{OURS:>12}{PEER:>10}{OURS:>10}{PEER:>10}")
    for count in COUNTS:
        a, b = results[OURS][count], results[PEER][count]
        print(
            f"{count:<12}{a.recall:10.3f}{b.recall:10.3f}{a.mean_best_overlap:12.3f}{b.mean_best_overlap:10.3f}"
            f"{a.mean_windows:10.0f}{b.mean_windows:10.0f}"
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5, help="images that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--mode", choices=("fast", "quality"), default="fast", help="the peer's recall is always fast's"
    )
    parser.add_argument("--min-sides", type=int, nargs="*", default=[20, 16])
    parser.add_argument("--recall-images", type=int, default=None, help="default: all val images")
    parser.add_argument("--picture", type=Path, default=Path("proposals.png"))
    options = parser.parse_args()
    cv2.setNumThreads(1)

    folder = os.environ.get("SPPNET_SHARED")
    records = val_records(Path(folder) / "voc") if folder else []
    step = max(1, len(records) // max(1, options.images))
    chosen = records[::step][: options.images]
    images = {record.id: read_image(record.path) for record in chosen} or {"generated": generated_image()}
    selective_search(next(iter(images.values())), ProposalSettings())  # compiles, or reads what was compiled before
    if options.images > 0:
        time_pairs(images, max(5, options.rounds), ProposalSettings(mode=options.mode))
    if not folder:
        print("SPPNET_SHARED is not set: no recall without annotated images")
        return 0
    for number, min_side in enumerate(options.min_sides):
        results = compare_recall(records[: options.recall_images], Path(folder) / "voc", min_side, options.mode)
        if number == 0:
            draw_recall_by_windows(results).save(options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
