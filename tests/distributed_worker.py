"""One of the processes of test_distributed: joins the group, does what it is told, prints what it found."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from class_pictures import write_classes
from doubles import ToyWindows
from torch import nn

from sppnet import cli, distributed
from sppnet.artifacts import tensors_digest, write_tensors
from sppnet.classification import sources
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.training import train_classifier
from sppnet.config import FinetuneSettings, HeadSettings, JointSettings, SVMSettings
from sppnet.config_files import load_config, parse_settings
from sppnet.detection import hard_negatives
from sppnet.detection.embedding import LabelledRows
from sppnet.detection.finetuning import finetune_head
from sppnet.detection.hard_negatives import MinedSVMs, mine_detectors
from sppnet.detection.joint_head import JointHead, train_joint_head
from sppnet.models.sppnet import SPPHead, build_head
from sppnet.pipeline.evaluation import evaluate_run
from sppnet.pipeline.training import train_detector


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, factor: float) -> torch.Tensor:
        return (self.used * factor).sum()


def basics(folder: Path) -> list[str]:
    (folder / f"rank{distributed.rank()}").touch()
    distributed.barrier()
    assert len(list(folder.iterdir())) == 2, "a process left the barrier before the other one came"
    share = ",".join(map(str, distributed.shard(range(5))))
    return [*map(str, [distributed.rank(), distributed.world_size(), distributed.is_main(), share])]


def gradients(_: Path) -> list[str]:
    """The mean of 1 and 3, three times; then the second process dies and the first must say so."""
    module = PartlyUsed()
    shared = distributed.data_parallel(module)
    found = []
    for _ in range(3):
        shared(1.0 + 2.0 * distributed.rank()).backward()
        found.append(f"{module.used.grad.tolist()},{module.unused.grad}")
        module.zero_grad()
    distributed.barrier()
    if distributed.rank() == 1:
        print(*found, flush=True)
        os._exit(0)
    for call in (
        lambda: shared(1.0).backward(),
        distributed.barrier,
        lambda: list(distributed.in_order(lambda i: [i], 2)),
    ):
        try:
            call()
        except RuntimeError as error:
            found.append(str(distributed.lost_another(error)))
    return [*found, str(distributed.lost_another(RuntimeError("of another kind")))]


def shared_values(index: int) -> list[object]:
    """Tensors, an array and a number, of other shapes for each index."""
    assert index % distributed.world_size() == distributed.rank(), "computed by another process too"
    values = np.random.default_rng(index)
    with torch.inference_mode():
        frozen = torch.from_numpy(values.normal(size=(index, 3)))
    return [frozen, values.normal(size=(4, 2)).astype(np.float32).T, values.random(index) < 0.5, index]


def in_order(folder: Path) -> list[str]:
    for _ in distributed.in_order(lambda index: (index,), 1):
        if distributed.rank() > 0:
            time.sleep(0.2)
            (folder / "late").touch()
    assert distributed.world_size() == 1 or (folder / "late").exists(), "a process came to the end before another one"
    found = distributed.in_order(shared_values, 5)
    return [tensors_digest({str(i): tensor for i, tensor in enumerate(tensors)}) for tensors in found]


def toy_head(folder: Path) -> tuple[SPPHead, list[str]]:
    """Without dropout, whose draws differ from process to process; 9 windows that two processes cannot halve."""
    settings = FinetuneSettings(
        steps=(6,), learning_rates=(0.01,), batch=9, images_per_batch=3, validate_every=2, validate_windows=16
    )
    head = build_head(12, (1,), 3, HeadSettings(fc6=8, fc7=8, dropout=0))
    train, validation = ToyWindows(4, 2, 0), ToyWindows(2, 2, 1)
    done = finetune_head(head, train, validation, 2, settings, folder / "finetune", False)
    return head, [tensors_digest(head.state_dict()), str(done.best_step)]


def finetune(folder: Path) -> list[str]:
    head, found = toy_head(folder)
    if distributed.is_main():
        write_tensors(folder / "head.safetensors", head.state_dict())
    return found


def toy_joint_head(folder: Path) -> JointHead:
    """Without dropout; 9 windows that two processes cannot halve, of which one may have no positive."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), 12)
    targets = np.where(labels[:, None] < 2, rng.normal(size=(36, 4)), 0).astype(np.float32)
    data = LabelledRows(rng.normal(size=(36, 8)).astype(np.float16), labels, targets, labels < 0, 2)
    settings, head = JointSettings(steps=6, batch=9, positive_share=0.4), HeadSettings(fc6=8, fc7=8, dropout=0)
    return train_joint_head(data, head, settings, folder / "joint", torch.device("cpu"), progress=False)[0]


