"""One linear SVM: sppnet's coordinate descent beside liblinear, to the same tolerance on the same features.

    python benchmarks/linear_svm.py [--windows 10000] [--widths 1024 4096 12800] [--rounds 5] [--tolerance 1e-3]

Features are generated: ReLU outputs, half of them zero, of mean norm 20, one window in twenty a positive whose class
shifts a tenth of its features a little, so that some windows stay on the wrong side as in mining. The two fit in
pairs, the order changing from pair to pair, and the ratio is taken pair by pair. Exit status 1 where the objective of
ours is more than a thousandth above liblinear's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np

from sppnet.config import SVMSettings
from sppnet.detection.linear_svm import fit_linear_svm, mean_norm_scale, svm_objective

SOLVERS = ("descent", "liblinear")
WORSE = 1e-3  # of the objective: more is another solution


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    warm_up = windows(40, 8)
    fit_linear_svm(*warm_up)  # compiles
    print(
        "| features | windows | sppnet, s | liblinear, s | ratio, median (from – to) | objective, ours / liblinear's |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    worst = 0.0
    for width in options.widths:
        features, labels = windows(options.windows, width)
        pairs = [fit_pair(number, features, labels, options.tolerance) for number in range(options.rounds)]
        own, peer = (statistics.median(pair[name][0] for pair in pairs) for name in SOLVERS)
        ratios = sorted(pair["liblinear"][0] / pair["descent"][0] for pair in pairs)
        relative = pairs[0]["descent"][1] / pairs[0]["liblinear"][1]
        worst = max(worst, relative - 1)
        spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} – {ratios[-1]:.1f})"
        print(f"| {width} | {len(features)} | {own:.2f} | {peer:.2f} | {spread} | {relative:.5f} |", flush=True)
    return 1 if worst > WORSE else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096, 12_800], help="features of a window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=SVMSettings().tolerance)
    return parser.parse_args(arguments)


def windows(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Scaled features (count, width) float32 and labels (count,)."""
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(count) % 20 == 0, 1, -1)
    features = rng.standard_normal((count, width), dtype=np.float32)
    features[:, : max(1, width // 10)] += 0.1 * labels[:, None]
    np.maximum(features, 0, out=features)
    features *= mean_norm_scale(np.linalg.norm(features, axis=1))
    return features, labels


def fit_pair(number: int, features: np.ndarray, labels: np.ndarray, tolerance: float) -> dict[str, tuple[float, float]]:
    """Solver -> seconds and objective."""
    pair = {}
    for name in SOLVERS if number % 2 == 0 else SOLVERS[::-1]:
        settings = SVMSettings(solver=name, tolerance=tolerance)
        start = time.perf_counter()
        svm = fit_linear_svm(features, labels, settings)
        seconds = time.perf_counter() - start
        pair[name] = (seconds, svm_objective(svm, features, labels, settings).total)
    return pair


if __name__ == "__main__":
    sys.exit(main())
