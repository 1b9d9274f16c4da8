"""Rank, shares and what is shared over torch.distributed; a no-op in one process.

Start several processes with ``torchrun --nproc-per-node=N -m -- sppnet …``: every process takes its share of
the images or classes, and gradients are averaged. Nothing here launches processes, and nothing is pickled.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sppnet.errors import SppnetError

T = TypeVar("T")

log = logging.getLogger("sppnet")

LAUNCHED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets beside WORLD_SIZE
ARRIVAL = timedelta(minutes=30)  # from the first process's start to the last one's; nodes of a cluster take their time
QUIET = 10  # seconds of waiting for the others without a word
PATIENCE = timedelta(days=7)  # the longest that one process may need alone; torchrun ends all where one fails
KINDS = (torch.float32, torch.float64, torch.int64, torch.bool)  # of the tensors that are shared


def start() -> None:
    """Join the process group that torchrun describes in the environment; do nothing without one.

    SppnetError where the environment describes half of one, as that of a cluster's job without torchrun does, or one
    that cannot be.
    """
    world = environment_number("WORLD_SIZE")
    if world <= 1 or dist.is_initialized():
        return
    missing = [name for name in LAUNCHED if not os.environ.get(name)]
    if missing:
        raise SppnetError(
            f"WORLD_SIZE={world} in the environment, without {', '.join(missing)}: start all processes with "
            "torchrun, or unset WORLD_SIZE to work in this process alone"
        )
    own, port, address = environment_number("RANK", 0), environment_number("MASTER_PORT"), os.environ["MASTER_ADDR"]
    if own >= world:
        raise SppnetError(f"RANK={own} in the environment: expected 0 to {world - 1}, below WORLD_SIZE; use torchrun")
    try:
        socket.getaddrinfo(address, port)
    except (OSError, ValueError) as error:  # ValueError: no name of a host could be so
        reason = getattr(error, "strerror", None) or error
        raise SppnetError(
            f"MASTER_ADDR={address} in the environment: cannot be found ({reason}); expected the host of rank 0"
        ) from None
    others = "another process" if world == 2 else f"{world - 1} other processes"
    notice = threading.Timer(QUIET, log.warning, (f"waiting for {others} at {address}:{port}",))
    notice.daemon = True
    notice.start()
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(environment_number("LOCAL_RANK", 0))
        store, rank, _ = next(dist.rendezvous("env://", timeout=ARRIVAL))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SppnetError(
            f"WORLD_SIZE={world} in the environment, but so many processes did not meet at MASTER_ADDR="
            f"{address} ({reason}); start all of them with torchrun, or unset WORLD_SIZE"
        ) from None
    finally:
        notice.cancel()


def environment_number(name: str, default: int = 1) -> int:
    """A whole number that torchrun leaves in the environment; `default` where there is none."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 7):
        shown = text if len(text) < 40 else f"{text[:20]}…"
        raise SppnetError(f"{name}={shown} in the environment: expected a whole number, as torchrun sets it; unset it")
    return int(text or default)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(device: torch.device | str) -> torch.device:
    """The device of this name, "auto" being a GPU where there is one; SppnetError for one unknown or not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        found = torch.device(("cuda" if count else "cpu") if device == "auto" else device)
    except (RuntimeError, TypeError, ValueError):
        found = None
    if found is not None and (found.type == "cpu" or (found.type == "cuda" and (found.index or 0) < count)):
        return found
    raise SppnetError(f"device: expected cpu, cuda or cuda:N, of {count} GPUs that torch sees here, got {device!r}")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's share of `items`: every world_size-th, from its rank."""
    return items[rank() :: world_size()]


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1, device="cpu"))  # not dist.barrier(), which needs a GPU where there are any


def in_order(compute: Callable[[int], Iterable[Any]], count: int) -> Iterator[list[Tensor]]:
    """compute(index), a few tensors, arrays or numbers, of every index below `count`: in order, in every process.

    One process computes it, that whose `shard` holds the index, and all get the very values as tensors; as many indices
    as there are processes are computed at a time. All processes must iterate; none comes to the end before all do.
    """
    for first in range(0, count, world_size()):
        own = compute(first + rank()) if first + rank() < count else ()
        found = [v if isinstance(v, Tensor) else torch.tensor(np.asarray(v), device="cpu") for v in own]
        for source in range(min(world_size(), count - first)):
            yield found if world_size() == 1 else _broadcast(found, source)
    barrier()


def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Give tensors in every process, in place, the values that they have in the first."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@torch.inference_mode()
def _broadcast(own: list[Tensor], source: int) -> list[Tensor]:
    """The tensors that `source` has, in every process: on a GPU where they are on one there."""
    header = torch.full((8, 5), -1, device="cpu")  # of at most 8: kind, whether on a GPU, dimensions, shape
    if rank() == source:
        own = [tensor.contiguous() for tensor in own]
        for row, tensor in zip(header[: len(own)], own, strict=True):
            kind = KINDS.index(tensor.dtype), tensor.is_cuda, tensor.ndim
            row[: 3 + tensor.ndim] = torch.tensor([*kind, *tensor.shape], device="cpu")
    dist.broadcast(header, source)
    if rank() != source:
        rows, places = header[header[:, 0] >= 0].tolist(), ("cpu", "cuda")
        own = [torch.empty(shape[:n], dtype=KINDS[k], device=places[gpu]) for k, gpu, n, *shape in rows]
    for tensor in own:
        dist.broadcast(tensor, source)
    return own


def data_parallel(module: nn.Module) -> nn.Module:
    """The module, its gradients averaged over the processes by every backward pass; unused parameters get none."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True, static_graph=True)


def lost_another(error: BaseException) -> bool:
    """Whether this says that another process of the job has ended. (Errors of gloo have no type of their own.)"""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
