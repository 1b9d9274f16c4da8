"""Train a detector: every stage of section 4.1 in order, on one screen; every stage resumes.

proposals -> maps -> finetune -> (low_rank) -> svm -> boxes -> thresholds -> detector/, or with a joint head
proposals -> embed -> joint -> thresholds -> detector/
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sppnet import distributed
from sppnet.artifacts import read_json, read_tensors, replaced_files, write_json, write_tensors
from sppnet.backbones.runtime import resolve_precision, resolve_runtime
from sppnet.config import STAGES, Config, FinetuneSettings
from sppnet.config_files import write_settings
from sppnet.detection.box_regression import BoxRegressors, fit_box_regressor
from sppnet.detection.detector import SPPDetector
from sppnet.detection.embedding import Projection, embed_images, fit_projection, label_rows, sample_pooled
from sppnet.detection.feature_maps import extract_images
from sppnet.detection.finetuning import finetune_head
from sppnet.detection.hard_negatives import mine_detectors
from sppnet.detection.joint_head import SoftmaxClassifier, train_joint_head
from sppnet.detection.linear_svm import LinearSVMs
from sppnet.detection.training_windows import FinetuneWindows, MiningWindows, find_box_examples, pool_box_examples
from sppnet.errors import SppnetError, counted
from sppnet.evaluation.proposals import proposal_recall
from sppnet.jobs import one_bar, progress_bar
from sppnet.models.low_rank import low_rank_head
from sppnet.models.sppnet import SPPHead
from sppnet.pipeline.estimate import Estimate, duration
from sppnet.pipeline.networks import TrainingNetworks, load_runtime, own_digest
from sppnet.pipeline.run_data import RunData, Split, load_run_data
from sppnet.pipeline.stage_status import StageStatus
from sppnet.pipeline.stages import CHECKPOINT, TESTED, StageGraph, ranks, regressor_path, tunes_low_rank
from sppnet.pipeline.thresholds import choose_thresholds, describe_thresholds
from sppnet.proposals.search import make_proposer, propose_images, propose_union, read_windows

log = logging.getLogger("sppnet")

START = "start.safetensors"  # a head of low rank before it is fine-tuned
DETECTIONS = "detections"  # in the validation images, until the thresholds are chosen


def train_detector(
    config: Config,
    root: str | Path,
    device: torch.device | str = "cpu",
    only: Sequence[str] = STAGES,
    force: Sequence[str] = (),
    progress: bool = True,
    backbone: nn.Module | None = None,
) -> SPPDetector | None:
    """Run the stages in `only`, those in `force` from scratch; returns the detector once every stage is complete.

    `backbone`: a network of your own in place of what config.backbone names. The settings go to root/config.yaml. Files
    that are missing or do not fit are an error before anything is written. What depends on a stage run from scratch is
    deleted too, and so is the detector of an earlier training.
    """
    if not isinstance(config, Config):
        raise SppnetError(f"config: expected a Config, got {type(config).__name__}; read one with load_config")
    return Training(config, Path(root), torch.device(device), progress, backbone).run(only, force)


class Training:
    """One training run: its stages, and the networks, each built when it is first needed."""

    def __init__(
        self,
        config: Config,
        root: Path,
        device: torch.device,
        progress: bool = True,
        module: nn.Module | None = None,
        data: RunData | None = None,  # where it was read already
    ) -> None:
        if (root / "detector" / "others").exists():
            raise SppnetError(f"{root}: holds several detectors combined, which are not trained; choose another --run")
        if module is not None:
            config = config.model_copy(update={"backbone": config.backbone.of_object()})
        self.asked, self.device, self.progress = config, device, progress
        self.precision = resolve_precision(config.precision, device)
        self.config = config.model_copy(update={"precision": self.precision})
        digest = own_digest(self.config.backbone, module)
        self.graph = StageGraph(root, self.config, data or load_run_data(config, Split.read(root)), digest, module)
        self.classes = self.graph.data.classes
        self.networks = TrainingNetworks(self.graph, device)

    def run(
        self,
        only: Sequence[str] = STAGES,
        force: Sequence[str] = (),
        expected: Estimate | None = None,
        reasons: Mapping[str, str] | None = None,
        adds: bool = False,
    ) -> SPPDetector | None:
        """`train_detector`. `expected` makes one bar of all stages; `reasons` of settings go to config.yaml too. With
        `adds` the run keeps its settings, its split and its detector until all stages are done.
        """
        graph, runtime = self.graph, resolve_runtime(self.config.maps.runtime, self.device)
        log.info("device %s, maps by %s, precision %s", self.device, runtime, self.precision)
        if reasons is None:  # else the plan has said it
            log.info("%s", graph.data)
        self.networks.check_inputs(only)
        if distributed.is_main() and not adds:
            graph.delete(graph.invalidated(only, force))
            write_settings(graph.root / "config.yaml", self.asked, reasons)
            graph.data.split.write(graph.root)
        distributed.barrier()
        chosen = [status for status in graph.statuses() if status.name in only]
        distributed.barrier()  # all processes see what is there before any of them makes more
        log.info("Summary\n%s", "\n".join(self._perform_all(chosen, expected)))
        missing = [status.name for status in graph.statuses() if not status.complete]
        if missing:
            log.info("no detector yet: %s still to do", ", ".join(missing))
            return None
        detector = self.assemble()
        if distributed.is_main() and adds:
            write_settings(graph.root / "config.yaml", self.asked, reasons)
            graph.data.split.write(graph.root)
        return detector

    def _perform_all(self, chosen: Sequence[StageStatus], expected: Estimate | None) -> list[str]:
        """Run these stages; returns the summary: of each its name, time, estimated time, what it did."""
        if expected is None:
            return [f"{'stage':<10} {'time':>9}  done", *(self.perform(status) for status in chosen)]
        start, lines, done = time.monotonic(), [f"{'stage':<10} {'time':>9} {'estimate':>9}  done"], 0.0
        with one_bar(expected.items, expected.total, self.progress) as bar:
            for status in chosen:
                bar.set_description_str(status.name, refresh=False)
                line = self.perform(status)
                done += expected.stages.get(status.name, 0)
                bar.update(done - bar.n)  # a stage may have had less to do
                lines += [f"{line[:20]} {duration(expected.stages.get(status.name, 0)):>9}{line[20:]}"]
        return [*lines, f"{'total':<10} {duration(time.monotonic() - start):>9} {duration(expected.total):>9}"]

    def perform(self, status: StageStatus) -> str:
        """Run one stage unless it is skipped; returns its line of the summary: name, time, what was done."""
        if status.skipped:
            return f"{status.name:<10} {'0.0 s':>9}  skipped: {status.skipped}"
        start = time.monotonic()
        reused = status.complete and status.name in ("finetune", "low_rank", "joint", "svm")
        summary = "reused" if reused else RUN[status.name](self)
        if distributed.is_main():  # only the making of a result needed them
            for left in (CHECKPOINT, START):
                (status.folder / left).unlink(missing_ok=True)
            shutil.rmtree(status.folder / DETECTIONS, ignore_errors=True)
        distributed.barrier()
        took = duration(time.monotonic() - start)
        log.info("%s: %s (%s)", status.name, summary, took)
        return f"{status.name:<10} {took:>9}  {summary}"

    def assemble(self) -> SPPDetector:
        """The detector from the artifacts, saved under detector/, where one of before stays until this is complete."""
        chosen = read_json(self.graph.folder("thresholds") / "thresholds.json")
        detector = replace(self._detector(), thresholds=tuple(chosen[name]["threshold"] for name in self.classes))
        if distributed.is_main():
            with replaced_files(self.graph.detector, "detector.json") as made:
                self.graph.data.split.write(made)
                detector.save(made)
        distributed.barrier()
        return detector

    def _detector(self) -> SPPDetector:
        """The detector from the artifacts of all stages but the last."""
        networks, proposer, regressors = self.networks, make_proposer(self.config.proposals), None
        if self.config.head.training == "joint":
            head = networks.head()
            boxes = BoxRegressors.from_tensors(read_tensors(self.graph.folder("joint") / "boxes.safetensors"))
            softmax = SoftmaxClassifier(head.classifier, self.classes)
            return SPPDetector(networks.backbone, head, softmax, boxes, proposer, self.asked)
        svms = LinearSVMs.from_tensors(read_tensors(self.graph.folder("svm") / "svm.safetensors"))
        if self.config.boxes.enabled:
            own = [read_tensors(self.graph.folder("boxes") / regressor_path(i)) for i in range(len(self.classes))]
            each = [BoxRegressors.from_tensors(tensors).per_class[0] for tensors in own]
            regressors = BoxRegressors.stack(dict(zip(self.classes, each, strict=True)))
        return SPPDetector(networks.backbone, networks.head(), svms, regressors, proposer, self.asked)

    # 1. windows of every image
    def proposals(self) -> str:
        records, folder = self.graph.data.images, self.graph.folder("proposals")
        several = propose_union(records, self.graph.searches, folder, self.progress) if self.graph.searches else None
        done = several or propose_images(records, self.config.proposals, folder, self.progress)
        own = distributed.shard(records)
        windows = {r.id: read_windows(folder, r) for r in own}
        bare = [name for name, found in windows.items() if not len(found)]
        log.debug("images without windows: %s", ", ".join(bare) or "none")
        quality = proposal_recall(windows, {r.id: r.annotation for r in own if r.annotation is not None})
        return (
            f"{counted(done.computed, 'image')} searched, {done.imported} imported, {done.reused} reused; "
            f"{quality.mean_windows:.0f} windows an image, recall at IoU 0.5 {quality.recall:.3f}, "
            f"mean best overlap {quality.mean_best_overlap:.3f}"
            + (f"; {len(bare)} × image without windows (its objects alone are used), e.g. {bare[0]}" if bare else "")
        )

    # 2. the map of every image, and of its mirror image for fine-tuning
    def maps(self) -> str:
        config, own = self.config, self.graph.own
        load = partial(load_runtime, config.backbone, config.maps.runtime, self.precision, self.device, own)
        workers = 0 if self.device.type == "cpu" else 1
        if self.networks.map_costs:
            log.info("%s", self.networks.map_costs)
        folder = self.graph.folder("maps")
        done = extract_images(self.graph.stored, load, config.maps, folder, workers, self.progress)
        return f"{counted(done.computed, 'map')} computed, {done.reused} reused, {done.gigabytes:.2f} GB"

    # 3. fc6 and fc7
    def finetune(self) -> str:
        return self._train_head("finetune", self.networks.initial_head(), self.config.finetune)

    # 3½. fc6 and fc7 of low rank, where that is wanted
    def low_rank(self) -> str:
        start = self.graph.folder("low_rank") / START
        if start.exists():
            log.info("low_rank: %s is reused", start)
        else:
            wanted, whole = ranks(self.config), self.networks.whole_head()
            activations = self.networks.activations(whole, self.progress)
            if distributed.is_main():
                reduced = low_rank_head(whole, wanted, activations)
                write_tensors(start, reduced.state_dict())
        distributed.barrier()
        summary = ", ".join(f"{name} of rank {rank}" for name, rank in ranks(self.config).items())
        head = self.networks.saved_head(start, ranks(self.config))
        distributed.barrier()  # all have read what goes when the stage is done
        if tunes_low_rank(self.config):
            own = self.config.low_rank
            schedule = {"steps": own.steps, "learning_rates": own.learning_rates}
            summary += "; " + self._train_head("low_rank", head, self.config.finetune.model_copy(update=schedule))
        elif distributed.is_main():
            write_tensors(start.with_name("head.safetensors"), head.state_dict())
        return summary

    def _train_head(self, stage: str, head: SPPHead, settings: FinetuneSettings) -> str:
        """Fine-tune a head; it becomes the result of `stage`."""
        folder, windows = self.graph.folder(stage), self.networks.windows
        train = FinetuneWindows(windows(train=True, objects=True), settings.flip)
        validation = FinetuneWindows(windows(train=False), False)
        done = finetune_head(
            head, train, validation, len(self.classes), settings, folder, self.progress, stage, self.config.precision
        )
        if distributed.is_main():
            write_tensors(folder / "head.safetensors", head.state_dict())
        return (
            f"{counted(done.steps, 'step')}, {done.reused_steps} of them from before; best validation error "
            f"{done.best_error:.3f} at step {done.best_step} (always background: {done.untrained_error:.3f})"
        )

    # 2 to 5 with a joint head: windows as rows of principal components …
    def embed(self) -> str:
        folder, own, networks = self.graph.folder("embed"), self.config.joint, self.networks
        path = folder / "projection.safetensors"
        if networks.map_costs:
            log.info("%s", networks.map_costs)
        if not path.exists():
            pooled = sample_pooled(networks.windows(True, True, base=True), own, self.progress).to(self.device)
            if distributed.is_main():
                write_tensors(path, fit_projection(pooled, own.rank, own.seed).to_tensors())
            del pooled
        distributed.barrier()
        projection = Projection.from_tensors(read_tensors(path))
        made = embed_images(networks.windows(True, True), projection, folder, own.flip, False, self.progress)
        made += embed_images(networks.tested(self.progress), projection, folder / TESTED, False, True, self.progress)
        kept = f"{len(projection.basis)} components keep {projection.kept:.1%} of the variance"
        return f"{counted(made, 'image')} embedded; {kept}"

    # … and fc6, fc7, softmax and boxes on these
    def joint(self) -> str:
        config, rows, folder = self.config, self.graph.folder("embed"), self.graph.folder("joint")
        projection = self.networks.projection()
        labelled = label_rows(self.networks.windows(train=True, objects=True), rows, config.joint.flip)
        own = config.head, config.joint, folder, self.device, self.precision, self.progress
        model, summary = train_joint_head(labelled, *own)
        if distributed.is_main():
            write_tensors(folder / "boxes.safetensors", model.regressors(self.classes).to_tensors())
            write_tensors(folder / "head.safetensors", self.networks.joint_head(model, projection).state_dict())
        distributed.barrier()
        return summary

    # 4. one linear SVM per class, with hard-negative mining
    def svm(self) -> str:
        target = self.graph.folder("svm") / "svm.safetensors"
        settings, networks = self.config.svm, self.networks
        source, features = networks.windows(train=True, objects=True), networks.features(settings.layer)
        scale = networks.scale(features, settings.feature_norm, settings)
        mined = mine_detectors(MiningWindows(source, features), self.classes, settings, scale, self.progress)
        if distributed.is_main():
            write_json(target.with_name("summary.json"), {"retrains": mined.retrains, "untrained": mined.untrained})
            write_tensors(target, mined.svms.to_tensors())
        distributed.barrier()
        images, objects = counted(len(self.graph.data.train), "image"), self.graph.data.objects
        images += f" and the objects of {len(objects)} more" if objects else ""
        done = f"{counted(len(self.classes), 'class')} on {settings.layer} features of {images}"
        silent = [f"{name} ({why})" for name, why in mined.untrained.items()]
        return f"{done}; never fires: {', '.join(silent)}" if silent else done

    # 5. class-wise box regression; no other process writes the classes of this one
    def boxes(self) -> str:
        paths = [self.graph.folder("boxes") / regressor_path(label) for label in range(len(self.classes))]
        missing = [label for label, path in enumerate(paths) if not path.exists()]
        done = next((path for path in paths if path.exists()), None)
        windows = 0
        if missing:
            settings, networks = self.config.boxes, self.networks
            source, features = networks.windows(train=True), networks.features(settings.layer)
            # All classes must have the same, and on a GPU the mean norm may differ in its last digits.
            scale = float(read_tensors(done)["scale"]) if done else networks.scale(features, settings.feature_norm)
            examples = find_box_examples(source)
            windows = sum(len(examples[label].windows) for label in missing)
            todo = [label for label in distributed.shard(range(len(paths))) if label in missing]
            for label in progress_bar(todo, "box regression", "class", shown=self.progress):
                own = examples[label]
                rows = pool_box_examples(source, own, networks.width(settings.layer), features)
                regressor = fit_box_regressor(rows, own.windows, own.boxes, settings, scale, self.device)
                write_tensors(paths[label], BoxRegressors.stack({self.classes[label]: regressor}).to_tensors())
        fitted = f"{counted(len(missing), 'class')} fitted on {counted(windows, 'window')}"
        return f"{fitted}, {len(self.classes) - len(missing)} reused"

    # The score from which on `detect` shows a detection of a class: of the best F1 on the validation images
    def thresholds(self) -> str:
        path = self.graph.folder("thresholds") / "thresholds.json"
        if not path.exists():
            rows = self.graph.folder("embed") if self.config.head.training == "joint" else None
            kept, detector = path.with_name(DETECTIONS), self._detector()
            chosen = choose_thresholds(detector, self.networks.tested(self.progress), kept, rows, self.progress)
            if distributed.is_main():
                write_json(path, chosen)
        distributed.barrier()
        return describe_thresholds(read_json(path))


RUN: dict[str, Callable[[Training], str]] = {
    "proposals": Training.proposals,
    "maps": Training.maps,
    "finetune": Training.finetune,
    "low_rank": Training.low_rank,
    "embed": Training.embed,
    "joint": Training.joint,
    "svm": Training.svm,
    "boxes": Training.boxes,
    "thresholds": Training.thresholds,
}
