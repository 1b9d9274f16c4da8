"""Detect in files, folders and patterns of images; write annotated pictures, detections.json and detections.csv."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sppnet.artifacts import check_writable, read_json, write_json, write_text
from sppnet.checks import check_thresholds
from sppnet.data.folder import find_images
from sppnet.detection.detector import SPPDetector
from sppnet.errors import ArtifactError, BackboneError, ImageError, SppnetError, counted
from sppnet.images import read_image
from sppnet.jobs import iterate_in_workers, progress_bar, ran_out_of_memory
from sppnet.paths import as_text, fitting_name
from sppnet.records import Detections
from sppnet.report.drawing import draw_detections, is_drawn, save_image

log = logging.getLogger("sppnet")

COLUMNS = ("image", "class", "score", "x1", "y1", "x2", "y2")
OTHERS = "{}: would be overwritten and is not of an earlier call; choose another --out"


@dataclass(frozen=True)
class FolderResult:
    """Detections at or above the threshold, by file; files that could not be searched, with the reason."""

    detections: dict[Path, Detections]
    skipped: dict[Path, str]
    note: str = ""  # what was left out on purpose or is not of this call, in words


def detect_files(
    load: Callable[[], SPPDetector],
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    threshold: float | None = None,
    workers: int = 0,
    progress: bool = True,
) -> FolderResult:
    """Detect in every image that `paths` name and write the results to `out`.

    What scores at least `threshold` is shown, by default what the detector's own thresholds let pass.
    `load` gives the detector, anew in each of `workers` processes (0 = one a core), and must be picklable. A file that
    cannot be read, is too narrow for the network or too large for the memory is skipped and counted. Pictures keep the
    names of their images; a name that occurs twice gets a number, one that is too long ends in a digest. Pictures that
    an earlier call drew carry a mark and are not searched, wherever they lie. What an earlier call wrote to `out` about
    other images stays there and in the lists, as long as its picture does. The lists are written after an
    interruption too. Raises SppnetError, before anything is computed, where a path names no image, `out` cannot be
    written to, and where a file in it that is not of an earlier call would be overwritten.
    """
    if threshold is not None:
        check_thresholds(threshold, ())
    out, paths = Path(out), [paths] if isinstance(paths, str | Path) else paths
    named = find_images(paths)
    images = [path for path in named.images if not is_drawn(path)]
    own = len(named.images) - len(images)
    if own and not images:
        raise SppnetError(f"{named.images[0]}: a picture that detections are drawn on already; name the images")
    earlier = _read_earlier(out)
    names = _picture_names(images, {place: picture for place, (_, picture) in earlier.items() if picture})
    _check_out(out, names)
    there = {name for name in names.values() if (out / name).exists()}
    results: dict[Path, Detections | str] = dict(named.unusable)
    bare: dict[Path, str] = {}  # images without windows, with the setting
    jobs = [(path, out / name) for path, name in names.items()]
    try:
        done = iterate_in_workers(partial(_painter, load, threshold), jobs, workers)
        for (path, _), (result, why) in progress_bar(done, "detect", "image", len(names), shown=progress):
            results[path] = result
            bare |= {path: why} if why else {}
    finally:
        found = {path: one for path in names if isinstance(one := results.get(path), Detections)}  # ordered by name
        skipped = {path: why for path, why in sorted(results.items()) if isinstance(why, str)}
        places = set(map(_place, results))  # of one that is skipped now nothing is kept
        others = [value for place, value in earlier.items() if place not in places]
        kept = [entry for entry, picture in others if picture]
        if results:
            entries = [*kept, *(_entry(path, names[path], found[path]) for path in found)]
            write_json(out / "detections.json", entries)
            write_text(out / "detections.csv", _table(entries))
    log.debug("images without candidate windows: %s", ", ".join(map(as_text, bare)) or "none")
    drawn = "a picture that detections are drawn on" if own == 1 else f"{own} pictures that detections are drawn on"
    replaced, first = len({names[path] for path in found} & there), min(bare, default=Path())
    gone = len(others) - len(kept)
    has = "image has" if len(bare) == 1 else "images have"
    notes = {
        f"not searched: {drawn}": own,
        f"{len(bare)} {has} no candidate window: {as_text(first)} ({bare.get(first)})": len(bare),
        f"replaced: {counted(replaced, 'picture')} of earlier calls": replaced,
        f"kept in the lists: {counted(len(kept), 'image')} of earlier calls": len(kept),
        f"no longer in the lists, since the pictures are gone: {counted(gone, 'image')} of earlier calls": gone,
    }
    return FolderResult(found, skipped, "; ".join(filter(None, (named.note(), *(n for n in notes if notes[n])))))


def _painter(
    load: Callable[[], SPPDetector], threshold: float | None
) -> Callable[[tuple[Path, Path]], tuple[Detections | str, str]]:
    """Detects in one image file after the other and draws what it finds in another; or says why there is none.

    Also gives the setting that left an image without windows, "" where it has some.
    """
    detector = load()

    def paint(job: tuple[Path, Path]) -> tuple[Detections | str, str]:
        path, picture = job
        try:
            image = read_image(path)
            windows = detector.proposer(image)
            detections = detector.detect(image, windows, threshold=threshold)
            drawn = draw_detections(image, detections)
        except ImageError as error:
            return str(error), ""
        except BackboneError as error:
            return f"{path}: {error}", ""
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            hint = "cut it up, or train with maps.max_side or a smaller maps.scales"
            return f"{path}: not enough memory for it; {hint}", ""
        save_image(drawn, picture)
        return detections, "" if len(windows) else f"proposals.min_side={detector.config.proposals.min_side}"

    return paint


def _check_out(out: Path, names: dict[Path, str]) -> None:
    """Refuse an `out` in which something of the user's would be overwritten, or nothing can be written."""
    for path in names:
        if path.resolve().parent == out.resolve():
            raise SppnetError(f"{path}: lies in {out}, where a picture could overwrite it; choose another --out")
    for name, of_ours in (dict.fromkeys(names.values(), is_drawn) | {"detections.csv": _is_table}).items():
        if (out / name).exists() and not of_ours(out / name):
            raise SppnetError(OTHERS.format(out / name))
    check_writable(out)


