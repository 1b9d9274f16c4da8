"""What the caller has set in torch, kept out of results, and the devices that can be asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sppnet.errors import SppnetError


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Without the gradients, inference mode, autocast and default device that the caller may have set.

    The default dtype belongs to the process, so tensors made inside name theirs.
    """
    plain = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with torch.inference_mode(False), torch.no_grad(), plain[0], plain[1], torch.device("cpu"):
        yield


def as_device(device: torch.device | str) -> torch.device:
    """The device of this name; SppnetError for one that is unknown or not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        found = None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found is not None and (found.type == "cpu" or (found.type == "cuda" and (found.index or 0) < count)):
        return found
    raise SppnetError(f"device: expected cpu, cuda or cuda:N, of {count} GPUs that torch sees here, got {device!r}")
