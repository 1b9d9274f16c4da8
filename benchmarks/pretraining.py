"""What a detector gains from pre-training (sec. 4.3): mAP on generated shapes by what its network learnt before.

    python benchmarks/pretraining.py OUT [--folder FOLDER] [--rows NAME …] [--columns NAME …]
                                     [--seeds 0 1 2] [--images TRAIN VAL TEST] [--epochs N] [--set KEY=VALUE …]

Rows: random weights; a classifier of crops of the detector's own objects; one of other labels (two of the five classes,
the others are background; what is an object and what is not); one of other sizes (a shorter side of 160, crops of 64
pixels alone); and, with --folder, one of a folder of pictures for each class. Columns: the classifier's validation
error; mAP of SVMs on the layers pool, fc6 and fc7 before fine-tuning, and on fc6 and fc7 after it. The settings are
those of `sppnet demo`; --set changes the detector's. Several seeds give mean ± deviation: a difference below the
deviations is noise. Everything lies in OUT, and an interrupted measurement goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import describe, in_words

from sppnet.artifacts import write_tensors
from sppnet.backbones.backbone import build_backbone
from sppnet.classification.classifier import WEIGHTS
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.training import HISTORY, train_classifier
from sppnet.commands import DEMO, DEMO_CLASSIFIER
from sppnet.config import Config
from sppnet.config_files import load_settings, parse_settings
from sppnet.data.crops import write_crops
from sppnet.data.shapes import DEFAULT_IMAGES, generate_shapes
from sppnet.data.splits import load_splits
from sppnet.pipeline.evaluation import evaluate_run
from sppnet.pipeline.training import train_detector
from sppnet.records import ImageRecord

SHAPES = ("cross", "disc", "square", "star", "triangle")
COLUMNS = {
    "pool": ("pool", False),
    "fc6": ("fc6", False),
    "fc7": ("fc7", False),
    "fine-tuned fc6": ("fc6", True),
    "fine-tuned fc7": ("fc7", True),
}  # svm.layer, svm.finetuned


@dataclass(frozen=True)
class Start:
    """What a classifier learns before: the label of every class it knows, and its sizes."""

    labels: dict[str, str]
    min_side: int
    sizes: tuple[int, ...]


DEMO_TRAINING = DEMO_CLASSIFIER["training"]
SAME = Start({name: name for name in SHAPES}, DEMO_TRAINING["min_side"], tuple(DEMO_TRAINING["sizes"]))
ROWS: dict[str, Start | None] = {
    "random weights": None,
    "the same classes": SAME,
    "two of the classes": replace(SAME, labels={name: name for name in SHAPES[:2]}),
    "object or background": replace(SAME, labels=dict.fromkeys(SHAPES, "object")),
    "shorter side 160": replace(SAME, min_side=160),
    "crops of 64 pixels": replace(SAME, sizes=(64,)),
}
FOLDER = "pictures of --folder"


@in_words
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.getLogger("sppnet").setLevel(logging.WARNING)
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Print the table, row by row."""
    images = dict(zip(DEFAULT_IMAGES, options.images, strict=True))
    devkit = generate_shapes(options.out / "data", images)
    splits = {name: [f"SHAPES/{name}"] for name in images}
    config = load_settings(Config, "", options.overrides, DEMO | {"data": {"root": str(devkit), **splits}})
    records, _ = load_splits(devkit, splits["train"])
    print(f"{describe()}; shapes: {images}; seeds {options.seeds}")
    print(
        f"| learnt before | error | {' | '.join(options.columns)} |\n|---|---|{'---|' * len(options.columns)}",
        flush=True,
    )
    for name in options.rows:
        found = []
        for seed in options.seeds:
            run = options.out / f"{name.replace(' ', '-')}-{seed}"
            error, start = start_of(name, run, config, records, options, seed)
            found.append([error, *detector_maps(start, options, seed)])
        cells = [spread_of(each) for each in zip(*found, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def start_of(
    name: str, run: Path, config: Config, records: Sequence[ImageRecord], options: argparse.Namespace, seed: int
) -> tuple[float | None, Config]:
    """The validation error of a row's classifier, none for random weights, and the detector that starts from it."""
    start, weights = ROWS.get(name), run / WEIGHTS
    random = config.backbone.without_weights()
    if name in ROWS and start is None:
        write_tensors(weights, build_backbone(random, seed).state_dict())
        return None, changed(config, backbone={"weights": {"source": "file", "file": weights}})
    start = start or SAME
    pictures = options.folder if name == FOLDER else crops_of(start, records, options.out / "crops")
    training = DEMO_TRAINING | {"min_side": start.min_side, "sizes": start.sizes, "seed": seed}
    values: dict[str, Any] = {
        "precision": config.precision,
        "data": {"train": pictures, "seed": seed},
        "backbone": random,
        "pyramid": config.pyramid,
        "head": config.head.model_copy(update={"dropout": DEMO_CLASSIFIER["head"]["dropout"]}),
        "training": training | {"epochs": options.epochs or training["epochs"]},
    }
    train_classifier(parse_settings(ClassifierConfig, values, name), run, torch.device("cpu"), progress=False)
    *_, last = csv.DictReader((run / HISTORY).read_text().splitlines())
    head = {"init": "checkpoint", "checkpoint": weights}
    file = {"weights": {"source": "file", "file": weights}}
    return float(last["top1_error"]), changed(config, backbone=file, head=head)


def crops_of(start: Start, records: Sequence[ImageRecord], folder: Path) -> Path:
    """Crops of the objects that a row knows, under the labels it gives them."""
    labelled = []
    for record in records:
        if record.annotation is not None:
            known = record.annotation.of(tuple(start.labels))
            own = replace(known, names=tuple(start.labels[name] for name in known.names))
            labelled.append(replace(record, annotation=own))
    return write_crops(labelled, sorted({*start.labels.values()}), folder, start.min_side)


def detector_maps(config: Config, options: argparse.Namespace, seed: int) -> list[float]:
    """mAP on the test images for each column; maps, windows and the fine-tuned head are made once."""
    found, root = [], options.out / "detectors"
    for layer, finetuned in map(COLUMNS.__getitem__, options.columns):
        svm = {"layer": layer, "finetuned": finetuned}
        own = changed(config, svm=svm, finetune={"seed": seed})
        train_detector(own, root, progress=False)
        evaluation = evaluate_run(root).result.evaluation
        assert evaluation is not None  # generated images are annotated
        found.append(evaluation.map)
    return found


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with some settings of some sections replaced, checked."""
    values = config.model_dump()
    for name, own in sections.items():
        values[name] |= own
    return parse_settings(Config, values, "pretraining")


def spread_of(values: Sequence[float | None]) -> str:
    """Per cent; mean ± standard deviation of several."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{deviation}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, help="pictures for each class, e.g. caltech20")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, FOLDER], metavar="NAME", help="default all")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=[*COLUMNS], metavar="NAME", help="default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", nargs=3, type=int, default=[*DEFAULT_IMAGES.values()], metavar="N")
    parser.add_argument("--epochs", type=int, help="of the classifiers; default those of sppnet demo")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    options.rows = options.rows or [*ROWS, *([FOLDER] if options.folder else [])]
    if FOLDER in options.rows and not options.folder:
        parser.error(f"the row '{FOLDER}' needs --folder")
    return options


if __name__ == "__main__":
    sys.exit(main())
