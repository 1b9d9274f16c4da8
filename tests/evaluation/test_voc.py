from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from doubles import refused_by_us
from hypothesis import given
from hypothesis import strategies as st

from sppnet.data.comp4 import read_comp4
from sppnet.data.splits import read_image_set
from sppnet.data.voc import read_annotation
from sppnet.evaluation.proposals import proposal_recall
from sppnet.evaluation.results import ClassResult, best_threshold
from sppnet.evaluation.voc import average_precision, evaluate_flat, evaluate_voc
from sppnet.records import Annotation, Detections

NO_DETECTIONS = ([], np.zeros(0), np.zeros((0, 4)))


def annotation(*objects: tuple) -> Annotation:
    """Objects as (name, x1, y1, x2, y2) or with a difficult flag as sixth."""
    return Annotation(
        np.array([o[1:5] for o in objects], dtype=np.float32).reshape(-1, 4),
        tuple(o[0] for o in objects),
        np.array([len(o) > 5 and o[5] for o in objects], dtype=bool),
    )


def detections(*found: tuple, classes: tuple[str, ...] = ("cat", "dog")) -> Detections:
    """Detections as (name, score, x1, y1, x2, y2)."""
    return Detections(
        np.array([f[2:] for f in found], dtype=np.float32).reshape(-1, 4),
        np.array([f[1] for f in found], dtype=np.float32),
        np.array([classes.index(f[0]) for f in found], dtype=np.int64),
        classes,
    )


def evaluate_class(ids, scores, boxes, truth, name, metric="11point", iou=0.5) -> ClassResult:
    return evaluate_flat({name: (ids, scores, boxes)}, truth, [name], metric, iou).results[name]


# ---- the oracle: the rules as plain loops --------------------------------------------------------------------------


def naive_overlap(a, b) -> float:
    """IoU of two half-open boxes, by way of 1-based inclusive corners as the devkit does it."""
    a, b = ([c[0] + 1, c[1] + 1, c[2], c[3]] for c in (a, b))
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    sizes = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return width * height / (sum(sizes) - width * height)


def naive_curve(ids, scores, boxes, annotations, name, iou=0.5):
    """Recall and precision after every detection that is not ignored."""
    claimed, true, false, curve = set(), 0, 0, []
    total = sum(n == name and not d for a in annotations.values() for n, d in zip(a.names, a.difficult, strict=True))
    for row in sorted(range(len(ids)), key=lambda r: -scores[r]):
        truth, best, where = annotations[ids[row]], 0.0, None
        for index, other in enumerate(truth.names):
            if other == name:
                overlap = naive_overlap(boxes[row], truth.boxes[index])
                if overlap > best:
                    best, where = overlap, index
        if where is not None and best >= iou:
            if truth.difficult[where]:
                continue
            true, false = (true + 1, false) if (ids[row], where) not in claimed else (true, false + 1)
            claimed.add((ids[row], where))
        else:
            false += 1
        curve.append((true / total if total else 0.0, true / (true + false)))
    return curve, total


def naive_ap(curve, metric) -> float:
    if metric == "11point":
        return sum(max([p for r, p in curve if r > k / 10 - 1e-9], default=0.0) for k in range(11)) / 11
    area, before = 0.0, 0.0
    for index, (recall, _) in enumerate(curve):
        area += (recall - before) * max(p for _, p in curve[index:])
        before = recall
    return area


# ---- conformance ----------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["cat", "dog", "bird"])
def test_both_rules_give_the_devkits_numbers(shared, name):
    folder = shared / "golden" / "voc_ap"
    expected = {row[0]: row[1:] for row in map(str.split, (folder / "expected.txt").read_text().splitlines())}[name]
    ids = read_image_set(folder / "ImageSets" / "Main" / "test.txt")
    truth = {i: read_annotation(folder / "Annotations" / f"{i}.xml")[0] for i in ids}
    found = {name: read_comp4(folder / f"comp4_det_test_{name}.txt")}
    eleven = evaluate_flat(found, truth, [name], "11point").results[name]
    area = evaluate_flat(found, truth, [name], "area").results[name]
    assert eleven.detections == int(expected[0])
    measured = [eleven.ap, area.ap, eleven.curve.recall[-1], eleven.curve.precision[-1]]
    assert measured == pytest.approx([float(value) for value in expected[1:]], abs=1e-9)


