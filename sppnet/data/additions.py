"""Folders of pictures that are added to a data set, under ids that stay (ours)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import numpy as np

from sppnet.data.layouts import find_data
from sppnet.data.selection import shown_classes
from sppnet.data.splits import load_splits
from sppnet.errors import SppnetError
from sppnet.records import Annotation, ImageRecord, SkipCounts


def add_folders(
    records: Sequence[ImageRecord],
    folders: Sequence[Path],
    classes: Sequence[str] | None = None,
    unknown: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> tuple[list[ImageRecord], SkipCounts, list[str], dict[str, set[str]]]:
    """`records` in their order, then the other images of the folders, each content once; what was skipped; notes.

    Last, by class, the images in which nobody labelled it: those before the first folder that shows it; those of a
    folder that shows none of the classes of `records`, for these; and those of `unknown` that no folder labels.

    All parts of a folder but test are added. The images of the n-th have the ids ``added-n/<id>``. One that is there
    already keeps its id: of classes that the folder labels it gets the folder's objects, those of others stay.
    SppnetError for a folder that is no data set, is test data alone or, where given, shows no `classes`.
    """
    merged, skips, notes, places = list(records), SkipCounts(), list[str](), dict[str, list[int]]()
    open_in, first = {name: set(ids) for name, ids in unknown.items()}, {*chain(*map(shown_classes, records))}
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
        for name in labelled - before:
            open_in.setdefault(name, set()).update(record.id for record in merged)
        for record in own:
            for place in (known := places.setdefault(record.digest, [])):
                merged[place] = replace(merged[place], annotation=_relabel(merged[place], record, labelled))
                for name in labelled & open_in.keys():
                    open_in[name].discard(merged[place].id)
            if known:
                copies.append(record.id)
            else:
                known.append(len(merged))
                merged.append(replace(record, id=f"added-{number}/{record.id}"))
                fresh += 1
                for name in before - labelled if labelled and labelled.isdisjoint(first) else ():
                    open_in.setdefault(name, set()).add(merged[-1].id)
        if len({record.id for record in merged}) < len(merged):
            raise SppnetError(f"{folder}: ids of its images begin with added-{number}/, as others do; rename those")
        again = f", and its objects of {', '.join(sorted(labelled))} to {len(copies)} known, e.g. " if copies else ""
        notes.append(f"{folder} adds {fresh} images{again}{copies[0] if copies else ''}")
    return merged, skips, notes, {name: open_in[name] for name in sorted(open_in)}


def _relabel(known: ImageRecord, newer: ImageRecord, labelled: set[str]) -> Annotation | None:
    old, new = known.annotation, newer.annotation
    if old is None or new is None:
        return new if old is None else old
    old = old[np.array([name not in labelled for name in old.names], bool)]
    boxes, difficult = (np.concatenate([getattr(each, key) for each in (old, new)]) for key in ("boxes", "difficult"))
    return Annotation(boxes, (*old.names, *new.names), difficult)
