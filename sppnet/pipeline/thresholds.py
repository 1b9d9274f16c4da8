"""The score from which on a detection is worth showing, chosen by class on the validation images (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sppnet.detection.detector import SPPDetector
from sppnet.detection.training_windows import TrainingWindows
from sppnet.errors import counted
from sppnet.evaluation.voc import best_threshold, evaluate_voc
from sppnet.jobs import progress_bar
from sppnet.proposals.search import read_windows


def choose_thresholds(
    detector: SPPDetector, source: TrainingWindows, progress: bool = True
) -> dict[str, dict[str, float]]:
    """Class -> the threshold of the best F1 at IoU 0.5 (VOC's matching), that F1, and the objects it was chosen on.

    A class of which no object is in the images of `source`, or none is found, keeps 0, the SVM's boundary.
    """
    found, records = {}, source.records
    for index, record in enumerate(progress_bar(records, "thresholds", "image", shown=progress)):
        windows = read_windows(source.windows_folder, record)
        found[record.id] = detector.detect_for_evaluation(source.maps(index), windows)[0]
    truth = {record.id: record.annotation for record in records if record.annotation is not None}
    known = {image: found[image] for image in truth}
    chosen = {}
    for name, result in evaluate_voc(known, truth, detector.classes).results.items():
        threshold, f1 = best_threshold(result.curve) if result.objects else (0.0, 0.0)
        chosen[name] = {"threshold": threshold if f1 else 0.0, "f1": f1, "objects": result.objects}
    return chosen


def describe_thresholds(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """One line: each class, its threshold, and what it rests on."""
    return ", ".join(f"{name} {values['threshold']:.2f} ({_reason(values)})" for name, values in chosen.items())


def _reason(values: Mapping[str, Any]) -> str:
    if not values["objects"]:
        return "no validation object"
    objects = counted(int(values["objects"]), "object")
    return f"F1 {values['f1']:.2f} of {objects}" if values["f1"] else "no object was found"
