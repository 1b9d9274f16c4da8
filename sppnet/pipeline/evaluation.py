"""Detect over a split, image by image, and write the devkit's files; evaluation is resumable (sec. 4.1)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sppnet import distributed
from sppnet.artifacts import digest_of, read_arrays, read_json, write_arrays, write_json
from sppnet.backbones.backbone import build_backbone
from sppnet.config import Config
from sppnet.data.comp4 import write_comp4
from sppnet.data.selection import restrict
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.detection.feature_maps import count_cells
from sppnet.errors import BackboneError, SppnetError, counted
from sppnet.evaluation.errors import DetectionErrors, find_errors
from sppnet.evaluation.proposals import ProposalQuality, proposal_recall
from sppnet.evaluation.results import Metric, VOCEvaluation
from sppnet.evaluation.voc import evaluate_voc
from sppnet.images import read_image
from sppnet.jobs import map_in_workers
from sppnet.paths import LONGEST_NAME, fitting_name
from sppnet.pipeline.run_data import Split, load_test_data
from sppnet.pipeline.stages import windows_folder
from sppnet.proposals.search import Windows, propose_images, read_windows, unite_windows
from sppnet.records import Detections, ImageRecord, spread
from sppnet.report.drawing import Picture, contact_sheet, save_image
from sppnet.report.plots import draw_precision_recall

log = logging.getLogger("sppnet")

SHOWN_IMAGES = 12  # on the sheet of examples
FIGURES = ("metrics.json", "curves.json", "precision_recall.png", "examples.jpg")
HELD_OUT = "held-out"  # stands for a split where none is named


@dataclass(frozen=True)
class SplitResult:
    """Detections of every image of a split; evaluation, errors and the quality of the windows where annotated."""

    detections: Mapping[str, Detections]
    thresholds: tuple[float, ...]  # the lowest score that `detect` shows, by class
    evaluation: VOCEvaluation | None
    errors: DetectionErrors | None
    proposals: ProposalQuality | None
    seconds_per_image: float | None  # of those detected now, in one process, without proposals; None if none was
    origin: str  # names the detector and the windows by their content


def detect_split(
    run: Path,
    description: DetectorDescription,
    records: Sequence[ImageRecord],
    device: torch.device | str = "cpu",
    evaluate: bool = True,
    backbone: nn.Module | None = None,
) -> SplitResult:
    """Detect in every record with the detector of a run; with `evaluate`, evaluate what is annotated.

    Windows and detections of each image are kept in the run, in folders named by their content, so an interrupted
    call goes on. Images are shared by a worker process a core; under torchrun every process does its share of them.
    `description` has its settings, and those of the detectors combined with it: as saved, or changed for this call.
    """
    config = description.config
    configs = [config, *(own.config for own in description.others)]
    for own in configs:
        network = build_backbone(own.backbone.without_weights(), module=backbone if own is config else None)
        count_cells(records, network, own.maps)  # before hours of work
    windows = {windows_folder(run, own): own.proposals for own in configs}
    for place, settings in windows.items():
        propose_images(records, settings, place, imports_needed=False)  # they may be those of training
    folder = run / f"detections-{digest_of(description.digest(device), *(place.name for place in windows))}"
    missing = [replace(r, annotation=None) for r in distributed.shard(records) if not r.path_in(folder).exists()]
    make = partial(_searcher, run, config, device, tuple(windows), folder, backbone)
    workers = 0 if torch.device(device).type == "cpu" else 1
    done = map_in_workers(make, missing, "detect", "image", workers)
    seconds = sum(each for _, each in done) / len(done) if done else None
    distributed.barrier()
    detections, cut = dict[str, Detections](), list[str]()
    for record in records:
        arrays = read_arrays(record.path_in(folder))
        rows = arrays["boxes"], arrays["scores"], arrays["labels"].astype(np.int64)
        detections[record.id] = Detections(*rows, description.classes)
        if arrays.get("cut", 0):  # of how many classes detect.max_per_class left some out
            cut.append(record.id)
    if cut:
        limit, images = f"detect.max_per_class={config.detect.max_per_class}", counted(len(cut), "image")
        log.info("%s left out detections of %s, %s the first; a larger one keeps them", limit, images, cut[0])
    known = restrict([r for r in records if r.annotation is not None], description.classes)
    annotations = {r.id: r.annotation for r in known if r.annotation is not None}
    lowest = [dict(zip(own.classes, own.thresholds, strict=True)) for own in (description, *description.others)]
    thresholds = tuple(min(own[name] for own in lowest) for name in description.classes)
    evaluation = errors = quality = None
    if annotations:
        rules = (config.evaluate.metric, config.evaluate.iou, config.evaluate.use_difficult)
        found = {image: detections[image] for image in annotations}
        searched = {r.id: _read_all(windows, r) for r in known}
        quality = proposal_recall(searched, annotations)
        if evaluate:
            evaluation = evaluate_voc(found, annotations, description.classes, *rules)
            errors = find_errors(found, annotations, description.classes, searched, thresholds, *rules)
    return SplitResult(detections, thresholds, evaluation, errors, quality, seconds, folder.name)


def _read_all(windows: Iterable[Path], record: ImageRecord) -> Windows:
    return unite_windows([read_windows(folder, record) for folder in windows])


def _searcher(
    run: Path,
    config: Config,
    device: torch.device | str,
    windows: Sequence[Path],
    folder: Path,
    backbone: nn.Module | None,
) -> Callable[[ImageRecord], float]:
    """Detects in one image after the other and writes what it finds."""
    detector = replace(SPPDetector.load(run, device, backbone=backbone), config=config)

    def search(record: ImageRecord) -> float:
        start = time.monotonic()
        try:
            found, cut = detector.detect_for_evaluation(read_image(record.path), _read_all(windows, record))
        except BackboneError as error:  # an image too narrow for the network: say which
            raise BackboneError(f"{record.path}: {error}") from None
        write_arrays(
            record.path_in(folder), boxes=found.boxes, scores=found.scores, labels=found.labels, cut=np.array(len(cut))
        )
        return time.monotonic() - start

    return search


@dataclass(frozen=True)
class RunEvaluation:
    """A tested split and the folder that holds its files."""

    result: SplitResult
    folder: Path


def evaluate_run(
    run: str | Path,
    device: torch.device | str = "cpu",
    data: str | Path | None = None,
    splits: str | Sequence[str] = (),
    metric: Metric | None = None,
    evaluate: bool = True,
    backbone: nn.Module | None = None,
) -> RunEvaluation:
    """Detect on a run's own test images or on those of another folder; files go to run/results/<splits>/.

    comp4 files always; with `evaluate` and annotations also metrics.json, the curves and a sheet of examples.
    `backbone`: the network that it was trained with, where that was given in Python.
    """
    run, data = Path(run), None if data is None else Path(data)
    splits = (splits,) if isinstance(splits, str) else splits
    # Loaded whole: a damaged one is refused before windows are searched.
    SPPDetector.load(run, backbone=backbone)
    description = DetectorDescription.read(run)
    config, classes = description.config, description.classes
    if metric is not None:
        config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metric": metric})})
    place = (data or config.data.root).resolve()
    other = place != config.data.root.resolve()
    others = tuple(replace(own, config=drop_imports(own.config, place)) for own in description.others)
    description = replace(description, config=drop_imports(config, place), others=others)
    found = load_test_data(config, data, splits, Split.read(description.folder))
    records, names = found.records, found.splits or (HELD_OUT,)
    _check_comp4_names(names, classes)
    for line in found.skips.lines():
        log.info("%s", line)
    for reason, images in found.skips.images.items():
        log.debug("%d × %s: %s", len(images), reason, ", ".join(dict.fromkeys(images)))
    if evaluate and all(record.annotation is None for record in records):
        raise SppnetError(
            f"no image has an annotation, e.g. {records[0].id}; add annotations, or take `sppnet test`, which detects "
            "alone"
        )
    result = detect_split(run, description, records, device, evaluate, backbone)
    folder = _results_folder(run, data if other else None, names)
    if distributed.is_main():
        if evaluate or not _describe(folder, result, names):
            for name in FIGURES:  # of earlier detections
                (folder / name).unlink(missing_ok=True)
        _write_comp4(folder, names, result.detections, classes)
        if result.evaluation is not None:
            tested = {"data": str(data or config.data.root), "splits": names}
            counts = {"training_images": len(found.trained), "validation_images": len(found.validation)}
            write_json(folder / "metrics.json", {**_metrics(result, result.evaluation), **tested, **counts})
            _draw(result, result.evaluation, records, folder)
    distributed.barrier()
    return RunEvaluation(result, folder)


def _describe(folder: Path, result: SplitResult, splits: tuple[str, ...]) -> bool:
    """Whether the figures in the folder are those of these very detections, with nothing missing among them."""
    metrics = read_json(folder / "metrics.json") if all((folder / name).is_file() for name in FIGURES) else None
    expected = {"detections": result.origin, "images": len(result.detections), "splits": list(splits)}
    return isinstance(metrics, dict) and expected.items() <= metrics.items()


def _results_folder(run: Path, data: Path | None, splits: tuple[str, ...]) -> Path:
    """Where the results go; `data` is a folder other than data.root, which may hold splits of the same names."""
    results = run / "results"
    if data is not None:
        place = data.resolve()
        results /= fitting_name(place.name, f"-{digest_of(str(place))[:8]}")
    return results / fitting_name("+".join(name.replace("/", "-") for name in splits), "")


def drop_imports(config: Config, place: Path) -> Config:
    """Without the imported windows that are gone, since a detector outlives them; without all for data elsewhere.

    They may be named by the bare file names of their images, which other data may have too.
    """
    proposals, other = config.proposals, place != config.data.root.resolve()
    kept = () if other else tuple(path for path in proposals.import_from if path.is_file())
    if other and proposals.import_from:
        log.info("proposals.import_from belongs to %s; the images of other data are searched", config.data.root)
    elif kept != proposals.import_from:
        log.info("some files of proposals.import_from are gone; images whose windows they held are searched")
    return config.model_copy(update={"proposals": proposals.model_copy(update={"import_from": kept})})


def _write_comp4(
    folder: Path, splits: tuple[str, ...], detections: Mapping[str, Detections], classes: tuple[str, ...]
) -> None:
    """The devkit's files, one folder per year where images of several years share a name."""
    shared = len({image.rpartition("/")[2] for image in detections}) < len(detections)
    by_folder: dict[Path, dict[str, Detections]] = {}
    for image, found in detections.items():
        by_folder.setdefault(folder / image.rpartition("/")[0] if shared else folder, {})[image] = found
    for place, own in by_folder.items():
        write_comp4(place, _image_set(splits), own, classes)


