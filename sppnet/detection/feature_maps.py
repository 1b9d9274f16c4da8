"""The convolutional map of an image, computed once, at every scale (sec. 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.artifacts import has_arrays, map_arrays, write_arrays
from sppnet.backbones.backbone import Backbone
from sppnet.backbones.runtime import Runtime
from sppnet.config import MapSettings
from sppnet.distributed import barrier, shard
from sppnet.errors import ArtifactError, BackboneError, SppnetError
from sppnet.images import flip_image, read_image, scaled_size
from sppnet.jobs import map_in_workers
from sppnet.records import ImageRecord


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """The maps of one image: one (C, H, W) tensor a scale, and the shorter side in pixels it was computed at."""

    maps: tuple[Tensor, ...]
    sides: tuple[float, ...]
    image_size: tuple[int, int]  # (height, width) of the original image

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FeatureMaps:
        return FeatureMaps(tuple(m.to(device, dtype) for m in self.maps), self.sides, self.image_size)


@dataclass(frozen=True)
class ExtractSummary:
    """What `extract_images` did with the images of this process."""

    computed: int
    reused: int
    gigabytes: float  # on disk, of all


def compute_maps(runtime: Runtime, image: NDArray[np.uint8], settings: MapSettings) -> FeatureMaps:
    """Image (H, W, 3) uint8 RGB -> its maps in float32, on the runtime's device, at every scale of the settings.

    Each map is (C, H, W) in channels-last memory. An image so narrow that the bound on its longer side leaves no map at
    a scale is an error that names the setting.
    """
    (height, width), maps, sides = image.shape[:2], list[Tensor](), list[float]()
    for scale in settings.scales:
        size, side = scaled_size((height, width), scale, settings.max_side)
        try:
            feature_map = runtime(runtime.prepare(image, size))[0]
        except BackboneError as error:
            raise BackboneError(f"an image of {width} × {height} pixels is too narrow: {error}") from None
        maps.append(feature_map.permute(1, 2, 0).contiguous().permute(2, 0, 1))
        sides.append(side)
    return FeatureMaps(tuple(maps), tuple(sides), (height, width))


def check_maps(maps: object, channels: int) -> None:
    """SppnetError for what is no FeatureMaps of so many channels."""
    if not isinstance(maps, FeatureMaps) or any(own.shape[0] != channels for own in maps.maps):
        found = len(maps.maps[0]) if isinstance(maps, FeatureMaps) else type(maps).__name__
        raise SppnetError(f"maps: expected FeatureMaps of {channels} channels, got {found}; pass what embed returned")


def count_cells(records: Sequence[ImageRecord], backbone: Backbone, settings: MapSettings) -> NDArray[np.int64]:
    """Cells of the maps of each image, of all scales together: (N,), known from the layers.

    Raise BackboneError, with their names, where images have no map at one of the scales: they are too narrow.
    """
    found, cells = dict[str, str](), list[int]()
    for record in records:
        try:
            scaled = [scaled_size(record.size, scale, settings.max_side)[0] for scale in settings.scales]
            cells.append(sum(height * width for height, width in map(backbone.map_size, scaled)))
        except BackboneError as error:
            size = f"{record.size[1]} × {record.size[0]} pixels"
            found.setdefault(record.id, f"{record.path}: an image of {size} has no map: {error}, or leave it out")
    if found:
        first, *others = found
        more = f"; {len(others)} more: {', '.join(others[:3])}" if others else ""
        raise BackboneError(f"{found[first]}{more}")
    return np.array(cells, np.int64)


def extract_images(
    images: Sequence[tuple[ImageRecord, bool]],
    load: Callable[[], Runtime],
    settings: MapSettings,
    folder: Path,
    workers: int = 0,
    progress: bool = True,
) -> ExtractSummary:
    """Write the maps of (image, whether it is mirrored) to `folder`; complete ones stay.

    Images are shared by `workers` processes (0 = one a core), each with a runtime of its own from `load`, which must be
    picklable. Under torchrun every process does its share of the records.
    """
    jobs = shard(images)
    missing = [(record, flip) for record, flip in jobs if not has_arrays(record.path_in(folder, flip))]
    map_in_workers(partial(_extractor, load, settings, folder), missing, "maps", "map", workers, progress)
    barrier()
    size = sum(record.path_in(folder, flip).stat().st_size for record, flip in jobs)
    return ExtractSummary(len(missing), len(jobs) - len(missing), size / 1e9)


def _extractor(
    load: Callable[[], Runtime], settings: MapSettings, folder: Path
) -> Callable[[tuple[ImageRecord, bool]], None]:
    """Writes the maps of one image, or of its mirror image, after the other."""
    runtime = load()

    def extract(job: tuple[ImageRecord, bool]) -> None:
        record, flip = job
        write_maps(record.path_in(folder, flip), image_maps(runtime, record, flip, settings))

    return extract


def image_maps(runtime: Runtime, record: ImageRecord, flip: bool, settings: MapSettings) -> FeatureMaps:
    """The maps of an image, or of its mirror image, as `rounded` has them."""
    image = read_image(record.path)
    try:
        return rounded(compute_maps(runtime, flip_image(image) if flip else image, settings), settings)
    except BackboneError as error:
        raise BackboneError(f"{record.path}: {error}") from None


def rounded(maps: FeatureMaps, settings: MapSettings) -> FeatureMaps:
    """On the CPU, in the precision of maps.storage; a value beyond it becomes its largest number, not infinity."""
    dtype = torch.float16 if settings.storage == "float16" else torch.float32
    limit = torch.finfo(dtype).max
    return replace(maps, maps=tuple(m.cpu().clamp(-limit, limit).to(dtype) for m in maps.maps))


def write_maps(path: Path, maps: FeatureMaps) -> None:
    """Maps as (H, W, C) arrays, as `rounded` gives them, so that a window is one run of memory a row."""
    arrays = {f"map_{i}": m.permute(1, 2, 0).numpy() for i, m in enumerate(maps.maps)}
    write_arrays(path, durable=False, sides=np.array(maps.sides), image_size=np.array(maps.image_size), **arrays)


def read_maps(folder: Path, record: ImageRecord, flip: bool = False) -> FeatureMaps:
    """The maps (C, H, W), in channels-last memory, that `extract_images` wrote for a record, in their precision there.

    They stay on the disk, from where only those cells are read that are used (`pool_crops`).
    """
    path = record.path_in(folder, flip)
    if not path.exists():
        raise ArtifactError(f"{path}: no maps for image {record.id}; run extract first")
    arrays = map_arrays(path)
    sides, (height, width) = tuple(arrays["sides"].tolist()), arrays["image_size"].tolist()
    maps = tuple(torch.from_numpy(arrays[f"map_{i}"]).permute(2, 0, 1) for i in range(len(sides)))
    return FeatureMaps(maps, sides, (height, width))
