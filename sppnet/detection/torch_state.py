"""What the caller has set in torch, kept out of results; changes of a network."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, tuple, list, type(None))  # settings of layers


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Without the gradients, inference mode, autocast and default device that the caller may have set.

    The default dtype belongs to the process, so tensors made inside name theirs.
    """
    plain = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with torch.inference_mode(False), torch.no_grad(), plain[0], plain[1], torch.device("cpu"):
        yield


def network_state(network: nn.Module) -> tuple[Any, ...]:
    """What differs after a change of a network: its tensors, and what its layers hold besides."""
    tensors = [fingerprint(tensor) for tensor in (*network.parameters(), *network.buffers())]
    return tensors, [_setting(path, layer) for path, layer in network.named_modules()]


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """What differs after a change of a tensor: ``.data`` changes no version, so its bits count.

    They are laid in rows of 1024 and summed along rows and columns, which sees their order too, on their own device;
    25 ms for the 210 MB of fc6.
    """
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    own = tensor.detach()
    bits = (own.permute(0, 2, 3, 1) if own.ndim == 4 else own).reshape(-1).view(kind)  # channels last: no copy
    whole, rest = bits.tensor_split([len(bits) // 1024 * 1024])
    sums = [whole.view(-1, 1024).sum(dim, dtype=kind) for dim in (0, 1)]  # of this type: 20 times as fast
    digest = hashlib.sha256(torch.cat([*sums, rest]).cpu().numpy().tobytes()).digest()
    return digest, tensor.requires_grad, tensor.shape, tensor.dtype, tensor.device


def _setting(path: str, layer: nn.Module) -> tuple[Any, ...]:
    """What a layer computes with besides its tensors: numbers, texts and flags that it holds, and its hooks."""
    held = {name: repr(value) for name, value in vars(layer).items() if isinstance(value, _PLAIN)}
    return path, type(layer), held, vars(layer).get("forward"), *layer._forward_hooks, *layer._forward_pre_hooks
