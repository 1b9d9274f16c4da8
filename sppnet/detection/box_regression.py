"""Class-wise box regression (sec. 4.1; numbers of the release).

A window with features x is moved and scaled by a linear prediction of (dx, dy, log dw, log dh), relative to the
window's centre and sides. Targets are centred and whitened with (S + ε I)^(−1/2), S their covariance divided by N,
and fitted by ridge regression on the features with a column of ones, which is regularised like the others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sppnet.artifacts import names_from_tensor, names_to_tensor
from sppnet.checks import as_numbers, as_rows, as_scale, check_boxes, check_rows
from sppnet.config import BoxRegressionSettings
from sppnet.detection.torch_state import undisturbed
from sppnet.distributed import choose_device
from sppnet.errors import SppnetError
from sppnet.records import Boxes
from sppnet.settings import checked_settings

logger = logging.getLogger("sppnet")

BLOCK = 1024  # rows of a system computed at once
EXACT_SIDE = 2048  # larger systems are formed from float32 products: far faster, their rounding far below λ
LARGEST_TARGET = 1e6  # sides of the window; no image has a box so far from it
FAR = 10.0  # a mean norm so many times off the one that the ridge is made for is logged
_PARTS = ("weight", "bias", "target_mean", "target_unwhiten")


@dataclass(frozen=True, eq=False)
class BoxRegressor:
    """The regressor of one class: weight (4, D) and bias (4,) in whitened space, and the way back; all float64.

    A weight in float32 multiplies the features in float32, see `BoxRegressors.single`.
    """

    weight: Tensor
    bias: Tensor
    target_mean: Tensor  # (4,)
    target_unwhiten: Tensor  # (4, 4), symmetric: (S + ε I)^(1/2)
    scale: float = 1.0  # multiplies the features

    @undisturbed()
    def refine(self, features: ArrayLike | Tensor, windows: ArrayLike) -> NDArray[np.float64]:
        """Features (R, D) of windows (R, 4) -> the predicted boxes (R, 4), not clipped to the image.

        Arrays or tensors; SppnetError for another width, another number of windows, and windows that are none.
        """
        rows = _as_tensor(features, self.weight.shape[1])
        corners = _matching_boxes(windows, len(rows), "windows")
        weight, bias = self.weight.to(rows.device), self.bias.to(rows.device)
        whitened = (rows.to(weight.dtype) @ weight.T).double() * self.scale + bias
        return apply_targets(corners, (whitened.cpu() @ self.target_unwhiten + self.target_mean).numpy())


@dataclass(frozen=True, eq=False)
class BoxRegressors:
    """The regressors of all classes; all of one feature width and scale."""

    per_class: tuple[BoxRegressor, ...]
    classes: tuple[str, ...]

    @classmethod
    def stack(cls, regressors: Mapping[str, BoxRegressor]) -> BoxRegressors:
        """Class name -> regressor."""
        kinds = {(regressor.weight.shape, regressor.scale) for regressor in regressors.values()}
        if len(kinds) != 1:
            raise ValueError(f"regressors must share one feature width and scale, got {sorted(map(str, kinds))}")
        return cls(tuple(regressors.values()), tuple(regressors))

    def single(self) -> BoxRegressors:
        """The same with the weights in float32: at test time enough, and wide features need no conversion."""
        return replace(self, per_class=tuple(replace(own, weight=own.weight.float()) for own in self.per_class))

    @undisturbed()
    def refine(
        self,
        features: ArrayLike | Tensor,
        windows: ArrayLike,
        labels: ArrayLike,
        rows: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """Each window (R, 4) by the regressor of its label, an index (R,) into classes, or one for all.

        features (R, D); where windows share features, (U, D) with the row of each window in `rows` (R,).
        """
        features = _as_tensor(features)
        rows = _indices(np.arange(len(features)) if rows is None else rows, len(features), "rows")
        corners = _matching_boxes(windows, len(rows), "windows")
        indices = _indices(labels, len(self.classes), "labels")
        if indices.shape not in ((), (len(corners),)):
            raise SppnetError(f"labels must be one index, or one for each of {len(corners)}, got {indices.shape}")
        per_window, refined = np.broadcast_to(indices, len(corners)), corners.copy()
        for label in np.unique(per_window):
            own = np.flatnonzero(per_window == label)
            inputs = features[torch.from_numpy(rows[own]).to(features.device)]
            refined[own] = self.per_class[label].refine(inputs, corners[own])
        return refined

    @undisturbed()
    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors stacked over the classes, and their names, that `from_tensors` reads back."""
        return {
            **{name: torch.stack([getattr(own, name) for own in self.per_class]) for name in _PARTS},
            "scale": torch.tensor(self.per_class[0].scale, dtype=torch.float64),
            "classes": names_to_tensor(self.classes),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> BoxRegressors:
        missing = {*_PARTS, "scale", "classes"} - set(tensors)
        if missing:
            raise SppnetError(f"box regressors need the tensors {sorted(missing)} too; train the regressors again")
        classes, scale = names_from_tensor(tensors["classes"]), float(tensors["scale"])
        each = ({name: tensors[name][label] for name in _PARTS} for label in range(len(classes)))
        return cls(tuple(BoxRegressor(**parts, scale=scale) for parts in each), classes)


@undisturbed()
def fit_box_regressor(
    features: ArrayLike | Tensor,
    windows: ArrayLike,
    boxes: ArrayLike,
    settings: BoxRegressionSettings | None = None,
    scale: float = 1.0,
    device: torch.device | str | None = None,
) -> BoxRegressor:
    """The regressor from features (N, D) of windows (N, 4) to the boxes (N, 4) of the objects they cover.

    Arrays, tensors or lists. `scale` multiplies the features here and in the result: the ridge is made for features of
    mean norm ``settings.feature_norm`` (release: 20; see `mean_norm_scale`); ten times more or less is logged as a
    warning. A system of min(N, D + 1) unknowns is solved in float64 on `device` (default: where the features are). No
    examples give the regressor that leaves windows unchanged.
    Raises SppnetError for features that are not finite, windows or boxes without extent, and lengths that differ.
    """
    settings = checked_settings(BoxRegressionSettings, settings)
    features, scale = _as_tensor(features), as_scale(scale)
    place = features.device if device is None else choose_device(device)
    norms = torch.linalg.vector_norm(features.float(), dim=1) * scale
    if not bool(norms.isfinite().all()):
        raise SppnetError(f"features must be finite, row {int((~norms.isfinite()).nonzero()[0])} is not; leave it out")
    if len(norms) and not 1 / FAR <= float(norms.mean()) / settings.feature_norm <= FAR:
        logger.warning(
            f"features of a mean norm of {float(norms.mean()):.3g}: boxes.ridge is made for {settings.feature_norm:g}; "
            "pass scale=mean_norm_scale(norms)"
        )
    corners = _matching_boxes(windows, len(features), "windows")
    with np.errstate(over="ignore"):
        targets = regression_targets(corners, _matching_boxes(boxes, len(features), "boxes"))
    far = np.flatnonzero(~(np.abs(targets) < LARGEST_TARGET).all(axis=1))
    if len(far):
        raise SppnetError(f"boxes must lie near their windows, that of row {far[0]} does not; leave it out")
    mean, unwhiten, whitened = _whiten(targets, settings.whitening)
    kind = torch.float64 if min(features.shape) <= EXACT_SIDE else torch.float32
    rows = torch.nn.functional.pad(features.to(place, kind) * scale, (0, 1), value=1.0)
    try:
        solution = _solve_ridge(rows, torch.from_numpy(whitened).to(rows.device), settings.ridge).cpu()
    except torch.linalg.LinAlgError:
        ridge = f"boxes.ridge={settings.ridge:g} is too small for these {len(rows)} rows of features"
        raise SppnetError(f"{ridge}, some of which depend on each other; raise it (release: 4000)") from None
    weight, bias = solution[:-1].T.contiguous(), solution[-1]
    return BoxRegressor(weight, bias, torch.from_numpy(mean), torch.from_numpy(unwhiten), scale)


def regression_targets(windows: ArrayLike, boxes: ArrayLike) -> NDArray[np.float64]:
    """(dx, dy, log dw, log dh) that `apply_targets` needs to turn windows (N, 4) into boxes (N, 4)."""
    window_centre, window_sides = _centres_and_sides(windows, "windows")
    box_centre, box_sides = _centres_and_sides(boxes, "boxes")
    return np.concatenate([(box_centre - window_centre) / window_sides, np.log(box_sides / window_sides)], axis=1)


def apply_targets(windows: Boxes, targets: NDArray[np.floating]) -> NDArray[np.float64]:
    """Windows (R, 4) moved by (dx, dy) of their sides and scaled by exp(log dw, log dh): (R, 4)."""
    sides = windows[:, 2:] - windows[:, :2]
    centre = windows[:, :2] + sides / 2 + targets[:, :2] * sides
    half = sides * np.exp(targets[:, 2:]) / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def _whiten(targets: NDArray[np.float64], epsilon: float) -> Sequence[NDArray[np.float64]]:
    """Targets (N, 4) -> their mean, (S + ε I)^(1/2), and the targets centred and multiplied by its inverse."""
    if not len(targets):
        return np.zeros(4), np.eye(4), targets
    mean = targets.mean(axis=0)
    centred = targets - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(targets) + epsilon * np.eye(4))
    if values[0] <= 0:
        raise SppnetError(f"{len(targets)} targets cannot be whitened; set boxes.whitening above 0 (release: 0.001)")
    root = np.sqrt(values)
    return mean, (vectors * root) @ vectors.T, centred @ ((vectors / root) @ vectors.T)


