"""The values that travel between the rooms."""

import dataclasses

import numpy as np
import pytest
from doubles import annotated

from sppnet.records import Annotation, Detections, SkipCounts, spread

OBJECTS = annotated(("cat", (0, 0, 5, 5)), ("dog", (1, 1, 6, 6)), ("cat", (2, 2, 7, 7)), difficult=(False, True, True))


def test_only_the_objects_of_some_classes():
    cats = OBJECTS.of(("cat",))
    assert cats.names == ("cat", "cat")
    assert cats.boxes[:, 0].tolist() == [0, 2]
    assert cats.difficult.tolist() == [False, True]
    assert OBJECTS.of(frozenset({"cat", "dog"})).names == OBJECTS.names


def test_no_object_of_the_class_leaves_an_empty_annotation():
    none = OBJECTS.of(("horse",))
    assert none.boxes.shape == (0, 4)
    assert none.names == ()
    assert none.difficult.shape == (0,)


def test_only_the_objects_that_are_not_difficult():
    assert OBJECTS.easy().names == ("cat",)
    assert OBJECTS.easy().boxes.tolist() == [[0, 0, 5, 5]]


def test_an_empty_annotation_stays_empty():
    empty = annotated()
    assert empty.of(("cat",)).boxes.shape == (0, 4)
    assert empty.easy().boxes.shape == (0, 4)


def test_names_and_boxes_that_do_not_match_are_noticed():
    broken = Annotation(np.zeros((2, 4), np.float32), ("cat",), np.zeros(2, bool))
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        broken.easy()


def test_detections_above_a_threshold_include_it():
    found = Detections(
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.array([2.0, 1.0, -1.0], np.float32),
        np.array([0, 1, 0]),
        ("a", "b"),
    )
    kept = found.above(1.0)
    assert len(found) == 3
    assert len(kept) == 2
    assert kept.boxes.tolist() == found.boxes[:2].tolist()
    assert kept.labels.tolist() == [0, 1]
    assert kept.classes == ("a", "b")
    assert len(found.above(5.0)) == 0


def test_skips_add_up_by_reason():
    total = SkipCounts({"no area": 2}).plus(SkipCounts({"no area": 1, "outside": 4})).plus(SkipCounts())
    assert total.counts == {"no area": 3, "outside": 4}


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OBJECTS.names = ()


def test_things_are_spread_over_all_of_them_in_order():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread("abc", 100) == ["a", "b", "c"]
    assert spread([], 3) == spread([1, 2], 0) == []