corner = st.integers(0, 12)
side = st.integers(1, 10)
image_id = st.sampled_from(["a", "b", "c"])
name = st.sampled_from(["cat", "dog"])
a_truth = st.lists(st.tuples(image_id, name, corner, corner, side, side, st.booleans()), max_size=8)
a_search = st.lists(st.tuples(image_id, st.integers(0, 4), corner, corner, side, side), max_size=14)


@given(a_truth, a_search, st.sampled_from(["11point", "area"]))
def test_random_scenes_with_ties_agree_with_the_naive_loop(objects, found, metric):
    truth = {
        key: annotation(*((o[1], o[2], o[3], o[2] + o[4], o[3] + o[5], o[6]) for o in objects if o[0] == key))
        for key in "abc"
    }
    ids, scores = [f[0] for f in found], np.array([f[1] / 2 for f in found])
    boxes = np.array([[x, y, x + w, y + h] for _, _, x, y, w, h in found], dtype=np.float64).reshape(-1, 4)
    result = evaluate_class(ids, scores, boxes, truth, "cat", metric)
    curve, total = naive_curve(ids, scores, boxes, truth, "cat")
    assert result.objects == total
    assert result.detections == len(ids)
    assert np.stack([result.curve.recall, result.curve.precision], axis=1) == pytest.approx(
        np.array(curve).reshape(-1, 2)
    )
    assert (result.ap is None) if total == 0 else (result.ap == pytest.approx(naive_ap(curve, metric), abs=1e-12))


def naive_ilsvrc_curve(ids, scores, boxes, annotations, name, iou):
    """Recall and precision after every detection by the rule of ILSVRC."""
    claimed, true, curve = set(), 0, []
    total = sum(other == name for a in annotations.values() for other in a.names)
    for count, row in enumerate(sorted(range(len(ids)), key=lambda r: -scores[r]), start=1):
        best, where = 0.0, None
        for index, other in enumerate(annotations[ids[row]].names):
            x1, y1, x2, y2 = annotations[ids[row]].boxes[index].tolist()
            needed = min(iou, (x2 - x1) * (y2 - y1) / ((x2 - x1 + 10) * (y2 - y1 + 10)))
            overlap = naive_overlap(boxes[row], (x1, y1, x2, y2))
            if other == name and (ids[row], index) not in claimed and overlap >= needed and overlap > best:
                best, where = overlap, index
        if where is not None:
            claimed.add((ids[row], where))
            true += 1
        curve.append((true / total if total else 0.0, true / count))
    return curve, total


@given(a_truth, a_search, st.sampled_from([0.3, 0.5, 1]), st.integers(1, 4))
def test_ilsvrcs_rule_agrees_with_its_naive_loop(objects, found, iou, size):
    """`size` enlarges the scenes: small objects are found at less than `iou`, large ones are not."""
    truth = {
        key: annotation(
            *((o[1], *(size * c for c in (o[2], o[3], o[2] + o[4], o[3] + o[5])), o[6]) for o in objects if o[0] == key)
        )
        for key in "abc"
    }
    ids, scores = [f[0] for f in found], np.array([f[1] / 2 for f in found])
    boxes = size * np.array([[x, y, x + w, y + h] for _, _, x, y, w, h in found], dtype=np.float64).reshape(-1, 4)
    result = evaluate_class(ids, scores, boxes, truth, "cat", "ilsvrc", iou)
    curve, total = naive_ilsvrc_curve(ids, scores, boxes, truth, "cat", iou)
    assert (result.objects, result.detections) == (total, len(ids))
    assert np.stack([result.curve.recall, result.curve.precision], axis=1) == pytest.approx(
        np.array(curve).reshape(-1, 2)
    )
    assert (result.ap is None) if total == 0 else (result.ap == pytest.approx(naive_ap(curve, "area"), abs=1e-12))


