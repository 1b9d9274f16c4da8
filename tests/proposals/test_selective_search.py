"""Segmentation, grouping and windows of selective search, each against a naive loop."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from refusals import refused_here
from scenes import OBJECTS, scene

from sppnet.config import ProposalSettings
from sppnet.data.selection import restrict
from sppnet.data.splits import load_splits
from sppnet.evaluation.proposals import proposal_recall
from sppnet.images import read_image
from sppnet.proposals.files import match_records
from sppnet.proposals.grouping import ONE, Similarity, group
from sppnet.proposals.regions import Regions, describe, pixel_bins
from sppnet.proposals.segmentation import STEPS, segment, sorted_edges
from sppnet.proposals.selective_search import hierarchies, selective_search, shrunk
from sppnet.records import pairwise_iou

ALL = Similarity()
SETS = [
    *(Similarity(), Similarity(colour=False), Similarity(texture=False, fill=False)),
    *(Similarity(False, False, size=False), Similarity(False, False, fill=False)),
]


def noise(height: int, width: int, seed: int, grey_levels: int = 6, channels: int = 3) -> NDArray[np.uint8]:
    """Coarse noise, full of equal edges."""
    values = np.random.default_rng(seed).integers(0, grey_levels, (height, width, channels))
    return (values * (255 // grey_levels)).astype(np.uint8)


def labelled(image: NDArray[np.uint8], k: float = 60, min_size: int = 2) -> tuple[NDArray[np.int32], int]:
    return segment(*sorted_edges(image), image.shape[:2], k, min_size)


def regions_of(image: NDArray[np.uint8], k: float = 60, min_size: int = 2) -> Regions:
    return describe(*labelled(image, k, min_size), pixel_bins(image))


# segmentation


def naive_edges(image: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """(weight, edge) in order, by comparison."""
    height, width = image.shape[:2]
    edges = []
    for y in range(height):
        for x in range(width):
            for direction, (v, u) in enumerate(((y, x + 1), (y + 1, x))):
                if v < height and u < width:
                    difference = image[y, x].astype(int) - image[v, u].astype(int)
                    distance = np.sqrt(np.float32((difference**2).sum()))
                    edges.append((int(distance * np.float32(STEPS)), 2 * (y * width + x) + direction))
    return sorted(edges)


def naive_segment(image: NDArray[np.uint8], k: float, min_size: int) -> NDArray[np.int64]:
    """Felzenszwalb & Huttenlocher's rule with a set of pixels per region."""
    height, width = image.shape[:2]
    members = {pixel: {pixel} for pixel in range(height * width)}
    region, inner = {pixel: pixel for pixel in members}, dict.fromkeys(members, np.float32(k * STEPS))

    def join(a: int, b: int) -> int:
        for pixel in members[b]:
            region[pixel] = a
        members[a] |= members.pop(b)
        return a

    ends = [(w, e // 2, e // 2 + (width if e % 2 else 1)) for w, e in naive_edges(image)]
    for weight, p, q in ends:
        a, b = region[p], region[q]
        if a != b and weight <= min(inner[a], inner[b]):
            a = join(a, b)
            inner[a] = np.float32(weight) + np.float32(k * STEPS) / np.float32(len(members[a]))
    for _, p, q in ends:
        a, b = region[p], region[q]
        if a != b and min(len(members[a]), len(members[b])) < min_size:
            join(a, b)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(region[p], len(numbers)) for p in range(height * width)]).reshape(height, width)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (5, 6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_edges_come_in_the_order_of_a_comparison_sort(size: tuple[int, int], channels: int) -> None:
    image = noise(*size, seed=3, channels=channels)
    edges, weights = sorted_edges(image)
    assert list(zip(weights.tolist(), edges.tolist(), strict=True)) == naive_edges(image)


def test_the_largest_weight_fits() -> None:
    image = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    assert sorted_edges(image)[1].tolist() == [int(np.sqrt(3 * 255**2) * STEPS)]


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([5.0, 60.0, 400.0]), st.integers(1, 9)
)
def test_segments_are_those_of_sets_joined_one_by_one(h: int, w: int, seed: int, k: float, min_size: int) -> None:
    image = noise(h, w, seed)
    labels, count = labelled(image, k, min_size)
    expected = naive_segment(image, k, min_size)
    np.testing.assert_array_equal(labels, expected)
    assert count == expected.max() + 1


def test_every_segment_is_connected_and_none_is_too_small() -> None:
    labels, count = labelled(noise(40, 50, 1), k=100, min_size=12)
    assert count > 5
    for region in range(count):
        pieces, _ = cv2.connectedComponents((labels == region).astype(np.uint8), connectivity=4)
        assert pieces == 2  # the region and the rest
        assert (labels == region).sum() >= 12


