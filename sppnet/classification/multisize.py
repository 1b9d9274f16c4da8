"""Pre-train trunk and head by SPP classification of crops, alternating between sizes (sec. 2.3).

For trunks without pretrained weights and data sets without a large classification set beside them: the crops are
the training objects themselves, and windows of the background. All sizes share all weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sppnet import distributed
from sppnet.boxes import as_boxes, pairwise_iou
from sppnet.config import Config, PretrainSettings, WeightsSettings
from sppnet.images import prepare, read_image
from sppnet.network.sppnet import SPPNet, build_head
from sppnet.network.trunks import Trunk
from sppnet.records import Annotation, ImageRecord

CONTEXT = 1.4  # side of a stored crop over the longer side of its object: room for shifts and other scales
BACKGROUND_OVERLAP = 0.3  # a background crop overlaps every object less than this


def pretrain_network(
    trunk: Trunk, records: Sequence[ImageRecord], classes: Sequence[str], config: Config, progress: bool = True
) -> tuple[SPPNet, str]:
    """Train `trunk` and a new head on crops of the records; returns the network, frozen in eval mode, and a summary.

    The trunk is trained in place. Raises ValueError where no record holds an object of the classes.
    """
    settings = config.pretrain
    difficult = config.data.train_on_difficult
    crops, labels = cut_crops(records, classes, max(settings.sizes), settings.seed, difficult)
    head = build_head(trunk.channels, config.pyramid.levels, len(classes) + 1, config.head, settings.seed)
    head.dropout = settings.dropout
    device = next(trunk.parameters()).device
    network = SPPNet(trunk.requires_grad_(True), config.pyramid.levels, head.to(device)).train()
    accuracy = _train(network, crops, labels, settings, progress)
    network.requires_grad_(False).eval()
    return network, f"{settings.steps} steps on {len(crops)} crops, training accuracy {accuracy:.3f}"


def cut_crops(
    records: Sequence[ImageRecord], classes: Sequence[str], side: int, seed: int, difficult: bool = True
) -> tuple[Tensor, Tensor]:
    """Square crops around every object and as many of the background: (N, 3, s, s) uint8 RGB and labels (N,).

    s is `side` with room for shifts; label K stands for the background. Without `difficult` such objects are left out,
    but are no background either.
    """
    rng = np.random.default_rng(seed)
    stored = round(side * CONTEXT)
    crops, labels = [], []
    for record in records:
        annotation = (record.annotation or _no_objects()).of(tuple(classes))
        wanted = annotation if difficult else annotation.easy()
        if not len(wanted.boxes):
            continue
        image = read_image(record.path)
        around = [_square(box, CONTEXT) for box in wanted.boxes]
        away = _background_boxes(annotation, record.size, rng)[: len(wanted.boxes)]
        background = [_square(box, CONTEXT) for box in away]
        crops += [_cut(image, square, stored) for square in around + background]
        labels += [classes.index(name) for name in wanted.names] + [len(classes)] * len(background)
    if not crops:
        raise ValueError(
            "pre-training needs annotated objects, but the training images hold none of the classes; check data.classes"
        )
    return torch.stack(crops).contiguous(memory_format=torch.channels_last), torch.tensor(labels)


def _train(network: SPPNet, crops: Tensor, labels: Tensor, settings: PretrainSettings, progress: bool) -> float:
    """SGD with a rate that falls linearly to zero; one epoch at one size, the next at another (sec. 2.3)."""
    optimiser = torch.optim.SGD(
        network.parameters(),
        settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    parameters = list(network.parameters())
    device = parameters[0].device
    rng = np.random.default_rng((settings.seed, distributed.rank()))
    epoch_steps = max(1, len(crops) // settings.batch)
    shares = _equal_shares(labels)
    right, total = torch.zeros((), device=device), torch.zeros((), device=device)
    disable = None if progress and distributed.is_main() else True
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for step in tqdm(range(settings.steps), desc="pretrain", unit="step", disable=disable):
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * (1 - step / settings.steps)
            size = settings.sizes[step // epoch_steps % len(settings.sizes)]
            chosen = rng.choice(len(crops), size=settings.batch, p=shares)
            views = _random_views(crops, chosen, size, max(settings.sizes), rng)
            pixels = _prepared(views, network.trunk.weights).to(device)
            wanted = labels[torch.from_numpy(chosen)].to(device)
            logits = network(pixels)
            optimiser.zero_grad()
            loss = F.cross_entropy(logits, wanted)
            loss.backward()
            total += loss.detach()
            distributed.average_gradients(parameters)
            optimiser.step()
            if step >= settings.steps * 3 // 4:
                right += (logits.argmax(1) == wanted).float().mean()
    if not torch.isfinite(total):
        raise ValueError(
            f"the loss of pre-training is not finite; lower pretrain.learning_rate={settings.learning_rate}"
        )
    return float(right) / (settings.steps - settings.steps * 3 // 4)


def _equal_shares(labels: Tensor) -> NDArray[np.float64]:
    """The probability of each crop (N,) with which every class is drawn as often as any other."""
    counts = np.bincount(labels.numpy())
    return 1 / (counts[labels.numpy()] * np.count_nonzero(counts))


def _random_views(
    crops: Tensor, chosen: NDArray[np.int64], size: int, largest: int, rng: np.random.Generator
) -> Tensor:
    """The chosen crops, shifted, zoomed, flipped, their channels brighter or darker: (B, 3, size, size) float32, 0-255.

    They are cut before they are resized, so only the resolution depends on `size`. Resizing bytes, not floats, takes
    3 ms for 64 of them instead of 17.
    """
    stored, count = crops.shape[-1], len(chosen)
    sides = rng.integers(round(largest * 0.9), stored + 1, size=count)
    corners = (rng.random((count, 2)) * (stored - sides + 1)[:, None]).astype(np.int64)
    views = torch.cat(
        [
            F.interpolate(
                crops[i : i + 1, :, y : y + side, x : x + side], (size, size), mode="bilinear", antialias=True
            )
            for i, side, (y, x) in zip(chosen.tolist(), sides.tolist(), corners.tolist(), strict=True)
        ]
    )
    flipped = torch.from_numpy(rng.random(count) < 0.5).view(-1, 1, 1, 1)
    gains = torch.from_numpy(rng.uniform(0.8, 1.2, (count, 3, 1, 1)).astype(np.float32))
    return torch.where(flipped, views.flip(3), views).mul(gains).clamp_(0, 255)


def _prepared(pixels: Tensor, weights: WeightsSettings) -> Tensor:
    """RGB pixels (N, 3, H, W), 0-255, as the trunk expects its input."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (weights.mean, weights.std))
    return ((pixels.flip(1) if weights.channel_order == "bgr" else pixels) - mean) / std


