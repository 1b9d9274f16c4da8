"""Train fc6, fc7 and a (K+1)-way classifier on sampled windows, the backbone frozen (sec. 4.1)."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sppnet import distributed
from sppnet.artifacts import read_tensors, write_tensors, write_text
from sppnet.config import FinetuneSettings
from sppnet.detection.training_windows import FinetuneWindows, LabelledWindows
from sppnet.errors import SppnetError
from sppnet.jobs import progress_bar
from sppnet.models.sppnet import SPPHead, momentum_of, restore_momentum, seed_dropout

logger = logging.getLogger("sppnet")

COLUMNS = ("step", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")


@dataclass(frozen=True)
class FinetuneSummary:
    best_step: int
    best_error: float  # on the validation windows
    untrained_error: float  # of always choosing background
    steps: int
    reused_steps: int


def finetune_head(
    head: SPPHead,
    train: FinetuneWindows,
    validation: FinetuneWindows,
    background: int,
    settings: FinetuneSettings,
    folder: Path,
    progress: bool = True,
    stage: str = "finetune",
    precision: str = "float32",
) -> FinetuneSummary:
    """Train `head` in place; it ends with the weights of the step that had the smallest validation error.

    The weights that it starts with are no candidate. `background` is the index of the background class, K. `stage`
    names it in progress and errors; `precision` is that of the products ("float32" or "bfloat16").
    Losses go to folder/log.csv. The state is saved at every validation, and a later call with the same folder goes on
    from there, with the same result as without the interruption. Under torchrun the processes share the windows of a
    batch, which are those of one process; only dropout, and scales in an image that two of them share, differ.
    Raises SppnetError where no window is a positive, for a loss that is not finite, and for a batch smaller than that.
    """
    if settings.batch < distributed.world_size():
        few = f"finetune.batch={settings.batch}, less than a window for each of {distributed.world_size()} processes"
        raise SppnetError(f"{few}; raise it, or start fewer")
    with_positives = _with_positives(train, "training")
    trainer = _Trainer(head, settings, folder, stage, precision)
    done = trainer.restore()
    distributed.barrier()  # with nothing left to do the first process would delete the state before others read it
    total = sum(settings.steps)
    devices = [trainer.device] if trainer.device.type == "cuda" else []  # all GPUs by default, each with a context
    ahead = 0 if trainer.device.type == "cpu" else 1  # a CPU does one after the other: both use all of its cores
    with _loaders() as loaders, torch.random.fork_rng(devices=devices):
        pooled, labels = validation_windows(validation, background, settings)
        batches = _batches(loaders, train, with_positives, background, settings, range(done, total), ahead)
        bar = progress_bar(range(done, total), stage, "step", total, done, progress and distributed.is_main())
        for step in bar:
            trainer.train_step(step, *next(batches))
            if (step + 1) % settings.validate_every == 0 or step + 1 == total:
                row = trainer.validate(step + 1, pooled, labels)
                bar.set_postfix(loss=f"{row[1]:.3f}", val_error=f"{1 - row[4]:.3f}", refresh=False)
    head.load_state_dict(trainer.best)
    head.eval()
    untrained = float((labels != background).float().mean())
    return FinetuneSummary(trainer.best_step, trainer.best_error, untrained, total, done)


@contextlib.contextmanager
def _loaders() -> Iterator[ThreadPoolExecutor]:
    """As many threads of ours as torch has, in each of which torch computes with one; the caller's number stays."""
    count = torch.get_num_threads()
    together = threading.Barrier(count)

    def start(_: int) -> None:
        torch.get_num_threads()  # a thread that was not asked for its number forgets what it is set to
        torch.set_num_threads(1)
        together.wait()

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(start, range(count)))
        torch.set_num_threads(count)  # other threads take what was set last
        yield threads