def _read_earlier(out: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """By the place of its image, each entry of the list in `out` and the name of its picture, "" if that is gone."""
    path = out / "detections.json"
    if not path.exists():
        return {}
    drawn = {as_text(picture.name): picture.name for picture in out.iterdir() if is_drawn(picture)}
    try:
        entries = read_json(path)
        if not isinstance(entries, list) or not _table(entries):
            raise TypeError
        return {_place(entry["image"]): (entry, drawn.get(entry.get("picture"), "")) for entry in entries}
    except (ArtifactError, AttributeError, LookupError, TypeError, ValueError):
        raise SppnetError(OTHERS.format(path)) from None


def _place(path: str | Path) -> str:
    return os.path.abspath(as_text(path))  # noqa: PTH100 - links stay


def _is_table(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:99].decode(errors="replace").partition("\r\n")[0] == ",".join(COLUMNS)


def _picture_names(paths: Sequence[Path], earlier: Mapping[str, str]) -> dict[Path, str]:
    """A file name for the picture of each image, all different: its stem, with a number where that is taken.

    `earlier` holds those of an earlier call by the places of their images, which keep them.
    """
    taken = {name.lower() for name in earlier.values()}
    names = {}
    for path in paths:
        numbers = (f"-{n}.jpg" for n in itertools.count(2))
        candidates = (fitting_name(path.stem, ending) for ending in itertools.chain([".jpg"], numbers))
        names[path] = earlier.get(_place(path)) or next(name for name in candidates if name.lower() not in taken)
        taken.add(names[path].lower())
    return names


def _entry(path: Path, picture: str, found: Detections) -> dict[str, Any]:
    objects = [
        {"class": found.classes[label], "score": round(float(score), 6), "box": [round(float(x), 2) for x in box]}
        for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
    ]
    return {"image": as_text(path), "picture": as_text(picture), "detections": objects}


def _table(entries: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    objects = [(as_text(entry["image"]), found) for entry in entries for found in entry["detections"]]
    rows = [[image, found["class"], found["score"], *found["box"]] for image, found in objects]
    csv.writer(text).writerows([COLUMNS, *rows])
    return text.getvalue()
