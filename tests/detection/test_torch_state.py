"""What the caller has set in torch changes no result; devices are named or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from doubles import TORCH_STATES, refused_by_us

from sppnet import SPPDetector, fit_box_regressor, mine_detectors, nms
from sppnet.detection.box_regression import BoxRegressors
from sppnet.distributed import choose_device

RNG = np.random.default_rng(0)
IMAGES = [(RNG.normal(size=(41, 16)), np.eye(41, 2)) for _ in range(3)]
FEATURES, WINDOWS = RNG.normal(size=(30, 16)).astype(np.float32), np.tile([10.0, 10, 50, 40], (30, 1))
BOXES = WINDOWS + RNG.uniform(-5, 5, (30, 4))


def results() -> list[np.ndarray]:
    svms = mine_detectors(IMAGES, ["a", "b"], progress=False).svms
    regressors = BoxRegressors.stack({"a": fit_box_regressor(FEATURES, WINDOWS, BOXES)})
    again = BoxRegressors.from_tensors(regressors.to_tensors()).single()
    found = [svms.weight, svms.bias, svms.score(FEATURES), svms.score(torch.from_numpy(FEATURES))]
    refined = [own.refine(FEATURES, WINDOWS, 0) for own in (regressors, again)]
    kept = nms(BOXES, FEATURES[:, 0], 0.5)
    return [*(tensor.numpy() for tensor in found), *refined, kept, nms(torch.from_numpy(BOXES), FEATURES[:, 0], 0.5)]


@pytest.mark.parametrize("mode", TORCH_STATES)
def test_modes_of_the_caller_change_nothing(mode):
    expected = results()
    with TORCH_STATES[mode]():
        found = results()
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == other.dtype
        assert np.array_equal(own, other)


def test_scores_of_svms_still_have_gradients():
    svms = mine_detectors(IMAGES, ["a", "b"], progress=False).svms
    features = torch.from_numpy(FEATURES).requires_grad_(True)
    svms.score(features)[:, 0].sum().backward()
    assert torch.allclose(features.grad, svms.weight[0] * svms.scale)


@pytest.mark.parametrize("device", ["nope", "cuda:99", "meta", "", None, 1.5, "CPU"])
def test_devices_that_are_not_there_are_refused(small_run, device):
    detector = SPPDetector.load(small_run.root)
    calls = [
        lambda: choose_device(device),
        lambda: detector.to(device),
        lambda: SPPDetector.load(small_run.root, device),
    ]
    if device is not None:  # that of the features
        calls.append(lambda: fit_box_regressor(FEATURES, WINDOWS, BOXES, device=device))
    for call in calls:
        assert "expected cpu, cuda or cuda:N" in refused_by_us(call)
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
