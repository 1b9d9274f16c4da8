"""Which images a run trains on, chooses settings on and is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sppnet.config import Config
from sppnet.data.voc import annotations_digest, choose_classes, hold_out, load_splits, restrict
from sppnet.errors import SppnetError
from sppnet.records import ImageRecord, SkipCounts, spread

BARE = {
    "training": "without objects (background for the SVMs alone)",
    "validation": "without objects (no part of the error)",
}


@dataclass(frozen=True)
class RunData:
    """The images of a run: to train on, and to choose settings on. `validation` are those fine-tuning draws from."""

    train: list[ImageRecord] = field(default_factory=list)
    held_out: list[ImageRecord] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    skips: SkipCounts = field(default_factory=SkipCounts)
    validate_images: int = 0

    @property
    def validation(self) -> list[ImageRecord]:
        """At most `validate_images` of the held-out images, spread over them."""
        return spread(self.held_out, self.validate_images)

    @property
    def images(self) -> list[ImageRecord]:
        """All that stages read: training images, then those of `validation`."""
        return [*self.train, *self.validation]

    def digest(self, split: str) -> str:
        """Content key of the annotated images of "train" or "validation"."""
        return annotations_digest(self.train if split == "train" else self.validation, self.classes)

    def __str__(self) -> str:
        """One line: images, classes, what was skipped, images that have no object, and whether the two overlap."""
        images = f"{len(self.train)} training and {len(self.held_out)} validation images"
        skips = [f"{count} × {reason}" for reason, count in self.skips.counts.items()]
        kinds = {"training": self.train, "validation": self.held_out}
        bare = {
            kind: sum(not (r.annotation and len(r.annotation.boxes)) for r in records)
            for kind, records in kinds.items()
        }
        skips += [f"{count} × {kind} image {BARE[kind]}" for kind, count in bare.items() if count]
        shared = len({record.id for record in self.train} & {record.id for record in self.held_out})
        if shared:
            skips.append(f"{shared} validation images are training images too, so validation errors look too good")
        return "; ".join([f"data: {images}, {len(self.classes)} classes ({', '.join(self.classes)})", *skips])


def load_run_data(config: Config) -> RunData:
    """Training and validation images; where no val split is named, a share of the training images is held out.

    Raises SppnetError for data that are missing or cannot be used.
    """
    settings = config.data
    if not settings.root.is_dir():
        raise SppnetError(
            f"{settings.root}: no such data folder; fetch PASCAL VOC with scripts/fetch_voc, "
            "or set data.root to your own folder (data/README.md shows the layout)"
        )
    train, skips = load_splits(settings.root, settings.train)
    if settings.val:
        held_out, more = load_splits(settings.root, settings.val)
        skips = skips.plus(more)
    else:
        train, held_out = hold_out(train, settings.holdout, settings.seed)
    classes = choose_classes(train, settings.classes)
    own, other = restrict(train, classes), restrict(held_out, classes)
    return RunData(own, other, classes, skips, config.finetune.validate_images)


def splits_to_test(config: Config, splits: Sequence[str] = ()) -> tuple[str, ...]:
    """The splits to evaluate on: those given, data.test or data.val; empty = the images held out of training."""
    return tuple(splits) or config.data.test or config.data.val


def load_test_data(
    config: Config, root: Path | None = None, splits: Sequence[str] = ()
) -> tuple[list[ImageRecord], SkipCounts]:
    """The images to evaluate on (see `splits_to_test`), below `root` or data.root.

    Where neither splits nor data.test nor data.val name any, they are the images held out of data.train: the same
    that chose the fine-tuning snapshot, so that their figures are a little too good. Raises SppnetError.
    """
    settings, names = config.data, splits_to_test(config, splits)
    folder = root or settings.root
    if not folder.is_dir():
        raise SppnetError(f"{folder}: no such data folder; name the one that holds the year folders with --data")
    if names:
        return load_splits(folder, names, require_annotations=False)
    train, skips = load_splits(folder, settings.train)
    return hold_out(train, settings.holdout, settings.seed)[1], skips
