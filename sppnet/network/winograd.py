"""Convolutions with a third to a quarter of the multiplications, in float32 on a CPU: Winograd's, F(m × m, r × r).

A tile of 6 × 6 cells gives m × m cells of the result, m + r = 7 (Lavin and Gray 2016). Seen as polynomials, tile and
filter are multiplied by their values at six points each way: 36 products for each pair of channels instead of 144 where
filters have 3 × 3 weights, or 100 where they have 5 × 5. A layer that steps by s cells sees s² maps, one of every s-th
cell, by filters of a fraction of the size: 11 × 11 weights and s = 4 are 3 × 3 weights on 16 times the channels.
torch itself has no such convolution on most processors; on a GPU cuDNN chooses among several by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.network.tile_kernels import POINTS, convolve_tiles
from sppnet.network.tile_vectors import COLUMNS, FIELD
from sppnet.network.vectors import EIGHT

# What tiles cost, in multiplications of their products (measured); sums of torch run somewhat nearer to a core's limit.
CHANGE = 16  # of a number to a point, or back
READ = 20  # of a number of the filters at the points, which no cache holds from call to call
START = 2**25  # of a call: threads
GAIN = 1.2  # that many times less work than sums must be left

# A filter of r weights, seen as a polynomial, at the points 0, 1, -1, 2, -2 and infinity: of every point its powers and
# a factor, which together with the integers of `tile_vectors` give the result.
_POINTS = (0, 1, -1, 2, -2)
_FACTORS = (1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24)


@dataclass(frozen=True)
class _Transformed:
    """A layer's filters at the points, and what shows that they are still those of its weights."""

    filters: Tensor
    weight: Tensor  # an alias, which keeps the memory, and so the address, from being used by another tensor
    version: int
    stride: int

    def belongs_to(self, weight: Tensor, stride: int) -> bool:
        same = (self.weight.data_ptr(), self.weight.shape, self.weight.stride(), self.version, self.stride)
        return same == (weight.data_ptr(), weight.shape, weight.stride(), weight._version, stride)


class Convolution(nn.Conv2d):
    """nn.Conv2d, run by `convolve` where that saves time and no gradients are wanted; results differ by rounding.

    The filters at the points are made at the first such call and kept, four times as many numbers as 3 × 3 weights,
    until a call with gradients on (optimisers may change weights without a trace) or a change of the weights that
    torch counts: not one through ``.data`` or numpy. An infinite cell makes all cells of its tiles NaN.
    """

    _transformed: _Transformed | None = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._transformed = None
        if not self._pays(input):
            return super().forward(input)
        return convolve(input, self._filters(), self.bias, self.kernel_size[0], self.stride[0], self._sides())

    def _apply(self, *arguments: Any, **named: Any) -> Self:
        self._transformed = None  # to another device or precision
        return super()._apply(*arguments, **named)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_transformed": None}  # a copy has weights of its own

    def _pays(self, images: Tensor) -> bool:
        if torch.is_grad_enabled() or not suits(self):
            return False
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if images.device.type != "cpu" or images.dtype != torch.float32 or self.weight.is_inference():
            return False  # the version of a tensor made in inference mode is not known
        if images.ndim != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < 1:
            return False  # torch's, or torch's error
        if not self._is_whole() or not _wants_float32():
            return False
        return saves_time(self, images.shape)

    def _is_whole(self) -> bool:
        """Whether the parameters are what the layer says: the loop works on addresses and sees to nothing."""
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        parameters = [(self.weight, shape)] + ([] if self.bias is None else [(self.bias, (self.out_channels,))])
        return min(self._sides()) >= 0 and all(
            tuple(own.shape) == wanted and own.dtype == torch.float32 and own.device.type == "cpu"
            for own, wanted in parameters
        )

    def _sides(self) -> tuple[int, int]:
        height, width = (int(side) for side in self.padding)
        return height, width

    def _filters(self) -> Tensor:
        kept, stride = self._transformed, self.stride[0]
        if kept is None or not kept.belongs_to(self.weight, stride):
            weight = self.weight.detach()
            kept = _Transformed(filters_at_points(weight, stride), weight, self.weight._version, stride)
            self._transformed = kept
        return kept.filters


