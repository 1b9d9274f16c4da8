"""Detections in the files of the PASCAL VOC devkit: ``comp4_det_<set>_<class>.txt``, 1-based inclusive corners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sppnet.artifacts import write_text
from sppnet.data.labels import normalise, read_lines
from sppnet.data.voc import INWARD
from sppnet.errors import SppnetError
from sppnet.paths import fitting_name
from sppnet.records import Detections


def write_comp4(
    folder: Path, image_set_name: str, detections: Mapping[str, Detections], classes: Sequence[str]
) -> list[Path]:
    """Write ``comp4_det_<set>_<class>.txt`` per class, as the VOC devkit reads them, and return the paths.

    `detections` maps image ids to what was found; lines are ``stem score xmin ymin xmax ymax``. A class
    without detections gets an empty file. Images of several year folders with one stem are an error.
    """
    stems = {image_id: image_id.rpartition("/")[2] for image_id in detections}
    if len(set(stems.values())) < len(stems):
        stem = Counter(stems.values()).most_common(1)[0][0]
        raise SppnetError(f"comp4 files name images by stem, but {stem!r} occurs twice; write each year by itself")
    lines: dict[str, list[str]] = {name: [] for name in classes}
    for image_id, found in detections.items():
        corners = found.boxes.astype(np.float64) + INWARD
        for label, score, box in zip(found.labels, found.scores, corners, strict=True):
            if found.classes[label] in lines:  # nine decimals keep float32 scores in their order
                values = " ".join(f"{value:.6f}" for value in box)
                lines[found.classes[label]].append(f"{stems[image_id]} {score:.9f} {values}\n")
    paths = [folder / fitting_name(f"comp4_det_{image_set_name}_{name}", ".txt") for name in classes]
    for path, name in zip(paths, classes, strict=True):
        write_text(path, "".join(lines[name]))
    return paths


def read_comp4(path: Path) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Image stems, scores (R,) and half-open boxes (R, 4) of a comp4 file, in the order of the file."""
    stems, values = list[str](), list[list[float]]()
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        stem, *fields = line.strip().rsplit(maxsplit=5)
        try:
            row = [float(field) for field in fields]
        except ValueError:
            row = []
        if len(row) != 5 or not np.isfinite(row).all():
            raise SppnetError(f"{path}:{number}: expected 'id score xmin ymin xmax ymax', got {line!r}; correct it")
        if row[3] <= row[1] - 1 or row[4] <= row[2] - 1:
            raise SppnetError(f"{path}:{number}: xmin must not exceed xmax, nor ymin ymax, got {line!r}; correct it")
        stems.append(normalise(stem))
        values.append(row)
    table = np.array(values, dtype=np.float64).reshape(-1, 5)
    return stems, table[:, 0], table[:, 1:] - INWARD
