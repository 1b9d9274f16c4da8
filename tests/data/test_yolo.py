"""YOLO's label files and data.yaml, sound and not."""

import numpy as np
import pytest
from layouts import BOX, LINE, picture, text
from PIL import Image

from sppnet.data.layouts import find_data
from sppnet.data.splits import load_split
from sppnet.errors import SppnetError


@pytest.fixture
def root(tmp_path):
    picture(tmp_path / "images/a.jpg"), picture(tmp_path / "images/b.jpg")
    text(tmp_path / "labels/a.txt", LINE), text(tmp_path / "classes.txt", "cat\nno\n\n")
    return tmp_path


def load(root, line):
    text(root / "labels/a.txt", line)
    return load_split(root, "all")


@pytest.mark.parametrize(
    ("line", "boxes", "counts"),
    [
        (LINE, [BOX], {}),
        ("\ufeff1\t0.3 0.35  0.4 0.5\r\n\n", [BOX], {}),
        ("0 0.3 0.35 0.4 0.5\n1 0.5 0.5 1 1", [BOX, (0, 0, 60, 40)], {}),
        (LINE * 2, [BOX], {"object annotated twice": 1}),
        ("0 0.1 0.1 0.5 0.1 0.5 0.6", [BOX], {"polygon turned into its box": 1}),
        ("0 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6", [BOX], {"polygon turned into its box": 1}),
        ("0 0.3 0.35 0 0.5", [], {"zero-area box": 1}),
        ("0 0.3 0.35 -0.4 0.5", [], {"box with reversed corners": 1}),
        ("0 1 1 0.5 0.5", [[45, 30, 60, 40]], {"box clipped to the image": 1}),
        ("0 1.02 0.5 0.1 0.5", [[58.2, 10, 60, 30]], {"box clipped to the image": 1}),
        ("0 1.5 0.5 0.1 0.5", [], {"box outside the image": 1}),
        ("", [], {}),
    ],
)
def test_lines_become_boxes_and_what_happens_to_them_is_counted(root, line, boxes, counts):
    records, skips = load(root, line)
    np.testing.assert_allclose(records[0].annotation.boxes, np.reshape(boxes, (-1, 4)), atol=1e-4)
    assert skips.counts == {"image without label file, taken as background": 1} | counts
    assert skips.images["image without label file, taken as background"] == ["images/b"]
    assert len(records[1].annotation) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.3 0.35 0.4", r"labels/a\.txt:1: expected 'class x y width height', or .*, got '0 0\.3 0\.35 0\.4'"),
        ("0 0.3 0.35 0.4 0.5 0.9", r"a\.txt:1: expected 'class x y"),
        (LINE + "cat 0.3 0.35 0.4 0.5", r"a\.txt:2: expected 'class x y"),
        ("0.5 0.3 0.35 0.4 0.5", r"a\.txt:1: expected 'class x y"),
        ("-1 0.3 0.35 0.4 0.5", r"a\.txt:1: expected 'class x y"),
        ("0 nan 0.35 0.4 0.5", r"a\.txt:1: expected shares"),
        ("0 inf 0.35 0.4 0.5", r"a\.txt:1: expected shares"),
        ("2 0.3 0.35 0.4 0.5", r"a\.txt:1: class 2 has no name in .*classes\.txt, which has 0 cat, 1 no; add it there"),
        ("0 30 20 10 8", r"a\.txt:1: expected shares of the image's width and height, from 0 to 1, got .*; divide pix"),
        ("0 10 10 30 10 30 20", r"a\.txt:1: expected shares"),
    ],
)
def test_a_faulty_line_is_an_error_that_names_it(root, line, message):
    with pytest.raises(SppnetError, match=message):
        load(root, line)


def test_labels_without_names_are_no_data_set(root):
    (root / "classes.txt").unlink()
    with pytest.raises(
        SppnetError, match=r"YOLO \(data\.yaml, or classes\.txt with one name .*found 2 images, 1 \.txt; docs/own"
    ):
        find_data(root)


@pytest.mark.parametrize(
    "names", ["", "names: []\n", "names: 3\n", "names: [a, a]\n", "names: {x: a}\n", "names: ['']\n"]
)
def test_a_yaml_file_without_names_is_an_error(root, names):
    text(root / "data.yaml", "nc: 2\ntrain: images\n" + names)
    (root / "classes.txt").unlink()
    with pytest.raises(
        SppnetError, match=r"data\.yaml: expected names, a list with a name of its own for each class nu"
    ):
        find_data(root)


def test_names_of_yaml_are_texts(root):
    text(root / "data.yaml", "train: images\nnames: [yes, 'no']\n")
    text(root / "labels/a.txt", "1 0.3 0.35 0.4 0.5\n0 0.3 0.35 0.4 0.4")
    assert load_split(root, "train")[0][0].annotation.names == ("no", "yes")
    assert find_data(root).classes == ("yes", "no")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [a\ntrain: x", r"data\.yaml: not valid YAML: .*; repair it, or remove it"),
        ("train: &x [a]\nval: *x\nnames: [a]", r"data\.yaml: not valid YAML: references"),
        ("names: !!python/object/apply:os.system [ls]\ntrain: a", r"data\.yaml: not valid YAML"),
        (
            "names: [a]\ntrain: gone\nval: gone too",
            r"data\.yaml: none that it names has images .*train: gone has no image; .*val: gone too has",
        ),
        (
            "names: [a]\ntrain: {x: 1}",
            r"data\.yaml: train: expected a folder, a list file or several, got \{'x': '1'\}",
        ),
    ],
)
def test_a_faulty_yaml_file_is_an_error(root, content, message):
    text(root / "data.yaml", content)
    with pytest.raises(SppnetError, match=message):
        find_data(root)