def test_flat_objects_are_single_segments() -> None:
    labels, _ = labelled(scene(), k=300, min_size=50)
    flat = [labels[y1:y2, x1:x2] for x1, y1, x2, y2 in OBJECTS[1:]]
    for inside in (flat[0][:80], flat[1]):
        assert len(np.unique(inside)) == 1


# regions


def test_bins_count_colours_and_gradients_as_a_loop_does() -> None:
    image = np.random.default_rng(4).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    bins = pixel_bins(image)
    for y, x, c in np.ndindex(image.shape):
        assert bins[y, x, c] == c * 25 + int(image[y, x, c]) * 25 // 256
        dx = int(image[y, min(x + 1, 6), c]) - int(image[y, max(x - 1, 0), c])
        dy = int(image[min(y + 1, 5), x, c]) - int(image[max(y - 1, 0), x, c])
        dx, dy = (max(-64, min(64, d)) for d in (dx, dy))
        angle = np.degrees(np.arctan2(dy, dx)) % 360
        magnitude = min(int(np.hypot(dx, dy) / 6.4), 9)
        assert bins[y, x, 3 + c] == c * 80 + int((angle + 22.5) % 360 // 45) * 10 + magnitude


def test_regions_hold_what_their_pixels_hold() -> None:
    image = noise(12, 15, 2)
    (labels, count), bins = labelled(image), pixel_bins(image)
    regions = describe(labels, count, bins)
    for r in range(count):
        ys, xs = np.nonzero(labels == r)
        assert regions.sizes[r] == len(ys)
        assert regions.boxes[r].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        inside = bins[labels == r].astype(int)
        np.testing.assert_array_equal(regions.colours[r], np.bincount(inside[:, :3].ravel(), minlength=75))
        np.testing.assert_array_equal(regions.textures[r], np.bincount(inside[:, 3:].ravel(), minlength=240))
    assert regions.pairs.tolist() == naive_pairs(labels)


def naive_pairs(labels: NDArray[np.int32]) -> list[list[int]]:
    pairs = set()
    for a, b in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        pairs |= {(min(p), max(p)) for p in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True) if p[0] != p[1]}
    return [list(pair) for pair in sorted(pairs)]


# grouping


def naive_similarity(regions: Regions, a: set[int], b: set[int], terms: Similarity) -> int:
    """From the leaves below both, in whole numbers."""
    whole, value = int(regions.sizes.sum()), 0
    members = [sorted(a), sorted(b)]
    sizes = [int(regions.sizes[m].sum()) for m in members]
    for used, counts in ((terms.colour, regions.colours), (terms.texture, regions.textures)):
        if used:
            channels = regions.colours.shape[1] // 25
            factors = [np.float32(ONE) / np.float32(size * channels) for size in sizes]
            shares = [
                (counts[m].sum(axis=0).astype(np.float32) * factor).astype(np.int64)
                for m, factor in zip(members, factors, strict=True)
            ]
            value += int(np.minimum(*shares).sum())
    if terms.size:
        value += ONE - sum(sizes) * ONE // whole
    if terms.fill:
        boxes = regions.boxes[members[0] + members[1]]
        x1, y1, x2, y2 = *boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()
        value += ONE - ((x2 - x1) * (y2 - y1) - sum(sizes)) * ONE // whole
    return value


def naive_group(regions: Regions, terms: Similarity) -> list[list[int]]:
    """Look at every pair again before every merger; of equal pairs, the one that came first."""
    leaves = {r: {r} for r in range(len(regions.sizes))}
    touching = {(int(a), int(b)): place for place, (a, b) in enumerate(regions.pairs)}
    mergers: list[list[int]] = []
    while touching:
        best = max(touching, key=lambda p: (naive_similarity(regions, leaves[p[0]], leaves[p[1]], terms), -touching[p]))
        new = len(regions.sizes) + len(mergers)
        leaves[new] = leaves[best[0]] | leaves[best[1]]
        near = sorted({c for pair in touching if set(pair) & set(best) for c in pair} - set(best))
        touching = {pair: place for pair, place in touching.items() if not set(pair) & set(best)}
        start = max(touching.values(), default=0) + len(regions.pairs) + 1000 * new
        touching |= {(c, new): start + i for i, c in enumerate(near)}
        mergers.append(list(best))
    return mergers


