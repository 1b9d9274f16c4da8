"""``pool_windows`` as two operators of torch: one gives the largest values, the other their places.

Where a derivative is asked, torch's own ``gather`` takes the values from the places: it has every derivative that torch
knows. This is decided where torch dispatches operators: only there are the transforms of torch.func to be seen.

Both take maps (N, C, H, W); windows, (R, 4) of one map or (K, 5) with the index of a map first; and levels. They return
(windows, C · Σn²). Values of windows are checked here, since they may be known at run time alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import adaptive_max_pool2d

LEAST = torch.finfo(torch.float32).min  # torchvision's roi_pool begins a maximum with it, in every type

# Of the folder's own name, so that a copy of it in another project has operators of its own.
_namespace = re.sub(r"\W|^(?=\d)", "_", __package__ or "ops", flags=re.ASCII)
_library = torch.library.Library(_namespace, "FRAGMENT")


def _pool_on_cpu(maps: Tensor, windows: Tensor, levels: Sequence[int]) -> Tensor:
    from . import _pool_cpu  # brings numba, which takes a second to import

    exact = _exact(maps).numpy()
    if np.isnan(exact.max(initial=-np.inf)):
        return pool_elsewhere(maps, windows, levels)
    rows = _checked_rows(windows, maps.shape)
    return torch.from_numpy(_pool_cpu.pool_cells(exact, rows, levels, torch.get_num_threads())).to(maps.dtype)


def pool_elsewhere(maps: Tensor, windows: Tensor, levels: Sequence[int]) -> Tensor:
    rows = _checked_rows(windows, maps.shape)
    return torch.cat([_pool_level(_exact(maps), rows, n)[0] for n in levels], dim=1).to(maps.dtype)


def _argmax(maps: Tensor, windows: Tensor, levels: Sequence[int]) -> Tensor:
    rows = _checked_rows(windows, maps.shape)
    return torch.cat([_pool_level(_exact(maps), rows, n)[1] for n in levels], dim=1)


def _pool_autograd(keys: Any, maps: Tensor, windows: Tensor, levels: Sequence[int]) -> Tensor:
    backward = maps.requires_grad and torch.is_grad_enabled()
    if not backward and forward_ad.unpack_dual(maps, level=0).tangent is None:
        return pool.redispatch(keys & torch._C._after_autograd_keyset, maps, windows, levels)
    places = argmax(maps.detach(), windows, levels)
    return maps.reshape(-1).gather(0, places.reshape(-1)).reshape(places.shape)


def _define(name: str, dtype: torch.dtype | None, **kernels: Any) -> Any:
    names = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2)))  # the module may be loaded once more
    name = next(free for free in names if not hasattr(getattr(torch.ops, _namespace), free))
    _library.define(f"{name}(Tensor maps, Tensor windows, int[] levels) -> Tensor")
    for key, kernel in kernels.items():
        _library.impl(name, kernel, key, with_keyset=kernel is _pool_autograd)
    operator = getattr(getattr(torch.ops, _namespace), name).default

    def fake(maps: Tensor, windows: Tensor, levels: Sequence[int]) -> Tensor:
        return maps.new_empty((windows.shape[0], maps.shape[1] * sum(n * n for n in levels)), dtype=dtype)

    torch.library.register_fake(operator, fake, lib=_library)
    return operator


pool = _define("pool", None, CPU=_pool_on_cpu, CompositeExplicitAutograd=pool_elsewhere, Autograd=_pool_autograd)
# Places have no derivative.
argmax = _define("argmax", torch.int64, CompositeExplicitAutograd=_argmax, Autograd=torch.library.fallthrough_kernel)


def _pool_level(maps: Tensor, rows: NDArray[np.int64], n: int) -> tuple[Tensor, Tensor]:
    """Values (K, C · n²) of one level and their places in all maps, by torchvision: on any device that it serves."""
    import torchvision  # noqa: F401, takes a second to import, too

    # right and bottom edges are inclusive there
    regions = torch.from_numpy(rows - [0, 0, 0, 1, 1]).to(maps.device, maps.dtype)
    values, places = (one.flatten(2) for one in torch.ops.torchvision.roi_pool(maps, regions, 1.0, n, n))
    trusted = bool((maps > LEAST).all())  # other cells, and NaN, are never the largest there
    for k in np.flatnonzero(_roi_pool_rounds(rows, n, maps.dtype)) if trusted else range(len(rows)):
        image, x1, y1, x2, y2 = rows[k].tolist()
        largest, at = adaptive_max_pool2d(maps[image, :, y1:y2, x1:x2], n, return_indices=True)
        values[k] = largest.flatten(1)
        places[k] = ((y1 + at // (x2 - x1)) * maps.shape[3] + x1 + at % (x2 - x1)).flatten(1)
    planes = torch.from_numpy(rows[:, :1] * maps.shape[1] + np.arange(maps.shape[1])).to(maps.device)
    return values.flatten(1), (places + planes[..., None] * (maps.shape[2] * maps.shape[3])).flatten(1)


def _roi_pool_rounds(rows: NDArray[np.int64], n: int, dtype: torch.dtype) -> NDArray[np.bool_]:
    """(K,): for which windows torchvision's edges of bins, found in the map's type, are not the exact ones.

    A last bin of n = 7, 11 or 13 may reach one cell too far: 7 · (57 / 7) is more than 57 in float32.
    """
    kind: type[np.floating] = np.float64 if dtype == torch.float64 else np.float32
    sides, i = (rows[:, 3:] - rows[:, 1:3])[..., None], np.arange(n)
    bin_sides = sides.astype(kind) / kind(n)
    starts, ends = np.floor(i.astype(kind) * bin_sides), np.ceil((i + 1).astype(kind) * bin_sides)
    return ((starts != i * sides // n) | (ends != -(-(i + 1) * sides // n))).any(axis=(1, 2))


def _exact(maps: Tensor) -> Tensor:
    """In a type that loops know; to it and back is exact, because a maximum is one of its inputs."""
    return maps.detach() if maps.dtype == torch.float64 else maps.detach().float()


def _checked_rows(windows: Tensor, shape: Sequence[int]) -> NDArray[np.int64]:
    """(K, 5): the index of a map and a window inside it."""
    given = (windows.double() if windows.is_floating_point() else windows).numpy(force=True)
    whole, (count, _, height, width) = np.True_, shape
    if given.dtype.kind == "f":
        whole = (np.isfinite(given) & (np.floor(given) == given)).all(axis=1)
        given = np.nan_to_num(given).clip(-1, 2**31)
    rows = np.zeros((len(given), 5), np.int64)
    rows[:, 5 - given.shape[1] :] = given
    image, x1, y1, x2, y2 = rows.T
    for good, what in (
        (whole, "is not whole cells"),
        ((image >= 0) & (image < count), f"names no map of the batch of {count}"),
        ((x1 < x2) & (y1 < y2), "is empty"),
        ((x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height), f"is not inside the map of {height} × {width} cells"),
    ):
        if not good.all():
            k = int(good.argmin())
            name = f"window {(image[:k] == image[k]).sum()}" + (f" of map {image[k]}" if count > 1 else "")
            raise ValueError(
                f"{name} {what}: got {windows[k, -4:].tolist()} (x1, y1, x2, y2, half-open); "
                "project_windows gives windows that are not empty and lie inside the map"
            )
    return rows
