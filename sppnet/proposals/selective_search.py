"""Selective search (Uijlings et al. 2013): windows around all regions of several hierarchies of an image.

An image is segmented in every colour space at every threshold; each segmentation is grouped once per set of
similarities; the boxes of all regions of all these hierarchies, small and large, are the windows. "fast" runs
2 spaces × 2 thresholds × 2 sets = 8 hierarchies, "quality" 5 × 4 × 4 = 80. About 15 times as fast as OpenCV's
on one core (``benchmarks/proposals.py``), and in the same order on every machine: no random numbers, no ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from sppnet.config import ProposalSettings
from sppnet.proposals.grouping import Similarity, group
from sppnet.proposals.regions import describe, pixel_bins
from sppnet.proposals.segmentation import segment, sorted_edges

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Strategies:
    """The diversification of a mode: every combination makes one hierarchy (sec. 4)."""

    spaces: tuple[str, ...]  # keys of COLOUR_SPACES
    thresholds: tuple[float, ...]  # k of the segmentation
    similarities: tuple[Similarity, ...]


ALL_TERMS = Similarity()
WITHOUT_COLOUR = Similarity(colour=False)
FILL = Similarity(colour=False, texture=False, size=False)
SIZE = Similarity(colour=False, texture=False, fill=False)

MODES = {
    "fast": Strategies(("hsv", "lab"), (100, 300), (ALL_TERMS, WITHOUT_COLOUR)),
    "quality": Strategies(
        ("hsv", "lab", "rgi", "hue", "intensity"), (50, 100, 150, 300), (ALL_TERMS, WITHOUT_COLOUR, FILL, SIZE)
    ),
}
# Ours. Sigma, k and the smallest region were chosen on training images of VOC-9 (700 images, nine classes;
# recall at IoU 0.5 and mean best overlap, 2,000 windows with sides >= 20; OpenCV's fast: 0.936 0.791):
#   k 100, 300, sigma 0.7, regions of 50 pixels    0.946  0.791
#   k 100, 200, sigma 0.6, regions of 50 pixels    0.949  0.790
#   k 100, 200, sigma 0.8, regions of 50 pixels    0.949  0.789
#   k 150, 300, sigma 0.6, regions of 50 pixels    0.941  0.788
# and on another draw of 450 (OpenCV 0.948 0.806): regions of k pixels, as published, 0.953 0.801 (k 100, 200) and
# 0.957 0.803 (k 50, 100), of 20 pixels 0.956 0.803 (k 100, 200). The blur after the conversion of colours instead of
# before it cost 0.005 of overlap; a copy of half the size takes 12 instead of 44 ms and costs 0.03 of both.
SIGMA = 0.7
SMALLEST_REGION = 50  # pixels


def selective_search(image: Image, settings: ProposalSettings) -> NDArray[np.float32]:
    """At most max_windows distinct windows with both sides >= min_side pixels, best first.

    Image (H, W, 3) uint8 RGB -> (R, 4) float32 xyxy half-open, whole pixels inside the image. Images with a side above
    max_side are searched in a copy shrunk to it. A uniform image gives itself; one with a side below min_side
    gives (0, 4).
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"image must be (H, W, 3) uint8 RGB, got {image.dtype} of shape {image.shape}; read it with read_image"
        )
    if min(image.shape[:2]) < settings.min_side:
        return np.zeros((0, 4), np.float32)
    small, scale = shrunk(image, settings.max_side)
    boxes, priorities = _prioritised(hierarchies(small, MODES[settings.mode]))
    boxes = np.rint(boxes * scale).astype(np.int64)
    large = (boxes[:, 2:] - boxes[:, :2] >= settings.min_side).all(axis=1)
    windows = _distinct(boxes[large], priorities[large])
    return windows[: settings.max_windows].astype(np.float32)


