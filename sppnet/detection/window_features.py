"""Feature maps and windows become pyramid vectors, and those become fc features (sec. 4.1)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.backbones.geometry import Geometry
from sppnet.backbones.windows import choose_scales, project_windows
from sppnet.config import MapSettings, PyramidSettings
from sppnet.detection.feature_maps import FeatureMaps
from sppnet.models.sppnet import Layer, SPPHead, pooled_size
from sppnet.ops.pyramid import pool_windows

# Maps, and windows (R,) on them, to the features wanted: (R, F) float32.
Features = Callable[[FeatureMaps, "ProjectedWindows"], Tensor]

STEP = 128  # rows; oneDNN keeps what it prepared for each number of them, megabytes
BATCH = 1024  # windows pooled and multiplied together: small enough that the allocator reuses the memory


@dataclass(frozen=True, eq=False)
class ProjectedWindows:
    """Where windows fall on the maps: at which scale (R,), and on which cells (R, 4)."""

    scale_index: NDArray[np.int64]
    cells: NDArray[np.int64]

    def rows(self, index: NDArray[np.int64]) -> ProjectedWindows:
        return ProjectedWindows(self.scale_index[index], self.cells[index])

    def unique(self) -> tuple[ProjectedWindows, NDArray[np.int64]]:
        """The distinct ones, in order of first occurrence, and for every window its row (R,) among them.

        The release compares windows before it clamps them to the map, and so keeps a few that become the same.
        """
        rows = np.column_stack([self.scale_index, self.cells])
        rows = rows - rows.min(axis=0, initial=0)
        keys = np.ravel_multi_index(tuple(rows.T), tuple(rows.max(axis=0, initial=0) + 1))
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(first)
        return self.rows(first[order]), np.argsort(order)[group]


def project_to_maps(
    maps: FeatureMaps,
    windows: NDArray[np.floating],
    geometry: Geometry,
    pyramid: PyramidSettings,
    settings: MapSettings,
    scale_index: NDArray[np.int64] | None = None,
) -> ProjectedWindows:
    """Boxes (R, 4) of the original image -> the scale each is pooled from, unless it is given (R,), and its cells."""
    if scale_index is None:
        side, rule = settings.target_side, settings.scale_choice
        scale_index = choose_scales(windows, maps.image_size, maps.sides, side, rule).astype(np.int64)
    cells = np.zeros((len(windows), 4), np.int64)
    for index, (feature_map, side) in enumerate(zip(maps.maps, maps.sides, strict=True)):
        chosen = scale_index == index
        size = (feature_map.shape[1], feature_map.shape[2])
        cells[chosen] = project_windows(windows[chosen], maps.image_size, side, geometry, size, pyramid.projection)
    return ProjectedWindows(scale_index, cells)


def pool_projected(maps: FeatureMaps, projected: ProjectedWindows, levels: tuple[int, ...]) -> Tensor:
    """Pyramid vectors (R, C · Σn²) of windows on the maps, float32, on the maps' device."""
    first = maps.maps[0]
    if len(maps.maps) == 1:
        return pool_windows(first, projected.cells, levels)
    pooled = first.new_zeros((len(projected.cells), pooled_size(first.shape[0], levels)))
    for index, feature_map in enumerate(maps.maps):
        rows = np.flatnonzero(projected.scale_index == index)
        if len(rows):
            pooled[torch.from_numpy(rows).to(first.device)] = pool_windows(feature_map, projected.cells[rows], levels)
    return pooled


def pool_crops(maps: FeatureMaps, projected: ProjectedWindows, levels: tuple[int, ...]) -> Tensor:
    """The same on the CPU, window by window: of maps on the disk no more is read than the cells of the windows."""
    rows = [maps.maps[0].new_zeros(0, pooled_size(len(maps.maps[0]), levels), dtype=torch.float32)]
    for scale, (x1, y1, x2, y2) in zip(projected.scale_index, projected.cells, strict=True):
        crop = maps.maps[scale][:, y1:y2, x1:x2].float()
        rows.append(pool_windows(crop, np.array([[0, 0, x2 - x1, y2 - y1]]), levels))
    return torch.cat(rows)


class FrozenHead:
    """fc6 and fc7 ready for many windows, in `precision` once and for all; a copy that later changes do not reach."""

    @torch.no_grad()
    def __init__(self, head: SPPHead, levels: tuple[int, ...], precision: str = "float32") -> None:
        self._levels, self._kind = levels, torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._head = copy.deepcopy(head).eval()
        self._head.products("fc6")[0].weight.mul_(head.input_scale)
        self._head.input_scale.fill_(1)
        self._head.to(self._kind)

    @torch.inference_mode()
    def features(self, maps: FeatureMaps, projected: ProjectedWindows, layer: Layer) -> Tensor:
        """Float32 features of `layer` of windows on the maps: (R, 4096 or so), for "pool" (R, C · Σn²)."""
        if layer == "pool":
            return pool_projected(maps, projected, self._levels)
        features = maps.maps[0].new_empty((len(projected.cells), self._head.products(layer)[-1].out_features))
        by_scale = np.argsort(projected.scale_index, kind="stable")  # a batch then reads few maps
        for rows in np.split(by_scale, range(BATCH, len(by_scale), BATCH)):
            pooled = pool_projected(maps, projected.rows(rows), self._levels)
            features[torch.from_numpy(rows)] = self._head.features(self._rounded(pooled), layer)[: len(rows)].float()
        return features

    @torch.inference_mode()
    def above_basis(self, rows: Tensor) -> Tensor:
        """Float32 features of fc7 of what basis6 gives, (R, rank): (R, fc7)."""
        fc6 = torch.relu(self._head.fc6(self._rounded(rows)))
        return torch.relu(self._head.fc7(self._head.basis7(fc6)))[: len(rows)].float()

    def _rounded(self, pooled: Tensor) -> Tensor:
        """(R, D) in the precision of the products, in bfloat16 with zeros up to a multiple of `STEP` rows."""
        if self._kind == torch.float32:
            return pooled
        rounded = pooled.new_zeros((-(-len(pooled) // STEP) * STEP, pooled.shape[1]), dtype=self._kind)
        rounded[: len(pooled)] = pooled
        return rounded


@dataclass(frozen=True, eq=False)
class WindowScores:
    """Scores (R, K) of windows, and where they lie on the maps, for the features of box regression."""

    scores: NDArray[np.float32]
    maps: FeatureMaps
    projected: ProjectedWindows  # (R,)
    head: FrozenHead | None = None  # what scored them, so that a change is not looked for twice an image
    features: tuple[Tensor, NDArray[np.int64]] | None = None  # fc7 of a joint head (U, D), the row of each window (R,)
