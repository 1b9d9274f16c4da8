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

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sppnet.evaluation.results import Checked, ClassResult, PRCurve
from sppnet.records import Annotation

Entry = tuple[int, int, Sequence[float], dict[str, float]]  # image, class, box, and what is known of it
ALL = slice(None)  # IoU thresholds; beside them the place of the range of areas
MEASURES = {"AP": (ALL, 0), "AP50": (0, 0), "AP75": (5, 0), "small": (ALL, 1), "medium": (ALL, 2), "large": (ALL, 3)}


def evaluate_coco(detections: Mapping[str, Checked], annotations: Mapping[str, Annotation]) -> dict[str, ClassResult]:
    """COCO's figures by class from class -> (image ids, scores, boxes), which `evaluate_voc` checks."""
    images = {image: number for number, image in enumerate(annotations)}
    classes = {name: number for number, name in enumerate(detections)}
    truth, objects = list[Entry](), Counter[str]()
    for image, annotation in annotations.items():
        for box, name, difficult in annotation.of(tuple(classes)):
            truth.append((images[image], classes[name], box, {"iscrowd": int(difficult)}))
            objects[name] += not difficult
    found = [
        (images[image], classes[name], box, {"score": score})
        for name, (ids, scores, boxes) in detections.items()
        for image, score, box in zip(ids, scores.tolist(), boxes.tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # where the library reports
        judge = COCOeval(_index(truth), _index(found), "bbox")
        judge.params.imgIds, judge.params.catIds = list(images.values()), list(classes.values())
        judge.evaluate()
        judge.accumulate()
    precision, scores = (judge.eval[key][..., -1] for key in ("precision", "scores"))  # (IoU, recall, class, area)
    results = dict[str, ClassResult]()
    for place, name in enumerate(classes):
        means = (precision[steps, :, place, area].mean() for steps, area in MEASURES.values())
        own = {key: None if mean < 0 else float(mean) for key, mean in zip(MEASURES, means, strict=True)}  # -1: none
        half, reached = (0, ALL, place, 0), precision[0, :, place, 0] > 0
        curve = PRCurve(*(each[reached] for each in (judge.params.recThrs, precision[half], scores[half])))
        results[name] = ClassResult(own.pop("AP"), curve, objects[name], len(detections[name][0]), own)
    return results


def _index(entries: Sequence[Entry]) -> COCO:
    """The library's own table of objects or detections."""
    table = COCO()
    table.dataset = {"categories": [], "annotations": []}
    for number, (image, category, (x1, y1, x2, y2), more) in enumerate(entries, 1):  # it takes 0 for none
        place = {"image_id": image, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        table.dataset["annotations"].append({"id": number, **place, "area": (x2 - x1) * (y2 - y1), **more})
    table.createIndex()
    return table
