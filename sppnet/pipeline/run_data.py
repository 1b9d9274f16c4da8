"""Which images a run trains on, chooses settings on and is evaluated on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppnet.artifacts import read_json, write_json
from sppnet.config import Config, DataSettings
from sppnet.data.additions import add_folders
from sppnet.data.layouts import find_data
from sppnet.data.parts import DataFolder
from sppnet.data.selection import (
    annotations_digest,
    check_apart,
    choose_classes,
    classes_amiss,
    count_others,
    hold_out,
    mark_unknown,
    restrict,
    shown_classes,
    unknown_in,
)
from sppnet.data.splits import load_splits, split_digests
from sppnet.errors import ArtifactError, SppnetError, counted
from sppnet.records import ImageRecord, SkipCounts, spread

log = logging.getLogger("sppnet")

BARE = {
    "training": "training image without objects (background for the SVMs alone)",
    "validation": "validation image without objects (no part of the error)",
}


@dataclass(frozen=True)
class Split:
    """Which images are trained on and which are held out, by id and content, and the settings that decided it.

    It is drawn once, and kept in the run and with the detector: a folder changes, what was trained on does not.
    """

    settings: Mapping[str, Any]
    train: Mapping[str, str]  # id -> ImageRecord.digest
    held_out: Mapping[str, str]
    objects: Mapping[str, str] = field(default_factory=dict)  # of data.objects_only, which were not divided
    unknown: Mapping[str, Sequence[str]] = field(default_factory=dict)  # class -> images in which nobody labelled it

    def write(self, folder: Path) -> None:
        values = {name: value for name, value in vars(self).items() if name not in ("objects", "unknown") or value}
        write_json(folder / "split.json", values)

    @classmethod
    def read(cls, folder: Path) -> Split | None:
        """That of a folder of a run or detector; None where it keeps none. ArtifactError for a damaged file."""
        path = folder / "split.json"
        if not path.exists():
            return None
        values = read_json(path)
        every = {"objects": {}, "unknown": {}, **values} if isinstance(values, dict) else {}
        parts: list[Any] = [every.get(key) for key in cls.__annotations__]
        if not all(isinstance(part, dict) for part in parts) or {*map(type, parts[-1].values())} - {list}:
            raise ArtifactError(f"{path}: expected the ids of a split, got something else; delete it to draw a new one")
        return cls(*parts)

    def divide(self, records: Sequence[ImageRecord]) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """(train, held out) of today's images: held out as before, known by id or content; others are trained on."""
        contents = set(self.held_out.values())
        out = {r.id for r in records if r.id in self.held_out or r.digest in contents}
        return [r for r in records if r.id not in out], [r for r in records if r.id in out]


@dataclass(frozen=True)
class RunData:
    """The images of a run: to train on, and to choose settings on. `validation` are those fine-tuning draws from."""

    train: list[ImageRecord] = field(default_factory=list)
    held_out: list[ImageRecord] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    skips: SkipCounts = field(default_factory=SkipCounts)
    validate_images: int = 0
    difficult: bool = True  # whether difficult objects train
    settings: Mapping[str, Any] = field(default_factory=dict)  # that decided the split
    notes: tuple[str, ...] = ()  # about classes and the split
    objects: list[ImageRecord] = field(default_factory=list)  # of data.objects_only: their objects train, nothing else
    named: DataSettings = field(default_factory=DataSettings)  # with the format and the parts as they were found
    base: list[ImageRecord] = field(default_factory=list)  # of `train`, before data.more

    @property
    def validation(self) -> list[ImageRecord]:
        """At most `validate_images` of the held-out images that have objects, spread over them."""
        return spread([r for r in self.held_out if shown_classes(r, self.difficult)], self.validate_images)

    @property
    def images(self) -> list[ImageRecord]:
        """All that have windows: training images, then those of `validation`."""
        return [*self.train, *self.validation]

    @property
    def split(self) -> Split:
        train, held_out, objects = map(_contents, (self.train, self.held_out, self.objects))
        return Split(self.settings, train, held_out, objects, unknown_in([*self.train, *self.held_out]))

    def digest(self, split: str) -> str:
        """Content key of the annotated images of "train", "validation", "objects" or "base"."""
        records = getattr(self, split)
        return annotations_digest(records, _shown(records, self.classes) if split == "base" else self.classes)

    def __str__(self) -> str:
        """One line: format, images, objects by class, then what was skipped or is remarkable, each with an image."""
        images = f"{len(self.train)} training and {counted(len(self.held_out), 'validation image')}"
        images += f", the objects of {counted(len(self.objects), 'more image')}" if self.objects else ""
        shown = (r.annotation.names for r in (*self.train, *self.held_out, *self.objects) if r.annotation)
        counts = Counter(name for names in shown for name in names)
        objects = f"{counted(counts.total(), 'object')} of {counted(len(self.classes), 'class')}"
        by_class = ", ".join(f"{name} {counts[name]}" for name in self.classes)
        head = f"data: {self.named.format.upper()}, {images}, {objects} ({by_class})"
        return "; ".join([head, *self.notes, *self.skips.lines()])


