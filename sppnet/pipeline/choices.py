"""The settings of a training on a folder of pictures, chosen from what is in it, each with its reason (ours).

Keys are those of ``--set``: section.name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sppnet.errors import SppnetError, counted
from sppnet.records import ImageRecord

BACKBONE = "efficientnet_lite0"
LAYERS = {  # the last of stride 16, and the last of all, dilated to it: of Lite0 5 to 7 mAP more than the last alone
    "efficientnet_lite0": "blocks.10+blocks.15",
    "efficientnet_lite1": "blocks.14+blocks.20",
    "efficientnet_lite2": "blocks.14+blocks.20",
}
BEST_SIDE = 208  # px, at which a window is seen best (maps.scale_choice)
LEAST, MOST = 353, 961  # shorter sides: a smaller one loses more than it is faster, a larger one takes too long
APART = 1.2  # ratio below which two sides see the same
MIDDLE, QUICK, FAR = 1.5, 800, 2.2  # a third side: from the first ratio on where no side is above 800, and at the last
LEAST_STEPS, MOST_STEPS = 200, 10_000
FEW = 400  # images up to which mirror images train too: 1.3, 1.2 and 1.5 mAP more at 113, 144 and 291 of BCCD
LEAST_WINDOWS, MOST_WINDOWS, ALL_WINDOWS = 64, 512, 1_500_000  # of an image, and of all, that are kept: 1.5 kB each


class Choice(NamedTuple):
    """The value of a setting, and why it has it."""

    value: Any
    reason: str


def choose_settings(records: Sequence[ImageRecord], backbone: str | None = BACKBONE) -> dict[str, Choice]:
    """The settings for annotated images, from their number and the sizes of their objects; SppnetError without any.

    Layers and weights are chosen where `backbone`, which may be set already, is of the EfficientNet-Lite family; None
    is a network of one's own.
    """
    rows = [
        (name, min(record.size), x2 - x1, y2 - y1)
        for record in records
        if record.annotation is not None
        for name, (x1, y1, x2, y2) in zip(record.annotation.names, record.annotation.boxes.tolist(), strict=True)
    ]
    if not rows:
        raise SppnetError(f"no object in {counted(len(records), 'image')}; draw boxes around some")
    names, sides, widths, heights = map(np.array, zip(*rows, strict=True))
    shares = np.sqrt(widths * heights) / sides
    _, label, count = np.unique(names, return_inverse=True, return_counts=True)
    weights = 1 / count[label]  # the objects of a class weigh as much together as another's
    images, objects = counted(len(records), "picture"), counted(len(rows), "object")
    small, large = (_quantile(shares, weights, part) for part in (3 / 8, 7 / 8))
    seen = f"objects of {small:.2f} to {large:.2f} of the shorter side (3/8 and 7/8 are smaller, classes alike)"
    windows = min(MOST_WINDOWS, max(LEAST_WINDOWS, ALL_WINDOWS // len(records)))
    steps = choose_steps(len(records), len(rows))
    width = min(20, max(6, int(0.8 * _quantile(np.minimum(widths, heights), weights, 1 / 20))))
    shapes = choose_shapes(shares, widths / heights, weights)
    network = dict[str, Choice]()
    if backbone is not None:
        network["backbone.name"] = Choice(BACKBONE, "accurate for its time, and a package: no download")
    if backbone in LAYERS:
        network["backbone.layer"] = Choice(LAYERS[backbone], "two joined: one for detail, one for what it is")
        network["backbone.weights.source"] = Choice("package", "ImageNet weights of the extra [backbones]")
    return network | {
        "head.training": Choice("joint", "minutes on a CPU: a light head learns, the network stays"),
        "proposals.min_side": Choice(width, "px; all but 1 in 20 objects are wider and higher"),
        "proposals.shapes": Choice(
            shapes, f"of sliding windows, as of {objects}: width, height / shorter side of the picture"
        ),
        "maps.scales": Choice(choose_sides(small, large), f"{seen} are about {BEST_SIDE} px there"),
        "joint.windows": Choice(windows, f"of each of {images}, at most {ALL_WINDOWS:,} in all"),
        "joint.flip": Choice(len(records) <= FEW, f"{images}; mirror images too up to {FEW}"),
        "joint.steps": Choice(steps, f"{images}, {objects}; 1,000 for 300, as the root"),
        "evaluate.metric": Choice("area", "as from VOC 2010 on"),
    }


def choose_shapes(
    shares: NDArray[np.floating], ratios: NDArray[np.floating], weights: NDArray[np.floating]
) -> tuple[tuple[float, float], ...]:
    """Widths and heights, as shares, of sliding windows for objects of `shares` (N,), width / height `ratios` (N,).

    A third of the objects is smaller, a third larger than the others; of each third the middle size, with the middle
    ratio of the widest, of the highest and of those between.
    """
    found, edges = dict[tuple[float, float], None](), [_quantile(shares, weights, part) for part in (1 / 3, 2 / 3)]
    thirds = np.searchsorted(edges, shares)
    for own in (thirds == third for third in np.unique(thirds)):
        share = _quantile(shares[own], weights[own], 1 / 2)
        for part in (1 / 6, 1 / 2, 5 / 6):
            ratio = math.sqrt(_quantile(ratios[own], weights[own], part))
            found[max(0.001, round(share * ratio, 3)), max(0.001, round(share / ratio, 3))] = None
    return tuple(found)


def choose_sides(small: float, large: float) -> tuple[int, ...]:
    """Shorter sides for objects of `small` to `large` of the shorter side of their images: one to three, ascending."""
    low, high = (_snap(BEST_SIDE / share) for share in (large, small))
    if high / low >= (MIDDLE if high <= QUICK else FAR):
        return low, _snap(math.sqrt(low * high)), high
    return (high,) if high / low < APART else (low, high)


def choose_steps(images: int, objects: int) -> int:
    """1,000 for 300 images and 2,500 for 2,000 (measured): as the root; many objects in each count as more images."""
    steps = 1000 * math.sqrt(max(images, objects / 15) / 300)
    return int(min(max(LEAST_STEPS, 50 * round(steps / 50)), MOST_STEPS))


def reduced(choices: Mapping[str, Choice], level: float, why: str) -> dict[str, Choice]:
    """The same for less time, from level 1, as they are, down to 0, the least: steps, sides and windows of an image.

    A lower level is nowhere more work. What is reduced has the reason `why`.
    """
    steps, sides, windows = (choices[key].value for key in ("joint.steps", "maps.scales", "joint.windows"))
    kept = list[float]()
    for side in sorted((LEAST * (side / LEAST) ** level for side in sides), reverse=True):
        kept += [side] if not kept or kept[-1] >= APART * side else []
    fewest, least = min(steps, LEAST_STEPS // 2), min(windows, LEAST_WINDOWS)
    values = {
        "joint.steps": fewest + round(level * (steps - fewest)),
        "maps.scales": tuple(map(_snap, reversed(kept))),
        "joint.windows": round(least * (windows / least) ** level),
    }
    less = {key: value for key, value in values.items() if value != choices[key].value}
    return {
        **choices,
        **{key: Choice(value, f"{why}, else {shown(choices[key].value)}") for key, value in less.items()},
    }


def shown(value: object) -> str:
    """A value in a table; of many pairs their number."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return f"{len(value)} of them"
    return str(list(value) if isinstance(value, tuple) else value)


def _snap(side: float) -> int:
    """The nearest of the sides 32 k + 1, where the cells of every layer begin and end with the picture."""
    return int(min(max(32 * round((side - 1) / 32) + 1, LEAST), MOST))


def _quantile(values: NDArray[Any], weights: NDArray[np.floating], part: float) -> float:
    """The value that `part` of all are below, where `weights` say how much each counts."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    wanted = part * below[-1] - 1e-9  # sums are not exact
    return float(values[order][np.searchsorted(below, wanted)])
