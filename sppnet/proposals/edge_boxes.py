"""EdgeBoxes (Zitnick & Dollár 2014): windows that hold many edges whole, by OpenCV's search.

The edges are those of a structured forest where the settings name its file, else thinned gradients, which need none.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from sppnet.config import ProposalSettings
from sppnet.images import ImageInput
from sppnet.proposals.edge_forest import forest_edges
from sppnet.proposals.selective_search import Image, Ranked, best_windows, ximgproc
from sppnet.settings import checked_settings

# Ours: sigma, percentile and beta by recall at IoU 0.5 and mean best overlap on training images of VOC.
SIGMA = 2.0  # px
STRONG = 99  # percentile of the gradients of an image from which on an edge is whole
FAINT = 1.0  # gradients below are noise: an eighth of a grey level a pixel
# Neighbours in the search overlap by alpha, kept boxes by beta at most. Published is a beta of 0.75: of the first 500
# windows 0.05 less recall, and of 2,000 0.007 more overlap. The others are as published.
SEARCH = {"alpha": 0.65, "beta": 0.7, "minScore": 0.01, "maxBoxes": 10_000}
# The smallest box has min_side² px², within these: OpenCV divides by sides of 0 below; 1000 is as published.
AREAS = (25, 1000)


def edge_boxes(image: ImageInput, settings: ProposalSettings | None = None) -> NDArray[np.float32]:
    """EdgeBoxes, in and out as `selective_search`; best first by the score of the paper, the same every time.

    A uniform image has no edges, and no windows. SppnetError also for an edge_model that cannot be used.
    """
    own = checked_settings(ProposalSettings, settings)

    def search(small: Image) -> Ranked:
        edges, orientations = gradient_edges(small) if own.edge_model is None else forest_edges(small, own.edge_model)
        # It keeps what it saw: a new one for each image.
        boxes_of = ximgproc().createEdgeBoxes(**SEARCH, minBoxArea=float(np.clip(own.min_side**2, *AREAS)))
        found, scores = boxes_of.getBoundingBoxes(np.ascontiguousarray(edges), np.ascontiguousarray(orientations))
        boxes = np.asarray(found if edges.any() else (), dtype=np.int64).reshape(-1, 4)
        # As in Matlab the first pixel is 1, and a box ends with the pixel at its corner + its size.
        corners = np.concatenate([boxes[:, :2] - 1, boxes[:, :2] + boxes[:, 2:]], axis=1)
        return corners, -np.asarray(scores if len(boxes) else (), dtype=np.float64).reshape(-1)

    return best_windows(image, own, search)


def gradient_edges(image: Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Thinned edges (H, W) of an RGB image in [0, 1], and their orientations, those of the gradient, in [0, π].

    Of each pixel the gradient of the channel of Lab that changes most; it stays where it is not smaller than those one
    pixel away along its direction.
    """
    lab = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2LAB).astype(np.float32)
    smooth = cv2.GaussianBlur(lab, (0, 0), SIGMA)
    by_channel = np.stack([cv2.Sobel(smooth, cv2.CV_32F, 0, 1), cv2.Sobel(smooth, cv2.CV_32F, 1, 0)])
    strongest = (by_channel**2).sum(axis=0).argmax(axis=2)[None, ..., None]
    gradient = np.take_along_axis(by_channel, strongest, axis=3)[..., 0]
    size = np.sqrt((gradient**2).sum(axis=0))
    thin, here = size, np.indices(size.shape, dtype=np.float32)
    step = gradient / np.maximum(size, np.finfo(np.float32).tiny)
    for beside in (here + step, here - step):
        thin = np.where(size >= map_coordinates(size, beside, order=1, mode="nearest"), thin, 0)
    whole = np.float32(max(np.percentile(size, STRONG), FAINT))
    return np.minimum(thin / whole, 1), np.mod(np.arctan2(*gradient), np.float32(np.pi))
