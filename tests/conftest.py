"""What every test may rely on: few threads, no window system, and skips with a reason where something is absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported: small tensors gain nothing from more

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run and no time limit per example: a slow machine must not fail a test.
settings.register_profile(
    "sppnet", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sppnet")

NO_SHARED_DATA = "SPPNET_SHARED does not name a folder with the conformance data and the real images"


def shared_folder() -> Path | None:
    """The folder named by SPPNET_SHARED, where there is one."""
    named = os.environ.get("SPPNET_SHARED")
    return Path(named).resolve() if named and Path(named).is_dir() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = _skip_reasons({marker.name for item in items for marker in item.iter_markers()})
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _skip_reasons(used: set[str]) -> dict[str, str]:
    reasons = {}
    if shared_folder() is None:
        reasons["shared_data"] = NO_SHARED_DATA
    if "network" in used and not os.environ.get("SPPNET_NETWORK"):
        reasons["network"] = "downloads something; set SPPNET_NETWORK=1 to run it"
    if "gpu" in used and not _has_cuda():
        reasons["gpu"] = "no CUDA device"
    return reasons


def _has_cuda() -> bool:
    import torch  # here and not above: most single test files need no torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of conformance data and real images; skips without it."""
    folder = shared_folder()
    if folder is None:
        pytest.skip(NO_SHARED_DATA)
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A detector trained in a second on a dozen generated pictures; a test that changes it takes `pipeline.copied`."""
    from small_run import train_small  # here and not above: it imports torch

    return train_small(tmp_path_factory.mktemp("small"))
