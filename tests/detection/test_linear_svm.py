import logging
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from linear_svm import fit_by_sklearn  # of the benchmark
from reference import svm_objective
from refusals import refused_here
from scipy.optimize import minimize

from sppnet.artifacts import read_tensors, write_tensors
from sppnet.config import BoxRegressionSettings, SVMSettings
from sppnet.detection import linear_svm
from sppnet.detection.linear_svm import LinearSVM, LinearSVMs, mean_norm_scale
from sppnet.errors import SppnetError

fit_linear_svm = partial(linear_svm.fit_linear_svm, scale=1.0)  # of features that come as they are meant
fit_any = linear_svm.fit_linear_svm


@pytest.fixture
def golden(shared):
    with np.load(shared / "golden/svm.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def golden_settings(golden):
    return SVMSettings(
        C=float(golden["C"]),
        bias_multiplier=float(golden["bias_mult"]),
        positive_weight=float(golden["pos_loss_weight"]),
    )


def two_clouds(count=60, dimension=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.where(np.arange(count) < count // 3, 1, -1)
    features = rng.standard_normal((count, dimension)) + 0.8 * labels[:, None]
    return features.astype(np.float32), labels


def objective(svm, features, labels, settings):
    return svm_objective(svm.weight, svm.bias, np.asarray(features), np.asarray(labels), settings, svm.scale)


@pytest.mark.shared_data
def test_the_objective_is_within_a_thousandth_of_the_release_for_any_seed(golden):
    settings = golden_settings(golden)
    for seed in range(5):
        svm = fit_linear_svm(golden["X"], golden["y"], settings.model_copy(update={"seed": seed}))
        reached = objective(svm, golden["X"], golden["y"], settings)
        assert reached == pytest.approx(float(golden["objective_tight"]), rel=1e-3)


@pytest.mark.shared_data
def test_the_objective_of_the_release_weights_is_the_value_that_the_release_reports(golden):
    for kind in ("tight", "default"):
        weight = golden[f"w_{kind}"]
        svm = LinearSVM(weight[:-1], float(weight[-1] * golden["bias_mult"]))
        total = objective(svm, golden["X"], golden["y"], golden_settings(golden))
        assert total == pytest.approx(float(golden[f"objective_{kind}"]), rel=1e-9)


@pytest.mark.parametrize("settings", [SVMSettings(C=0.05), SVMSettings(C=1.0, bias_multiplier=3, positive_weight=5)])
def test_a_general_minimiser_finds_no_better_weights(settings):
    features, labels = two_clouds()
    # Nelder-Mead on the definition, started at the solution: any remaining descent would show.
    svm = fit_linear_svm(features, labels, settings.model_copy(update={"tolerance": 1e-7, "max_iterations": 100_000}))
    reached = objective(svm, features, labels, settings)

    def value(v):
        return objective(LinearSVM(v[:-1], float(v[-1])), features, labels, settings)

    start = np.append(svm.weight, svm.bias)
    better = min(minimize(value, s, method="Nelder-Mead", options={"maxiter": 4000}).fun for s in (start, start * 0.9))
    assert reached <= better * (1 + 1e-3)


# At first these converge without the examples set aside, far from the minimum of all.
@example(count=59, dimension=14, seed=24, cost=1.0, weight=1.0, multiplier=10.0, double=True)
@example(count=17, dimension=14, seed=35, cost=1.0, weight=1.0, multiplier=10.0, double=True)
@example(count=119, dimension=24, seed=59, cost=1.0, weight=2.0, multiplier=10.0, double=False)
@example(count=2, dimension=38, seed=250, cost=1.0, weight=2.0, multiplier=10.0, double=False)
@example(count=63, dimension=4, seed=970, cost=1.0, weight=0.5, multiplier=10.0, double=False)
@settings_of_hypothesis(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 150),
    dimension=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    cost=st.sampled_from([1e-3, 0.03, 1.0]),
    weight=st.sampled_from([0.5, 1.0, 2.0]),
    multiplier=st.sampled_from([1.0, 10.0]),
    double=st.booleans(),
)
def test_coordinate_descent_ends_no_higher_than_liblinear(count, dimension, seed, cost, weight, multiplier, double):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(count) < 0.3, 1, -1)
    labels[:2] = 1, -1
    features = rng.standard_normal((count, dimension)) + 0.5 * labels[:, None]
    features[rng.random(count) < 0.1] = 0  # a row without features still has its bias
    features = features if double else features.astype(np.float32)
    settings = SVMSettings(
        C=cost, positive_weight=weight, bias_multiplier=multiplier, tolerance=1e-5, max_iterations=500_000
    )
    expected = objective(fit_by_sklearn(features, labels, settings), features, labels, settings)  # liblinear
    close = settings.model_copy(update={"tolerance": 1e-5 * min(1.0, expected)})  # it is no share of the objective
    reached = objective(fit_linear_svm(features, labels, close), features, labels, settings)
    # No weights have less than the minimum, so above is all it can fail by.
    assert reached <= expected * (1 + 1e-4)


@pytest.mark.parametrize(("count", "dimension", "seed"), [(60, 14, 15), (100, 20, 4), (60, 14, 36)])
def test_a_fit_says_whether_it_converged_and_gives_what_it_had_by_then(count, dimension, seed, caplog):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(count) < 0.3, 1, -1)
    labels[:2] = 1, -1
    features = rng.standard_normal((count, dimension)) + 0.5 * labels[:, None]

    def stopped(rounds):
        caplog.clear()
        return fit_linear_svm(features, labels, settings.model_copy(update={"max_iterations": rounds}))

    settings = SVMSettings(C=1.0, tolerance=1e-5)
    found, low, high = stopped(20_000), 0, 20_000
    assert not caplog.text
    while high - low > 1:  # the last round before it converges
        middle = (low + high) // 2
        stopped(middle)
        low, high = (middle, high) if caplog.text else (low, middle)
    assert stopped(high).bias == found.bias
    assert stopped(low).bias == pytest.approx(found.bias, rel=0.05, abs=1e-3)
    assert f"stopped at {low} iterations" in caplog.text


