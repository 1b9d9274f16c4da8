import numpy as np
import pytest

from sppnet.proposals.sliding import DENSEST, sliding_windows
from sppnet.records import pairwise_iou

SHAPES = ((0.2, 0.1), (0.5, 0.5))


def test_windows_are_those_of_a_loop():
    height, width, wanted = 100, 160, []
    for across, down in ((20, 10), (50, 50)):
        columns = 1 + -(-(width - across) // (DENSEST * across))
        rows = 1 + -(-(height - down) // (DENSEST * down))
        for row in range(int(rows)):
            for column in range(int(columns)):
                x = (width - across) * column / (columns - 1)
                y = (height - down) * row / (rows - 1)
                wanted.append((x, y, x + across, y + down))
    found = sliding_windows((height, width), SHAPES, 100_000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("limit", [50, 300, 1000])
def test_at_most_the_limit_and_as_many_of_it_as_fit(limit):
    found = sliding_windows((100, 160), SHAPES, limit)
    assert 0.7 * limit < len(found) <= limit
    assert len(sliding_windows((100, 160), SHAPES, 1)) == 8  # the corners, of each shape


def test_an_object_of_one_of_the_shapes_is_overlapped_wherever_it_is():
    rng = np.random.default_rng(0)
    windows = sliding_windows((375, 500), SHAPES, 100_000)
    for across, down in np.array(SHAPES) * 375:
        x, y = rng.uniform(0, 500 - across, 200), rng.uniform(0, 375 - down, 200)
        best = pairwise_iou(np.stack([x, y, x + across, y + down], axis=1), windows).max(axis=1)
        assert best.min() > 0.85**2 / (2 - 0.85**2) - 1e-6


@pytest.mark.parametrize("size", [(40, 1000), (1000, 40), (1, 1), (3, 500)])
def test_windows_stay_inside_images_of_any_size(size):
    windows = sliding_windows(size, [(0.5, 0.5), (3.0, 1.0), (1.0, 30.0), (0.01, 0.01)], 500)
    assert windows.min() >= 0
    assert (windows[:, 2:] <= np.array(size[::-1]) + 1e-3).all()
    assert (windows[:, 2:] > windows[:, :2]).all()


def test_no_shape_no_window():
    assert sliding_windows((30, 40), (), 10).shape == (0, 4)
