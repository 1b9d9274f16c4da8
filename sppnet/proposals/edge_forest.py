"""The structured forest of an edge detector (Dollár & Zitnick 2013), checked before OpenCV reads it.

OpenCV takes the numbers of a model file as they come: one that is out of range ends the process, not the call.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from sppnet.errors import SppnetError
from sppnet.proposals.selective_search import Image, ximgproc

LARGEST = 1 << 30  # bytes of a model; the published one has a tenth
OPTIONS = {  # of a model, and the values that are taken: beyond them tables of OpenCV overflow or fill the memory
    "numberOfTrees": (1, 1000), "numberOfTreesToEvaluate": (1, 32), "selfsimilarityGridSize": (1, 16),
    "stride": (1, 64), "shrinkNumber": (1, 64), "patchSize": (1, 256), "patchInnerSize": (1, 256),
    "numberOfGradientOrientations": (1, 24), "gradientSmoothingRadius": (0, 64), "regFeatureSmoothingRadius": (0, 64),
    "ssFeatureSmoothingRadius": (0, 64), "gradientNormalizationRadius": (0, 64),
}  # fmt: skip
LISTS = {"childs": "iu", "featureIds": "iu", "thresholds": "iuf", "edgeBoundaries": "iu", "edgeBins": "iu"}


def forest_edges(image: Image, path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Thinned edges (H, W) of an RGB image by the forest in a file, and their orientations.

    SppnetError for a file that is gone or holds no forest that OpenCV can use.
    """
    detector, shrink, patch = load_forest(path)
    height, width = image.shape[:2]
    bottom, right = (max(-side % shrink, patch - side) for side in (height, width))
    padded = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    try:
        edges = detector.detectEdges(padded.astype(np.float32) / np.float32(255))
        orientations = detector.computeOrientation(edges)
        thin = detector.edgesNms(edges, orientations)
    except cv2.error as error:  # of options that fit no image
        raise _unusable(path, " ".join(str(error).split())) from None
    return thin[:height, :width], orientations[:height, :width]


def load_forest(path: Path) -> tuple[Any, int, int]:
    """OpenCV's detector of a model file, its shrinkNumber and its patchSize; errors as `forest_edges`.

    The sides of an image must be multiples of the first, and at least the second.
    """
    if not path.is_file():
        remedy = "put the file that proposals.edge_model names there, or pass windows of your own"
        raise SppnetError(f"{path}: no such file; {remedy}")
    state = path.stat()
    return _load(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)  # reading a forest takes seconds
def _load(path: Path, *_: int) -> tuple[Any, int, int]:
    create = ximgproc().createStructuredEdgeDetection
    try:
        options, lists = _read(path)
        _check(options, lists)
        return create(str(path)), options["shrinkNumber"], options["patchSize"]
    except (ValueError, OSError, EOFError, zlib.error, RecursionError, cv2.error) as error:
        raise _unusable(path, " ".join(str(error).split())) from None


def _unusable(path: Path, problem: str) -> SppnetError:
    wanted = "expected a structured forest as OpenCV reads it (model.yml.gz, or model.yml unpacked)"
    return SppnetError(f"{path}: {wanted}, but {problem}; name another file, or leave proposals.edge_model out")


def _read(path: Path) -> tuple[dict[str, int], dict[str, NDArray[Any]]]:
    """Options and lists of numbers, read so strictly that OpenCV cannot read others in the same text."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed and path.suffix != ".gz":
        raise ValueError("it is packed with gzip and its name does not end in .gz")
    with gzip.open(path) if packed else path.open("rb") as file:
        text = file.read(LARGEST + 1).decode("ascii").replace("\r\n", "\n")
    head, *parts = re.split(r"^(\w+):", text, flags=re.MULTILINE)
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))
    if len(text) > LARGEST or not re.fullmatch(r"%YAML[: ]1\.\d\s*(---\s*)?", head):
        raise ValueError(f"it begins with {text[:20]!r}, not with %YAML:1.0" if text else "it is empty")
    missing = [name for name in ("options", *LISTS) if name not in bodies]
    if missing or len(bodies) != len(parts) // 2:
        raise ValueError(f"{missing[0]} is missing" if missing else "a key stands twice")
    entry = r"\w+: *(?:0|[1-9]\d{0,8}) *"
    if not re.fullmatch(rf"(\n +){entry}(\1{entry})*\s*", bodies["options"]):
        raise ValueError("options are not a number each")
    pairs = re.findall(r"(\w+): *(\d+)", bodies["options"])
    return {name: int(value) for name, value in pairs}, {name: _numbers(name, bodies[name]) for name in LISTS}


def _numbers(name: str, body: str) -> NDArray[Any]:
    """The numbers of "- [1, 2, …]" rows, one after the other."""
    start, *parts = re.split(r"^( +)- (?=\[)", body, flags=re.MULTILINE)
    try:
        rows = [np.array(json.loads(re.sub(r"\.(?!\d)", ".0", row))) for row in parts[1::2]]
        found = np.concatenate(rows)
    except ValueError:  # no JSON, or no rows
        found = np.array("")
    if start.strip() or len(set(parts[::2])) > 1 or found.ndim != 1 or found.dtype.kind not in LISTS[name]:
        kind = "numbers" if "f" in LISTS[name] else "whole numbers"
        raise ValueError(f"{name} are not rows of {kind} in brackets")
    return found


def _check(options: dict[str, int], lists: dict[str, NDArray[Any]]) -> None:
    """ValueError for what would make OpenCV read or write beside its tables, or never end."""
    for name, (low, high) in OPTIONS.items():
        if not low <= options.get(name, -1) <= high:
            raise ValueError(f"{name} is {options.get(name, 'missing')}, not from {low} to {high}")
    shrink, patch, inner = options["shrinkNumber"], options["patchSize"], options["patchInnerSize"]
    if patch % shrink or inner % shrink or (patch - inner) % 2 or inner > patch:
        raise ValueError(f"patchSize={patch} and patchInnerSize={inner} do not fit shrinkNumber={shrink} or each other")
    childs, features, thresholds, bounds, bins = (lists[name] for name in LISTS)
    nodes, rest = divmod(len(childs), options["numberOfTrees"])
    if rest or not nodes or not len(childs) == len(features) == len(thresholds) < len(bounds):
        sizes = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"its lists do not fit {options['numberOfTrees']} trees of one size: {sizes}")
    # `childs` holds the number of a node's left child, counted from one; the right is next. Both lie behind the node.
    inside, place = childs != 0, np.arange(len(childs)) % nodes
    channels = 2 * options["numberOfGradientOrientations"] + 5
    cells, grid = (patch // shrink) ** 2, options["selfsimilarityGridSize"] ** 2
    in_range = {
        "childs": ~inside | ((childs >= place + 2) & (childs < nodes)),
        "featureIds": ~inside | ((features >= 0) & (features < (cells + grid * (grid - 1) // 2) * channels)),
        "thresholds": np.isfinite(thresholds),
        "edgeBoundaries": (bounds >= 0) & (bounds <= len(bins)) & (np.diff(bounds, prepend=0) >= 0),
        "edgeBins": (bins >= 0) & (bins < inner**2 * channels),
    }
    for name, good in in_range.items():
        if not good.all():
            raise ValueError(
                f"number {good.argmin() + 1} of {name} is {lists[name][good.argmin()]}, which is out of range"
            )
