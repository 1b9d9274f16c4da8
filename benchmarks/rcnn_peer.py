"""R-CNN in the benchmark `rcnn.py`: every window warped to 227 × 227 pixels and through the whole network."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import torch
from machine import seconds
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from sppnet.backbones.backbone import Backbone
from sppnet.backbones.runtime import make_runtime
from sppnet.images import prepare

SIDE, GRID = 227, 6  # R-CNN's input, and the map after its pool5
HEAD_BATCH = 1024  # rows of fc6 and fc7 at once, as ours


class Split(NamedTuple):
    """Seconds of one image: convolutions; warping, or projecting and pooling; fc6, fc7 and scores."""

    maps: float
    windows: float
    head: float

    @property
    def total(self) -> float:
        return self.maps + self.windows + self.head


class RCNN:
    """Convolutions by the same runtime as ours, in the fastest of `batches`; fc6, fc7 and scores by torch, as ours."""

    def __init__(
        self, backbone: Backbone, runtime: str, precision: str, width: int, classes: int, batches: Sequence[int]
    ) -> None:
        self.weights = backbone.weights
        self._convolve = make_runtime(backbone, runtime, precision)
        self._kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._layers = fully_connected(backbone.channels, width, classes).to(self._kind)
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        self.batch = min(batches, key=self._seconds_a_window)
        self._warped = np.empty((self.batch, SIDE, SIDE, 3), np.float32)

    @torch.inference_mode()
    def score(self, image: NDArray[np.uint8], windows: NDArray[np.float64]) -> tuple[NDArray[np.float32], Split]:
        """Scores (R, K) of windows (R, 4) and the time they took."""
        start = time.perf_counter()
        size = (image.shape[0], image.shape[1])
        pixels = prepare(image, size, self.weights.channel_order, self.weights.mean, self.weights.std)
        normalised = pixels[0].permute(1, 2, 0).contiguous().numpy()
        boxes, features, warping = whole_pixels(windows, size), [], time.perf_counter() - start
        for begin in range(0, len(boxes), self.batch):
            before = time.perf_counter()
            batch = self._warp(normalised, boxes[begin : begin + self.batch])
            warping += time.perf_counter() - before
            features.append(max_pool2d(self._convolve(batch), 3, 2).flatten(1))  # pool5: 13 × 13 cells -> 6 × 6
        middle = time.perf_counter()
        rows = torch.cat(features).to(self._kind)
        scores = torch.cat([self._layers(part).float() for part in rows.split(HEAD_BATCH)]).numpy()
        return scores, Split(middle - start - warping, warping, time.perf_counter() - middle)

    def _warp(self, pixels: NDArray[np.float32], boxes: NDArray[np.int64]) -> Tensor:
        """(R, 4) -> (R, 3, 227, 227) channels last, in a buffer that the next call overwrites.

        OpenCV on normalised floats takes 0.1 ms a window; torch's interpolation takes seven times as long.
        """

        def resize(row: int) -> None:
            x1, y1, x2, y2 = boxes[row].tolist()
            cv2.resize(pixels[y1:y2, x1:x2], (SIDE, SIDE), dst=self._warped[row], interpolation=cv2.INTER_LINEAR)

        list(self._pool.map(resize, range(len(boxes))))
        return torch.from_numpy(self._warped[: len(boxes)]).permute(0, 3, 1, 2)

    def _seconds_a_window(self, batch: int) -> float:
        images = torch.randn(batch, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        self._convolve(images)
        return min(seconds(lambda: self._convolve(images)) for _ in range(2)) / batch


def whole_pixels(windows: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Boxes (R, 4) rounded to pixels inside the image (height, width), at least one pixel each."""
    bound = np.array([size[1], size[0]])
    first = np.clip(np.rint(windows[:, :2]), 0, bound - 1)
    last = np.clip(np.rint(windows[:, 2:]), first + 1, bound)
    return np.concatenate([first, last], axis=1).astype(np.int64)


def fully_connected(channels: int, width: int, classes: int) -> nn.Sequential:
    """fc6, fc7 and the scores, with random weights: (R, channels · 36) -> (R, classes)."""
    sizes = (channels * GRID * GRID, width, width, classes)
    fc6, fc7, scores = (nn.utils.skip_init(nn.Linear, *pair) for pair in itertools.pairwise(sizes))
    generator = torch.Generator().manual_seed(0)
    for layer in (fc6, fc7, scores):
        nn.init.normal_(layer.weight, std=0.01, generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(fc6, nn.ReLU(inplace=True), fc7, nn.ReLU(inplace=True), scores).requires_grad_(False)
