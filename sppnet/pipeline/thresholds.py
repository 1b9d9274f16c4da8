"""The score from which on a detection is worth showing, chosen by class on the validation images (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sppnet.artifacts import read_arrays, write_arrays
from sppnet.detection.detector import SPPDetector
from sppnet.detection.training_windows import TrainingWindows
from sppnet.distributed import barrier, shard
from sppnet.errors import counted
from sppnet.evaluation.results import best_threshold
from sppnet.evaluation.voc import evaluate_voc
from sppnet.jobs import progress_bar
from sppnet.proposals.search import read_windows
from sppnet.records import Detections


def choose_thresholds(
    detector: SPPDetector, source: TrainingWindows, windows: Path, kept: Path, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Class -> the threshold of the best F1 at IoU 0.5 (VOC's matching), that F1, the objects it was chosen on, and AP.

    `source` has the images and their maps, the folder `windows` the windows that are searched; an interrupted call goes
    on from the detections in `kept`. A class without an object, or with none found, keeps 0, the SVM's boundary; with a
    joint head 0.5, the probability of either. AP is the area under the curve, or None.
    """
    records, unknown = source.records, 0.5 if detector.is_joint else 0.0
    missing = [index for index in shard(range(len(records))) if not records[index].path_in(kept).exists()]
    for index in progress_bar(missing, "thresholds", "image", shown=progress):
        own = detector.detect_for_evaluation(source.maps(index), read_windows(windows, records[index]))[0]
        write_arrays(records[index].path_in(kept), boxes=own.boxes, scores=own.scores, labels=own.labels)
    barrier()
    truth = {record.id: record.annotation for record in records if record.annotation is not None}
    found = {r.id: Detections(**read_arrays(r.path_in(kept)), classes=detector.classes) for r in records}
    chosen = {}
    for name, result in evaluate_voc({i: found[i] for i in truth}, truth, detector.classes, "area").results.items():
        threshold, f1 = best_threshold(result.curve) if result.objects else (unknown, 0.0)
        chosen[name] = {"threshold": threshold if f1 else unknown, "f1": f1, "objects": result.objects, "ap": result.ap}
    return chosen


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
