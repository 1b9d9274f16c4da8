"""Backbones: the convolutional layers below the pyramid, with their weights, geometry and preprocessing."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import re
import sys
from collections.abc import Mapping
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sppnet.artifacts import digest_of, tensors_digest
from sppnet.backbones.architectures import BACKBONES, Plan
from sppnet.backbones.geometry import Geometry, geometry_of, map_side, steps_of
from sppnet.backbones.probing import Grid, probe
from sppnet.backbones.probing import map_side as probed_side
from sppnet.backbones.timm_models import TimmFeatures, timm_names
from sppnet.backbones.weights import load_mean_image, load_weights, public_state
from sppnet.config import BackboneSettings, WeightsSettings
from sppnet.errors import BackboneError

_TIMM_GRIDS: dict[tuple[str, str], Grid] = {}  # by name and layer: probing takes seconds, and a run makes several
MAX_STRIDE = 16  # sec. 4.1: the stride of the maps that windows are projected onto


class Backbone(nn.Module):
    """Runs `layers` in order and returns the map of the layer in `outputs`, or of several, joined along the channels.

    Joined maps ("features.13+features.17") must have the same size for every image; the geometry is that of the
    last. Parameter names are those of the layers. While all parameters are frozen ``train()`` leaves the
    backbone in eval mode, so that batch norm keeps its statistics; ``requires_grad_(True)`` makes it trainable.
    """

    def __init__(
        self, name: str, layers: Mapping[str, nn.Module], outputs: tuple[str, ...], weights: WeightsSettings
    ) -> None:
        super().__init__()
        for path, layer in layers.items():  # under its dotted name
            *groups, child = path.split(".")
            owner: nn.Module = self
            for group in groups:
                if not hasattr(owner, group):
                    owner.add_module(group, nn.Module())
                owner = getattr(owner, group)
            owner.add_module(child, layer)
        self.name = name
        self.layer = "+".join(outputs)
        self.weights = weights
        self._order = tuple(layers)
        self._outputs = outputs
        # the last first: of less, layers would lose the stride by which those behind them are dilated
        found = [steps_of(nn.Sequential(*_up_to(layers, own).values()), MAX_STRIDE) for own in reversed(outputs)]
        self.channels: int = sum(channels for _, channels in found)
        self._steps = found[0][0]
        # every remainder of the strides in question
        if len({tuple(map_side(steps, side) for side in range(256, 256 + 64)) for steps, _ in found}) > 1:
            raise BackboneError(
                f"backbone.layer={self.layer}: expected maps of one size, but theirs differ; join layers of one stride"
            )

    @cached_property
    def geometry(self) -> Geometry:
        return geometry_of(self._steps)

    @cached_property
    def mean(self) -> tuple[float, ...] | Tensor:
        """What is subtracted from the pixels, as `sppnet.images.prepare` takes it: the mean, or the mean image."""
        weights = self.weights
        if weights.mean_image is not None:
            return load_mean_image(weights.mean_image, weights.channel_order)
        assert weights.mean is not None  # build_backbone has filled it in
        return weights.mean

    @property
    def std(self) -> tuple[float, ...]:
        assert self.weights.std is not None
        return self.weights.std

    def forward(self, images: Tensor) -> Tensor:
        """Prepared images (N, 3, H, W) -> map (N, C, h, w), in channels-last memory (twice as fast on a CPU)."""
        self.map_size((images.shape[2], images.shape[3]))
        x = images.contiguous(memory_format=torch.channels_last)
        maps = []
        for name in self._order:
            x = self.get_submodule(name)(x)
            if name in self._outputs:
                maps.append(x if name == self._order[-1] else x.clone())  # the next layer may work in place
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)

    def map_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a prepared image -> (h, w) of its map, from the layers alone; BackboneError if it is too small."""
        height, width = self._map_size(size)
        if min(height, width) < 1:
            raise BackboneError(
                f"expected an image large enough for {self.name} up to {self.layer}, "
                f"got {size[0]} × {size[1]} pixels; use a larger scale"
            )
        return height, width

    def _map_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return map_side(self._steps, size[0]), map_side(self._steps, size[1])

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))


