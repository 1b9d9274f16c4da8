"""Train a detector: rooms 1-7 in order, on one screen; every stage resumes (sec. 4.1).

propose -> (pretrain) -> extract -> finetune -> (compress) -> svm -> boxes -> detector/
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sppnet import distributed
from sppnet.classification.multisize import pretrain_network
from sppnet.config import Config, FinetuneSettings
from sppnet.config_files import dump_config
from sppnet.detection.box_regression import BoxRegressor, BoxRegressors, fit_box_regressor
from sppnet.detection.detector import SPPDetector
from sppnet.detection.feature_maps import extract_images, maps_path
from sppnet.detection.finetuning import finetune_head
from sppnet.detection.hard_negatives import MiningState, mine_detectors
from sppnet.detection.linear_svm import LinearDetectors
from sppnet.detection.low_rank import CompressionError, compress_head, describe_layers
from sppnet.detection.plan import RunPlan, load_run_data
from sppnet.detection.proposals import make_proposer, propose_images, read_windows, windows_path
from sppnet.detection.stages import STAGES, StageError, StageReport, StageStatus, duration, stage_status, stage_table
from sppnet.detection.training_networks import TrainingNetworks
from sppnet.detection.training_windows import FinetuneWindows, MiningWindows, find_box_examples, pool_box_examples
from sppnet.evaluation.proposals import proposal_recall
from sppnet.network.sppnet import SPPHead
from sppnet.network.trunks import Trunk, build_trunk
from sppnet.progress import progress_bar
from sppnet.records import ImageRecord
from sppnet.store import read_arrays, read_json, read_tensors, write_arrays, write_json, write_tensors, write_text

log = logging.getLogger("sppnet")


def train_detector(
    config: Config,
    root: Path,
    device: torch.device | str = "cpu",
    only: Sequence[str] = STAGES,
    force: Sequence[str] = (),
    progress: bool = True,
) -> SPPDetector | None:
    """Run the stages in `only`, those in `force` from scratch; returns the detector once every stage is complete.

    The settings go to root/config.yaml. Files that are missing or do not fit are an error before anything is written.
    What rests on a stage done from scratch is deleted too, and so is the detector of an earlier training.
    """
    training = Training(config, root, torch.device(device), progress)
    log.info("%s", training.plan.data)
    training.check_files(only)
    if distributed.is_main():
        training.clear(training.redone(only, force))
        write_text(root / "config.yaml", dump_config(config))
    distributed.barrier()
    reports = [training.perform(status) for status in training.status() if status.name in only]
    log.info("all that was done\n%s", stage_table(reports))
    missing = [status.name for status in training.status() if not status.complete]
    if missing:
        log.info("no detector yet: %s still to do", ", ".join(missing))
        return None
    return training.assemble()


class Training:
    """One training run: its data, its artifact folders and the networks, each built when it is first needed."""

    def __init__(self, config: Config, root: Path, device: torch.device, progress: bool = True) -> None:
        self.config, self.device, self.progress = config, device, progress
        self.plan = RunPlan(root, config, load_run_data(config))
        self.classes = self.plan.data.classes
        self.networks = TrainingNetworks(self.plan, device)

    @property
    def trunk(self) -> Trunk:
        return self.networks.trunk

    def head(self) -> SPPHead:
        """The head whose features are used: fine-tuned, or as it was initialised; compressed where ranks are set."""
        return self.networks.head()

    def status(self) -> list[StageStatus]:
        """The stages in order, with what is there of each. Reads no weights and writes nothing."""
        plan, config = self.plan, self.config
        images = [*plan.data.train, *plan.validation]
        windows = [windows_path(plan.windows, record) for record in images]
        maps = [maps_path(plan.maps, record, False) for record in images]
        maps += [maps_path(plan.maps, record, True) for record in self._flipped()]
        no_pretrain = "" if config.pretrain.enabled else "pretrain.enabled is false"
        no_head = "" if plan.uses_trained_head else "the features wanted need no fine-tuned head"
        no_ranks = (
            "" if plan.ranks else "compress.fc6 and compress.fc7 are 0" if plan.uses_fc else "no fc features are wanted"
        )
        no_boxes = "" if config.boxes.enabled else "boxes.enabled is false"
        regressors = [self._regressor_path(label) for label in range(len(self.classes))]
        return [
            stage_status("propose", plan.windows, windows),
            stage_status(
                "pretrain", plan.pretrain, [self.networks.pretrained_path], no_pretrain, "checkpoint.safetensors"
            ),
            stage_status("extract", plan.maps, maps),
            stage_status("finetune", plan.finetune, [self.networks.head_path], no_head, "checkpoint.safetensors"),
            stage_status(
                "compress", plan.compress, [self.networks.compressed_path], no_ranks, self.networks.chosen_path.name
            ),
            stage_status("svm", plan.svm, [plan.svm / "svm.safetensors"], checkpoint="mining.npz"),
            stage_status("boxes", plan.boxes, regressors, no_boxes),
        ]

    def obstacles(self, stages: Sequence[str]) -> list[str]:
        """What `check_files` would refuse for these stages without reading a weight: a line for each."""
        config, networks = self.config, self.networks
        named = [("proposals.import_from", path) for path in config.proposals.import_from]
        found = list[str]()
        if set(stages) - {"propose"}:
            weights, checkpoint = config.trunk.weights, config.head.checkpoint
            needs_trunk = not (config.pretrain.enabled and networks.pretrained_path.exists())
            if needs_trunk and weights.source == "file" and weights.file is not None:
                named.append(("trunk.weights.file", weights.file))
            if config.head.init == "checkpoint" and checkpoint is not None and not networks.head_path.exists():
                named.append(("head.checkpoint", checkpoint))
            try:
                networks.check_ranks()
            except CompressionError as error:
                found.append(str(error))
        return [*(f"missing: {path} ({setting})" for setting, path in named if not path.is_file()), *found]

    def check_files(self, stages: Sequence[str]) -> None:
        """Raise now what would end one of these stages hours later: files that are missing or do not fit."""
        for path in self.config.proposals.import_from:
            if not path.is_file():
                raise StageError(f"{path}: no such file; proposals.import_from must name existing .npz or .mat files")
        if not set(stages) - {"propose"}:
            return
        if not self.config.pretrain.enabled:
            _ = self.trunk
        elif not self.networks.pretrained_path.exists():
            build_trunk(self.config.trunk)
        self.networks.check_ranks()
        if self.config.head.init != "random" and not self.networks.head_path.exists():
            self.networks.started_head()

    def redone(self, only: Sequence[str], force: Sequence[str]) -> tuple[str, ...]:
        """The stages to delete before `only` run: those in `force` among them, and all that rest on these."""
        used = [status.name for status in self.status() if not status.skipped]
        forced = [name for name in used if name in only and name in force]
        return tuple(name for name in used if any(name in (own, *self.plan.dependents(own)) for own in forced))

    def clear(self, redone: Sequence[str]) -> None:
        """Delete these stages, last first: an interruption never leaves a stage whose inputs are gone.

        The detector goes first, unless every stage is complete and stays.
        """
        stages = self.status()
        if redone or not all(status.complete for status in stages):
            detector = self.plan.detector / "detector.json"
            if detector.exists():
                log.info("%s: of other settings, or of what is done again; gone until training is complete", detector)
                detector.unlink()
        for status in reversed(stages):
            if status.name in redone and status.folder.exists():
                shutil.rmtree(status.folder)

    def perform(self, status: StageStatus) -> StageReport:
        """Run one stage unless it is skipped."""
        start = time.monotonic()
        if status.skipped:
            return StageReport(status.name, 0.0, f"skipped: {status.skipped}")
        summary: str = getattr(self, f"_{status.name}")()  # the stages below, by name
        seconds = time.monotonic() - start
        log.info("%s: %s (%s)", status.name, summary, duration(seconds))
        return StageReport(status.name, seconds, summary)

    def assemble(self) -> SPPDetector:
        """The detector from the artifacts, saved under detector/."""
        detectors = LinearDetectors.from_tensors(read_tensors(self.plan.svm / "svm.safetensors"))
        regressors = None
        if self.config.boxes.enabled:
            own = [read_tensors(self._regressor_path(i)) for i in range(len(self.classes))]
            regressors = BoxRegressors.stack(
                {n: BoxRegressors.from_tensors(t).of(0) for n, t in zip(self.classes, own, strict=True)}
            )
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
        bare = sum(not len(found) for found in windows.values())
        quality = proposal_recall(windows, {r.id: r.annotation for r in records if r.annotation is not None})
        return (
            f"{done.computed} images searched, {done.imported} imported, {done.reused} reused; "
            f"{done.mean_windows:.0f} windows an image, recall at IoU 0.5 {quality.recall:.3f}, "
            f"mean best overlap {quality.mean_best_overlap:.3f}"
            + (f"; {bare} × image without windows (its objects alone are used)" if bare else "")
        )

    # 0. a trunk without pretrained weights learns from crops of the objects
    def _pretrain(self) -> str:
        if self.networks.pretrained_path.exists():
            return "reused"
        trunk = build_trunk(self.config.trunk, self.config.pretrain.seed).to(self.device)
        data, checkpoint = self.plan.data, self.plan.pretrain / "checkpoint.safetensors"
        network, summary = pretrain_network(trunk, data.train, self.classes, self.config, self.progress, checkpoint)
        if distributed.is_main():
            write_tensors(self.networks.pretrained_path, network.state_dict())
            checkpoint.unlink(missing_ok=True)
        distributed.barrier()
        return summary

    # 2. the map of every image, and of its mirror image for fine-tuning
    def _extract(self) -> str:
        plan, settings, trunk = self.plan, self.config.maps, self.trunk
        flipped = {record.id for record in self._flipped()}
        straight = [r for r in [*plan.data.train, *plan.validation] if r.id not in flipped]
        done = [extract_images(straight, trunk, settings, plan.maps, False, self.progress)] if straight else []
        if flipped:
            done.append(extract_images(self._flipped(), trunk, settings, plan.maps, True, self.progress))
        computed, reused = sum(d.computed for d in done), sum(d.reused for d in done)
        return f"{computed} maps computed, {reused} reused, {sum(d.gigabytes for d in done):.2f} GB"

    # 5. fc6 and fc7
    def _finetune(self) -> str:
        path = self.networks.head_path
        if path.exists():
            self._delete_scaffolding(path)
            return "reused"
        return self._train_head("finetune", self.networks.initial_head(), self.config.finetune, path)

    # 5½. fc6 and fc7 of low rank, where that is wanted
    def _compress(self) -> str:
        networks, path = self.networks, self.networks.compressed_path
        if path.exists():
            self._delete_scaffolding(path, networks.chosen_path)
            return "reused"
        if networks.chosen_path.exists():
            log.info("compress: the directions chosen before are reused, %s", networks.chosen_path)
        elif distributed.is_main():
            self._choose_directions()
        distributed.barrier()
        lines = list(read_json(self.plan.compress / "summary.json").values())
        if self.plan.tunes_thin_layers:
            own = self.config.compress
            schedule = {"steps": own.steps, "learning_rates": own.learning_rates}
            settings = self.config.finetune.model_copy(update=schedule)
            lines.append(self._train_head("compress", networks.chosen_head(), settings, path))
        elif distributed.is_main():
            write_tensors(path, networks.chosen_head().state_dict())
        distributed.barrier()
        self._delete_scaffolding(path, networks.chosen_path)
        return "; ".join(lines)

    def _choose_directions(self) -> None:
        ranks, whole = self.plan.ranks, self.networks.whole_head()
        responses = self.networks.responses(whole, self.progress)
        thin = compress_head(whole, ranks.get("fc6"), ranks.get("fc7"), responses.chosen)
        kept = {name: line for name, line in describe_layers(whole, thin, responses).items() if name in ranks}
        write_json(self.plan.compress / "summary.json", kept)
        write_tensors(self.networks.chosen_path, thin.state_dict())

    def _train_head(self, stage: str, head: SPPHead, settings: FinetuneSettings, path: Path) -> str:
        """Fine-tune a head, leave it under `path`."""
        train = FinetuneWindows(self.networks.windows(train=True), settings.flip)
        validation = FinetuneWindows(self.networks.windows(train=False), flips=False)
        done = finetune_head(head, train, validation, len(self.classes), settings, path.parent, self.progress, stage)
        if distributed.is_main():
            write_tensors(path, head.state_dict())
        distributed.barrier()
        self._delete_scaffolding(path)
        return (
            f"{done.steps} steps, {done.reused_steps} of them from before; best validation error "
            f"{done.best_error:.3f} at step {done.best_step} (always background: {done.untrained_error:.3f})"
        )

    def _delete_scaffolding(self, path: Path, *others: Path) -> None:
        """What only the making of a head needed, once it is complete; an interruption may have left it."""
        if distributed.is_main():
            for file in (path.parent / "checkpoint.safetensors", *others):
                file.unlink(missing_ok=True)

    # 6. one linear SVM per class, with hard-negative mining
    def _svm(self) -> str:
        target, checkpoint = self.plan.svm / "svm.safetensors", self.plan.svm / "mining.npz"
        if target.exists():
            return "reused"
        if distributed.is_main():
            settings, networks = self.config.svm, self.networks
            source, features = networks.windows(train=True), networks.features(settings.layer)
            state = MiningState.from_arrays(read_arrays(checkpoint)) if checkpoint.exists() else None
            scale = state.scale if state is not None else networks.scale(features, settings.feature_norm, settings)
            mined = mine_detectors(
                MiningWindows(source, features),
                self.classes,
                settings,
                scale,
                state,
                save=lambda state: write_arrays(checkpoint, **state.to_arrays()),
                save_every=200,
            )
            write_json(self.plan.svm / "summary.json", {"retrains": mined.retrains, "untrained": mined.untrained})
            write_tensors(target, mined.detectors.to_tensors())
            checkpoint.unlink(missing_ok=True)
        distributed.barrier()
        done = f"{len(self.classes)} classes on {self.config.svm.layer} features of {len(self.plan.data.train)} images"
        silent = [f"{name} ({why})" for name, why in read_json(self.plan.svm / "summary.json")["untrained"].items()]
        return f"{done}; never fires: {', '.join(silent)}" if silent else done

    # 7. class-wise box regression
    def _boxes(self) -> str:
        paths = [self._regressor_path(label) for label in range(len(self.classes))]
        missing = [label for label, path in enumerate(paths) if not path.exists()]
        done = next((path for path in paths if path.exists()), None)
        counts = []
        if distributed.is_main() and missing:
            settings, networks = self.config.boxes, self.networks
            source, features = networks.windows(train=True), networks.features(settings.layer)
            # On a GPU the mean norm may differ in its last digits, but all classes must have the same.
            scale = float(read_tensors(done)["scale"]) if done else networks.scale(features, settings.feature_norm)
            examples = find_box_examples(source)
            for label in progress_bar(missing, "box regression", "class", shown=self.progress):
                own = examples[label]
                rows = pool_box_examples(source, own, networks.width(settings.layer), features)
                regressor: BoxRegressor = fit_box_regressor(rows, own.windows, own.boxes, settings, scale, self.device)
                write_tensors(paths[label], BoxRegressors.stack({self.classes[label]: regressor}).to_tensors())
                counts.append(len(rows))
        distributed.barrier()
        return f"{len(missing)} classes fitted on {sum(counts)} windows, {len(self.classes) - len(missing)} reused"

    def _flipped(self) -> list[ImageRecord]:
        """The training images whose mirror images fine-tuning needs too."""
        return self.plan.data.train if self.plan.uses_trained_head and self.config.finetune.flip else []

    def _regressor_path(self, label: int) -> Path:
        return self.plan.boxes / f"class-{label:03d}.safetensors"
