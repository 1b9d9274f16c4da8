"""SpatialPyramidPool in torch.jit.script, torch.fx and ONNX export: fails where plain adaptive_max_pool2d passes the first two.

Right: scripting and tracing pass; ONNX export (dynamo=True) writes a graph of slices and ReduceMax for a fixed size, or says what is supported.
"""

import sys

import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from sppnet import SpatialPyramidPool

net = nn.Sequential(nn.Conv2d(3, 8, 3), SpatialPyramidPool((1, 2)), nn.Linear(40, 2))
left = []
for name, run in {"script": torch.jit.script, "fx": lambda n: create_feature_extractor(n, ["0"])}.items():
    try:
        run(net)
    except Exception as error:
        left.append(f"{name}: {type(error).__name__}")
print("failing:", left)
sys.exit(bool(left))