class OwnBackbone(Backbone):
    """Any network that maps images (N, 3, H, W) to a grid of cells (N, C, h, w); what it is, is found by running it."""

    def __init__(self, module: nn.Module, name: str, weights: WeightsSettings) -> None:
        nn.Module.__init__(self)
        self.module, self.name, self.layer, self.weights = module, name, getattr(module, "layer", "its map"), weights
        self._setting = f"backbone.{'name' if isinstance(module, TimmFeatures) else 'module'}={name}"
        self._sides: dict[tuple[int, int], int] = {}

    @cached_property
    def _grid(self) -> Grid:
        known = _TIMM_GRIDS if isinstance(self.module, TimmFeatures) else {}
        key = (self.name, self.layer)
        try:
            return known.get(key) or known.setdefault(key, probe(self.module))
        except BackboneError as error:
            raise BackboneError(f"{self._setting}: {error}") from error

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(self._grid.stride, self._grid.first_centre)

    @cached_property
    def channels(self) -> int:  # type: ignore[override]  # found when it is first asked for
        return self._grid.channels

    def forward(self, images: Tensor) -> Tensor:
        """As that of every backbone; BackboneError where the network fails on an image of this size."""
        try:
            found = self.module(images.contiguous(memory_format=torch.channels_last))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:  # what layers raise for an image too small
            raise self._too_small(images, str(error).partition("\n")[0]) from error
        if not isinstance(found, Tensor) or found.ndim != 4 or not found.numel():
            raise self._too_small(images, "it gives no map (N, C, h, w)")
        return found

    def _map_size(self, size: tuple[int, int]) -> tuple[int, int]:
        for place in ((2, size[0]), (3, size[1])):
            if place not in self._sides:
                self._sides[place] = probed_side(self.module, *place, self._grid.width)
        return self._sides[2, size[0]], self._sides[3, size[1]]

    def _too_small(self, images: Tensor, reason: str) -> BackboneError:
        return BackboneError(
            f"{self._setting} fails on an image of {images.shape[2]} × {images.shape[3]} pixels "
            f"({reason}); use a larger scale, or a network that takes images of any size"
        )


def build_backbone(settings: BackboneSettings, seed: int = 0, module: nn.Module | None = None) -> Backbone:
    """The backbone of `settings` with its weights, in eval mode, every parameter frozen.

    Random weights depend on `seed` alone and leave torch's global generator as it was. `module` stands for what
    backbone.module names; it is copied. Raises BackboneError for unknown names and networks that do not fit, and
    SppnetError for weights that cannot be had.
    """
    weights, own, name = settings.weights, settings.module, settings.name or ""
    if module is not None:
        check_object(module)
        module, own = copy.deepcopy(module), own or "object"
    elif own is not None:
        module = import_module(own, seed)
    elif name.startswith("timm/"):
        if timm_names():
            _check_name(name)
        module, own = TimmFeatures(name, settings.layer, weights.source == "timm", seed, MAX_STRIDE), name
    usual = module if isinstance(module, TimmFeatures) else WeightsSettings()
    theirs = {key: getattr(usual, key) for key in ("mean", "std") if getattr(weights, key) is None}
    weights = weights.model_copy(update=theirs)
    backbone = _named_backbone(settings, seed) if module is None else OwnBackbone(module.float(), str(own), weights)
    kept = ("timm", "random") if module is None or own == name else ("torchvision", "timm", "random")
    if weights.source not in kept:
        state, target = public_state(weights, name), backbone if module is None else module
        if isinstance(module, TimmFeatures):
            state, target = module.own_names(state), module.net
        load_weights(target, state, str(weights.file or f"{weights.source}'s {name}"))
    return backbone.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def import_module(path: str, seed: int) -> nn.Module:
    """What the function at "package.module:function" returns; runs its code, with random numbers from `seed` alone.

    The current folder can be imported from too, after all else. BackboneError, with the setting, where that fails.
    """
    if path == "object":
        raise BackboneError(
            "backbone.module=object: the backbone was given as an object in Python, and has to be again: "
            "train_detector(…, backbone=module), SPPDetector.load(run, backbone=module)"
        )
    name, _, function = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        make: Any = functools.reduce(getattr, function.split("."), importlib.import_module(name))
    except Exception as error:  # whatever somebody's module raises
        raise BackboneError(
            f"backbone.module={path}: cannot import it ({type(error).__name__}: {error}); give package.module:function "
            f"of an installed package or of a file in the current folder, {Path.cwd()}"
        ) from error
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = make()
    except Exception as error:
        raise BackboneError(
            f"backbone.module={path}: calling it without arguments fails ({type(error).__name__}: {error}); "
            "give a function that returns the network"
        ) from error
    if not isinstance(module, nn.Module):
        raise BackboneError(
            f"backbone.module={path}: expected a torch.nn.Module, got {type(module).__name__}; return the network"
        )
    return module


