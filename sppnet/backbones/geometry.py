"""Where on the image a cell of a map looks, and how large the map is: from the layers, or by running the network.

Of the built-in backbones all follows from the layers, before there are weights; `Geometry.of` finds it for any network.
Along the main path of a network every convolution or pool adds ((kernel - 1) · dilation / 2 - padding) · stride so
far to the centre of the first cell, and multiplies the stride. Kernels are square and the same in both axes. Which
layers lie on it shows a run without values, on the meta device, which takes milliseconds; probing takes seconds.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sppnet.backbones.probing import probe
from sppnet.errors import SppnetError

SHRINK = 6.5  # release: pixels by which a window is narrowed on each side before rounding, at stride 16
Layer = nn.Conv2d | nn.MaxPool2d
Step = tuple[int, int, int, int, bool]  # kernel, stride, padding, dilation and whether the last cell may be cut off


@dataclass(frozen=True)
class Geometry:
    """Cell i of a map looks at pixel first_centre + i · stride (0-based) of the network's input, in both axes.

    `shrink`: pixels by which a window is narrowed on each side when it is projected; None = 6.5 at stride 16,
    in proportion elsewhere. ValueError for a stride that is not positive, a negative shrink, and what is not finite.
    """

    stride: float
    first_centre: float
    shrink: float = cast(float, None)

    def __post_init__(self) -> None:
        for name, wanted in (("stride", "pixels > 0"), ("first_centre", "a pixel"), ("shrink", "pixels >= 0 or None")):
            value = getattr(self, name)
            if name == "shrink" and value is None:
                object.__setattr__(self, name, SHRINK * self.stride / 16)
            elif not is_number(value) or (name == "stride" and value <= 0) or (name == "shrink" and value < 0):
                raise SppnetError(f"Geometry: expected {name} in {wanted}, got {value!r}; Geometry.of(module) finds it")

    @classmethod
    def of(cls, module: nn.Module, shrink: float | None = None) -> Geometry:
        """The geometry of any network that maps images (N, 3, H, W) to a grid of cells (N, C, h, w), by running it.

        A cell looks at the middle of the pixels that it sees, through any branch. Squeeze-and-excitation and other
        values without a place do not count. The network stays as it was: mode, buffers, gradients, random numbers. It
        takes seconds (ResNet-50: 2). BackboneError, with what was found, for a network that is no such grid: pooled or
        flattened, fixed in size, enlarged, attending everywhere, random, different in the two axes, hiding NaN
        (torch.where(x > 0, x, 0)), or without values yet (lazy).
        """
        grid = probe(module)
        return cls(grid.stride, grid.first_centre, cast(float, shrink))


def is_number(value: object) -> bool:
    """Whether it is a real number, of Python or numpy, neither NaN nor beyond all measure."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(float(value)) < 1e100
    except OverflowError:  # an integer beyond all floats
        return False


def steps_of(network: nn.Module, limit: float = math.inf) -> tuple[list[Step], int]:
    """The convolutions and pools of the main path, and the channels of the map.

    Layers change in place so that the total stride stays within `limit`, without changing what a cell sees: a layer
    that would pass it loses its stride, and everything after it is dilated by as much. At every position that the
    strided network had, the new map holds the same value. What stands beside the main path must be 1×1 and run last.
    """
    read: dict[Layer, int] = {}  # pixels between the cells that a layer reads

    def note(layer: Any, images: tuple[Tensor, ...]) -> None:  # both axes have one stride, so one image has two sizes
        read[layer] = 192 // (images[0].shape[3] - images[0].shape[2])

    hooks = [layer.register_forward_pre_hook(note) for layer in network.modules() if isinstance(layer, Layer)]
    with torch.no_grad():
        found = network.eval()(torch.zeros(1, 3, 256, 256 + 192, device=next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    steps, stride, kept = list[Step](), 1, {1: 1}  # stride of the network as it was -> as it becomes
    for layer, before in read.items():
        kernel, own, padding, dilation, _ = _numbers(layer)
        wider = before // kept[before]
        if wider > 1 and kernel > 1:
            layer.padding, layer.dilation = (padding * wider,) * 2, (dilation * wider,) * 2
        if kept[before] * own > limit:
            layer.stride = (1, 1)
        kept[before * own] = kept[before] * _numbers(layer)[1]
        if before == stride:  # else beside a path that has stepped on
            steps.append(_numbers(layer))
            stride *= own
    return steps, found.shape[1]


def geometry_of(steps: Sequence[Step]) -> Geometry:
    """Stride and first centre of the map behind these steps."""
    stride, centre = 1, 0.0
    for kernel, step, padding, dilation, _ in steps:
        centre += ((kernel - 1) * dilation / 2 - padding) * stride
        stride *= step
    return Geometry(stride, centre)


def map_side(steps: Sequence[Step], side: int) -> int:
    """Cells along one axis for an input of `side` pixels; 0 where the input is too small."""
    for kernel, stride, padding, dilation, ceil in steps:
        spare = side + 2 * padding - dilation * (kernel - 1) - 1
        if side < 1 or spare < 0:
            return 0
        cells = spare // stride + 1
        # one more pool, cut off at the end, must start inside the input or its left padding
        side = cells + (ceil and spare % stride > 0 and cells * stride < side + padding)
    return side


def _numbers(layer: Layer) -> Step:
    given = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    kernel, stride, padding, dilation = (own[0] if isinstance(own, tuple) else int(own) for own in given)
    return kernel, stride, padding, dilation, bool(getattr(layer, "ceil_mode", False))
