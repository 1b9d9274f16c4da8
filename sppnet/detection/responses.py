"""What fc6 answers to windows of a detector's training images: by these compression sees what matters of a layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.config import CompressSettings
from sppnet.detection.detector import SPPDetector
from sppnet.detection.low_rank import draw_windows, linear_responses
from sppnet.detection.plan import load_run_data, usable_config, windows_folder
from sppnet.detection.proposals import propose_images, read_windows
from sppnet.detection.window_features import pool_cells, window_cells
from sppnet.images import read_image
from sppnet.progress import progress_bar
from sppnet.records import ImageRecord

IMAGES, WINDOWS = CompressSettings().images, CompressSettings().windows


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
    for record in progress_bar(chosen, "responses", "image", shown=progress):
        own = draw_windows(record, read_windows(folder, record), detector.classes, windows, rng)
        if len(own):
            parts.append(_responses(detector, record, own))
    return torch.cat(parts)


@torch.inference_mode()
def _responses(detector: SPPDetector, record: ImageRecord, windows: NDArray[np.float32]) -> Tensor:
    config, maps = detector.config, detector.embed(read_image(record.path))
    where = window_cells(maps, windows, detector.trunk.geometry, config.pyramid, config.maps)
    return linear_responses(detector.head, pool_cells(maps, where, config.pyramid.levels)).cpu()
