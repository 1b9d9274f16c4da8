"""What box voting changes: accuracy of a trained run with and without, and the time of the selection.

    python benchmarks/refine.py RUN [--data VOCdevkit] [--split VOC2007/val …] [--windows FILE.npz …] [--images N]
                                [--rounds 1] [--resamples 200]

The windows are those that `sppnet eval RUN` left, or those of files. Maps and scores of the windows of an image are
computed once; every variant selects from them (detect.vote). Columns: mAP at IoU 0.5, its mean over
0.50, 0.55 … 0.95, their differences to the selection without with the 90 % interval of a paired bootstrap over
images, and milliseconds an image of the selection alone. A gain whose interval holds 0 is noise. Nothing is written
to the run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from machine import describe, in_words
from numpy.typing import NDArray

from sppnet.data.splits import load_splits
from sppnet.detection.detector import SPPDetector
from sppnet.detection.torch_state import undisturbed
from sppnet.detection.window_features import FrozenHead, WindowScores, project_to_maps
from sppnet.errors import SppnetError
from sppnet.evaluation.voc import average_precision, evaluate_voc
from sppnet.pipeline.stages import windows_folder
from sppnet.proposals.files import match_records
from sppnet.proposals.search import read_windows
from sppnet.records import Annotation, Detections, ImageRecord, spread

VARIANTS = {
    "base": {"vote": False},
    "vote": {"vote": True},
}
OVERLAPS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
Found = Mapping[str, Detections]
Truth = Mapping[str, Annotation]


@in_words
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Print the table."""
    detector = SPPDetector.load(options.run)
    if detector.others:
        raise SppnetError(f"{options.run}: expected one detector, got a combination; name one of its runs")
    config = detector.config
    records, _ = load_splits(options.data or config.data.root, options.split or config.data.test)
    known = [r for r in records if r.annotation is not None and set(r.annotation.names) & set(detector.classes)]
    known = spread(known, options.images or len(known))
    windows = load_windows(options, detector, known)
    print(f"{describe()}; {len(known)} images, {options.resamples} resamples", flush=True)
    found, seconds = select_all(detector, known, windows, options.rounds)
    truth = {r.id: r.annotation for r in known if r.annotation is not None}
    print("| variant | mAP at 0.5 | mean of 0.50 … 0.95 | at 0.5 − base | mean − base | selection, ms an image |")
    print("|---|---|---|---|---|---|")
    draws = np.random.default_rng(0).multinomial(len(known), [1 / len(known)] * len(known), options.resamples)
    base: NDArray[np.float64] | None = None
    for name, own in found.items():
        exact = [100 * evaluate_voc(own, truth, detector.classes, iou=iou).map for iou in OVERLAPS]
        drawn = 100 * np.array([resample(own, truth, detector.classes, iou, draws) for iou in OVERLAPS])
        base = drawn if base is None else base
        differences = [interval(drawn[0] - base[0]), interval((drawn - base).mean(axis=0))]
        cells = f"{exact[0]:.2f} | {statistics.mean(exact):.2f} | {' | '.join(differences)}"
        print(f"| {name} | {cells} | {1e3 * seconds[name] / len(known):.1f} |", flush=True)
    return 0


def load_windows(
    options: argparse.Namespace, detector: SPPDetector, records: Sequence[ImageRecord]
) -> dict[str, NDArray[np.float64]]:
    """Image id -> windows (R, 4), from the files or from what the run has searched."""
    if not options.windows:
        folder = windows_folder(options.run, detector.config)
        return {r.id: np.asarray(read_windows(folder, r), np.float64) for r in records}
    matched = match_records(records, options.windows)
    missing = [r.id for r in records if r.id not in matched]
    if missing:
        raise SppnetError(f"--windows: no windows of image {missing[0]} and {len(missing) - 1} more; name their files")
    return {image: np.asarray(own, np.float64) for image, own in matched.items()}