def load_run_data(config: Config, kept: Split | None = None) -> RunData:
    """Training and validation images; where no val split is named, a share of the training images is held out.

    That share is the one of `kept`, an earlier split of the same settings, as long as it has every class in training
    and an image on either side. Raises SppnetError for data that are missing or cannot be used, and for validation or
    test images that are training images too.
    """
    settings = config.data
    if not settings.root.is_dir():
        fetch = "fetch PASCAL VOC with scripts/fetch_voc, or " if settings.root == DataSettings().root else ""
        own = f"{fetch}set data.root to your own folder (data/README.md shows the layout)"
        raise SppnetError(f"{settings.root}: no such data folder; {own}")
    folder = find_data(settings.root, settings.format)
    settings = named_parts(settings, folder)
    if not settings.train:
        parts = ", ".join(folder.parts)
        raise SppnetError(f"{settings.root}: no part is called train; name those to train on in data.train: {parts}")
    records, skips = load_splits(folder, settings.train)
    val, more = load_splits(folder, settings.val)
    before = kept.unknown if kept is not None and settings.more else {}
    merged, added_skips, added, unknown = add_folders([*records, *val], settings.more, settings.classes, before)
    merged = mark_unknown(merged, unknown if config.head.training == "joint" else {})
    skips = skips.plus(more).plus(folder.left_out).plus(added_skips)
    count, known = len(records), len(records) + len(val)
    trainable = [*merged[:count], *merged[known:]]
    classes = choose_classes(trainable, settings.classes)
    others, notes = count_others(trainable, classes, "training"), list[str]()
    others += count_others(merged[count:known], classes, "validation")
    newer = {record.id: record for record in restrict(merged, classes)}
    train, difficult = restrict(records, classes), settings.train_on_difficult
    drawn: dict[str, Any] = {"train": list(settings.train), "classes": settings.classes and list(settings.classes)}
    if settings.val:
        drawn |= {"val": list(settings.val)}
        held_out = restrict(val, classes)
        check_apart(_contents(train), _contents(held_out), "data.val")
    else:
        drawn |= {"holdout": settings.holdout, "seed": settings.seed, "train_on_difficult": difficult}
        train, held_out, notes = _hold_out(train, drawn, kept, newer)
    base = train
    train, held_out = ([newer[record.id] for record in side] for side in (base, held_out))
    fresh = [newer[record.id] for record in merged[known:]]
    drawn_before = kept if kept is not None and kept.settings == drawn else Split(drawn, {}, {})
    held_out += drawn_before.divide(fresh)[1]
    measured = _shown(held_out, classes)
    undivided = [record for record in fresh if record.id not in {*drawn_before.train, *drawn_before.held_out}]
    showing = [record for record in undivided if shown_classes(record, difficult).difference(measured)]
    with suppress(SppnetError):  # too few
        held_out += hold_out(showing, settings.holdout, settings.seed, difficult)[1]
    out = {record.id for record in held_out}
    train += [record for record in fresh if record.id not in out]
    objects, more = _load_objects(folder, settings, classes)
    skips = skips.plus(more)
    check_apart(_contents([*train, *held_out]), _contents(objects), "data.objects_only")
    for split in settings.test:
        try:
            digests = split_digests(folder, split)
        except (SppnetError, OSError):  # they may be elsewhere, or come later
            continue
        check_apart(_contents([*train, *objects]), digests, "data.test")
        ids, contents = {r.id for r in held_out}, {r.digest for r in held_out}
        both = [name for name, digest in digests.items() if name in ids or digest in contents]
        if both:
            share = f"{len(both)} of {counted(len(digests), 'image')} of {split}, e.g. {both[0]}"
            notes.append(f"validation images are in data.test too, {share}, so figures will look a little too good")
    for kind, images in {"training": train, "validation": held_out}.items():
        bare = [r.id for r in images if not (r.annotation and len(r.annotation.boxes))]
        first: dict[str, str] = {}
        copies = [f"{r.id} of {first[r.digest]}" for r in images if first.setdefault(r.digest, r.id) != r.id]
        remarkable = {BARE[kind]: bare, f"{kind} image that is a copy of another": copies}
        skips = skips.plus(SkipCounts(remarkable))
    for reason, names in skips.images.items():
        log.debug("%d × %s: %s", len(names), reason, ", ".join(dict.fromkeys(names)))
    used = {*settings.train, *settings.val, *settings.test, *settings.objects_only}
    unused = [f"part {name} not used" for name in folder.contents if name not in used]
    notes = [*folder.notes, *unused, *added, *others, *notes]
    notes += classes_amiss([*train, *objects], held_out, classes, difficult)
    validate = config.finetune.validate_images
    return RunData(train, held_out, classes, skips, validate, difficult, drawn, tuple(notes), objects, settings, base)


