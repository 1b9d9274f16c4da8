"""The pyramid against torch's adaptive pooling and against the definition written as loops."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pyramid_vector
from torch.nn.functional import adaptive_max_pool2d

from sppnet.ops import pyramid
from sppnet.ops._operators import argmax, pool, pool_elsewhere
from sppnet.ops.pyramid import (
    RoIPool,
    SpatialPyramidPool,
    WindowPool,
    bin_count,
    pool_windows,
    sliding_pool,
    spatial_pyramid_pool,
)

PAPER = (1, 2, 3, 6)
LEVELS = [PAPER, (1, 2, 4), (1, 2, 3, 4), (3, 5, 7), (2, 3), (6, 1), (1,), (2, 2), (12, 4, 3, 5)]


def random_map(channels: int, height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_windows(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = np.sort(rng.integers(0, width, (count, 2)), axis=1)
    y = np.sort(rng.integers(0, height, (count, 2)), axis=1)
    return np.stack([x[:, 0], y[:, 0], x[:, 1] + 1, y[:, 1] + 1], axis=1)


def channels_last(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def crop_by_crop(feature_map: torch.Tensor, windows: np.ndarray, levels: tuple[int, ...]) -> torch.Tensor:
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)  # crops are small: more threads only wait for each other
    for x1, y1, x2, y2 in windows.tolist():
        crop = feature_map[:, y1:y2, x1:x2]
        rows.append(torch.cat([adaptive_max_pool2d(crop[None], n).flatten() for n in levels]))
    torch.set_num_threads(threads)
    return torch.stack(rows)


def with_gradient(feature_map: torch.Tensor, windows: np.ndarray, levels: tuple[int, ...]) -> torch.Tensor:
    """The path of maps that require a gradient."""
    return pool_windows(feature_map.detach().requires_grad_(), windows, levels).detach()


def with_roi_pool(feature_map: torch.Tensor, windows: np.ndarray, levels: tuple[int, ...]) -> torch.Tensor:
    """What a GPU runs, on the CPU: its values, which are also those at its places."""
    cells = torch.from_numpy(np.asarray(windows, dtype=np.int64))
    values = pool_elsewhere(feature_map[None], cells, levels)
    places = argmax(feature_map[None], cells, levels)
    assert torch.equal(feature_map.reshape(-1)[places].nan_to_num(7e4), values.nan_to_num(7e4))
    return values


@given(
    channels=st.integers(1, 40),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    levels=st.sampled_from(LEVELS),
    count=st.sampled_from([1, 12, 100]),  # of many the maxima of squares are computed first
    last=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=50)
def test_windows_equal_adaptive_max_pooling_of_the_crop_bit_for_bit(
    channels, height, width, levels, count, last, double, seed
):
    feature_map = random_map(channels, height, width, seed, torch.float64 if double else torch.float32)
    given = channels_last(feature_map) if last else feature_map
    windows = random_windows(count, height, width, seed)
    expected = crop_by_crop(feature_map, windows, levels)
    assert torch.equal(pool_windows(given, windows, levels), expected)
    assert torch.equal(with_gradient(given, windows, levels), expected)
    assert torch.equal(with_roi_pool(given, windows, levels), expected)


@pytest.mark.parametrize("levels", [PAPER, (3, 5, 7), (2,)])
@pytest.mark.parametrize("channels", [15, 16, 130, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_channels_is_pooled(channels, levels, dtype):
    feature_map, windows = random_map(channels, 20, 30, dtype=dtype), random_windows(70, 20, 30)
    expected = crop_by_crop(feature_map, windows, levels)
    assert torch.equal(pool_windows(feature_map, windows, levels), expected)
    assert torch.equal(pool_windows(channels_last(feature_map), windows, levels), expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 60), (60, 3), (17, 16), (2, 2)])
@pytest.mark.parametrize("levels", [PAPER, (60, 7)])
def test_narrow_maps_and_many_windows(height, width, levels):
    feature_map, windows = random_map(3, height, width), random_windows(300, height, width)
    assert torch.equal(pool_windows(feature_map, windows, levels), crop_by_crop(feature_map, windows, levels))


@pytest.mark.parametrize("count", [1, 3000])  # without squares of cells, and with them
def test_bins_far_larger_than_any_square(count):
    feature_map, rng = random_map(2, 90, 120), np.random.default_rng(0)
    corner = rng.integers(0, 10, (count, 2))
    windows = np.concatenate([corner, [120, 90] - rng.integers(0, 10, (count, 2))], axis=1)
    pooled = pool_windows(feature_map, windows, (1, 2, 3))
    assert torch.equal(pooled[:200], crop_by_crop(feature_map, windows[:200], (1, 2, 3)))


def test_windows_on_the_same_cells_have_the_same_rows():
    feature_map, windows = random_map(8, 9, 12), random_windows(40, 9, 12)
    repeated = windows[np.random.default_rng(0).integers(0, 40, 700)]
    expected = crop_by_crop(feature_map, repeated, (1, 2, 4))
    assert torch.equal(pool_windows(feature_map, repeated, (1, 2, 4)), expected)
    whole = pool_windows(feature_map, [[0, 0, 12, 9]] * 500, (2,))
    assert torch.equal(whole, spatial_pyramid_pool(feature_map, (2,)).expand(500, -1))


@pytest.mark.parametrize("channels", [256, 300])
def test_a_result_of_many_megabytes_is_the_same(channels):
    feature_map, windows = random_map(channels, 20, 30), random_windows(700, 20, 30)
    pooled = pool_windows(feature_map, windows, PAPER)
    assert pooled.nbytes > 2**25
    assert torch.equal(pooled, crop_by_crop(feature_map, windows, PAPER))


def test_results_that_are_held_do_not_change_with_the_next_call():
    windows = random_windows(300, 20, 30)
    first = pool_windows(random_map(64, 20, 30, 1), windows, (1, 2, 3, 6))
    kept, row = first.clone(), first[7]
    del first
    pool_windows(random_map(64, 20, 30, 2), windows, (1, 2, 3, 6))
    pool_windows(random_map(64, 20, 30, 3), windows, (1, 2, 3, 6))
    assert torch.equal(row, kept[7])


def test_results_of_every_size_may_be_held_at_once():
    maps, counts = [random_map(32, 12, 15, seed) for seed in range(8)], [700, 40, 700, 350, 0, 1, 90, 700]
    windows = random_windows(700, 12, 15)
    results = [pool_windows(cells, windows[:count], PAPER) for cells, count in zip(maps, counts, strict=True)]
    for cells, count, result in zip(maps, counts, results, strict=True):
        assert torch.equal(result, pool_windows(cells, windows, PAPER)[:count])


@given(height=st.integers(1, 20), width=st.integers(1, 20), levels=st.sampled_from(LEVELS), seed=st.integers(0, 999))
@settings(max_examples=30)
def test_the_window_of_the_whole_map_is_the_pyramid_of_the_map(height, width, levels, seed):
    feature_map = random_map(3, height, width, seed)
    pooled = pool_windows(feature_map, [[0, 0, width, height]], levels)
    assert torch.equal(pooled[0], spatial_pyramid_pool(feature_map, levels))


@pytest.mark.parametrize("levels", LEVELS)
def test_windows_equal_the_definition_written_as_loops(levels):
    feature_map = random_map(3, 9, 14)
    windows = random_windows(12, 9, 14)
    expected = np.stack([pyramid_vector(feature_map.numpy(), window, levels) for window in windows])
    assert np.array_equal(pool_windows(feature_map, windows, levels).numpy(), expected)


def test_the_vector_is_level_major_and_then_channel_major():
    feature_map = torch.arange(8.0).reshape(2, 2, 2)
    expected = torch.tensor([3.0, 7, 0, 1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(spatial_pyramid_pool(feature_map, (1, 2)), expected)
    assert torch.equal(pool_windows(feature_map, [[0, 0, 2, 2]], (1, 2))[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_is_pooled_exactly_and_kept(dtype):
    feature_map = random_map(5, 11, 13, dtype=dtype)
    windows = random_windows(20, 11, 13)
    pooled = pool_windows(feature_map, windows, (1, 2, 3, 6))
    assert pooled.dtype == dtype
    assert torch.equal(pooled, crop_by_crop(feature_map, windows, (1, 2, 3, 6)))
    assert torch.equal(with_roi_pool(feature_map, windows, (1, 2, 3, 6)), pooled)


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_makes_no_difference_and_stays(torch_threads, threads):
    feature_map, windows = random_map(20, 40, 50), random_windows(1500, 40, 50)
    torch_threads(threads)
    pooled = pool_windows(feature_map, windows, PAPER)
    assert torch.get_num_threads() == threads
    assert torch.equal(pooled, with_roi_pool(feature_map, windows, PAPER))


def test_several_threads_may_pool_at_once():
    maps, windows = [random_map(128, 40, 50, seed) for seed in range(4)], random_windows(300, 40, 50)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda feature_map: pool_windows(feature_map, windows, (1, 3)), maps))
    for feature_map, result in zip(maps, results, strict=True):
        assert torch.equal(result, crop_by_crop(feature_map, windows, (1, 3)))


FORKED = """
import os, signal, torch
from sppnet.ops.pyramid import pool_windows
torch.set_num_threads(3)
feature_map = torch.max_pool2d(torch.randn(1, 64, 64, 64), 2)[0]  # on torch's own threads
windows = torch.arange(32 * 20).reshape(-1, 1) % 20 + torch.tensor([0, 0, 1, 9])
expected = pool_windows(feature_map, windows, (1, 2, 3))
if child := os.fork():
    print(os.waitpid(child, 0)[1])
