"""The trunk and the head of a training run, built when they are first needed, and the features they give."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet.config import SVMSettings
from sppnet.detection.linear_svm import mean_norm_scale
from sppnet.detection.low_rank import CompressionError, Responses, ask_images, check_rank, linear_responses
from sppnet.detection.plan import RunPlan
from sppnet.detection.proposals import read_windows
from sppnet.detection.sampling import spread
from sppnet.detection.stages import StageError
from sppnet.detection.training_windows import TrainingWindows, sample_norms
from sppnet.detection.window_features import Features, FrozenHead, pool_cells
from sppnet.network.sppnet import (
    FullyConnected,
    Layer,
    SPPHead,
    build_head,
    copy_fc,
    load_head_checkpoint,
    load_pretrained_fc,
    pooled_size,
)
from sppnet.network.trunks import Trunk, build_trunk
from sppnet.network.weights import load_weight_file, torchvision_state
from sppnet.progress import progress_bar
from sppnet.store import read_tensors


class TrainingNetworks:
    """What pretrain, finetune and compress have made so far, where they are wanted, else what they start from.

    A stage that is wanted but not complete is a StageError that names it.
    """

    def __init__(self, plan: RunPlan, device: torch.device) -> None:
        self.plan, self.config, self.device = plan, plan.config, device

    @property
    def pretrained_path(self) -> Path:
        """Where the stage pretrain leaves trunk and head."""
        return self.plan.pretrain / "network.safetensors"

    @property
    def head_path(self) -> Path:
        """Where the stage finetune leaves the head."""
        return self.plan.finetune / "head.safetensors"

    @cached_property
    def trunk(self) -> Trunk:
        settings = self.config.trunk
        if not self.config.pretrain.enabled:
            return build_trunk(settings).to(self.device)
        trunk, state = self._bare_trunk(), self._pretrained()
        trunk.load_state_dict({name[6:]: tensor for name, tensor in state.items() if name.startswith("trunk.")})
        return trunk.to(self.device)

    @property
    def compressed_path(self) -> Path:
        """Where the stage compress leaves the head."""
        return self.plan.compress / "head.safetensors"

    @property
    def chosen_path(self) -> Path:
        """Where the stage compress keeps the head whose ranks it has chosen while that is fine-tuned."""
        return self.plan.compress / "chosen.safetensors"

    def head(self) -> SPPHead:
        """The head whose features are used: the whole one, or what the stage compress made of it."""
        if not self.plan.ranks:
            return self.whole_head()
        return self._thin_head(self._need(self.compressed_path, "compress"))

    def chosen_head(self) -> SPPHead:
        """The compressed head before it is fine-tuned."""
        return self._thin_head(self.chosen_path)

    def whole_head(self) -> SPPHead:
        """The head before it is compressed: fine-tuned, or as it was initialised."""
        if not self.plan.uses_trained_head:
            return self.initial_head()
        head = self._new_head()
        head.load_state_dict(read_tensors(self._need(self.head_path, "finetune")))
        return head.to(self.device)

    def initial_head(self) -> SPPHead:
        """The head before fine-tuning, with its input scaled as head.input_norm says."""
        head = self.started_head()
        if self.config.head.input_norm is not None:
            head.input_scale.fill_(self.scale(self.features("pool"), self.config.head.input_norm))
        return head.to(self.device)

    def started_head(self) -> SPPHead:
        """A new head with fc6 and fc7 from where head.init says, on the CPU."""
        config, head = self.config, self._new_head()
        if config.pretrain.enabled and config.head.init == "random":
            copy_fc(head, self._pretrained(), "the pretrained network")
        elif config.head.init == "checkpoint":
            load_head_checkpoint(head, config.head)
        elif config.head.init == "imagenet":
            weights = config.trunk.weights
            file = weights.file if weights.source == "file" else None
            state = load_weight_file(file) if file is not None else torchvision_state(config.trunk.name)
            load_pretrained_fc(head, state, config.trunk.name, self.trunk.channels, config.pyramid.levels)
        return head

    def features(self, layer: Layer) -> Features:
        """What makes features of a layer from maps and windows on them."""
        if layer == "pool":
            return lambda maps, where: pool_cells(maps, where, self.config.pyramid.levels)
        frozen = FrozenHead(self.head(), self.config.pyramid.levels, self.config.detect.precision)
        return lambda maps, where: frozen.features(maps, where, layer)

    def width(self, layer: Layer) -> int:
        """How wide the features of a layer are."""
        sizes = {"fc6": self.config.head.fc6, "fc7": self.config.head.fc7}
        return sizes.get(layer) or pooled_size(self.trunk.channels, self.config.pyramid.levels)

    def scale(self, features: Features, target: float, sample: SVMSettings | None = None) -> float:
        """The factor that gives features the mean norm `target`, from a sample of images and windows.

        `sample` gives its size; by default it is the release's, so that only the SVMs depend on svm.norm_*.
        """
        size = sample or SVMSettings()
        norms = sample_norms(self.windows(train=True), features, size.norm_images, size.norm_windows)
        if not len(norms):
            raise StageError("no training image has a window; check proposals.min_side and the images")
        return mean_norm_scale(norms, target)

    def windows(self, train: bool) -> TrainingWindows:
        """The windows of the training or of the validation images, on the maps of the trunk."""
        plan = self.plan
        records = plan.data.train if train else plan.validation
        return TrainingWindows(
            records, plan.data.classes, plan.windows, plan.maps, self.trunk.geometry, self.config, self.device
        )

    def responses(self, whole: SPPHead, progress: bool = True) -> Responses:
        """What fc6 of the whole head answers to windows drawn as the settings `compress` say (`ask_images`)."""
        settings, source = self.config.compress, self.windows(train=True)
        chosen = spread(range(len(source.records)), settings.images)
        records = [source.records[index] for index in chosen]
        found = progress_bar(records, "responses", "image", shown=progress)
        proposals = (read_windows(source.windows_folder, record) for record in found)

        @torch.inference_mode()
        def answer(number: int, drawn: NDArray[np.float32]) -> Tensor:
            maps = source.maps(chosen[number])
            return linear_responses(whole, source.pool(maps, source.cells(maps, drawn))).cpu()

        width = whole.fc6.out_features
        return ask_images(records, proposals, answer, source.classes, settings.windows, settings.seed, width)

    def check_ranks(self) -> None:
        """CompressionError for ranks that the stage compress would refuse, before anything is trained."""
        ranks, config = self.plan.ranks, self.config
        if not ranks:
            return
        sizes = config.head
        inputs = {"fc6": pooled_size(self._bare_trunk().channels, config.pyramid.levels), "fc7": sizes.fc6}
        for name, rank in ranks.items():
            check_rank(name, inputs[name], {"fc6": sizes.fc6, "fc7": sizes.fc7}[name], rank)
        most = config.compress.windows
        if max(ranks.values()) > most // 2:
            raise CompressionError(
                f"compress.windows={most} cannot tell {max(ranks.values())} directions apart; "
                "raise it to several times the rank"
            )

    def _bare_trunk(self) -> Trunk:
        """The layers of the trunk, with random weights: none must be there yet."""
        settings = self.config.trunk
        weights = settings.weights.model_copy(update={"source": "random"})
        return build_trunk(settings.model_copy(update={"weights": weights}))

    def _thin_head(self, path: Path) -> SPPHead:
        head = self._new_head(self.plan.ranks)
        head.load_state_dict(read_tensors(path))
        return head.to(self.device)

    def _new_head(self, ranks: dict[FullyConnected, int] | None = None) -> SPPHead:
        config, outputs = self.config, len(self.plan.data.classes) + 1
        thin = {str(name): rank for name, rank in (ranks or {}).items()}
        return build_head(self.trunk.channels, config.pyramid.levels, outputs, config.head, config.finetune.seed, thin)

    def _pretrained(self) -> dict[str, Tensor]:
        return read_tensors(self._need(self.pretrained_path, "pretrain"))

    def _need(self, path: Path, stage: str) -> Path:
        if not path.exists():
            raise StageError(
                f"{path}: the {stage} stage is not complete for these settings; "
                f"run `sppnet train` without --only, or with --only {stage} first"
            )
        return path
