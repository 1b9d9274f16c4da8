"""What an evaluation of detections gives: AP and curve of every class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sppnet.errors import counted

CurveMetric = Literal["11point", "area", "ilsvrc"]  # of one curve
Metric = Literal["11point", "area", "ilsvrc", "coco"]
Floats = NDArray[np.float64]
Checked = tuple[Sequence[str], Floats, Floats]  # image ids, scores (R,), boxes (R, 4) of one class


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
    more: Mapping[str, float | None] = field(
        default_factory=dict
    )  # of the metric coco: AP50, AP75, small, medium, large


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
    def measures(self) -> dict[str, dict[str, float | None]]:
        """By class: AP, and the others of the metric coco; None where there is no object of that size."""
        return {name: {"AP": result.ap, **result.more} for name, result in self.results.items()}

    @property
    def mean(self) -> dict[str, float | None]:
        """Means of the measures over the classes that have them; None where none has."""
        every = list(self.measures.values())
        present = {key: [value for own in every if (value := own[key]) is not None] for key in every[0]}
        return {key: float(np.mean(values)) if values else None for key, values in present.items()}

    @property
    def map(self) -> float:
        """Mean AP over the classes that have objects; nan where none has."""
        return math.nan if (mean := self.mean["AP"]) is None else mean

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, as JSON can hold it (what is undefined is null)."""
        own = {
            "metric": self.metric,
            "iou": self.iou,
            "use_difficult": self.use_difficult,
            "map": self.mean["AP"],
            "ap": self.ap,
            "objects": self.objects,
            "detections": {name: result.detections for name, result in self.results.items()},
        }
        coco = {"iou": None, "mean": self.mean, "measures": self.measures}  # it has ten overlaps
        return own | coco if self.metric == "coco" else own

    def table(self) -> str:
        """One line per class and one for the mean, as text."""
        columns = [*self.mean, "objects", "detections", *(() if self.metric == "coco" else ("recall", "precision"))]
        rows: list[tuple[str, Sequence[object]]] = [("class", columns)]
        for name, own in self.results.items():
            reached, exact = own.curve.recall[-1:].tolist() or [0.0], own.curve.precision[-1:].tolist() or [None]
            last = (*reached, *exact) if own.objects else (None, None)
            rows.append((name, (*self.measures[name].values(), own.objects, own.detections, *last)))
        rows.append(("mean", list(self.mean.values())))
        width, widths = max(len(name) for name, _ in rows), [max(6, len(column)) for column in columns]
        lines = [" ".join([f"{name:{width}}", *map(_cell, cells, widths)]) for name, cells in rows]
        present = sum(ap is not None for ap in self.ap.values())
        overlaps = "0.5 to 0.95" if self.metric == "coco" else f"{self.iou:g}"
        rule = f"{self.metric} at IoU {overlaps}" + (", difficult objects count" if self.use_difficult else "")
        return "\n".join(lines) + f"  over {present} of {counted(len(self.results), 'class')}, {rule}"


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


def _cell(value: object, width: int) -> str:
    text = "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    return f" {text:>{width}}"