else:
    signal.alarm(20)
    found = pool_windows(feature_map, windows, (1, 2, 3))
    os._exit(found.tolist() != expected.tolist())  # torch's own threads do not survive a fork
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_pools_too():
    run = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "0", run.stderr


def test_a_window_of_one_cell_fills_every_bin():
    feature_map = random_map(4, 7, 8)
    pooled = pool_windows(feature_map, [[3, 2, 4, 3]], (6,))
    assert torch.equal(pooled.reshape(4, 36), feature_map[:, 2, 3, None].expand(4, 36))


def test_no_windows_give_no_rows():
    for windows in ([], np.zeros((0, 4), np.int64), torch.zeros((0, 4), dtype=torch.int32)):
        assert pool_windows(random_map(4, 7, 8), windows, (1, 2)).shape == (0, 20)
    assert with_roi_pool(random_map(4, 7, 8), np.zeros((0, 4), np.int64), (1, 2)).shape == (0, 20)
    assert spatial_pyramid_pool(torch.zeros(0, 4, 7, 8), (1, 2)).shape == (0, 20)


def test_arrays_and_tensors_of_windows_are_the_same():
    feature_map, windows = random_map(4, 7, 8), random_windows(6, 7, 8)
    expected = pool_windows(feature_map, windows, (2,))
    assert torch.equal(pool_windows(feature_map, torch.from_numpy(windows).int(), (2,)), expected)
    assert torch.equal(pool_windows(feature_map, windows[::-1].astype(np.uint16), (2,)), expected.flip(0))


