"""One linear SVM: sppnet's coordinate descent beside scikit-learn's LinearSVC, to the same tolerance.

    python benchmarks/linear_svm.py [--windows 10000] [--widths 1024 4096 12800] [--rounds 5] [--tolerance 1e-3]

Features are generated: ReLU outputs, half of them zero, of mean norm 20, one window in twenty a positive whose class
shifts a tenth of its features a little, so that some windows stay on the wrong side as in mining. The two fit in turn;
the ratio is taken pair by pair. Exit status 1 where the objective of ours is more than a thousandth above LinearSVC's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from functools import partial

import numpy as np
from machine import alternate, describe, ratio, seconds
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from sppnet.config import SVMSettings
from sppnet.detection.linear_svm import LinearSVM, fit_linear_svm, mean_norm_scale

WORSE = 1e-3  # of the objective: more is another solution


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = SVMSettings(tolerance=options.tolerance)
    fits = {"sppnet": partial(fit_linear_svm, scale=1.0), "LinearSVC": fit_by_sklearn}
    print(f"{describe()}; {options.windows} windows, tolerance {options.tolerance:g}")
    print("| features | sppnet, s | LinearSVC, s | LinearSVC / sppnet | objective, sppnet / LinearSVC |")
    print("|---|---|---|---|---|", flush=True)
    worst = 0.0
    for width in options.widths:
        rows, labels = windows(options.windows, width)
        objectives = {
            name: objective(fit(rows, labels, settings), rows, labels, settings) for name, fit in fits.items()
        }
        times = alternate(
            {name: partial(seconds, partial(fit, rows, labels, settings)) for name, fit in fits.items()}, options.rounds
        )
        relative = objectives["sppnet"] / objectives["LinearSVC"]
        worst = max(worst, relative - 1)
        own, peer = (statistics.median(times[name]) for name in fits)
        print(f"| {width} | {own:.3f} | {peer:.3f} | {ratio(times['LinearSVC'], times['sppnet'])} | {relative:.5f} |")
    return 1 if worst > WORSE else 0


def windows(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Scaled features (count, width) float32 and labels (count,)."""
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(count) % 20 == 0, 1, -1)
    features = rng.standard_normal((count, width), dtype=np.float32)
    features[:, : max(1, width // 10)] += 0.1 * labels[:, None]
    np.maximum(features, 0, out=features)
    features *= mean_norm_scale(np.linalg.norm(features, axis=1))
    return features, labels


def fit_by_sklearn(features: np.ndarray, labels: np.ndarray, settings: SVMSettings) -> LinearSVM:
    """The same problem for liblinear."""
    solver = LinearSVC(
        loss="hinge",
        dual=True,
        C=settings.C,
        intercept_scaling=settings.bias_multiplier,
        class_weight={1: settings.positive_weight, -1: 1.0},
        tol=settings.tolerance,
        max_iter=settings.max_iterations,
        random_state=settings.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the objectives tell
        solver.fit(features, labels)
    return LinearSVM(solver.coef_[0].astype(np.float64), float(solver.intercept_[0]))


def objective(svm: LinearSVM, features: np.ndarray, labels: np.ndarray, settings: SVMSettings) -> float:
    """What both minimise: ½|w|² + ½(bias / multiplier)² + C Σ weight · hinge loss."""
    hinge = np.maximum(0, 1 - labels * (features @ svm.weight + svm.bias))
    norm = svm.weight @ svm.weight + (svm.bias / settings.bias_multiplier) ** 2
    return float(norm / 2 + settings.C * (hinge * np.where(labels > 0, settings.positive_weight, 1.0)).sum())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096, 12_800], help="features of a window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=SVMSettings().tolerance)
    options = parser.parse_args(arguments)
    if options.windows < 40 or min(options.rounds, *options.widths) < 1:
        parser.error("--windows must be at least 40, --rounds and --widths at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
