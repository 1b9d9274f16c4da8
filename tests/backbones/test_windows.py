"""Scale choice and projection against the release's own numbers and its formulas written as loops."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import expected_scale, nearest_area, release_window
from torch import nn

from sppnet import Geometry
from sppnet.backbones.architectures import BACKBONES
from sppnet.backbones.geometry import geometry_of, map_side, steps_of
from sppnet.backbones.windows import choose_scales, project_windows
from sppnet.detection.window_features import ProjectedWindows
from sppnet.errors import SppnetError
from sppnet.images import scaled_size
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


@given(
    st.integers(2, 900),
    st.integers(2, 900),
    st.sampled_from((208, 224, 100.5)),
    st.lists(st.integers(16, 2000), min_size=1, max_size=6),
    st.integers(0, 9999),
)
@settings(deadline=None)
def test_the_paper_s_scale_is_the_one_of_the_nearest_area(height, width, side, scales, seed):
    boxes = random_boxes(6, height, width, seed)
    nearest = [nearest_area(box, (height, width), scales, side) for box in boxes]
    for given_boxes in (boxes, torch.from_numpy(boxes)):
        assert choose_scales(given_boxes, (height, width), scales, side, "paper").tolist() == nearest
    assert choose_scales(boxes, (height, width), scales, rule="paper").tolist() == [
        nearest_area(box, (height, width), scales, 224) for box in boxes
    ]


def test_the_rules_differ_where_the_nearest_side_has_not_the_nearest_area():
    # sides of 150 and 288 px: 74 and 64 from 224, but areas of 27,676 and 32,768 from it
    box = np.array([[0.0, 0, 100, 100]])
    assert choose_scales(box, (100, 100), (150, 288), 224, "release").tolist() == [1]
    assert choose_scales(box, (100, 100), (150, 288), rule="paper").tolist() == [0]


def test_a_tie_between_scales_goes_to_the_first():
    # expected = 208 · 208 / 208 = 208, halfway between the scales
    assert choose_scales(np.array([[0.0, 0, 208, 208]]), (208, 300), (200, 216)).tolist() == [0]
    # areas of 1² · 7² and 1² · 1² are both 24 from 5²
    for scales in ((7, 1), (1, 7)):
        assert choose_scales(np.array([[0.0, 0, 1, 1]]), (1, 1), scales, 5, "paper").tolist() == [0]
    # of a shorter side of 3 too, by which nothing here can be divided
    assert choose_scales(np.array([[0.0, 0, 3, 3]]), (3, 9), (1, 7), 5, "paper").tolist() == [0]


@pytest.mark.parametrize("rule", ["release", "paper"])
def test_a_box_without_area_takes_the_largest_scale_and_one_beyond_measure_the_smallest(rule):
    assert choose_scales(np.array([[5.0, 5, 5, 9]]), (300, 300), FIVE, rule=rule).tolist() == [4]
    assert choose_scales(np.array([[0.0, 0, 1e200, 1e200]]), (300, 300), FIVE[::-1], rule=rule).tolist() == [4]


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
    with pytest.raises(ValueError, match=r"boxes must be finite x1 y1 x2 y2 .*nan.* at row 1"):
        project_windows(boxes, (300, 300), 688, ZF5, (43, 57))
    with pytest.raises(ValueError, match="projection must be one of release, paper, got 'centre'"):
        project_windows(boxes[:1], (300, 300), 688, ZF5, (43, 57), "centre")
    with pytest.raises(ValueError, match=r"map_size must be \(height, width\), both at least 1, got \(0, 57\)"):
        project_windows(boxes[:1], (300, 300), 688, ZF5, (0, 57))
    with pytest.raises(ValueError, match="scales must be shorter sides in pixels, at least one"):
        choose_scales(boxes[:1], (300, 300), ())
    with pytest.raises(ValueError, match=r"boxes must have shape \(R, 4\), got .*\(4,\)"):
        choose_scales(boxes[0], (300, 300), FIVE)


def test_the_expected_side_is_rounded_before_the_nearest_scale_is_taken():
    # 208 · 300 / 104.2 = 598.8: 599 rounded, 598 cut off
    assert choose_scales(np.array([[0, 0, 104.2, 104.2]]), (300, 400), (598, 599)).tolist() == [1]


def test_distinct_windows_may_lie_outside_the_map():
    cells = np.array([[-2, 0, 3, 3], [0, -2, 3, 3], [-2, 0, 3, 3]])
    distinct, rows = ProjectedWindows(np.zeros(3, np.int64), cells).unique()
    assert distinct.cells.tolist() == [[-2, 0, 3, 3], [0, -2, 3, 3]]
    assert rows.tolist() == [0, 1, 0]


# arguments that cannot be

BOX, IMAGE, GRID, VGG = np.array([[48, 240, 195, 371.0]]), (500, 353), (61, 43), Geometry(16, 7.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scale": 688 / 353},
            r"map_size is 61 × 43; give sizes as \(height, width\), the resized shorter side as scale",
        ),
        ({"scale": 1.0}, "a map of about 1 × 1 cells"),
        ({"scale": 0}, r"scale must be the resized shorter side in pixels, e\.g\. 688, got 0"),
        ({"scale": -688}, "got -688"),
        ({"scale": float("nan")}, "got nan"),
        ({"scale": float("inf")}, "got inf"),
        ({"scale": "688"}, "got '688'"),
        ({"scale": (688, 974)}, r"got \(688, 974\)"),
        ({"scale": 10**400}, "scale must be"),
        (
            {"scale": 353},
            r"becomes 500 × 353 .* about 31 × 22 cells, but map_size is 61 × 43; .* the map of this image",
        ),
        ({"scale": 1e90}, "map_size is 61 × 43"),
        ({"map_size": (43, 61)}, r"map_size is 43 × 61; give sizes as \(height, width\)"),
        ({"image_size": (353, 500)}, r"give sizes as \(height, width\)"),
        ({"map_size": (256, 61, 43)}, r"got \(256, 61, 43\); leave out the channels: map_size=image\.shape\[:2\]"),
        ({"image_size": (500, 353, 3)}, "leave out the channels"),
        ({"image_size": (500.5, 353)}, r"image_size must be \(height, width\), both at least 1, got \(500\.5, 353\)"),
        ({"image_size": ("500", "353")}, r"got \('500', '353'\)"),
        ({"image_size": "500x353"}, "got '500x353'"),
        ({"image_size": 500}, "got 500"),
        ({"image_size": ((500,), (353, 3))}, "image_size must be"),
        ({"image_size": None}, "got None"),
        ({"map_size": (float("nan"), 43)}, "map_size must be"),
        ({"geometry": (16, 7.5)}, r"geometry must be a Geometry, .* got \(16, 7\.5\)"),
        ({"geometry": SimpleNamespace(stride=0, first_centre=0, shrink=0)}, "expected stride in pixels > 0, got 0"),
        ({"geometry": Geometry(32, 7.5)}, "at stride 32 a map of about 30 × 22 cells"),
        (
            {"boxes": BOX[:, [2, 3, 0, 1]]},
            r"boxes must be finite x1 y1 x2 y2 with x2 >= x1 .* at row 0",
        ),
        (
            {"boxes": torch.tensor([[0, 0, 9, 9.0], [5, 9, 9, 5]])},
            r"boxes must be .* got \[5\.0, 9\.0, 9\.0, 5\.0\] at row 1",
        ),
        ({"boxes": [[0, 0, 9, float("inf")]]}, "boxes must be finite x1 y1 x2 y2 .*inf.* at row 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(change, message):
    arguments = {"boxes": BOX, "image_size": IMAGE, "scale": 688, "geometry": VGG, "map_size": GRID}
    assert project_windows(**arguments).shape == (1, 4)
    with pytest.raises(SppnetError, match=message):
        project_windows(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": 688}, r"scales must be shorter sides in pixels, at least one, e\.g\. \(688,\), got 688"),
        ({"scales": (480, -688)}, r"got \(480, -688\)"),
        ({"scales": (480, float("nan"))}, "scales must be"),
        ({"scales": ("480",)}, "scales must be"),
        ({"scales": ((480, 688),)}, "scales must be"),
        ({"target_side": 0}, r"target_side must be pixels > 0, e\.g\. 208, got 0"),
        ({"target_side": float("inf")}, "got inf"),
        ({"rule": "nearest"}, "rule must be one of release, paper, got 'nearest'"),
        ({"rule": None}, "got None"),
        ({"image_size": (353, 0)}, "image_size must be"),
        ({"boxes": [[5, 5, 1, 9]]}, "boxes must be finite x1 y1 x2 y2"),
    ],
)
def test_scales_cannot_be_chosen_from_what_cannot_be(change, message):
    arguments = {"boxes": BOX, "image_size": IMAGE, "scales": (480, 688), "target_side": 208}
    assert choose_scales(**arguments).tolist() == [0]
    with pytest.raises(SppnetError, match=message):
        choose_scales(**{**arguments, **change})


class Unreadable:
    def __array__(self, *args, **kwargs):
        raise IndexError("nothing")


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ("abc", "boxes must be an array of real numbers, got <U3"),
        ([["1", "2", "3", "4"]], "boxes must be an array of real numbers"),
        ([[1, 2, 3, 4], [1, 2]], "boxes must be an array of numbers, got list"),
        ([[1, 2, 3, None]], "real numbers, got list"),
        (BOX.astype(complex), "got complex128"),
        (torch.tensor(BOX).to(torch.complex64), "got complex64"),
        (torch.ones(2, 4, device="meta"), "got Tensor"),
        (torch.tensor(BOX).to_sparse(), "got Tensor"),
        ({}, "got dict"),
        (None, "got NoneType"),
        (Unreadable(), "got Unreadable"),
        (BOX > 0, r"boxes must have shape \(R, 4\), got bool of shape \(1, 4\)"),
        (torch.ones(2, 4, dtype=torch.bool), r"got bool of shape \(2, 4\)"),
        (5, r"boxes must have shape \(R, 4\), got \(\)"),
        (BOX[0], r"got \(4,\); pass boxes\[None\] for one box"),
        (BOX[:, :3], r"got \(1, 3\)"),
        ([[1e9999] * 4], "boxes must be finite"),
    ],
)
def test_boxes_that_are_no_numbers_are_refused(boxes, message):
    for call in (
        lambda: project_windows(boxes, IMAGE, 688, VGG, GRID),
        lambda: choose_scales(boxes, IMAGE, (480, 688)),
    ):
        with pytest.raises(SppnetError, match=message):
            call()


def test_lists_arrays_and_tensors_are_alike():
    for boxes in (
        BOX.tolist(),
        BOX.astype(np.float32),
        torch.tensor(BOX).bfloat16().double(),
        torch.tensor(BOX).half(),
    ):
        for size in (list(GRID), np.array(GRID), torch.tensor(GRID), torch.Size(GRID)):
            cells = project_windows(boxes, np.array(IMAGE), np.float32(688), VGG, size)
            assert np.asarray(cells).tolist() == [[6, 29, 24, 45]]
    assert choose_scales([], torch.tensor(IMAGE), torch.tensor([480, 688])).shape == (0,)
    assert project_windows([], IMAGE, 688, VGG, GRID).shape == (0, 4)


SIDES = st.one_of(st.integers(1, 40), st.integers(1, 4000))


@pytest.fixture(scope="module")
def plans():
    """The layers of every backbone with its geometry; no weights."""
    return {name: random_backbone_layers(name) for name in BACKBONES}


def random_backbone_layers(name):
    with torch.device("meta"):
        plan = BACKBONES[name]()
    layers = nn.Sequential(*list(plan.layers.values())[: list(plan.layers).index(plan.default) + 1])
    steps, _ = steps_of(layers, 16)
    return steps, geometry_of(steps)


@given(st.data(), SIDES, SIDES, st.integers(16, 1600), st.one_of(st.none(), st.integers(16, 2000)))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_map_of_every_backbone_is_accepted_at_every_size(plans, data, height, width, scale, max_side):
    steps, geometry = plans[data.draw(st.sampled_from(sorted(plans)))]
    assume(scale**2 * max(height, width) / min(height, width) < 3e7)  # a larger map would not fit into the memory
    size, side = scaled_size((height, width), scale, max_side)
    cells = (map_side(steps, size[0]), map_side(steps, size[1]))
    if min(cells) < 1:
        return
    box = np.array([[0, 0, width, height], [width / 2, height / 2, width / 2, height / 2]])
    windows = project_windows(box, (height, width), side, geometry, cells)
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2:] > windows[:, :2]).all()
    assert (windows[:, 2:] <= [cells[1], cells[0]]).all()


@given(st.data(), SIDES, SIDES, st.integers(16, 1600), st.sampled_from((32, 64, 128)))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_map_of_a_padded_image_gives_the_windows_of_the_image(plans, data, height, width, scale, multiple):
    steps, geometry = plans[data.draw(st.sampled_from(sorted(plans)))]
    assume(scale**2 * max(height, width) / min(height, width) < 3e7)
    size, side = scaled_size((height, width), scale, None)
    cells, padded = (
        tuple(map_side(steps, -(-each // divisor) * divisor) for each in size) for divisor in (1, multiple)
    )
    if min(cells) < 1:
        return
    box = np.array([[width / 4, height / 4, width / 2, height / 2]])  # inside the map, which cuts windows off
    windows = project_windows(box, (height, width), side, geometry, padded)
    own = project_windows(box, (height, width), side, geometry, cells)
    assert np.array_equal(np.minimum(windows[:, 2:], cells[::-1]), own[:, 2:])


@pytest.mark.parametrize("cells", [(16, 16), (13, 16), (16, 13), (18, 12)])
def test_maps_of_images_padded_to_a_multiple_are_taken(cells):
    assert project_windows([[0, 0, 97, 97]], (97, 97), 97, Geometry(8, 3.5), cells).shape == (1, 4)


@pytest.mark.parametrize("cells", [(19, 16), (16, 32), (9, 16), (128, 128)])
def test_maps_that_no_padding_explains_are_refused(cells):
    with pytest.raises(SppnetError, match=rf"a map of about 12 × 12 cells, but map_size is {cells[0]} × {cells[1]}"):
        project_windows([[0, 0, 97, 97]], (97, 97), 97, Geometry(8, 3.5), cells)


@given(
    st.tuples(st.integers(1, 99), st.integers(1, 99)), st.integers(0, 98), st.integers(0, 98), st.integers(0, 30),
    st.floats(1, 40), st.floats(-40, 40), st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_a_larger_box_never_begins_later_or_ends_earlier(size, x, y, more, stride, centre, paper):
    geometry = Geometry(stride, centre, shrink=0)
    cells = tuple(max(1, round(each * 200 / min(size) / stride)) for each in size)
    boxes = np.array([[x, y, x + 40, y + 40], [x - more, y - more, x + 40 + more, y + 40 + more]])
    inner, outer = project_windows(boxes, size, 200, geometry, cells, "paper" if paper else "release")
    crossed = 40 * 199 / max(min(size) - 1, 1) < 2 * stride  # less than two cells: the middle decides
    assert crossed or ((outer[:2] <= inner[:2]).all() and (outer[2:] >= inner[2:]).all())


ANYTHING = st.one_of(
    st.none(), st.text(max_size=3), st.floats(), st.integers(), st.lists(st.floats() | st.integers(), max_size=4)
)


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING, ANYTHING)
@settings(deadline=None, max_examples=200)
def test_any_other_argument_is_refused_here_and_not_inside_a_library(first, second, third, fourth, fifth):
    calls = (
        lambda: project_windows(BOX, first, second, VGG, third),
        lambda: project_windows(
            BOX, IMAGE, 688, SimpleNamespace(stride=first, first_centre=second, shrink=third), GRID
        ),
        lambda: choose_scales(BOX, first, second, third),
        lambda: Geometry(fourth, fifth, first),
    )
    for call in calls:
        try:
            call()
        except (ValueError, TypeError) as error:
            frames = traceback.extract_tb(error.__traceback__)
            assert "/sppnet/" in frames[-1].filename, frames[-1]
