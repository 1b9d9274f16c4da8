import importlib.util
import os
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
from defusedxml.ElementTree import parse
from PIL import Image

from sppnet.data.voc import (
    annotations_digest,
    choose_classes,
    hold_out,
    load_split,
    load_splits,
    read_annotation,
    read_comp4,
    read_image_set,
    restrict,
    write_annotation,
    write_comp4,
)
from sppnet.errors import SppnetError
from sppnet.records import Annotation, Detections, ImageRecord


def xml_of(*objects: str, size: str = "") -> str:
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def thing(name: str, *corners: object, difficult: int | str | None = 0) -> str:
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    bndbox = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name>{flag}<bndbox>{bndbox}</bndbox></object>"


def stated(height: int, width: int) -> str:
    return f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"


def annotated(tmp_path: Path, text: str, size: tuple[int, int] | None = (100, 200)):
    path = tmp_path / "000001.xml"
    path.write_text(text)
    return read_annotation(path, size)


def make_devkit(root: Path, year: str = "VOC2007", names=("a", "b"), image_set: str = "train", ending=".jpg") -> Path:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / year / folder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(root / year / "JPEGImages" / f"{name}{ending}")
        objects = thing("cat", 1, 1, 10 + number, 20), thing("dog", 5, 5, 40, 30, difficult=1)
        (root / year / "Annotations" / f"{name}.xml").write_text(xml_of(*objects))
    (root / year / "ImageSets/Main" / f"{image_set}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def record(name: str, annotation: Annotation | None = None) -> ImageRecord:
    return ImageRecord(name, Path(f"{name}.jpg"), (30, 40), "0" * 16, annotation)


def things(*names: str) -> Annotation:
    boxes = np.tile(np.float32([1, 2, 3, 4]), (len(names), 1))
    return Annotation(boxes, names, np.zeros(len(names), dtype=bool))


# --- annotations ------------------------------------------------------------------------------------


def test_one_based_inclusive_corners_become_zero_based_and_half_open(tmp_path):
    found, skips = annotated(tmp_path, xml_of(thing("cat", 1, 1, 200, 100), thing("dog", 11, 21, 30, 60, difficult=1)))
    assert found.boxes.dtype == np.float32
    np.testing.assert_array_equal(found.boxes, [[0, 0, 200, 100], [10, 20, 30, 60]])
    assert found.names == ("cat", "dog")
    assert found.difficult.tolist() == [False, True]
    assert skips.counts == {}


def test_an_image_without_objects_is_ordinary(tmp_path):
    found, skips = annotated(tmp_path, xml_of())
    assert found.boxes.shape == (0, 4)
    assert found.names == ()
    assert found.difficult.shape == (0,)
    assert skips.counts == {}


def test_fractions_are_kept_and_a_missing_difficult_is_no(tmp_path):
    found, _ = annotated(tmp_path, xml_of(thing("cat", 1.5, 2.25, 30.5, 40, difficult=None)))
    np.testing.assert_array_equal(found.boxes, [[0.5, 1.25, 30.5, 40]])
    assert not found.difficult[0]


def test_zero_area_boxes_are_skipped_and_counted(tmp_path):
    boxes = ((50, 50, 50, 50), (9, 9, 8, 20), (9, 9, 20, 9), (10, 10, 11, 11))
    found, skips = annotated(tmp_path, xml_of(*(thing("cat", *box) for box in boxes)))
    np.testing.assert_array_equal(found.boxes, [[9, 9, 11, 11]])
    assert skips.counts == {"zero-area box": 3}


def test_a_side_of_one_pixel_counts_as_no_area_and_one_of_two_as_a_box(tmp_path):
    path = tmp_path / "a.xml"
    write_annotation(path, (100, 200), [[7, 5, 8, 40], [7, 5, 40, 6], [7, 5, 9, 7]], ["cat"] * 3, [False] * 3)
    assert "<xmin>8</xmin><ymin>6</ymin><xmax>8</xmax><ymax>40</ymax>" in path.read_text()
    found, skips = read_annotation(path, (100, 200))
    np.testing.assert_array_equal(found.boxes, [[7, 5, 9, 7]])
    assert skips.counts == {"zero-area box": 2}


def test_boxes_beyond_the_edge_are_clipped_or_skipped_and_counted(tmp_path):
    boxes = ((0, 0, 20, 20), (150, 50, 250, 130), (201, 1, 220, 10), (-30, -30, 0, 0), (1, 1, 200, 100))
    found, skips = annotated(tmp_path, xml_of(*(thing("cat", *box) for box in boxes)))
    np.testing.assert_array_equal(found.boxes, [[0, 0, 20, 20], [149, 49, 200, 100], [0, 0, 200, 100]])
    assert skips.counts == {"box clipped to the image": 2, "box outside the image": 2}


@pytest.mark.parametrize("size", ["", stated(100, 200), stated(200, 100), stated(1, 1), stated(0, 0)])
def test_without_a_size_objects_are_as_they_are_written_whatever_size_is_stated(tmp_path, size):
    boxes = ((0, 5, 5000, 6000), (7, 5, 7, 60), (-3, 5, 9, 5), (9, 9, 8, 20), (9, 9, 20, 7), (150, 150, 160, 160))
    found, skips = annotated(tmp_path, xml_of(*(thing("cat", *box) for box in boxes), size=size), size=None)
    np.testing.assert_array_equal(
        found.boxes, [[-1, 4, 5000, 6000], [6, 4, 7, 60], [-4, 4, 9, 5], [149, 149, 160, 160]]
    )
    assert skips.counts == {"box with reversed corners": 2}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (stated(100, 200), 0),
        (stated(200, 100), 1),
        (stated(0, 0), 0),
        ("<size/>", 0),
        ("<size><width>x</width></size>", 0),
    ],
)
def test_the_size_of_the_image_wins_over_the_stated_one(tmp_path, text, count):
    found, skips = annotated(tmp_path, xml_of(thing("cat", 1, 1, 200, 100), size=text))
    np.testing.assert_array_equal(found.boxes, [[0, 0, 200, 100]])
    assert skips.counts.get("annotation size disagrees with the image", 0) == count


