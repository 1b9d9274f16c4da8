"""Step 6: linear SVMs, one per class, and the fit of a single one (sec. 4.1; numbers of the release).

The problem of one class, over scaled features x with labels y in {-1, +1}:

    1/2 |w|² + 1/2 (b/B)² + C (p Σ_{y=+1} max(0, 1 − f(x)) + Σ_{y=−1} max(0, 1 + f(x))),    f(x) = w·x + b

with B the bias multiplier and p the weight of positives. `dual_descent` solves it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import linear

from sppnet.config import SVMSettings
from sppnet.detection.dual_descent import minimise_hinge
from sppnet.errors import SppnetError

logger = logging.getLogger("sppnet")

BLOCK_BYTES = 1 << 26  # of rows scored at once in double precision

Features = NDArray[np.floating] | Tensor


@dataclass(frozen=True)
class LinearSVM:
    """One trained SVM: weight (D,) float64 and bias, for features scaled as in training."""

    weight: NDArray[np.float64]
    bias: float

    def score(self, features: Features) -> NDArray[np.float64]:
        """(R, D) -> (R,) float64, computed in double precision."""
        rows = _as_array(features)
        block = max(1, BLOCK_BYTES // (8 * max(1, rows.shape[1])))
        blocks = [rows[start : start + block] @ self.weight + self.bias for start in range(0, len(rows), block)]
        return np.concatenate(blocks) if blocks else np.empty(0)


@dataclass(frozen=True)
class SVMObjective:
    """The minimised sum in its three parts."""

    positive: float
    negative: float
    regularisation: float

    @property
    def total(self) -> float:
        return self.positive + self.negative + self.regularisation

    def __str__(self) -> str:
        return f"{self.total:.3f} = {self.positive:.3f} pos + {self.negative:.3f} neg + {self.regularisation:.3f} reg"


@dataclass(frozen=True)
class LinearSVMs:
    """The SVMs of all classes: weight (K, D) float32, bias (K,) float32, the scale of the features, the names."""

    weight: Tensor
    bias: Tensor
    scale: float
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.classes)
        if self.weight.ndim != 2 or len(self.weight) != count or self.bias.shape != (count,):
            raise SppnetError(
                f"{count} classes need weight (K, D) and bias (K,), got {tuple(self.weight.shape)} and "
                f"{tuple(self.bias.shape)}; give one row for each class"
            )

    def score(self, features: Tensor) -> Tensor:
        """Unscaled features (R, D) -> scores (R, K) float32 on their device: scale · x · Wᵀ + b."""
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise SppnetError(
                f"features must have shape (R, {self.weight.shape[1]}), got {tuple(features.shape)}; "
                "use the layer that these SVMs were trained on"
            )
        weight = (self.weight * self.scale).to(features.device)
        return linear(features.float(), weight, self.bias.to(features.device))

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors that `from_tensors` reads back, names of the classes included."""
        names = torch.tensor(list("\n".join(self.classes).encode()), dtype=torch.uint8)
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return {"weight": self.weight, "bias": self.bias, "scale": scale, "classes": names}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LinearSVMs:
        missing = {"weight", "bias", "scale", "classes"} - set(tensors)
        if missing:
            raise SppnetError(f"linear SVMs need the tensors {sorted(missing)} too; train them again")
        names = tuple(bytes(tensors["classes"].tolist()).decode().split("\n"))
        return cls(tensors["weight"], tensors["bias"], float(tensors["scale"]), names)


def fit_linear_svm(features: Features, labels: ArrayLike, settings: SVMSettings | None = None) -> LinearSVM:
    """The minimum of the problem above. features (N, D), already scaled; labels (N,) in {-1, +1}.

    The same features, labels and settings give the same weights. Features in float32 or float64 are read where they
    lie, others as float64. A fit that stops at ``max_iterations`` is used and logged as a warning.
    Raises SppnetError for other shapes and labels, for positives or negatives alone, and for features not finite.
    """
    settings = settings or SVMSettings()
    rows, signs = _as_array(features), _checked_labels(labels, len(features))
    costs = settings.C * np.where(signs > 0, settings.positive_weight, 1.0)
    limits = settings.tolerance, settings.max_iterations, settings.seed
    solution = minimise_hinge(np.ascontiguousarray(rows), signs, costs, settings.bias_multiplier, *limits)
    if not solution.converged:
        logger.warning(
            "linear SVM of %d x %d stopped at %d iterations before it reached tolerance %g; its weights are used, "
            "raise svm.max_iterations or svm.tolerance",
            *rows.shape,
            settings.max_iterations,
            settings.tolerance,
        )
    return LinearSVM(solution.weight, solution.bias)


def svm_objective(
    svm: LinearSVM, scores: NDArray[np.floating], labels: ArrayLike, settings: SVMSettings | None = None
) -> SVMObjective:
    """The value that `fit_linear_svm` minimises. scores (N,) that this SVM gives, labels (N,) in {-1, +1}."""
    settings, signs = settings or SVMSettings(), _checked_labels(labels, len(scores), both=False)
    loss = np.maximum(0, 1 - signs * scores.astype(np.float64))
    norm = svm.weight @ svm.weight + (svm.bias / settings.bias_multiplier) ** 2
    return SVMObjective(
        positive=float(settings.C * settings.positive_weight * loss[signs > 0].sum()),
        negative=float(settings.C * loss[signs < 0].sum()),
        regularisation=float(norm / 2),
    )


def mean_norm_scale(norms: ArrayLike, target: float = 20.0) -> float:
    """The factor that brings the mean of these feature norms to `target` (release: 20).

    Raises SppnetError where there is no norm, or where their mean is zero or not finite.
    """
    values = np.asarray(norms, dtype=np.float64)
    mean = float(values.mean()) if values.size else float("nan")
    if not (np.isfinite(mean) and mean > 0):
        raise SppnetError(
            f"the mean of {values.size} feature norms must be positive, got {mean}; "
            "check that the sampled images have windows and that the network's weights are loaded"
        )
    return target / mean


def _as_array(features: Features) -> NDArray[np.floating]:
    """(N, D) in float32 or float64: as it is, or a copy."""
    if isinstance(features, Tensor):
        whole = features.detach().cpu()
        array = (whole if whole.dtype == torch.float64 else whole.float()).numpy()
    else:
        array = np.asarray(features)
    if array.ndim != 2:
        raise SppnetError(f"features must have shape (N, D), got {array.shape}; pass features[None] for one window")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _checked_labels(labels: ArrayLike, count: int, both: bool = True) -> NDArray[np.int64]:
    signs = np.asarray(labels)
    if signs.shape != (count,):
        raise SppnetError(f"labels must have shape ({count},), one for each row of features, got {signs.shape}")
    if not np.isin(signs, (-1, 1)).all():
        other = signs[~np.isin(signs, (-1, 1))][0]
        raise SppnetError(f"labels must be -1 or +1, got {other}; for 0 and 1 pass 2 * labels - 1")
    if both and not ((signs > 0).any() and (signs < 0).any()):
        missing = "negatives (-1)" if (signs > 0).any() else "positives (+1)"
        raise SppnetError(f"a linear SVM needs positives and negatives, got {count} examples but no {missing}")
    return signs.astype(np.int64)
