"""The spatial pyramid: a map or a window of any size becomes a vector of one length (sec. 2.2, 4.1, app. A).

Level n divides H rows into n bins; bin i covers rows floor(i·H / n) … ceil((i + 1)·H / n) - 1, columns
likewise, and the feature is the maximum inside a bin. The vector holds level after level in the order they
are given, and within a level channel-major: (C, n, n) flattened.

RoI pooling is one level; the pyramid of a whole image is the window that covers the map; the pyramid of a
window equals the pyramid of the cropped map.

Needs torch and numpy alone. numba and torchvision are imported when windows are pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, pad

from . import _operators

PAPER_LEVELS = (1, 2, 3, 6)
MAX_LEVEL = 1000
FLOATING = torch.float16, torch.bfloat16, torch.float32, torch.float64  # those that torch pools
WHOLE = torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64

torch.fx.wrap("pool_windows")  # one step of a graph that torch.fx traces

Windows = ArrayLike | Tensor | Sequence[ArrayLike] | Sequence[Tensor]


def bin_count(levels: Sequence[int]) -> int:
    """M = Σn², bins per channel: 50 for (1, 2, 3, 6)."""
    return sum(n * n for n in _checked_levels(levels))


def spatial_pyramid_pool(feature_map: Tensor, levels: Sequence[int]) -> Tensor:
    """Pyramid vector of whole maps, differentiable: (C, H, W) -> (C · Σn²,); (N, C, H, W) -> (N, C · Σn²).

    Raises ValueError for maps that are not floating point of these shapes with at least one cell each.
    """
    levels = _checked_levels(levels)
    if not isinstance(feature_map, torch.fx.Proxy):  # which has no shape
        _check_map(feature_map)
    if torch.onnx.is_in_onnx_export():
        return torch.cat([_pool_slices(feature_map, n) for n in levels], dim=-1)
    return torch.cat([adaptive_max_pool2d(feature_map, n).flatten(-3) for n in levels], dim=-1)


def pool_windows(feature_map: Tensor, windows: Windows, levels: Sequence[int]) -> Tensor:
    """Pyramid vectors of many windows of one map or of a batch of maps.

    feature_map: (C, H, W) or (N, C, H, W), floating point. windows: xyxy feature-map cells, half-open, as a list, an
    array or a tensor: (R, 4) integers for one map; for a batch a list of N of those, or (K, 5) in torchvision's form:
    the index of the map, then the cells, integers or floats that hold whole numbers. levels e.g. (1, 2, 3, 6).
    Returns (windows, C · Σn²) of the map's type on the map's device, in the order given; each row equals
    ``spatial_pyramid_pool`` of the cropped map (zeros of either sign count as equal), infinite and NaN cells too.
    He et al. 2015, sec. 4.1, app. A.

    An operator of torch: torch.compile and torch.export take it whole, and derivatives of every kind go to the same
    cells as those of ``spatial_pyramid_pool``. On the CPU it runs compiled loops on torch's number of threads,
    elsewhere ``torchvision.ops.roi_pool`` level by level.

    Raises ValueError for windows that have another shape or type, are empty, or do not lie inside their map; under
    torch.compile the last two when the compiled function runs.
    """
    levels = _checked_levels(levels)
    _check_map(feature_map)
    if feature_map.ndim == 3:
        return _operators.pool(feature_map[None], _as_cells(windows, feature_map, 4), levels)
    if not (isinstance(windows, (list, tuple)) and all(_is_table(one) for one in windows)):
        return _operators.pool(feature_map, _as_cells(windows, feature_map, 5), levels)
    if len(windows) not in (0, len(feature_map)):
        raise ValueError(
            f"windows must be a list of one (R, 4) per map, got {len(windows)} for a batch of {len(feature_map)} maps; "
            "pass an empty list for a map without windows"
        )
    cells = [_as_cells(one, feature_map, 4).to(torch.int64) for one in windows]
    rows = [_as_cells([], feature_map, 5), *(pad(one, (1, 0), value=image) for image, one in enumerate(cells))]
    return _operators.pool(feature_map, torch.cat(rows), levels)


class _Pyramid(nn.Module):
    def __init__(self, levels: Sequence[int] = PAPER_LEVELS) -> None:
        super().__init__()
        self.levels = _checked_levels(levels)

    def out_features(self, channels: int) -> int:
        """C · Σn²: how long the vectors of maps of that many channels are."""
        return _checked_whole(channels, "channels") * bin_count(self.levels)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class SpatialPyramidPool(_Pyramid):
    """``spatial_pyramid_pool`` as a layer: (N, C, H, W) of any H and W -> (N, C · Σn²).

    Can be scripted, traced and exported, to ONNX too, where the runtime decides what a NaN becomes.
    """

    def forward(self, feature_map: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            parts = []  # no comprehensions over tuples there
            for n in self.levels:
                parts.append(adaptive_max_pool2d(feature_map, [n, n]).flatten(-3))
            return torch.cat(parts, dim=-1)
        return spatial_pyramid_pool(feature_map, self.levels)


class WindowPool(_Pyramid):
    """``pool_windows`` as a layer: maps and windows in any of its forms -> (windows, C · Σn²)."""

    def forward(self, feature_map: Tensor, windows: Windows) -> Tensor:
        return pool_windows(feature_map, windows, self.levels)


class RoIPool(nn.Module):
    """RoI pooling, a pyramid of one level: maps and windows as `pool_windows` takes -> (windows, C, size, size)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = _checked_whole(size, "size")

    def forward(self, feature_map: Tensor, windows: Windows) -> Tensor:
        return pool_windows(feature_map, windows, (self.size,)).unflatten(1, (-1, self.size, self.size))

    def extra_repr(self) -> str:
        return f"size={self.size}"


