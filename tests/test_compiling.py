"""Work in parts: every part once, on the caller's thread and others, errors where the caller sees them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sppnet import compiling
from sppnet.compiling import PARTS_PER_THREAD, in_parts


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 1000])
def test_the_parts_cover_everything_once(threads, count):
    seen = []
    in_parts(lambda start, stop: seen.append((start, stop)), count, threads, 32)
    assert sorted(k for start, stop in seen for k in range(start, stop)) == list(range(count))
    assert len(seen) == max(1, min(count // 32, threads * PARTS_PER_THREAD if threads > 1 else 1))


def test_the_caller_works_beside_the_other_threads():
    names = set()

    def run(start, stop):
        names.add(threading.current_thread())
        time.sleep(0.01)

    in_parts(run, 64, 3, 1)
    assert threading.current_thread() in names
    assert len(names) == 3


@pytest.mark.parametrize("bad", range(8))
def test_an_error_of_any_part_reaches_the_caller(bad):
    def run(start, stop):
        time.sleep(0.002)
        if start == bad:
            raise ValueError(f"part {bad}")

    with pytest.raises(ValueError, match=f"part {bad}"):
        in_parts(run, 8, 2, 1)


@pytest.mark.parametrize("mine", [True, False])
def test_after_an_error_no_other_part_begins(mine):
    begun, caller = [], threading.current_thread()

    def run(start, stop):
        begun.append(start)
        time.sleep(0.02)
        if (threading.current_thread() is caller) == mine:
            raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        in_parts(run, 16, 2, 1)
    assert len(begun) < 8


RESTING = """
import torch
from pathlib import Path
from sppnet.compiling import in_parts, rest_torch_threads

def tasks():
    return len(list(Path("/proc/self/task").iterdir()))

torch.set_num_threads(3)
images = torch.randn(1, 64, 64, 64)
rest_torch_threads()
resting = tasks()
pooled = torch.max_pool2d(images, 2)
assert tasks() == resting + 2
rest_torch_threads()
assert tasks() == resting
torch.max_pool2d(images, 2)
seen = []
in_parts(lambda start, stop: seen.append(tasks()), 2, 2, 1)
assert max(seen) <= resting + 1, seen  # one of ours
assert torch.equal(torch.max_pool2d(images, 2), pooled)
assert torch.get_num_threads() == 3
print("rested")
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
@pytest.mark.skipif(compiling._gnu_openmp(Path(torch.__file__).parent) is None, reason="torch without GNU OpenMP")
def test_torchs_threads_go_before_others_work_and_come_again():
    run = subprocess.run([sys.executable, "-c", RESTING], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "rested", run.stderr


FORKED = """
import os, signal, torch
from sppnet.compiling import in_parts
torch.set_num_threads(3)
torch.max_pool2d(torch.randn(1, 64, 64, 64), 2)
if child := os.fork():
    print(os.waitpid(child, 0)[1])
else:
    signal.alarm(20)
    in_parts(lambda start, stop: None, 64, 2, 1)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_torchs_threads():
    run = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "0", run.stderr


def test_without_gnu_openmp_nothing_happens(tmp_path):
    assert compiling._gnu_openmp(tmp_path) is None
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libgomp.so.1").write_text("not a library")
    compiling._gnu_openmp.cache_clear()
    assert compiling._gnu_openmp(tmp_path) is None


ANNOUNCED = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from sppnet.compiling import announce_compiling, compiled
announce_compiling()

@compiled()
def double(number):
    return 2 * number

print(double(1), double(1.5), double(2))
"""


def test_the_log_says_once_that_loops_are_compiled_and_not_when_they_are_kept(tmp_path):
    (tmp_path / "script.py").write_text(ANNOUNCED)
    command = [sys.executable, str(tmp_path / "script.py")]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n") for _ in range(2)]
    assert said[0][0].startswith("compiling loops for this machine")
    assert said[0][1:] == said[1] == ["2 3.0 4", ""]
