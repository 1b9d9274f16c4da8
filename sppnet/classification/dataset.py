"""Images a classifier is trained on, those it is measured on meanwhile, and what an epoch shows of them (sec. 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from sppnet import distributed
from sppnet.artifacts import file_digest, names_from_tensor, names_to_tensor, read_json, write_json
from sppnet.backbones.backbone import Backbone
from sppnet.classification.settings import ClassDataSettings, ClassTrainingSettings
from sppnet.classification.views import list_views
from sppnet.data.class_folder import ClassFolder, read_class_folder
from sppnet.errors import ArtifactError, BackboneError, SppnetError, counted
from sppnet.images import image_header, normalise, read_image, scaled_size
from sppnet.jobs import progress_bar
from sppnet.paths import as_text

SPLIT = "split.json"

# Principal components of the colours of ImageNet's pixels, in RGB from 0 to 1: the alteration of colours that the paper
# cites (Krizhevsky et al. 2012) is along them. Published numbers, as in most training code for ImageNet.
DEVIATIONS = torch.tensor([0.2175, 0.0188, 0.0045])
COMPONENTS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@dataclass(frozen=True)
class ClassData:
    """Images to train on and to measure on; `split` is what is kept of them: settings, names, contents."""

    train: ClassFolder
    validation: ClassFolder
    split: Mapping[str, Mapping[str, Any]]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def write(self, run: Path) -> None:
        write_json(run / SPLIT, self.split)

    def __str__(self) -> str:
        sides = f"{len(self.train.images)} training and {counted(len(self.validation.images), 'validation image')}"
        return f"data: {sides} of {counted(len(self.classes), 'class')}"


def load_class_data(settings: ClassDataSettings, run: Path) -> ClassData:
    """The images of data.train and data.val, or a share of every class held out, drawn once and kept in `run`.

    An image that was held out stays so, known by its path below the folder or by its content; copies of it do too. New
    images train. A class with a single image is trained. SppnetError for fewer than two classes, for validation images
    among the training images, and where nothing is left to measure on.
    """
    folder = read_class_folder(settings.train)
    if len(folder.classes) < 2:
        raise SppnetError(f"{folder}; expected folders of two classes or more, to tell them apart; add one")
    contents = _contents(folder)
    drawn: dict[str, Any] = {"holdout": settings.holdout, "seed": settings.seed} if settings.val is None else {}
    if settings.val is not None:
        validation = read_class_folder(settings.val, folder.classes)
        others = _contents(validation)
        trained = set(contents.values())
        both = [name for name, digest in others.items() if digest in trained]
        if both:
            share = f"{len(both)} of {counted(len(others), 'image')}, e.g. {both[0]}"
            raise SppnetError(f"data.val: training images are in it too, {share}; take them out of one of the folders")
        return ClassData(folder, validation, {"settings": drawn, "train": contents, "held_out": others})
    kept = _read_split(run / SPLIT)
    out = _known(contents, kept["held_out"]) if kept and kept["settings"] == drawn else np.zeros(len(contents), bool)
    if not out.any() or len(np.unique(folder.labels[~out])) < len(folder.classes):
        out = _known(contents, _draw(folder, contents, settings))
    untrained = sorted(set(range(len(folder.classes))) - set(folder.labels[~out].tolist()))
    if untrained or not out.any():
        what = f"class {folder.classes[untrained[0]]} has copies of others alone" if untrained else "no class has two"
        raise SppnetError(f"{folder.root}: expected two different images of a class or more, but {what}; add some")
    sides = [
        {name: contents[name] for name, held in zip(contents, out, strict=True) if held == side} for side in (0, 1)
    ]
    split = {"settings": drawn, "train": sides[0], "held_out": sides[1]}
    return ClassData(folder.part(np.flatnonzero(~out)), folder.part(np.flatnonzero(out)), split)


def _contents(folder: ClassFolder) -> dict[str, str]:
    """Path below the folder -> digest of the file, in the order of the images; ImageError for what is no image."""

    def digest(place: int) -> list[Tensor]:
        image_header(folder.images[place])
        return [names_to_tensor([file_digest(folder.images[place])]).long()]  # numbers, for other processes

    bar = progress_bar(distributed.in_order(digest, len(folder.images)), "contents", "image", len(folder.images))
    names = (as_text(path.relative_to(folder.root).as_posix()) for path in folder.images)
    return {name: names_from_tensor(found)[0] for name, (found,) in zip(names, bar, strict=True)}


def _known(contents: Mapping[str, str], held: Mapping[str, str]) -> NDArray[np.bool_]:
    """(N,) whether an image is one of those `held`, or a copy of one."""
    digests = set(held.values()) | {contents[name] for name in held if name in contents}
    return np.array([digest in digests for digest in contents.values()])


def _draw(folder: ClassFolder, contents: Mapping[str, str], settings: ClassDataSettings) -> dict[str, str]:
    """The share of every class, at least one of two different images: by name."""
    rng, found = np.random.default_rng(settings.seed), dict[str, str]()
    sides = [dict[str, str]() for _ in folder.classes]
    for (name, digest), label in zip(contents.items(), folder.labels, strict=True):
        sides[label][digest] = name
    for own in sides:
        count = min(max(1, round(settings.holdout * len(own))), len(own) - 1)
        found |= {own[digest]: digest for digest in rng.choice(sorted(own), count, replace=False).tolist()}
    return found


def _read_split(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(values.get(key), dict) for key in ("settings", "held_out")):
        raise ArtifactError(f"{path}: expected the names of a split, got something else; delete it to draw a new one")
    return values


class Batch(NamedTuple):
    """Images to be shown together: their places, the side of their crops, the epoch; None: as validation sees them."""

    places: NDArray[np.int64]
    size: int
    epoch: int | None = None


def epoch_batches(count: int, epoch: int, settings: ClassTrainingSettings) -> list[Batch]:
    """All batches of an epoch of `count` images, in a new order, without an incomplete last one where there are others.

    Sizes are those of sec. 2.3: one for the epoch, the next for the next epoch; or each batch its own ("range").
    """
    rng = np.random.default_rng((settings.seed, epoch))
    order, sizes = rng.permutation(count), settings.sizes
    found = []
    for first in range(0, max(count - settings.batch, 0) + 1, settings.batch):
        drawn = int(rng.integers(min(sizes), max(sizes), endpoint=True))
        size = drawn if settings.size_choice == "range" else sizes[epoch % len(sizes)]
        found.append(Batch(order[first : first + settings.batch], size, epoch))
    return found


def training_view(
    image: NDArray[np.uint8], size: int, settings: ClassTrainingSettings, rng: np.random.Generator | None
) -> Tensor:
    """What training sees of an image uint8 RGB (H, W, 3): (3, size, size) float32 pixels, about 0 to 255 (sec. 3.1).

    One of the ten views of a test, of the largest size; its colours are altered, and it is resized to `size`: only the
    resolution depends on it (sec. 2.3). Without `rng` it is the centre as it is. Bilinear without antialiasing, as
    images are resized everywhere here.
    """
    shape = image.shape[0], image.shape[1]
    views = list_views("centre" if rng is None else "ten", shape, max(settings.sizes), settings.min_side)
    chosen = views[0 if rng is None else int(rng.integers(len(views)))]
    x1, y1, x2, y2 = chosen.box
    scaled = _resize(torch.tensor(image).permute(2, 0, 1).float(), scaled_size(shape, chosen.scale)[0])
    view = scaled[:, y1:y2, x1:x2].flip(2) if chosen.flip else scaled[:, y1:y2, x1:x2]
    if rng is not None:
        strength = torch.from_numpy(rng.normal(0, 0.1, 3).astype(np.float32)) * settings.colour
        view = view + 255 * (COMPONENTS @ (DEVIATIONS * strength)).view(3, 1, 1)
    return _resize(view, (size, size))


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return transforms.resize(pixels, list(size), antialias=False)


class TrainingViews(Dataset[Any]):
    """Batches (B, 3, s, s), prepared for the network, and labels (B,): the same in whatever process they are made.

    In place of a batch an error is returned: a DataLoader would bury what a worker process raises in its traceback.
    """

    def __init__(
        self, images: Sequence[Path], labels: Iterable[int], settings: ClassTrainingSettings, backbone: Backbone
    ) -> None:
        self.images, self.labels = list(images), torch.tensor([*labels])
        self.settings, self.weights = settings, backbone.weights
        self.statistics = backbone.mean, backbone.std

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor] | SppnetError:
        try:
            views = torch.stack([self._view(int(place), batch) for place in batch.places])
        except SppnetError as error:
            return error
        views = views.flip(1) if self.weights.channel_order == "bgr" else views
        return normalise(views, *self.statistics), self.labels[torch.from_numpy(batch.places)]

    def _view(self, place: int, batch: Batch) -> Tensor:
        # from 1 on: seeds are padded with zeros, so that 0 would be the stream of the epoch's order
        own = None if batch.epoch is None else np.random.default_rng((self.settings.seed, batch.epoch, place + 1))
        image = read_image(self.images[place])
        try:
            return training_view(image, batch.size, self.settings, own)
        except BackboneError as error:  # too narrow
            raise BackboneError(f"{self.images[place]}: {error}") from None
