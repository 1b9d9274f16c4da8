"""The trained detector: its two halves, its folder on disk, and what it does with nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import random_windows

import sppnet
from sppnet.backbones import runtime
from sppnet.detection.box_regression import BoxRegressor, BoxRegressors
from sppnet.detection.detector import DetectorDescription, SPPDetector, WindowScores
from sppnet.detection.window_features import ProjectedWindows
from sppnet.errors import ArtifactError
from sppnet.records import pairwise_iou


@pytest.fixture(scope="module")
def detector(small_run):
    return SPPDetector.load(small_run.root)


@pytest.fixture(scope="module")
def image(small_run):
    return sppnet.read_image(small_run.devkit / "SHAPES/JPEGImages/test_00000.jpg")


@pytest.fixture(scope="module")
def windows(image):
    return random_windows(image.shape[:2], np.zeros((0, 4)), np.random.default_rng(1), 40)


@pytest.fixture
def folder(small_run, tmp_path):
    """A copy of the detector folder, to be damaged."""
    shutil.copytree(small_run.root / "detector", tmp_path / "run/detector")
    return tmp_path / "run/detector"


def same(a: sppnet.Detections, b: sppnet.Detections) -> bool:
    pairs = zip((a.boxes, a.scores, a.labels), (b.boxes, b.scores, b.labels), strict=True)
    return a.classes == b.classes and all(np.array_equal(x, y) for x, y in pairs)


def saved_digest(detector, folder) -> str:
    detector.save(folder)
    return DetectorDescription.read(folder).digest("cpu")


# ---- detections ----------------------------------------------------------------------------------------------------


def test_a_detector_of_openvino_works_where_it_is_missing(detector, image, windows, monkeypatch):
    maps = detector.config.maps
    asked = detector.config.model_copy(update={"maps": maps.model_copy(update={"runtime": "openvino"})})
    plain = detector.config.model_copy(update={"maps": maps.model_copy(update={"runtime": "torch"})})
    monkeypatch.setattr(runtime, "_openvino_is_installed", lambda: False)
    assert same(
        replace(detector, config=asked).detect(image, windows), replace(detector, config=plain).detect(image, windows)
    )


def test_detections_are_sorted_typed_and_inside_the_image(detector, image, windows):
    found, cut = detector.detect_for_evaluation(image, windows)
    assert cut == ()
    assert len(found) > 0
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert (np.diff(found.scores) <= 0).all()
    height, width = image.shape[:2]
    assert found.boxes.min() >= 0
    assert (found.boxes[:, 2:] <= [width, height]).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert found.scores.min() > detector.config.detect.score_threshold
    for label in range(len(found.classes)):
        own = found.boxes[found.labels == label]
        overlaps = pairwise_iou(own.astype(np.float64), own.astype(np.float64)) - np.eye(len(own))
        assert overlaps.max(initial=0) <= detector.config.detect.nms_overlap + 1e-6


def test_embedding_once_and_scoring_apart_agrees_with_detect(detector, image, windows):
    detector = replace(detector, regressors=None)
    maps = detector.embed(image)
    scores = detector.score(maps, windows)
    assert scores.shape == (len(windows), len(detector.classes))
    assert np.allclose(np.concatenate([detector.score(maps, windows[:7]), detector.score(maps, windows[7:])]), scores)
    found = detector.detect(image, windows)
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        row = np.flatnonzero((windows == box).all(axis=1))[0]
        assert scores[row, label] == score


def test_selection_is_threshold_suppression_regression_clipping_and_suppression(detector):
    """Two classes by hand: window 1 is suppressed by 0, 3 scores too low, 4 has left the image; the others move."""
    windows = np.array(
        [[0, 0, 40, 40], [2, 0, 42, 40], [80, 0, 120, 40], [0, 60, 40, 100], [118, 50, 138, 90]], np.float64
    )
    scores = np.array([[1.0, -2], [0.9, -2], [0.5, 0.6], [-2, -1.5], [0.8, -2]], np.float32)
    maps = detector.embed(np.zeros((100, 120, 3), np.uint8))
    where = ProjectedWindows(np.zeros(5, np.int64), np.tile([0, 0, 1, 1], (5, 1)))
    width = detector.regressors.per_class[0].weight.shape[1]
    shift = BoxRegressor(
        torch.zeros(4, width, dtype=torch.float64), torch.tensor([0.25, 0, 0, 0], dtype=torch.float64),
        torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64),
    )  # fmt: skip
    linear = replace(detector.svms, weight=torch.zeros(2, 3), bias=torch.zeros(2), classes=("a", "b"))
    own = replace(detector, thresholds=(), svms=linear, regressors=BoxRegressors.stack({"a": shift, "b": shift}))
    found = own.select(windows, WindowScores(scores, maps, where), (100, 120))
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [0, 1, 0]
    assert found.scores.tolist() == pytest.approx([1.0, 0.6, 0.5])
    assert found.boxes.tolist() == [[10, 0, 50, 40], [90, 0, 120, 40], [90, 0, 120, 40]]


def test_no_windows_give_no_detections(detector, image):
    for nothing in (np.zeros((0, 4)), []):
        found = detector.detect(image, nothing)
        assert (found.boxes.shape, found.scores.shape, found.labels.shape) == ((0, 4), (0,), (0,))
        assert found.classes == detector.classes
    assert detector.score(detector.embed(image), np.zeros((0, 4))).shape == (0, len(detector.classes))
    blind = replace(detector, proposer=lambda image: np.zeros((0, 4), np.float32))
    assert len(blind.detect(image)) == 0


def test_an_image_smaller_than_every_window_gives_no_detections(detector):
    assert len(detector.detect(np.zeros((7, 9, 3), np.uint8))) == 0


def test_a_fixed_proposer_takes_the_place_of_the_search(small_run, detector, image, windows):
    fixed = SPPDetector.load(small_run.root, proposer=lambda image: windows)
    assert same(fixed.detect(image), detector.detect(image, windows))
    assert same(replace(detector, proposer=lambda image: windows).detect(image), fixed.detect(image))


def test_the_search_is_that_of_the_settings(detector):
    """A white square on black: selective search finds it by itself."""
    picture = np.zeros((120, 160, 3), np.uint8)
    picture[30:90, 50:110] = 255
    found = replace(detector, regressors=None).detect(picture, threshold=-3)
    assert len(found) > 0
    assert pairwise_iou(found.boxes.astype(np.float64), np.array([[50.0, 30, 110, 90]])).max() > 0.8


def test_bfloat16_finds_nearly_the_same(detector, image, windows):
    half = replace(detector, config=detector.config.model_copy(update={"precision": "bfloat16"}))
    exact = detector.score(detector.embed(image), windows)
    rounded = half.score(half.embed(image), windows)
    assert rounded.dtype == np.float32
    assert not np.array_equal(exact, rounded)
    assert np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()
    assert len(half.detect(image, windows, threshold=-2)) > 0


def test_images_and_windows_of_wrong_shapes_are_refused(detector, image):
    with pytest.raises(ValueError, match=r"windows must have shape \(R, 4\), got \(4,\); pass windows\[None\]"):
        detector.detect(image, np.array([0, 0, 10, 10]))
    with pytest.raises(ValueError, match=r"image must be .*uint8.*; read it with"):
        detector.detect(image.astype(np.float32))
    with pytest.raises(ValueError, match=r"image must be .*uint8.*; read it with"):
        detector.detect(image[..., 0], np.array([[0, 0, 10, 10]]))
    with pytest.raises(ValueError, match=r"windows\[0\] is \[0.0, 0.0, nan, 10.0\]: expected finite x1 < x2"):
        detector.detect(image, np.array([[0, 0, np.nan, 10]]))


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_a_saved_detector_is_the_same_detector(detector, image, windows, tmp_path):
    detector.save(tmp_path / "copy")
    again = SPPDetector.load(tmp_path / "copy")
    assert DetectorDescription.read(tmp_path / "copy").digest("cpu") == saved_digest(detector, tmp_path / "other")
    assert again.config == detector.config
    assert same(again.detect(image, windows), detector.detect(image, windows))


def test_a_detector_without_box_regression_is_saved_and_loaded_too(detector, image, windows, tmp_path):
    plain = replace(detector, regressors=None)
    detector.save(tmp_path)  # leaves regressors behind, which must not come back
    plain.save(tmp_path)
    again = SPPDetector.load(tmp_path)
    assert again.regressors is None
    assert same(again.detect(image, windows), plain.detect(image, windows))
    assert not same(again.detect(image, windows, threshold=-2), detector.detect(image, windows, threshold=-2))


def test_the_digest_covers_weights_settings_of_the_test_and_precision(detector, tmp_path):
    maps = detector.config.maps.model_copy(update={"scales": (96,)})
    others = [
        replace(detector, regressors=None),
        replace(detector, svms=replace(detector.svms, bias=detector.svms.bias + 1)),
        replace(detector, config=detector.config.model_copy(update={"maps": maps})),
        replace(detector, config=detector.config.model_copy(update={"precision": "bfloat16"})),
    ]
    digests = [saved_digest(other, tmp_path / str(number)) for number, other in enumerate([detector, *others])]
    assert len(set(digests)) == 5
    runtime = detector.config.maps.model_copy(update={"runtime": "auto"})
    same = replace(detector, config=detector.config.model_copy(update={"maps": runtime}))
    assert saved_digest(same, tmp_path / "same") == digests[0]


def test_moving_a_detector_changes_nothing_it_finds(detector, image, windows):
    moved = detector.to("cpu")
    assert moved.device == torch.device("cpu")
    assert same(moved.detect(image, windows), detector.detect(image, windows))


@pytest.mark.gpu
def test_a_detector_on_the_gpu_finds_the_same(small_run, detector, image, windows):
    moved = SPPDetector.load(small_run.root, "cuda")
    scores = moved.score(moved.embed(image), windows)
    np.testing.assert_allclose(scores, detector.score(detector.embed(image), windows), rtol=1e-3, atol=1e-3)
    assert len(moved.detect(image, windows)) > 0


def test_a_folder_without_a_detector_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="none: no such folder; name the run folder of a training"):
        SPPDetector.load(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"holds no trained detector .*run `sppnet train` to the end first"):
        SPPDetector.load(tmp_path)


@pytest.mark.parametrize("part", ["backbone", "head", "svm", "boxes"])
def test_missing_damaged_and_exchanged_weights_are_refused(folder, part):
    path = folder / f"{part}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=rf"{part}\.safetensors: missing or damaged; run `sppnet train` again"):
        SPPDetector.load(folder.parent)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{part}\.safetensors: missing or damaged; run `sppnet train` again"):
        SPPDetector.load(folder.parent)
    path.write_bytes(whole)
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file({**tensors, name: tensors[name] + 1}, path)
    with pytest.raises(ArtifactError, match=rf"{part}\.safetensors: is not the file this detector was saved with"):
        SPPDetector.load(folder.parent)


def test_a_damaged_description_is_refused(folder):
    path = folder / "detector.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match=r"detector\.json: cannot read this artifact"):
        SPPDetector.load(folder.parent)
    for content in ("[]", "null", '"text"'):
        path.write_text(content)
        with pytest.raises(ArtifactError, match=r"detector\.json: expected format 2, got .*run `sppnet train` again"):
            SPPDetector.load(folder.parent)
    for name in ("classes", "config", "parts", "ranks"):
        path.write_text(json.dumps({key: value for key, value in json.loads(text).items() if key != name}))
        with pytest.raises(ArtifactError, match=rf"{name} is missing or incomplete.*run `sppnet train` again"):
            SPPDetector.load(folder.parent)


def test_a_detector_of_another_version_is_refused(folder):
    path = folder / "detector.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "format": 3}))
    with pytest.raises(ArtifactError, match=r"expected format 2, got 3; .*another version of sppnet"):
        SPPDetector.load(folder.parent)
    path.write_text(json.dumps({**description, "format": 1}))
    with pytest.raises(
        ArtifactError, match=r"earlier version of sppnet, .*trunk is now backbone.*run `sppnet train` again"
    ):
        SPPDetector.load(folder.parent)
    config = description["config"]
    for section, key, value in (
        ("maps", "colour", 1),
        ("backbone", "name", "tiny6"),
        ("head", "fc6", 17),
        ("pyramid", "levels", [1, 3]),
    ):
        changed = {**config, section: {**config[section], key: value}}
        path.write_text(json.dumps({**description, "config": changed}))
        with pytest.raises(ArtifactError, match=r"detector\.json: damaged, or from another version of sppnet"):
            SPPDetector.load(folder.parent)
