"""What folders of pictures and labels are, found by looking: exports of labelling tools, in small."""

import numpy as np
import pytest
from devkit import make_devkit, thing
from layouts import BOX, LINE, XML, coco, coco_of, picture, text, xml

from sppnet.data.layouts import find_data
from sppnet.data.parts import DataFolder, Part, role_of
from sppnet.data.splits import load_split, load_splits, split_digests
from sppnet.errors import SppnetError

YAML = "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n"


def voc_in_two_folders(root):
    picture(root / "images/a.jpg"), xml(root / "annotations/a.xml")
    return "voc", ("all",), ["images/a"]


def voc_in_one_folder(root):
    picture(root / "a.jpg"), xml(root / "a.xml")
    return "voc", ("all",), ["a"]


def voc_by_task(root):
    for task in ("task 1", "task 2"):
        picture(root / f"pictures/{task}/a.jpg"), xml(root / f"labels/{task}/a.xml")
    return "voc", ("all",), ["pictures/task 1/a", "pictures/task 2/a"]


def voc_beside_by_task(root):
    for task in ("one/deep", "two"):
        picture(root / f"{task}/a.PNG"), xml(root / f"{task}/a.XML")
    return "voc", ("all",), ["one/deep/a", "two/a"]


def voc_with_lists(root):
    make_devkit(make_devkit(root, "d"), "d", ("b",), "val")
    (root / "d").rename(root / "x")
    for folder in ("ImageSets", "JPEGImages", "Annotations"):
        (root / "x" / folder).rename(root / folder)
    text(root / "ImageSets/Main/train.txt", "a\n")
    text(root / "ImageSets/Main/cat_train.txt", "a  1\n")
    return "voc", ("train", "val"), ["JPEGImages/a", "JPEGImages/b"]


def voc_with_a_list_at_the_top(root):
    for name in "ab":
        picture(root / f"images/{name}.jpg"), xml(root / f"annotations/{name}.xml")
    text(root / "train.txt", "images/a.jpg\n"), text(root / "test.txt", "./images/b.jpg\n")
    return "voc", ("test", "train"), ["images/b", "images/a"]


def voc_in_split_folders(root):
    for part in ("test", "train", "valid"):
        picture(root / part / "a.jpg"), xml(root / part / "a.xml")
    return "voc", ("test", "train", "valid"), ["test/a", "train/a", "valid/a"]


def voc_above_its_devkit(root):
    make_devkit(root / "VOCdevkit", names=("a",))
    return "voc", ("VOC2007/train",), ["VOC2007/a"]


def coco_official(root):
    for part in ("train2017", "val2017"):
        picture(root / part / "a.jpg"), coco(root / f"annotations/instances_{part}.json", coco_of("a.jpg"))
        coco(root / f"annotations/person_keypoints_{part}.json", coco_of("a.jpg"))
        coco(root / f"annotations/captions_{part}.json", {"images": [], "annotations": []})
    return "coco", ("train2017", "val2017"), ["train2017/a", "val2017/a"]


def coco_in_split_folders(root):
    for part in ("test", "train", "valid"):
        picture(root / part / "a.jpg"), coco(root / part / "_annotations.coco.json", coco_of("a.jpg"))
    return "coco", ("test", "train", "valid"), ["test/a", "train/a", "valid/a"]


def coco_default(root):
    picture(root / "images/a.jpg"), coco(root / "annotations/instances_default.json", coco_of("a.jpg"))
    return "coco", ("all",), ["images/a"]


def coco_with_paths(root):
    values = coco_of("../../upload/7/a.jpg", "sub\\b.png")
    picture(root / "images/a.jpg"), picture(root / "images/sub/b.png"), coco(root / "result.json", values)
    text(root / "notes.json", "{}"), text(root / "list.json", "[1]")
    return "coco", ("all",), ["images/a", "images/sub/b"]


def yolo_roboflow(root):
    for part in ("train", "valid"):
        picture(root / part / "images/a.jpg"), text(root / part / "labels/a.txt", LINE)
    text(root / "data.yaml", YAML + "test: ../test/images\nroboflow:\n  version: 2\n")
    text(root / "README.dataset.txt", "hello\n")
    return "yolo", ("train", "val"), ["train/images/a", "valid/images/a"]