def check_object(module: nn.Module) -> None:
    """BackboneError for a network, given in Python, that worker processes could not receive."""
    try:
        ForkingPickler.dumps(copy.deepcopy(module).to("meta"))  # as processes exchange it, without the weights
        unknown = {type(part) for part in module.modules() if type(part).__module__ == "__main__"}
        if unknown and not Path(getattr(sys.modules["__main__"], "__file__", "")).is_file():
            raise ValueError(f"{unknown.pop().__qualname__} is defined in an interactive session")
    except Exception as error:
        raise BackboneError(
            f"backbone={type(module).__name__}: worker processes cannot receive it ({error}); define its classes and "
            "functions at the top of a file that can be imported, without lambda"
        ) from error


def content_digest(module: nn.Module) -> str:
    """16 hexadecimal digits of the layers and the weights of a network."""
    return digest_of(re.sub(r" at 0x[0-9a-f]+", "", repr(module)), tensors_digest(module.state_dict()))


def _named_backbone(settings: BackboneSettings, seed: int) -> Backbone:
    """That of backbone.name with random weights."""
    name = settings.name or ""  # BackboneSettings has checked it
    _check_name(name)
    with torch.device("meta"):  # no time and no random numbers spent on weights that are replaced below
        plan = BACKBONES[name]()
    outputs = _outputs(settings, plan)
    layers = _up_to(plan.layers, outputs[-1])
    backbone = Backbone(name, layers, outputs, settings.weights).to_empty(device="cpu")
    _initialise(backbone, plan.deviation, torch.Generator().manual_seed(seed))
    return backbone


def _check_name(name: str) -> None:
    known = [*BACKBONES, *timm_names()] if name not in BACKBONES else [name]
    if name.partition(".")[0] not in known:  # behind the point stands which of a model's weights
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise BackboneError(f"unknown backbone.name={name}; {hint}known: {', '.join(BACKBONES)}, timm/NAME")


def _outputs(settings: BackboneSettings, plan: Plan) -> tuple[str, ...]:
    """The layers whose maps are wanted, in the order in which they run."""
    names = list(plan.layers)
    wanted = settings.layer.split("+") if settings.layer is not None else [plan.default]
    for name in wanted:
        if name not in names:
            raise BackboneError(f"unknown backbone.layer={name} of {settings.name}; known: {', '.join(names)}")
    return tuple(name for name in names if name in wanted)


def _up_to(layers: Mapping[str, nn.Module], last: str) -> dict[str, nn.Module]:
    return dict(list(layers.items())[: list(layers).index(last) + 1])


def _initialise(backbone: Backbone, deviation: float | None, generator: torch.Generator) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            if deviation is None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            else:
                nn.init.normal_(module.weight, std=deviation, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
