"""fc6 and fc7 of low rank: fewer products per window in a trained detector.

Its SVMs and box regressors stay as they are. In training the settings `compress` do it before the SVMs: the thin layers
are fine-tuned, and the SVMs learn on what they give.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.config import CompressSettings
from sppnet.data.voc import DatasetError
from sppnet.detection.detector import SPPDetector
from sppnet.detection.low_rank import (
    LAYERS,
    CompressionError,
    Responses,
    ask_images,
    check_ranks,
    compress_head,
    describe_layers,
    linear_responses,
)
from sppnet.detection.plan import load_run_data, usable_config, windows_folder
from sppnet.detection.proposals import find_windows
from sppnet.detection.sampling import spread
from sppnet.detection.window_features import pool_cells, window_cells
from sppnet.images import read_image
from sppnet.network.sppnet import SPPHead
from sppnet.progress import progress_bar

Method = Literal["responses", "weights"]
SAMPLE = CompressSettings()  # how many images and windows are asked by default


@dataclass(frozen=True)
class Compression:
    """A head before and after, and the folder that holds the compressed detector."""

    whole: SPPHead
    thin: SPPHead
    folder: Path
    responses: Responses | None = None  # those that chose the directions, if they did

    def __str__(self) -> str:
        """What was kept of each layer, and what is left to store and to compute; a line each."""
        lines = list(describe_layers(self.whole, self.thin, self.responses).values())
        (parameters, products), (fewer, left) = _cost(self.whole), _cost(self.thin)
        lines.append(f"fc6 and fc7: {parameters:,} -> {fewer:,} parameters")
        lines.append(f"{products:,} -> {left:,} multiply-adds a window, {products / left:.1f} times fewer")
        return "\n".join(lines)


def compress_run(
    run: Path,
    fc6: int | None = None,
    fc7: int | None = None,
    out: Path | None = None,
    device: str | torch.device = "cpu",
    method: Method = "responses",
    images: int = SAMPLE.images,
    progress: bool = True,
) -> Compression:
    """Compress the detector of `run` into a folder of its own, which every command takes for a run.

    `method`: "responses" to `images` of the run's training images, or the "weights" alone. The folder (default:
    ``compressed-fc6-256-fc7-64`` or so, in `run`) appears when it is complete; it shares the windows that `run` already
    has. Raises StoreError without a detector and CompressionError, also without training images where they are needed.
    """
    detector = SPPDetector.load(run, device)
    ranks = {name: rank for name, rank in (("fc6", fc6), ("fc7", fc7)) if rank}
    folder = out or run / "-".join(["compressed", *(f"{name}-{rank}" for name, rank in ranks.items())])
    _check_free(folder)
    _check_ranks(detector, fc6 or 0, fc7 or 0)  # before minutes are spent
    responses = None
    if method == "responses":
        try:
            responses = sample_responses(detector, run, images, progress=progress)
        except DatasetError as error:
            raise CompressionError(f"{error}; --method weights needs no images") from None
    thin = compress_detector(detector, fc6, fc7, None if responses is None else responses.chosen)
    partial = folder.resolve().with_name(f".{folder.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    thin.save(partial / "detector")
    _share_windows(run, partial)
    partial.replace(folder)
    return Compression(detector.head, thin.head, folder, responses)


def compress_detector(
    detector: SPPDetector, fc6: int | None = None, fc7: int | None = None, responses: Tensor | None = None
) -> SPPDetector:
    """The detector with a compressed head; the given one stays as it is. Raises CompressionError (`compress_head`),
    also for a layer that the detector does not use."""
    _check_ranks(detector, fc6 or 0, fc7 or 0)
    return replace(detector, head=compress_head(detector.head, fc6, fc7, responses))


def sample_responses(
    detector: SPPDetector,
    run: Path,
    images: int = SAMPLE.images,
    windows: int = SAMPLE.windows,
    seed: int = SAMPLE.seed,
    progress: bool = True,
) -> Responses:
    """What fc6 answers, before its rectification, to windows of at most `images` training images of a run.

    `ask_images` draws them, from the windows of the run where it still has them, else they are searched; nothing is
    written. Raises DatasetError where the training images are gone.
    """
    config = usable_config(detector.config)
    chosen = spread(load_run_data(config).train, images)
    found = find_windows(chosen, config.proposals, windows_folder(run, config.proposals))
    proposals = progress_bar(found, "responses", "image", len(chosen), shown=progress)
    width = detector.head.fc6.out_features

    @torch.inference_mode()
    def answer(number: int, drawn: NDArray[np.float32]) -> Tensor:
        maps = detector.embed(read_image(chosen[number].path))
        where = window_cells(maps, drawn, detector.trunk.geometry, config.pyramid, config.maps)
        return linear_responses(detector.head, pool_cells(maps, where, config.pyramid.levels)).cpu()

    return ask_images(chosen, proposals, answer, detector.classes, windows, seed, width)


def _check_ranks(detector: SPPDetector, fc6: int, fc7: int) -> None:
    """CompressionError for ranks that `compress_head` would refuse, and for layers that the detector does not use."""
    used = {detector.config.svm.layer} | ({detector.config.boxes.layer} if detector.regressors is not None else set())
    needed = {"fc6": bool(used & {"fc6", "fc7"}), "fc7": "fc7" in used}
    for name, rank in (("fc6", fc6), ("fc7", fc7)):
        if rank and not needed[name]:
            raise CompressionError(
                f"{name} is not used by this detector, which takes {' and '.join(sorted(used))} features; "
                f"leave out --{name}"
            )
    check_ranks(detector.head, {"fc6": fc6, "fc7": fc7})


def _check_free(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CompressionError(f"{folder}: exists already; delete it or choose another --out")


def _share_windows(run: Path, folder: Path) -> None:
    """Links to the windows of `run`, so that no image is searched twice; such files are never changed in place."""
    for path in run.glob("propose-*/**/*.npz"):
        target = folder / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, target)


def _cost(head: SPPHead) -> tuple[int, int]:
    """Parameters of fc6 and fc7, and multiply-adds a window."""
    layers = [layer for name in LAYERS for layer in head.products(name)]
    return sum(p.numel() for layer in layers for p in layer.parameters()), sum(x.weight.numel() for x in layers)
