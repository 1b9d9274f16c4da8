"""Errors of detections by kind, and what each costs, beside plain loops and cases made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sppnet import Annotation, Detections, SppnetError, evaluate_voc
from sppnet.evaluation.errors import KINDS, find_errors
from sppnet.evaluation.voc import average_precision
from sppnet.records import pairwise_iou

CLASSES = ("cat", "dog", "owl")
CAT, DOG, FAR = [0, 0, 100, 100], [200, 0, 300, 100], [500, 500, 600, 600]
BESIDE = [0, 0, 100, 30]  # overlaps CAT by 0.3
BESIDE_DOG = [200, 0, 300, 30]
TRUTH = {"a": Annotation([CAT, DOG], ("cat", "dog"))}


def found(*rows: tuple) -> dict[str, Detections]:
    """Detections in the one image: (class, score, box)."""
    boxes, scores, labels = [row[2] for row in rows], [row[1] for row in rows], [CLASSES.index(row[0]) for row in rows]
    return {"a": Detections(boxes, scores, labels, CLASSES)}


def scenes(seed: int, images: int = 8) -> tuple[dict[str, Detections], dict[str, Annotation], dict[str, np.ndarray]]:
    """Crowded images with objects of two classes, detections of three, and some windows."""
    rng = np.random.default_rng(seed)
    detections, truth, windows = {}, {}, {}
    for number in range(images):
        count = int(rng.integers(0, 6))
        corner = rng.integers(0, 60, (count, 2))
        boxes = np.concatenate([corner, corner + rng.integers(20, 50, (count, 2))], axis=1)
        truth[f"{number}"] = Annotation(
            boxes, tuple(CLASSES[i] for i in rng.integers(0, 2, count)), rng.random(count) < 0.2
        )
        seen = boxes[rng.random(count) < 0.8]
        near = np.repeat(seen, 3, axis=0) + rng.integers(-8, 9, (3 * len(seen), 4))
        corner = rng.integers(0, 90, (3, 2))
        every = np.concatenate([near, np.concatenate([corner, corner + 20], axis=1)])
        scores = rng.integers(0, 8, len(every)) / 4
        labels = rng.integers(0, 3, len(every))
        every[:, 2:] = np.maximum(every[:, 2:], every[:, :2] + 1)
        if number != 1:  # an image without detections
            detections[f"{number}"] = Detections(every, scores, labels, CLASSES)
        windows[f"{number}"] = boxes[::2] + rng.integers(-9, 10, (len(boxes[::2]), 4))
    return detections, truth, windows


def naive(detections, truth, windows, thresholds, metric):
    """Counts by kind and class, and the mean AP once each kind is mended (None: none), by plain loops."""
    rows, objects = [], []  # [score, class, kind, object] and [class, difficult, covered]
    for image, annotation in truth.items():
        first = len(objects)
        for box, name, difficult in annotation:
            over = [pairwise_iou(np.array([box]), np.array([w], float))[0, 0] for w in windows[image]]
            objects.append([name, difficult, max(over, default=0) >= 0.5])
        taken = set()
        own = detections.get(image, ())
        for box, score, _, name in sorted(own, key=lambda d: -d.score):
            best = {True: (0.0, None), False: (0.0, None)}
            for place, (other, kind, _) in enumerate(annotation):
                iou = pairwise_iou(np.array([box]), np.array([other]))[0, 0]
                if iou > best[kind == name][0]:
                    best[kind == name] = (iou, first + place)
            (near, mine), (other, theirs) = best[True], best[False]
            if near >= 0.5:
                kind = "ignored" if objects[mine][1] else "duplicate" if mine in taken else "found"
                taken.add(mine)
                rows.append([score, name, kind, mine])
            elif near >= 0.1:
                rows.append([score, name, "badly placed", mine])
            elif other >= 0.5:
                rows.append([score, name, "wrong class", theirs])
            else:
                rows.append([score, name, "wrong class and place" if other >= 0.1 else "background", None])

    def missed(some):
        meant = {row[3] for row in some if row[2] in ("found", "badly placed", "wrong class")}
        kinds = {False: "missed by proposals", True: "missed by score"}
        return {n: kinds[covered] for n, (_, hard, covered) in enumerate(objects) if not hard and n not in meant}

    def mean_ap(mended):
        taken, curve = set(), {name: [] for name in CLASSES}
        gone = {n for n, kind in missed(rows).items() if kind == mended}
        for score, name, kind, target in sorted(rows, key=lambda row: -row[0]):
            if mended in ("badly placed", "wrong class") and kind in ("found", mended):
                if target not in taken and not objects[target][1]:
                    curve[objects[target][0]].append((score, True))
                taken.add(target)
            elif kind not in ("ignored", mended):
                curve[name].append((score, kind == "found"))
        aps = []
        for name in CLASSES:
            own = [n for n, (kind, hard, _) in enumerate(objects) if kind == name and not hard]
            total, true, points = len(set(own) - gone), 0, []
            for place, (_, right) in enumerate(curve[name], 1):
                true += right
                points.append((true / max(total, 1), true / place))
            if own:
                aps.append(average_precision(*np.reshape(points, (-1, 2)).T, metric) if total else 1.0)
        return np.mean(aps)

    shown = [row for row in rows if row[0] >= thresholds[CLASSES.index(row[1])]]
    counts = {kind: dict.fromkeys(CLASSES, 0) for kind in (*KINDS, "found")}
    for _, name, kind, _ in shown:
        if kind != "ignored":
            counts[kind][name] += 1
    for n, kind in missed(shown).items():
        counts[kind][objects[n][0]] += 1
    return counts, {kind: mean_ap(kind) for kind in (None, *KINDS)}


@pytest.mark.parametrize("metric", ["11point", "area"])
@pytest.mark.parametrize("seed", range(6))
def test_kinds_and_costs_are_those_of_plain_loops(seed, metric):
    detections, truth, windows = scenes(seed)
    thresholds = (0.5, 1.0, 0.25)
    counts, means = naive(detections, truth, windows, thresholds, metric)
    errors = find_errors(detections, truth, CLASSES, windows, thresholds, metric)
    assert errors.counts == counts
    assert errors.map_lost == pytest.approx({kind: means[kind] - means[None] for kind in KINDS}, abs=1e-12)
    assert means[None] == pytest.approx(evaluate_voc(detections, truth, CLASSES, metric).map, abs=1e-12)
    assert errors.objects == sum(len(own.easy()) for own in truth.values())


def test_the_scenes_of_the_loops_have_every_kind():
    every = [find_errors(*scenes(seed)[:2], CLASSES, scenes(seed)[2]) for seed in range(6)]
    assert all(sum(sum(own.counts[kind].values()) for own in every) > 3 for kind in KINDS)
    assert all(max(own.map_lost[kind] for own in every) > 0.005 for kind in KINDS)


# By hand: classes of one object each, so half of an AP is a quarter of the mean.
RIGHT = ("dog", 0.5, DOG)
CASES = {
    "missed by proposals": ([RIGHT], [DOG], "cat", 0.5),  # nothing finds the cat: it counts no longer
    "missed by score": ([RIGHT], [CAT, DOG], "cat", 0.5),
    "badly placed": ([RIGHT, ("cat", 0.9, BESIDE)], [CAT, DOG], "cat", 0.5),
    "wrong class": ([RIGHT, ("dog", 0.9, CAT)], [CAT, DOG], "dog", 0.75),  # AP of cats 0 to 1, of dogs 1/2 to 1
    "wrong class and place": ([RIGHT, ("cat", 0.4, CAT), ("dog", 0.9, BESIDE)], [CAT, DOG], "dog", 0.25),
    "duplicate": ([RIGHT, ("cat", 0.9, CAT), ("dog", 0.45, DOG)], [CAT, DOG], "dog", 0.0),  # below all that is right
    "background": ([RIGHT, ("cat", 0.4, CAT), ("cat", 0.9, FAR)], [CAT, DOG], "cat", 0.25),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_made_by_hand_is_counted_alone_and_costs_what_it_should(kind):
    rows, windows, name, cost = CASES[kind]
    errors = find_errors(found(*rows), TRUTH, CLASSES, {"a": windows}, metric="area")
    assert {own: counts for own, counts in errors.counts.items() if any(counts.values()) and own != "found"} == {
        kind: {**dict.fromkeys(CLASSES, 0), name: 1}
    }
    assert errors.map_lost == pytest.approx({**dict.fromkeys(KINDS, 0), kind: cost})


def test_a_duplicate_costs_where_it_is_above_what_is_right():
    truth = {"a": Annotation([CAT, FAR], ("cat", "cat"))}
    rows = ("cat", 0.9, CAT), ("cat", 0.8, CAT), ("cat", 0.7, FAR)
    errors = find_errors(found(*rows), truth, ["cat"], metric="area")
    assert errors.counts["duplicate"] == {"cat": 1}
    assert errors.map_lost["duplicate"] == pytest.approx(1 - (1 + 2 / 3) / 2)


def test_of_a_mended_detection_and_one_that_is_right_the_better_counts():
    """The badly placed one takes the object, and the right one below it goes: nothing is between them, so AP stays."""
    rows = ("cat", 0.9, BESIDE), ("cat", 0.8, FAR), ("cat", 0.7, CAT)
    errors = find_errors(found(*rows), {"a": TRUTH["a"][:1]}, ["cat"], metric="area")
    assert errors.counts["found"] == {"cat": 1}
    assert errors.map_lost["badly placed"] == pytest.approx(1 - 1 / 3)
    assert errors.map_lost["background"] == pytest.approx(1 / 2 - 1 / 3)


def test_what_is_near_an_object_of_its_class_is_badly_placed_though_it_covers_another():
    both = {"a": Annotation([CAT, BESIDE], ("cat", "dog"))}
    assert find_errors(found(("cat", 1, BESIDE)), both, CLASSES).counts["badly placed"]["cat"] == 1


def test_difficult_objects_are_neither_missed_nor_won():
    truth = {"a": Annotation([CAT, DOG], ("cat", "dog"), [False, True])}
    rows = ("cat", 0.9, CAT), ("dog", 0.8, DOG), ("dog", 0.7, BESIDE_DOG), ("cat", 0.6, DOG)
    errors = find_errors(found(*rows), truth, CLASSES, {"a": []}, metric="area")
    assert {kind: sum(own.values()) for kind, own in errors.counts.items() if any(own.values())} == {
        "badly placed": 1, "wrong class": 1, "found": 1
    }  # fmt: skip
    assert set(errors.map_lost.values()) == {0.0}
    counted = find_errors(found(*rows[:1]), truth, CLASSES, {"a": []}, use_difficult=True)
    assert counted.counts["missed by proposals"]["dog"] == 1
    assert find_errors(found(*rows[:1]), truth, CLASSES, {"a": []}, metric="ilsvrc").counts == counted.counts


def test_counts_are_of_what_is_shown_and_costs_of_all():
    rows = ("cat", 0.9, FAR), ("cat", 0.2, CAT), RIGHT
    errors = find_errors(found(*rows), TRUTH, CLASSES, {"a": [CAT]}, thresholds=(0.3, 0.6, 0), metric="area")
    assert errors.counts["missed by score"] == {"cat": 1, "dog": 0, "owl": 0}
    assert errors.counts["missed by proposals"] == {"cat": 0, "dog": 1, "owl": 0}
    assert errors.map_lost == pytest.approx({**dict.fromkeys(KINDS, 0), "background": 0.25})


def test_without_windows_every_missed_object_is_missed_by_score():
    assert find_errors({}, TRUTH, CLASSES).counts["missed by score"] == {"cat": 1, "dog": 1, "owl": 0}
    assert find_errors({}, TRUTH, CLASSES, {}).counts["missed by proposals"] == {"cat": 1, "dog": 1, "owl": 0}


def test_without_objects_nothing_costs_and_false_alarms_count():
    errors = find_errors(found(("cat", 1, FAR)), {"a": Annotation([], [])}, CLASSES)
    assert errors.map_lost == dict.fromkeys(KINDS, 0)
    assert errors.counts["background"]["cat"] == 1
    assert "0 of 0 objects are found" in errors.table()
    assert find_errors({}, {}, CLASSES).objects == 0


def test_the_table_has_a_line_for_each_kind():
    lines = find_errors(found(*CASES["wrong class"][0]), TRUTH, CLASSES, metric="area").table().splitlines()
    assert lines[0].split() == ["errors", "shown", "mAP", "lost", "most", "in"]
    assert [line[:21].strip() for line in lines[1:-1]] == list(KINDS)
    assert lines[1 + KINDS.index("wrong class")].split() == ["wrong", "class", "1", "0.7500", "dog", "(1)"]
    assert lines[-1].endswith("1 of 2 objects are found; mAP: of all, area at IoU 0.5")


def test_of_a_class_that_is_unknown_in_an_image_nothing_there_is_wrong():
    rows = RIGHT, ("cat", 0.4, CAT), ("cat", 0.9, FAR)
    truth = {"a": replace(TRUTH["a"], unknown=("horse",)), "b": Annotation([FAR], ("dog",), unknown=("cat",))}
    detections = {"a": found(*rows)["a"], "b": found(("cat", 0.8, FAR), ("dog", 0.8, FAR))["a"]}
    counts = find_errors(detections, truth, CLASSES, metric="area", use_difficult=True).counts
    assert {kind: sum(own.values()) for kind, own in counts.items() if any(own.values())} == {
        "found": 3,
        "background": 1,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"detections": {"b": found()["a"]}}, "image b, which has no annotation"), ({"classes": []}, "at least one"),
        ({"windows": {"a": [[0, 0, 1]]}}, "windows of image a must have shape"), ({"iou": 0}, "iou must lie above 0"),
        ({"thresholds": [1, 2]}, "threshold: expected a number, or one for each of 3 classes"),
        ({"metric": "AP"}, "metric must be one of"), ({"thresholds": math.nan}, "threshold"),
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused(wrong, message):
    with pytest.raises(SppnetError, match=message):
        find_errors(**{"detections": found(), "annotations": TRUTH, "classes": CLASSES, **wrong})
