"""Full-image features of one length for any size of image (sec. 3.2, 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sppnet.backbones.backbone import build_backbone
from sppnet.classification.classifier import Classifier
from sppnet.classification.settings import ClassifierConfig
from sppnet.config_files import load_settings
from sppnet.errors import BackboneError, ImageError, SppnetError
from sppnet.images import read_image, scaled_size
from sppnet.jobs import progress_bar
from sppnet.models.sppnet import Layer, SPPHead, SPPNet, build_head, pooled_size, start_head
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
    backbone = build_backbone(config.backbone, config.training.seed)
    levels, settings = config.pyramid.levels, config.head
    if settings.init == "random":  # it has no features, and may be larger than the memory
        with torch.device("meta"):
            head = SPPHead(pooled_size(backbone.channels, levels), 1, settings)
    else:
        head = build_head(backbone.channels, levels, 1, settings)
    start_head(head, settings, config.backbone, backbone.channels, levels)
    network = SPPNet(backbone.to(device), levels, head if settings.init == "random" else head.to(device))
    return Classifier(network.requires_grad_(False).eval(), (), config)


def prepared(classifier: Classifier, image: NDArray[np.uint8], side: int) -> Tensor:
    """Image (H, W, 3) uint8 RGB -> (1, 3, h, w): its shorter side `side` pixels, aspect kept."""
    return classifier.runtime.prepare(image, scaled_size((image.shape[0], image.shape[1]), side)[0])


def image_features(
    classifier: Classifier, image: NDArray[np.uint8], layer: Layer = "pool", side: int = 224, crop: bool = False
) -> NDArray[np.float32]:
    """Image (H, W, 3) uint8 RGB -> (D,) float32 of length 1: the full image with its shorter side `side` pixels.

    "pool" is the pyramid of the whole map, fc6 and fc7 what the head makes of it. `crop`: of the central side × side
    pixels alone, what networks of a fixed size see (sec. 3.3). A vector of zeros stays one. SppnetError for fc6 and fc7
    of a network without them; BackboneError for an image too small or too narrow.
    """
    network = classifier.network
    if layer != "pool" and network.head.fc6.weight.is_meta:
        missing = f"layer={layer}: expected a network whose fc6 and fc7 are trained, got a backbone alone"
        raise SppnetError(f"{missing}; take the layer pool, the run of a classifier, or set head.init")
    pixels = prepared(classifier, image, side)
    if crop:
        top, left = ((length - side) // 2 for length in pixels.shape[2:])
        pixels = pixels[:, :, top : top + side, left : left + side]
    with torch.inference_mode():
        pooled = spatial_pyramid_pool(classifier.runtime(pixels), network.levels)
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

    SppnetError where none is left.
    """
    rows, skipped = dict[int, NDArray[np.float32]](), dict[Path, str]()
    for place, path in enumerate(progress_bar(images, "features", "image", shown=progress)):
        try:
            rows[place] = image_features(classifier, read_image(path), layer, side, crop)
        except ImageError as error:
            skipped[path] = str(error)
        except BackboneError as error:
            skipped[path] = f"{path}: {error}"
    if not rows:
        raise SppnetError(f"expected images, none of {len(images)} can be used: {next(iter(skipped.values()), '')}")
    return FolderFeatures(np.stack([*rows.values()]), np.array([*rows], np.int64), skipped)
