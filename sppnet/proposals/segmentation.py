"""Graph-based segmentation of an image (Felzenszwalb & Huttenlocher 2004) in compiled loops over its pixels.

A pixel is joined to its right and its lower neighbour; an edge weighs the Euclidean distance of the two colours.
Edges are visited by weight: two regions become one where the edge is no heavier than what either holds together
inside, plus k / its pixels. Weights are counted in steps of 1 / STEPS, and edges of equal weight keep the order of the
pixels. Both make the result one and the same on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppnet.ops.compiling import compiled

STEPS = 16  # weights are whole numbers of 1 / STEPS grey levels
NO_EDGE = 65535  # beyond every weight: sqrt(3) · 255 · STEPS = 7066


def sorted_edges(image: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """Edges of the pixel grid by weight: (E,) edge numbers and (E,) weights in steps of 1 / STEPS.

    image: C-contiguous (H, W, C) uint8. Edge 2p leads from pixel p = y · W + x to its right neighbour, edge 2p + 1 to
    the lower one; E = H (W - 1) + (H - 1) W.
    """
    height, width = image.shape[:2]
    weights = np.full(2 * height * width, NO_EDGE, np.uint16)
    _weigh(image, weights)
    edges = np.argsort(weights, kind="stable")[: 2 * height * width - height - width].astype(np.int32)
    return edges, weights[edges]


def segment(
    edges: NDArray[np.int32], weights: NDArray[np.uint16], size: tuple[int, int], k: float, min_size: int
) -> tuple[NDArray[np.int32], int]:
    """Region of every pixel (H, W) int32, numbered 0 … N - 1 by their first pixel, and N.

    edges and weights from `sorted_edges`; size (height, width). Regions below `min_size` pixels are joined
    with a neighbour along their lightest edges afterwards, as in the authors' program.
    """
    # A pixel's parent in the tree of its region; at a root, minus the region's pixels. One array instead of two: large
    # images do not fit the caches.
    parents = np.full(size[0] * size[1], -1, np.int32)
    _join(edges, weights, size[1], np.float32(k * STEPS), min_size, parents)
    labels = np.full(len(parents), -1, np.int32)
    return labels.reshape(size), _number(parents, labels)


@compiled(error_model="numpy")
def _weigh(image: Any, weights: Any) -> None:
    height, width, channels = image.shape
    for y in range(height):
        for x in range(width):
            for lower in range(2):
                v, u = y + lower, x + 1 - lower
                if v < height and u < width:
                    squares: Any = 0
                    for c in range(channels):
                        difference = np.int32(image[y, x, c]) - np.int32(image[v, u, c])
                        squares += difference * difference
                    weights[2 * (y * width + x) + lower] = np.int32(np.sqrt(np.float32(squares)) * np.float32(STEPS))


@compiled(error_model="numpy")
def _root(parents: Any, pixel: int) -> int:
    """The pixel that stands for the region; halves the path to it."""
    above = parents[pixel]
    while above >= 0:
        higher = parents[above]
        if higher < 0:
            return above
        parents[pixel] = higher
        pixel, above = higher, parents[higher]
    return pixel


@compiled(error_model="numpy")
def _ends(edge: int, width: int, parents: Any) -> tuple[int, int]:
    """The regions at the two ends of an edge."""
    pixel = edge >> 1
    return _root(parents, pixel), _root(parents, pixel + (width if edge & 1 else 1))


@compiled(error_model="numpy")
def _unite(a: int, b: int, parents: Any) -> int:
    """Make two regions one, under the root of the larger (a, where they are equal)."""
    if parents[a] > parents[b]:
        a, b = b, a
    parents[a] += parents[b]
    parents[b] = a
    return a


@compiled(error_model="numpy")
def _join(edges: Any, weights: Any, width: int, k: float, min_size: int, parents: Any) -> None:
    bounds = np.full(parents.shape[0], k, np.float32)  # a region's heaviest inner edge + k / its pixels
    left = np.empty(edges.shape[0], np.int32)  # edges between two regions
    count = 0
    for i in range(edges.shape[0]):
        a, b = _ends(edges[i], width, parents)
        weight = np.float32(weights[i])
        if a != b and weight <= bounds[a] and weight <= bounds[b]:
            joined = _unite(a, b, parents)
            bounds[joined] = weight + k / np.float32(-parents[joined])
        elif a != b:
            left[count] = edges[i]
            count += 1
    for edge in left[:count]:
        a, b = _ends(edge, width, parents)
        if a != b and -max(parents[a], parents[b]) < min_size:
            _unite(a, b, parents)


@compiled(error_model="numpy")
def _number(parents: Any, labels: Any) -> int:
    count = 0
    for pixel in range(parents.shape[0]):
        root = _root(parents, pixel)
        if labels[root] < 0:
            labels[root] = count
            count += 1
        labels[pixel] = labels[root]
    return count
