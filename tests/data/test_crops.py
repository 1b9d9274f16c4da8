"""Crops of objects and background as a folder of pictures for each class."""

from pathlib import Path

import numpy as np
import pytest
from doubles import annotated, picture, picture_record
from small_run import modified

from sppnet.data import crops as module
from sppnet.data.class_folder import read_class_folder
from sppnet.data.crops import write_crops
from sppnet.errors import SppnetError
from sppnet.images import read_image
from sppnet.records import Annotation, pairwise_iou

CLASSES = ("stripes", "bars")
BOXES = {"stripes": (10, 12, 42, 44), "bars": (60, 30, 92, 62)}


def striped(seed):
    """Noise with one square of horizontal and one of vertical stripes."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(100, 156, (80, 100, 3), dtype=np.uint8)
    lines = np.where(np.arange(32) // 4 % 2, 230, 20).astype(np.uint8)
    pixels[12:44, 10:42] = lines[:, None, None]
    pixels[30:62, 60:92] = lines[None, :, None]
    return pixels


@pytest.fixture
def records(tmp_path):
    return [picture_record(tmp_path, f"{i}", striped(i), annotated(*BOXES.items())) for i in range(5)]


def pictures(folder: Path, name: str) -> list[np.ndarray]:
    return [read_image(path) for path in sorted((folder / name).glob("*.png"))]


def test_every_object_is_cut_in_the_middle_of_a_square_with_room_around_it(records, tmp_path):
    folder = write_crops(records[:1], CLASSES, tmp_path / "crops", 56)
    (stripes,), (bars,) = (pictures(folder, name) for name in CLASSES)
    # 32 px and room for 0.4 of them: 45 px on a side, resized to 56
    assert stripes.shape == bars.shape == (56, 56, 3)
    assert stripes[10:46, 28, 0].std() > 60
    assert stripes[28, 12:44, 0].std() < 10 < 60 < bars[28, 12:44, 0].std()


def test_a_crop_beyond_the_border_repeats_the_edge(tmp_path):
    pixels = picture(28, 28)
    record = picture_record(tmp_path, "corner", pixels, annotated(("bars", (-10, -10, 10, 10))))
    (crop,) = pictures(write_crops([record], CLASSES, tmp_path / "crops", 28), "bars")  # 20 × 1.4 px around (0, 0)
    assert np.array_equal(crop, np.pad(pixels, ((14, 0), (14, 0), (0, 0)), mode="edge")[:28, :28])


def test_they_are_a_folder_of_classes_with_as_many_of_the_background(records, tmp_path):
    found = read_class_folder(write_crops(records, CLASSES, tmp_path / "crops", 40))
    assert found.classes == ("background", "bars", "stripes")
    counts = np.bincount(found.labels)
    assert counts[1:].tolist() == [5, 5]
    assert 3 <= counts[0] <= 10


def test_background_overlaps_no_object_by_much_and_is_as_large_as_objects(tmp_path):
    pixels = np.zeros((80, 100, 3), np.uint8)  # a pixel's colour is its place
    pixels[..., 0], pixels[..., 1] = 2.5 * np.arange(100), 2.5 * np.arange(80)[:, None]
    record = picture_record(tmp_path, "places", pixels, annotated(*BOXES.items()))
    folders = [write_crops([record], CLASSES, tmp_path / "crops", 56, seed) for seed in range(50)]
    crops = np.stack([crop for folder in folders for crop in pictures(folder, "background")]) / 2.5
    assert len(crops) > 50
    sides = (crops[:, 28, 37, 0] - crops[:, 28, 18, 0]) / 19 * 56 / 1.4
    assert sides.min() > 14  # 0.5 to 1.2 of 32 px
    assert sides.max() < 40
    centres = crops[:, 27:29, 27:29, :2].mean(axis=(1, 2)) + 0.5
    found = np.concatenate([centres - sides[:, None] / 2, centres + sides[:, None] / 2], axis=1)
    assert pairwise_iou(found, np.array(list(BOXES.values()), float)).max() < 0.34  # 0.3, and what is read off


def test_difficult_objects_are_left_out_where_they_do_not_train_and_are_no_background_either(tmp_path):
    pixels = np.zeros((120, 200, 3), np.uint8)
    pixels[40:80, 20:60, 0], pixels[40:80, 120:160, 1] = 255, 255
    boxes = Annotation([[20, 40, 60, 80], [120, 40, 160, 80]], CLASSES, [False, True])
    record = picture_record(tmp_path, "two", pixels, boxes)
    whole, easy = (write_crops([record], CLASSES, tmp_path / "crops", 28, difficult=used) for used in (True, False))
    assert [path.name for path in sorted(whole.iterdir())] == ["background", "bars", "stripes"]
    assert {path.name for path in easy.iterdir()} <= {"background", "stripes"}
    for seed in range(20):
        for crop in pictures(write_crops([record], CLASSES, tmp_path / "crops", 28, seed, False), "background"):
            assert (crop[4:-4, 4:-4, 1] > 128).mean() < 0.5  # without its context
    with pytest.raises(SppnetError, match="expected annotated objects of the classes, but the images hold none"):
        write_crops([record], ("bars",), tmp_path / "crops", 28, difficult=False)


def test_images_without_objects_of_the_classes_give_no_crops(tmp_path, records):
    others = [
        picture_record(tmp_path, "none", picture(40, 40), annotated()),
        picture_record(tmp_path, "unknown", picture(40, 40), None),
        picture_record(tmp_path, "dog", picture(40, 40), annotated(("dog", (0, 0, 9, 9)))),
    ]
    each = [write_crops(own, CLASSES, tmp_path / "crops", 32) for own in (records[:1], [*records[:1], *others])]
    assert len({len(read_class_folder(folder).images) for folder in each}) == 1
    with pytest.raises(SppnetError, match="expected annotated objects of the classes, but the images hold none"):
        write_crops(others, CLASSES, tmp_path / "none", 32)
    assert list((tmp_path / "none").iterdir()) == []


def test_the_smallest_object_is_cut_all_the_same(tmp_path):
    record = picture_record(tmp_path, "thin", picture(40, 40), annotated(("bars", (5, 5, 5.01, 5.01))))
    assert pictures(write_crops([record], CLASSES, tmp_path / "crops", 45), "bars")[0].shape == (45, 45, 3)


def test_crops_of_the_same_objects_are_reused_and_others_lie_beside_them(records, tmp_path):
    first = write_crops(records, CLASSES, tmp_path / "crops", 32)
    before = modified(first)
    assert write_crops(records, CLASSES, tmp_path / "crops", 32) == first
    assert modified(first) == before
    assert write_crops(records, CLASSES, tmp_path / "crops", 32, seed=1) != first
    assert write_crops(records[:2], CLASSES, tmp_path / "crops", 32) != first
    again = write_crops(records, CLASSES, tmp_path / "again", 32)
    assert {path: (again / path).read_bytes() for path in before} == {p: (first / p).read_bytes() for p in before}
    assert modified(first) == before


def test_an_interruption_leaves_nothing_that_looks_complete(records, tmp_path, monkeypatch):
    def interrupted(path):
        if path == records[2].path:
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr(module, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_crops(records, CLASSES, tmp_path / "crops", 32)
    assert list((tmp_path / "crops").iterdir()) == []


@pytest.mark.parametrize("name", ["background", "Background", "a/b", ".hidden", "a\0b"])
def test_a_class_that_no_folder_can_be_named_after_is_refused(records, tmp_path, name):
    with pytest.raises(SppnetError, match=r"class .*; give the class another one|expected the name of a folder"):
        write_crops(records, ("bars", name), tmp_path / "crops", 32)
    assert not (tmp_path / "crops").exists()


def test_crops_that_cannot_get_their_name_are_an_error_unless_another_process_made_them(records, tmp_path, monkeypatch):
    first = write_crops(records, CLASSES, tmp_path / "first", 32)
    folder = tmp_path / "second" / first.name

    def refused(path, target):
        raise PermissionError("no")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        write_crops(records, CLASSES, folder.parent, 32)
    assert list(folder.parent.iterdir()) == []
    monkeypatch.setattr(Path, "rename", lambda path, target: folder.mkdir() or refused(path, target))
    assert write_crops(records, CLASSES, folder.parent, 32) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
