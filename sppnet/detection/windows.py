"""Windows of the image become windows of the map: choose the scale, project (sec. 4.1, app. A).

Boxes are xyxy, 0-based, half-open, in pixels of the original image; windows on the map are xyxy half-open
cells. numpy arrays give numpy arrays, torch tensors give torch tensors on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from sppnet.backbones.geometry import Geometry
from sppnet.records import areas, as_boxes

Array = TypeVar("Array", NDArray[np.generic], torch.Tensor)


def choose_scales(
    boxes: Array, image_size: tuple[int, int], scales: Sequence[float], target_side: float = 208
) -> Array:
    """The scale at which each box is nearest to `target_side`² pixels: (R, 4) -> (R,) int64 index into `scales`.

    Release: expected = round(208 · min(h, w) / √area), 208 being the span of 13 cells; then the scale nearest to it,
    the first one on a tie. The paper (sec. 4.1) takes the scale whose window has the area nearest to 224²; a target of
    224 is close to that, but takes the nearest side, not the nearest area.
    """
    if len(scales) == 0:
        raise ValueError("scales is empty; give at least one shorter side, e.g. (688,)")
    _check_size("image_size", image_size)
    area = np.maximum(areas(_finite_boxes(boxes)), 1e-9)  # a box without area goes to the largest scale
    expected = np.floor(target_side * min(image_size) / np.sqrt(area) + 0.5)
    distances = np.abs(np.asarray(scales, dtype=np.float64)[None, :] - expected[:, None])
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
    the map, so a window always holds a cell and lies inside the map, whatever the box.
    """
    _check_size("image_size", image_size)
    _check_size("map_size", map_size)
    # Release: first and last pixels of both images coincide, (x - 1)·(s - 1) / (min(h, w) - 1) + 1 counted from 1.
    corners, span = _finite_boxes(boxes), max(min(image_size) - 1, 1)  # an image one pixel wide has no span
    corner1, corner2 = corners[:, :2] * (scale - 1) / span, (corners[:, 2:] - 1) * (scale - 1) / span
    centre, shrink, stride = geometry.first_centre, geometry.shrink, geometry.stride
    if projection == "release":
        first = np.floor((corner1 - centre + shrink) / stride + 0.5)
        last = np.ceil((corner2 - centre - shrink) / stride - 0.5)
    elif projection == "paper":
        first, last = np.floor((corner1 - centre) / stride) + 1, np.ceil((corner2 - centre) / stride) - 1
    else:
        raise ValueError(f"projection must be one of release, paper, got {projection!r}")
    middle = np.floor((first + last) / 2)
    crossed = first > last
    height, width = map_size
    bound = np.array([width - 1, height - 1], dtype=np.float64)
    first = np.clip(np.where(crossed, middle, first), 0, bound)
    last = np.clip(np.where(crossed, middle, last), 0, bound)
    return _like(boxes, np.concatenate([first, last + 1], axis=1).astype(np.int64))


def _finite_boxes(boxes: NDArray[np.generic] | torch.Tensor) -> NDArray[np.float64]:
    array = as_boxes(boxes.detach().cpu().numpy() if isinstance(boxes, torch.Tensor) else boxes)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(f"box {bad[0]} is not finite: got {array[bad[0]].tolist()}; drop it before projecting")
    return array


def _check_size(name: str, size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name} must be (height, width), both at least 1, got {tuple(size)}")


def _like(model: Array, values: NDArray[np.int64]) -> Array:
    """`values` as what `model` is: an array, or a tensor on its device."""
    return torch.from_numpy(values).to(model.device) if isinstance(model, torch.Tensor) else cast(Array, values)
