"""ILSVRC's detection data are read into the same records as VOC's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from det_tree import EXTRA, add_image, make_det, train_name, val_name, write_list, write_names
from devkit import make_devkit

from sppnet.data.ilsvrc import find_lists
from sppnet.data.splits import load_split, load_splits, split_digests
from sppnet.errors import SppnetError
from sppnet.proposals.files import export_windows, match_records

ACCORDION, AIRPLANE, CAR = "n02672831", "n02691156", "n02958343"


@pytest.fixture
def root(tmp_path) -> Path:
    return make_det(tmp_path / "ILSVRC", val=3)


def test_corners_are_zero_based_and_inclusive_and_classes_have_english_names(root):
    add_image(root, "val", val_name(1), (CAR, 0, 0, 127, 95), (AIRPLANE, 10, 20, 40, 30))
    records, skips = load_split(root, "DET/val")
    assert [record.id for record in records] == [f"DET/val/ILSVRC2012_val_0000000{i}" for i in (1, 2, 3)]
    assert records[0].path == root / "Data/DET/val/ILSVRC2012_val_00000001.JPEG"
    assert records[0].size == (96, 128)
    np.testing.assert_array_equal(records[0].annotation.boxes, [[0, 0, 128, 96], [10, 20, 41, 31]])
    assert records[0].annotation.names == ("car", "airplane")
    assert not records[0].annotation.difficult.any()
    assert len(records[2].annotation) == 0
    assert skips.counts == {}


def test_skips_are_those_of_voc(root):
    boxes = ((5, 5, 5, 40), (9, 9, 8, 20), (9, 9, 5, 20), (100, 50, 128, 130), (200, 5, 250, 9), (10, 10, 11, 11))
    xml = root / f"Annotations/DET/val/{val_name(1)}.xml"
    xml.write_text(xml.read_text().split("<object>")[0] + "".join(xml_thing(*box) for box in boxes) + "</annotation>")
    records, skips = load_split(root, "DET/val")
    np.testing.assert_array_equal(records[0].annotation.boxes, [[100, 50, 128, 96], [10, 10, 12, 12]])
    assert skips.counts == {
        "zero-area box": 2,
        "box with reversed corners": 1,
        "box outside the image": 1,
        "box clipped to the image": 1,
    }


def xml_thing(*corners: int) -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{CAR}</name><bndbox>{box}</bndbox></object>"


def test_train_is_all_lists_of_classes_and_each_image_counts_once(root):
    records, skips = load_split(root, "DET/train")
    ids = [record.id for record in records]
    assert len(ids) == len(set(ids)) == 7
    assert ids[0] == f"DET/train/ILSVRC2013_train/{ACCORDION}/{ACCORDION}_0"
    shown = {record.id: record.annotation.names for record in records}
    assert shown[f"DET/train/{train_name(CAR, 1)}"] == ("car",)  # whatever the lists of other classes say
    assert shown[f"DET/train/{EXTRA}"] == ()
    assert skips.counts == {}
    (own,) = {len(load_split(root, f"DET/train_{i}")[0]) for i in (1, 2, 3)}
    assert own == 6
    assert len(find_lists(root)["DET/train"]) == 3
    write_list(root, "train_10", f"{train_name(CAR, 0)} 1")
    assert [path.stem for path in find_lists(root)["DET/train"]] == ["train_1", "train_2", "train_3", "train_10"]


def test_a_list_of_all_training_images_goes_before_those_of_classes(root):
    write_list(root, "train", f"{train_name(CAR, 0)} 1", f"{EXTRA} 2")
    records, skips = load_split(root, "DET/train")
    assert [record.annotation.names for record in records] == [("car",), ()]
    assert skips.counts == {}


@pytest.mark.parametrize("synset", [ACCORDION, CAR])  # of the first list and of the last
def test_a_positive_image_without_annotation_has_no_objects_and_is_counted(root, synset):
    name = train_name(synset, 0)
    (root / f"Annotations/DET/train/{name}.xml").unlink()
    records, skips = load_split(root, "DET/train")
    assert {record.id: record.annotation.names for record in records}[f"DET/train/{name}"] == ()
    reason = "image listed as positive that has no annotation, taken as one without objects"
    assert dict(skips.images) == {reason: [f"DET/train/{name}"]}


def test_an_image_that_shows_a_class_in_part_is_no_positive(root):
    name = add_image(root, "train", "part", annotated=False)
    write_list(root, "train_4", f"{name} 0")
    for split in ("DET/train_4", "DET/train"):
        records, skips = load_split(root, split)
        assert (records[-1].id, len(records[-1].annotation)) == ("DET/train/part", 0)
        assert skips.counts == {}


def test_parts_of_a_folder_may_have_lists_of_their_own(root):
    write_list(root, "val1", val_name(2))
    write_list(root, "train_some", train_name(CAR, 0), f"{train_name(AIRPLANE, 1)}.JPEG")
    assert [r.id for r in load_split(root, "DET/val1")[0]] == [f"DET/val/{val_name(2)}"]
    records, _ = load_splits(root, ("DET/val1", "DET/train_some"))
    assert [r.annotation.names for r in records] == [("car",), ("car",), ("airplane",)]


def test_without_map_det_classes_are_synsets_and_it_may_lie_in_the_root(root):
    write_names(root, [f"{CAR} 1 voiture"], place="")  # that of the devkit goes first
    assert load_split(root, "DET/val")[0][1].annotation.names == ("car",)
    (root / "devkit/data/map_det.txt").rename(root / "map_det.txt")
    names = {name for record in load_split(root, "DET/train")[0] for name in record.annotation.names}
    assert names == {"accordion", "airplane", "car"}
    (root / "map_det.txt").unlink()
    names = {name for record in load_split(root, "DET/train")[0] for name in record.annotation.names}
    assert names == {ACCORDION, AIRPLANE, CAR}


def test_synsets_of_one_english_name_keep_their_ids(root):
    write_names(root, [f"{ACCORDION} 1 crane", f"{AIRPLANE} 2 crane", f"{CAR} 3 passenger  car"])
    names = {name for record in load_split(root, "DET/train")[0] for name in record.annotation.names}
    assert names == {ACCORDION, AIRPLANE, "passenger car"}


@pytest.mark.parametrize("line", [f"{CAR} car", f"{CAR} x car", CAR, f"{ACCORDION} 7 again"])
def test_a_faulty_map_of_names_is_an_error_that_names_the_line(root, line):
    write_names(root, [f"{ACCORDION} 1 accordion", "", line])
    with pytest.raises(SppnetError, match=r"map_det\.txt:3: expected 'synset number name', each synset once, got"):
        load_split(root, "DET/val")


def test_images_to_test_on_have_no_annotations(root):
    records, skips = load_split(root, "DET/test", require_annotations=False)
    assert [record.annotation for record in records] == [None, None]
    assert skips.counts == {"image without annotation, not evaluated": 2}
    with pytest.raises(SppnetError, match=r"Annotations/DET/test/ILSVRC2012_test_00000001\.xml: no such annotation"):
        load_split(root, "DET/test")
    (root / f"Annotations/DET/val/{val_name(2)}.xml").unlink()
    with pytest.raises(SppnetError, match=r"ILSVRC2012_val_00000002\.xml: no such annotation file; add it or"):
        load_split(root, "DET/val")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("val", ["a 1", "b two"], r"val\.txt:2: expected a name, such as .*, and a number, got 'b two'; correct"),
        ("val", ["a -1"], r"val\.txt:1: expected a name"),
        ("val", ["a 1 2"], r"val\.txt:1: expected a name"),
        ("train_1", ["a/b 1", "", "a/c 2"], r"train_1\.txt:3: expected a name, .* and 1, 0 or -1, got 'a/c 2'"),
        ("train_1", ["../../secret 1"], r"train_1\.txt:1: expected a name"),
        ("val", ["/etc/passwd"], r"val\.txt:1: expected a name"),
        ("val", ["./a 1"], r"val\.txt:1: expected a name"),
        ("val", ["C:\\b 1"], r"val\.txt:1: expected a name"),
        ("val", ["a 1", "b 2", "a 3"], r"val\.txt:3: 'a' is already on line 1; remove one of them"),
        ("val", ["x" * 300, "\0"], r"no such image, named in .*val\.txt:1; 2 of 2 images"),
        ("val", ["", " "], r"val\.txt: lists no image; write one name per line"),
        ("val", ["no 1", f"{val_name(1)} 2", "nor 3"],
         r"DET/val/no\.JPEG: no such image, named in .*val\.txt:1; 2 of 3 images of DET/val missing; add them, or"),
    ],
)  # fmt: skip
def test_a_faulty_list_is_an_error_that_names_file_and_line(root, name, lines, message):
    write_list(root, name, *lines)
    with pytest.raises(SppnetError, match=message):
        load_split(root, f"DET/{name}")


def test_missing_images_of_all_lists_are_counted_together(root):
    write_list(root, "train_2", "ILSVRC2013_train/x 1", "ILSVRC2013_train/y -1")
    with pytest.raises(SppnetError, match=r"x\.JPEG: no such image, .*train_2\.txt:1; 2 of 9 images of DET/train miss"):
        load_split(root, "DET/train")


@pytest.mark.parametrize(
    "split", ["DET/train2", "DET/", "DET", "val", "VOC2007/val", "DET/other", "DET/my_val", "DET/../val"]
)
def test_a_set_that_is_not_there_is_an_error_with_those_that_are(root, split):
    for name in ("other", "my_val"):
        write_list(root, name, val_name(1))  # of which folder?
    with pytest.raises(SppnetError, match=rf"no part '{split}' in .* data; parts here: DET/train, DET/test, DET/val$"):
        load_split(root, split)


def test_one_list_twice_and_lists_that_share_images_are_errors(root):
    for second in ("DET/val", "DET/val2"):
        write_list(root, "val2", val_name(1))
        with pytest.raises(SppnetError, match=rf"image DET/val/{val_name(1)} is in DET/val and in {second}; name spl"):
            load_splits(root, ("DET/val", second))


def test_the_folder_above_and_voc_years_beside_it_are_read(root):
    assert load_split(root.parent, "DET/val")[0] == load_split(root, "DET/val")[0]
    make_devkit(make_devkit(root), year="DET")
    assert load_split(root, "VOC2007/train")[0][0].id == "VOC2007/a"
    assert load_split(root, "DET/train")[0][0].id == "DET/a"  # a year folder of this name goes first


def test_contents_are_those_of_the_records_and_windows_go_by_stem_or_id(root, tmp_path):
    records, _ = load_splits(root, ("DET/val", "DET/train"))
    contents = split_digests(root, "DET/val") | split_digests(root, "DET/train")
    assert contents == {record.id: record.digest for record in records}
    window = [[1, 2, 30, 40]]
    export_windows(tmp_path / "w.npz", [val_name(1), f"{ACCORDION}_0", records[1].id], [window] * 3)
    found = match_records(records, [tmp_path / "w.npz"])
    assert set(found) == {records[0].id, records[1].id, f"DET/train/{train_name(ACCORDION, 0)}"}