def test_boxes_of_parts_are_not_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part>"
    person = thing("person", 11, 11, 20, 20).replace("<bndbox>", part + "<bndbox>", 1)
    found, _ = annotated(tmp_path, xml_of(person))
    assert found.names == ("person",)
    np.testing.assert_array_equal(found.boxes, [[10, 10, 20, 20]])


BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'
FILE_ENTITY = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", r"000001\.xml: cannot read this annotation as XML .*repair or remove"),
        ("", "cannot read this annotation as XML"),
        (BOMB, "cannot read this annotation as XML .*EntitiesForbidden"),
        (FILE_ENTITY, "cannot read this annotation as XML .*EntitiesForbidden"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "cannot read this annotation as XML"),
        ("<html></html>", "expected <annotation> at the top, got <html>; give a PASCAL VOC annotation"),
        (xml_of("<object><bndbox/></object>"), "has no <name>; name its class"),
        (xml_of(thing("a/b", 1, 1, 5, 5)), "class 'a/b' cannot be part of a file name; rename it"),
        (xml_of("<object><name>cat</name></object>"), "object 'cat' has no <bndbox>; add its box"),
        (xml_of(thing("cat", "left", 1, 5, 5)), "<xmin> of object 'cat' must be a number, got 'left'; correct the box"),
        (xml_of(thing("cat", 1, "", 5, 5)), "<ymin> of object 'cat' must be a number"),
        (xml_of(thing("cat", 1, 1, "nan", 5)), "<xmax> of object 'cat' must be a number, got 'nan'"),
        (xml_of(thing("cat", 1, 1, 5, "1e400")), "<ymax> of object 'cat' must be a number"),
        (xml_of(thing("cat", 1, 1, 5, 5, difficult="yes")), "<difficult> of object 'cat' must be 0 or 1, got 'yes'"),
    ],
)
def test_a_damaged_annotation_is_an_error_that_names_the_file(tmp_path, text, message):
    with pytest.raises(SppnetError, match=message) as raised:
        annotated(tmp_path, text)
    assert str(tmp_path / "000001.xml") in str(raised.value)