def by_ilsvrc(objects, *boxes, iou=0.5):
    """Precision after each of these detections, of falling scores, in an image with these cats."""
    truth = {"a": annotation(*(("cat", *box) for box in objects))}
    scores = np.arange(len(boxes), 0, -1)
    return evaluate_class(["a"] * len(boxes), scores, boxes, truth, "cat", "ilsvrc", iou).curve.precision.tolist()


def test_by_ilsvrcs_rule_a_small_object_is_found_at_less_than_half():
    small, large = (0, 0, 10, 10), (0, 0, 100, 100)  # 100 / 400 is enough for the first
    assert by_ilsvrc([small], (0, 0, 3, 10)) == [1]  # IoU 0.3
    assert by_ilsvrc([small], (0, 0, 5, 5)) == [1]  # exactly enough
    assert by_ilsvrc([small], (0, 0, 2.4, 10)) == [0]
    for tall in (False, True):  # 400 / 1000 is enough for one of 40 × 10 pixels, lying or upright
        lying, less, enough = (0, 0, 40, 10), (0, 0, 15, 10), (0, 0, 16, 10)
        box, low, high = ((x, y, h, w) if tall else (x, y, w, h) for x, y, w, h in (lying, less, enough))
        assert (by_ilsvrc([box], low), by_ilsvrc([box], high)) == ([0], [1])
    assert by_ilsvrc([large], (0, 0, 49, 100)) == [0]
    assert by_ilsvrc([large], (0, 0, 50, 100)) == [1]  # exactly a half
    assert by_ilsvrc([large], (0, 0, 40, 100), iou=0.4) == [1]


def test_by_ilsvrcs_rule_a_detection_takes_the_best_object_that_is_free_and_duplicates_are_false():
    objects = (0, 0, 100, 100), (0, 20, 100, 120)
    between = (0, 5, 100, 105)  # nearer to the first
    assert by_ilsvrc(objects, between, between) == [1, 1]
    assert by_ilsvrc(objects, between, between, between) == [1, 1, pytest.approx(2 / 3)]
    assert by_ilsvrc(objects[:1], between, between) == [1, 0.5]
    truth = {"a": annotation(*(("cat", *box) for box in objects))}
    found = evaluate_class(["a", "a"], [2, 1], [between, between], truth, "cat", "area").curve.precision
    assert found.tolist() == [1, 0.5]  # VOC's rule looks at the best object alone


def test_by_ilsvrcs_rule_no_object_is_difficult():
    truth = {"a": annotation(("cat", 0, 0, 50, 50, True), ("cat", 60, 60, 90, 90))}
    found = evaluate_flat({"cat": (["a"], [1], [[0, 0, 50, 50]])}, truth, ["cat"], "ilsvrc")
    assert (found.objects["cat"], found.ap["cat"], found.use_difficult) == (2, 0.5, True)


@pytest.mark.parametrize("found", [3, 6, 7])
def test_a_recall_of_exactly_k_tenths_reaches_its_threshold(found):
    recall = np.cumsum(np.full(found, 1.0)) / 10
    assert average_precision(recall, np.ones(found), "11point") == pytest.approx((found + 1) / 11, abs=1e-12)


def test_a_recall_that_rounding_put_just_below_a_threshold_reaches_it():
    recall = np.cumsum(np.full(8, 0.1))
    assert recall[7] < 0.8
    assert average_precision(recall, np.ones(8), "11point") == pytest.approx(9 / 11, abs=1e-12)


@pytest.mark.parametrize("metric", ["11point", "area"])
def test_average_precision_is_one_for_a_perfect_curve_and_zero_for_an_empty_one(metric):
    assert average_precision([0.5, 1.0], [1.0, 1.0], metric) == 1.0
    assert average_precision([], [], metric) == 0.0


def test_the_area_uses_the_best_precision_to_the_right():
    assert average_precision([0.0, 0.5, 1.0], [0.0, 0.5, 2 / 3], "area") == pytest.approx(2 / 3)


# ---- rules one by one -----------------------------------------------------------------------------------------------


def score_of(truth, *found, **options):
    return evaluate_voc({"a": detections(*found)}, {"a": truth}, ["cat"], **options)


