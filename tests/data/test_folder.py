from pathlib import Path

import pytest

from sppnet.data.folder import FoundImages, find_images
from sppnet.errors import SppnetError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", "deep/er/c.jpeg", ".hidden/d.jpg", ".e.jpg", "deep/f.tif"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


def names(found: FoundImages, root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in found.images]


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