def test_a_missing_annotation_is_an_error(tmp_path):
    with pytest.raises(SppnetError, match=r"gone\.xml: no such annotation file; add it or take the image out"):
        read_annotation(tmp_path / "gone.xml")


def test_deeply_nested_xml_does_no_harm(tmp_path):
    found, _ = annotated(tmp_path, "<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>")
    assert found.names == ()


def test_a_written_annotation_reads_back_the_same(tmp_path):
    path = tmp_path / "VOC2007" / "Annotations" / "x.xml"
    boxes = [[0, 0, 200, 100], [10.5, 20, 30, 60.25]]
    write_annotation(path, (100, 200), boxes, ("a & <b>", "dog"), (False, True))
    found, skips = read_annotation(path, (100, 200))
    np.testing.assert_array_equal(found.boxes, boxes)
    assert found.names == ("a & <b>", "dog")
    assert found.difficult.tolist() == [False, True]
    assert skips.counts == {}
    root = parse(path).getroot()
    assert [root.find("object/bndbox").findtext(tag) for tag in ("xmin", "ymin", "xmax", "ymax")] == [
        "1",
        "1",
        "200",
        "100",
    ]


def test_an_annotation_without_objects_is_written_and_read(tmp_path):
    write_annotation(tmp_path / "x.xml", (10, 20), [], (), ())
    assert read_annotation(tmp_path / "x.xml", (10, 20))[0].boxes.shape == (0, 4)


# --- image sets and splits --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"000001\n000002\n", ["000001", "000002"]),
        (b"000002  1\r\n000001 -1\r\n\r\n000003  0", ["000002", "000001", "000003"]),
        (b"\xef\xbb\xbf000001\n", ["000001"]),
        (b"my photo\nother\n", ["my photo", "other"]),
        (b"", []),
    ],
)
def test_image_sets_have_one_or_two_columns(tmp_path, content, names):
    (tmp_path / "set.txt").write_bytes(content)
    assert read_image_set(tmp_path / "set.txt") == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\na 1\n", r"set\.txt:3: 'a' is already on line 1; remove one"),
        (b"a\n../b\n", r"set\.txt:2: expected a file name without folder, got '\.\./b'"),
        (b"..\n", r"set\.txt:1: expected a file name without folder"),
        (b"C:\\b\n", "expected a file name without folder"),
        (b"\xff\xfe\n", "cannot read this text file .*give an existing UTF-8 file"),
    ],
)
def test_a_faulty_image_set_is_an_error_that_names_the_line(tmp_path, content, message):
    (tmp_path / "set.txt").write_bytes(content)
    with pytest.raises(SppnetError, match=message):
        read_image_set(tmp_path / "set.txt")


def test_a_split_holds_its_images_in_the_order_of_the_set(tmp_path):
    make_devkit(tmp_path, names=("b", "a"))
    records, skips = load_split(tmp_path, "VOC2007/train")
    assert [record.id for record in records] == ["VOC2007/b", "VOC2007/a"]
    assert records[0].path == tmp_path / "VOC2007" / "JPEGImages" / "b.jpg"
    assert records[0].size == (30, 40)
    assert len(records[0].digest) == 16
    assert records[0].digest != records[1].digest
    np.testing.assert_array_equal(records[1].annotation.boxes, [[0, 0, 11, 20], [4, 4, 40, 30]])
    assert skips.counts == {}


@pytest.mark.parametrize("ending", [".jpeg", ".JPG", ".png", ".PNG", ".bmp", ".webp"])
def test_images_may_have_other_endings(tmp_path, ending):
    make_devkit(tmp_path, ending=ending)
    records, _ = load_split(tmp_path, "VOC2007/train")
    assert [record.path.name for record in records] == [f"a{ending}", f"b{ending}"]


