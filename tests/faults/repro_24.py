"""evaluate_voc believes impossible detections: label -1 is the last class, a surplus score or box is dropped, NaN boxes and
NaN ground truth count; a label beyond the classes or unequal lengths of an annotation are an IndexError from inside.

Right: ValueError that names the image, as it does for NaN scores.
"""

import numpy as np
from product import verdict

from sppnet import Annotation, Detections, evaluate_voc

box = np.array([[5, 5, 40, 40]], np.float32)
truth = Annotation(box, ("x",), np.array([False]))


def found(boxes=box, scores=(0.8,), labels=(0,)):
    return Detections(boxes, np.array(scores, np.float32), np.array(labels), ("x",))


cases = {
    "label -1": lambda: (found(labels=(-1,)), truth),
    "two scores, one box": lambda: (found(scores=(0.8, 0.7)), truth),
    "NaN box": lambda: (found(box * np.nan), truth),
    "NaN ground truth": lambda: (found(), Annotation(box * np.nan, ("x",), np.array([False]))),
    "label 3": lambda: (found(labels=(3,)), truth),
    "two boxes, one name": lambda: (found(), Annotation(np.repeat(box, 2, 0), ("x",), np.array([False]))),
}
faults = []
for what, case in cases.items():
    try:
        detections, annotation = case()
        value = evaluate_voc({"a": detections}, {"a": annotation}, ["x"]).map
        faults.append(f"{what}: mAP {value:g}")
    except ValueError:
        pass
    except Exception as error:
        faults.append(f"{what}: {type(error).__name__}: {error}")
verdict(bool(faults), "; ".join(faults))
