"""The cover of objects by windows: any arrays that are boxes have one, and nothing else does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from doubles import annotated
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused_here
from torchvision.ops import box_iou

from sppnet.evaluation.proposals import proposal_recall

WINDOWS = np.array([[0.0, 0, 10, 10], [4, 4, 12, 20]])
TRUTH = annotated(("cat", (0, 0, 8, 10)), ("dog", (5, 5, 15, 15)))

boxes = st.lists(st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(0, 20)] * 2), max_size=6).map(
    lambda rows: [(x, y, x + width, y + height) for x, y, width, height in rows]
)


objects = boxes.map(lambda rows: [(x1, y1, x2 + 1, y2 + 1) for x1, y1, x2, y2 in rows])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(boxes, objects), max_size=4), st.floats(0.01, 1), st.none() | st.integers(1, 4))
def test_the_cover_is_that_of_torchvision_image_by_image(images: list, iou: float, most: int | None) -> None:
    windows = {str(i): found for i, (found, _) in enumerate(images)}
    truth = {str(i): annotated(*(("cat", box) for box in objects)) for i, (_, objects) in enumerate(images)}
    quality = proposal_recall(windows, truth, iou, most)
    best = []
    for found, objects in images:
        given = torch.tensor(found[:most], dtype=torch.float64).reshape(-1, 4)
        for box in objects:
            overlaps = box_iou(torch.tensor([box], dtype=torch.float64), given)
            best.append(float(overlaps.max()) if len(given) else 0.0)
    np.testing.assert_allclose(quality.best_overlaps, best)
    assert len(quality.best_overlaps) == len(best)
    assert (
        quality.recall == pytest.approx(np.mean(quality.best_overlaps >= iou)) if best else math.isnan(quality.recall)
    )


@pytest.mark.parametrize(
    "same",
    [
        WINDOWS.tolist(),
        torch.tensor(WINDOWS, requires_grad=True),
        torch.tensor(WINDOWS).bfloat16(),
        WINDOWS.astype(np.uint8),
        [tuple(row) for row in WINDOWS],
    ],
)
def test_arrays_tensors_and_lists_have_the_same_cover(same: Any) -> None:
    expected = proposal_recall({"a": WINDOWS}, {"a": TRUTH}).best_overlaps
    np.testing.assert_array_equal(proposal_recall({"a": same}, {"a": TRUTH}).best_overlaps, expected)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (WINDOWS[:, [2, 3, 0, 1]], "windows of image a must be finite x1 y1 x2 y2 .* at row 0"),
        (WINDOWS * np.nan, r"windows of image a must be finite .* got \[nan, .* at row 0"),
        (np.where(WINDOWS > 11, np.inf, WINDOWS), "windows of image a must be finite .* inf.* at row 1"),
        (np.column_stack([WINDOWS, WINDOWS[:, 0]]), r"windows of image a must have shape \(R, 4\), got \(2, 5\)"),
        (WINDOWS[0], r"windows of image a must have shape \(R, 4\), got \(4,\)"),
        (WINDOWS.astype(str), "windows of image a must be an array of real numbers"),
        (WINDOWS * 1j, "windows of image a must be an array of real numbers"),
        ([[0, 0, 1, 1], [0, 0, 1]], "windows of image a must be an array of numbers"),
        (None, "windows of image a must be an array"),
    ],
)
def test_windows_that_are_none_are_refused_with_their_image(windows: Any, message: str) -> None:
    refused_here(lambda: proposal_recall({"a": windows}, {"a": TRUTH}), message)


@pytest.mark.parametrize(
    "arguments",
    [
        {"annotations": {"a": TRUTH, "b": TRUTH}},
        *({"iou": iou} for iou in (0, -0.5, 1.01, np.nan, "0.5", None)),
    ],
)
def test_what_has_no_cover_is_refused_by_name(arguments: dict[str, Any]) -> None:
    name = next(iter(arguments))
    messages = {"annotations": "no windows given for image b", "iou": "^iou"}
    message = messages.get(name, f"^{name} must ")
    refused_here(
        lambda: proposal_recall(**{"windows": {"a": WINDOWS}, "annotations": {"a": TRUTH}, **arguments}), message
    )
