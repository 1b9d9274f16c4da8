import unicodedata
from pathlib import Path

import numpy as np
import pytest
from defusedxml.ElementTree import parse
from devkit import stated, thing, xml_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sppnet.data.voc import read_annotation, write_annotation
from sppnet.errors import SppnetError
from sppnet.images import image_header, read_image


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
    assert skips == {}


def test_an_image_without_objects_is_ordinary(tmp_path):
    found, skips = annotated(tmp_path, xml_of())
    assert found.boxes.shape == (0, 4)
    assert found.names == ()
    assert found.difficult.shape == (0,)
    assert skips == {}


def test_fractions_are_kept_and_a_missing_difficult_is_no(tmp_path):
    found, _ = annotated(tmp_path, xml_of(thing("cat", 1.5, 2.25, 30.5, 40, difficult=None)))
    np.testing.assert_array_equal(found.boxes, [[0.5, 1.25, 30.5, 40]])
    assert not found.difficult[0]


def test_zero_area_boxes_are_skipped_and_counted(tmp_path):
    boxes = ((50, 50, 50, 50), (9, 9, 8, 20), (9, 9, 20, 9), (10, 10, 11, 11))
    found, skips = annotated(tmp_path, xml_of(*(thing("cat", *box) for box in boxes)))
    np.testing.assert_array_equal(found.boxes, [[9, 9, 11, 11]])
    assert skips == {"zero-area box": 3}


def test_a_side_of_one_pixel_counts_as_no_area_and_one_of_two_as_a_box(tmp_path):
    path = tmp_path / "a.xml"
    write_annotation(path, (100, 200), [[7, 5, 8, 40], [7, 5, 40, 6], [7, 5, 9, 7]], ["cat"] * 3, [False] * 3)
    assert "<xmin>8</xmin><ymin>6</ymin><xmax>8</xmax><ymax>40</ymax>" in path.read_text()
    found, skips = read_annotation(path, (100, 200))
    np.testing.assert_array_equal(found.boxes, [[7, 5, 9, 7]])
    assert skips == {"zero-area box": 2}


def test_boxes_beyond_the_edge_are_clipped_or_skipped_and_counted(tmp_path):
    boxes = ((0, 0, 20, 20), (150, 50, 250, 130), (201, 1, 220, 10), (-30, -30, 0, 0), (1, 1, 200, 100))
    found, skips = annotated(tmp_path, xml_of(*(thing("cat", *box) for box in boxes)))
    np.testing.assert_array_equal(found.boxes, [[0, 0, 20, 20], [149, 49, 200, 100], [0, 0, 200, 100]])
    assert skips == {"box clipped to the image": 2, "box outside the image": 2}


@pytest.mark.parametrize("size", ["", stated(100, 200), stated(200, 100), stated(1, 1), stated(0, 0)])
def test_without_a_size_objects_are_as_they_are_written_whatever_size_is_stated(tmp_path, size):
    boxes = ((0, 5, 5000, 6000), (7, 5, 7, 60), (-3, 5, 9, 5), (9, 9, 8, 20), (9, 9, 20, 7), (150, 150, 160, 160))
    found, skips = annotated(tmp_path, xml_of(*(thing("cat", *box) for box in boxes), size=size), size=None)
    np.testing.assert_array_equal(
        found.boxes, [[-1, 4, 5000, 6000], [6, 4, 7, 60], [-4, 4, 9, 5], [149, 149, 160, 160]]
    )
    assert skips == {"box with reversed corners": 2}


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
    assert skips.get("annotation size disagrees with the image", 0) == count


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
    assert skips == {}
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


# --- pictures that EXIF turns


def turned(tmp_path: Path, orientation: int, box, stored=(60, 90), size: str | None = None):
    """What is read of an annotation with one half-open `box` on a picture of `stored` (height, width), and its pixels.

    The second value is the box of the bright pixels of the upright image: what Pillow makes of the same picture.
    """
    x1, y1, x2, y2 = box
    pixels = np.zeros((*stored, 3), np.uint8)
    pixels[y1:y2, x1:x2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "p.png", exif=exif)
    rows, columns = np.nonzero(read_image(tmp_path / "p.png")[:, :, 0])
    text = xml_of(thing("cat", x1 + 1, y1 + 1, x2, y2), size=stated(*stored) if size is None else size)
    (tmp_path / "p.xml").write_text(text)
    found, skips = read_annotation(tmp_path / "p.xml", *image_header(tmp_path / "p.png"))
    return found.boxes[0].tolist(), [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], skips


