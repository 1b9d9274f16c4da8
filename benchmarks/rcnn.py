"""Detection time of one image without proposals: R-CNN against sppnet, on the same trunk and windows.

    python benchmarks/rcnn.py [--trunks alexnet zf5] [--scales 1|5|both] [--rounds 5] [--windows 2000]
                              [--rcnn-windows 2000] [--ranks 128 64] [--precisions float32] [--threads N]

R-CNN warps every window to 227 × 227 pixels and runs the whole network on it; sppnet computes the maps once. Weights
are random: times do not depend on them. All variants run one after the other in every round, so that a busy machine
slows all of them; ratios are taken pair by pair. R-CNN runs in the fastest layout that a sweep finds first; in float32
twice, with torch's convolutions and with those of network/winograd.py, which are part of what makes sppnet fast.
Reduced variants must agree with the float32 ones. With SPPNET_SHARED set the image and its windows are VOC's, random
ones otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from rcnn_peer import RCNN, Split, fastest_layout, fully_connected

from sppnet.config_files import parse_config
from sppnet.detection import detector as detector_module
from sppnet.detection import window_features
from sppnet.detection.detector import SPPDetector
from sppnet.detection.linear_svm import LinearDetectors
from sppnet.detection.low_rank import compress_head
from sppnet.detection.proposals import FixedWindows
from sppnet.detection.window_features import WindowCells
from sppnet.images import image_size, read_image
from sppnet.network.sppnet import build_head
from sppnet.network.trunks import build_trunk

SCALES = {"1": (688,), "5": (480, 576, 688, 864, 1200)}
CLASSES, FC, PROPOSALS = 20, 4096, 2000
TILES = ", our convolutions"  # in the name of a variant of R-CNN
SWEPT = 128  # windows on which R-CNN's layouts are tried
TOLERANCE = 0.03  # of reduced against float32 scores, as a share of the range of the scores
# The calls of ours that count as windows; the rest of `score` is the head.
WINDOW_CALLS = ((detector_module, "window_cells"), (WindowCells, "merged"), (window_features, "pool_windows_by_bin"))


@dataclass(frozen=True)
class Example:
    image: NDArray[np.uint8]
    windows: NDArray[np.float64]
    origin: str


@dataclass(frozen=True)
class Variant:
    """`run` gives the scores and their times; the scores must agree with those of the variant `like`."""

    name: str
    run: Callable[[], tuple[NDArray[np.float32], Split]]
    like: str | None = None


# ---- the image and its windows -------------------------------------------------------------------------------------


def example(count: int) -> Example:
    """A 375 × 500 image with `count` of its 2,000 windows, spread over them."""
    folder = os.environ.get("SPPNET_SHARED")
    found = _voc_example(Path(folder) / "voc") if folder else None
    found = found or _random_example()
    return replace(found, windows=spread(found.windows, count))


def spread(rows: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """At most `count` of the rows, at even distances."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.int64)]


def _voc_example(voc: Path) -> Example | None:
    windows = voc / "proposals/selective_search_fast_VOC2007.npz"
    if not windows.is_file():
        sys.exit(f"{windows}: no such file; correct SPPNET_SHARED, or unset it to measure random boxes")
    with np.load(windows, allow_pickle=False) as file:
        ids, offsets, boxes = file["ids"], file["offsets"], file["boxes"]
    for index in np.flatnonzero(np.diff(offsets) >= PROPOSALS):
        path = voc / f"VOCdevkit/VOC2007/JPEGImages/{ids[index]}.jpg"
        if path.is_file() and image_size(path) == (375, 500):
            own = boxes[offsets[index] : offsets[index + 1]][:PROPOSALS].astype(np.float64)
            return Example(read_image(path), own, f"selective search of VOC2007/{ids[index]}")
    return None


def _random_example() -> Example:
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(20), np.log(375), (PROPOSALS, 2)))
    corners = rng.uniform(0, 1, (PROPOSALS, 2)) * (np.array([500, 375]) - sides)
    image = rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)
    return Example(image, np.concatenate([corners, corners + sides], axis=1), "random boxes")


# ---- ours ----------------------------------------------------------------------------------------------------------


