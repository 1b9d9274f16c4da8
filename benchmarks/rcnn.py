"""Detection time of one image without proposals: R-CNN beside sppnet, same backbone, windows, runtime and precision.

    python benchmarks/rcnn.py [--backbones alexnet zf5] [--runtimes torch openvino] [--precisions float32]
                              [--windows 2000] [--rcnn-windows 2000] [--rounds 5] [--ranks 128 64] [--threads N]

R-CNN warps every window to 227 × 227 pixels and runs the whole network on it; sppnet computes the maps once, at one
scale or at five. Both run their convolutions in the same runtime and fc6, fc7 in torch. Weights are random: times do
not depend on them. All run one after the other in every round; ratios are taken round by round. With SPPNET_SHARED set
the image and its windows are VOC's, generated otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import PAUSE, cores, describe, ratio
from numpy.typing import NDArray
from rcnn_peer import RCNN, Split

from examples import pictures, random_detector, windows
from sppnet.backbones.runtime import resolve_runtime
from sppnet.detection.detector import SPPDetector
from sppnet.detection.window_features import BATCH, pool_projected, project_to_maps
from sppnet.images import read_image

SCALES = {"1 scale": (688,), "5 scales": (480, 576, 688, 864, 1200)}
CLASSES = 20


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    boxes, path, origin = windows(options.windows)
    with tempfile.TemporaryDirectory() as folder:
        image = read_image(path or pictures(Path(folder), 1)[0])
    print(f"{describe()}, {options.threads} threads; {len(boxes)} windows ({origin})")
    if options.rcnn_windows < len(boxes):
        print(f"R-CNN is timed on {options.rcnn_windows} of the windows; its times are scaled up")
    print("maps: ours once a scale, R-CNN's convolutions of every warped window. windows: ours projecting and pooling,")
    print("R-CNN's warping. head: fc6, fc7 and the scores of the classes")
    for backbone in options.backbones:
        for runtime in options.runtimes:
            for precision in options.precisions:
                compare(backbone, runtime, precision, image, boxes, options)
    return 0


def compare(
    backbone: str,
    runtime: str,
    precision: str,
    image: NDArray[np.uint8],
    boxes: NDArray[np.float64],
    options: argparse.Namespace,
) -> None:
    """Print the times of all variants in one runtime and precision, and what each of ours gains."""
    ranks = dict(zip(("fc6", "fc7"), options.ranks, strict=True)) if options.ranks else None
    own = {
        f"ours, {scales}{', low rank' if rank else ''}": random_detector(
            backbone, precision, runtime, SCALES[scales], options.fc, rank, CLASSES
        )
        for scales in options.scales
        for rank in ([None, ranks] if ranks else [None])
    }
    first = next(iter(own.values()))
    peer = RCNN(first.backbone, runtime, precision, options.fc, CLASSES, options.batches)
    part = boxes[:: -(-len(boxes) // options.rcnn_windows)]
    factor = len(boxes) / len(part)
    runs: dict[str, Callable[[], Split]] = {
        "R-CNN": lambda: Split(*(factor * value for value in peer.score(image, part)[1])),
        **{name: (lambda detector=detector: score(detector, image, boxes)) for name, detector in own.items()},
    }
    found: dict[str, list[Split]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):  # the first warms up
        for name, run in runs.items():
            time.sleep(PAUSE)
            split = run()
            if number:
                found[name].append(split)
    print(f"\n{backbone}, {runtime}, {precision}; R-CNN in batches of {peer.batch}")
    print("| ms an image, medians | total | maps | windows | head | R-CNN / ours |\n|---|---|---|---|---|---|")
    slow = [split.total for split in found["R-CNN"]]
    for name, splits in found.items():
        columns = [[split.total for split in splits], *zip(*splits, strict=True)]
        cells = " | ".join(f"{1e3 * statistics.median(column):,.1f}" for column in columns)
        gain = "" if name == "R-CNN" else ratio(slow, list(columns[0]))
        print(f"| {name} | {cells} | {gain} |", flush=True)


def score(detector: SPPDetector, image: NDArray[np.uint8], boxes: NDArray[np.float64]) -> Split:
    """`embed` and `score`, as users call them. Projecting and pooling is what it takes when repeated by itself."""
    start = time.perf_counter()
    maps = detector.embed(image)
    embedded = time.perf_counter()
    detector.score(maps, boxes)
    scored = time.perf_counter()
    config = detector.config
    projected, _ = project_to_maps(maps, boxes, detector.backbone.geometry, config.pyramid, config.maps).unique()
    by_scale = np.argsort(projected.scale_index, kind="stable")
    for begin in range(0, len(by_scale), BATCH):
        pool_projected(maps, projected.rows(by_scale[begin : begin + BATCH]), config.pyramid.levels)
    pooling = min(time.perf_counter() - scored, scored - embedded)
    return Split(embedded - start, pooling, scored - embedded - pooling)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=("alexnet", "zf5"), default=["alexnet", "zf5"])
    installed = ["torch", "openvino"] if resolve_runtime("auto", "cpu") == "openvino" else ["torch"]
    parser.add_argument("--runtimes", nargs="+", choices=installed, default=installed, help="default: all installed")
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--scales", nargs="+", choices=SCALES, default=list(SCALES))
    parser.add_argument("--ranks", type=int, nargs=2, metavar=("FC6", "FC7"), help="adds heads of these ranks")
    parser.add_argument("--windows", type=int, default=2000)
    parser.add_argument("--rcnn-windows", type=int, default=2000, help="fewer: its times are scaled up")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="that R-CNN chooses from")
    parser.add_argument("--fc", type=int, default=4096, help="width of fc6 and fc7; a small one for a quick trial")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.windows, options.rcnn_windows, options.threads, *options.batches) < 1:
        parser.error("--rounds, --windows, --rcnn-windows, --batches and --threads must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
