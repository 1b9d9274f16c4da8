"""Features of one's own to linear SVMs, one for each class, with hard-negative mining (sec. 4.1).

python examples/svms.py
"""

import numpy as np

from sppnet import mine_detectors

rng = np.random.default_rng(0)
centres = rng.normal(size=(2, 64)) * 4  # of the features of cats and of dogs


def image():
    """Features (R, 64) of one object and 99 other windows, and the overlaps (R, 2) of each with cats and dogs."""
    features, overlaps = rng.normal(size=(100, 64)), np.zeros((100, 2))
    label = rng.integers(2)
    features[0] += centres[label]
    overlaps[0, label] = 1
    return features, overlaps


mined = mine_detectors([image() for _ in range(40)], classes=("cat", "dog"))
features, overlaps = image()
scores = mined.svms.score(features)  # (R, 2)
print("fits of each class:", mined.retrains)
print(f"the object is a {mined.svms.classes[overlaps[0].argmax()]}, and scores {scores[0].tolist()}")
print("the best other window scores", scores[1:].max().item())
