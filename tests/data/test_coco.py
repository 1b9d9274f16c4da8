"""COCO's JSON, sound and not."""

import json

import numpy as np
import pytest
from layouts import BOX, coco, coco_of, picture, text
from PIL import Image

from sppnet.data.coco import read_coco
from sppnet.data.layouts import find_data
from sppnet.data.splits import load_split
from sppnet.errors import SppnetError
from sppnet.images import read_image


@pytest.fixture
def root(tmp_path):
    picture(tmp_path / "images/a.jpg"), picture(tmp_path / "images/b.jpg")
    return tmp_path


def load(root, values, require=True):
    coco(root / "labels.json", values)
    return load_split(root, "all", require)


def changed(**fields):
    """Two images with a cat each, the first annotation with other fields; None removes one."""
    values = coco_of("a.jpg", "b.jpg")
    own = values["annotations"][0] | fields
    values["annotations"][0] = {key: value for key, value in own.items() if value is not None}
    return values


@pytest.mark.parametrize(
    ("fields", "boxes", "counts"),
    [
        ({}, [BOX], {}),
        ({"bbox": [6.5, 4.25, 23.5, 19.75]}, [[6.5, 4.25, 30, 24]], {}),
        ({"bbox": None, "segmentation": [[6, 4, 30, 4, 30, 9], [8, 9, 9, 9, 8, 24]]}, [BOX],
         {"polygon turned into its box": 1}),
        ({"bbox": [], "segmentation": [6, 4, 30, 4, 30, 24]}, [BOX], {"polygon turned into its box": 1}),
        ({"bbox": None, "segmentation": {"size": [40, 60], "counts": "x"}}, [],
         {"annotation without bbox and polygon, left out": 1}),
        ({"bbox": None}, [], {"annotation without bbox and polygon, left out": 1}),
        ({"bbox": None, "segmentation": [[1, 2, 3]]}, [], {"annotation without bbox and polygon, left out": 1}),
        ({"bbox": [18, 14, 20, 24, 90]}, [BOX], {"rotated box turned into an upright one": 1}),
        ({"bbox": [5, 5, 0, 9]}, [], {"zero-area box": 1}),
        ({"bbox": [5, 5, -3, 9]}, [], {"box with reversed corners": 1}),
        ({"bbox": [50, 30, 30, 30]}, [[50, 30, 60, 40]], {"box clipped to the image": 1}),
        ({"bbox": [70, 3, 5, 5]}, [], {"box outside the image": 1}),
        ({"image_id": "1", "category_id": "1"}, [BOX], {}),
        ({"iscrowd": 1}, [BOX], {"crowd taken as a difficult object (data.train_on_difficult=false keeps it out of "
                                 "training)": 1}),
    ],
)  # fmt: skip
def test_annotations_become_boxes_and_what_happens_to_them_is_counted(root, fields, boxes, counts):
    (record, other), skips = load(root, changed(**fields))
    np.testing.assert_allclose(record.annotation.boxes, np.reshape(boxes, (-1, 4)), atol=1e-5)
    assert skips.counts == counts
    assert all(images[0] == "images/a" for images in skips.images.values())
    np.testing.assert_array_equal(other.annotation.boxes, [BOX])


@pytest.mark.parametrize("key", ["iscrowd", "ignore", "difficult"])
@pytest.mark.parametrize(
    ("flag", "difficult"),
    [(1, True), (True, True), ("1", True), (0, False), (False, False), ("0", False), ("false", False)],
)
def test_crowds_and_marked_objects_are_difficult(root, key, flag, difficult):
    fields = {"attributes": {"difficult": flag, "colour": "red"}} if key == "difficult" else {key: flag}
    (record, other), skips = load(root, changed(**fields))
    assert (record.annotation.difficult.tolist(), other.annotation.difficult.tolist()) == ([difficult], [False])
    assert len(skips.counts) == (difficult and key == "iscrowd")


def test_a_class_of_two_ids_is_one_and_its_objects_are_counted(root):
    values = coco_of(
        "a.jpg", "b.jpg", boxes=[(6, 4, 24, 20), (1, 1, 9, 9), (2, 2, 9, 9)], categories=("cat", "dog", "cat ")
    )
    records, skips = load(root, values)
    assert [record.annotation.names for record in records] == [("cat", "dog", "cat")] * 2
    assert find_data(root).classes == ("cat", "dog")
    assert skips.images == {
        "object of cat, a name of 2 categories, which are taken as one class": ["images/a"] * 2 + ["images/b"] * 2
    }


def test_a_name_escaped_as_in_a_url_is_the_file_unless_one_is_called_so(root):
    picture(root / "images/my cat (1).jpg"), picture(root / "images/50%25.jpg"), picture(root / "images/50%.jpg")
    records, _ = load(root, coco_of("images/my%20cat%20%281%29.jpg", "50%25.jpg"))
    assert [record.id for record in records] == ["images/my cat (1)", "images/50%25"]