def _shown(records: Sequence[ImageRecord], classes: Sequence[str]) -> tuple[str, ...]:
    names = frozenset[str]().union(*map(shown_classes, records))
    return tuple(name for name in classes if name in names)


def named_parts(settings: DataSettings, folder: DataFolder) -> DataSettings:
    """The settings with the format of the folder and its parts to train, validate and test on.

    Where `train` names none, or the default's VOC2007 that the folder does not have, the names of the parts say; of a
    folder without year folders these say what validates and tests too, where that is not named.
    """
    default, own = DataSettings(), dict[str, Any]({"format": folder.format})
    by_names = not settings.train or (settings.train == default.train and not {*default.train} <= {*folder.parts})
    if by_names or folder.contents:
        found, others = folder.roles(() if by_names else settings.train), settings.objects_only
        roles = {role: tuple(part for part in parts if part not in others) for role, parts in found.items()}
        own["train"] = roles["train"] if by_names else settings.train
        own["val"] = settings.val or roles["val"]
        own["test"] = roles["test"] if settings.test == default.test else settings.test or roles["test"]
    return settings.model_copy(update=own)


def _load_objects(
    folder: DataFolder, settings: DataSettings, classes: tuple[str, ...]
) -> tuple[list[ImageRecord], SkipCounts]:
    """The images of data.objects_only that show an object to train on; the others are counted."""
    records, skips = load_splits(folder, settings.objects_only)
    shown = {r.id for r in restrict(records, classes) if shown_classes(r, settings.train_on_difficult)}
    bare = [r.id for r in records if r.id not in shown]
    skips = skips.plus(SkipCounts({"image of data.objects_only without objects to train on, left out": bare}))
    return [r for r in restrict(records, classes) if r.id in shown], skips


def _contents(records: Sequence[ImageRecord]) -> dict[str, str]:
    return {r.id: r.digest for r in records}


def _hold_out(
    records: list[ImageRecord], drawn: Mapping[str, Any], kept: Split | None, there: Collection[str]
) -> tuple[list[ImageRecord], list[ImageRecord], list[str]]:
    """(train, held out, notes): as it was kept, or drawn anew. `there`: the ids of all images, added ones too."""
    difficult, notes = drawn["train_on_difficult"], list[str]()
    if kept is not None and kept.settings == drawn:
        train, held_out = kept.divide(records)
        trained, shown = ({n for r in side for n in shown_classes(r, difficult)} for side in (train, held_out))
        lost, copies = shown - trained, {r.digest for r in train} & {r.digest for r in held_out}
        if train and held_out and not lost and not copies:
            fresh = [r.id for r in train if r.id not in kept.train]
            if fresh:
                new = counted(len(fresh), "image")
                notes.append(f"{new} new since the split was drawn, trained on, e.g. {fresh[0]}")
            gone = [name for name in (*kept.train, *kept.held_out) if name not in there]
            if gone:
                notes.append(f"{counted(len(gone), 'image')} of the split gone, e.g. {gone[0]}")
            return train, held_out, notes
        why = f"class {min(lost)} would not be trained" if lost else "a side is empty, or has copies of the other"
        notes.append(f"the split of before no longer fits ({why}): drawn anew")
    train, held_out = hold_out(records, drawn["holdout"], drawn["seed"], difficult)
    return train, held_out, notes


