"""A network of one's own as backbone: found by its import path, checked, and named by its content."""

from __future__ import annotations

import copy
import functools
import importlib
import re
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sppnet.artifacts import digest_of, tensors_digest
from sppnet.errors import BackboneError


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
