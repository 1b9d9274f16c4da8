"""What values given by hand must be: arrays, tensors and lists of numbers alike, checked where they enter."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.errors import SppnetError


def is_whole(value: Any) -> bool:
    """Whether it is one whole number; true and false are none."""
    dimensions: int = getattr(value, "ndim", 0)
    if isinstance(value, bool | np.bool_) or dimensions:
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def as_array(value: object, name: str) -> NDArray[Any]:
    """A new array of the numbers or flags of an array, a tensor of any device, or a list."""
    try:
        if hasattr(value, "detach"):  # a tensor, without importing torch, which takes seconds
            tensor: Any = value.detach().cpu()
            value = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
        array = np.array(value)
    except Exception as error:  # whatever numpy or torch say of what is none
        raise SppnetError(f"{name}: expected an array of numbers, got {type(value).__name__} ({error})") from None
    if array.size and array.dtype.kind not in "biuf":
        got = f"{type(value).__name__} of {array.dtype}"
        raise SppnetError(f"{name}: expected an array, tensor or list of numbers, got {got}")
    return array


def as_column(value: object, name: str, kinds: str = "iuf") -> NDArray[Any]:
    """The same of shape (R,) and one of these kinds: b, i, u or f; SppnetError for others."""
    array = as_array(value, name)
    if not array.size:
        return np.zeros(0, array.dtype if array.dtype.kind in kinds else np.dtype(f"{kinds[0]}1"))
    if array.ndim != 1 or array.dtype.kind not in kinds:
        wanted = {"iuf": "numbers", "iu": "whole numbers", "biu": "true or false"}[kinds]
        raise SppnetError(f"{name}: expected {wanted} of shape (R,), got {array.dtype} of shape {array.shape}")
    return array


def check_boxes(value: object, name: str = "boxes", dtype: Any = np.float32) -> NDArray[Any]:
    """Finite boxes (R, 4) with x1 < x2 and y1 < y2, in float32 unless said otherwise; nothing at all is (0, 4)."""
    array = as_array(value, name)
    if not array.size:
        return np.zeros((0, 4), dtype)
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind == "b":
        hint = f"; pass {name}[None] for one box" if array.shape == (4,) else ""
        raise SppnetError(f"{name} must have shape (R, 4), got {array.shape}{hint}")
    with np.errstate(over="ignore"):
        boxes = array.astype(dtype)
    bad = first_bad_box(boxes)
    if bad is not None:
        raise SppnetError(
            f"{name}[{bad}] is {array[bad].tolist()}: expected finite x1 < x2 and y1 < y2 (zero-based, half-open); "
            "correct it or leave it out"
        )
    return boxes


def first_bad_box(boxes: NDArray[np.floating]) -> int | None:
    """The first row that is not finite or not ordered."""
    good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return None if good.all() else int(good.argmin())


def check_scores(value: object, name: str = "scores") -> NDArray[np.float32]:
    """Finite numbers (R,) as float32."""
    numbers = as_column(value, name)
    with np.errstate(over="ignore"):
        scores = numbers.astype(np.float32)
    if not np.isfinite(scores).all():
        bad = int(np.isfinite(scores).argmin())
        raise SppnetError(f"{name}[{bad}] is {numbers[bad]}: expected a finite number; leave out what has none")
    return scores


def check_names(value: object, name: str) -> tuple[str, ...]:
    """Texts, none of them empty, of a sequence."""
    texts = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise SppnetError(f"{name}: expected a sequence of names, e.g. ['cat', 'dog'], got {texts!r}")
    wrong = [text for text in texts if not isinstance(text, str) or not text]
    if wrong:
        raise SppnetError(f"{name}: expected a sequence of names, e.g. ['cat', 'dog'], got {wrong[0]!r} among them")
    return tuple(str(text) for text in texts)


def check_classes(value: object, name: str = "classes") -> tuple[str, ...]:
    """The same, all different."""
    names = check_names(value, name)
    if len(set(names)) < len(names):
        raise SppnetError(f"{name} must be distinct names, got {list(names)}; name each class once")
    return names


def check_lengths(**lists: Sequence[Any] | NDArray[Any]) -> None:
    """SppnetError unless all are of one length."""
    if len({len(values) for values in lists.values()}) > 1:
        got = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise SppnetError(f"expected one of each for every box, got {got}")


def check_thresholds(value: float | ArrayLike, classes: Sequence[str]) -> NDArray[np.float32]:
    """Lowest scores (K,) from one number, or from one for each class; infinite ones let all or nothing pass."""
    array = as_array(value, "threshold")
    if array.shape not in ((), (len(classes),)) or array.dtype.kind not in "iuf" or np.isnan(array).any():
        raise SppnetError(
            f"threshold: expected a number, or one for each of the {len(classes)} classes, got {value!r}; "
            "leave it out for detector.thresholds"
        )
    with np.errstate(over="ignore"):
        return np.broadcast_to(array.astype(np.float32), len(classes))


def check_overlap(value: object, name: str) -> float:
    """An intersection over union in [0, 1]."""
    array = as_array(value, name)
    if array.ndim or array.dtype.kind not in "iuf" or not 0 <= array <= 1:
        raise SppnetError(f"{name} must be an overlap in [0, 1], got {value!r}; give one, e.g. 0.3")
    return float(array)


def rows_of(index: Any, count: int) -> int | NDArray[np.int64]:
    """What ``things[index]`` means for `count` things: one row, or the rows of a slice, a mask or an array of indices.

    IndexError as for arrays.
    """
    rows = np.arange(count)
    if isinstance(index, slice):
        return rows[index]
    if is_whole(index):
        if not -count <= operator.index(index) < count:
            raise IndexError(f"index {index} is out of range for {count}")
        return int(rows[operator.index(index)])
    array = as_array(index, "index")
    if not array.size and array.dtype.kind != "b":
        return rows[:0]
    if array.dtype.kind == "b" and array.shape != (count,):
        raise IndexError(f"expected a mask of shape ({count},), got {array.shape}")
    if array.ndim != 1 or array.dtype.kind == "f":
        raise IndexError(f"expected a whole number, a slice, a mask or an array of indices, got {index!r}")
    if array.dtype.kind != "b" and not -count <= int(array.min()) <= int(array.max()) < count:
        raise IndexError(f"indices {int(array.min())} to {int(array.max())} are out of range for {count}")
    return rows[array]
