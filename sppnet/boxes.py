"""Arithmetic on boxes: float (R, 4) arrays of (x1, y1, x2, y2), zero-based, half-open.

Width is x2 - x1. With these corners the plain intersection over union equals the VOC devkit's, whose
inclusive corners need "+ 1"; there is none in this package. Sizes are (height, width).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Boxes = NDArray[np.floating]


def as_boxes(boxes: ArrayLike, name: str = "boxes") -> NDArray[np.float64]:
    """Any (R, 4) array-like as float64; an empty sequence becomes (0, 4)."""
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        hint = f"; pass {name}[None] for one box" if array.shape == (4,) else ""
        raise ValueError(f"{name} must have shape (R, 4), got {array.shape}{hint}")
    return array


def areas(boxes: Boxes) -> NDArray[np.floating]:
    """(R, 4) -> (R,); boxes without extent have area 0."""
    sides = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None)
    return sides[:, 0] * sides[:, 1]


def pairwise_iou(boxes: Boxes, others: Boxes) -> NDArray[np.floating]:
    """Intersection over union of every pair: (R, 4), (S, 4) -> (R, S); 0 where both areas are 0."""
    corner1 = np.maximum(boxes[:, None, :2], others[None, :, :2])
    corner2 = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = np.clip(corner2 - corner1, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    union = areas(boxes)[:, None] + areas(others)[None, :] - intersection
    ratio = np.zeros(intersection.shape, np.result_type(intersection, np.float32))  # whole-pixel boxes come as integers
    return np.divide(intersection, union, out=ratio, where=union > 0)


def clip_boxes(boxes: Boxes, image_size: tuple[int, int]) -> Boxes:
    """Corners moved into the image of (height, width)."""
    height, width = image_size
    return np.clip(boxes, 0, np.array([width, height, width, height], dtype=boxes.dtype))


def flip_boxes(boxes: Boxes, width: float) -> Boxes:
    """The same boxes in the horizontally flipped image."""
    flipped = boxes.copy()
    flipped[:, 0] = width - boxes[:, 2]
    flipped[:, 2] = width - boxes[:, 0]
    return flipped