@pytest.mark.parametrize("terms", SETS)
@pytest.mark.parametrize("seed", range(6))
def test_mergers_are_those_of_a_search_through_all_pairs(terms: Similarity, seed: int) -> None:
    regions = regions_of(noise(9 + seed, 14 - seed, seed, channels=3), k=40 + 10 * seed, min_size=1 + seed % 3)
    assert len(regions.sizes) > 8
    boxes, mergers = group(regions, terms)
    assert mergers.tolist() == naive_group(regions, terms)
    assert len(boxes) == 2 * len(regions.sizes) - 1


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
    k=st.sampled_from([1, 60, 400]),
    min_size=st.integers(1, 6),
    terms=st.sampled_from(SETS),
)
def test_mergers_of_few_regions_are_those_of_a_search_too(
    size: tuple[int, int], channels: int, seed: int, k: int, min_size: int, terms: Similarity
) -> None:
    regions = regions_of(noise(*size, seed, channels=channels), k=k, min_size=min_size)
    assert group(regions, terms)[1].tolist() == naive_group(regions, terms)


@pytest.mark.parametrize("terms", SETS)
def test_a_background_with_many_neighbours_is_grouped_as_by_a_search_through_all_pairs(terms: Similarity) -> None:
    rng = np.random.default_rng(3)
    image = np.full((26, 26, 3), 90, np.uint8)
    for y, x in itertools.product(range(1, 25, 4), repeat=2):
        image[y : y + 2, x : x + 2] = rng.integers(0, 256, 3)
        image[y, x + 2] = rng.integers(0, 256, 3)  # a neighbour of its own beside each speck
    regions = regions_of(image, k=1, min_size=1)
    degrees = np.bincount(regions.pairs.ravel())
    assert len(degrees) > 70
    assert degrees.max() > 70
    assert group(regions, terms)[1].tolist() == naive_group(regions, terms)


def test_equal_regions_merge_in_the_order_of_their_pairs() -> None:
    checks = np.kron(np.indices((4, 5)).sum(axis=0) % 2, np.ones((3, 3))).astype(np.uint8)[..., None] * 200
    regions = regions_of(np.repeat(checks, 3, axis=2), k=1, min_size=1)
    assert len(regions.sizes) == 20
    assert group(regions, ALL)[1].tolist() == naive_group(regions, ALL)


def test_a_hierarchy_ends_with_the_whole_image_and_boxes_enclose_what_was_merged() -> None:
    boxes, mergers = group(regions_of(noise(30, 40, 5)), ALL)
    assert boxes[-1].tolist() == [0, 0, 40, 30]
    made = boxes[len(boxes) - len(mergers) :]
    np.testing.assert_array_equal(made[:, :2], boxes[mergers, :2].min(axis=1))
    np.testing.assert_array_equal(made[:, 2:], boxes[mergers, 2:].max(axis=1))
    assert sorted(mergers.ravel().tolist()) == list(range(len(boxes) - 1))  # every region but the last, once


def test_one_region_is_its_own_hierarchy() -> None:
    boxes, mergers = group(regions_of(np.full((4, 6, 3), 7, np.uint8)), ALL)
    assert boxes.tolist() == [[0, 0, 6, 4]]
    assert mergers.shape == (0, 2)


def halves(left: int, right: int) -> Regions:
    """Two regions of one colour each, without texture."""
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, :4], image[:, 4:] = left, right
    bins = np.where(np.arange(6) < 3, pixel_bins(image), pixel_bins(image * 0)).astype(np.uint16)
    return describe(np.repeat([[0] * 4 + [1] * 4], 4, axis=0).astype(np.int32), 2, bins)


@pytest.mark.parametrize(
    ("terms", "colours", "expected"),
    [
        (Similarity(size=False, fill=False, texture=False), (100, 100), 1),  # the same histogram
        (Similarity(size=False, fill=False, texture=False), (10, 200), 0),  # no colour in common
        (Similarity(size=False, fill=False, colour=False), (10, 200), 1),  # both without texture
        (Similarity(colour=False, texture=False, fill=False), (10, 200), 0),  # both together are the whole image
        (Similarity(colour=False, texture=False, size=False), (10, 200), 1),  # they fill their common box
    ],
)
def test_the_loop_that_grouping_is_compared_with_has_closed_forms(
    terms: Similarity, colours: tuple[int, int], expected: int
) -> None:
    assert naive_similarity(halves(*colours), {0}, {1}, terms) / ONE == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("terms", "first"),
    [
        (Similarity(texture=False, size=False, fill=False), [1, 2]),  # the two of one colour
        (Similarity(colour=False, texture=False, fill=False), [0, 1]),  # the two that are smallest together
    ],
)
def test_three_strips_are_merged_by_what_they_have_in_common(terms: Similarity, first: list[int]) -> None:
    image = np.zeros((4, 12, 3), np.uint8)
    image[:, :2] = 200
    labels = np.repeat([[0] * 2 + [1] * 2 + [2] * 8], 4, axis=0).astype(np.int32)
    boxes, mergers = group(describe(labels, 3, pixel_bins(image)), terms)
    assert mergers[0].tolist() == first
    assert boxes[3].tolist() == ([2, 0, 12, 4] if first == [1, 2] else [0, 0, 4, 4])