def test_of_several_files_with_one_id_the_jpeg_is_taken(tmp_path):
    make_devkit(tmp_path, ending=".png")
    make_devkit(tmp_path, ending=".jpg")
    assert load_split(tmp_path, "VOC2007/train")[0][0].path.name == "a.jpg"


def test_the_file_name_in_an_annotation_is_never_followed(tmp_path):
    make_devkit(tmp_path, names=("a",))
    text = xml_of("<filename>/etc/passwd</filename><path>/etc/passwd</path>", thing("cat", 1, 1, 5, 5))
    (tmp_path / "VOC2007/Annotations/a.xml").write_text(text)
    assert load_split(tmp_path, "VOC2007/train")[0][0].path.name == "a.jpg"


def test_an_image_stored_sideways_has_the_size_of_the_upright_one(tmp_path):
    make_devkit(tmp_path, names=("a",))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "VOC2007/JPEGImages/a.jpg", exif=exif)
    text = xml_of(thing("cat", 1, 1, 30, 40), size=stated(30, 40))
    (tmp_path / "VOC2007/Annotations/a.xml").write_text(text)
    records, skips = load_split(tmp_path, "VOC2007/train")
    assert records[0].size == (40, 30)
    np.testing.assert_array_equal(records[0].annotation.boxes, [[0, 0, 30, 40]])
    assert skips.counts == {"annotation size disagrees with the image": 1}


def test_skips_are_summed_over_the_images(tmp_path):
    make_devkit(tmp_path, names=("a", "b"))
    for name in ("a", "b"):
        (tmp_path / f"VOC2007/Annotations/{name}.xml").write_text(xml_of(thing("cat", 5, 5, 5, 5)))
    assert load_split(tmp_path, "VOC2007/train")[1].counts == {"zero-area box": 2}


def test_restricting_to_classes_drops_the_objects_of_all_others(tmp_path):
    make_devkit(tmp_path)
    records = restrict(load_split(tmp_path, "VOC2007/train")[0], ("dog",))
    assert [record.annotation.names for record in records] == [("dog",), ("dog",)]


def test_a_test_split_may_lack_annotations(tmp_path):
    make_devkit(tmp_path)
    (tmp_path / "VOC2007/Annotations/a.xml").unlink()
    records, skips = load_split(tmp_path, "VOC2007/train", require_annotations=False)
    assert skips.counts == {"image without annotation, not evaluated": 1}
    assert records[0].annotation is None
    assert records[1].annotation is not None
    with pytest.raises(SppnetError, match=r"a\.xml: no such annotation file"):
        load_split(tmp_path, "VOC2007/train")


def test_a_missing_set_names_those_that_exist(tmp_path):
    make_devkit(make_devkit(tmp_path, image_set="train"), year="VOC2012", image_set="val")
    message = r"test\.txt: no such image set for split 'VOC2007/test'; splits here: VOC2007/train, VOC2012/val"
    with pytest.raises(SppnetError, match=message):
        load_split(tmp_path, "VOC2007/test")


def test_a_root_above_the_devkit_is_pointed_out(tmp_path):
    make_devkit(tmp_path / "VOCdevkit")
    with pytest.raises(SppnetError, match=r"no such image set .*; set data\.root=.*VOCdevkit"):
        load_split(tmp_path, "VOC2007/train")


@pytest.mark.parametrize("split", ["train", "VOC2007/", "a/b/c", "../train", "/train"])
def test_a_split_is_a_year_folder_and_a_set(tmp_path, split):
    with pytest.raises(SppnetError, match=r"expected <year folder>/<set>, e\.g\. VOC2007/trainval"):
        load_split(tmp_path, split)


def test_a_missing_root_is_an_error(tmp_path):
    with pytest.raises(SppnetError, match=r"gone: no such data folder; see data/README\.md"):
        load_split(tmp_path / "gone", "VOC2007/train")


def test_an_empty_set_is_an_error(tmp_path):
    make_devkit(tmp_path, names=())
    with pytest.raises(SppnetError, match=r"train\.txt: lists no image; write one image id per line"):
        load_split(tmp_path, "VOC2007/train")


