"""The values that travel between the steps, and arithmetic on boxes against loops over pixels."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from doubles import annotated
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sppnet.records import (
    Annotation,
    Detections,
    ImageRecord,
    SkipCounts,
    areas,
    as_boxes,
    clip_boxes,
    flip_boxes,
    pairwise_iou,
    spread,
)

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


NONE = np.zeros((0, 4))
corners = arrays(np.float64, (5, 4), elements=st.integers(0, 12).map(float))


def ordered(boxes):
    return np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)


def pixels_of(box):
    x1, y1, x2, y2 = (int(edge) for edge in box)
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


def iou_by_counting(box, other):
    own, its = pixels_of(box), pixels_of(other)
    return len(own & its) / len(own | its) if own | its else 0.0


@given(corners, corners)
def test_iou_counts_the_pixels_of_half_open_boxes(boxes, others):
    boxes, others = ordered(boxes), ordered(others)
    expected = [[iou_by_counting(box, other) for other in others] for box in boxes]
    np.testing.assert_allclose(pairwise_iou(boxes, others), expected, atol=1e-12)


def test_iou_equals_the_devkit_s_for_inclusive_corners():
    inclusive = np.array([[11, 21, 30, 60], [16, 31, 45, 50]])  # 1-based; the devkit adds 1 to every side
    width, height = 30 - 16 + 1, 50 - 31 + 1
    union = 20 * 40 + 30 * 20 - width * height
    boxes = inclusive - [1, 1, 0, 0]
    assert pairwise_iou(boxes[:1], boxes[1:]).item() == pytest.approx(width * height / union)


@given(corners)
def test_areas_count_pixels(boxes):
    np.testing.assert_array_equal(areas(ordered(boxes)), [len(pixels_of(box)) for box in ordered(boxes)])


def test_a_box_turned_inside_out_has_no_area_and_overlaps_nothing():
    inside_out = np.array([[10.0, 10.0, 2.0, 2.0]])
    assert areas(inside_out).tolist() == [0]
    assert pairwise_iou(inside_out, np.array([[0.0, 0.0, 20.0, 20.0]])).tolist() == [[0]]


def test_two_boxes_without_area_overlap_by_zero_and_not_by_nan():
    point = np.array([[3.0, 3.0, 3.0, 3.0]])
    assert pairwise_iou(point, point).tolist() == [[0]]


def test_no_boxes_are_as_good_as_any():
    some = np.array([[0.0, 0.0, 1.0, 1.0]])
    assert areas(NONE).shape == (0,)
    assert pairwise_iou(NONE, some).shape == (0, 1)
    assert pairwise_iou(some, NONE).shape == (1, 0)
    assert clip_boxes(NONE, (10, 10)).shape == (0, 4)
    assert flip_boxes(NONE, 10).shape == (0, 4)


@pytest.mark.parametrize("empty", [[], (), np.zeros(0), np.zeros((0, 4), np.float32), np.zeros((0, 7))])
def test_anything_empty_becomes_no_boxes(empty):
    boxes = as_boxes(empty)
    assert boxes.shape == (0, 4)
    assert boxes.dtype == np.float64


def test_lists_of_whole_numbers_become_boxes():
    assert as_boxes([[1, 2, 3, 4]]).dtype == np.float64


def test_one_box_alone_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"windows must have shape \(R, 4\), got \(4,\); pass windows\[None\] for one box"
    ):
        as_boxes(np.zeros(4), "windows")


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (8,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"boxes must have shape \(R, 4\), got \("):
        as_boxes(np.zeros(shape))


def test_clipping_moves_corners_into_the_image_of_height_and_width():
    boxes = np.array([[-5.0, -3.0, 30.0, 40.0], [2.0, 3.0, 4.0, 5.0], [50.0, 50.0, 60.0, 60.0]], np.float32)
    clipped = clip_boxes(boxes, (20, 10))
    assert clipped.tolist() == [[0, 0, 10, 20], [2, 3, 4, 5], [10, 20, 10, 20]]
    assert clipped.dtype == np.float32
    assert boxes[0, 0] == -5  # the originals stay


@given(corners)
def test_flipped_boxes_cover_the_flipped_pixels(boxes):
    for box, flipped in zip(ordered(boxes), flip_boxes(ordered(boxes), 12), strict=True):
        assert pixels_of(flipped) == {(11 - x, y) for x, y in pixels_of(box)}


@given(corners)
def test_flipping_twice_changes_nothing(boxes):
    np.testing.assert_array_equal(flip_boxes(flip_boxes(boxes, 12), 12), boxes)


def test_an_image_with_the_longest_name_has_files_of_its_own():
    stems = ["写" * 83, "写" * 82 + "真", "x" * 251, "short"]
    records = [ImageRecord(f"MINE/{stem}", Path("x"), (9, 9), "0" * 16) for stem in stems]
    paths = [record.path_in(Path("run"), flip) for record in records for flip in (False, True)]
    assert len(set(paths)) == 8
    assert all(path.parent == Path("run/MINE") and len(path.name.encode()) <= 255 for path in paths)
    assert paths[-1] == Path("run/MINE/short-0000000000000000-flip.npz")
