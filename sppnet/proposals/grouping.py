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
LARGEST = 4 * ONE  # beyond what any two regions have in common
NONE = -1  # instead of a region
GONE = -1  # instead of what two regions have in common
REGION_BITS = 32  # of a heap entry, for a region; what its similarity lacks of the largest lies above


class Similarity(NamedTuple):
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
    used = [regions.colours] * similarity.colour + [regions.textures] * similarity.texture
    counts = np.concatenate([*used, np.zeros((count, 0), np.int32)], axis=1)
    counts, sizes, boxes = (
        np.concatenate([given, np.zeros((count - 1, *given.shape[1:]), np.int32)])
        for given in (counts, regions.sizes, regions.boxes)
    )
    channels = regions.colours.shape[1] // COLOUR_BINS
    tree = _Tree(counts, np.empty_like(counts), sizes, boxes, channels, int(regions.sizes.sum()))
    mergers = np.empty((count - 1, 2), np.int32)
    _merge(tree, _contacts(regions.pairs, 2 * count - 1), similarity, mergers)
    return boxes, mergers


class _Tree(NamedTuple):
    """Per region of the hierarchy; rows of regions not made yet are free."""

    counts: Any  # (2N - 1, bins) pixels
    shares: Any  # (2N - 1, bins) the same as parts of ONE, rounded down
    sizes: Any
    boxes: Any
    channels: int
    pixels: int  # of the image


class _Contacts(NamedTuple):
    """P pairs of neighbours, and per region the chain of links to its own; a link may name a region merged since.

    Links 2p and 2p + 1 are the two ends of contact p, in the chains of the regions on either side.
    """

    first: Any  # (2N - 1,) link of a region, -1 = none
    last: Any
    following: Any  # (2P,) link after a link, -1 = none
    neighbour: Any  # (2P,) the region that a link names
    merged_into: Any  # (2N - 1,) itself while the region lives
    common: Any  # (P,) what the histograms of both sides have in common, or more; GONE: another contact says it
    exact: Any  # (P,) whether it is not more


class _Near(NamedTuple):
    """Neighbours of one region, in any order."""

    regions: Any  # (N,)
    contacts: Any
    values: Any  # similarities, or more where the contact is not exact
    place: Any  # (2N - 1,) of a region among these
    seen: Any  # (2N - 1,) the newest region that a region was seen beside


def _contacts(pairs: NDArray[np.int32], total: int) -> _Contacts:
    first, following = np.full(total, -1, np.int32), np.full(pairs.size, -1, np.int32)
    last = first.copy()
    _link(pairs.ravel(), first, last, following)
    common, exact = np.full(len(pairs), LARGEST, np.int32), np.zeros(len(pairs), np.bool_)
    merged_into = np.arange(total, dtype=np.int32)
    return _Contacts(first, last, following, pairs[:, ::-1].ravel(), merged_into, common, exact)


@compiled(error_model="numpy")
def _link(regions: Any, first: Any, last: Any, following: Any) -> None:
    for link in range(regions.shape[0]):
        region = regions[link]
        if first[region] < 0:
            first[region] = link
        else:
            following[last[region]] = link
        last[region] = link


@compiled(error_model="numpy")
def _living(merged_into: Any, region: int) -> int:
    """The region that this one is part of by now; halves the path to it."""
    while merged_into[region] != region:
        merged_into[region] = merged_into[merged_into[region]]
        region = merged_into[region]
    return region


@compiled(error_model="numpy")
def _neighbours(a: int, b: int, new: int, growth: Any, contacts: Any, near: Any) -> int:
    """Make the chains of a and b that of `new`, every neighbour once; the neighbours, unordered, and their number.

    What a neighbour has in common with `new` is at most what it had with a, or with b, and the `growth` of these.
    """
    contacts.following[contacts.last[a]] = contacts.first[b]
    count, end, link, side, last_of_a = 0, -1, contacts.first[a], 0, contacts.last[a]
    while link >= 0:
        contact = link >> 1
        region = _living(contacts.merged_into, contacts.neighbour[link])
        if region != new and contacts.common[contact] != GONE:
            bound = min(contacts.common[contact] + growth[side], LARGEST)
            if near.seen[region] != new:
                near.seen[region], near.place[region] = new, count
                near.regions[count], near.contacts[count] = region, contact
                contacts.common[contact], contacts.exact[contact] = bound, False
                count += 1
                if end < 0:
                    contacts.first[new] = link
                else:
                    contacts.following[end] = link
                end = link
            else:
                kept = near.contacts[near.place[region]]
                contacts.common[kept] = min(contacts.common[kept], bound)
                contacts.common[contact] = GONE
        if link == last_of_a:
            side = 1
        link = contacts.following[link]
    if end >= 0:
        contacts.following[end] = -1
    contacts.last[new] = end
    return count


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
def _intersection(tree: Any, a: int, b: int) -> Any:
    """What the histograms of two regions have in common, colour and texture together, in 1 / ONE."""
    ours, theirs, common = tree.shares[a], tree.shares[b], np.int32(0)
    for i in range(ours.shape[0]):
        common = np.int32(common + min(ours[i], theirs[i]))
    return common


