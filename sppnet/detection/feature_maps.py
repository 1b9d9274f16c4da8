"""Room 2: the convolutional map of an image, computed once, at every scale (sec. 4.1)."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.config import MapSettings
from sppnet.distributed import barrier, is_main, shard
from sppnet.images import flip_image, prepare, read_image, scaled_size
from sppnet.network.trunks import Trunk, TrunkError
from sppnet.progress import progress_bar
from sppnet.records import ImageRecord
from sppnet.store import StoreError, cache_arrays, has_arrays, read_arrays

# Images of many sizes must not fill the memory. oneDNN, torch's convolutions on a CPU, keeps what it prepared for the
# last 1024 of them, megabytes each at large sizes: 2 GB more after 300 images, where 64 take no longer. It reads this
# before its first convolution.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
IMAGES_PER_TRIM = 16
_images = itertools.count(1)


@dataclass(frozen=True)
class FeatureMaps:
    """The maps of one image: one (C, H, W) tensor a scale, and the shorter side in pixels it was computed at."""

    maps: tuple[Tensor, ...]
    sides: tuple[float, ...]
    image_size: tuple[int, int]  # (height, width) of the original image

    def to(self, device: torch.device | str) -> FeatureMaps:
        return FeatureMaps(tuple(m.to(device) for m in self.maps), self.sides, self.image_size)


@dataclass(frozen=True)
class ExtractSummary:
    """What `extract_images` did with the images of this process."""

    computed: int
    reused: int
    gigabytes: float  # on disk, of all


@torch.inference_mode()
def compute_maps(trunk: Trunk, image: NDArray[np.uint8], settings: MapSettings) -> FeatureMaps:
    """Image (H, W, 3) uint8 RGB -> its maps in float32, on the trunk's device, at every scale of the settings.

    Each map is (C, H, W) in channels-last memory, as the trunk gives it. An image so narrow that the bound on its
    longer side leaves no map at a scale is an error that names the setting.
    """
    device = next(trunk.parameters()).device
    maps, sides = [], []
    for scale in settings.scales:
        size, side = scaled_size(image.shape[:2], scale, settings.max_side)
        weights = trunk.weights
        pixels = prepare(image, size, weights.channel_order, weights.mean, weights.std, device)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.compute == "bfloat16"):
                feature_map = trunk(pixels)[0]
        except TrunkError as error:
            raise TrunkError(f"an image of {image.shape[1]} × {image.shape[0]} pixels is too narrow: {error}") from None
        maps.append(feature_map.float().permute(1, 2, 0).contiguous().permute(2, 0, 1))
        sides.append(side)
    if next(_images) % IMAGES_PER_TRIM == 0:
        _return_freed_memory()
    return FeatureMaps(tuple(maps), tuple(sides), (image.shape[0], image.shape[1]))


def extract_images(
    records: Sequence[ImageRecord],
    trunk: Trunk,
    settings: MapSettings,
    folder: Path,
    flips: bool,
    progress: bool = True,
) -> ExtractSummary:
    """Write the maps of every record, and of its mirror image when `flips`, to `folder`; complete ones stay.

    Under torchrun every process does its share of the records.
    """
    jobs = [(record, flip) for record in shard(records) for flip in ((False, True) if flips else (False,))]
    missing = [job for job in jobs if not has_arrays(maps_path(folder, *job))]
    for record, flip in progress_bar(missing, "maps", "map", shown=progress and is_main()):
        image = read_image(record.path)
        write_maps(
            maps_path(folder, record, flip),
            compute_maps(trunk, flip_image(image) if flip else image, settings),
            settings,
        )
    barrier()
    size = sum(maps_path(folder, *job).stat().st_size for job in jobs)
    return ExtractSummary(len(missing), len(jobs) - len(missing), size / 1e9)


def maps_path(folder: Path, record: ImageRecord, flip: bool) -> Path:
    """Where the maps of a record lie; the name carries the content of the image."""
    return folder / f"{record.id}-{record.digest}{'-flip' if flip else ''}.npz"


def write_maps(path: Path, maps: FeatureMaps, settings: MapSettings) -> None:
    """Maps as (H, W, C) arrays in the precision of the settings, so that a window is one run of memory a row."""
    dtype = np.float16 if settings.storage == "float16" else np.float32
    limit = np.finfo(dtype).max  # a value beyond half precision becomes its largest number, not infinity
    arrays = {
        f"map_{i}": m.permute(1, 2, 0).cpu().numpy().clip(-limit, limit).astype(dtype) for i, m in enumerate(maps.maps)
    }
    cache_arrays(path, sides=np.array(maps.sides), image_size=np.array(maps.image_size), **arrays)


def read_maps(folder: Path, record: ImageRecord, flip: bool = False) -> FeatureMaps:
    """The maps that `extract_images` wrote for a record, as float32 (C, H, W) in channels-last memory."""
    path = maps_path(folder, record, flip)
    if not path.exists():
        raise StoreError(f"{path}: no maps for image {record.id}; run extract first")
    arrays = read_arrays(path)
    sides = tuple(float(side) for side in arrays["sides"])
    height, width = (int(side) for side in arrays["image_size"])
    maps = tuple(torch.from_numpy(arrays[f"map_{i}"]).float().permute(2, 0, 1) for i in range(len(sides)))
    return FeatureMaps(maps, sides, (height, width))


def _return_freed_memory() -> None:
    """Give the gaps between maps of many sizes back to the system, which glibc would keep; elsewhere do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