def _image_set(splits: tuple[str, ...]) -> str:
    return "+".join(dict.fromkeys(split.rpartition("/")[2] for split in splits))


def _check_comp4_names(splits: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Before hours of work: the devkit's files have these very names."""
    longest = max(classes, key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(f"comp4_det_{_image_set(splits)}_{longest}.txt")) > LONGEST_NAME:
        raise SppnetError(
            f"the comp4 file of class {longest!r} would have a name of more than {LONGEST_NAME} bytes; give the image "
            "set a shorter name, or name fewer of them with --split"
        )


def _metrics(result: SplitResult, evaluation: VOCEvaluation) -> dict[str, Any]:
    quality: Any = result.proposals  # it is measured with the evaluation
    return {
        **evaluation.to_dict(),
        "images": len(result.detections),
        "seconds_per_image": result.seconds_per_image,
        "detections": result.origin,
        "proposals": {
            "recall": quality.recall,
            "mean_best_overlap": quality.mean_best_overlap,
            "windows": quality.mean_windows,
        },
        "errors": vars(result.errors),
    }


def _draw(result: SplitResult, evaluation: VOCEvaluation, records: Sequence[ImageRecord], folder: Path) -> None:
    """Curves, as numbers and as a picture, and a sheet of examples spread over the images."""
    curves = {name: vars(own.curve) for name, own in evaluation.results.items()}
    lists = {name: {key: values.tolist() for key, values in own.items()} for name, own in curves.items()}
    write_json(folder / "curves.json", lists)
    save_image(draw_precision_recall(evaluation), folder / "precision_recall.png")
    shown = spread(records, SHOWN_IMAGES)
    pictures = [Picture(read_image(r.path), result.detections[r.id].above(result.thresholds), r.id) for r in shown]
    save_image(contact_sheet(pictures), folder / "examples.jpg")
