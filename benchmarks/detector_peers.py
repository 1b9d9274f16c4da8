"""SSD and Faster R-CNN of torchvision in the benchmark `few_pictures.py`, on the backbone of ours, fine-tuned.

Both have EfficientNet-Lite0 with the package's weights and preprocessing, whose maps of stride 8, 16 and 32 SSD
continues to six as SSD300 does, and of which Faster R-CNN makes a feature pyramid of 128 channels. As torchvision's own
recipes do, batch norm keeps its statistics and scales, and the layers up to stride 4 stay as they are. The head is that
of few pictures and little time: 128 windows an image and two layers of 512 in Faster R-CNN.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.transforms import v2

from sppnet.backbones.architectures import BACKBONES
from sppnet.backbones.weights import load_weights, public_state
from sppnet.config import WeightsSettings
from sppnet.images import read_image
from sppnet.records import Detections, ImageRecord

NAME = "efficientnet_lite0"
CHANNELS = {"4": 40, "10": 112, "15": 320}  # of the last blocks of stride 8, 16 and 32
DEVIATION = {"4": 7.0, "10": 6.0, "15": 2.5}  # of their maps, which no activation follows; new layers expect 1
FROZEN = 4  # the stem and the blocks up to stride 4
WARM_UP = 0.1  # of the time
TRUNK_RATE = 0.1  # of the learning rate of the new layers
MOST_GRADIENT = 10.0  # norm
NORMALISED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class Maps(nn.Module):
    """EfficientNet-Lite0: prepared images -> maps (N, C, h, w) of the last blocks of three strides, and `further`."""

    def __init__(self, further: nn.Module, channels: int | list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {name.replace("blocks.", ""): own for name, own in BACKBONES[NAME]().layers.items()}
        )
        pretrained = public_state(WeightsSettings(source="package"), NAME)
        state = {name.removeprefix("blocks."): tensor for name, tensor in pretrained.items()}
        load_weights(self.blocks, state, f"the package's {NAME}")
        norms = (layer for layer in self.modules() if isinstance(layer, nn.BatchNorm2d))
        for part in (*[*self.blocks.values()][:FROZEN], *norms):
            part.requires_grad_(False)
        self.further, self.out_channels = further, channels

    def train(self, mode: bool = True) -> Maps:
        return super().train(False)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        x, maps = images.contiguous(memory_format=torch.channels_last), OrderedDict[str, Tensor]()
        for name, block in self.blocks.items():
            x = block(x)
            if name in CHANNELS:
                maps[name] = x / DEVIATION[name]
        return self.further(maps)


class Coarser(nn.ModuleList):
    """Three maps more of 256 channels: 40, 20, 10, 5, 3 and 1 cells a side of 320 pixels."""

    def __init__(self) -> None:
        sizes = ((320, 2, 1), (256, 2, 1), (256, 1, 0))  # channels before, stride, padding
        super().__init__(
            nn.Sequential(nn.Conv2d(inputs, 128, 1), nn.ReLU(), nn.Conv2d(128, 256, 3, *own), nn.ReLU())
            for inputs, *own in sizes
        )

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        for number, layers in enumerate(self):
            maps[f"coarser{number}"] = layers([*maps.values()][-1])
        return maps


def ssd(classes: int) -> nn.Module:
    """SSD at 320 × 320 with the default boxes of SSD300."""
    scales = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    boxes = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=scales)
    backbone = Maps(Coarser(), [*CHANNELS.values(), 256, 256, 256])
    return SSD(backbone, boxes, (320, 320), classes + 1, **NORMALISED)


def faster_rcnn(classes: int) -> nn.Module:
    """Faster R-CNN at a shorter side of 352, two sizes of anchors a map."""
    anchors = AnchorGenerator(((24, 40), (64, 104), (168, 272)), ((0.5, 1.0, 2.0),) * 3)
    pyramid, width, hidden = FeaturePyramidNetwork([*CHANNELS.values()], 128), 128, 512
    return FasterRCNN(
        Maps(pyramid, width),
        None,
        min_size=352,
        max_size=640,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_test=300,
        box_roi_pool=MultiScaleRoIAlign([*CHANNELS], output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(width * 7 * 7, hidden),
        box_predictor=FastRCNNPredictor(hidden, classes + 1),
        box_score_thresh=0.01,  # as SSD and ours, for the whole of the curve
        box_batch_size_per_image=128,
        **NORMALISED,
    )


class Peer(NamedTuple):
    """How a detector is made for K classes and fine-tuned."""

    make: Callable[[int], nn.Module]
    learning_rate: float  # of the new layers
    batch: int
    crops: bool  # SSD's random crops, beside mirroring


PEERS = {"ssd": Peer(ssd, 4e-3, 4, True), "faster_rcnn": Peer(faster_rcnn, 2e-3, 2, False)}


def fine_tune(
    peer: Peer, records: Sequence[ImageRecord], classes: Sequence[str], seconds: float, seed: int
) -> tuple[nn.Module, int]:
    """The detector after `seconds` of CPU time, in eval mode, and how many steps fitted."""
    start, steps = cpu_clock(), 0
    pictures = [(torch.from_numpy(read_image(r.path)).permute(2, 0, 1), _target(r, classes)) for r in records]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peer.make(len(classes)).to(memory_format=torch.channels_last).train()
        optimiser, augment = _optimiser(model, peer.learning_rate), _augmentation(peer.crops)
        order: list[int] = []
        while (done := (cpu_clock() - start) / seconds) < 1:
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * rate_at(done)
            while len(order) < peer.batch:
                order += torch.randperm(len(pictures)).tolist()
            chosen = [augment(*pictures[order.pop(0)]) for _ in range(peer.batch)]
            losses = model([image for image, _ in chosen], [target for _, target in chosen])
            loss = torch.stack([*losses.values()]).sum()
            optimiser.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), MOST_GRADIENT)
            if math.isfinite(norm):
                optimiser.step()
            steps += 1
    return model.eval(), steps


def rate_at(done: float) -> float:
    """The factor of the learning rate after this share of the time: a linear warm-up, then a cosine down to 0."""
    return min(1, (done + 0.01) / WARM_UP) * (1 + math.cos(math.pi * min(done, 1))) / 2


def cpu_clock() -> float:
    """Seconds of CPU time so far, of this process and of those that it has ended."""
    return sum(os.times()[:4])


@torch.inference_mode()
def detect(model: nn.Module, record: ImageRecord, classes: tuple[str, ...]) -> Detections:
    """What the detector finds, with the scores and the suppression that are its own."""
    image = torch.from_numpy(read_image(record.path)).permute(2, 0, 1).float() / 255
    found = {name: value.numpy() for name, value in model([image])[0].items()}
    boxes = found["boxes"].astype(np.float32)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return Detections(boxes[kept], found["scores"][kept], found["labels"][kept] - 1, classes)


def _optimiser(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    own = {id(parameter) for parameter in model.backbone.blocks.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trunk, new = ([p for p in trained if (id(p) in own) == inside] for inside in (True, False))
    groups = [{"params": trunk, "initial_lr": rate * TRUNK_RATE}, {"params": new, "initial_lr": rate}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.01, fused=True)


def _augmentation(crops: bool) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """torchvision's "ssdlite" with crops, else its "hflip"."""
    own = [v2.RandomIoUCrop()] if crops else []
    return v2.Compose(
        [*own, v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes(), v2.ToDtype(torch.float, scale=True)]
    )


def _target(record: ImageRecord, classes: Sequence[str]) -> dict[str, Tensor]:
    """Boxes and labels as torchvision takes them: 0 is the background."""
    assert record.annotation is not None
    known = record.annotation.of(classes)
    corners = torch.from_numpy(known.boxes.copy()).reshape(-1, 4)
    labels = torch.tensor([1 + classes.index(name) for name in known.names], dtype=torch.int64)
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=record.size)
    return {"boxes": boxes, "labels": labels}
