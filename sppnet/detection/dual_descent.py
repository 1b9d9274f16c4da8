"""The compiled loop behind `fit_linear_svm`: dual coordinate descent for the hinge loss.

Hsieh, Chang, Lin, Keerthi, Sundararajan, "A dual coordinate descent method for large-scale linear SVM", 2008: the
method of liblinear, with its shrinking and its stopping rule. The reason to have it here is memory: it reads the
features where they lie, in their own precision, while liblinear copies them to double precision and then to pairs of
index and value, 24 bytes where a float32 feature has four. On pyramid vectors of ten thousand numbers reading memory
is all that takes time.

The dual of the problem in `linear_svm`, one α for each example:

    min over 0 ≤ αᵢ ≤ cᵢ of  1/2 |Σ αᵢ yᵢ (xᵢ, B)|² − Σ αᵢ,    w = Σ αᵢ yᵢ xᵢ,  b = B² Σ αᵢ yᵢ
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sppnet.compiling import compiled
from sppnet.errors import SppnetError

ZERO_GRADIENT = 1e-12  # a smaller projected gradient leaves α as it is


class Solution(NamedTuple):
    """weight (D,) float64, bias, how often all examples were gone through, and whether the tolerance was reached."""

    weight: NDArray[np.float64]
    bias: float
    rounds: int
    converged: bool


def minimise_hinge(
    features: NDArray[np.floating],
    signs: NDArray[np.int64],
    costs: NDArray[np.float64],
    bias_multiplier: float,
    tolerance: float,
    max_rounds: int,
    seed: int,
) -> Solution:
    """The minimum, from α = 0. features (N, D) C-contiguous float32 or float64; signs (N,) −1 or +1; costs (N,) the cᵢ.

    It ends when the projected gradients of all examples lie within `tolerance` of each other and of zero, or after
    `max_rounds`.
    Sums are kept in double precision; the same values and seed give the same weights on one machine.
    Raises SppnetError where a feature is not finite.
    """
    norms = np.empty(len(features))
    _squared_norms(features, norms)
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise SppnetError(
            f"features must be finite, and their norms too: row {row} is not; check the images and the weights"
        )
    order = np.random.default_rng(seed)
    weight, bias, rounds, converged = _descend(
        features, signs, costs, norms, bias_multiplier, tolerance, max_rounds, np.uint64(order.integers(2**63))
    )
    return Solution(weight, float(bias), int(rounds), bool(converged))


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
    """One example after the other takes the α that is best for it alone, in a new random order every round.

    Shrinking: an α at its bound whose gradient points outwards by more than the largest violation of the last round is
    set aside. Once the others have converged all take part again, until a full round finds nothing beyond the
    tolerance.
    """
    count, width = features.shape
    weight, bias = np.zeros(width), 0.0  # bias is that of the feature `multiplier`: b / B
    alphas = np.zeros(count)
    order = np.arange(count)
    active = count
    outward, inward = np.inf, -np.inf  # the extreme projected gradients of the last round
    for done in range(1, max_rounds + 1):
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
                return weight, bias * multiplier, done, True
            active = count
            outward, inward = np.inf, -np.inf
            continue
        outward = highest if highest > 0 else np.inf
        inward = lowest if lowest < 0 else -np.inf
    return weight, bias * multiplier, max_rounds, False
