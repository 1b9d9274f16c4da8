"""Weight files: torchvision's own, with its cache, and .pth, .safetensors or .npz files; checked loading."""

from __future__ import annotations

import hashlib
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from sppnet.artifacts import write_atomically
from sppnet.errors import SppnetError

DOWNLOAD_TIMEOUT = 30.0  # ours: seconds without a response, so that a machine without network is told soon
_KINDS = (".pth", ".pt", ".safetensors", ".npz")


def load_weight_file(path: Path | str) -> dict[str, Tensor]:
    """Named CPU tensors of a .pth (or .pt), .safetensors or .npz file; nothing in it is executed.

    A .pth may hold the tensors under the key "state_dict". Raises SppnetError for a file that is missing, of
    another kind, damaged, or that holds anything but finite named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise SppnetError(f"{path}: expected a weight file, but there is no such file; check backbone.weights.file")
    if path.suffix not in _KINDS:
        raise SppnetError(
            f"{path}: expected a weight file of kind {', '.join(_KINDS)}, got {path.suffix!r}; convert it"
        )
    try:
        values = _read(path)
    except Exception as error:  # the three readers raise a dozen classes, some of them private
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise SppnetError(
            f"{path}: expected a complete {path.suffix} file of plain tensors, but it cannot be read ({first_line}); "
            "fetch or save it again"
        ) from None
    return _checked(values, path)


def torchvision_state(name: str) -> dict[str, Tensor]:
    """The full ImageNet state of a torchvision model ("alexnet", "resnet18", …), downloaded once into torch's cache.

    The first edition of the weights (IMAGENET1K_V1): the later ones are tuned for ImageNet accuracy and their
    frozen features transfer less well. Raises SppnetError where the download fails, with the file to fetch by hand.
    """
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise SppnetError(
            f"torchvision has no weights for {name!r}; set backbone.weights.source=file and "
            "backbone.weights.file=PATH, or backbone.weights.source=random"
        )
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urllib.parse.urlparse(url).path).name
    if not path.is_file():
        _download(url, path)
    return load_weight_file(path)


def load_weights(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy into `module` the tensors that it names; others in `state` (a classifier, later layers) are left aside.

    Raises SppnetError where one is missing or of another shape; `origin` names the weights in the message.
    """
    own = module.state_dict()
    needed = {key: tensor for key, tensor in own.items() if not key.endswith("num_batches_tracked")}
    faults = [fault for key, tensor in needed.items() if (fault := _fault(key, tensor, state.get(key)))]
    if faults:
        raise SppnetError(
            f"{origin}: {len(faults)} of the {len(needed)} tensors needed do not fit: {'; '.join(faults[:3])}"
            f"{'; …' if len(faults) > 3 else ''}; expected torchvision's parameter names: "
            "choose the backbone.name that the file was saved from, or another file"
        )
    module.load_state_dict({key: state[key] for key in needed}, strict=False)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    values = torch.load(path, map_location="cpu", weights_only=True)
    return values["state_dict"] if isinstance(values, dict) and isinstance(values.get("state_dict"), dict) else values


def _checked(values: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise SppnetError(f"{path}: expected named tensors, got {type(values).__name__}; save a model's state_dict")
    for name, value in values.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise SppnetError(f"{path}: expected finite numbers, but {name} holds NaN or infinity; fetch it again")
    return dict(values)


def _fault(key: str, own: Tensor, given: Tensor | None) -> str | None:
    if given is None:
        return f"{key} is missing"
    if given.shape != own.shape:
        return f"{key} has shape {tuple(given.shape)} instead of {tuple(own.shape)}"
    return None


def _download(url: str, path: Path) -> None:
    """The file behind `url`, complete and with the digest that its name carries, or SppnetError."""
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
            content = response.read()
        found = hashlib.sha256(content).hexdigest()
        if digest and not found.startswith(digest.group(1)):
            raise OSError(f"a file with SHA-256 {found[:8]}… in place of {digest.group(1)}…")
    except (OSError, HTTPException) as error:  # no network, no such file, a connection that ends, another content
        raise SppnetError(
            f"{url}: expected to download torchvision's weights, got: {error}; fetch {path.name} elsewhere and put it "
            f"into {path.parent}, or set backbone.weights.source=file and backbone.weights.file=PATH"
        ) from None
    write_atomically(path, lambda file: file.write(content))
