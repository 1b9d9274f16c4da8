"""The kernel behind ``pool_windows`` on a CUDA device, in Triton, which torch brings along where it supports one.

One program computes one bin of one window for a block of channels. The map lies channels last, so each of its reads is
of neighbouring bytes, and all but the first come from the caches: a map of 256 × 43 × 57 is 1.3 MB in 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 256  # of a program
WARPS = 1  # a program's; each of their 32 threads then reads 16 bytes at once, or two times 16


@triton.jit
def largest_of_bins(  # type: ignore[no-untyped-def]  # Triton compiles annotations too
    cells, windows, bins, pooled, width, channels, count, BLOCK: tl.constexpr
):
    """Program (r · count + m, b): bin m of window r, channels b · BLOCK …

    cells: (H, W, C); windows: (R, 4) int32; bins: (count, 3) int32, level n and the bin's row and column; pooled:
    (R, count, C).
    """
    program = tl.program_id(0)
    window, place = windows + program // count * 4, bins + program % count * 3
    n, i, j = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    x1, y1, x2, y2 = tl.load(window), tl.load(window + 1), tl.load(window + 2), tl.load(window + 3)
    top, bottom = y1 + i * (y2 - y1) // n, y1 + ((i + 1) * (y2 - y1) + n - 1) // n
    left, right = x1 + j * (x2 - x1) // n, x1 + ((j + 1) * (x2 - x1) + n - 1) // n
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    largest = tl.load(cells + (top * width + left).to(tl.int64) * channels + channel, mask=inside)
    for y in range(top, bottom):
        for x in range(left, right):
            cell = tl.load(cells + (y * width + x).to(tl.int64) * channels + channel, mask=inside)
            largest = tl.maximum(largest, cell).to(cell.dtype)  # a maximum of 16 bits may come in 32
    tl.store(pooled + program.to(tl.int64) * channels + channel, largest, mask=inside)


def pool_bins(feature_map: Tensor, windows: Tensor, bins: Tensor) -> Tensor:
    """Maximum of every bin of every window: (R, M, C), of the map's type.

    feature_map: (C, H, W) without NaN; windows: (R, 4) xyxy cells, half-open, not empty and inside the map (not checked
    here); bins: (M, 3), level n and the bin's row and column. All on one device.
    """
    channels, _, width = feature_map.shape
    cells = feature_map.detach().permute(1, 2, 0).contiguous()
    pooled = torch.empty((len(windows), len(bins), channels), dtype=cells.dtype, device=cells.device)
    if not pooled.numel():
        return pooled
    block = min(CHANNELS, triton.next_power_of_2(channels))
    grid = (len(windows) * len(bins), triton.cdiv(channels, block))
    corners, places = windows.to(torch.int32).contiguous(), bins.to(torch.int32).contiguous()
    with torch.cuda.device_of(cells):  # Triton runs on the current device
        largest_of_bins[grid](cells, corners, places, pooled, width, channels, len(bins), BLOCK=block, num_warps=WARPS)
    return pooled
