"""data.train_on_difficult=false makes hard negatives of its own class of every difficult object.

VOC ignores difficult objects, it does not call them background. Crops keep to that (crops.write_crops: "left
out, but are no background either"), mining does not: TrainingWindows.annotation drops them before overlaps are taken.
Right: windows that overlap a difficult object by more than svm.negative_overlap are neither positive nor negative.
"""

import numpy as np
import torch
from product import ROOT, add_image, tiny_settings, verdict, write_set

from sppnet import Geometry
from sppnet.artifacts import write_arrays
from sppnet.config_files import parse_config
from sppnet.data.splits import load_split
from sppnet.detection.training_windows import TrainingWindows
from sppnet.records import pairwise_iou

devkit = ROOT / "devkit"
add_image(devkit, "a", [("cat", (11, 11, 60, 60), 0), ("cat", (91, 51, 150, 110), 1)])
write_set(devkit, "train", ["a"])
records, _ = load_split(devkit, "MINE/train")
windows = np.array([[92, 52, 148, 108], [0, 70, 40, 110]], np.float32)  # on the difficult cat; on nothing
write_arrays(records[0].path_in(ROOT / "w"), windows=windows)
faults = []
for used in (True, False):
    config = parse_config(
        tiny_settings(devkit, data={"root": str(devkit), "train": ["MINE/train"], "train_on_difficult": used}), "repro"
    )
    source = TrainingWindows(records, ("cat",), ROOT / "w", ROOT / "m", Geometry(16, 7.5), config, torch.device("cpu"))
    found = source.image_windows(0)
    own = found.overlaps[len(found.objects) :, 0]
    negative = own < config.svm.negative_overlap
    print(
        f"train_on_difficult={used}: overlap with cats {own.round(2).tolist()} -> negatives of cat {negative.tolist()}"
    )
    if negative[0]:
        iou = float(pairwise_iou(windows[:1], records[0].annotation.boxes[1:])[0, 0])
        faults.append(f"a window of IoU {iou:.2f} with a difficult cat is a negative of cat")
verdict(bool(faults), "; ".join(faults))
