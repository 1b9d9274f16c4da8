"""3 × 3 convolutions with a quarter of the multiplications, in float32 on a CPU: Winograd's, F(4 × 4, 3 × 3).

A tile of 6 × 6 cells gives 4 × 4 cells of the result (Lavin and Gray 2016). Seen as polynomials, tile and filter are
multiplied by their values at six points each way: 36 products for each pair of channels instead of 144. To these values
and back lead small matrices, so all of it is matrix products of torch, over blocks of tiles that stay in the caches.
torch itself has no such convolution on most processors; on a GPU cuDNN chooses among several by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

TILE, FIELD = 4, 6  # cells of a tile of the result each way, and those of the input that it sees
CHANNELS = 128  # more than these, in and out: with fewer the changes to and from points cost what the products save
TILES = 48  # fewer in a call do not pay for reading the filters, four times as many numbers as weights
WASTE = 1.25  # cells that tiles compute beyond the border, as a factor
BLOCK = 2**23  # bytes of a block of tiles at the points, of input and result together

# At the points 0, 1, -1, 2, -2 and infinity.
_TO_POINTS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_FILTER_TO_POINTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_FROM_POINTS = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


@dataclass(frozen=True)
class _Transformed:
    """A layer's filters at the points, and what shows that they are still those of its weights."""

    filters: Tensor
    weight: Tensor  # an alias, which keeps the memory, and so the address, from being used by another tensor
    version: int

    def belongs_to(self, weight: Tensor) -> bool:
        return self.weight.data_ptr() == weight.data_ptr() and self.version == weight._version


class Convolution(nn.Conv2d):
    """nn.Conv2d, run by `convolve` where that saves time and no gradients are wanted; results differ by rounding.

    The filters at the points are made at the first such call and kept, four times as many numbers as the weights. They
    follow every change of the weights but those that torch does not see either: through ``.data`` or numpy.
    """

    _transformed: _Transformed | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self._pays(input):
            return super().forward(input)
        return convolve(input, self._filters(), self.bias, self._sides())

    def _apply(self, *arguments: Any, **named: Any) -> Self:
        self._transformed = None  # to another device or precision
        return super()._apply(*arguments, **named)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_transformed": None}  # a copy has weights of its own

    def _pays(self, images: Tensor) -> bool:
        if not suits(self) or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        if images.device.type != "cpu" or images.dtype != torch.float32 or self.weight.is_inference():
            return False  # the version of a tensor made in inference mode is not known
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            return False  # torch's, or torch's error
        if torch.get_float32_matmul_precision() != "highest":
            return False  # products in bfloat16 are too coarse for sums that cancel
        return saves_time(images.shape, self._sides())

    def _sides(self) -> tuple[int, int]:
        height, width = (int(side) for side in self.padding)
        return height, width

    def _filters(self) -> Tensor:
        if self._transformed is None or not self._transformed.belongs_to(self.weight):
            weight = self.weight.detach()
            self._transformed = _Transformed(filters_at_points(weight), weight, self.weight._version)
        return self._transformed.filters


def suits(layer: nn.Conv2d) -> bool:
    """Whether a layer can run by `convolve`, and has channels enough to gain by it."""
    plain = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.groups == 1
    padded = layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and max(layer.padding) <= FIELD - TILE
    wide = min(layer.in_channels, layer.out_channels) > CHANNELS
    return layer.kernel_size == (3, 3) and plain and padded and wide and layer.weight.dtype == torch.float32


def saves_time(shape: torch.Size | tuple[int, ...], padding: tuple[int, int]) -> bool:
    """Whether images of shape (N, C, H, W) have tiles enough, and not too much of them beyond the border."""
    height, width = _result_size(shape, padding)
    tiles = _tiles(height) * _tiles(width)
    return shape[0] * tiles >= TILES and TILE * TILE * tiles <= WASTE * height * width


def filters_at_points(weight: Tensor) -> Tensor:
    """Weights (O, C, 3, 3) -> (36, C, O), computed in float64."""
    change = torch.tensor(_FILTER_TO_POINTS, dtype=torch.float64)
    points = torch.einsum("ia,ocab,jb->ijco", change, weight.double(), change)
    return points.flatten(0, 1).to(weight.dtype).contiguous()


