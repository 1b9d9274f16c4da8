"""Full-image features of one length for any size of image (sec. 3.2, 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sppnet.classification.classifier import Classifier, build_network, of_images, usable
from sppnet.classification.settings import ClassifierConfig
from sppnet.config_files import load_settings
from sppnet.errors import SppnetError
from sppnet.jobs import progress_bar
from sppnet.models.sppnet import Layer
from sppnet.ops.pyramid import spatial_pyramid_pool


@dataclass(frozen=True, eq=False)
class FolderFeatures:
    """Features (N, D) float32 of the images that could be read: their places (N,) in the list that was given."""

    features: NDArray[np.float32]
    places: NDArray[np.int64]
    skipped: dict[Path, str]  # the others, with the reason


def open_classifier(source: Path, device: torch.device) -> Classifier:
    """That of a run; of a YAML file the network with its pretrained weights, before any training.

    Such a network has fc6 and fc7 only where head.init says from where.
    """
    if source.suffix.lower() not in (".yaml", ".yml"):
        return Classifier.load(source, device)
    config = load_settings(ClassifierConfig, source)
    if config.head.init == "random":  # it has no features, and could take gigabytes
        config = config.model_copy(update={"head": config.head.model_copy(update={"fc6": 1, "fc7": 1})})
    return Classifier(build_network(config, 1, start=True).requires_grad_(False).eval().to(device), (), config)


def image_features(
    classifier: Classifier, image: NDArray[np.uint8], layer: Layer = "pool", side: int = 224, crop: bool = False
) -> NDArray[np.float32]:
    """Image (H, W, 3) uint8 RGB -> (D,) float32 of length 1: the full image with its shorter side `side` pixels.

    "pool" is the pyramid of the whole map, fc6 and fc7 what the head makes of it. `crop`: of the central side × side
    pixels alone, what networks of a fixed size see (sec. 3.3). A vector of zeros stays one. SppnetError for fc6 and fc7
    of a network without them; BackboneError for an image too small or too narrow.
    """
    network = classifier.network
    if layer != "pool" and not classifier.classes and classifier.config.head.init == "random":
        missing = f"layer={layer}: expected a network whose fc6 and fc7 are trained, got a backbone alone"
        raise SppnetError(f"{missing}; take the layer pool, the run of a classifier, or set head.init")
    pixels = classifier.pixels(image, side)
    if crop:
        top, left = ((length - side) // 2 for length in pixels.shape[2:])
        pixels = pixels[:, :, top : top + side, left : left + side]
    with torch.inference_mode():
        pooled = spatial_pyramid_pool(classifier.maps(pixels), network.levels)
        return F.normalize(network.head.features(pooled, layer), dim=1)[0].cpu().numpy()


def folder_features(
    classifier: Classifier,
    images: Sequence[Path],
    layer: Layer = "pool",
    side: int = 224,
    progress: bool = True,
    crop: bool = False,
) -> FolderFeatures:
    """`image_features` of image files; one that cannot be read or is too narrow is skipped, with the reason.

    Processes of torchrun share the images, and all get the result. SppnetError where none is left.
    """
    results = of_images(images, lambda image: [image_features(classifier, image, layer, side, crop)])
    rows, skipped = usable(progress_bar(results, "features", "image", len(images), shown=progress))
    return FolderFeatures(np.stack([row.numpy() for (row,) in rows.values()]), np.array([*rows], np.int64), skipped)