TURNED = {"annotation turned with its image (EXIF orientation)": 1}
UNKNOWN = {"image with EXIF orientation, boxes taken as drawn upright: its <size> does not tell": 1}


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("stored", [(60, 90), (90, 60)])
def test_boxes_drawn_on_the_stored_picture_are_turned_with_it(tmp_path, orientation, stored):
    box, bright, counts = turned(tmp_path, orientation, (10, 20, 45, 32), stored)
    assert box == bright
    assert counts == TURNED


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_without_a_size_the_frame_that_the_boxes_fit_tells_how_they_were_drawn(tmp_path, orientation):
    box, bright, counts = turned(tmp_path, orientation, (10, 20, 85, 32), size="")
    assert (box, counts) == (bright, TURNED)
    box, _, counts = turned(tmp_path, orientation, (10, 20, 32, 59), (90, 60), size=stated(60, 90))
    assert (box, counts) == ([10, 20, 32, 59], {})  # stated upright
    box, _, counts = turned(tmp_path, orientation, (10, 20, 45, 32), size="")
    assert (box, counts) == ([10, 20, 45, 32], UNKNOWN)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize(("stored", "box"), [((60, 90), (62, 20, 85, 32)), ((90, 60), (5, 70, 50, 88))])
def test_boxes_that_fit_the_stored_picture_alone_are_turned_though_the_size_is_upright(
    tmp_path, orientation, stored, box
):
    found, bright, counts = turned(tmp_path, orientation, box, stored, size=stated(*stored[::-1]))
    assert (found, counts) == (bright, TURNED)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_box_that_only_overshoots_the_upright_picture_is_clipped_and_turns_none(tmp_path, orientation):
    found, _, counts = turned(tmp_path, orientation, (30, 20, 65, 32), (60, 90), size=stated(90, 60))
    assert (found, counts) == ([30, 20, 60, 32], {"box clipped to the image": 1})


@pytest.mark.parametrize(("orientation", "stored"), [(2, (60, 90)), (3, (60, 90)), (4, (90, 60)), (6, (70, 70))])
def test_where_both_frames_have_one_size_the_orientation_is_counted(tmp_path, orientation, stored):
    box, _, counts = turned(tmp_path, orientation, (10, 20, 45, 32), stored)
    assert (box, counts) == ([10, 20, 45, 32], UNKNOWN)


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_a_picture_that_is_not_turned_is_ordinary(tmp_path, orientation):
    box, bright, counts = turned(tmp_path, orientation, (10, 20, 45, 32))
    assert (box, counts) == (bright, {})


# --- what people write


@pytest.mark.parametrize(
    ("text", "flag"), [("", 0), (None, 0), ("Unspecified", 0), (" 1 ", 1), ("0", 0), ("true", 1), ("False", 0)]
)
def test_difficult_is_read_as_people_write_it(tmp_path, text, flag):
    assert annotated(tmp_path, xml_of(thing("cat", 1, 1, 5, 5, difficult=text)))[0].difficult.tolist() == [flag]


def test_numbers_may_have_signs_exponents_and_blanks(tmp_path):
    found, skips = annotated(tmp_path, xml_of(thing("cat", " 1e1 ", "+2", "5.5e+1", "-0"), thing("dog", -9, 1, 5, 5)))
    np.testing.assert_array_equal(found.boxes, [[0, 0, 5, 5]])
    assert skips == {"box with reversed corners": 1, "box clipped to the image": 1}


@pytest.mark.parametrize("value", ["1_0", "inf", "-inf", "NaN", "1,5", "0x10", "1e12", "１ ２", "--1"])
def test_what_is_no_number_is_an_error_that_names_the_file(tmp_path, value):
    with pytest.raises(SppnetError, match=r"000001\.xml: <xmax> of object 'cat' must be a number"):
        annotated(tmp_path, xml_of(thing("cat", 1, 1, value, 5)))


