import importlib.util
import os
import sys
import time
import unicodedata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
from devkit import make_devkit, stated, thing, xml_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sppnet.data.comp4 import read_comp4
from sppnet.data.selection import choose_classes, restrict
from sppnet.data.splits import load_split, load_splits, read_image_set, split_digests
from sppnet.data.voc import read_annotation
from sppnet.errors import SppnetError


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


@pytest.mark.parametrize("ending", [".png", ".JPG", ".jpeg"])
def test_two_files_of_one_id_are_an_error_that_names_both(tmp_path, ending):
    make_devkit(tmp_path, ending=ending)
    make_devkit(tmp_path, ending=".jpg")
    with pytest.raises(SppnetError, match="both files of the id 'a'") as raised:
        load_split(tmp_path, "VOC2007/train")
    assert f"a{ending}" in str(raised.value)
    assert "a.jpg" in str(raised.value)
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text("b\n")
    (tmp_path / f"VOC2007/JPEGImages/b{ending}").unlink()
    assert len(load_split(tmp_path, "VOC2007/train")[0]) == 1  # what is not listed does no harm


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
    message = r"no part 'VOC2007/test' in these VOC data; parts here: VOC2007/train, VOC2012/val"
    with pytest.raises(SppnetError, match=message):
        load_split(tmp_path, "VOC2007/test")


def test_a_root_above_the_devkit_is_read(tmp_path):
    make_devkit(tmp_path / "VOCdevkit")
    assert [record.id for record in load_split(tmp_path, "VOC2007/train")[0]] == ["VOC2007/a", "VOC2007/b"]


@pytest.mark.parametrize("split", ["train", "VOC2007/", "a/b/c", "../train", "/train"])
def test_a_split_is_a_year_folder_and_a_set(tmp_path, split):
    make_devkit(tmp_path)
    with pytest.raises(SppnetError, match=r"no part .* in these VOC data; parts here: VOC2007/train"):
        load_split(tmp_path, split)


def test_a_missing_root_is_an_error(tmp_path):
    with pytest.raises(
        SppnetError, match=r"gone: no such data folder; name one that exists \(data\.root, data\.more\), or fetch"
    ):
        load_split(tmp_path / "gone", "VOC2007/train")


def test_an_empty_set_is_an_error(tmp_path):
    make_devkit(tmp_path, names=())
    with pytest.raises(SppnetError, match=r"train\.txt: lists no image; write one image id per line"):
        load_split(tmp_path, "VOC2007/train")


def test_missing_images_are_an_error_that_names_the_first_and_counts_them(tmp_path):
    make_devkit(tmp_path)
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text("a\nc\nd.jpg\n")
    with pytest.raises(SppnetError, match=r"JPEGImages/c: no such image .*2 of 3 images in .*out of the list"):
        load_split(tmp_path, "VOC2007/train")


@pytest.mark.parametrize("line", ["../JPEGImages/a", "JPEGImages/a.jpg", "..", "C:\\b"])
def test_a_line_with_a_folder_is_no_image(tmp_path, line):
    make_devkit(tmp_path)
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text(f"b\n{line}\n")
    with pytest.raises(SppnetError, match=r"no such image .*, 1 of 2 images in .*train\.txt missing"):
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


# --- names as people give them


@pytest.mark.parametrize(
    ("lines", "files", "names"),
    [
        (("photo 1", "photo 2"), ("photo 1", "photo 2"), ("photo 1", "photo 2")),
        (("photo 1",), ("photo 1",), ("photo 1",)),
        (("my photo -1", "other"), ("my photo -1", "other"), ("my photo -1", "other")),
        (("my photo -1", "other  1"), ("my photo", "other"), ("my photo", "other")),
        (("-1", "0", "1 1"), ("-1", "0", "1"), ("-1", "0", "1")),
        (("img", "img 1"), ("img", "img 1"), ("img", "img 1")),
        (("0001\t1 ", " 0002\t-1"), ("0001", "0002"), ("0001", "0002")),
        (("a.jpg", "b.v2", "c.JPG 1"), ("a", "b.v2", "c"), ("a", "b.v2", "c")),
        (("a  b  ",), ("a  b",), ("a  b",)),
    ],
)
def test_a_line_is_the_id_that_there_is(tmp_path, lines, files, names):
    make_devkit(tmp_path, names=files)
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    records, _ = load_split(tmp_path, "VOC2007/train")
    assert [record.id for record in records] == [f"VOC2007/{name}" for name in names]
    assert all(record.annotation is not None for record in records)


@pytest.mark.parametrize("lines", ["a\na.jpg\n", "a 1\na\n", "a\n a \n"])
def test_one_image_on_two_lines_is_an_error_however_it_is_written(tmp_path, lines):
    make_devkit(tmp_path, names=("a",))
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text(lines)
    with pytest.raises(SppnetError, match=r"train\.txt:2: 'a' is already on line 1"):
        load_split(tmp_path, "VOC2007/train")


