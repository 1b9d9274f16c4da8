"""Splits of a data set, read from disk: the one door to records, whatever the format.

Those of VOC's year folders are read here, those of ILSVRC's detection data in `ilsvrc`, others where `layouts` says.

    <root>/<year folder>/ImageSets/Main/<set>.txt     one image id per line
    <root>/<year folder>/JPEGImages/<id>.jpg          or .jpeg, .png, .bmp, .webp, in upper or lower case
    <root>/<year folder>/Annotations/<id>.xml

A split of these is named ``<year folder>/<set>``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sppnet.artifacts import file_digest
from sppnet.data import ilsvrc
from sppnet.data.labels import normalise, read_lines
from sppnet.data.layouts import find_data
from sppnet.data.parts import DataFolder, Part
from sppnet.data.voc import annotate
from sppnet.errors import ImageError, SppnetError, counted
from sppnet.images import IMAGE_SUFFIXES, image_header
from sppnet.records import ImageRecord, SkipCounts

FLAGS = ("-1", "0", "1")  # second column of the per-class sets


def read_image_set(path: Path, known: Collection[str] = ()) -> list[str]:
    """The ids of an image set, in the order of the file, in Unicode's composed form (NFC).

    One id per line; a second column of -1, 0 or 1 (the per-class sets of VOC) is dropped. Where the ids that there are
    are `known`, a line is one of these as it stands before it is one with such a column, or with the ending of an
    image. Blank lines, byte-order marks and Windows line ends are accepted; an id listed twice is an error.
    """
    first_line: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, read_lines(path)), start=1):
        if not line:
            continue
        name = _id_of(normalise(line), known)
        if name in first_line:
            raise SppnetError(f"{path}:{number}: {name!r} is already on line {first_line[name]}; remove one of them")
        first_line[name] = number
    return list(first_line)


def _id_of(line: str, known: Collection[str]) -> str:
    """The id on a line of an image set."""
    stem, flag = [*line.rsplit(None, 1), ""][:2]
    stem = stem if flag in FLAGS else line
    endings = [name[: -len(end)] for name in (line, stem) for end in IMAGE_SUFFIXES if name.lower().endswith(end)]
    return next((name for name in (line, stem, *endings) if name in known), stem)


def load_split(
    data: DataFolder | Path | str, split: str, require_annotations: bool = True
) -> tuple[list[ImageRecord], SkipCounts]:
    """The images of ``<year folder>/<set>``, or of a part that `find_data` finds, and what was skipped in them.

    `data` is a folder, or what `find_data` says it is. A missing annotation is an error, or with
    ``require_annotations=False`` (a test split) is counted and gives a record without one. Raises SppnetError for a
    missing folder, set or image, two files of one id, an unreadable image header and faulty annotations.
    """
    part, records, skipped = find_part(data, split), list[ImageRecord](), dict[str, list[str]]()
    for image_id, path in part.images.items():
        try:
            size, orientation = image_header(path)
            record = ImageRecord(image_id, path, size, file_digest(path))
        except (ImageError, OSError) as error:
            raise SppnetError(f"an image of the data set cannot be used: {error}") from None
        counts: Mapping[str, int] = {"image without annotation, not evaluated": 1}
        if require_annotations or image_id not in part.unlabelled:
            annotation, counts = part.annotate(image_id, size, orientation)
            record = replace(record, annotation=annotation)
        for reason, count in counts.items():
            skipped.setdefault(reason, []).extend([record.id] * count)
        records.append(record)
    return records, SkipCounts(skipped)


def find_annotations(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Id -> its annotation file, which ends in .xml in any case; where there is none, the path that it would have."""
    files = files_by_stem(folder, (".xml",))
    return {name: _only(files.get(name, [folder / f"{name}.xml"]), name) for name in names}


def split_digests(data: DataFolder | Path | str, split: str) -> dict[str, str]:
    """Id -> content (`ImageRecord.digest`) of the images of a split; nothing else of them is read."""
    return {image_id: file_digest(path) for image_id, path in find_part(data, split).images.items()}


def load_splits(
    data: DataFolder | Path | str, splits: Sequence[str], require_annotations: bool = True
) -> tuple[list[ImageRecord], SkipCounts]:
    """Several splits one after the other; an image that is in two of them is an error."""
    records, skips, split_of = list[ImageRecord](), SkipCounts(), dict[str, str]()
    data = data if isinstance(data, DataFolder) or not splits else find_data(data)
    for split in splits:
        more, left_out = load_split(data, split, require_annotations)
        for record in more:
            if record.id in split_of:
                first = split_of[record.id]
                raise SppnetError(f"image {record.id} is in {first} and in {split}; name splits that share no image")
            split_of[record.id] = split
        records += more
        skips = skips.plus(left_out)
    return records, skips


def find_part(data: DataFolder | Path | str, split: str) -> Part:
    """The images of a split and what reads their annotations; SppnetError, with those here, for another."""
    folder = data if isinstance(data, DataFolder) else find_data(data)
    name = split if split in folder.contents else normalise(split)
    if name not in (folder.contents or folder.lists):
        here = ", ".join(folder.parts[:20]) or "none"
        raise SppnetError(f"{folder.root}: no part {split!r} in these {folder.format.upper()} data; parts here: {here}")
    if folder.contents:
        return folder.contents[name]
    lists = folder.lists[name]
    if lists[0].parent.name == "DET":
        return ilsvrc.find_part(folder.root, split, lists)
    year, images = lists[0].parents[2], _find_images(lists[0])
    annotations = find_annotations(year / "Annotations", images)
    files, xml = (
        {f"{normalise(year.name)}/{name}": path for name, path in paths.items()} for paths in (images, annotations)
    )
    return Part(files, partial(annotate, xml), {name for name, path in xml.items() if not path.exists()})


def _find_images(set_file: Path) -> dict[str, Path]:
    """Id -> image file, of an image set, in its order."""
    folder = set_file.parents[2] / "JPEGImages"
    files = files_by_stem(folder, IMAGE_SUFFIXES)
    names = read_image_set(set_file, files)
    if not names:
        raise SppnetError(f"{set_file}: lists no image; write one image id per line")
    missing = [name for name in names if name not in files]
    if missing:
        first = f"{folder / missing[0]}: no such image ({', '.join(IMAGE_SUFFIXES)})"
        which = f"{len(missing)} of {counted(len(names), 'image')} in {set_file} missing"
        raise SppnetError(f"{first}, {which}; add them, or take their ids out of the list")
    return {name: _only(files[name], name) for name in names}


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Stem in composed form -> the files of it with one of these endings, in upper or lower case."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in suffixes:
            found.setdefault(normalise(path.stem), []).append(path)
    return found


def _only(files: Sequence[Path], name: str) -> Path:
    if len(files) > 1:
        both = f"{files[0]} and {files[1].name} are both files of the id {name!r}"
        raise SppnetError(f"{both} (names that look alike may differ in their Unicode form); keep one of them")
    return files[0]
