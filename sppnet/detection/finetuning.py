"""Room 5: train fc6, fc7 and a (K+1)-way classifier on sampled windows, the backbone frozen (sec. 4.1)."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sppnet import distributed
from sppnet.artifacts import read_tensors, write_tensors, write_text
from sppnet.config import FinetuneSettings
from sppnet.detection.sampling import Batch, LabelledWindows, draw_batch
from sppnet.errors import SppnetError
from sppnet.models.sppnet import SPPHead, seed_dropout
from sppnet.progress import progress_bar

log = logging.getLogger("sppnet")

COLUMNS = ("step", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")
PREFETCH = 3  # batches pooled ahead while the head trains


class WindowSource(Protocol):
    """Labelled windows of many images, and their pooled features on demand."""

    @property
    def labelled(self) -> Sequence[LabelledWindows]:
        """One entry an image."""
        ...

    def pool(self, image: int, rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Pyramid vectors (R, D) float32 of these windows of an image; `rng` draws their scales."""
        ...


@dataclass(frozen=True)
class FinetuneSummary:
    best_step: int
    best_error: float  # on the validation windows
    untrained_error: float  # of always answering background
    steps: int
    reused_steps: int
    seconds: float


def finetune_head(
    head: SPPHead,
    train: WindowSource,
    validation: WindowSource,
    background: int,
    settings: FinetuneSettings,
    folder: Path,
    progress: bool = True,
    stage: str = "finetune",
    precision: str = "float32",
) -> FinetuneSummary:
    """Train `head` in place; it ends with the weights of the step that had the smallest validation error.

    The weights that it starts with are no candidate. `stage` names it in progress and errors; `precision` is that of
    the products ("float32" or "bfloat16").

    `background` is the index of the background class, K. Losses go to folder/log.csv and to TensorBoard files
    beside it; the state is saved at every validation, and a later call with the same folder goes on from there,
    with the same result as without the interruption. Under torchrun a batch is shared by the processes.
    """
    start = time.monotonic()
    usable = _usable_images(train, "training")
    trainer = _Trainer(head, settings, folder, stage, precision)
    done = trainer.restore()
    distributed.barrier()  # with nothing left to do the first process would delete the state before others read it
    total = sum(settings.steps)
    devices = [trainer.device] if trainer.device.type == "cuda" else []  # all GPUs by default, each with a context
    with ThreadPoolExecutor(1) as loader, _tensorboard(folder, done) as board, torch.random.fork_rng(devices=devices):
        labels, pooled = loader.submit(_validation_windows, validation, background, settings).result()
        batches = _batches(loader, train, usable, background, settings, range(done, total))
        shown = progress and distributed.is_main()
        bar = progress_bar(range(done, total), stage, "step", total, done, shown)
        for step in bar:
            trainer.train_step(step, *next(batches))
            if (step + 1) % settings.validate_every == 0 or step + 1 == total:
                row = trainer.validate(step + 1, pooled, labels, background)
                bar.set_postfix(loss=f"{row[1]:.3f}", val_error=f"{1 - row[4]:.3f}", refresh=False)
                for name, value in zip(COLUMNS[1:], row[1:], strict=True):
                    board.add_scalar(name, value, step + 1)
    trainer.load_best()
    untrained = float((labels != background).float().mean())
    return FinetuneSummary(trainer.best_step, trainer.best_error, untrained, total, done, time.monotonic() - start)


