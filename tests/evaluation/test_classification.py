"""AP of the classes that images show."""

import numpy as np
import pytest

from sppnet.errors import SppnetError
from sppnet.evaluation.classification import multi_label_ap


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
