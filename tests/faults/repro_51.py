"""The geometry of a backbone with branches: convolutions of shortcuts are counted as if they stood in the chain, silently.

Right: the true stride (found by probing the network), or an error for a container that is not understood.
"""

import sys

import torch
from torch import nn

from sppnet.backbones.geometry import geometry_of, steps_of


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.short, self.a, self.b = nn.Conv2d(8, 8, 1, 2), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x):
        return self.short(x) + self.b(self.a(x))


net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Residual(), Residual())
try:
    stride = geometry_of(steps_of(net)[0]).stride
except (TypeError, ValueError) as error:
    print("refused:", error)
    sys.exit(0)
true = 320 / (net(torch.zeros(1, 3, 64, 480)).shape[-1] - net(torch.zeros(1, 3, 64, 160)).shape[-1])
print("said", stride, "true", true)
sys.exit(stride != true)
