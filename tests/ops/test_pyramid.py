"""The pyramid against torch's adaptive pooling and against the definition written as loops."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pyramid_vector
from torch.nn.functional import adaptive_max_pool2d

from sppnet.ops.pyramid import (
    RoIPool,
    SpatialPyramidPool,
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


def with_roi_pool(feature_map: torch.Tensor, windows: np.ndarray, levels: tuple[int, ...]) -> torch.Tensor:
    """The path of maps that require a gradient."""
    return pool_windows(feature_map.detach().requires_grad_(), windows, levels).detach()


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
    assert torch.equal(pool_windows(feature_map, windows, (1, 2, 3)).nan_to_num(7e7), expected.nan_to_num(7e7))
    without_nan = feature_map[1:]
    assert torch.equal(pool_windows(without_nan, windows, (1, 2, 3)), crop_by_crop(without_nan, windows, (1, 2, 3)))


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
