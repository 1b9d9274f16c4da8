"""SPP-net: a backbone, the pyramid over its map, fc6, fc7 and a classifier (sec. 2.2, 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.backbones.backbone import Backbone
from sppnet.backbones.weights import load_weight_file, load_weights, torchvision_state, without_prefix
from sppnet.config import BackboneSettings, HeadSettings
from sppnet.errors import SppnetError
from sppnet.ops.pyramid import spatial_pyramid_pool

Layer = Literal["pool", "fc6", "fc7"]
FullyConnected = Literal["fc6", "fc7"]

# Where torchvision keeps fc6 and fc7, and the grid on which they were trained: (fc6, fc7, n).
PRETRAINED_FC = {"alexnet": ("classifier.1", "classifier.4", 6), "vgg16": ("classifier.0", "classifier.3", 7)}


class SPPHead(nn.Module):
    """fc6, fc7 and a classifier above pooled features (R, D).

    `input_scale` multiplies the pooled features first, so that one learning rate suits every backbone. A layer named in
    `ranks` is of low rank: a linear layer `basis6` or `basis7` of so many outputs and no bias stands below it.
    """

    input_scale: Tensor

    def __init__(
        self, inputs: int, outputs: int, settings: HeadSettings, ranks: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        ranks = ranks or {}
        self.basis6, self.fc6 = _layer(inputs, settings.fc6, ranks.get("fc6"))
        self.basis7, self.fc7 = _layer(settings.fc6, settings.fc7, ranks.get("fc7"))
        self.classifier = nn.Linear(settings.fc7, outputs)
        self.dropout = settings.dropout
        self.register_buffer("input_scale", torch.ones(()))

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, D) -> logits (R, outputs); dropout after fc6 and fc7 while training."""
        return self.classifier(self.hidden(pooled))

    def hidden(self, pooled: Tensor) -> Tensor:
        """(R, D) -> what the classifier sees (R, fc7): features of fc7, with that dropout."""
        hidden = F.dropout(self.features(pooled, "fc6"), self.dropout, self.training)
        return F.dropout(F.relu(self.fc7(self.basis7(hidden))), self.dropout, self.training)

    def features(self, pooled: Tensor, layer: Layer) -> Tensor:
        """(R, D) -> the rectified output of `layer`, (R, 4096 or so); "pool" gives the input back."""
        if layer == "pool":
            return pooled
        hidden = F.relu(self.fc6(self.basis6(pooled * self.input_scale.to(pooled.dtype))))
        return hidden if layer == "fc6" else F.relu(self.fc7(self.basis7(hidden)))

    def products(self, layer: FullyConnected) -> tuple[nn.Linear, ...]:
        """What `layer` consists of, in order: one linear layer, or two where it is of low rank."""
        basis, linear = (self.basis6, self.fc6) if layer == "fc6" else (self.basis7, self.fc7)
        return (basis, linear) if isinstance(basis, nn.Linear) else (linear,)

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of the low-rank layers, by name; empty for a whole head."""
        layers: tuple[FullyConnected, ...] = ("fc6", "fc7")
        return {name: self.products(name)[0].out_features for name in layers if len(self.products(name)) == 2}


def _layer(inputs: int, outputs: int, rank: int | None) -> tuple[nn.Module, nn.Linear]:
    """The layer below, and the layer itself."""
    if rank is None:
        return nn.Identity(), nn.Linear(inputs, outputs)
    return nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs)


class SPPNet(nn.Module):
    """The whole network for images of any size: backbone, pyramid over the whole map, head (sec. 2.2)."""

    def __init__(self, backbone: Backbone, levels: tuple[int, ...], head: SPPHead) -> None:
        super().__init__()
        self.backbone, self.levels, self.head = backbone, levels, head

    def forward(self, images: Tensor) -> Tensor:
        """Prepared images (N, 3, H, W) -> logits (N, outputs)."""
        return self.head(spatial_pyramid_pool(self.backbone(images), self.levels))


def pooled_size(channels: int, levels: tuple[int, ...]) -> int:
    """Length of the vector of one window: C · Σn²."""
    return channels * sum(n * n for n in levels)


def seed_dropout(device: torch.device, seed: int) -> None:
    """From here on dropout on a device draws what `seed` says. (torch.manual_seed changes every GPU's numbers.)"""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def momentum_of(optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The momentum of every parameter that has one, named by its place, to be saved."""
    states = [optimiser.state[parameter].get("momentum_buffer") for parameter in parameters]
    return {f"momentum.{i}": state for i, state in enumerate(states) if state is not None}


def restore_momentum(
    optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor], state: Mapping[str, Tensor]
) -> None:
    """Give the optimiser what `momentum_of` saved, in each parameter's memory format: the fused step relies on it."""
    for i, parameter in enumerate(parameters):
        if f"momentum.{i}" in state:
            buffer = torch.empty_like(parameter.detach()).copy_(state[f"momentum.{i}"])
            optimiser.state[parameter]["momentum_buffer"] = buffer


