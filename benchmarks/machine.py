"""What this machine is, and how the benchmarks measure: in turn, round by round, with ratios taken pair by pair."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sppnet.errors import SppnetError

PAUSE = 0.05  # s between two measurements: the threads of the first spin for a while and would take a core
# One endless loop on one core; it ends with the process that started it.
BUSY = """
import os, numpy as np
parent, matrix = int(os.environ["BUSY_PARENT"]), np.ones((256, 256)) / 256
while os.getppid() == parent:
    matrix = matrix @ matrix
"""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_words(main: Callable[..., int]) -> Callable[..., int]:
    """`main` of a benchmark; what cannot be measured ends it with one line and status 2."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except SppnetError as error:
            print(f"{Path(inspect.getfile(main)).stem}: error: {error}", file=sys.stderr)
            return 2

    return run


def describe(device: torch.device | str = "cpu") -> str:
    """The device, the cores and the version of torch, in one line."""
    name = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {cores()} cores, torch {torch.__version__}"


def seconds(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Wall seconds of one call, with everything that it started on a GPU."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def cpu_seconds(function: Callable[[], object]) -> float:
    """Seconds that one call keeps the cores of this process busy."""
    start = time.process_time()
    function()
    return time.process_time() - start


def alternate(measurements: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every measurement once a round, after one round to warm up; every second round runs in reverse order."""
    found: dict[str, list[float]] = {name: [] for name in measurements}
    for measure in measurements.values():
        measure()
    for number in range(rounds):
        for name in list(measurements)[:: -1 if number % 2 else 1]:
            time.sleep(PAUSE)
            found[name].append(measurements[name]())
    return found


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Median of the ratios pair by pair, and their range."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})"


def milliseconds(values: Sequence[float]) -> str:
    """Their median."""
    return f"{1e3 * statistics.median(values):,.1f}"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Meanwhile `count` other processes compute, each on one core."""
    environment = {**os.environ, **ONE_THREAD, "BUSY_PARENT": str(os.getpid())}
    loops = [subprocess.Popen([sys.executable, "-c", BUSY], env=environment) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tree_memory(process: int) -> int:
    """Resident bytes of a process and all its descendants together; 0 where there is no /proc.

    Pages that processes share count once for each of them.
    """
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        threads = list(Path(f"/proc/{process}/task").iterdir())
    except OSError:  # it has ended
        return 0
    total = pages * os.sysconf("SC_PAGE_SIZE")
    for thread in threads:
        with contextlib.suppress(OSError):
            total += sum(tree_memory(int(child)) for child in (thread / "children").read_text().split())
    return total
