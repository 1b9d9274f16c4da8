"""Data sets written in another format: VOC's, COCO's or YOLO's."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sppnet.artifacts import write_json, write_text
from sppnet.data.layouts import find_data
from sppnet.data.parts import role_of
from sppnet.data.splits import find_part, load_splits
from sppnet.data.voc import write_annotation
from sppnet.errors import SppnetError, counted
from sppnet.paths import fitting_name
from sppnet.records import ImageRecord, SkipCounts

Named = Mapping[str, ImageRecord]  # by the names of the new files


def convert(source: Path, out: Path, to: str, format: str = "auto", splits: Sequence[str] = ()) -> str:
    """Write the parts of a folder (all that have a role, or `splits`) to the new folder `out`; returns what was done.

    Images are copied, so that no later change of one changes the other. `out` appears only when it is complete.
    SppnetError for what `load_splits` refuses, and for an `out` that holds something or lies in the source.
    """
    folder = find_data(source, format)
    parts = tuple(splits) or tuple(part for own in folder.roles().values() for part in own)
    inside = any(out.resolve().is_relative_to(path.resolve()) for path in (source, folder.root))
    if inside or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise SppnetError(f"{out}: expected a new or an empty folder outside of the source; name another")
    everything, skips = load_splits(folder, parts, require_annotations=False)
    hard = [r.id for r in everything if r.annotation and to == "yolo" for flag in r.annotation.difficult if flag]
    if not everything:
        raise SppnetError(f"{source}: nothing to convert: its annotations ({folder.format.upper()}) list no image")
    bare = {r.id: r for r in everything if r.annotation is None and to != "voc"}
    lost = {"image without annotation, left out": [*bare], "difficult flag lost, which YOLO does not have": hard}
    skips = folder.left_out.plus(skips).plus(SkipCounts(lost))
    everything = [record for record in everything if record.id not in bare]
    of_part = {part: find_part(folder, part).images for part in parts}
    records = {part: [record for record in everything if record.id in of_part[part]] for part in parts}
    found = {name for record in everything if record.annotation for name in record.annotation.names}
    classes = folder.classes or tuple(sorted(found))
    names, short = _names([record.id for record in everything]), _names(parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sppnet-", dir=out.parent) as temporary:
        whole = Path(temporary) / out.name
        for part, own in records.items():
            named = {fitting_name(names[record.id], record.path.suffix): record for record in own}
            for name, record in named.items():
                image = whole / FOLDERS[to].format(short[part]) / name
                image.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(record.path, image)
            WRITERS[to](whole, short[part], named, classes)
        if to == "yolo":
            _write_yaml(whole, list(short.values()), classes)
        whole.rename(out)
    counts = ", ".join(f"{short[part]} {len(own)}" for part, own in records.items())
    head = f"{folder.format.upper()} to {to.upper()}: {counted(len(everything), 'image')} ({counts})"
    return "; ".join([f"{head} of {counted(len(classes), 'class')} in {out}", *folder.notes, *skips.lines()])


def _names(ids: Sequence[str]) -> dict[str, str]:
    """Id -> a name of its own without folders: the last part of the id, or all of it where several share that."""
    stems, names, taken = Counter(one.rpartition("/")[2] for one in ids), dict[str, str](), set[str]()
    for one in ids:
        stem = one.rpartition("/")[2]
        name = stem if stems[stem] == 1 else one.replace("/", "_")
        while name in taken:
            name += "_"
        names[one] = name
        taken.add(name)
    return names


def _write_voc(out: Path, part: str, images: Named, classes: Sequence[str]) -> None:
    for name, record in images.items():
        path, own = (out / "Annotations" / name).with_suffix(".xml"), record.annotation
        if own is not None:
            write_annotation(path, record.size, own.boxes, own.names, list(own.difficult), durable=False)
    write_text(out / f"ImageSets/Main/{part}.txt", "".join(f"{Path(name).stem}\n" for name in images))


def _write_coco(out: Path, part: str, images: Named, classes: Sequence[str]) -> None:
    entries, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, (name, record) in enumerate(images.items(), start=1):
        entries.append({"id": number, "file_name": name, "width": record.size[1], "height": record.size[0]})
        for (x1, y1, x2, y2), label, difficult in record.annotation or ():
            box = [x1, y1, x2 - x1, y2 - y1]
            own = {"id": len(annotations) + 1, "image_id": number, "category_id": classes.index(label) + 1}
            annotations.append({**own, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "ignore": int(difficult)})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    values = {"images": entries, "annotations": annotations, "categories": categories}
    write_json(out / f"annotations/instances_{part}.json", values)


def _write_yolo(out: Path, part: str, images: Named, classes: Sequence[str]) -> None:
    for name, record in images.items():
        lines, size = list[str](), np.array(record.size[::-1] * 2)
        for box, label, _ in record.annotation or ():
            x1, y1, x2, y2 = box / size
            lines.append(
                f"{classes.index(label)} {(x1 + x2) / 2:.9g} {(y1 + y2) / 2:.9g} {x2 - x1:.9g} {y2 - y1:.9g}\n"
            )
        write_text((out / "labels" / part / name).with_suffix(".txt"), "".join(lines), durable=False)


def _write_yaml(out: Path, parts: Sequence[str], classes: Sequence[str]) -> None:
    by_role: dict[str, list[str]] = {}
    for part in parts:
        by_role.setdefault(role_of(part) or "train", []).append(f"images/{part}")
    lines = [f"{role}: {json.dumps(folders if len(folders) > 1 else folders[0])}" for role, folders in by_role.items()]
    names = [f"  {number}: {json.dumps(name, ensure_ascii=False)}" for number, name in enumerate(classes)]
    write_text(out / "data.yaml", "\n".join([*lines, "names:", *names, ""]))


FOLDERS = {"voc": "JPEGImages", "coco": "{}", "yolo": "images/{}"}  # of the images of a part
WRITERS = {"voc": _write_voc, "coco": _write_coco, "yolo": _write_yolo}