def joint(folder: Path) -> list[str]:
    model = toy_joint_head(folder)
    if distributed.is_main():
        write_tensors(folder / "joint.safetensors", model.state_dict())
    return [tensors_digest(model.state_dict())]


def toy_pairs() -> tuple[list[tuple[np.ndarray, np.ndarray]], SVMSettings]:
    """Images whose negatives enter and leave the cache again and again."""
    rng, pairs = np.random.default_rng(0), []
    for _ in range(15):
        overlaps = np.where(rng.random((60, 3)) < 0.7, 0.1, rng.random((60, 3))).astype(np.float32)
        overlaps[np.arange(3), np.arange(3)] = 1
        pairs.append((rng.normal(size=(60, 8)) + 2 * overlaps @ rng.normal(size=(3, 8)), overlaps))
    return pairs, SVMSettings(C=0.01, retrain_after=30, evict_below=-1.01)


def mined_parts(mined: MinedSVMs) -> list[str]:
    return [tensors_digest(mined.svms.to_tensors()), *map(str, mined.retrains), str(mined.dropped), *mined.untrained]


def mining(_: Path) -> list[str]:
    pairs, settings = toy_pairs()
    return mined_parts(mine_detectors(pairs, ("a", "b", "c"), settings, progress=False))


def classifier(folder: Path) -> list[str]:
    """Two epochs of the head alone and of the whole network, no dropout; two cannot halve batches of 9."""
    values = {
        "precision": "float32",
        "data": {"train": str(folder / "classes")},
        "backbone": {"name": "tiny5", "weights": {"source": "random"}},
        "pyramid": {"levels": [1]},
        "head": {"fc6": 16, "fc7": 16, "dropout": 0, "input_norm": 100},
        "training": {"sizes": [32], "batch": 9, "epochs": 2, "train_backbone": False},
    }
    if distributed.is_main():
        write_classes(folder / "classes", 6)
    distributed.barrier()
    found = list[str]()
    for name, whole in (("head", False), ("whole", True)):
        own = {**values["training"], "train_backbone": whole, "min_side": 32}
        head = values["head"]
        if whole:  # what it says depends on the statistics of batch norm
            own, head = {**own, "learning_rate": 1e-6}, {**head, "input_norm": 1e5}
        config = parse_settings(ClassifierConfig, {**values, "training": own, "head": head}, "test")
        with patch.object(sources, "TOGETHER", 1):  # every process has validation images
            trained = train_classifier(config, folder / name, torch.device("cpu"), progress=False)
        found.append(tensors_digest(trained.network.state_dict()))
    return found


def pipeline(folder: Path) -> list[str]:
    """The stages that are missing in the run, and the evaluation."""
    config = load_config(folder / "run/config.yaml")
    assert train_detector(config, folder / "run", progress=False) is not None
    return [str(evaluate_run(folder / "run").result.evaluation.map)]


def dying(folder: Path) -> list[str]:
    """`sppnet train`, whose second process is killed at its third image of mining."""
    visit, seen = hard_negatives._Miner.visit, []

    def deadly(*arguments: object) -> None:
        seen.append(0)
        if distributed.rank() == 1 and len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        visit(*arguments)

    hard_negatives._Miner.visit = deadly
    return [str(cli.main(["train", str(folder / "run/config.yaml"), "--run", str(folder / "run")]))]


TASKS = (basics, in_order, finetune, joint, mining, classifier, gradients)

if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    task, place = sys.argv[1], Path(sys.argv[2])
    if task == "dying":
        print(*dying(place))
    else:
        distributed.start()
        for do in (pipeline,) if task == "pipeline" else TASKS:
            print(*do(place), flush=True)
        distributed.stop()