def yolo_ultralytics(root):
    for part in ("train", "val"):
        picture(root / "images" / part / "a.jpg"), text(root / "labels" / part / "a.txt", LINE)
    text(root / "dataset.yaml", "path: ../datasets/gone\ntrain: images/train\nval: [images/val]\nnames:\n  0: cat\n")
    return "yolo", ("train", "val"), ["images/train/a", "images/val/a"]


def yolo_with_lists(root):
    for name in "ab":
        picture(root / f"images/{name}.jpg"), text(root / f"labels/{name}.txt", LINE)
    text(root / "lists/first.txt", "./images/a.jpg\n"), text(root / "lists/second.txt", "/home/x/images/b.jpg\n")
    text(root / "data.yml", "train: lists/first.txt\nval: lists/second.txt\nnames: {0: cat}\n")
    return "yolo", ("train", "val"), ["images/a", "images/b"]


def yolo_of_another_machine(root):
    picture(root / "sub/train/images/a.jpg"), text(root / "sub/train/labels/a.txt", LINE)
    text(root / "sub/data.yaml", "train: /content/set/train/images\nval: /content/set/valid/images\nnames: [cat]\n")
    return "yolo", ("train",), ["sub/train/images/a"]


def yolo_with_classes(root):
    picture(root / "images/a.jpg"), text(root / "labels/a.txt", LINE), text(root / "classes.txt", "cat\n\n")
    text(root / "notes.json", '{"categories": [], "info": {}}')
    return "yolo", ("all",), ["images/a"]


def yolo_beside(root):
    for part in ("train", "valid"):
        picture(root / part / "a.jpg"), text(root / part / "a.txt", LINE), text(root / part / "_darknet.labels", "cat")
    return "yolo", ("train", "valid"), ["train/a", "valid/a"]


