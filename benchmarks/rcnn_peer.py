"""R-CNN in the benchmark `rcnn.py`: every window warped to 227 × 227 pixels and through the whole network.

Written to be fast on a CPU: see `RCNN.warp` for the warping, `fastest_layout` for the convolutions.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sppnet.config import WeightsSettings
from sppnet.images import prepare
from sppnet.network import winograd
from sppnet.network.trunks import Trunk

SIDE, GRID = 227, 6  # R-CNN's input, and the map after its pool5
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # tried
HEAD_BATCH = 512  # rows of fc6 and fc7 at once, as ours


class Split(NamedTuple):
    """Seconds of one image: convolutions; warping, or projecting and pooling; fc6, fc7 and scores."""

    maps: float
    windows: float
    head: float

    @property
    def total(self) -> float:
        return self.maps + self.windows + self.head


@dataclass(frozen=True)
class Layout:
    """How R-CNN's convolutions run; a sweep chooses."""

    channels_last: bool = True
    autocast: bool = False  # in bfloat16: autocast, or a model in bfloat16
    batch: int = 16
    tiles: bool = False  # our convolutions (network/winograd.py) where they pay, else torch's everywhere

    def __str__(self) -> str:
        words = ["channels last" if self.channels_last else "contiguous", f"batch {self.batch}"]
        return ", ".join(words + ["autocast"] * self.autocast + ["tiles"] * self.tiles)


class RCNN:
    """Every window warped to 227 × 227 and through trunk, pool5, fc6, fc7 and the linear scores.

    `fully_connected` maps (R, C · 36) to (R, K); it runs on large batches after the convolutions of all windows.
    """

    def __init__(
        self, trunk: Trunk, fully_connected: nn.Sequential, dtype: torch.dtype, layout: Layout, threads: int = 1
    ) -> None:
        self.weights, self.dtype, self.layout = trunk.weights, dtype, layout
        memory = torch.channels_last if layout.channels_last else torch.contiguous_format
        kind = torch.float32 if layout.autocast else dtype
        self.convolutions = _convolutions(trunk).to(dtype=kind).to(memory_format=memory)
        self.fully_connected = fully_connected.to(dtype)
        self._memory, self._kind = memory, kind
        self._warped = np.empty((layout.batch, SIDE, SIDE, 3), np.float32)
        self._workers, self._pool = threads, ThreadPoolExecutor(threads)

    @torch.inference_mode()
    def score(self, image: NDArray[np.uint8], windows: NDArray[np.float64]) -> tuple[NDArray[np.float32], Split]:
        """Scores (R, K) of windows (R, 4) and the time they took."""
        start = time.perf_counter()
        boxes = whole_pixels(windows, (image.shape[0], image.shape[1]))
        pixels = normalised(image, self.weights)
        warping = time.perf_counter() - start
        features = []
        for begin in range(0, len(boxes), self.layout.batch):
            before = time.perf_counter()
            batch = self.warp(pixels, boxes[begin : begin + self.layout.batch])
            warping += time.perf_counter() - before
            features.append(self.convolve(batch))
        middle = time.perf_counter()
        rows = torch.cat(features)
        scores = torch.cat([self.fully_connected(part).float() for part in rows.split(HEAD_BATCH)]).numpy()
        return scores, Split(middle - start - warping, warping, time.perf_counter() - middle)

    def warp(self, pixels: NDArray[np.float32], boxes: NDArray[np.int64]) -> Tensor:
        """Boxes (R, 4), R up to a batch -> (R, 3, 227, 227) in a buffer that the next call overwrites.

        OpenCV on normalised floats writes channels-last batches directly: 0.1 ms a window, where resizing bytes and
        normalising afterwards takes 0.5 ms, F.grid_sample 0.7 ms and F.interpolate window by window 0.7 to 0.9 ms.
        """
        shares = np.array_split(np.arange(len(boxes)), self._workers)
        list(self._pool.map(lambda rows: _resize(pixels, boxes, rows, self._warped), shares))
        return torch.from_numpy(self._warped[: len(boxes)]).permute(0, 3, 1, 2)

    def convolve(self, batch: Tensor) -> Tensor:
        """(R, 3, 227, 227) -> (R, C · 36)."""
        batch = batch.to(self._kind, memory_format=self._memory)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.layout.autocast), _tiles(self.layout.tiles):
            return self.convolutions(batch).flatten(1)