def select_all(
    detector: SPPDetector, records: Sequence[ImageRecord], windows: Mapping[str, NDArray[np.float64]], rounds: int
) -> tuple[dict[str, dict[str, Detections]], dict[str, float]]:
    """Variant -> the detections of every image, and the seconds that selecting took, the least of the rounds."""
    config, own = detector.config, detector.config.detect
    head = FrozenHead(detector.head, config.pyramid.levels, detector.precision)
    variants = {
        name: replace(detector, config=config.model_copy(update={"detect": own.model_copy(update=values)}))
        for name, values in VARIANTS.items()
    }
    found: dict[str, dict[str, Detections]] = {name: {} for name in variants}
    seconds = dict.fromkeys(variants, 0.0)
    for record in records:
        maps, boxes = detector.embed(record.path), windows[record.id]
        projected = project_to_maps(maps, boxes, detector.backbone.geometry, config.pyramid, config.maps)
        scored = WindowScores(detector.score(maps, boxes), maps, projected, head)
        passes = scored.scores > own.score_threshold
        times: dict[str, list[float]] = {name: [] for name in variants}
        for name in [name for _ in range(rounds) for name in variants]:
            start = time.perf_counter()
            with undisturbed():
                found[name][record.id] = variants[name].select(
                    boxes, scored, passes, own.nms_overlap, own.max_per_class
                )[0]
            times[name].append(time.perf_counter() - start)
        for name, each in times.items():
            seconds[name] += min(each)
    return found, seconds


@dataclass(frozen=True)
class Flags:
    """The detections of a class over all images, best first: (R,) image and true positive; (I,) objects an image."""

    image: NDArray[np.int64]
    true: NDArray[np.bool_]
    objects: NDArray[np.int64]

    def ap(self, counts: NDArray[np.int64]) -> float:
        """Where every image counts so many times (I,); nan without objects."""
        total = int((counts * self.objects).sum())
        weights = counts[self.image]
        true, every = (self.true * weights).cumsum(), np.maximum(weights.cumsum(), 1)
        return average_precision(true / total, true / every) if total else np.nan


def resample(
    found: Found, truth: Truth, classes: tuple[str, ...], iou: float, draws: NDArray[np.int64]
) -> NDArray[np.float64]:
    """mAP of every draw (D, I): VOC matches inside an image, so what is true stays true however often it is drawn."""
    flags = flags_by_class(found, truth, classes, iou)
    return np.array([np.nanmean([own.ap(counts) for own in flags]) for counts in draws])


def flags_by_class(found: Found, truth: Truth, classes: tuple[str, ...], iou: float) -> list[Flags]:
    each = [evaluate_voc({name: found[name]}, {name: truth[name]}, classes, iou=iou).results for name in truth]
    flags = []
    for name in classes:
        curves = [results[name].curve for results in each]
        image = np.repeat(np.arange(len(each)), [len(curve.scores) for curve in curves])
        steps = [np.diff(np.rint(c.precision * np.arange(1, len(c.precision) + 1)), prepend=0) > 0 for c in curves]
        order = np.argsort(-np.concatenate([curve.scores for curve in curves]), kind="stable")
        objects = np.array([results[name].objects for results in each])
        flags.append(Flags(image[order], np.concatenate(steps)[order], objects))
    return flags


def interval(differences: NDArray[np.float64]) -> str:
    low, middle, high = np.quantile(differences, [0.05, 0.5, 0.95])
    return f"{middle:+.2f} ({low:+.2f} – {high:+.2f})"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a training")
    parser.add_argument("--data", type=Path, help="VOCdevkit; default data.root")
    parser.add_argument("--split", nargs="+", help="default data.test")
    parser.add_argument("--windows", nargs="+", type=Path, help="files of windows; default those of the run")
    parser.add_argument("--images", type=int, help="so many, spread over the split; default all")
    parser.add_argument("--rounds", type=int, default=1, help="of every selection; the fastest counts")
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.resamples, 1 if options.images is None else options.images) < 1:
        parser.error("--rounds, --resamples and --images must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
