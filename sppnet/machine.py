"""What the machine can do, so that times can be read: rates of matrix products and of copies. And the clock itself."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

SLOW = 1.0  # seconds of a first call after which no other follows: bfloat16 on a CPU that has none
ON_CPU, ON_GPU = (1024, 256 * 2**20), (8192, 4 * 2**30)  # side of the matrices, bytes of a copy


@dataclass(frozen=True)
class Machine:
    """What the other figures rest on; rates are those of a large matrix product and of a copy (read + written)."""

    device: str
    cores: int
    threads: int
    versions: dict[str, str]
    gflops_float32: float
    gflops_bfloat16: float
    copy_gigabytes_per_second: float

    def rows(self) -> list[str]:
        """Two lines that say so."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        rates = f"float32 {self.gflops_float32:,.0f} GFLOP/s, bfloat16 {self.gflops_bfloat16:,.0f} GFLOP/s"
        return [
            f"{self.device}, {self.cores} cores, {self.threads} threads; {versions}",
            f"matrix products {rates}; copies {self.copy_gigabytes_per_second:,.1f} GB/s",
        ]


def measure_machine(device: torch.device, sppnet_version: str, rounds: int = 7) -> Machine:
    """Measured on `device`, each figure the median of `rounds` after one to warm up, or that one if slow."""
    side = (ON_GPU if device.type == "cuda" else ON_CPU)[0]
    float32, bfloat16 = (_matrix_gflops(side, kind, device, rounds) for kind in (torch.float32, torch.bfloat16))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions = {"sppnet": sppnet_version, "torch": torch.__version__, "torchvision": torchvision.__version__}
    bandwidth = copy_bandwidth(device, rounds) / 1e9
    return Machine(_device_name(device), cores, torch.get_num_threads(), versions, float32, bfloat16, bandwidth)


def copy_bandwidth(device: torch.device, rounds: int = 7) -> float:
    """Bytes read plus bytes written per second by a copy between two resident arrays, with all threads."""
    copied = (ON_GPU if device.type == "cuda" else ON_CPU)[1]
    source = torch.ones(copied // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * copied / _median_seconds(lambda: target.copy_(source), device, rounds)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall seconds of one call, with everything that it started on a GPU, and its result."""
    _finish(device)
    start = time.perf_counter()
    result = function()
    _finish(device)
    return time.perf_counter() - start, result


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_seconds(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    first = timed(function, device)[0]
    if first > SLOW:
        return first
    return statistics.median(timed(function, device)[0] for _ in range(rounds))


def _matrix_gflops(side: int, kind: torch.dtype, device: torch.device, rounds: int) -> float:
    matrix = torch.ones(side, side, dtype=kind, device=device)
    return 2 * side**3 / _median_seconds(lambda: matrix @ matrix, device, rounds) / 1e9


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
