import numpy as np
import pytest
import torch
from doubles import refused_by_us
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused_here

from sppnet.artifacts import read_tensors, write_tensors
from sppnet.config import BoxRegressionSettings
from sppnet.detection.box_regression import (
    BoxRegressors,
    apply_targets,
    fit_box_regressor,
    regression_targets,
)


def examples(count=50, width=6, seed=0):
    """Features and windows whose boxes are a noisy function of both."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 200, (count, 2))
    windows = np.concatenate([corner, corner + rng.uniform(20, 100, (count, 2))], axis=1)
    features = rng.uniform(0, 3, (count, width)).astype(np.float32)
    targets = 0.1 * features @ rng.standard_normal((width, 4)) * 0.3 + 0.02 * rng.standard_normal((count, 4))
    return torch.from_numpy(features), windows, apply_targets(windows, targets)


def naive_fit(features, windows, boxes, settings, scale=1.0):
    """The definition with explicit loops and inverses; returns predicted boxes for the training windows."""
    targets = []
    for (x1, y1, x2, y2), (a1, b1, a2, b2) in zip(windows, boxes, strict=True):
        w, h = x2 - x1, y2 - y1
        dx, dy = ((a1 + a2) - (x1 + x2)) / 2 / w, ((b1 + b2) - (y1 + y2)) / 2 / h
        targets.append([dx, dy, np.log((a2 - a1) / w), np.log((b2 - b1) / h)])
    targets = np.array(targets)
    mean = targets.mean(axis=0)
    covariance = np.cov(targets.T, bias=True) + settings.whitening * np.eye(4)
    values, vectors = np.linalg.eigh(covariance)
    unwhiten = vectors @ np.diag(values**0.5) @ vectors.T
    x = np.column_stack([features.double().numpy() * scale, np.ones(len(features))])
    whitened = (targets - mean) @ np.linalg.inv(unwhiten)
    weight = np.linalg.inv(x.T @ x + settings.ridge * np.eye(x.shape[1])) @ x.T @ whitened
    return apply_targets(windows, x @ weight @ unwhiten + mean)


@pytest.mark.shared_data
def test_weights_and_predictions_equal_those_of_the_release(shared):
    with np.load(shared / "golden/box_regression.npz", allow_pickle=False) as golden:
        features = torch.from_numpy(golden["features"])
        settings = BoxRegressionSettings(ridge=float(golden["ridge_lambda"]))
        regressor = fit_box_regressor(features, golden["examples"], golden["ground_truth"], settings)
        weight = torch.cat([regressor.weight, regressor.bias[:, None]], dim=1).numpy()
        np.testing.assert_allclose(weight, golden["weights"], rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(regressor.target_mean, golden["target_mean"], rtol=1e-12)
        np.testing.assert_allclose(regressor.target_unwhiten, golden["target_unwhiten"], rtol=1e-10)
        predicted = regressor.refine(features, golden["examples"])
        np.testing.assert_allclose(predicted, golden["predicted"], rtol=1e-9)
        targets = regression_targets(golden["examples"], golden["ground_truth"])
        np.testing.assert_allclose(targets, golden["targets"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("count", "width"), [(50, 6), (12, 40), (7, 7), (1, 3), (1100, 3), (3, 1100)])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_either_solution_equals_the_definition(count, width, scale):
    features, windows, boxes = examples(count, width)
    settings = BoxRegressionSettings(ridge=7.0)
    regressor = fit_box_regressor(features, windows, boxes, settings, scale)
    expected = naive_fit(features, windows, boxes, settings, scale)
    np.testing.assert_allclose(regressor.refine(features, windows), expected, rtol=1e-8)


def test_the_systems_of_examples_and_of_features_give_the_same_regressor(monkeypatch):
    monkeypatch.setattr("sppnet.detection.box_regression.BLOCK", 16)  # several blocks and tiles
    features, windows, boxes = examples(60, 59)
    padded = torch.cat([features, torch.zeros(60, 31)], dim=1)  # zeros change nothing but the choice of system
    primal = fit_box_regressor(features, windows, boxes)
    dual = fit_box_regressor(padded, windows, boxes)
    np.testing.assert_allclose(dual.weight[:, :59], primal.weight, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(dual.bias, primal.bias, rtol=1e-9)
    assert not dual.weight[:, 59:].any()


def test_half_precision_features_are_fitted_in_double_precision():
    features, windows, boxes = examples(40, 5)
    half = features.half()
    first, second = (fit_box_regressor(f, windows, boxes) for f in (half, half.double()))
    assert torch.equal(first.weight, second.weight)
    assert first.weight.dtype == torch.float64


def test_the_covariance_of_targets_is_divided_by_their_number_and_lifted():
    windows = np.tile([[0.0, 0, 10, 10]], (2, 1))
    boxes = windows + np.array([[2, 0, 2, 0], [-2, 0, -2, 0]])  # dx = ±0.2, the rest 0: covariance 0.04 in one place
    regressor = fit_box_regressor(torch.rand(2, 3), windows, boxes, BoxRegressionSettings(whitening=0.01))
    np.testing.assert_allclose(regressor.target_unwhiten, np.diag(np.sqrt([0.05, 0.01, 0.01, 0.01])), atol=1e-15)


def test_arrays_that_cannot_be_written_to_are_features_too():
    features, windows, boxes = examples()
    frozen = [features.numpy().copy(), windows.copy(), boxes.copy()]
    for array in frozen:
        array.flags.writeable = False
    expected = fit_box_regressor(features, windows, boxes).refine(features, windows)
    regressor = fit_box_regressor(*frozen)
    np.testing.assert_array_equal(regressor.refine(*frozen[:2]), expected)
    np.testing.assert_array_equal(BoxRegressors.stack({"cat": regressor}).refine(*frozen[:2], 0), expected)


def test_targets_and_their_application_are_inverse():
    _, windows, boxes = examples()
    np.testing.assert_allclose(apply_targets(windows, regression_targets(windows, boxes)), boxes)


def test_a_known_window_has_known_targets():
    targets = regression_targets(np.array([[10, 10, 30, 50]]), np.array([[15, 10, 25, 90]]))
    np.testing.assert_allclose(targets, [[0, 0.5, np.log(0.5), np.log(2)]])


def test_no_examples_give_the_regressor_that_changes_nothing():
    regressor = fit_box_regressor(torch.zeros(0, 5), np.zeros((0, 4)), np.zeros((0, 4)))
    windows = np.array([[1.0, 2, 30, 40]])
    np.testing.assert_allclose(regressor.refine(torch.rand(1, 5), windows), windows)


def test_no_windows_are_refined_to_no_boxes():
    regressor = fit_box_regressor(*examples())
    assert regressor.refine(torch.zeros(0, 6), np.zeros((0, 4))).shape == (0, 4)
    stacked = BoxRegressors.stack({"cat": regressor})
    assert stacked.refine(torch.zeros(0, 6), np.zeros((0, 4)), np.zeros(0)).shape == (0, 4)


def test_each_window_is_refined_by_the_regressor_of_its_label():
    fitted = {name: fit_box_regressor(*examples(seed=seed)) for seed, name in enumerate(["cat", "dog", "cow"])}
    stacked = BoxRegressors.stack(fitted)
    features, windows, _ = examples(9, seed=5)
    labels = np.array([2, 0, 0, 1, 2, 1, 0, 2, 2])
    refined = stacked.refine(features, windows, labels)
    for row, label in enumerate(labels):
        own = list(fitted.values())[label].refine(features[row : row + 1], windows[row : row + 1])
        np.testing.assert_allclose(refined[row : row + 1], own)
    np.testing.assert_allclose(stacked.refine(features, windows, 1), fitted["dog"].refine(features, windows))


def test_windows_that_share_features_name_their_rows():
    stacked = BoxRegressors.stack({name: fit_box_regressor(*examples(seed=k)) for k, name in enumerate(["cat", "dog"])})
    features, windows, _ = examples(4, seed=5)
    rows, labels = np.array([3, 0, 3, 1, 2, 0]), np.array([0, 1, 1, 0, 0, 0])
    expected = stacked.refine(features[torch.from_numpy(rows)], windows[rows], labels)
    np.testing.assert_array_equal(stacked.refine(features, windows[rows], labels, rows), expected)


def test_in_single_precision_the_boxes_are_nearly_the_same():
    fitted = BoxRegressors.stack({"cat": fit_box_regressor(*examples())})
    features, windows, _ = examples(30, seed=1)
    exact, single = fitted.refine(features, windows, 0), fitted.single().refine(features, windows, 0)
    assert 0 < np.abs(exact - single).max() < 1e-3
    assert fitted.per_class[0].weight.dtype == torch.float64


def test_regressors_survive_the_store(tmp_path):
    fitted = {name: fit_box_regressor(*examples(seed=seed), scale=0.3) for seed, name in enumerate(["sofa", "vélo"])}
    stacked = BoxRegressors.stack(fitted)
    write_tensors(tmp_path / "boxes.safetensors", stacked.to_tensors())
    again = BoxRegressors.from_tensors(read_tensors(tmp_path / "boxes.safetensors"))
    assert (again.classes, again.per_class[0].scale) == (("sofa", "vélo"), 0.3)
    features, windows, _ = examples(4)
    np.testing.assert_array_equal(again.refine(features, windows, 1), stacked.refine(features, windows, 1))


def test_a_class_without_examples_keeps_its_windows():
    features, windows, boxes = examples()
    fitted = fit_box_regressor(features, windows, boxes, scale=0.5)
    idle = fit_box_regressor(features[:0], windows[:0], boxes[:0], scale=0.5)
    stacked = BoxRegressors.stack({"cat": fitted, "dog": idle})
    np.testing.assert_allclose(stacked.refine(features, windows, 1), windows)
    np.testing.assert_allclose(stacked.refine(features, windows, 0), fitted.refine(features, windows))


def test_errors_say_what_was_expected():
    features, windows, boxes = examples(3)
    flat = windows.copy()
    flat[1, 2] = flat[1, 0]
    with pytest.raises(ValueError, match=r"windows must be finite x1 y1 x2 y2 with x2 > x1 .* at row 1"):
        fit_box_regressor(features, flat, boxes)
    with pytest.raises(ValueError, match=r"boxes must be finite x1 y1 x2 y2 with x2 > x1 .* at row 1"):
        fit_box_regressor(features, windows, flat)
    with pytest.raises(ValueError, match="expected one of boxes for each of the 3 feature rows, got 2"):
        fit_box_regressor(features, windows, boxes[:2])
    with pytest.raises(ValueError, match=r"features must have shape \(R, D\), got \(3,\)"):
        fit_box_regressor(features[:, 0], windows, boxes)
    regressor = fit_box_regressor(features, windows, boxes)
    with pytest.raises(ValueError, match=r"features must have shape \(R, 6\), got \(3, 5\)"):
        regressor.refine(features[:, :5], windows)
    with pytest.raises(ValueError, match="expected one of windows for each of the 3 feature rows"):
        fit_box_regressor(features, windows[:1], boxes)
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 0, got \[1\]"):
        BoxRegressors.stack({"cat": regressor}).refine(features, windows, 1)
    with pytest.raises(ValueError, match="share one feature width and scale"):
        BoxRegressors.stack({"cat": regressor, "dog": fit_box_regressor(features[:, :2], windows, boxes)})
    tensors = BoxRegressors.stack({"cat": regressor}).to_tensors()
    del tensors["bias"]
    with pytest.raises(ValueError, match=r"need the tensors \['bias'\] too"):
        BoxRegressors.from_tensors(tensors)
    with pytest.raises(ValueError, match=r"set boxes\.whitening above 0"):
        fit_box_regressor(features[:1], windows[:1], boxes[:1], BoxRegressionSettings(whitening=0))


# arguments as people have them


def test_arrays_tensors_and_lists_give_the_same_regressor():
    features, windows, boxes = examples()
    features, windows, boxes = torch.round(features * 4), np.rint(windows), np.rint(boxes)
    expected = fit_box_regressor(features, windows, boxes)
    for kind in (lambda x: x.tolist(), lambda x: torch.tensor(x, requires_grad=True), lambda x: x.astype(">f4")):
        arguments = [kind(given) for given in (features.numpy(), windows, boxes)]
        found = fit_box_regressor(*arguments)
        np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.refine(*arguments[:2]), expected.refine(features, windows))
    whole = features.numpy().astype(np.uint8)
    np.testing.assert_allclose(fit_box_regressor(whole, windows, boxes).weight, expected.weight, rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 999), st.floats(1e-3, 1e4))
def test_any_windows_and_boxes_with_extent_give_boxes_with_extent(count, width, seed, ridge):
    features, windows, boxes = examples(count, width, seed)
    regressor = fit_box_regressor(features, windows, boxes, BoxRegressionSettings(ridge=ridge))
    refined = regressor.refine(features, windows)
    assert refined.shape == (count, 4)
    assert (refined[:, 2:] > refined[:, :2]).all()
    if count > width:
        expected = naive_fit(features, windows, boxes, BoxRegressionSettings(ridge=ridge))
        np.testing.assert_allclose(refined, expected, rtol=1e-6)


FEATURES, WINDOWS, BOXES = examples(5)
NO_BOXES = {
    "reversed": WINDOWS[:, [2, 3, 0, 1]],
    "not finite": np.where(np.arange(4) == 2, np.nan, WINDOWS),
    "infinite": np.where(np.arange(4) == 2, np.inf, WINDOWS),
    "too few": WINDOWS[:-1],
    "five columns": np.column_stack([WINDOWS, WINDOWS[:, 0]]),
    "one box": WINDOWS[0],
    "text": WINDOWS.astype(str),
    "complex": WINDOWS * 1j,
    "none": None,
}


@pytest.mark.parametrize("kind", NO_BOXES)
def test_what_is_no_box_is_refused_as_window_and_as_box(kind):
    regressor = fit_box_regressor(FEATURES, WINDOWS, BOXES)
    refused_here(lambda: fit_box_regressor(FEATURES, NO_BOXES[kind], BOXES), "windows")
    refused_here(lambda: fit_box_regressor(FEATURES, WINDOWS, NO_BOXES[kind]), "boxes")
    refused_here(lambda: regressor.refine(FEATURES, NO_BOXES[kind]), "windows")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.full((5, 6), np.nan), "features must be finite, row 0 is not"),
        (torch.full((5, 6), torch.inf).half(), "features must be finite"),
        (np.ones((5, 6), complex), "features must be an array of real numbers"),
        (torch.ones(5, 6).cfloat(), "features must be an array of real numbers"),
        ([["a"] * 6] * 5, "features must be an array of real numbers"),
        ([[1.0], [1.0, 2.0]], "features must be an array of numbers"),
        (np.ones((5, 0)), r"features must have shape \(R, D\)"),
        (np.ones((4, 6)), "expected one of windows for each of the 4 feature rows, got 5"),
        (None, "features must be an array"),
    ],
)
def test_what_is_no_features_is_refused(features, message):
    refused_here(lambda: fit_box_regressor(features, WINDOWS, BOXES), message)


def test_a_ridge_for_other_features_is_logged(caplog):
    fit_box_regressor(FEATURES * 5, WINDOWS, BOXES)
    assert not caplog.text
    for factor in (1e-3, 1e3):
        caplog.clear()
        fit_box_regressor(FEATURES * factor, WINDOWS, BOXES)
        assert "boxes.ridge is made for 20; pass scale=mean_norm_scale(norms)" in caplog.text
        caplog.clear()
        fit_box_regressor(FEATURES * factor, WINDOWS, BOXES, scale=4 / factor)
        assert not caplog.text


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], 2, -1, 0.5, [0, 1, 0, 1, np.nan], ["cat"] * 5, [[0] * 5], None])
def test_labels_are_indices_into_classes(labels):
    own = fit_box_regressor(FEATURES, WINDOWS, BOXES)
    stacked = BoxRegressors.stack({"cat": own, "dog": own})
    refused_here(lambda: stacked.refine(FEATURES, WINDOWS, labels), "labels must ")
    refused_here(lambda: stacked.refine(FEATURES, WINDOWS, 0, np.array([0, 1, 2, 3, 5])), "rows must lie in 0 … 4")


def test_settings_and_scales_that_cannot_be_are_refused():
    spoiled = BoxRegressionSettings().model_copy(update={"ridge": -1.0})
    refused_here(lambda: fit_box_regressor(FEATURES, WINDOWS, BOXES, spoiled), "ridge: ")
    refused_here(lambda: fit_box_regressor(FEATURES, WINDOWS, BOXES, 4000), "settings must be BoxRegressionSettings")
    refused_here(lambda: fit_box_regressor(FEATURES, WINDOWS, BOXES, scale=-1), "scale must be a positive number")


@pytest.mark.parametrize("ridge", [1e-300, 1e-15])  # lost beside a sum of 64
def test_a_ridge_too_small_for_features_that_depend_on_each_other_is_refused(ridge):
    windows = np.tile([0, 0, 9.0, 9], (64, 1))
    for features in (np.ones((64, 5)), np.full((64, 9), 2.0)):
        message = refused_by_us(
            lambda features=features: fit_box_regressor(
                features, windows, windows + 1, BoxRegressionSettings(ridge=ridge)
            )
        )
        assert f"boxes.ridge={ridge:g} is too small" in message


@pytest.mark.parametrize("far", [[0, 0, 1e300, 1e300], [1e200, 0, 1e200, 0], [0, -1e9, 0, 0]])
def test_boxes_far_from_their_windows_are_refused(far):
    windows = np.tile([0, 0, 9.0, 9], (60, 1))
    boxes = windows.copy()
    boxes[7] += far
    if boxes[7, 0] == boxes[7, 2]:  # the sides are lost beside so large a number
        boxes[7, 2] *= 2
    message = refused_by_us(lambda: fit_box_regressor(np.ones((60, 5)), windows, boxes))
    assert "boxes must lie near their windows, that of row 7 does not" in message