def whole_pixels(windows: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Boxes (R, 4) rounded to pixels inside the image (height, width), at least one pixel each."""
    bound = np.array([size[1], size[0]])
    first = np.clip(np.rint(windows[:, :2]), 0, bound - 1)
    last = np.clip(np.rint(windows[:, 2:]), first + 1, bound)
    return np.concatenate([first, last], axis=1).astype(np.int64)


def normalised(image: NDArray[np.uint8], weights: WeightsSettings) -> NDArray[np.float32]:
    """The image as the trunk sees it, (H, W, 3) float32."""
    pixels = prepare(image, (image.shape[0], image.shape[1]), weights.channel_order, weights.mean, weights.std)
    return pixels[0].permute(1, 2, 0).contiguous().numpy()


@contextlib.contextmanager
def _tiles(wanted: bool) -> Iterator[None]:
    """Without them all convolutions are torch's."""
    with mock.patch.object(winograd, "GAIN", winograd.GAIN if wanted else float("inf")):
        yield


def _resize(
    pixels: NDArray[np.float32], boxes: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.float32]
) -> None:
    for row in rows.tolist():
        x1, y1, x2, y2 = boxes[row].tolist()
        cv2.resize(pixels[y1:y2, x1:x2], (SIDE, SIDE), dst=out[row], interpolation=cv2.INTER_LINEAR)


def _convolutions(trunk: Trunk) -> nn.Sequential:
    """A copy of the trunk's layers, which stand in a row, and the pool5 that the pyramid replaces."""
    layers = [copy.deepcopy(layer) for layer in trunk.modules() if not list(layer.children())]
    return nn.Sequential(*layers, nn.MaxPool2d(3, stride=2))  # 13 × 13 cells -> 6 × 6


def fully_connected(channels: int, width: int, classes: int) -> nn.Sequential:
    """fc6, fc7 and the scores, with random weights: (R, channels · 36) -> (R, classes)."""
    sizes = (channels * GRID * GRID, width, width, classes)
    fc6, fc7, scores = (nn.utils.skip_init(nn.Linear, *pair) for pair in itertools.pairwise(sizes))
    for layer in (fc6, fc7, scores):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(fc6, nn.ReLU(inplace=True), fc7, nn.ReLU(inplace=True), scores).requires_grad_(False)


def fastest_layout(trunk: Trunk, dtype: torch.dtype, count: int, tiles: bool = False) -> tuple[Layout, str]:
    """The layout whose convolutions take least time: first memory format and precision, then batch.

    All with torch's convolutions, or with ours where they pay; those need one memory format.
    """
    autocasts = (False, True) if dtype == torch.bfloat16 else (False,)
    images = torch.randn(count, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    times: dict[Layout, float] = {}

    def best(layouts: Sequence[Layout]) -> Layout:
        for layout in layouts:
            times.setdefault(layout, _convolution_time(trunk, dtype, layout, images) / count)
        return min(layouts, key=lambda layout: times[layout])

    formats = (True,) if tiles else (True, False)
    layout = best([Layout(last, cast, tiles=tiles) for last in formats for cast in autocasts])
    layout = best([replace(layout, batch=batch) for batch in BATCHES if batch <= count])
    others = "; ".join(f"{tried} {1e3 * seconds:.1f}" for tried, seconds in times.items() if tried != layout)
    return layout, f"{layout}: {1e3 * times[layout]:.1f} ms a window ({others})"


def _convolution_time(trunk: Trunk, dtype: torch.dtype, layout: Layout, images: Tensor) -> float:
    model = RCNN(trunk, nn.Sequential(), dtype, layout)  # outside of inference mode, as the one that is measured
    seconds = []
    with torch.inference_mode():
        for _ in range(3):  # the first one warms up
            start = time.perf_counter()
            for batch in images.split(layout.batch):
                model.convolve(batch)
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
