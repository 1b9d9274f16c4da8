"""The score from which on a detection is worth showing, chosen by class on the validation images (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sppnet.artifacts import read_arrays, read_tensors, write_arrays
from sppnet.detection.detector import SPPDetector
from sppnet.detection.embedding import Projection
from sppnet.detection.feature_maps import FeatureMaps
from sppnet.detection.training_windows import TrainingWindows
from sppnet.detection.window_features import FrozenHead, ProjectedWindows, WindowScores
from sppnet.distributed import barrier, shard
from sppnet.errors import counted
from sppnet.evaluation.results import best_threshold
from sppnet.evaluation.voc import evaluate_voc
from sppnet.jobs import progress_bar
from sppnet.pipeline.stages import TESTED
from sppnet.proposals.search import read_windows
from sppnet.records import Detections


def choose_thresholds(
    detector: SPPDetector, source: TrainingWindows, kept: Path, rows: Path | None = None, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Class -> the threshold of the best F1 at IoU 0.5 (VOC's matching), that F1, the objects it was chosen on, and AP.

    `source` has the images, their maps and the windows that are searched; with a joint head the rows of these lie in
    the folder `rows` of the stage `embed`, and no map is computed. An interrupted call goes on from the detections in
    `kept`. A class without an object, or with none found, keeps 0, the SVM's boundary; with a
    joint head 0.5, the probability of either. AP is the area under the curve, or None.
    """
    records, unknown = source.records, 0.5 if detector.is_joint else 0.0
    missing = [index for index in shard(range(len(records))) if not records[index].path_in(kept).exists()]
    score = None if rows is None else _scorer(detector, source, rows)
    for index in progress_bar(missing, "thresholds", "image", shown=progress):
        windows = read_windows(source.windows_folder, records[index])
        own = detector.detect_for_evaluation(score(index) if score else source.maps(index), windows)[0]
        write_arrays(records[index].path_in(kept), boxes=own.boxes, scores=own.scores, labels=own.labels)
    barrier()
    truth = {record.id: record.annotation for record in records if record.annotation is not None}
    found = {r.id: Detections(**read_arrays(r.path_in(kept)), classes=detector.classes) for r in records}
    chosen = {}
    for name, result in evaluate_voc({i: found[i] for i in truth}, truth, detector.classes, "area").results.items():
        threshold, f1 = best_threshold(result.curve) if result.objects else (unknown, 0.0)
        chosen[name] = {"threshold": threshold if f1 else unknown, "f1": f1, "objects": result.objects, "ap": result.ap}
    return chosen


def _scorer(detector: SPPDetector, source: TrainingWindows, rows: Path) -> Callable[[int], WindowScores]:
    """Gives the scores of the windows of an image, from their rows."""
    projection = Projection.from_tensors(read_tensors(rows / "projection.safetensors"))
    head = FrozenHead(detector.head, detector.config.pyramid.levels, detector.precision)
    nowhere = ProjectedWindows(np.zeros(0, np.int64), np.zeros((0, 4), np.int64))

    @torch.no_grad()
    def score(index: int) -> WindowScores:
        record = source.records[index]
        stored = read_arrays(record.path_in(rows / TESTED))["rows"]
        own = torch.from_numpy(stored.astype(np.float32)) + projection.shift
        features = head.above_basis(own.to(detector.device))
        scores, maps = detector.svms.score(features).cpu().numpy(), FeatureMaps((), (), record.size)
        return WindowScores(scores, maps, nowhere, head, (features, np.arange(len(own))))

    return score


def mean_precision(chosen: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean of the AP of all classes that have one; None without any, as of earlier versions."""
    found = [values["ap"] for values in chosen.values() if values.get("ap") is not None]
    return sum(found) / len(found) if found else None


def describe_thresholds(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """One line: each class, its threshold, and what it rests on."""
    return ", ".join(f"{name} {values['threshold']:.2f} ({_reason(values)})" for name, values in chosen.items())


def _reason(values: Mapping[str, Any]) -> str:
    if not values["objects"]:
        return "no validation object"
    objects = counted(int(values["objects"]), "object")
    return f"F1 {values['f1']:.2f} of {objects}" if values["f1"] else "no object was found"
