"""The settings of a training on a folder of pictures, chosen from what is in it, each with its reason (ours).

A key is written as in ``--set``: section.name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppnet.data.parts import DataFolder
from sppnet.errors import SppnetError, counted
from sppnet.records import ImageRecord

BEST_SIDE = 208  # px, at which a window is seen best (maps.scale_choice)
SIDES = 353, 961  # shorter sides from the smallest that is worth its loss to the largest that is worth its time
PITCH = 32  # sides are 32 k + 1, so that the cells of every layer begin and end with the picture
APART = 1.2  # ratio below which two sides see the same
MIDDLE, QUICK = 1.5, 800  # a third side between two of this ratio, where the larger is not above so many pixels …
FAR = 2.2  # … or the two are as far apart as this
LEAST_STEPS, MOST_STEPS = 200, 10_000
ROWS = 1_500_000  # windows of all images that are kept for training, 1.5 kB each
LEAST_WINDOWS, MOST_WINDOWS = 64, 512  # of an image
SEARCHED = 640, 1280  # longer side of the copy that is searched
SEEN = 24  # px of an object in that copy


@dataclass(frozen=True)
class Choice:
    """The value of one setting, and why it has it."""

    value: Any
    reason: str


Choices = Mapping[str, Choice]


def choose_parts(found: DataFolder, parts: Mapping[str, tuple[str, ...]]) -> dict[str, Choice]:
    """The settings that say where the pictures are; `parts`: those to train, validate and test on."""
    named = {role: Choice(names, "by the names of the folder's parts") for role, names in parts.items() if names}
    held = Choice((), "no part is called so: a share of the training pictures, drawn once, is held out")
    tested = "the held-out pictures" if not parts["val"] else "those of data.val"
    own = {"val": held, "test": Choice((), f"no part is called so: {tested}")} | named
    return {"data.format": Choice(found.format, "found by looking")} | {f"data.{role}": own[role] for role in own}


def choose_settings(records: Sequence[ImageRecord]) -> dict[str, Choice]:
    """The settings for training images, from their number and from the sizes of their objects.

    SppnetError where there is no object.
    """
    names, shares, narrow, of_longer = _objects(records)
    if not len(names):
        raise SppnetError(f"no object in {counted(len(records), 'image')}; draw boxes around some")
    images = counted(len(records), "picture")
    evenly = "" if len(set(names)) == 1 else ", every class counting alike"
    small, large = (_quantile(shares, names, part) for part in (3 / 8, 7 / 8))
    sides = choose_sides(small, large)
    size = f"objects of {small:.2f} to {large:.2f} of the shorter side (3/8 and 7/8 of them are smaller{evenly})"
    steps = choose_steps(len(records), len(names))
    windows = min(MOST_WINDOWS, max(LEAST_WINDOWS, ROWS // len(records)))
    least = min(20, max(6, int(0.8 * _quantile(narrow, names, 1 / 20))))
    tiny = _quantile(of_longer, names, 1 / 8)
    searched = min(max(SEARCHED[0], round(SEEN / tiny)), SEARCHED[1])
    return {
        "backbone.name": Choice("efficientnet_lite0", "the most accurate for its time that comes as a package"),
        "backbone.weights.source": Choice("package", "ImageNet weights of the extra [backbones]: no download"),
        "head.training": Choice("joint", "minutes on a CPU: no network is trained but a light head"),
        "maps.scales": Choice(sides, f"{size} are then about {BEST_SIDE} px"),
        "joint.steps": Choice(steps, f"{images} with {counted(len(names), 'object')}: 1,000 for 300, as their root"),
        "joint.windows": Choice(windows, f"of each of {images}: at most {ROWS:,} in all"),
        "proposals.min_side": Choice(least, "all but 1 in 20 objects are wider and higher"),
        "proposals.max_side": Choice(searched, f"7 of 8 objects take {SEEN} px or more in a copy of this longer side"),
        "evaluate.metric": Choice("area", "average precision as from VOC 2010 on"),
    }


def choose_sides(small: float, large: float) -> tuple[int, ...]:
    """Shorter sides for objects of `small` to `large` of the shorter side of their images: one to three, ascending."""
    low, high = (_snap(BEST_SIDE / share) for share in (large, small))
    if high / low >= MIDDLE and (high <= QUICK or high / low > FAR):
        return low, _snap(math.sqrt(low * high)), high
    return (high,) if high / low < APART else (low, high)


def choose_steps(images: int, objects: int) -> int:
    """1,000 for 300 images (measured), 2,500 for 2,000: as the root; many objects in an image count as more images."""
    steps = 1000 * math.sqrt(max(images, objects / 15) / 300)
    return int(min(max(LEAST_STEPS, 50 * round(steps / 50)), MOST_STEPS))


def reduced(choices: Choices, level: float, why: str) -> dict[str, Choice]:
    """The same for less time, from level 1, as they are, down to 0, the least: steps, sides and windows of an image.

    A lower level never takes longer. `why` is part of the reason of what is reduced.
    """
    values: dict[str, Any] = {key: choices[key].value for key in ("joint.steps", "maps.scales", "joint.windows")}
    steps, sides, windows = values.values()
    floor = min(steps, LEAST_STEPS // 2)
    values["joint.steps"] = floor + round(level * (steps - floor))
    kept = list[float]()
    for side in sorted((SIDES[0] * (side / SIDES[0]) ** level for side in sides), reverse=True):
        kept += [side] if not kept or kept[-1] >= APART * side else []
    values["maps.scales"] = tuple(map(_snap, reversed(kept)))
    floor = min(windows, LEAST_WINDOWS)
    values["joint.windows"] = round(floor * (windows / floor) ** level)
    changed = {key: value for key, value in values.items() if value != choices[key].value}
    shown = {key: list(old) if isinstance(old := choices[key].value, tuple) else old for key in changed}
    return {**choices, **{key: Choice(value, f"{why}, else {shown[key]}") for key, value in changed.items()}}


def nested(choices: Choices) -> dict[str, Any]:
    """The values as the sections of a configuration."""
    values: dict[str, Any] = {}
    for key, choice in choices.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = choice.value
    return values


def _snap(side: float) -> int:
    """The nearest side 32 k + 1 within `SIDES`."""
    return int(min(max(PITCH * round((side - 1) / PITCH) + 1, SIDES[0]), SIDES[1]))


def _objects(records: Sequence[ImageRecord]) -> tuple[NDArray[Any], ...]:
    """Of every object its class, root of its area over the shorter side, smaller side in px, root over the longer."""
    rows = [
        (name, size / min(record.size), narrow, size / max(record.size))
        for record in records
        if record.annotation is not None
        for name, (x1, y1, x2, y2) in zip(record.annotation.names, record.annotation.boxes.tolist(), strict=True)
        for size, narrow in [(math.sqrt((x2 - x1) * (y2 - y1)), min(x2 - x1, y2 - y1))]
    ]
    return tuple(np.array(column) for column in zip(*rows, strict=True)) if rows else (np.array([]),) * 4


def _quantile(values: NDArray[Any], names: NDArray[Any], part: float) -> float:
    """The value that `part` of all are below, where the objects of each class weigh as much together as another's."""
    _, label, count = np.unique(names, return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    weight = np.cumsum(1 / count[label][order])
    return float(values[order][np.searchsorted(weight, part * weight[-1])])
