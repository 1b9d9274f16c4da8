"""What a folder of pictures and labels is, found by looking: VOC's year folders, plain VOC, COCO or YOLO."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from sppnet.data import coco, ilsvrc, yolo
from sppnet.data.labels import normalise
from sppnet.data.parts import DataFolder, Tree, group, label_files, pair
from sppnet.data.voc import annotate, read_xml
from sppnet.errors import SppnetError, counted

ANNOTATION = re.compile(rb"<annotation[\s>]")
SETS = "*/ImageSets/Main/*.txt"
LOOKED_FOR = {
    "voc": "year folders with ImageSets/Main, or .xml files with <annotation>, one for an image",
    "coco": ".json files with images, categories and annotations",
    "yolo": "data.yaml, or classes.txt with one name on a line and a .txt file for each image",
}


def find_data(root: Path | str, format: str = "auto") -> DataFolder:
    """What the folder is. Of several formats in it, the one that labels most images, and a note that says so.

    SppnetError for a folder that is not there or has none of the formats, or not the one that is asked for, and for
    files of the only one found that cannot be used.
    """
    root = Path(root)
    if not root.is_dir():
        remedy = "name one that exists (data.root, data.more), or fetch the data as data/README.md says"
        raise SppnetError(f"{root}: no such data folder; {remedy}")
    looks: dict[str, Callable[[Tree], DataFolder | None]] = {"voc": _look_voc, "coco": coco.look, "yolo": yolo.look}
    if format not in ("auto", *looks):
        raise SppnetError(f"format {format!r}: expected auto, {', '.join(looks)}")
    if format in ("auto", "voc") and (years := find_years(root)):
        return years
    tree, found, faults = Tree(root), list[DataFolder](), dict[str, SppnetError]()
    for name, look in looks.items() if format == "auto" else [(format, looks[format])]:
        try:
            found += filter(None, [look(tree)])
        except SppnetError as error:
            faults[name] = error
    if not found:
        raise next(iter(faults.values()), _nothing(tree, format))
    best, *others = sorted(found, key=lambda folder: -folder.labelled)
    notes = [
        f"it has labels of two formats: {best.format.upper()} ({counted(best.labelled, 'image')}) is taken, "
        f"{other.format.upper()} ({other.labelled}) with data.format={other.format}"
        for other in others
    ]
    notes += [f"it may be {name.upper()} too (data.format={name}), but {error}" for name, error in faults.items()]
    return replace(best, notes=(*notes, *best.notes))


def find_years(root: Path) -> DataFolder | None:
    """VOC's year folders or ILSVRC's detection data, in the folder or one below; None where there are none."""
    for place in (root, root / "VOCdevkit", root / "ILSVRC"):
        lists = {normalise(f"{path.parents[2].name}/{path.stem}"): [path] for path in sorted(place.glob(SETS))}
        lists = {**ilsvrc.find_lists(place), **lists}
        per_class = {one for one in lists if f"{one.partition('/')[0]}/{one.rpartition('_')[2]}" in lists}
        per_class |= {one for one in lists if ilsvrc.OF_CLASS.fullmatch(one.removeprefix("DET/"))}
        if lists:
            return DataFolder(place, "voc", tuple(one for one in lists if one not in per_class), lists=lists)
    return None


def _look_voc(tree: Tree) -> DataFolder | None:
    labels = tree.of(".xml")
    if not any(ANNOTATION.search((tree.root / path).read_bytes().replace(b"\0", b"")) for path in labels):
        return None
    pairs, lost = pair(tree, {path: _image_name(tree, path) for path in labels})
    if not pairs:
        return None
    parts = group(tree, pairs)
    listed = {path for images in parts.values() for path in images}
    files = {tree.id_of(path): tree.root / pairs.get(path, path.with_suffix(".xml")) for path in listed}
    return label_files(tree, parts, (pairs, lost), partial(annotate, files), listed - set(pairs), format="voc")


def _image_name(tree: Tree, label: Path) -> str:
    """The stem of an annotation; where it fits files of several names, as of a photo and a mask, <filename> if one."""
    names = {normalise(path.name) for path in tree.named.get(normalise(label.stem), ())}
    stated = normalise(read_xml(tree.root / label).findtext("filename") or "").strip() if len(names) > 1 else ""
    return stated if stated in names else label.stem


def _nothing(tree: Tree, format: str) -> SppnetError:
    looked = "; ".join(f"{kind.upper()} ({text})" for kind, text in LOOKED_FOR.items() if format in ("auto", kind))
    files = Counter(path.suffix.lower() or "without ending" for path in tree.others).most_common(5)
    found = ", ".join([counted(len(tree.images), "image"), *(f"{count} {ending}" for ending, count in files)])
    where = f"{tree.root}: no annotated pictures found"
    return SppnetError(f"{where}; looked for {looked}; found {found}; docs/own-data.md shows how each looks")
