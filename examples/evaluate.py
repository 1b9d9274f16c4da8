"""PASCAL VOC's and COCO's evaluation of the boxes of any detector, and their errors, from plain arrays (sec. 4.2).

python examples/evaluate.py
"""

import numpy as np

from sppnet import Annotation, Detections, evaluate_voc
from sppnet.evaluation.errors import find_errors

classes = ("cat", "dog")
truth = {
    "a": Annotation([[10, 10, 60, 80], [70, 20, 120, 90]], ("cat", "dog")),
    "b": Annotation([[5, 5, 50, 50]], ("cat",), difficult=[True]),  # neither found nor missed
}
found = {  # labels count from 0; pixels, x1 y1 x2 y2
    "a": {
        "boxes": [[12, 11, 61, 78], [68, 25, 118, 95], [0, 0, 20, 20]],
        "scores": [0.9, 0.7, 0.6],
        "labels": [0, 1, 0],
    },
    "b": {"boxes": [[6, 5, 49, 52]], "scores": [0.8], "labels": [0]},
}
detections = {name: Detections(**own, classes=classes) for name, own in found.items()}
for metric in ("11point", "area", "coco"):
    evaluation = evaluate_voc(detections, truth, classes, metric=metric)
    print(metric)
    print(evaluation.table())
print(find_errors(detections, truth, classes).table())
curve = evaluate_voc(detections, truth, classes).results["cat"].curve
print("cat: recall", np.round(curve.recall, 2), "precision", np.round(curve.precision, 2))
