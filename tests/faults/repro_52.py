"""project_windows believes impossible arguments: a scale that is a factor, 0, negative or NaN; a map of another size; boxes whose corners are swapped.

Right: ValueError that says what was expected (the resized shorter side in pixels; a map of about resized side / stride cells; x1 < x2).
"""

import sys

import numpy as np

from sppnet import Geometry, project_windows

box, image, grid, geometry = np.array([[48, 240, 195, 371.0]]), (500, 353), (61, 43), Geometry(16, 7.5)
cases = {
    "scale as a factor": lambda: project_windows(box, image, 688 / 353, geometry, grid),
    "scale 0": lambda: project_windows(box, image, 0, geometry, grid),
    "scale NaN": lambda: project_windows(box, image, float("nan"), geometry, grid),
    "map (W, H)": lambda: project_windows(box, image, 688, geometry, grid[::-1]),
    "map of another scale": lambda: project_windows(box, image, 353, geometry, grid),
    "corners swapped": lambda: project_windows(box[:, [2, 3, 0, 1]], image, 688, geometry, grid),
    "stride -16": lambda: project_windows(box, image, 688, Geometry(-16, 0), grid),
}
left = 0
for name, case in cases.items():
    try:
        print("believed:", name, case())
        left += 1
    except ValueError:
        pass
print(left, "of", len(cases), "believed")
sys.exit(left > 0)
