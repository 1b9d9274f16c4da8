"""Where on the image a cell of a map looks, and how large the map is: from the layers, or by running the network.

Of the built-in backbones all follows from the layers, before there are weights; `Geometry.of` finds it for any network.
Along the main path of a network every convolution or pool adds ((kernel - 1) · dilation / 2 - padding) · stride so
far to the centre of the first cell, and multiplies the stride. Kernels are square and the same in both axes. Which
layers lie on it shows a run without values, on the meta device, which takes milliseconds; probing takes seconds.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from sppnet.backbones.probing import probe
from sppnet.errors import SppnetError

SHRINK = 6.5  # release: pixels by which a window is narrowed on each side before rounding, at stride 16
Layer = nn.Conv2d | nn.MaxPool2d


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
        takes seconds (ResNet-50: 10). BackboneError, with what was found, for a network that is no such grid: pooled or
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


@dataclass(frozen=True)
class Step:
    """One convolution or pool of the main path."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    ceil: bool

    def map_side(self, side: int) -> int:
        """Cells along one axis for `side` cells of input; 0 where the input is too small."""
        spare = side + 2 * self.padding - self.dilation * (self.kernel - 1) - 1
        if side < 1 or spare < 0:
            return 0
        if not self.ceil:
            return spare // self.stride + 1
        cells = -(-spare // self.stride) + 1
        # the last pool must start inside the input or its left padding
        return cells - 1 if (cells - 1) * self.stride >= side + self.padding else cells


def layers_of(network: nn.Module) -> tuple[dict[Layer, int], int, int]:
    """Convolutions and pools as they run -> pixels between the cells that they read; stride and channels of the map."""
    sides: dict[Layer, list[int]] = {}
    layers = [layer for layer in network.modules() if isinstance(layer, Layer)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, images: sides.setdefault(layer, []).append(images[0].shape[2]))
        for layer in layers
    ]
    device = next((parameter.device for parameter in network.parameters()), torch.device("meta"))
    with torch.no_grad():
        maps = [network.eval()(torch.zeros(1, 3, side, side, device=device)) for side in (256, 256 + 192)]
    for hook in hooks:
        hook.remove()
    read = {layer: 192 // (both[1] - both[0]) for layer, both in sides.items()}
    return read, 192 // (maps[1].shape[2] - maps[0].shape[2]), maps[0].shape[1]


def steps_of(network: nn.Module) -> list[Step]:
    """The convolutions and pools of the main path; what stands beside it must be 1×1 and run after it."""
    steps, stride = list[Step](), 1
    layers, total, _ = layers_of(network)
    for layer, read in layers.items():
        if read == stride:  # else beside a path that has stepped on: the convolution of a shortcut
            kernel, own, padding = (_int(value) for value in (layer.kernel_size, layer.stride, layer.padding))
            steps.append(Step(kernel, own, padding, _int(layer.dilation), bool(getattr(layer, "ceil_mode", False))))
            stride *= own
    if stride != total:
        raise TypeError(
            f"the map has stride {total}, its Conv2d and MaxPool2d one behind the other {stride}; "
            "Geometry.of(module) runs the network"
        )
    return steps


def geometry_of(steps: Sequence[Step]) -> Geometry:
    """Stride and first centre of the map behind these steps."""
    stride, centre = 1, 0.0
    for step in steps:
        centre += ((step.kernel - 1) * step.dilation / 2 - step.padding) * stride
        stride *= step.stride
    return Geometry(stride, centre)


def map_side(steps: Sequence[Step], side: int) -> int:
    """Cells along one axis for an input of `side` pixels; 0 where the input is too small."""
    for step in steps:
        side = step.map_side(side)
    return side


def limit_stride(network: nn.Module, limit: int) -> None:
    """Change the layers in place so that the total stride stays within `limit`, without changing what a cell sees.

    A layer that would pass the limit loses its stride, and everything after it is dilated by as much: at every
    position that the strided network had, the new map holds the same value.
    """
    kept = {1: 1}  # stride of the network as it was -> as it becomes
    for layer, read in layers_of(network)[0].items():
        stride, dilation = _int(layer.stride), read // kept[read]
        if dilation > 1 and _int(layer.kernel_size) > 1:
            layer.padding = (_int(layer.padding) * dilation,) * 2
            layer.dilation = (_int(layer.dilation) * dilation,) * 2
        if kept[read] * stride > limit:
            layer.stride = (1, 1)
        kept[read * stride] = kept[read] * _int(layer.stride)


def _int(value: Any) -> int:
    """A layer's number, given once or once per axis."""
    both = value if isinstance(value, tuple) else (value, value)
    if both[0] != both[1] or not isinstance(both[0], int):
        raise TypeError(f"expected the same number for both axes of a layer, got {value}")
    return int(both[0])
