"""Detect in files, folders and patterns of images; write annotated pictures, detections.json and detections.csv."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sppnet.artifacts import read_json, write_json, write_text
from sppnet.checks import check_thresholds
from sppnet.data.folder import find_images
from sppnet.detection.detector import SPPDetector
from sppnet.errors import ArtifactError, BackboneError, ImageError, SppnetError
from sppnet.images import read_image
from sppnet.jobs import iterate_in_workers, progress_bar
from sppnet.records import Detections
from sppnet.report.drawing import draw_detections, save_image


@dataclass(frozen=True)
class FolderResult:
    """Detections at or above the threshold, by file; files that could not be read, with the reason."""

    detections: dict[Path, Detections]
    skipped: dict[Path, str]


def detect_files(
    load: Callable[[], SPPDetector],
    paths: Sequence[str | Path],
    out: Path,
    threshold: float | None = None,
    workers: int = 0,
    progress: bool = True,
) -> FolderResult:
    """Detect in every image that `paths` name and write the results to `out`.

    `load` gives the detector, anew in each of `workers` processes (0 = one a core), and must be picklable. What scores
    at least `threshold` is shown, by default what the detector's own thresholds let pass. A file that cannot be read,
    or is too narrow for the network, is skipped and counted. Pictures keep the names of their images; a name that
    occurs twice gets a number. What an earlier call left in `out` is not searched. The lists are written after an
    interruption too. Raises SppnetError where a path names no image, and where a picture would overwrite one of the
    images.
    """
    if threshold is not None:
        check_thresholds(threshold, ())
    found: dict[Path, Detections] = {}
    skipped: dict[Path, str] = {}
    names = _picture_names(_find_inputs(paths, out))
    jobs = [(path, out / name) for path, name in names.items()]
    try:
        done = iterate_in_workers(partial(_painter, load, threshold), jobs, workers)
        for (path, _), result in progress_bar(done, "detect", "image", len(names), shown=progress):
            if isinstance(result, str):
                skipped[path] = result
            else:
                found[path] = result
    finally:
        found = {path: found[path] for path in names if path in found}  # in order of their names
        if found or skipped:
            write_json(out / "detections.json", [_entry(path, names[path], found[path]) for path in found])
            write_text(out / "detections.csv", _table(found))
    return FolderResult(found, {path: skipped[path] for path in names if path in skipped})


def _painter(
    load: Callable[[], SPPDetector], threshold: float | None
) -> Callable[[tuple[Path, Path]], Detections | str]:
    """Detects in one image file after the other and draws what it finds in another; or says why there is none."""
    detector = load()

    def paint(job: tuple[Path, Path]) -> Detections | str:
        path, picture = job
        try:
            image = read_image(path)
            detections = detector.detect(image, threshold=threshold)
        except ImageError as error:
            return str(error)
        except BackboneError as error:
            return f"{path}: {error}"
        save_image(draw_detections(image, detections), picture)
        return detections

    return paint


def _find_inputs(paths: Sequence[str | Path], out: Path) -> list[Path]:
    """The images that `paths` name, without the pictures that an earlier call left in `out`."""
    found, earlier = find_images(paths), _earlier_pictures(out)
    images = [path for path in found if path.resolve() not in earlier]
    inside = [path for path in images if path.resolve().parent == out.resolve()]
    if inside or not images:
        image = (inside or found)[0]
        raise SppnetError(f"{image}: lies in {out}, where a picture could overwrite it; choose another --out")
    return images


def _earlier_pictures(out: Path) -> set[Path]:
    """What the detections.json in `out`, if there is one, says that it belongs to."""
    try:
        return {out.resolve() / entry["picture"] for entry in read_json(out / "detections.json")}
    except (ArtifactError, TypeError, KeyError):  # none, or not ours
        return set()


def _picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for the picture of each image, all different: its stem, with a number where that is taken."""
    taken: set[str] = set()
    names = {}
    for path in paths:
        candidates = itertools.chain([f"{path.stem}.jpg"], (f"{path.stem}-{n}.jpg" for n in itertools.count(2)))
        names[path] = next(name for name in candidates if name.lower() not in taken)
        taken.add(names[path].lower())
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
