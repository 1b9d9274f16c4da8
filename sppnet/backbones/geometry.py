"""Where on the image a cell of a map looks, and how large the map is: from the layers, or by running the network.

Of the built-in backbones all follows from the layers, before there are weights; `Geometry.of` finds it for any network.
Along the main path of a network every convolution or pool adds ((kernel - 1) · dilation / 2 - padding) · stride so
far to the centre of the first cell, and multiplies the stride. Kernels are square and the same in both axes.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.squeezenet import Fire

from sppnet.backbones.architectures import LocalResponseNorm, MBConv
from sppnet.backbones.probing import probe
from sppnet.errors import SppnetError

SHRINK = 6.5  # release: pixels by which a window is narrowed on each side before rounding, at stride 16
_MAIN_PATH = {  # blocks with branches -> the children that decide stride and centre, in order
    BasicBlock: ("conv1", "conv2"),
    Bottleneck: ("conv1", "conv2", "conv3"),
    InvertedResidual: ("conv",),
    Fire: ("squeeze", "expand3x3"),
}
_IN_PLACE = {f"torch.nn.modules.{kind}" for kind in ("activation", "batchnorm", "dropout")}  # cell by cell


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


def steps_of(modules: Iterable[nn.Module]) -> list[Step]:
    """The convolutions and pools that an input passes through, blocks by their main path."""
    steps = []
    for layer in (layer for module in modules for layer in _main_path(module)):
        kernel, stride, padding = (_int(value) for value in (layer.kernel_size, layer.stride, layer.padding))
        ceil = isinstance(layer, nn.MaxPool2d) and layer.ceil_mode
        steps.append(Step(kernel, stride, padding, _int(layer.dilation), ceil))
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


def limit_stride(modules: Iterable[nn.Module], limit: int) -> None:
    """Change the layers in place so that the total stride stays within `limit`, without changing what a cell sees.

    A layer that would pass the limit loses its stride, and everything after it is dilated by as much: at every
    position that the strided network had, the new map holds the same value.
    """
    stride, dilation = 1, 1
    for module in modules:
        for layer in _main_path(module):
            if dilation > 1 and _int(layer.kernel_size) > 1:
                layer.padding = (_int(layer.padding) * dilation,) * 2
                layer.dilation = (_int(layer.dilation) * dilation,) * 2
            if stride * _int(layer.stride) > limit:
                dilation *= _int(layer.stride)
                layer.stride = (1, 1)
            stride *= _int(layer.stride)
        _restride_shortcuts(module)


def channels_of(modules: Sequence[nn.Module]) -> int:
    """Channels of the map behind these modules."""
    last = [layer for module in modules for layer in _main_path(module) if isinstance(layer, nn.Conv2d)][-1]
    for fire in (inner for module in modules for inner in module.modules() if isinstance(inner, Fire)):
        if fire.expand3x3 is last:  # a fire block joins two branches
            return fire.expand1x1.out_channels + last.out_channels
    return last.out_channels


def _main_path(module: nn.Module) -> Iterator[nn.Conv2d | nn.MaxPool2d]:
    if isinstance(module, nn.Conv2d | nn.MaxPool2d):
        yield module
        return
    kind, children = type(module), list(module.children())
    names, in_order = _MAIN_PATH.get(kind), kind.forward in (nn.Sequential.forward, MBConv.forward)
    in_place = not children and (kind.__module__ in _IN_PLACE or kind in (nn.Identity, LocalResponseNorm))
    if names is None and not in_order and not in_place:
        raise TypeError(
            f"the geometry of a layer of type {kind.__name__} is not known; use Conv2d or MaxPool2d, "
            "one behind the other, or Geometry.of(module), which runs the network"
        )
    for child in children if names is None else [getattr(module, name) for name in names]:
        yield from _main_path(child)


def _restride_shortcuts(module: nn.Module) -> None:
    """The 1×1 convolution beside a residual block takes the stride that is left on the block's main path."""
    for block in module.modules():
        if isinstance(block, BasicBlock | Bottleneck) and block.downsample is not None:
            block.downsample[0].stride = (math.prod(_int(layer.stride) for layer in _main_path(block)),) * 2


def _int(value: Any) -> int:
    """A layer's number, given once or once per axis."""
    both = value if isinstance(value, tuple) else (value, value)
    if both[0] != both[1] or not isinstance(both[0], int):
        raise TypeError(f"expected the same number for both axes of a layer, got {value}")
    return int(both[0])