def convolve(images: Tensor, filters: Tensor, bias: Tensor | None, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """F.conv2d of images (N, C, H, W) with 3 × 3 filters from `filters_at_points` -> (N, O, H', W'), channels last.

    `padding` (rows, columns) of zeros on either side, at most 2. The rounding errors of float32 are about ten times
    those of plain sums: up to 1e-5 of the largest result.
    """
    height, width = _result_size(images.shape, padding)
    cells = images.permute(0, 2, 3, 1)
    result = images.new_empty(len(images), height, width, filters.shape[2])
    block = _Block(filters, _tiles(height), _tiles(width), len(images))
    for first in range(0, len(images), block.images):
        for top in range(0, height, block.rows * TILE):
            part = result[first : first + block.images, top : top + block.rows * TILE]
            computed = block.run(cells[first : first + block.images], top, padding)
            torch.add(computed[: len(part), : part.shape[1], :width], 0 if bias is None else bias, out=part)
    return result.permute(0, 3, 1, 2)


class _Block:
    """Memory for some rows of tiles, of as many images as fit; used again for every block."""

    def __init__(self, filters: Tensor, tall: int, wide: int, images: int) -> None:
        self._filters = filters
        points, channels, outputs = filters.shape
        bytes_of_a_row = wide * points * (channels + outputs) * filters.element_size()
        rows = max(1, BLOCK // bytes_of_a_row)
        self.rows = -(-tall // -(-tall // rows))  # blocks of about the same height
        self.images = max(1, min(images, rows // tall))
        field = FIELD - TILE
        self._cells = filters.new_zeros(self.images, self.rows * TILE + field, wide * TILE + field, channels)
        image, row, column, _ = self._cells.stride()
        shape = (FIELD, FIELD, self.images, self.rows, wide, channels)
        self._tiles = self._cells.as_strided(shape, (row, column, image, TILE * row, TILE * column, 1))
        self._gathered = filters.new_empty(shape)
        self._inputs = filters.new_empty(points, self._gathered[0, 0].numel())
        self._products = filters.new_empty(points, self.images * self.rows * wide, outputs)
        self._outputs = filters.new_empty(TILE * TILE, self._products[0].numel())
        self._to_points, self._from_points = (_both_ways(m).to(filters) for m in (_TO_POINTS, _FROM_POINTS))

    def run(self, cells: Tensor, top: int, padding: tuple[int, int]) -> Tensor:
        """The result of rows `top` … of images (N, H, W, C), without bias: (N, TILE · rows, TILE · wide, O)."""
        self._fill(cells, top - padding[0], padding[1])
        self._gathered.copy_(self._tiles)
        torch.mm(self._to_points, self._gathered.flatten(0, 1).flatten(1), out=self._inputs)
        inputs = self._inputs.view(len(self._inputs), -1, self._filters.shape[1])
        torch.bmm(inputs, self._filters, out=self._products)
        torch.mm(self._from_points, self._products.flatten(1), out=self._outputs)
        tiles = self._outputs.view(TILE, TILE, self.images, self.rows, -1, self._filters.shape[2])
        return tiles.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)

    def _fill(self, cells: Tensor, top: int, left: int) -> None:
        """The rows `top` … of the images, zeros beyond their border; columns beyond it stay the zeros they were."""
        images, height, width, _ = cells.shape
        start, stop = max(0, top), min(height, top + self._cells.shape[1])
        self._cells[:, : start - top] = 0
        self._cells[:, stop - top :] = 0
        self._cells[:images, start - top : stop - top, left : left + width] = cells[:, start:stop]


def _both_ways(matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """A change along columns and along rows, as one matrix on tiles in a row."""
    one_way = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one_way, one_way)


def _result_size(shape: torch.Size | tuple[int, ...], padding: tuple[int, int]) -> tuple[int, int]:
    return shape[2] + 2 * padding[0] - 2, shape[3] + 2 * padding[1] - 2


def _tiles(cells: int) -> int:
    return -(-cells // TILE)
