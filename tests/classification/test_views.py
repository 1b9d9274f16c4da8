"""The views are those of the paper: counts, positions, flips."""

from __future__ import annotations

from collections import Counter

import pytest

from sppnet.classification.views import View, list_views
from sppnet.cli import VIEWS
from sppnet.errors import SppnetError
from sppnet.images import scaled_size

COUNTS = {"centre": 1, "ten": 10, "full": 2, "multiview": 98}
SIZES = [(375, 500), (500, 375), (256, 256), (20, 30), (224, 224), (1, 1), (353, 500), (100, 1000)]


def both(scale: float, *boxes: tuple[int, int, int, int]) -> Counter[View]:
    """Each box, as it is and mirrored."""
    return Counter(View(scale, box, flip) for box in boxes for flip in (False, True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", VIEWS)
def test_there_are_as_many_as_in_the_paper_and_they_lie_inside(name: str, size: tuple[int, int]) -> None:
    views = list_views(name, size)
    assert len(views) == COUNTS[name]
    for view in views:
        (height, width), side = scaled_size(size, view.scale)
        x1, y1, x2, y2 = view.box
        assert side == pytest.approx(view.scale)
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert (x2 - x1, y2 - y1) in ((224, 224), (width, height))


def test_centre_is_the_middle_of_the_image_at_256() -> None:
    assert list_views("centre", (256, 300)) == [View(256, (38, 16, 262, 240), False)]
    assert list_views("centre", (512, 600)) == list_views("centre", (256, 300))


def test_ten_are_the_middle_and_the_corners_with_flips() -> None:
    corners = (0, 0, 224, 224), (76, 0, 300, 224), (0, 32, 224, 256), (76, 32, 300, 256)
    assert Counter(list_views("ten", (256, 300))) == both(256, (38, 16, 262, 240), *corners)


def test_full_is_the_whole_image_with_flip() -> None:
    assert Counter(list_views("full", (512, 600))) == both(256, (0, 0, 300, 256))


def test_multiview_has_six_at_224_eighteen_at_each_other_scale_and_two_full() -> None:
    views = list_views("multiview", (300, 400))
    crops = [view for view in views if view.box[2] - view.box[0] == view.box[3] - view.box[1] == 224]
    assert Counter(view.scale for view in crops) == {224: 6, 256: 18, 300: 18, 360: 18, 448: 18, 560: 18}
    assert Counter(view for view in views if view not in crops) == both(256, (0, 0, 341, 256))
    assert len(set(views)) == 98
    # at 300: the image is 400 × 300, a view has 176 × 76 px of room
    left, middle, right = ((x, x + 224) for x in (0, 88, 176))
    top, centre, bottom = ((y, y + 224) for y in (0, 38, 76))
    places = [(x, y) for x in (left, middle, right) for y in (top, centre, bottom)]
    own = both(300, *((x[0], y[0], x[1], y[1]) for x, y in places))
    assert Counter(view for view in views if view.scale == 300) == own


@pytest.mark.parametrize(("size", "boxes"), [
    ((448, 600), [(0, 0, 224, 224), (38, 0, 262, 224), (76, 0, 300, 224)]),
    ((600, 448), [(0, 0, 224, 224), (0, 38, 224, 262), (0, 76, 224, 300)]),
])  # fmt: skip
def test_the_six_at_224_are_the_middle_and_both_ends(
    size: tuple[int, int], boxes: list[tuple[int, int, int, int]]
) -> None:
    assert Counter(view for view in list_views("multiview", size) if view.scale == 224) == both(224, *boxes)


def test_another_size_of_training_changes_all_in_proportion() -> None:
    scales = {view.scale for view in list_views("multiview", (90, 120), side=56, min_side=64)}
    assert scales == {56, 64, 75, 90, 112, 140}
    scales = {view.scale for view in list_views("multiview", (120, 150), side=96, min_side=96)}
    assert scales == {96, 110, 129, 154, 192, 240}  # 109.7, 128.6 and 154.3 rounded
    assert list_views("centre", (64, 75), side=56, min_side=64) == [View(64, (9, 4, 65, 60), False)]


def test_an_image_is_never_smaller_than_its_views() -> None:
    assert list_views("centre", (300, 300), side=224, min_side=100) == [View(224, (0, 0, 224, 224), False)]


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(SppnetError, match=r"views must be one of centre, ten, full, multiview, got 'center'"):
        list_views("center", (300, 400))