def test_an_overlap_of_exactly_the_threshold_is_a_hit():
    truth = annotation(("cat", 0, 0, 10, 10))
    assert score_of(truth, ("cat", 1, 0, 0, 10, 5)).ap["cat"] == 1.0
    assert score_of(truth, ("cat", 1, 0, 0, 10, 4.9)).ap["cat"] == 0.0


def test_a_second_detection_of_an_object_is_a_false_positive():
    result = score_of(annotation(("cat", 0, 0, 10, 10)), ("cat", 0.5, 0, 0, 10, 10), ("cat", 0.9, 0, 0, 10, 9))
    assert result.results["cat"].curve.precision.tolist() == [1.0, 0.5]
    assert result.results["cat"].curve.scores.tolist() == pytest.approx([0.9, 0.5])


def test_a_detection_whose_best_object_is_taken_does_not_fall_back_to_the_next_one():
    truth = annotation(("cat", 0, 0, 10, 10), ("cat", 0, 0, 10, 8))
    result = score_of(truth, ("cat", 2, 0, 0, 10, 10), ("cat", 1, 0, 0, 10, 9.5))
    assert result.results["cat"].curve.recall.tolist() == [0.5, 0.5]


def test_a_detection_on_a_difficult_object_is_ignored_and_the_object_is_not_missed():
    truth = annotation(("cat", 0, 0, 10, 10, True), ("cat", 20, 20, 30, 30))
    result = score_of(truth, ("cat", 2, 0, 0, 10, 10), ("cat", 1, 20, 20, 30, 30))
    cat = result.results["cat"]
    assert (cat.ap, cat.objects, cat.detections) == (1.0, 1, 2)
    assert len(result.results["cat"].curve.recall) == 1


def test_difficult_objects_count_where_asked_for():
    truth = annotation(("cat", 0, 0, 10, 10, True))
    assert score_of(truth, ("cat", 1, 0, 0, 10, 10)).ap["cat"] is None
    assert score_of(truth, ("cat", 1, 0, 0, 10, 10), use_difficult=True).ap["cat"] == 1.0


def test_an_object_of_another_class_or_image_is_not_hit():
    truth = {"a": annotation(("dog", 0, 0, 10, 10)), "b": annotation(("cat", 0, 0, 10, 10))}
    result = evaluate_voc({"a": detections(("cat", 1, 0, 0, 10, 10))}, truth, ["cat"])
    assert (result.ap["cat"], result.results["cat"].objects) == (0.0, 1)


def test_equal_scores_keep_the_order_they_were_given_in():
    truth = {"a": annotation(("cat", 0, 0, 10, 10))}
    hit, miss = [0, 0, 10, 10], [50, 50, 60, 60]
    first = evaluate_class(["a", "a"], [1, 1], [hit, miss], truth, "cat")
    second = evaluate_class(["a", "a"], [1, 1], [miss, hit], truth, "cat")
    assert first.curve.precision.tolist() == [1.0, 0.5]
    assert second.curve.precision.tolist() == [0.0, 0.5]


def test_an_annotated_image_without_detections_counts_as_missed():
    truth = {"a": annotation(("cat", 0, 0, 10, 10)), "b": annotation(("cat", 0, 0, 10, 10))}
    result = evaluate_voc({"b": detections(("cat", 1, 0, 0, 10, 10))}, truth, ["cat"], "area")
    assert result.ap["cat"] == 0.5


def test_a_class_without_objects_is_absent_and_left_out_of_the_mean():
    result = evaluate_voc(
        {"a": detections(("cat", 1, 0, 0, 10, 10), ("dog", 1, 0, 0, 9, 9))},
        {"a": annotation(("cat", 0, 0, 10, 10))},
        ["cat", "dog"],
    )
    assert result.ap == {"cat": 1.0, "dog": None}
    assert result.map == 1.0
    assert result.results["dog"].detections == 1


@pytest.mark.parametrize("truth", [{}, {"a": annotation()}])
def test_no_objects_at_all_have_no_mean(truth):
    result = evaluate_voc({}, truth, ["cat"])
    assert math.isnan(result.map)
    assert json.loads(json.dumps(result.to_dict()))["map"] is None
    assert "over 0 of 1 class" in result.table()


