"""Linear SVMs, one per class, and the fit of a single one (sec. 4.1; numbers of the release).

The problem of one class, over scaled features x with labels y in {-1, +1}, B the bias multiplier and p the weight of
positives:

    1/2 |w|² + 1/2 (b/B)² + C (p Σ_{y=+1} max(0, 1 − f(x)) + Σ_{y=−1} max(0, 1 + f(x))),    f(x) = w·x + b

It is solved by dual coordinate descent (Hsieh, Chang, Lin, Keerthi, Sundararajan, "A dual coordinate descent method for
large-scale linear SVM", 2008), the method of liblinear, with its shrinking and its stopping rule. Its dual, one α for
each example, with the upper bound cᵢ = C, or C p for a positive:

    min over 0 ≤ αᵢ ≤ cᵢ of  1/2 |Σ αᵢ yᵢ (xᵢ, B)|² − Σ αᵢ,    w = Σ αᵢ yᵢ xᵢ,  b = B² Σ αᵢ yᵢ

The loop stands here because of memory: liblinear needs 24 bytes for a feature, where float32 has four.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import linear

from sppnet.artifacts import names_from_tensor, names_to_tensor
from sppnet.checks import as_numbers, as_rows, as_scale, check_rows
from sppnet.config import SVMSettings
from sppnet.detection.torch_state import undisturbed
from sppnet.errors import SppnetError
from sppnet.ops.compiling import compiled
from sppnet.settings import checked_settings

logger = logging.getLogger("sppnet")

ONE_SIDED = 0.95  # a share of the scores on one side of 0 that a fit may warn of
ZERO_GRADIENT = 1e-12  # a smaller projected gradient leaves α as it is


@dataclass(frozen=True, eq=False)
class LinearSVM:
    """One trained SVM: weight (D,) float64 and bias, for features in the units of those that it was trained on.

    `scale` is what the features were multiplied by in the problem that was solved; the weight contains it.
    """

    weight: NDArray[np.float64]
    bias: float
    scale: float = 1.0

    def score(self, features: ArrayLike | Tensor) -> NDArray[np.float64]:
        """(R, D), array or tensor -> (R,) float64, computed in double precision; SppnetError for another width."""
        return _as_array(features, len(self.weight)) @ self.weight + self.bias


@dataclass(frozen=True, eq=False)
class LinearSVMs:
    """The SVMs of all classes: weight (K, D) float32, bias (K,) float32, the scale of the features, the names."""

    weight: Tensor
    bias: Tensor
    scale: float
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.classes)
        if self.weight.ndim != 2 or len(self.weight) != count or self.bias.shape != (count,):
            shapes = f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            raise SppnetError(f"{count} classes need weight (K, D) and bias (K,), a row for each, got {shapes}")

    def score(self, features: ArrayLike | Tensor) -> Tensor:
        """Unscaled features (R, D), array or tensor -> scores (R, K) float32 on their device: scale · x · Wᵀ + b."""
        if not isinstance(features, Tensor) or features.is_complex():
            features = torch.tensor(_as_array(features), device="cpu")
        check_rows(tuple(features.shape), self.weight.shape[1])
        weight = (self.weight * self.scale).to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            return linear(features.float(), weight, self.bias.to(features.device))

    def to(self, device: torch.device) -> LinearSVMs:
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    @undisturbed()
    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors that `from_tensors` reads back, names of the classes included."""
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return {"weight": self.weight, "bias": self.bias, "scale": scale, "classes": names_to_tensor(self.classes)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LinearSVMs:
        missing = {"weight", "bias", "scale", "classes"} - set(tensors)
        if missing:
            raise SppnetError(f"linear SVMs need the tensors {sorted(missing)} too; train them again")
        return cls(tensors["weight"], tensors["bias"], float(tensors["scale"]), names_from_tensor(tensors["classes"]))


def fit_linear_svm(
    features: ArrayLike | Tensor, labels: ArrayLike, settings: SVMSettings | None = None, scale: float | None = None
) -> LinearSVM:
    """The minimum of the problem above. features (N, D), array or tensor of any real type; labels (N,) in {-1, +1}.

    C and the bias multiplier are made for features of a norm of ``settings.feature_norm`` (release: 20); in other units
    the boundary at 0 means nothing. So the problem is that of the features times `scale`. None measures it: the factor
    that brings the median of their norms, zeros left out, to that value; features scaled already come with scale=1. The
    result takes features as they were given.
    The same arguments give the same weights on one machine. Features in float32 or float64 are read where they lie,
    others as float64; sums are kept in double precision. The fit ends when the projected gradients of all examples lie
    within ``tolerance`` of each other and of zero; one that stops at ``max_iterations`` rounds is used and logged.
    Warns, where the scale was measured, if 0 leaves nearly all on one side, and one label for all would be as good.
    Raises SppnetError for other shapes and labels, for positives or negatives alone, and for features not finite.
    """
    settings = checked_settings(SVMSettings, settings)
    rows = np.ascontiguousarray(_as_array(features))
    signs = _checked_labels(labels, len(rows))
    if len(set(signs.tolist())) < 2:
        missing = "negatives (-1)" if (signs > 0).any() else "positives (+1)"
        raise SppnetError(f"a linear SVM needs positives and negatives, got {len(signs)} examples but no {missing}")
    norms = np.empty(len(rows))
    _squared_norms(rows, norms)
    if not np.isfinite(norms).all():
        bad = int(np.isfinite(norms).argmin())
        raise SppnetError(f"features must be finite, and their norms too: row {bad} is not; leave it out")
    factor = typical_norm_scale(np.sqrt(norms), settings.feature_norm) if scale is None else as_scale(scale)
    # The problem of scaled features in the units of those given: w contains the factor, and no copy is scaled.
    costs = settings.C * factor**2 * np.where(signs > 0, settings.positive_weight, 1.0)
    limits = settings.bias_multiplier / factor, settings.tolerance, settings.max_iterations
    state = np.uint64(np.random.default_rng(settings.seed).integers(2**63))
    weight, bias, converged = _descend(rows, signs, costs, norms, *limits, state)
    if not converged:
        logger.warning(
            f"linear SVM of {len(rows)} x {rows.shape[1]} stopped at {settings.max_iterations} iterations before it "
            f"reached tolerance {settings.tolerance:g}; its weights are used, raise svm.max_iterations or svm.tolerance"
        )
    if scale is None:
        above = np.array([_dot(row, weight) + bias > 0 for row in rows])
        right = (above == (signs > 0)).mean()
        if right <= max((signs > 0).mean(), (signs < 0).mean()) and max(above.mean(), 1 - above.mean()) > ONE_SIDED:
            warnings.warn(
                f"0 tells {right:.0%} of the examples apart, no more than one label for all would: C={settings.C:g} is "
                f"small for {len(rows)} examples, or a large part of their features is constant; raise C, or subtract "
                "the median of the features",
                stacklevel=2,
            )
    return LinearSVM(weight, float(bias), factor)


def mean_norm_scale(norms: ArrayLike, target: float = 20.0) -> float:
    """The factor that brings the mean of these feature norms to `target` (release: 20).

    Raises SppnetError where there is no norm, or where their mean is zero or not finite.
    """
    values = np.asarray(norms, dtype=np.float64)
    mean = float(values.mean()) if values.size else float("nan")
    if not (np.isfinite(mean) and mean > 0):
        raise SppnetError(f"the mean of {values.size} feature norms must be positive, got {mean}; check the weights")
    return target / mean


def typical_norm_scale(norms: NDArray[np.floating], target: float) -> float:
    """The factor that brings the median of these norms, zeros left out, to `target`: a few huge ones do not matter."""
    present = norms[norms > 0]
    if not len(present):
        raise SppnetError(f"features must not be all zero, got {len(norms)} such rows; check where they come from")
    return as_scale(target / float(np.median(present)))


def _as_array(features: ArrayLike | Tensor, width: int | None = None) -> NDArray[np.floating]:
    """(N, D) in float32 or float64: as it is, or a copy."""
    array = as_rows(features, width)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _checked_labels(labels: ArrayLike, count: int) -> NDArray[np.int64]:
    signs = as_numbers(labels, "labels")
    if signs.shape != (count,):
        raise SppnetError(f"labels must have shape ({count},), one for each row of features, got {signs.shape}")
    other = signs[(signs != 1) & (signs != -1)] if signs.dtype != bool else signs
    if len(other):
        raise SppnetError(f"labels must be -1 or +1, got {other[0]}; for 0 and 1 pass 2 * labels - 1")
    return signs.astype(np.int64)


# Sums may be reordered: so they become vector instructions.
_compiled = compiled(fastmath={"reassoc", "contract"})


@_compiled
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = 0.0
    for d in range(a.size):
        total += np.float64(a[d]) * np.float64(b[d])
    return total


@_compiled
def _add(factor, row, weight):  # type: ignore[no-untyped-def]
    for d in range(row.size):
        weight[d] += factor * np.float64(row[d])


@_compiled
def _squared_norms(features, norms):  # type: ignore[no-untyped-def]
    for i in range(len(features)):
        norms[i] = _dot(features[i], features[i])


@_compiled
def _shuffle(order, count, state):  # type: ignore[no-untyped-def]
    """Put the first `count` entries in random order: Knuth's MMIX congruential generator, upper bits."""
    for place in range(count - 1):
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        other = place + np.int64((state >> np.uint64(33)) % np.uint64(count - place))
        order[place], order[other] = order[other], order[place]
    return state


@_compiled
def _descend(features, signs, costs, norms, multiplier, tolerance, max_rounds, state):  # type: ignore[no-untyped-def]
    """From α = 0, one example after the other takes the α that is best for it alone, in a new random order every round.

    Shrinking: an α at its bound whose gradient points outwards by more than the largest violation of the last round is
    set aside. Once the others have converged all take part again, until a full round finds nothing beyond the
    tolerance. Returns the weight, the bias and whether the tolerance was reached.
    """
    count, width = features.shape
    weight, bias = np.zeros(width), 0.0  # bias is that of the feature `multiplier`: b / B
    alphas = np.zeros(count)
    order = np.arange(count)
    active = count
    outward, inward = np.inf, -np.inf  # the extreme projected gradients of the last round
    for _ in range(max_rounds):
        state = _shuffle(order, active, state)
        highest, lowest = -np.inf, np.inf
        place = 0
        while place < active:
            i = order[place]
            gradient = signs[i] * (_dot(features[i], weight) + bias * multiplier) - 1.0
            projected = gradient
            if alphas[i] == 0.0:
                aside = gradient > outward
                projected = min(gradient, 0.0)
            elif alphas[i] == costs[i]:
                aside = gradient < inward
                projected = max(gradient, 0.0)
            else:
                aside = False
            if aside:
                active -= 1
                order[place], order[active] = order[active], order[place]
                continue
            highest, lowest = max(highest, projected), min(lowest, projected)
            if abs(projected) > ZERO_GRADIENT:
                curvature = norms[i] + multiplier * multiplier
                if curvature == 0.0:  # no feature and no bias to speak of: as far as it goes
                    moved = 0.0 if gradient > 0 else costs[i]
                else:
                    moved = min(max(alphas[i] - gradient / curvature, 0.0), costs[i])
                step = (moved - alphas[i]) * signs[i]
                alphas[i] = moved
                _add(step, features[i], weight)
                bias += step * multiplier
            place += 1
        if max(highest - lowest, highest, -lowest) <= tolerance:
            if active == count:
                return weight, bias * multiplier, True
            active = count
            outward, inward = np.inf, -np.inf
            continue
        outward = highest if highest > 0 else np.inf
        inward = lowest if lowest < 0 else -np.inf
    return weight, bias * multiplier, False
