"""Selective search, ours against OpenCV's: time per image on one core, and how well the windows cover the objects.

    python benchmarks/proposals.py [--timed 5] [--rounds 5] [--images N] [--picture docs/pictures/proposals.png]

Times are taken image by image in pairs, one after the other in every round, so that a busy machine slows both; CPU
seconds of the process, the median of the rounds. With SPPNET_SHARED set the images are VOC's; both then search all val
images, or --images of them, and recall at IoU 0.5 and mean best overlap with the objects of nine classes are printed
and drawn for the first 100 … 2,000 windows (OpenCV takes most of a second an image). Without it one generated image is
timed.
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
from tqdm import tqdm

from sppnet.config import ProposalSettings
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


def search_peer(records: list[ImageRecord], settings: ProposalSettings) -> tuple[dict[str, np.ndarray], float]:
    """All windows of OpenCV's search by image, in its order, sides of settings.min_side px and more; seconds an image.

    Larger sides and fewer windows are a selection of these (see `selected`), so one search serves all comparisons.
    """
    everything = settings.model_copy(update={"max_windows": 10**6})
    start = time.process_time()
    found = {
        record.id: opencv_search(read_image(record.path), everything)
        for record in tqdm(records, desc=f"{PEER}'s search", unit="image", disable=None)
    }
    return found, (time.process_time() - start) / max(1, len(records))


def selected(windows: np.ndarray, min_side: int, max_windows: int) -> np.ndarray:
    """The first `max_windows` of those with both sides of `min_side` px and more."""
    return windows[(windows[:, 2:] - windows[:, :2] >= min_side).all(axis=1)][:max_windows]


def compare_recall(
    records: list[ImageRecord], peer: dict[str, np.ndarray], peer_seconds: float, settings: ProposalSettings
) -> dict[str, dict[int, ProposalQuality]]:
    """Quality by number of windows of both; printed as a table."""
    theirs = {name: selected(found, settings.min_side, settings.max_windows) for name, found in peer.items()}
    start = time.process_time()
    ours = {record.id: selective_search(read_image(record.path), settings) for record in records}
    seconds = (time.process_time() - start) / len(records)
    annotations = {record.id: record.annotation for record in records if record.annotation is not None}
    results = {
        name: {count: proposal_recall(windows, annotations, max_windows=count) for count in COUNTS}
        for name, windows in ((OURS, ours), (PEER, theirs))
    }
    objects = results[OURS][COUNTS[0]].objects
    print(
        f"\n{len(records)} images, {objects} objects, sides of {settings.min_side} px and more, mode {settings.mode}; "
        f"CPU time an image with reading: ours {1e3 * seconds:.0f} ms, {PEER} {1e3 * peer_seconds:.0f} ms\n"
    )
    print(quality_table(results))
    return results


def quality_table(results: dict[str, dict[int, ProposalQuality]]) -> str:
    """Markdown: a row for each number of windows, both methods side by side."""
    lines = [
        f"| first | recall at IoU 0.5, {OURS} | {PEER} | mean best overlap, {OURS} | {PEER} | windows, {OURS} "
        f"| {PEER} |",
        "|---|---|---|---|---|---|---|",
    ]
    for count, a in results[OURS].items():
        b = results[PEER][count]
        lines.append(
            f"| {count:,} | {a.recall:.3f} | {b.recall:.3f} | {a.mean_best_overlap:.3f} | {b.mean_best_overlap:.3f} "
            f"| {a.mean_windows:.0f} | {b.mean_windows:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timed", type=int, default=5, help="images that are timed in pairs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", choices=("fast", "quality"), default="fast")
    parser.add_argument("--min-sides", type=int, nargs="+", default=[20, 16], help="the picture shows the first")
    parser.add_argument("--images", type=int, default=None, help="images searched for cover, default: all val images")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/proposals.png"))
    options = parser.parse_args()
    cv2.setNumThreads(1)

    folder = os.environ.get("SPPNET_SHARED")
    records = val_records(Path(folder) / "voc") if folder else []
    images = {r.id: read_image(r.path) for r in spread(records, options.timed)} or {"generated": generated_image()}
    selective_search(next(iter(images.values())), ProposalSettings())  # compiles, or reads what was compiled before
    if options.timed > 0:
        time_pairs(images, max(5, options.rounds), ProposalSettings(mode=options.mode))
    if not folder:
        print("SPPNET_SHARED is not set: no cover without annotated images")
        return 0
    chosen = spread(records, len(records) if options.images is None else options.images)
    smallest = ProposalSettings(mode=options.mode, min_side=min(options.min_sides))
    peer, peer_seconds = search_peer(chosen, smallest)
    for number, min_side in enumerate(options.min_sides):
        settings = smallest.model_copy(update={"min_side": min_side})
        results = compare_recall(chosen, peer, peer_seconds, settings)
        if number == 0:
            options.picture.parent.mkdir(parents=True, exist_ok=True)
            draw_recall_by_windows(results).save(options.picture, optimize=True)
            print(f"\ndrawn: {options.picture}")
    return 0


def spread(records: list[ImageRecord], count: int) -> list[ImageRecord]:
    """At most `count` of the records, evenly spread."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


if __name__ == "__main__":
    sys.exit(main())
