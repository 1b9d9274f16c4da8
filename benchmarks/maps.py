"""What makes maps fast on a CPU: strips, convolutions by tiles, normalisation; each against torch's way.

    python benchmarks/maps.py [--trunks zf5 mobilenet_v2 vgg16 alexnet] [--scales 688 1200] [--rounds 5] [--threads N]

Images are random and have sides 3 : 4, in float32; all but what is compared is the same on both sides. The two are
timed in pairs, one after the other in every round, so that a busy machine slows both; ratios are taken pair by pair.
Exit status 1 where results differ by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from sppnet.config import TrunkSettings, WeightsSettings
from sppnet.network import normalisation, strips, winograd
from sppnet.network.normalisation import LocalResponseNorm
from sppnet.network.trunks import TRUNKS, Trunk, build_trunk

TOLERANCE = 1e-5  # of the largest value
TOLERANCE_OF_TILES = 1e-4  # after several layers


def whole(trunk: Trunk, images: Tensor) -> Tensor:
    """The trunk's map without strips."""
    with mock.patch.object(strips, "LARGE", float("inf")):
        return trunk(images)


def plain(trunk: Trunk, images: Tensor) -> Tensor:
    """The trunk's map by torch's convolutions."""
    with mock.patch.object(winograd, "GAIN", float("inf")):
        return trunk(images)


def by_torch(layer: LocalResponseNorm, images: Tensor) -> Tensor:
    """The normalisation by torch's operations, as on a GPU."""
    with mock.patch.object(normalisation, "COMPILED_ON", "no device"):
        return layer(images)


def timed(function: Callable[[], Tensor]) -> float:
    time.sleep(0.05)  # OpenMP's threads spin for a while after the previous call and would take a core from this one
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.inference_mode()
def compare(
    name: str, ours: Callable[[], Tensor], peer: Callable[[], Tensor], rounds: int, tolerance: float = TOLERANCE
) -> bool:
    """Print a row of the table; False where the results differ."""
    expected = peer()
    difference = float((ours() - expected).abs().max() / expected.abs().max())
    pairs = [(timed(ours), timed(peer)) for _ in range(rounds)]
    mine, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    span = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})"
    print(f"| {name} | {mine:,.0f} | {theirs:,.0f} | {span} | {difference:.0e} |", flush=True)
    return difference <= tolerance


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunks", nargs="+", choices=TRUNKS, default=["zf5", "mobilenet_v2", "vgg16", "alexnet"])
    parser.add_argument("--scales", nargs="+", type=int, default=[688, 1200], help="shorter sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.threads, *options.scales) < 1:
        parser.error("--rounds, --threads and --scales must be at least 1")
    torch.set_num_threads(options.threads)
    columns = "ratio, median (from – to) | difference |\n|---|---|---|---|---|"
    trunks = [build_trunk(TrunkSettings(name=n, weights=WeightsSettings(source="random"))) for n in options.trunks]
    agree = True
    for title, other, tolerance in (
        ("maps | strips, ms | whole, ms", whole, TOLERANCE),
        ("maps | convolutions by tiles, ms | torch's, ms", plain, TOLERANCE_OF_TILES),
    ):
        print(f"\n| {title} | {columns}")
        for trunk in trunks:
            for scale in options.scales:
                images = torch.randn(1, 3, scale, scale * 4 // 3)
                ours, peer = (lambda t=trunk, x=images: t(x)), (lambda t=trunk, x=images, o=other: o(t, x))
                agree &= compare(f"{trunk.name}, {scale}", ours, peer, options.rounds, tolerance)
    print(f"\n| normalisation | compiled, ms | torch, ms | {columns}")
    layer = LocalResponseNorm()
    for scale in options.scales:
        cells = torch.randn(1, 96, scale // 2, scale * 2 // 3).to(memory_format=torch.channels_last)
        ours, peer = (lambda x=cells: layer(x)), (lambda x=cells: by_torch(layer, x))
        agree &= compare(f"96 × {cells.shape[2]} × {cells.shape[3]}", ours, peer, options.rounds)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
