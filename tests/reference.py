"""Naive loops: the definitions written out, slow and plain, as oracles for the fast code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sppnet.config import SVMSettings


def pyramid_vector(feature_map: NDArray, window: Sequence[int], levels: Sequence[int]) -> NDArray:
    """Pyramid vector of one window (x1, y1, x2, y2) of a (C, H, W) map, bin by bin (app. A)."""
    x1, y1, x2, y2 = (int(edge) for edge in window)
    height, width = y2 - y1, x2 - x1
    values = []
    for n in levels:
        for channel in feature_map:
            for i in range(n):
                top, bottom = y1 + i * height // n, y1 - (-(i + 1) * height // n)
                for j in range(n):
                    left, right = x1 + j * width // n, x1 - (-(j + 1) * width // n)
                    values.append(max(channel[y, x] for y in range(top, bottom) for x in range(left, right)))
    return np.array(values, dtype=feature_map.dtype)


def svm_objective(
    weight: NDArray, bias: float, features: NDArray, labels: NDArray, settings: SVMSettings, scale: float = 1.0
) -> float:
    """What a linear SVM minimises (sec. 4.1), of features that are multiplied by `scale` in the problem."""
    losses = np.maximum(0, 1 - labels * (features.astype(np.float64) @ weight + bias))
    costs = settings.C * np.where(labels > 0, settings.positive_weight, 1)
    return float((weight @ weight / scale**2 + (bias / settings.bias_multiplier) ** 2) / 2 + costs @ losses)


def expected_scale(box: Sequence[float], image_size: tuple[int, int], target_side: float) -> int:
    """The release's wish for a scale: round(208 · min(h, w) / √area)."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return math.floor(target_side * min(image_size) / math.sqrt(area) + 0.5)


def nearest_area(box: Sequence[float], image_size: tuple[int, int], scales: Sequence[float], side: float) -> int:
    """The scale s at which the box has the area nearest to side² in the image scaled by s / min(h, w) (sec. 4.1)."""
    width, height = (Fraction(high) - Fraction(low) for low, high in zip(box[:2], box[2:], strict=True))
    factors = [Fraction(scale) / min(image_size) for scale in scales]
    distances = [abs((width * factor) * (height * factor) - Fraction(side) ** 2) for factor in factors]
    return distances.index(min(distances))


def release_window(
    box: Sequence[float], image_size: tuple[int, int], scale: float, geometry, map_size: tuple[int, int]
) -> list[int]:
    """The release's projection of one box in its own coordinates: 1-based, inclusive. Returns xyxy half-open cells."""
    span, offset0 = min(image_size) - 1, geometry.first_centre + 1
    edges = []
    for low, high, cells in ((box[0] + 1, box[2], map_size[1]), (box[1] + 1, box[3], map_size[0])):
        x0 = (low - 1) * (scale - 1) / span + 1
        x1 = (high - 1) * (scale - 1) / span + 1
        left = math.floor((x0 - offset0 + geometry.shrink) / geometry.stride + 0.5) + 1
        right = math.ceil((x1 - offset0 - geometry.shrink) / geometry.stride - 0.5) + 1
        if left > right:
            left = right = int((left + right) / 2)
        left, right = (min(max(edge, 1), cells) for edge in (left, right))
        edges.append((left - 1, right))
    return [edges[0][0], edges[1][0], edges[0][1], edges[1][1]]
