"""Local response normalisation over space within each channel, as the paper's networks have it; one pass on a CPU.

Written as five operations of torch it takes 40 % of ZF-5's time on a CPU: each of them reads and writes the finest maps
of the network. The loop here keeps a row of sums of squares and reads the map once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sppnet.compiling import compiled, in_parts

COMPILED_ON = "cpu"
ROWS_PER_PART = 4  # fewer are not worth a thread
PIECE = 2048  # numbers whose sums lie in the first cache


class LocalResponseNorm(nn.Module):
    """Normalisation over a spatial neighbourhood within each channel (release: size 3, alpha 5e-5, beta 0.75).

    y = x · (1 + alpha · mean(x²))^(-beta), the mean over the size × size cells around x; cells beyond the border
    count as zeros. `size` is odd. (N, C, H, W) -> the same shape.
    """

    def __init__(self, size: int = 3, alpha: float = 5e-5, beta: float = 0.75) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd, so that a cell has as many neighbours on either side, got {size}")
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == COMPILED_ON and not torch.is_grad_enabled() and x.numel():
            return self._compiled(x)
        exact = x if x.dtype == torch.float64 else x.float()  # 16-bit floats are rounded once, at the end
        mean = F.avg_pool2d(exact * exact, self.size, stride=1, padding=self.size // 2, count_include_pad=True)
        if torch.is_grad_enabled() or self.beta != 0.75:
            return (exact * (1 + self.alpha * mean).pow(-self.beta)).to(x.dtype)
        root = mean.mul_(self.alpha).add_(1).rsqrt_()  # z^-0.75 = z^-½ · z^-¼ in place: half of the memory traffic
        return root.sqrt().mul_(root).mul_(exact).to(x.dtype)

    def _compiled(self, x: Tensor) -> Tensor:
        exact = x if x.dtype == torch.float64 else x.float()
        cells = exact.detach().permute(0, 2, 3, 1).contiguous().numpy()
        normalised = normalise(cells, self.size, self.alpha, self.beta, torch.get_num_threads())
        return torch.from_numpy(normalised).permute(0, 3, 1, 2).to(x.dtype)


def normalise(cells: NDArray[Any], size: int, alpha: float, beta: float, threads: int = 1) -> NDArray[Any]:
    """The same of C-contiguous (N, H, W, C) maps in float32 or float64."""
    normalised = np.empty_like(cells)
    rows = cells.shape[0] * cells.shape[1]

    def run(start: int, stop: int) -> None:
        _normalise_rows(cells, normalised, size // 2, cells.dtype.type(alpha / size**2), beta, start, stop)

    in_parts(run, rows, threads, ROWS_PER_PART)
    return normalised


@compiled(error_model="numpy")  # a check for zero before every division would keep it from being a vector's
def _normalise_rows(cells: Any, normalised: Any, reach: int, alpha: Any, beta: float, start: int, stop: int) -> None:
    """Rows `start` … `stop` - 1 of all images. `alpha` is that of a sum of squares, in the type of the cells."""
    height, width, channels = cells.shape[1], cells.shape[2], cells.shape[3]
    count = width * channels
    # Rows lie flat, so that one loop goes over all channels of all cells: the next cell is `channels` further.
    columns = np.zeros(count + 2 * reach * channels, cells.dtype)  # sums down the columns, zeros beyond the border
    inner = columns[reach * channels : reach * channels + count]
    total = np.empty(PIECE, cells.dtype)
    one, power = cells.dtype.type(1), cells.dtype.type(-beta)
    for row in range(start, stop):
        image, y = row // height, row % height
        first = max(0, y - reach)
        line = cells[image, first].reshape(-1)
        for i in range(count):
            inner[i] = line[i] * line[i]
        for other in range(first + 1, min(height, y + reach + 1)):
            line = cells[image, other].reshape(-1)
            for i in range(count):
                inner[i] += line[i] * line[i]
        cell, result = cells[image, y].reshape(-1), normalised[image, y].reshape(-1)
        for begin in range(0, count, PIECE):
            piece = min(PIECE, count - begin)
            own = columns[begin:]
            if reach:
                near, far = columns[begin + channels :], columns[begin + 2 * channels :]
                for i in range(piece):
                    total[i] = own[i] + near[i] + far[i]
            else:
                total[:piece] = own[:piece]
            for k in range(3, 2 * reach + 1):
                more = columns[begin + k * channels :]
                for i in range(piece):
                    total[i] += more[i]
            source, target = cell[begin:], result[begin:]
            if beta == 0.75:  # a third of the time of the power
                for i in range(piece):
                    root = np.sqrt(one + alpha * total[i])
                    target[i] = source[i] / (root * np.sqrt(root))
            else:
                for i in range(piece):
                    target[i] = source[i] * (one + alpha * total[i]) ** power
