"""A generated VOC-format data set of textured shapes: the embedded default, which needs no download.

Five classes of shapes of about 30 to 160 px in any rotation, colour and texture lie on textured backgrounds
among lines and specks; colour and texture say nothing about the class. Every image has a random generator of its
own, seeded by (seed, set, number), so an image is the same however many others there are.
"""

from __future__ import annotations

import colorsys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from sppnet.artifacts import read_json, write_json, write_text
from sppnet.data.voc import write_annotation
from sppnet.errors import ArtifactError, SppnetError

Pixels = NDArray[np.float32]  # (H, W, 3) RGB in [0, 1]

VERSION = 1  # changes with everything that changes a pixel or a box
YEAR = "SHAPES"  # the year folder; splits are SHAPES/train, SHAPES/val, SHAPES/trainval, SHAPES/test
SETS = ("train", "val", "test")
DEFAULT_IMAGES: Mapping[str, int] = {"train": 240, "val": 60, "test": 100}
SETTINGS_FILE = "shapes.json"

HEIGHTS, WIDTHS = (208, 272), (280, 360)
SIDES = (40, 170)  # diameter of the shape, px
OBJECTS = (1, 5)
DIFFICULT_BELOW = 0.5  # visible share of the shape under which an object is marked difficult
VISIBLE_AT_LEAST = 0.35  # no object is hidden further than this
INSIDE_AT_LEAST = 0.6  # no object is cut off by the edge further than this
CROWDED = 0.2  # share of the objects that are laid over another
TRIES = 20
FINER = 4  # polygons are filled so much finer than they are shown


@dataclass(frozen=True)
class Scene:
    """One image with its objects: RGB pixels (H, W, 3) uint8, boxes (R, 4) half-open, names, difficult flags."""

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    names: tuple[str, ...]
    difficult: tuple[bool, ...]


@dataclass(frozen=True)
class _Shape:
    """A placed shape: its cover (H, W) in [0, 1], its pixels inside the image and what of them is visible."""

    name: str
    cover: Pixels
    area: float  # of the whole shape, outside the image too
    visible: NDArray[np.bool_]

    @property
    def share(self) -> float:
        return float(self.visible.sum()) / self.area

    def behind(self, cover: Pixels) -> _Shape:
        return replace(self, visible=self.visible & (cover < 0.5))


def generate_shapes(root: Path | str, images: Mapping[str, int] = DEFAULT_IMAGES, seed: int = 0) -> Path:
    """Write ``<root>/VOCdevkit/SHAPES`` with so many `images` of train, val and test; return ``<root>/VOCdevkit``.

    A folder that already holds the same images is left alone. The folder appears under its name only when it is
    complete. Raises SppnetError for unknown set names and where the name is taken by anything else.
    """
    if not images or not set(images) <= set(SETS) or min(images.values()) < 1:
        raise SppnetError(f"images must map some of {', '.join(SETS)} to counts of at least 1, got {dict(images)}")
    devkit = Path(root) / "VOCdevkit"
    settings = {"version": VERSION, "seed": seed, "images": dict(images)}
    if not (devkit / YEAR).exists():
        devkit.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".shapes-", dir=devkit) as temporary:
            complete = Path(temporary) / YEAR
            _write_folder(complete, images, seed)
            write_json(complete / SETTINGS_FILE, settings)
            with suppress(OSError):  # another process was faster
                complete.rename(devkit / YEAR)
    try:
        found = read_json(devkit / YEAR / SETTINGS_FILE)
    except ArtifactError:
        found = "something else"
    if found != settings:
        expected = f"{devkit / YEAR}: expected shapes of {settings}"
        raise SppnetError(f"{expected}, found {found}; delete it or choose another folder")
    return devkit


def draw_scene(rng: Generator) -> Scene:
    """A background, clutter and one to five shapes.

    A box is tight around the visible part of its shape, as VOC's are; an object of which less than half is
    visible, behind others or beyond the edge, is difficult.
    """
    size = (int(rng.integers(*HEIGHTS)), int(rng.integers(*WIDTHS)))
    backdrop = _colour(rng, saturation=(0.05, 0.3), value=(0.25, 0.85))
    image = _textured(rng, size, backdrop, contrast=rng.uniform(0.03, 0.12))
    image += (_smooth_noise(rng, size, rng.uniform(40, 120))[..., None] - 0.5) * 0.2
    _add_clutter(rng, image)
    shapes, colours = list[_Shape](), [backdrop]
    for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))):
        placed = _place(rng, size, shapes)
        if placed is None:
            continue
        colour = _distinct_colour(rng, colours)
        colours.append(colour)
        _paint(rng, image, placed.cover, colour)
        shapes = [*(shape.behind(placed.cover) for shape in shapes), placed]
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.005, 0.025))
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    boxes = np.array([tight_box(shape.visible) for shape in shapes], dtype=np.float64)
    difficult = tuple(shape.share < DIFFICULT_BELOW for shape in shapes)
    return Scene(pixels, boxes, tuple(shape.name for shape in shapes), difficult)


