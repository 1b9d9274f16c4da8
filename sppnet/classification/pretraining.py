"""Pre-train backbone and head by SPP classification of crops, alternating between sizes (sec. 2.3).

For backbones without pretrained weights and data sets without a large classification set beside them: the crops are
the training objects themselves, and windows of the background. All sizes share all weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sppnet import distributed
from sppnet.artifacts import read_tensors, write_tensors
from sppnet.backbones.backbone import Backbone
from sppnet.config import Config, PretrainSettings
from sppnet.errors import SppnetError, counted
from sppnet.images import normalise, prepare, read_image
from sppnet.jobs import progress_bar
from sppnet.models.sppnet import SPPNet, build_head, momentum_of, restore_momentum, seed_dropout
from sppnet.records import ImageRecord, pairwise_iou

CONTEXT = 1.4  # side of a stored crop over the longer side of its object: margin for shifts and other scales
BACKGROUND_OVERLAP = 0.3  # a background crop overlaps every object less than this
SAVE_EVERY = 200  # steps from one checkpoint to the next


def pretrain_network(
    backbone: Backbone,
    records: Sequence[ImageRecord],
    classes: Sequence[str],
    config: Config,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> tuple[SPPNet, str]:
    """Train `backbone` and a new head on crops of the records; returns the network, frozen in eval mode, and a summary.

    The backbone is trained in place, one epoch at one size, the next at another (sec. 2.3). With a file `checkpoint`
    the state is saved there now and then, and a later call goes on from it, with the same result as without the
    interruption; the file is the caller's to delete. Raises SppnetError where no record holds an object of the classes,
    and for a loss that is not finite.
    """
    settings = config.pretrain
    crops, labels = cut_crops(records, classes, max(settings.sizes), settings.seed, config.data.train_on_difficult)
    head = build_head(backbone.channels, config.pyramid.levels, len(classes) + 1, config.head, settings.seed)
    head.dropout = settings.dropout
    device = next(backbone.parameters()).device
    network = SPPNet(backbone.requires_grad_(True), config.pyramid.levels, head.to(device)).train()
    trainer = _Trainer(network, settings)
    done = trainer.restore(checkpoint) if checkpoint is not None and checkpoint.exists() else 0
    distributed.barrier()  # with nothing left to do the first process would delete the state before others read it
    counts = np.bincount(labels)
    shares = 1 / (counts[labels] * np.count_nonzero(counts))  # every class is drawn as often as any other
    batch = max(1, settings.batch // distributed.world_size())
    epoch_steps = max(1, len(crops) // settings.batch)
    shown = progress and distributed.is_main()
    devices = [device] if device.type == "cuda" else []  # all GPUs by default, each with a context
    with torch.random.fork_rng(devices=devices):
        for step in progress_bar(range(done, settings.steps), "pretrain", "step", settings.steps, done, shown):
            rng = np.random.default_rng((settings.seed, step, distributed.rank()))  # of this step alone, for resuming
            seed_dropout(device, int(rng.integers(1 << 62)))
            size = settings.sizes[step // epoch_steps % len(settings.sizes)]
            chosen = rng.choice(len(crops), size=batch, p=shares)
            views = random_views(crops[torch.from_numpy(chosen)], size, max(settings.sizes), rng)
            trainer.train_step(step, views, torch.from_numpy(labels[chosen]))
            if checkpoint is not None and (step + 1) % SAVE_EVERY == 0:
                trainer.save(checkpoint, step + 1)
    trainer.check_loss()
    network.requires_grad_(False).eval()
    accuracy = float(trainer.sums[1]) / (settings.steps - settings.steps * 3 // 4)
    steps = counted(settings.steps, "step") + (f", {done} of them from before," if done else "")
    return network, f"{steps} on {counted(len(crops), 'crop')}, training accuracy {accuracy:.3f}"


def cut_crops(
    records: Sequence[ImageRecord], classes: Sequence[str], side: int, seed: int, difficult: bool = True
) -> tuple[Tensor, NDArray[np.int64]]:
    """Square crops around every object and as many of the background: (N, 3, s, s) uint8 RGB and labels (N,).

    s is `side` with a margin for shifts; label K stands for the background. Beyond the border of an image its edge
    pixels repeat. Without `difficult` such objects are left out, but are no background either.
    """
    rng = np.random.default_rng(seed)
    stored = round(side * CONTEXT)
    crops, labels = [], []
    for record in records:
        if record.annotation is None:
            continue
        annotation = record.annotation.of(tuple(classes))
        wanted = annotation if difficult else annotation.easy()
        if not len(wanted.boxes):
            continue
        image = read_image(record.path)
        # background: boxes of the sizes of the objects, anywhere in the image away from them
        objects = annotation.boxes.astype(np.float64)
        sides = np.repeat(annotation.boxes[:, 2:] - annotation.boxes[:, :2], 4, axis=0)
        sides = sides * rng.uniform(0.5, 1.2, (len(sides), 1))
        corner = rng.random((len(sides), 2)) * np.maximum(np.array(record.size)[::-1] - sides, 1)
        boxes = np.concatenate([corner, corner + sides], axis=1)
        away = pairwise_iou(boxes, objects).max(axis=1) < BACKGROUND_OVERLAP
        background = boxes[away][: len(wanted.boxes)]
        crops += [_cut(image, box, stored) for box in [*wanted.boxes, *background]]
        labels += [classes.index(name) for name in wanted.names] + [len(classes)] * len(background)
    if not crops:
        raise SppnetError(
            "pre-training needs annotated objects, but the training images hold none of the classes; check data.classes"
        )
    return torch.stack(crops).contiguous(memory_format=torch.channels_last), np.array(labels)


def random_views(crops: Tensor, size: int, largest: int, rng: np.random.Generator) -> Tensor:
    """Crops (B, 3, s, s) uint8 shifted, zoomed, flipped, their channels brighter or darker: (B, 3, size, size) float32.

    They are cut, at least 0.9 of `largest` pixels, before they are resized: only the resolution depends on `size`.
    """
    stored, count = crops.shape[-1], len(crops)
    sides = rng.integers(round(largest * 0.9), stored + 1, size=count)
    corners = (rng.random((count, 2)) * (stored - sides + 1)[:, None]).astype(np.int64)
    cut = [crops[i : i + 1, :, y : y + s, x : x + s] for i, (s, (x, y)) in enumerate(zip(sides, corners, strict=True))]
    views = torch.cat([F.interpolate(part, (size, size), mode="bilinear", antialias=True) for part in cut])
    flipped = torch.from_numpy(rng.random(count) < 0.5).view(-1, 1, 1, 1)
    gains = torch.from_numpy(rng.uniform(0.8, 1.2, (count, 3, 1, 1)).astype(np.float32))
    return torch.where(flipped, views.flip(3), views).mul(gains).clamp_(0, 255)


class _Trainer:
    """The network, its optimiser, SGD with a rate that falls linearly to zero, and their state on disk."""

    def __init__(self, network: SPPNet, settings: PretrainSettings) -> None:
        self.network, self.settings = network, settings
        self.shared = distributed.data_parallel(network)
        self.parameters = list(network.parameters())
        self.device = self.parameters[0].device
        rate, momentum, decay = settings.learning_rate, settings.momentum, settings.weight_decay
        self.optimiser = torch.optim.SGD(self.parameters, rate, momentum, weight_decay=decay, fused=True)
        self.sums = torch.zeros(2, device=self.device)  # loss; accuracy in the last quarter of the steps

    def train_step(self, step: int, views: Tensor, labels: Tensor) -> None:
        settings, weights = self.settings, self.network.backbone.weights
        self.optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 - step / settings.steps)
        pixels = views.flip(1) if weights.channel_order == "bgr" else views
        prepared = normalise(pixels, self.network.backbone.mean, weights.std)
        logits, labels = self.shared(prepared.to(self.device)), labels.to(self.device)
        self.optimiser.zero_grad()
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimiser.step()
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        self.sums += torch.stack([loss.detach(), accuracy * (step >= settings.steps * 3 // 4)])

    def check_loss(self) -> None:
        if not torch.isfinite(self.sums[0]):
            raise SppnetError(
                f"the loss of pre-training is not finite; lower pretrain.learning_rate={self.settings.learning_rate}"
            )

    def save(self, path: Path, step: int) -> None:
        self.check_loss()
        if not distributed.is_main():
            return
        momentum = momentum_of(self.optimiser, self.parameters)
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        write_tensors(path, {**momentum, **network, "step": torch.tensor(step), "sums": self.sums})

    def restore(self, path: Path) -> int:
        """Go on from a saved state; returns the steps done."""
        state = read_tensors(path)
        self.network.load_state_dict({n[8:]: t for n, t in state.items() if n.startswith("network.")})
        restore_momentum(self.optimiser, self.parameters, state)
        self.sums = state["sums"].to(self.device)
        return int(state["step"])


def _cut(image: NDArray[np.uint8], box: NDArray[np.floating], side: int) -> Tensor:
    """The square around a box, with context, as (3, side, side) uint8."""
    centre, half = (box[:2] + box[2:]) / 2, max(float((box[2:] - box[:2]).max()), 2.0) * CONTEXT / 2
    (x1, y1), (x2, y2) = np.rint(centre - half).astype(int), np.rint(centre + half).astype(int)
    rows = np.clip(np.arange(y1, max(y2, y1 + 1)), 0, image.shape[0] - 1)
    columns = np.clip(np.arange(x1, max(x2, x1 + 1)), 0, image.shape[1] - 1)
    part = np.ascontiguousarray(image[rows[:, None], columns[None, :]])
    resized = prepare(part, (side, side), "rgb", (0, 0, 0), (1, 1, 1))[0]
    return resized.round().clamp(0, 255).to(torch.uint8)
