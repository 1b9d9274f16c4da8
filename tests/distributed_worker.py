"""One of the processes of test_distributed: joins the group, does what it is told, prints what it found."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from doubles import ToyWindows

from sppnet import distributed
from sppnet.artifacts import tensors_digest
from sppnet.config import FinetuneSettings, HeadSettings
from sppnet.detection.finetuning import finetune_head
from sppnet.models.sppnet import build_head


def basics(folder: Path) -> list[str]:
    (folder / f"rank{distributed.rank()}").touch()
    distributed.barrier()
    assert len(list(folder.iterdir())) == 2, "a process left the barrier before the other one came"
    given, untouched = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    given.grad = torch.full((2,), 1.0 + 2.0 * distributed.rank())
    distributed.average_gradients([given, untouched])
    share = ",".join(map(str, distributed.shard(range(5))))
    own = [distributed.rank(), distributed.world_size(), distributed.is_main(), share]
    return [*map(str, own), f"{given.grad[0].item()},{untouched.grad}"]


def finetune(folder: Path) -> list[str]:
    settings = FinetuneSettings(
        steps=(6,), learning_rates=(0.01,), batch=8, images_per_batch=2, validate_every=2, validate_windows=16
    )
    head = build_head(12, (1,), 3, HeadSettings(fc6=8, fc7=8))
    done = finetune_head(head, ToyWindows(4, 2, 0), ToyWindows(2, 2, 1), 2, settings, folder / "finetune", False)
    return [tensors_digest(head.state_dict()), str(done.best_step)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start()
    print(*{"basics": basics, "finetune": finetune}[sys.argv[1]](Path(sys.argv[2])))
    distributed.stop()
