"""The crops that pre-training learns from."""

import numpy as np
import pytest
from PIL import Image

from sppnet.classification.pretraining import cut_crops
from sppnet.records import Annotation, ImageRecord


@pytest.fixture
def record(tmp_path):
    """An image of a red and a difficult green square on black."""
    pixels = np.zeros((120, 200, 3), np.uint8)
    pixels[20:60, 20:60, 0], pixels[40:80, 120:160, 1] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    boxes = np.array([[20, 20, 60, 60], [120, 40, 160, 80]], np.float32)
    annotation = Annotation(boxes, ("red", "green"), np.array([False, True]))
    return ImageRecord("A/a", tmp_path / "a.png", (120, 200), "0", annotation)


def objects(crops, labels):
    """Label and brightest channel at the centre of the crops of objects."""
    centre = crops.shape[-1] // 2
    return [(int(n), int(c[:, centre, centre].argmax())) for c, n in zip(crops, labels, strict=True) if n < 2]


def test_every_object_is_the_centre_of_a_crop(record):
    crops, labels = cut_crops([record], ("red", "green"), 20, seed=0)
    assert crops.shape[1:] == (3, 28, 28)
    assert objects(crops, labels) == [(0, 0), (1, 1)]


def test_difficult_objects_are_left_out_where_they_do_not_train(record):
    crops, labels = cut_crops([record], ("red", "green"), 20, seed=0, difficult=False)
    assert objects(crops, labels) == [(0, 0)]
    assert (labels == 2).sum() <= 1
    with pytest.raises(ValueError, match="hold none of the classes"):
        cut_crops([record], ("green",), 20, seed=0, difficult=False)