class _Trainer:
    """The optimiser, its state on disk and the best head so far."""

    def __init__(self, head: SPPHead, settings: FinetuneSettings, folder: Path, stage: str, precision: str) -> None:
        self.head, self.settings, self.folder, self.stage = head.train(), settings, folder, stage
        self.half = precision == "bfloat16"
        self.device = head.fc6.weight.device
        weights = [p for name, p in head.named_parameters() if not name.endswith("bias")]
        biases = [p for name, p in head.named_parameters() if name.endswith("bias")]
        self.parameters = weights + biases
        groups = [{"params": weights, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}]
        self.optimiser = torch.optim.SGD(groups, lr=settings.learning_rates[0], momentum=settings.momentum, fused=True)
        self.rows: list[tuple[float, ...]] = []
        self.sums = torch.zeros(3, device=self.device)  # loss, right answers, windows since the last validation
        self.best_step, self.best_error, self.best_loss = 0, float("inf"), float("inf")
        self.best = {name: tensor.clone() for name, tensor in head.state_dict().items()}

    def train_step(self, step: int, pooled: Tensor, labels: Tensor) -> None:
        rate = self._rate(step)
        for group, factor in zip(self.optimiser.param_groups, (1.0, self.settings.bias_rate), strict=True):
            group["lr"] = rate * factor
        seed_dropout(self.device, _seed(self.settings.seed, step, distributed.rank()))  # the same after a resume
        pooled, labels = pooled.to(self.device), labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = self.head(pooled).float()
        loss = F.cross_entropy(logits, labels)
        self.optimiser.zero_grad()
        loss.backward()
        distributed.average_gradients(self.parameters)
        self.optimiser.step()
        right = (logits.detach().argmax(1) == labels).float().sum()
        self.sums += torch.stack([loss.detach() * len(labels), right, torch.full_like(right, len(labels))])

    def validate(self, step: int, pooled: Tensor, labels: Tensor, background: int) -> tuple[float, ...]:
        """Log a row, keep the head if it is the best, save the state; returns the row."""
        train_loss, right, count = self.sums.tolist()
        val_loss, val_accuracy = self._evaluate(pooled, labels)
        if not np.isfinite(train_loss) or not np.isfinite(val_loss):
            raise SppnetError(
                f"the loss is not finite at step {step}; lower {self.stage}.learning_rates, or set head.input_norm=300"
            )
        row = (step, train_loss / count, right / count, val_loss, val_accuracy, self._rate(step - 1))
        self.rows.append(row)
        self.sums.zero_()
        if (1 - val_accuracy, val_loss) < (self.best_error, self.best_loss):
            self.best_step, self.best_error, self.best_loss = step, 1 - val_accuracy, val_loss
            self.best = {name: tensor.clone() for name, tensor in self.head.state_dict().items()}
        log.debug("%s step %d: loss %.4f accuracy %.4f, validation %.4f %.4f", self.stage, *row[:5])
        self._save(step)
        return row

    def _evaluate(self, pooled: Tensor, labels: Tensor) -> tuple[float, float]:
        self.head.eval()
        with torch.no_grad():
            logits = torch.cat([self.head(part.to(self.device)).cpu() for part in pooled.split(512)])
        self.head.train()
        return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())

    def _rate(self, step: int) -> float:
        phase = int(np.searchsorted(np.cumsum(self.settings.steps), step, side="right"))
        return self.settings.learning_rates[min(phase, len(self.settings.learning_rates) - 1)]

    def _save(self, step: int) -> None:
        if not distributed.is_main():
            return
        states = [self.optimiser.state[parameter].get("momentum_buffer") for parameter in self.parameters]
        momentum = {f"momentum.{i}": state for i, state in enumerate(states) if state is not None}
        now = {f"now.{name}": tensor for name, tensor in self.head.state_dict().items()}
        best = {f"best.{name}": tensor for name, tensor in self.best.items()}
        progress = {
            "step": torch.tensor(step),
            "chosen": torch.tensor([self.best_step, self.best_error, self.best_loss], dtype=torch.float64),
            "rows": torch.tensor(self.rows, dtype=torch.float64),
        }
        write_tensors(self.folder / "checkpoint.safetensors", {**momentum, **now, **best, **progress})
        write_text(self.folder / "log.csv", _csv(self.rows))

    def restore(self) -> int:
        """Continue from the saved state, if there is one; returns the steps done."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return 0
        state = read_tensors(path)
        self.head.load_state_dict({n[4:]: t for n, t in state.items() if n.startswith("now.")})
        self.best = {n[5:]: t.to(self.device) for n, t in state.items() if n.startswith("best.")}
        for i, parameter in enumerate(self.parameters):
            if f"momentum.{i}" in state:
                self.optimiser.state[parameter]["momentum_buffer"] = state[f"momentum.{i}"].to(self.device)
        step, self.best_error, self.best_loss = state["chosen"].tolist()
        self.best_step = int(step)
        self.rows = [tuple(row) for row in state["rows"].tolist()]
        return int(state["step"])

    def load_best(self) -> None:
        self.head.load_state_dict(self.best)
        self.head.eval()


def _usable_images(source: WindowSource, kind: str) -> NDArray[np.int64]:
    """Images with a positive; SppnetError if there is none."""
    usable = [i for i, image in enumerate(source.labelled) if len(image.positives)]
    if not usable:
        raise SppnetError(
            f"no {kind} window overlaps an object by finetune.positive_overlap; check the proposals and the annotations"
        )
    return np.array(usable, np.int64)


def _batches(
    loader: ThreadPoolExecutor,
    source: WindowSource,
    usable: NDArray[np.int64],
    background: int,
    settings: FinetuneSettings,
    steps: range,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pooled, labels) of every step, in order, pooled ahead by the loader's one thread."""
    share = max(1, settings.batch // distributed.world_size())
    own = _with_batch(settings, share)

    def load(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((settings.seed, step, distributed.rank()))
        chosen = rng.choice(usable, min(settings.images_per_batch, len(usable)), replace=False)
        drawn = draw_batch([source.labelled[i] for i in chosen], background, own, rng)
        return _pool_batch(source, chosen, drawn, rng)

    waiting: list[Future[tuple[Tensor, Tensor]]] = []
    for step in steps:
        waiting.append(loader.submit(load, step))
        if len(waiting) > PREFETCH:
            yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()


def _with_batch(settings: FinetuneSettings, batch: int) -> FinetuneSettings:
    return settings.model_copy(update={"batch": batch})


def _pool_batch(
    source: WindowSource, images: NDArray[np.int64], drawn: Batch, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Pooled features and labels, grouped by image."""
    parts, labels = [], []
    for position, image in enumerate(images):
        own = drawn.image == position
        if own.any():
            parts.append(source.pool(int(image), drawn.row[own], rng))
            labels.append(drawn.label[own])
    return torch.cat(parts), torch.from_numpy(np.concatenate(labels))


def _validation_windows(source: WindowSource, background: int, settings: FinetuneSettings) -> tuple[Tensor, Tensor]:
    """(labels, pooled) of windows drawn once from all images of the source."""
    # Seeds are padded with zeros: (seed, 1) would be the stream of training step 1.
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(1,)))
    chosen = _usable_images(source, "validation")
    own = _with_batch(settings, settings.validate_windows)
    drawn = draw_batch([source.labelled[i] for i in chosen], background, own, rng)
    pooled, labels = _pool_batch(source, chosen, drawn, rng)
    return labels, pooled


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _csv(rows: Sequence[tuple[float, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([int(row[0]), *row[1:]] for row in rows)
    return text.getvalue()


@contextlib.contextmanager
def _tensorboard(folder: Path, done: int) -> Iterator[SummaryWriter]:
    writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1 if done else None)
    try:
        yield writer
    finally:
        writer.close()