@pytest.mark.parametrize("deep", [True, False])
def test_files_of_parts_of_others_list_the_same_images(tmp_path, deep):
    """A trainval beside train and val, and a subset."""
    names = {"train": ["a.jpg", "b.jpg"], "val": ["c.jpg"]}
    names |= {"trainval": [*names["train"], *names["val"]], "train_mini": ["a.jpg"]}
    for part in ("train", "val"):
        for name in names[part]:
            picture(tmp_path / "images" / (part if deep else "") / name)
    for part, own in names.items():
        coco(tmp_path / f"annotations/instances_{part}.json", coco_of(*own))
    folder = find_data(tmp_path)
    assert {part: [image[-1] for image in folder.contents[part].images] for part in folder.parts} == {
        "train": ["a", "b"], "train_mini": ["a"], "trainval": ["a", "b", "c"], "val": ["c"]
    }  # fmt: skip
    assert folder.left_out.counts == {}
    assert folder.roles() == {"train": ("train",), "val": ("val",), "test": ()}


def test_an_image_that_is_missing_is_not_the_one_of_another_part_however_the_files_lie(tmp_path):
    for part, name in (("train", "a"), ("val", "b"), ("extra", "c")):
        picture(tmp_path / f"images/{part}/{name}.jpg")
    coco(tmp_path / "annotations/train.json", coco_of("a.jpg", "b.jpg", "extra/c.jpg"))
    coco(tmp_path / "annotations/val.json", coco_of("b.jpg"))
    folder = find_data(tmp_path)
    assert [*folder.contents["train"].images] == ["images/train/a", "images/extra/c"]
    assert folder.left_out.images == {"image that is not there, left out": ["b.jpg of annotations/train.json"]}


def test_json_beside_the_data_does_not_matter_unless_it_belongs_to_them(root):
    coco(root / "labels.json", coco_of("a.jpg")), text(root / "package.json", "{")
    folder = find_data(root)
    assert folder.parts == ("all",)
    (note,) = folder.notes
    assert note.startswith(f"left out: {root / 'package.json'}: cannot read this file as JSON")
    text(root / "val.json", "{")
    with pytest.raises(SppnetError, match=r"val\.json: cannot read this file as JSON"):
        find_data(root)
    coco(root / "instances_train.json", coco_of("b.jpg"))  # beside which others do not count, as panoptic.json
    coco(root / "panoptic.json", coco_of("a.jpg") | {"annotations": [{"segments_info": []}]})
    assert (find_data(root).parts, find_data(root).notes) == (("train",), ())
    text(root / "instances_val.json", "{")
    with pytest.raises(SppnetError, match=r"instances_val\.json: cannot read this file as JSON"):
        find_data(root)


def test_images_without_annotations_are_background_and_others_are_left_out_with_a_name(root):
    values = coco_of("a.jpg", "b.jpg", "gone.jpg")
    values["annotations"] = values["annotations"][:1]
    picture(root / "images/new.jpg")
    records, skips = load(root, values)
    assert [len(record.annotation) for record in records] == [1, 0]
    assert skips.counts == {}
    left_out = find_data(root).left_out.images
    assert left_out == {
        "image that is not there, left out": ["gone.jpg of labels.json"],
        "image in no JSON, left out": ["images/new"],
    }


def test_a_list_of_test_images_has_no_annotations(root):
    values = coco_of("a.jpg")
    del values["annotations"]
    records, skips = load(root, values, require=False)
    assert (records[0].annotation, skips.counts) == (None, {"image without annotation, not evaluated": 1})
    with pytest.raises(SppnetError, match=r"labels\.json: no list of annotations, so none of images/a; name a part"):
        load(root, values)


