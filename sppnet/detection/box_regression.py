"""Room 7: class-wise box regression (sec. 4.1; numbers of the release).

A window with features x is moved and scaled by a linear prediction of (dx, dy, log dw, log dh), relative to the
window's centre and sides. Targets are centred and whitened with (S + ε I)^(−1/2), S their covariance divided by N,
and fitted by ridge regression on the features with a column of ones, which is regularised like the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sppnet.boxes import Boxes, as_boxes
from sppnet.config import BoxRegressionSettings
from sppnet.errors import SppnetError

Features = NDArray[np.floating] | Tensor

BLOCK = 1024  # features or examples converted at once
EXACT_SIDE = 2048  # systems up to this side are formed from float64 products


@dataclass(frozen=True)
class BoxRegressor:
    """The regressor of one class: weight (4, D) and bias (4,) in whitened space, and the way back; all float64.

    A weight in float32 multiplies the features in float32, see `BoxRegressors.single`.
    """

    weight: Tensor
    bias: Tensor
    target_mean: Tensor  # (4,)
    target_unwhiten: Tensor  # (4, 4), symmetric: (S + ε I)^(1/2)
    scale: float = 1.0  # multiplies the features

    def targets(self, features: Features) -> NDArray[np.float64]:
        """Unscaled features (R, D) -> predicted (dx, dy, log dw, log dh), (R, 4)."""
        rows = _as_tensor(features, self.weight.shape[1])
        weight, bias = self.weight.to(rows.device), self.bias.to(rows.device)
        whitened = (rows.to(weight.dtype) @ weight.T).double() * self.scale + bias
        return (whitened.cpu() @ self.target_unwhiten + self.target_mean).numpy()

    def refine(self, features: Features, windows: Boxes) -> NDArray[np.float64]:
        """Features (R, D) of windows (R, 4) -> the predicted boxes (R, 4), not clipped to the image."""
        corners = _matching_boxes(windows, len(features), "windows")
        return apply_targets(corners, self.targets(features))


@dataclass(frozen=True)
class BoxRegressors:
    """The regressors of all classes, stacked along a first axis of length K; float64, the weight perhaps float32."""

    weight: Tensor  # (K, 4, D)
    bias: Tensor  # (K, 4)
    target_mean: Tensor  # (K, 4)
    target_unwhiten: Tensor  # (K, 4, 4)
    scale: float
    classes: tuple[str, ...]

    @classmethod
    def stack(cls, regressors: Mapping[str, BoxRegressor]) -> BoxRegressors:
        """Class name -> regressor; all of one feature width and scale."""
        kinds = {(regressor.weight.shape, regressor.scale) for regressor in regressors.values()}
        if len(kinds) != 1:
            raise SppnetError(f"regressors must share one feature width and scale, got {sorted(map(str, kinds))}")
        names = ("weight", "bias", "target_mean", "target_unwhiten")
        parts = {name: torch.stack([getattr(r, name) for r in regressors.values()]) for name in names}
        return cls(**parts, scale=next(iter(regressors.values())).scale, classes=tuple(regressors))

    def of(self, label: int) -> BoxRegressor:
        parts = (self.weight[label], self.bias[label], self.target_mean[label], self.target_unwhiten[label])
        return BoxRegressor(*parts, scale=self.scale)

    def single(self) -> BoxRegressors:
        """The same with the weight in float32: at test time enough, and the conversion of wide features is saved."""
        return replace(self, weight=self.weight.float())

    def refine(
        self, features: Features, windows: Boxes, labels: ArrayLike, rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.float64]:
        """Each window (R, 4) by the regressor of its label, an index (R,) into classes, or one for all.

        features (R, D); where windows share features, (U, D) with the row of each window in `rows` (R,).
        """
        features = _as_tensor(features)
        rows = np.arange(len(features)) if rows is None else rows
        corners = _matching_boxes(windows, len(rows), "windows")
        per_window = np.broadcast_to(np.asarray(labels, dtype=np.int64), len(corners))
        if not np.isin(per_window, np.arange(len(self.classes))).all():
            raise SppnetError(f"labels must lie in 0 … {len(self.classes) - 1}, got {sorted(set(per_window.tolist()))}")
        refined = corners.copy()
        for label in np.unique(per_window):
            own = np.flatnonzero(per_window == label)
            inputs = features[torch.from_numpy(rows[own]).to(features.device)]
            refined[own] = self.of(int(label)).refine(inputs, corners[own])
        return refined

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors that `from_tensors` reads back, names of the classes included."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "target_mean": self.target_mean,
            "target_unwhiten": self.target_unwhiten,
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "classes": torch.tensor(list("\n".join(self.classes).encode()), dtype=torch.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> BoxRegressors:
        names = ("weight", "bias", "target_mean", "target_unwhiten")
        missing = {*names, "scale", "classes"} - set(tensors)
        if missing:
            raise SppnetError(f"box regressors need the tensors {sorted(missing)} too; train the regressors again")
        classes = tuple(bytes(tensors["classes"].tolist()).decode().split("\n"))
        return cls(**{name: tensors[name] for name in names}, scale=float(tensors["scale"]), classes=classes)


def fit_box_regressor(
    features: Features,
    windows: Boxes,
    boxes: Boxes,
    settings: BoxRegressionSettings | None = None,
    scale: float = 1.0,
    device: torch.device | str | None = None,
) -> BoxRegressor:
    """The regressor from features (N, D) of windows (N, 4) to the boxes (N, 4) of the objects they cover.

    `scale` multiplies the features here and in the result (see `mean_norm_scale`). The system of min(N, D + 1)²
    numbers is summed and solved in float64 on `device` (default: where the features are), in blocks, so that beside the
    features only it is held, twice. Large systems are formed from float32 products, whose rounding is far below λ.
    No examples give the regressor that leaves windows unchanged.
    Raises ValueError for windows or boxes without extent and for lengths that differ.
    """
    settings = settings or BoxRegressionSettings()
    features = _as_tensor(features)
    corners = _matching_boxes(windows, len(features), "windows")
    targets = regression_targets(corners, _matching_boxes(boxes, len(features), "boxes"))
    mean, unwhiten, whitened = _whiten(targets, settings.whitening)
    solve = _solve_dual if len(features) <= features.shape[1] else _solve_primal
    device = torch.device(device) if device is not None else features.device
    weight, bias = solve(features, torch.from_numpy(whitened).to(device), settings.ridge, scale)
    return BoxRegressor(weight.cpu(), bias.cpu(), torch.from_numpy(mean), torch.from_numpy(unwhiten), scale)


def regression_targets(windows: Boxes, boxes: Boxes) -> NDArray[np.float64]:
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
        raise SppnetError(
            f"the covariance of {len(targets)} targets cannot be inverted with whitening {epsilon}; "
            "set boxes.whitening above 0 (release: 0.001)"
        )
    root = np.sqrt(values)
    return mean, (vectors * root) @ vectors.T, centred @ ((vectors / root) @ vectors.T)


def _solve_primal(features: Tensor, targets: Tensor, ridge: float, scale: float) -> tuple[Tensor, Tensor]:
    """(XᵀX + λI)⁻¹ Xᵀ targets with X = [scale · features, 1]: a system of D + 1 unknowns."""
    count, width = features.shape
    system = targets.new_zeros(width + 1, width + 1)
    products = _product_type(width)
    right = targets.new_zeros(width + 1, 4)
    for start in range(0, count, BLOCK):
        rows = features[start : start + BLOCK].to(targets.device, products) * scale
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        _add_lower_gram(system, rows.T)
        right += rows.T.double() @ targets[start : start + BLOCK]
    solution = _solve_ridge(system, right, ridge)
    return solution[:-1].T.contiguous(), solution[-1]


def _solve_dual(features: Tensor, targets: Tensor, ridge: float, scale: float) -> tuple[Tensor, Tensor]:
    """The same solution as Xᵀ (XXᵀ + λI)⁻¹ targets: a system of N unknowns."""
    count, width = features.shape
    system = targets.new_ones(count, count)  # the products of the column of ones
    products = _product_type(count)
    blocks = range(0, width, BLOCK)
    for start in blocks:
        _add_lower_gram(system, features[:, start : start + BLOCK].to(targets.device, products) * scale)
    alpha = _solve_ridge(system, targets, ridge)
    parts = [alpha.T @ features[:, start : start + BLOCK].to(targets) * scale for start in blocks]
    return torch.cat(parts, dim=1) if parts else targets.new_zeros(4, 0), alpha.sum(dim=0)


def _product_type(side: int) -> torch.dtype:
    # ours: twice as fast; λ = 4000 dwarfs the rounding of products of features with norm 20
    return torch.float64 if side <= EXACT_SIDE else torch.float32


def _add_lower_gram(system: Tensor, rows: Tensor) -> None:
    """Add rows · rowsᵀ to the lower triangle, in tiles: half the work of the whole product."""
    for start in range(0, len(rows), BLOCK):
        stop = start + BLOCK
        system[start:stop, :stop] += rows[start:stop] @ rows[:stop].T


def _solve_ridge(system: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve (system + λI) · solution = right; only the lower triangle of `system` is read, and it is overwritten."""
    system.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(system))


def _centres_and_sides(boxes: Boxes, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    corners = as_boxes(boxes, name)
    sides = corners[:, 2:] - corners[:, :2]
    bad = np.flatnonzero(~(sides > 0).all(axis=1))
    if len(bad):
        raise SppnetError(
            f"{name} must have x2 > x1 and y2 > y1, got {corners[bad[0]].tolist()} at row {bad[0]}; "
            "leave out what has no extent"
        )
    return corners[:, :2] + sides / 2, sides


def _matching_boxes(boxes: Boxes, count: int, name: str) -> NDArray[np.float64]:
    corners = as_boxes(boxes, name)
    if len(corners) != count:
        raise SppnetError(f"expected one of {name} for each of the {count} feature rows, got {len(corners)}")
    return corners


def _as_tensor(features: Features, width: int | None = None) -> Tensor:
    if not isinstance(features, Tensor):
        array = np.asarray(features)
        features = torch.from_numpy(array if array.flags.writeable else array.copy())
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        raise SppnetError(
            f"features must have shape (R, {width or 'D'}), got {tuple(features.shape)}; "
            "use the layer that the regressor was trained on"
        )
    return features.detach()