def test_missing_images_are_an_error_that_names_the_first_and_counts_them(tmp_path):
    make_devkit(tmp_path)
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text("a\nc\nd.jpg\n")
    with pytest.raises(
        SppnetError, match=r"JPEGImages/c: no such image .*one of 2 missing of the 3 in .*without the ending"
    ):
        load_split(tmp_path, "VOC2007/train")


def test_an_image_that_is_none_is_an_error_that_names_it(tmp_path):
    make_devkit(tmp_path)
    (tmp_path / "VOC2007/JPEGImages/b.jpg").write_bytes(b"not an image")
    with pytest.raises(SppnetError, match=r"an image of the data set cannot be used: .*b\.jpg"):
        load_split(tmp_path, "VOC2007/train")


def test_several_splits_follow_one_another(tmp_path):
    make_devkit(make_devkit(tmp_path), year="VOC2012", names=("a",))
    records, _ = load_splits(tmp_path, ("VOC2007/train", "VOC2012/train"))
    assert [record.id for record in records] == ["VOC2007/a", "VOC2007/b", "VOC2012/a"]
    assert load_splits(tmp_path, ())[0] == []


def test_an_image_in_two_splits_is_an_error(tmp_path):
    make_devkit(make_devkit(tmp_path), names=("b",), image_set="val")
    with pytest.raises(SppnetError, match="image VOC2007/b is in VOC2007/train and in VOC2007/val"):
        load_splits(tmp_path, ("VOC2007/train", "VOC2007/val"))


# --- records ----------------------------------------------------------------------------------------


def test_classes_are_discovered_sorted():
    records = [record("1", things("dog", "cat")), record("2"), record("3", things("ant"))]
    assert choose_classes(records, None) == ("ant", "cat", "dog")
    assert choose_classes(records, ("dog", "ant")) == ("dog", "ant")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "horse"), "class 'horse' never occurs; classes found in the training images: cat, dog"),
        (("cat", "cat"), "names 'cat' twice; name each class once"),
        ((), "no class to train; classes found in the training images: cat, dog"),
    ],
)
def test_classes_that_cannot_be_trained_are_an_error(classes, message):
    with pytest.raises(SppnetError, match=message):
        choose_classes([record("1", things("dog", "cat"))], classes)


def test_no_objects_at_all_are_an_error():
    with pytest.raises(SppnetError, match="no class to train; classes found in the training images: none"):
        choose_classes([record("1", things())], None)


def test_restricting_keeps_every_image():
    restricted = restrict([record("1", things("dog", "cat")), record("2"), record("3", things("cat"))], ("dog",))
    assert [r.id for r in restricted] == ["1", "2", "3"]
    assert restricted[0].annotation.names == ("dog",)
    assert restricted[1].annotation is None
    assert restricted[2].annotation.boxes.shape == (0, 4)


def test_holding_out_depends_on_seed_and_ids_alone():
    records = [record(f"VOC2007/{number:06}") for number in range(50)]
    train, held = hold_out(records, 0.2, seed=0)
    assert (len(train), len(held)) == (40, 10)
    assert sorted(r.id for r in [*train, *held]) == [r.id for r in records]
    assert [r.id for r in held] == sorted(r.id for r in held)
    shuffled = hold_out(records[::-1], 0.2, seed=0)[1]
    assert {r.id for r in shuffled} == {r.id for r in held}
    assert {r.id for r in hold_out(records, 0.2, seed=1)[1]} != {r.id for r in held}


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.99, 2)])
def test_holding_out_leaves_an_image_on_either_side(share, count):
    assert len(hold_out([record("1"), record("2"), record("3")], share)[1]) == count


@pytest.mark.parametrize(("share", "images"), [(0.0, 5), (1.0, 5), (0.5, 1), (0.5, 0)])
def test_holding_out_needs_a_share_and_two_images(share, images):
    message = (
        f"expected a held-out share between 0 and 1 and at least 2 images, got {share} and {images}; set data.holdout"
    )
    with pytest.raises(SppnetError, match=message):
        hold_out([record(str(number)) for number in range(images)], share)


