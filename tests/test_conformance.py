"""The authors' release, step by step, through the public names and the command line alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import run_command

import sppnet
from sppnet.detection.box_regression import BoxRegressor
from sppnet.evaluation.voc import evaluate_flat

ZF5 = sppnet.Geometry(stride=16, first_centre=20, shrink=6.5)
LEVELS = (1, 2, 3, 6)
PUBLIC = [
    "Annotation",
    "BoxRegressionSettings",
    "Config",
    "Detections",
    "Geometry",
    "ImageRecord",
    "SPPDetector",
    "SVMSettings",
    "SpatialPyramidPool",
    "SppnetError",
    "WindowPool",
    "choose_scales",
    "evaluate_voc",
    "fit_box_regressor",
    "fit_linear_svm",
    "load_config",
    "mine_detectors",
    "nms",
    "pool_windows",
    "project_windows",
    "read_image",
    "selective_search",
    "spatial_pyramid_pool",
    "train_detector",
]


def golden(shared: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(shared / "golden" / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture
def windows(shared: Path) -> dict[str, np.ndarray]:
    values = golden(shared, "windows")
    values["boxes"] = values["boxes_1based"] - [1, 1, 0, 0]
    return values


def size_of(values: dict[str, np.ndarray]) -> tuple[int, int]:
    return int(values["image_height"]), int(values["image_width"])


def released_cells(unclipped: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The release's own 1-based inclusive windows -> merged where they cross, clamped, as half-open cells."""
    corners = unclipped.astype(np.float64)
    for low, high, limit in ((0, 2, size[1]), (1, 3, size[0])):
        crossed = corners[:, low] > corners[:, high]
        corners[crossed, low] = corners[crossed, high] = np.trunc(corners[crossed][:, [low, high]].mean(axis=1))
        corners[:, [low, high]] = corners[:, [low, high]].clip(1, limit)
    return (corners - [1, 1, 0, 0]).astype(np.int64)


# ---- what can be imported ------------------------------------------------------------------------------------------


def test_the_public_names_are_what_they_say_and_no_more():
    assert sorted(sppnet.__all__) == sorted(PUBLIC)
    assert all(hasattr(sppnet, name) for name in PUBLIC)
    assert sppnet.__version__


def test_public_names_come_from_the_modules_that_type_checkers_see():
    tree = ast.parse(Path(sppnet.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {name.name: node.module for node in checked.body for name in node.names}
    assert seen == {name: f"sppnet.{module}" for name, module in sppnet._MODULES.items()}
    assert set(seen) == set(sppnet.__all__) <= set(dir(sppnet))
    assert all(getattr(sppnet, name).__module__ == module for name, module in seen.items())
    with pytest.raises(AttributeError, match="module 'sppnet' has no attribute 'nothing'"):
        sppnet.nothing  # noqa: B018


def test_the_geometry_has_a_stride_a_first_centre_and_a_shrink():
    assert (ZF5.stride, ZF5.first_centre, ZF5.shrink) == (16, 20, 6.5)


def test_arrays_and_tensors_are_both_accepted_and_give_the_same():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 200, (40, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 100, (40, 2))], axis=1)
    scores = rng.random(40)
    own, scales = torch.from_numpy(boxes), (300, 480)
    assert sppnet.nms(own, torch.from_numpy(scores), 0.3).tolist() == sppnet.nms(boxes, scores, 0.3).tolist()
    chosen = sppnet.choose_scales(own, (300, 320), scales)
    assert chosen.tolist() == sppnet.choose_scales(boxes, (300, 320), scales).tolist()
    cells = sppnet.project_windows(own, (300, 320), 300, ZF5, (18, 20))
    assert cells.tolist() == sppnet.project_windows(boxes, (300, 320), 300, ZF5, (18, 20)).tolist()
    feature_map = torch.from_numpy(rng.random((3, 18, 20), np.float32))
    pooled = sppnet.pool_windows(feature_map, cells, (1, 2))
    assert torch.equal(pooled, sppnet.pool_windows(feature_map, cells.numpy(), (1, 2)))
    features = rng.standard_normal((40, 5)).astype(np.float32)
    labels = np.where(np.arange(40) < 15, 1, -1)
    svm = sppnet.fit_linear_svm(torch.from_numpy(features), labels, sppnet.SVMSettings())
    assert np.array_equal(svm.weight, sppnet.fit_linear_svm(features, labels).weight)
    assert svm.weight.shape == (5,)
    assert isinstance(svm.bias, float)
    regressor = sppnet.fit_box_regressor(features, boxes, boxes + 3, sppnet.BoxRegressionSettings())
    refined = regressor.refine(features, boxes)
    assert refined.shape == (40, 4)
    assert np.array_equal(refined, regressor.refine(torch.from_numpy(features), boxes))


