"""Windows of one's own backbone: the map once, then a vector of one length for any box of the picture (sec. 4.1).

python examples/windows.py photo.jpg
"""

import sys

import torch
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import normalize, resize

from sppnet import Geometry, pool_windows, project_windows, read_image, selective_search

if len(sys.argv) != 2:
    sys.exit(__doc__)
backbone = torch.nn.Sequential(*list(resnet18(weights=None).children())[:-3]).eval()  # weights="DEFAULT": ImageNet's
geometry = Geometry.of(backbone)
print(f"stride {geometry.stride:g}, the first cell looks at pixel {geometry.first_centre:g}")

image = read_image(sys.argv[1])  # (H, W, 3) uint8
boxes = selective_search(image)  # (R, 4) xyxy in pixels of the picture
scale = 400  # pixels of the shorter side
pixels = resize(torch.from_numpy(image).permute(2, 0, 1) / 255, scale, antialias=True)
pixels = normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
with torch.inference_mode():
    feature_map = backbone(pixels[None])[0]
cells = project_windows(boxes, image.shape[:2], scale, geometry, feature_map.shape[1:])
vectors = pool_windows(feature_map, cells, levels=(1, 2, 3, 6))
print(f"{len(boxes)} boxes, a map of {tuple(feature_map.shape)}, vectors {tuple(vectors.shape)}")
