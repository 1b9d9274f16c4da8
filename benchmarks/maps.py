"""Maps of an image on a CPU: the OpenVINO runtime beside torch, and beside the code of another checkout.

    python benchmarks/maps.py [--backbones mobilenet_v2:353 alexnet:688] [--threads 1 2] [--before CHECKOUT]

Images are random and have sides 3 : 4; weights are random; everything is float32. All ways are timed one after the
other in every round, the other checkout in a process of its own, so that a busy machine slows all of them; ratios are
taken round by round. Exit status 1 where the maps of OpenVINO and torch differ by more than rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from checkouts import existing, server
from machine import alternate, cores, describe, milliseconds, ratio, seconds
from torch import Tensor

from sppnet.backbones.backbone import Backbone, build_backbone
from sppnet.backbones.runtime import make_runtime
from sppnet.config import BackboneSettings, WeightsSettings

CASES = [f"{name}:{side}" for name in ("mobilenet_v2", "squeezenet1_1") for side in (688, 353)]
CASES += [f"{name}:688" for name in ("alexnet", "vgg16", "resnet18")]
TOLERANCE = 1e-4  # of the largest value, after all layers
# The other checkout times one call for each request.
BEFORE = """
import functools, json, sys, time, torch
try:
    from sppnet.network.trunks import build_trunk as build
    from sppnet.config import TrunkSettings as Settings, WeightsSettings
except ImportError:
    from sppnet.backbones.backbone import build_backbone as build
    from sppnet.config import BackboneSettings as Settings, WeightsSettings
backbone = functools.cache(lambda name: build(Settings(name=name, weights=WeightsSettings(source="random"))))
images = functools.cache(lambda side: torch.randn(1, 3, side, side * 4 // 3))
for line in sys.stdin:
    request = json.loads(line)
    torch.set_num_threads(request["threads"])
    model, pixels = backbone(request["name"]), images(request["side"])
    with torch.inference_mode():
        start = time.perf_counter()
        model(pixels)
        print(json.dumps(time.perf_counter() - start), flush=True)
"""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    print(describe())
    print(
        "| maps | threads | OpenVINO, ms | torch, ms | before, ms | torch / OpenVINO | before / OpenVINO | difference |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    agree = True
    with server(options.before, BEFORE) as before:
        for case in options.backbones:
            name, _, side = case.partition(":")
            backbone = build_backbone(BackboneSettings(name=name, weights=WeightsSettings(source="random")))
            images = torch.randn(1, 3, int(side), int(side) * 4 // 3)
            for threads in options.threads:
                torch.set_num_threads(threads)
                ways = runtimes(backbone, threads)
                measurements = {way: partial(seconds, partial(run, images)) for way, run in ways.items()}
                if before is not None:
                    measurements["before"] = partial(before.ask, name=name, side=int(side), threads=threads)
                expected, found = ways["torch"](images), ways.get("openvino", ways["torch"])(images)
                difference = float((found - expected).abs().max() / expected.abs().max())
                agree &= difference <= TOLERANCE
                print(
                    row(f"{name}, {side} | {threads}", alternate(measurements, options.rounds), difference), flush=True
                )
    return 0 if agree else 1


def runtimes(backbone: Backbone, threads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Images (1, 3, H, W) -> map, by each runtime that is installed."""
    names = ("torch", "openvino") if importlib.util.find_spec("openvino") else ("torch",)
    return {name: make_runtime(backbone, name, "float32", threads) for name in names}


def row(name: str, times: dict[str, list[float]], difference: float) -> str:
    """One line of the table; empty cells for what was not measured."""
    medians = [milliseconds(times[way]) if way in times else "" for way in ("openvino", "torch", "before")]
    own = times.get("openvino")
    ratios = [ratio(times[way], own) if way in times and own else "" for way in ("torch", "before")]
    return f"| {name} | {' | '.join([*medians, *ratios])} | {difference:.0e} |"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=CASES, metavar="NAME:SIDE", help="and the shorter side in px")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cores()}), help="default: 1 and all cores")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", type=Path, help="the root of another checkout")
    options = parser.parse_args(arguments)
    if min(options.rounds, *options.threads) < 1 or not all(c.partition(":")[2].isdigit() for c in options.backbones):
        parser.error("--rounds and --threads must be at least 1, --backbones NAME:SIDE")
    existing([options.before])
    return options


if __name__ == "__main__":
    sys.exit(main())
