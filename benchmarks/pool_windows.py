"""Pool 2,000 windows of a 256 × 43 × 57 map: sppnet beside torchvision's roi_pool, once per level.

    python benchmarks/pool_windows.py [--rounds 7] [--threads N] [--levels 3 5 7] [--device cuda] [--precision float16]

All are timed one after the other in every round, so that a busy machine slows both; ratios are taken round by round.
On a CPU the compiled loop is called directly, too: what the operator adds is checks and torch's dispatch. Results must
be bit-equal. With SPPNET_SHARED set the windows are real proposals of one VOC image, projected at scale 688; otherwise
random boxes of similar sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torchvision
from machine import alternate, cores, describe, milliseconds, ratio, seconds
from torch import Tensor

from examples import SIZE, windows
from sppnet.backbones.geometry import Geometry
from sppnet.backbones.windows import project_windows
from sppnet.ops._pool_cpu import pool_cells
from sppnet.ops.pyramid import pool_windows

CHANNELS, MAP_SIZE, LEVELS, SCALE = 256, (43, 57), (1, 2, 3, 6), 688
GEOMETRY = Geometry(stride=16, first_centre=7.5)  # a map of ceil(side / 16) cells
COPIED = 256 * 2**20  # bytes, of a copy beside which the rates can be read


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    levels, device = tuple(options.levels), options.device
    boxes, _, origin = windows(options.windows)
    cells = project_windows(boxes, SIZE, SCALE, GEOMETRY, MAP_SIZE)
    feature_map = torch.relu(torch.randn(CHANNELS, *MAP_SIZE, generator=torch.Generator().manual_seed(0)))
    feature_map = feature_map.to(device, getattr(torch, options.precision))
    last = feature_map.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    inclusive = torch.from_numpy(cells - np.array([0, 0, 1, 1])).float()
    regions = torch.cat([torch.zeros(len(cells), 1), inclusive], dim=1).to(feature_map)
    source = torch.ones(COPIED // 4, device=device)
    target = torch.zeros_like(source)
    ways = {
        "sppnet, map (C, H, W)": partial(pool_windows, feature_map, cells, levels),
        "sppnet, map channels last": partial(pool_windows, last, cells, levels),
        "roi_pool, once per level": partial(roi_pool_per_level, feature_map, regions, levels),
        "copy": partial(target.copy_, source),
    }
    first, second, peer, loop = *list(ways)[:3], "compiled loop alone"
    if device.type == "cpu":
        rows = np.concatenate([np.zeros((len(cells), 1), np.int64), cells], axis=1)
        ways[loop] = partial(pool_cells, last[None].numpy(), rows, levels, options.threads)
    equal = torch.equal(ways[first](), ways[peer]())
    times = alternate({name: partial(seconds, way, device) for name, way in ways.items()}, options.rounds)
    written = feature_map.element_size() * CHANNELS * len(cells) * sum(n * n for n in levels)
    rates = {first: written / min(times[first]), "copy": 2 * COPIED / min(times["copy"])}

    print(f"{describe(device)}, {options.threads} threads; {len(cells)} windows ({origin}), {options.precision}")
    print(f"{peer:<28}{milliseconds(times[peer]):>10} ms")
    for name in (first, second):
        print(f"{name:<28}{milliseconds(times[name]):>10} ms   roi_pool / sppnet {ratio(times[peer], times[name])}")
    if loop in times:
        print(f"{loop:<28}{milliseconds(times[loop]):>10} ms   operator / loop {ratio(times[second], times[loop])}")
    print(f"ours writes {rates[first] / 1e9:.1f} GB/s; a copy reads and writes {rates['copy'] / 1e9:.1f} GB/s here")
    print(f"bit-equal: {equal}")
    return 0 if equal else 1


def roi_pool_per_level(feature_map: Tensor, regions: Tensor, levels: Sequence[int]) -> Tensor:
    return torch.cat([torchvision.ops.roi_pool(feature_map[None], regions, n).flatten(1) for n in levels], dim=1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="of the pyramid (default: 1 2 3 6)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32", help="of the map")
    options = parser.parse_args(arguments)
    if options.device.type == "cpu" and options.precision != "float32":
        parser.error("--precision float16 is for a GPU: on a CPU torchvision has no roi_pool in it")
    if min(options.windows, options.rounds, options.threads) < 1:
        parser.error("--windows, --rounds and --threads must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
