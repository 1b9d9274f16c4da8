"""Any format from any other: boxes, flags and parts stay, the source too."""

import json

import numpy as np
import pytest
from devkit import stated, thing
from layouts import coco, coco_of, picture, text, xml
from PIL import Image

from sppnet.data.convert import convert
from sppnet.data.layouts import find_data
from sppnet.data.splits import load_split, load_splits
from sppnet.errors import SppnetError


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path):
    """Two parts of plain VOC, an image of one name in both, fractions, a difficult object, an empty image."""
    rng, root = np.random.default_rng(0), tmp_path / "source"
    for part, name, count in [("train", "a", 9), ("train", "b", 0), ("valid", "a", 4), ("valid", "c d.é", 3)]:
        picture(root / part / f"{name}.jpg", (613, 411))
        corners = np.sort(rng.uniform(1, 411, (count, 2, 2)), axis=1).reshape(-1, 4)
        objects = [
            thing(str(rng.choice(["cat", 'yes: "no"'])), *one, difficult=int(rng.integers(2))) for one in corners
        ]
        text(root / part / f"{name}.xml", f"<annotation>{''.join(objects)}</annotation>")
    return root


@pytest.mark.parametrize("ways", [("coco", "yolo", "voc"), ("yolo", "coco", "voc", "yolo"), ("voc", "yolo")])
def test_a_round_trip_keeps_boxes_names_parts_and_pixels(tmp_path, source, ways):
    before, last = contents(source), source
    for step, to in enumerate(ways):
        out = tmp_path / f"{step} {to}"
        said = convert(last, out, to)
        assert said.startswith(
            f"VOC to {ways[0].upper()}: 4 images (train 2, valid 2) of 2 classes" if not step else ""
        )
        assert find_data(out).format == to
        last = out
    assert contents(source) == before
    for part in ("train", "val"):
        own = find_data(source).roles()[part]
        old, new = load_splits(source, own)[0], load_splits(last, find_data(last).roles()[part])[0]
        old = sorted(old, key=lambda record: record.digest)
        for one, other in zip(old, sorted(new, key=lambda record: record.digest), strict=True):
            assert (one.digest, one.size, one.annotation.names) == (other.digest, other.size, other.annotation.names)
            np.testing.assert_allclose(other.annotation.boxes, one.annotation.boxes, atol=0.01)
            assert not np.shares_memory(one.annotation.boxes, other.annotation.boxes)


def test_difficult_flags_stay_in_coco_and_their_loss_in_yolo_is_counted(tmp_path, source):
    flags = [record.annotation.difficult.tolist() for record in load_split(source, "train")[0]]
    assert "difficult flag" not in convert(source, tmp_path / "coco", "coco")
    assert [record.annotation.difficult.tolist() for record in load_split(tmp_path / "coco", "train")[0]] == flags
    lost = sum(map(sum, flags)) + sum(record.annotation.difficult.sum() for record in load_split(source, "valid")[0])
    assert f"{lost} × difficult flag lost, which YOLO does not have, e.g. train/a" in convert(
        source, tmp_path / "yolo", "yolo"
    )


def test_difficult_flags_are_written_to_voc(tmp_path, source):
    convert(source, tmp_path / "coco", "coco")
    for last, part in ((source, "train"), (tmp_path / "coco", "train"), (tmp_path / "coco", "valid")):
        convert(last, tmp_path / f"voc {part} {last.name}", "voc", splits=(part,))
        own, new = (load_splits(folder, (part,))[0] for folder in (last, tmp_path / f"voc {part} {last.name}"))
        flags = {r.digest: r.annotation.difficult.tolist() for r in own}
        assert {r.digest: r.annotation.difficult.tolist() for r in new} == flags
        assert len({flag for flags in flags.values() for flag in flags}) == 2


def test_names_that_meet_without_their_folders_stay_apart(tmp_path):
    names = ("a/b_c", "a_b/c", "d/b_c", "d/c", "e/a_b_c")
    for name in names:
        picture(tmp_path / f"in/{name}.jpg"), xml(tmp_path / f"in/{name}.xml")
    convert(tmp_path / "in", tmp_path / "out", "voc")
    old, new = (load_splits(tmp_path / folder, ("all",))[0] for folder in ("in", "out"))
    assert {r.digest for r in old} == {r.digest for r in new}
    assert sorted(r.path.stem for r in new) == ["a_b_c", "a_b_c_", "a_b_c__", "d_b_c", "d_c"]


def test_parts_of_one_role_are_a_list_in_yaml_and_one_without_a_role_trains(tmp_path):
    for part in ("train2014", "train2017", "val", "extra"):
        picture(tmp_path / f"in/{part}/{part}.jpg")
        coco(tmp_path / f"in/instances_{part}.json", coco_of(f"{part}.jpg"))
    for out, parts, line in (
        ("out", (), 'train: ["images/train2014", "images/train2017"]\nval: "images/val"\n'),
        ("more", ("extra", "val"), 'train: "images/extra"\nval: "images/val"\n'),
    ):
        convert(tmp_path / "in", tmp_path / out, "yolo", splits=parts)
        assert (tmp_path / out / "data.yaml").read_text() == line + 'names:\n  0: "cat"\n'
    found = find_data(tmp_path / "out").contents
    assert {part: [*own.images] for part, own in found.items()} == {
        "train": ["images/train2014/train2014", "images/train2017/train2017"], "val": ["images/val/val"]
    }  # fmt: skip