# windows


def test_the_objects_of_a_simple_scene_are_found() -> None:
    windows = selective_search(scene(), ProposalSettings())
    assert windows.dtype == np.float32
    assert pairwise_iou(OBJECTS.astype(float), windows).max(axis=1).min() > 0.8


def test_the_same_image_gives_the_same_windows_in_the_same_order() -> None:
    settings = ProposalSettings(max_windows=40, min_side=5)
    first, second = selective_search(scene(), settings), selective_search(np.asfortranarray(scene()), settings)
    np.testing.assert_array_equal(first, second)
    assert len(first) == 40


def test_windows_are_the_boxes_of_all_hierarchies() -> None:
    trees = list(hierarchies(scene()))
    assert len(trees) == 8
    expected = {tuple(box) for tree in trees for box in tree.tolist() if box[2] - box[0] > 19 and box[3] - box[1] > 19}
    assert {tuple(map(int, w)) for w in selective_search(scene(), ProposalSettings())} == expected


def naive_windows(image: NDArray[np.uint8]) -> list[list[int]]:
    """Each box once, ordered by position times a hash in plain integers, then by corners."""
    best: dict[tuple[int, ...], float] = {}
    for number, tree in enumerate(hierarchies(image)):
        for row, box in enumerate(tree.tolist()):
            key = number
            for part in (*box, 0):
                key = (key ^ part) * 0x9E3779B97F4A7C15 % 2**64
                key ^= key >> 32
            priority = (len(tree) - row) * ((key >> 11) / 2**53)
            best[tuple(box)] = min(priority, best.get(tuple(box), np.inf))
    return [list(box) for box in sorted(best, key=lambda box: (best[box], box))]


def test_the_order_is_position_times_a_hash() -> None:
    windows = selective_search(scene(), ProposalSettings(min_side=1, max_windows=100_000))
    assert windows.tolist() == naive_windows(scene())


def test_the_windows_of_a_very_wide_image_are_told_apart() -> None:
    image = np.zeros((1, 70_000, 3), np.uint8)
    for start in (10, 5_000, 32_768, 65_536, 66_000):  # the same low bits again and again
        image[:, start : start + 3000] = start % 251
    windows = selective_search(image, ProposalSettings(min_side=1, max_windows=100_000, max_side=None))
    assert len(windows) > 10
    assert windows.tolist() == naive_windows(image)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (33, 20)])
def test_tiny_and_thin_uniform_images_give_themselves(size: tuple[int, int]) -> None:
    windows = selective_search(np.full((*size, 3), 128, np.uint8), ProposalSettings(min_side=1))
    assert windows.tolist() == [[0, 0, size[1], size[0]]]


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 2), (3, 3)])
def test_tiny_and_thin_noise_ends_with_windows_inside(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    windows = selective_search(image, ProposalSettings(min_side=1, max_side=None))
    assert [0, 0, size[1], size[0]] in windows.tolist()
    assert (windows[:, 2:] > windows[:, :2]).all()
    assert (windows[:, 2:] <= [size[1], size[0]]).all()


def test_an_image_below_min_side_has_no_windows() -> None:
    assert selective_search(scene(19, 300)[:, :, :], ProposalSettings()).shape == (0, 4)


def test_a_large_image_is_searched_in_a_shrunk_copy_and_answered_in_its_own_pixels() -> None:
    large = cv2.resize(scene(), (601, 450), interpolation=cv2.INTER_NEAREST)
    windows = selective_search(large, ProposalSettings(max_side=200))
    assert pairwise_iou(OBJECTS * 3.0, windows).max(axis=1).min() > 0.8
    assert (windows[:, 2:] - windows[:, :2]).min() >= 20
    assert windows[:, 2:].max(axis=0).tolist() == [601, 450]
    small, scale = shrunk(large, 200)
    assert small.shape == (150, 200, 3)
    np.testing.assert_allclose(scale, [601 / 200, 3, 601 / 200, 3])


@pytest.mark.parametrize("size", [(150, 200), (1, 1), (1, 60), (700, 30)])
def test_files_tensors_and_pil_images_are_the_arrays_that_they_hold(size: tuple[int, int], tmp_path: Path) -> None:
    image = scene(*size)
    windows = selective_search(image, min_side=1)
    Image.fromarray(image).save(tmp_path / "scene.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for kind in (Image.fromarray(image), tensor, tensor / 255, image[::-1][::-1], tmp_path / "scene.png"):
        np.testing.assert_array_equal(selective_search(kind, min_side=1), windows)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (scene() / 255, "got float64 of shape"),
        (scene().astype(int), "got int64 of shape"),
        (scene() > 100, "got bool of shape"),
        (np.zeros((9, 9), np.uint32), "got uint32 of shape"),
        (np.zeros((9, 9, 4), np.uint16), "got uint16 of shape"),
        (scene().transpose(2, 0, 1), r"got uint8 of shape \(3, 150, 200\)"),
        (scene()[None], r"got uint8 of shape \(1, 150, 200, 3\)"),
        (scene()[..., 0], r"got uint8 of shape \(150, 200\)"),
        (torch.from_numpy(scene()), r"got \(150, 200, 3\)"),
        (scene().tolist(), "got list"),
        ("photo.jpg", "there is no such file"),
        (None, "got NoneType"),
        (Image.fromarray(scene()[..., 0].astype(np.int32)), "expected 8 or 16 bits per channel"),
    ],
)
def test_other_images_are_refused_with_the_next_step(image: Any, message: str) -> None:
    refused_here(lambda: selective_search(image), message)


