from pathlib import Path

import numpy as np
import pytest

from sppnet.data.folder import find_images, load_image_folder
from sppnet.errors import SppnetError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", "deep/er/c.jpeg", ".hidden/d.jpg", ".e.jpg", "deep/f.tif"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


def names(paths: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


def test_a_folder_gives_every_visible_image_below_it_sorted(photos):
    assert names(find_images([photos]), photos) == ["a.PNG", "b.jpg", "deep/er/c.jpeg", "deep/f.tif"]


def test_a_folder_below_a_hidden_one_is_read_when_it_is_named(photos):
    assert names(find_images([photos / ".hidden"]), photos) == [".hidden/d.jpg"]


def test_a_file_is_taken_whatever_its_ending(photos):
    assert names(find_images([str(photos / "notes.txt")]), photos) == ["notes.txt"]


def test_patterns_are_expanded_and_take_images_alone(photos):
    assert names(find_images([f"{photos}/*"]), photos) == ["a.PNG", "b.jpg"]
    assert names(find_images([f"{photos}/**/*.jp*g"]), photos) == ["b.jpg", "deep/er/c.jpeg"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    (tmp_path / "photo[1].jpg").touch()
    assert names(find_images([tmp_path / "photo[1].jpg"]), tmp_path) == ["photo[1].jpg"]


def test_an_image_named_twice_is_found_once(photos):
    found = find_images([photos / "b.jpg", photos, f"{photos}/*.jpg"])
    assert names(found, photos) == ["a.PNG", "b.jpg", "deep/er/c.jpeg", "deep/f.tif"]


@pytest.mark.parametrize("path", ["gone.jpg", "gone/", "*.gif", "*.txt"])
def test_a_path_that_names_no_image_is_an_error(photos, path):
    with pytest.raises(
        SppnetError, match=r"no such file, folder or match; give images \(\.bmp, .*\), a folder or a pattern"
    ):
        find_images([photos, photos / path])


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(SppnetError, match=r"no image in this folder; expected files ending in \.bmp"):
        find_images([tmp_path])


def test_no_path_at_all_is_an_error():
    with pytest.raises(SppnetError, match="expected at least one image, folder or pattern, got none"):
        find_images([])


def test_sub_folders_are_classes(tmp_path):
    for name in ("dog/2.jpg", "dog/1.jpg", "cat/1.png", "cat/notes.txt", ".cache/x.jpg", "readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths, labels, classes = load_image_folder(tmp_path)
    assert names(paths, tmp_path) == ["cat/1.png", "dog/1.jpg", "dog/2.jpg"]
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 1]
    assert classes == ("cat", "dog")


def test_a_class_without_images_is_an_error(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(SppnetError, match="cat: no image in this folder"):
        load_image_folder(tmp_path)


def test_a_folder_without_classes_is_an_error(tmp_path):
    with pytest.raises(SppnetError, match="expected one sub-folder of images per class, found none; sort the images"):
        load_image_folder(tmp_path)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(
        SppnetError, match="gone: no such folder; give one that holds one sub-folder of images per class"
    ):
        load_image_folder(tmp_path / "gone")


@pytest.mark.shared_data
def test_the_twenty_categories_are_read(shared):
    paths, labels, classes = load_image_folder(shared / "caltech20")
    assert len(classes) == 20
    assert np.bincount(labels).tolist() == [60] * 20
    assert all(path.parent.name == classes[label] for path, label in zip(paths, labels, strict=True))
