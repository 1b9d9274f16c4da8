"""The networks a backbone can be made of: the paper's four (table 1), a small one of our own, public ones.

Each function returns a Plan: the layers by name, in the order in which they run, up to the pyramid's place.
Names are torchvision's, or those of the public weights; in the paper's networks "conv5" is the map after the ReLU.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


@dataclass(frozen=True)
class Plan:
    """Layers by name; a dotted name is torchvision's ("features.0")."""

    layers: dict[str, nn.Module]
    default: str  # the layer whose map is taken where none is named
    deviation: float | None = None  # of random weights, normally distributed; None = He initialisation


class LocalResponseNorm(nn.Module):
    """Normalisation over a spatial neighbourhood within each channel (release: size 3, alpha 5e-5, beta 0.75).

    y = x · (1 + alpha · mean(x²))^(-beta), the mean over the size × size cells around x; cells beyond the border
    count as zeros. `size` is odd. (N, C, H, W) -> the same shape.
    """

    def __init__(self, size: int = 3, alpha: float = 5e-5, beta: float = 0.75) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd, so that a cell has as many neighbours on either side, got {size}")
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        exact = x if x.dtype == torch.float64 else x.float()  # 16-bit floats are rounded once, at the end
        mean = F.avg_pool2d(exact * exact, self.size, stride=1, padding=self.size // 2, count_include_pad=True)
        return (exact * (1 + self.alpha * mean).pow(-self.beta)).to(x.dtype)


class ConvReLU(nn.Conv2d):
    """A convolution followed by its ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input), inplace=True)  # fresh memory for a fine map costs more than the ReLU


def zf5() -> Plan:
    """ZF-5 with the release's paddings (conv1, pool1, conv2, … : 1, 0, 0, 0, 1, 1, 1); maps of 13 cells at 224."""
    return _paper_plan(
        conv1=ConvReLU(3, 96, 7, stride=2, padding=1),
        norm1=LocalResponseNorm(),
        pool1=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        conv2=ConvReLU(96, 256, 5, stride=2),
        norm2=LocalResponseNorm(),
        pool2=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        conv3=ConvReLU(256, 384, 3, padding=1),
        conv4=ConvReLU(384, 384, 3, padding=1),
        conv5=ConvReLU(384, 256, 3, padding=1),
    )


def convnet5() -> Plan:
    """Convnet*-5: maps of 55, 27 and 13 cells at 224."""
    return _paper_plan(
        conv1=ConvReLU(3, 96, 11, stride=4, padding=2),
        norm1=LocalResponseNorm(),
        conv2=ConvReLU(96, 256, 5, padding=2),
        norm2=LocalResponseNorm(),
        pool2=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        conv3=ConvReLU(256, 384, 3, padding=1),
        pool3=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        conv4=ConvReLU(384, 384, 3, padding=1),
        conv5=ConvReLU(384, 256, 3, padding=1),
    )


def overfeat5() -> Plan:
    """Overfeat-5: total stride 12, maps of 36 and 18 cells at 224."""
    return _paper_plan(
        conv1=ConvReLU(3, 96, 7, stride=2, padding=1),
        pool1=nn.MaxPool2d(3, stride=3),
        norm1=LocalResponseNorm(),
        conv2=ConvReLU(96, 256, 5, padding=2),
        pool2=nn.MaxPool2d(2, stride=2),
        conv3=ConvReLU(256, 512, 3, padding=1),
        conv4=ConvReLU(512, 512, 3, padding=1),
        conv5=ConvReLU(512, 512, 3, padding=1),
    )


def overfeat7() -> Plan:
    """Overfeat-7: Overfeat-5 and two more convolutions."""
    more = {name: ConvReLU(512, 512, 3, padding=1) for name in ("conv6", "conv7")}
    return _paper_plan(**overfeat5().layers, **more)


class MBConv(nn.Sequential):
    """EfficientNet's block without squeeze-and-excitation: expand, filter each channel, project, add the input.

    `expand` = 1 leaves the first convolution out; the input is added where the shape stays.
    """

    def __init__(self, inputs: int, outputs: int, expand: int, size: int, stride: int) -> None:
        wide = inputs * expand
        widen = {"expand_conv": nn.Conv2d(inputs, wide, 1, bias=False), **_norm_relu6(wide, 0)} if expand > 1 else {}
        depthwise = nn.Conv2d(wide, wide, size, stride, size // 2, groups=wide, bias=False)
        project = {"project_conv": nn.Conv2d(wide, outputs, 1, bias=False), "bn2": nn.BatchNorm2d(outputs, eps=1e-3)}
        super().__init__(OrderedDict(**widen, depthwise_conv=depthwise, **_norm_relu6(wide, 1), **project))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return input + output if self.adds else output


def efficientnet_lite(width: float, depth: float) -> Plan:
    """EfficientNet-Lite up to its last block, without the 1×1 convolution to 1280 channels behind it.

    `width` multiplies the channels, `depth` the blocks of all stages but the first and the last.
    """
    # Padding is the same on both sides; TensorFlow's, which its weights know, is so at sides of 32 k + 1 alone.
    stem = OrderedDict(conv_stem=nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), **_norm_relu6(32, 0))
    layers, inputs = dict[str, nn.Module](stem=nn.Sequential(stem)), 32
    # a stage: blocks, channels, expansion, side of the filters, stride of its first block
    for blocks, channels, expand, size, stride in (
        *((1, 16, 1, 3, 1), (2, 24, 6, 3, 2), (2, 40, 6, 5, 2), (3, 80, 6, 3, 2)),
        *((3, 112, 6, 5, 1), (4, 192, 6, 5, 2), (1, 320, 6, 3, 1)),
    ):
        outputs = int(channels * width + 4) // 8 * 8  # the nearest multiple of 8
        for place in range(math.ceil(blocks * depth) if blocks > 1 else 1):
            layers[f"blocks.{len(layers) - 1}"] = MBConv(inputs, outputs, expand, size, 1 if place else stride)
            inputs = outputs
    return Plan(layers, default=list(layers)[-1])


def tiny5() -> Plan:
    """Ours: five light convolutions with batch norm, for demonstrations and laptops, trained from scratch.

    The first steps by 4 pixels: maps finer than a quarter of the image take most of the time and add little.
    """
    return Plan(
        {
            "conv1": _conv_bn_relu(3, 24, size=7, stride=4),
            "conv2": _conv_bn_relu(24, 48, stride=2),
            "conv3": _conv_bn_relu(48, 64, stride=2),
            "conv4": _conv_bn_relu(64, 96),
            "conv5": _conv_bn_relu(96, 128),
        },
        default="conv5",
    )


BACKBONES: dict[str, Callable[[], Plan]] = {
    "zf5": zf5,
    "convnet5": convnet5,
    "overfeat5": overfeat5,
    "overfeat7": overfeat7,
    "tiny5": tiny5,
    # Up to the rectified conv5 (VGG16: conv5_3): the pool after it gives way to the pyramid.
    "alexnet": lambda: _features_plan(torchvision.models.alexnet().features[:-1]),
    "vgg16": lambda: _features_plan(torchvision.models.vgg16().features[:-1]),
    "squeezenet1_0": lambda: _features_plan(torchvision.models.squeezenet1_0().features),
    "squeezenet1_1": lambda: _features_plan(torchvision.models.squeezenet1_1().features),
    # Up to the last block, without the 1×1 convolution to 1280 channels behind it.
    "mobilenet_v2": lambda: _features_plan(torchvision.models.mobilenet_v2().features, default="features.17"),
    "efficientnet_lite0": lambda: efficientnet_lite(1, 1),
    "efficientnet_lite1": lambda: efficientnet_lite(1, 1.1),
    "efficientnet_lite2": lambda: efficientnet_lite(1.1, 1.2),
    "resnet18": lambda: _resnet_plan(torchvision.models.resnet18()),
    "resnet50": lambda: _resnet_plan(torchvision.models.resnet50()),
}


def _paper_plan(**layers: nn.Module) -> Plan:
    return Plan(layers, default=list(layers)[-1], deviation=0.01)  # release: N(0, 0.01)


def _conv_bn_relu(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(outputs), relu=nn.ReLU(inplace=True)))


def _norm_relu6(channels: int, place: int) -> dict[str, nn.Module]:
    """TensorFlow's epsilon; ReLU6 keeps values small enough for 8-bit devices."""
    return {f"bn{place}": nn.BatchNorm2d(channels, eps=1e-3), f"relu{place}": nn.ReLU6(inplace=True)}


def _features_plan(features: nn.Module, default: str | None = None) -> Plan:
    layers = {f"features.{name}": layer for name, layer in features.named_children()}
    return Plan(layers, default=default or list(layers)[-1])


def _resnet_plan(model: nn.Module) -> Plan:
    layers = {name: layer for name, layer in model.named_children() if name not in ("avgpool", "fc")}
    return Plan(layers, default="layer4")
