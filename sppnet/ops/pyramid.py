"""The spatial pyramid: a map or a window of any size becomes a vector of one length (sec. 2.2, 4.1, app. A).

Level n divides H rows into n bins; bin i covers rows floor(i·H / n) … ceil((i + 1)·H / n) - 1, columns
likewise, and the feature is the maximum inside a bin. The vector holds level after level in the order they
are given, and within a level channel-major: (C, n, n) flattened.

RoI pooling is one level; the pyramid of a whole image is the window that covers the map; the pyramid of a
window equals the pyramid of the cropped map.

This module needs torch and numpy alone. numba (in `_pool_cpu`) and torchvision are imported when windows are pooled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d


def bin_count(levels: Sequence[int]) -> int:
    """M = Σn², bins per channel: 50 for (1, 2, 3, 6)."""
    return sum(n * n for n in _checked_levels(levels))


def spatial_pyramid_pool(feature_map: Tensor, levels: Sequence[int]) -> Tensor:
    """Pyramid vector of whole maps, differentiable: (C, H, W) -> (C · Σn²,); (N, C, H, W) -> (N, C · Σn²)."""
    levels = _checked_levels(levels)
    if feature_map.ndim not in (3, 4) or 0 in feature_map.shape[-3:]:
        raise ValueError(
            "feature_map must have shape (C, H, W) or (N, C, H, W) with at least one cell, got "
            f"{tuple(feature_map.shape)}; a map without cells comes from an image smaller than the backbone can take"
        )
    if feature_map.shape[0] == 0:
        return feature_map.new_empty((0, feature_map.shape[1] * bin_count(levels)))
    return torch.cat([adaptive_max_pool2d(feature_map, n).flatten(-3) for n in levels], dim=-1)


def pool_windows(feature_map: Tensor, windows: ArrayLike | Tensor, levels: Sequence[int]) -> Tensor:
    """Pyramid vectors of many windows of one map.

    feature_map: (C, H, W), floating point; windows: (R, 4) int xyxy feature-map cells, half-open, as an array or a
    tensor; levels e.g. (1, 2, 3, 6). Returns (R, C · Σn²) of the map's type on the map's device, each row equal to
    ``spatial_pyramid_pool`` of the cropped map (zeros of either sign count as equal). He et al. 2015, sec. 4.1, app. A.

    On the CPU a map without gradient goes through compiled loops, on torch's number of threads; NaN propagate as in
    torch, on a slow path. A map that requires a gradient, or one on another device, goes through
    ``torchvision.ops.roi_pool`` level by level; it must be finite, since NaN are skipped there.

    Raises ValueError for windows that are not (R, 4) integers, empty, or not inside the map.
    """
    levels = _checked_levels(levels)
    _check_map(feature_map)
    cells = _checked_windows(windows, feature_map.shape[-2:])
    if feature_map.device.type != "cpu" or (feature_map.requires_grad and torch.is_grad_enabled()):
        return _pool_windows_roi(feature_map, cells, levels)
    return _pool_windows_compiled(feature_map.detach(), cells, levels)


class SpatialPyramidPool(nn.Module):
    """``spatial_pyramid_pool`` as a layer: (N, C, H, W) of any H and W -> (N, C · Σn²)."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = _checked_levels(levels)

    def forward(self, feature_map: Tensor) -> Tensor:
        return spatial_pyramid_pool(feature_map, self.levels)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class RoIPool(nn.Module):
    """RoI pooling, a pyramid of one level: (C, H, W), (R, 4) windows -> (R, C, size, size)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        (self.size,) = _checked_levels((size,))

    def forward(self, feature_map: Tensor, windows: ArrayLike | Tensor) -> Tensor:
        pooled = pool_windows(feature_map, windows, (self.size,))
        return pooled.reshape(-1, feature_map.shape[0], self.size, self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}"


def sliding_pool(side: int, n: int) -> tuple[int, int, bool]:
    """The paper's training shorthand for level n on a map of a × a cells: window ceil(a / n), stride floor(a / n).

    Sec. 2.3. Gives them, and whether sliding that window over the map yields n positions. Kept for reference, never
    used as the layer: it yields n at a = 13 for n = 1, 2, 3, 6, but 9 instead of 6 at a = 10, n = 6, which is the
    paper's own 180-pixel case. Below a = n the stride is 0.
    """
    if side < 1 or n < 1:
        raise ValueError(f"side and n must be at least 1, got {side} and {n}; give the side of the map in cells")
    window, stride = -(-side // n), side // n
    return window, stride, stride > 0 and (side - window) // stride + 1 == n


def _pool_windows_compiled(feature_map: Tensor, windows: NDArray[np.int64], levels: tuple[int, ...]) -> Tensor:
    from . import _pool_cpu  # brings numba, which takes a second to import

    # numba has no 16-bit floats; to float32 and back is exact, because a maximum is one of its inputs
    exact = feature_map if feature_map.dtype == torch.float64 else feature_map.float()
    if _pool_cpu.has_nan(exact.numpy()):
        return _pool_windows_by_crop(feature_map, windows, levels)
    pooled = _pool_cpu.pool_cells(exact.numpy(), windows, levels, threads=torch.get_num_threads())
    return torch.from_numpy(pooled).to(feature_map.dtype)


def _pool_windows_roi(feature_map: Tensor, windows: NDArray[np.int64], levels: tuple[int, ...]) -> Tensor:
    """The same by torchvision, level by level: differentiable, and on any device that torchvision serves."""
    from torchvision.ops import roi_pool  # takes a second to import, too

    exact = feature_map if feature_map.dtype == torch.float64 else feature_map.float()
    # its right and bottom edges are inclusive, and the first column is the index of the image
    inclusive = np.concatenate([np.zeros((len(windows), 1), np.int64), windows - [0, 0, 1, 1]], axis=1)
    regions = torch.from_numpy(inclusive).to(exact.device, exact.dtype)
    parts, kind = [], np.float64 if exact.dtype == torch.float64 else np.float32
    for n in levels:
        pooled = roi_pool(exact[None], regions, n).flatten(1)
        rounded = np.flatnonzero(_roi_pool_rounds(windows, n, kind))
        if len(rounded):
            rows = torch.from_numpy(rounded).to(exact.device)
            pooled = pooled.index_copy(0, rows, _pool_windows_by_crop(exact, windows[rounded], (n,)))
        parts.append(pooled)
    return torch.cat(parts, dim=1).to(feature_map.dtype)


def _roi_pool_rounds(windows: NDArray[np.int64], n: int, dtype: type[np.floating]) -> NDArray[np.bool_]:
    """(R,): for which windows torchvision's edges of bins, found in the map's type, are not the exact ones.

    A last bin of n = 7, 11 or 13 may reach one cell too far: 7 · (57 / 7) is more than 57 in float32.
    """
    sides, i = (windows[:, 2:] - windows[:, :2])[..., None], np.arange(n)
    bin_sides = sides.astype(dtype) / dtype(n)
    starts, ends = np.floor(i.astype(dtype) * bin_sides), np.ceil((i + 1).astype(dtype) * bin_sides)
    return ((starts != i * sides // n) | (ends != -(-(i + 1) * sides // n))).any(axis=(1, 2))


def _pool_windows_by_crop(feature_map: Tensor, windows: NDArray[np.int64], levels: tuple[int, ...]) -> Tensor:
    """The definition itself, one window at a time."""
    if len(windows) == 0:
        return feature_map.new_empty((0, feature_map.shape[0] * bin_count(levels)))
    crops = (feature_map[:, y1:y2, x1:x2] for x1, y1, x2, y2 in windows.tolist())
    return torch.stack([spatial_pyramid_pool(crop, levels) for crop in crops])


def _checked_levels(levels: Sequence[int]) -> tuple[int, ...]:
    checked = tuple(int(n) for n in levels)
    if not checked or min(checked) < 1 or checked != tuple(levels):
        raise ValueError(f"levels must be whole numbers from 1 on, got {levels!r}; the paper's pyramid is (1, 2, 3, 6)")
    return checked


def _check_map(feature_map: Tensor) -> None:
    if feature_map.ndim != 3 or 0 in feature_map.shape:
        hint = "; pass one image's map at a time" if feature_map.ndim == 4 else ""
        raise ValueError(
            f"feature_map must have shape (C, H, W) with at least one cell, got {tuple(feature_map.shape)}{hint}"
        )
    if not feature_map.is_floating_point():
        raise ValueError(f"feature_map must be floating point, got {feature_map.dtype}; convert it with .float()")


def _checked_windows(windows: ArrayLike | Tensor, map_size: Sequence[int]) -> NDArray[np.int64]:
    array = windows.detach().cpu().numpy() if isinstance(windows, Tensor) else np.asarray(windows)
    if array.size == 0 and array.ndim < 2:
        array = np.zeros((0, 4), np.int64)
    if array.ndim != 2 or array.shape[1] != 4:
        hint = "; pass windows[None] for one window" if array.shape == (4,) else ""
        raise ValueError(f"windows must have shape (R, 4), got {array.shape}{hint}")
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"windows must be whole cells of the map, got {array.dtype}; project boxes with project_windows first"
        )
    array = np.ascontiguousarray(array, dtype=np.int64)
    _check_inside(array, map_size)
    return array


def _check_inside(windows: NDArray[np.int64], map_size: Sequence[int]) -> None:
    height, width = map_size
    x1, y1, x2, y2 = windows.T
    empty = (x2 <= x1) | (y2 <= y1)
    outside = (x1 < 0) | (y1 < 0) | (x2 > width) | (y2 > height)
    for bad, what in ((empty, "is empty"), (outside, f"is not inside the map of {height} × {width} cells")):
        if bad.any():
            first = int(bad.argmax())
            raise ValueError(
                f"window {first} {what}: got {windows[first].tolist()} (x1, y1, x2, y2, half-open); "
                "project_windows gives windows that are not empty and lie inside the map"
            )