@pytest.mark.parametrize("listed", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("annotated", ["NFC", "NFD"])
def test_list_image_and_annotation_meet_in_any_form_of_unicode(tmp_path, listed, stored, annotated):
    name = "Übung é"
    make_devkit(tmp_path, names=(unicodedata.normalize(stored, name),), year=unicodedata.normalize(stored, "Jähr"))
    folder = tmp_path / unicodedata.normalize(stored, "Jähr")
    xml = next((folder / "Annotations").glob("*.xml"))
    xml.rename(xml.with_stem(unicodedata.normalize(annotated, name)))
    (folder / "ImageSets/Main/train.txt").write_text(unicodedata.normalize(listed, name))
    (record,), _ = load_split(tmp_path, unicodedata.normalize(listed, "Jähr/train"))
    assert record.id == unicodedata.normalize("NFC", f"Jähr/{name}")
    assert record.annotation.names == ("cat", "dog")


def test_names_that_differ_in_their_form_alone_are_an_error(tmp_path):
    make_devkit(tmp_path, names=[unicodedata.normalize(form, "é") for form in ("NFC", "NFD")], image_set="both")
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text("é")
    with pytest.raises(SppnetError, match=r"both files of the id .é. .*Unicode form"):
        load_split(tmp_path, "VOC2007/train")


def test_annotations_may_end_in_capitals_but_not_in_both(tmp_path):
    make_devkit(tmp_path, names=("a",))
    file = tmp_path / "VOC2007/Annotations/a.xml"
    text = file.read_text()
    file.rename(file.with_suffix(".XML"))
    assert load_split(tmp_path, "VOC2007/train", require_annotations=False)[0][0].annotation.names == ("cat", "dog")
    file.write_text(text)
    with pytest.raises(SppnetError, match=r"a\.XML and a\.xml are both files of the id 'a'"):
        load_split(tmp_path, "VOC2007/train")


def test_links_to_images_and_annotations_are_followed(tmp_path):
    make_devkit(tmp_path / "store", names=("a",))
    make_devkit(tmp_path / "data", names=("a",))
    for file in ("JPEGImages/a.jpg", "Annotations/a.xml"):
        (tmp_path / "data/VOC2007" / file).unlink()
        (tmp_path / "data/VOC2007" / file).symlink_to(tmp_path / "store/VOC2007" / file)
    (record,), _ = load_split(tmp_path / "data", "VOC2007/train")
    assert record.annotation is not None
    (tmp_path / "store/VOC2007/JPEGImages/a.jpg").unlink()
    with pytest.raises(SppnetError, match=r"data/VOC2007/JPEGImages/a\.jpg"):
        load_split(tmp_path / "data", "VOC2007/train")


def test_a_root_that_is_a_year_folder_has_its_sets_as_parts(tmp_path):
    make_devkit(tmp_path)
    with pytest.raises(SppnetError, match=r"VOC2007: no part 'VOC2007/train' in these VOC data; parts here: train"):
        load_split(tmp_path / "VOC2007", "VOC2007/train")
    assert [record.id for record in load_split(tmp_path / "VOC2007", "train")[0]] == ["JPEGImages/a", "JPEGImages/b"]


def test_skips_name_their_images(tmp_path):
    make_devkit(make_devkit(tmp_path, names=("a", "b", "c")), year="VOC2012", names=("a",))
    bad = xml_of(thing("cat", 5, 5, 5, 9), thing("cat", 9, 9, 7, 9), thing("cat", 1, 1, 9, 9))
    for file in ("VOC2007/Annotations/b.xml", "VOC2012/Annotations/a.xml"):
        (tmp_path / file).write_text(bad)
    skips = load_splits(tmp_path, ("VOC2007/train", "VOC2012/train"))[1]
    assert skips.images["zero-area box"] == ["VOC2007/b", "VOC2012/a"]
    assert skips.lines() == [
        "2 × box with reversed corners, e.g. VOC2007/b",
        "2 × zero-area box, e.g. VOC2007/b",
    ]


def test_the_contents_of_a_split_are_those_of_its_records(tmp_path):
    make_devkit(tmp_path, names=("b", "a"))
    records, _ = load_split(tmp_path, "VOC2007/train")
    assert split_digests(tmp_path, "VOC2007/train") == {record.id: record.digest for record in records}


@given(st.text(max_size=60), st.booleans())
def test_any_text_is_a_list_of_distinct_stems_or_an_error_that_names_the_line(tmp_path_factory, text, known):
    path = tmp_path_factory.getbasetemp() / "random.txt"
    path.write_bytes(text.encode("utf-8", "replace"))
    message = None
    try:
        names = read_image_set(path, [*text.split()] if known else ())
    except SppnetError as error:
        names, message = [], str(error)
    assert message is None or "random.txt:" in message
    assert len(set(names)) == len(names)
    assert all(name and name == name.strip() for name in names)


# --- real data


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


# --- scripts/fetch_voc


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


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_ends_end_a_line(tmp_path, end):
    ids = ["a\u2028b", "c\x85d", "e\x0bf", "g\x0ch", "plain"]
    (tmp_path / "set.txt").write_bytes(end.join([*ids, ""]).encode())
    assert read_image_set(tmp_path / "set.txt", ids) == ids
