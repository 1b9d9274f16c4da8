"""Forests of edges: what OpenCV makes of a sound one, and that no other reaches it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from forests import LISTS, MIDDLE, OPTIONS, forest
from numpy.typing import NDArray

from sppnet.errors import SppnetError
from sppnet.proposals.edge_forest import forest_edges, load_forest

KIND = "expected a structured forest as OpenCV reads it (model.yml.gz, or model.yml unpacked), but "
LAST_FEATURE = (16 * 16 + 25 * 24 // 2) * 13 - 1  # cells of a patch and pairs of cells, in 13 channels


def square(height: int = 60, width: int = 80) -> NDArray[np.uint8]:
    image = np.full((height, width, 3), 20, np.uint8)
    image[height // 4 : height // 2 + 2, width // 4 : width // 2 + 2] = 220
    return image


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_edges_are_those_of_opencv(tmp_path: Path) -> None:
    path = written(tmp_path / "model.yml", forest())
    edges, orientations = forest_edges(square(), path)
    detector = cv2.ximgproc.createStructuredEdgeDetection(str(path))
    whole = detector.detectEdges(square().astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(orientations, detector.computeOrientation(whole))
    np.testing.assert_array_equal(edges, detector.edgesNms(whole, orientations))
    assert edges.max() > 0.1
    assert 20 < np.count_nonzero(edges) < np.count_nonzero(whole)


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (15, 16), (33, 17), (61, 83)])
def test_an_image_of_any_size_has_edges_of_its_size(size: tuple[int, int], tmp_path: Path) -> None:
    edges, orientations = forest_edges(square(*size), written(tmp_path / "model.yml", forest()))
    assert edges.shape == orientations.shape == size
    assert np.isfinite(edges).all()


def test_an_image_of_odd_sides_is_that_with_its_last_pixels_twice(tmp_path: Path) -> None:
    path = written(tmp_path / "model.yml", forest())
    image = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    even = np.pad(image, ((0, 1), (0, 1), (0, 0)), mode="edge")
    for own, padded in zip(forest_edges(image, path), forest_edges(even, path), strict=True):
        np.testing.assert_array_equal(own, padded[:47, :63])


def test_a_forest_may_be_packed_saved_by_opencv_or_have_the_ends_of_lines_of_windows(tmp_path: Path) -> None:
    expected = forest_edges(square(), written(tmp_path / "model.yml", forest()))[0]
    (tmp_path / "packed.yml.gz").write_bytes(gzip.compress(forest().encode()))
    (tmp_path / "windows.yml").write_bytes(forest().replace("\n", "\r\n").encode())
    again = cv2.FileStorage(str(tmp_path / "again.yml"), cv2.FILE_STORAGE_WRITE)
    again.startWriteStruct("options", cv2.FileNode_MAP)
    for name, value in OPTIONS.items():
        again.write(name, value)
    again.endWriteStruct()
    for name, rows in LISTS.items():
        again.startWriteStruct(name, cv2.FileNode_SEQ)
        for row in rows:
            again.startWriteStruct("", cv2.FileNode_SEQ + cv2.FileNode_FLOW)
            for value in row:
                again.write("", float(value) if name == "thresholds" else int(value))
            again.endWriteStruct()
        again.endWriteStruct()
    again.release()
    for name in ("packed.yml.gz", "windows.yml", "again.yml"):
        np.testing.assert_array_equal(forest_edges(square(), tmp_path / name)[0], expected)


def test_another_forest_under_the_same_name_is_read_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "model.yml", forest())
    assert forest_edges(square(), path)[0].any()
    written(path, forest(thresholds=[["1.5e+10", 0, 0]] * 2))
    assert not forest_edges(square(), path)[0].any()


def test_the_largest_numbers_that_are_taken_are_no_danger(tmp_path: Path) -> None:
    largest = [16 * 16 * 13 - 1] * 40
    text = forest(featureIds=[[LAST_FEATURE, 0, 0]] * 2, edgeBins=[largest, MIDDLE], thresholds=[[-1, 0, 0]] * 2)
    edges, _ = forest_edges(square(61, 83), written(tmp_path / "model.yml", text))
    assert np.isfinite(edges).all()


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "empty.yml": ("", "it is empty"),
    "other.txt": ("hello\n", "it begins with 'hello\\n', not with %YAML:1.0"),
    "picture.yml": (b"\xff\xd8\xff\xe0 JFIF", "it is not text"),
    "settings.yml": ("%YAML:1.0\nname: mine\n", "options is missing or stands twice"),
    "packed.yml": (gzip.compress(forest().encode()), "it is not text"),
    "cut.yml.gz": (gzip.compress(forest().encode())[:-30], ""),
    "cut.yml": (forest()[:-9], "edgeBins are not rows of whole numbers in brackets"),
    "without.yml": (forest(edgeBins=None), "edgeBins is missing or stands twice"),
    "twice.yml": (forest() + "\nchilds:\n    - [0]\n", "childs is missing or stands twice"),
    "plain.yml.gz": (forest(), "Not a gzipped file"),
    "option_twice.yml": (forest().replace("stride: 2", "stride: 2\n    stride: 9"), "options are not a number each"),
    "text.yml": (forest({"stride": "two"}), "options are not a number each"),
    "octal.yml": (forest({"stride": "02"}), "options are not a number each"),
    "no_option.yml": (forest({"patchSize": None}), "patchSize is missing, not from 1 to 32"),
    "no_trees.yml": (forest({"numberOfTrees": 0}), "numberOfTrees is 0, not from 1 to 32"),
    "three_trees.yml": (forest({"numberOfTrees": 4}), "its lists do not fit 4 trees of one size: 6 childs"),
    "no_stride.yml": (forest({"stride": 0}), "stride is 0, not from 1 to 32"),
    "huge.yml": (forest({"patchSize": 100_000}), "patchSize is 100000, not from 1 to 32"),
    "odd.yml": (forest({"shrinkNumber": 3}), "shrinkNumber is not 2, or patchSize=32 and patchInnerSize=16 do"),
    "odd_patch.yml": (forest({"patchSize": 31}), "shrinkNumber is not 2, or patchSize=31 and patchInnerSize=16 do"),
    "odd_inner.yml": (forest({"patchInnerSize": 15}), "patchSize=32 and patchInnerSize=15 do not fit"),
    "inner.yml": (forest({"patchSize": 8}), "patchSize=8 and patchInnerSize=16 do not fit"),
    "indents.yml": (forest().replace("    - [80]", "  - [80]"), "edgeBoundaries are not rows of whole numbers in br"),
    "flat.yml": (forest(childs=None) + "\nchilds: [2,0,0,2,0,0]\n", "childs are not rows of whole numbers in brackets"),
    "nested.yml": (forest(childs=[["[2,0,0]"], ["[2,0,0]"]]), "childs are not rows of whole numbers in brackets"),
    "words.yml": (forest(childs=[['"a"', 0, 0]] * 2), "childs are not rows of whole numbers in brackets"),
    "fraction.yml": (forest(childs=[[2.5, 0, 0]] * 2), "childs are not rows of whole numbers in brackets"),
    "hex.yml": (forest(childs=[["0x2", 0, 0]] * 2), "childs are not rows of whole numbers in brackets"),
    "nan.yml": (forest(thresholds=[["NaN", 0, 0]] * 2), "number 1 of thresholds is nan, which is out of range"),
    "short.yml": (forest(thresholds=[[0, 0, 0]]), "6 featureIds, 3 thresholds, 7 edgeBoundaries, 80 edgeBins"),
    "short_bounds.yml": (forest(edgeBoundaries=[[0] * 6]), "6 edgeBoundaries"),
    "loop.yml": (forest(childs=[[2, 1, 0]] * 2), "number 2 of childs is 1, which is out of range"),
    "self.yml": (forest(childs=[[1, 0, 0]] * 2), "number 1 of childs is 1, which is out of range"),
    "beyond.yml": (forest(childs=[[2, 0, 0], [3, 0, 0]]), "number 4 of childs is 3, which is out of range"),
    "negative.yml": (forest(childs=[[-2, 0, 0]] * 2), "number 1 of childs is -2, which is out of range"),
    "feature.yml": (forest(featureIds=[[LAST_FEATURE + 1, 0, 0]] * 2), f"of featureIds is {LAST_FEATURE + 1}, which"),
    "no_feature.yml": (forest(featureIds=[[-1, 0, 0]] * 2), "number 1 of featureIds is -1, which is out of range"),
    "bounds.yml": (forest(edgeBoundaries=[[0, 0, 0, 40, 39, 40], [80]]), "number 5 of edgeBoundaries is 39"),
    "bins.yml": (forest(edgeBoundaries=[[0, 0, 0, 40, 40, 40], [81]]), "number 7 of edgeBoundaries is 81"),
    "no_bin.yml": (forest(edgeBins=[[-1] * 80]), "number 1 of edgeBins is -1, which is out of range"),
    "bin.yml": (forest(edgeBins=[[16 * 16 * 13] * 80]), "number 1 of edgeBins is 3328"),
}  # fmt: skip

SCRIPT = """
import json, sys
from pathlib import Path
from sppnet.proposals.edge_forest import load_forest
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        load_forest(path)
    except ValueError as error:
        found[path.name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is said of each of the broken files; in a process of its own, which OpenCV could end."""
    folder = tmp_path_factory.mktemp("broken")
    for name, (content, _) in BROKEN.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return {name: message.removeprefix(f"{folder / name}: ") for name, message in said.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_sound_forest_is_refused_before_opencv_reads_it(name: str, messages: dict[str, Any]) -> None:
    assert name in messages
    assert messages[name].startswith(KIND), messages[name]
    assert BROKEN[name][1] in messages[name]
    assert messages[name].endswith("; put one there, or leave proposals.edge_model out")


def test_opencv_itself_would_end_the_process(tmp_path: Path) -> None:
    code = f"import cv2; cv2.ximgproc.createStructuredEdgeDetection({str(tmp_path / 'm.yml')!r})"
    written(tmp_path / "m.yml", "%YAML:1.0\nname: mine\n")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode < 0


def test_a_file_that_is_gone_or_a_folder_is_named(tmp_path: Path) -> None:
    for path, why in (tmp_path / "gone.yml", "No such file or directory"), (tmp_path, "Is a directory"):
        with pytest.raises(SppnetError, match=rf"{path}: expected a structured forest .*, but {why}; put one there"):
            forest_edges(square(), path)


@pytest.mark.parametrize("side", [2, 16, 32])
def test_the_smallest_options_are_no_danger_either(side: int, tmp_path: Path) -> None:
    least = {name: 0 if name.endswith("Radius") else 1 for name in OPTIONS}
    options = {**least, "shrinkNumber": 2, "patchSize": side, "patchInnerSize": 2}
    text = forest({**options, "numberOfTrees": 2}, featureIds=[[0, 0, 0]] * 2, edgeBins=[[2 * 2 * 7 - 1] * 80])
    edges, _ = forest_edges(square(9, 2), written(tmp_path / "m.yml", text))
    assert edges.shape == (9, 2)


def test_an_opencv_without_its_contributions_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "ximgproc")
    with pytest.raises(SppnetError, match=r"no ximgproc; .* install opencv-contrib-python-headless"):
        load_forest(written(tmp_path / "m.yml", forest()))
