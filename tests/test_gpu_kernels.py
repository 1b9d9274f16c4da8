"""The kernel for GPUs without a GPU: its results in Triton's interpreter, and that it compiles for the GPUs there are.

Both in processes of their own: Triton decides when a kernel is defined whether to interpret it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sppnet.network import pyramid

pytestmark = pytest.mark.skipif(not pyramid._has_triton(), reason="this torch brings no Triton")

INTERPRETED = """
import numpy as np
import torch
from sppnet.network import bins, pyramid
from sppnet.network.gpu_kernels import pool_bins

torch.manual_seed(0)
windows = np.array([[0, 0, 7, 5], [3, 2, 4, 3], [2, 1, 7, 3], [6, 0, 7, 5], [0, 4, 5, 5]])
for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for channels, levels in ((5, (1, 2, 3)), (300, (2, 1))):  # a block that is not full; a full one and another
        whole = (torch.randn(channels, 5, 7) - 3).to(kind)
        for feature_map in (whole, whole.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            found = pyramid._pool_windows_on_gpu(feature_map, windows, levels)
            assert found.dtype == kind
            assert torch.equal(found, pyramid.pool_windows(feature_map, windows, levels)), (kind, levels)
    by_bin = pyramid._pool_on_gpu(whole, windows, levels, bins.bin_order(levels)).flatten(1)
    assert torch.equal(by_bin.float(), pyramid.pool_windows_by_bin(whole, windows, levels).float())
    assert pyramid._pool_windows_on_gpu(whole, windows[:0], levels).shape == (0, 300 * 5)
print("as on the CPU")
"""

COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sppnet.network.gpu_kernels import CHANNELS, WARPS, largest_of_bins

for kind in ("fp16", "bf16", "fp32", "fp64"):
    arguments = {"cells": f"*{kind}", "windows": "*i32", "bins": "*i32", "pooled": f"*{kind}"}
    arguments |= {"width": "i32", "channels": "i32", "count": "i32", "BLOCK": "constexpr"}
    aligned = {(k,): [["tt.divisibility", 16]] for k in (0, 3, 5)}  # as for 256 channels
    for capability in (80, 90):
        source = ASTSource(largest_of_bins, arguments, {"BLOCK": CHANNELS}, aligned)
        built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
        wide = "v2.b64" if kind == "fp64" else "v4.b32"
        assert f"ld.global.{wide}" in built.asm["ptx"] and f"st.global.{wide}" in built.asm["ptx"], kind
        assert built.asm["cubin"]
print("compiled")
"""


def run(code: str, cache: Path, **environment: str) -> str:
    variables = {**os.environ, "TRITON_CACHE_DIR": str(cache), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=variables)
    return done.stdout.strip() + done.stderr


def test_interpreted_it_gives_the_bits_of_the_cpu(tmp_path: Path) -> None:
    assert run(INTERPRETED, tmp_path, TRITON_INTERPRET="1") == "as on the CPU"


def test_it_compiles_for_every_kind_of_number_and_reads_sixteen_bytes_at_once(tmp_path: Path) -> None:
    assert run(COMPILED, tmp_path) == "compiled"


def test_devices_without_a_loop_of_their_own_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyramid, "_kernel_works", lambda device: True)
    assert pyramid.has_own_loop(torch.device("cpu"))
    assert pyramid.has_own_loop(torch.device("cuda", 1))
    assert not pyramid.has_own_loop(torch.device("mps"))
    monkeypatch.setattr(pyramid, "_has_triton", lambda: False)
    assert not pyramid.has_own_loop(torch.device("cuda"))
    assert pyramid.has_own_loop(torch.device("cpu"))


def test_a_kernel_that_fails_leaves_pooling_to_torchvision_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(pyramid, "_pool_on_gpu", fails)
    pyramid._kernel_works.cache_clear()
    try:
        with caplog.at_level("WARNING", "sppnet"):
            assert not pyramid._kernel_works(torch.device("cpu"))
        assert "roi_pool on cpu: the kernel of ours failed: Failed to find C compiler" in caplog.text
    finally:
        pyramid._kernel_works.cache_clear()
