"""Windows of training images as short rows, computed once: pooled, and projected onto principal components (ours).

What low-rank layers do after fine-tuning is done first, so that the layers above train on hundreds of numbers a window
and never see a map. A row is basis · pooled − shift: the pooled features, centred, along the directions in which they
vary most (Zhang, Zou, He, Sun 2016, sec. 3.1, of features in place of responses), of unit mean square.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sppnet.artifacts import digest_of, has_arrays, map_arrays, write_arrays
from sppnet.config import FinetuneSettings, JointSettings
from sppnet.detection.box_regression import regression_targets
from sppnet.detection.training_windows import ImageWindows, TrainingWindows, label_windows
from sppnet.detection.window_features import BATCH, pool_projected
from sppnet.distributed import barrier, in_order, shard
from sppnet.errors import SppnetError
from sppnet.jobs import map_in_workers, progress_bar
from sppnet.models.sppnet import seed_dropout
from sppnet.proposals.search import read_windows
from sppnet.records import ImageRecord, flip_boxes, pairwise_iou, spread

SAMPLE_IMAGES = 64  # that choose principal components
SAMPLE_RATIO = 8  # windows of these in all, for each component
OVERSAMPLED = 32  # components that are computed and left out, since the last ones are the least exact
NEAR_MISS = 0.1  # sec. 4.1: the least IoU of its negatives
LABELS = FinetuneSettings(negative_overlap=(0.0, 0.5))  # positives from sec. 4.1's IoU on, background all below


@dataclass(frozen=True, eq=False)
class Projection:
    """Pooled features (R, D) -> rows (R, rank): basis (rank, D), shift (rank,); `kept` of the variance of a sample."""

    basis: Tensor
    shift: Tensor
    kept: float = 1.0

    def rows(self, pooled: Tensor, precision: str = "float32") -> Tensor:
        """Rows (R, rank) float32 of pooled features (R, D), the product in `precision`, as at test time."""
        kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        basis = self.basis.to(pooled.device, kind)
        return F.linear(pooled.to(kind), basis).float() - self.shift.to(pooled.device)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis, "shift": self.shift, "kept": torch.tensor(self.kept, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Projection:
        return cls(tensors["basis"], tensors["shift"], float(tensors["kept"]))


@torch.no_grad()
def fit_projection(pooled: Tensor, rank: int, seed: int = 0) -> Projection:
    """Onto the first `rank` principal components of pooled features (N, D), fewer where N or D is less.

    By a randomised method (Halko, Martinsson, Tropp 2011), the same for the same seed. SppnetError for no features.
    """
    if not len(pooled):
        raise SppnetError("no training image has a window; check proposals.min_side and the images")
    mean = pooled.mean(0)
    centred = pooled - mean
    with torch.random.fork_rng(devices=[pooled.device] if pooled.is_cuda else []):
        seed_dropout(pooled.device, seed)
        components = torch.svd_lowrank(centred, min(rank + OVERSAMPLED, *pooled.shape), niter=2)[2].T[:rank]
    total, kept = (float(part.square().sum()) for part in (centred, centred @ components.T))
    scale = (len(components) * len(pooled) / kept) ** 0.5 if kept > 0 else 1.0
    return Projection(components * scale, components @ mean * scale, kept / total if total > 0 else 1.0)


def sample_pooled(source: TrainingWindows, settings: JointSettings, progress: bool = True) -> Tensor:
    """Pooled features (N, D) of a sample of windows, half of them near objects where there are as many."""
    chosen = spread(range(len(source.records)), SAMPLE_IMAGES)
    each = max(2, -(-SAMPLE_RATIO * settings.rank // max(1, len(chosen))))

    def pool(place: int) -> list[Tensor]:
        found = source.image_windows(chosen[place])
        windows = found.windows[draw_windows(found, each, _generator(source, chosen[place], settings.seed))]
        return [source.features(chosen[place], windows, partial(pool_projected, levels=source.config.pyramid.levels))]

    every = progress_bar(in_order(pool, len(chosen)), "components", "image", len(chosen), shown=progress)
    width = source.backbone.channels * sum(n * n for n in source.config.pyramid.levels)
    return torch.cat([torch.empty(0, width), *(own.cpu() for (own,) in every)])


def draw_windows(found: ImageWindows, limit: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """At most `limit` rows of an image's windows: its objects first, up to half near one, others; each once."""
    count = len(found.objects)
    order = np.concatenate([np.arange(count), count + rng.permutation(len(found.windows) - count)])
    near = order[found.overlaps[order].max(axis=1, initial=0) >= LABELS.positive_overlap][: limit // 2]
    return np.concatenate([near, order[~np.isin(order, near)][: limit - len(near)]])


def rows_path(record: ImageRecord, folder: Path, flip: bool = False) -> Path:
    """Where the rows of an image lie; the name carries its content and its objects, of whatever class."""
    found = record.annotation
    objects = None if found is None else (found.boxes.tolist(), found.difficult.tolist())
    return replace(record, digest=digest_of(record.digest, objects)).path_in(folder, flip)


def embed_images(
    source: TrainingWindows, projection: Projection, folder: Path, flips: bool, tested: bool, progress: bool = True
) -> int:
    """Write the rows of every image, and with `flips` of its mirror image, to `folder`; complete files stay.

    Rows are of joint.windows windows of an image (`draw_windows`); of one that is `tested` of all its proposals.
    Returns how many files were written.
    """
    jobs = shard([(index, flip) for flip in (False, True)[: 1 + flips] for index in range(len(source.records))])
    path_in = ImageRecord.path_in if tested else rows_path
    paths = [(path_in(source.records[index], folder, flip), index, flip) for index, flip in jobs]
    missing = [job for job in paths if not has_arrays(job[0])]
    workers = 0 if source.device.type == "cpu" else 1
    map_in_workers(partial(_embedder, source, projection, tested), missing, "embed", "image", workers, progress)
    barrier()
    return len(missing)


def _embedder(
    source: TrainingWindows, projection: Projection, tested: bool
) -> Callable[[tuple[Path, int, bool]], None]:
    config = source.config
    kind = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    projection = replace(projection, basis=projection.basis.to(source.device, kind))  # once, not for every image

    def embed(job: tuple[Path, int, bool]) -> None:
        path, index, flip = job
        if tested:
            windows = read_windows(source.windows_folder, source.records[index])
        else:
            found, rng = source.image_windows(index), _generator(source, index, config.joint.seed)
            windows = found.windows[draw_windows(found, config.joint.windows, rng)]
        windows = flip_boxes(windows, source.records[index].size[1]) if flip else windows
        maps = source.maps(index, flip)
        distinct, places = source.project(maps, windows).unique()
        rows = np.zeros((len(distinct.cells), len(projection.basis)), np.float16)
        for batch in np.split(np.arange(len(rows)), range(BATCH, len(rows), BATCH)):
            pooled = pool_projected(maps, distinct.rows(batch), config.pyramid.levels)
            rows[batch] = projection.rows(pooled, config.precision).cpu().numpy()
        write_arrays(path, durable=False, windows=windows, rows=rows[places])

    return embed


def _generator(source: TrainingWindows, index: int, seed: int) -> np.random.Generator:
    """Of an image, whatever the others are."""
    return np.random.default_rng((seed, int(source.records[index].digest, 16)))


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """The rows of many images that a joint head trains on: positives, and background, which is label K.

    features (N, rank), on the disk; targets (N, 4) are those of `regression_targets`, 0 for background. `missed` (N,)
    tells the background that overlaps an object by 0.1 or more. `unknown`, where some is: which image (N,) each
    row is of, and the classes that nobody labelled in each image (I, K).
    """

    features: NDArray[np.float16]
    labels: NDArray[np.int64]
    targets: NDArray[np.float32]
    missed: NDArray[np.bool_]
    classes: int
    unknown: tuple[NDArray[np.int64], NDArray[np.bool_]] | None = None

    def read(self, chosen: NDArray[np.int64]) -> Tensor:
        """The features (B, rank) float32 of these of N."""
        return torch.from_numpy(self.features[chosen].astype(np.float32))

    def mask(self, logits: Tensor, chosen: NDArray[np.int64]) -> Tensor:
        """The logits (B, K + 1) of these of N; for background minus infinity, out of the softmax, where `unknown`."""
        if self.unknown is None:
            return logits
        images, classes = self.unknown
        hidden = classes[images[chosen]] & (self.labels[chosen] == self.classes)[:, None]
        return logits.masked_fill(F.pad(torch.from_numpy(hidden), (0, 1)).to(logits.device), -torch.inf)

    def draw(self, count: int, share: float, rng: np.random.Generator) -> NDArray[np.int64]:
        """`count` of N, with replacement: `share` of them positives, as many of every class that has some, first.

        Half of the others are background that overlaps an object, where there is such: it is what boxes that miss look
        like (sec. 4.1 takes no other). Where there is no background all are positives. SppnetError without positives.
        """
        order, starts = self._by_label
        present = np.flatnonzero(np.diff(starts[:-2]))
        if not len(present):
            raise SppnetError("no training window overlaps an object by half; check annotations and windows")
        backgrounds = self.classes + np.flatnonzero(np.diff(starts[-3:]))
        wanted = round(count * share) if len(backgrounds) else count
        labels = np.append(np.resize(rng.permutation(present), wanted), np.resize(backgrounds, count - wanted))
        sizes = starts[labels + 1] - starts[labels]
        return order[starts[labels] + np.floor(rng.random(count) * sizes).astype(np.int64)]

    @cached_property
    def _by_label(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All N by their labels, `missed` last, and where each begins among them: (N,), (K + 3,)."""
        groups = self.labels + self.missed
        order = np.argsort(groups, kind="stable")
        return order, np.searchsorted(groups[order], np.arange(self.classes + 3))


def label_rows(source: TrainingWindows, folder: Path, flips: bool) -> LabelledRows:
    """The rows that `embed_images` wrote, image after image, with labels and targets from the annotations of today.

    They lie in one file, which is gone with the process: a system opens a thousand at once, perhaps.
    """
    width, parts = 0, list[tuple[NDArray[np.generic], ...]]()
    with tempfile.TemporaryFile(dir=folder) as gathered:
        for index, flip in itertools.product(range(len(source.records)), (False, True)[: 1 + flips]):
            record, annotation = source.records[index], source.annotation(index)
            arrays = map_arrays(rows_path(record, folder, flip))
            stored = np.asarray(arrays["windows"])
            windows = flip_boxes(stored, record.size[1]) if flip else stored
            overlaps = source.overlaps(index, windows)
            found = label_windows(overlaps, LABELS, source.ignored(index, windows))
            rows, near = np.concatenate([found.positives, found.negatives]), found.positives
            targets = np.zeros((len(rows), 4), np.float32)
            if len(near):
                iou = pairwise_iou(windows[near].astype(np.float64), annotation.boxes.astype(np.float64))
                own = np.where(source.labels(annotation) == found.labels[:, None], iou, -1).argmax(axis=1)
                targets[: len(near)] = regression_targets(windows[near], annotation.boxes[own])
                targets[:, 0] *= -1 if flip else 1
            labels = np.append(found.labels, np.full(len(found.negatives), len(source.classes)))
            missed = (labels == len(source.classes)) & (overlaps[rows].max(axis=1, initial=0) >= NEAR_MISS)
            parts.append((labels, targets, missed))
            gathered.write(arrays["rows"][rows].tobytes())
            width = arrays["rows"].shape[1]
        none = np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, bool)
        labels, targets, missed = (np.concatenate(column) for column in zip(none, *parts, strict=True))
        gathered.flush()
        shape = len(labels), width
        features = np.memmap(gathered, np.float16, "r", shape=shape) if len(labels) else np.zeros(shape, np.float16)
    images = [index for index in range(len(source.records)) for _ in range(1 + flips)]
    open_in = np.array(
        [np.isin(source.classes, source.annotation(index).unknown) for index in range(len(source.records))]
    )
    unknown = (np.repeat(images, [len(own) for own, *_ in parts]), open_in) if open_in.any() else None
    return LabelledRows(features, labels, targets, missed, len(source.classes), unknown)
