"""Errors of the classes of whole images, and AP of the classes that they show, against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sppnet.errors import SppnetError
from sppnet.evaluation.classification import multi_label_ap, top_k_error


def counted_by_hand(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Every image: its class sorted behind others of the same score, is it among the first k?"""
    wrong = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda place: (-row[place], place == label))
        wrong += label not in order[:k]
    return wrong / len(labels)


@pytest.mark.parametrize("k", [1, 2, 5, 7, 9])
def test_top_k_error_is_that_of_a_count_by_hand_with_ties(k: int) -> None:
    rng = np.random.default_rng(k)
    scores, labels = rng.integers(0, 4, (200, 7)) / 3, rng.integers(0, 7, 200)
    error = top_k_error(scores, labels, k)
    assert error == pytest.approx(counted_by_hand(scores, labels, k))
    assert (error == 0) == (k >= 7)


def test_equal_scores_and_nan_are_wrong() -> None:
    assert top_k_error([[1, 1, 1]], [0], 1) == 1
    assert top_k_error([[1, 1, 1]], [0], 2) == 1
    assert top_k_error([[np.nan, 0, 0]], [0], 2) == 1
    assert top_k_error([[2, 1, 1], [0, 3, 1]], [0, 0], 1) == 0.5


@pytest.mark.parametrize(("scores", "labels", "k", "words"), [
    (np.zeros((2, 3)), [0], 1, r"got \(2, 3\), \(1,\) and 1"),
    (np.zeros(3), [0, 1, 2], 1, r"scores, labels and k"),
    (np.zeros((0, 3)), np.zeros(0, int), 1, r"got \(0, 3\)"),
    (np.zeros((1, 3)), [0.0], 1, r"whole numbers"),
    (np.zeros((1, 3)), [0], 0, r"at least 1"),
    (np.zeros((1, 3)), [3], 1, r"labels must lie in 0 to 2, got 3 to 3"),
])  # fmt: skip
def test_what_cannot_be_is_refused(scores: np.ndarray, labels: np.ndarray, k: int, words: str) -> None:
    with pytest.raises(SppnetError, match=words):
        top_k_error(scores, labels, k)


def eleven_points(scores, shown):
    """By the words of the devkit: the best precision at recall of 0, 0.1, … 1, one rank after the other."""
    ranked = [label for _, label in sorted(zip(-scores, shown, strict=True), key=lambda pair: pair[0]) if label != 0]
    total, points = ranked.count(1), []
    for step in range(11):
        precisions = [
            ranked[:rank].count(1) / rank
            for rank in range(1, len(ranked) + 1)
            if 10 * ranked[:rank].count(1) >= step * total
        ]
        points.append(max(precisions, default=0))
    return sum(points) / 11


@pytest.mark.parametrize("seed", range(8))
def test_ap_is_that_of_the_devkits_words(seed):
    rng = np.random.default_rng(seed)
    shown = rng.choice([1, -1, -1, 0], size=(40, 3))
    scores = rng.integers(-9, 9, size=(40, 3)) + 3 * shown if seed % 2 else rng.normal(size=(40, 3))
    expected = [eleven_points(scores[:, place], shown[:, place].tolist()) for place in range(3)]
    assert multi_label_ap(scores, shown) == pytest.approx(expected)


def test_an_image_with_difficult_objects_alone_is_neither():
    scores = np.array([[4.0], [3.0], [2.0], [1.0]])
    assert multi_label_ap(scores, np.array([[0], [1], [0], [-1]])) == [1]
    assert multi_label_ap(scores, np.array([[-1], [1], [0], [-1]]))[0] == pytest.approx(0.5)


def test_a_class_that_no_image_shows_has_no_ap():
    assert multi_label_ap([[1.0, 2.0]], [[-1, 1]]) == [None, 1]


@pytest.mark.parametrize("scores", [[[1.0]], [1.0, 2.0], [[np.nan, 1.0]]])
def test_scores_of_another_shape_or_not_finite_are_an_error(scores):
    with pytest.raises(SppnetError, match=r"must both be \(N, C\)"):
        multi_label_ap(scores, [[1, -1]])