LAYOUTS = [
    value for name, value in globals().items() if name.startswith(("voc_", "coco_", "yolo_")) and name != "coco_of"
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_labelling_tools_export_is_found_and_read(tmp_path, layout):
    form, parts, ids = layout(tmp_path)
    folder = find_data(tmp_path)
    assert (folder.format, folder.parts) == (form, parts)
    assert not [why for why in folder.left_out.counts if "missing" in why]
    records, _ = load_splits(tmp_path, parts)
    assert [record.id for record in records] == ids
    for record in records:
        assert record.annotation.names[0] == "cat"
        if record.size == (40, 60):  # not of `make_devkit`
            np.testing.assert_allclose(record.annotation.boxes, [BOX], atol=1e-4)
    assert split_digests(tmp_path, parts[0]).keys() <= set(ids)


def test_a_folder_of_two_formats_says_which_was_taken_and_how_to_say_otherwise(tmp_path):
    for name in "ab":
        picture(tmp_path / f"images/{name}.jpg"), text(tmp_path / f"labels/{name}.txt", LINE)
    (
        text(tmp_path / "classes.txt", "cat\n"),
        coco(tmp_path / "labels.json", coco_of("a.jpg", "c.jpg", categories=["dog"])),
    )
    xml(tmp_path / "images/a.xml")
    folder = find_data(tmp_path)
    assert folder.format == "yolo"
    assert folder.notes == (
        "it has labels of two formats: YOLO (2 images) is taken, VOC (1) with data.format=voc",
        "it has labels of two formats: YOLO (2 images) is taken, COCO (1) with data.format=coco",
    )
    assert find_data(tmp_path, "coco").notes == ()
    names = [load_split(find_data(tmp_path, form), "all")[0][0].annotation.names for form in ("auto", "voc", "coco")]
    assert names == [("cat",), ("cat",), ("dog",)]


def test_another_format_that_is_faulty_is_said_too(tmp_path):
    yolo_with_classes(tmp_path), text(tmp_path / "labels.json", "{")
    (note,) = find_data(tmp_path).notes
    assert note.startswith("it may be COCO too (data.format=coco), but ")
    assert "labels.json: cannot read this file as JSON" in note
    with pytest.raises(SppnetError, match="expected auto, voc, coco, yolo"):
        find_data(tmp_path, "csv")
    with pytest.raises(
        SppnetError, match=r"no annotated pictures found; looked for VOC \(.*; found 1 image, 2 \.txt, 2 \.j"
    ):
        find_data(tmp_path, "voc")


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_folder_without_annotations_is_told_what_was_looked_for(tmp_path, pictures):
    for name in range(pictures):
        picture(tmp_path / f"{name}.jpg")
    message = (
        rf"{tmp_path}: no annotated pictures found; looked for VOC \(.*\); COCO \(.*\); YOLO \(.*\); found {pictures}"
    )
    with pytest.raises(SppnetError, match=message):
        find_data(tmp_path)
    with pytest.raises(SppnetError, match="no such data folder"):
        find_data(tmp_path / "gone")


def test_names_of_parts_say_what_they_are_for(tmp_path):
    roles = {
        "train": "train", "training": "train", "train2017": "train", "my_train": "train", "trainval": "train",
        "valid": "val", "val": "val", "validation": "val", "test": "test", "2007_test": "test", "Test-dev": "test",
        "all": None, "latest": None, "retrain": None, "trains": None, "other": None,
    }  # fmt: skip
    assert {name: role_of(name) for name in roles} == roles
    parts = ("Y/train", "Y/trainval", "Y/val", "Z/trainval", "Z/extra")
    expected = {"train": ("Y/train", "Z/trainval"), "val": ("Y/val",), "test": ()}
    assert DataFolder(tmp_path, "voc", parts).roles() == expected
    assert DataFolder(tmp_path, "voc", ("all", "test")).roles() == {"train": ("all",), "val": (), "test": ("test",)}


def test_a_folder_of_trains_beside_others_is_no_part(tmp_path):
    for name in ("bus", "train"):
        picture(tmp_path / f"{name}/a.jpg"), xml(tmp_path / f"{name}/a.xml")
    assert find_data(tmp_path).parts == ("all",)


def test_what_a_plain_folder_leaves_out_is_counted(tmp_path):
    voc_with_a_list_at_the_top(tmp_path)
    for name in "cd":
        picture(tmp_path / f"images/{name}.jpg")
    xml(tmp_path / "annotations/c.xml"), xml(tmp_path / "annotations/gone.xml"), xml(tmp_path / "export.xml")
    assert find_data(tmp_path).left_out.images == {
        "image without label file, left out": ["images/d"],
        "image of no part, left out": ["images/c"],
        "label file without an image, left out": ["annotations/gone.xml"],
    }


def test_a_list_that_names_what_is_not_there_is_an_error(tmp_path):
    voc_with_a_list_at_the_top(tmp_path)
    text(tmp_path / "train.txt", "a\nx\ny.jpg\n")
    with pytest.raises(SppnetError, match=r"train\.txt: 2 of 3 images missing, e\.g\. 'x'; add them, or take them out"):
        find_data(tmp_path)


def test_a_listed_image_without_annotation_is_an_error_in_training_alone(tmp_path):
    voc_with_a_list_at_the_top(tmp_path)
    (tmp_path / "annotations/b.xml").unlink()
    assert load_split(tmp_path, "test", require_annotations=False)[0][0].annotation is None
    with pytest.raises(SppnetError, match=r"images/b\.xml: no such annotation file"):
        load_split(tmp_path, "test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("images/a.jpg", "images/a.png"), r"annotations/a\.xml: 'a' fits images/a\.jpg and images/a\.png alike; name"),
        (
            ("one/a.jpg", "two/a.jpg"),
            r"annotations/a\.xml: 'a' fits one/a\.jpg and two/a\.jpg alike; name the folder too",
        ),
        ((), r"no annotated pictures found; .*; found 0 images, 1 \.xml; docs/own-data\.md shows how each looks"),
    ],
)
def test_an_annotation_of_no_image_or_of_two_is_an_error(tmp_path, files, message):
    xml(tmp_path / "annotations/a.xml")
    for name in files:
        picture(tmp_path / name)
    with pytest.raises(SppnetError, match=message):
        find_data(tmp_path)


def test_two_annotations_of_one_image_are_an_error_unless_one_is_nearer(tmp_path):
    picture(tmp_path / "images/a.jpg"), xml(tmp_path / "one/a.xml"), xml(tmp_path / "two/a.xml")
    with pytest.raises(SppnetError, match=r"two/a\.xml and one/a\.xml are both labels of images/a\.jpg; keep one"):
        find_data(tmp_path)
    xml(tmp_path / "images/a.xml", thing("dog", 1, 1, 9, 9))
    assert load_split(tmp_path, "all")[0][0].annotation.names == ("dog",)


