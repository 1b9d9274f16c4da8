"""What an evaluation of detections gives: AP and curve of every class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sppnet.errors import counted

CurveMetric = Literal["11point", "area", "ilsvrc"]  # of one curve
Metric = Literal["11point", "area", "ilsvrc", "coco"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PRCurve:
    """Recall, precision and score after each counted detection, best first: float64 (R,); ignored ones are left out."""

    recall: Floats
    precision: Floats
    scores: Floats


@dataclass(frozen=True)
class ClassResult:
    """One class: its AP (None = no object to find), its curve, and how many objects and detections there were."""

    ap: float | None
    curve: PRCurve
    objects: int  # objects that count as missed when not found
    detections: int  # all detections, the ignored ones included


@dataclass(frozen=True)
class VOCEvaluation:
    """Results per class, in the order given. A class without objects is absent: AP None, not in the mean."""

    results: Mapping[str, ClassResult]
    metric: Metric
    iou: float
    use_difficult: bool

    @property
    def ap(self) -> dict[str, float | None]:
        return {name: result.ap for name, result in self.results.items()}

    @property
    def objects(self) -> dict[str, int]:
        return {name: result.objects for name, result in self.results.items()}

    @property
    def map(self) -> float:
        """Mean AP over the classes that have objects; nan where none has."""
        present = [ap for ap in self.ap.values() if ap is not None]
        return float(np.mean(present)) if present else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, as JSON can hold it (an undefined mean is null)."""
        return {
            "metric": self.metric,
            "iou": self.iou,
            "use_difficult": self.use_difficult,
            "map": None if math.isnan(self.map) else self.map,
            "ap": self.ap,
            "objects": self.objects,
            "detections": {name: result.detections for name, result in self.results.items()},
        }

    def table(self) -> str:
        """One line per class and one for the mean, as text."""
        width = max(len("class"), *map(len, self.results))
        lines = [f"{'class':{width}}      AP  objects  detections  recall  precision"]
        lines += [f"{name:{width}}  {_row(result)}" for name, result in self.results.items()]
        present = sum(ap is not None for ap in self.ap.values())
        mean = "     -" if math.isnan(self.map) else f"{self.map:6.4f}"
        rule = f"{self.metric} at IoU {self.iou:g}" + (", difficult objects count" if self.use_difficult else "")
        lines.append(f"{'mean':{width}}  {mean}  over {present} of {counted(len(self.results), 'class')}, {rule}")
        return "\n".join(lines)


def best_threshold(curve: PRCurve) -> tuple[float, float]:
    """The lowest score to accept so that F1 is best, and that F1: (score, F1); (nan, 0) where nothing is found.

    The threshold lies halfway between the last score accepted and the next lower one of the curve, and is that score
    where it is the lowest of all. Of thresholds with equal F1 the highest is taken.
    """
    recall, precision, scores = curve.recall, curve.precision, curve.scores
    f1 = 2 * recall * precision / np.maximum(recall + precision, np.finfo(np.float64).tiny)
    f1[:-1][scores[1:] == scores[:-1]] = 0  # no threshold divides equal scores
    if not f1.any():
        return math.nan, 0.0
    last = int(f1.argmax())
    return float(scores[last : last + 2].mean()), float(f1[last])


def _row(result: ClassResult) -> str:
    counts = f"{result.objects:7d}  {result.detections:10d}"
    if result.ap is None:
        return f"     -  {counts}       -          -  no objects"
    recall = f"{result.curve.recall[-1]:6.4f}" if len(result.curve.recall) else f"{0:6.4f}"
    precision = f"{result.curve.precision[-1]:9.4f}" if len(result.curve.precision) else f"{'-':>9}"
    return f"{result.ap:6.4f}  {counts}  {recall}  {precision}"
