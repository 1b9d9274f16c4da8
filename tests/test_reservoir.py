import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppnet.detection.reservoir import Reservoir


def sample(capacity, seed, splits):
    reservoir = Reservoir(capacity, seed)
    start = 0
    for count in splits:
        rows = torch.arange(start, start + count)
        reservoir.add(torch.stack([rows, rows * 10], dim=1))
        start += count
    return reservoir


def test_what_fits_is_kept_in_order():
    assert sample(7, 0, [2, 0, 3]).rows().tolist() == [[0, 0], [1, 10], [2, 20], [3, 30], [4, 40]]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 20), st.integers(0, 100))
def test_the_sample_does_not_depend_on_how_rows_were_split(splits, capacity, seed):
    rows = sample(capacity, seed, splits).rows()
    assert torch.equal(rows, sample(capacity, seed, [sum(splits)]).rows())
    assert torch.equal(rows[:, 0] * 10, rows[:, 1])
    assert len(set(rows[:, 0].tolist())) == len(rows) == min(capacity, sum(splits))


def test_every_row_is_equally_likely_to_be_kept():
    counts = np.zeros(40)
    for seed in range(2000):
        counts[sample(10, seed, [15, 25]).rows()[:, 0].numpy()] += 1
    expected = 2000 * 10 / 40
    deviation = np.sqrt(2000 * 0.25 * 0.75)
    assert np.abs(counts - expected).max() < 4.5 * deviation


def test_nothing_added_gives_no_rows():
    assert Reservoir(3).rows().shape == (0, 0)
    assert len(Reservoir(3)) == 0
    assert sample(3, 0, [0]).rows().shape == (0, 2)


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        Reservoir(0)
    with pytest.raises(ValueError, match=r"rows of shape \(R, D\), got \(2,\); add no others"):
        Reservoir(3).add(torch.zeros(2))
    with pytest.raises(ValueError, match=r"rows of shape \(R, 2\), got \(2, 3\); add no others"):
        sample(3, 0, [1]).add(torch.zeros(2, 3))
