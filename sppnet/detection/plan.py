"""Which data a run uses and where each stage keeps its artifacts: folders named by the content of their inputs.

The digest of a stage covers its settings, the content of the images, annotations and files it reads, and the digests
of the stages before it. So a changed setting redoes exactly the stages that depend on it, and an interrupted one
goes on where it stopped.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sppnet.config import Config, ProposalSettings
from sppnet.data.voc import DatasetError, annotations_digest, choose_classes, hold_out, load_splits, restrict
from sppnet.detection.sampling import spread
from sppnet.network.sppnet import FullyConnected
from sppnet.records import ImageRecord, SkipCounts
from sppnet.store import digest_of, file_digest

log = logging.getLogger("sppnet")

BARE = {
    "training": "without objects (background for the SVMs alone)",
    "validation": "without objects (no part of the error)",
}


@dataclass(frozen=True)
class RunData:
    """The images of a run: to train on, and to choose settings and the fine-tuning snapshot on."""

    train: list[ImageRecord]
    validation: list[ImageRecord]
    classes: tuple[str, ...]
    skips: SkipCounts

    def __str__(self) -> str:
        """One line: images, classes, what was skipped, images that have no object, and whether the two overlap."""
        images = f"{len(self.train)} training and {len(self.validation)} validation images"
        skips = [f"{count} × {reason}" for reason, count in self.skips.counts.items()]
        kinds = {"training": self.train, "validation": self.validation}
        bare = {kind: sum(not _has_objects(record) for record in records) for kind, records in kinds.items()}
        skips += [f"{count} × {kind} image {BARE[kind]}" for kind, count in bare.items() if count]
        shared = len({record.id for record in self.train} & {record.id for record in self.validation})
        if shared:
            skips.append(f"{shared} validation images are training images too, so validation errors look too good")
        return "; ".join([f"data: {images}, {len(self.classes)} classes ({', '.join(self.classes)})", *skips])


def load_run_data(config: Config) -> RunData:
    """Training and validation images; where no val split is named, a share of the training images is held out.

    Raises DatasetError for data that are missing or cannot be used.
    """
    settings = config.data
    if not settings.root.is_dir():
        raise DatasetError(
            f"{settings.root}: no such data folder; fetch PASCAL VOC with scripts/fetch_voc, "
            "or set data.root to your own folder (data/README.md shows the layout)"
        )
    train, skips = load_splits(settings.root, settings.train)
    if settings.val:
        validation, more = load_splits(settings.root, settings.val)
        skips = skips.plus(more)
    else:
        train, validation = hold_out(train, settings.holdout, settings.seed)
    classes = choose_classes(train, settings.classes)
    return RunData(restrict(train, classes), restrict(validation, classes), classes, skips)


def _has_objects(record: ImageRecord) -> bool:
    return record.annotation is not None and len(record.annotation.boxes) > 0


def splits_to_test(config: Config, splits: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The splits to evaluate on: those given, data.test or data.val; empty = the images held out of training."""
    return splits or config.data.test or config.data.val


def load_test_data(
    config: Config, root: Path | None = None, splits: tuple[str, ...] = ()
) -> tuple[list[ImageRecord], SkipCounts]:
    """The images to evaluate on (see `splits_to_test`), below `root` or data.root.

    Where neither splits nor data.test nor data.val name any, they are the images held out of data.train: the same
    that chose the fine-tuning snapshot, so that their figures are a little too good. Raises DatasetError.
    """
    settings, names = config.data, splits_to_test(config, splits)
    folder = root or settings.root
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such data folder; name the one that holds the year folders with --data")
    if names:
        return load_splits(folder, names, require_annotations=False)
    train, skips = load_splits(folder, settings.train)
    return hold_out(train, settings.holdout, settings.seed)[1], skips


def usable_config(config: Config) -> Config:
    """A detector outlives the files that its training windows came from; images are searched then."""
    kept = tuple(path for path in config.proposals.import_from if path.is_file())
    if kept == config.proposals.import_from:
        return config
    log.info("some files of proposals.import_from are gone; images whose windows they held are searched")
    return config.model_copy(update={"proposals": config.proposals.model_copy(update={"import_from": kept})})


def windows_folder(root: Path, settings: ProposalSettings) -> Path:
    """Where the windows of these settings lie, of training and test images alike."""
    files = [file_digest(path) for path in settings.import_from if path.is_file()]
    return root / f"propose-{digest_of('propose', _dump(settings, 'workers', 'import_from'), files)}"


