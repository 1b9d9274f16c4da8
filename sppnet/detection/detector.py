"""The trained detector: an image to its detections (sec. 4.1)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from sppnet.artifacts import file_digest, tensors_digest, write_json, write_tensors
from sppnet.backbones.backbone import Backbone, build_backbone
from sppnet.backbones.runtime import Precision, Runtime, device_of, make_runtime, resolve_precision, resolve_runtime
from sppnet.checks import as_boxes, check_boxes, check_overlap, check_thresholds, is_whole
from sppnet.config import Config
from sppnet.detection.box_regression import BoxRegressors
from sppnet.detection.detector_description import FORMAT, OTHER_VERSION, DetectorDescription, check_fit, read_part
from sppnet.detection.feature_maps import FeatureMaps, check_maps, compute_maps
from sppnet.detection.joint_head import SoftmaxClassifier
from sppnet.detection.linear_svm import LinearSVMs
from sppnet.detection.nms import first_of_class, nms_per_class, suppress_detections, unite_detections
from sppnet.detection.refinement import IMPROBABLE, LOOSE, LOWEST, UNLIKELY, settle, vote
from sppnet.detection.torch_state import network_state, undisturbed
from sppnet.detection.window_features import FrozenHead, WindowScores, project_to_maps
from sppnet.distributed import choose_device
from sppnet.errors import ArtifactError, BackboneError, SppnetError
from sppnet.images import ImageInput, one_by_one, read_pixels
from sppnet.models.sppnet import SPPHead, build_head
from sppnet.proposals.search import Proposer, make_proposer
from sppnet.records import Detections, clip_boxes

T = TypeVar("T")
Images = list[Any] | tuple[Any, ...]  # of ImageInput


@dataclass(frozen=True)
class SPPDetector:
    """Finds the objects of its classes in an image. Make one by training, or ``SPPDetector.load(run)``.

    Weights, layers, their plain settings and hooks may be changed between calls: those of the moment are used. Neither
    autocast, gradient and inference modes, nor the default device or dtype of the caller change a result. Threads may
    share a detector. With `others` (`sppnet.detection.combination`), `detect` gives what all of them find; the rest
    is of this one alone.
    """

    backbone: Backbone
    head: SPPHead
    svms: LinearSVMs | SoftmaxClassifier  # the latter of a joint head: scores are probabilities
    regressors: BoxRegressors | None
    proposer: Proposer
    config: Config
    thresholds: tuple[float, ...] = ()  # the lowest score that `detect` shows, of each class; 0 where not given
    others: tuple[SPPDetector, ...] = ()  # combined with this one; detect settings are this one's

    def __post_init__(self) -> None:
        given: Any = self.thresholds
        values = check_thresholds(0 if isinstance(given, tuple) and not given else given, self.classes)
        object.__setattr__(self, "thresholds", tuple(values.tolist()))
        if any({*own.classes} != {*self.classes} for own in self.others):
            raise SppnetError("others: expected detectors of the same classes; combine_detectors says which differ")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.svms.classes

    @property
    def is_joint(self) -> bool:
        """Whether its head was trained jointly: scores are probabilities, and all is read from fc7."""
        return isinstance(self.svms, SoftmaxClassifier)

    @property
    def precision(self) -> Precision:
        """What is computed with: "float32" or "bfloat16"; config.precision may leave it to the hardware."""
        return resolve_precision(self.config.precision, self.device)

    @property
    def device(self) -> torch.device:
        return device_of(self.backbone)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made when first used: a compiled runtime cannot be copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @overload
    def detect(
        self, image: ImageInput, windows: Any = ..., *, threshold: Any = ..., nms: Any = ..., top: Any = ...
    ) -> Detections: ...
    @overload
    def detect(
        self, image: Images, windows: Any = ..., *, threshold: Any = ..., nms: Any = ..., top: Any = ...
    ) -> list[Detections]: ...
    def detect(
        self, image: Any, windows: Any = None, *, threshold: Any = None, nms: Any = None, top: Any = None
    ) -> Any:
        """What is in an image, best first; of a list of images a list.

        An image is a path, a PIL image, an array (H, W, 3) uint8 RGB, or a tensor (3, H, W), uint8 or in [0, 1].
        `windows` (R, 4) replace the proposals; boxes are in pixels of the upright image, xyxy half-open.

        threshold: lowest score, a number or one for each class; default `thresholds`.
        nms: overlap above which the worse box of a class goes, or of a joint head loses score; default as the settings.
        top: at most so many of the best detections an image; default all. SppnetError for what cannot be taken.
        """
        if isinstance(image, list | tuple):
            each = [None] * len(image) if windows is None else windows
            if not isinstance(each, list | tuple) or len(each) != len(image):
                raise SppnetError(f"windows of a list of images must be a list of as many arrays, here {len(image)}")
            return one_by_one(self.detect, image, each, threshold=threshold, nms=nms, top=top)
        lowest = None if threshold is None else self._by_class(threshold)
        overlap = self.config.detect.nms_overlap if nms is None else check_overlap(nms, "nms")
        if top is not None and not (is_whole(top) and top > 0):
            raise SppnetError(f"top must be a count of detections, at least 1, got {top!r}; leave it out for all")
        pixels = read_pixels(image)
        found = check_boxes(self.proposer(pixels) if windows is None else windows, "windows", np.float64)
        try:
            return self._search(pixels, found, lowest, overlap)[0][:top]
        except BackboneError as error:
            raise BackboneError(f"{image}: {error}" if isinstance(image, str | os.PathLike) else str(error)) from None

    @overload
    def embed(self, image: ImageInput) -> FeatureMaps: ...
    @overload
    def embed(self, image: Images) -> list[FeatureMaps]: ...
    def embed(self, image: Any) -> Any:
        """The convolutional maps of an image, as `detect` takes it: compute them once, then score many windows.

        They are ordinary tensors without gradients; of a list of images a list.
        """
        if isinstance(image, list | tuple):
            return one_by_one(self.embed, image)
        with undisturbed():
            found = compute_maps(self._runtime(), read_pixels(image), self.config.maps)
            return replace(found, maps=tuple(m.clone() if m.is_inference() else m for m in found.maps))

    def score(self, maps: FeatureMaps, windows: ArrayLike) -> NDArray[np.float32]:
        """Scores (R, K) of windows (R, 4) of the image of `maps`: margins of SVMs, or probabilities of a joint head."""
        boxes = check_boxes(windows, "windows", np.float64)
        with undisturbed():
            return self._score(maps, boxes).scores

    def detect_for_evaluation(
        self, image: FeatureMaps | WindowScores | ImageInput, windows: NDArray[np.floating]
    ) -> tuple[Detections, tuple[str, ...]]:
        """As the release evaluates: all above detect.score_threshold, detect.max_per_class of a class at most.

        Takes an image, its maps or scores; of a joint head at least 0.01. Also returns the classes the maximum cut.
        """
        own, boxes = self.config.detect, as_boxes(windows, "windows")
        least = max(own.score_threshold, IMPROBABLE) if self.is_joint else own.score_threshold
        above = np.nextafter(check_thresholds(least, self.classes), np.float32(np.inf))
        return self._search(image, boxes, self._by_class(above), own.nms_overlap, own.max_per_class)

    def _search(
        self,
        image: FeatureMaps | WindowScores | ImageInput,
        windows: NDArray[np.floating],
        lowest: dict[str, float] | None,
        overlap: float,
        limit: int | None = None,
    ) -> tuple[Detections, tuple[str, ...]]:
        """The whole way of sec. 4.1, from an image or its maps on; with others that of sec. 4.4.

        `lowest`: the score from which on a detection of a class is shown; None for the thresholds of each detector.
        Boxes of joint heads are settled together, then shown from the lowest of these thresholds on.
        """
        if len(windows) == 0:
            none: Any = []
            return Detections(none, none, none, self.classes), ()
        if self.others and isinstance(image, FeatureMaps):
            raise SppnetError("maps: each of several combined detectors has its own; pass the image")
        lows = [lowest or own._by_class(own.thresholds) for own in (self, *self.others)]
        found, passed, left_out = list[Detections](), list[NDArray[np.bool_]](), set[str]()
        for own, low in zip((self, *self.others), lows, strict=True):
            maps = image if isinstance(image, FeatureMaps | WindowScores) else own.embed(image)
            with undisturbed():
                scored = own._score(maps, windows)
                passes = scored.scores >= check_thresholds([low[name] for name in own.classes], own.classes)
                if self.is_joint:  # boxes that do not pass may vote
                    rows, label = np.nonzero(passes | (scored.scores > UNLIKELY) if own.config.detect.vote else passes)
                    boxes, solid = own._regress(windows, scored, rows, label)
                    rows, label = rows[solid], label[solid]
                    found.append(Detections(boxes, scored.scores[rows, label], label, own.classes))
                    passed.append(passes[rows, label])
                else:
                    selected, cut = own.select(windows, scored, passes, overlap, limit)
                    found.append(selected)
                    left_out |= {*cut}
        every = unite_detections(found)
        if self.is_joint:
            settled, cut = settle(every, np.concatenate(passed), overlap, limit, self.config.detect.vote)
            return settled.above([min(low[name] for low in lows) for name in self.classes]), cut
        pooled, cut = suppress_detections(every, overlap, limit) if self.others else (every, ())
        return pooled, tuple(name for name in self.classes if name in {*cut, *left_out})

    def select(
        self,
        windows: NDArray[np.floating],
        scored: WindowScores,
        passes: NDArray[np.bool_],
        overlap: float,
        limit: int | None = None,
    ) -> tuple[Detections, tuple[str, ...]]:
        """NMS, box regression on the survivors, clip, NMS again (release) of the SVMs' scores that pass (R, K).

        With detect.vote boxes move before the second NMS (ours). Also returns the classes with more than `limit`.
        """
        most = len(windows) if limit is None else limit
        kept, label = nms_per_class(windows, np.where(passes, scored.scores, -np.inf), overlap, max_per_class=most + 1)
        stay, more = first_of_class(label, most)
        kept, label, cut = kept[stay], label[stay], tuple(self.classes[own] for own in more)
        boxes, solid = self._regress(windows, scored, kept, label)
        found = Detections(boxes, scored.scores[kept[solid], label[solid]], label[solid], self.classes)
        if self.config.detect.vote:
            votes, of = nms_per_class(windows, np.where(scored.scores > LOWEST, scored.scores, -np.inf), LOOSE)
            others, solid = self._regress(windows, scored, votes, of)
            found = vote(found, Detections(others, scored.scores[votes, of][solid], of[solid], self.classes))
        return suppress_detections(found, overlap)[0], cut

    def _regress(
        self, windows: NDArray[np.floating], scored: WindowScores, kept: NDArray[np.int64], label: NDArray[np.int64]
    ) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
        """Of those kept (S,), by the regressors of their labels and clipped: boxes with extent, and which are (S,)."""
        boxes = windows[kept]
        if self.regressors is not None and len(kept):
            if scored.features is None:
                distinct, rows = scored.projected.rows(kept).unique()  # few survive, so pooling them again is cheap
                features = (scored.head or self._frozen_head()).features(scored.maps, distinct, self.config.boxes.layer)
            else:
                features, rows = scored.features[0], scored.features[1][kept]
            boxes = self.regressors.single().refine(features, boxes, label, rows)
        boxes = clip_boxes(boxes, scored.maps.image_size)
        corners = boxes.astype(np.float32)
        solid = np.all(corners[:, 2:] > corners[:, :2], axis=1)
        return boxes[solid], solid

    def _by_class(self, threshold: ArrayLike) -> dict[str, float]:
        return dict(zip(self.classes, check_thresholds(threshold, self.classes).tolist(), strict=True))

    def save(self, folder: Path | str) -> None:
        """Everything that `load` needs, without pickle; detector.json comes last and names the contents."""
        folder = Path(folder)
        parts = {"backbone": self.backbone.state_dict(), "head": self.head.state_dict()}
        if isinstance(self.svms, LinearSVMs):
            parts["svm"] = self.svms.to_tensors()
        if self.regressors is not None:
            parts["boxes"] = self.regressors.to_tensors()
        if self.config.backbone.weights.mean_image is not None:
            parts["mean_image"] = {"mean": torch.as_tensor(self.backbone.mean)}
        for name, tensors in parts.items():
            write_tensors(folder / f"{name}.safetensors", tensors)
        others = [folder / "others" / str(place) for place in range(len(self.others))]
        for own, place in zip(self.others, others, strict=True):
            own.save(place)
        description: dict[str, Any] = {
            "format": FORMAT,
            "classes": list(self.classes),
            "config": self.config.model_dump(mode="json"),
            "parts": {name: tensors_digest(tensors) for name, tensors in parts.items()},
            "ranks": self.head.ranks,
            "thresholds": list(self.thresholds),
            "others": [file_digest(place / "detector.json") for place in others],
        }
        write_json(folder / "detector.json", description)

    @classmethod
    def load(
        cls,
        run: Path | str,
        device: str | torch.device = "cpu",
        proposer: Proposer | None = None,
        backbone: nn.Module | None = None,
    ) -> SPPDetector:
        """The detector of a run folder, or of the ``detector`` folder in it; ArtifactError if training is not done.

        `backbone`: the network of your own that it was trained with; its weights are read from the folder.
        """
        description, device = DetectorDescription.read(run), choose_device(device)
        config, classes, folder = description.config, description.classes, description.folder
        tensors = {name: read_part(folder, name, digest) for name, digest in description.parts.items()}
        others = tuple(cls.load(own.folder, device) for own in description.others)
        search = proposer or make_proposer(config.proposals, *(own.config.proposals for own in others))
        try:
            with undisturbed():  # in float32 whatever torch's default
                network = build_backbone(config.backbone.without_weights(), module=backbone).float()
                check_fit(network, tensors["backbone"], f"{folder / 'backbone.safetensors'}: the weights")
                network.load_state_dict(tensors["backbone"])
                if config.backbone.weights.mean_image is not None:
                    network.mean = tensors["mean_image"]["mean"]
                levels, ranks = config.pyramid.levels, description.ranks
                head = build_head(network.channels, levels, len(classes) + 1, config.head, ranks=ranks).float()
                head.load_state_dict(tensors["head"])
                softmax = SoftmaxClassifier(head.classifier, classes)
                svms = LinearSVMs.from_tensors(tensors["svm"]) if "svm" in tensors else softmax
                boxes = BoxRegressors.from_tensors(tensors["boxes"]) if "boxes" in tensors else None
                detector = cls(network, head, svms, boxes, search, config, description.thresholds, others)
        except (
            ValueError,
            KeyError,
            RuntimeError,
            TypeError,
        ) as error:  # settings, tensors or layers that do not fit together
            if isinstance(error, BackboneError) and (backbone is not None or config.backbone.module is not None):
                raise
            raise ArtifactError(
                f"{folder / 'detector.json'}: {OTHER_VERSION} ({' '.join(str(error).split())[:300]})"
            ) from None
        return detector.to(device)

    def to(self, device: str | torch.device) -> SPPDetector:
        """The detector with its networks on `device`; they are moved, not copied."""
        device = choose_device(device)
        svms, others = self.svms.to(device), tuple(own.to(device) for own in self.others)
        return replace(self, backbone=self.backbone.to(device), head=self.head.to(device), svms=svms, others=others)

    def _score(self, maps: FeatureMaps | WindowScores, windows: NDArray[np.floating]) -> WindowScores:
        if isinstance(maps, WindowScores):
            return maps
        check_maps(maps, self.backbone.channels)
        projected = project_to_maps(maps, windows, self.backbone.geometry, self.config.pyramid, self.config.maps)
        distinct, rows = projected.unique()
        head = self._frozen_head()
        features = head.features(maps, distinct, "fc7" if self.is_joint else self.config.svm.layer)
        scores = self.svms.score(features).cpu().numpy()[rows]
        if not np.isfinite(scores).all():
            raise SppnetError("the scores are not finite: a weight of the detector is NaN or infinite; load it again")
        return WindowScores(scores, maps, projected, head, (features, rows) if self.is_joint else None)

    def _frozen_head(self) -> FrozenHead:
        return self._kept("head", self.head, lambda: FrozenHead(self.head, self.config.pyramid.levels, self.precision))

    def _runtime(self) -> Runtime:
        # "openvino" was asked for where it was trained: elsewhere it may be missing
        kind = "auto" if self.config.maps.runtime == "openvino" else self.config.maps.runtime
        if resolve_runtime(kind, self.device) == "torch":
            return make_runtime(self.backbone, "torch", self.precision)  # runs the layers themselves: nothing to keep
        return self._kept("runtime", self.backbone, lambda: make_runtime(self.backbone, kind, self.precision))

    def _kept(self, name: str, network: nn.Module, make: Callable[[], T]) -> T:
        """What `make` gives of a network, made again when that has changed."""
        state = network_state(network)
        kept = self.__dict__.setdefault("_made", {})
        found = kept.get(name)
        if found is None or found[0] != state:
            found = kept[name] = (state, make())
        return found[1]