def test_values_by_name_replace_those_of_the_settings() -> None:
    for named, same in (
        ({}, ProposalSettings()),
        ({"max_windows": 60}, ProposalSettings(max_windows=60)),
        ({"min_side": 5, "max_windows": np.int64(30)}, ProposalSettings(min_side=5, max_windows=30)),
    ):
        np.testing.assert_array_equal(selective_search(scene(), **named), selective_search(scene(), same))
    own = ProposalSettings(max_side=100, min_side=5, max_windows=9)
    expected = selective_search(scene(), ProposalSettings(max_side=100, min_side=5, max_windows=20))
    np.testing.assert_array_equal(selective_search(scene(), own, max_windows=20), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_side", 0),
        ("min_side", 2.5),
        ("min_side", np.nan),
        ("max_windows", 0),
        ("max_windows", "many"),
        ("settings", 0.5),
        ("settings", {"min_side": 9}),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(name: str, value: Any) -> None:
    refused_here(
        lambda: selective_search(scene(), **{name: value}),
        f"^{name}( must be ProposalSettings|: Input should|: expected a)",
    )


def test_threads_find_what_one_thread_finds() -> None:
    images = [scene(100 + 10 * i, 150) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for found, image in zip(pool.map(selective_search, images * 2), images * 2, strict=True):
            np.testing.assert_array_equal(found, selective_search(image))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 30), st.integers(0, 99), st.booleans()
)
def test_any_image_has_windows_as_promised(
    height: int, width: int, side: int, most: int, seed: int, flat: bool
) -> None:
    image = np.random.default_rng(seed).integers(0, 3 if flat else 256, (height, width, 3), dtype=np.uint8)
    before = image.copy()
    windows = selective_search(image, min_side=side, max_windows=most)
    assert windows.dtype == np.float32
    assert windows.shape[1:] == (4,)
    assert len(windows) <= most
    assert len(np.unique(windows, axis=0)) == len(windows)
    assert (windows == np.rint(windows)).all()
    assert (windows >= 0).all()
    assert (windows[:, 2:] <= [width, height]).all()
    assert (windows[:, 2:] - windows[:, :2] >= side).all()
    assert len(windows) or min(height, width) < side
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(windows, selective_search(image, min_side=side, max_windows=most))


@pytest.mark.shared_data
@pytest.mark.slow
def test_real_objects_are_covered_as_well_as_by_opencv(shared: Path) -> None:
    classes = ("bus", "car", "cat", "cow", "dog", "horse", "person", "sheep", "train")
    root = shared / "voc"
    records = restrict(load_splits(root / "VOCdevkit", ("VOC2007/val",))[0], classes)[:40]
    theirs = match_records(records, [root / "proposals" / "selective_search_fast_VOC2007.npz"])
    settings = ProposalSettings(min_side=16)
    ours = {record.id: selective_search(read_image(record.path), settings) for record in records}
    annotations = {record.id: record.annotation for record in records if record.annotation is not None}
    mine, peer = (proposal_recall(windows, annotations, max_windows=2000) for windows in (ours, theirs))
    assert sum(len(own.boxes) for own in annotations.values()) > 50
    assert mine.recall >= peer.recall - 0.04
    assert mine.mean_best_overlap >= peer.mean_best_overlap - 0.03
