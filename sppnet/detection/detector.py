"""The trained detector: an image to its detections, on one screen (sec. 4.1)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.artifacts import digest_of, read_json, read_tensors, tensors_digest, write_json, write_tensors
from sppnet.backbones.backbone import Backbone, build_backbone
from sppnet.backbones.runtime import Precision, Runtime, make_runtime, resolve_precision
from sppnet.config import Config
from sppnet.config_files import parse_config
from sppnet.detection.box_regression import BoxRegressors
from sppnet.detection.feature_maps import FeatureMaps, compute_maps
from sppnet.detection.linear_svm import LinearSVMs
from sppnet.detection.nms import nms_per_class
from sppnet.detection.window_features import FrozenHead, ProjectedWindows, project_to_maps
from sppnet.errors import ArtifactError, SppnetError
from sppnet.models.sppnet import SPPHead, build_head
from sppnet.proposals.search import Proposer, make_proposer
from sppnet.records import Detections, as_boxes, clip_boxes

FORMAT = 2  # of the detector folder
_PARTS = ("backbone", "head", "svm")  # and boxes, where they are regressed
_FIELDS = {"classes": list, "config": dict, "parts": dict, "ranks": dict}
_TRAIN_AGAIN = "run `sppnet train` again, which puts the detector together from its stages"
_OTHER_VERSION = f"damaged, or from another version of sppnet: {_TRAIN_AGAIN}"


@dataclass(frozen=True)
class DetectorDescription:
    """What detector.json says of a saved detector; reads no weights."""

    folder: Path
    config: Config
    classes: tuple[str, ...]
    parts: dict[str, str]  # file stem -> digest of its tensors
    ranks: dict[str, int]  # of the low-rank layers of the head; empty for a whole head

    @classmethod
    def read(cls, run: Path | str) -> DetectorDescription:
        """Of a run folder, or of the ``detector`` folder in it; ArtifactError where there is none of this version."""
        folder = Path(run)
        folder = folder / "detector" if (folder / "detector").is_dir() else folder
        path = folder / "detector.json"
        if not path.is_file():
            raise ArtifactError(_missing(Path(run), folder))
        values = read_json(path)
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        if found == 1:
            raise ArtifactError(
                f"{path}: saved by an earlier version of sppnet, whose settings had other names (trunk is now "
                f"backbone, compress is now low_rank, precision is one setting): {_TRAIN_AGAIN}"
            )
        if found != FORMAT:
            raise ArtifactError(f"{path}: expected format {FORMAT}, got {found!r}; {_OTHER_VERSION}")
        missing = [name for name, kind in _FIELDS.items() if not isinstance(values.get(name), kind)]
        if missing or not {*_PARTS} <= set(values["parts"]):
            missing = [*missing, "parts"]
            raise ArtifactError(f"{path}: {missing[0]} is missing or incomplete; {_OTHER_VERSION}")
        ranks = values["ranks"]
        if not all(type(rank) is int and rank > 0 for rank in ranks.values()):
            raise ArtifactError(f"{path}: ranks must be positive numbers by layer, got {ranks!r}; {_OTHER_VERSION}")
        try:
            config = parse_config(values["config"], "settings")
        except SppnetError as error:
            raise ArtifactError(f"{path}: {_OTHER_VERSION} ({error})") from None
        return cls(folder, config, tuple(values["classes"]), values["parts"], ranks)

    def digest(self, device: str | torch.device) -> str:
        """Content key of what decides the detections, given windows: weights, test settings and precision."""
        sections = (self.config.maps, self.config.pyramid, self.config.detect, self.config.svm, self.config.boxes)
        values = [section.model_dump(mode="json", exclude={"runtime"}) for section in sections]
        return digest_of(self.parts, values, resolve_precision(self.config.precision, device))


@dataclass(frozen=True)
class WindowScores:
    """Scores (R, K) of windows, and where they lie on the maps, for the features of box regression."""

    scores: NDArray[np.float32]
    maps: FeatureMaps
    projected: ProjectedWindows  # (R,)


@dataclass(frozen=True)
class SPPDetector:
    """Finds the objects of its classes in an image. Make one by training, or ``SPPDetector.load(run)``."""

    backbone: Backbone
    head: SPPHead
    svms: LinearSVMs
    regressors: BoxRegressors | None
    proposer: Proposer
    config: Config

    @property
    def classes(self) -> tuple[str, ...]:
        return self.svms.classes

    @cached_property
    def precision(self) -> Precision:
        """What is computed with: "float32" or "bfloat16"; config.precision may leave it to the hardware."""
        return resolve_precision(self.config.precision, self.device)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made when first used: a compiled runtime cannot be copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def detect(
        self, image: NDArray[np.uint8], windows: NDArray[np.floating] | None = None, *, threshold: float | None = None
    ) -> Detections:
        """Image (H, W, 3) uint8 RGB -> what is in it, best first, at every score above detect.score_threshold.

        threshold: the lowest score instead.

        `windows` (R, 4) replace the proposals; boxes come in pixels of the image, xyxy half-open.
        """
        windows = as_boxes(self.proposer(image) if windows is None else windows, "windows")
        if len(windows) == 0:
            return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int), self.classes)
        return self.select(windows, self._score(self.embed(image), windows), image.shape[:2], threshold)

    def embed(self, image: NDArray[np.uint8]) -> FeatureMaps:
        """The convolutional maps of an image: compute them once, then score as many windows as you like."""
        return compute_maps(self._runtime, image, self.config.maps)

    def score(self, maps: FeatureMaps, windows: NDArray[np.floating]) -> NDArray[np.float32]:
        """SVM scores (R, K) of windows (R, 4), boxes in the image that `maps` were computed from."""
        return self._score(maps, as_boxes(windows, "windows")).scores

    def select(
        self,
        windows: NDArray[np.floating],
        scored: WindowScores,
        image_size: tuple[int, int],
        threshold: float | None = None,
    ) -> Detections:
        """Scored windows -> detections: threshold, NMS, box regression on the survivors, clip, NMS again (release)."""
        settings = self.config.detect
        lowest = settings.score_threshold
        if threshold is not None:
            lowest = float(np.nextafter(np.float32(threshold), np.float32(-np.inf)))
        index, label = nms_per_class(windows, scored.scores, settings.nms_overlap, lowest, settings.max_per_class)
        boxes, scores = windows[index], scored.scores[index, label]
        if self._fast_regressors is not None and len(index):
            distinct, rows = scored.projected.rows(index).unique()  # few survive, so pooling them again is cheap
            features = self._frozen_head.features(scored.maps, distinct, self.config.boxes.layer)
            boxes = self._fast_regressors.refine(features, boxes, label, rows)
        boxes = clip_boxes(boxes, image_size)
        solid = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        boxes, scores, label = boxes[solid], scores[solid], label[solid]
        table = np.full((len(boxes), len(self.classes)), -np.inf)
        table[np.arange(len(boxes)), label] = scores
        keep = nms_per_class(boxes, table, settings.nms_overlap)[0]
        return Detections(
            boxes[keep].astype(np.float32), scores[keep].astype(np.float32), label[keep].astype(np.int64), self.classes
        )

    def save(self, folder: Path) -> None:
        """Everything that `load` needs, without pickle; detector.json comes last and names the contents."""
        parts = {"backbone": self.backbone.state_dict(), "head": self.head.state_dict(), "svm": self.svms.to_tensors()}
        if self.regressors is not None:
            parts["boxes"] = self.regressors.to_tensors()
        for name, tensors in parts.items():
            write_tensors(folder / f"{name}.safetensors", tensors)
        description: dict[str, Any] = {
            "format": FORMAT,
            "classes": list(self.classes),
            "config": self.config.model_dump(mode="json"),
            "parts": {name: tensors_digest(tensors) for name, tensors in parts.items()},
            "ranks": self.head.ranks,
        }
        write_json(folder / "detector.json", description)

    @classmethod
    def load(cls, run: Path | str, device: str | torch.device = "cpu", proposer: Proposer | None = None) -> SPPDetector:
        """The detector of a run folder, or of the ``detector`` folder in it; ArtifactError if training is not done."""
        description = DetectorDescription.read(run)
        folder = description.folder
        tensors = {name: _read_part(folder, name, digest) for name, digest in description.parts.items()}
        try:
            detector = cls._from_parts(description, tensors, proposer)
        except (ValueError, KeyError, RuntimeError) as error:  # settings, tensors or layers that do not fit together
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{folder / 'detector.json'}: {_OTHER_VERSION} ({reason})") from None
        return detector.to(device)

    def to(self, device: str | torch.device) -> SPPDetector:
        """The detector with its networks on `device`; they are moved, not copied."""
        linear = replace(self.svms, weight=self.svms.weight.to(device), bias=self.svms.bias.to(device))
        return replace(self, backbone=self.backbone.to(device), head=self.head.to(device), svms=linear)

    @classmethod
    def _from_parts(
        cls, description: DetectorDescription, tensors: dict[str, dict[str, Tensor]], proposer: Proposer | None
    ) -> SPPDetector:
        config = description.config
        backbone = build_backbone(config.backbone.without_weights())
        backbone.load_state_dict(tensors["backbone"])
        outputs = len(description.classes) + 1
        head = build_head(backbone.channels, config.pyramid.levels, outputs, config.head, ranks=description.ranks)
        head.load_state_dict(tensors["head"])
        svms = LinearSVMs.from_tensors(tensors["svm"])
        boxes = BoxRegressors.from_tensors(tensors["boxes"]) if "boxes" in tensors else None
        search = make_proposer(config.proposals) if proposer is None else proposer
        return cls(backbone, head, svms, boxes, search, config)

    def _score(self, maps: FeatureMaps, windows: NDArray[np.floating]) -> WindowScores:
        config = self.config
        projected = project_to_maps(maps, windows, self.backbone.geometry, config.pyramid, config.maps)
        distinct, rows = projected.unique()
        features = self._frozen_head.features(maps, distinct, config.svm.layer)
        return WindowScores(self.svms.score(features).cpu().numpy()[rows], maps, projected)

    @cached_property
    def _frozen_head(self) -> FrozenHead:
        return FrozenHead(self.head, self.config.pyramid.levels, self.precision)

    @cached_property
    def _runtime(self) -> Runtime:
        kind = self.config.maps.runtime  # "openvino" was asked for where it was trained: elsewhere it may be missing
        return make_runtime(self.backbone, "torch" if kind == "torch" else "auto", self.precision)

    @cached_property
    def _fast_regressors(self) -> BoxRegressors | None:
        return None if self.regressors is None else self.regressors.single()


def _missing(run: Path, folder: Path) -> str:
    """Why there is no detector in a run folder, and what to do."""
    if not run.exists():
        return f"{run}: no such folder; name the run folder of a training, as `sppnet train --run` does"
    if all((folder / f"{part}.safetensors").is_file() for part in _PARTS):
        return (
            f"{run}: its detector is not complete (no detector/detector.json): saving was interrupted or training with "
            "other settings or from scratch has begun; run `sppnet train` to the end, with the settings wanted"
        )
    return f"{run}: holds no trained detector (detector/detector.json); run `sppnet train` to the end first"


def _read_part(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    try:
        tensors = read_tensors(path)
    except ArtifactError:
        raise ArtifactError(f"{path}: missing or damaged; {_TRAIN_AGAIN}") from None
    if tensors_digest(tensors) != digest:
        raise ArtifactError(f"{path}: is not the file this detector was saved with; {_TRAIN_AGAIN}")
    return tensors
