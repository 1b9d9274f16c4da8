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

from sppnet.compiling import compiled
from sppnet.proposals.regions import COLOUR_BINS, Regions

ONE = 1 << 18  # a similarity of 1
LARGEST = 4 * ONE  # no two regions are more similar
REGION_BITS = 32  # of a heap entry, for a region; what its similarity lacks of the largest lies above


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
def _add_pair(a: int, b: int, value: int, first: Any, following: Any, ends: Any, values: Any) -> None:
    """Number the pair; its ends 2p and 2p + 1 join the chains of its regions: `first` of each, `following`, … -1."""
    values.append(value)
    for region in (a, b):
        following.append(first[region])
        first[region] = len(ends)
        ends.append(region)


@compiled(error_model="numpy")
def _choose(
    owner: int, count: int, merged: Any, first: Any, following: Any, ends: Any, values: Any, partners: Any, heap: Any
) -> None:
    """The partner of `owner`: the most similar living neighbour, of several the earliest; onto the heap with it.

    A pair belongs to its younger region, one of the `count` given regions to the smaller number. So no region gains
    pairs once it is made, and pairs came in the order of (owner, other region).
    """
    best, value, end = -1, -1, first[owner]
    while end >= 0:
        region, own = ends[end ^ 1], values[end >> 1]
        owned = not merged[region] and (region < owner if owner >= count else owner < region < count)
        if owned and (own > value or (own == value and region < best)):
            best, value = region, own
        end = following[end]
    partners[owner] = best
    if best >= 0:
        heappush(heap, ((LARGEST - value) << REGION_BITS) | owner)


@compiled(error_model="numpy")
def _merge(tree: Any, touching: Any, terms: Any, mergers: Any) -> None:
    """A heap holds the most similar pair that a region owns, the most similar first, of several the earliest region's.

    A pair whose other region has been merged is chosen again when it comes up; by then it can only be less similar.
    """
    count, total, new = mergers.shape[0] + 1, tree.sizes.shape[0], mergers.shape[0] + 1
    first, following, ends = np.full(total, -1), [0 for _ in range(0)], [0 for _ in range(0)]
    merged, partners, seen = np.zeros(total, np.bool_), np.full(total, -1), np.full(total, -1)
    values, heap = [np.int64(0) for _ in range(0)], [np.int64(0) for _ in range(0)]
    for region in range(count):
        _share(tree, region)
    for a, b in touching:
        _add_pair(a, b, _similarity(tree, a, b, terms), first, following, ends, values)
    for region in range(count):
        _choose(region, count, merged, first, following, ends, values, partners, heap)
    while len(heap) > 0:
        owner = heappop(heap) & ((1 << REGION_BITS) - 1)
        partner = partners[owner]
        if merged[owner]:
            continue
        if not merged[partner]:
            a, b = min(owner, partner), max(owner, partner)
            mergers[new - count, 0], mergers[new - count, 1] = a, b
            merged[a] = merged[b] = True
            _combine(tree, a, b, new)
            for old in (a, b):
                end = first[old]
                while end >= 0:
                    region = ends[end ^ 1]
                    if not merged[region] and seen[region] != new:
                        seen[region] = new  # the newest region that it was seen beside
                        _add_pair(region, new, _similarity(tree, region, new, terms), first, following, ends, values)
                    end = following[end]
            owner, new = new, new + 1
        _choose(owner, count, merged, first, following, ends, values, partners, heap)