def broken(**lists):
    return coco_of("a.jpg", "b.jpg") | lists


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(image_id=7), r"1 annotation whose image_id it does not list, e\.g\. 7 of annotation 1; listed"),
        (changed(category_id=9), r"1 annotation whose category_id it does not list, e\.g\. 9 of .*; listed"),
        (changed(image_id=None), r"annotations\.0\.image_id.*: Field required, got \{"),
        (changed(bbox=[1, 2, 3]), r"annotation 1 of a\.jpg: bbox must be x, y, width and height, got \[1\.0, 2\.0, 3"),
        (changed(bbox=["x", 2, 3, 4]), r"annotations\.0\.bbox\.0: .*valid number.*got 'x'; correct it"),
        (changed(bbox=[1, 2, 3, float("nan")]), r"annotations\.0\.bbox\.3: "),
        (changed(bbox=[1, 2, 3, 1e30]), r"annotations\.0\.bbox\.3: "),
        (broken(images=[{"id": 1}]), r"images\.0\.file_name: Field required"),
        (broken(images=coco_of("a.jpg")["images"] * 2), r"images: '1' is there twice; give each an id"),
        (coco_of("a.jpg", "images/a.jpg"), r"labels\.json: lists images/a\.jpg twice; merge the entries"),
        (broken(categories=[{"id": 1, "name": " "}]), r"categories\.0\.name: "),
        (broken(categories=coco_of()["categories"] * 2), r"categories: '1' is there twice"),
        (changed(iscrowd="maybe"), r"annotations\.0\.iscrowd: .*boolean.*got 'maybe'; correct it"),
        (changed(ignore=2), r"annotations\.0\.ignore: .*boolean.*got 2; correct it"),
        (coco_of("c.jpg", "d.jpg"), r"labels\.json: none of its 2 images is below .*, e\.g\. c\.jpg; put them there"),
    ],
)  # fmt: skip
def test_a_faulty_file_is_an_error_that_names_the_entry(root, values, message):
    with pytest.raises(SppnetError, match=message):
        load(root, values)


@pytest.mark.parametrize("content", ["", "{", '{"images": [', "\x00", "[" * 100_000])
def test_a_damaged_file_is_an_error(root, content):
    text(root / "labels.json", content)
    with pytest.raises(SppnetError, match=r"labels\.json: cannot read this file as JSON \(.*; export it again"):
        find_data(root)


@pytest.mark.parametrize("values", [[], {}, 3, None, {"images": []}, {"images": {}, "annotations": []}])
def test_json_that_is_no_coco_is_said_to_be_none(root, values):
    assert read_coco(coco(root / "labels.json", values)) is None
    with pytest.raises(
        SppnetError, match=r"no annotated pictures found; looked for VOC .*COCO .*YOLO .*2 images, 1 \.js"
    ):
        find_data(root)
    with pytest.raises(
        SppnetError, match=r"looked for COCO \(\.json files with images, categories and annotations\); f"
    ):
        find_data(root, "coco")


def test_a_file_is_read_again_when_it_changes(root):
    assert load(root, coco_of("a.jpg"))[0][0].annotation.names == ("cat",)
    assert load(root, coco_of("a.jpg", categories=["a dog"]))[0][0].annotation.names == ("a dog",)


def test_a_mark_of_the_byte_order_is_no_damage(root):
    (root / "labels.json").write_text(json.dumps(coco_of("a.jpg")), encoding="utf-8-sig")
    assert len(load_split(root, "all")[0]) == 1


def test_two_images_of_one_name_need_their_folders(root):
    picture(root / "more/a.jpg")
    with pytest.raises(SppnetError, match=r"'a\.jpg' fits images/a\.jpg and more/a\.jpg alike; name the folder too"):
        load(root, coco_of("a.jpg"))
    records, _ = load(root, coco_of("images/a.jpg", "more/a.jpg"))
    assert [record.id for record in records] == ["images/a", "more/a"]


def test_a_missing_image_is_not_taken_from_another_part(tmp_path):
    picture(tmp_path / "train/a.jpg"), picture(tmp_path / "valid/b.jpg")
    for part in ("train", "valid"):
        coco(tmp_path / part / "_annotations.coco.json", coco_of("a.jpg", "b.jpg"))
    assert [[r.id for r in load_split(tmp_path, part)[0]] for part in ("train", "valid")] == [["train/a"], ["valid/b"]]
    assert find_data(tmp_path).left_out.counts == {"image that is not there, left out": 2}


@pytest.mark.parametrize(
    ("size", "box", "expected", "count"),
    [
        ((40, 60), [6, 4, 24, 20], (6, 4, 30, 24), {}),  # stated as upright
        ((60, 40), [6, 4, 24, 20], (16, 6, 36, 30), {"annotation turned with its image (EXIF orientation)": 1}),
    ],
)
def test_boxes_of_a_turned_photo_are_of_the_frame_that_is_stated(root, size, box, expected, count):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 60 × 40, upright 40 × 60
    picture(root / "images/a.jpg", exif=exif)
    values = coco_of("a.jpg", boxes=[box])
    values["images"][0] |= {"width": size[0], "height": size[1]}
    (record,), skips = load(root, values)
    assert record.size == (60, 40)
    np.testing.assert_array_equal(record.annotation.boxes, [expected])
    assert skips.counts == count


def test_palette_and_16_bit_images_are_images_like_others(root):
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save(root / "images/deep.png")
    Image.open(root / "images/a.jpg").convert("P").save(root / "images/few.png")
    records, skips = load(root, coco_of("deep.png", "few.png"))
    assert [record.size for record in records] == [(40, 60)] * 2
    assert all(read_image(record.path).shape == (40, 60, 3) for record in records)
    assert skips.counts == {}
