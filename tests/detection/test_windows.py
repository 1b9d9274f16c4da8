"""Scale choice and projection against the release's own numbers and its formulas written as loops."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import expected_scale, release_window

from sppnet.detection.window_features import ProjectedWindows
from sppnet.detection.windows import choose_scales, project_windows
from sppnet.ops.pyramid import pool_windows

ZF5 = SimpleNamespace(stride=16, first_centre=20, shrink=6.5)
FIVE = (480, 576, 688, 864, 1200)
LEVELS = (1, 2, 3, 6)


def random_boxes(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = np.sort(rng.integers(0, width, (count, 2)), axis=1)
    y = np.sort(rng.integers(0, height, (count, 2)), axis=1)
    return np.stack([x[:, 0], y[:, 0], x[:, 1] + 1, y[:, 1] + 1], axis=1).astype(np.float64)


@pytest.fixture(scope="module")
def golden(shared: Path):
    with np.load(shared / "golden/windows.npz", allow_pickle=False) as file:
        values = dict(file)
    values["boxes"] = values["boxes_1based"] - [1, 1, 0, 0]
    values["size"] = (int(values["image_height"]), int(values["image_width"]))
    return values


def project_at_best_scales(golden) -> tuple[np.ndarray, np.ndarray]:
    best = choose_scales(golden["boxes"], golden["size"], golden["scales"])
    cells = np.zeros((len(best), 4), np.int64)
    for k, scale in enumerate(golden["scales"]):
        at = best == k
        map_size = golden[f"map_{scale}"].shape[1:]
        cells[at] = project_windows(golden["boxes"][at], golden["size"], scale, ZF5, map_size)
    return best, cells


def merged_and_clamped(unclipped: np.ndarray, map_size: tuple[int, int]) -> list[int]:
    """What the release does after projecting: 1-based inclusive -> half-open cells."""
    corners = []
    for low, high, side in ((unclipped[0], unclipped[2], map_size[1]), (unclipped[1], unclipped[3], map_size[0])):
        if low > high:
            low = high = int((low + high) / 2)
        corners.append((min(max(low, 1), side) - 1, min(max(high, 1), side)))
    return [corners[0][0], corners[1][0], corners[0][1], corners[1][1]]


@pytest.mark.shared_data
def test_the_release_chooses_the_same_scales(golden):
    best = choose_scales(golden["boxes"], golden["size"], golden["scales"])
    assert np.array_equal(best, golden["best_scale_index"])
    # with one scale per possible expectation the choice names the expectation itself
    wishes = np.unique(golden["expected_scale"])
    assert np.array_equal(wishes[choose_scales(golden["boxes"], golden["size"], wishes)], golden["expected_scale"])


@pytest.mark.shared_data
def test_the_release_projects_onto_the_same_cells(golden):
    best, cells = project_at_best_scales(golden)
    sizes = [golden[f"map_{scale}"].shape[1:] for scale in golden["scales"]]
    expected = [merged_and_clamped(w, sizes[k]) for w, k in zip(golden["window_1based_unclipped"], best, strict=True)]
    assert cells.tolist() == expected
    size = golden["map_688"].shape[1:]
    single = project_windows(golden["boxes"], golden["size"], 688, ZF5, size)
    assert single.tolist() == [merged_and_clamped(w, size) for w in golden["window_688_1based_unclipped"]]


@pytest.mark.shared_data
def test_the_release_pools_the_same_bits(golden):
    single = project_windows(golden["boxes"], golden["size"], 688, ZF5, golden["map_688"].shape[1:])
    pooled = pool_windows(torch.from_numpy(golden["map_688"]), single, LEVELS)
    assert np.array_equal(pooled.numpy(), golden["pooled_688"])
    best, cells = project_at_best_scales(golden)
    for k, scale in enumerate(golden["scales"]):
        pooled = pool_windows(torch.from_numpy(golden[f"map_{scale}"]), cells[best == k], LEVELS)
        assert np.array_equal(pooled.numpy(), golden["pooled_5scale"][best == k])


@pytest.mark.shared_data
def test_the_release_merges_the_same_windows(golden):
    one_scale = np.zeros(300, np.int64)
    before_clamping = golden["window_688_1based_unclipped"]  # which the release compares
    distinct, _ = ProjectedWindows(one_scale, before_clamping).unique()
    assert np.array_equal(distinct.cells, before_clamping[golden["unique_window_688_indices"]])
    cells = project_windows(golden["boxes"], golden["size"], 688, ZF5, golden["map_688"].shape[1:])
    clamped, inverse = ProjectedWindows(one_scale, cells).unique()
    assert len(clamped.cells) <= len(distinct.cells)
    assert np.array_equal(clamped.cells[inverse], cells)


@given(
    height=st.integers(2, 900),
    width=st.integers(2, 900),
    scale=st.one_of(st.sampled_from(FIVE), st.floats(20, 1300)),
    seed=st.integers(0, 9999),
)
@settings(deadline=None, max_examples=80)
def test_projection_equals_the_releases_formula_written_as_a_loop(height, width, scale, seed):
    boxes = random_boxes(6, height, width, seed)
    map_size = tuple(max(1, int(side * scale / min(height, width)) // 16 - 1) for side in (height, width))
    expected = [release_window(box, (height, width), scale, ZF5, map_size) for box in boxes]
    assert project_windows(boxes, (height, width), scale, ZF5, map_size).tolist() == expected


@given(boxes=st.lists(st.tuples(*[st.floats(-1e9, 1e9)] * 4), max_size=5), paper=st.booleans(), side=st.integers(1, 99))
@settings(deadline=None)
def test_every_box_becomes_a_window_with_cells_inside_the_map(boxes, paper, side):
    array = np.array(boxes).reshape(-1, 2, 2)
    array = np.sort(array, axis=1).reshape(-1, 4)
    size = tuple(max(1, round(each * 160 / min(side, 60) / 16)) for each in (side, 60))
    cells = project_windows(array, (side, 60), 160, ZF5, size, "paper" if paper else "release")
    assert cells.dtype == np.int64
    assert cells.shape == (len(boxes), 4)
    assert (cells[:, :2] >= 0).all()
    assert (cells[:, 2:] > cells[:, :2]).all()
    assert (cells[:, 2:] <= size[::-1]).all()


def test_the_papers_projection_keeps_the_cells_whose_centres_lie_strictly_inside():
    centred = SimpleNamespace(stride=16, first_centre=0, shrink=6.5)
    boxes = np.array([[0, 16, 33, 49], [1, 15, 34, 50], [40, 40, 45, 45]])
    # scale = min(h, w): the image is not resized; centres lie at 0, 16, 32, …
    cells = project_windows(boxes, (200, 200), 200, centred, (12, 12), "paper")
    assert cells[:2].tolist() == [[1, 2, 2, 3], [1, 1, 3, 4]]
    assert cells[2].tolist() == [2, 2, 3, 3]  # no centre inside: the cell to the left of the middle
    shifted = SimpleNamespace(stride=16, first_centre=16, shrink=6.5)
    assert (project_windows(boxes[1:2] + 16, (200, 200), 200, shifted, (12, 12), "paper") == cells[1:2]).all()


@given(st.integers(2, 900), st.integers(2, 900), st.sampled_from((208, 224)), st.integers(0, 9999))
@settings(deadline=None)
def test_the_scale_is_the_one_nearest_to_the_expectation(height, width, target_side, seed):
    boxes = random_boxes(6, height, width, seed)
    expected = [expected_scale(box, (height, width), target_side) for box in boxes]
    nearest = [min(range(5), key=lambda k: abs(FIVE[k] - wish)) for wish in expected]
    assert choose_scales(boxes, (height, width), FIVE, target_side).tolist() == nearest


def test_a_tie_between_scales_goes_to_the_first():
    # expected = 208 · 208 / 208 = 208, halfway between the scales
    assert choose_scales(np.array([[0.0, 0, 208, 208]]), (208, 300), (200, 216)).tolist() == [0]


def test_a_box_without_area_takes_the_largest_scale():
    assert choose_scales(np.array([[5.0, 5, 5, 9]]), (300, 300), FIVE).tolist() == [4]


def test_no_boxes_give_no_windows():
    none = np.zeros((0, 4))
    assert choose_scales(none, (300, 300), FIVE).shape == (0,)
    cells = project_windows(none, (300, 300), 688, ZF5, (43, 43))
    assert cells.shape == (0, 4)
    distinct, inverse = ProjectedWindows(np.zeros(0, np.int64), cells).unique()
    assert len(distinct.cells) == len(inverse) == 0


def test_tensors_give_tensors():
    boxes = random_boxes(50, 300, 400)
    tensor = torch.from_numpy(boxes)
    scales = choose_scales(tensor, (300, 400), FIVE)
    cells = project_windows(tensor, (300, 400), 688, ZF5, (43, 57))
    assert all(isinstance(each, torch.Tensor) and each.dtype == torch.int64 for each in (scales, cells))
    assert np.array_equal(scales.numpy(), choose_scales(boxes, (300, 400), FIVE))
    assert np.array_equal(cells.numpy(), project_windows(boxes, (300, 400), 688, ZF5, (43, 57)))


def test_windows_on_the_same_cells_at_the_same_scale_are_merged_in_their_order():
    cells = np.array([[5, 5, 9, 9], [1, 1, 2, 2], [5, 5, 9, 9], [5, 5, 9, 9], [0, 0, 3, 3]])
    scale_index = np.array([1, 0, 1, 0, 0])
    distinct, inverse = ProjectedWindows(scale_index, cells).unique()
    assert distinct.scale_index.tolist() == [1, 0, 0, 0]
    assert distinct.cells.tolist() == cells[[0, 1, 3, 4]].tolist()
    assert inverse.tolist() == [0, 1, 0, 2, 3]


def test_projections_that_make_no_sense_are_refused():
    boxes = np.array([[0.0, 0, 5, 5], [0, np.nan, 5, 5]])
    with pytest.raises(ValueError, match=r"box 1 is not finite: got .*drop it before projecting"):
        project_windows(boxes, (300, 300), 688, ZF5, (43, 57))
    with pytest.raises(ValueError, match="projection must be one of release, paper, got 'centre'"):
        project_windows(boxes[:1], (300, 300), 688, ZF5, (43, 57), "centre")
    with pytest.raises(ValueError, match=r"map_size must be \(height, width\), both at least 1, got \(0, 57\)"):
        project_windows(boxes[:1], (300, 300), 688, ZF5, (0, 57))
    with pytest.raises(ValueError, match="scales must be shorter sides in pixels, at least one"):
        choose_scales(boxes[:1], (300, 300), ())
    with pytest.raises(ValueError, match=r"boxes must have shape \(R, 4\), got \(4,\)"):
        choose_scales(boxes[0], (300, 300), FIVE)


def test_the_expected_side_is_rounded_before_the_nearest_scale_is_taken():
    # 208 · 300 / 104.2 = 598.8: 599 rounded, 598 cut off
    assert choose_scales(np.array([[0, 0, 104.2, 104.2]]), (300, 400), (598, 599)).tolist() == [1]


def test_distinct_windows_may_lie_outside_the_map():
    cells = np.array([[-2, 0, 3, 3], [0, -2, 3, 3], [-2, 0, 3, 3]])
    distinct, rows = ProjectedWindows(np.zeros(3, np.int64), cells).unique()
    assert distinct.cells.tolist() == [[-2, 0, 3, 3], [0, -2, 3, 3]]
    assert rows.tolist() == [0, 1, 0]
