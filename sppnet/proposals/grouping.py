"""Hierarchical grouping of regions (Uijlings et al. 2013, sec. 3) in compiled loops: the two most similar neighbours
become one, again and again, until the image is one region.

Similarities are sums of colour, texture, size and fill, each a whole number of 1 / ONE. Integers make every sum exact,
so an image gives the same hierarchy on every machine; ties go to the pair that came first: of the given pairs to the
earlier one, of a new region's to that with the smallest number.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sppnet.ops.compiling import compiled
from sppnet.proposals.regions import COLOUR_BINS, Regions

ONE = 1 << 18  # a similarity of 1
LARGEST = 4 * ONE  # no two regions are more similar
PAIR_BITS = 32  # of a heap entry, for a pair; what its similarity lacks of the largest lies above


class Similarity(NamedTuple):
    """Which terms are summed (sec. 3.2)."""

    colour: bool = True
    texture: bool = True
    size: bool = True
    fill: bool = True


class _Tree(NamedTuple):
    """Per region of the hierarchy; rows of regions not made yet are free."""

    counts: Any  # (2N - 1, bins) pixels
    shares: Any  # (2N - 1, bins) the same as parts of ONE, rounded down
    sizes: Any
    boxes: Any
    channels: int
    pixels: int  # of the image


def group(regions: Regions, similarity: Similarity) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Boxes (2N - 1, 4) of all regions of the hierarchy, and the two regions (N - 1, 2) that each merger joined.

    The N given regions come first; merger m makes region N + m. The last region is the whole image.
    The regions of one image touch each other, directly or through others; N >= 1.
    """
    count = len(regions.sizes)
    used = [regions.colours] * similarity.colour + [regions.textures] * similarity.texture
    counts = np.concatenate([*used, np.zeros((count, 0), np.int32)], axis=1)
    counts, sizes, boxes = (
        np.concatenate([given, np.zeros((count - 1, *given.shape[1:]), np.int32)])
        for given in (counts, regions.sizes, regions.boxes)
    )
    channels = regions.colours.shape[1] // COLOUR_BINS
    tree = _Tree(counts, np.empty_like(counts), sizes, boxes, channels, int(regions.sizes.sum()))
    mergers = np.empty((count - 1, 2), np.int32)
    _merge(tree, regions.pairs, similarity, mergers)
    return boxes, mergers


@compiled(error_model="numpy")
def _share(tree: Any, region: int) -> None:
    factor = np.float32(ONE) / np.float32(tree.sizes[region] * tree.channels)
    counts, shares = tree.counts[region], tree.shares[region]
    for i in range(counts.shape[0]):
        shares[i] = np.int32(np.float32(counts[i]) * factor)


@compiled(error_model="numpy")
def _combine(tree: Any, a: int, b: int, new: int) -> None:
    tree.sizes[new] = tree.sizes[a] + tree.sizes[b]
    for corner in range(2):
        tree.boxes[new, corner] = min(tree.boxes[a, corner], tree.boxes[b, corner])
        tree.boxes[new, corner + 2] = max(tree.boxes[a, corner + 2], tree.boxes[b, corner + 2])
    counts, ours, theirs = tree.counts[new], tree.counts[a], tree.counts[b]
    for i in range(counts.shape[0]):
        counts[i] = ours[i] + theirs[i]
    _share(tree, new)


@compiled(error_model="numpy")
def _similarity(tree: Any, a: int, b: int, terms: Any) -> Any:
    """Sum of the terms in 1 / ONE: what histograms have in common, 1 - size of both, 1 - what fills the common box."""
    ours, theirs, common = tree.shares[a], tree.shares[b], np.int32(0)
    for i in range(ours.shape[0]):
        common = np.int32(common + min(ours[i], theirs[i]))
    value, both = np.int64(common), np.int64(tree.sizes[a]) + np.int64(tree.sizes[b])
    if terms.size:
        value += ONE - both * ONE // tree.pixels
    if terms.fill:
        width = max(tree.boxes[a, 2], tree.boxes[b, 2]) - min(tree.boxes[a, 0], tree.boxes[b, 0])
        height = max(tree.boxes[a, 3], tree.boxes[b, 3]) - min(tree.boxes[a, 1], tree.boxes[b, 1])
        value += ONE - (np.int64(width) * np.int64(height) - both) * ONE // tree.pixels
    return value


@compiled(error_model="numpy")
def _add_pair(tree: Any, a: int, b: int, terms: Any, first: Any, following: Any, ends: Any, heap: Any) -> None:
    """Number the pair; its ends 2p and 2p + 1 join the chains of its regions: `first` of each, `following`, … -1."""
    heappush(heap, ((LARGEST - _similarity(tree, a, b, terms)) << PAIR_BITS) | (len(ends) >> 1))
    for region in (a, b):
        following.append(first[region])
        first[region] = len(ends)
        ends.append(region)


@compiled(error_model="numpy")
def _merge(tree: Any, touching: Any, terms: Any, mergers: Any) -> None:
    """A heap holds all pairs, the most similar first, of several the earliest; those of merged regions are passed."""
    count, total, new = mergers.shape[0] + 1, tree.sizes.shape[0], mergers.shape[0] + 1
    first, following, ends = np.full(total, -1), [0 for _ in range(0)], [0 for _ in range(0)]
    merged, seen, heap = np.zeros(total, np.bool_), np.full(total, -1), [np.int64(0) for _ in range(0)]
    for region in range(count):
        _share(tree, region)
    for a, b in touching:
        _add_pair(tree, a, b, terms, first, following, ends, heap)
    while len(heap) > 0:
        pair = heappop(heap) & ((1 << PAIR_BITS) - 1)
        a, b = ends[2 * pair], ends[2 * pair + 1]
        if merged[a] or merged[b]:
            continue
        mergers[new - count, 0], mergers[new - count, 1] = a, b
        merged[a] = merged[b] = True
        _combine(tree, a, b, new)
        beside = [0 for _ in range(0)]
        for old in (a, b):
            end = first[old]
            while end >= 0:
                region = ends[end ^ 1]
                if not merged[region] and seen[region] != new:
                    seen[region] = new  # the newest region that it was seen beside
                    beside.append(region)
                end = following[end]
        for region in sorted(beside):
            _add_pair(tree, region, new, terms, first, following, ends, heap)
        new += 1
