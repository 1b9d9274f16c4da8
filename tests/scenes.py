"""A picture whose objects every search of windows finds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

OBJECTS = np.array([[20, 30, 90, 110], [120, 15, 170, 95], [60, 100, 180, 140]])


def scene(height: int = 150, width: int = 200) -> NDArray[np.uint8]:
    """Three flat objects on a noisy ground."""
    image = np.random.default_rng(0).integers(90, 120, (height, width, 3), dtype=np.uint8)
    for (x1, y1, x2, y2), colour in zip(OBJECTS, [(250, 20, 20), (20, 250, 20), (20, 20, 250)], strict=True):
        image[y1:y2, x1:x2] = colour
    return image
