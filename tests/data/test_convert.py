"""Any format from any other: boxes, flags and parts stay, the source too."""

import json

import numpy as np
import pytest
from devkit import thing
from layouts import picture, text

from sppnet.data.convert import convert
from sppnet.data.layouts import find_data
from sppnet.data.splits import load_split, load_splits


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
        own = find_data(source).roles[part]
        old, new = load_splits(source, own)[0], load_splits(last, find_data(last).roles[part])[0]
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
