"""Convolutional models of timm as backbones. The only importer of timm, which is imported when first used."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sppnet.errors import BackboneError

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # of the hub that timm downloads from, read when it is imported


class TimmFeatures(nn.Module):
    """The map of a layer of "timm/NAME", or of several of one stride ("layer3+layer4"), joined along the channels.

    By default of the last layer within the stride `limit`, which timm keeps by dilation where it can. BackboneError for
    a model or layer that timm does not have, and weights that it cannot load.
    """

    def __init__(self, name: str, layer: str | None, pretrained: bool, seed: int, limit: int) -> None:
        super().__init__()
        try:
            import timm

            create: Any = timm.create_model
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                options = {"model_name": name.removeprefix("timm/"), "features_only": True, "output_stride": limit}
                try:
                    info = create(**options).feature_info
                except (TypeError, AssertionError):  # how timm says that it cannot dilate this model
                    del options["output_stride"]
                    info = create(**options).feature_info
                names = info.module_name()
                strides = dict(zip(names, info.reduction(), strict=True))
                fitting = [one for one in names if strides[one] <= limit] or names
                wanted = sorted((layer or fitting[-1]).split("+"), key=lambda one: [*names, one].index(one))
                if len({strides.get(one) for one in wanted}) > 1 or wanted[-1] not in names:
                    known = ", ".join(f"{one} (stride {stride})" for one, stride in strides.items())
                    raise ValueError(f"backbone.layer={layer}: expected one of {known}, or several of one stride")
                places = [names.index(one) for one in wanted]
                self.net = create(**options, out_indices=places, pretrained=pretrained)
        except Exception as error:  # of timm's models, files and download, without a base
            reason = (str(error) or type(error).__name__).splitlines()[0]
            hint = "take another convolutional model or layer, or weights by backbone.weights.source=file"
            hint = "pip install 'sppnet[timm]'" if isinstance(error, ImportError) else hint
            raise BackboneError(f"backbone.name={name}: timm cannot give it ({reason}); {hint}") from error
        part: Any
        for part in self.net.modules():
            # TensorFlow's padding: with a stride, where a cell looks depends on the size of the image
            if type(part).__name__ == "Conv2dSame" and part.stride != (1, 1):
                part.__class__ = nn.Conv2d
                part.padding = tuple((k - 1) * d // 2 for k, d in zip(part.kernel_size, part.dilation, strict=True))
        self.layer = "+".join(wanted)
        statistics = [self.net.pretrained_cfg[key] for key in ("mean", "std")]  # of pixels from 0 to 1
        self.mean, self.std = (tuple(round(255 * value, 6) for value in values) for values in statistics)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.net(images), dim=1)

    def own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that bear timm's names, under those of `net`: timm flattens modules to take their maps."""
        own = {key.removeprefix("body.").replace(".", "_"): key for key in self.net.state_dict()}
        return {own.get(key.replace(".", "_"), key): tensor for key, tensor in state.items()}


def timm_names() -> list[str]:
    """timm/NAME of all models of timm; none where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        return []
    import timm

    return [f"timm/{name}" for name in timm.list_models()]
