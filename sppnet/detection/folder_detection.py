"""Detect in files, folders and patterns of images; write annotated pictures, detections.json and detections.csv."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sppnet.data.folder import find_images
from sppnet.detection.detector import SPPDetector
from sppnet.images import ImageError, read_image
from sppnet.records import Detections
from sppnet.report.drawing import draw_detections, save_image
from sppnet.store import write_json, write_text

log = logging.getLogger("sppnet")


@dataclass(frozen=True)
class FolderResult:
    """Detections at or above the threshold, by file; files that could not be read, with the reason."""

    detections: dict[Path, Detections]
    skipped: dict[Path, str]


def detect_files(
    detector: SPPDetector, paths: Sequence[str | Path], out: Path, threshold: float, progress: bool = True
) -> FolderResult:
    """Detect in every image that `paths` name and write the results to `out`.

    A file that cannot be read is skipped and counted. Pictures keep the names of their images; a name that
    occurs twice gets a number. Raises FolderError where a path names no image.
    """
    found: dict[Path, Detections] = {}
    skipped: dict[Path, str] = {}
    names = _picture_names(find_images(paths))
    for path, name in tqdm(names.items(), desc="detect", unit="image", disable=None if progress else True):
        try:
            image = read_image(path)
        except ImageError as error:
            skipped[path] = str(error)
            continue
        found[path] = detector.detect(image).above(threshold)
        save_image(draw_detections(image, found[path], threshold), out / name)
    write_json(out / "detections.json", [_entry(path, names[path], found[path]) for path in found])
    write_text(out / "detections.csv", _table(found))
    return FolderResult(found, skipped)


def _picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    seen: Counter[str] = Counter()
    names = {}
    for path in paths:
        seen[path.stem] += 1
        names[path] = f"{path.stem}.jpg" if seen[path.stem] == 1 else f"{path.stem}-{seen[path.stem]}.jpg"
    return names


def _entry(path: Path, picture: str, found: Detections) -> dict[str, Any]:
    objects = [
        {"class": found.classes[label], "score": round(float(score), 6), "box": [round(float(x), 2) for x in box]}
        for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
    ]
    return {"image": str(path), "picture": picture, "detections": objects}


def _table(found: dict[Path, Detections]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", "class", "score", "x1", "y1", "x2", "y2"])
    for path, detections in found.items():
        for entry in _entry(path, "", detections)["detections"]:
            writer.writerow([path, entry["class"], entry["score"], *entry["box"]])
    return text.getvalue()
