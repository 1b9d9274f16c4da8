"""A folder of pictures for each class, as classifiers are trained on: stripes across, stripes down, a disc."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("across", "disc", "down")


def write_classes(folder: Path, count: int = 10, seed: int = 0) -> Path:
    """`count` pictures of every class, of different colours, places and sizes."""
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(50, 70, 2)
            y, x = np.mgrid[:height, :width]
            phase, centre = rng.integers(12), rng.integers(20, 35, 2)
            disc = np.hypot(y - centre[0], x - centre[1]) < rng.integers(10, 18)
            shown = {"across": (y + phase) % 12 < 6, "down": (x + phase) % 12 < 6, "disc": disc}[kind]
            colours = rng.integers(0, 100, 3), rng.integers(150, 255, 3)
            pixels = np.where(shown[..., None], *colours) + rng.integers(0, 20, (height, width, 3)) - 10
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / kind / f"{i:02}.png")
    return folder
