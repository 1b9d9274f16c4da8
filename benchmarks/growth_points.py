"""What runs in the process of one point of growth.py: `python benchmarks/growth_points.py TASK` with a task as JSON.

Prints one line of JSON: the seconds of the repeats, the memory held before them, the size that was really measured.
"""

from __future__ import annotations

import json
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from sppnet.config import Config, MapSettings, ProposalSettings, SVMSettings
from sppnet.config_files import load_config
from sppnet.detection.box_regression import BoxRegressors, fit_box_regressor
from sppnet.detection.detector import SPPDetector
from sppnet.detection.feature_maps import compute_maps
from sppnet.detection.hard_negatives import mine_detectors
from sppnet.detection.linear_svm import LinearDetectors, mean_norm_scale
from sppnet.detection.proposals import FixedWindows, Proposer, make_proposer
from sppnet.detection.training import Training
from sppnet.detection.training_windows import (
    FinetuneWindows,
    MiningWindows,
    TrainingWindows,
    find_box_examples,
    pool_box_examples,
    sample_norms,
)
from sppnet.detection.window_features import Features, window_cells
from sppnet.network.sppnet import build_head
from sppnet.network.trunks import build_trunk

BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
CLASSES = tuple(f"class {i}" for i in range(20))
Windows = NDArray[np.float32]
Prepared = tuple[Callable[[], Any], int, Callable[[Any], str]]  # the work, its real size, a remark on its result


def work(part: str, job: str, size: int, threads: int, rounds: int, **run: Any) -> dict[str, Any]:
    """Do one job; its seconds, the memory held before it, the size it really had, and a remark."""
    torch.set_num_threads(threads)
    if part == "images":
        function, size, describe = prepare_images(job, size, **run)
    else:
        function, size, describe = {"windows": prepare_windows, "side": prepare_side}[part](job, size)
    before = peak_gigabytes()
    seconds, result = repeat(function, rounds)
    return {"seconds": seconds, "before": before, "size": size, "note": describe(result)}


def repeat(function: Callable[[], Any], rounds: int) -> tuple[list[float], Any]:
    """Seconds of `rounds` calls, of three where a call takes over two seconds; and the result of the last."""
    seconds: list[float] = []
    result = None
    while len(seconds) < rounds and not (len(seconds) >= 3 and statistics.median(seconds) > 2):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return seconds, result


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES_PER_UNIT / 1e9