def test_double_precision_and_whole_numbers_are_kept():
    features, labels = two_clouds()
    exact = fit_linear_svm(features.astype(np.float64) * (1 + 1e-9), labels)
    assert np.abs(exact.weight - fit_linear_svm(features, labels).weight).max() > 0
    double = torch.from_numpy(features.astype(np.float64) * (1 + 1e-9))
    np.testing.assert_array_equal(fit_linear_svm(double, labels).weight, exact.weight)
    whole = np.array([[2**25 + 1], [-(2**25) - 1]])
    np.testing.assert_array_equal(
        fit_linear_svm(whole, [1, -1]).weight, fit_linear_svm(whole.astype(float), [1, -1]).weight
    )


def test_examples_without_features_or_bias_are_no_division_by_zero():
    svm = fit_linear_svm(np.zeros((4, 3)), [1, -1, 1, -1], SVMSettings(bias_multiplier=1e-200))
    assert svm.weight.tolist() == [0, 0, 0]


def test_coordinate_descent_leaves_the_features_and_labels_as_they_are():
    features, labels = two_clouds()
    before = features.copy(), labels.copy()
    fit_linear_svm(features, labels)
    np.testing.assert_array_equal(features, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_two_points_have_the_closed_form_solution():
    # x = ±1 and equal weights: the margin is met at w = 1, b = 0.
    svm = fit_linear_svm(
        np.array([[1.0], [-1.0]]), [1, -1], SVMSettings(C=100, bias_multiplier=10, positive_weight=1, tolerance=1e-8)
    )
    assert svm.weight == pytest.approx([1], abs=1e-4)
    assert svm.bias == pytest.approx(0, abs=1e-4)


def test_the_same_problem_gives_the_same_weights_as_tensor_and_as_array():
    features, labels = two_clouds()
    first = fit_linear_svm(features, labels)
    for same in (torch.from_numpy(features), np.asfortranarray(features), np.repeat(features, 2, axis=0)[::2]):
        again = fit_linear_svm(same, labels.astype(np.int8))
        np.testing.assert_array_equal(first.weight, again.weight)
        assert first.bias == again.bias
    half = torch.from_numpy(features).bfloat16()
    np.testing.assert_array_equal(fit_linear_svm(half, labels).weight, fit_linear_svm(half.float(), labels).weight)


def test_a_fit_that_does_not_converge_is_logged_and_used(caplog):
    features, labels = two_clouds()
    with caplog.at_level(logging.WARNING, logger="sppnet"):
        svm = fit_linear_svm(features, labels, SVMSettings(C=10, tolerance=1e-12, max_iterations=2, seed=2**40))
    assert "60 x 5 stopped at 2 iterations before it reached tolerance 1e-12" in caplog.text
    assert svm.weight.shape == (5,)


def test_scores_of_many_rows_are_those_of_each_row():
    rng = np.random.default_rng(0)
    svm = LinearSVM(rng.standard_normal(3), 0.25)
    features = rng.standard_normal((9000, 3)).astype(np.float32)
    np.testing.assert_allclose(svm.score(features), [row @ svm.weight + 0.25 for row in features.astype(float)])
    assert svm.score(np.zeros((0, 3))).shape == (0,)


def test_svms_score_scaled_features_plus_bias():
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((3, 4)), rng.standard_normal(3)
    svms = LinearSVMs(torch.tensor(weight).float(), torch.tensor(bias).float(), 2.5, ("a", "b", "c"))
    features = rng.standard_normal((6, 4)).astype(np.float32)
    scores = svms.score(torch.from_numpy(features))
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), features * 2.5 @ weight.T + bias, rtol=1e-5, atol=1e-5)
    assert svms.score(torch.zeros(0, 4)).shape == (0, 3)
    assert svms.score(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_svms_survive_their_file(tmp_path):
    svms = LinearSVMs(torch.rand(2, 3), torch.rand(2), 0.1, ("potted plant", "vélo"))
    write_tensors(tmp_path / "svms.safetensors", svms.to_tensors())
    again = LinearSVMs.from_tensors(read_tensors(tmp_path / "svms.safetensors"))
    assert (again.classes, again.scale) == (svms.classes, svms.scale)
    assert torch.equal(again.weight, svms.weight)
    assert torch.equal(again.bias, svms.bias)


def test_the_scale_brings_the_mean_norm_to_its_target():
    assert mean_norm_scale([30.0, 50.0]) == 0.5
    assert mean_norm_scale(np.array([1.0, 3.0]), target=4) == 2.0


def test_errors_say_what_was_expected():
    features, labels = two_clouds()
    with pytest.raises(SppnetError, match=r"got 60 examples but no positives \(\+1\)"):
        fit_linear_svm(features, -np.ones(60))
    with pytest.raises(SppnetError, match=r"got 60 examples but no negatives \(-1\)"):
        fit_linear_svm(features, np.ones(60))
    with pytest.raises(SppnetError, match=r"labels must be -1 or \+1, got 0; for 0 and 1 pass 2 \* labels - 1"):
        fit_linear_svm(features, (labels > 0).astype(int))
    with pytest.raises(SppnetError, match=r"labels must have shape \(60,\)"):
        fit_linear_svm(features, labels[:-1])
    with pytest.raises(SppnetError, match=r"features must have shape \(R, D\), got \(5,\)"):
        fit_linear_svm(features[0], labels[:5])
    with pytest.raises(SppnetError, match="the mean of 0 feature norms must be positive"):
        mean_norm_scale([])
    with pytest.raises(SppnetError, match=r"must be positive, got 0\.0"):
        mean_norm_scale([0.0])
    with pytest.raises(SppnetError, match="2 classes need weight"):
        LinearSVMs(torch.zeros(3, 4), torch.zeros(3), 1.0, ("a", "b"))
    features[7, 2] = np.nan
    with pytest.raises(SppnetError, match=r"features must be finite, .* row 7 is not"):
        fit_linear_svm(features, labels)
    svms = LinearSVMs(torch.zeros(1, 4), torch.zeros(1), 1.0, ("a",))
    with pytest.raises(SppnetError, match=r"features must have shape \(R, 4\), got \(2, 5\)"):
        svms.score(torch.zeros(2, 5))
    with pytest.raises(SppnetError, match=r"need the tensors \['scale'\] too"):
        LinearSVMs.from_tensors({k: v for k, v in svms.to_tensors().items() if k != "scale"})


# features and arguments as people have them


def task(count=400, width=64, seed=0):
    """Features and labels that a line through the origin tells apart."""
    features = np.random.default_rng(seed).normal(size=(count, width))
    return features, np.where(features[:, 0] + 0.3 * features[:, 1] > 0, 1, -1)


def of_norm(features, norm):
    return norm * features / np.linalg.norm(features, axis=1, keepdims=True)


def accuracy(svm, features, labels):
    return ((svm.score(features) > 0) == (labels > 0)).mean()


@pytest.mark.parametrize("norm", [1, 1e-4, 1e-6, 300, 1e9])
@pytest.mark.parametrize("count", [400, 60])
def test_zero_is_the_boundary_whatever_the_norm_of_the_features(norm, count):
    features, labels = task(count, 16)
    features = of_norm(features, norm)
    svm = fit_any(features, labels)
    assert svm.scale == pytest.approx(20 / norm)
    assert accuracy(svm, features, labels) > 0.8
    assert np.array_equal(svm.score(features), features @ svm.weight + svm.bias)


def test_one_row_of_huge_features_changes_nothing_for_the_others():
    features, labels = task()
    features = of_norm(features, 1)
    features[7] *= 1e6
    assert accuracy(fit_any(features, labels), features, labels) > 0.85


@settings_of_hypothesis(max_examples=20, deadline=None)
@given(count=st.integers(4, 80), width=st.integers(1, 20), seed=st.integers(0, 1000), power=st.integers(-6, 6))
def test_a_measured_scale_solves_the_problem_of_the_scaled_features_as_liblinear_does(count, width, seed, power):
    rng = np.random.default_rng(seed)
    labels = np.where(np.arange(count) % 3 == 0, 1, -1)
    features = 10.0**power * (rng.standard_normal((count, width)) + 0.5 * labels[:, None])
    features[-1] = 0
    norms = np.linalg.norm(features, axis=1)
    settings = SVMSettings(tolerance=1e-6, max_iterations=50_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not every such task has its boundary at 0
        svm = fit_any(features, labels, settings)
    assert svm.scale == pytest.approx(20 / np.median(norms[norms > 0]))
    scaled = features * svm.scale
    peer = objective(fit_by_sklearn(scaled, labels, settings), scaled, labels, settings)
    assert objective(svm, features, labels, settings) <= peer * (1 + 1e-4)
    np.testing.assert_allclose(svm.score(features), fit_linear_svm(scaled, labels, settings).score(scaled), atol=1e-3)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: np.clip(127.5 + 60 * x, 0, 255).astype(np.uint8),
        lambda x: np.column_stack([x, np.full(len(x), 1e3)]),
        lambda x: x + 100,
    ],
)
def test_a_boundary_that_is_not_at_zero_is_warned_of(spoil):
    features, labels = task()
    with pytest.warns(
        UserWarning, match=r"0 tells \d+% of the examples apart, no more than one label .* subtract the median"
    ):
        fit_any(spoil(features), labels)
    shifted = spoil(features) - np.median(spoil(features), axis=0)
    assert accuracy(fit_any(shifted, labels), shifted, labels) > 0.85  # what the warning advises


