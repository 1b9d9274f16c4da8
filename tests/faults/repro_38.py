"""One picture longer than JPEG's 65,500 pixels (a scan, a long screenshot) ends detect for the whole folder."""

import json
import sys
import tempfile
from pathlib import Path

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
    },
    "here",
)
backbone = build_backbone(config.backbone)  # untrained: it is about files
head = build_head(backbone.channels, config.pyramid.levels, 2, config.head)
SPPDetector(backbone, head, LinearSVMs(torch.zeros(1, 4), torch.ones(1), 1.0, ("cat",)), None, None, config).save(
    root / "run/detector"
)
(root / "in").mkdir()
Image.new("RGB", (66000, 40), (90, 120, 60)).save(root / "in/a_long.png")
Image.new("RGB", (80, 60), (90, 120, 60)).save(root / "in/b_small.png")
status, out, err = sppnet("detect", root / "run", root / "in", "--out", root / "out")
searched = [Path(entry["image"]).name for entry in json.loads((root / "out/detections.json").read_text())]
if "b_small.png" in searched and status in (0, 1):
    sys.exit(0)
print(f"status {status}, searched {searched} of 2 pictures: {err.strip().splitlines()[-1]}")
sys.exit(1)