def test_a_map_may_lie_in_memory_as_it_likes():
    whole, windows = random_map(90, 20, 24), random_windows(50, 7, 8)
    sliced = whole[1:85, 2:9, ::3]
    expected = crop_by_crop(sliced, windows, (1, 2, 3, 6))
    for feature_map in (sliced, sliced.contiguous(), channels_last(sliced), sliced.permute(0, 2, 1).contiguous().mT):
        assert torch.equal(pool_windows(feature_map, windows, (1, 2, 3, 6)), expected)


def test_nan_and_infinity_propagate_as_in_torch():
    feature_map = random_map(3, 6, 6)
    feature_map[0, 1, 1], feature_map[1], feature_map[2, 3, 3] = torch.nan, -torch.inf, torch.inf
    windows = random_windows(30, 6, 6)
    expected = crop_by_crop(feature_map, windows, (1, 2, 3))
    for way in (pool_windows, with_gradient, with_roi_pool):
        assert torch.equal(way(feature_map, windows, (1, 2, 3)).nan_to_num(7e7), expected.nan_to_num(7e7))
        without_nan = feature_map[1:]
        assert torch.equal(way(without_nan, windows, (1, 2, 3)), crop_by_crop(without_nan, windows, (1, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min, -1e300])
def test_the_lowest_numbers_of_a_type_are_pooled(dtype, lowest):
    feature_map = torch.full((2, 5, 4), lowest, dtype=torch.float64).to(dtype)
    feature_map[1, 2:] = torch.tensor(-3.0)
    windows = random_windows(20, 5, 4)
    expected = crop_by_crop(feature_map, windows, (1, 2, 3))
    for way in (pool_windows, with_gradient, with_roi_pool):
        assert torch.equal(way(feature_map, windows, (1, 2, 3)), expected)


@pytest.mark.parametrize("special", [None, torch.nan, torch.inf, -torch.inf])
def test_the_gradient_goes_where_that_of_the_crop_goes_also_among_equal_cells(special):
    feature_map = torch.randint(0, 3, (3, 8, 9), generator=torch.Generator().manual_seed(1)).double()
    if special is not None:
        feature_map[:, 2:7:2, 1:8:3] = special
    for n in (1, 2, 3, 6):  # level by level: sums of whole numbers do not depend on their order
        for window in random_windows(20, 8, 9).tolist():
            ours, theirs = feature_map.clone().requires_grad_(), feature_map.clone().requires_grad_()
            weights = torch.arange(3.0 * n * n, dtype=torch.float64) + 1
            pool_windows(ours, [window], (n,))[0].backward(weights)
            adaptive_max_pool2d(theirs[:, window[1] : window[3], window[0] : window[2]], n).flatten().backward(weights)
            assert torch.equal(ours.grad, theirs.grad)


def test_levels_too_fine_for_roi_pool_are_exact_too():
    feature_map = random_map(2, 62, 62)
    windows = np.array([[0, 0, 62, 62]])
    expected = crop_by_crop(feature_map, windows, (14, 22))
    assert torch.equal(with_roi_pool(feature_map, windows, (14, 22)), expected)
    assert torch.equal(pool_windows(feature_map, windows, (14, 22)), expected)


@pytest.mark.parametrize("n", [*range(1, 15), 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins_with_a_gradient_are_exact_at_any_side(n, dtype):
    feature_map, sides = torch.arange(601, dtype=dtype).reshape(1, 1, 601), np.arange(1, 601)[:, None]
    windows = np.concatenate([0 * sides, 0 * sides, sides, 0 * sides + 1], axis=1)  # most end before the map does
    for sign in (1, -1):  # the last and the first cell of every bin
        found = with_roi_pool(sign * feature_map, windows, (n,)).reshape(-1, n, n)[:, 0].numpy()
        i = np.arange(n)
        np.testing.assert_array_equal(found, -(-(i + 1) * sides // n) - 1 if sign == 1 else -(i * sides // n))


def test_gradients_flow_where_roi_pool_would_round():
    feature_map = random_map(1, 60, 3, dtype=torch.float64).requires_grad_()
    windows = np.array([[0, 0, 3, 29], [1, 2, 2, 5], [0, 1, 2, 59]])
    assert torch.autograd.gradcheck(lambda cells: pool_windows(cells, windows, (7, 2)), feature_map)


def test_gradients_flow_to_the_largest_cell_of_every_bin():
    feature_map = random_map(2, 5, 6, dtype=torch.float64).requires_grad_()
    windows = random_windows(4, 5, 6)
    assert torch.autograd.gradcheck(lambda cells: pool_windows(cells, windows, (1, 2, 3)), feature_map)
    assert torch.autograd.gradcheck(lambda cells: SpatialPyramidPool((1, 2, 3))(cells[None]), feature_map)
    with torch.no_grad():
        assert not pool_windows(feature_map, windows, (1, 2, 3)).requires_grad


def test_the_layer_gives_one_length_for_every_size():
    layer = SpatialPyramidPool((1, 2, 3, 6))
    assert layer(torch.zeros(2, 4, 13, 13)).shape == layer(torch.zeros(2, 4, 10, 17)).shape == (2, 200)
    maps = torch.stack([random_map(4, 10, 9, seed) for seed in range(3)])
    assert torch.equal(layer(maps), torch.stack([spatial_pyramid_pool(one, layer.levels) for one in maps]))
    assert bin_count((1, 2, 3, 6)) == 50
    assert "(1, 2, 3, 6)" in repr(layer)


def test_roi_pooling_is_one_level():
    feature_map, windows = random_map(4, 9, 9), random_windows(5, 9, 9)
    pooled = RoIPool(3)(feature_map, windows)
    assert pooled.shape == (5, 4, 3, 3)
    assert torch.equal(pooled.flatten(1), pool_windows(feature_map, windows, (3,)))
    assert RoIPool(3)(feature_map, windows[:0]).shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    ("side", "n", "expected"),
    [(13, 1, (13, 13, True)), (13, 2, (7, 6, True)), (13, 3, (5, 4, True)), (13, 6, (3, 2, True)),
     (10, 6, (2, 1, False)), (4, 6, (1, 0, False))],
)  # fmt: skip
def test_the_training_shorthand_says_whether_it_yields_the_bins(side, n, expected):
    assert sliding_pool(side, n) == expected
    if expected[1]:
        positions = torch.nn.functional.max_pool2d(torch.zeros(1, side, side), *expected[:2]).shape[-1]
        assert (positions == n) == expected[2]


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([0, 0, 1, 1], r"must have shape \(R, 4\), got \(4,\); pass windows\[None\]"),
        ([[0, 0, 1]], r"must have shape \(R, 4\), got \(1, 3\)"),
        ([[0.0, 0.0, 1.0, 1.0]], "must be whole cells of the map, got float64; project boxes with project_windows"),
        ([[0, 0, 1, 1], [2, 2, 2, 3]], r"window 1 is empty: got \[2, 2, 2, 3\].*project_windows"),
        ([[0, 3, 1, 2]], "window 0 is empty"),
        ([[0, 0, 9, 1]], r"window 0 is not inside the map of 7 × 8 cells: got \[0, 0, 9, 1\].*project_windows"),
        ([[0, 0, 1, 1], [-1, 0, 1, 1]], "window 1 is not inside"),
    ],
)
def test_windows_that_cannot_be_pooled_are_refused(windows, message):
    with pytest.raises(ValueError, match=message):
        pool_windows(random_map(2, 7, 8), windows, (1, 2))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([[[0, 0, 1, 1]]], r"a list of one \(R, 4\) per map, got 1 for a batch of 2 maps"),
        ([[0, 0, 1, 1], [0, 0, 1, 1]], r"must have shape \(K, 5\), or be a list of one \(R, 4\) per map, got \(2, 4\)"),
        (np.zeros((2, 1, 4), int), r"got \(2, 1, 4\)"),
        ([0, 0, 0, 1, 1], r"got \(5,\); pass windows\[None\]"),
        ([[2, 0, 0, 1, 1]], "window 0 of map 2 names no map of the batch of 2"),
        ([[0, 0, 0, 1, 1], [-1, 0, 0, 1, 1]], "window 0 of map -1 names no map"),
        (
            [[], [[0, 0, 1, 1], [0, 0, 9, 1]]],
            r"window 1 of map 1 is not inside the map of 7 × 8 cells: got \[0, 0, 9, 1\]",
        ),
        ([[0, 0, 0, 1, 1], [1, 0, 0, 1, 1], [0, 3, 0, 3, 1]], "window 1 of map 0 is empty"),
        (
            np.array([[0, 0, 0, 1, 1], [1, 0, 0.5, 1, 1]]),
            r"window 0 of map 1 is not whole cells: got \[0.0, 0.5, 1.0, 1.0\]",
        ),
        (torch.tensor([[0, 0, 0, torch.nan, 1]]), "window 0 of map 0 is not whole cells"),
        (torch.tensor([[0, 0, 0, torch.inf, 1]]), "window 0 of map 0 is not whole cells"),
        (torch.tensor([[0, 0, 0, 1e30, 1]]), "window 0 of map 0 is not inside"),
        ([[[0.0, 0.0, 1.0, 1.0]], []], "must be whole cells of the map, got float64; project boxes"),
        ([[0, 0, 0, 2**63, 1]], "window 0 of map 0 is"),
    ],
)
def test_windows_of_a_batch_that_cannot_be_pooled_are_refused(windows, message):
    with pytest.raises(ValueError, match=message):
        pool_windows(torch.zeros(2, 2, 7, 8), windows, (1, 2))