class _Trainer:
    """The optimiser, its state on disk and the best head so far."""

    def __init__(self, head: SPPHead, settings: FinetuneSettings, folder: Path, stage: str, precision: str) -> None:
        self.head, self.settings, self.folder, self.stage = head.train(), settings, folder, stage
        self.shared = distributed.data_parallel(head)
        self.device = head.fc6.weight.device
        self.half = precision == "bfloat16"
        weights = [p for name, p in head.named_parameters() if not name.endswith("bias")]
        biases = [p for name, p in head.named_parameters() if name.endswith("bias")]
        self.parameters = weights + biases
        groups = [{"params": weights, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}]
        self.optimiser = torch.optim.SGD(groups, lr=settings.learning_rates[0], momentum=settings.momentum, fused=True)
        self.rows: list[tuple[float, ...]] = []
        self.sums = torch.zeros(3, device=self.device)  # loss, correct windows, windows since the last validation
        self.best_step, self.best_error, self.best_loss = 0, float("inf"), float("inf")
        self.best = {name: tensor.clone() for name, tensor in head.state_dict().items()}

    def train_step(self, step: int, pooled: Tensor, labels: Tensor) -> None:
        rate = self._rate(step)
        for group, factor in zip(self.optimiser.param_groups, (1.0, self.settings.bias_rate), strict=True):
            group["lr"] = rate * factor
        own = np.random.SeedSequence((self.settings.seed, step, distributed.rank()))
        seed_dropout(self.device, int(own.generate_state(1)[0]))  # the same after a resume
        pooled, labels = pooled.to(self.device), labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = self.shared(pooled).float()
        loss = F.cross_entropy(logits, labels)
        self.optimiser.zero_grad()
        # The mean over processes is that over windows, whatever their shares.
        (loss * (len(labels) * distributed.world_size() / self.settings.batch)).backward()
        self.optimiser.step()
        right = (logits.detach().argmax(1) == labels).float().sum()
        self.sums += torch.stack([loss.detach() * len(labels), right, torch.full_like(right, len(labels))])

    def validate(self, step: int, pooled: Tensor, labels: Tensor) -> tuple[float, ...]:
        """Log a row, keep the head if it is the best, save the state; returns the row."""
        train_loss, right, count = self.sums.tolist()
        self.head.eval()
        with torch.no_grad():
            logits = torch.cat([self.head(part.to(self.device)).cpu() for part in pooled.split(512)])
        self.head.train()
        val_loss = float(F.cross_entropy(logits, labels))
        val_accuracy = float((logits.argmax(1) == labels).float().mean())
        if not np.isfinite(train_loss) or not np.isfinite(val_loss):
            advice = f"lower {self.stage}.learning_rates, or set head.input_norm=300"
            raise SppnetError(f"the loss is not finite at step {step}; {advice}")
        row = (step, train_loss / count, right / count, val_loss, val_accuracy, self._rate(step - 1))
        self.rows.append(row)
        self.sums.zero_()
        if (1 - val_accuracy, val_loss) < (self.best_error, self.best_loss):
            self.best_step, self.best_error, self.best_loss = step, 1 - val_accuracy, val_loss
            self.best = {name: tensor.clone() for name, tensor in self.head.state_dict().items()}
        logger.debug("%s step %d: loss %.4f accuracy %.4f, validation %.4f %.4f", self.stage, *row[:5])
        self._save(step)
        return row

    def _rate(self, step: int) -> float:
        return self.settings.learning_rates[int(np.searchsorted(np.cumsum(self.settings.steps), step, side="right"))]

    def _save(self, step: int) -> None:
        if not distributed.is_main():
            return
        momentum = momentum_of(self.optimiser, self.parameters)
        now = {f"now.{name}": tensor for name, tensor in self.head.state_dict().items()}
        best = {f"best.{name}": tensor for name, tensor in self.best.items()}
        progress = {
            "step": torch.tensor(step),
            "chosen": torch.tensor([self.best_step, self.best_error, self.best_loss], dtype=torch.float64),
            "rows": torch.tensor(self.rows, dtype=torch.float64),
        }
        write_tensors(self.folder / "checkpoint.safetensors", {**momentum, **now, **best, **progress})
        lines = [COLUMNS, *([int(row[0]), *row[1:]] for row in self.rows)]
        write_text(self.folder / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))

    def restore(self) -> int:
        """Continue from the saved state, if there is one; returns the steps done."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return 0
        state = read_tensors(path)
        self.head.load_state_dict({n[4:]: t for n, t in state.items() if n.startswith("now.")})
        self.best = {n[5:]: t.to(self.device) for n, t in state.items() if n.startswith("best.")}
        restore_momentum(self.optimiser, self.parameters, state)
        step, self.best_error, self.best_loss = state["chosen"].tolist()
        self.best_step = int(step)
        self.rows = [tuple(row) for row in state["rows"].tolist()]
        return int(state["step"])


def draw_batch(
    images: Sequence[LabelledWindows], background: int, settings: FinetuneSettings, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`settings.batch` windows from these images, `positive_share` of them positive, with replacement.

    (3, B): position of the image in `images`, row of the window in it, class (`background` for a negative).
    Every image gives the same number where it can, so that one crowded image does not fill the batch. With
    `settings.balance` every class of an image is as likely: of a small object few windows are positives. Where the
    images hold no positives (or no negatives) at all the batch is made of the others; it is empty if there are neither.
    """
    wanted = round(settings.batch * settings.positive_share)
    has_positives = [i for i, image in enumerate(images) if len(image.positives)]
    has_negatives = [i for i, image in enumerate(images) if len(image.negatives)]
    if not has_positives:
        wanted = 0
    elif not has_negatives:
        wanted = settings.batch
    rows = []
    for i in _draw_evenly(has_positives, wanted, rng):
        labels = images[i].labels
        own = np.flatnonzero(labels == rng.choice(np.unique(labels))) if settings.balance else np.arange(len(labels))
        chosen = own[rng.integers(len(own))]
        rows.append((i, images[i].positives[chosen], labels[chosen]))
    for i in _draw_evenly(has_negatives, settings.batch - wanted, rng):
        rows.append((i, rng.choice(images[i].negatives), background))
    return np.array(rows, np.int64).reshape(-1, 3).T


