"""timm's and torchvision's usual mean and std (pixels 0 to 1) in backbone.weights, where pixels run from 0 to 255."""

import sys
import tempfile

import torch
from product import sppnet

from sppnet.backbones.backbone import build_backbone
from sppnet.config import BackboneSettings, WeightsSettings
from sppnet.data.shapes import generate_shapes

root = generate_shapes(tempfile.mkdtemp(), {"train": 3, "val": 1})
backbone = build_backbone(BackboneSettings(name="tiny5", weights=WeightsSettings(source="random")))
torch.save(backbone.state_dict(), root / "w.pth")  # stands for pretrained weights
config = root / "c.yaml"
config.write_text(f"""
data: {{root: {root}, train: [SHAPES/train], val: [SHAPES/val], test: []}}
backbone:
  name: tiny5
  weights: {{source: file, file: {root}/w.pth, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
""")
status, out, err = sppnet("train", config, "--dry-run", "--run", root / "run")
if "255" in out + err:  # an error or a word of warning that names the range
    sys.exit(0)
print(
    f"mean 0.485 and std 0.229 of pixels 0 to 1 are taken for pixels 0 to 255 (white becomes {(255 - 0.485) / 0.229:.0f}), status {status}, no word"
)
sys.exit(1)