def test_maps_and_levels_that_cannot_be_pooled_are_refused():
    for call in (lambda one: pool_windows(one, [], (1,)), lambda one: spatial_pyramid_pool(one, (1,))):
        with pytest.raises(ValueError, match=r"must be a tensor, got ndarray; torch.from_numpy makes one"):
            call(np.zeros((2, 7, 8), np.float32))
        with pytest.raises(ValueError, match=r"must be floating point .* got torch.int64, .*\.float\(\)"):
            call(torch.zeros(2, 7, 8, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"and dense, got .* torch.sparse_coo; .*\.to_dense\(\)"):
            call(torch.zeros(2, 7, 8).to_sparse())
        with pytest.raises(ValueError, match=r"at least one cell, got \(2, 0, 8\); a map without cells"):
            call(torch.zeros(2, 0, 8))
        with pytest.raises(ValueError, match=r"must have shape \(C, H, W\) or \(N, C, H, W\) .* got \(7, 8\)"):
            call(torch.zeros(7, 8))
    for levels in ((), (0, 1), (1.5,), (True,), 3, "12", None, (1, 1001)):
        with pytest.raises(ValueError, match=r"levels must be whole numbers from 1 to 1000, got .*\(1, 2, 3, 6\)"):
            SpatialPyramidPool(levels)
    with pytest.raises(ValueError, match="side must be a whole number from 1 on, got 0; give side as an int"):
        sliding_pool(0, 6)
    with pytest.raises(ValueError, match=r"size must be a whole number from 1 on, got 2\.5"):
        RoIPool(2.5)
    with pytest.raises(ValueError, match="channels must be a whole number from 1 on, got True"):
        WindowPool().out_features(True)


# --- a batch ----------------------------------------------------------------------------------------

INDEX = np.array([[2, 0, 0, 9, 7], [0, 1, 2, 8, 3], [2, 4, 4, 5, 5], [0, 0, 0, 9, 7], [0, 3, 1, 8, 7]])
OF_EACH = [INDEX[INDEX[:, 0] == image, 1:] for image in range(3)]  # none of map 1


@pytest.mark.parametrize(
    "windows",
    [INDEX, INDEX.tolist(), INDEX.astype(np.float32), torch.from_numpy(INDEX), torch.from_numpy(INDEX).bfloat16()],
)
def test_windows_of_a_batch_may_name_their_map(windows):
    maps = torch.stack([random_map(5, 7, 9, seed) for seed in range(3)])
    expected = torch.stack([spatial_pyramid_pool(maps[i, :, b:d, a:c], (1, 3)) for i, a, b, c, d in INDEX])
    assert torch.equal(pool_windows(maps, windows, (1, 3)), expected)
    assert torch.equal(with_gradient(maps, windows, (1, 3)), expected)
    assert torch.equal(pool_elsewhere(maps, torch.as_tensor(windows), (1, 3)), expected)
    places = argmax(maps, torch.as_tensor(windows), (1, 3))
    assert torch.equal(maps.reshape(-1)[places], expected)
    assert torch.equal(RoIPool(3)(maps, windows).flatten(1), expected[:, 5:])


@pytest.mark.parametrize(
    "windows",
    [OF_EACH, [one.tolist() for one in OF_EACH], tuple(torch.from_numpy(one).int() for one in OF_EACH),
     [OF_EACH[0], np.zeros(0), torch.from_numpy(OF_EACH[2])]],
)  # fmt: skip
def test_windows_of_a_batch_may_be_listed_per_map(windows):
    maps = torch.stack([random_map(5, 7, 9, seed) for seed in range(3)]).contiguous(memory_format=torch.channels_last)
    expected = torch.cat([pool_windows(one, cells, PAPER) for one, cells in zip(maps, OF_EACH, strict=True)])
    assert torch.equal(WindowPool()(maps, windows), expected)
    maps.requires_grad_()
    pool_windows(maps, windows, (2,)).sum().backward()
    assert (maps.grad[1] == 0).all()
    assert maps.grad.sum() == 5 * 5 * 4


def test_the_place_of_a_nan_map_of_a_batch_is_its_own():
    maps = torch.stack([random_map(4, 6, 6, seed) for seed in range(3)])
    maps[1, 2, 3, 3] = torch.nan
    windows = [[[0, 0, 6, 6]], [[0, 0, 6, 6], [0, 0, 3, 3]], [[1, 2, 5, 4]]]
    found = pool_windows(maps, windows, (1, 2))
    expected = torch.cat([crop_by_crop(one, np.array(cells), (1, 2)) for one, cells in zip(maps, windows, strict=True)])
    assert torch.equal(found.nan_to_num(7e7), expected.nan_to_num(7e7))


NONE = [
    [],
    (),
    np.zeros(0),
    np.zeros((0, 4)),
    torch.zeros(0),
    torch.zeros((0, 4), dtype=torch.bool),
    np.zeros((0, 5), "U3"),
]


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch's own forward mode uses it
@pytest.mark.parametrize("windows", NONE)
def test_no_windows_are_an_answer_of_every_map_and_derivative(windows):
    for maps in (random_map(4, 7, 8), torch.zeros(2, 4, 7, 8), torch.zeros(0, 4, 7, 8)):
        given = maps.clone().requires_grad_()
        pooled = pool_windows(given, windows, (1, 2))
        assert pooled.shape == (0, 20)
        pooled.sum().backward()
        assert torch.equal(given.grad, torch.zeros_like(maps))
        assert torch.vmap(lambda one: pool_windows(one, windows, (1, 2)))(maps[None].expand(3, *maps.shape)).shape == (
            3,
            0,
            20,
        )
        tangent = torch.func.jvp(lambda one: pool_windows(one, windows, (1, 2)), (maps,), (maps,))[1]
        assert tangent.shape == (0, 20)
        assert torch.func.grad(lambda one: pool_windows(one, windows, (1, 2)).sum())(maps).shape == maps.shape
        assert RoIPool(2)(maps, windows).shape == (0, 4, 2, 2)


def test_a_batch_of_no_maps_has_no_vectors():
    maps = torch.zeros(0, 4, 7, 8, requires_grad=True)
    SpatialPyramidPool((1, 2))(maps).sum().backward()
    assert maps.grad.shape == maps.shape
    assert SpatialPyramidPool((1, 2))(maps).shape == (0, 20)


def test_maps_without_memory_give_vectors_without_memory():
    pooled = pool_windows(torch.zeros(4, 7, 8, device="meta"), [[0, 0, 1, 1]] * 3, (1, 2))
    assert pooled.is_meta
    assert pooled.shape == (3, 20)
    with pytest.raises(ValueError, match=r"windows must be a dense tensor with values, got .* on meta; pass a list"):
        pool_windows(torch.zeros(4, 7, 8), torch.zeros(1, 4, dtype=torch.int64, device="meta"), (1, 2))


def test_a_default_device_of_torch_does_not_move_windows():
    maps = torch.stack([random_map(4, 7, 8, seed) for seed in range(2)])
    expected = pool_windows(maps, [[[0, 0, 2, 2]], [[0, 1, 2, 2]]], (1, 2))
    with torch.device("meta"):
        assert torch.equal(pool_windows(maps, [[[0, 0, 2, 2]], [[0, 1, 2, 2]]], (1, 2)), expected)
        assert pool_windows(maps[0], [], (1, 2)).device.type == "cpu"
        found = torch.vmap(lambda one: pool_windows(one, [[0, 0, 2, 2]], (1, 2)))(maps)
    assert torch.equal(found[0], expected[:1])


# --- the operator -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch's own forward mode uses it
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck asks for it
@pytest.mark.parametrize("operator", [pool, argmax])
def test_the_operators_keep_what_torch_asks_of_operators(operator):
    rows = torch.from_numpy(INDEX)
    torch.library.opcheck(operator, (torch.rand(3, 4, 7, 9, requires_grad=True), rows, (1, 3)))
    torch.library.opcheck(operator, (torch.rand(1, 4, 7, 9, requires_grad=True), rows[:, 1:], (2,)))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch's own forward mode uses it
def test_derivatives_of_every_mode_and_order_are_right():
    maps, rows = torch.stack([random_map(2, 7, 9, seed, torch.float64) for seed in range(3)]), torch.from_numpy(INDEX)
    run = lambda given: pool_windows(given, rows, (1, 2))  # noqa: E731
    given = maps.clone().requires_grad_()
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(run, given, **modes)
    assert torch.autograd.gradgradcheck(lambda one: run(one) ** 2, given)


def test_windows_may_differ_from_batch_to_batch_of_vmap():
    maps, windows = (
        torch.stack([random_map(5, 7, 9, seed) for seed in range(3)]),
        torch.from_numpy(random_windows(12, 7, 9)),
    )
    several = windows.reshape(3, 4, 4).to(torch.uint16)
    run = lambda one, cells: pool_windows(one, cells, (1, 3))  # noqa: E731
    expected = torch.stack([run(one, cells) for one, cells in zip(maps, several, strict=True)])
    assert torch.equal(torch.vmap(run)(maps, several), expected)
    assert torch.equal(torch.vmap(run, in_dims=(1, 1))(maps.movedim(0, 1), several.movedim(0, 1)), expected)
    assert torch.equal(torch.vmap(run, in_dims=(None, 0))(maps[0], several).flatten(0, 1), run(maps[0], windows))
    nested = torch.vmap(torch.vmap(run, in_dims=(0, None)), in_dims=(None, 0))(maps, several)
    assert torch.equal(nested[2, 1], run(maps[1], several[2]))


@pytest.mark.parametrize("row", [[1, 0, 0, 1, 1], [-1, 0, 0, 1, 1]])
def test_a_row_of_vmap_does_not_reach_the_next_batch(row):
    with pytest.raises(ValueError, match="names no map of the batch"):
        torch.vmap(lambda one: pool_windows(one, torch.tensor([row]), (1,)))(torch.zeros(2, 1, 3, 4, 5))


def test_copies_of_the_folder_have_operators_of_their_own(tmp_path, monkeypatch):
    shutil.copytree(
        Path(pyramid.__file__).parent, tmp_path / "copied_pyramid", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    feature_map, windows = random_map(2, 5, 6).requires_grad_(), [[0, 1, 4, 5]]  # the loop that compiles faster
    expected, functions = pool_windows(feature_map, windows, PAPER), []
    for _ in range(2):  # the second time under the same name, while the first is still used
        functions.append(importlib.import_module("copied_pyramid.pyramid").pool_windows)
        for name in [name for name in sys.modules if name.startswith("copied_pyramid")]:
            del sys.modules[name]
    for function in (pool_windows, *functions):
        assert torch.equal(function(feature_map, windows, PAPER), expected)
        with pytest.raises(ValueError, match="window 0 is empty"):
            function(feature_map, [[0, 1, 0, 5]], PAPER)


# --- anything ---------------------------------------------------------------------------------------


@st.composite
def maps_and_windows(draw):
    """Maps, windows in one of the forms, and the same windows as rows (index of the map, cells)."""
    height, width, channels, count = (draw(st.integers(1, most)) for most in (12, 12, 5, 3))
    single, dtype = (
        draw(st.booleans()),
        draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])),
    )
    values = draw(st.sampled_from([1, 2, 1000]))  # many equal cells, and few
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    maps = torch.randint(-values, values + 1, (count, channels, height, width), generator=generator).to(dtype)
    if draw(st.booleans()):
        maps = maps.contiguous(memory_format=torch.channels_last)
    rows = draw(st.lists(st.tuples(st.integers(0, 0 if single else count - 1), *[st.integers(0, 11)] * 4), max_size=6))
    ordered = [(i, *sorted((a % width, c % width)), *sorted((b % height, d % height))) for i, a, b, c, d in rows]
    cells = np.array([(i, x1, y1, x2 + 1, y2 + 1) for i, x1, x2, y1, y2 in ordered], np.int64).reshape(-1, 5)
    form = draw(st.sampled_from([np.asarray, torch.from_numpy, np.ndarray.tolist, lambda one: one.astype(np.uint8)]))
    if single:
        return maps[0], form(cells[:, 1:]), cells
    if draw(st.booleans()):
        return maps, form(cells if draw(st.booleans()) else cells.astype(np.float64)), cells
    cells = cells[np.argsort(cells[:, 0], kind="stable")]
    return maps, [form(cells[cells[:, 0] == image, 1:]) for image in range(count)], cells


