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
        reservoir.add(rows, rows * 10.0)
        start += count
    return reservoir


def test_what_fits_is_kept_in_order():
    (rows, tens) = sample(7, 0, [2, 0, 3]).columns()
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert tens.tolist() == [0, 10, 20, 30, 40]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 20), st.integers(0, 100))
def test_the_sample_does_not_depend_on_how_rows_were_split(splits, capacity, seed):
    rows, tens = sample(capacity, seed, splits).columns()
    whole, _ = sample(capacity, seed, [sum(splits)]).columns()
    assert torch.equal(rows, whole)
    assert torch.equal(rows * 10.0, tens)  # columns stay together
    assert len(set(rows.tolist())) == len(rows) == min(capacity, sum(splits))


def test_every_row_is_equally_likely_to_be_kept():
    counts = np.zeros(40)
    for seed in range(2000):
        counts[sample(10, seed, [15, 25]).columns()[0].numpy()] += 1
    expected = 2000 * 10 / 40
    deviation = np.sqrt(2000 * 0.25 * 0.75)
    assert np.abs(counts - expected).max() < 4.5 * deviation


def test_nothing_added_gives_no_columns():
    assert Reservoir(3).columns() == ()
    assert len(Reservoir(3)) == 0


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        Reservoir(0)
    with pytest.raises(ValueError, match="same number of columns of one length"):
        Reservoir(3).add(torch.zeros(2), torch.zeros(3))
    reservoir = sample(3, 0, [1])
    with pytest.raises(ValueError, match="same number of columns of one length"):
        reservoir.add(torch.zeros(2))
