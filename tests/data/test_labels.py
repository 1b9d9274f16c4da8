"""Boxes laid into images whose EXIF orientation turns them."""

import pytest

from sppnet.data.labels import place_objects

TURNED = "annotation turned with its image (EXIF orientation)"
UNKNOWN = "image with EXIF orientation, boxes taken as drawn upright: its <size> does not tell"
CLIPPED = "box clipped to the image"


@pytest.mark.parametrize(
    ("box", "expected", "counts"),
    [
        ([0, 0, 60, 30], [10, 0, 40, 60], {TURNED: 1}),
        ([0, 0, 61, 30], [10, 0, 40, 60], {TURNED: 1, CLIPPED: 1}),  # a pixel beyond, as of inclusive corners
        ([0, 0, 62, 30], [0, 0, 40, 30], {UNKNOWN: 1, CLIPPED: 1}),  # beyond both
        ([0, 0, 30, 61], [0, 0, 30, 60], {CLIPPED: 1}),
        ([0, 0, 30, 62], [0, 0, 30, 60], {UNKNOWN: 1, CLIPPED: 1}),
        ([0, 0, 41, 41], [0, 0, 40, 41], {UNKNOWN: 1, CLIPPED: 1}),  # within both
    ],
)
def test_a_box_that_fits_one_frame_to_a_pixel_tells_the_frame(box, expected, counts):
    found, counted = place_objects([box], ["cat"], [False], (60, 40), stated=None, orientation=6)
    assert found.boxes.tolist() == [expected]
    assert counted == counts
