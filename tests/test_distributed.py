"""Rank, shares and what is shared: a no-op alone, and two real processes over gloo."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import distributed_worker as worker
import numpy as np
import pytest
import torch
from small_run import copied

from sppnet import distributed
from sppnet.artifacts import read_json, read_tensors
from sppnet.classification.classifier import Classifier
from sppnet.classification.dataset import load_class_data
from sppnet.classification.testing import evaluate_classifiers
from sppnet.config import LowRankSettings
from sppnet.errors import SppnetError
from sppnet.pipeline.evaluation import evaluate_run
from sppnet.pipeline.training import train_detector

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


def test_one_process_computes_all_in_order_and_keeps_its_module():
    found = [[tensor.tolist() for tensor in tensors] for tensors in distributed.in_order(lambda i: (i, [1.5] * i), 3)]
    assert found == [[0, []], [1, [1.5]], [2, [1.5, 1.5]]]
    module = torch.nn.Linear(2, 2)
    assert distributed.data_parallel(module) is module


def test_errors_of_one_process_are_its_own():
    assert not distributed.lost_another(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))


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


def run_processes(folder, task, statuses=(0, 0)):
    """The worker's `task` in two processes; returns what each printed, line by line, and its standard error."""
    port = str(free_port())
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
              "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "distributed_worker.py"), task, str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=600) for process in processes]
    for process, status, (_, errors) in zip(processes, statuses, results, strict=True):
        assert process.returncode == status, errors
    return [([line.split() for line in output.splitlines()], errors) for output, errors in results]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of two processes that did all tasks, and what each printed: task -> words."""
    folder = tmp_path_factory.mktemp("tasks")
    names = [task.__name__ for task in worker.TASKS]
    return folder, *(dict(zip(names, lines, strict=True)) for lines, _ in run_processes(folder, "all"))


@pytest.mark.slow
def test_two_processes_share_the_work_and_wait_for_each_other(tasks):
    _, first, second = tasks
    assert first["basics"] == ["0", "2", "True", "0,2,4"]  # rank, size, main, shard
    assert second["basics"] == ["1", "2", "False", "1,3"]


@pytest.mark.slow
def test_what_one_process_computes_all_have_in_order(tasks):
    _, first, second = tasks
    assert first["in_order"] == second["in_order"] == worker.in_order(Path())


@pytest.mark.slow
def test_gradients_are_averaged_and_a_process_that_ends_is_told_apart_from_a_bug(tasks):
    _, first, second = tasks
    mean = ["[2.0,", "2.0],None"] * 3  # (1 + 3) / 2; nothing for the parameter that is not used
    assert second["gradients"] == mean
    assert first["gradients"] == [*mean, "True", "True", "True", "False"]  # backward, barrier, in_order; another error


@pytest.mark.slow
def test_two_processes_fine_tune_the_head_of_one(tasks, tmp_path):
    """They draw the same windows; sums of two halves round differently, by some 1e-7 of the largest weight a step."""
    folder, first, second = tasks
    assert first["finetune"] == second["finetune"]  # the same digest of the head, the same best step
    assert (folder / "finetune" / "log.csv").read_text().count("\n") == 4
    head, (_, best_step) = worker.toy_head(tmp_path)
    assert first["finetune"][1] == best_step
    for name, tensor in read_tensors(folder / "head.safetensors").items():
        torch.testing.assert_close(tensor, head.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_the_joint_head_of_one(tasks, tmp_path):
    folder, first, second = tasks
    assert first["joint"] == second["joint"]
    own = worker.toy_joint_head(tmp_path).state_dict()
    for name, tensor in read_tensors(folder / "joint.safetensors").items():
        torch.testing.assert_close(tensor, own[name], rtol=1e-3, atol=1e-5)  # AdamW divides by small numbers


@pytest.mark.slow
def test_two_processes_mine_the_svms_of_one(tasks):
    _, first, second = tasks
    alone = worker.mining(Path())
    assert min(map(int, alone[1:4])) > 5, "expected many fits, with negatives that leave and come"
    assert first["mining"] == second["mining"] == alone


@pytest.mark.slow
def test_two_processes_train_the_classifier_of_one(tasks, tmp_path):
    """The head draws the same batches and features; of the whole network batch norm sees halves of them."""
    folder, first, second = tasks
    assert first["classifier"] == second["classifier"]
    worker.classifier(tmp_path)
    for name, tensor in read_tensors(folder / "head/classifier/weights.safetensors").items():
        own = read_tensors(tmp_path / "head/classifier/weights.safetensors")[name]
        torch.testing.assert_close(tensor, own, rtol=1e-4, atol=1e-6)
    # what drives the rate is the loss of the network that is kept, its batch norm too
    trained = Classifier.load(folder / "whole", torch.device("cpu"))
    held_out = load_class_data(trained.config.data, folder / "whole").validation
    found = evaluate_classifiers([trained], held_out, "centre", progress=False)
    loss = -np.log(found.probabilities[np.arange(len(found.labels)), found.labels]).mean()
    *_, last = csv.DictReader((folder / "whole/history.csv").read_text().splitlines())
    assert float(last["val_loss"]) == pytest.approx(loss, rel=1e-5)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_process_ends_training_and_two_go_on_to_the_run_of_one(small_run, tmp_path):
    """All but fine-tuning, whose dropout differs: from the same head every file is that of one process, bit by bit."""
    alone, run = copied(small_run, tmp_path / "alone").root, tmp_path / "run"
    low_rank = LowRankSettings(fc6=4, steps=(), learning_rates=())  # not fine-tuned again
    config = small_run.config.model_copy(update={"low_rank": low_rank})
    assert train_detector(config, alone, progress=False) is not None
    finetuned = next(alone.glob("finetune-*"))
    shutil.copytree(finetuned, run / finetuned.name)
    shutil.copy(alone / "config.yaml", run)
    (lines, errors), _ = run_processes(tmp_path, "dying", (0, -signal.SIGKILL))
    assert lines[-1] == ["2"]
    assert errors.splitlines()[-1].startswith("sppnet train: error: another process of this job ended")
    assert "Traceback" not in errors
    assert not list(run.glob("svm-*/svm.safetensors"))
    (first, _), (second, _) = run_processes(tmp_path, "pipeline")
    evaluated = evaluate_run(alone)
    for stage in ("proposals", "maps", "low_rank", "svm", "boxes", "thresholds"):
        (folder,) = run.glob(f"{stage}-*")
        assert contents(alone / folder.name) == contents(folder) != {}, stage
    assert first == second == [[str(evaluated.result.evaluation.map)]]
    assert contents(alone / "detector") == contents(run / "detector")
    assert contents(alone / evaluated.result.origin) == contents(run / evaluated.result.origin) != {}
    figures = [read_json(folder / "results/SHAPES-test/metrics.json") for folder in (alone, run)]
    assert figures[0].pop("seconds_per_image") != figures[1].pop("seconds_per_image")
    assert figures[0] == figures[1]


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
        ({**PAIR, "MASTER_PORT": "99999"}, "so many processes did not meet .*99999"),
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


@pytest.mark.parametrize(("rank", "world", "others"), [(0, 3, "2 other processes"), (1, 2, "another process")])
def test_processes_that_never_come_are_not_waited_for_for_ever(monkeypatch, caplog, rank, world, others):
    monkeypatch.setattr(distributed, "ARRIVAL", timedelta(seconds=1))
    monkeypatch.setattr(distributed, "QUIET", 0.1)
    values = {"WORLD_SIZE": str(world), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SppnetError, match=r"so many processes did not meet at MASTER_ADDR=127\.0"):
        distributed.start()
    assert f"waiting for {others} at 127.0.0.1:{values['MASTER_PORT']}" in caplog.text
