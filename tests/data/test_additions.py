"""Folders added to a data set: ids, known pictures, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from devkit import thing
from layouts import BOX, coco, coco_of, picture, text, xml

from sppnet.data.additions import add_folders
from sppnet.data.selection import mark_unknown, unknown_in
from sppnet.data.splits import load_splits
from sppnet.errors import SppnetError

DOG = thing("dog", 31, 11, 50, 30)


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("a", "b"):
        picture(tmp_path / "root" / f"{name}.jpg")
        xml(tmp_path / "root" / f"{name}.xml")
    return tmp_path / "root"


@pytest.fixture
def known(root):
    return load_splits(root, ("all",))[0]


def objects(record):
    return dict(zip(record.annotation.names, map(tuple, record.annotation.boxes.tolist()), strict=True))


def test_new_pictures_of_any_format_follow_the_known_ones_under_ids_of_their_folder(tmp_path, known):
    for part in ("train", "valid", "test"):
        picture(tmp_path / "one" / part / "a.jpg")
        coco(tmp_path / "one" / part / "_annotations.coco.json", coco_of("a.jpg", categories=("dog",)))
    picture(tmp_path / "two/a.png")
    text(tmp_path / "two/a.txt", "0 0.5 0.5 0.1 0.1\n")
    text(tmp_path / "two/classes.txt", "bird\n")
    folders = [tmp_path / "one", tmp_path / "two"]
    merged, _, notes, unknown = add_folders(known, folders)
    assert [r.id for r in merged] == ["a", "b", "added-1/train/a", "added-1/valid/a", "added-2/a"]
    assert merged[:2] == known
    of_folders = {"added-1/train/a", "added-1/valid/a"}, {"added-2/a"}  # neither labels cats, the second no dogs
    assert unknown == {"dog": {"a", "b", *of_folders[1]}, "bird": {"a", "b", *of_folders[0]},
                       "cat": of_folders[0] | of_folders[1]}  # fmt: skip
    assert [set(objects(r)) for r in merged[2:]] == [{"dog"}, {"dog"}, {"bird"}]
    assert notes == [f"{folders[0]} adds 2 images", f"{folders[1]} adds 1 images"]
    assert add_folders(known, folders)[0] == merged
    assert add_folders(known, [*folders, folders[0]])[0] == merged


def test_a_known_picture_gets_the_objects_of_the_classes_that_the_folder_labels_and_keeps_the_others(tmp_path, known):
    shutil.copy(known[0].path, tmp_path / "copy.jpg")
    for name, labels in (("dogs", [DOG]), ("moved", [thing("cat", 11, 11, 20, 20)]), ("empty", [])):
        (tmp_path / name).mkdir()
        shutil.copy(known[0].path, tmp_path / name / "x.jpg")
        text(tmp_path / name / "x.xml", f"<annotation>{''.join(labels)}</annotation>")
    cat, dog, moved = (float(v) for v in BOX), (30, 10, 50, 30), (10, 10, 20, 20)
    merged, _, notes, unknown = add_folders(known, [tmp_path / "dogs"])
    assert [r.id for r in merged] == ["a", "b"]
    assert objects(merged[0]) == {"cat": tuple(cat), "dog": dog}
    assert merged[1] == known[1]
    assert unknown == {"dog": {"b"}}
    assert notes == [f"{tmp_path / 'dogs'} adds 0 images, and its objects of dog to 1 known, e.g. x"]
    assert objects(add_folders(known, [tmp_path / "dogs", tmp_path / "moved"])[0][0]) == {"dog": dog, "cat": moved}
    assert add_folders(known, [tmp_path / "empty"])[0] == known
    again = add_folders(merged, [tmp_path / "dogs"])[0]
    assert np.array_equal(again[0].annotation.boxes, merged[0].annotation.boxes)


def test_what_nobody_labelled_stays_unknown_until_a_folder_labels_it(tmp_path, root, known):
    picture(root / "c.jpg", (50, 31))
    text(root / "c.xml", "<annotation></annotation>")
    xml(root / "a.xml", thing("cat", 11, 11, 30, 40), DOG)  # labelled in place: one picture alone
    for name, stem, labels in (
        ("dogs", "d", [DOG]),
        ("both", "e", [DOG, thing("cat", 11, 11, 20, 20)]),
        ("more", "f", []),
    ):
        picture(tmp_path / name / f"{stem}.jpg", (50, 32 + len(labels)))
        text(tmp_path / name / f"{stem}.xml", f"<annotation>{''.join(labels)}</annotation>")
    shutil.copy(known[1].path, tmp_path / "dogs/b.jpg")
    text(tmp_path / "dogs/b.xml", "<annotation></annotation>")
    records, folders = load_splits(root, ("all",))[0], [tmp_path / name for name in ("dogs", "both", "more")]
    picture(tmp_path / "again/g.jpg", (50, 36))
    xml(tmp_path / "again/g.xml", DOG)
    alone = add_folders(known[1:], [folders[0], tmp_path / "again"])[3]  # dogs alone, twice
    assert alone == {"cat": {"added-1/d", "added-2/g"}, "dog": set()}
    before = {"dog": ["a", "b", "c"], "cow": ["c"]}
    merged, _, _, unknown = add_folders(records, folders, unknown=before)
    assert unknown == {"dog": {"a", "c"}, "cow": {"c"}}
    marked = {r.id: r.annotation.unknown for r in mark_unknown(merged, unknown)}
    assert marked == {"a": (), "b": (), "c": ("cow", "dog"), "added-1/d": (), "added-2/e": (), "added-3/f": ()}
    assert unknown_in(mark_unknown(merged, unknown)) == {"dog": ["c"], "cow": ["c"]}
    assert mark_unknown(merged, {}) == merged


def test_classes_that_a_folder_only_lists_stay_as_they_are_known(tmp_path, known):
    picture(tmp_path / "dogs/new.jpg"), shutil.copy(known[0].path, tmp_path / "dogs/x.jpg")
    coco(tmp_path / "dogs/labels.json", coco_of("x.jpg", "new.jpg", boxes=[(1, 1, 9, 9)], categories=("dog", "cat")))
    merged, _, notes, _ = add_folders(known, [tmp_path / "dogs"])
    assert objects(merged[0]) == {"cat": tuple(map(float, BOX)), "dog": (1, 1, 10, 10)}
    assert notes == [f"{tmp_path / 'dogs'} adds 1 images, and its objects of dog to 1 known, e.g. x"]


def test_a_folder_without_anything_to_train_on_is_refused(tmp_path, known):
    picture(tmp_path / "pictures/a.jpg", (50, 30))
    with pytest.raises(SppnetError, match="no annotated pictures found"):
        add_folders(known, [tmp_path / "pictures"])
    xml(tmp_path / "test/test/a.xml")
    picture(tmp_path / "test/test/a.jpg")
    with pytest.raises(SppnetError, match="parts test: nothing to train on"):
        add_folders(known, [tmp_path / "test"])
    picture(tmp_path / "dogs/a.jpg")
    xml(tmp_path / "dogs/a.xml", DOG)
    with pytest.raises(SppnetError, match=r"classes dog: nothing to train on; .* data.classes"):
        add_folders(known, [tmp_path / "dogs"], ["cat"])
    assert len(add_folders(known, [tmp_path / "dogs"], ["cat", "dog"])[0]) == 3


def test_ids_that_would_not_be_unique_are_refused(tmp_path, root):
    for place in (root / "added-1/z", tmp_path / "more/z"):
        picture(place.with_suffix(".jpg"))
        xml(place.with_suffix(".xml"))
    with pytest.raises(SppnetError, match="begin with added-1/"):
        add_folders(load_splits(root, ("all",))[0], [tmp_path / "more"])