def test_hidden_files_are_not_looked_at_and_links_are(tmp_path):
    voc_in_one_folder(tmp_path / "store")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "store")
    text(tmp_path / "data/.cache/labels.json", "{"), text(tmp_path / "data/__MACOSX/._a.xml", "?")
    assert [record.id for record in load_split(tmp_path / "data", "all")[0]] == ["link/a"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_verified_annotation_and_one_of_another_encoding_are_annotations(tmp_path, encoding):
    picture(tmp_path / "a.jpg"), xml(tmp_path / "a.xml")
    content = (tmp_path / "a.xml").read_text().replace("<annotation>", '<annotation verified="yes">')
    declared = content if content.startswith("<?xml") else f'<?xml version="1.0" encoding="{encoding}"?>{content}'
    (tmp_path / "a.xml").write_text(declared, encoding=encoding)
    (record,), skips = load_split(tmp_path, "all")
    assert record.annotation.boxes.tolist() == [list(BOX)]
    assert not skips.counts


def test_shares_of_six_digits_are_no_clipped_boxes(tmp_path):
    picture(tmp_path / "a.jpg", size=(641, 479)), text(tmp_path / "classes.txt", "cat\n")
    text(tmp_path / "a.txt", "0 0.750001 0.5 0.5 1.0\n0 0.9 0.5 0.3 0.5\n")
    _, skips = load_split(tmp_path, "all")
    assert skips.counts == {"box clipped to the image": 1}


def test_masks_are_no_photos_where_the_annotation_names_its_picture(tmp_path):
    """Oxford-IIIT Pets: the trimaps lie nearer to the XML than the pictures."""
    for name in "ab":
        picture(tmp_path / f"images/{name}.jpg"), picture(tmp_path / f"annotations/trimaps/{name}.png")
        xml(tmp_path / f"annotations/xmls/{name}.xml", f"<filename>{name}.jpg</filename>", XML)
    text(tmp_path / "annotations/trainval.txt", "a 1 1 1\nb 1 1 1\n")
    folder = find_data(tmp_path)
    assert [record.id for record in load_split(folder, "all")[0]] == ["images/a", "images/b"]
    assert folder.left_out.counts == {"image without label file, left out": 2}
    text(tmp_path / "train.txt", "a\n"), text(tmp_path / "val.txt", "b.jpg\n")  # of the labelled picture, not the mask
    assert [load_split(tmp_path, part)[0][0].id for part in ("train", "val")] == ["images/a", "images/b"]
    xml(tmp_path / "annotations/xmls/a.xml", "<filename>elsewhere.jpg</filename>", XML)
    (tmp_path / "annotations/trimaps/b.png").unlink()
    assert load_split(tmp_path, "train")[0][0].id == "annotations/trimaps/a"


@pytest.mark.parametrize("named", [True, False])
def test_a_year_folder_by_itself_has_the_lists_of_main(tmp_path, named):
    root = make_devkit(tmp_path, names=("a", "b")) / "VOC2007"
    make_devkit(tmp_path, names=("c",), image_set="val")
    for name in ("a", "c"):
        picture(root / f"SegmentationClass/{name}.png"), picture(root / f"SegmentationObject/{name}.png")
        if named:
            xml(root / f"Annotations/{name}.xml", f"<filename>{name}.jpg</filename>", XML)
    for name in ("Segmentation", "Layout", "Action"):
        text(root / f"ImageSets/{name}/train.txt", "a\n"), text(root / f"ImageSets/{name}/val.txt", "c\n")
    text(root / "ImageSets/Main/cat_train.txt", "a  1\nb -1\n"), text(root / "ImageSets/Main/trainval.txt", "a\nb\nc\n")
    folder = find_data(root)
    assert folder.parts == ("train", "trainval", "val")
    assert folder.roles() == {"train": ("train",), "val": ("val",), "test": ()}
    assert [r.id for r in load_split(folder, "trainval")[0]] == ["JPEGImages/a", "JPEGImages/b", "JPEGImages/c"]


def test_parts_within_others_have_no_role(tmp_path):
    def parts(**images):
        return DataFolder(
            tmp_path, "coco", (*images,), {p: Part(dict.fromkeys(own), annotate) for p, own in images.items()}
        )

    def annotate(*_):
        raise AssertionError

    folder = parts(train="abc", train_few="ab", val="ad", test="d", other="e")
    assert folder.roles() == {"train": ("train",), "val": ("val",), "test": ()}
    assert folder.roles(("other",)) == {"train": ("other",), "val": ("val",), "test": ()}
    assert folder.roles(("val",)) == {"train": ("val",), "val": (), "test": ()}
    assert parts(train="a", train_again="a").roles()["train"] == ("train",)
