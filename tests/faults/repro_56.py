"""fit_linear_svm on l2-normalised features, the usual ones: every score is above 0, chance accuracy at the documented boundary, no warning.

Right: a warning that says which mean norm the settings are made for, or features scaled inside, with the scale kept in the result.
"""

import sys
import warnings

import numpy as np

from sppnet import fit_linear_svm

x = np.random.default_rng(0).normal(size=(400, 64))
y = np.where(x[:, 0] + 0.3 * x[:, 1] > 0, 1, -1)
x /= np.linalg.norm(x, axis=1, keepdims=True)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    score = fit_linear_svm(x, y).score(x)
accuracy = float(((score > 0) == (y > 0)).mean())
print("accuracy at 0:", round(accuracy, 3), "warnings:", len(seen))
sys.exit(accuracy < 0.8 and not seen)
