"""Convolutional models of timm as backbones. The only importer of timm, which is imported when first used."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sppnet.errors import BackboneError

PREFIX = "timm/"


class TimmFeatures(nn.Module):
    """The map of a layer, or of several of one stride, joined along the channels."""

    def __init__(self, name: str, layer: str | None, pretrained: bool, seed: int, limit: int) -> None:
        """The model `name` up to `layer`; by default the last one within the stride `limit`, which is kept where timm
        can dilate. BackboneError for a model or layer that timm does not have, and weights that it cannot load.
        """
        super().__init__()
        known = timm_names()
        arch = name.partition(".")[0]  # behind it stands which of its weights
        if arch not in known:
            near = difflib.get_close_matches(arch, known, n=3)
            hint = f"did you mean {', '.join(PREFIX + one for one in near)}?" if near else "see timm.list_models()"
            raise BackboneError(f"unknown backbone.name={PREFIX}{name}; {hint}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                options, info = {"output_stride": limit}, _create(name, output_stride=limit).feature_info
            except (TypeError, AssertionError):  # how timm says that it cannot dilate this model
                options, info = {}, _create(name).feature_info
            strides = dict(zip(info.module_name(), info.reduction(), strict=True))
            fitting = [one for one, stride in strides.items() if stride <= limit] or list(strides)
            wanted = fitting[-1:] if layer is None else layer.split("+")
            unknown = [one for one in wanted if one not in strides]
            if unknown:
                known_here = ", ".join(f"{one} (stride {stride})" for one, stride in strides.items())
                raise BackboneError(f"unknown backbone.layer={unknown[0]} of {PREFIX}{name}; known: {known_here}")
            if len({strides[one] for one in wanted}) > 1:
                raise BackboneError(f"backbone.layer={layer}: expected maps of one size; join layers of the same stride")
            places = sorted(list(strides).index(one) for one in wanted)
            self.net = _create(name, pretrained=pretrained, out_indices=places, **options)
        self.layer = "+".join(list(strides)[place] for place in places)
        statistics = [self.net.pretrained_cfg[key] for key in ("mean", "std")]  # of pixels from 0 to 1
        self.mean, self.std = (tuple(255 * value for value in values) for values in statistics)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.net(images)
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)

    def own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that bear timm's names, under those of `net`: timm flattens modules to take their maps."""
        own = {key.removeprefix("body.").replace(".", "_"): key for key in self.net.state_dict()}
        return {own.get(key.replace(".", "_"), key): tensor for key, tensor in state.items()}


def timm_names() -> list[str]:
    """All models of timm; BackboneError where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        raise BackboneError(
            f"backbone.name={PREFIX}NAME: the package timm is not installed; pip install 'sppnet[timm]', "
            "or choose another backbone.name"
        )
    import timm

    return list(timm.list_models())


def _create(name: str, pretrained: bool = False, **options: Any) -> Any:
    import timm

    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except (TypeError, AssertionError):
        raise
    except Exception as error:  # of its download, its files and its models, without a base
        reason = (str(error) or type(error).__name__).splitlines()[0]
        hint = "with weights at hand set backbone.weights.source=file and backbone.weights.file=PATH"
        hint = hint if pretrained else "take a convolutional model"
        raise BackboneError(f"backbone.name={PREFIX}{name}: timm cannot give it ({reason}); {hint}") from error