def choose_images(
    images: NDArray[np.int64], objects_only: NDArray[np.bool_], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """At most `count` of the images (N,) for a batch: half of them such as show objects alone, where there are any.

    The others, at least one, have the negatives.
    """
    others = images[~objects_only]
    half = min(count // 2, len(images) - len(others))
    chosen = [rng.choice(others, min(count - half, len(others)), replace=False)]
    chosen += [rng.choice(images[objects_only], half, replace=False)] if half else []
    return np.concatenate(chosen)


def validation_windows(source: FinetuneWindows, background: int, settings: FinetuneSettings) -> tuple[Tensor, Tensor]:
    """(pooled, labels) of windows drawn once from all images of the source."""
    # Seeds are padded with zeros: (seed, 1) would be the stream of training step 1.
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(1,)))
    own = settings.model_copy(update={"batch": settings.validate_windows})
    drawn, labels = _draw(source, _with_positives(source, "validation"), background, own, rng)
    return torch.cat([source.pool(*one) for one in drawn]), labels


def _draw_evenly(choices: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """`count` of the choices, each as often as any other, give or take one."""
    if not choices or not count:
        return []
    rounds = [rng.permutation(choices) for _ in range(math.ceil(count / len(choices)))]
    return np.concatenate(rounds)[:count].tolist()


def _with_positives(source: FinetuneWindows, kind: str) -> NDArray[np.int64]:
    """Images with a positive; SppnetError if there is none."""
    found = [i for i, image in enumerate(source.labelled) if len(image.positives)]
    if not found:
        raise SppnetError(
            f"no {kind} window overlaps an object by finetune.positive_overlap; check annotations and windows"
        )
    return np.array(found, np.int64)


def _batches(
    loaders: ThreadPoolExecutor,
    source: FinetuneWindows,
    images: NDArray[np.int64],
    background: int,
    settings: FinetuneSettings,
    steps: range,
    ahead: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pooled, labels) of every step, in order; windows of so many further steps are pooled meanwhile."""
    waiting: list[tuple[Iterator[Tensor], Tensor]] = []
    alone = np.array([source.labelled[i].objects_only for i in images], dtype=bool)
    for step in steps:
        rng = np.random.default_rng((settings.seed, step))
        chosen = choose_images(images, alone, settings.images_per_batch, rng)
        drawn, labels = _draw(source, chosen, background, settings, rng, distributed.world_size())
        waiting.append((loaders.map(source.pool, *zip(*drawn, strict=True)), labels))
        if len(waiting) > ahead:
            parts, labels = waiting.pop(0)
            yield torch.cat(list(parts)), labels
    yield from ((torch.cat(list(parts)), labels) for parts, labels in waiting)


def _draw(
    source: FinetuneWindows,
    images: NDArray[np.int64],
    background: int,
    settings: FinetuneSettings,
    rng: np.random.Generator,
    parts: int = 1,
) -> tuple[list[tuple[int, NDArray[np.int64], np.random.Generator]], Tensor]:
    """What `source.pool` takes of each image, and the labels of all windows in that order; of `parts` its own."""
    position, row, label = draw_batch([source.labelled[i] for i in images], background, settings, rng)
    own = np.array_split(np.argsort(position, kind="stable"), parts)[distributed.rank() % parts]
    drawn = np.unique(position)
    rows = [row[own[position[own] == i]] for i in drawn]
    each = zip(images[drawn].tolist(), rows, rng.spawn(len(drawn)), strict=True)
    return [one for one in each if len(one[1])], torch.from_numpy(label[own])
