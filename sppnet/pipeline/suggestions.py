"""Which pictures to label next, and which labels to look at again, by the detections of a run (ours)."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sppnet import distributed
from sppnet.artifacts import check_writable, file_digest, write_json, write_text
from sppnet.data.folder import find_images
from sppnet.data.labels import normalise
from sppnet.data.layouts import find_data
from sppnet.data.selection import restrict
from sppnet.data.splits import load_split
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.errors import ImageError, SppnetError, counted
from sppnet.evaluation.doubts import Doubt, certainties, label_doubts, unlabelled_doubts
from sppnet.images import image_header, read_image
from sppnet.paths import as_text
from sppnet.pipeline.evaluation import detect_split, drop_imports
from sppnet.pipeline.run_data import Split, load_run_data
from sppnet.records import Detections, ImageRecord
from sppnet.report.drawing import Picture, contact_sheet, is_drawn, save_image

log = logging.getLogger("sppnet")

FILES = ("suggest.json", "suggest.csv", "suggest.jpg")
SHOWN = 40  # pictures on the sheet, at most


class Suggestion(NamedTuple):
    """A picture to label, or whose labels to look at: its score is the sum of its doubts, the largest first."""

    path: Path
    reason: str
    score: float
    labelled: bool
    doubts: tuple[Doubt, ...]


def suggest(
    run: Path, folder: Path | None, out: Path, top: int = 20, device: torch.device | str = "cpu"
) -> tuple[list[Suggestion], list[str]]:
    """The `top` pictures of a folder, by default the run's own, with the most doubts; and notes about the others.

    A picture without labels scores the mistakes to expect in it (`unlabelled_doubts`), one with labels how much in them
    contradicts the detector (`label_doubts`). suggest.json, .csv and a sheet go to `out`. Windows and detections are
    kept in the run. Copies count once; pictures of the run that are without labels in `folder` are left out.
    SppnetError for a run without detector, no pictures, and files in `out` that are not of an earlier call.
    """
    if any((out / name).exists() for name in FILES) and not is_drawn(out / FILES[-1]):
        raise SppnetError(f"{out}: holds a file called suggest that is not of an earlier call; choose another --out")
    SPPDetector.load(run)  # a damaged one is refused before windows are searched
    description = DetectorDescription.read(run)
    config, split = description.config, Split.read(description.folder) or Split({}, {}, {})
    if folder is None:
        data, notes = load_run_data(config, split), list[str]()
        records = [*data.train, *data.held_out]
    else:
        records, notes = _find_pictures(folder, {*split.train.values(), *split.held_out.values()})
        others = tuple(replace(own, config=drop_imports(own.config, folder)) for own in description.others)
        description = replace(description, config=drop_imports(config, folder), others=others)
    check_writable(out)
    records = restrict(records, description.classes)
    result = detect_split(run, description, records, device, evaluate=False)
    sure = {r.id: certainties(result.detections[r.id], result.thresholds, _joint(description)) for r in records}
    usual = float(np.mean([(certain >= 0.5).any() for certain in sure.values()]))
    found = [_judge(record, result.detections[record.id], sure[record.id], usual) for record in records]
    best = sorted((one for one in found if one.score > 0), key=lambda one: -one.score)[:top]
    trained = sum(r.annotation is not None and r.digest in split.train.values() for r in records)
    if trained:
        seen = f"trained on: {trained} of {counted(len(records), 'picture')}; it has learned their labels"
        notes.append(f"{seen}, so it finds fewer errors there than in others")
    if distributed.is_main():
        _write(best, out)
    return best, notes


def _joint(description: DetectorDescription) -> bool:
    return description.config.head.training == "joint"


def _find_pictures(folder: Path, known: set[str]) -> tuple[list[ImageRecord], list[str]]:
    """The pictures of a folder, each content once, labelled where it is a data set; notes."""
    labelled, notes, found, again = dict[Path, ImageRecord](), list[str](), dict[str, ImageRecord](), 0
    try:
        for part in find_data(folder).parts:
            labelled |= {r.path.resolve(): r for r in load_split(folder, part, require_annotations=False)[0]}
    except SppnetError as error:
        log.info("%s: taken as pictures without labels (%s)", folder, error)
    for path in (path for path in find_images([folder]).images if not is_drawn(path)):
        record = labelled.get(path.resolve())
        if record is None:
            try:
                size, digest = image_header(path)[0], file_digest(path)
            except (ImageError, OSError) as error:
                notes.append(f"left out: {error}")
                continue
            record = ImageRecord(normalise(path.relative_to(folder).as_posix()), path, size, digest)
        if record.annotation is None and record.digest in known:
            again += 1
        elif record.annotation is not None or record.digest not in found:
            found[record.digest] = record
    if again:
        notes.append(f"not ranked, being in the run with their labels: {counted(again, 'picture')}")
    if not found:
        raise SppnetError(f"{folder}: no picture to rank; {'; '.join(notes) or 'all are drawn on'}")
    return list(found.values()), notes


def _judge(record: ImageRecord, found: Detections, certain: np.ndarray, usual: float) -> Suggestion:
    labels = record.annotation
    doubts = unlabelled_doubts(found, certain, usual) if labels is None else label_doubts(found, certain, labels)
    sums: dict[str, list[float]] = {}
    for doubt in doubts:
        sums.setdefault(doubt.reason, []).append(doubt.value)
    most = sorted(sums, key=lambda reason: -sum(sums[reason]))[:2]
    reason = ", ".join(f"{len(sums[name])} × {name}" if len(sums[name]) > 1 else name for name in most)
    score, ordered = sum(doubt.value for doubt in doubts), sorted(doubts, key=lambda doubt: -doubt.value)
    return Suggestion(record.path, reason, score, labels is not None, tuple(ordered))


def _write(found: Sequence[Suggestion], out: Path) -> None:
    entries = [
        {**one._asdict(), "path": as_text(one.path), "doubts": [doubt._asdict() for doubt in one.doubts]}
        for one in found
    ]
    text, columns = io.StringIO(), Suggestion._fields[:4]
    csv.writer(text).writerows([columns, *([entry[name] for name in columns] for entry in entries)])
    pictures = []
    for number, one in enumerate(found[:SHOWN], start=1):
        placed, reasons = (
            [d for d in one.doubts if d.box is not None],
            tuple({d.reason: 0 for d in one.doubts}) or ("",),
        )
        boxes, scores = np.array([d.box for d in placed]).reshape(-1, 4), np.array([d.value for d in placed])
        shown = Detections(boxes, scores, np.array([reasons.index(d.reason) for d in placed], np.int64), reasons)
        pictures.append(Picture(read_image(one.path), shown, f"{number}: {one.score:.2f} {one.path.name}"))
    write_json(out / FILES[0], entries)
    write_text(out / FILES[1], text.getvalue())
    save_image(contact_sheet(pictures), out / FILES[2])
