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
    """The map of a layer, or of several of one stride ("layer3+layer4"), joined along the channels.

    By default of the last layer within the stride `limit`, which timm keeps by dilation where it can. BackboneError for
    a model or layer that timm does not have, and weights that it cannot load.
    """

    def __init__(self, name: str, layer: str | None, pretrained: bool, seed: int, limit: int) -> None:
        super().__init__()
        known = timm_names()
        if name.partition(".")[0] not in known:  # behind the point stands which of its weights
            near = [PREFIX + one for one in difflib.get_close_matches(name, known, n=3)]
            hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
            raise BackboneError(f"unknown backbone.name={PREFIX}{name}; {hint}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                options, info = {"output_stride": limit}, _create(name, output_stride=limit).feature_info
            except (TypeError, AssertionError):  # how timm says that it cannot dilate this model
                options, info = {}, _create(name).feature_info
            names, strides = info.module_name(), info.reduction()
            fitting = [one for one, stride in zip(names, strides, strict=True) if stride <= limit] or names
            places = [names.index(one) if one in names else -1 for one in (layer or fitting[-1]).split("+")]
            if -1 in places or len({strides[place] for place in places}) > 1:
                known_here = ", ".join(f"{one} (stride {stride})" for one, stride in zip(names, strides, strict=True))
                wanted = f"expected one of {known_here}, or several of one stride"
                raise BackboneError(f"backbone.layer={layer} of {PREFIX}{name}: {wanted}")
            self.net = _create(name, pretrained=pretrained, out_indices=sorted(places), **options)
        for part in self.net.modules():
            # TensorFlow's padding: with a stride, where a cell looks depends on the size of the image
            if type(part).__name__ == "Conv2dSame" and part.stride != (1, 1):
                part.__class__ = nn.Conv2d
                part.padding = tuple((k - 1) * d // 2 for k, d in zip(part.kernel_size, part.dilation, strict=True))
        self.layer = "+".join(names[place] for place in sorted(places))
        statistics = [self.net.pretrained_cfg[key] for key in ("mean", "std")]  # of pixels from 0 to 1
        self.mean, self.std = (tuple(round(255 * value, 6) for value in values) for values in statistics)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.net(images), dim=1)

    def own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that bear timm's names, under those of `net`: timm flattens modules to take their maps."""
        own = {key.removeprefix("body.").replace(".", "_"): key for key in self.net.state_dict()}
        return {own.get(key.replace(".", "_"), key): tensor for key, tensor in state.items()}


def timm_names() -> list[str]:
    """All models of timm; BackboneError where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        hint = "pip install 'sppnet[timm]', or choose another backbone.name"
        raise BackboneError(f"backbone.name={PREFIX}NAME: the package timm is not installed; {hint}")
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
        files = "take a file by backbone.weights.source=file and backbone.weights.file=PATH"
        hint = files if pretrained else "take a convolutional model"
        raise BackboneError(f"backbone.name={PREFIX}{name}: timm cannot give it ({reason}); {hint}") from error
