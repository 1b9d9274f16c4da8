"""What fc6 answers to windows of a detector's training images: by these compression sees what matters of a layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.config import CompressSettings
from sppnet.detection.detector import SPPDetector
from sppnet.detection.low_rank import Responses, draw_windows, linear_responses, spread
from sppnet.detection.plan import load_run_data, usable_config, windows_folder
from sppnet.detection.proposals import find_windows
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
) -> Responses:
    """What fc6 answers, before its rectification, to windows of the training images of a run.

    Of at most `images` images, spread over all, `windows` windows in all where they have as many: half of them close to
    objects where there are as many, because the detector must tell these apart and few proposals are; the others any
    proposals. They come from the run where it still has them and are searched otherwise; nothing is written. Raises
    DatasetError where the training images are gone.
    """
    config = usable_config(detector.config)
    chosen = spread(load_run_data(config).train, images)
    found = find_windows(chosen, config.proposals, windows_folder(run, config.proposals))
    each, rng, parts = -(-windows // max(1, len(chosen))), np.random.default_rng(seed), []
    for record, proposals in progress_bar(
        zip(chosen, found, strict=True), "responses", "image", len(chosen), shown=progress
    ):
        own = draw_windows(record, proposals, detector.classes, each, rng)
        parts.append(_responses(detector, record, own))
    return Responses.of_images(parts, detector.head.fc6.out_features)


@torch.inference_mode()
def _responses(detector: SPPDetector, record: ImageRecord, windows: NDArray[np.float32]) -> Tensor:
    config, maps = detector.config, detector.embed(read_image(record.path))
    where = window_cells(maps, windows, detector.trunk.geometry, config.pyramid, config.maps)
    return linear_responses(detector.head, pool_cells(maps, where, config.pyramid.levels)).cpu()
