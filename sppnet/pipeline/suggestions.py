"""Which pictures to label next, and which labels to look at again, by the detections of a run (ours)."""

from __future__ import annotations

import csv
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

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
COLUMNS = ("image", "score", "reason", "labelled")


def suggest(
    run: Path, folder: Path | None, out: Path, top: int = 20, device: torch.device | str = "cpu"
) -> tuple[list[dict[str, Any]], list[str]]:
    """The `top` pictures of a folder, by default the run's own, by the sum of their doubts; and notes about the others.

    Those of a picture without labels are the mistakes to expect in it (`unlabelled_doubts`), those of one with labels
    what in them contradicts the detector (`label_doubts`). suggest.json, .csv and a sheet go to `out`; windows and
    detections are kept in the run. Copies count once; pictures of the run that have no labels in `folder` are left out.
    SppnetError for a run without detector, no pictures, and files in `out` that are not of an earlier call.
    """
    if any((out / name).exists() for name in FILES) and not is_drawn(out / FILES[-1]):
        raise SppnetError(f"{out}: holds a file called suggest that is not of an earlier call; choose another --out")
    joint = SPPDetector.load(run).is_joint  # a damaged one is refused before windows are searched
    description = DetectorDescription.read(run)
    split = Split.read(description.folder) or Split({}, {}, {})
    if folder is None:
        data, notes = load_run_data(description.config, split), list[str]()
        records = [*data.train, *data.held_out]
    else:
        records, notes = _find_pictures(folder, {*split.train.values(), *split.held_out.values()})
        others = tuple(replace(own, config=drop_imports(own.config, folder)) for own in description.others)
        description = replace(description, config=drop_imports(description.config, folder), others=others)
    check_writable(out)
    result = detect_split(run, description, records, device, evaluate=False)
    certain = {image: certainties(found, result.thresholds, joint) for image, found in result.detections.items()}
    usual, doubts = float(np.mean([(each >= 0.5).any() for each in certain.values()])), dict[str, list[Doubt]]()
    for own in restrict(records, description.classes):
        each = result.detections[own.id], certain[own.id]
        labels = own.annotation
        found = unlabelled_doubts(*each, usual) if labels is None else label_doubts(*each, labels)
        doubts[own.id] = sorted(found, key=lambda doubt: -doubt.value)
    best = sorted((r for r in records if doubts[r.id]), key=lambda r: -sum(d.value for d in doubts[r.id]))[:top]
    trained = sum(r.annotation is not None and r.digest in split.train.values() for r in records)
    seen = f"trained on: {trained} of {counted(len(records), 'picture')}, whose labels it has learned, errors too"
    notes += [f"{seen}: others show more"] if trained else []
    entries = [_entry(record, doubts[record.id]) for record in best]
    if distributed.is_main():
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *([entry[name] for name in COLUMNS] for entry in entries)])
        reasons = tuple(sorted({doubt.reason for record in best[:SHOWN] for doubt in doubts[record.id]}))
        sheet = contact_sheet([_picture(i, r, doubts[r.id], reasons) for i, r in enumerate(best[:SHOWN], start=1)])
        write_json(out / FILES[0], entries)
        write_text(out / FILES[1], text.getvalue())
        save_image(sheet, out / FILES[2])
    return entries, notes


def _find_pictures(folder: Path, known: set[str]) -> tuple[list[ImageRecord], list[str]]:
    """The pictures of a folder, each content once, labelled where it is a data set; notes."""
    labelled, notes, found, again = dict[Path, ImageRecord](), list[str](), dict[str, ImageRecord](), 0
    images = [path for path in find_images([folder]).images if not is_drawn(path)]
    try:
        for part in find_data(folder).parts:
            labelled |= {r.path.resolve(): r for r in load_split(folder, part, require_annotations=False)[0]}
    except SppnetError as error:
        log.info("%s: taken as pictures without labels", str(error).partition(";")[0])
    for path in images:
        try:
            name = normalise(path.relative_to(folder).as_posix())
            record = labelled.get(path.resolve()) or ImageRecord(name, path, image_header(path)[0], file_digest(path))
        except (ImageError, OSError) as error:
            notes.append(f"left out: {error}")
            continue
        again += record.annotation is None and record.digest in known
        if record.annotation is not None or record.digest not in {*found, *known}:
            found[record.digest] = record
    notes += [f"not ranked, being in the run with their labels: {counted(again, 'picture')}"] if again else []
    if not found:
        raise SppnetError(f"{folder}: no picture to rank; {'; '.join(notes) or 'detections are drawn on all'}")
    return list(found.values()), notes


def _entry(record: ImageRecord, doubts: list[Doubt]) -> dict[str, Any]:
    sums: dict[str, list[float]] = {}
    for doubt in doubts:
        sums.setdefault(doubt.reason, []).append(doubt.value)
    most = sorted(sums, key=lambda reason: -sum(sums[reason]))[:2]
    reason = ", ".join(f"{len(sums[name])} × {name}" if len(sums[name]) > 1 else name for name in most)
    values = as_text(record.path), round(sum(map(sum, sums.values())), 4), reason, record.annotation is not None
    return {**dict(zip(COLUMNS, values, strict=True)), "doubts": [doubt._asdict() for doubt in doubts]}


def _picture(number: int, record: ImageRecord, doubts: list[Doubt], reasons: tuple[str, ...]) -> Picture:
    """The picture with the boxes of its doubts; a reason has one colour on the whole sheet."""
    placed = [d for d in doubts if d.box]
    boxes, values = np.array([d.box for d in placed]).reshape(-1, 4), np.array([d.value for d in placed])
    found = Detections(boxes, values, np.array([reasons.index(d.reason) for d in placed], np.int64), reasons)
    return Picture(read_image(record.path), found, f"{number}: {sum(d.value for d in doubts):.2f} {record.path.name}")