def shrunk(image: Image, max_side: int | None) -> tuple[Image, NDArray[np.float64]]:
    """The image with its longer side at most `max_side`, and the factors (4,) that lead xyxy in it back."""
    height, width = image.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return image, np.ones(4)
    ratio = max_side / max(height, width)
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return small, np.tile([width / size[0], height / size[1]], 2)


def hierarchies(image: Image, strategies: Strategies) -> Iterator[NDArray[np.int32]]:
    """Boxes (2N - 1, 4) of each hierarchy: the N regions of a segmentation first, the whole image last."""
    # smoothed before the conversion: a hue has no mean, and one blur serves all spaces
    smooth = np.asarray(cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), SIGMA), dtype=np.uint8)
    for space in strategies.spaces:
        converted = np.ascontiguousarray(COLOUR_SPACES[space](smooth))
        edges, weights = sorted_edges(converted)
        bins = pixel_bins(converted)
        for k in strategies.thresholds:
            labels, count = segment(edges, weights, image.shape[:2], k, SMALLEST_REGION)
            regions = describe(labels, count, bins)
            for similarity in strategies.similarities:
                yield group(regions, similarity)[0]


def _hsv(image: Image) -> Image:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), dtype=np.uint8)


def _lab(image: Image) -> Image:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2LAB), dtype=np.uint8)


def _intensity(image: Image) -> Image:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)[..., None]


def _rgi(image: Image) -> Image:
    """Red and green as shares of red + green + blue (a third each in black), and the intensity."""
    total = image.sum(axis=2, dtype=np.int32)[..., None]
    shares = np.where(total > 0, 255 * image[..., :2].astype(np.int32) // np.maximum(total, 1), 85)
    return np.concatenate([shares.astype(np.uint8), _intensity(image)], axis=2)


COLOUR_SPACES: dict[str, Callable[[Image], Image]] = {
    "hsv": _hsv,
    "lab": _lab,
    "rgi": _rgi,
    "hue": lambda image: _hsv(image)[..., :1],
    "intensity": _intensity,
}


def _prioritised(trees: Iterator[NDArray[np.int32]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All boxes and their priorities, small ones first in line: position below the top times a number in [0, 1).

    As published (sec. 4), with a hash of box and hierarchy for the random number.
    """
    boxes, priorities = [], []
    for number, tree in enumerate(trees):
        position = np.arange(len(tree), 0, -1)
        boxes.append(tree.astype(np.int64))
        priorities.append(position * _pseudo_random(tree, number))
    return np.concatenate(boxes), np.concatenate(priorities)


def _pseudo_random(boxes: NDArray[np.int32], number: int) -> NDArray[np.float64]:
    """(R,) in [0, 1), a hash of the corners and the number."""
    key = _mixed(box_hash(boxes, number))  # a last round without a corner
    return (key >> np.uint64(11)).astype(np.float64) / 2.0**53


def box_hash(boxes: NDArray[np.integer], number: int = 0) -> NDArray[np.uint64]:
    """(R,) a hash of whole corners (R, 4) and the number: an order without preference, the same on every machine."""
    key = np.full(len(boxes), number, np.uint64)
    for corner in boxes.T.astype(np.uint64):
        key = _mixed(key ^ corner)
    return key


def _mixed(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    key = key * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: mixes upwards
    return key ^ (key >> np.uint64(32))  # and back down


def _distinct(boxes: NDArray[np.int64], priorities: NDArray[np.float64]) -> NDArray[np.int64]:
    """Each box once, at its first place; boxes of equal priority in the order of their corners."""
    boxes = boxes[np.lexsort((*boxes.T[::-1], priorities))]
    side = int(boxes.max(initial=0)) + 1
    if side >= 1 << 15:  # four corners of 15 bits make one number, which is faster than rows
        _, first = np.unique(boxes, axis=0, return_index=True)
    else:
        _, first = np.unique(boxes @ (np.int64(1) << np.arange(0, 60, 15)), return_index=True)
    return boxes[np.sort(first)]
