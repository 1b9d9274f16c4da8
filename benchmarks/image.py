"""One image from JPEG to detections, and where the time goes; the peer is the paper's own figure of 0.5 s.

    python benchmarks/image.py [--backbones alexnet zf5] [--ranks FC6 FC7] [--precisions float32 bfloat16]
                               [--runtimes auto torch] [--run DIR ...] [--images 5] [--rounds 5] [--threads N]

The paper's 0.5 s are for the whole system, with EdgeBoxes and a GPU of 2014. Detectors of the backbones have random
weights and the paper's sizes (scale 688, fc6 and fc7 of 4096, 20 classes), with `--ranks` of low rank; `--run` adds
trained ones. `detect` is timed whole; its steps are timed one by one in the same round. Images are 500 × 375 JPEGs of
VOC where SPPNET_SHARED is set, generated ones otherwise. Exit status 1 where the steps and `detect` find other things.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from machine import PAUSE, cores, describe, ratio, seconds

from examples import SIZE, pictures, random_detector, shared
from sppnet.detection.detector import SPPDetector
from sppnet.detection.window_features import WindowScores, project_to_maps
from sppnet.images import read_image
from sppnet.records import Detections

PAPER = 0.5  # s an image, sec. 4.3
Result = TypeVar("Result")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    agree = True
    with tempfile.TemporaryDirectory() as folder:
        images = pictures(Path(folder), options.images)
        origin = "VOC" if shared("voc") else "generated"
        print(f"{describe(options.device)}; {len(images)} {origin} images of {SIZE[1]} × {SIZE[0]} pixels", end="; ")
        print(f"medians of {options.rounds} rounds, {options.threads} threads")
        for name, detector in detectors(options):
            print(f"\n{name}")
            agree &= measure(detector, images, options.rounds)
    return 0 if agree else 1


def detectors(options: argparse.Namespace) -> Iterator[tuple[str, SPPDetector]]:
    """Each with its name, on the device."""
    for run in options.run:
        yield str(run), SPPDetector.load(run, options.device)
    ranks = dict(zip(("fc6", "fc7"), options.ranks, strict=True)) if options.ranks else None
    for backbone in options.backbones:
        for runtime in options.runtimes:
            for precision in options.precisions:
                for own in (None, ranks) if ranks else (None,):
                    rank = f", ranks {own['fc6']} and {own['fc7']}" if own else ""
                    detector = random_detector(backbone, precision, runtime, width=options.fc, ranks=own)
                    name = f"{backbone}, random weights, {precision}, runtime {runtime}{rank}"
                    yield name, detector.to(options.device)


def measure(detector: SPPDetector, images: list[Path], rounds: int) -> bool:
    """Print where the time goes; False where the steps and the whole disagree."""
    steps: dict[str, list[float]] = defaultdict(list)
    whole: list[float] = []
    same = True
    for path in images:
        for number in range(rounds + 1):  # the first warms up
            expected, total = timed(detector, lambda: whole_image(detector, path))  # noqa: B023 - called at once
            time.sleep(PAUSE)
            found, times = detect_by_steps(detector, path)
            time.sleep(PAUSE)
            same &= all(np.array_equal(getattr(found, n), getattr(expected, n)) for n in ("boxes", "scores", "labels"))
            if number:
                whole.append(total)
                for step, own in times.items():
                    steps[step].append(own)
    medians = {step: statistics.median(own) for step, own in steps.items()}
    for step, own in medians.items():
        print(f"  {step:<32}{1e3 * own:9.1f} ms {100 * own / sum(medians.values()):5.1f} %")
    print(f"  {'file to detections':<32}{1e3 * statistics.median(whole):9.1f} ms", end="; ")
    print(f"ratio to the paper's {PAPER} s {ratio(whole, [PAPER] * len(whole))}; the steps find the same: {same}")
    return same


def whole_image(detector: SPPDetector, path: Path) -> Detections:
    """Everything above detect.score_threshold, from the file on."""
    image = read_image(path)
    return detector.detect_for_evaluation(image, detector.proposer(image))[0]


def detect_by_steps(detector: SPPDetector, path: Path) -> tuple[Detections, dict[str, float]]:
    """The same, and the seconds of each public step."""
    image, read = timed(detector, lambda: read_image(path))
    windows, search = timed(detector, lambda: detector.proposer(image))
    maps, embed = timed(detector, lambda: detector.embed(image))
    scores, score = timed(detector, lambda: detector.score(maps, windows))
    config = detector.config
    projected = project_to_maps(maps, windows, detector.backbone.geometry, config.pyramid, config.maps)
    scored, own = WindowScores(scores, maps, projected), config.detect
    limits = scores > own.score_threshold, own.nms_overlap, own.max_per_class
    (found, _), select = timed(detector, lambda: detector.select(windows, scored, *limits))
    return found, {
        "read_image": read,
        "proposer: candidate windows": search,
        "embed: maps": embed,
        "score: pooling, fc6, fc7, SVMs": score,
        "select: suppression, regression": select,
    }


def timed(detector: SPPDetector, function: Callable[[], Result]) -> tuple[Result, float]:
    """The result of a call and its seconds."""
    results: list[Result] = []
    spent = seconds(lambda: results.append(function()), detector.device)
    return results[0], spent


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="*", default=["alexnet", "zf5", "mobilenet_v2"])
    parser.add_argument("--ranks", type=int, nargs=2, metavar=("FC6", "FC7"), help="adds heads of these ranks")
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--runtimes", nargs="+", choices=("auto", "torch", "openvino"), default=["auto"])
    parser.add_argument("--run", nargs="*", type=Path, default=[], help="trained runs")
    parser.add_argument("--fc", type=int, default=4096, help="width of fc6 and fc7; a small one for a quick trial")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores(), help="of torch (default: all cores)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if min(options.images, options.rounds, options.threads) < 1:
        parser.error("--images, --rounds and --threads must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