def _solve_ridge(rows: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """(XᵀX + λI)⁻¹ Xᵀ targets for rows X (N, M) and targets (N, 4) float64: (M, 4) float64.

    Where N < M as the same solution Xᵀ (XXᵀ + λI)⁻¹ targets, a system of N unknowns.
    """
    dual = len(rows) < rows.shape[1]
    factors = rows if dual else rows.T
    system = torch.zeros(len(factors), len(factors), dtype=torch.float64, device=rows.device)
    for start in range(0, len(factors), BLOCK):  # the Cholesky factor needs only the lower triangle: half the work
        system[start : start + BLOCK, : start + BLOCK] = factors[start : start + BLOCK] @ factors[: start + BLOCK].T
    system.diagonal().add_(ridge)
    right = targets if dual else factors.double() @ targets
    solution = torch.cholesky_solve(right, torch.linalg.cholesky(system, out=system))  # in place
    del system
    return factors.T.double() @ solution if dual else solution


def _centres_and_sides(boxes: ArrayLike, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    corners = check_boxes(boxes, name)
    sides = corners[:, 2:] - corners[:, :2]
    return corners[:, :2] + sides / 2, sides


def _indices(values: ArrayLike, count: int, name: str) -> NDArray[np.int64]:
    indices = as_numbers(values, name)
    if not np.isin(indices, np.arange(count)).all():
        raise SppnetError(f"{name} must lie in 0 … {count - 1}, got {sorted(set(indices.ravel().tolist()))}")
    return indices.astype(np.int64)


def _matching_boxes(boxes: ArrayLike, count: int, name: str) -> NDArray[np.float64]:
    corners = check_boxes(boxes, name, extent=False)
    if len(corners) != count:
        raise SppnetError(f"expected one of {name} for each of the {count} feature rows, got {len(corners)}")
    return corners


def _as_tensor(features: ArrayLike | Tensor, width: int | None = None) -> Tensor:
    if not isinstance(features, Tensor) or features.is_complex():
        array = as_rows(features, width)
        array = array if array.dtype in (np.float16, np.float32, np.float64) else array.astype(np.float64)
        features = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch takes no others
    check_rows(tuple(features.shape), width)
    return features.detach()
