"""Regions of a segmentation, described for grouping: their pixels per colour and texture bin, boxes and neighbours.

Whole pixels are counted, so a region that is made of two has the sum of their counts (Uijlings et al. 2013, sec. 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppnet.ops.compiling import compiled

COLOUR_BINS = 25  # per channel, sec. 3.2
ORIENTATIONS, MAGNITUDES = 8, 10  # texture bins per channel, sec. 3.2
STEEPEST = 64  # ours: grey levels over two pixels; steeper gradients share the last magnitude bin


@dataclass(frozen=True)
class Regions:
    """The N regions of a segmentation: all that similarities need to know of them, and which ones touch."""

    colours: NDArray[np.int32]  # (N, C · 25) pixels per colour bin of each of the C channels
    textures: NDArray[np.int32]  # (N, C · 80) pixels per bin of gradient orientation and magnitude
    sizes: NDArray[np.int32]  # (N,) pixels
    boxes: NDArray[np.int32]  # (N, 4) xyxy half-open
    pairs: NDArray[np.int32]  # (P, 2) regions that touch, each pair once, smaller number first, in ascending order


def pixel_bins(image: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Histogram bins of every pixel: (H, W, C) -> (H, W, 2C), C colour bins below C · 25, C texture bins below C · 80.

    The gradient is the difference of the two neighbours in x and in y; beyond the edge a pixel is its own neighbour.
    """
    bins = np.empty((*image.shape[:2], 2 * image.shape[2]), np.uint16)
    _find_bins(image, _gradient_bins(), bins)
    return bins


def describe(labels: NDArray[np.int32], count: int, bins: NDArray[np.uint16]) -> Regions:
    """Regions 0 … count - 1 of `labels` (H, W), with the bins (H, W, 2C) of `pixel_bins` counted."""
    channels = bins.shape[2] // 2
    colours = np.zeros((count, channels * COLOUR_BINS), np.int32)
    textures = np.zeros((count, channels * ORIENTATIONS * MAGNITUDES), np.int32)
    sizes, boxes = np.zeros(count, np.int32), np.tile(np.array([*labels.shape[::-1], 0, 0], np.int32), (count, 1))
    _count(labels, bins, colours, textures, sizes, boxes)
    both = [(labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])]  # sides of every border
    ends = np.concatenate([(a[a != b], b[a != b]) for a, b in both], axis=1).astype(np.int64)
    keys = np.unique(ends.min(axis=0) << 32 | ends.max(axis=0))
    return Regions(colours, textures, sizes, boxes, np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1).astype(np.int32))


@cache
def _gradient_bins() -> NDArray[np.uint16]:
    """Texture bin by (dy, dx), both shifted by STEEPEST: orientations around 0°, 45°, …, magnitudes in even steps."""
    steps = np.arange(-STEEPEST, STEEPEST + 1)
    dy, dx = np.meshgrid(steps, steps, indexing="ij")
    turn = np.arctan2(dy, dx) / (2 * np.pi) * ORIENTATIONS
    orientation = np.floor(turn + 0.5).astype(np.int64) % ORIENTATIONS
    magnitude = np.minimum(np.hypot(dx, dy) * MAGNITUDES / STEEPEST, MAGNITUDES - 1).astype(np.int64)
    return (orientation * MAGNITUDES + magnitude).astype(np.uint16)


@compiled(error_model="numpy")
def _find_bins(image: Any, gradient_bins: Any, bins: Any) -> None:
    height, width, channels = image.shape
    for y in range(height):
        above, below = max(y - 1, 0), min(y + 1, height - 1)
        for x in range(width):
            left, right = max(x - 1, 0), min(x + 1, width - 1)
            for c in range(channels):
                dx: Any = np.int32(image[y, right, c]) - np.int32(image[y, left, c])
                dy: Any = np.int32(image[below, x, c]) - np.int32(image[above, x, c])
                row = max(-STEEPEST, min(STEEPEST, dy)) + STEEPEST
                column = max(-STEEPEST, min(STEEPEST, dx)) + STEEPEST
                bins[y, x, c] = c * COLOUR_BINS + np.int32(image[y, x, c]) * COLOUR_BINS // 256
                bins[y, x, channels + c] = c * ORIENTATIONS * MAGNITUDES + gradient_bins[row, column]


@compiled(error_model="numpy")
def _count(labels: Any, bins: Any, colours: Any, textures: Any, sizes: Any, boxes: Any) -> None:
    channels = bins.shape[2] // 2
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            region = labels[y, x]
            for c in range(channels):
                colours[region, bins[y, x, c]] += 1
                textures[region, bins[y, x, channels + c]] += 1
            sizes[region] += 1
            boxes[region, 0] = min(boxes[region, 0], x)
            boxes[region, 1] = min(boxes[region, 1], y)
            boxes[region, 2] = max(boxes[region, 2], x + 1)
            boxes[region, 3] = max(boxes[region, 3], y + 1)
