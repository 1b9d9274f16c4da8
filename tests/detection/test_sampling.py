"""Step 5: foreground and background windows, and batches of them."""

from collections import Counter

import numpy as np
import pytest
from doubles import NO_WINDOWS, annotated
from hypothesis import given
from hypothesis import strategies as st

from sppnet.boxes import pairwise_iou
from sppnet.config import FinetuneSettings
from sppnet.detection.sampling import (
    LabelledWindows,
    class_overlaps,
    distinct_negatives,
    draw_batch,
    draw_rows,
    label_windows,
)

CLASSES = ("cat", "dog", "horse")
SETTINGS = FinetuneSettings(batch=64, positive_share=0.25)


def naive_overlap(window, box):
    width = max(0, min(window[2], box[2]) - max(window[0], box[0]))
    height = max(0, min(window[3], box[3]) - max(window[1], box[1]))
    union = (window[2] - window[0]) * (window[3] - window[1]) + (box[2] - box[0]) * (box[3] - box[1]) - width * height
    return width * height / union if union else 0.0


def random_boxes(count, seed):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], axis=1).astype(np.float32)


def labelled(positives=(), labels=None, negatives=()):
    own = np.array(positives, np.int64)
    return LabelledWindows(
        own, np.zeros(len(own), np.int64) if labels is None else np.array(labels), np.array(negatives, np.int64)
    )


def test_overlaps_are_the_largest_iou_with_the_objects_of_each_class():
    windows, boxes = random_boxes(50, 0), random_boxes(6, 1)
    names = ("cat", "dog", "cat", "dog", "dog", "bird")
    found = class_overlaps(windows, annotated(*zip(names, boxes, strict=True)), CLASSES)
    assert found.dtype == np.float32
    for row, window in enumerate(windows):
        for column, name in enumerate(CLASSES):
            own = [naive_overlap(window, box) for box, other in zip(boxes, names, strict=True) if other == name]
            assert found[row, column] == pytest.approx(max(own, default=0.0), abs=1e-5)


def test_without_objects_or_windows_there_is_no_overlap():
    assert class_overlaps(random_boxes(3, 0), annotated(), CLASSES).tolist() == [[0, 0, 0]] * 3
    assert class_overlaps(NO_WINDOWS, annotated(("cat", (0, 0, 5, 5))), CLASSES).shape == (0, 3)
    assert class_overlaps(NO_WINDOWS, annotated(), CLASSES).shape == (0, 3)


def test_windows_are_labelled_by_the_class_they_overlap_most():
    overlaps = np.array([[0.5, 0.0], [0.6, 0.7], [0.49, 0.3], [0.1, 0.0], [0.09, 0.0], [0, 0], [1, 0]], np.float32)
    found = label_windows(overlaps, SETTINGS)
    assert found.positives.tolist() == [0, 1, 6]
    assert found.labels.tolist() == [0, 1, 0]
    assert found.negatives.tolist() == [2, 3]


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)), max_size=20))
def test_no_window_is_both_positive_and_negative(values):
    overlaps = np.array(values, np.float32).reshape(-1, 2)
    settings = SETTINGS.model_copy(update={"negative_overlap": (0.1, 0.9)})  # wider than the positives begin
    found = label_windows(overlaps, settings)
    assert found.positives.tolist() == [i for i, own in enumerate(overlaps) if max(own) >= 0.5]
    assert found.negatives.tolist() == [i for i, own in enumerate(overlaps) if 0.1 <= max(own) < 0.5]
    assert len(found.labels) == len(found.positives)


def test_a_batch_holds_its_share_of_positives_with_their_labels():
    images = [labelled([3, 5], [1, 0], [7, 8, 9]), labelled([2], [2], [4])]
    batch = draw_batch(images, 3, SETTINGS, np.random.default_rng(0))
    assert len(batch.row) == len(batch.image) == len(batch.label) == 64
    assert (batch.label != 3).sum() == 16
    right = {(0, 3): 1, (0, 5): 0, (1, 2): 2, (0, 7): 3, (0, 8): 3, (0, 9): 3, (1, 4): 3}
    assert {
        (image, row): label
        for image, row, label in zip(*map(np.ndarray.tolist, (batch.image, batch.row, batch.label)), strict=True)
    } == right


def test_a_crowded_image_gives_no_more_than_the_others():
    images = [labelled(range(100), None, range(100, 900)), labelled([0], None, [1]), labelled([0], None, [1])]
    batch = draw_batch(images, 1, SETTINGS, np.random.default_rng(0))
    for background in (False, True):
        counts = Counter(batch.image[(batch.label == 1) == background].tolist())
        assert max(counts.values()) - min(counts.values()) <= 1


