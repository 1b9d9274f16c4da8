"""Folders of pictures that are added to a data set, under ids that stay (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from sppnet.data.layouts import find_data
from sppnet.data.selection import shown_classes
from sppnet.data.splits import load_splits
from sppnet.errors import SppnetError
from sppnet.records import Annotation, ImageRecord, SkipCounts


def add_folders(
    records: Sequence[ImageRecord], folders: Sequence[Path], classes: Sequence[str] | None = None
) -> tuple[list[ImageRecord], SkipCounts, list[str]]:
    """`records` in their order, then the other images of the folders; what was skipped; notes. Each content once.

    All parts of a folder but test are added. The images of the n-th have the ids ``added-n/<id>``. One that is there
    already keeps its id: of classes that the folder labels it gets the folder's objects, those of others stay. A class
    that none of the images before shows is `unknown` in them. SppnetError for a folder that is no data set, is test
    data alone or, where given, shows no `classes`.
    """
    merged, skips, notes, places = list(records), SkipCounts(), list[str](), dict[str, list[int]]()
    for place, record in enumerate(merged):
        places.setdefault(record.digest, []).append(place)
    for number, folder in enumerate(folders, start=1):
        found, fresh, copies = find_data(folder), 0, list[str]()
        roles = found.roles()
        own, more = load_splits(found, (*roles["train"], *roles["val"]))
        skips = skips.plus(found.left_out).plus(more)
        labelled, before = ({*chain(*map(shown_classes, each))} for each in (own, merged))
        if not own or (classes is not None and labelled and labelled.isdisjoint(classes)):
            shows = f"classes {', '.join(sorted(labelled))}" if own else f"parts {', '.join(found.parts)}"
            raise SppnetError(f"{folder}: {shows}: nothing to train on; name another, or the classes in data.classes")
        merged = [replace(r, annotation=_unlabelled(r.annotation, labelled - before)) for r in merged]
        for record in own:
            for place in (known := places.setdefault(record.digest, [])):
                merged[place] = replace(merged[place], annotation=_relabel(merged[place], record, labelled))
            if known:
                copies.append(record.id)
            else:
                known.append(len(merged))
                merged.append(replace(record, id=f"added-{number}/{record.id}"))
                fresh += 1
        if len({record.id for record in merged}) < len(merged):
            raise SppnetError(f"{folder}: ids of its images begin with added-{number}/, as others do; rename those")
        again = f", and its objects of {', '.join(sorted(labelled))} to {len(copies)} known, e.g. " if copies else ""
        notes.append(f"{folder} adds {fresh} images{again}{copies[0] if copies else ''}")
    return merged, skips, notes


def _unlabelled(known: Annotation | None, names: set[str]) -> Annotation | None:
    return None if known is None else replace(known, unknown=tuple(sorted({*known.unknown, *names})))


def _relabel(known: ImageRecord, newer: ImageRecord, labelled: set[str]) -> Annotation | None:
    old, new = known.annotation, newer.annotation
    if old is None or new is None:
        return new if old is None else old
    others = old[np.array([name not in labelled for name in old.names], bool)]
    boxes, difficult = (
        np.concatenate([getattr(each, key) for each in (others, new)]) for key in ("boxes", "difficult")
    )
    unknown = tuple(name for name in old.unknown if name not in labelled)
    return Annotation(boxes, (*others.names, *new.names), difficult, unknown)