def _wants_float32() -> bool:
    """False where torch may use bfloat16 for products: its sums can, and these, which cancel, cannot."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set in torch's newer way, per library
        return False


def suits(layer: nn.Conv2d) -> bool:
    """Whether a layer can run by `convolve`."""
    plain = layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
    square = len({*layer.kernel_size}) == len({*layer.stride}) == 1 and not isinstance(layer.padding, str)
    fits = square and 3 <= _reach(layer.kernel_size[0], layer.stride[0]) <= 5 and layer.out_channels % COLUMNS == 0
    return plain and fits and layer.weight.dtype == torch.float32


def saves_time(layer: nn.Conv2d, shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether a layer that `suits` has tiles enough in images of shape (N, C, H, W), and gains by them.

    Counted are multiplications, in all cells of a tile, those beyond the border too.
    """
    kernel, stride, outputs = layer.kernel_size[0], layer.stride[0], layer.out_channels
    height, width = (_result_side(shape[2 + k], kernel, stride, int(layer.padding[k])) for k in (0, 1))
    side = _tile_side(kernel, stride)
    tiles = shape[0] * -(-height // side) * -(-width // side)
    inputs = _channels(layer.in_channels, stride)
    products = inputs * outputs
    ours = START + POINTS * (tiles * (products + CHANGE * (inputs + outputs)) + READ * products)
    return GAIN * ours < shape[0] * height * width * kernel**2 * layer.in_channels * outputs


def filters_at_points(weight: Tensor, stride: int = 1) -> Tensor:
    """Weights (O, C, k, k) of a layer, O a multiple of 16 -> what `convolve` takes; computed in float64.

    (36, O / 16, K, 16), K the channels times stride²: those of the first cell of a square of `stride` cells, then those
    of the next; zeros fill K up to a multiple of 8.
    """
    outputs, channels, kernel, _ = weight.shape
    reach = _reach(kernel, stride)
    powers = [[factor * point**k for k in range(reach)] for point, factor in zip(_POINTS, _FACTORS, strict=True)]
    change = torch.tensor([*powers, [0] * (reach - 1) + [1]], dtype=torch.float64)
    whole = F.pad(weight.double(), [0, stride * reach - kernel] * 2)
    parts = whole.view(outputs, channels, reach, stride, reach, stride)
    points = torch.einsum("ia,ocaybx,jb->ijyxco", change, parts, change).flatten(2, 4).flatten(0, 1)
    points = F.pad(points, [0, 0, 0, -points.shape[1] % EIGHT])
    panels = points.unflatten(2, (outputs // COLUMNS, COLUMNS)).transpose(1, 2)
    return panels.to(weight.dtype).contiguous()


def convolve(
    images: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
) -> Tensor:
    """F.conv2d of images (N, C, H, W) with the weights (O, C, kernel, kernel) of which `filters_at_points` are given.

    `padding` (rows, columns) of zeros on either side. Returns (N, O, H', W'), channels last. float32; the rounding
    errors are about ten times those of plain sums: 2e-5 of the largest result, 5e-5 for the largest steps. Raises
    ValueError for other numbers, and for filters and bias of another layer.
    """
    expected = (POINTS, filters.shape[1], _channels(images.shape[1], stride), COLUMNS)
    if {images.dtype, filters.dtype, torch.float32 if bias is None else bias.dtype} != {torch.float32}:
        raise ValueError(f"images, filters and bias must be float32, got {images.dtype} and {filters.dtype}")
    if tuple(filters.shape) != expected or min(padding) < 0:
        raise ValueError(
            f"filters for {images.shape[1]} channels and stride {stride} must have shape {expected}, "
            f"got {tuple(filters.shape)}; padding must not be negative, got {padding}"
        )
    if bias is not None and bias.shape != (filters.shape[1] * COLUMNS,):
        raise ValueError(f"bias must have shape ({filters.shape[1] * COLUMNS},), got {tuple(bias.shape)}")
    height, width = (_result_side(images.shape[2 + k], kernel, stride, padding[k]) for k in (0, 1))
    outputs = filters.shape[1] * COLUMNS
    cells = images.detach().permute(0, 2, 3, 1)
    side = _tile_side(kernel, stride)
    if images.shape[1] % EIGHT:
        cells, stride, padding = _squares(cells, stride, padding), 1, (0, 0)
    result = images.new_empty(len(images), height, width, outputs)
    offsets = images.new_zeros(outputs) if bias is None else bias.detach()
    contiguous = (filters.contiguous().numpy(), offsets.contiguous().numpy())
    threads = torch.get_num_threads()
    convolve_tiles(_channels_last(cells).numpy(), *contiguous, result.numpy(), side, stride, padding, threads)
    return result.permute(0, 3, 1, 2)


def _squares(cells: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """Cells (N, H, W, C), padding in front of them -> the channels of all cells of a square, (N, H / s, W / s, K)."""
    sides = [-(-(cells.shape[1 + k] + padding[k]) // stride) for k in (0, 1)]
    behind = [stride * sides[k] - padding[k] - cells.shape[1 + k] for k in (0, 1)]
    padded = F.pad(cells, [0, 0, padding[1], behind[1], padding[0], behind[0]])
    parts = padded.unflatten(2, (sides[1], stride)).unflatten(1, (sides[0], stride)).transpose(2, 3)
    channels = _channels(cells.shape[3], stride)
    squares = cells.new_zeros(len(cells), *sides, channels)
    squares[..., : stride**2 * cells.shape[3]].unflatten(3, (stride, -1)).copy_(parts.flatten(4))
    return squares


def _channels_last(cells: Tensor) -> Tensor:
    """(N, H, W, C), each cell contiguous; copied where it is not."""
    return cells if cells.stride(3) == 1 or not cells.numel() else cells.contiguous()


def _channels(channels: int, stride: int) -> int:
    """Those of the cells of a square, a multiple of 8."""
    return -(-channels * stride**2 // EIGHT) * EIGHT


def _reach(kernel: int, stride: int) -> int:
    """Weights each way of the filters on every `stride`-th cell."""
    return -(-kernel // stride)


def _tile_side(kernel: int, stride: int) -> int:
    return FIELD + 1 - _reach(kernel, stride)


def _result_side(side: int, kernel: int, stride: int, padding: int) -> int:
    return max(0, (side + 2 * padding - kernel) // stride + 1)