def test_features_of_any_real_type_are_features():
    features, labels = two_clouds()
    whole = np.rint(features * 20)
    expected = fit_any(whole, labels)
    for same in (
        whole.tolist(),
        whole.astype(np.float16),
        whole.astype(np.int64),
        torch.from_numpy(whole).requires_grad_(),
        torch.from_numpy(whole).half(),
        torch.from_numpy(whole).int(),
        list(torch.from_numpy(whole)),
        whole.astype(">f4"),
        whole[::-1][::-1],
    ):
        found = fit_any(same, labels.tolist())
        np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-6)
        np.testing.assert_allclose(found.score(same), expected.score(whole), rtol=1e-6)


FEATURES, LABELS = two_clouds()
NO_FEATURES = {
    "complex": FEATURES.astype(complex),
    "complex tensor": torch.from_numpy(FEATURES).cfloat(),
    "objects": FEATURES.astype(object),
    "text": FEATURES.astype(str),
    "ragged": [[1.0, 2.0], [3.0]] * 30,
    "a generator": (row for row in FEATURES),
    "none": None,
    "a number": 3.0,
    "one row": FEATURES[0],
    "three axes": FEATURES[None],
    "no columns": FEATURES[:, :0],
}


@pytest.mark.parametrize("kind", NO_FEATURES)
def test_what_is_no_features_is_refused_everywhere(kind):
    svms = LinearSVMs(torch.ones(2, 5), torch.zeros(2), 1.0, ("a", "b"))
    for call in (partial(fit_any, labels=LABELS), fit_any(FEATURES, LABELS).score, svms.score):
        refused_here(partial(call, NO_FEATURES[kind]), "features must ")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.where(FEATURES > 1, np.nan, FEATURES), "must be finite"),
        (np.where(FEATURES > 1, np.inf, FEATURES), "must be finite"),
        (FEATURES * 0, "must not be all zero"),
        (FEATURES[:0], r"labels must have shape \(0,\)"),
        (FEATURES[:30], r"labels must have shape \(30,\)"),
    ],
)
def test_features_that_nothing_can_be_learned_from_are_refused(features, message):
    refused_here(lambda: fit_any(features, LABELS), message)


