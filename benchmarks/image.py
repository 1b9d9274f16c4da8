"""One image from JPEG to detections: windows, maps, pooling, fc6, fc7, SVMs, box regression and suppression.

    python benchmarks/image.py [--images 5] [--rounds 5] [--trunks alexnet zf5] [--ranks FC6 FC7] [--run DIR ...]
                               [--precisions float32 bfloat16] [--threads N] [--device cpu]

Each detector is measured in float32 and with maps, fc6 and fc7 in bfloat16; those of the trunks have random weights and
the paper's sizes (scale 688, fc6 and fc7 of 4096, 20 classes), also with fc6 and fc7 of low rank where `--ranks` names
them; `--run` adds trained ones. Images are 500 × 375 JPEGs of
VOC where SPPNET_SHARED is set, generated ones otherwise. The peer is the paper's own figure: about 0.5 s an image for
the whole system, with EdgeBoxes and a GPU of 2014. Exit status 1 where the timed run finds anything else than `detect`,
or where scores in bfloat16 are further from those in float32 than TOLERANCE.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sppnet import __version__
from sppnet.benchmark import describe, random_detector, write_picture
from sppnet.detection.detector import SPPDetector
from sppnet.detection.low_rank import compress_head
from sppnet.detection.profiling import Clock, detect_timed, profile_images
from sppnet.images import image_size, read_image
from sppnet.machine import measure_machine
from sppnet.records import Detections

PAPER = 0.5  # seconds an image
SIZE = (375, 500)
PRECISIONS = ("float32", "bfloat16")
TOLERANCE = 0.1  # of the range of the scores in float32


def voc_images(root: Path, count: int) -> list[Path]:
    """The first `count` images of SIZE below `root`, drawn evenly from all files; ends the program without any."""
    files = sorted(root.glob("VOC*/JPEGImages/*.jpg"))
    mixed = [files[index] for index in np.random.default_rng(0).permutation(len(files))]
    chosen: list[Path] = []
    for path in mixed:
        if len(chosen) == count:
            break
        if image_size(path) == SIZE:
            chosen.append(path)
    if not chosen:
        sys.exit(
            f"{root}: expected VOC*/JPEGImages/*.jpg, some of {SIZE[1]} × {SIZE[0]} pixels, found none among "
            f"{len(files)} files; correct SPPNET_SHARED, or unset it to measure generated images"
        )
    return chosen


def with_precision(detector: SPPDetector, precision: str) -> SPPDetector:
    """The same detector with maps, fc6 and fc7 computed in `precision`."""
    config = detector.config
    maps = config.maps.model_copy(update={"compute": precision})
    detect = config.detect.model_copy(update={"precision": precision})
    return replace(detector, config=config.model_copy(update={"maps": maps, "detect": detect}))


def same(a: Detections, b: Detections) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "scores", "labels"))


def score_difference(exact: SPPDetector, rounded: SPPDetector, path: Path) -> float:
    """Largest difference of the scores of an image's windows, as a share of the range of the exact ones."""
    image = read_image(path)
    windows = exact.proposer(image)
    if len(windows) == 0:
        return 0.0
    first, second = (detector.score(detector.embed(image), windows) for detector in (exact, rounded))
    return float(np.abs(first - second).max() / np.ptp(first))


def detectors(options: argparse.Namespace) -> Iterator[tuple[str, SPPDetector]]:
    for run in options.run:
        yield str(run), SPPDetector.load(run, options.device)
    for trunk in options.trunks:
        detector = random_detector(trunk)
        yield f"{trunk}, random weights", detector.to(options.device)
        if any(options.ranks):
            thin = replace(detector, head=compress_head(detector.head, *options.ranks))
            yield f"{trunk}, random weights of ranks {options.ranks[0]} and {options.ranks[1]}", thin.to(options.device)


def measure(
    name: str, detector: SPPDetector, images: list[Path], rounds: int, precisions: Sequence[str] = PRECISIONS
) -> bool:
    """Print the profiles of a detector in each precision; False where results disagree."""
    exact, agree = with_precision(detector, PRECISIONS[0]), True
    for precision in precisions:
        own = with_precision(detector, precision)
        profile = profile_images(own, images, rounds)
        equal = same(detect_timed(own, images[0], Clock(own.device)), own.detect(read_image(images[0])))
        difference = score_difference(exact, own, images[0])
        agree = agree and equal and difference <= TOLERANCE
        print(f"\n{name}: {describe(own)}")
        print("\n".join(profile.rows()))
        print(f"{profile.windows:,.0f} windows, {profile.distinct:,.0f} on different cells; ", end="")
        print(f"{profile.total / PAPER:.2f} × the paper's {PAPER} s; the timed run finds the same: {equal}; ", end="")
        print(f"scores within {100 * difference:.2f} % of float32's range")
    return agree


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trunks", nargs="*", default=["alexnet", "zf5"])
    parser.add_argument("--ranks", type=int, nargs=2, default=[0, 0], help="of fc6 and fc7; 0 leaves one whole")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=PRECISIONS,
        help="default: both",
    )
    parser.add_argument("--run", nargs="*", type=Path, default=[], help="trained runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if min(options.images, options.rounds, options.threads) < 1:
        parser.error("--images, --rounds and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    shared = os.environ.get("SPPNET_SHARED")
    with tempfile.TemporaryDirectory() as folder:
        if shared:
            images, origin = voc_images(Path(shared) / "voc/VOCdevkit", options.images), "VOC"
        else:
            images = [write_picture(Path(folder) / f"{seed}.jpg", seed) for seed in range(options.images)]
            origin = "generated"
        print("\n".join(measure_machine(torch.device(options.device), __version__).rows()))
        print(f"{len(images)} {origin} images of {SIZE[1]} × {SIZE[0]} pixels, median of {options.rounds} runs of each")
        agree = [
            measure(name, detector, images, options.rounds, options.precisions) for name, detector in detectors(options)
        ]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