def test_a_class_without_detections_has_ap_zero():
    result = evaluate_flat({"cat": NO_DETECTIONS}, {"a": annotation(("cat", 0, 0, 10, 10))}, ["cat"])
    assert result.ap["cat"] == 0.0
    assert len(result.results["cat"].curve.recall) == 0


def test_detections_of_other_classes_are_left_out():
    truth = {"a": annotation(("cat", 0, 0, 10, 10)), "b": annotation(("dog", 5, 5, 9, 9))}
    found = {"a": detections(("dog", 3, 0, 0, 10, 10)), "b": detections(("cat", 2, 5, 5, 9, 9), ("dog", 1, 5, 5, 9, 9))}
    result = evaluate_voc(found, truth, ["dog"])
    assert result.ap == {"dog": 0.5}
    assert result.results["dog"].detections == 2


@pytest.mark.parametrize("metric", ["11point", "area", "ilsvrc", "coco"])
def test_of_a_class_that_is_unknown_in_an_image_nothing_there_is_wrong(metric):
    cat, dog = (0, 0, 50, 50), (50, 50, 99, 99)
    truth = {"a": annotation(("cat", *cat)), "b": annotation(("dog", *dog))}
    found = {"a": detections(("cat", 1, *cat), ("dog", 3, *dog)), "b": detections(("dog", 2, *dog), ("cat", 3, *cat))}
    assert max(evaluate_voc(found, truth, ["cat", "dog"], metric).ap.values()) < 0.6
    truth["a"] = replace(truth["a"], unknown=("dog",))
    result = evaluate_voc(found, truth, ["cat", "dog"], metric)
    assert result.ap["dog"] == pytest.approx(1)
    assert result.ap["cat"] < 0.6
    assert result.results["dog"].detections == 1


def test_the_table_shows_every_class_and_the_mean():
    result = evaluate_voc(
        {"a": detections(("cat", 1, 0, 0, 10, 10))}, {"a": annotation(("cat", 0, 0, 10, 10))}, ["cat", "dog"], "area"
    )
    lines = result.table().splitlines()
    assert lines[1].split() == ["cat", "1.0000", "1", "1", "1.0000", "1.0000"]
    assert lines[2].split()[:4] == ["dog", "-", "0", "0"]
    assert lines[3].split()[:2] == ["mean", "1.0000"]
    assert lines[3].endswith("over 1 of 2 classes, area at IoU 0.5")


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_detections_for_an_unknown_image_are_an_error():
    with pytest.raises(ValueError, match=r"image b, which has no annotation; evaluate on the images that were"):
        evaluate_voc({"b": detections()}, {"a": annotation()}, ["cat"])
    with pytest.raises(ValueError, match=r"cat: detections for image b and 1 more, which has no annotation"):
        evaluate_flat({"cat": (["b", "c"], [1, 2], np.zeros((2, 4)))}, {"a": annotation()}, ["cat"])


def test_arrays_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match=r"cat: 1 image ids, 2 scores and 1 boxes; give one of each"):
        evaluate_class(["a"], [1, 2], np.zeros((1, 4)), {"a": annotation()}, "cat")


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_finite_number_is_an_error(score):
    with pytest.raises(ValueError, match=r"detection 1, in image a, has the score (nan|inf) and .*; expected finite"):
        evaluate_class(["a", "a"], [1, score], [[0, 0, 9, 9]] * 2, {"a": annotation()}, "cat")


@pytest.mark.parametrize("classes", [[], ["cat", "cat"]])
def test_no_classes_or_repeated_ones_are_an_error(classes):
    with pytest.raises(ValueError, match=r"classes must be distinct names.*, got (none|\[)"):
        evaluate_voc({}, {}, classes)


def test_a_class_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match=r"no detections given for dog; pass empty arrays for a class without any"):
        evaluate_flat({"cat": NO_DETECTIONS}, {"a": annotation()}, ["cat", "dog"])


def test_an_unknown_metric_is_an_error():
    with pytest.raises(ValueError, match="metric must be one of 11point, area, ilsvrc, got 'coco'"):
        average_precision([1.0], [1.0], "coco")