@given(maps_and_windows(), st.lists(st.integers(1, 7), min_size=1, max_size=3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_valid_windows_equal_the_definition_written_as_loops(given_maps, levels, gradient):
    maps, windows, cells = given_maps
    batch = (maps if maps.ndim == 4 else maps[None]).double().numpy()
    expected = [pyramid_vector(batch[image], window, levels) for image, *window in cells.tolist()]
    pooled = (with_gradient if gradient else pool_windows)(maps, windows, levels)
    assert pooled.dtype == maps.dtype
    assert np.array_equal(pooled.double().numpy(), np.reshape(expected, (-1, batch.shape[1] * bin_count(levels))))
    whole = spatial_pyramid_pool(maps, levels).double().reshape(len(batch), -1).numpy()
    height, width = batch.shape[2:]
    assert np.array_equal(whole, [pyramid_vector(one, (0, 0, width, height), levels) for one in batch])
    assert SpatialPyramidPool(levels).out_features(batch.shape[1]) == whole.shape[1]


NUMBERS = [None, True, False, 0, -1, 1.0, "1", 2**70, torch.tensor(2), np.float64(2), np.array([2]), [2], object()]
BAD_LEVELS = [
    *[(n,) for n in NUMBERS], (), [], {1}, {1: 2}, "12", b"12", 3, None, iter((1,)), np.array(3), np.array([1.5]),
    np.array([[1]]), np.array([True]), torch.tensor([1]), [1, 1001], [[1]], range(3),
]  # fmt: skip
BAD_MAPS = [
    None, 1.0, "map", [[[1.0]]], np.zeros((2, 5, 6)), torch.zeros(()), torch.zeros(5), torch.zeros(5, 6),
    torch.zeros(1, 1, 2, 5, 6), torch.zeros(0, 5, 6), torch.zeros(2, 5, 0), torch.zeros(2, 0, 5, 6),
    torch.zeros(2, 5, 6).int(), torch.zeros(2, 5, 6).bool(), torch.zeros(2, 5, 6, dtype=torch.complex64),
    torch.zeros(2, 5, 6).to(torch.float8_e4m3fn), torch.zeros(2, 5, 6).to_sparse(),
]  # fmt: skip
BAD_WINDOWS = [
    None, 1, 1.5, "ab", b"ab", {}, {1}, object(), iter([]), [1], [None], ["a"], [[0, 0, 1]], [[0, 0, 1, 1], [0]],
    [[0, 0, 1, 2**70]], [[0, 0, 1, None]], [["0", "0", "1", "1"]], [[0, 0, 1.0, 1]], [[0, 0, 1j, 1]],
    [[False, False, True, True]], [0, 0, 1, 1], [[[0, 0, 1, 1, 1]]], [[[[0, 0, 1, 1]]]],
    np.zeros((1, 4), object), np.zeros((1, 4), "M8[s]"), np.zeros(1, [("x", int)]), np.zeros((1, 4)),
    torch.zeros(1, 4), torch.zeros(1, 4).bool(), torch.zeros(1, 4).to_sparse(), torch.zeros(1, 4, device="meta"),
    torch.zeros(1, 4, dtype=torch.complex64), torch.tensor(1), [torch.tensor([0, 0, 1, 1]), None],
    [torch.zeros(1, 3)], [np.zeros((1, 5), int)], [[[0, 0, 1, 1]]] * 5,
]  # fmt: skip


def refused(call) -> None:
    """With an error of ours: neither one from inside a library, nor an answer."""
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    *_, last = traceback.extract_tb(error.value.__traceback__)
    assert Path(last.filename).is_relative_to(Path(pyramid.__file__).parent), last
    assert type(error.value) is ValueError
    assert "; " in str(error.value)  # the next step


@given(bad=st.sampled_from(BAD_LEVELS))
@settings(max_examples=len(BAD_LEVELS), deadline=None)
def test_anything_else_than_levels_is_refused(bad):
    feature_map = torch.zeros(2, 5, 6)
    for call in (bin_count, SpatialPyramidPool, WindowPool):
        refused(lambda call=call: call(bad))
    refused(lambda: spatial_pyramid_pool(feature_map, bad))
    refused(lambda: pool_windows(feature_map, [], bad))


@given(bad=st.sampled_from(NUMBERS))
@settings(max_examples=len(NUMBERS), deadline=None)
def test_anything_else_than_numbers_is_refused(bad):
    if not (isinstance(bad, int) and bad > 1):
        for call in (
            RoIPool,
            SpatialPyramidPool().out_features,
            lambda one: sliding_pool(one, 3),
            lambda one: sliding_pool(3, one),
        ):
            refused(lambda call=call: call(bad))


@given(bad=st.sampled_from(BAD_MAPS), windows=st.sampled_from([[], [[0, 0, 1, 1]]]))
@settings(max_examples=len(BAD_MAPS) * 2, deadline=None)
def test_anything_else_than_maps_is_refused(bad, windows):
    refused(lambda: spatial_pyramid_pool(bad, (1,)))
    refused(lambda: SpatialPyramidPool()(bad))
    refused(lambda: WindowPool()(bad, windows))


@given(bad=st.sampled_from(BAD_WINDOWS), count=st.sampled_from([None, 1, 2]), gradient=st.booleans())
@settings(max_examples=100, deadline=None)
def test_anything_else_than_windows_is_refused(bad, count, gradient):
    maps = torch.zeros([2, 5, 6] if count is None else [count, 2, 5, 6], requires_grad=gradient)
    refused(lambda: WindowPool()(maps, bad))


@given(
    corners=st.lists(st.integers(-4, 9), min_size=4, max_size=4),
    image=st.integers(-2, 4),
    form=st.sampled_from([np.array, torch.tensor, list]),
    gradient=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_windows_anywhere_are_pooled_or_refused(corners, image, form, gradient):
    x1, y1, x2, y2 = corners
    inside = 0 <= x1 < x2 <= 6 and 0 <= y1 < y2 <= 5
    maps = torch.rand(3, 2, 5, 6, requires_grad=gradient)
    for call, valid in (
        (lambda: pool_windows(maps[0], form([corners]), (2,)), inside),
        (lambda: pool_windows(maps, form([[0, 0, 0, 1, 1], [image, *corners]]), (2,)), inside and 0 <= image < 3),
    ):
        if valid:
            assert call().shape[1] == 8
        else:
            refused(call)


HEAVY = ("numba", "llvmlite", "torchvision", "cv2", "scipy", "sklearn", "matplotlib")


def test_the_layer_imports_torch_and_nothing_heavier():
    code = (
        "import sys; from sppnet.ops.pyramid import SpatialPyramidPool\n"
        "import torch; SpatialPyramidPool((1, 2))(torch.zeros(1, 2, 5, 5))\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.slow
def test_the_kernel_works_where_nothing_can_be_cached():
    code = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
        "import torch; from sppnet.ops.pyramid import pool_windows\n"
        "print(pool_windows(torch.ones(2, 3, 3), [[0, 0, 3, 3]], (1, 2)).sum().item())"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "10.0", run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gpu_gives_the_same_bits(dtype):
    feature_map, windows = random_map(16, 43, 57, dtype=dtype), random_windows(300, 43, 57)
    pooled = pool_windows(feature_map.cuda(), torch.from_numpy(windows).cuda(), (1, 2, 3, 6))
    assert pooled.is_cuda
    assert torch.equal(pooled.cpu(), pool_windows(feature_map, windows, (1, 2, 3, 6)))


@pytest.mark.parametrize("channels", [16, 320])
@pytest.mark.parametrize("count", [1, 3, 400])
def test_few_windows_of_a_map_that_lies_channels_last_equal_the_crops_too(channels: int, count: int) -> None:
    """So few that the map is read as it lies; the result shares no memory with it."""
    feature_map = channels_last(torch.randn(channels, 22, 30, generator=torch.Generator().manual_seed(0)))
    rng = np.random.default_rng(0)
    corner = rng.integers(0, [29, 21], (count, 2))
    windows = np.concatenate([corner, corner + 1 + rng.integers(0, [30, 22] - corner)], axis=1)
    expected = torch.stack([spatial_pyramid_pool(feature_map[:, b:d, a:c], (1, 2, 3, 6)) for a, b, c, d in windows])
    pooled = pool_windows(feature_map, windows, (1, 2, 3, 6))
    assert torch.equal(pooled, expected)
    feature_map.zero_()
    assert torch.equal(pooled, expected)


SHARED_HEAP = """
import torch
from sppnet import pool_windows
corners = torch.rand(600, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1)[0]
first, last = (corners * torch.tensor([48, 38])).long().unbind(1)
windows, feature_map = torch.cat([first, last + 1], 1), torch.rand(256, 40, 50)
torch.set_num_threads(1)
expected = pool_windows(feature_map, windows, (1, 2, 3, 6))
torch.set_num_threads(4)
for _ in range(5):
    assert torch.equal(pool_windows(feature_map, windows, (1, 2, 3, 6)), expected)
whole = torch.tensor([[0, 0, 50, 40]])
for level in (14, 33):
    assert torch.equal(pool_windows(feature_map, whole, (level,)).view(256, level, level),
                       torch.nn.functional.adaptive_max_pool2d(feature_map, level))
"""


def test_threads_that_share_one_heap_do_not_write_into_the_memory_of_others() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SHARED_HEAP],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-500:]