def build_head(
    channels: int,
    levels: tuple[int, ...],
    outputs: int,
    settings: HeadSettings,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
) -> SPPHead:
    """A head with weights N(0, 0.01) (sec. 4.1, release) and zero biases, the same for the same seed.

    `ranks` gives it the shape of a low-rank head, whose weights are then loaded.
    """
    with torch.random.fork_rng(devices=[]):  # torch's own start values, replaced below
        head = SPPHead(pooled_size(channels, levels), outputs, settings, ranks)
    generator = torch.Generator().manual_seed(seed)
    for linear in (head.fc6, head.fc7, head.classifier):
        nn.init.normal_(linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(linear.bias)
    return head.eval()


def start_head(
    head: SPPHead, settings: HeadSettings, backbone: BackboneSettings, channels: int, levels: tuple[int, ...]
) -> None:
    """fc6 and fc7 from where head.init says, in place."""
    if settings.init == "checkpoint":
        load_head_checkpoint(head, settings)
    elif settings.init == "imagenet":
        weights, name = backbone.weights, backbone.name
        file = weights.file if weights.source == "file" else None
        public = torchvision_state(name) if file is None and name in PRETRAINED_FC else {}
        state = public if file is None else load_weight_file(file)
        load_pretrained_fc(head, state, str(name or backbone.module), channels, levels)


def load_pretrained_fc(
    head: SPPHead, state: Mapping[str, Tensor], backbone: str, channels: int, levels: tuple[int, ...]
) -> None:
    """fc6 and fc7 of torchvision's alexnet or vgg16 into `head`, in place.

    The level with the same bins as the pretrained grid takes the pretrained block of fc6; the other levels
    start at zero, so that at first the head computes what the pretrained one does.
    """
    if backbone not in PRETRAINED_FC:
        raise SppnetError(
            f"head.init=imagenet needs one of {', '.join(PRETRAINED_FC)}, got backbone {backbone}; use head.init=random"
        )
    *layers, n = PRETRAINED_FC[backbone]
    keys, origin = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")], f"the weights of {backbone}"
    state = without_prefix(state, keys, origin)
    for key in keys:
        if key not in state:
            raise SppnetError(f"{origin} hold no {key}; use a file with the classifier, or head.init=random")
    weight6, bias6, weight7, bias7 = (state[key] for key in keys)
    own, given = channels * n * n, (head.fc6.out_features, head.fc7.out_features)
    if n not in levels or given != (len(weight6), len(weight7)) or weight6.shape[1] != own:
        raise SppnetError(
            f"head.init=imagenet of {backbone} needs a {n}×{n} level, head.fc6={len(weight6)}, head.fc7={len(weight7)} "
            f"and {weight6.shape[1] // n**2} channels, those of the default backbone.layer, got levels {levels}, "
            f"{given} and {channels} channels; set them, or use head.init=random"
        )
    start = pooled_size(channels, levels[: levels.index(n)])
    with torch.no_grad():
        head.fc6.weight.zero_()
        head.fc6.weight[:, start : start + own] = weight6
        head.fc6.bias.copy_(bias6)
        head.fc7.weight.copy_(weight7)
        head.fc7.bias.copy_(bias7)


def load_head_checkpoint(head: SPPHead, settings: HeadSettings) -> None:
    """fc6, fc7 and the input scale of an SPP classification checkpoint (``head.*`` in a file) into `head`, in place."""
    path = settings.checkpoint
    if path is None:
        raise SppnetError("head.init is 'checkpoint' but no file is named; set head.checkpoint=PATH")
    load_weights(head, load_weight_file(path, "head.checkpoint"), str(path), leave="classifier.")