def test_a_part_without_any_labels_is_not_annotated(root):
    text(root / "data.yaml", "train: images\ntest: holiday\nnames: [cat]\n"), picture(root / "holiday/c.jpg")
    assert load_split(root, "test", require_annotations=False)[0][0].annotation is None
    with pytest.raises(SppnetError, match=r"holiday/c has no label file, nor has any image of its part; add labels/"):
        load_split(root, "test")


def test_what_belongs_to_nothing_is_counted(root):
    text(root / "data.yaml", "train: images\ntest: nowhere\nnames: [cat]\n")
    picture(root / "drawings/x.jpg"), text(root / "labels/gone.txt", LINE)
    folder = find_data(root)
    assert folder.left_out.images == {
        "image without label file, left out": ["drawings/x"],
        "label file without an image, left out": ["labels/gone.txt"],
    }
    assert folder.notes == ("data.yaml: test: nowhere has no image",)


def test_key_points_are_left_out_and_their_boxes_stay(root):
    text(root / "data.yaml", "train: images\nkpt_shape: [2, 2]\nnames: [cat]\n")
    text(root / "labels/a.txt", LINE.strip() + " 0.1 0.2 0.3 0.4")
    records, skips = load_split(root, "train")
    np.testing.assert_allclose(records[0].annotation.boxes, [BOX], atol=1e-4)
    assert skips.counts["key points left out"] == 1


def test_validation_by_the_training_images_is_none(root):
    text(root / "data.yaml", "train: images\nval: images\nnames: [cat]\n")
    assert find_data(root).roles() == {"train": ("train",), "val": (), "test": ()}


def test_shares_are_of_the_upright_photo(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 60 × 40, upright 40 × 60
    picture(root / "images/a.jpg", exif=exif)
    records, skips = load(root, LINE)
    assert records[0].size == (60, 40)
    np.testing.assert_allclose(records[0].annotation.boxes, [[4, 6, 20, 36]], atol=1e-4)
    assert skips.counts["image with EXIF orientation, boxes taken as drawn upright"] == 1


def test_pictures_may_lie_in_another_folder_that_the_yaml_file_names(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    text(elsewhere / "data.yaml", f"path: {root}\ntrain: images\nnames: [cat]\n")
    assert [record.id for record in load_split(elsewhere, "train")[0]] == ["images/a", "images/b"]


def test_lists_of_classes_must_agree(root):
    text(root / "labels/classes.txt", "cat\n no \n")
    assert find_data(root).classes == ("cat", "no")
    text(root / "labels/obj.names", "no\ncat\n")
    with pytest.raises(
        SppnetError, match=r"/classes\.txt and labels/obj\.names list different classes, so a number may"
    ):
        find_data(root)
    text(root / "data.yaml", "train: images\nnames: [cat, dog]\n")
    assert find_data(root).classes == ("cat", "dog")


def test_yaml_beside_the_data_does_not_matter(root):
    text(root / "compose.yml", "command: !reset [x]\nnames: [")
    folder = find_data(root)
    assert (folder.parts, len(folder.notes)) == (("all",), 1)
    assert folder.notes[0].startswith(f"left out: {root / 'compose.yml'}: not valid YAML")
    text(root / "more/data.yaml", "train: ../images\nnames: [cat, dog]\n"), text(root / "data.yaml", "names: [")
    assert find_data(root).classes == ("cat", "dog")
    (root / "more/data.yaml").unlink()
    with pytest.raises(SppnetError, match=r"/data\.yaml: not valid YAML"):
        find_data(root)
    (root / "data.yaml").unlink(), (root / "classes.txt").unlink()
    with pytest.raises(SppnetError, match=r"compose\.yml: not valid YAML"):
        find_data(root)


@pytest.mark.parametrize("folders", [("images", "labels"), ("train/images", "train/labels"), ("images/x", "labels/x")])
def test_a_mask_beside_the_label_is_not_the_photo(tmp_path, folders):
    photos, labels = (tmp_path / "set" / name for name in folders)
    picture(photos / "a.jpg"), picture(labels / "a.png"), text(labels / "a.txt", LINE)
    text(tmp_path / "set/classes.txt", "cat\n")
    folder = find_data(tmp_path / "set")
    (record,), _ = load_split(folder, folder.roles()["train"][0])
    assert record.id == f"{folders[0]}/a"
    assert folder.left_out.images == {"image without label file, left out": [f"{folders[1]}/a"]}


def test_a_picture_beside_its_label_is_the_photo_where_no_folder_mirrors_it(tmp_path):
    picture(tmp_path / "labels/a.png"), text(tmp_path / "labels/a.txt", LINE), picture(tmp_path / "masks/a.png")
    text(tmp_path / "classes.txt", "cat\n"), picture(tmp_path / "b.jpg"), text(tmp_path / "b.txt", LINE)
    picture(tmp_path / "masks/b.jpg")
    assert [record.id for record in load_split(tmp_path, "all")[0]] == ["b", "labels/a"]
