"""The finest layers of a trunk, strip by strip: their maps are the largest by far, and no cache holds them whole.

A whole map of 96 channels at half the size of a 1200 × 1600 image is 184 MB. It is written and read by three layers at
the speed of memory, and each time into pages that the system must clear first. A strip of it stays in the caches, and
only the last layer's result, a sixteenth of the cells, is ever whole. Cells see the same numbers either way;
convolutions by tiles, which begin elsewhere, may round differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sppnet.network.geometry import geometry_of, map_side, path_steps, steps_of

COARSE = 4  # the stride from which on maps are small
LARGE = 2**25  # bytes: from here on glibc takes every map from the system, and gives it back
PIXELS = 128  # rows of the image in a strip; more overlap less, but leave the caches


@dataclass(frozen=True)
class Reach:
    """Cell i of a map depends on the rows i · stride - before … i · stride - before + field - 1 of the input."""

    field: int
    stride: int
    before: int


def reach_of(modules: Sequence[nn.Module]) -> Reach:
    """What the cells behind these modules see, padding included."""
    field, stride, before = 1, 1, 0
    for step in steps_of(modules):
        before += step.padding * stride
        field += (step.kernel - 1) * step.dilation * stride
        stride *= step.stride
    return Reach(field, stride, before)


def fine_layers(modules: Sequence[nn.Module]) -> int:
    """How many of the modules, from the first on, it takes to reach a stride of COARSE: those to run in strips."""
    for count in range(1, len(modules) + 1):
        if geometry_of(steps_of(modules[:count])).stride >= COARSE:
            return count
    return 0


def largest_map(modules: Sequence[nn.Module], size: tuple[int, int]) -> int:
    """Numbers in the largest map of these modules for an image (H, W), those inside of blocks included."""
    largest, channels, (height, width) = 0, 0, size
    for layer, step in path_steps(modules):
        height, width = step.map_side(height), step.map_side(width)
        channels = layer.out_channels if isinstance(layer, nn.Conv2d) else channels
        largest = max(largest, channels * height * width)
    return largest


def run_in_strips(modules: Sequence[nn.Module], images: Tensor, pixels: int | None = None) -> Tensor:
    """The modules in a row over images (N, C, H, W), `pixels` (or PIXELS) rows at a time -> their map, channels last.

    A strip begins at a multiple of the stride and holds every row that its cells see, so that padding is only met
    where the image itself ends. The modules must not train and must not change their input in place.
    """
    reach, steps = reach_of(modules), steps_of(modules)
    height, width = map_side(steps, images.shape[2]), map_side(steps, images.shape[3])
    rows = max(1, (pixels or PIXELS) // reach.stride)
    whole = torch.empty(0)
    for first in range(0, height, rows):
        last = min(height, first + rows)
        # Where cells see nothing but padding a strip still holds enough rows to run.
        start = min(first * reach.stride - reach.before, images.shape[2] - reach.field)
        start = max(0, start // reach.stride * reach.stride)
        stop = (last - 1) * reach.stride - reach.before + reach.field if last < height else images.shape[2]
        stop = max(stop, start + reach.field)
        strip = images[:, :, start:stop]
        for module in modules:
            strip = module(strip)
        if not first:
            shape = (strip.shape[0], height, width, strip.shape[1])
            whole = strip.new_empty(shape).permute(0, 3, 1, 2)
        whole[:, :, first:last] = strip[:, :, first - start // reach.stride : last - start // reach.stride]
    return whole


def pays(modules: Sequence[nn.Module], images: Tensor) -> bool:
    """Whether strips take less time than whole maps: on a CPU, without training, where the maps are large."""
    if images.device.type != "cpu" or torch.is_grad_enabled() or not modules:
        return False
    size = 2 if torch.is_autocast_enabled("cpu") else images.element_size()
    return len(images) * size * largest_map(modules, (images.shape[2], images.shape[3])) > LARGE
