"""The trained detector: its two halves, its folder on disk, and what it does with nothing."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from doubles import TORCH_STATES, refused_by_us
from PIL import Image
from safetensors.torch import load_file, save_file

import sppnet
from sppnet.backbones import backbone as backbones
from sppnet.backbones import runtime
from sppnet.detection.box_regression import BoxRegressor, BoxRegressors
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.detection.torch_state import fingerprint
from sppnet.detection.window_features import ProjectedWindows, WindowScores
from sppnet.errors import ArtifactError, BackboneError, ImageError
from sppnet.records import pairwise_iou


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
    detect = detector.config.detect.model_copy(update={"vote": False})
    detector = replace(detector, regressors=None, config=detector.config.model_copy(update={"detect": detect}))
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
    found, cut = own.select(windows, WindowScores(scores, maps, where), scores > -1.5, 0.3)
    assert cut == ()
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
    with pytest.raises(ValueError, match=r"image must be .*uint8.*, or read it with"):
        detector.detect(image.astype(np.float32))
    with pytest.raises(ValueError, match=r"image must be .*uint8.*or read it with"):
        detector.detect(image[..., 0], np.array([[0, 0, 10, 10]]))
    with pytest.raises(ValueError, match=r"windows must be finite .* got \[0.0, 0.0, nan, 10.0\] at row 0"):
        detector.detect(image, np.array([[0, 0, np.nan, 10]]))


# ---- images and options --------------------------------------------------------------------------------------------


def test_an_image_may_be_a_path_a_pil_image_a_tensor_or_a_list_of_them(detector, image, windows, tmp_path):
    Image.fromarray(image).save(tmp_path / "a.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = detector.detect(image, windows, threshold=-2)
    inputs = [str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(image), tensor, tensor / 255]
    assert all(detector.detect(each, windows, threshold=-2) == expected for each in inputs)
    several = detector.detect([*inputs, image], [windows] * 6, threshold=-2)
    assert several == [expected] * 6
    assert detector.detect((image,), (windows[:3],), threshold=-2)[0] == detector.detect(
        image, windows[:3], threshold=-2
    )
    assert detector.detect([]) == detector.embed([]) == []
    maps = detector.embed([tmp_path / "a.png", tensor])
    assert all(torch.equal(own.maps[0], detector.embed(image).maps[0]) for own in maps)


def test_an_image_of_a_list_that_cannot_be_used_is_named(detector, image, windows, tmp_path, monkeypatch):
    with pytest.raises(ImageError, match=r"image 1 of the list: .*gone\.jpg: expected an image, but there is no such"):
        detector.detect([image, tmp_path / "gone.jpg"])
    with pytest.raises(ImageError, match=r"image 2 of the list: a tensor must be an RGB image"):
        detector.embed([image, image, torch.zeros(4, 5)])
    Image.fromarray(image).save(tmp_path / "thin.png")
    with monkeypatch.context() as patched:
        patched.setattr(backbones, "map_side", lambda steps, side: 0)
        with pytest.raises(BackboneError, match=r"thin\.png: an image of .* pixels is too narrow"):
            detector.detect(tmp_path / "thin.png", windows)
    for wrong in (windows, [windows], windows[0], "windows"):
        assert "windows" in refused_by_us(lambda wrong=wrong: detector.detect([image, image], wrong))


def test_options_of_a_call_count_over_the_settings(detector, image, windows):
    everything = detector.detect(image, windows, threshold=-np.inf)
    for threshold in (-1.0, everything.scores[7], [-1.2, -0.9, 0, -2, -1.0], torch.full((5,), -1.1)):
        assert detector.detect(image, windows, threshold=threshold) == everything.above(threshold)
    assert detector.detect(image, windows) == everything.above(detector.thresholds)
    low = replace(detector, thresholds=(-1.5, 0, -1, 5, -np.inf))
    assert low.detect(image, windows) == everything.above([-1.5, 0, -1, 5, -np.inf])
    assert detector.detect(image, windows, threshold=-2, top=4) == detector.detect(image, windows, threshold=-2)[:4]
    plain = replace(detector, regressors=None)
    kept = plain.detect(image, windows, threshold=-np.inf, nms=1)
    assert len(kept) == len(windows) * len(detector.classes)
    assert len(plain.detect(image, windows, threshold=-np.inf, nms=0)) < len(everything)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": np.nan}, {"threshold": "low"}, {"threshold": True}, {"threshold": [0, 0]},
        {"threshold": [0, 0, 0, 0, np.nan]}, {"nms": np.nan}, {"nms": 1.2}, {"nms": -0.1}, {"nms": "a"}, {"nms": True},
        {"nms": [0.3]}, {"top": 0}, {"top": -1}, {"top": 2.5}, {"top": True}, {"top": "3"}, {"top": np.nan},
    ],
)  # fmt: skip
def test_impossible_options_are_refused_whatever_the_image(detector, image, options):
    for own in (np.zeros((0, 4)), [[0, 0, 50, 50]]):
        assert next(iter(options)) in refused_by_us(lambda own=own: detector.detect(image, own, **options))


@pytest.mark.parametrize(
    "windows",
    [
        [[0, 0, np.inf, 9]], [[9, 0, 0, 9]], [[0, 0, 0, 9]], [[0, 0, 9]], "all", [[True] * 4], [["0", "0", "9", "9"]],
        {"a": [0, 0, 9, 9]}, [[0, 0, 9, 9], [0, 0]],
    ],
)  # fmt: skip
def test_impossible_windows_are_refused(detector, image, windows):
    maps = detector.embed(image)
    assert "windows" in refused_by_us(lambda: detector.detect(image, windows))
    assert "windows" in refused_by_us(lambda: detector.score(maps, windows))


@pytest.mark.parametrize("maps", [None, "image", ["maps"], np.zeros((3, 4, 5)), torch.zeros(3, 4, 5)])
def test_what_embed_did_not_return_is_not_scored(detector, image, windows, maps):
    assert "pass what embed returned" in refused_by_us(lambda: detector.score(maps, windows))
    real = detector.embed(image)
    assert "pass what embed returned" in refused_by_us(lambda: detector.score([real], windows))
    narrow = replace(real, maps=tuple(own[:3] for own in real.maps))
    assert "got 3; pass what embed returned" in refused_by_us(lambda: detector.score(narrow, windows))


def test_maps_windows_and_svms_are_equal_to_themselves_alone(detector, image):
    maps = detector.embed(image)
    assert maps == maps
    assert maps != detector.embed(image)
    assert detector.svms != replace(detector.svms)
    assert detector.regressors.per_class[0] != replace(detector.regressors.per_class[0])
    assert len({maps, detector.svms}) == 2


def test_evaluation_says_of_which_classes_the_maximum_left_some_out(detector, image, windows):
    whole, cut = detector.detect_for_evaluation(image, windows)
    assert cut == ()
    settings = detector.config.detect.model_copy(update={"max_per_class": 2, "score_threshold": -np.inf})
    own = replace(detector, config=detector.config.model_copy(update={"detect": settings}), regressors=None)
    found, cut = own.detect_for_evaluation(own.embed(image), windows)
    counts = np.bincount(own.detect(image, windows, threshold=-np.inf).labels, minlength=5)
    assert cut == tuple(name for name, count in zip(own.classes, counts, strict=True) if count > 2)
    assert cut
    assert np.bincount(found.labels, minlength=5).tolist() == np.minimum(counts, 2).tolist()
    assert len(whole) > len(found)


# ---- whatever the caller has set -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", TORCH_STATES)
def test_modes_of_the_caller_change_nothing(small_run, detector, image, windows, mode):
    expected, scores = detector.detect(image, windows, threshold=-2), detector.score(detector.embed(image), windows)
    with TORCH_STATES[mode]():
        loaded = SPPDetector.load(small_run.root)
        for own in (detector, loaded, replace(detector)):
            assert own.detect(image, windows, threshold=-2) == expected
            maps = own.embed(image)
            assert np.array_equal(own.score(maps, windows), scores)
        assert not maps.maps[0].is_inference()
    assert loaded.detect(image, windows, threshold=-2) == expected
    factor = torch.ones(1, requires_grad=True)
    (maps.maps[0] * factor).pow(2).sum().backward()  # needs ordinary tensors
    assert factor.grad.item() > 0


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.parametrize("mode", ["another device", "bfloat16", "inference"])
def test_modes_of_the_caller_change_nothing_with_openvino(detector, image, windows, mode):
    asked = detector.config.maps.model_copy(update={"runtime": "openvino"})
    detector = replace(detector, config=detector.config.model_copy(update={"maps": asked}))
    expected = detector.detect(image, windows, threshold=-2)
    with TORCH_STATES[mode]():
        assert replace(detector).detect(image, windows, threshold=-2) == expected


def test_threads_may_share_a_detector(small_run, detector, image, windows):
    images = [image, np.ascontiguousarray(image[::-1]), np.ascontiguousarray(image[:, ::-1])] * 4
    expected = [detector.detect(each, windows, threshold=-2) for each in images]
    fresh = SPPDetector.load(small_run.root)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda each: fresh.detect(each, windows, threshold=-2), images)) == expected


def test_a_copied_and_a_pickled_detector_find_the_same(detector, image, windows):
    expected = detector.detect(image, windows, threshold=-2)
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector)), copy.copy(detector)):
        assert other.detect(image, windows, threshold=-2) == expected
        assert other.thresholds == detector.thresholds


@torch.no_grad()
def scale_in_place(tensor):
    tensor.mul_(1.5)


CHANGES = {
    "head, in place": lambda own: scale_in_place(own.head.fc6.weight),
    "head, by .data": lambda own: own.head.fc7.weight.data.mul_(1.5),
    "one bias, by .data": lambda own: own.head.fc7.bias.data[3:4].add_(1),
    "a buffer": lambda own: own.head.input_scale.mul_(1.1),
    "load_state_dict": lambda own: own.head.load_state_dict({k: v * 1.2 for k, v in own.head.state_dict().items()}),
    "another layer": lambda own: setattr(own.head, "fc7", copy.deepcopy(own.head.fc7).requires_grad_(False)),
    "another head": lambda own: object.__setattr__(own, "head", shifted(own.head)),
    "backbone, in place": lambda own: scale_in_place(next(own.backbone.parameters())),
    "backbone, by .data": lambda own: next(own.backbone.parameters()).data.mul_(1.5),
    "head, hook": lambda own: own.head.fc7.register_forward_hook(lambda layer, given, found: found * 1.5),
    "head, order by .data": lambda own: own.head.fc7.weight.data.copy_(own.head.fc7.weight.data.flip(0)),
    "head, columns by .data": lambda own: own.head.fc6.weight.data.copy_(own.head.fc6.weight.data.flip(1)),
    "backbone, order by .data": lambda own: reverse_channels(own.backbone.conv1.conv.weight),
    "backbone, two by .data": lambda own: swap_two(own.backbone.conv1.conv.weight),
    "activation": lambda own: setattr(own.backbone.conv1, "relu", torch.nn.Tanh()),
    "padding": lambda own: setattr(own.backbone.conv1.conv, "padding_mode", "reflect"),
    "backbone, hook": lambda own: own.backbone.conv1.register_forward_pre_hook(lambda layer, given: -given[0]),
    "SVMs": lambda own: scale_in_place(own.svms.weight),
    "regressors": lambda own: [scale_in_place(each.bias.add_(0.1)) for each in own.regressors.per_class],
}


def reverse_channels(weight):
    weight.data.copy_(weight.data.flip(1))


def swap_two(weight):
    first, second = weight.data[0, 0], weight.data[0, 2]
    first[:], second[:] = second.clone(), first.clone()


def shifted(head):
    changed = copy.deepcopy(head)
    scale_in_place(changed.fc6.weight)
    return changed


@pytest.mark.parametrize("runtime", ["torch", "auto"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_were_changed_are_used(small_run, image, windows, tmp_path, change, runtime):
    own = SPPDetector.load(small_run.root)
    maps = own.config.maps.model_copy(update={"runtime": runtime})
    own = replace(own, config=own.config.model_copy(update={"maps": maps}))
    before = own.detect(image, windows, threshold=-np.inf)
    CHANGES[change](own)
    if change == "another layer":
        own.head.fc7.weight.data.neg_()
    after = own.detect(image, windows, threshold=-np.inf)
    assert after != before
    own.__dict__.pop("_made")
    assert own.detect(image, windows, threshold=-np.inf) == after
    if not {"hook", "activation", "padding"} & {*change.split(", ")}:  # no weights
        own.save(tmp_path)
        assert SPPDetector.load(tmp_path).detect(image, windows, threshold=-np.inf) == after


def test_a_backbone_that_is_no_longer_frozen_is_refused(small_run, image, windows):
    own = SPPDetector.load(small_run.root)
    own.detect(image, windows)
    own.backbone.requires_grad_(True)
    with pytest.raises(ValueError, match="expected a frozen backbone in eval mode"):
        own.detect(image, windows)


def test_weights_that_are_no_numbers_are_an_error_and_no_silence(small_run, image, windows):
    own = SPPDetector.load(small_run.root)
    own.head.fc7.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="the scores are not finite"):
        own.detect(image, windows)
    with pytest.raises(ValueError, match="the scores are not finite"):
        own.detect_for_evaluation(image, windows)


# ---- thresholds ----------------------------------------------------------------------------------------------------


def test_a_detector_that_says_no_thresholds_has_the_boundary_of_its_svms(folder, detector, image, windows):
    path = folder / "detector.json"
    description = json.loads(path.read_text())
    assert SPPDetector.load(folder).thresholds == tuple(description["thresholds"]) == detector.thresholds
    path.write_text(json.dumps({key: value for key, value in description.items() if key != "thresholds"}))
    old = SPPDetector.load(folder)
    assert old.thresholds == DetectorDescription.read(folder).thresholds == (0,) * 5
    assert old.detect(image, windows) == detector.detect(image, windows, threshold=0)
    for wrong in ([0, 0], "low", None, [0, 0, 0, 0, float("nan")], {"a": 1}):
        path.write_text(json.dumps({**description, "thresholds": wrong}))
        with pytest.raises(
            ArtifactError, match=r"detector\.json: damaged, or from another version of sppnet.*threshold"
        ):
            SPPDetector.load(folder)
    with pytest.raises(ValueError, match="one for each of 5 classes"):
        replace(detector, thresholds=[1, 2])


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_a_saved_detector_is_the_same_detector(detector, image, windows, tmp_path):
    detector.save(str(tmp_path / "copy"))
    again = SPPDetector.load(tmp_path / "copy")
    assert DetectorDescription.read(tmp_path / "copy").digest("cpu") == saved_digest(detector, tmp_path / "other")
    assert again.config == detector.config
    assert same(again.detect(image, windows), detector.detect(image, windows))


def test_the_mean_image_travels_with_the_detector(detector, image, windows, tmp_path):
    file, mean = tmp_path / "mean.npy", np.random.default_rng(0).uniform(0, 255, (3, 8, 9)).astype(np.float32)
    np.save(file, mean)
    weights = detector.config.backbone.weights.model_copy(update={"mean_image": file})
    own = detector.config.backbone.model_copy(update={"weights": weights})
    network = copy.deepcopy(detector.backbone)
    network.weights = weights
    vars(network).pop("mean", None)
    changed = replace(detector, backbone=network, config=detector.config.model_copy(update={"backbone": own}))
    maps = changed.embed(image).maps[0]
    assert not torch.allclose(maps, detector.embed(image).maps[0])
    changed.save(tmp_path / "copy")
    file.unlink()
    again = SPPDetector.load(tmp_path / "copy")
    assert torch.equal(again.embed(image).maps[0], maps)
    assert saved_digest(again, tmp_path / "third") == DetectorDescription.read(tmp_path / "copy").digest("cpu")
    (tmp_path / "copy" / "mean_image.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"mean_image\.safetensors: missing or damaged"):
        SPPDetector.load(tmp_path / "copy")


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
    own = detector.config.maps
    for change in ({"runtime": "auto"}, {"budget_gigabytes": 1.0}, {"target_side": 208.0}):
        same = replace(detector, config=detector.config.model_copy(update={"maps": own.model_copy(update=change)}))
        assert saved_digest(same, tmp_path / "same") == digests[0]
    for change in ({"scale_choice": "paper"}, {"target_side": 224.0}, {"scale_choice": "paper", "target_side": 208.0}):
        other = replace(detector, config=detector.config.model_copy(update={"maps": own.model_copy(update=change)}))
        digests.append(saved_digest(other, tmp_path / "other"))
    assert len(set(digests)) == 8
    assert saved_digest(replace(detector, thresholds=9), tmp_path / "nine") == digests[0]  # of detect alone


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


def test_a_detector_of_a_version_with_a_stage_more_is_what_it_was(folder, detector, image, windows):
    path = folder / "detector.json"
    description = json.loads(path.read_text())
    config = {**description["config"], "pretrain": {"enabled": True, "steps": 2000}}
    config["proposals"] = {**config["proposals"], "mode": "fast", "edge_model": None}
    path.write_text(json.dumps({**description, "config": config}))
    assert same(SPPDetector.load(folder.parent).detect(image, windows), detector.detect(image, windows))


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3]])
def test_rows_and_columns_in_another_order_are_a_change(order):
    weight = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))
    assert fingerprint(weight.clone()) == fingerprint(weight)
    assert fingerprint(weight[order]) != fingerprint(weight)
    columns = weight.view(4, 4, 256)[:, order].reshape(4, 1024)
    assert fingerprint(columns) != fingerprint(weight)