def test_recall_and_precision_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match=r"must both have shape \(R,\), got \(1,\) and \(2,\)"):
        average_precision([1.0], [1.0, 0.5])


TRUTH = annotation(("cat", 0, 0, 10, 10))
FOUND = detections(("cat", 1, 0, 0, 10, 10))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"detections": {"a": None}}, r"image a: expected sppnet\.Detections, got NoneType"),
        ({"detections": {"a": {"boxes": [], "scores": [], "labels": []}}}, "image a: expected .* got dict"),
        ({"detections": {"a": ([[0, 0, 1, 1]], [1], [0])}}, "image a: expected .* got tuple"),
        ({"detections": {1: FOUND}, "annotations": {1: TRUTH}}, "image 1: ids must be texts, got int"),
        ({"detections": [FOUND, FOUND], "annotations": [TRUTH]}, "2 detections and 1 annotations"),
        ({"detections": [FOUND]}, "both be mappings by image id, or both be sequences"),
        ({"detections": "a"}, "got str"), ({"detections": None}, "got NoneType"),
        ({"detections": "a", "annotations": "a"}, "got str"),
        ({"detections": FOUND}, "got Detections"), ({"detections": 3, "annotations": [TRUTH]}, "got int"),
        ({"detections": {"a": detections(classes=("dog", "owl"))}}, "class 'cat' is none of .* classes: dog, owl"),
        ({"annotations": {"a": None}}, r"image a: expected sppnet\.Annotation, got NoneType"),
        ({"annotations": {"a": TRUTH, "b": FOUND}}, "image b: expected .*Annotation, got Detections"),
        ({"annotations": {}}, "image a, which has no annotation"),
        ({"classes": "cat"}, "classes: expected a sequence of names"), ({"classes": ["cat", 3]}, "got 3 among them"),
        ({"classes": []}, "at least one"), ({"classes": ["cat", "cat"]}, "distinct"), ({"classes": None}, "got None"),
        ({"metric": "11points"}, "metric must be"), ({"metric": None}, "metric must be"), ({"metric": []}, "metric"),
        ({"iou": 0}, "iou must lie above 0"), ({"iou": 1.5}, "iou must be an overlap"), ({"iou": -1}, "iou"),
        ({"iou": math.nan}, "iou"), ({"iou": "0.5"}, "iou"), ({"iou": True}, "iou"), ({"iou": None}, "iou"),
        ({"use_difficult": "no"}, "use_difficult must be true or false"), ({"use_difficult": None}, "use_difficult"),
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused(wrong, message):
    arguments = {"detections": {"a": FOUND}, "annotations": {"a": TRUTH}, "classes": ["cat"], **wrong}
    assert re.search(message, refused_by_us(lambda: evaluate_voc(**arguments)))


@pytest.mark.parametrize(
    "change",
    [
        {"boxes": np.float32([[0, 0, np.nan, 10]])}, {"boxes": np.float32([[9, 0, 3, 10]])},
        {"scores": np.float32([np.nan])},
    ],
)  # fmt: skip
def test_numbers_that_became_impossible_after_they_were_checked_are_refused_with_the_image(change):
    found = detections(("cat", 1, 0, 0, 10, 10))
    for name, array in change.items():
        getattr(found, name)[:] = array
    assert "image a" in refused_by_us(lambda: evaluate_voc({"a": found}, {"a": TRUTH}, ["cat"]))


@pytest.mark.parametrize(
    "entry",
    [
        (["a"], [1], [[0, 0, 0, 9]]), (["a"], [1], [[0, 0, np.inf, 9]]), (["a"], ["1"], [[0, 0, 9, 9]]), None, "abc",
        (["a"], [1]), ([3], [1], [[0, 0, 9, 9]]), (["a"], [[1]], [[0, 0, 9, 9]]), (["a"], [True], [[0, 0, 9, 9]]),
        (["a", "a"], [1], [[0, 0, 9, 9]]), (["b"], [1], [[0, 0, 9, 9]]), (["a"], [1], [["0", "0", "9", "9"]]),
    ],
)  # fmt: skip
def test_impossible_flat_detections_are_refused(entry):
    refused_by_us(lambda: evaluate_flat({"cat": entry}, {"a": TRUTH}, ["cat"]))
    refused_by_us(lambda: evaluate_flat([entry], {"a": TRUTH}, ["cat"]))