def _square(box: NDArray[np.floating], context: float) -> NDArray[np.float64]:
    centre, side = (box[:2] + box[2:]) / 2, max(float((box[2:] - box[:2]).max()), 2.0) * context
    return np.concatenate([centre - side / 2, centre + side / 2])


def _cut(image: NDArray[np.uint8], square: NDArray[np.float64], side: int) -> Tensor:
    """A square of the image as (3, side, side) uint8; beyond the border the edge pixels repeat."""
    x1, y1, x2, y2 = np.rint(square).astype(int)
    rows = np.clip(np.arange(y1, max(y2, y1 + 1)), 0, image.shape[0] - 1)
    columns = np.clip(np.arange(x1, max(x2, x1 + 1)), 0, image.shape[1] - 1)
    part = np.ascontiguousarray(image[rows[:, None], columns[None, :]])
    resized = prepare(part, (side, side), "rgb", (0, 0, 0), (1, 1, 1))[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def _background_boxes(annotation: Annotation, size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """As many boxes as objects, of their sizes, placed anywhere in the image away from them."""
    height, width = size
    sides = annotation.boxes[:, 2:] - annotation.boxes[:, :2]
    sides = np.repeat(sides, 4, axis=0) * rng.uniform(0.5, 1.2, (4 * len(sides), 1))
    corner = rng.random((len(sides), 2)) * np.maximum([width, height] - sides, 1)
    boxes = as_boxes(np.concatenate([corner, corner + sides], axis=1))
    away = pairwise_iou(boxes, as_boxes(annotation.boxes)).max(axis=1, initial=0) < BACKGROUND_OVERLAP
    return boxes[away][: len(annotation.boxes)]


def _no_objects() -> Annotation:
    return Annotation(np.zeros((0, 4), np.float32), (), np.zeros(0, bool))