def picture(width: int, height: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: noise of equal contrast in every octave from 2 px up, as photographs have it."""
    rng = np.random.default_rng(0)
    image = np.full((height, width, 3), 128, np.float32)
    cell = 2
    while cell < width:
        coarse = rng.normal(0, 18, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        cell *= 2
    return np.clip(image, 0, 255).astype(np.uint8)


def random_windows(count: int, width: int, height: int) -> Windows:
    """(count, 4) distinct boxes in whole pixels, sides of 20 px and more."""
    rng = np.random.default_rng(1)
    found = np.zeros((0, 4), np.int64)
    while len(found) < count:
        corners = rng.integers(0, [width + 1, height + 1], (4 * count, 2, 2))
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2] >= 20).all(axis=1)]
        found = np.unique(np.concatenate([found, boxes]), axis=0)
    return rng.permutation(found)[:count].astype(np.float32)


def make_detector(proposer: Proposer) -> SPPDetector:
    """AlexNet's trunk, a head of 4,096, 20 classes and box regression; weights random, about half the scores kept."""
    config = Config.model_validate({"trunk": {"name": "alexnet", "weights": {"source": "random"}}})
    generator = torch.Generator().manual_seed(0)
    trunk, names = build_trunk(config.trunk), CLASSES
    head = build_head(trunk.channels, config.pyramid.levels, len(names) + 1, config.head)
    weight = torch.randn(len(names), config.head.fc7, generator=generator) * 0.02
    bias = torch.full((len(names),), config.detect.score_threshold)
    regressors = BoxRegressors(
        torch.randn(len(names), 4, head.fc6.in_features, generator=generator).double() * 1e-4,
        torch.zeros(len(names), 4).double(),
        torch.zeros(len(names), 4).double(),
        torch.eye(4).double().repeat(len(names), 1, 1) * 0.1,
        1.0,
        names,
    )
    return SPPDetector(trunk, head.eval(), LinearDetectors(weight, bias, 1.0, names), regressors, proposer, config)


def prepare_windows(job: str, size: int) -> Prepared:
    image, windows = picture(500, 375), random_windows(size, 500, 375)
    detector = make_detector(FixedWindows(windows))
    detector.detect(image, windows[:50])  # compiles, or reads what was compiled before
    maps, settings = detector.embed(image), detector.config
    where = window_cells(maps, windows, detector.trunk.geometry, settings.pyramid, settings.maps)
    distinct = len(where.merged()[0].cells)
    return lambda: detector.detect(image, windows), size, lambda found: f"{distinct:,} distinct, {len(found)} found"


def prepare_side(job: str, size: int) -> Prepared:
    width, height = size, size * 3 // 4
    image, small = picture(width, height), picture(120, 90)
    if job.startswith("search"):
        search = make_proposer(ProposalSettings(max_side=None if "full" in job else 640))
        search(small)
        return lambda: search(image), size, lambda windows: f"{len(windows):,} windows"
    detector = make_detector(make_proposer(ProposalSettings()))
    if job == "detect":
        detector.detect(small)
        return lambda: detector.detect(image), size, lambda found: f"{len(found)} found"
    settings = MapSettings(scales=(height if "own" in job else 688,))
    compute_maps(detector.trunk, small, MapSettings(scales=(90,)))
    trunk = detector.trunk
    return lambda: compute_maps(trunk, image, settings), size, lambda maps: "map {1} × {2}".format(*maps.maps[0].shape)


def prepare_images(job: str, size: int, config: str, run: str, overrides: list[str]) -> Prepared:
    """A stage on `size` training images spread over all; it reads the run's windows, maps and head, writes nothing."""
    logging.getLogger("sppnet").setLevel(logging.ERROR)
    training = Training(load_config(config, overrides), Path(run), torch.device("cpu"), progress=False)
    records, settings = training.plan.data.train, training.config
    count = min(size, len(records))
    source = replace(
        training.networks.windows(train=True), records=[records[i * len(records) // count] for i in range(count)]
    )
    objects = sum(len(source.annotation(i).boxes) for i in range(count))
    if job == "finetune-setup":
        return lambda: FinetuneWindows(source, settings.finetune.flip), count, lambda _: f"{objects:,} objects"
    layer = settings.svm.layer if job == "svm" else settings.boxes.layer
    features, width = training.networks.features(layer), training.networks.width(layer)
    if job == "svm":
        return lambda: train_svms(source, features), count, lambda fits: f"{objects:,} objects, {fits} fits"
    return lambda: fit_boxes(source, features, width), count, lambda rows: f"{rows:,} windows to train on"


def train_svms(source: TrainingWindows, features: Features) -> int:
    """The svm stage, from the scale to the last fit; the number of fits of all classes."""
    settings = source.config.svm
    norms = sample_norms(source, features, settings.norm_images, settings.norm_windows)
    scale = mean_norm_scale(norms, settings.feature_norm)
    return sum(mine_detectors(MiningWindows(source, features), source.classes, settings, scale).retrains)


def fit_boxes(source: TrainingWindows, features: Features, width: int) -> int:
    """The boxes stage, class after class, nothing kept; the number of training windows."""
    settings, size = source.config.boxes, SVMSettings()  # the release's sample, as in training
    norms = sample_norms(source, features, size.norm_images, size.norm_windows)
    scale, total = mean_norm_scale(norms, settings.feature_norm), 0
    for examples in find_box_examples(source):
        rows = pool_box_examples(source, examples, width, features)
        fit_box_regressor(rows, examples.windows, examples.boxes, settings, scale, source.device)
        total += len(rows)
    return total


if __name__ == "__main__":
    print(json.dumps(work(**json.loads(sys.argv[1]))))
