"""The pyramid layer in one's own classifier: it learns from pictures of two sizes and takes any (sec. 2.3).

python examples/classifier.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sppnet import SpatialPyramidPool


def pictures(count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (N, 1, side, side) with lines that lie (0) or stand (1)."""
    labels = torch.arange(count) % 2
    lines = torch.zeros(count, side, side)
    lines[labels == 0, ::8] = 2
    lines[labels == 1, :, ::8] = 2
    return (lines + torch.randn(count, side, side))[:, None], labels


torch.manual_seed(0)
pyramid = SpatialPyramidPool((1, 2, 4))
network = nn.Sequential(
    *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 5, 2, 2), nn.ReLU()),
    *(pyramid, nn.Linear(pyramid.out_features(16), 2)),
)
optimiser = torch.optim.Adam(network.parameters(), 3e-3)
for step in range(40):
    images, labels = pictures(32, side=(32, 44)[step % 2])  # one size a step, the same weights
    loss = cross_entropy(network(images), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
for side in (28, 32, 44, 61):
    images, labels = pictures(200, side)
    correct = (network(images).argmax(1) == labels).float().mean()
    print(f"{side} × {side}: {correct:.0%} correct")
