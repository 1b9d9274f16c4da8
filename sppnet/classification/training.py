"""Train a classifier (sec. 3.1): the whole network at one size or several, or its head alone on features of images.

It resumes: <run>/training-<digest>/state.safetensors holds the last epoch; the digest covers settings, images and the
weights that training starts from. Features for a head alone are kept when all are there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sppnet import distributed
from sppnet.artifacts import (
    check_writable,
    digest_of,
    read_json,
    read_tensors,
    tensors_digest,
    write_tensors,
    write_text,
)
from sppnet.backbones.runtime import device_of, resolve_precision
from sppnet.classification.classifier import DESCRIPTION, Classifier, build_network
from sppnet.classification.dataset import ClassData, epoch_batches, load_class_data
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.sources import FeatureSource, ImageSource, Source
from sppnet.config_files import dump_config
from sppnet.errors import ArtifactError, SppnetError
from sppnet.jobs import progress_bar
from sppnet.models.sppnet import SPPNet, momentum_of, restore_momentum, seed_dropout

log = logging.getLogger("sppnet")

HISTORY, STATE = "history.csv", "state.safetensors"
COLUMNS = ("epoch", "size", "learning_rate", "loss", "val_loss", "top1_error", "top5_error", "seconds")
DIVISIONS = 2  # sec. 3.1: the rate is divided by 10 twice; where the loss stops once more, training ends


def train_classifier(
    config: ClassifierConfig, run: Path, device: torch.device, epochs: int | None = None, progress: bool = True
) -> Classifier:
    """Train as `config` says and write <run>/classifier, config.yaml, split.json and history.csv.

    `epochs` takes the place of training.epochs: more of them go on from a finished training. A call with the same
    settings and images goes on from the last epoch, with the same result as without the interruption; one with others
    begins anew and replaces the classifier. Under torchrun the processes share every batch. Raises SppnetError for
    images and weights that cannot be used and for a loss that is not finite.
    """
    settings = config.training.model_copy(update={"epochs": epochs or config.training.epochs})
    config = config.model_copy(update={"training": settings})
    data = load_class_data(config.data, run)
    log.info("%s", data)
    network = build_network(config, len(data.classes), start=True).to(device)
    few, processes = min(settings.batch, len(data.train.images)), distributed.world_size()
    if few < processes:
        raise SppnetError(f"expected an image of a batch of {few} for each of {processes} processes; start fewer")
    folder = run / f"training-{_digest(config, data, network)}"
    check_writable(run)
    if distributed.is_main():
        if _made_by(run) != folder.name:  # the classifier there is of another training
            (run / DESCRIPTION).unlink(missing_ok=True)
        write_text(run / "config.yaml", dump_config(config))
        data.write(run)
    distributed.barrier()
    whole = settings.train_backbone
    source: Source = (
        ImageSource(network, data, config) if whole else FeatureSource(network, data, config, run, progress)
    )
    if not (folder / STATE).exists():
        _scale_input(network, source, config)
    _Trainer(network, source, config, run, folder).train(progress)
    if distributed.is_main():
        Classifier(network, data.classes, config).save(run, folder.name)
    distributed.barrier()
    return Classifier.load(run, device)


def _made_by(run: Path) -> str:
    """The training that the classifier of a run is of; "" where none can be read."""
    try:
        return str(read_json(run / DESCRIPTION)["training"])
    except (ArtifactError, TypeError, KeyError):
        return ""


def rate_divisions(losses: Sequence[float], patience: int) -> int:
    """How often the rate has been divided: whenever no loss of `patience` epochs fell below all before (sec. 3.1)."""
    best, waited, divisions = math.inf, 0, 0
    for loss in losses:
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        if waited == patience:
            waited, divisions = 0, divisions + 1
    return divisions


def _digest(config: ClassifierConfig, data: ClassData, network: SPPNet) -> str:
    """Names a training by what decides its result; of files the contents, of the schedule all but where it ends."""
    files = {"head": {"checkpoint"}, "backbone": {"weights": {"file", "mean_image"}}}
    unnamed: Any = {"data": True, "training": {"epochs"}, **files}
    own = config.model_dump(mode="json", exclude=unnamed)
    start = tensors_digest({**network.state_dict(), "mean": torch.as_tensor(network.backbone.mean)})
    return digest_of(own, data.classes, data.split["train"], data.split["held_out"], start)


@torch.no_grad()
def _scale_input(network: SPPNet, source: Source, config: ClassifierConfig) -> None:
    """Scale what enters fc6 as head.input_norm says; an fc6 that was trained goes on computing what it did."""
    if config.head.input_norm is None:
        return
    mean = float(torch.cat([rows.norm(dim=1).cpu() for rows in source.pooled()]).mean())
    if not (math.isfinite(mean) and mean > 0):
        raise SppnetError(f"head.input_norm: expected features of a positive norm, got {mean}; check the weights")
    scale = config.head.input_norm / mean
    if config.head.init != "random":
        network.head.fc6.weight.mul_(network.head.input_scale / scale)
    network.head.input_scale.fill_(scale)


class _Trainer:
    """What is trained, its optimiser, the history, and their state on disk."""

    def __init__(self, network: SPPNet, source: Source, config: ClassifierConfig, run: Path, folder: Path) -> None:
        self.source, self.settings, self.run, self.folder = source, config.training, run, folder
        self.device = device_of(network)
        self.trained = source.trained.requires_grad_(True)
        self.shared = distributed.data_parallel(self.trained)
        self.parameters = list(self.trained.parameters())
        rate, momentum, decay = self.settings.learning_rate, self.settings.momentum, self.settings.weight_decay
        self.optimiser = torch.optim.SGD(self.parameters, rate, momentum, weight_decay=decay, fused=True)
        self.half = resolve_precision(config.precision, self.device) == "bfloat16"
        self.rows: list[list[float]] = []  # loss, val_loss, top1_error, top5_error, seconds of every epoch

    def train(self, progress: bool = True) -> None:
        """Go on from the saved state until the last epoch, or until the plateau after the last division of the rate."""
        self._restore()
        distributed.barrier()
        done, epochs = len(self.rows), self.settings.epochs
        steps = len(epoch_batches(self.source.count, 0, self.settings))
        if done:
            log.info("%d of %d epochs reused", done, max(done, epochs))
        bar = progress_bar(range(done * steps, epochs * steps), "train", "step", epochs * steps, done * steps, progress)
        devices = [self.device] if self.device.type == "cuda" else []  # all GPUs by default, each with a context
        with bar, torch.random.fork_rng(devices=devices):
            while len(self.rows) < epochs and self._divisions() <= DIVISIONS:
                row = self._epoch(len(self.rows), bar.update)
                bar.set_postfix(loss=f"{row[0]:.3f}", val_error=f"{row[2]:.3f}", refresh=False)
        if distributed.is_main():  # a power cut can have left the one of an earlier epoch
            write_text(self.run / HISTORY, self._history())
        if self._divisions() > DIVISIONS:
            log.info("the validation loss has stopped falling: training ends after %d epochs", len(self.rows))

    def _divisions(self) -> int:
        return rate_divisions([row[1] for row in self.rows], self.settings.patience)

    def _epoch(self, epoch: int, step_done: Callable[[], object]) -> list[float]:
        start = time.monotonic()
        self.optimiser.param_groups[0]["lr"] = self.settings.learning_rate / 10 ** self._divisions()
        self.trained.train()
        total, steps = torch.zeros((), device=self.device), 0
        for step, (inputs, labels) in enumerate(self.source.epoch(epoch)):
            # the same dropout after a resume; 2: other streams are of the order and of the views
            own = np.random.SeedSequence((self.settings.seed, epoch, step, distributed.rank(), 2))
            seed_dropout(self.device, int(own.generate_state(1)[0]))
            total += self._step(inputs, labels)
            steps += 1
            step_done()
        distributed.take_from_main(self.trained.buffers())  # statistics of batch norm are each process's own
        losses = [loss for (loss,) in distributed.in_order(lambda _: [total], distributed.world_size())]
        loss, measured = float(torch.stack(losses).double().mean()) / steps, self._validate()
        if not math.isfinite(loss) or not math.isfinite(measured[0]):
            advice = f"lower training.learning_rate={self.settings.learning_rate}, or set head.input_norm=300"
            raise SppnetError(f"the loss is not finite in epoch {epoch + 1}; {advice}")
        self.rows.append([loss, *measured, time.monotonic() - start])
        self._save()
        return self.rows[-1]

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        inputs, labels = inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = self.shared(inputs).float()
        loss = F.cross_entropy(logits, labels)
        self.optimiser.zero_grad()
        # The mean over processes is that over images, whatever their shares.
        batch = min(self.settings.batch, self.source.count)
        (loss * (len(labels) * distributed.world_size() / batch)).backward()
        self.optimiser.step()
        return loss.detach()

    @torch.no_grad()
    def _validate(self) -> list[float]:
        """[loss, top-1 error, top-5 error] of the validation images, the same in every process."""
        self.trained.eval()
        own = self.source.validation()

        def measure(_: int) -> list[Tensor]:
            inputs, labels = next(own)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                logits = self.trained(inputs.to(self.device)).float().cpu()
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            return [torch.stack([loss, (~best[:, 0]).sum(), (~best.any(1)).sum(), torch.tensor(len(labels))]).double()]

        sums = torch.stack([sums for (sums,) in distributed.in_order(measure, self.source.validation_count)]).sum(0)
        return (sums[:3] / sums[3]).tolist()

    def _save(self) -> None:
        if not distributed.is_main():
            return
        own = {f"trained.{name}": tensor for name, tensor in self.trained.state_dict().items()}
        momentum, rows = momentum_of(self.optimiser, self.parameters), torch.tensor(self.rows, dtype=torch.float64)
        write_tensors(self.folder / STATE, {**own, **momentum, "rows": rows})
        write_text(self.run / HISTORY, self._history())

    def _restore(self) -> None:
        if (self.folder / STATE).exists():
            state = read_tensors(self.folder / STATE)
            own = {name.removeprefix("trained."): t for name, t in state.items() if name.startswith("trained.")}
            self.trained.load_state_dict(own)
            restore_momentum(self.optimiser, self.parameters, state)
            self.rows = state["rows"].tolist()

    def _history(self) -> str:
        sizes, losses, lines = self.settings.sizes, [row[1] for row in self.rows], [",".join(COLUMNS)]
        named = [f"{min(sizes)}-{max(sizes)}"] if self.settings.size_choice == "range" else sizes
        for epoch, row in enumerate(self.rows):
            size = named[epoch % len(named)]
            rate = self.settings.learning_rate / 10 ** rate_divisions(losses[:epoch], self.settings.patience)
            lines.append(",".join(map(str, [epoch + 1, size, rate, *row])))
        return "\n".join(lines) + "\n"
