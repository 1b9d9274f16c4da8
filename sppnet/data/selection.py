"""Which classes and which images of a data set are used for what."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from sppnet.artifacts import digest_of
from sppnet.errors import SppnetError, counted
from sppnet.records import ImageRecord

LONGEST = 200  # bytes of a class name: it becomes part of file names


def choose_classes(records: Sequence[ImageRecord], classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes to train: those given, each of which must occur in `records`, or all that occur, sorted.

    Raises SppnetError for none, one that never occurs or is named twice, and names that cannot be parts of file names:
    with slashes or control characters, too long, or different in upper and lower case alone.
    """
    example: dict[str, str] = {}  # class -> an image that shows it
    for record in records:
        for name in record.annotation.names if record.annotation else ():
            example.setdefault(name, record.id)
    found = tuple(sorted(example))
    chosen = found if classes is None else classes
    listing = f"classes found in the training images: {', '.join(found) or 'none'}"
    if not chosen:
        raise SppnetError(f"no class to train; {listing}: no image has an object; export the annotations with boxes")
    for name in chosen:
        if name not in example:
            raise SppnetError(f"class {name!r} never occurs; {listing}")
        if chosen.count(name) > 1:
            raise SppnetError(f"data.classes names {name!r} twice; name each class once")
        if any(letter in "/\\" or unicodedata.category(letter) == "Cc" for letter in name) or name in (".", ".."):
            fault = "cannot be part of a file name"
        elif len(name.encode()) > LONGEST:
            fault = f"has more than {LONGEST} bytes"
        else:
            continue
        where = f"class {name!r}, e.g. in the annotation of {example[name]},"
        raise SppnetError(f"{where} {fault}; rename it there, or name the classes to train in data.classes")
    folded: dict[str, str] = {}
    for name in chosen:
        first = folded.setdefault(name.casefold(), name)
        if first != name:
            two = f"classes {first!r} (e.g. in {example[first]}) and {name!r} (e.g. in {example[name]})"
            remedy = "rename one of them in the annotations, or leave it out of data.classes"
            raise SppnetError(f"{two} differ in upper and lower case alone; {remedy}")
    return chosen


def restrict(records: Sequence[ImageRecord], classes: tuple[str, ...]) -> list[ImageRecord]:
    """The same images with the objects of these classes alone."""
    wanted = frozenset(classes)
    return [r if r.annotation is None else replace(r, annotation=r.annotation.of(wanted)) for r in records]


def shown_classes(record: ImageRecord, difficult: bool = True) -> frozenset[str]:
    """The classes of the objects of an image; of those that are not difficult where `difficult` is false."""
    if record.annotation is None:
        return frozenset()
    return frozenset((record.annotation if difficult else record.annotation.easy()).names)


def mark_unknown(records: Sequence[ImageRecord], unknown: Mapping[str, Collection[str]]) -> list[ImageRecord]:
    """The same images, with the classes that are unknown in each (class -> ids of images), unless it shows them."""
    found, open_in = list[ImageRecord](), {name: frozenset(ids) for name, ids in unknown.items()}
    for record in records:
        own = record.annotation
        if own is not None:
            names = tuple(name for name, ids in open_in.items() if record.id in ids and name not in own.names)
            record = replace(record, annotation=replace(own, unknown=names))
        found.append(record)
    return found


def unknown_in(records: Sequence[ImageRecord]) -> dict[str, list[str]]:
    """Class -> the ids of the images in which it is unknown."""
    found = dict[str, list[str]]()
    for record in records:
        for name in record.annotation.unknown if record.annotation is not None else ():
            found.setdefault(name, []).append(record.id)
    return found