@given(a_truth, a_search)
def test_classes_go_by_name_whatever_their_order_in_the_detections(objects, found):
    """Detections that count their classes otherwise, or know more of them, have the AP of the flat lists."""
    truth = {
        key: annotation(*((o[1], o[2], o[3], o[2] + o[4], o[3] + o[5], o[6]) for o in objects if o[0] == key))
        for key in "abc"
    }
    rows = [("cat" if s % 2 else "dog", s, x, y, x + w, y + h, key) for key, s, x, y, w, h in found]
    orders = (("cat", "dog"), ("dog", "cat"), ("owl", "dog", "cow", "cat"))
    results = [
        evaluate_voc({k: detections(*(r[:6] for r in rows if r[6] == k), classes=order) for k in "abc"}, truth, ["cat"])
        for order in orders
    ]
    own = [row for key in "abc" for row in rows if row[6] == key and row[0] == "cat"]
    flat = ([r[6] for r in own], [r[1] for r in own], [r[2:6] for r in own])
    expected = evaluate_flat({"cat": flat}, truth, ["cat"])
    assert [result.ap for result in results] == [expected.ap] * 3
    in_order = evaluate_voc(
        [detections(*(r[:6] for r in rows if r[6] == k)) for k in "abc"], list(truth.values()), ["cat"]
    )
    assert in_order.ap == expected.ap


# ---- thresholds -----------------------------------------------------------------------------------------------------


def f1_of(ids, scores, boxes, truth, threshold) -> float:
    """F1 of the detections of cats that score at least `threshold`, counted one by one."""
    kept = [row for row in range(len(ids)) if scores[row] >= threshold]
    own = [[ids[row] for row in kept], [scores[row] for row in kept], [boxes[row] for row in kept]]
    curve, total = naive_curve(*own, truth, "cat")
    found = round(curve[-1][0] * total) if curve else 0
    return 2 * found / (len(curve) + total) if total else 0.0


@given(a_truth, a_search)
def test_the_best_threshold_is_that_of_the_best_f1_of_all(objects, found):
    truth = {
        key: annotation(*((o[1], o[2], o[3], o[2] + o[4], o[3] + o[5], o[6]) for o in objects if o[0] == key))
        for key in "abc"
    }
    ids, scores = [f[0] for f in found], np.array([f[1] / 2 for f in found])
    boxes = np.array([[x, y, x + w, y + h] for _, _, x, y, w, h in found], dtype=np.float64).reshape(-1, 4)
    threshold, f1 = best_threshold(evaluate_class(ids, scores, boxes, truth, "cat").curve)
    possible = {score: f1_of(ids, scores, boxes, truth, score) for score in (0, 0.5, 1, 1.5, 2)}
    best = max(possible.values())
    assert f1 == pytest.approx(best)
    if best:
        assert f1_of(ids, scores, boxes, truth, threshold) == pytest.approx(best)
        assert threshold >= max(score for score, value in possible.items() if value == best) - 0.5
    else:
        assert math.isnan(threshold)


@pytest.mark.parametrize(
    ("hits", "scores", "threshold", "f1"),
    [
        ("+", [0.5], 0.5, 1),  # the lowest of all
        ("+-", [0.5, 0.1], 0.3, 1),  # halfway to the next
        ("++--", [0.9, 0.8, 0.8, 0.2], 0.5, 4 / 5),  # equal scores cannot be told apart
        ("+-+", [0.9, 0.5, 0.1], 0.1, 4 / 5),
        ("-", [0.9], math.nan, 0),
    ],
)
def test_a_threshold_lies_halfway_between_neighbours(hits, scores, threshold, f1):
    boxes = [[20 * i, 0, 20 * i + 10, 10] if hit == "+" else [0, 50, 10, 60] for i, hit in enumerate(hits)]
    truth = {"a": annotation(*(("cat", *box) for box, hit in zip(boxes, hits, strict=True) if hit == "+"))}
    truth["a"] = truth["a"] if len(truth["a"]) else TRUTH
    curve = evaluate_class(["a"] * len(hits), scores, boxes, truth, "cat").curve
    assert best_threshold(curve) == (pytest.approx(threshold, nan_ok=True), pytest.approx(f1))


