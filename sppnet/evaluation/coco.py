"""COCO's average precision, computed by pycocotools from values in memory.

AP is the mean over the IoU thresholds 0.5, 0.55, … 0.95 of the mean precision at 101 points of recall. A detection
finds the free object that it overlaps most, if by the threshold or more. The best 100 detections of each class and
image count (the library cuts by class). Sizes are areas of boxes: small up to 32² pixels, large from 96² on. Difficult
objects are crowds: none is missed, and detections of which such a share lies in one are ignored.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sppnet.errors import counted
from sppnet.evaluation.results import ClassResult, Floats, PRCurve, VOCEvaluation
from sppnet.records import Annotation

ALL = slice(None)
# The IoU thresholds and the range of areas behind each, in the order of pycocotools' own summary.
MEASURES = {"AP": (ALL, 0), "AP50": (0, 0), "AP75": (5, 0), "small": (ALL, 1), "medium": (ALL, 2), "large": (ALL, 3)}


@dataclass(frozen=True)
class COCOEvaluation(VOCEvaluation):
    """COCO's figures; the curves of `results` are those at IoU 0.5, as far as recall goes."""

    mean: Mapping[str, float | None]  # AP, AP50, AP75, small, medium, large; None = no object of that size
    by_class: Mapping[str, Mapping[str, float | None]]  # the same of every class

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, as JSON can hold it (what cannot be measured is null)."""
        own = {"iou": [round(0.5 + 0.05 * step, 2) for step in range(10)], "coco": self.mean, "by_class": self.by_class}
        return super().to_dict() | own

    def table(self) -> str:
        """One line per class and one for the mean, as text."""
        width = max(len("class"), *map(len, self.results))
        lines = [f"{'class':{width}}" + "".join(f"  {name:>6}" for name in MEASURES) + "  objects  detections"]
        for name, result in self.results.items():
            counts = f"  {result.objects:7d}  {result.detections:10d}"
            lines.append(f"{name:{width}}" + _cells(self.by_class[name]) + counts)
        present = sum(ap is not None for ap in self.ap.values())
        rule = f"over {present} of {counted(len(self.results), 'class')}, COCO at IoU 0.5 to 0.95"
        rule += ", difficult objects count" if self.use_difficult else ""
        return "\n".join([*lines, f"{'mean':{width}}{_cells(self.mean)}  {rule}"])


def evaluate_coco(
    detections: Mapping[str, tuple[Sequence[str], Floats, Floats]],
    annotations: Mapping[str, Annotation],
    use_difficult: bool = False,
) -> COCOEvaluation:
    """COCO's figures from class -> (image ids, scores, boxes), which `evaluate_voc` checks."""
    images = {image: number for number, image in enumerate(annotations, 1)}  # the library takes 0 for "none"
    classes = {name: number for number, name in enumerate(detections, 1)}
    truth, objects = list[dict[str, Any]](), Counter[str]()
    for image, annotation in annotations.items():
        for box, name, difficult in annotation.of(tuple(classes)):
            crowd = difficult and not use_difficult
            truth.append(_entry(images[image], classes[name], box, iscrowd=int(crowd)))
            objects[name] += not crowd
    found = [
        _entry(images[image], classes[name], box, score=score)
        for name, (ids, scores, boxes) in detections.items()
        for image, score, box in zip(ids, scores.tolist(), boxes.tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # where the library reports
        judge = COCOeval(*(_index(entries, images, classes) for entries in (truth, found)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision, scores = (judge.eval[key][..., -1] for key in ("precision", "scores"))  # (IoU, recall, class, area)
    by_class, results = {}, {}
    for place, name in enumerate(classes):
        own = {key: precision[steps, :, place, area].mean() for key, (steps, area) in MEASURES.items()}
        by_class[name] = {key: _measured(value) for key, value in own.items()}
        half, reached = (0, ALL, place, 0), precision[0, :, place, 0] > 0
        curve = PRCurve(*(each[reached] for each in (judge.params.recThrs, precision[half], scores[half])))
        results[name] = ClassResult(by_class[name]["AP"], curve, objects[name], len(detections[name][0]))
    mean = {key: _measured(value) for key, value in zip(MEASURES, judge.stats, strict=False)}
    return COCOEvaluation(results, "coco", 0.5, use_difficult, mean, by_class)


def _entry(image: int, category: int, box: Sequence[float], **more: float) -> dict[str, Any]:
    width, height = box[2] - box[0], box[3] - box[1]
    own = {"bbox": [box[0], box[1], width, height], "area": width * height}
    return {"image_id": image, "category_id": category, **own, **more}


def _index(entries: Sequence[dict[str, Any]], images: Mapping[str, int], classes: Mapping[str, int]) -> COCO:
    """The library's own table of objects or detections, without a file."""
    table = COCO()
    table.dataset = {
        "images": [{"id": number} for number in images.values()],
        "categories": [{"id": number, "name": name} for name, number in classes.items()],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(entries, 1)],
    }
    table.createIndex()
    return table


def _measured(value: float) -> float | None:
    return None if value < 0 else float(value)  # -1: no object


def _cells(measures: Mapping[str, float | None]) -> str:
    return "".join("       -" if value is None else f"  {value:6.4f}" for value in measures.values())