def random_detector(trunk_name: str, width: int = FC, classes: int = CLASSES) -> SPPDetector:
    """A detector in memory with random weights: levels (1, 2, 3, 6), fc7 features."""
    settings = {"trunk": {"name": trunk_name, "weights": {"source": "random"}}, "head": {"fc6": width, "fc7": width}}
    config = parse_config(settings, "benchmark")
    trunk = build_trunk(config.trunk)
    head = build_head(trunk.channels, config.pyramid.levels, classes + 1, config.head)
    weight = 0.01 * torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    linear = LinearDetectors(weight, torch.zeros(classes), 1.0, tuple(f"class {k}" for k in range(classes)))
    return SPPDetector(trunk, head, linear, None, FixedWindows(np.zeros((0, 4))), config)


def with_settings(detector: SPPDetector, scales: tuple[int, ...], precision: str) -> SPPDetector:
    """The same weights at other scales and in another precision, of convolutions and head."""
    config = detector.config
    maps = config.maps.model_copy(update={"scales": scales, "compute": precision})
    detect = config.detect.model_copy(update={"precision": precision})
    return replace(detector, config=config.model_copy(update={"maps": maps, "detect": detect}))


def score_image(
    detector: SPPDetector, image: NDArray[np.uint8], windows: NDArray[np.float64]
) -> tuple[NDArray[np.float32], Split]:
    """`embed` and `score`, as users call them; what they spend on windows is found by watching those calls."""
    spent: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        for owner, name in WINDOW_CALLS:
            stack.enter_context(mock.patch.object(owner, name, _watched(getattr(owner, name), name, spent)))
        start = time.perf_counter()
        maps = detector.embed(image)
        middle = time.perf_counter()
        scores = detector.score(maps, windows)
        end = time.perf_counter()
    missing = [name for _, name in WINDOW_CALLS if name not in spent]
    if missing:
        raise RuntimeError(f"scoring made no call to {missing[0]}; name in WINDOW_CALLS what projects and pools now")
    pooling = sum(spent.values())
    return scores, Split(middle - start, pooling, end - middle - pooling)