@compiled(error_model="numpy")
def _growth(tree: Any, old: int, new: int) -> Any:
    """How much more any region can have in common with `new` than with `old`, a part of it."""
    ours, theirs, more = tree.shares[old], tree.shares[new], np.int32(0)
    for i in range(ours.shape[0]):
        more = np.int32(more + max(theirs[i] - ours[i], np.int32(0)))
    return more


@compiled(error_model="numpy")
def _similarity(tree: Any, a: int, b: int, common: Any, terms: Any) -> Any:
    """Sum of the terms in 1 / ONE: what is common, 1 - size of both, 1 - what fills the common box."""
    value, both = np.int64(common), np.int64(tree.sizes[a]) + np.int64(tree.sizes[b])
    if terms.size:
        value += ONE - both * ONE // tree.pixels
    if terms.fill:
        width = max(tree.boxes[a, 2], tree.boxes[b, 2]) - min(tree.boxes[a, 0], tree.boxes[b, 0])
        height = max(tree.boxes[a, 3], tree.boxes[b, 3]) - min(tree.boxes[a, 1], tree.boxes[b, 1])
        value += ONE - (np.int64(width) * np.int64(height) - both) * ONE // tree.pixels
    return value


@compiled(error_model="numpy")
def _owned(owner: int, count: int, contacts: Any, near: Any) -> int:
    """The living neighbours with which a region owns the pair, and their number; `count` regions were given.

    A pair belongs to its younger region, one of two given regions to the smaller number. So no region gains pairs once
    it is made, and pairs came in the order of (owner, other region).
    """
    found, link = 0, contacts.first[owner]
    while link >= 0:
        region = _living(contacts.merged_into, contacts.neighbour[link])
        if region < owner if owner >= count else owner < region < count:
            near.regions[found], near.contacts[found] = region, link >> 1
            found += 1
        link = contacts.following[link]
    return found


@compiled(error_model="numpy")
def _choose(tree: Any, owner: int, degree: int, near: Any, contacts: Any, terms: Any, partners: Any, heap: Any) -> None:
    """The partner of `owner`: the most similar of `degree` neighbours, of several the earliest; onto the heap with it.

    What two have in common is computed only where the bound reaches the best so far; the highest bound comes first.
    """
    first, best, value = 0, NONE, np.int64(-1)
    for k in range(degree):
        near.values[k] = _similarity(tree, owner, near.regions[k], contacts.common[near.contacts[k]], terms)
        if near.values[k] > near.values[first]:
            first = k
    for turn in range(degree + 1 if degree else 0):
        k = first if turn == 0 else turn - 1
        if near.values[k] < value:
            continue
        region, contact = near.regions[k], near.contacts[k]
        if not contacts.exact[contact]:
            contacts.common[contact], contacts.exact[contact] = _intersection(tree, owner, region), True
            near.values[k] = _similarity(tree, owner, region, contacts.common[contact], terms)
        if near.values[k] > value or (near.values[k] == value and region < best):
            best, value = region, near.values[k]
    partners[owner] = best
    if best != NONE:
        heappush(heap, ((LARGEST - value) << REGION_BITS) | owner)


@compiled(error_model="numpy")
def _merge(tree: Any, contacts: Any, terms: Any, mergers: Any) -> None:
    """A heap holds the most similar pair that a region owns, the most similar first, of several the earliest region's.

    A pair whose other region has been merged is chosen again when it comes up; by then it can only be less similar.
    """
    count, total, new = mergers.shape[0] + 1, tree.sizes.shape[0], mergers.shape[0] + 1
    place, seen = np.empty(total, np.int32), np.full(total, NONE, np.int32)
    near = _Near(np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, np.int64), place, seen)
    partners, growth = np.full(total, NONE, np.int32), np.zeros(2, np.int32)
    heap = [np.int64(0) for _ in range(0)]
    for region in range(count):
        _share(tree, region)
    for region in range(count):
        _choose(tree, region, _owned(region, count, contacts, near), near, contacts, terms, partners, heap)
    while len(heap) > 0:
        owner = heappop(heap) & ((1 << REGION_BITS) - 1)
        if contacts.merged_into[owner] != owner:
            continue
        partner = partners[owner]
        if contacts.merged_into[partner] == partner:
            a, b = min(owner, partner), max(owner, partner)
            mergers[new - count, 0], mergers[new - count, 1] = a, b
            contacts.merged_into[a] = contacts.merged_into[b] = new
            _combine(tree, a, b, new)
            growth[0], growth[1] = _growth(tree, a, new), _growth(tree, b, new)
            owner, degree = new, _neighbours(a, b, new, growth, contacts, near)
            new += 1
        else:
            degree = _owned(owner, count, contacts, near)
        _choose(tree, owner, degree, near, contacts, terms, partners, heap)
