"""What fc6 answers to windows of training images: by these compression sees which directions of a layer matter.

A fine-tuned layer is a random start and a little of what it learned. Its singular values hardly fall, but its answers
to real windows lie close to a space of few dimensions (Zhang, Zou, He, Sun, "Accelerating Very Deep Convolutional
Networks for Classification and Detection", 2016, sec. 3.1).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sppnet.detection.detector import SPPDetector
from sppnet.detection.plan import load_run_data, usable_config, windows_folder
from sppnet.detection.proposals import propose_images, read_windows
from sppnet.detection.sampling import class_overlaps
from sppnet.detection.window_features import pool_cells, window_cells
from sppnet.images import read_image
from sppnet.network.sppnet import SPPHead
from sppnet.records import ImageRecord

IMAGES, WINDOWS = 256, 64  # by default: 16,384 windows, four for each of 4,096 outputs
NEAR = 0.5  # IoU from which on a window shows an object

log = logging.getLogger("sppnet")


def sample_responses(
    detector: SPPDetector,
    run: Path,
    images: int = IMAGES,
    windows: int = WINDOWS,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """fc6 before its rectification, bias included, of windows of the run's training images: (N, fc6) float32, CPU.

    At most `images` images, spread over all, and `windows` windows of each: half of them close to objects where there
    are as many, because the detector must tell these apart and few proposals are; the others any proposals. Windows
    come from the run where it still has them and are searched otherwise. Raises DatasetError where the training images
    are gone.
    """
    config = usable_config(detector.config)
    records = load_run_data(config).train
    count = min(images, len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]
    folder = windows_folder(run, config.proposals)
    propose_images(chosen, config.proposals, folder, progress)
    rng = np.random.default_rng(seed)
    parts = [torch.empty(0, detector.head.fc6.out_features)]
    for record in tqdm(chosen, desc="responses", unit="image", disable=None if progress else True):
        own = draw_windows(record, read_windows(folder, record), detector.classes, windows, rng)
        if len(own):
            parts.append(_responses(detector, record, own))
    return torch.cat(parts)


def draw_windows(
    record: ImageRecord, windows: NDArray[np.float32], classes: Sequence[str], count: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """At most `count` of the windows (R, 4) of an image, half of them with IoU >= 0.5 with an object if there are."""
    annotation = record.annotation
    best = np.zeros(len(windows)) if annotation is None else class_overlaps(windows, annotation, classes).max(1)
    order = rng.permutation(len(windows))
    near = order[best[order] >= NEAR][: count // 2]
    others = order[~np.isin(order, near)][: count - len(near)]
    return windows[np.concatenate([near, others])]


@torch.inference_mode()
def _responses(detector: SPPDetector, record: ImageRecord, windows: NDArray[np.float32]) -> Tensor:
    config, maps = detector.config, detector.embed(read_image(record.path))
    where = window_cells(maps, windows, detector.trunk.geometry, config.pyramid, config.maps)
    return linear_responses(detector.head, pool_cells(maps, where, config.pyramid.levels)).cpu()


def linear_responses(head: SPPHead, pooled: Tensor) -> Tensor:
    """Pooled features (R, D) -> fc6 of them before its rectification (R, fc6), in a compressed head too."""
    hidden = pooled * head.input_scale
    for layer in head.products("fc6"):
        hidden = F.linear(hidden, layer.weight, layer.bias)
    return hidden


def principal_directions(responses: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Responses (N, F) -> their mean (F,), the orthonormal directions (F, rank) in which they vary most, and the share
    of their variance along these; all in float64. Raises ValueError for fewer responses than directions."""
    count, width = responses.shape
    if not 1 <= rank <= min(count, width):
        raise ValueError(
            f"expected a rank from 1 to {min(count, width)} for {count} responses of {width} numbers, got {rank}; "
            "sample more windows or choose a lower rank"
        )
    mean = responses.double().mean(0)
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for block in responses.split(4096):  # the whole sample in double precision would be half a gigabyte
        centred = block.double() - mean
        covariance += centred.T @ centred
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    total = float(variances.clamp(min=0).sum())
    kept = float(variances[-rank:].clamp(min=0).sum()) / total if total > 0 else 1.0
    return mean, directions[:, -rank:].flip(1).contiguous(), kept
