from pathlib import Path

import numpy as np
import pytest
from defusedxml.ElementTree import parse
from devkit import stated, thing, xml_of

from sppnet.data.voc import read_annotation, write_annotation
from sppnet.errors import SppnetError


def annotated(tmp_path: Path, text: str, size: tuple[int, int] | None = (100, 200)):
    path = tmp_path / "000001.xml"
    path.write_text(text)
    return read_annotation(path, size)


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
    assert skips.counts == {"box with reversed corners": 1, "zero-area box": 2}


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


@pytest.mark.parametrize("size", ["", stated(100, 200)])
def test_without_the_size_of_the_image_boxes_stay_as_they_are(tmp_path, size):
    found, skips = annotated(tmp_path, xml_of(thing("cat", 0, 5, 5000, 6000), size=size), size=None)
    np.testing.assert_array_equal(found.boxes, [[-1, 4, 5000, 6000]])
    assert skips.counts == {}


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
        ("<annotation>", r"000001\.xml: cannot read this annotation as XML .*repair it, save it as UTF-8, or remove"),
        ("", "cannot read this annotation as XML"),
        (BOMB, "cannot read this annotation as XML .*EntitiesForbidden"),
        (FILE_ENTITY, "cannot read this annotation as XML .*EntitiesForbidden"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "cannot read this annotation as XML"),
        ("<html></html>", "expected <annotation> at the top, got <html>; give a PASCAL VOC annotation"),
        (xml_of("<object><bndbox/></object>"), "has no <name>; name its class"),
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
