"""What folders of pictures and labels are, found by looking: exports of labelling tools, in small."""

import numpy as np
import pytest
from devkit import make_devkit
from layouts import BOX, LINE, coco, coco_of, picture, text, xml

from sppnet.data.layouts import find_data
from sppnet.data.splits import load_splits, split_digests

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
