import os
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
        SppnetError, match=r"no such file, folder or match; give images \(\.jpg, .*\), a folder or a pattern"
    ):
        find_images([photos, photos / path])


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(SppnetError, match=r"no image in this folder; expected files ending in \.jpg"):
        find_images([tmp_path])


def test_no_path_at_all_is_an_error():
    with pytest.raises(SppnetError, match="expected at least one image, folder or pattern, got none"):
        find_images([])


def test_endings_of_every_kind_of_picture_are_known(tmp_path):
    for name in ("a.jfif", "b.JPE", "c.pgm", "d.heic", "e.avif"):
        (tmp_path / name).touch()
    assert names(find_images([tmp_path]), tmp_path) == ["a.jfif", "b.JPE", "c.pgm", "d.heic", "e.avif"]


def test_what_is_passed_over_is_counted(photos):
    for name in ("clip.mov", "more.txt", "README"):
        (photos / name).touch()
    note = find_images([photos]).note()
    assert note == "passed over: 2 .txt, 2 hidden, 1 .mov, 1 without ending"
    assert find_images([photos / "b.jpg"]).note() == ""


def test_linked_folders_are_searched_once_and_loops_end(photos, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.jpg").touch()
    (photos / "a_link").symlink_to(elsewhere)
    (photos / "deep" / "again").symlink_to(elsewhere)
    (photos / "deep" / "loop").symlink_to(photos)
    (elsewhere / "loop").symlink_to(photos / "deep")
    found = names(find_images([photos]), photos)
    assert found == ["a.PNG", "a_link/linked.jpg", "b.jpg", "deep/er/c.jpeg", "deep/f.tif"]


def test_links_without_an_end_are_named(photos):
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    (photos / "gone").symlink_to(photos / "nowhere")
    (photos / "itself.jpg").symlink_to(photos / "itself.jpg")
    found = find_images([photos])
    assert {photos / "gone.jpg", photos / "itself.jpg"} <= set(found.images)  # reading them says what is wrong
    assert list(found.unusable) == [photos / "gone"]
    assert "gone: a link to " in found.unusable[photos / "gone"]


def test_a_folder_that_may_not_be_read_is_named(photos, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_images([photos])
    assert found.unusable == {photos / "deep/er": f"{photos / 'deep/er'}: cannot be searched (Permission denied)"}
    assert names(found, photos) == ["a.PNG", "b.jpg", "deep/f.tif"]


def test_a_file_is_one_file_however_its_path_is_written(photos, monkeypatch):
    monkeypatch.chdir(photos)
    found = find_images(["b.jpg", photos, photos / "deep/../b.jpg"]).images
    assert sorted(path.name for path in found) == ["a.PNG", "b.jpg", "c.jpeg", "f.tif"]
    assert Path("b.jpg") in found, "the first name counts"


@pytest.mark.parametrize(
    "paths", [["photos/**/*"], ["photos", "other"], ["other", "photos"], ["photos", "photos/b.jpg"]]
)
def test_links_back_and_aside_give_a_picture_once(photos, tmp_path, monkeypatch, paths):
    monkeypatch.chdir(tmp_path)
    (photos / "loop").symlink_to(photos)
    (tmp_path / "other").symlink_to(photos)
    found = find_images(paths)
    assert len(found.images) == len({image.resolve() for image in found.images}) >= 4
    assert max(found.passed_over.values(), default=0) <= 4
    if "*" in paths[0]:
        assert Path("photos/b.jpg") in found.images
