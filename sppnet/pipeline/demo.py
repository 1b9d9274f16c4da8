"""The demonstration: generate pictures, train on them, evaluate, detect; minutes on two cores, no download."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import torch

from sppnet.config import Config
from sppnet.config_files import parse_config
from sppnet.data.shapes import generate_shapes
from sppnet.detection.detector import SPPDetector
from sppnet.pipeline.evaluation import evaluate_run
from sppnet.pipeline.prediction import detect_files
from sppnet.pipeline.training import train_detector

log = logging.getLogger("sppnet")

# What differs from the paper's settings, to fit in minutes on two cores.
SETTINGS = {
    "name": "demo",
    "data": {"train": ["SHAPES/train"], "val": ["SHAPES/val"], "test": ["SHAPES/test"]},
    "proposals": {"max_windows": 500},
    "backbone": {"name": "tiny5", "weights": {"source": "random"}},
    "maps": {"scales": [320]},
    "head": {"fc6": 256, "fc7": 256},
    "pretrain": {"enabled": True},
    "finetune": {
        "steps": [1500, 500],
        "learning_rates": [1e-2, 1e-3],
        "images_per_batch": 16,
        "validate_every": 250,
    },
    "svm": {"tolerance": 0.01},
    "detect": {"score_threshold": -3},
}


def demo_config(data: Path) -> Config:
    """The settings of the demonstration on the generated data set in `data`."""
    return parse_config({**SETTINGS, "data": {**SETTINGS["data"], "root": str(data)}}, "demo")  # type: ignore[dict-item]


def run_demo(run: Path, device: torch.device | str = "cpu") -> list[str]:
    """Everything under `run`; returns the lines to print at the end. A second call reuses what is there."""
    start = time.monotonic()
    devkit = generate_shapes(run / "data")
    config = demo_config(devkit)
    train_detector(config, run, device)
    output = evaluate_run(run, device)
    assert output.result.evaluation is not None  # generated images are annotated
    pictures = sorted((devkit / "SHAPES" / "JPEGImages").glob("test*"))[:12]
    detect_files(partial(SPPDetector.load, run, device), pictures, run / "pictures", threshold=0.0)
    return [
        output.result.evaluation.table(),
        f"mAP {output.result.evaluation.map:.3f} on {len(output.result.detections)} held-out images",
        f"curves and examples: {output.folder}",
        f"pictures with detections: {run / 'pictures'}",
        f"in {(time.monotonic() - start) / 60:.1f} minutes",
    ]