def test_the_digest_covers_everything_that_training_sees():
    def digest(image="0" * 16, box=1.0, names=("cat", "dog"), difficult=False, classes=("cat",), image_id="1"):
        boxes = np.float32([[box, 2, 3, 4], [5, 6, 7, 8]])
        annotation = Annotation(boxes, names, np.array([difficult, False]))
        return annotations_digest([ImageRecord(image_id, Path("x"), (9, 9), image, annotation)], classes)

    digests = [digest(), digest(image="1" * 16), digest(box=1.5), digest(difficult=True), digest(image_id="2")]
    digests += [digest(classes=("cat", "dog")), digest(names=("dog", "cat")), annotations_digest([], ("cat",))]
    assert len(set(digests)) == len(digests)
    assert digest() == digest()
    assert digest(names=("cat", "cow")) == digest()  # objects of other classes are not seen
    assert len(annotations_digest([record("1")], ("cat",))) == 16


# --- detections -------------------------------------------------------------------------------------


def detections(boxes, scores, labels, classes=("cat", "dog")) -> Detections:
    boxes = np.float32(boxes).reshape(-1, 4)
    return Detections(boxes, np.float32(scores), np.int64(labels), classes)


def test_comp4_files_hold_one_based_inclusive_corners(tmp_path):
    found = {
        "VOC2007/000002": detections([[0, 0, 10, 20], [1.5, 2, 3, 4]], [0.5, -1.25], [1, 0]),
        "VOC2007/000001": detections([], [], []),
    }
    paths = write_comp4(tmp_path / "results", "test", found, ("cat", "dog", "emu"))
    assert [path.name for path in paths] == [f"comp4_det_test_{name}.txt" for name in ("cat", "dog", "emu")]
    assert paths[0].read_text() == "000002 -1.250000000 2.500000 3.000000 3.000000 4.000000\n"
    assert paths[1].read_text() == "000002 0.500000000 1.000000 1.000000 10.000000 20.000000\n"
    assert paths[2].read_text() == ""


def test_detections_written_and_read_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (40, 2, 2)).cumsum(axis=1)
    found = detections(corners.reshape(40, 4), rng.normal(size=40), np.zeros(40), classes=("dog",))
    path = write_comp4(tmp_path, "val", {"VOC2012/my photo": found}, ("dog",))[0]
    stems, scores, boxes = read_comp4(path)
    assert stems == ["my photo"] * 40
    np.testing.assert_array_equal(scores.astype(np.float32).argsort(), found.scores.argsort())
    np.testing.assert_allclose(scores, found.scores, atol=1e-9)
    np.testing.assert_allclose(boxes, found.boxes, atol=1e-6)


def test_an_empty_comp4_file_holds_no_detections(tmp_path):
    (tmp_path / "x.txt").write_text("\n")
    stems, scores, boxes = read_comp4(tmp_path / "x.txt")
    assert (stems, scores.shape, boxes.shape) == ([], (0,), (0, 4))


@pytest.mark.parametrize("line", ["000001 0.5 1 2 3", "000001 0.5 1 2 3 x", "000001 nan 1 2 3 4", "000001"])
def test_a_faulty_comp4_line_is_named(tmp_path, line):
    (tmp_path / "x.txt").write_text(f"000001 0.5 1 2 3 4\n{line}\n")
    with pytest.raises(SppnetError, match=r"x\.txt:2: expected 'id score xmin ymin xmax ymax', got .*; correct it"):
        read_comp4(tmp_path / "x.txt")


def test_a_missing_comp4_file_is_an_error(tmp_path):
    with pytest.raises(SppnetError, match="cannot read this text file"):
        read_comp4(tmp_path / "gone.txt")


def test_stems_of_two_years_do_not_mix_in_one_file(tmp_path):
    found = {"VOC2007/1": detections([], [], []), "VOC2012/1": detections([], [], [])}
    with pytest.raises(SppnetError, match="'1' occurs twice; write each year by itself"):
        write_comp4(tmp_path, "test", found, ("cat",))


