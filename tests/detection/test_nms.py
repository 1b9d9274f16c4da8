import numpy as np
import pytest
import torch
import torchvision
from doubles import refused_by_us
from hypothesis import given, settings
from hypothesis import strategies as st

import sppnet.detection.nms as nms_module
from sppnet.detection.nms import nms, nms_per_class, soften
from sppnet.records import Detections


def greedy_loop(boxes, scores, threshold):
    """Suppression as it is defined, one pair at a time."""
    remaining = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    kept = []
    while remaining:
        best = remaining.pop(0)
        kept.append(best)
        remaining = [i for i in remaining if iou(boxes[best], boxes[i]) <= threshold]
    return kept


def iou(a, b):
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1)]
    inter = sides[0] * sides[1]
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def random_problem(seed, count, grid=14, score_levels=6):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, grid, (count, 2)).astype(np.float64)
    boxes = np.concatenate([corner, corner + rng.integers(0, grid, (count, 2))], axis=1)
    return boxes, rng.integers(0, score_levels, count).astype(np.float64)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40), st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]))
def test_suppression_equals_the_naive_loop_with_ties_and_empty_boxes(seed, count, threshold):
    boxes, scores = random_problem(seed, count)
    np.testing.assert_array_equal(nms(boxes, scores, threshold), greedy_loop(boxes, scores, threshold))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(1, 8))
def test_a_limit_gives_the_first_of_what_the_full_suppression_keeps(seed, count, limit):
    boxes, scores = random_problem(seed, count, grid=30)
    np.testing.assert_array_equal(nms(boxes, scores, 0.3, limit), nms(boxes, scores, 0.3)[:limit])


@pytest.mark.shared_data
def test_kept_indices_equal_those_of_the_release(shared):
    with np.load(shared / "golden/nms_overlap.npz", allow_pickle=False) as golden:
        boxes = golden["boxes"] - [1, 1, 0, 0]  # 1-based inclusive corners -> half-open
        kept = nms(boxes, golden["scores"], float(golden["nms_threshold"]))
        np.testing.assert_array_equal(kept, golden["keep_order"])


def test_an_overlap_equal_to_the_threshold_survives():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5]], dtype=np.float32)
    scores = np.array([2, 1], dtype=np.float32)
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.4999).tolist() == [0]


def test_single_precision_boxes_are_compared_in_double_precision():
    # 3/10: single precision would put the overlap above the threshold 0.3.
    boxes = np.array([[0, 0, 10, 1], [0, 0, 3, 1]], dtype=np.float32)
    assert float(np.float32(3) / np.float32(10)) > 0.3
    assert nms(boxes, np.array([1, 0], dtype=np.float32), 0.3).tolist() == [0, 1]


def test_equal_scores_keep_the_lower_index():
    boxes = np.tile(np.array([[5.0, 5, 20, 20]]), (50, 1))
    assert nms(boxes, np.zeros(50), 0.3).tolist() == [0]


def test_tensors_in_give_a_tensor_out():
    boxes, scores = random_problem(3, 30)
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.3)
    assert kept.dtype == torch.int64
    np.testing.assert_array_equal(kept.numpy(), nms(boxes, scores, 0.3))


def test_arrays_in_give_int64_out_and_no_boxes_give_no_indices():
    kept = nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), 0.3)
    assert kept.shape == (0,)
    assert kept.dtype == np.int64
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.3).shape == (0,)


def test_per_class_suppression_equals_one_suppression_per_class():
    boxes, _ = random_problem(1, 80)
    scores = np.random.default_rng(0).standard_normal((80, 3))
    expected = []
    for label in range(3):
        above = [i for i in range(80) if scores[i, label] > -0.2]
        kept = [above[i] for i in greedy_loop(boxes[above], scores[above, label], 0.3)][:5]
        expected += [(-scores[i, label], label, i) for i in kept]
    indices, labels = nms_per_class(boxes, np.where(scores > -0.2, scores, -np.inf), 0.3, max_per_class=5)
    assert list(zip(labels, indices, strict=True)) == [(label, i) for _, label, i in sorted(expected)]


def test_a_score_of_minus_infinity_takes_no_part():
    indices, labels = nms_per_class(np.array([[0.0, 0, 5, 5]]), np.array([[-np.inf, -1.4]]), 0.3)
    assert (indices.tolist(), labels.tolist()) == ([0], [1])


def test_no_windows_or_no_classes_give_no_detections():
    for scores in (np.zeros((0, 3)), np.zeros((2, 0))):
        indices, labels = nms_per_class(np.zeros((len(scores), 4)), scores, 0.3)
        assert indices.dtype == labels.dtype == np.int64
        assert len(indices) == len(labels) == 0


