"""The values that travel between the steps, and arithmetic on boxes against loops over pixels."""

import dataclasses
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from doubles import annotated, refused_by_us
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from sppnet.errors import SppnetError
from sppnet.records import (
    Annotation,
    Detections,
    ImageRecord,
    SkipCounts,
    areas,
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
    with pytest.raises(SppnetError, match=r"one of each for every box, got 2 boxes, 1 names, 2 difficult"):
        Annotation([[0, 0, 1, 1]] * 2, ("cat",), np.zeros(2, bool))


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
    total = SkipCounts({"no area": ["a", "a"]}).plus(SkipCounts({"no area": ["b"], "outside": ["c"] * 4}))
    assert total.plus(SkipCounts()).counts == {"no area": 3, "outside": 4}
    assert total.lines() == ["3 × no area, e.g. a", "4 × outside, e.g. c"]


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OBJECTS.names = ()


def test_things_are_spread_over_all_of_them_in_order():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread("abc", 100) == ["a", "b", "c"]
    assert spread([], 3) == spread([1, 2], 0) == []


# ---- detections and annotations from any numbers -------------------------------------------------------------------

BOXES = [[0, 0, 10, 10], [5, 5, 40, 30.5], [1, 2, 3, 4]]
FOUND = Detections(BOXES, [0.5, -1, 2], [1, 0, 1], ["cat", "dog"])


@st.composite
def some_detections(draw):
    count = draw(st.integers(0, 6))
    corner = draw(arrays(np.float32, (count, 2), elements=st.floats(-1e4, 1e4, width=32)))
    sides = draw(arrays(np.float32, (count, 2), elements=st.floats(1, 1e4, width=32)))
    scores = draw(arrays(np.float32, count, elements=st.floats(-1e6, 1e6, width=32)))
    labels = draw(arrays(np.int64, count, elements=st.integers(0, 2)))
    return np.concatenate([corner, corner + sides], axis=1), scores, labels, ("a", "b", "c")


@given(some_detections(), st.sampled_from(["array", "tensor", "list"]))
def test_arrays_tensors_and_lists_make_the_same_detections(values, kind):
    convert = {"array": np.array, "tensor": torch.from_numpy, "list": np.ndarray.tolist}[kind]
    *given_arrays, classes = values
    given_values = [convert(array) for array in given_arrays]
    found = Detections(*given_values, list(classes))
    for array, expected in zip((found.boxes, found.scores, found.labels), given_arrays, strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
        assert not np.shares_memory(array, expected)
    assert found == Detections(*given_arrays, classes) == Detections(**json.loads(json.dumps(found.to_dict())))
    if len(found):
        changed = found.scores + np.float32(1e7)
        assert found != replace(found, scores=changed)
    assert found != replace(found, classes=("a", "b", "d"))


@given(some_detections(), st.data())
def test_indexing_is_that_of_arrays_and_iterating_gives_each(values, data):
    found = Detections(*values)
    count = len(found)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool)
    rows = data.draw(st.lists(st.integers(-count, count - 1), max_size=5)) if count else []
    for index in (mask, torch.from_numpy(mask), slice(1, None, 2), slice(None, None, -1), rows, np.array(rows, int)):
        part = found[index]
        plain = index if isinstance(index, slice) else np.asarray(index, None if len(index) else int)
        np.testing.assert_array_equal(part.boxes, found.boxes[plain])
        np.testing.assert_array_equal(part.scores, found.scores[plain])
        np.testing.assert_array_equal(part.labels, found.labels[plain])
        assert part.classes == found.classes
    each = list(found)
    assert [one.name for one in each] == found.class_names
    for row, (box, score, label, name) in enumerate(each):
        assert found[row] == found[np.int64(row)] == found[row - count] == each[row]
        assert (box, score, label) == (tuple(found.boxes[row]), found.scores[row], found.labels[row])
        assert name == found.classes[label]


@pytest.mark.parametrize("index", [3, -4, [0, 3], [0.5], [True], np.ones(4, bool), "a", None, True, 1.0, (0, 1, 9)])
def test_an_index_that_means_no_row_is_refused(index):
    refused_by_us(lambda: FOUND[index])
    refused_by_us(lambda: OBJECTS[index])


WRONG_DETECTIONS = {
    "boxes": [
        np.nan, None, "boxes", [[0, 0, 1]] * 3, [[0, 0, 10, np.inf], *BOXES[1:]], [[0, 0, 10, np.nan], *BOXES[1:]],
        [[5, 5, 5, 9], *BOXES[1:]], [[5, 9, 8, 5], *BOXES[1:]], BOXES[:2], [], [["0", "0", "9", "9"]] * 3,
        np.ones((3, 4), bool), [[0, 0, 1e300, 1], *BOXES[1:]], [[0, 0, 9, 9], [0, 0], [1, 1, 2, 2]], {"a": 1},
        np.array(BOXES, complex), torch.zeros(3, 4), torch.full((3, 4), torch.nan), [[0, 0, 1e-50, 1], *BOXES[1:]],
    ],
    "scores": [
        [0, 1, np.nan], [0, 1, -np.inf], [1, 2], [], None, 3.0, [[1], [2], [3]], ["1", "2", "3"], [True, False, True],
        torch.tensor([1, 2, torch.inf]), [1, 2, 1e39], [None, 1, 2],
    ],
    "labels": [
        [0, 1, 2], [0, 1, -1], [0, 1], [0.5, 0, 0], [0.0, 1.0, 0.0], [True, False, True], ["cat", "dog", "cat"], None,
        [[0], [1], [0]], torch.tensor([0.0, 1, 0]), np.array([0, 1, 2**63], np.uint64), 0,
    ],
    "classes": [
        "cat", [], ["cat"], ["cat", "cat"], ["cat", 1], ["cat", ""], None, {"cat", "dog"}, {0: "cat", 1: "dog"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "wrong"), [(name, each) for name, all_ in WRONG_DETECTIONS.items() for each in all_])
def test_detections_of_impossible_values_cannot_be_made(name, wrong):
    assert name in refused_by_us(lambda: replace(FOUND, **{name: wrong}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"boxes": np.array(BOXES) * np.nan}, {"boxes": [[0, 0, 0, 4], *BOXES[1:]]}, {"boxes": BOXES[:2]},
        {"names": "cat"}, {"names": ["cat", "dog"]}, {"names": ["cat", "dog", 3]}, {"names": ["cat", "dog", ""]},
        {"difficult": [False, True]}, {"difficult": [0, 1, 2]}, {"difficult": [0.0, 1.0, 0.0]}, {"difficult": "no"},
        {"unknown": "cat"}, {"unknown": [1]}, {"unknown": ["cow", "dog"]},
        {"names": None}, {"difficult": [[0], [1], [0]]}, {"difficult": np.array([np.nan, 0, 1])},
    ],
)  # fmt: skip
def test_annotations_of_impossible_values_cannot_be_made(wrong):
    refused_by_us(lambda: replace(Annotation(BOXES, ["cat", "dog", "cat"], [0, 1, 0]), **wrong))


def test_an_annotation_is_made_indexed_and_compared_like_detections():
    objects = Annotation(torch.tensor(BOXES), np.array(["cat", "dog", "cat"]), difficult=[0, 1, 0])
    assert objects == Annotation(**json.loads(json.dumps(objects.to_dict())))
    assert objects != replace(objects, difficult=[0, 0, 0])
    assert objects != replace(objects, unknown=("cow",)) == replace(objects, unknown=["cow"])
    assert objects[:1].unknown == () != replace(objects, unknown=["cow"]).of(["cat"]).unknown == ("cow",)
    assert objects != replace(objects, names=["cat", "dog", "dog"])
    assert objects != replace(objects, boxes=objects.boxes + 1)
    assert objects != "cat"
    assert objects[-1] == ((1, 2, 3, 4), "cat", False)
    assert objects[1:] == Annotation(BOXES[1:], ["dog", "cat"], [True, False])
    assert [(name, difficult) for _, name, difficult in objects] == [("cat", False), ("dog", True), ("cat", False)]
    assert len(objects[objects.difficult]) == 1
    assert not Annotation(BOXES, ["a", "b", "c"]).difficult.any()
    assert len(Annotation([], [])) == 0
    with pytest.raises(TypeError, match="unhashable"):
        hash(objects)


def test_values_that_are_given_are_copied():
    boxes, scores, labels = np.array(BOXES, np.float32), np.zeros(3, np.float32), np.zeros(3, np.int64)
    found, objects = Detections(boxes, scores, labels, ["x"]), Annotation(boxes, ["x"] * 3)
    boxes += 100
    labels += 5
    assert found.boxes.tolist() == objects.boxes.tolist() == BOXES
    assert found.labels.tolist() == [0, 0, 0]
    found.boxes[:] = 7
    assert boxes.max() == 140


def test_a_threshold_is_one_number_or_one_for_each_class():
    assert FOUND.above(-1) == FOUND
    assert FOUND.above(0.5) == FOUND.above(torch.tensor(0.5)) == FOUND.above([0.5, 0.5]) == FOUND[[0, 2]]
    assert FOUND.above([-1, 1]) == FOUND[1:]
    assert FOUND.above(np.inf) == FOUND[:0]
    assert FOUND.above(-np.inf) == FOUND
    third = replace(FOUND, scores=np.float32([0.7, 0.1, 0.3]))
    for score in (0.7, 0.1, 0.3):  # in float32 below, above and above what is written here
        assert len(third.above(score)) == len(third.above([score, score])) == (third.scores >= np.float32(score)).sum()
    for wrong in (np.nan, [0.5], [0, 1, 2], [0, np.nan], "0.5", None, True, [[0, 1]]):
        assert "threshold" in refused_by_us(lambda wrong=wrong: FOUND.above(wrong))


def test_a_record_of_an_image_holds_an_annotation_and_a_size(tmp_path):
    assert ImageRecord("A/a", str(tmp_path), [3, 4], "0").size == (3, 4)
    wrong = ({"id": 5}, {"id": ""}, {"size": (3,)}, {"size": (0, 4)}, {"size": (3, 4.5)}, {"size": None},
             {"annotation": {"boxes": []}}, {"digest": None}, {"size": "34"})  # fmt: skip
    for each in wrong:
        refused_by_us(lambda each=each: replace(ImageRecord("A/a", tmp_path, (3, 4), "0"), **each))


# ---- other programs ------------------------------------------------------------------------------------------------


def test_torchvision_s_tensors_hold_the_same():
    tensors = FOUND.to_torchvision()
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "boxes": torch.float32, "scores": torch.float32, "labels": torch.int64
    }  # fmt: skip
    assert Detections(**tensors, classes=FOUND.classes) == FOUND
    kept = torchvision.ops.batched_nms(tensors["boxes"], tensors["scores"], tensors["labels"], 0.5)
    assert kept.tolist() == [2, 0, 1]


