"""Arguments of every kind become arrays of numbers, in the memory they have, or are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused_here

from sppnet.checks import as_boxes, as_numbers, as_rows, as_scale, check_boxes


class ElsewhereTensor:
    """A tensor on a device that numpy cannot read, as one of CUDA is."""

    dtype = torch.float32

    def detach(self) -> ElsewhereTensor:
        return self

    def cpu(self) -> torch.Tensor:
        return torch.ones(2, 3)

    def __array__(self, *_: Any, **__: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_the_memory_is_shared_where_it_can_be() -> None:
    array, tensor = np.ones((2, 3), np.float32), torch.ones(2, 3, requires_grad=True)
    assert as_numbers(array, "x") is array
    assert np.shares_memory(as_numbers(tensor, "x"), tensor.detach().numpy())


def test_tensors_of_any_kind_are_numbers() -> None:
    ones = torch.ones(2, 3)
    eighths = ones.to(torch.float8_e4m3fn)
    for tensor in (ElsewhereTensor(), ones.bfloat16(), eighths, ones.half(), ones.bool()):
        np.testing.assert_array_equal(as_rows(tensor), np.ones((2, 3)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", ["text", None, [[1], [1, 2]], [1j], [None], {"a": 1}, object(), torch.ones(2).to_sparse()]
)
def test_what_is_no_array_of_numbers_is_refused_by_name(values: Any) -> None:
    refused_here(lambda: as_numbers(values, "windows of image a"), "^windows of image a must be an array of ")


def test_boxes_have_an_extent_unless_they_need_none() -> None:
    flat = [[1, 2, 1, 2]]
    assert check_boxes(flat, extent=False).tolist() == flat
    refused_here(lambda: check_boxes(flat), r"boxes must be finite x1 y1 x2 y2 with x2 > x1 and y2 > y1, got \[1")
    for extent in (False, True):
        assert check_boxes([], extent=extent).shape == (0, 4)
        for row in ([5, 5, 6, 4], [0, 0, 1, np.inf], [0, np.nan, 1, 1]):
            refused_here(
                lambda row=row, extent=extent: check_boxes([[0, 0, 1, 1], row], "objects", extent=extent),
                r"objects must be finite .* at row 1; correct it .* for x y width height",
            )


@pytest.mark.parametrize("scale", [1, 0.5, np.float32(2), torch.tensor(3.0), np.array(4)])
def test_a_scale_is_any_positive_number(scale: Any) -> None:
    assert as_scale(scale) == float(scale)


@pytest.mark.parametrize("empty", [[], (), np.zeros(0), np.zeros((0, 4), np.float32), np.zeros((0, 7))])
def test_anything_empty_becomes_no_boxes(empty):
    boxes = as_boxes(empty)
    assert boxes.shape == (0, 4)
    assert boxes.dtype == np.float64


def test_lists_of_whole_numbers_become_boxes():
    assert as_boxes([[1, 2, 3, 4]]).dtype == np.float64


def test_one_box_alone_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"windows must have shape \(R, 4\), got \(4,\); pass windows\[None\] for one box"
    ):
        as_boxes(np.zeros(4), "windows")


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (8,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"boxes must have shape \(R, 4\), got \("):
        as_boxes(np.zeros(shape))
