"""Values given by hand, checked where they enter: arrays, tensors of any device and lists of numbers alike.

Nothing here imports torch: who wants the evaluation alone should not wait for it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.errors import SppnetError, counted


def is_whole(value: Any) -> bool:
    """Whether it is one whole number; true and false are none."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool | np.bool_) and not getattr(value, "ndim", 0)


def as_numbers(values: object, name: str) -> NDArray[Any]:
    """Real numbers or flags, in the memory of `values` where that is possible.

    SppnetError for text, objects, complex numbers and ragged lists; `name` is that of the argument.
    """
    own: Any = values
    try:
        if hasattr(own, "detach"):
            own = own.detach().cpu()
            own = own.float() if str(own.dtype).startswith(("torch.bfloat", "torch.float8")) else own  # not in numpy
        array = np.asarray(own)
    except Exception as error:  # whatever numpy or torch say of what is none
        raise SppnetError(f"{name} must be an array of numbers, got {type(values).__name__}: {error}") from None
    if array.dtype.kind in "biuf":
        return array
    if not array.size:
        return array.astype(np.float64)
    found = type(values).__name__ if array.dtype == object else str(array.dtype)
    raise SppnetError(f"{name} must be an array of real numbers, got {found}; pass a numpy array or a torch tensor")


def as_column(values: object, name: str, kinds: str = "iuf") -> NDArray[Any]:
    """Numbers (R,) of one of these kinds: b, i, u or f."""
    array = as_numbers(values, name)
    if not array.size:
        return np.zeros(0, array.dtype if array.dtype.kind in kinds else f"{kinds[0]}1")
    if array.ndim != 1 or array.dtype.kind not in kinds:
        wanted = {"iuf": "numbers", "biu": "true or false"}.get(kinds, "whole numbers")
        raise SppnetError(f"{name}: expected {wanted} of shape (R,), got {array.dtype} of shape {array.shape}")
    return array


def as_rows(values: object, width: int | None = None, name: str = "features") -> NDArray[Any]:
    """Numbers (R, D), with D = `width` where that is given."""
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


def as_boxes(values: object, name: str = "boxes") -> NDArray[np.float64]:
    """Any four numbers a row: float64 (R, 4); nothing at all is (0, 4)."""
    array = as_numbers(values, name)
    if not array.size:
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind == "b":
        hint = f"; pass {name}[None] for one box" if array.shape == (4,) else ""
        kind = "bool of shape " if array.dtype.kind == "b" else ""
        raise SppnetError(f"{name} must have shape (R, 4), got {kind}{array.shape}{hint}")
    return array.astype(np.float64, copy=False)


def check_boxes(values: object, name: str = "boxes", dtype: Any = np.float64, extent: bool = True) -> NDArray[Any]:
    """A copy of the boxes (R, 4) as `dtype`: finite, x1 < x2 and y1 < y2, or at most equal without `extent`."""
    exact = as_boxes(values, name)
    with np.errstate(over="ignore"):
        boxes = exact.astype(dtype)
    bad = first_bad_box(boxes, extent)
    if bad is not None:
        rule = "x2 > x1 and y2 > y1" if extent else "x2 >= x1 and y2 >= y1"
        remedy = "correct it or leave it out, and for x y width height add the first two to the last two"
        got = f"{exact[bad].tolist()} at row {bad}"
        raise SppnetError(f"{name} must be finite x1 y1 x2 y2 with {rule}, got {got}; {remedy}")
    return boxes


def first_bad_box(boxes: NDArray[np.floating], extent: bool = True) -> int | None:
    """The first row that is not finite or not ordered."""
    ordered = np.greater if extent else np.greater_equal
    good = np.isfinite(boxes).all(axis=1) & ordered(boxes[:, 2:], boxes[:, :2]).all(axis=1)
    return None if good.all() else int(good.argmin())


def check_scores(values: object, name: str = "scores") -> NDArray[np.float32]:
    """A copy of finite numbers (R,) as float32."""
    with np.errstate(over="ignore"):
        scores = as_column(values, name).astype(np.float32)
    check_finite(scores, name)
    return scores


def as_scale(scale: object) -> float:
    """A factor of features; SppnetError for one that is not positive, or whose square is not."""
    number = as_numbers(scale, "scale")
    if number.ndim or not 1e-100 < float(number) < 1e100:
        raise SppnetError(f"scale must be a positive number, got {scale!r}; it multiplies the features")
    return float(number)


def check_overlap(value: object, name: str) -> float:
    """An intersection over union in [0, 1]."""
    array = as_numbers(value, name)
    if array.ndim or array.dtype.kind == "b" or not 0 <= array <= 1:
        raise SppnetError(f"{name} must be an overlap in [0, 1], got {value!r}; give one, e.g. 0.3")
    return float(array)


def check_thresholds(value: float | ArrayLike, classes: Sequence[str]) -> NDArray[np.float32]:
    """Lowest scores (K,) from one number, or from one for each class; infinite ones let all or nothing pass."""
    array = as_numbers(value, "threshold")
    if array.shape not in ((), (len(classes),)) or array.dtype.kind == "b" or np.isnan(array).any():
        expected = f"a number, or one for each of {counted(len(classes), 'class')}"
        raise SppnetError(f"threshold: expected {expected}, got {value!r}; leave it out for detector.thresholds")
    with np.errstate(over="ignore"):
        return np.broadcast_to(array.astype(np.float32), len(classes))


def check_names(values: object, name: str) -> tuple[str, ...]:
    """Texts, none of them empty, of a sequence."""
    texts: Any = values.tolist() if isinstance(values, np.ndarray) else values
    sequence = isinstance(texts, Sequence) and not isinstance(texts, str | bytes)
    wrong = [text for text in texts if not isinstance(text, str) or not text] if sequence else [texts]
    if wrong:
        got = f"{wrong[0]!r} among them" if sequence else repr(texts)
        raise SppnetError(f"{name}: expected a sequence of names, e.g. ['cat', 'dog'], got {got}")
    return tuple(map(str, texts))


def check_classes(values: object, name: str = "classes") -> tuple[str, ...]:
    """The same, all different."""
    names = check_names(values, name)
    if len(set(names)) < len(names):
        raise SppnetError(f"{name} must be distinct names, got {list(names)}; name each class once")
    return names


def check_lengths(**lists: Sequence[Any] | NDArray[Any]) -> None:
    """SppnetError unless all are of one length."""
    if len({len(values) for values in lists.values()}) > 1:
        got = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise SppnetError(f"expected one of each for every box, got {got}")


def rows_of(index: Any, count: int) -> int | NDArray[np.int64]:
    """What ``things[index]`` means for `count` things: one row, or the rows of a slice, a mask or an array of indices.

    IndexError as for arrays.
    """
    rows = np.arange(count)
    if is_whole(index):
        return int(rows[operator.index(index)])
    if not isinstance(index, slice):
        index = as_column(index, "index", "iub")
    return rows[index]
