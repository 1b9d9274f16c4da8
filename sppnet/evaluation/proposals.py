"""How well candidate windows cover the objects: what no window covers, no detector on top of them can find."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppnet.checks import check_boxes, check_overlap
from sppnet.errors import SppnetError, counted
from sppnet.records import Annotation, pairwise_iou


@dataclass(frozen=True)
class ProposalQuality:
    """Best IoU of any window with each object (M,), at the threshold `iou`, and the windows per image on average."""

    best_overlaps: NDArray[np.float64]
    iou: float
    mean_windows: float

    @property
    def recall(self) -> float:
        """Share of the objects that a window covers with IoU >= `iou`; nan without objects."""
        return float((self.best_overlaps >= self.iou).mean()) if len(self.best_overlaps) else math.nan

    @property
    def mean_best_overlap(self) -> float:
        """Mean over the objects of their best IoU; nan without objects."""
        return float(self.best_overlaps.mean()) if len(self.best_overlaps) else math.nan


def proposal_recall(
    windows: Mapping[str, ArrayLike],
    annotations: Mapping[str, Annotation],
    iou: float = 0.5,
    max_windows: int | None = None,
    use_difficult: bool = False,
) -> ProposalQuality:
    """Cover of the annotated objects by image id -> windows (R, 4), the first `max_windows` of each image.

    Windows are arrays, tensors or lists. Restrict the annotations to the classes of interest with ``Annotation.of``.
    Images without annotation are left out. Raises SppnetError for an annotated image without an entry in `windows`, for
    windows that are none, and for an `iou` that no window can meet.
    """
    if not check_overlap(iou, "iou") > 0:
        raise SppnetError(f"iou must lie above 0, got {iou!r}")
    missing = [image_id for image_id in annotations if image_id not in windows]
    if missing:
        count = f"{len(missing)} of {counted(len(annotations), 'image')}"
        raise SppnetError(f"no windows given for image {missing[0]} ({count}); propose them first, or pass []")
    overlaps, counts = [np.zeros(0)], []
    for image_id, annotation in annotations.items():
        boxes = check_boxes(windows[image_id], f"windows of image {image_id}", extent=False)[:max_windows]
        truth = annotation if use_difficult else annotation.easy()
        overlaps.append(pairwise_iou(truth.boxes.astype(np.float64), boxes).max(axis=1, initial=0.0))
        counts.append(len(boxes))
    return ProposalQuality(np.concatenate(overlaps), iou, float(np.mean(counts)) if counts else math.nan)
