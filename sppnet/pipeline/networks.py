"""The backbone and the head of a training run, built when they are first needed, and the features they give."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sppnet import distributed
from sppnet.artifacts import read_tensors
from sppnet.backbones.backbone import Backbone, build_backbone, content_digest
from sppnet.backbones.runtime import Kind, Precision, Runtime, make_runtime, resolve_precision, resolve_runtime
from sppnet.backbones.weights import package_file
from sppnet.config import BackboneSettings, SVMSettings
from sppnet.data.selection import shown_classes
from sppnet.detection.embedding import Projection, draw_windows
from sppnet.detection.feature_maps import compute_maps
from sppnet.detection.joint_head import JointHead
from sppnet.detection.linear_svm import mean_norm_scale
from sppnet.detection.training_windows import TrainingWindows, sample_norms
from sppnet.detection.window_features import Features, FrozenHead, pool_projected
from sppnet.distributed import in_order
from sppnet.errors import BackboneError, SppnetError, counted
from sppnet.jobs import available_cores, progress_bar
from sppnet.models.low_rank import check_rank, fc6_activations
from sppnet.models.sppnet import (
    Layer,
    SPPHead,
    build_head,
    pooled_size,
    start_head,
)
from sppnet.pipeline.stages import GRAPH, TESTED, StageGraph, fc_layers, ranks, tunes_low_rank, windows_folder
from sppnet.proposals.edge_forest import load_forest
from sppnet.proposals.search import propose_images
from sppnet.records import spread

ACTIVATION_IMAGES = 256  # that choose principal components
ACTIVATIONS = 16_384  # windows of these in all: four for each of 4,096 outputs


class TrainingNetworks:
    """What finetune and low_rank have made so far, where they are wanted, else what they start from.

    A stage that is wanted but not complete is a SppnetError that names it.
    """

    def __init__(self, graph: StageGraph, device: torch.device) -> None:
        self.graph, self.config, self.device = graph, graph.config, device

    @cached_property
    def backbone(self) -> Backbone:
        return build_backbone(self.config.backbone, module=self.graph.own).to(self.device)

    def head(self) -> SPPHead:
        """The head whose features are used: of low rank where that is set, fine-tuned unless that is not wanted."""
        if not GRAPH["joint"].skipped(self.config):
            path = self._need("joint", "head.safetensors")
            return self.saved_head(path, {"fc6": len(read_tensors(path)["basis6.weight"])})
        if not ranks(self.config):
            return self.whole_head()
        return self.saved_head(self._need("low_rank", "head.safetensors"), ranks(self.config))

    def joint_head(self, model: JointHead, projection: Projection) -> SPPHead:
        """The head of a joint training, on pooled features."""
        head = self._new_head({"fc6": len(projection.basis)})
        model.whole(projection, head)
        return head

    def whole_head(self) -> SPPHead:
        """The head before its rank is reduced: fine-tuned, or as it was initialised."""
        if GRAPH["finetune"].skipped(self.config):
            return self.initial_head()
        return self.saved_head(self._need("finetune", "head.safetensors"))

    def saved_head(self, path: Path, ranks: dict[str, int] | None = None) -> SPPHead:
        """The head that a file holds, of these ranks."""
        head = self._new_head(ranks)
        head.load_state_dict(read_tensors(path))
        return head.to(self.device)

    def initial_head(self) -> SPPHead:
        """The head before fine-tuning, with its input scaled as head.input_norm says.

        An fc6 that was trained goes on computing what it did: its weights take back what the scale changes.
        """
        head = self.started_head()
        if self.config.head.input_norm is not None:
            scale = self.scale(self.features("pool"), self.config.head.input_norm)
            if self.config.head.init != "random":
                head.fc6.weight.data.mul_(head.input_scale / scale)
            head.input_scale.fill_(scale)
        return head.to(self.device)

    def started_head(self) -> SPPHead:
        """A new head with fc6 and fc7 from where head.init says, on the CPU."""
        config, head = self.config, self._new_head()
        start_head(head, config.head, config.backbone, self.backbone.channels, config.pyramid.levels)
        return head

    def features(self, layer: Layer) -> Features:
        """What makes features of a layer from maps and windows on them."""
        levels = self.config.pyramid.levels
        if layer == "pool":
            return lambda maps, projected: pool_projected(maps, projected, levels)
        frozen = FrozenHead(self.head(), levels, self.config.precision)
        return lambda maps, projected: frozen.features(maps, projected, layer)

    def width(self, layer: Layer) -> int:
        """How wide the features of a layer are."""
        sizes = {"fc6": self.config.head.fc6, "fc7": self.config.head.fc7}
        return sizes.get(layer) or pooled_size(self.backbone.channels, self.config.pyramid.levels)

    def scale(self, features: Features, target: float, sample: SVMSettings | None = None) -> float:
        """The factor that gives features the mean norm `target`, from a sample of images and windows.

        `sample` gives its size; by default it is the release's, so that only the SVMs depend on svm.norm_*.
        """
        size = sample or SVMSettings()
        norms = sample_norms(self.windows(train=True), features, size.norm_images, size.norm_windows)
        if not len(norms):
            raise SppnetError("no training image has a window; check proposals.min_side and the images")
        return mean_norm_scale(norms, target)

    def windows(self, train: bool, objects: bool = False, base: bool = False) -> TrainingWindows:
        """The windows of the training or of the validation images, on the maps of the backbone.

        With `objects` the images of data.objects_only follow, whose objects are all their windows. With `base` those
        of data.more are left out.
        """
        graph, more = self.graph, self.graph.data.objects if objects else []
        train_records = graph.data.base if base else graph.data.train
        records = [*(train_records if train else graph.data.validation), *more]
        folders = graph.folder("proposals"), graph.folder("maps")
        classes, backbone = graph.data.classes, self.backbone
        return TrainingWindows(records, classes, *folders, backbone, self.config, self.device, len(more))

    def tested(self, progress: bool = True) -> TrainingWindows:
        """The validation images with the windows that `eval` searches, which are searched where they are missing."""
        folder = windows_folder(self.graph.root, self.config)
        source = replace(self.windows(train=False), windows_folder=folder)
        propose_images(source.records, self.config.proposals, folder, progress, imports_needed=False)
        return source

    @torch.inference_mode()
    def activations(self, head: SPPHead, progress: bool = True) -> Tensor:
        """What fc6 of the whole head gives, before its rectification, of a sample of windows: (N, fc6).

        Half of the windows of an image are objects or near one where there are as many (`draw_windows`), because the
        detector must tell these apart and few proposals are.
        """
        source, rng = self.windows(train=True), np.random.default_rng(self.config.finetune.seed)
        chosen = spread(range(len(source.records)), ACTIVATION_IMAGES)
        each, drawn = -(-ACTIVATIONS // len(chosen)), list[NDArray[np.float32]]()
        for index in chosen:
            image = source.image_windows(index)
            drawn.append(image.windows[draw_windows(image, each, rng)])
        pool, count = self.features("pool"), len(chosen)
        every = in_order(lambda i: [fc6_activations(head, source.features(chosen[i], drawn[i], pool)).cpu()], count)
        found = [part for (part,) in progress_bar(every, "activations", "image", count, shown=progress)]
        return torch.cat([torch.empty(0, head.fc6.out_features), *found])

    def missing_inputs(self, stages: Sequence[str]) -> list[str]:
        """What would end one of these stages, found without reading a weight: files, images, ranks or the runtime."""
        config, data, difficult = self.config, self.graph.data, self.config.data.train_on_difficult
        used, more = {name for name in stages if not GRAPH[name].skipped(config)}, set(stages) - {"proposals"}
        trained = {f"train_proposals.{place}": own for place, own in enumerate(config.train_proposals)}
        searches = {"proposals": config.proposals, **trained}
        files = [(f"{name}.import_from", path) for name, own in searches.items() for path in own.import_from]
        by_edges = {name: own.edge_model for name, own in searches.items() if own.method == "edge_boxes"}
        forests = {f"{name}.edge_model": path for name, path in by_edges.items() if path is not None}
        files += forests.items()
        if more and config.backbone.weights.source == "file":
            files += [("backbone.weights.file", path) for path in [config.backbone.weights.file] if path]
        if more and config.head.init == "checkpoint" and self._starts_head:
            files += [("head.checkpoint", path) for path in [config.head.checkpoint] if path]
        found = [f"missing: {path}: no such file; check {name}" for name, path in files if not path.is_file()]
        hint = "" if difficult else ", or all are difficult and data.train_on_difficult=false"
        if used - {"proposals", "maps"} and not any(shown_classes(record, difficult) for record in data.train):
            found.append(f"no training image has an object of the classes{hint}; check the annotations")
        if ("finetune" in used or ("low_rank" in used and tunes_low_rank(config))) and not data.validation:
            other = "leave it empty to hold out images of data.train" if config.data.val else "add images"
            found.append(
                f"no validation image has an object of the classes{hint}, but these choose the fine-tuned network; "
                f"name images with objects in data.val, or {other}"
            )
        try:
            for path in filter(Path.is_file, forests.values()):
                load_forest(path)
            if more:
                if config.backbone.weights.source == "package":
                    package_file(self.graph.layers.name)
                _ = self.graph.layers.mean
                resolve_runtime(config.maps.runtime, self.device)
                for name, rank in ranks(config).items():
                    fc6 = name == "fc6"
                    inputs = pooled_size(self.graph.layers.channels, config.pyramid.levels) if fc6 else config.head.fc6
                    check_rank(name, inputs, config.head.fc6 if fc6 else config.head.fc7, rank)
                if {"maps", "embed"} & used:
                    _ = self.map_costs
        except SppnetError as error:
            found.append(str(error))
        return found

    @cached_property
    def map_costs(self) -> str:
        """What the maps take of disk, memory and time; "" where all are there. SppnetError where the disk is too small.

        With a joint head the rows of their windows lie on the disk, once more while it is trained, and maps take the
        time. They are those of an image of the first one's size, the time by random weights at the smallest scale.
        """
        graph, config, settings = self.graph, self.config, self.config.maps
        joint = not GRAPH["embed"].skipped(config)
        what, folder = ("rows", graph.folder("embed")) if joint else ("maps", graph.folder("maps"))
        paths = graph.rows if joint else [record.path_in(Path(), flip) for record, flip in graph.stored]
        there = np.array([(folder / path).exists() for path in paths], bool)
        others = len(graph.images) - len(there)
        if there.all() and not others:
            return ""
        sizes, scales, gathered = graph.gigabytes[: len(there)], counted(len(settings.scales), "scale"), 0.0
        if joint:
            kept, every = config.joint.windows, config.proposals.max_windows * (1 + bool(config.proposals.shapes))
            windows = np.array([every if path.is_relative_to(TESTED) else kept for path in paths])
            sizes = windows * (2 * config.joint.rank + 16) / 1e9
            gathered = 2e-9 * config.joint.rank * windows[windows == kept].sum()
        line = f"the {what} of {len(graph.images):,} images, mirrored ones too, at {scales}: {sizes.sum():.3g} GB"
        free = shutil.disk_usage(next(filter(Path.exists, folder.absolute().parents))).free / 1e9
        done = sizes[there].sum()
        if sizes[~there].sum() + gathered > free:
            twice = f" and {gathered:.3g} once more in training" if joint else ""
            room = f"{done:.3g} of it there{twice}, but the disk of {folder} has {free:.3g} GB left"
            hint = f"maps.budget_gigabytes={done + 0.9 * free:.3g} to compute the others when read, fewer maps.scales"
            hint = "fewer joint.windows" if joint else hint
            raise SppnetError(f"{line}, {room}; set {hint}, or another disk with --run")
        precision = resolve_precision(config.precision, self.device)
        runtime = make_runtime(graph.layers.to(self.device), settings.runtime, precision)
        smallest = settings.model_copy(update={"scales": (min(settings.scales),)})
        for _ in range(2):  # the first one compiles, and warms up
            start = time.monotonic()
            measured = compute_maps(runtime, np.zeros((*graph.images[0][0].size, 3), np.uint8), smallest).maps[0]
        values = graph.gigabytes[0] * 1e9 / (2 if settings.storage == "float16" else 4)  # time grows with them
        seconds = (time.monotonic() - start) * values / measured.numel()
        cores = min(1, torch.get_num_threads() / available_cores()) if self.device.type == "cpu" else 1
        took = timedelta(seconds=round(seconds * (~there).sum() * cores / distributed.world_size()))
        line += f" on disk, {4e-6 * values:.3g} MB of memory and {seconds:.2f} s an image, {took} for those missing"
        if others:
            steps = sum(config.finetune.steps) + (sum(config.low_rank.steps) if ranks(config) else 0)
            images = 0 if GRAPH["finetune"].skipped(config) else steps * config.finetune.images_per_batch
            reads = round(images * others / len(graph.images))
            again = f"in fine-tuning {reads:,} times, {timedelta(seconds=round(reads * seconds))}"
            line += f"; the maps of {others} images are not stored but computed when they are read, {again}"
        return line

    def check_inputs(self, stages: Sequence[str]) -> None:
        """Raise now what would end one of these stages hours later: what is missing, and weights that do not fit."""
        for reason in self.missing_inputs(stages):
            raise SppnetError(reason)
        if set(stages) - {"proposals"}:
            _ = self.backbone
            if self.config.head.init != "random" and self._starts_head:
                self.started_head()

    @property
    def _starts_head(self) -> bool:
        """Whether head.init is read: of the paper's head, where fc features are wanted and not fine-tuned yet."""
        status = self.graph.status("finetune")
        return bool(fc_layers(self.config)) and (bool(status.skipped) or not status.complete)

    def _new_head(self, ranks: dict[str, int] | None = None) -> SPPHead:
        config, outputs, channels = self.config, len(self.graph.data.classes) + 1, self.backbone.channels
        return build_head(channels, config.pyramid.levels, outputs, config.head, config.finetune.seed, ranks)

    def projection(self) -> Projection:
        """That of the stage `embed`."""
        return Projection.from_tensors(read_tensors(self._need("embed", "projection.safetensors")))

    def _need(self, stage: str, name: str) -> Path:
        path = self.graph.folder(stage) / name
        if not path.exists():
            raise SppnetError(
                f"{path}: the {stage} stage is not complete for these settings; "
                f"run `sppnet train`, or its stage {stage} first"
            )
        return path


def own_digest(settings: BackboneSettings, module: nn.Module | None) -> str:
    """Names a network of one's own by its layers and weights; "" for a backbone by name.

    BackboneError for a network that is no grid, and for one that differs from call to call.
    """
    if settings.module is None:
        return ""
    first, second = (build_backbone(settings.without_weights(), module=module) for _ in range(2))
    _ = first.geometry  # refused here where there is none
    if content_digest(first) != content_digest(second):
        raise BackboneError(
            f"backbone.module={settings.module}: expected the same network at every call, because each process makes "
            "its own, got other weights; load them from a file, or draw them with torch alone"
        )
    return content_digest(first)


def load_runtime(
    settings: BackboneSettings,
    kind: Kind,
    precision: Precision,
    device: torch.device,
    module: nn.Module | None = None,
) -> Runtime:
    """The backbone of `settings`, or `module`, ready to compute maps on `device`, for `extract_images`."""
    return make_runtime(build_backbone(settings, module=module).to(device), kind, precision)