def test_an_object_that_is_there_twice_counts_once(tmp_path):
    text = xml_of(thing("cat", 1, 1, 5, 5), thing("dog", 1, 1, 5, 5), thing(" cat ", "1.0", 1, 5, 5, difficult=1))
    found, skips = annotated(tmp_path, text)
    assert found.names == ("cat", "dog")
    assert not found.difficult.any()
    assert skips == {"object annotated twice": 1}
    assert read_annotation(tmp_path / "000001.xml")[0].names == ("cat", "dog", "cat")  # as the devkit reads it


def test_without_a_size_every_object_counts_as_in_the_devkit(tmp_path):
    boxes = ((50, 50, 50, 50), (900, 900, 950, 950), (9, 9, 5, 20))
    found, skips = annotated(tmp_path, xml_of(*(thing("cat", *box) for box in boxes)), size=None)
    np.testing.assert_array_equal(found.boxes, np.array(boxes[:2]) - [1, 1, 0, 0])
    assert skips == {"box with reversed corners": 1}


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "big5", "utf-16", "iso-8859-1", "windows-1251", "utf-8-sig"])
def test_annotations_in_other_encodings_are_read_where_they_say_so(tmp_path, encoding):
    name = {"iso-8859-1": "Bär", "windows-1251": "кот"}.get(encoding, "人")
    text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n' + xml_of(thing(name, 1, 1, 5, 5))
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert read_annotation(tmp_path / "a.xml", (10, 10))[0].names == (name,)
    (tmp_path / "b.xml").write_bytes(xml_of(thing("é", 1, 1, 5, 5)).encode("iso-8859-1"))
    with pytest.raises(SppnetError, match=r"b\.xml: cannot read this annotation as XML .*save it as UTF-8"):
        read_annotation(tmp_path / "b.xml")


def test_class_names_have_one_form_of_unicode(tmp_path):
    found, _ = annotated(tmp_path, xml_of(*(thing(f" {unicodedata.normalize(f, 'bär')}\n", 1, 1, 5, 5) for f in FORMS)))
    assert found.names == ("bär",)  # one object, there twice


FORMS = ("NFC", "NFD")
LETTERS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), min_size=1, max_size=12)


@given(
    st.lists(st.tuples(*[st.integers(0, 97)] * 2, *[st.integers(2, 100)] * 2, LETTERS, st.booleans()), max_size=6),
)
def test_annotations_are_read_as_they_were_written(tmp_path_factory, objects):
    path = tmp_path_factory.getbasetemp() / "round.xml"
    objects = [(x, y, min(x + w, 100), min(y + h, 100), " ".join(name.split()), d) for x, y, w, h, name, d in objects]
    objects = [row for row in {row[:5]: row for row in objects}.values() if row[4]]
    write_annotation(path, (100, 100), [row[:4] for row in objects], [r[4] for r in objects], [r[5] for r in objects])
    found, skips = read_annotation(path, (100, 100))
    expected = list({(unicodedata.normalize("NFC", row[4]), row[:4]): row for row in reversed(objects)}.values())[::-1]
    assert found.boxes.tolist() == [[float(x) for x in row[:4]] for row in expected]
    assert found.names == tuple(unicodedata.normalize("NFC", row[4]) for row in expected)
    assert found.difficult.tolist() == [row[5] for row in expected]
    assert set(skips) <= {"object annotated twice"}


TAGS = ("annotation", "object", "name", "bndbox", "xmin", "xmax", "ymin", "ymax", "difficult", "size", "width", "!--")
PIECES = st.one_of(
    st.sampled_from([f"<{t}>" for t in TAGS] + [f"</{t}>" for t in TAGS] + ["<annotation/>", "&lt;", "7"]),
    st.text(max_size=5),
)


@given(st.one_of(st.binary(max_size=80), st.lists(PIECES, max_size=25).map("".join)), st.booleans())
def test_no_garbage_ends_in_anything_but_an_error_with_the_name_of_the_file(tmp_path_factory, content, inside):
    path = tmp_path_factory.getbasetemp() / "garbage.xml"
    content = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    path.write_bytes(b"<annotation>" + content + b"</annotation>" if inside else content)
    message = None
    try:
        found, _ = read_annotation(path, (100, 100), 6)
        assert len(found.boxes) == len(found.names) == len(found.difficult)
    except SppnetError as error:
        message = str(error)
    assert message is None or "garbage.xml" in message
