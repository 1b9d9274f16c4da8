import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from sppnet.config import ProposalSettings
from sppnet.data.selection import choose_classes
from sppnet.data.shapes import (
    OUTLINES,
    Scene,
    draw_scene,
    generate_shapes,
    polygon_area,
    polygon_cover,
    tight_box,
)
from sppnet.data.splits import load_split, load_splits
from sppnet.errors import SppnetError
from sppnet.images import read_image
from sppnet.proposals.selective_search import selective_search
from sppnet.records import areas, pairwise_iou


def scene(number: int, seed: int = 0) -> Scene:
    return draw_scene(np.random.default_rng([seed, 0, number]))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp("shapes"), {"train": 12, "val": 3, "test": 5})


def test_the_folder_is_a_devkit_with_all_its_splits(devkit):
    assert devkit.name == "VOCdevkit"
    records, skips = load_splits(devkit, ("SHAPES/train", "SHAPES/val", "SHAPES/test"))
    assert (len(records), skips.counts) == (20, {})
    assert len(load_split(devkit, "SHAPES/trainval")[0]) == 15
    assert set(choose_classes(records, None)) <= set(OUTLINES)
    assert read_image(records[0].path).shape[:2] == records[0].size


def test_the_annotations_are_those_of_the_drawn_scenes(devkit):
    records, _ = load_split(devkit, "SHAPES/train")
    for number in (0, 7):
        drawn = scene(number)
        np.testing.assert_array_equal(records[number].annotation.boxes, drawn.boxes)
        assert records[number].annotation.names == drawn.names
        assert records[number].annotation.difficult.tolist() == list(drawn.difficult)
        difference = np.abs(read_image(records[number].path).astype(int) - drawn.pixels)
        assert difference.mean() < 8  # JPEG changes pixels a little


def test_an_image_is_the_same_however_many_are_asked_for(devkit, tmp_path):
    fewer = contents(generate_shapes(tmp_path, {"train": 4, "test": 2}) / "SHAPES")
    more = contents(devkit / "SHAPES")
    images = [name for name in fewer if name.startswith(("JPEGImages", "Annotations"))]
    assert len(images) == 12
    assert all(fewer[name] == more[name] for name in images)


def test_another_seed_draws_other_images(tmp_path):
    first = contents(generate_shapes(tmp_path / "0", {"test": 2}, seed=0) / "SHAPES" / "JPEGImages")
    second = contents(generate_shapes(tmp_path / "1", {"test": 2}, seed=1) / "SHAPES" / "JPEGImages")
    assert not set(first.values()) & set(second.values())


def test_train_and_test_share_no_image(devkit):
    records, _ = load_splits(devkit, ("SHAPES/train", "SHAPES/val", "SHAPES/test"))
    assert len({record.digest for record in records}) == len(records)


def test_what_is_complete_is_left_alone(devkit):
    marker = devkit / "SHAPES" / "JPEGImages" / "train_00000.jpg"
    before = marker.stat().st_mtime_ns
    assert generate_shapes(devkit.parent, {"train": 12, "val": 3, "test": 5}) == devkit
    assert marker.stat().st_mtime_ns == before


def test_a_folder_of_other_settings_is_never_overwritten(devkit):
    with pytest.raises(SppnetError, match=r"expected shapes of .*'seed': 5.*found .*'seed': 0.*; delete it or choose"):
        generate_shapes(devkit.parent, {"train": 12, "val": 3, "test": 5}, seed=5)


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "VOCdevkit" / "SHAPES").mkdir(parents=True)
    with pytest.raises(SppnetError, match="found something else; delete it or choose another folder"):
        generate_shapes(tmp_path, {"train": 1})
    assert list((tmp_path / "VOCdevkit" / "SHAPES").iterdir()) == []


@pytest.mark.parametrize("images", [{}, {"training": 5}, {"train": 0}])
def test_only_known_sets_of_at_least_one_image_are_drawn(tmp_path, images):
    with pytest.raises(SppnetError, match="images must map some of train, val, test to counts of at least 1"):
        generate_shapes(tmp_path, images)


def test_an_interrupted_run_leaves_nothing_behind_under_the_name(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sppnet.data.shapes.write_annotation", fail)
    with pytest.raises(KeyboardInterrupt):
        generate_shapes(tmp_path, {"train": 1})
    assert list((tmp_path / "VOCdevkit").iterdir()) == []


def test_of_two_processes_at_once_the_slower_one_accepts_the_faster_ones_folder(tmp_path, monkeypatch):
    rename = Path.rename

    def overtaken(path: Path, target: Path) -> Path:
        target.mkdir()
        settings = json.loads((path / "shapes.json").read_text())
        (target / "shapes.json").write_text(json.dumps(settings))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    devkit = generate_shapes(tmp_path, {"train": 1})
    assert [path.name for path in devkit.iterdir()] == ["SHAPES"]
    assert [path.name for path in (devkit / "SHAPES").iterdir()] == ["shapes.json"]


def test_scenes_hold_what_they_promise():
    scenes = [scene(number) for number in range(60)]
    names = [name for one in scenes for name in one.names]
    assert set(names) == set(OUTLINES)
    assert {len(one.names) for one in scenes} == {1, 2, 3, 4, 5}
    assert 0 < sum(sum(one.difficult) for one in scenes) < 0.15 * len(names)
    for one in scenes:
        height, width, _ = one.pixels.shape
        assert one.pixels.dtype == np.uint8
        assert (one.boxes >= 0).all()
        assert (one.boxes <= [width, height, width, height]).all()
        assert (areas(one.boxes) > 100).all()


def test_the_cover_of_a_polygon_is_its_area_in_every_pixel():
    cover = polygon_cover(np.array([[2, 3], [6.5, 3], [6.5, 8], [2, 8]], dtype=np.float64), (12, 10))
    expected = np.zeros((12, 10))
    expected[3:8, 2:6], expected[3:8, 6] = 1, 0.5
    np.testing.assert_allclose(cover, expected, atol=0.26)  # a quarter pixel


@pytest.mark.parametrize("name", OUTLINES)
def test_a_shape_covers_as_much_as_its_polygon_measures(name):
    corners = OUTLINES[name] * 40 + 50.3
    assert polygon_cover(corners, (100, 100)).sum() == pytest.approx(polygon_area(corners), rel=0.02)


def test_the_area_of_a_square_is_its_side_squared():
    assert polygon_area(np.array([[1, 1], [4, 1], [4, 4], [1, 4]], dtype=np.float64)) == 9
    assert polygon_area(OUTLINES["disc"]) == pytest.approx(np.pi, rel=0.01)


def test_the_box_of_a_shape_is_tight_and_half_open():
    visible = np.zeros((12, 10), dtype=bool)
    visible[3, 2] = visible[7, 5] = True
    assert tight_box(visible) == (2, 3, 6, 8)


def test_what_lies_outside_the_image_covers_nothing():
    assert not polygon_cover(OUTLINES["star"] * 10 - 30, (50, 60)).any()


@pytest.mark.slow
def test_selective_search_finds_the_shapes():
    overlaps: list[float] = []
    for number in range(20):
        drawn = scene(number)
        windows = selective_search(drawn.pixels, ProposalSettings())
        overlaps += list(pairwise_iou(drawn.boxes, windows).max(axis=1)[~np.array(drawn.difficult)])
    assert np.mean(np.array(overlaps) >= 0.5) >= 0.95
