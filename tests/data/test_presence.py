"""Which classes the images of VOC's folders show."""

import pytest
from devkit import make_devkit, thing, xml_of

from sppnet.data.presence import is_voc, read_presence
from sppnet.errors import SppnetError


def test_difficult_objects_alone_are_neither_shown_nor_absent(tmp_path):
    make_devkit(tmp_path, names=("a", "b", "c"))
    both = thing("dog", 5, 5, 40, 30, difficult=1), thing("dog", 1, 1, 9, 9)
    (tmp_path / "VOC2007/Annotations/b.xml").write_text(xml_of(*both))
    make_devkit(tmp_path, names=("d",), image_set="val")
    found = read_presence(tmp_path, ["VOC2007/train"], ["VOC2007/val"])
    assert found.classes == ("cat", "dog")
    assert found.shown.tolist() == [[1, 0], [-1, 1], [1, 0], [1, 0]]
    assert [path.stem for path in found.images] == ["a", "b", "c", "d"]
    assert found.train == 3
    chosen = read_presence(tmp_path, ["VOC2007/train"], (), ("dog",))
    assert (chosen.shown.tolist(), chosen.train) == ([[0], [1], [0]], 3)


def test_what_is_skipped_in_annotations_is_told(tmp_path):
    make_devkit(tmp_path, names=("a",))
    (tmp_path / "VOC2007/Annotations/a.xml").write_text(xml_of(thing("cat", 1, 1, 9, 9), thing("dog", 3, 3, 3, 3)))
    found = read_presence(tmp_path, ["VOC2007/train"], ())
    assert found.classes == ("cat",)
    assert found.skips == ("1 × zero-area box, e.g. VOC2007/a",)


def test_an_image_may_not_train_and_be_tested(tmp_path):
    make_devkit(tmp_path)
    with pytest.raises(SppnetError, match="name splits that share no image"):
        read_presence(tmp_path, ["VOC2007/train"], ["VOC2007/train"])
    with pytest.raises(SppnetError, match="class 'cow' never occurs"):
        read_presence(tmp_path, ["VOC2007/train"], (), ("cow",))


def test_vocs_folders_are_known_by_their_image_sets(tmp_path):
    make_devkit(tmp_path / "above/VOCdevkit")
    (tmp_path / "classes/cat").mkdir(parents=True)
    assert [
        is_voc(tmp_path / name) for name in ("above", "above/VOCdevkit", "above/VOCdevkit/VOC2007", "classes", "none")
    ] == [
        *(True, True, True),
        *(False, False),
    ]