def sliding_pool(side: int, n: int) -> tuple[int, int, bool]:
    """The paper's training shorthand for level n on a map of a × a cells: window ceil(a / n), stride floor(a / n).

    Sec. 2.3. Gives them, and whether sliding that window over the map yields n positions. Kept for reference, never
    used as the layer: it yields n at a = 13 for n = 1, 2, 3, 6, but 9 instead of 6 at a = 10, n = 6, which is the
    paper's own 180-pixel case. Below a = n the stride is 0.
    """
    side, n = _checked_whole(side, "side"), _checked_whole(n, "n")
    window, stride = -(-side // n), side // n
    return window, stride, stride > 0 and (side - window) // stride + 1 == n


def _pool_slices(feature_map: Tensor, n: int) -> Tensor:
    """One level of slices and maxima, which ONNX knows: it has no adaptive pooling."""
    height, width = feature_map.shape[-2:]
    rows = [feature_map[..., i * height // n : ((i + 1) * height + n - 1) // n, :].amax(-2) for i in range(n)]
    bins = [row[..., j * width // n : ((j + 1) * width + n - 1) // n].amax(-1) for row in rows for j in range(n)]
    return torch.stack(bins, dim=-1).flatten(-2)


def _checked_whole(number: Any, name: str) -> int:
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {number!r}; give {name} as an int")
    return int(number)


def _checked_levels(levels: Sequence[int]) -> tuple[int, ...]:
    given = levels.tolist() if isinstance(levels, np.ndarray) else levels
    several = isinstance(given, (list, tuple, range)) and len(given) > 0
    if several and all(isinstance(n, (int, np.integer)) and n is not True and 1 <= n <= MAX_LEVEL for n in given):
        return tuple(int(n) for n in given)
    raise ValueError(
        f"levels must be whole numbers from 1 to {MAX_LEVEL}, got {levels!r:.80}; the paper's pyramid is {PAPER_LEVELS}"
    )


def _check_map(feature_map: Tensor) -> None:
    if not isinstance(feature_map, Tensor):
        raise ValueError(
            f"feature_map must be a tensor, got {type(feature_map).__name__}; torch.from_numpy makes one of an array"
        )
    if feature_map.dtype not in FLOATING or feature_map.layout != torch.strided or feature_map.is_nested:
        raise ValueError(
            "feature_map must be floating point of 16, 32 or 64 bits and dense, got "
            f"{feature_map.dtype}, {feature_map.layout}; convert it with .float() or .to_dense()"
        )
    if feature_map.ndim not in (3, 4) or (not torch.jit.is_tracing() and 0 in feature_map.shape[-3:]):
        raise ValueError(
            "feature_map must have shape (C, H, W) or (N, C, H, W) with at least one cell, got "
            f"{tuple(feature_map.shape)}; a map without cells comes from an image smaller than the backbone can take"
        )


def _is_table(one: Any) -> bool:
    """Whether this is the windows of a map, and not a window."""
    if isinstance(one, (Tensor, np.ndarray)):
        return one.ndim == 2 or one.shape == (0,)
    return isinstance(one, (list, tuple)) and (len(one) == 0 or isinstance(one[0], (list, tuple, np.ndarray, Tensor)))


def _as_cells(windows: Windows, feature_map: Tensor, columns: int) -> Tensor:
    """(R, columns) on the CPU, its values not checked."""
    cells = windows.detach() if isinstance(windows, Tensor) else _from_numbers(windows)
    if torch.jit.is_tracing():  # sizes of a trace are not to be asked
        return cells.cpu()
    if cells.layout != torch.strided or cells.is_nested or cells.is_meta > feature_map.is_meta:
        raise ValueError(
            f"windows must be a dense tensor with values, got {cells.layout} on {cells.device}; pass a list"
        )
    if cells.shape in ((0,), (0, 4), (0, 5)):
        return torch.from_numpy(np.zeros((0, columns), np.int64))
    if cells.ndim != 2 or cells.shape[1] != columns:
        form = "(R, 4)" if columns == 4 else "(K, 5), or be a list of one (R, 4) per map"
        step = "pass windows[None] for one window" if cells.shape == (columns,) else "give one row per window"
        raise ValueError(f"windows must have shape {form}, got {tuple(cells.shape)}; {step}")
    if cells.dtype not in WHOLE and not (cells.is_floating_point() and columns == 5):
        found = str(cells.dtype).removeprefix("torch.")
        raise ValueError(
            f"windows must be whole cells of the map, got {found}; project boxes with project_windows first"
        )
    return cells if cells.is_meta else cells.cpu()


def _from_numbers(windows: Any) -> Tensor:
    if torch.compiler.is_dynamo_compiling():  # which knows no types of arrays
        return torch.as_tensor(windows)
    try:
        array = np.asarray(windows)
        kinds = {"i": np.int64, "u": np.int64, "f": np.float64}
        return torch.from_numpy(array.astype(kinds[array.dtype.kind] if array.size else np.int64))
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError):
        raise ValueError(
            f"windows must be rows of whole numbers, got {windows!r:.80}; pass a list or an array"
        ) from None
