"""A folder of images for each class."""

import unicodedata

import pytest
from class_pictures import write_classes

from sppnet.data.class_folder import read_class_folder
from sppnet.errors import SppnetError


@pytest.fixture
def folder(tmp_path):
    return write_classes(tmp_path / "data", 2)


def test_images_of_every_class_in_order_at_any_depth_but_hidden_ones(folder):
    (folder / "disc/more").mkdir()
    (folder / "disc/00.png").rename(folder / "disc/more/00.png")
    (folder / ".cache").mkdir()
    (folder / "notes.txt").touch()
    (folder / "down/.hidden.png").touch()
    found = read_class_folder(folder)
    assert found.classes == ("across", "disc", "down")
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [str(path.relative_to(folder)) for path in found.images[2:4]] == ["disc/01.png", "disc/more/00.png"]
    assert str(found) == f"{folder}: 6 images of 3 classes"
    part = found.part(found.labels.nonzero()[0][:1])
    assert (part.images, part.labels.tolist(), part.classes) == (found.images[2:3], [1], found.classes)


def test_names_are_compared_composed(folder):
    (folder / "disc").rename(folder / unicodedata.normalize("NFD", "Käse"))
    composed = unicodedata.normalize("NFC", "Käse")
    assert read_class_folder(folder).classes == (composed, "across", "down")
    assert read_class_folder(folder, ("down", composed, "across")).labels.tolist() == [1, 1, 2, 2, 0, 0]


def test_a_class_that_is_missing_keeps_its_place(folder):
    found = read_class_folder(folder, ("zebra", "down", "disc", "across"))
    assert found.classes == ("zebra", "down", "disc", "across")
    assert found.labels.tolist() == [3, 3, 2, 2, 1, 1]


def test_folders_of_another_form_are_refused(folder, tmp_path):
    with pytest.raises(SppnetError, match=r"disc: expected a class that was trained .across, down.; rename or remove"):
        read_class_folder(folder, ("across", "down"))
    with pytest.raises(SppnetError, match=r"none: expected a folder that holds one folder .* no such folder"):
        read_class_folder(tmp_path / "none")
    with pytest.raises(SppnetError, match=r"disc: expected a folder that holds one folder .* it holds no folder; sort"):
        read_class_folder(folder / "disc")
    for path in (folder / "disc").iterdir():
        path.unlink()
    with pytest.raises(SppnetError, match=r"disc: .*no image"):
        read_class_folder(folder)