def test_evaluate_voc_gives_ap_per_class_and_their_mean():
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    truth = sppnet.Annotation(boxes, ("cat", "dog"), np.zeros(2, bool))
    found = sppnet.Detections(boxes[:1], np.ones(1, np.float32), np.zeros(1, np.int64), ("cat", "dog"))
    for metric in ("11point", "area"):
        evaluation = sppnet.evaluate_voc([found], [truth], ("cat", "dog"), metric, 0.5)
        assert evaluation.ap == {"cat": 1.0, "dog": 0.0}
        assert evaluation.map == 0.5


# ---- against the release's numbers ---------------------------------------------------------------------------------


# A part of them lies in tests/golden and is compared everywhere; all of them where SPPNET_SHARED names their folder.

GOLDEN = Path(__file__).parent / "golden"


def kept(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def test_windows_fall_on_the_releases_cells_and_pool_its_values():
    values = kept("windows")
    boxes, size = values["boxes_1based"] - [1, 1, 0, 0], size_of(values)
    feature_map = values["map_688"]
    cells = sppnet.project_windows(boxes, size, 688, ZF5, feature_map.shape[1:])
    assert np.array_equal(cells, released_cells(values["window_688_1based_unclipped"], feature_map.shape[1:]))
    pooled = sppnet.pool_windows(torch.from_numpy(feature_map), cells[:30], LEVELS).numpy()
    assert np.array_equal(pooled, values["pooled_688"])


def test_windows_take_the_releases_scale_of_five_and_its_cells_there():
    values = kept("windows")
    boxes, size = values["boxes_1based"] - [1, 1, 0, 0], size_of(values)
    chosen = sppnet.choose_scales(boxes, size, values["scales"])
    assert np.array_equal(chosen, values["best_scale_index"])
    for index, (scale, map_size) in enumerate(zip(values["scales"].tolist(), values["map_sizes"], strict=True)):
        own = chosen == index
        cells = sppnet.project_windows(boxes[own], size, scale, ZF5, map_size)
        assert np.array_equal(cells, released_cells(values["window_1based_unclipped"][own], map_size))


def test_suppression_keeps_the_releases_boxes_in_its_order():
    values = kept("nms")
    found = sppnet.nms(values["boxes"] - [1, 1, 0, 0], values["scores"], float(values["nms_threshold"]))
    assert found.tolist() == values["keep_order"].tolist()


def test_the_releases_regressor_predicts_its_boxes():
    values = kept("box_regression")
    weight, parts = torch.from_numpy(values["weights"]), ("target_mean", "target_unwhiten")
    own = BoxRegressor(weight[:, :-1], weight[:, -1], *(torch.from_numpy(values[name]) for name in parts))
    predicted = own.refine(values["features"], values["examples"])
    np.testing.assert_allclose(predicted, values["predicted"], rtol=1e-6)


@pytest.mark.parametrize(("column", "metric"), [(0, "11point"), (1, "area")])
def test_average_precision_is_the_devkits(column, metric):
    values = kept("voc_ap")
    annotations = {}
    for image in range(int(values["images"])):
        own = values["object_images"] == image
        names = tuple(values["object_names"][own].tolist())
        annotations[str(image)] = sppnet.Annotation(values["object_boxes"][own], names, values["object_difficult"][own])
    classes = [key.removesuffix("_expected") for key in values if key.endswith("_expected")]
    detections = {
        name: ([str(i) for i in values[f"{name}_images"]], values[f"{name}_scores"], values[f"{name}_boxes"])
        for name in classes
    }
    found = evaluate_flat(detections, annotations, classes, metric).ap
    assert len(classes) == 3
    assert found == pytest.approx({name: values[f"{name}_expected"][column] for name in classes}, abs=1e-9)


@pytest.mark.shared_data
def test_every_window_falls_on_the_releases_cells_and_pools_its_values_at_one_scale(windows):
    feature_map = windows["map_688"]
    cells = sppnet.project_windows(windows["boxes"], size_of(windows), 688, ZF5, feature_map.shape[1:])
    expected = released_cells(windows["window_688_1based_unclipped"], feature_map.shape[1:])
    assert (cells == expected).all(axis=1).sum() == 300
    pooled = sppnet.pool_windows(torch.from_numpy(feature_map), cells, LEVELS).numpy()
    assert (pooled == windows["pooled_688"]).all(axis=1).sum() == 300


@pytest.mark.shared_data
def test_every_window_falls_on_the_releases_cells_and_pools_its_values_at_five_scales(windows):
    chosen = sppnet.choose_scales(windows["boxes"], size_of(windows), windows["scales"])
    assert np.array_equal(chosen, windows["best_scale_index"])
    agreed = 0
    for index, scale in enumerate(windows["scales"]):
        own, feature_map = chosen == index, windows[f"map_{scale}"]
        cells = sppnet.project_windows(windows["boxes"][own], size_of(windows), scale, ZF5, feature_map.shape[1:])
        expected = released_cells(windows["window_1based_unclipped"][own], feature_map.shape[1:])
        pooled = sppnet.pool_windows(torch.from_numpy(feature_map), cells, LEVELS).numpy()
        same = (cells == expected).all(axis=1) & (pooled == windows["pooled_5scale"][own]).all(axis=1)
        agreed += int(same.sum())
    assert agreed == 300


@pytest.mark.shared_data
def test_suppression_keeps_the_same_boxes_in_the_same_order(shared):
    values = golden(shared, "nms_overlap")
    kept = sppnet.nms(values["boxes"] - [1, 1, 0, 0], values["scores"], float(values["nms_threshold"]))
    assert kept.tolist() == values["keep_order"].tolist()


@pytest.mark.shared_data
def test_box_regression_predicts_the_same_boxes(shared):
    values = golden(shared, "box_regression")
    settings = sppnet.BoxRegressionSettings(ridge=float(values["ridge_lambda"]))
    regressor = sppnet.fit_box_regressor(values["features"], values["examples"], values["ground_truth"], settings)
    predicted = regressor.refine(values["features"], values["examples"])
    np.testing.assert_allclose(predicted, values["predicted"], rtol=1e-6)


@pytest.mark.shared_data
def test_the_svm_reaches_the_releases_objective_within_a_thousandth(shared):
    values = golden(shared, "svm")
    C, multiplier, positive = (float(values[key]) for key in ("C", "bias_mult", "pos_loss_weight"))
    settings = sppnet.SVMSettings(C=C, bias_multiplier=multiplier, positive_weight=positive)
    svm = sppnet.fit_linear_svm(values["X"], values["y"], settings)
    margin = values["y"] * (values["X"].astype(np.float64) @ svm.weight + svm.bias)
    loss = np.where(values["y"] > 0, positive, 1.0) * np.maximum(0, 1 - margin)
    objective = (svm.weight @ svm.weight + (svm.bias / multiplier) ** 2) / 2 + C * loss.sum()
    assert objective == pytest.approx(float(values["objective_tight"]), rel=1e-3)


@pytest.mark.shared_data
def test_the_score_command_gives_the_devkits_average_precision_by_both_rules(shared):
    folder = shared / "golden/voc_ap"
    rows = [line.split() for line in (folder / "expected.txt").read_text().splitlines()]
    for column, metric in ((2, "11point"), (3, "area")):
        expected = {row[0]: float(row[column]) for row in rows}
        files = ["--annotations", folder / "Annotations", "--image-set", folder / "ImageSets/Main/test.txt"]
        options = ["--detections", folder / "comp4_det_test_{}.txt", "--classes", ",".join(expected), "--json"]
        command = ["score", *map(str, files + options), "--metric", metric]
        if metric == "11point":  # once as a command of its own, which takes its time to start
            run = subprocess.run([sys.executable, "-m", "sppnet", *command], capture_output=True, text=True, check=True)
            found = json.loads(run.stdout)
        else:
            found = json.loads(run_command(*command).out)
        assert found["ap"] == pytest.approx(expected, abs=1e-9)
        assert found["map"] == pytest.approx(np.mean(list(expected.values())), abs=1e-9)
