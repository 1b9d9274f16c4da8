"""Folders of pictures that are added to a data set, under ids that stay (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sppnet.data.layouts import find_data
from sppnet.data.selection import hold_out, shown_classes
from sppnet.data.splits import load_splits
from sppnet.errors import SppnetError, counted
from sppnet.records import Annotation, ImageRecord, SkipCounts


def add_folders(
    records: Sequence[ImageRecord], folders: Sequence[Path], classes: Sequence[str] | None = None
) -> tuple[list[ImageRecord], SkipCounts, list[str]]:
    """`records` in their order, then the other images of the folders; what was skipped; notes. Each image once.

    All parts of a folder but test are added. The images of the n-th have the ids ``added-n/<id>``. One that is there
    already, by its content, keeps its id: of classes that the folder labels it gets the folder's objects, those of
    others stay. SppnetError for a folder that is no data set, is test data alone or, where given, shows no `classes`.
    """
    merged, skips, notes, places = list(records), SkipCounts(), list[str](), dict[str, list[int]]()
    for place, record in enumerate(merged):
        places.setdefault(record.digest, []).append(place)
    for number, folder in enumerate(folders, start=1):
        found = find_data(folder)
        parts = (*found.roles["train"], *found.roles["val"])
        if not parts:
            raise SppnetError(
                f"{folder}: nothing to train on: {', '.join(found.parts)}; name a folder with other parts"
            )
        own, more = load_splits(folder, parts)
        skips, copies = skips.plus(found.left_out).plus(more), list[str]()
        labelled = {*found.classes, *(name for r in own if r.annotation for name in r.annotation.names)}
        if classes is not None and labelled and labelled.isdisjoint(classes):
            other = f"shows {', '.join(sorted(labelled))} and none of {', '.join(classes)}"
            raise SppnetError(f"{folder}: {other}; train these classes too by data.classes")
        for record in own:
            for place in places.get(record.digest, []):
                merged[place] = replace(merged[place], annotation=_relabel(merged[place], record, labelled))
            if record.digest in places:
                copies.append(record.id)
            else:
                places[record.digest] = [len(merged)]
                merged.append(replace(record, id=f"added-{number}/{record.id}"))
        if len({record.id for record in merged}) < len(merged):
            raise SppnetError(
                f"{folder}: its images would be named added-{number}/…, as others are; rename that folder"
            )
        notes.append(f"{folder} adds {counted(len(own) - len(copies), 'image')}")
        if copies:
            notes[-1] += f"; the objects of {', '.join(sorted(labelled)) or 'no class'} in {len(copies)} known are new"
            notes[-1] += f", e.g. {copies[0]}"
    return merged, skips, notes


def _relabel(known: ImageRecord, newer: ImageRecord, labelled: set[str]) -> Annotation | None:
    if known.annotation is None or newer.annotation is None:
        return newer.annotation or known.annotation
    old, new = known.annotation, newer.annotation
    old = old[np.array([name not in labelled for name in old.names], bool)]
    boxes, difficult = (np.concatenate([getattr(each, key) for each in (old, new)]) for key in ("boxes", "difficult"))
    return Annotation(boxes, (*old.names, *new.names), difficult)


def measure_classes(
    fresh: Sequence[ImageRecord], held_out: Sequence[ImageRecord], share: float, seed: int, difficult: bool = True
) -> list[ImageRecord]:
    """Those of `fresh` to hold out: about `share` of the images that show classes which `held_out` does not.

    All others train. `difficult`: whether difficult objects train.
    """
    measured = frozenset[str]().union(*(shown_classes(record, difficult) for record in held_out))
    showing = [record for record in fresh if shown_classes(record, difficult) - measured]
    try:
        return hold_out(showing, share, seed, difficult)[1]
    except SppnetError:  # too few
        return []
