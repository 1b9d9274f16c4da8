"""Class names in Cyrillic, Greek, Chinese, Arabic … are drawn as the same empty boxes in the pictures of `detect` and `eval`.

Reported of other projects. The product accepts any name in annotations.
Right: a font with these letters where the system has one (matplotlib's DejaVu Sans, which is installed, has Cyrillic, Greek
and Arabic), else a number or transliteration per class; at least a line that says so.
"""

import numpy as np
from product import verdict

from sppnet import Detections
from sppnet.report.drawing import draw_detections

image = np.full((120, 200, 3), 200, np.uint8)


def drawn(name):
    found = Detections(np.array([[20, 40, 160, 100]], np.float32), np.array([0.5], np.float32), np.array([0]), (name,))
    return np.asarray(draw_detections(image, found))


pairs = {
    "Cyrillic": ("кот", "пёс"),
    "Greek": ("αβγ", "δεζ"),
    "Chinese": ("猫", "犬"),
    "Arabic": ("قط", "كل"),
    "Latin": ("cat", "dog"),
}
same = [what for what, (one, other) in pairs.items() if np.array_equal(drawn(one), drawn(other))]
verdict(bool(same), f"two different class names give the same picture in {', '.join(same)}")
