"""Doubts about detections and labels, counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sppnet.evaluation.doubts import certainties, label_doubts, unlabelled_doubts
from sppnet.records import Annotation, Detections

CLASSES = ("cat", "dog")
A, B, C = (0, 0, 100, 100), (200, 0, 300, 100), (0, 200, 100, 300)


def shifted(box, share):
    """The box moved to the right so that the IoU with it is `share`."""
    width = (box[2] - box[0]) * (1 - share) / (1 + share)
    return box[0] + width, box[1], box[2] + width, box[3]


def found(*rows):
    """(box, class) of each row; scores do not count."""
    labels = np.array([CLASSES.index(name) for _, name in rows], np.int64)
    return Detections(np.array([box for box, _ in rows], float).reshape(-1, 4), np.zeros(len(rows)), labels, CLASSES)


def labels(*rows, difficult=None):
    boxes = np.array([box for box, _ in rows], float).reshape(-1, 4)
    return Annotation(boxes, tuple(name for _, name in rows), difficult)


def values(doubts):
    return {doubt.reason: pytest.approx(doubt.value, abs=1e-5) for doubt in doubts}


def test_margins_however_far_from_the_threshold_are_certain():
    given = Detections(np.tile(A, (2, 1)), np.array([1e4, -1e4]), np.array([0, 0]), CLASSES)
    assert certainties(given, 0, probabilities=False).tolist() == pytest.approx([1, 0])


def test_certainty_is_the_logistic_function_of_the_score_above_the_threshold_of_the_class():
    scores, thresholds = [0.5, 0.9, 0.01, 0.3, 1.0], (0.5, 0.3)
    given = Detections(np.tile(A, (5, 1)), np.array(scores), np.array([0, 0, 1, 1, 1]), CLASSES)
    odds = [
        math.log(s / (1 - s)) - math.log(t / (1 - t)) for s, t in zip(scores[:4], [0.5, 0.5, 0.3, 0.3], strict=True)
    ]
    expected = [1 / (1 + math.exp(-x)) for x in odds]
    assert certainties(given, thresholds, True)[:4] == pytest.approx(expected, rel=1e-5)
    assert certainties(given, thresholds, True)[4] > 0.9999
    margins = certainties(given, -0.5, False)
    assert margins == pytest.approx([1 / (1 + math.exp(-4 * (s + 0.5))) for s in scores], rel=1e-5)
    assert certainties(found(), 0.5, True).shape == (0,)


def test_without_labels_the_doubts_are_the_mistakes_to_expect():
    rng, names = np.random.default_rng(0), ("cat", "dog")
    for count in range(8):
        rows = [((200 * i, 0, 200 * i + 50, 50), names[int(rng.integers(2))]) for i in range(count)]
        certain = rng.random(count)
        expected = sum(min(c, 1 - c) for c in certain if 0.1 <= c <= 0.95)
        if all(certain < 0.5):
            expected += 0.7
        total = sum(doubt.value for doubt in unlabelled_doubts(found(*rows), certain, 0.7))
        assert total == pytest.approx(expected)


def test_two_classes_of_one_object_are_a_doubt_of_the_less_certain():
    doubts = unlabelled_doubts(found((A, "cat"), (shifted(A, 0.8), "dog")), np.array([0.8, 0.9]))
    assert values(doubts) == pytest.approx({"dog or cat": 0.8, "uncertain dog": 0.1})
    apart = unlabelled_doubts(found((A, "cat"), (shifted(A, 0.4), "dog")), np.array([0.8, 0.9]))
    assert values(apart) == pytest.approx({"uncertain cat": 0.2, "uncertain dog": 0.1})


def test_what_is_certain_is_no_doubt():
    assert unlabelled_doubts(found((A, "cat")), np.array([0.96])) == []


def test_nothing_found_counts_as_much_as_pictures_usually_show_something():
    assert values(unlabelled_doubts(found(), np.zeros(0), 0.9)) == {"nothing found": 0.9}
    assert unlabelled_doubts(found(), np.zeros(0), 0.0) == []
    assert values(unlabelled_doubts(found((A, "cat")), np.array([0.3]), 0.6)) == {
        "nothing found": 0.6,
        "uncertain cat": 0.3,
    }


@pytest.mark.parametrize(
    ("detections", "certain", "annotation", "expected"),
    [
        ([(A, "cat")], [0.9], [(A, "cat")], {}),
        ([(A, "cat")], [0.9], [], {"cat not labelled": 0.8}),
        ([(A, "cat")], [0.4], [], {}),
        ([(A, "cat")], [0.52], [], {}),
        ([(A, "cat")], [0.9], [(B, "cat")], {"cat not labelled": 0.8, "cat labelled, nothing seen": 1}),
        ([(A, "cat")], [0.06], [(A, "cat")], {"cat labelled, nothing seen": 0.4}),
        ([(A, "cat")], [0.1], [(A, "cat")], {}),
        ([(A, "dog")], [0.9], [(A, "cat")], {"cat labelled, dog seen": 0.8}),
        ([(A, "dog"), (A, "cat")], [0.9, 0.25], [(A, "cat")], {"cat labelled, dog seen": 0.8 * 0.75}),
        ([(shifted(A, 0.4), "dog")], [0.9], [(A, "cat")], {}),
        ([(shifted(A, 0.45), "cat")], [1.0], [(A, "cat")], {"cat badly placed": 0.5}),
        ([(shifted(A, 0.61), "cat")], [1.0], [(A, "cat")], {}),
        ([(shifted(A, 0.45), "cat"), (shifted(A, 0.7), "cat")], [0.9, 0.9], [(A, "cat")], {}),
        ([(shifted(A, 0.45), "cat"), (shifted(A, 0.7), "cat")], [1.0, 0.4], [(A, "cat")], {"cat badly placed": 0.5}),
        ([(A, "cat"), (A, "dog")], [0.9, 0.9], [(A, "cat"), (A, "dog")], {}),
    ],
)
def test_what_contradicts_the_labels(detections, certain, annotation, expected):
    doubts = label_doubts(found(*detections), np.array(certain), labels(*annotation))
    assert {doubt.reason: pytest.approx(doubt.value, abs=1e-5) for doubt in doubts} == expected


def test_difficult_labels_are_no_mistakes():
    flags = np.array([True, False])
    given = labels((A, "cat"), (B, "dog"), difficult=flags)
    assert label_doubts(found((A, "dog"), (B, "dog")), np.array([0.9, 0.9]), given) == []
    assert values(label_doubts(found(), np.zeros(0), given)) == {"dog labelled, nothing seen": 1}


def test_a_doubt_is_where_its_detection_or_its_label_is():
    doubts = label_doubts(found((A, "cat")), np.array([0.9]), labels((C, "dog")))
    assert [doubt.box for doubt in doubts] == [A, C]