def test_entries_of_a_coco_file_are_plain_numbers():
    entries = json.loads(json.dumps(FOUND.to_coco(np.int64(7))))
    assert entries[1] == {"image_id": 7, "category_id": 1, "bbox": [5, 5, 35, 25.5], "score": -1}
    assert [entry["category_id"] for entry in FOUND.to_coco("a", [17, 18])] == [18, 17, 18]
    assert FOUND.to_coco("a", {"dog": 18, "cat": 17, "owl": 19}) == FOUND.to_coco("a", np.array([17, 18]))
    assert FOUND[:0].to_coco(1) == []
    for ids in ([1], [1, 2.5], {"cat": 1}, [1, None], [True, 2], 5):
        refused_by_us(lambda ids=ids: FOUND.to_coco(1, ids))
    for image in (None, 1.5, True):
        refused_by_us(lambda image=image: FOUND.to_coco(image))


def test_supervision_gets_its_own_fields_and_is_named_where_it_is_missing(monkeypatch):
    fake = types.ModuleType("supervision")
    fake.Detections = lambda **fields: fields
    monkeypatch.setitem(sys.modules, "supervision", fake)
    given_fields = FOUND.to_supervision()
    assert given_fields["data"]["class_name"].tolist() == ["dog", "cat", "dog"]
    fields = {"xyxy": FOUND.boxes, "confidence": FOUND.scores, "class_id": FOUND.labels}
    for name, array in fields.items():
        np.testing.assert_array_equal(given_fields[name], array)
        assert not np.shares_memory(given_fields[name], array)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(SppnetError, match="pip install --no-deps supervision"):
        FOUND.to_supervision()


