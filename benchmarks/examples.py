"""What the benchmarks measure on: VOC's images and windows where SPPNET_SHARED is set, generated ones otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sppnet.backbones.backbone import build_backbone
from sppnet.config_files import parse_config
from sppnet.data.shapes import draw_scene
from sppnet.detection.box_regression import BoxRegressor, BoxRegressors
from sppnet.detection.detector import SPPDetector
from sppnet.detection.linear_svm import LinearSVMs
from sppnet.images import image_header
from sppnet.models.sppnet import build_head
from sppnet.proposals.search import make_proposer

SIZE = (375, 500)  # (height, width), VOC's most frequent
SVM_SCALE = 0.05  # of random features: scores of about -1.5 ± 1.5, so that suppression has about as much to do as usual


def shared(path: str) -> Path | None:
    """A file or folder below SPPNET_SHARED, None where that is not set; ends the program where it does not exist."""
    root = os.environ.get("SPPNET_SHARED")
    if not root:
        return None
    found = Path(root) / path
    if not found.exists():
        sys.exit(f"{found}: no such file; correct SPPNET_SHARED, or unset it to measure generated images")
    return found


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the rows, at even distances."""
    count = min(count, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def pictures(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs of SIZE: VOC's, or generated ones written to `folder`."""
    devkit = shared("voc/VOCdevkit")
    if devkit is None:
        return [write_picture(folder / f"generated_{seed}.jpg", seed) for seed in range(count)]
    files = sorted(devkit.glob("VOC*/JPEGImages/*.jpg"))
    return spread([path for path in files if image_header(path)[0] == SIZE], count)


def write_picture(path: Path, seed: int = 0) -> Path:
    """Four scenes of shapes in one JPEG of SIZE."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng).pixels[:188, :250] for _ in range(4)]
    rows = [np.concatenate(scenes[:2], axis=1), np.concatenate(scenes[2:], axis=1)]
    Image.fromarray(np.concatenate(rows)[: SIZE[0]]).save(path, quality=90)
    return path


def windows(count: int = 2000) -> tuple[NDArray[np.float64], Path | None, str]:
    """(count, 4) boxes in an image of SIZE, its file (None for random boxes), and where they are from."""
    proposals = shared("voc/proposals/selective_search_fast_VOC2007.npz")
    if proposals is not None:
        with np.load(proposals, allow_pickle=False) as file:
            ids, offsets, boxes = file["ids"], file["offsets"], file["boxes"]
        for index in np.flatnonzero(np.diff(offsets) >= count):
            path = shared(f"voc/VOCdevkit/VOC2007/JPEGImages/{ids[index]}.jpg")
            if path is not None and image_header(path)[0] == SIZE:
                own = boxes[offsets[index] : offsets[index + 1]][:count].astype(np.float64)
                return own, path, f"selective search of VOC2007/{ids[index]}"
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(20), np.log(SIZE[0]), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array(SIZE[::-1]) - sides)
    return np.concatenate([corners, corners + sides], axis=1), None, "random boxes"


def subset(source: Path, target: Path, counts: Mapping[str, int]) -> Path:
    """A devkit in `target` with links to `counts` images of each image set of `source`, spread over its years."""
    for name, count in counts.items():
        members = [
            (file.parents[2], line.split()[0])
            for file in sorted(source.resolve().glob(f"VOC*/ImageSets/Main/{name}.txt"))
            for line in file.read_text().splitlines()
            if line.strip()
        ]
        chosen = spread(members, count)
        for year in sorted({year for year, _ in members}):
            link_images(year, target / year.name, name, [image for own, image in chosen if own == year])
    return target


def link_images(source: Path, target: Path, name: str, images: Sequence[str]) -> None:
    """Links to `images` of a year folder, and the image set `name` of them."""
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for image in images:
            link = target / folder / f"{image}.{suffix}"
            if not link.exists():
                link.symlink_to(source / folder / link.name)
    (target / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (target / f"ImageSets/Main/{name}.txt").write_text("".join(f"{image}\n" for image in images))


def random_detector(
    backbone: str,
    precision: str = "float32",
    runtime: str = "auto",
    scales: Sequence[int] = (688,),
    width: int = 4096,
    ranks: Mapping[str, int] | None = None,
    classes: int = 20,
) -> SPPDetector:
    """A detector that has learned nothing: as fast as a trained one, and nothing to download.

    Its SVMs let about a third of the windows pass, and its box regressors predict no change.
    """
    settings = {
        "precision": precision,
        "backbone": {"name": backbone, "weights": {"source": "random"}},
        "maps": {"scales": list(scales), "runtime": runtime},
        "head": {"fc6": width, "fc7": width},
    }
    config = parse_config(settings, "benchmark")
    network = build_backbone(config.backbone)
    head = build_head(network.channels, config.pyramid.levels, classes + 1, config.head, ranks=ranks)
    names = tuple(f"class {number + 1}" for number in range(classes))
    weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    svms = LinearSVMs(weight, torch.full((classes,), -1.5), SVM_SCALE, names)
    zeros = torch.zeros(4, dtype=torch.float64)
    pooled = network.channels * sum(n * n for n in config.pyramid.levels)
    still = BoxRegressor(zeros.new_zeros(4, pooled), zeros, zeros, torch.eye(4, dtype=torch.float64))
    regressors = BoxRegressors.stack(dict.fromkeys(names, still))
    return SPPDetector(network, head, svms, regressors, make_proposer(config.proposals), config)
