"""Pool 2,000 windows of a 256 × 43 × 57 map: sppnet against torchvision's roi_pool, once per level.

    python benchmarks/pool_windows.py [--rounds 7] [--threads N] [--levels 3 5 7] [--device cuda] [--precision float16]

The two are timed in pairs, one after the other in every round, so that a busy machine slows both; the ratio is taken
pair by pair. Results must be bit-equal. With SPPNET_SHARED set the windows are real proposals of one VOC image,
projected at scale 688; otherwise random boxes of similar sizes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torchvision

from sppnet import machine
from sppnet.detection.windows import project_windows
from sppnet.network.pyramid import pool_windows

CHANNELS, MAP_SIZE, LEVELS, COUNT, SCALE = 256, (43, 57), (1, 2, 3, 6), 2000, 688
GEOMETRY = SimpleNamespace(stride=16, first_centre=7.5, shrink=6.5)  # a map of ceil(side / 16) cells


def proposals() -> tuple[np.ndarray, tuple[int, int], str]:
    """(2000, 4) boxes, the image's (height, width), and where they are from."""
    folder = os.environ.get("SPPNET_SHARED")
    if folder:
        windows = Path(folder) / "voc/proposals/selective_search_fast_VOC2007.npz"
        if not windows.is_file():
            sys.exit(f"{windows}: no such file; correct SPPNET_SHARED, or unset it to measure random boxes")
        with np.load(windows, allow_pickle=False) as file:
            ids, offsets, boxes = file["ids"], file["offsets"], file["boxes"]
        for image in np.flatnonzero(np.diff(offsets) >= COUNT):
            found = boxes[offsets[image] : offsets[image + 1]]
            size = (int(found[:, 3].max()), int(found[:, 2].max()))
            if 370 <= size[0] <= 375 and size[1] == 500:
                return found[:COUNT].astype(np.float64), size, f"selective search of VOC2007/{ids[image]}"
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(20), np.log(375), (COUNT, 2)))
    corners = rng.uniform(0, 1, (COUNT, 2)) * (np.array([500, 375]) - np.minimum(sides, 375))
    return np.concatenate([corners, corners + sides], axis=1), (375, 500), "random boxes"


def roi_pool_per_level(feature_map: torch.Tensor, regions: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    return torch.cat([torchvision.ops.roi_pool(feature_map[None], regions, n).flatten(1) for n in levels], dim=1)


def traffic(windows: np.ndarray, levels: Sequence[int], size: int) -> tuple[int, int]:
    """Bytes of every cell of every window once, and bytes written."""
    cells = int(((windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])).sum())
    return size * CHANNELS * cells, size * CHANNELS * len(windows) * sum(n * n for n in levels)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="of the pyramid (default: 1 2 3 6)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32", help="of the map")
    options = parser.parse_args(arguments)
    levels, device = tuple(options.levels), options.device
    if device.type == "cpu" and options.precision != "float32":
        parser.error("--precision float16 is for a GPU: on a CPU torchvision has no roi_pool in it")
    torch.set_num_threads(options.threads)

    boxes, image_size, origin = proposals()
    windows = project_windows(boxes, image_size, SCALE, GEOMETRY, MAP_SIZE)
    feature_map = torch.relu(torch.randn(CHANNELS, *MAP_SIZE, generator=torch.Generator().manual_seed(0)))
    feature_map = feature_map.to(device, getattr(torch, options.precision))
    last = feature_map.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    inclusive = torch.from_numpy(windows - np.array([0, 0, 1, 1])).float()
    regions = torch.cat([torch.zeros(len(windows), 1), inclusive], dim=1).to(feature_map)

    equal = torch.equal(pool_windows(feature_map, windows, levels), roi_pool_per_level(feature_map, regions, levels))
    rounds = [
        (
            machine.timed(lambda: pool_windows(feature_map, windows, levels), device)[0],
            machine.timed(lambda: pool_windows(last, windows, levels), device)[0],
            machine.timed(lambda: roi_pool_per_level(feature_map, regions, levels), device)[0],
        )
        for _ in range(max(5, options.rounds))
    ]
    ours, ours_last, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = sorted(peer / mine for mine, _, peer in rounds)
    read, written = traffic(windows, levels, feature_map.element_size())
    bandwidth = machine.copy_bandwidth(device)
    mean_cells = read / (feature_map.element_size() * CHANNELS * len(windows))

    print(f"{len(windows)} windows ({origin}), {mean_cells:.0f} cells each on average, {options.precision}", end=", ")
    print(f"{options.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device))
    print(f"sppnet pool_windows, map (C, H, W)     {1e3 * ours:8.2f} ms   median of {len(rounds)}")
    print(f"sppnet pool_windows, map channels last {1e3 * ours_last:8.2f} ms")
    print(f"torchvision roi_pool, once per level   {1e3 * theirs:8.2f} ms")
    print(f"ratio, pair by pair: median {statistics.median(ratios):.1f}, from {ratios[0]:.1f} to {ratios[-1]:.1f}")
    print(f"bytes: {written / 1e6:.0f} MB written; the windows have {read / 1e6:.0f} MB of cells, of a map of", end=" ")
    print(f"{feature_map.nbytes / 1e6:.1f} MB that the caches hold")
    print(f"copy bandwidth of this machine {bandwidth / 1e9:.1f} GB/s (read + written); ours writes", end=" ")
    print(
        f"{written / ours / 1e9:.1f} GB/s, {written / ours / bandwidth:.2f} of it; cells and result together", end=" "
    )
    print(f"{(read + written) / ours / 1e9:.1f} GB/s, {(read + written) / ours / bandwidth:.2f}")
    print(f"bit-equal: {equal}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