def hold_out(
    records: Sequence[ImageRecord], share: float, seed: int = 0, difficult: bool = True
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """(train, held out): about `share` of the images, at least one on each side, chosen by `seed` and ids.

    Every class stays in training, so one that a single image shows is not held out. Where the share allows it every
    other class is held out too, the rarest first. Copies of one image stay on one side, and exceed the share where
    nothing with objects is held out otherwise. `difficult`: whether difficult objects train.
    """
    if not 0 < share < 1 or len(records) < 2:
        expected = "expected a held-out share between 0 and 1 and at least 2 images"
        raise SppnetError(f"{expected}, got {share} and {len(records)}; set data.holdout, or name images in data.val")
    count = min(max(round(share * len(records)), 1), len(records) - 1)
    groups: dict[str, list[ImageRecord]] = {}  # copies
    for record in sorted(records, key=lambda record: hashlib.sha256(f"{seed} {record.id}".encode()).digest()):
        groups.setdefault(record.digest, []).append(record)
    shown = {key: frozenset[str]().union(*(shown_classes(r, difficult) for r in groups[key])) for key in groups}
    left = Counter(name for names in shown.values() for name in names)  # groups in training that show a class
    held, free = set[str](), count
    rarest_first = sorted(left, key=lambda name: (left[name], name))
    by_class = [[key for key in shown if name in shown[key]] for name in rarest_first]
    for candidates in (*by_class, *([key] for key in shown)):
        fits = (key for key in candidates if len(groups[key]) <= free and all(left[name] > 1 for name in shown[key]))
        chosen = next(fits, None) if held.isdisjoint(candidates) else None
        if chosen is not None:
            held.add(chosen)
            free -= len(groups[chosen])
            left.subtract(shown[chosen])
    if not any(shown[key] for key in held):  # copies exceed the share rather than leave nothing to look at
        larger = [key for key in shown if key not in held and all(left[name] > 1 for name in shown[key])]
        larger = [key for key in larger if (shown[key] or not held) and len(groups[key]) < len(records)]
        held.update(sorted(larger, key=lambda key: (not shown[key], len(groups[key])))[:1])
    if not held:
        why = "each is the only one of a class, or a copy of the others"
        raise SppnetError(f"no image of {len(records)} can be held out: {why}; add images, or name some in data.val")
    out = {record.id for digest in held for record in groups[digest]}
    return [r for r in records if r.id not in out], [r for r in records if r.id in out]


def count_others(records: Sequence[ImageRecord], classes: tuple[str, ...], kind: str) -> list[str]:
    """A note about the objects of other classes, if there are any."""
    objects = [(name, r.id) for r in records if r.annotation for name in r.annotation.names if name not in classes]
    counts = Counter(name for name, _ in objects)
    if not counts:
        return []
    listed = ", ".join(f"{name} {count}" for name, count in counts.most_common(10)) + ", …" * (len(counts) > 10)
    (name, image), total = objects[0], counted(counts.total(), f"{kind} object")
    return [f"{total} of classes that are not trained: {listed}, e.g. {name} in {image}"]


def classes_amiss(
    train: Sequence[ImageRecord], held_out: Sequence[ImageRecord], classes: tuple[str, ...], difficult: bool
) -> list[str]:
    """Notes about classes that cannot be trained, or not be measured."""
    sides = (train, held_out)
    trained, measured = (Counter(n for r in side for n in shown_classes(r, difficult)) for side in sides)
    notes = [
        f"class {name} has difficult objects alone, which do not train (data.train_on_difficult): it never fires"
        for name in classes
        if not trained[name]
    ]
    unknown = {name: ids for name, ids in unknown_in(train).items() if name in classes}
    if unknown:
        listed = ", ".join(f"{name} in {counted(len(ids), 'training image')}" for name, ids in unknown.items())
        notes.append(f"not labelled, so that nothing is known of it there: {listed}")
    missing = [f"{name} (in {counted(trained[name], 'training image')})" for name in classes if not measured[name]]
    if missing:
        notes.append(f"not measured, since no validation image shows them: {', '.join(missing)}")
    return notes


def check_apart(train: Mapping[str, str], others: Mapping[str, str], setting: str) -> None:
    """Raise where images of another set are among those to train on (or, for objects_only, to validate on)."""
    of_content = {digest: name for name, digest in train.items()}
    pairs = [(name, name if name in train else of_content.get(digest)) for name, digest in others.items()]
    shared = [name if name == other else f"{name} (a copy of {other})" for name, other in pairs if other is not None]
    if shared:
        what = "images of data.train or data.val" if setting == "data.objects_only" else "training images"
        why = "objects would count twice or " if setting == "data.objects_only" else ""
        raise SppnetError(
            f"{setting}: {what} are in it too, {len(shared)} of {counted(len(others), 'image')}, e.g. "
            f"{', '.join(shared[:3])}, so {why}figures would look too good; take them out of one of the sets"
            + (
                ", or leave data.val empty, of year folders: copies are held out together"
                if setting == "data.val"
                else ""
            )
        )


def annotations_digest(records: Sequence[ImageRecord], classes: tuple[str, ...]) -> str:
    """16 hexadecimal digits of images and objects of `classes`: ids, contents, boxes, names, flags, unknown ones."""
    rows = []
    for record in restrict(records, classes):
        found = record.annotation
        objects = None if found is None else (found.boxes.tolist(), found.names, found.difficult.tolist())
        unknown = () if found is None else tuple(name for name in classes if name in found.unknown)
        rows.append((record.id, record.digest, objects, *unknown))
    return digest_of("annotations", classes, rows)
