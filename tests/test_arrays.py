"""Arguments of every kind become arrays of numbers, in the memory they have, or are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused_here

from sppnet.arrays import as_corners, as_numbers, as_rows, as_scale


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
    for tensor in (ElsewhereTensor(), torch.ones(2, 3).bfloat16(), torch.ones(2, 3).half(), torch.ones(2, 3).bool()):
        np.testing.assert_array_equal(as_rows(tensor), np.ones((2, 3)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", ["text", None, [[1], [1, 2]], [1j], [None], {"a": 1}, object(), torch.ones(2).to_sparse()]
)
def test_what_is_no_array_of_numbers_is_refused_by_name(values: Any) -> None:
    refused_here(lambda: as_numbers(values, "windows of image a"), "^windows of image a must be an array of ")


def test_corners_are_boxes_also_without_extent() -> None:
    assert as_corners([]).shape == (0, 4)
    assert as_corners([[1, 2, 1, 2]]).tolist() == [[1, 2, 1, 2]]
    refused_here(
        lambda: as_corners([[0, 0, 1, 1], [5, 5, 6, 4]], "objects"), r"objects must be .* \[5.0, .* at row 1; for x"
    )
    refused_here(lambda: as_corners([[0, 0, 1, np.inf]]), "boxes must be finite, got inf at row 0")


@pytest.mark.parametrize("scale", [1, 0.5, np.float32(2), torch.tensor(3.0), np.array(4)])
def test_a_scale_is_any_positive_number(scale: Any) -> None:
    assert as_scale(scale) == float(scale)
