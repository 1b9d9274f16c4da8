"""Hierarchical grouping of regions (Uijlings et al. 2013, sec. 3): the two most similar neighbours become one, again
and again, until the image is one region. Compiled loops; ``segmentation`` says why numba has a door here.

Similarities are sums of colour, texture, size and fill, each a whole number of 1 / ONE. Integers make every sum exact,
so an image gives the same hierarchy on every machine; ties go to the pair that came first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sppnet.compiling import compiled
from sppnet.detection.regions import COLOUR_BINS, Regions

ONE = 1 << 18  # a similarity of 1
PAIR_BITS = 42  # of a heap entry, for the number of the pair; the similarity, at most 4 · ONE, lies above


@dataclass(frozen=True)
class Similarity:
    """Which terms are summed (sec. 3.2)."""

    colour: bool = True
    texture: bool = True
    size: bool = True
    fill: bool = True


def group(regions: Regions, similarity: Similarity) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Boxes (2N - 1, 4) of all regions of the hierarchy, and the two regions (N - 1, 2) that each merger joined.

    The N given regions come first; merger m makes region N + m. The last region is the whole image.
    The regions of one image touch each other, directly or through others; N >= 1.
    """
    count = len(regions.sizes)
    total = 2 * count - 1
    channels = regions.colours.shape[1] // COLOUR_BINS
    used = [regions.colours] * similarity.colour + [regions.textures] * similarity.texture
    counts = np.zeros((total, sum(part.shape[1] for part in used)), np.int32)
    counts[:count] = np.concatenate([*used, np.zeros((count, 0), np.int32)], axis=1)
    sizes, boxes = np.zeros(total, np.int32), np.zeros((total, 4), np.int32)
    sizes[:count], boxes[:count] = regions.sizes, regions.boxes
    tree = _Tree(counts, np.empty_like(counts), sizes, boxes)
    terms = _Terms(channels, int(regions.sizes.sum()), similarity.size, similarity.fill)
    mergers = np.empty((count - 1, 2), np.int32)
    _merge(tree, _chains(regions.pairs, total), regions.pairs, terms, mergers)
    return boxes, mergers


class _Tree(NamedTuple):
    """Per region of the hierarchy; rows of regions not made yet are free."""

    counts: Any  # (2N - 1, bins) pixels
    shares: Any  # (2N - 1, bins) the same as parts of ONE, rounded down
    sizes: Any
    boxes: Any


class _Chains(NamedTuple):
    """The neighbours of each region: a chain of links. A link may name a region that has been merged since."""

    first: Any  # (2N - 1,) link of a region, -1 = none
    last: Any
    following: Any  # (2P,) link after a link, -1 = none
    neighbour: Any  # (2P,) the region that a link names
    merged_into: Any  # (2N - 1,) itself while the region lives


class _Terms(NamedTuple):
    channels: int
    image_pixels: int
    size: bool
    fill: bool


def _chains(pairs: NDArray[np.int32], total: int) -> _Chains:
    none, links = np.full(total, -1, np.int32), 2 * len(pairs)
    numbers = np.arange(total, dtype=np.int32)
    chains = _Chains(none, none.copy(), np.full(links, -1, np.int32), np.empty(links, np.int32), numbers)
    _link(pairs, chains)
    return chains


@compiled(error_model="numpy")
def _link(pairs: Any, chains: Any) -> None:
    for link in range(chains.neighbour.shape[0]):
        region = pairs[link >> 1, link & 1]
        chains.neighbour[link] = pairs[link >> 1, 1 - (link & 1)]
        if chains.first[region] < 0:
            chains.first[region] = link
        else:
            chains.following[chains.last[region]] = link
        chains.last[region] = link


@compiled(error_model="numpy")
def _living(merged_into: Any, region: int) -> int:
    """The region that this one is part of by now; halves the path to it."""
    while merged_into[region] != region:
        merged_into[region] = merged_into[merged_into[region]]
        region = merged_into[region]
    return region


@compiled(error_model="numpy")
def _neighbours(a: int, b: int, new: int, chains: Any, seen: Any, found: Any) -> int:
    """Make the chains of a and b that of `new`, every neighbour once; the neighbours, unordered, and their number."""
    chains.following[chains.last[a]] = chains.first[b]
    count, end, link = 0, -1, chains.first[a]
    while link >= 0:
        region = _living(chains.merged_into, chains.neighbour[link])
        if region != new and seen[region] != new:
            seen[region] = new
            found[count] = region
            count += 1
            if end < 0:
                chains.first[new] = link
            else:
                chains.following[end] = link
            end = link
        link = chains.following[link]
    if end >= 0:
        chains.following[end] = -1
    chains.last[new] = end
    return count


