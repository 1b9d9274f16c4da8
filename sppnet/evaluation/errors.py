"""What is wrong with detections, by kind, and the mean AP that each kind costs: TIDE (Bolya et al., ECCV 2020).

A detection that finds no object, by VOC's matching at the threshold `iou`, is of the first of these kinds: a duplicate
where it overlaps an object of its class by `iou`, which a better one found before; badly placed where by 0.1; of a
wrong class where it overlaps one of another class by `iou`; of a wrong class and place where by 0.1; else background.

An object that is neither found nor meant by a badly placed detection or one of a wrong class is missed: by the
proposals where no window overlaps it by `iou`, else by its score. Difficult objects are not missed.

A kind costs the mean AP that mending it wins. A badly placed detection gets the box of its object, one of a wrong class
the class: the best of all detections of the object then counts, the others go. Detections of other kinds go. Missed
objects count no longer; the AP of a class with no other objects is 1 then (ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.checks import as_boxes, check_thresholds
from sppnet.evaluation.results import CurveMetric, Metric
from sppnet.evaluation.voc import all_counted, average_precision, check_images, check_rules, match_voc
from sppnet.records import Annotation, Detections, pairwise_iou

NEAR = 0.1  # TIDE's overlap from which on a detection is not of the background
MISSED = ("missed by proposals", "missed by score")
KINDS = (*MISSED, "badly placed", "wrong class", "wrong class and place", "duplicate", "background")
PLACED, CLASS, BOTH, DUPLICATE, BACKGROUND, FOUND, IGNORED = range(2, 9)  # places in KINDS; FOUND: without error


@dataclass(frozen=True)
class DetectionErrors:
    """Errors of the detections shown, by kind and class, and the mean AP that each kind costs, of all detections.

    `counts` has "found" too. Objects are counted in their class, wrong detections in that which they say.
    """

    counts: Mapping[str, Mapping[str, int]]
    map_lost: Mapping[str, float]
    objects: int  # those that are not difficult
    metric: CurveMetric
    iou: float

    def table(self) -> str:
        """One line per kind, as text."""
        lines = [f"{'errors':21}   shown  mAP lost  most in"]
        for kind, lost in self.map_lost.items():
            count, most = max((count, name) for name, count in self.counts[kind].items())
            total = sum(self.counts[kind].values())
            lines.append(f"{kind:21}{total:8d}  {lost:8.4f}" + (f"  {most} ({count})" if count else ""))
        found = f"where {sum(self.counts['found'].values())} of {self.objects} objects are found"
        rule = f"shown: from the threshold of the class on, {found}; mAP: of all, {self.metric} at IoU {self.iou:g}"
        return "\n".join([*lines, rule])


def find_errors(
    detections: Mapping[str, Detections] | Sequence[Detections],
    annotations: Mapping[str, Annotation] | Sequence[Annotation],
    classes: Sequence[str],
    windows: Mapping[str, ArrayLike] | None = None,
    thresholds: float | ArrayLike = -np.inf,
    metric: Metric = "11point",
    iou: float = 0.5,
    use_difficult: bool = False,
) -> DetectionErrors:
    """The errors of what `evaluate_voc` takes. `windows`: image id -> the windows searched (R, 4); None = unknown.

    `thresholds`: the lowest score shown, one number or one for each class. For the metrics ilsvrc and coco AP is area.
    """
    names = check_rules(classes, metric, iou, use_difficult)
    found_in, truth_of = check_images(detections, annotations, names)
    truth_of = all_counted(truth_of) if use_difficult or metric == "ilsvrc" else truth_of
    matched = _match(found_in, truth_of, names, windows, iou)
    shown, counts = matched.scores >= check_thresholds(thresholds, names)[matched.labels], {}
    for kind, name in enumerate((*KINDS, "found")):
        own = matched.labels[shown & (matched.kinds == kind)]
        own = matched.classes[matched.missed(name, shown)] if name in MISSED else own
        counts[name] = dict(zip(names, np.bincount(own, minlength=len(names)).tolist(), strict=True))
    rule: CurveMetric = "11point" if metric == "11point" else "area"
    lost = {kind: matched.mean_ap(rule, kind) - matched.mean_ap(rule) for kind in KINDS}
    return DetectionErrors(counts, lost, int(np.count_nonzero(~matched.difficult)), rule, iou)


@dataclass(frozen=True)
class _Matched:
    """Detections, best first (R,), with the object that each means; the objects of all images (M,)."""

    scores: NDArray[Any]
    labels: NDArray[Any]
    kinds: NDArray[Any]
    targets: NDArray[Any]
    classes: NDArray[Any]
    difficult: NDArray[np.bool_]
    covered: NDArray[np.bool_]  # by a window

    def missed(self, kind: str, shown: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The objects that are missed in this way where these detections are shown (M,)."""
        missed = ~self.difficult & (self.covered != (kind == MISSED[0]))
        missed[self.targets[shown & np.isin(self.kinds, (FOUND, PLACED, CLASS))]] = False
        return missed

    def mean_ap(self, metric: CurveMetric, mended: str | None = None) -> float:
        """Mean AP over the classes with objects, with a kind of errors mended; 0 without objects."""
        labels, right, kept, wanted = self.labels.copy(), self.kinds == FOUND, self.kinds != IGNORED, ~self.difficult
        present, wrong = np.unique(self.classes[wanted]), self.kinds == (KINDS.index(mended) if mended else -1)
        if mended in MISSED:
            wanted &= ~self.missed(mended, kept)
        elif mended in (KINDS[PLACED], KINDS[CLASS]):
            claims = np.flatnonzero(right | wrong)
            best = claims[np.unique(self.targets[claims], return_index=True)[1]]
            kept[claims] = False
            kept[best] = right[best] = ~self.difficult[self.targets[best]]
            labels[best] = self.classes[self.targets[best]]
        else:
            kept &= ~wrong
        aps = []
        for label in present:
            true = right[kept & (labels == label)].cumsum(dtype=np.float64)
            total = np.count_nonzero(wanted & (self.classes == label))
            ap = average_precision(true / max(total, 1), true / np.arange(1, len(true) + 1), metric)
            aps.append(ap if total else 1.0)
        return float(np.mean(aps)) if aps else 0.0