def _write_folder(folder: Path, images: Mapping[str, int], seed: int) -> None:
    stems = {name: [f"{name}_{number:05d}" for number in range(images[name])] for name in SETS if name in images}
    (folder / "JPEGImages").mkdir(parents=True)
    for name, of_set in stems.items():
        for number, stem in enumerate(of_set):
            scene = draw_scene(np.random.default_rng([seed, SETS.index(name), number]))
            encoded = cv2.imencode(".jpg", scene.pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            (folder / "JPEGImages" / f"{stem}.jpg").write_bytes(encoded.tobytes())
            path, (height, width, _) = folder / "Annotations" / f"{stem}.xml", scene.pixels.shape
            write_annotation(path, (height, width), scene.boxes, scene.names, scene.difficult)
    stems["trainval"] = [*stems.get("train", ()), *stems.get("val", ())]
    for name, of_set in stems.items():
        if of_set:
            write_text(folder / "ImageSets" / "Main" / f"{name}.txt", "\n".join([*of_set, ""]))


# --- shapes -----------------------------------------------------------------------------------------


def _regular(corners: int, radii: ArrayLike = 1.0) -> NDArray[np.float64]:
    """Corners on circles of these radii by turns: (V, 2)."""
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.resize(radii, corners)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


ARM = 0.34  # half the width of a cross's arms
QUARTER = np.array([(ARM, -1), (ARM, -ARM), (1, -ARM)])
OUTLINES: Mapping[str, NDArray[np.float64]] = {  # polygons (V, 2) that fill about [-1, 1]²
    "cross": np.concatenate([QUARTER @ np.linalg.matrix_power([[0, 1], [-1, 0]], turn) for turn in range(4)]),
    "disc": _regular(60),
    "square": _regular(4) / np.sqrt(0.5) * 0.64,
    "star": _regular(10, (1.08, 0.46)),
    "triangle": _regular(3) * 1.12,
}


def _place(rng: Generator, size: tuple[int, int], others: list[_Shape]) -> _Shape | None:
    """A shape that leaves itself and the others visible enough; None where no place was found."""
    crowded = bool(others) and rng.random() < CROWDED
    for _ in range(TRIES):
        if crowded:  # on a visible pixel of another
            rows, columns = np.nonzero(others[int(rng.integers(len(others)))].visible)
            chosen = int(rng.integers(len(rows)))
            centre = np.array([columns[chosen], rows[chosen]], dtype=np.float64)
        else:
            centre = rng.uniform((0, 0), (size[1], size[0]))
        shape = _random_shape(rng, size, centre)
        least = (VISIBLE_AT_LEAST if crowded else other.share - 0.05 for other in others)
        left = (other.behind(shape.cover).share for other in others)
        if shape.share >= INSIDE_AT_LEAST and all(a >= b for a, b in zip(left, least, strict=True)):
            return shape
    return None


def _random_shape(rng: Generator, size: tuple[int, int], centre: NDArray[np.float64]) -> _Shape:
    name = str(rng.choice(list(OUTLINES)))
    side = float(np.exp(rng.uniform(*np.log(SIDES))))
    angle, stretch = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.15, 0.15))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (OUTLINES[name] * side / 2 * (stretch, 1 / stretch)) @ turn.T + centre
    cover = polygon_cover(corners, size)
    return _Shape(name, cover, polygon_area(corners), cover >= 0.5)


def polygon_area(corners: NDArray[np.float64]) -> float:
    """Of a polygon (V, 2), by the shoelace formula."""
    x, y = corners.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def polygon_cover(corners: NDArray[np.float64], size: tuple[int, int]) -> Pixels:
    """Cover (H, W) in [0, 1] of a polygon (V, 2), smooth at its edges; pixel (0, 0) spans [0, 1]²."""
    cover = np.zeros(size, dtype=np.float32)
    x1, y1 = np.floor(corners.min(axis=0)).clip(0, size[::-1]).astype(int)
    x2, y2 = np.ceil(corners.max(axis=0)).clip(0, size[::-1]).astype(int)
    if x2 > x1 and y2 > y1:
        fine = np.zeros(((y2 - y1) * FINER, (x2 - x1) * FINER), dtype=np.uint8)
        points = (corners - (x1, y1)) * FINER - 0.5  # cv2 counts from pixel centres
        cv2.fillPoly(fine, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_8, 4)  # here in 1/16 px
        smooth = cv2.resize(fine, (int(x2 - x1), int(y2 - y1)), interpolation=cv2.INTER_AREA)
        cover[y1:y2, x1:x2] = smooth.astype(np.float32) / 255
    return cover


