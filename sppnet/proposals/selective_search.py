"""Selective search (Uijlings et al. 2013): windows around all regions of several hierarchies of an image.

An image is segmented in every colour space at every threshold; each segmentation is grouped once per set of
similarities; the boxes of all regions of all these hierarchies, small and large, are the windows: 2 spaces × 2
thresholds × 2 sets = 8 hierarchies, those of the authors' "fast" mode. About ten times as fast as OpenCV's on one core
(``benchmarks/proposals.py``), and in the same order on every machine: no random numbers, no ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from sppnet.config import ProposalSettings
from sppnet.errors import SppnetError
from sppnet.images import ImageInput, read_pixels
from sppnet.proposals.grouping import Similarity, group
from sppnet.proposals.regions import describe, pixel_bins
from sppnet.proposals.segmentation import segment, sorted_edges
from sppnet.settings import checked_settings

Image = NDArray[np.uint8]
Priorities = NDArray[np.float64] | NDArray[np.uint64]  # (N,), small ones first in line
Ranked = tuple[NDArray[np.int64], Priorities | None]  # boxes (N, 4) and their priorities; None: a hash of the corners


# Every combination makes one hierarchy (sec. 4, "fast"): colour spaces, k of the segmentation, and similarities.
SPACES = (cv2.COLOR_RGB2HSV, cv2.COLOR_RGB2LAB)
THRESHOLDS = (100, 300)
SIMILARITIES = (Similarity(), Similarity(colour=False))
# Ours: k, sigma and the smallest region by recall at IoU 0.5 and mean best overlap on 700 training images of VOC, where
# they reach OpenCV's; nearby values change either by at most 0.005. A copy of half the size costs 0.03 of both.
SIGMA = 0.7
SMALLEST_REGION = 50  # pixels


def selective_search(
    image: ImageInput,
    settings: ProposalSettings | None = None,
    *,
    max_windows: int | None = None,
    min_side: int | None = None,
) -> NDArray[np.float32]:
    """At most max_windows distinct windows with both sides >= min_side pixels, best first.

    A path, a PIL image, an array (H, W, 3) uint8 RGB, or a tensor (3, H, W), uint8 or in [0, 1] -> (R, 4) float32 xyxy
    half-open, whole pixels inside the image, the same every time. What is given by name replaces the setting of that
    name. Images with a side above max_side are searched in a copy shrunk to it. A uniform image gives itself; one with
    a side below min_side gives (0, 4). Raises SppnetError for another kind of image, and for settings that cannot be.
    """
    own = checked_settings(ProposalSettings, settings, max_windows=max_windows, min_side=min_side)
    return best_windows(image, own, lambda small: _prioritised(hierarchies(small)))


def opencv_selective_search(image: ImageInput, settings: ProposalSettings | None = None) -> NDArray[np.float32]:
    """OpenCV's selective search, in and out as `selective_search`.

    OpenCV gives a fixed set in an order of C's rand. Ours is by a hash of the corners, so that every prefix is a fair
    sample of all sizes and places: as good a recall as the random order, where orders by size or shape lose much of it.
    """
    own = checked_settings(ProposalSettings, settings)
    return best_windows(image, own, lambda small: (_opencv_boxes(small), None))


def best_windows(
    image: ImageInput, settings: ProposalSettings, search: Callable[[Image], Ranked]
) -> NDArray[np.float32]:
    """What every search has in common: the image it sees, and which of the boxes it finds are windows."""
    pixels = read_pixels(image)
    if min(pixels.shape[:2]) < settings.min_side:
        return np.zeros((0, 4), np.float32)
    small, scale = shrunk(pixels, settings.max_side)
    boxes, priorities = search(small)
    boxes = np.rint(boxes * scale).astype(np.int64)
    places = box_hash(boxes) if priorities is None else priorities
    large = (boxes[:, 2:] - boxes[:, :2] >= settings.min_side).all(axis=1)
    return _distinct(boxes[large], places[large])[: settings.max_windows].astype(np.float32)


def shrunk(image: Image, max_side: int | None) -> tuple[Image, NDArray[np.float64]]:
    """The image with its longer side at most `max_side`, and the factors (4,) that lead xyxy in it back."""
    height, width = image.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return image, np.ones(4)
    ratio = max_side / max(height, width)
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return small, np.tile([width / size[0], height / size[1]], 2)


def hierarchies(image: Image) -> Iterator[NDArray[np.int32]]:
    """Boxes (2N - 1, 4) of each hierarchy: the N regions of a segmentation first, the whole image last."""
    # smoothed before the conversion: a hue has no mean, and one blur serves all spaces
    smooth = np.asarray(cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), SIGMA), dtype=np.uint8)
    for space in SPACES:
        converted = np.asarray(cv2.cvtColor(smooth, space), dtype=np.uint8)
        edges, weights = sorted_edges(converted)
        bins = pixel_bins(converted)
        for k in THRESHOLDS:
            labels, count = segment(edges, weights, image.shape[:2], k, SMALLEST_REGION)
            regions = describe(labels, count, bins)
            for similarity in SIMILARITIES:
                yield group(regions, similarity)[0]


def _prioritised(trees: Iterator[NDArray[np.int32]]) -> Ranked:
    """As published (sec. 4): position below the top times a number in [0, 1), here a hash of box and hierarchy."""
    boxes, priorities = [], []
    for number, tree in enumerate(trees):
        key = _mixed(box_hash(tree, number))  # a last round without a corner
        boxes.append(tree.astype(np.int64))
        priorities.append(np.arange(len(tree), 0, -1) * ((key >> np.uint64(11)).astype(np.float64) / 2.0**53))
    return np.concatenate(boxes), np.concatenate(priorities)


def box_hash(boxes: NDArray[np.integer], number: int = 0) -> NDArray[np.uint64]:
    """(R,) a hash of whole corners (R, 4) and the number: an order without preference, the same on every machine."""
    key = np.full(len(boxes), number, np.uint64)
    for corner in boxes.T.astype(np.uint64):
        key = _mixed(key ^ corner)
    return key


def _mixed(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    key = key * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: mixes upwards
    return key ^ (key >> np.uint64(32))  # and back down


def _distinct(boxes: NDArray[np.int64], priorities: Priorities) -> NDArray[np.int64]:
    """Each box once, at its first place; boxes of equal priority in the order of their corners."""
    order = np.lexsort((priorities, *boxes.T[::-1]))
    boxes, priorities = boxes[order], priorities[order]
    first = np.append(True, (boxes[1:] != boxes[:-1]).any(axis=1))[: len(boxes)]
    return boxes[first][np.argsort(priorities[first], kind="stable")]


def ximgproc() -> Any:
    """OpenCV's contributed image processing; SppnetError where another OpenCV hides it."""
    if not hasattr(cv2, "ximgproc"):
        advice = "uninstall the other opencv-* packages and install opencv-contrib-python-headless"
        raise SppnetError(f"this OpenCV has no ximgproc; {advice}")
    return cv2.ximgproc


def _opencv_boxes(image: Image) -> NDArray[np.int64]:
    """All boxes that OpenCV finds, xyxy half-open."""
    search = ximgproc().segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR))
    search.switchToSelectiveSearchFast()
    corner_and_size = np.asarray(search.process(), dtype=np.int64).reshape(-1, 4)
    return np.concatenate([corner_and_size[:, :2], corner_and_size[:, :2] + corner_and_size[:, 2:]], axis=1)
