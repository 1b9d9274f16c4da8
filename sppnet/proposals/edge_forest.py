"""The structured forest of an edge detector (Dollár & Zitnick 2013), checked before OpenCV reads it.

OpenCV takes the numbers of a model file as they come: one that is out of range ends the process, not the call.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import error as ZlibError

import cv2
import numpy as np
from numpy.typing import NDArray

from sppnet.errors import SppnetError
from sppnet.proposals.selective_search import Image, ximgproc

OPTIONS = (
    "numberOfTrees", "numberOfTreesToEvaluate", "selfsimilarityGridSize", "stride", "patchSize", "patchInnerSize",
    "numberOfGradientOrientations", "gradientSmoothingRadius", "regFeatureSmoothingRadius", "ssFeatureSmoothingRadius",
    "gradientNormalizationRadius", "shrinkNumber",
)  # fmt: skip
MOST = 32  # of an option; tables of OpenCV overflow or fill the memory with much larger ones
SHRINK = 2  # the only shrinkNumber of a forest; others do not fit images of all sizes
LISTS = ("childs", "featureIds", "thresholds", "edgeBoundaries", "edgeBins")


def forest_edges(image: Image, path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Thinned edges (H, W) of an RGB image by the forest in a file, and their orientations; errors as `load_forest`."""
    detector, patch = load_forest(path)
    height, width = image.shape[:2]
    bottom, right = (max(side % SHRINK, patch - side) for side in (height, width))  # else OpenCV writes beside it
    padded = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    edges = detector.detectEdges(padded.astype(np.float32) / np.float32(255))
    orientations = detector.computeOrientation(edges)
    return detector.edgesNms(edges, orientations)[:height, :width], orientations[:height, :width]


def load_forest(path: Path) -> tuple[Any, int]:
    """OpenCV's detector of a model file, and the least side of an image, which must be even.

    SppnetError for a file that is gone or holds no forest that OpenCV can use.
    """
    return _load(path, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=2)  # reading a forest takes seconds
def _load(path: Path, _: int) -> tuple[Any, int]:
    create = ximgproc().createStructuredEdgeDetection
    try:
        patch = _read(path)["patchSize"]
        return create(str(path)), patch
    except (ValueError, OSError, EOFError, ZlibError, RecursionError, cv2.error) as error:
        wanted = "expected a structured forest as OpenCV reads it (model.yml.gz, or model.yml unpacked)"
        found = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SppnetError(f"{path}: {wanted}, but {found}; put one there, or leave proposals.edge_model out") from None


def _read(path: Path) -> dict[str, int]:
    """The options of a sound forest, read so strictly that OpenCV cannot read other numbers in the same text."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    if not content.isascii():
        raise ValueError("it is not text")
    text = content.decode("ascii").replace("\r\n", "\n")
    head, *parts = re.split(r"^(\w+):", text, flags=re.MULTILINE)
    if not re.fullmatch(r"%YAML[: ]1\.\d\s*(---\s*)?", head):
        raise ValueError(f"it begins with {text[:20]!r}, not with %YAML:1.0" if text else "it is empty")
    for name in ("options", *LISTS):
        if parts[::2].count(name) != 1:
            raise ValueError(f"{name} is missing or stands twice")
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))
    entry = r"\w+: *(?:0|[1-9]\d{0,8}) *"
    pairs = re.findall(r"(\w+): *(\d+)", bodies["options"])
    options = {name: int(value) for name, value in pairs}
    if not re.fullmatch(rf"(\n +){entry}(\1{entry})*\s*", bodies["options"]) or len(options) < len(pairs):
        raise ValueError("options are not a number each")
    _check(options, {name: _numbers(name, bodies[name]) for name in LISTS})
    return options


def _numbers(name: str, body: str) -> NDArray[Any]:
    """The numbers of "- [1, 2, …]" rows, one after the other."""
    start, *parts = re.split(r"^( +)- (?=\[)", body, flags=re.MULTILINE)
    try:
        found = np.concatenate([np.array(json.loads(re.sub(r"\.(?!\d)", ".0", row))) for row in parts[1::2]])
    except ValueError:  # no JSON, or no rows
        found = np.array("")
    kinds, kind = ("iuf", "numbers") if name == "thresholds" else ("iu", "whole numbers")
    if start.strip() or len(set(parts[::2])) > 1 or found.ndim != 1 or found.dtype.kind not in kinds:
        raise ValueError(f"{name} are not rows of {kind} in brackets")
    return found


def _check(options: dict[str, int], lists: dict[str, NDArray[Any]]) -> None:
    """ValueError for what would make OpenCV read or write beside its tables, or never end."""
    for name in OPTIONS:
        least = 0 if name.endswith("Radius") else 1
        if not least <= options.get(name, -1) <= MOST:
            raise ValueError(f"{name} is {options.get(name, 'missing')}, not from {least} to {MOST}")
    patch, inner = options["patchSize"], options["patchInnerSize"]
    if options["shrinkNumber"] != SHRINK or patch % SHRINK or inner % SHRINK or inner > patch:
        raise ValueError(f"shrinkNumber is not {SHRINK}, or patchSize={patch} and patchInnerSize={inner} do not fit it")
    childs, features, thresholds, bounds, bins = lists.values()
    nodes, rest = divmod(len(childs), options["numberOfTrees"])
    if rest or not nodes or not len(childs) == len(features) == len(thresholds) < len(bounds):
        sizes = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"its lists do not fit {options['numberOfTrees']} trees of one size: {sizes}")
    # `childs` holds the number of a node's left child, counted from one; the right is next. Both lie behind the node.
    leaf, place = childs == 0, np.arange(len(childs)) % nodes
    cells, grid = (patch // SHRINK) ** 2, options["selfsimilarityGridSize"] ** 2
    channels = 2 * options["numberOfGradientOrientations"] + 5
    good = (
        leaf | ((childs >= place + 2) & (childs < nodes)),
        leaf | ((features >= 0) & (features < (cells + grid * (grid - 1) // 2) * channels)),
        np.isfinite(thresholds),
        (bounds >= 0) & (bounds <= len(bins)) & (np.diff(bounds, prepend=0) >= 0),
        (bins >= 0) & (bins < inner**2 * channels),
    )
    for (name, values), own in zip(lists.items(), good, strict=True):
        if not own.all():
            raise ValueError(f"number {own.argmin() + 1} of {name} is {values[own.argmin()]}, which is out of range")