def test_of_thresholds_of_equal_f1_the_highest_is_taken():
    truth = {"a": annotation(*(("cat", 20 * i, 0, 20 * i + 10, 10) for i in range(4)))}
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [0, 50, 9, 60], [0, 60, 9, 70], [40, 0, 50, 10]]  # hit hit miss miss hit
    curve = evaluate_class(["a"] * 5, [5, 4, 3, 2, 1], boxes, truth, "cat").curve
    assert best_threshold(curve) == (3.5, pytest.approx(2 / 3))  # as is that of all five


# ---- candidate windows ----------------------------------------------------------------------------------------------


def test_proposal_recall_agrees_with_a_naive_loop():
    random = np.random.default_rng(0)
    corners = random.integers(0, 30, (2, 40, 2))
    boxes = np.concatenate([corners[0], corners[0] + 1 + corners[1] // 2], axis=1).astype(np.float64)
    windows = {"a": boxes[:15], "b": boxes[15:30]}
    truth = {
        "a": annotation(*(("cat", *box) for box in boxes[30:34])),
        "b": annotation(*(("dog", *box) for box in boxes[34:40])),
    }
    best = [max(naive_overlap(window, box) for window in windows[key][:10]) for key in "ab" for box in truth[key].boxes]
    quality = proposal_recall(windows, truth, iou=0.3, max_windows=10)
    assert quality.best_overlaps == pytest.approx(np.array(best))
    assert quality.recall == pytest.approx(np.mean(np.array(best) >= 0.3))
    assert quality.mean_best_overlap == pytest.approx(np.mean(best))
    assert (len(quality.best_overlaps), quality.mean_windows) == (10, 10)


@pytest.mark.shared_data
def test_the_stored_windows_reach_their_stated_recall_averaged_over_nine_classes(shared):
    windows, truth = {}, {}
    for year in ("VOC2007", "VOC2012"):
        folder = shared / "voc" / "VOCdevkit" / year
        with np.load(shared / "voc" / "proposals" / f"selective_search_fast_{year}.npz", allow_pickle=False) as stored:
            rows = np.split(stored["boxes"], stored["offsets"][1:-1])
            windows |= dict(zip(stored["ids"].tolist(), rows, strict=True))
        for key in read_image_set(folder / "ImageSets" / "Main" / "val.txt"):
            truth[key] = read_annotation(folder / "Annotations" / f"{key}.xml")[0]
    recalls = [
        proposal_recall(windows, {key: objects.of((name,)) for key, objects in truth.items()}, max_windows=2000).recall
        for name in ("bus", "car", "cat", "cow", "dog", "horse", "person", "sheep", "train")
    ]
    assert np.mean(recalls) == pytest.approx(0.95, abs=0.001)


def test_difficult_objects_need_not_be_covered():
    truth = {"a": annotation(("cat", 0, 0, 4, 4), ("cat", 10, 10, 20, 20, True))}
    assert proposal_recall({"a": [[0, 0, 4, 4]]}, truth).recall == 1.0
    assert proposal_recall({"a": [[0, 0, 4, 4]]}, truth, use_difficult=True).recall == 0.5


def test_an_image_without_windows_covers_nothing():
    quality = proposal_recall({"a": np.zeros((0, 4))}, {"a": annotation(("cat", 0, 0, 4, 4))})
    assert (quality.recall, quality.mean_best_overlap, quality.mean_windows) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("truth", [{}, {"a": annotation()}])
def test_without_objects_the_cover_is_undefined(truth):
    quality = proposal_recall({"a": [[0, 0, 4, 4]]}, truth)
    assert math.isnan(quality.recall)
    assert math.isnan(quality.mean_best_overlap)


def test_an_annotated_image_that_was_not_searched_is_an_error():
    with pytest.raises(ValueError, match=r"no windows given for image b \(1 of 2 images\); propose them first"):
        proposal_recall({"a": []}, {"a": annotation(), "b": annotation()})