@dataclass(frozen=True)
class RunPlan:
    """The artifact folders of a run under `root`."""

    root: Path
    config: Config
    data: RunData

    @cached_property
    def validation(self) -> list[ImageRecord]:
        """The validation images that fine-tuning draws its windows from: spread over the split, at most so many."""
        return spread(self.data.validation, self.config.finetune.validate_images)

    @cached_property
    def windows(self) -> Path:
        return windows_folder(self.root, self.config.proposals)

    @cached_property
    def pretrain(self) -> Path:
        config = self.config
        return self._folder(
            "pretrain",
            self._trunk_start,
            _dump(config.pretrain),
            _dump(config.head),
            config.pyramid.levels,
            self._train,
        )

    @cached_property
    def maps(self) -> Path:
        return self._folder("extract", self._trunk, _dump(self.config.maps))

    @cached_property
    def head(self) -> Path:
        """The head as initialised: before fine-tuning."""
        config = self.config
        checkpoint = config.head.checkpoint
        file = file_digest(checkpoint) if checkpoint is not None and checkpoint.is_file() else None
        settings = [_dump(config.head, "checkpoint"), _dump(config.pyramid), config.finetune.seed]
        return self._folder("head", self.maps.name, self.windows.name, settings, file, self._train)

    @cached_property
    def finetune(self) -> Path:
        validation = annotations_digest(self.validation, self.data.classes)
        return self._folder("finetune", self.head.name, _dump(self.config.finetune), validation)

    @property
    def uses_trained_head(self) -> bool:
        """Whether any features that are wanted come from the fine-tuned head."""
        return self.config.finetune.enabled and self.config.svm.finetuned and self.uses_fc

    @property
    def trained_head(self) -> Path:
        return self.finetune if self.config.finetune.enabled and self.config.svm.finetuned else self.head

    @cached_property
    def compress(self) -> Path:
        schedule = () if self.tunes_thin_layers else ("steps", "learning_rates")
        sample = _dump(self.config.compress, "fc6", "fc7", *schedule)
        return self._folder("compress", self.trained_head.name, self.ranks, sample, self.windows.name)

    @property
    def tunes_thin_layers(self) -> bool:
        """Whether fc6 and fc7 are fine-tuned again once they are of low rank."""
        return self.uses_trained_head and bool(self.config.compress.steps)

    @property
    def ranks(self) -> dict[FullyConnected, int]:
        """The layers to compress, by name: of those that features are wanted of, and that these rest on."""
        settings, ranks = self.config.compress, dict[FullyConnected, int]()
        if settings.fc6 and self.uses_fc:
            ranks["fc6"] = settings.fc6
        if settings.fc7 and "fc7" in self._layers:
            ranks["fc7"] = settings.fc7
        return ranks

    @property
    def uses_fc(self) -> bool:
        """Whether any features that are wanted come from fc6 or fc7, fine-tuned or not."""
        return any(layer != "pool" for layer in self._layers)

    @property
    def _layers(self) -> list[str]:
        config = self.config
        return [config.svm.layer, *([config.boxes.layer] if config.boxes.enabled else [])]

    @cached_property
    def svm(self) -> Path:
        return self._folder("svm", _dump(self.config.svm), self._features(self.config.svm.layer))

    @cached_property
    def boxes(self) -> Path:
        return self._folder("boxes", _dump(self.config.boxes), self._features(self.config.boxes.layer))

    def dependents(self, stage: str) -> tuple[str, ...]:
        """The later stages whose results rest on those of `stage`."""
        config = self.config
        tuned = config.finetune.enabled and config.svm.finetuned
        layers = {"svm": config.svm.layer, "boxes": config.boxes.layer}
        on_fc = tuple(name for name, layer in layers.items() if layer != "pool")
        compress = ("compress",) if self.ranks else ()
        trained = ("finetune", *compress, "svm", "boxes")
        return {
            "propose": trained,
            "pretrain": ("extract", *trained),
            "extract": trained,
            "finetune": (*compress, *on_fc) if tuned else (),
            "compress": on_fc if self.ranks else (),
        }.get(stage, ())

    @property
    def detector(self) -> Path:
        return self.root / "detector"

    @cached_property
    def _train(self) -> str:
        return annotations_digest(self.data.train, self.data.classes) + str(self.config.data.train_on_difficult)

    @cached_property
    def _trunk_start(self) -> str:
        settings = self.config.trunk
        file = settings.weights.file
        content = (
            file_digest(file) if settings.weights.source == "file" and file is not None and file.is_file() else None
        )
        values = settings.model_dump(mode="json")
        values["weights"].pop("file")
        return digest_of(values, content)

    @property
    def _trunk(self) -> str:
        return self.pretrain.name if self.config.pretrain.enabled else self._trunk_start

    def _features(self, layer: str) -> str:
        """What window features of a layer depend on."""
        pooled = [self.maps.name, self.windows.name, _dump(self.config.pyramid), self._train]
        head = self.compress if self.ranks else self.trained_head
        return digest_of(pooled if layer == "pool" else [*pooled, head.name, self.config.detect.precision])

    def _folder(self, stage: str, *parts: Any) -> Path:
        return self.root / f"{stage}-{digest_of(stage, *parts)}"


def _dump(settings: BaseModel, *without: str) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=set(without))
