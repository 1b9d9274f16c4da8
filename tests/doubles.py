"""Stand-ins for the expensive parts: pictures, records, maps and windows made of a few numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sppnet.artifacts import file_digest
from sppnet.backbones.backbone import Backbone, build_backbone
from sppnet.config import BackboneSettings, WeightsSettings
from sppnet.detection.feature_maps import FeatureMaps
from sppnet.detection.training_windows import LabelledWindows
from sppnet.records import Annotation, ImageRecord

NO_WINDOWS = np.zeros((0, 4), np.float32)


def annotated(*objects: tuple[str, Sequence[float]], difficult: Sequence[bool] | None = None) -> Annotation:
    """annotated(("cat", (0, 0, 10, 10)), …) -> the annotation of an image with these objects."""
    boxes = np.array([box for _, box in objects], np.float32).reshape(-1, 4)
    flags = np.zeros(len(objects), bool) if difficult is None else np.array(difficult, bool)
    return Annotation(boxes, tuple(name for name, _ in objects), flags)


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth noise (H, W, 3): neighbouring pixels are alike, as in a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def picture_record(
    folder: Path, name: str, pixels: NDArray[np.uint8], annotation: Annotation | None = None
) -> ImageRecord:
    """The picture as a PNG in `folder`, and its record."""
    path = folder / f"{name}.png"
    Image.fromarray(pixels).save(path)
    return ImageRecord(f"TOY/{name}", path, (pixels.shape[0], pixels.shape[1]), file_digest(path), annotation)


def random_backbone(name: str = "tiny5", seed: int = 0) -> Backbone:
    return build_backbone(BackboneSettings(name=name, weights=WeightsSettings(source="random")), seed)


def random_maps(
    *sizes: tuple[int, int], sides: Sequence[float], image_size: tuple[int, int], channels: int = 3
) -> FeatureMaps:
    """Maps of these sizes with different random numbers in every cell."""
    generator = torch.Generator().manual_seed(len(sizes))
    maps = tuple(torch.randn(channels, *size, generator=generator) for size in sizes)
    return FeatureMaps(maps, tuple(sides), image_size)


class ToyWindows:
    """Stands for `FinetuneWindows`: images whose windows are points around their class's corner of a cube.

    Each image holds as many positives as classes and twice as many negatives, which lie around the origin.
    """

    def __init__(self, images: int, classes: int, seed: int, noise: float = 0.3, features: int = 12) -> None:
        self.classes, self.features, self.noise, self.seed = classes, features, noise, seed
        rows = np.arange(3 * classes)
        own = LabelledWindows(rows[:classes], rows[:classes], rows[classes:])
        self.labelled: Sequence[LabelledWindows] = [own] * images
        self.pooled = 0  # how often windows were pooled

    def pool(self, image: int, rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Rows of the image's points; `rng` adds what a random scale would."""
        self.pooled += 1
        points = np.zeros((len(rows), self.features))
        own = np.flatnonzero(rows < self.classes)
        points[own, rows[own]] = 3.0
        fixed = np.random.default_rng((self.seed, image)).normal(size=(3 * self.classes, self.features))
        points += self.noise * (fixed[rows] + 0.1 * rng.normal(size=points.shape))
        return torch.from_numpy(points.astype(np.float32))


def refused_by_us(call: Callable[[], object]) -> str:
    """The message of the ValueError, TypeError or IndexError that `call` must raise, from a line of this package."""
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        call()
    assert "sppnet" in str(caught.traceback[-1].path.parent), caught.getrepr()
    assert str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def default_dtype(kind: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# What a caller may have set in torch; "meta" stands for a GPU.
TORCH_STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "another device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
