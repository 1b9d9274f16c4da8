"""Detect over a split, image by image, and write the devkit's files; evaluation is resumable (sec. 4.1)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from sppnet import distributed
from sppnet.data.voc import restrict, write_comp4
from sppnet.detection.detector import SPPDetector
from sppnet.detection.plan import load_test_data, windows_folder
from sppnet.detection.proposals import propose_images, read_windows
from sppnet.evaluation.proposals import ProposalQuality, proposal_recall
from sppnet.evaluation.voc import VOCEvaluation, evaluate_voc
from sppnet.images import read_image
from sppnet.records import Annotation, Detections, ImageRecord
from sppnet.report.contact_sheet import Picture, contact_sheet
from sppnet.report.curves import draw_precision_recall
from sppnet.report.drawing import save_image
from sppnet.store import digest_of, read_arrays, write_arrays, write_json

log = logging.getLogger("sppnet")

SHOWN_SCORE = 0.0  # the SVM's own boundary


@dataclass(frozen=True)
class TestResult:
    """Detections of every image of a split; their evaluation and the quality of the windows where annotated."""

    detections: Mapping[str, Detections]
    evaluation: VOCEvaluation | None
    proposals: ProposalQuality | None
    seconds_per_image: float | None  # of the images detected now, without proposals; None if all were reused


def test_detector(
    detector: SPPDetector, records: Sequence[ImageRecord], windows_folder: Path, work: Path, progress: bool = True
) -> TestResult:
    """Detect in every record, with windows from `windows_folder` (made where missing); evaluate what is annotated.

    Detections of each image are kept under `work`, in a folder named by the detector's content, so an interrupted test
    goes on. Under torchrun every process does its share of the images.
    """
    propose_images(records, detector.config.proposals, windows_folder, progress)
    folder = work / f"detections-{digest_of(detector.digest(), windows_folder.name)}"
    own = [r for r in distributed.shard(records) if not _path(folder, r).exists()]
    start = time.monotonic()
    disable = None if progress and distributed.is_main() else True
    for record in tqdm(own, desc="detect", unit="image", disable=disable):
        found = detector.detect(read_image(record.path), read_windows(windows_folder, record))
        write_arrays(_path(folder, record), boxes=found.boxes, scores=found.scores, labels=found.labels)
    seconds = (time.monotonic() - start) / len(own) if own else None
    distributed.barrier()
    detections = {r.id: _read(_path(folder, r), detector.classes) for r in records}
    evaluation, quality = _evaluate(detector, records, detections, windows_folder)
    return TestResult(detections, evaluation, quality, seconds)


@dataclass(frozen=True)
class TestOutput:
    """A tested split and the folder that holds its files."""

    result: TestResult
    folder: Path


def test_run(
    detector: SPPDetector,
    run: Path,
    data: Path | None = None,
    splits: tuple[str, ...] = (),
    metric: Literal["11point", "area"] | None = None,
    evaluate: bool = True,
) -> TestOutput:
    """Test a run on its own test images or on any devkit-shaped folder; files go to run/results/<splits>/.

    comp4 files always; with `evaluate` and annotations also metrics.json, the curves and a sheet of examples.
    """
    config = detector.config
    if metric is not None:
        config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metric": metric})})
        detector = replace(detector, config=config)
    records, skips = load_test_data(config, data, splits)
    for reason, count in skips.counts.items():
        log.info("%d × %s", count, reason)
    result = test_detector(detector, records, windows_folder(run, config.proposals), run)
    if not evaluate:
        result = replace(result, evaluation=None)
    folder = run / "results" / _results_name(splits or config.data.test)
    if distributed.is_main():
        _write_files(result, records, folder)
    return TestOutput(result, folder)


def _results_name(splits: tuple[str, ...]) -> str:
    return "+".join(split.replace("/", "-") for split in splits) or "held-out"


def _write_files(result: TestResult, records: Sequence[ImageRecord], folder: Path) -> None:
    classes = next(iter(result.detections.values())).classes
    image_set = folder.name.split("+")[0].split("-", 1)[-1]
    write_comp4(folder, image_set, result.detections, classes)
    if result.evaluation is None:
        return
    values = result.evaluation.to_dict()
    if result.proposals is not None:
        values["proposals"] = {
            "recall": result.proposals.recall,
            "mean_best_overlap": result.proposals.mean_best_overlap,
            "windows": result.proposals.mean_windows,
        }
    write_json(
        folder / "metrics.json", {**values, "images": len(records), "seconds_per_image": result.seconds_per_image}
    )
    curves = {
        name: {k: getattr(c, k).tolist() for k in ("recall", "precision", "scores")}
        for name, c in result.evaluation.curves.items()
    }
    write_json(folder / "curves.json", curves)
    save_image(draw_precision_recall(result.evaluation), folder / "precision_recall.png")
    shown = [records[i * len(records) // min(12, len(records))] for i in range(min(12, len(records)))]
    pictures = [Picture(read_image(r.path), result.detections[r.id], r.id) for r in shown]
    save_image(contact_sheet(pictures, SHOWN_SCORE), folder / "examples.jpg")


def _evaluate(
    detector: SPPDetector, records: Sequence[ImageRecord], detections: Mapping[str, Detections], windows_folder: Path
) -> tuple[VOCEvaluation | None, ProposalQuality | None]:
    known = restrict([r for r in records if r.annotation is not None], detector.classes)
    annotations: dict[str, Annotation] = {r.id: r.annotation for r in known if r.annotation is not None}
    if not annotations:
        log.info("none of the %d images is annotated: detections are written, but not evaluated", len(records))
        return None, None
    settings = detector.config.evaluate
    evaluation = evaluate_voc(
        {image: detections[image] for image in annotations},
        annotations,
        detector.classes,
        settings.metric,
        settings.iou,
        settings.use_difficult,
    )
    return evaluation, proposal_recall({r.id: read_windows(windows_folder, r) for r in known}, annotations)


def _path(folder: Path, record: ImageRecord) -> Path:
    return folder / f"{record.id}-{record.digest}.npz"


def _read(path: Path, classes: tuple[str, ...]) -> Detections:
    arrays = read_arrays(path)
    return Detections(arrays["boxes"], arrays["scores"], arrays["labels"].astype(np.int64), classes)
