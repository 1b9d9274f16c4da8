"""The detector of the small run, and a picture with windows to try it on."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from small_run import SmallRun, random_windows

from sppnet.detection.detector import SPPDetector
from sppnet.images import read_image


@pytest.fixture(scope="module")
def detector(small_run: SmallRun) -> SPPDetector:
    return SPPDetector.load(small_run.root)


@pytest.fixture(scope="module")
def image(small_run: SmallRun) -> NDArray[np.uint8]:
    return read_image(small_run.devkit / "SHAPES/JPEGImages/test_00000.jpg")


@pytest.fixture(scope="module")
def windows(image: NDArray[np.uint8]) -> NDArray[np.floating]:
    return random_windows(image.shape[:2], np.zeros((0, 4)), np.random.default_rng(1), 50)
