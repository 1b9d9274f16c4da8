"""More than 100 objects of a class in a picture (cells, cars from above): detect stops at detect.max_per_class and says nothing."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from product import sppnet

from sppnet import SPPDetector
from sppnet.backbones.backbone import build_backbone
from sppnet.config_files import parse_config
from sppnet.detection.linear_svm import LinearSVMs
from sppnet.models.sppnet import build_head

root = Path(tempfile.mkdtemp())
config = parse_config(
    {
        "backbone": {"name": "tiny5", "weights": {"source": "random"}},
        "maps": {"scales": [64]},
        "pyramid": {"levels": [1]},
        "head": {"fc6": 4, "fc7": 4},
        "proposals": {"max_side": None},
    },
    "here",
)
backbone = build_backbone(config.backbone)
head = build_head(backbone.channels, config.pyramid.levels, 2, config.head)
SPPDetector(backbone, head, LinearSVMs(torch.zeros(1, 4), torch.ones(1), 1.0, ("cell",)), None, None, config).save(
    root / "run/detector"
)  # finds everything
pixels = np.full((840, 840, 3), 128, np.uint8)
colours = np.random.default_rng(0).integers(0, 255, (14, 14, 3))
for row in range(14):
    for column in range(14):  # 196 objects
        pixels[row * 60 + 10 : row * 60 + 50, column * 60 + 10 : column * 60 + 50] = colours[row, column]
Image.fromarray(pixels).save(root / "cells.png")
status, out, err = sppnet("detect", root / "run", root / "cells.png", "--out", root / "out")
said = out + err
if "max_per_class" in said or not said.startswith("100 detections"):
    sys.exit(0)
print(f"196 objects, all scored 1, and detect says only: {out.splitlines()[0]}")
sys.exit(1)
