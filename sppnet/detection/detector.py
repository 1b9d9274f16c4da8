"""The trained detector: rooms 1-4 and 6-8 at test time, on one screen (sec. 4.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.boxes import as_boxes, clip_boxes
from sppnet.config import Config
from sppnet.config_files import parse_config
from sppnet.detection.box_regression import BoxRegressors
from sppnet.detection.feature_maps import FeatureMaps, compute_maps
from sppnet.detection.linear_svm import LinearDetectors
from sppnet.detection.nms import nms_per_class
from sppnet.detection.proposals import Proposer, make_proposer
from sppnet.detection.window_features import FrozenHead, WindowCells, window_cells
from sppnet.network.sppnet import SPPHead, build_head
from sppnet.network.trunks import Trunk, build_trunk
from sppnet.records import Detections
from sppnet.store import StoreError, digest_of, read_json, read_tensors, tensors_digest, write_json, write_tensors

FORMAT = 1  # of the detector folder
_FIELDS = {"classes": list, "config": dict, "parts": dict}
_TRAIN_AGAIN = "run `sppnet train` again, which puts the detector together from its stages"
_OTHER_VERSION = f"damaged, or from another version of sppnet: {_TRAIN_AGAIN}"


@dataclass(frozen=True)
class WindowScores:
    """Scores (R, K) of windows, and where they lie on the maps, for the features that box regression asks for."""

    scores: NDArray[np.float32]
    maps: FeatureMaps
    where: WindowCells  # (R,)


@dataclass(frozen=True)
class SPPDetector:
    """Finds the objects of its classes in an image. Make one by training, or ``SPPDetector.load(run)``."""

    trunk: Trunk
    head: SPPHead
    detectors: LinearDetectors
    regressors: BoxRegressors | None
    proposer: Proposer
    config: Config

    @property
    def classes(self) -> tuple[str, ...]:
        return self.detectors.classes

    @property
    def device(self) -> torch.device:
        return next(self.trunk.parameters()).device

    def detect(self, image: NDArray[np.uint8], windows: NDArray[np.floating] | None = None) -> Detections:
        """Image (H, W, 3) uint8 RGB -> what is in it, best first, at every score above detect.score_threshold.

        `windows` (R, 4) replace the proposals; boxes come in pixels of the image, xyxy half-open.
        """
        windows = as_boxes(self.proposer(image) if windows is None else windows, "windows")
        if len(windows) == 0:
            return self._nothing()
        return self.select(windows, self._score(self.embed(image), windows), image.shape[:2])

    def embed(self, image: NDArray[np.uint8]) -> FeatureMaps:
        """The convolutional maps of an image: compute them once, then score as many windows as you like."""
        return compute_maps(self.trunk, image, self.config.maps)

    def score(self, maps: FeatureMaps, windows: NDArray[np.floating]) -> NDArray[np.float32]:
        """SVM scores (R, K) of windows (R, 4), boxes in the image that `maps` were computed from."""
        return self._score(maps, as_boxes(windows, "windows")).scores

    def select(self, windows: NDArray[np.floating], scored: WindowScores, image_size: tuple[int, int]) -> Detections:
        """Scored windows -> detections: threshold, NMS, box regression on the survivors, clip, NMS again (release)."""
        settings = self.config.detect
        index, label = nms_per_class(
            windows, scored.scores, settings.nms_overlap, settings.score_threshold, settings.max_per_class
        )
        boxes, scores = windows[index], scored.scores[index, label]
        if self._fast_regressors is not None and len(index):
            distinct, rows = scored.where.rows(index).merged()  # few survive, so pooling them again is cheap
            features = self._frozen_head.features(scored.maps, distinct, self.config.boxes.layer)
            boxes = self._fast_regressors.refine(features, boxes, label, rows)
        boxes = clip_boxes(boxes, image_size)
        solid = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        boxes, scores, label = boxes[solid], scores[solid], label[solid]
        keep = _nms_of_labels(boxes, scores, label, len(self.classes), settings.nms_overlap)
        return Detections(
            boxes[keep].astype(np.float32), scores[keep].astype(np.float32), label[keep].astype(np.int64), self.classes
        )

    def save(self, folder: Path) -> None:
        """Everything that `load` needs, without pickle; detector.json comes last and names the contents."""
        parts = {"trunk": self.trunk.state_dict(), "head": self.head.state_dict(), "svm": self.detectors.to_tensors()}
        if self.regressors is not None:
            parts["boxes"] = self.regressors.to_tensors()
        for name, tensors in parts.items():
            write_tensors(folder / f"{name}.safetensors", tensors)
        description: dict[str, Any] = {
            "format": FORMAT,
            "classes": list(self.classes),
            "config": self.config.model_dump(mode="json"),
            "parts": {name: tensors_digest(tensors) for name, tensors in parts.items()},
        }
        if self.head.ranks:  # of a compressed head
            description["ranks"] = self.head.ranks
        write_json(folder / "detector.json", description)

    @classmethod
    def load(cls, run: Path | str, device: str | torch.device = "cpu", proposer: Proposer | None = None) -> SPPDetector:
        """The detector of a run folder, or of the ``detector`` folder in it; StoreError if training is not complete."""
        folder = Path(run)
        folder = folder / "detector" if (folder / "detector").is_dir() else folder
        if not (folder / "detector.json").is_file():
            raise StoreError(_missing(Path(run), folder))
        description = _read_description(folder / "detector.json")
        tensors = {name: _read_part(folder, name, digest) for name, digest in description["parts"].items()}
        try:
            detector = cls._from_parts(description, tensors, proposer)
        except (ValueError, KeyError, RuntimeError) as error:  # settings, tensors or layers that do not fit together
            reason = str(error).splitlines()[0]
            raise StoreError(f"{folder / 'detector.json'}: {_OTHER_VERSION} ({reason})") from None
        return detector.to(device)

    def to(self, device: str | torch.device) -> SPPDetector:
        """The detector with its networks on `device`; they are moved, not copied."""
        linear = replace(self.detectors, weight=self.detectors.weight.to(device), bias=self.detectors.bias.to(device))
        return replace(self, trunk=self.trunk.to(device), head=self.head.to(device), detectors=linear)

    @classmethod
    def _from_parts(
        cls, description: dict[str, Any], tensors: dict[str, dict[str, Tensor]], proposer: Proposer | None
    ) -> SPPDetector:
        config = parse_config(description["config"], "settings")
        weights = config.trunk.weights.model_copy(update={"source": "random"})
        trunk = build_trunk(config.trunk.model_copy(update={"weights": weights}))
        trunk.load_state_dict(tensors["trunk"])
        outputs, ranks = len(description["classes"]) + 1, _read_ranks(description)
        head = build_head(trunk.channels, config.pyramid.levels, outputs, config.head, ranks=ranks)
        head.load_state_dict(tensors["head"])
        detectors = LinearDetectors.from_tensors(tensors["svm"])
        boxes = BoxRegressors.from_tensors(tensors["boxes"]) if "boxes" in tensors else None
        search = make_proposer(config.proposals) if proposer is None else proposer
        return cls(trunk, head, detectors, boxes, search, config)

    def digest(self) -> str:
        """Content key of what decides the detections, given windows: weights and test settings."""
        tensors = [
            tensors_digest(part)
            for part in (self.trunk.state_dict(), self.head.state_dict(), self.detectors.to_tensors())
        ]
        boxes = tensors_digest(self.regressors.to_tensors()) if self.regressors is not None else None
        settings = [self.config.maps, self.config.pyramid, self.config.detect, self.config.svm, self.config.boxes]
        return digest_of(tensors, boxes, [s.model_dump(mode="json") for s in settings])

    def _score(self, maps: FeatureMaps, windows: NDArray[np.floating]) -> WindowScores:
        config = self.config
        where = window_cells(maps, windows, self.trunk.geometry, config.pyramid, config.maps)
        distinct, rows = where.merged()
        features = self._frozen_head.features(maps, distinct, config.svm.layer)
        return WindowScores(self.detectors.score(features).cpu().numpy()[rows], maps, where)

    @cached_property
    def _frozen_head(self) -> FrozenHead:
        return FrozenHead(self.head, self.config.pyramid.levels, self.config.detect.precision)

    @cached_property
    def _fast_regressors(self) -> BoxRegressors | None:
        return None if self.regressors is None else self.regressors.single()

    def _nothing(self) -> Detections:
        return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), self.classes)


def _missing(run: Path, folder: Path) -> str:
    """Why there is no detector in a run folder, and what to do."""
    if not run.exists():
        return f"{run}: no such folder; name the run folder of a training, as `sppnet train --run` does"
    if all((folder / f"{part}.safetensors").is_file() for part in ("trunk", "head", "svm")):
        return (
            f"{run}: its detector is not complete (no detector/detector.json): saving was interrupted or training with "
            "other settings or from scratch has begun; run `sppnet train` to the end, with the settings wanted"
        )
    return f"{run}: holds no trained detector (detector/detector.json); run `sppnet train` to the end first"


def _read_description(path: Path) -> dict[str, Any]:
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise StoreError(f"{path}: expected format {FORMAT}, got {found!r}; {_OTHER_VERSION}")
    missing = [name for name, kind in _FIELDS.items() if not isinstance(description.get(name), kind)]
    if missing or not {"trunk", "head", "svm"} <= set(description["parts"]):
        raise StoreError(f"{path}: {missing[0] if missing else 'parts'} is missing or incomplete; {_OTHER_VERSION}")
    return description


def _read_ranks(description: dict[str, Any]) -> dict[str, int]:
    """Ranks of the compressed layers of the head; none for a whole head."""
    ranks = description.get("ranks", {})
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
        raise ValueError(f"ranks must be positive numbers by layer, got {ranks!r}")
    return ranks


def _read_part(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    try:
        tensors = read_tensors(path)
    except StoreError:
        raise StoreError(f"{path}: missing or damaged; {_TRAIN_AGAIN}") from None
    if tensors_digest(tensors) != digest:
        raise StoreError(f"{path}: is not the file this detector was saved with; {_TRAIN_AGAIN}")
    return tensors


def _nms_of_labels(
    boxes: NDArray[np.floating], scores: NDArray[np.floating], labels: NDArray[np.int64], classes: int, threshold: float
) -> NDArray[np.int64]:
    """NMS within each label; indices best first."""
    table = np.full((len(boxes), classes), -np.inf)
    table[np.arange(len(boxes)), labels] = scores
    return nms_per_class(boxes, table, threshold)[0]
