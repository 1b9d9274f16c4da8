"""fc6, fc7, a softmax over the classes and class-wise box regression, learned together (ours).

The loss is that of Fast R-CNN (Girshick 2015, sec. 2.3): cross entropy, and for positives the smooth L1 of the targets
of their class, each of zero mean and unit variance. What is trained fits the detector of sec. 4.1: an `SPPHead` whose
fc6 is of low rank, and `BoxRegressors` on fc7. Only scores differ: they are probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sppnet import distributed
from sppnet.artifacts import read_tensors, write_tensors, write_text
from sppnet.config import HeadSettings, JointSettings
from sppnet.detection.box_regression import BoxRegressor, BoxRegressors
from sppnet.detection.embedding import LabelledRows, Projection
from sppnet.errors import SppnetError
from sppnet.jobs import progress_bar
from sppnet.models.sppnet import SPPHead, seed_dropout

SAVE_EVERY = 250  # steps; the state is saved, and the losses are logged
COLUMNS = ("step", "loss", "box_loss", "learning_rate")


@dataclass(frozen=True, eq=False)
class SoftmaxClassifier:
    """Probabilities of the classes; the last output of `linear`, (K + 1, D), is background."""

    linear: nn.Linear
    classes: tuple[str, ...]

    def score(self, features: Tensor) -> Tensor:
        """Features of fc7 (R, D) -> probabilities (R, K) float32."""
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(features.float()).softmax(dim=1)[:, : len(self.classes)]

    def to(self, device: torch.device) -> SoftmaxClassifier:
        """The same: its layer moves with the head that it is part of."""
        return self


class JointHead(nn.Module):
    """Rows (R, rank) -> logits (R, K + 1) and normalised box targets for every class (R, K, 4).

    `target_mean` and `target_std` (4,) are those of the targets in training. Weights start as torch's own do.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self, rank: int, classes: int, settings: HeadSettings, targets: NDArray[np.floating], seed: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            seed_dropout(torch.device("cpu"), seed)
            self.head = SPPHead(rank, classes + 1, settings)
            self.boxes = nn.Linear(settings.fc7, 4 * classes)
        mean, std = targets.mean(axis=0), targets.std(axis=0) + 1e-3  # all windows may be their objects
        self.register_buffer("target_mean", torch.from_numpy(mean).float())
        self.register_buffer("target_std", torch.from_numpy(std).float())

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.head.hidden(rows)
        return self.head.classifier(hidden), self.boxes(hidden).unflatten(1, (-1, 4))

    def whole(self, projection: Projection, head: SPPHead) -> None:
        """`head` becomes the head on pooled features: the projection is its basis, the shift goes to fc6's bias."""
        own = {name: tensor.cpu() for name, tensor in self.head.state_dict().items()}
        bias = own["fc6.bias"].double() - own["fc6.weight"].double() @ projection.shift.cpu().double()
        head.load_state_dict({**own, "basis6.weight": projection.basis, "fc6.bias": bias.float()})

    def regressors(self, classes: tuple[str, ...]) -> BoxRegressors:
        """The box regression of each class, on fc7."""
        weight, bias = (p.detach().cpu().double().unflatten(0, (-1, 4)) for p in (self.boxes.weight, self.boxes.bias))
        mean, std = self.target_mean.cpu().double(), torch.diag(self.target_std.cpu().double())
        each = (BoxRegressor(weight[label], bias[label], mean, std) for label in range(len(classes)))
        return BoxRegressors.stack(dict(zip(classes, each, strict=True)))


