"""Structured forests of two trees, as the program that converts the published one writes them."""

from __future__ import annotations

from typing import Any

OPTIONS = {
    "numberOfTrees": 2, "numberOfTreesToEvaluate": 2, "selfsimilarityGridSize": 5, "stride": 2, "shrinkNumber": 2,
    "patchSize": 32, "patchInnerSize": 16, "numberOfGradientOrientations": 4, "gradientSmoothingRadius": 0,
    "regFeatureSmoothingRadius": 2, "ssFeatureSmoothingRadius": 8, "gradientNormalizationRadius": 4,
}  # fmt: skip
MAGNITUDE = 3 * 16 * 16 + 8 * 16 + 8  # the size of the gradient in the middle of a patch
MIDDLE = [7 * 16 + 7, 7 * 16 + 8, 8 * 16 + 7, 8 * 16 + 8] * 10  # pixels of a patch, the same again to count more
LISTS: dict[str, Any] = {
    "childs": [[2, 0, 0], [2, 0, 0]],  # a root and two leaves: an edge in the middle of the patch, or none
    "featureIds": [[MAGNITUDE, 0, 0], [MAGNITUDE, 0, 0]],
    "thresholds": [["5.000000e-02", 0, 0], ["5.000000e-02", 0, 0]],
    "edgeBoundaries": [[0, 0, 0, 40, 40, 40], [80]],
    "edgeBins": [MIDDLE, MIDDLE],
}


def forest(options: dict[str, Any] | None = None, **lists: Any) -> str:
    """The text of a forest with some of its options and lists changed; None leaves one out."""
    pairs = {**OPTIONS, **(options or {})}
    text = "%YAML:1.0\n\noptions:\n" + "".join(f"    {name}: {n}\n" for name, n in pairs.items() if n is not None)
    for name, rows in {**LISTS, **lists}.items():
        if rows is not None:
            text += f"\n{name}:\n" + "".join(f"    - [{','.join(map(str, row))}]\n" for row in rows)
    return text
