"""The pyramid against torch's adaptive pooling and against the definition written as loops."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from fences import fenced
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pyramid_vector
from torch.nn.functional import adaptive_max_pool2d

from sppnet.network import bins, kernels, memory, pyramid
from sppnet.network.pyramid import (
    RoIPool,
    SpatialPyramidPool,
    bin_columns,
    bin_count,
    pool_windows,
    pool_windows_by_bin,
    sliding_pool,
    spatial_pyramid_pool,
)

LEVELS = [(1, 2, 3, 6), (1, 2, 4), (1, 2, 3, 4), (3, 5, 7), (2, 3), (6, 1), (1,), (2, 2), (12, 4, 3, 5)]


def random_map(channels: int, height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_windows(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = np.sort(rng.integers(0, width, (count, 2)), axis=1)
    y = np.sort(rng.integers(0, height, (count, 2)), axis=1)
    return np.stack([x[:, 0], y[:, 0], x[:, 1] + 1, y[:, 1] + 1], axis=1)


def crop_by_crop(feature_map: torch.Tensor, windows: np.ndarray, levels: tuple[int, ...]) -> torch.Tensor:
    rows = []
    for x1, y1, x2, y2 in windows.tolist():
        crop = feature_map[:, y1:y2, x1:x2]
        rows.append(torch.cat([adaptive_max_pool2d(crop[None], n).flatten() for n in levels]))
    return torch.stack(rows)


@given(
    channels=st.integers(1, 40),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    levels=st.sampled_from(LEVELS),
    count=st.sampled_from([1, 12, 200]),  # of many the maxima of squares are computed first
    seed=st.integers(0, 10_000),
    double=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_windows_equal_adaptive_max_pooling_of_the_crop_bit_for_bit(
    channels, height, width, levels, count, seed, double
):
    feature_map = random_map(channels, height, width, seed, torch.float64 if double else torch.float32)
    windows = random_windows(count, height, width, seed)
    expected = crop_by_crop(feature_map, windows, levels)
    assert torch.equal(pool_windows(feature_map, windows, levels), expected)
    assert torch.equal(pyramid._pool_windows_roi(feature_map, windows, levels), expected)


@pytest.mark.parametrize(("height", "width"), [(43, 57), (1, 60), (60, 3), (17, 16)])
@pytest.mark.parametrize("last", [False, True])
def test_maxima_of_squares_are_those_of_their_cells(height, width, last):
    feature_map = random_map(133, height, width).numpy()
    given = np.ascontiguousarray(feature_map.transpose(1, 2, 0)).transpose(2, 0, 1) if last else feature_map
    windows = random_windows(2000, height, width)
    table = kernels._squares(given, windows, bins.level_plan((1,)), threads=2)
    assert table.shape[1:4] == (min(4, min(height, width).bit_length()), height, width)
    for k in range(table.shape[1]):
        side = 1 << k
        for y in range(height - side + 1):
            for x in range(width - side + 1):
                expected = feature_map[:, y : y + side, x : x + side].max(axis=(1, 2))
                np.testing.assert_array_equal(table[:, k, y, x].reshape(-1)[:133], expected)


def test_as_many_sizes_of_squares_are_made_as_save_reads():
    windows, plan = random_windows(2000, 43, 57), bins.level_plan((1, 2, 3, 6))
    fine = bins.level_plan((60,))
    assert kernels._sides(windows, bins.level_plan((1,)), 43, 57) == 3
    assert kernels._sides(windows, plan, 43, 57) == 2  # hardly a bin is 8 cells high
    assert kernels._sides(windows, fine, 43, 57) == 0  # none has 2 cells
    assert kernels._sides(windows, bins.level_plan((60, 1)), 43, 57) == 0  # the coarse one rests on the fine one
    assert kernels._sides(windows, bins.level_plan((60, 7)), 43, 57) == kernels._sides(
        windows, bins.level_plan((7,)), 43, 57
    )
    assert kernels._sides(windows[:1], plan, 43, 57) == 0  # one window does not pay
    assert kernels._sides(windows[:0], plan, 43, 57) == 0


@pytest.mark.parametrize(
    ("channels", "itemsize", "lanes"),
    [(256, 4, 128), (512, 4, 128), (320, 4, 64), (96, 4, 96), (1, 4, 32), (129, 4, 32), (256, 2, 256), (256, 8, 64)],
)
def test_blocks_leave_few_lanes_empty(channels, itemsize, lanes):
    assert kernels._lanes(channels, itemsize) == lanes


def test_a_map_that_lies_channels_last_is_not_copied_for_few_windows():
    last, plan = channels_last(random_map(64, 20, 30)), bins.level_plan((1, 2))
    few, many = random_windows(3, 20, 29), random_windows(2000, 20, 29)
    assert np.shares_memory(kernels._squares(last.numpy(), few, plan, threads=1), last.numpy())
    assert not np.shares_memory(kernels._squares(last.numpy(), many, plan, threads=1), last.numpy())
    other = channels_last(random_map(63, 20, 30)).numpy()
    assert not np.shares_memory(kernels._squares(other, few, plan, threads=1), other)  # vectors would read beyond it
    for feature_map in (last, last[:63], last[:, :, :29]):
        assert torch.equal(pool_windows(feature_map, few, (1, 2)), crop_by_crop(feature_map, few, (1, 2)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 5, 32, 63, 130])
def test_nothing_is_read_behind_a_map_nor_written_behind_a_result(monkeypatch, channels, dtype):
    class Fenced:
        def array(self, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
            return fenced(np.zeros(shape, kind))

    monkeypatch.setattr(kernels, "result_memory", Fenced())
    monkeypatch.setattr(kernels, "table_memory", Fenced())
    feature_map = random_map(channels, 11, 13).numpy().astype(dtype)
    last = fenced(np.ascontiguousarray(feature_map.transpose(1, 2, 0))).transpose(2, 0, 1)
    for windows in (random_windows(2, 11, 13), random_windows(150, 11, 13)):
        expected = crop_by_crop(torch.from_numpy(feature_map), windows, (1, 2, 4, 3)).numpy()
        for own in (fenced(feature_map), last):
            np.testing.assert_array_equal(kernels.pool_cells(own, windows, (1, 2, 4, 3)), expected)
            by_bin = kernels.pool_bins(own, windows, (1, 2, 4, 3)).reshape(len(windows), -1)
            np.testing.assert_array_equal(by_bin, expected[:, bin_columns(channels, (1, 2, 4, 3))])


def test_squares_that_take_too_much_memory_are_not_made(monkeypatch):
    feature_map, windows = random_map(3, 30, 40), random_windows(500, 30, 40)
    plan = bins.level_plan((1, 2))
    whole = kernels._squares(feature_map.numpy(), windows, plan, threads=1)
    assert whole.shape[1] > 1
    monkeypatch.setattr(kernels, "TABLE_BYTES", whole.nbytes - 1)
    assert kernels._squares(feature_map.numpy(), windows, plan, threads=1).shape[1] == 1
    assert torch.equal(pool_windows(feature_map, windows, (1, 2)), crop_by_crop(feature_map, windows, (1, 2)))


def test_copies_of_one_window_make_no_squares(monkeypatch):
    seen = []
    squares = kernels._squares
    monkeypatch.setattr(kernels, "_squares", lambda *given: seen.append(squares(*given)) or seen[-1])
    feature_map = random_map(3, 20, 20)
    assert torch.equal(
        pool_windows(feature_map, [[0, 0, 20, 20]] * 500, (2,)),
        spatial_pyramid_pool(feature_map, (2,)).expand(500, -1),
    )
    assert seen[0].shape[1] == 1


def cells_read(group: np.ndarray, height: int, width: int) -> set[tuple[int, int]]:
    """The cells of the squares of a group of reads, at one byte a cell."""
    found = set()
    for place in group.tolist():
        k, y, x = place // (height * width), place // width % height, place % width
        found |= {(y + dy, x + dx) for dy in range(1 << k) for dx in range(1 << k)}
    return found


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    levels=st.sampled_from(LEVELS),
    squares=st.integers(1, 4),
    count=st.sampled_from([0, 1, 30]),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_the_squares_of_a_bin_cover_it_and_no_other_cell(height, width, levels, squares, count, seed):
    windows, plan = random_windows(count, height, width, seed), bins.level_plan(levels)
    firsts, groups = bins.reads_of_windows(windows, plan, squares, height, width, 1)
    found = [set().union(*(cells_read(g, height, width) for g in groups[a:b])) for a, b in itertools.pairwise(firsts)]
    expected = []
    for x1, y1, x2, y2 in windows.tolist():
        for n in (n for n, parent, *_ in plan.tolist() if parent < 0):
            rows, columns = edges(y2 - y1, n), edges(x2 - x1, n)
            for (top, bottom), (left, right) in itertools.product(rows, columns):
                expected.append({(y1 + y, x1 + x) for y in range(top, bottom) for x in range(left, right)})
    assert found == expected
    assert firsts[-1] == len(groups)


def edges(side: int, n: int) -> list[tuple[int, int]]:
    """Where the bins of a level begin and end: floor and ceil of exact fractions."""
    return [(math.floor(Fraction(i * side, n)), math.ceil(Fraction((i + 1) * side, n))) for i in range(n)]


@pytest.mark.parametrize("levels", LEVELS)
def test_bins_of_finer_bins_read_those_inside_them(levels):
    plan = bins.level_plan(levels).tolist()
    firsts, groups = bins.reads_of_bins(tuple(map(tuple, plan)), 10)
    found = [set((groups[a:b] // 10).ravel().tolist()) for a, b in itertools.pairwise(firsts)]
    expected = []
    for n, parent, *_ in plan:
        if parent >= 0:
            m, _, row, _ = plan[parent]
            for (top, bottom), (left, right) in itertools.product(edges(m, n), repeat=2):
                expected.append({row + y * m + x for y in range(top, bottom) for x in range(left, right)})
    assert found == expected


@pytest.mark.parametrize("levels", [(1, 2, 3, 6), (3, 5, 7), (2,)])
@pytest.mark.parametrize("channels", [96, 130, 320])  # a block; a block that is partly empty; five
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_in_several_blocks_are_all_there(channels, levels, dtype):
    feature_map, windows = random_map(channels, 20, 30, dtype=dtype), random_windows(40, 20, 30)
    expected = crop_by_crop(feature_map, windows, levels)
    assert torch.equal(pool_windows(feature_map, windows, levels), expected)
    last = channels_last(feature_map)
    assert torch.equal(pool_windows(last, windows, levels), expected)
    for kind in (torch.float32, torch.bfloat16):
        by_bin = pool_windows_by_bin(last, windows, levels, kind)
        assert torch.equal(by_bin, expected[:, bin_columns(channels, levels)].to(kind))


def channels_last(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@pytest.mark.parametrize("by_bin", [False, True])
def test_windows_on_the_same_cells_have_the_same_rows(by_bin):
    feature_map, windows = random_map(8, 9, 12), random_windows(40, 9, 12)
    repeated = windows[np.random.default_rng(0).integers(0, 40, 700)]
    pool = pool_windows_by_bin if by_bin else pool_windows
    columns = bin_columns(8, (1, 2, 4)) if by_bin else slice(None)
    expected = crop_by_crop(feature_map, repeated, (1, 2, 4))[:, columns]
    assert torch.equal(pool(feature_map, repeated, (1, 2, 4)), expected)


@pytest.mark.parametrize(
    "channels", [256, 336, 300]
)  # whole cache lines; the last block part of them; rows that begin anywhere
def test_a_result_beyond_the_caches_is_the_same(channels):
    feature_map, windows = random_map(channels, 20, 30), random_windows(700, 20, 30)
    pooled = pool_windows(feature_map, windows, (1, 2, 3, 6))
    assert pooled.nbytes >= kernels.BEYOND_CACHES
    assert pooled.data_ptr() % 64 == 0
    assert torch.equal(pooled, crop_by_crop(feature_map, windows, (1, 2, 3, 6)))
    columns = bin_columns(channels, (1, 2, 3, 6))
    assert torch.equal(pool_windows_by_bin(feature_map, windows, (1, 2, 3, 6)), pooled[:, columns])


class Shifted:
    """Memory that begins a little behind a cache line, as that of numpy may."""

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = np.empty(size + 128, np.uint8)
        first = -block.ctypes.data % 64 + 16
        return block[first : first + size].view(dtype).reshape(shape)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("channels", [32, 80, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_of_every_kind_go_past_the_caches(monkeypatch, shifted, channels, dtype):
    monkeypatch.setattr(kernels, "BEYOND_CACHES", 0)
    if shifted:
        monkeypatch.setattr(kernels, "result_memory", Shifted())
    else:
        monkeypatch.setattr(kernels.result_memory, "smallest", 0)
    feature_map = random_map(channels, 9, 11, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    windows = random_windows(90, 9, 11)
    expected = crop_by_crop(feature_map, windows, (1, 2, 3))
    assert torch.equal(pool_windows(feature_map, windows, (1, 2, 3)), expected)
    if dtype != torch.float64:
        by_bin = pool_windows_by_bin(feature_map, windows, (1, 2, 3), dtype)
        assert by_bin.data_ptr() % 64 == 16 * shifted
        assert torch.equal(by_bin, expected[:, bin_columns(channels, (1, 2, 3))].to(dtype))


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), kind=st.sampled_from([np.float32, np.float64, np.int16]))
def test_a_transposition_is_numpys(rows, columns, kind):
    values = np.arange(rows * (columns + 3)).astype(kind).reshape(rows, columns + 3)[:, :columns]
    whole = np.full((columns, rows + 2), -1, kind)
    kernels._transpose(values, whole[:, :rows], False)
    np.testing.assert_array_equal(whole[:, :rows], values.T)
    assert (whole[:, rows:] == -1).all()


@pytest.mark.parametrize("rows", range(2, 8))
@pytest.mark.parametrize("columns", [8, 11, 32])
def test_few_rows_are_transposed_with_room_behind_them(rows, columns):
    values = np.arange(8 * columns, dtype=np.float32).reshape(8, columns)
    found = np.full(columns * rows + 8, -1, np.float32)
    kernels._transpose(values[:rows], found[: columns * rows].reshape(columns, rows), True)
    np.testing.assert_array_equal(found[: columns * rows].reshape(columns, rows), values[:rows].T)


def test_memory_of_a_result_is_used_again_when_nobody_holds_it():
    results = memory.ReusedMemory(smallest=1000, largest=100_000)
    first = results.array((50, 10), np.float32)
    place = first.ctypes.data
    assert place % 64 == 0
    other = results.array((50, 10), np.float32)  # the first is held: the second must lie elsewhere
    assert not np.shares_memory(first, other)
    row = other[3:4]
    del first, other
    third = results.array((50, 10), np.float32)  # a row of the second is held
    assert not np.shares_memory(row, third)
    tensor = torch.from_numpy(third)[2]
    del third
    fourth = results.array((50, 10), np.float32)  # and here a tensor
    assert fourth.ctypes.data != tensor.data_ptr() - 2 * 40
    place = fourth.ctypes.data
    del fourth
    assert results.array((25, 10), np.float64).ctypes.data == place
    assert results.array((50, 9), np.float32).ctypes.data == place
    assert results.array((5, 100), np.float32).shape == (5, 100)


def test_a_small_result_does_not_hold_the_memory_of_a_large_one():
    results = memory.ReusedMemory(smallest=1000, largest=100_000)
    large = results.array((90_000,), np.uint8)
    place = large.ctypes.data
    del large
    small = results.array((2000,), np.uint8)
    assert small.base.nbytes < 3000
    assert results.array((200_000,), np.uint8).base is None  # too large to stay
    assert results.array((900,), np.uint8).base is None  # too small to matter
    assert place


def test_results_that_are_held_do_not_change_with_the_next_call():
    windows = random_windows(300, 20, 30)
    first = pool_windows(random_map(64, 20, 30, 1), windows, (1, 2, 3, 6))
    kept, row = first.clone(), first[7]
    del first
    pool_windows(random_map(64, 20, 30, 2), windows, (1, 2, 3, 6))
    pool_windows(random_map(64, 20, 30, 3), windows, (1, 2, 3, 6))
    assert torch.equal(row, kept[7])


@given(height=st.integers(1, 20), width=st.integers(1, 20), levels=st.sampled_from(LEVELS), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
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
    assert torch.equal(pyramid._pool_windows_roi(feature_map, windows, (1, 2, 3, 6)), pooled)


@given(
    channels=st.integers(1, 40),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    levels=st.sampled_from(LEVELS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_features_by_bin_are_the_same_features_in_another_order_and_rounded(
    channels, height, width, levels, dtype, seed
):
    feature_map, windows = random_map(channels, height, width, seed), random_windows(40, height, width, seed)
    expected = pool_windows(feature_map, windows, levels)[:, bin_columns(channels, levels)].to(dtype)
    assert torch.equal(pool_windows_by_bin(feature_map, windows, levels, dtype), expected)


def test_features_by_bin_hold_one_bin_of_all_channels_after_the_other():
    feature_map = torch.arange(8.0).reshape(2, 2, 2)
    pooled = pool_windows_by_bin(feature_map, [[0, 0, 2, 2]], (1, 2))[0]
    assert pooled.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 3, 7]  # the finest level first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_by_bin_of_no_windows_and_of_a_map_with_nan(dtype):
    feature_map = random_map(3, 6, 7)
    assert pool_windows_by_bin(feature_map, np.zeros((0, 4), np.int64), (1, 2), dtype).shape == (0, 15)
    feature_map[1, 2, 3] = torch.nan
    windows = random_windows(50, 6, 7)
    expected = pool_windows(feature_map, windows, (1, 2))[:, bin_columns(3, (1, 2))].to(dtype)
    found = pool_windows_by_bin(feature_map, windows, (1, 2), dtype)
    assert expected.isnan().any()
    assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))


def test_codes_of_bfloat16_numbers_keep_their_order_and_lead_back():
    numbers = torch.tensor([-torch.inf, -3.3e38, -2.0, -1e-39, -0.0, 0.0, 1e-39, 1.0, 3.3e38, torch.inf]).bfloat16()
    bits = numbers.view(torch.int16).numpy()
    codes = kernels.bfloat16_codes(bits)
    assert (np.diff(codes.astype(int)) > 0).all()
    assert np.array_equal(kernels.bfloat16_codes(codes), bits)


def test_many_windows_are_shared_between_threads_without_a_difference():
    feature_map, windows = random_map(20, 40, 50), random_windows(1500, 40, 50)
    alone = kernels.pool_cells(feature_map.numpy(), windows, (1, 2, 3, 6), threads=1)
    assert 36 * len(windows) > 5 * kernels.BINS_AT_ONCE
    assert np.array_equal(kernels.pool_cells(feature_map.numpy(), windows, (1, 2, 3, 6), threads=3), alone)
    assert np.array_equal(crop_by_crop(feature_map, windows, (1, 2, 3, 6)).numpy(), alone)


def test_several_threads_may_pool_at_once():
    maps, windows = [random_map(128, 40, 50, seed) for seed in range(6)], random_windows(600, 40, 50)
    assert kernels._squares(maps[0].numpy(), windows, bins.level_plan((1, 3)), 1).nbytes > kernels.table_memory.smallest
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda feature_map: pool_windows(feature_map, windows, (1, 3)), maps))
    assert results[0].nbytes > kernels.result_memory.smallest
    for feature_map, result in zip(maps, results, strict=True):
        assert torch.equal(result, crop_by_crop(feature_map, windows, (1, 3)))


def test_a_window_of_one_cell_fills_every_bin():
    feature_map = random_map(4, 7, 8)
    pooled = pool_windows(feature_map, [[3, 2, 4, 3]], (6,))
    assert torch.equal(pooled.reshape(4, 36), feature_map[:, 2, 3, None].expand(4, 36))


def test_no_windows_give_no_rows():
    for windows in ([], np.zeros((0, 4), np.int64), torch.zeros((0, 4), dtype=torch.int32)):
        assert pool_windows(random_map(4, 7, 8), windows, (1, 2)).shape == (0, 20)
    assert pyramid._pool_windows_roi(random_map(4, 7, 8), np.zeros((0, 4), np.int64), (1, 2)).shape == (0, 20)
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
    assert torch.equal(pool_windows(feature_map, windows, (1, 2, 3)).nan_to_num(7e7), expected.nan_to_num(7e7))
    without_nan = feature_map[1:]
    assert torch.equal(pool_windows(without_nan, windows, (1, 2, 3)), crop_by_crop(without_nan, windows, (1, 2, 3)))


def test_levels_too_fine_for_roi_pool_are_exact_too():
    feature_map = random_map(2, 62, 62)
    windows = np.array([[0, 0, 62, 62]])
    expected = crop_by_crop(feature_map, windows, (14, 22))
    assert torch.equal(pyramid._pool_windows_roi(feature_map, windows, (14, 22)), expected)
    assert torch.equal(pool_windows(feature_map, windows, (14, 22)), expected)


def test_roi_pools_bins_are_exact_up_to_the_level_it_is_trusted_with():
    sides = np.arange(1, 3000)
    for n in range(1, pyramid.ROI_POOL_EXACT_LEVEL + 1):
        bin_side = sides.astype(np.float32) / np.float32(n)
        for i in range(n):
            assert np.array_equal(np.floor(np.float32(i) * bin_side), i * sides // n)
            assert np.array_equal(np.minimum(np.ceil(np.float32(i + 1) * bin_side), sides), -(-(i + 1) * sides // n))


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


def test_coarse_levels_are_computed_from_the_smallest_level_they_divide():
    plan = bins.level_plan((1, 2, 3, 6)).tolist()
    assert plan == [[6, -1, 0, 14], [3, 0, 36, 5], [2, 0, 45, 1], [1, 2, 49, 0]]
    assert [row[1] for row in bins.level_plan((3, 5, 7)).tolist()] == [-1, -1, -1]
    mixed = bins.level_plan((1, 3, 4, 6)).tolist()  # those that read the map come first
    assert mixed == [[6, -1, 0, 26], [4, -1, 36, 10], [3, 0, 52, 1], [1, 2, 61, 0]]


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


def test_maps_and_levels_that_cannot_be_pooled_are_refused():
    with pytest.raises(ValueError, match=r"feature_map must have shape \(C, H, W\).*one image's map at a time"):
        pool_windows(torch.zeros(1, 2, 7, 8), [[0, 0, 1, 1]], (1,))
    with pytest.raises(ValueError, match=r"must be floating point, got torch.int64; convert it with .float\(\)"):
        pool_windows(torch.zeros(2, 7, 8, dtype=torch.int64), [[0, 0, 1, 1]], (1,))
    with pytest.raises(ValueError, match=r"at least one cell, got \(2, 0, 8\); a map without cells"):
        spatial_pyramid_pool(torch.zeros(2, 0, 8), (1,))
    for levels in ((), (0, 1), (1.5,)):
        with pytest.raises(ValueError, match=r"levels must be whole numbers from 1 on, got .*\(1, 2, 3, 6\)"):
            SpatialPyramidPool(levels)
    with pytest.raises(ValueError, match="side and n must be at least 1, got 0 and 6; give the side"):
        sliding_pool(0, 6)


@pytest.mark.slow
def test_the_kernel_works_where_nothing_can_be_cached():
    code = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
        "import torch; from sppnet.network.pyramid import pool_windows\n"
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
