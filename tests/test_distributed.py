"""Rank, shard and gather: a no-op alone, and two real processes over gloo."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from sppnet import distributed
from sppnet.errors import SppnetError

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_the_main_one_and_does_everything():
    distributed.start()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.shard([1, 2, 3]) == [1, 2, 3]
    distributed.barrier()
    distributed.stop()


def test_torchrun_with_one_process_starts_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.start()
    assert not torch.distributed.is_initialized()


def test_the_gradients_of_one_process_stay():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    distributed.average_gradients([parameter])
    assert parameter.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_shards_are_disjoint_and_complete(monkeypatch, count):
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        shares.append(list(distributed.shard(range(count))))
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_processes(folder, what):
    """The worker's `what` in two processes; returns what each printed."""
    port = str(free_port())
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
              "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "distributed_worker.py"), what, str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=600) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [output.split() for output, _ in results]


@pytest.mark.slow
def test_two_processes_share_the_work_and_average_their_gradients(tmp_path):
    first, second = run_processes(tmp_path, "basics")
    assert first == ["0", "2", "True", "0,2,4", "2.0,None"]  # rank, size, main, shard, gradients (1 + 3) / 2
    assert second == ["1", "2", "False", "1,3", "2.0,None"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0", "rank1"]


@pytest.mark.slow
def test_two_processes_fine_tune_one_head(tmp_path):
    first, second = run_processes(tmp_path, "finetune")
    assert first == second  # the same digest of the head, the same best step
    assert (tmp_path / "finetune" / "log.csv").read_text().count("\n") == 4


PAIR = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 in the environment, without RANK, MASTER_ADDR, MASTER_PORT: start all"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"},
            "without MASTER_ADDR: start all processes",
        ),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many in the environment: expected a whole number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2 in the environment: expected a whole number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9{20}… in the environment: expected a whole number"),
        ({"WORLD_SIZE": "10000000"}, "WORLD_SIZE=10000000 in the environment: expected a whole number"),
        ({**PAIR, "RANK": "2"}, "RANK=2 in the environment: expected 0 to 1, below WORLD_SIZE"),
        ({**PAIR, "RANK": "-1"}, "RANK=-1 in the environment: expected a whole number"),
        ({**PAIR, "RANK": "x"}, "RANK=x in the environment: expected a whole number"),
        ({**PAIR, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 in the environment: expected a port from 1 to 65535"),
        ({**PAIR, "MASTER_PORT": "0"}, "MASTER_PORT=0 in the environment: expected a port from 1 to 65535"),
        ({**PAIR, "MASTER_PORT": "http"}, "MASTER_PORT=http in the environment: expected a whole number"),
        ({**PAIR, "MASTER_ADDR": "no.host.invalid"}, "MASTER_ADDR=no.host.invalid in the environment: cannot be found"),
        ({**PAIR, "MASTER_ADDR": "x" * 99}, "MASTER_ADDR=x{99} in the environment: cannot be found"),
    ],
)
def test_half_a_launch_is_refused_at_once(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SppnetError, match=message):
        distributed.start()


@pytest.mark.parametrize("value", ["", "0", "1", " "])
def test_a_world_of_one_or_none_is_this_process(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    distributed.start()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_never_come_are_not_waited_for_for_ever(monkeypatch, caplog, rank):
    monkeypatch.setattr(distributed, "ARRIVAL", timedelta(seconds=1))
    monkeypatch.setattr(distributed, "QUIET", 0.1)
    values = {"WORLD_SIZE": "3", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SppnetError, match=r"so many processes did not meet at MASTER_ADDR=127\.0"):
        distributed.start()
    assert f"waiting for 2 other processes at 127.0.0.1:{values['MASTER_PORT']}" in caplog.text
