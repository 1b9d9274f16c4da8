"""Windows of the image become windows of the map: choose the scale, project (sec. 4.1, app. A).

Boxes are xyxy, 0-based, half-open, in pixels of the original image; windows on the map are xyxy half-open
cells. numpy arrays give numpy arrays, torch tensors give torch tensors on the same device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from sppnet.backbones.geometry import Geometry, is_number
from sppnet.checks import check_boxes
from sppnet.errors import SppnetError
from sppnet.records import areas

Array = TypeVar("Array", NDArray[np.generic], torch.Tensor)

TARGET_SIDES = {"release": 208.0, "paper": 224.0}  # px that a window should have at its scale
SPARE = 2  # cells by which a map may differ from what stride and first centre say: every layer rounds its size
PADDED = 128  # px: images may be padded to multiples of it, and of what divides it (torchvision's detectors: 32)


def choose_scales(
    boxes: Array,
    image_size: tuple[int, int],
    scales: Sequence[float],
    target_side: float | None = None,
    rule: Literal["release", "paper"] = "release",
) -> Array:
    """The scale at which each box is nearest to `target_side`² pixels: (R, 4) -> (R,) int64 index into `scales`.

    "release": expected = round(208 · min(h, w) / √area), 208 being the span of 13 cells; then the scale nearest to it.
    "paper" (sec. 4.1): the scale s at which the box covers an area nearest to 224², area · (s / min(h, w))²: the whole
    image is scaled by that factor, and an area with it. The first scale on a tie; `target_side` replaces 208 or 224.
    SppnetError as in `project_windows`.
    """
    height, width = _whole_size("image_size", image_size)
    sides = _as_array(scales)
    if sides is None or sides.ndim != 1 or not len(sides) or not (np.isfinite(sides) & (sides > 0)).all():
        raise SppnetError(f"scales must be shorter sides in pixels, at least one, e.g. (688,), got {scales!r}")
    if not isinstance(rule, str) or rule not in TARGET_SIDES:
        raise SppnetError(f"rule must be one of release, paper, got {rule!r}")
    target = TARGET_SIDES[rule] if target_side is None else target_side
    if not is_number(target) or target <= 0:
        raise SppnetError(f"target_side must be pixels > 0, e.g. 208, got {target_side!r}")
    target = float(target) * min(height, width)
    with np.errstate(over="ignore"):  # boxes of any extent
        area = np.maximum(areas(check_boxes(boxes, extent=False)), 1e-9)  # a box without area goes to the largest scale
    if rule == "release":
        distances = np.abs(sides[None, :] - np.floor(target / np.sqrt(area) + 0.5)[:, None])
    else:  # times min(h, w)²: of whole numbers exact, so that a tie is one
        distances = np.abs(np.clip(area, 1e-3, 1e100)[:, None] * sides[None, :] ** 2 - target**2)
    return _like(boxes, distances.argmin(axis=1))


def project_windows(
    boxes: Array,
    image_size: tuple[int, int],
    scale: float,
    geometry: Geometry,
    map_size: tuple[int, int],
    projection: Literal["release", "paper"] = "release",
) -> Array:
    """Boxes (R, 4) -> windows (R, 4) int64 on the map of the image whose shorter side is resized to `scale`.

    With x the 0-based inclusive corner of a box in the resized image, c the first centre and S the stride,
    "release" gives left = floor((x - c + shrink) / S + 1/2), right = ceil((x - c - shrink) / S - 1/2), inclusive;
    "paper" (app. A; c is its "proper offset" for paddings other than floor(k/2)) gives left = floor((x - c) / S) + 1
    and right = ceil((x - c) / S) - 1. Where left > right both become their mean, truncated; then both are clamped to
    the map, so a window always holds a cell and lies inside the map, wherever the box is. The map may also be that of
    an image padded at right and bottom to a multiple of 32, 64 or 128 pixels: `image_size` is still the image's own.

    SppnetError for what cannot be: a scale that is no number of pixels, sizes that are not (height, width), a map that
    is not of this image at this scale and geometry, corners that are not finite or not in order.
    """
    if not isinstance(projection, str) or projection not in ("release", "paper"):
        raise SppnetError(f"projection must be one of release, paper, got {projection!r}")
    size, cells = _whole_size("image_size", image_size), _whole_size("map_size", map_size)
    corners = check_boxes(boxes, extent=False)
    if not all(hasattr(geometry, name) for name in ("stride", "first_centre", "shrink")):
        raise SppnetError(f"geometry must be a Geometry, e.g. Geometry(stride=16, first_centre=7.5), got {geometry!r}")
    geometry = Geometry(geometry.stride, geometry.first_centre, geometry.shrink)  # which checks them
    stride, centre, shrink = float(geometry.stride), float(geometry.first_centre), float(geometry.shrink)
    if not is_number(scale) or scale <= 0:
        raise SppnetError(f"scale must be the resized shorter side in pixels, e.g. 688, got {scale!r}")
    scale = float(scale)
    _check_map(size, scale, geometry, cells)
    # Release: first and last pixels of both images coincide, (x - 1)·(s - 1) / (min(h, w) - 1) + 1 counted from 1.
    factor = (scale - 1) / max(min(size) - 1, 1) if scale > 1 else scale / min(size)  # one pixel has no span
    with np.errstate(over="ignore", invalid="ignore"):  # boxes of any extent
        corner1, corner2 = corners[:, :2] * factor, (corners[:, 2:] - 1) * factor
        if projection == "release":
            first = np.floor((corner1 - centre + shrink) / stride + 0.5)
            last = np.ceil((corner2 - centre - shrink) / stride - 0.5)
        else:
            first, last = np.floor((corner1 - centre) / stride) + 1, np.ceil((corner2 - centre) / stride) - 1
        middle = np.floor((first + last) / 2)
    crossed = first > last
    bound = np.array(cells[::-1], dtype=np.float64) - 1
    first = np.clip(np.where(crossed, middle, first), 0, bound)
    last = np.clip(np.where(crossed, middle, last), 0, bound)
    return _like(boxes, np.concatenate([first, last + 1], axis=1).astype(np.int64))


def _check_map(size: tuple[int, int], scale: float, geometry: Geometry, cells: tuple[int, int]) -> None:
    """SppnetError where these cells cannot be the map of an image of this size whose shorter side becomes `scale`."""
    if _fits(size, scale, geometry, cells):
        return
    resized = [side * scale / min(size) for side in size]
    about = [max(1.0, side / geometry.stride) for side in resized]
    raise SppnetError(
        f"an image of {size[0]} × {size[1]} pixels at scale={scale:g} (its shorter side) becomes {resized[0]:.0f} × "
        f"{resized[1]:.0f} and at stride {geometry.stride:g} a map of about {about[0]:.0f} × {about[1]:.0f} cells, but "
        f"map_size is {cells[0]} × {cells[1]}; give sizes as (height, width), "
        "the resized shorter side as scale, and the map of this image"
    )


def _fits(size: tuple[int, int], scale: float, geometry: Geometry, cells: tuple[int, int]) -> bool:
    """Whether a network of this geometry, whatever it pads, can give so many cells, of the image or the padded one."""
    for side, count in zip(size, cells, strict=True):
        length = side * scale / min(size)
        padded = math.ceil(length / PADDED - 1e-9) * PADDED  # 128.0000001 is 128
        # layers of the geometry that pad nothing, or as much on both sides
        smallest, largest = (
            (each / geometry.stride, (each - 1 - 2 * geometry.first_centre) / geometry.stride + 1)
            for each in (length, padded)
        )
        if not min(smallest) - SPARE <= count <= max(largest) + SPARE:
            return False
    return True


def _whole_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    array = _as_array(size)
    if array is None or array.shape != (2,) or not ((array >= 1) & (array < 2**31) & (array == np.floor(array))).all():
        hint = f"; leave out the channels: {name}=image.shape[:2]" if array is not None and array.shape == (3,) else ""
        raise SppnetError(f"{name} must be (height, width), both at least 1, got {size!r}{hint}")
    return int(array[0]), int(array[1])


def _as_array(values: object) -> NDArray[np.float64] | None:
    """Numbers as an array, from a sequence, an array or a tensor; None for anything else."""
    try:
        array = np.asarray(values.tolist() if isinstance(values, torch.Tensor) else values)
        return array.astype(np.float64) if array.dtype.kind in "iuf" else None
    except (TypeError, ValueError):  # e.g. rows of different lengths
        return None


def _like(model: Array, values: NDArray[np.int64]) -> Array:
    """`values` as what `model` is: an array, or a tensor on its device."""
    return torch.from_numpy(values).to(model.device) if isinstance(model, torch.Tensor) else cast(Array, values)