# --- real data --------------------------------------------------------------------------------------


@pytest.mark.shared_data
def test_the_devkit_files_of_the_conformance_data_are_read(shared):
    folder = shared / "golden" / "voc_ap"
    ids = read_image_set(folder / "ImageSets/Main/test.txt")
    assert (len(ids), ids[0]) == (60, "070000")
    found, _ = read_annotation(folder / "Annotations" / "070000.xml")
    np.testing.assert_array_equal(found.boxes[0], [274, 181, 434, 352])
    stems, scores, boxes = read_comp4(folder / "comp4_det_test_bird.txt")
    assert (stems[0], scores[0]) == ("070000", 0.381629)
    np.testing.assert_allclose(boxes[0], [373.529, 251.84, 432.303, 341.427])


@pytest.mark.shared_data
def test_the_real_splits_are_read_completely_and_quickly(shared):
    start = time.perf_counter()
    records, skips = load_splits(shared / "voc" / "VOCdevkit", ("VOC2007/train", "VOC2012/train"))
    assert time.perf_counter() - start < 10  # half a second on an idle machine
    assert (len(records), skips.counts) == (2052, {})
    assert {"bus", "car", "cat", "cow", "dog", "horse", "person", "sheep", "train"} <= set(
        choose_classes(records, None)
    )


@pytest.mark.shared_data
def test_the_two_zero_area_boxes_of_the_blood_cells_are_counted(shared):
    records, skips = load_split(shared / "bccd" / "VOCdevkit", "VOC2007/trainval")
    assert (len(records), skips.counts) == (364, {"zero-area box": 2})
    assert choose_classes(records, None) == ("Platelets", "RBC", "WBC")


# --- scripts/fetch_voc ------------------------------------------------------------------------------


@pytest.fixture
def fetch_voc(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = str(Path(__file__).parents[2] / "scripts" / "fetch_voc")
    assert os.access(path, os.X_OK)
    spec = importlib.util.spec_from_loader("fetch_voc", SourceFileLoader("fetch_voc", path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_connection_fetching_says_where_the_data_comes_from(fetch_voc, tmp_path, monkeypatch, capsys):
    def offline(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(fetch_voc, "VOCDetection", offline)
    assert fetch_voc.main(["--root", str(tmp_path), "--years", "2007"]) == 1
    message = capsys.readouterr().err
    assert "cannot fetch VOC2007 trainval: <urlopen error Name or service not known>" in message
    assert "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar" in message
    assert f"below {tmp_path}:\n  VOCdevkit/VOC2007/{{JPEGImages,Annotations,ImageSets/Main}}" in message


def test_fetching_unpacks_each_archive_once_and_removes_it(fetch_voc, tmp_path, monkeypatch):
    calls = []

    def download(root: Path, year: str, image_set: str, download: bool) -> None:
        calls.append((year, image_set))
        make_devkit(root / "VOCdevkit", f"VOC{year}", (f"{image_set}1",), image_set)
        (root / fetch_voc.archive(year, image_set)["filename"]).touch()

    monkeypatch.setattr(fetch_voc, "VOCDetection", download)
    assert fetch_voc.main(["--root", str(tmp_path)]) == 0
    assert calls == [("2007", "trainval"), ("2007", "test"), ("2012", "trainval")]
    assert [path.name for path in tmp_path.iterdir()] == ["VOCdevkit"]
    assert len(load_splits(tmp_path / "VOCdevkit", ("VOC2007/trainval", "VOC2007/test", "VOC2012/trainval"))[0]) == 3
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/test1.jpg").unlink()  # an interrupted run is taken up again
    assert fetch_voc.main(["--root", str(tmp_path)]) == 0
    assert calls[3:] == [("2007", "test")]


def test_an_archive_that_lacks_images_is_not_taken_for_complete(fetch_voc, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_voc, "VOCDetection", lambda *_, **__: None)
    assert fetch_voc.main(["--root", str(tmp_path), "--years", "2012"]) == 1
    assert "images or annotations of trainval are missing" in capsys.readouterr().err