@dataclass(frozen=True)
class EvaluationData:
    """Images to evaluate on, what was skipped in them, the splits they are (none: held out).

    `trained` and `validation` are the ids of those that were trained on, or chose among what was trained.
    """

    records: list[ImageRecord]
    skips: SkipCounts
    splits: tuple[str, ...]
    trained: list[str]
    validation: list[str]


def load_test_data(
    config: Config, root: Path | None = None, splits: Sequence[str] = (), kept: Split | None = None
) -> EvaluationData:
    """The images to evaluate on, below `root` or data.root: those of `splits`, of data.test or of data.val.

    Where none of them names any, they are the images held out of data.train, as `kept` with the detector: the same
    that chose the thresholds, so that their figures are a little too good. Of another
    data set they are all images of data.train. Raises SppnetError, also for held-out images that are gone or changed,
    and for training images among them which `splits` does not name. In another folder images with the names of the
    run's count as these, saved anew, where most have such names.
    """
    folder, kept = root or config.data.root, kept or Split({}, {}, {})
    other = folder.resolve() != config.data.root.resolve()
    if not folder.is_dir():
        raise SppnetError(f"{folder}: no such data folder; name the one that holds the pictures with --data")
    found = find_data(folder, "auto" if other else config.data.format)
    settings = named_parts(config.data, found)
    names = tuple(splits) or settings.test or settings.val
    if other and not splits and found.contents and not {*(names or settings.train)} <= {*found.parts}:
        names = next(filter(None, map(found.roles().get, ("test", "val", "train"))), ())
    if not names and not kept.held_out and not other:
        raise SppnetError(
            "which images were held out is not known: the detector keeps no split.json (it is of an earlier version or "
            "was put together elsewhere), or is combined of some that were trained on what others held out; name "
            "images with --split, or train again"
        )
    records, skips = load_splits(found, names or settings.train, require_annotations=False)
    if not other and not splits:
        merged, more, *_ = add_folders(records, config.data.more)
        ids = () if settings.test else kept.held_out
        records = [*merged[: len(records)], *(r for r in merged[len(records) :] if r.id in ids)]
        skips = skips.plus(more)
    records = mark_unknown(records, {} if other else kept.unknown)
    if not names:
        today = {r.id: r.digest for r in records}
        wrong = [name for name, digest in kept.held_out.items() if today.get(name) != digest]
        if other and (wrong or not kept.held_out):
            names = settings.train
            log.info("no split is named: all images of %s in %s are evaluated", ", ".join(names), folder)
        elif wrong:
            total = counted(len(kept.held_out), "image")
            raise SppnetError(
                f"held out of training, but gone or changed: {len(wrong)} of {total}, e.g. {', '.join(wrong[:3])}; "
                "put them back, train again, or name images with --split"
            )
        else:
            records = [r for r in records if r.id in kept.held_out]
            own = {why: [image for image in images if image in kept.held_out] for why, images in skips.images.items()}
            skips = SkipCounts(own)
    train = {**kept.train, **kept.objects}
    known = {**train, **kept.held_out}
    alike = not other or 2 * sum(r.id in known for r in records) > min(len(records), len(known))
    trained, validation = (
        [r.id for r in records if r.digest in contents or (alike and r.id in side)]
        for side, contents in ((side, set(side.values())) for side in (train, kept.held_out))
    )
    if validation:
        what = f"{len(validation)} of {counted(len(records), 'image')}, e.g. {validation[0]}"
        chosen = "thresholds" if config.head.training == "joint" else "fine-tuned network and the thresholds"
        log.info("held out of training, but they chose the %s: %s; figures look a little too good", chosen, what)
    if trained:
        what = f"trained on: {len(trained)} of {counted(len(records), 'image')}, e.g. {', '.join(trained[:3])}"
        saved_anew = not {r.digest for r in records} & set(train.values())
        if other and saved_anew:
            what += " (by their names: other files, but most here have names of the run's images)"
        elif not splits:
            raise SppnetError(f"{what}; take them out of the set, or name it with --split to evaluate on them")
        log.warning("%s: the figures look too good", what)
    return EvaluationData(records, skips, names, trained, validation)