def _match(
    given: Mapping[str, Detections], truth: Mapping[str, Annotation], names: tuple[str, ...], windows: Any, iou: float
) -> _Matched:
    none: Any = np.zeros(0, np.int64)
    found, objects, count = [(np.zeros(0), none, none, none)], [(none, none > 0, none > 0)], 0
    for image, annotation in truth.items():
        known, own = annotation.of(names), given.get(image, Detections(none, none, none, names))
        corners, classes = as_boxes(known.boxes), np.array([names.index(name) for name in known.names], np.int64)
        searched = corners if windows is None else as_boxes(windows.get(image, ()), f"windows of image {image}")
        objects.append((classes, known.difficult, pairwise_iou(corners, searched).max(axis=1, initial=0) >= iou))
        judged = {*names}.difference(annotation.unknown)
        labels = np.array([names.index(name) if name in judged else -1 for name in own.classes])[own.labels]
        rows = [row for row in np.argsort(-own.scores, kind="stable") if labels[row] >= 0]
        overlaps = np.pad(pairwise_iou(as_boxes(own.boxes[rows]), corners), ((0, 0), (0, 1)))  # argmax needs a column
        same = labels[rows, None] == np.append(classes, -1)
        near, other = np.where(same, overlaps, 0), np.where(same, 0, overlaps)
        right, ignored = match_voc(near, np.append(known.difficult, False), iou)
        tests = [right, ignored, *(each.max(axis=1) >= least for each in (near, other) for least in (iou, NEAR))]
        kinds = np.select(tests, [FOUND, IGNORED, DUPLICATE, PLACED, CLASS, BOTH], BACKGROUND)
        targets = np.where(kinds == CLASS, other.argmax(axis=1), near.argmax(axis=1))
        found.append((own.scores[rows].astype(float), labels[rows], kinds, targets + count))
        count += len(known)
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    order = np.argsort(-columns[0], kind="stable")
    return _Matched(*(own[order] for own in columns), *map(np.concatenate, zip(*objects, strict=True)))