def _watched(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """The function, adding the seconds of every call to `spent`."""

    @functools.wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    return timed


# ---- measuring -----------------------------------------------------------------------------------------------------


def variants_of(trunk: str, what: Example, options: argparse.Namespace) -> tuple[list[Variant], list[tuple[str, str]]]:
    """What is measured, and the pairs (slower, faster) whose ratios are wanted."""
    detector = random_detector(trunk, options.fc)
    rcnn_windows = spread(what.windows, options.rcnn_windows)
    factor = len(what.windows) / len(rcnn_windows)
    variants = []
    peers = [(name, tiles) for name in options.precisions for tiles in (False, True) if name == "float32" or not tiles]
    for name, tiles in peers:
        dtype, title = getattr(torch, name), f"R-CNN {name}{TILES * tiles}"
        layout, report = fastest_layout(detector.trunk, dtype, min(SWEPT, len(rcnn_windows)), tiles)
        print(f"{title}: {report}", flush=True)
        torch.manual_seed(0)
        last = fully_connected(detector.trunk.channels, options.fc, CLASSES)
        peer = RCNN(detector.trunk, last, dtype, layout, options.threads)
        run = functools.partial(_scaled, functools.partial(peer.score, what.image, rcnn_windows), factor)
        variants.append(Variant(title, run, None if title == "R-CNN float32" else "R-CNN float32"))

    # variants of ours: (name, detector, precision, the variant whose scores it must give, or None)
    ours: list[tuple[str, SPPDetector, str, str | None]] = [
        ("ours float32", detector, "float32", None),
        ("ours reduced", detector, "bfloat16", "ours float32"),
    ]
    if any(options.ranks):
        thin = replace(detector, head=compress_head(detector.head, *options.ranks))
        ours.append(("ours thin float32", thin, "float32", None))
        ours.append(("ours thin reduced", thin, "bfloat16", "ours thin float32"))
    ours = [own for own in ours if own[2] in options.precisions]

    pairs = []
    for scales in SCALES if options.scales == "both" else [options.scales]:
        for name, own, precision, like in ours:
            run = functools.partial(
                score_image, with_settings(own, SCALES[scales], precision), what.image, what.windows
            )
            suffix = f", {scales} scale{'s' * (scales != '1')}"
            variants.append(Variant(name + suffix, run, like and like + suffix))
            slower = [f"R-CNN {kind}{TILES * tiles}" for kind, tiles in peers if kind in ("float32", precision)]
            pairs += [(peer, name + suffix) for peer in slower]
    return variants, pairs


def _scaled(run: Callable[[], tuple[NDArray[np.float32], Split]], factor: float) -> tuple[NDArray[np.float32], Split]:
    scores, split = run()
    return scores, Split(*(factor * seconds for seconds in split))


def difference(scores: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference as a share of the range of the expected scores; NaN where any score is NaN."""
    return float(np.abs(scores - expected).max() / np.ptp(expected))


def check(variants: Sequence[Variant]) -> bool:
    """Run everything once, which also warms up, and compare the scores."""
    scores = {variant.name: variant.run()[0] for variant in variants}
    agree = True
    for variant in variants:
        if variant.like is not None:
            found = difference(scores[variant.name], scores[variant.like])
            agree &= (fine := found <= TOLERANCE)
            verdict = f"{'agree' if fine else 'DISAGREE'}, largest difference {found:.2%} of their range"
            print(f"scores of {variant.name} and {variant.like}: {verdict}")
    print(f"(tolerance {TOLERANCE:.0%})")
    return agree


def measure(variants: Sequence[Variant], rounds: int) -> dict[str, list[Split]]:
    splits: dict[str, list[Split]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            time.sleep(0.05)  # OpenMP's threads spin for a while after the previous call and would take a core
            splits[variant.name].append(variant.run()[1])
    return splits


def print_table(splits: dict[str, list[Split]], pairs: Sequence[tuple[str, str]]) -> None:
    def milliseconds(values: Sequence[float]) -> str:
        return f"{1e3 * statistics.median(values):10.1f}"

    print(f"\n{'ms an image, medians':<34}{'total':>10}{'maps':>10}{'windows':>10}{'head':>10}   total from to")
    for name, rounds in splits.items():
        totals = [split.total for split in rounds]
        columns = [totals, *(list(part) for part in zip(*rounds, strict=True))]
        span = f"{1e3 * min(totals):.1f} {1e3 * max(totals):.1f}"
        print(f"{name:<34}{''.join(milliseconds(column) for column in columns)}   {span}")
    print(f"\n{'times faster, pair by pair':<72}{'median':>8}   from to")
    for slow, fast in pairs:
        ratios = sorted(a.total / b.total for a, b in zip(splits[slow], splits[fast], strict=True))
        print(f"{f'{fast} than {slow}':<72}{statistics.median(ratios):8.1f}   {ratios[0]:.1f} {ratios[-1]:.1f}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunks", nargs="+", choices=("alexnet", "zf5"), default=["alexnet", "zf5"])
    parser.add_argument("--scales", choices=(*SCALES, "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=PROPOSALS)
    parser.add_argument("--rcnn-windows", type=int, default=PROPOSALS, help="fewer: its times are scaled up")
    parser.add_argument("--ranks", type=int, nargs=2, default=[128, 64], help="of compressed fc6, fc7; 0 0: none")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32", "bfloat16"],
        help="float32 alone where the processor has no bfloat16",
    )
    parser.add_argument("--fc", type=int, default=FC, help="width of fc6 and fc7; a small one for a quick trial")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.windows, options.rcnn_windows, options.threads) < 1:
        parser.error("--rounds, --windows, --rcnn-windows and --threads must be at least 1")
    if "float32" not in options.precisions:
        parser.error("--precisions must name float32, with which the others are compared")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    what = example(options.windows)
    agree = True
    for trunk in options.trunks:
        print(f"\n==== {trunk}: {len(what.windows)} windows ({what.origin}), {options.threads} threads", flush=True)
        variants, pairs = variants_of(trunk, what, options)
        agree &= check(variants)
        print_table(measure(variants, options.rounds), pairs)
        if options.rcnn_windows < len(what.windows):
            print(f"R-CNN was timed on {options.rcnn_windows} of the windows; its times are scaled up linearly")
    print("\nR-CNN does not depend on our scales. maps: ours once a scale, R-CNN's convolutions of every warped window")
    print("windows: ours projecting and pooling, R-CNN's warping; head: fc6, fc7 and the scores of the classes")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