def tight_box(visible: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The smallest half-open box of the true pixels of (H, W); zeros where there is none."""
    x, y, width, height = cv2.boundingRect(visible.astype(np.uint8))
    return x, y, x + width, y + height


# --- paint ------------------------------------------------------------------------------------------


def _smooth_noise(rng: Generator, size: tuple[int, int], cell: float) -> Pixels:
    """Values (H, W) in [0, 1] that change over about `cell` pixels."""
    coarse = rng.random((int(size[0] / cell) + 3, int(size[1] / cell) + 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth, dtype=np.float32).clip(0, 1)


def _wave(rng: Generator, size: tuple[int, int], turns: int, shortest: float, longest: float) -> Pixels:
    """A sine (H, W) along a random direction, of half a period or more in `shortest` to `longest` pixels."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    along = np.asarray(x * np.cos(angle) + y * np.sin(angle), dtype=np.float32)
    return np.asarray(np.sin(along * (turns * np.pi / rng.uniform(shortest, longest))), dtype=np.float32)


def _checks(rng: Generator, size: tuple[int, int]) -> Pixels:
    angle, period = rng.uniform(0, np.pi / 2), rng.uniform(5, 11)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return ((np.floor(u / period) + np.floor(v / period)) % 2).astype(np.float32)


TEXTURES: Mapping[str, Callable[[Generator, tuple[int, int]], NDArray[Any]]] = {  # values (H, W) in [0, 1]
    "stripes": lambda rng, size: (_wave(rng, size, 2, 5, 14) * 2).clip(-0.5, 0.5) + 0.5,
    "checks": _checks,
    "noise": lambda rng, size: _smooth_noise(rng, size, rng.uniform(2, 7)),
    "gradient": lambda rng, size: _wave(rng, size, 1, 60, 160) / 2 + 0.5,
}


def _textured(rng: Generator, size: tuple[int, int], colour: Pixels, contrast: float) -> NDArray[Any]:
    """Pixels (H, W, 3) around `colour`, varied by a random texture."""
    texture = TEXTURES[str(rng.choice(list(TEXTURES)))](rng, size)
    return colour + (texture[..., None] - 0.5) * contrast * rng.uniform(0.4, 1, 3).astype(np.float32)


def _add_clutter(rng: Generator, image: Pixels) -> None:
    """Draw thin lines and irregular specks, too small and ragged to be one of the shapes."""
    height, width, _ = image.shape
    for _ in range(int(rng.integers(0, 5))):
        ends = rng.uniform((0, 0), (width, height), (2, 2))
        along = ends[1] - ends[0]
        across = np.array([-along[1], along[0]]) / np.hypot(*along) * rng.uniform(0.5, 1.5)
        corners = np.concatenate([ends + across, ends[::-1] - across])
        _paint(rng, image, polygon_cover(corners, (height, width)), _colour(rng, (0, 0.6), (0.1, 0.95)))
    for _ in range(int(rng.integers(3, 14))):
        corners = _regular(9, rng.uniform(1.5, 7, 9)) + rng.uniform((0, 0), (width, height))
        _paint(rng, image, polygon_cover(corners, (height, width)), _colour(rng, (0, 0.6), (0.1, 0.95)))


def _paint(rng: Generator, image: Pixels, cover: Pixels, colour: Pixels) -> None:
    x1, y1, x2, y2 = tight_box(cover > 0)
    pixels = _textured(rng, (y2 - y1, x2 - x1), colour, contrast=rng.uniform(0.1, 0.4))
    image[y1:y2, x1:x2] += cover[y1:y2, x1:x2, None] * (pixels - image[y1:y2, x1:x2])


def _colour(rng: Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Pixels:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb, dtype=np.float32)


def _distinct_colour(rng: Generator, others: list[Pixels]) -> Pixels:
    """Of three colours the one that stands out most from the background and the other shapes."""
    candidates = [_colour(rng, (0.3, 0.95), (0.3, 0.95)) for _ in range(3)]
    return max(candidates, key=lambda colour: min(float(np.linalg.norm(colour - other)) for other in others))
