"""Train a detector: rooms 1-7 in order, on one screen; every stage resumes (sec. 4.1).

    propose -> (pretrain) -> extract -> finetune -> svm -> boxes -> detector/
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sppnet import distributed
from sppnet.classification.multisize import pretrain_network
from sppnet.config import Config
from sppnet.detection.box_regression import BoxRegressor, BoxRegressors, fit_box_regressor
from sppnet.detection.detector import SPPDetector
from sppnet.detection.feature_maps import extract_images, maps_path
from sppnet.detection.finetuning import finetune_head
from sppnet.detection.hard_negatives import MiningState, mine_detectors
from sppnet.detection.linear_svm import LinearDetectors, mean_norm_scale
from sppnet.detection.plan import RunPlan, load_run_data
from sppnet.detection.proposals import make_proposer, propose_images, read_windows, windows_path
from sppnet.detection.training_windows import (
    FinetuneWindows,
    MiningWindows,
    TrainingWindows,
    find_box_examples,
    pool_box_examples,
)
from sppnet.detection.window_features import head_features
from sppnet.evaluation.proposals import proposal_recall
from sppnet.network.sppnet import Layer, SPPHead, build_head, copy_fc, load_head_checkpoint, load_pretrained_fc, pooled_size
from sppnet.network.trunks import Trunk, build_trunk
from sppnet.network.weights import load_weight_file, torchvision_state
from sppnet.store import read_arrays, read_tensors, write_arrays, write_json, write_tensors

log = logging.getLogger("sppnet")

STAGES = ("propose", "pretrain", "extract", "finetune", "svm", "boxes")


class StageError(ValueError):
    """A stage that cannot run as asked; the message gives the next step."""


@dataclass(frozen=True)
class StageStatus:
    """What a stage would do: `done` of `total` parts are there already; `skipped` says why it would not run at all."""

    name: str
    folder: Path
    done: int
    total: int
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name:<9} skip     {self.skipped}"
        if self.done == self.total:
            return f"{self.name:<9} reuse    all {self.total} in {self.folder.name}"
        if self.done:
            return f"{self.name:<9} resume   {self.done} of {self.total} in {self.folder.name}"
        return f"{self.name:<9} run      nothing yet for these inputs and settings ({self.folder.name})"


def train_detector(
    config: Config,
    root: Path,
    device: torch.device | str = "cpu",
    only: Sequence[str] = STAGES,
    force: Sequence[str] = (),
    progress: bool = True,
) -> SPPDetector | None:
    """Run the stages in `only`, those in `force` from scratch; returns the detector once every stage is complete."""
    training = Training(config, root, torch.device(device), progress)
    for status in training.status():
        if status.name not in only or status.skipped:
            continue
        if status.name in force and distributed.is_main():
            shutil.rmtree(status.folder, ignore_errors=True)
        distributed.barrier()
        start = time.monotonic()
        summary = training.run(status.name)
        log.info("%s: %s (%s)", status.name, summary, _duration(time.monotonic() - start))
    if any(status.done < status.total for status in training.status() if not status.skipped):
        return None
    return training.assemble()


class Training:
    """One training run: its data, its artifact folders and the networks, each built when it is first needed."""

    def __init__(self, config: Config, root: Path, device: torch.device, progress: bool = True) -> None:
        self.config, self.device, self.progress = config, device, progress
        self.plan = RunPlan(root, config, load_run_data(config))
        self.classes = self.plan.data.classes

    def status(self) -> list[StageStatus]:
        """The stages in order, with what is there of each."""
        plan, config = self.plan, self.config
        images = [*plan.data.train, *plan.validation]
        maps = [maps_path(plan.maps, r, False) for r in images] + [maps_path(plan.maps, r, True) for r in self._flipped()]
        tuned = config.finetune.enabled and (config.svm.finetuned or config.boxes.layer != "pool")
        return [
            _status("propose", plan.windows, [windows_path(plan.windows, record) for record in images]),
            _status("pretrain", plan.pretrain, [plan.pretrain / "network.safetensors"],
                    "" if config.pretrain.enabled else "pretrain.enabled is false"),
            _status("extract", plan.maps, maps),
            _status("finetune", plan.finetune, [plan.finetune / "head.safetensors"],
                    "" if tuned else "the features wanted need no fine-tuned head"),
            _status("svm", plan.svm, [plan.svm / "svm.safetensors"]),
            _status("boxes", plan.boxes, [self._regressor_path(i) for i in range(len(self.classes))],
                    "" if config.boxes.enabled else "boxes.enabled is false"),
        ]

    def run(self, stage: str) -> str:
        """Run one stage; returns its summary."""
        stages: dict[str, Callable[[], str]] = {
            "propose": self._propose, "pretrain": self._pretrain, "extract": self._extract,
            "finetune": self._finetune, "svm": self._svm, "boxes": self._boxes,
        }
        return stages[stage]()

    def assemble(self) -> SPPDetector:
        """The detector from the artifacts, saved under detector/."""
        detectors = LinearDetectors.from_tensors(read_tensors(self.plan.svm / "svm.safetensors"))
        regressors = None
        if self.config.boxes.enabled:
            own = [read_tensors(self._regressor_path(i)) for i in range(len(self.classes))]
            regressors = BoxRegressors.stack({n: BoxRegressors.from_tensors(t).of(0) for n, t in zip(self.classes, own, strict=True)})
        detector = SPPDetector(
            self.trunk, self.head(), detectors, regressors, make_proposer(self.config.proposals), self.config
        )
        if distributed.is_main():
            detector.save(self.plan.detector)
        distributed.barrier()
        return detector

    # 1. windows of every image
    def _propose(self) -> str:
        records = [*self.plan.data.train, *self.plan.validation]
        done = propose_images(records, self.config.proposals, self.plan.windows, self.progress)
        windows = {r.id: read_windows(self.plan.windows, r) for r in records}
        quality = proposal_recall(windows, {r.id: r.annotation for r in records if r.annotation is not None})
        return (f"{done.computed} images searched, {done.imported} imported, {done.reused} reused; {done.mean_windows:.0f} windows an image, "
                f"recall at IoU 0.5 {quality.recall:.3f}, mean best overlap {quality.mean_best_overlap:.3f}")

    # 0. a trunk without pretrained weights learns from crops of the objects
    def _pretrain(self) -> str:
        target = self.plan.pretrain / "network.safetensors"
        if target.exists():
            return "reused"
        trunk = build_trunk(self.config.trunk, self.config.pretrain.seed).to(self.device)
        network, summary = pretrain_network(trunk, self.plan.data.train, self.classes, self.config, self.progress)
        if distributed.is_main():
            write_tensors(target, network.state_dict())
        distributed.barrier()
        return summary

    # 2. the map of every image, and of its mirror image for fine-tuning
    def _extract(self) -> str:
        plan, settings = self.plan, self.config.maps
        flipped = {record.id for record in self._flipped()}
        straight = [r for r in [*plan.data.train, *plan.validation] if r.id not in flipped]
        done = [extract_images(straight, self.trunk, settings, plan.maps, False, self.progress)] if straight else []
        done += [extract_images(self._flipped(), self.trunk, settings, plan.maps, True, self.progress)] if flipped else []
        computed, reused = sum(d.computed for d in done), sum(d.reused for d in done)
        return f"{computed} maps computed, {reused} reused, {sum(d.gigabytes for d in done):.2f} GB"

    # 5. fc6 and fc7
    def _finetune(self) -> str:
        target = self.plan.finetune / "head.safetensors"
        if target.exists():
            return "reused"
        head = self._initial_head()
        train = FinetuneWindows(self._source(train=True), self.config.finetune.flip)
        validation = FinetuneWindows(self._source(train=False), flips=False)
        done = finetune_head(head, train, validation, len(self.classes), self.config.finetune, self.plan.finetune, self.progress)
        if distributed.is_main():
            write_tensors(target, head.state_dict())
            (self.plan.finetune / "checkpoint.safetensors").unlink(missing_ok=True)
        distributed.barrier()
        return (f"{done.steps} steps, {done.reused_steps} of them from before; best validation error {done.best_error:.3f} at step "
                f"{done.best_step} (always background: {done.untrained_error:.3f})")

    # 6. one linear SVM per class, with hard-negative mining
    def _svm(self) -> str:
        target, checkpoint = self.plan.svm / "svm.safetensors", self.plan.svm / "mining.npz"
        if target.exists():
            return "reused"
        if distributed.is_main():
            settings = self.config.svm
            source, features = self._source(train=True), self._features(settings.layer)
            scale = self._scale(settings.layer, settings.feature_norm)
            state = MiningState.from_arrays(read_arrays(checkpoint)) if checkpoint.exists() else None
            mined = mine_detectors(
                MiningWindows(source, features), self.classes, settings, scale, state,
                save=lambda state: write_arrays(checkpoint, **state.to_arrays()), save_every=200,
            )
            write_json(self.plan.svm / "summary.json", {"retrains": mined.retrains, "untrained": mined.untrained})
            write_tensors(target, mined.detectors.to_tensors())
            checkpoint.unlink(missing_ok=True)
        distributed.barrier()
        return f"{len(self.classes)} classes on {self.config.svm.layer} features, one pass over {len(self.plan.data.train)} images"

    # 7. class-wise box regression
    def _boxes(self) -> str:
        missing = [i for i in range(len(self.classes)) if not self._regressor_path(i).exists()]
        counts = []
        if distributed.is_main() and missing:
            settings = self.config.boxes
            source, features = self._source(train=True), self._features(settings.layer)
            scale = self._scale(settings.layer, settings.feature_norm)
            examples = find_box_examples(source)
            for label in tqdm(missing, desc="box regression", unit="class", disable=None if self.progress else True):
                own = examples[label]
                rows = pool_box_examples(source, own, self._width(settings.layer), features)
                regressor: BoxRegressor = fit_box_regressor(rows, own.windows, own.boxes, settings, scale, self.device)
                write_tensors(self._regressor_path(label), BoxRegressors.stack({self.classes[label]: regressor}).to_tensors())
                counts.append(len(rows))
        distributed.barrier()
        return f"{len(missing)} classes fitted on {sum(counts)} windows, {len(self.classes) - len(missing)} reused"

    @cached_property
    def trunk(self) -> Trunk:
        settings = self.config.trunk
        if not self.config.pretrain.enabled:
            return build_trunk(settings).to(self.device)
        weights = settings.weights.model_copy(update={"source": "random"})
        trunk = build_trunk(settings.model_copy(update={"weights": weights}))
        state = self._pretrained()
        trunk.load_state_dict({name[6:]: tensor for name, tensor in state.items() if name.startswith("trunk.")})
        return trunk.to(self.device)

    def head(self) -> SPPHead:
        """The head whose features are used: fine-tuned, or as it was initialised."""
        if self.plan.trained_head == self.plan.head:
            return self._initial_head()
        head = self._new_head()
        head.load_state_dict(read_tensors(self._need(self.plan.finetune / "head.safetensors", "finetune")))
        return head.to(self.device)

    def _initial_head(self) -> SPPHead:
        config, head = self.config, self._new_head()
        if config.pretrain.enabled and config.head.init == "random":
            copy_fc(head, self._pretrained(), "the pretrained network")
        elif config.head.init == "checkpoint":
            load_head_checkpoint(head, config.head)
        elif config.head.init == "imagenet":
            weights = config.trunk.weights
            state = load_weight_file(weights.file) if weights.file is not None else torchvision_state(config.trunk.name)
            load_pretrained_fc(head, state, config.trunk.name, self.trunk.channels, config.pyramid.levels)
        if config.head.input_norm is not None:
            head.input_scale.fill_(self._scale("pool", config.head.input_norm))
        return head.to(self.device)

    def _new_head(self) -> SPPHead:
        levels = self.config.pyramid.levels
        return build_head(self.trunk.channels, levels, len(self.classes) + 1, self.config.head, self.config.finetune.seed)

    def _pretrained(self) -> dict[str, Tensor]:
        return read_tensors(self._need(self.plan.pretrain / "network.safetensors", "pretrain"))

    def _need(self, path: Path, stage: str) -> Path:
        if not path.exists():
            raise StageError(f"{path}: the {stage} stage is not complete for these settings; run `sppnet train` without --only, or {stage} first")
        return path

    def _source(self, train: bool) -> TrainingWindows:
        records = self.plan.data.train if train else self.plan.validation
        return TrainingWindows(
            records, self.classes, self.plan.windows, self.plan.maps, self.trunk.geometry, self.config, self.device
        )

    def _flipped(self) -> list:  # type: ignore[type-arg]
        return self.plan.data.train if self.config.finetune.enabled and self.config.finetune.flip else []

    def _features(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        if layer == "pool":
            return lambda pooled: pooled
        head, precision = self.head(), self.config.detect.precision
        return lambda pooled: head_features(head, pooled, layer, precision)

    def _width(self, layer: Layer) -> int:
        sizes = {"fc6": self.config.head.fc6, "fc7": self.config.head.fc7}
        return sizes.get(layer) or pooled_size(self.trunk.channels, self.config.pyramid.levels)

    def _scale(self, layer: Layer, target: float) -> float:
        """The factor that gives features of `layer` the mean norm `target`, from a sample of images and windows."""
        source, features, settings = self._source(train=True), self._features(layer), self.config.svm
        count = min(settings.norm_images, len(source.records))
        norms = []
        for step in range(count):
            index = step * len(source.records) // count
            windows = read_windows(self.plan.windows, source.records[index])[: settings.norm_windows]
            if len(windows):
                maps = source.maps(index)
                norms.append(features(source.pool(maps, source.cells(maps, windows))).norm(dim=1).cpu().numpy())
        if not norms:
            raise StageError("no training image has a window; check proposals.min_side and the images")
        return mean_norm_scale(np.concatenate(norms), target)

    def _regressor_path(self, label: int) -> Path:
        return self.plan.boxes / f"class-{label:03d}.safetensors"


def _status(name: str, folder: Path, parts: Sequence[Path], skipped: str = "") -> StageStatus:
    return StageStatus(name, folder, sum(path.exists() for path in parts), len(parts), skipped)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
