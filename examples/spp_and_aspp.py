"""SPP and ASPP as the neck of one backbone: a vector of one length, or a map of the size that comes in (sec. 2.2).

python examples/spp_and_aspp.py
"""

import torch
from torchvision.models import resnet18
from torchvision.models.segmentation.deeplabv3 import ASPP

from sppnet import SpatialPyramidPool

torch.manual_seed(0)
backbone = torch.nn.Sequential(*list(resnet18(weights=None).children())[:-3]).eval()  # stride 16, 256 channels
spp = SpatialPyramidPool((1, 2, 3, 6))
# Atrous spatial pyramid pooling (Chen et al. 2017): convolutions whose taps lie 1, 6, 12, 18 cells apart, side by side
aspp = ASPP(in_channels=256, atrous_rates=[6, 12, 18], out_channels=64).eval()

for height, width in ((224, 224), (180, 180), (353, 500)):
    with torch.inference_mode():
        cells = backbone(torch.randn(1, 3, height, width))
        vector, again = spp(cells), aspp(cells)
    shapes = [tuple(one.shape[1:]) for one in (cells, vector, again)]
    print("{} × {}: map {}, SPP {}, ASPP {}".format(height, width, *shapes))
print("SPP: one length for any size of image; bins alone say where: for fully connected layers, for classes.")
print("ASPP: a vector for each cell, of its surroundings at several sizes: for a class for each pixel.")