def joint_loss(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(cross entropy, smooth L1 of the positives' own class) of R windows, both divided by R (Fast R-CNN).

    logits (R, K + 1), boxes and their normalised targets (R, K, 4) and (R, 4), labels (R,) with K for background.
    """
    near = (labels < boxes.shape[1]).nonzero().squeeze(1)
    box_loss = F.smooth_l1_loss(boxes[near, labels[near]], targets[near], reduction="sum") / max(1, len(labels))
    return F.cross_entropy(logits, labels), box_loss


def train_joint_head(
    rows: LabelledRows,
    head: HeadSettings,
    settings: JointSettings,
    folder: Path,
    device: torch.device,
    precision: str = "float32",
    progress: bool = True,
) -> tuple[JointHead, str]:
    """The head trained on rows, in eval mode, and a line about it.

    Losses go to folder/log.csv. The state is saved every 250 steps, and a later call with the same folder goes on from
    there, with the same result as without the interruption. Under torchrun the processes share the windows of a batch,
    which are those of one process; only dropout differs. SppnetError without positives and for a loss that is not
    finite.
    """
    if settings.batch < distributed.world_size():
        few = f"joint.batch={settings.batch}, less than a window for each of {distributed.world_size()} processes"
        raise SppnetError(f"{few}; raise it, or start fewer")
    rows.draw(1, 1, np.random.default_rng(0))  # refused here where there are no positives
    found = rows.targets[rows.labels < rows.classes]
    model = JointHead(rows.features.shape[1], rows.classes, head, found, settings.seed).to(device)
    trainer = _Trainer(model, settings, folder, device, precision)
    done = trainer.restore()
    distributed.barrier()  # with nothing left to do the first process would delete the state before others read it
    devices = [device] if device.type == "cuda" else []
    bar = progress_bar(range(done, settings.steps), "joint", "step", settings.steps, done, progress)
    with torch.random.fork_rng(devices=devices):
        for step in bar:
            drawn = rows.draw(settings.batch, settings.positive_share, np.random.default_rng((settings.seed, step)))
            own = np.array_split(drawn, distributed.world_size())[distributed.rank()]
            trainer.train_step(step, rows, own)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == settings.steps:
                loss, box_loss = trainer.log_losses(step + 1)
                bar.set_postfix(loss=f"{loss + box_loss:.3f}", refresh=False)
    loss, box_loss = trainer.log[-1][1:3]
    steps = f"{settings.steps} steps on {len(rows.labels):,} windows, {done} of them from before"
    return model.eval(), f"{steps}; loss {loss:.3f}, of boxes {box_loss:.3f}"


class _Trainer:
    """The optimiser, its schedule, and the state on disk."""

    def __init__(
        self, model: JointHead, settings: JointSettings, folder: Path, device: torch.device, precision: str
    ) -> None:
        self.model, self.settings, self.folder, self.device = model.train(), settings, folder, device
        self.shared, self.half = distributed.data_parallel(model), precision == "bfloat16"
        self.optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, fused=True)
        self.rates = list(one_cycle(settings.learning_rate, settings.steps))
        self.log: list[tuple[float, ...]] = []
        self.sums = torch.zeros(2, device=device)
        self.count = 0

    def train_step(self, step: int, rows: LabelledRows, chosen: NDArray[np.int64]) -> None:
        labels, targets = (torch.from_numpy(part[chosen]).to(self.device) for part in (rows.labels, rows.targets))
        targets = (targets - self.model.target_mean) / self.model.target_std
        self.optimiser.param_groups[0]["lr"] = self.rates[step]
        own = np.random.SeedSequence((self.settings.seed, step, distributed.rank()))
        seed_dropout(self.device, int(own.generate_state(1)[0]))  # the same after a resume
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits, boxes = self.shared(rows.read(chosen).to(self.device))
        losses = joint_loss(rows.mask(logits.float(), chosen), boxes.float(), labels, targets)
        self.optimiser.zero_grad()
        share = len(labels) * distributed.world_size() / self.settings.batch  # the mean is that over windows
        (torch.stack(losses).sum() * share).backward()
        self.optimiser.step()
        self.sums += torch.stack(losses).detach()
        self.count += 1

    def log_losses(self, step: int) -> tuple[float, float]:
        """Log the mean losses since the last time and save the state; returns them."""
        loss, box_loss = (self.sums / self.count).tolist()
        if not np.isfinite([loss, box_loss]).all():
            raise SppnetError(f"the loss is not finite at step {step}; lower joint.learning_rate")
        self.log.append((step, loss, box_loss, self.rates[step - 1]))
        self.sums.zero_()
        self.count = 0
        if not distributed.is_main():
            return loss, box_loss
        state = self.optimiser.state_dict()["state"]
        moments = {f"optimiser.{i}.{name}": value for i, own in state.items() for name, value in own.items()}
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        progress = {"step": torch.tensor(step), "log": torch.tensor(self.log, dtype=torch.float64)}
        write_tensors(self.folder / "checkpoint.safetensors", {**moments, **model, **progress})
        lines = [COLUMNS, *([int(row[0]), *row[1:]] for row in self.log)]
        write_text(self.folder / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
        return loss, box_loss

    def restore(self) -> int:
        """Continue from the saved state, if there is one; returns the steps done."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return 0
        saved = read_tensors(path)
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in saved.items() if n.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved.items():
            kind, _, place = name.partition(".")
            if kind == "optimiser":
                index, _, part = place.partition(".")
                state.setdefault(int(index), {})[part] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.log = [tuple(row) for row in saved["log"].tolist()]
        return int(saved["step"])


def one_cycle(largest: float, steps: int) -> Iterator[float]:
    """The learning rate of every step, by torch's OneCycleLR (Smith and Topin 2018)."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], largest)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, largest, total_steps=steps + 1, cycle_momentum=False)
    for _ in range(steps):
        yield float(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
