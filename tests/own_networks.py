"""Networks of one's own, as tests name them by import path or give them as objects."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallResidual(nn.Module):
    """Stride 8, 12 channels: a stem, a block with a shortcut, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 4, 1)
        self.short = nn.Conv2d(8, 12, 1, 2)
        self.first = nn.Conv2d(8, 12, 3, 2, 1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 12, 3, 1, 1)
        self.gate = nn.Linear(12, 12)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        x = F.relu(self.short(x) + self.second(F.relu(self.norm(self.first(x)))))
        return x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]


def residual() -> nn.Module:
    """Weights drawn anew at every call."""
    return SmallResidual()


def classifier() -> nn.Module:
    return nn.Sequential(SmallResidual(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def number() -> int:
    return 7


def failing() -> nn.Module:
    raise FileNotFoundError("weights.pth")


def different() -> nn.Module:
    """Weights from a source that no seed of torch reaches."""
    module = SmallResidual()
    module.stem.bias.data[0] = random.SystemRandom().random()
    return module