def test_errors_say_what_was_expected():
    boxes = np.array([[0.0, 0, 1, 1], [0, 0, 2, 2]])
    with pytest.raises(ValueError, match=r"scores must have shape \(2,\), one for each box, got \(3,\)"):
        nms(boxes, np.zeros(3), 0.3)
    with pytest.raises(ValueError, match=r"pass boxes\[None\] for one box"):
        nms(boxes[0], np.zeros(1), 0.3)
    with pytest.raises(ValueError, match="got NaN at index 1"):
        nms(boxes, np.array([0, np.nan]), 0.3)
    with pytest.raises(ValueError, match=r"overlap in \[0, 1\], got 30"):
        nms(boxes, np.zeros(2), 30)
    with pytest.raises(ValueError, match=r"expected scores \(R, K\) with boxes"):
        nms_per_class(boxes, np.zeros(2), 0.3)


BOXES = [[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]]


@pytest.mark.parametrize(
    "kind", [np.array, torch.tensor, list, lambda values: torch.tensor(values, dtype=torch.bfloat16)]
)
def test_arrays_tensors_and_lists_are_suppressed_alike(kind):
    boxes, scores = kind(BOXES), kind([0.25, 0.5, 0.75])
    kept = nms(boxes, scores, 0.3, np.int64(5))
    assert isinstance(kept, torch.Tensor if isinstance(boxes, torch.Tensor) else np.ndarray)
    assert kept.tolist() == [2, 1] == nms(BOXES, [1, 2, 3], torch.tensor(0.3)).tolist()
    assert nms(kind(BOXES), scores, 0.3, 0).tolist() == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"boxes": np.array(BOXES) * np.nan}, {"boxes": [*BOXES[1:], [0, 0, np.inf, 1]]}, {"boxes": BOXES[:2]},
        {"boxes": [*BOXES[1:], [5, 5, 2, 9]]}, {"boxes": [*BOXES[1:], [5, 5, 9, 2]]}, {"boxes": "boxes"},
        {"boxes": None}, {"boxes": np.ones((3, 4), bool)}, {"boxes": [[0, 0, 1]] * 3}, {"boxes": []},
        {"scores": [1, np.nan, 2]}, {"scores": [1, 2]}, {"scores": []}, {"scores": None}, {"scores": ["1", "2", "3"]},
        {"scores": [[1], [2], [3]]}, {"scores": [True, False, True]}, {"threshold": np.nan}, {"threshold": 30},
        {"threshold": -0.1}, {"threshold": "0.3"}, {"threshold": None}, {"threshold": True}, {"threshold": [0.3]},
        {"limit": -1}, {"limit": 2.5}, {"limit": True}, {"limit": "3"},
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused(wrong):
    arguments = {"boxes": BOXES, "scores": [1, 2, 3], "threshold": 0.3, **wrong}
    message = refused_by_us(lambda: nms(**arguments))
    assert next(iter(wrong)) in message or "one for each box" in message


def test_boxes_that_are_all_looked_at_are_suppressed_once(monkeypatch):
    calls = []

    def counted(boxes, scores, threshold):
        calls.append(len(boxes))
        return torchvision.ops.nms(boxes, scores, threshold)

    monkeypatch.setattr(nms_module, "suppress", counted)
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], np.float64)
    assert nms(boxes, np.array([3.0, 2.0, 1.0]), 0.3).tolist() == [0, 2]
    assert calls == [3]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 30), st.sampled_from([0.0, 0.3, 0.5]))
def test_neighbours_lose_score_as_in_the_naive_loop(seed, count, overlap):
    boxes, _ = random_problem(seed, count)
    rng = np.random.default_rng(seed)
    scores, labels = rng.permutation(np.linspace(0.1, 1, count)), rng.integers(0, 2, count)
    boxes[:, 2:] += 1
    found = soften(Detections(boxes, scores, labels, ("a", "b")), overlap)
    expected, left = scores.astype(np.float32).astype(np.float64), set(range(count))
    while left:
        best = max(left, key=lambda i: expected[i])
        left.remove(best)
        for other in left:
            if labels[other] == labels[best] and iou(boxes[best], boxes[other]) > overlap:
                expected[other] *= 1 - iou(boxes[best], boxes[other])
    order = np.argsort(-expected, kind="stable")
    np.testing.assert_allclose(found.scores, expected[order], rtol=1e-5)
    np.testing.assert_array_equal(found.boxes, boxes[order])
    np.testing.assert_array_equal(found.labels, labels[order])