def test_detections_are_drawn_on_the_image_they_were_found_in(tmp_path):
    image = np.full((60, 80, 3), 128, np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    drawn = np.asarray(FOUND.draw(image))
    assert drawn.shape == image.shape
    assert (drawn != image).any()
    assert (image == 128).all()
    assert (np.asarray(FOUND.draw(tmp_path / "a.png")) == drawn).all()
    refused_by_us(lambda: FOUND.draw(image / 255))


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


@pytest.mark.parametrize("name", ["/etc/x", "../x", "A/../x", "..", "/", "a\0b"])
def test_an_id_that_leads_elsewhere_is_refused(name):
    with pytest.raises(SppnetError, match="an id must be"):
        ImageRecord(name, Path("x.jpg"), (1, 1), "0")
    ImageRecord("A..b/..c", Path("x.jpg"), (1, 1), "0")


def test_what_is_no_sequence_is_refused_by_name():
    found = Detections([[0, 0, 1, 1]], [1.0], [0], ("a",))
    for ids in (5, 1.5, object()):
        with pytest.raises(SppnetError, match="category_ids: expected a whole number for each"):
            found.to_coco(1, ids)
    assert found.to_coco(1, (n for n in [7]))[0]["category_id"] == 7
    for names in (None, "cat", 3, [3]):
        with pytest.raises(SppnetError, match="names: expected a sequence of names"):
            OBJECTS.of(names)
    assert len(OBJECTS.of({"cat"})) == len(OBJECTS.of(["cat"])) == 2
    with pytest.raises(SppnetError, match="path must be that of an image file"):
        ImageRecord("a", None, (1, 1), "0")