def test_balanced_every_class_of_an_image_is_as_likely_and_every_window_of_a_class():
    images = [labelled(range(10), [0] * 7 + [1] * 2 + [2], range(10, 12))]
    settings = SETTINGS.model_copy(update={"batch": 12_000, "positive_share": 0.5, "balance": True})
    rows = draw_batch(images, 3, settings, np.random.default_rng(0)).row
    counts = np.bincount(rows, minlength=10)[:10]
    assert counts.sum() == 6000
    expected = 2000 / np.array([7] * 7 + [2] * 2 + [1])
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_unbalanced_every_positive_of_an_image_is_as_likely_whatever_its_class():
    images = [labelled(range(10), [0] * 7 + [1] * 2 + [2], range(10, 12))]
    settings = SETTINGS.model_copy(update={"batch": 12_000, "positive_share": 0.5})
    counts = np.bincount(draw_batch(images, 3, settings, np.random.default_rng(0)).row, minlength=10)[:10]
    assert counts.sum() == 6000
    assert (abs(counts - 600) < 5 * np.sqrt(600)).all()


def test_every_window_of_an_image_is_as_likely():
    images = [labelled(range(4), None, range(4, 8))]
    settings = SETTINGS.model_copy(update={"batch": 8000, "positive_share": 0.5})
    counts = np.bincount(draw_batch(images, 1, settings, np.random.default_rng(0)).row, minlength=8)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(1000)


@pytest.mark.parametrize(
    ("images", "positives", "negatives"),
    [
        ([labelled([0], [1]), labelled([1], [0])], 64, 0),
        ([labelled([], [], [1]), labelled([], [], [2])], 0, 64),
        ([labelled([0]), labelled([], [], [2])], 16, 48),
        ([labelled(), labelled()], 0, 0),
        ([], 0, 0),
    ],
    ids=["no negatives", "no positives", "each in another image", "nothing at all", "no images"],
)
def test_where_one_kind_is_missing_the_batch_is_made_of_the_other(images, positives, negatives):
    batch = draw_batch(images, 9, SETTINGS, np.random.default_rng(0))
    assert (batch.label != 9).sum() == positives
    assert (batch.label == 9).sum() == negatives


@pytest.mark.parametrize(("share", "positives"), [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_any_share_of_positives_can_be_asked_for(share, positives):
    settings = SETTINGS.model_copy(update={"batch": 8, "positive_share": share})
    batch = draw_batch([labelled([0], None, [1])], 5, settings, np.random.default_rng(0))
    assert (batch.label != 5).sum() == positives
    assert len(batch.label) == 8


def test_the_same_generator_draws_the_same_batch():
    images = [labelled(range(9), None, range(9, 40))] * 3
    first, again = (draw_batch(images, 1, SETTINGS, np.random.default_rng(4)) for _ in range(2))
    assert np.array_equal(first.row, again.row)
    assert not np.array_equal(first.row, draw_batch(images, 1, SETTINGS, np.random.default_rng(5)).row)


@pytest.mark.parametrize("seed", range(5))
def test_distinct_negatives_equal_the_naive_choice(seed):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 6, (40, 2))
    windows = np.concatenate([corner, corner + rng.integers(1, 9, (40, 2))], axis=1).astype(np.float32)
    negatives = rng.random((40, 3)) < 0.7
    iou = pairwise_iou(windows, windows)
    expected = np.zeros_like(negatives)
    for label in range(3):
        chosen = []
        for row in np.flatnonzero(negatives[:, label]):
            if all(iou[row, other] <= 0.5 for other in chosen):
                chosen.append(row)
        expected[chosen, label] = True
    np.testing.assert_array_equal(distinct_negatives(windows, negatives, 0.5), expected)
    assert expected.sum() < negatives.sum()


def test_rows_are_drawn_evenly_and_in_their_order_and_all_of_them_where_they_fit():
    rng, rows = np.random.default_rng(0), np.arange(10, 50)
    assert draw_rows(rows, 40, rng).tolist() == rows.tolist()
    assert len(draw_rows(rows, 39, rng)) == 39
    counts = np.zeros(50)
    for _ in range(2000):
        drawn = draw_rows(rows, 10, rng)
        assert len(drawn) == 10
        assert (np.diff(drawn) > 0).all()
        counts[drawn] += 1
    assert counts[:10].sum() == 0
    assert np.abs(counts[10:] - 500).max() < 4.5 * np.sqrt(2000 * 0.25 * 0.75)
