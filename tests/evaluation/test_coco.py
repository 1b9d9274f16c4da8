"""COCO's figures are those of pycocotools on files of the same detections and objects."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sppnet import Annotation, Detections, SppnetError, evaluate_voc
from sppnet.evaluation.coco import MEASURES
from sppnet.evaluation.voc import evaluate_flat

CLASSES = ("cat", "dog", "owl", "cow")  # no image shows a cow
ALL = slice(None)
WHERE = {"AP": (ALL, 0), "AP50": (0, 0), "AP75": (5, 0), "small": (ALL, 1), "medium": (ALL, 2), "large": (ALL, 3)}


def scenes(seed: int, images: int = 12) -> tuple[dict[str, Detections], dict[str, Annotation]]:
    """Images with objects of all sizes, some difficult, and detections near them and elsewhere; a quarter empty."""
    rng = np.random.default_rng(seed)
    found, truth = {}, {}
    for number in range(images):
        count = 0 if number % 4 == 3 else int(rng.integers(1, 8))
        corner, sides = rng.uniform(0, 300, (count, 2)), rng.choice([10, 40, 80, 150], (count, 2)) * rng.uniform(0.7, 1)
        boxes = np.concatenate([corner, corner + sides], axis=1)
        labels = rng.integers(0, 3, count)
        truth[f"{number}"] = Annotation(boxes, tuple(CLASSES[i] for i in labels), rng.random(count) < 0.2)
        near = (
            np.repeat(boxes, 3, axis=0)
            + rng.normal(0, 6, (3 * count, 4)) * np.repeat(sides, 3, 0)[:, [0, 1, 0, 1]] / 60
        )
        corner = rng.uniform(0, 300, (5, 2))
        every = np.concatenate([near, np.concatenate([corner, corner + rng.uniform(5, 150, (5, 2))], axis=1)])
        own = np.concatenate([np.repeat(labels, 3), rng.integers(0, 3, 5)])
        own = np.where(rng.random(len(own)) < 0.1, 0, own)
        scores = rng.integers(0, 20, len(own)) / 20  # equal scores are there
        found[f"{number}"] = Detections(every, scores, own, CLASSES)
    return found, truth


def by_files(found: dict[str, Detections], truth: dict[str, Annotation], folder: Path, crowds: bool) -> COCOeval:
    """What the library says of the two files."""
    numbers = {image: number for number, image in enumerate(truth, 1)}
    entries = [
        {"image_id": numbers[image], "category_id": CLASSES.index(name) + 1, "iscrowd": int(difficult and crowds),
         "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        for image, own in truth.items() for (x1, y1, x2, y2), name, difficult in own
    ]  # fmt: skip
    objects = {
        "images": [{"id": number} for number in numbers.values()],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(entries, 1)],
    }
    (folder / "objects.json").write_text(json.dumps(objects))
    results = [entry for image, own in found.items() for entry in own.to_coco(numbers[image])]
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        table = COCO(folder / "objects.json")
        judge = COCOeval(table, table.loadRes(str(folder / "results.json")), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


@pytest.mark.parametrize(("seed", "use_difficult"), [(0, False), (1, False), (2, True)])
def test_the_figures_are_those_of_the_library_on_files(tmp_path, capsys, seed, use_difficult):
    found, truth = scenes(seed)
    judge = by_files(found, truth, tmp_path, not use_difficult)
    own = evaluate_voc(found, truth, CLASSES, "coco", use_difficult=use_difficult)
    assert capsys.readouterr().out == ""
    assert list(own.mean.values()) == pytest.approx(judge.stats[:6], abs=1e-12)
    assert own.map == pytest.approx(judge.stats[0], abs=1e-12)
    assert len({round(value, 6) for value in own.mean.values()}) == 6
    for place, name in enumerate(CLASSES[:3]):
        for measure, (steps, area) in WHERE.items():
            expected = judge.eval["precision"][steps, :, place, area, 2].mean()
            expected = None if expected < 0 else pytest.approx(expected, abs=1e-12)
            assert own.measures[name][measure] == expected
        curve = own.results[name].curve
        assert curve.recall[-1] <= judge.eval["recall"][0, place, 0, 2] + 1e-12
        assert curve.precision.sum() / 101 == pytest.approx(own.measures[name]["AP50"], abs=1e-12)
    assert set(own.measures["cow"].values()) == {None}
    easy = sum(name == "cat" and (use_difficult or not d) for a in truth.values() for _, name, d in a)
    assert own.objects["cat"] == easy


def test_the_area_under_the_curve_at_one_overlap_is_near_the_other_rules():
    """Another matching and 101 points, so not equal: a mistake of boxes by a pixel would be seen."""
    found, truth = scenes(3, images=40)
    coco, area = (evaluate_voc(found, truth, CLASSES[:3], metric, use_difficult=True) for metric in ("coco", "area"))
    assert coco.mean["AP50"] == pytest.approx(area.map, abs=0.02)


def test_boxes_are_half_open():
    truth = {"a": Annotation([[0, 0, 32, 32], [50, 50, 82, 82.5]], ("cat", "cat"))}
    found = {"a": Detections([[0, 0, 32, 32], [50, 50, 82, 82.5]], [1, 1], [0, 0], ("cat",))}
    result = evaluate_voc(found, truth, ["cat"], "coco")
    assert {key: value for key, value in result.mean.items() if key != "large"} == pytest.approx(
        dict.fromkeys(list(MEASURES)[:5], 1.0)
    )
    assert result.mean["large"] is None
    half = {"a": Detections([[0, 0, 32, 16]], [1], [0], ("cat",))}  # an overlap of exactly 0.5
    assert evaluate_voc(half, {"a": truth["a"][:1]}, ["cat"], "coco").mean["AP50"] == pytest.approx(1)


def test_the_best_hundred_of_each_class_and_image_count():
    truth = {"a": Annotation([[0, 0, 50, 50], [0, 0, 50, 50]], ("cat", "dog"))}
    boxes, labels = [[60 + i, 60, 90 + i, 90] for i in range(100)] + [[0, 0, 50, 50]] * 2, [0] * 101 + [1]
    scores = [0.9] * 100 + [0.5, 0.4]
    result = evaluate_voc({"a": Detections(boxes, scores, labels, CLASSES)}, truth, ("cat", "dog"), "coco")
    assert result.ap == pytest.approx({"cat": 0, "dog": 1})
    ninety_nine = Detections(boxes[1:], scores[1:], labels[1:], CLASSES)
    assert evaluate_voc({"a": ninety_nine}, truth, ("cat", "dog"), "coco").ap["cat"] == pytest.approx(1 / 100)


def test_a_difficult_object_is_a_crowd():
    truth = {"a": Annotation([[0, 0, 100, 100], [200, 0, 240, 40]], ("cat", "cat"), [True, False])}
    inside = [[10, 10, 30, 30], [60, 60, 90, 90], [200, 0, 240, 40]]
    result = evaluate_voc({"a": Detections(inside, [0.9, 0.8, 0.7], [0, 0, 0], ("cat",))}, truth, ["cat"], "coco")
    assert (result.map, result.objects["cat"]) == (pytest.approx(1), 1)
    counted = evaluate_voc({"a": Detections(inside, [0.9, 0.8, 0.7], [0, 0, 0], ("cat",))}, truth, ["cat"], "coco",
                           use_difficult=True)  # fmt: skip
    assert (counted.map, counted.objects["cat"]) == (pytest.approx(51 / 101 / 3), 2)


def test_a_curve_ends_at_the_recall_that_is_reached():
    truth = {"a": Annotation([[0, 0, 10, 10], [50, 50, 60, 60], [0, 50, 9, 60]], ("cat", "cat", "dog"))}
    found = Detections([[0, 0, 10, 10], [80, 80, 90, 90], [80, 0, 90, 9]], [0.9, 0.8, 0.7], [0, 0, 1], CLASSES)
    curves = {name: own.curve for name, own in evaluate_voc({"a": found}, truth, CLASSES, "coco").results.items()}
    np.testing.assert_allclose(curves["cat"].recall, np.arange(51) / 100)
    np.testing.assert_allclose(curves["cat"].precision, 1)
    assert [len(curves[name].recall) for name in ("dog", "owl")] == [0, 0]  # none right, none there


def test_what_cannot_be_measured_is_null_and_a_dash():
    nothing = evaluate_voc({}, {"a": Annotation([], [])}, ["cat"], "coco")
    assert math.isnan(nothing.map)
    assert nothing.to_dict()["mean"] == dict.fromkeys(MEASURES)
    assert evaluate_voc({}, {}, ["cat"], "coco").mean == nothing.mean
    missed = evaluate_voc({}, {"a": Annotation([[0, 0, 9, 9]], ["cat"])}, ["cat", "cow"], "coco")
    json.dumps(missed.to_dict(), allow_nan=False)
    head, cat, cow, mean = missed.table().splitlines()
    assert head.split() == ["class", *MEASURES, "objects", "detections"]
    assert cat.split() == ["cat", "0.0000", "0.0000", "0.0000", "0.0000", "-", "-", "1", "0"]
    assert cow.split()[1:7] == ["-"] * 6
    assert mean.split()[:2] == ["mean", "0.0000"]
    assert mean.endswith("over 1 of 2 classes, coco at IoU 0.5 to 0.95")


def test_impossible_flat_detections_are_refused():
    truth = {"a": Annotation([[0, 0, 9, 9]], ["cat"])}
    with pytest.raises(SppnetError, match="cat: detection 0, in image a"):
        evaluate_flat({"cat": (["a"], [1], [[0, 0, 0, 9]])}, truth, ["cat"], "coco")
    with pytest.raises(SppnetError, match="image b, which has no annotation"):
        evaluate_flat({"cat": (["b"], [1], [[0, 0, 9, 9]])}, truth, ["cat"], "coco")
