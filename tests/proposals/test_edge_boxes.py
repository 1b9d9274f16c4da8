"""Edges of gradients against loops, and EdgeBoxes against OpenCV's own answer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from forests import forest
from numpy.typing import NDArray
from PIL import Image
from scenes import OBJECTS, scene

from sppnet.config import ProposalSettings
from sppnet.data.selection import restrict
from sppnet.data.splits import load_splits
from sppnet.errors import SppnetError
from sppnet.evaluation.proposals import proposal_recall
from sppnet.images import read_image
from sppnet.proposals.edge_boxes import edge_boxes, gradient_edges
from sppnet.proposals.edge_forest import forest_edges
from sppnet.proposals.search import make_proposer
from sppnet.proposals.selective_search import opencv_selective_search, selective_search
from sppnet.records import pairwise_iou

edges_of = partial(ProposalSettings, method="edge_boxes")


# edges


def naive_gradients(image: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(dy, dx) of every pixel: Gauss of 2 px, Sobel, the channel of Lab that changes most."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(float)
    weights = np.exp(-(np.arange(-8, 9) ** 2) / (2 * 2.0**2))
    weights /= weights.sum()
    smooth = np.zeros_like(lab)
    for i, j in np.ndindex(17, 17):
        smooth += (
            weights[i]
            * weights[j]
            * np.pad(lab, ((8, 8), (8, 8), (0, 0)), "reflect")[i:, j:][: len(lab), : lab.shape[1]]
        )
    padded = np.pad(smooth, ((1, 1), (1, 1), (0, 0)), "reflect")
    found = np.zeros((2, *lab.shape[:2]))
    for y, x in np.ndindex(lab.shape[:2]):
        block = padded[y : y + 3, x : x + 3]
        dy = sum(w * (block[2, i] - block[0, i]) for i, w in enumerate((1, 2, 1)))
        dx = sum(w * (block[i, 2] - block[i, 0]) for i, w in enumerate((1, 2, 1)))
        channel = int(np.argmax(dy**2 + dx**2))
        found[:, y, x] = dy[channel], dx[channel]
    return found[0], found[1]


def between(values: NDArray[np.float64], y: float, x: float) -> float:
    """The value at a place between pixels; beyond the border that of the border."""
    y, x = (min(max(at, 0), side - 1) for at, side in zip((y, x), values.shape, strict=True))
    top, left = int(y), int(x)
    total = 0.0
    for v, u in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = max(0, 1 - abs(y - v)) * max(0, 1 - abs(x - u))
        total += weight * values[min(v, values.shape[0] - 1), min(u, values.shape[1] - 1)]
    return total


def test_edges_are_the_largest_gradients_along_their_direction() -> None:
    image = cv2.resize(np.random.default_rng(1).integers(0, 256, (5, 6, 3), dtype=np.uint8), (30, 26))
    edges, orientations = gradient_edges(image)
    dy, dx = naive_gradients(image)
    size = np.hypot(dy, dx)
    whole = np.percentile(size, 99)
    kept = 0
    for y, x in zip(*np.nonzero(size > 1e-9), strict=True):  # in the corners it is 0
        uy, ux = dy[y, x] / size[y, x], dx[y, x] / size[y, x]
        beside = max(between(size, y + uy, x + ux), between(size, y - uy, x - ux))
        if abs(size[y, x] - beside) > 1e-2:  # else rounding decides
            expected = min(size[y, x] / whole, 1) if size[y, x] > beside else 0
            assert edges[y, x] == pytest.approx(expected, abs=1e-3), (y, x)
            kept += expected > 0
        turn = (orientations[y, x] - np.arctan2(dy[y, x], dx[y, x])) / np.pi
        assert abs(turn - round(turn)) < 1e-3 or size[y, x] < 1
    assert 50 < kept < size.size / 3
    assert orientations.min() >= 0
    assert orientations.max() <= np.float32(np.pi)


def test_an_edge_between_two_colours_is_one_line() -> None:
    image = np.full((40, 60, 3), (200, 60, 60), np.uint8)
    image[:, 30:] = (60, 130, 60)
    edges, orientations = gradient_edges(image)
    assert set(np.nonzero(edges > 0.05)[1]) <= {29, 30}
    assert edges[:, 29:31].max() == 1
    np.testing.assert_allclose(np.cos(2 * orientations[:, 29:31]), 1, atol=1e-3)  # the gradient runs along x


def test_a_faint_edge_is_no_whole_one_where_there_is_no_other() -> None:
    image = np.full((60, 80, 3), 100, np.uint8)
    image[30, 40] = 103  # gradients of a fraction of 1, all others are 0
    largest = np.hypot(*naive_gradients(image)).max()
    assert 0.05 < largest < 0.9
    assert gradient_edges(image)[0].max() == pytest.approx(largest, rel=1e-3)


def test_one_colour_has_no_edges_and_no_windows() -> None:
    assert not gradient_edges(np.full((30, 30, 3), 77, np.uint8))[0].any()
    assert edge_boxes(np.full((30, 30, 3), 77, np.uint8), edges_of(min_side=1)).shape == (0, 4)


# windows


def opencvs(edges: NDArray[np.float32], orientations: NDArray[np.float32], area: float) -> dict[tuple[int, ...], float]:
    """Boxes and their best scores by one call with the documented parameters; xyxy half-open."""
    search = cv2.ximgproc.createEdgeBoxes(alpha=0.65, beta=0.7, minScore=0.01, maxBoxes=10_000, minBoxArea=area)
    scores: dict[tuple[int, ...], float] = {}
    for (x, y, w, h), score in zip(*search.getBoundingBoxes(edges, orientations), strict=True):
        box = int(x) - 1, int(y) - 1, int(x + w), int(y + h)
        scores[box] = max(float(score), scores.get(box, 0))
    return scores


@pytest.mark.parametrize(("min_side", "area"), [(20, 400), (40, 1000), (1, 25)])
def test_windows_are_those_of_opencv_by_their_scores(min_side: int, area: float) -> None:
    scores = opencvs(*gradient_edges(scene()), area)
    large = [box for box in scores if min(box[2] - box[0], box[3] - box[1]) >= min_side]
    expected = sorted(large, key=lambda box: (-scores[box], box))[:200]
    assert len(expected) > 10
    windows = edge_boxes(scene(), edges_of(min_side=min_side, max_windows=200))
    assert windows.dtype == np.float32
    assert windows.tolist() == [list(box) for box in expected]


def test_the_edges_may_be_those_of_a_forest(tmp_path: Path) -> None:
    model = tmp_path / "model.yml"
    model.write_text(forest(edgeBins=[[119, 120, 135, 136] * 10] * 2))
    windows = edge_boxes(scene(), edges_of(edge_model=model))
    scores = opencvs(*map(np.ascontiguousarray, forest_edges(scene(), model)), 400)
    assert len(windows) > 10
    assert windows[0].tolist() == list(max(scores, key=lambda box: scores[box]))
    model.unlink()
    proposer = make_proposer(edges_of(edge_model=model))
    with pytest.raises(SppnetError, match=r"model\.yml: expected .*, but No such file or directory; put one there"):
        proposer(scene())


def test_the_objects_of_a_simple_scene_are_found() -> None:
    windows = edge_boxes(scene(), edges_of())
    assert pairwise_iou(OBJECTS.astype(float), windows).max(axis=1).min() > 0.7


def test_the_same_image_gives_the_same_windows_whatever_came_before_and_however_many_threads() -> None:
    first = edge_boxes(scene(), edges_of())
    threads = cv2.getNumThreads()
    try:
        for count in (1, 4):
            cv2.setNumThreads(count)
            edge_boxes(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8), edges_of())
            np.testing.assert_array_equal(edge_boxes(np.asfortranarray(scene()), edges_of()), first)
    finally:
        cv2.setNumThreads(threads)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 900), (19, 40), (24, 24)])
def test_windows_of_tiny_and_thin_noise_lie_inside(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    windows = edge_boxes(image, edges_of(min_side=1, max_side=None))
    assert (windows[:, 2:] > windows[:, :2]).all()
    assert windows.min(initial=0) >= 0
    assert (windows[:, 2:] <= size[::-1]).all()
    assert edge_boxes(image, edges_of(min_side=25)).shape == (0, 4)


def test_a_large_image_is_searched_in_a_shrunk_copy_and_answered_in_its_own_pixels() -> None:
    large = cv2.resize(scene(), (601, 450), interpolation=cv2.INTER_NEAREST)
    windows = edge_boxes(large, edges_of(max_side=200))
    assert pairwise_iou(OBJECTS * 3.0, windows).max(axis=1).min() > 0.7
    assert (windows[:, 2:] <= [601, 450]).all()
    assert (windows[:, 2:] - windows[:, :2]).min() >= 20


@pytest.mark.parametrize("search", [edge_boxes, selective_search, opencv_selective_search])
def test_grey_pictures_are_searched_as_three_channels_of_8_bits(search) -> None:
    grey = cv2.cvtColor(scene(), cv2.COLOR_RGB2GRAY)
    expected = search(np.repeat(grey[..., None], 3, axis=2), ProposalSettings())
    assert len(expected) > 5
    for image in (grey, grey.astype(np.uint16) * 257):
        np.testing.assert_array_equal(search(Image.fromarray(image), ProposalSettings()), expected)


@pytest.mark.parametrize("image", [np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3)), np.zeros(9, np.uint16)])
def test_another_kind_of_image_is_refused(image: NDArray) -> None:
    with pytest.raises(
        SppnetError,
        match=r"image must be a uint8 RGB array of shape \(H, W, 3\), got .* or read it with sppnet.read_image",
    ):
        edge_boxes(image)


def test_an_opencv_without_its_contributions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "ximgproc")
    with pytest.raises(SppnetError, match=r"no ximgproc; .* install opencv-contrib-python-headless"):
        edge_boxes(scene())


@pytest.mark.shared_data
def test_windows_of_real_images_cover_most_objects(shared: Path) -> None:
    records = load_splits(shared / "voc/VOCdevkit", ("VOC2007/train",))[0][:300:100]
    classes = tuple({name for record in records if record.annotation for name in record.annotation.names})
    annotations = {r.id: r.annotation for r in restrict(records, classes) if r.annotation is not None}
    found = {record.id: edge_boxes(read_image(record.path), edges_of()) for record in records}
    assert proposal_recall(found, annotations).recall > 0.8
