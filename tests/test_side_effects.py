"""Neither importing the package nor using it changes the process it runs in, and imports stay light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LIGHT = """
import json, sys
from sppnet import SpatialPyramidPool
SpatialPyramidPool((1, 2))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

UNCHANGED = """
import json, os, pkgutil, signal, socket, sys, threading
import cv2, numpy, torch

def state():
    return {
        "environment": dict(os.environ),
        "timeout": socket.getdefaulttimeout(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads()],
        "precision": [str(torch.get_default_dtype()), torch.get_float32_matmul_precision()],
        "signals": [str(signal.getsignal(kind)) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "random": [torch.random.get_rng_state().tolist(), str(numpy.random.get_state())],
        "grad": torch.is_grad_enabled(),
        "folder": os.getcwd(),
        "running": sorted(thread.name for thread in threading.enumerate()),
    }

before = state()
import sppnet
for module in pkgutil.walk_packages(sppnet.__path__, "sppnet."):
    if module.name != "sppnet.__main__":
        __import__(module.name)
imported = state()
from sppnet import SPPDetector, read_image
detector = SPPDetector.load(sys.argv[1])
config = detector.config
maps = config.maps.model_copy(update={"runtime": "auto"})
from dataclasses import replace
detector = replace(detector, config=config.model_copy(update={"maps": maps, "precision": "auto"}))
assert len(detector.detect(sys.argv[2], threshold=-3))
used = state()
print(json.dumps([[key, name] for name, found in (("import", imported), ("use", used))
                  for key in before if before[key] != found[key]]))
"""


def output_of(code: str, *arguments: object) -> object:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_layer_brings_torch_and_nothing_heavier():
    heavy = {"numba", "sklearn", "matplotlib", "openvino", "cv2", "scipy", "timm", "torchvision", "pydantic", "PIL"}
    imported = output_of(LIGHT)
    assert isinstance(imported, list)
    assert heavy & set(imported) == set()
    assert "torch" in imported


@pytest.mark.slow
def test_the_process_stays_as_it_was(small_run):
    picture = next(Path(small_run.devkit, "SHAPES/JPEGImages").glob("test*"))
    assert output_of(UNCHANGED, small_run.root, picture) == []
