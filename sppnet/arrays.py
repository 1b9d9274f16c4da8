"""Arguments as people have them: arrays, torch tensors on any device and nested lists become checked numpy arrays.

Nothing here imports torch: who wants the evaluation alone should not wait for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.errors import SppnetError
from sppnet.records import as_boxes


def as_numbers(values: ArrayLike, name: str) -> NDArray[Any]:
    """Real numbers, in the memory of `values` where that is possible.

    Raises SppnetError for text, objects, complex numbers and ragged lists; `name` is that of the argument.
    """
    own: Any = values
    try:
        if hasattr(own, "detach"):
            own = own.detach().cpu()
            own = own.float() if str(own.dtype) == "torch.bfloat16" else own  # numpy has no such type
        array = np.asarray(own)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SppnetError(f"{name} must be an array of numbers, got {type(values).__name__}: {error}") from None
    if array.dtype.kind not in "biuf":
        found = type(values).__name__ if array.dtype == object else str(array.dtype)
        raise SppnetError(f"{name} must be an array of real numbers, got {found}; pass a numpy array or a torch tensor")
    return array


def as_rows(values: ArrayLike, width: int | None = None, name: str = "features") -> NDArray[Any]:
    """The same of shape (R, D); SppnetError for another shape, or another D than `width`."""
    array = as_numbers(values, name)
    check_rows(array.shape, width, name)
    return array


def check_rows(shape: tuple[int, ...], width: int | None = None, name: str = "features") -> None:
    """SppnetError unless the shape is (R, D), with D = `width` where that is given."""
    if len(shape) != 2 or shape[1] < 1 or width not in (None, shape[1]):
        hint = f"pass {name}[None] for one window" if len(shape) == 1 else "take those that the training was on"
        raise SppnetError(f"{name} must have shape (R, {width or 'D'}), got {tuple(shape)}; {hint}")


def check_finite(rows: NDArray[Any], name: str) -> None:
    """SppnetError that names the first row (of R) with a value that is not finite."""
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        raise SppnetError(f"{name} must be finite, got {rows[tuple(bad[0])]} at row {bad[0][0]}; leave such rows out")


def as_corners(boxes: ArrayLike, name: str = "boxes") -> NDArray[np.float64]:
    """Boxes (R, 4) that are finite and do not end before they begin; SppnetError names the first that is not so."""
    corners = as_boxes(as_numbers(boxes, name), name)
    check_finite(corners, name)
    bad = np.flatnonzero((corners[:, 2:] < corners[:, :2]).any(axis=1))
    if len(bad):
        raise SppnetError(
            f"{name} must be x1 y1 x2 y2 with x2 >= x1 and y2 >= y1, got {corners[bad[0]].tolist()} at row {bad[0]}; "
            "for x y width height add the first two to the last two"
        )
    return corners


def as_scale(scale: float) -> float:
    """A factor of features; SppnetError for one that is not positive, or whose square is not."""
    number = as_numbers(scale, "scale")
    if number.ndim or not 1e-100 < float(number) < 1e100:
        raise SppnetError(f"scale must be a positive number, got {scale!r}; it multiplies the features")
    return float(number)