@pytest.mark.parametrize(
    "labels",
    [
        (LABELS > 0).astype(int),
        LABELS > 0,
        np.ones(60, bool),
        LABELS * 0.5,
        LABELS * np.nan,
        LABELS * 1j,
        np.where(LABELS > 0, "cat", "dog"),
        LABELS.astype(object),
        LABELS[:, None],
        LABELS[:-1],
        np.abs(LABELS),
        None,
    ],
)
def test_labels_other_than_plus_and_minus_one_are_refused(labels):
    refused_here(lambda: fit_any(FEATURES, labels), "labels must |needs positives and negatives")
    fit_any(FEATURES, torch.tensor(LABELS, dtype=torch.float32, requires_grad=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("C", 0.0),
        ("C", np.nan),
        ("C", np.inf),
        ("positive_weight", -1.0),
        ("tolerance", 0.0),
        ("tolerance", np.inf),
        ("bias_multiplier", -1.0),
        ("max_iterations", 0),
        ("feature_norm", np.nan),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SVMSettings(**{name: value})
    settings = SVMSettings().model_copy(update={name: value})  # which checks nothing
    refused_here(lambda: fit_any(FEATURES, LABELS, settings), name)


@pytest.mark.parametrize("settings", [0.1, {"C": 1}, SVMSettings, BoxRegressionSettings()])
def test_other_things_than_settings_are_refused(settings):
    refused_here(lambda: fit_any(FEATURES, LABELS, settings), r"settings must be SVMSettings\(\.\.\.\), got ")


@pytest.mark.parametrize("scale", [0, -1.0, np.nan, np.inf, "2", [1.0]])
def test_a_scale_that_is_no_positive_number_is_refused(scale):
    refused_here(lambda: fit_any(FEATURES, LABELS, scale=scale), "scale must be ")


def test_svms_score_arrays_as_tensors_and_refuse_another_width():
    svms = LinearSVMs(torch.rand(2, 5), torch.rand(2), 0.5, ("a", "b"))
    expected = svms.score(torch.from_numpy(FEATURES))
    for same in (FEATURES, FEATURES.tolist(), FEATURES.astype(np.float64)):
        assert torch.equal(svms.score(same), expected)
    for score in (svms.score, fit_any(FEATURES, LABELS).score):
        for other in (FEATURES[:, :4], torch.from_numpy(FEATURES[:, :4]), FEATURES[:, :4].tolist()):
            refused_here(partial(score, other), r"features must have shape \(R, 5\), got \(60, 4\)")
