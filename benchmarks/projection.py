"""What a training on many images would take on 1, 8 and 64 devices, from costs that were measured on one.

    python benchmarks/projection.py [--images N --classes K] [--map SECONDS ...] [--devices 1 8 64]

Prints a Markdown table of hours. Nothing is run. The default costs are those of RESULTS.md, "Training on VOC-9", and a
device is what they were measured on: two cores of an EPYC, MobileNetV2, nine classes. Give your own: seconds an image
or a step from the log of a run on a part of your data, or from `benchmarks/cost.py`, on one of your devices.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

COSTS = {  # option: (default, meaning)
    "--images": (118_287, "training images (COCO train2017)"),
    "--classes": (80, "classes"),
    "--test-images": (5_000, "images to evaluate on"),
    "--windows": (2_000, "windows an image"),
    "--proposals": (0.04, "s an image: 0.08 a core"),
    "--map": (270 / 4304, "s a map of all scales; an image has two, itself and its mirror image"),
    "--map-mb": (2.92, "MB a map of all scales: height · width · channels · 2 bytes"),
    "--step": (810 / 12_000, "s a step of fine-tuning"),
    "--steps": (90_000, "steps of fine-tuning"),
    "--features": (0.5 * 250 / 2052, "s an image: fc7 of its windows in mining; half of what mining took (assumed)"),
    "--fits": (0.5 * 250 / 2052 / 9, "s an image and class: fits of SVMs; the other half (assumed)"),
    "--boxes": (55 / 9, "s a class: its regressor"),
    "--test": (69 / 498, "s an image: detection and evaluation, without its windows"),
    "--inputs": (16_000, "pooled features of a window"),
    "--fc": (1_024, "outputs of fc6 and of fc7"),
    "--cache-gb": (2.0, "svm.cache_gigabytes"),
    "--positives": (6_000, "svm.max_positives"),
    "--link": (1.25, "GB/s between devices; 10 Gb/s Ethernet has 1.25"),
}


def project(costs: argparse.Namespace, devices: int) -> dict[str, float]:
    """Hours of each stage on so many devices, then gigabytes on disk and in the memory of each process."""
    classes = math.ceil(costs.classes / devices)  # of the process that has most
    images, shared = costs.images / devices, costs.images if devices > 1 else 0
    weights = costs.fc * (costs.inputs + costs.fc + costs.classes + 1)
    exchange = 2 * (devices - 1) / devices * 4 * weights / costs.link / 1e9  # s: a ring passes all gradients twice
    sent = shared * 4 * costs.windows * (costs.fc + costs.classes) / costs.link / 1e9
    seconds = {
        "proposals": (images + costs.test_images / devices) * costs.proposals,
        "maps": 2 * images * costs.map,
        "finetune": costs.steps * (costs.step / devices + exchange),
        "svm": images * costs.features + sent + costs.images * costs.fits * classes,
        "boxes": classes * costs.boxes,
        "eval": costs.test_images / devices * costs.test,
    }
    hours = {stage: value / 3600 for stage, value in seconds.items()}
    positives = 4 * costs.fc * costs.positives * classes
    rows = 8 * costs.windows * costs.images  # which windows of every image fine-tuning may draw
    return {
        **hours,
        "**total, hours**": sum(hours.values()),
        "disk, GB: maps and windows": costs.images * (2 * costs.map_mb / 1e3 + 16 * costs.windows / 1e9),
        "memory of a process, GB": max(costs.cache_gb + positives / 1e9, (rows + 12 * weights) / 1e9),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, meaning) in COSTS.items():
        text = f"{meaning} (default: {default:.4g})"
        parser.add_argument(name, type=type(default), default=default, help=text)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    costs = parser.parse_args(arguments)
    own = [getattr(costs, name.lstrip("-").replace("-", "_")) for name in COSTS]
    if min(costs.devices) < 1 or not costs.link > 0 or not all(0 <= value < math.inf for value in own):
        parser.error("--devices must be at least 1, --link above 0, and no cost negative")
    columns = [project(costs, devices) for devices in costs.devices]
    print("| hours on devices | " + " | ".join(map(str, costs.devices)) + " |\n|---|" + "---|" * len(columns))
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(f"{column[row]:.3g}" for column in columns) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