@compiled(error_model="numpy")
def _share(tree: Any, region: int, channels: int) -> None:
    factor = np.float32(ONE) / np.float32(tree.sizes[region] * channels)
    counts, shares = tree.counts[region], tree.shares[region]
    for i in range(counts.shape[0]):
        shares[i] = np.int32(np.float32(counts[i]) * factor)


@compiled(error_model="numpy")
def _combine(tree: Any, a: int, b: int, new: int, channels: int) -> None:
    tree.sizes[new] = tree.sizes[a] + tree.sizes[b]
    for corner in range(2):
        tree.boxes[new, corner] = min(tree.boxes[a, corner], tree.boxes[b, corner])
        tree.boxes[new, corner + 2] = max(tree.boxes[a, corner + 2], tree.boxes[b, corner + 2])
    counts, ours, theirs = tree.counts[new], tree.counts[a], tree.counts[b]
    for i in range(counts.shape[0]):
        counts[i] = ours[i] + theirs[i]
    _share(tree, new, channels)


@compiled(error_model="numpy")
def _similarity(tree: Any, a: int, b: int, terms: Any) -> Any:
    """Sum of the terms in 1 / ONE: intersection of histograms, 1 - size of both, 1 - what fills the common box."""
    ours, theirs, common = tree.shares[a], tree.shares[b], np.int32(0)
    for i in range(ours.shape[0]):
        common = np.int32(common + min(ours[i], theirs[i]))
    value, both = np.int64(common), np.int64(tree.sizes[a]) + np.int64(tree.sizes[b])
    if terms.size:
        value += ONE - both * ONE // terms.image_pixels
    if terms.fill:
        width = max(tree.boxes[a, 2], tree.boxes[b, 2]) - min(tree.boxes[a, 0], tree.boxes[b, 0])
        height = max(tree.boxes[a, 3], tree.boxes[b, 3]) - min(tree.boxes[a, 1], tree.boxes[b, 1])
        value += ONE - (np.int64(width) * np.int64(height) - both) * ONE // terms.image_pixels
    return value


@compiled(error_model="numpy")
def _with_room(array: Any, length: int) -> Any:
    if length <= len(array):
        return array
    larger = np.empty(2 * length, array.dtype)
    larger[: len(array)] = array
    return larger


@compiled(error_model="numpy")
def _push(heap: Any, length: int, entry: int) -> None:
    place = length
    while place > 0 and heap[(place - 1) >> 1] < entry:
        heap[place] = heap[(place - 1) >> 1]
        place = (place - 1) >> 1
    heap[place] = entry


@compiled(error_model="numpy")
def _pop(heap: Any, length: int) -> int:
    """The largest entry; the last one sinks into its place."""
    top, entry, place, child = heap[0], heap[length - 1], 0, 1
    while child < length - 1:
        if child + 1 < length - 1 and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= entry:
            break
        heap[place] = heap[child]
        place, child = child, 2 * child + 1
    heap[place] = entry
    return top


@compiled(error_model="numpy")
def _merge(tree: Any, chains: Any, pairs: Any, terms: Any, mergers: Any) -> None:
    """A heap holds all pairs that ever touched: similarity above, below it the number of the pair, earlier ones larger.

    Entries of regions that live no more are skipped when they come up.
    """
    count, latest = mergers.shape[0] + 1, (1 << PAIR_BITS) - 1
    seen, near = np.full(tree.sizes.shape[0], -1, np.int32), np.empty(count, np.int32)
    firsts, seconds = pairs[:, 0].copy(), pairs[:, 1].copy()
    heap, length, known, new = np.empty(len(pairs), np.int64), 0, 0, count
    for region in range(count):
        _share(tree, region, terms.channels)
    for known in range(len(pairs)):
        value = _similarity(tree, firsts[known], seconds[known], terms)
        _push(heap, length, (value << PAIR_BITS) | (latest - known))
        length += 1
    known = len(pairs)
    while length > 0:
        pair = latest - (_pop(heap, length) & latest)
        length -= 1
        a, b = firsts[pair], seconds[pair]
        if chains.merged_into[a] != a or chains.merged_into[b] != b:
            continue
        mergers[new - count, 0], mergers[new - count, 1] = a, b
        chains.merged_into[a] = chains.merged_into[b] = new
        _combine(tree, a, b, new, terms.channels)
        degree = _neighbours(a, b, new, chains, seen, near)
        firsts, seconds = _with_room(firsts, known + degree), _with_room(seconds, known + degree)
        heap = _with_room(heap, length + degree)
        for region in np.sort(near[:degree]):
            firsts[known], seconds[known] = region, new
            value = _similarity(tree, region, new, terms)
            _push(heap, length, (value << PAIR_BITS) | (latest - known))
            known, length = known + 1, length + 1
        new += 1
