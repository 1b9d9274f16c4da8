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

from sppnet.artifacts import check_writable, read_json, write_json, write_text
from sppnet.checks import check_thresholds
from sppnet.data.folder import find_images
from sppnet.detection.detector import SPPDetector
from sppnet.errors import ArtifactError, BackboneError, ImageError, SppnetError
from sppnet.images import read_image
from sppnet.jobs import iterate_in_workers, progress_bar, ran_out_of_memory
from sppnet.paths import as_text, fitting_name
from sppnet.records import Detections
from sppnet.report.drawing import draw_detections, is_drawn, save_image

COLUMNS = ("image", "class", "score", "x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class FolderResult:
    """Detections at or above the threshold, by file; files that could not be searched, with the reason."""

    detections: dict[Path, Detections]
    skipped: dict[Path, str]
    note: str = ""  # what was left out on purpose, in words


def detect_files(
    load: Callable[[], SPPDetector],
    paths: Sequence[str | Path],
    out: Path,
    threshold: float | None = None,
    workers: int = 0,
    progress: bool = True,
) -> FolderResult:
    """Detect in every image that `paths` name and write the results to `out`.

    What scores at least `threshold` is shown, by default what the detector's own thresholds let pass.
    `load` gives the detector, anew in each of `workers` processes (0 = one a core), and must be picklable. A file that
    cannot be read, is too narrow for the network or too large for the memory is skipped and counted. Pictures keep the
    names of their images; a name that occurs twice gets a number, one that is too long ends in a digest. Pictures that
    an earlier call drew carry a mark and are not searched, wherever they lie. The lists are written after an
    interruption too. Raises SppnetError, before anything is computed, where a path names no image, `out` cannot be
    written to, and where a file in it that is not of an earlier call would be overwritten.
    """
    if threshold is not None:
        check_thresholds(threshold, ())
    named = find_images(paths)
    images = [path for path in named.images if not is_drawn(path)]
    own = len(named.images) - len(images)
    if own and not images:
        raise SppnetError(f"{named.images[0]}: a picture that detections are drawn on already; name the images")
    names = _picture_names(images)
    _check_out(out, names)
    results: dict[Path, Detections | str] = dict(named.unusable)
    jobs = [(path, out / name) for path, name in names.items()]
    try:
        done = iterate_in_workers(partial(_painter, load, threshold), jobs, workers)
        for (path, _), result in progress_bar(done, "detect", "image", len(names), shown=progress):
            results[path] = result
    finally:
        found = {path: one for path in names if isinstance(one := results.get(path), Detections)}  # ordered by name
        skipped = {path: why for path, why in sorted(results.items()) if isinstance(why, str)}
        if results:
            write_json(out / "detections.json", [_entry(path, names[path], found[path]) for path in found])
            write_text(out / "detections.csv", _table(found))
    drawn = "a picture that detections are drawn on" if own == 1 else f"{own} pictures that detections are drawn on"
    note = "; ".join(filter(None, (named.note(), f"not searched: {drawn}" if own else "")))
    return FolderResult(found, skipped, note)


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
            drawn = draw_detections(image, detections)
        except ImageError as error:
            return str(error)
        except BackboneError as error:
            return f"{path}: {error}"
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            return f"{path}: not enough memory for it; cut it up, or train with maps.max_side or a smaller maps.scales"
        save_image(drawn, picture)
        return detections

    return paint


def _check_out(out: Path, names: dict[Path, str]) -> None:
    """Refuse an `out` in which something of the user's would be overwritten, or nothing can be written."""
    for path in names:
        if path.resolve().parent == out.resolve():
            raise SppnetError(f"{path}: lies in {out}, where a picture could overwrite it; choose another --out")
    written = dict.fromkeys(names.values(), is_drawn) | {"detections.json": _is_list, "detections.csv": _is_table}
    for name, of_ours in written.items():
        if (out / name).exists() and not of_ours(out / name):
            raise SppnetError(f"{out / name}: would be overwritten and is not of an earlier call; choose another --out")
    check_writable(out)


def _is_list(path: Path) -> bool:
    try:
        entries = read_json(path)
        return isinstance(entries, list) and all({"image", "detections"} <= entry.keys() for entry in entries)
    except (ArtifactError, AttributeError):
        return False


def _is_table(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:99].decode(errors="replace").partition("\r\n")[0] == ",".join(COLUMNS)


def _picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for the picture of each image, all different: its stem, with a number where that is taken."""
    taken: set[str] = set()
    names = {}
    for path in paths:
        numbers = (f"-{n}.jpg" for n in itertools.count(2))
        candidates = (fitting_name(path.stem, ending) for ending in itertools.chain([".jpg"], numbers))
        names[path] = next(name for name in candidates if name.lower() not in taken)
        taken.add(names[path].lower())
    return names


def _entry(path: Path, picture: str, found: Detections) -> dict[str, Any]:
    objects = [
        {"class": found.classes[label], "score": round(float(score), 6), "box": [round(float(x), 2) for x in box]}
        for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
    ]
    return {"image": as_text(path), "picture": as_text(picture), "detections": objects}


def _table(found: dict[Path, Detections]) -> str:
    text = io.StringIO()
    objects = [(as_text(path), entry) for path in found for entry in _entry(path, "", found[path])["detections"]]
    rows = [[path, entry["class"], entry["score"], *entry["box"]] for path, entry in objects]
    csv.writer(text).writerows([COLUMNS, *rows])
    return text.getvalue()