def test_what_is_written_is_what_other_programs_read(tmp_path, source):
    convert(source, tmp_path / "coco", "coco"), convert(source, tmp_path / "yolo", "yolo")
    values = json.loads((tmp_path / "coco/annotations/instances_train.json").read_text())
    assert [image["file_name"] for image in values["images"]] == ["train_a.jpg", "b.jpg"]
    assert (values["images"][0]["width"], values["images"][0]["height"]) == (613, 411)
    assert [category["id"] for category in values["categories"]] == [1, 2]
    (first, *_), box = values["annotations"], load_split(source, "train")[0][0].annotation.boxes[0]
    np.testing.assert_allclose(first["bbox"], [*box[:2], *(box[2:] - box[:2])], rtol=1e-6)
    line = (tmp_path / "yolo/labels/train/train_a.txt").read_text().split("\n")[0].split()
    shares = [
        (box[0] + box[2]) / 2 / 613,
        (box[1] + box[3]) / 2 / 411,
        (box[2] - box[0]) / 613,
        (box[3] - box[1]) / 411,
    ]
    np.testing.assert_allclose(np.array(line[1:], float), shares, rtol=1e-6)
    assert (tmp_path / "yolo/labels/train/b.txt").read_text() == ""


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("source/new", r"source/new: expected a new or an empty folder outside of the source; name another"),
        ("source", r"expected a new or an empty folder outside"),
        ("full", r"full: expected a new or an empty folder"),
        ("full/file", r"file: expected a new or an empty folder"),
    ],
)
def test_nothing_is_written_into_the_source_or_over_files(tmp_path, source, out, message):
    text(tmp_path / "full/file", "mine")
    before = contents(tmp_path)
    with pytest.raises(SppnetError, match=message):
        convert(source, tmp_path / out, "coco")
    assert contents(tmp_path) == before


def test_nothing_is_left_of_what_fails_midway(tmp_path, source, monkeypatch):
    monkeypatch.setattr("sppnet.data.convert.WRITERS", {"yolo": lambda *_: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        convert(source, tmp_path / "new", "yolo")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_empty_folder_is_filled_and_parts_are_chosen(tmp_path, source):
    (tmp_path / "new").mkdir()
    assert "3 images (valid 2, train 1)" not in convert(source, tmp_path / "new", "voc", splits=("valid",))
    assert sorted(path.name for path in (tmp_path / "new/JPEGImages").iterdir()) == ["a.jpg", "c d.é.jpg"]
    with pytest.raises(SppnetError, match="no part 'x' in these VOC data; parts here: train, valid"):
        convert(source, tmp_path / "more", "voc", splits=("x",))


def test_images_without_annotation_stay_in_voc_alone(tmp_path, source):
    values = coco_of("a.jpg")
    del values["annotations"]
    picture(tmp_path / "in/a.jpg"), coco(tmp_path / "in/test.json", values)
    picture(tmp_path / "in/b.jpg"), coco(tmp_path / "in/train.json", coco_of("b.jpg"))
    for to in ("voc", "yolo"):
        said = convert(tmp_path / "in", tmp_path / to, to)
        assert ("1 × image without annotation, left out, e.g. a" in said) == (to == "yolo")
    assert load_split(tmp_path / "voc", "test", require_annotations=False)[0][0].annotation is None


def test_an_image_in_two_parts_is_an_error(tmp_path):
    picture(tmp_path / "in/a.jpg")
    for name in ("train", "val"):
        coco(tmp_path / f"in/{name}.json", coco_of("a.jpg"))
    picture(tmp_path / "in/b.jpg"), coco(tmp_path / "in/val.json", coco_of("a.jpg", "b.jpg"))
    with pytest.raises(SppnetError, match=r"image a is in train and in val; name splits that share no image"):
        convert(tmp_path / "in", tmp_path / "out", "yolo")


def test_class_numbers_and_their_order_stay(tmp_path):
    names = ["zebra", "ape", "never"]
    picture(tmp_path / "in/a.jpg"), coco(tmp_path / "in/a.json", coco_of("a.jpg", categories=names))
    convert(tmp_path / "in", tmp_path / "yolo", "yolo"), convert(tmp_path / "yolo", tmp_path / "coco", "coco")
    assert find_data(tmp_path / "yolo").classes == find_data(tmp_path / "coco").classes == tuple(names)


def test_a_turned_photo_keeps_its_boxes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    picture(tmp_path / "in/a.jpg", exif=exif), xml(tmp_path / "in/a.xml", stated(60, 40), thing("cat", 3, 5, 20, 50))
    box = load_split(tmp_path / "in", "all")[0][0].annotation.boxes
    last = tmp_path / "in"
    for to in ("coco", "yolo", "voc"):
        convert(last, tmp_path / to, to)
        last = tmp_path / to
        np.testing.assert_allclose(load_splits(last, find_data(last).parts)[0][0].annotation.boxes, box, atol=1e-3)
