"""What a classifier is trained on: crops of images for the whole network, or features of full ones for its head."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from sppnet import distributed
from sppnet.artifacts import digest_of, map_arrays, tensors_digest, write_arrays
from sppnet.backbones.runtime import device_of, make_runtime, resolve_precision
from sppnet.classification.dataset import Batch, ClassData, TrainingViews, epoch_batches
from sppnet.classification.settings import ClassifierConfig
from sppnet.errors import BackboneError, SppnetError
from sppnet.images import flip_image, read_image, scaled_size
from sppnet.jobs import available_cores, progress_bar
from sppnet.models.sppnet import SPPNet
from sppnet.ops.pyramid import spatial_pyramid_pool

FEW = 512  # images below which this process reads them: starting others takes seconds
MOST = 8  # processes that read images
NORM_IMAGES = 200  # ours: sample for head.input_norm
TOGETHER = 64  # validation images
LARGEST = torch.finfo(torch.float16).max  # of the features kept


class ImageSource:
    """The whole network, on crops of images.

    `trained` is the network, `count` the training images, `validation_count` the batches of all processes.
    """

    def __init__(self, network: SPPNet, data: ClassData, config: ClassifierConfig) -> None:
        self.trained, self.settings, self.count = network, config.training, len(data.train.images)
        images = (*data.train.images, *data.validation.images)
        labels = np.concatenate([data.train.labels, data.validation.labels])
        size, places = max(self.settings.sizes), np.arange(self.count, len(images))
        self.held_out = [Batch(places[i : i + TOGETHER], size) for i in range(0, len(places), TOGETHER)]
        self.validation_count = len(self.held_out)
        self.queue: list[Batch] = []
        workers = min(available_cores(), MOST) if len(images) >= FEW else 0
        self.loader: DataLoader[tuple[Tensor, Tensor] | SppnetError] = DataLoader(
            TrainingViews(images, labels, self.settings, network.backbone),
            batch_size=None,
            sampler=self.queue,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device_of(network).type == "cuda",
            multiprocessing_context="spawn" if workers else None,  # forked copies of torch's threads can hang
            worker_init_fn=_ignore_ctrl_c,
        )

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this process and their labels (B,)."""
        batches = epoch_batches(self.count, epoch, self.settings)
        return self._load([one._replace(places=_share(one.places)) for one in batches])

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._load(distributed.shard(self.held_out))

    def pooled(self) -> Iterator[Tensor]:
        """Pooled features (B, D) of some training images, by the statistics that batch norm trains with."""
        places = _sample(self.count)
        batches = [Batch(part, max(self.settings.sizes)) for part in np.array_split(places, -(-len(places) // 32))]
        backbone = copy.deepcopy(self.trained.backbone).train()  # those of random weights are not known yet
        for images, _ in self._load(batches):
            yield spatial_pyramid_pool(backbone(images.to(device_of(backbone))), self.trained.levels)

    def _load(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        self.queue[:] = batches
        try:
            for found in self.loader:
                if isinstance(found, SppnetError):
                    raise found
                yield found
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            why = "out of memory, or a script that lacks the line 'if __name__ == \"__main__\":'"
            raise SppnetError(f"a process that reads images died: {why}; repair that, or end other programs") from None


class FeatureSource:
    """The head alone, on features of full images and their mirror images, computed once (ours); as `ImageSource`.

    The full image rather than crops: that is what is tested by default, and the backbone runs twice an image and size
    instead of in every epoch. They are kept in 16 bits, as maps are, in <run>/features-<digest>.npz.
    """

    def __init__(
        self, network: SPPNet, data: ClassData, config: ClassifierConfig, run: Path, progress: bool = True
    ) -> None:
        self.trained, self.settings, self.count = network.head, config.training, len(data.train.images)
        self.labels = torch.from_numpy(np.concatenate([data.train.labels, data.validation.labels]))
        self.validation_count = -(-len(data.validation.images) // TOGETHER)
        self.sizes = sorted(set(self.settings.sizes))
        backbone, weights = network.backbone, network.backbone.weights
        precision = resolve_precision(config.precision, device_of(network))
        mean = tensors_digest({"mean": torch.as_tensor(backbone.mean)})
        used = weights.channel_order, mean, backbone.std, backbone.layer, network.levels, precision, self.sizes
        contents = data.split["train"], data.split["held_out"]
        path = run / f"features-{digest_of(tensors_digest(backbone.state_dict()), contents, used)}.npz"
        if not path.exists():
            runtime, images = make_runtime(backbone, "auto", precision), (*data.train.images, *data.validation.images)

            def features(index: int) -> list[Tensor]:
                image, rows = read_image(images[index]), list[Tensor]()
                try:
                    for side in self.sizes:
                        size, _ = scaled_size((image.shape[0], image.shape[1]), side)
                        for each in (image, flip_image(image)):
                            found = runtime(runtime.prepare(each, size))[0]
                            rows.append(spatial_pyramid_pool(found, network.levels).cpu())
                except BackboneError as error:  # too narrow
                    raise BackboneError(f"{images[index]}: {error}") from None
                return [torch.stack(rows).clamp(-LARGEST, LARGEST)]

            every = distributed.in_order(features, len(images))
            bar = progress_bar(every, "features", "image", len(images), shown=progress)
            found = np.stack([rows.numpy().astype(np.float16) for (rows,) in bar])
            if distributed.is_main():
                write_arrays(path, features=found)
            distributed.barrier()
        self.features = map_arrays(path)["features"]  # (N, sizes · 2, D)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        flips = np.random.default_rng((self.settings.seed, epoch, 1)).integers(2, size=self.count)
        for batch in epoch_batches(self.count, epoch, self.settings):
            nearest = int(np.argmin(np.abs(np.array(self.sizes) - batch.size)))
            places = _share(batch.places)
            yield self._rows(places, 2 * nearest + flips[places]), self.labels[places]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in distributed.shard(range(self.count, len(self.labels), TOGETHER)):
            places = np.arange(first, min(first + TOGETHER, len(self.labels)))
            yield self._rows(places, 2 * len(self.sizes) - 2), self.labels[places]

    def pooled(self) -> Iterator[Tensor]:
        yield self._rows(_sample(self.count), 2 * len(self.sizes) - 2)

    def _rows(self, places: NDArray[np.int64], kinds: NDArray[np.int64] | int) -> Tensor:
        return torch.from_numpy(self.features[places, kinds]).float()


def _sample(count: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(NORM_IMAGES, count)).astype(np.int64)


def _share(places: NDArray[np.int64]) -> NDArray[np.int64]:
    return places[distributed.rank() :: distributed.world_size()]


def _ignore_ctrl_c(_: int) -> None:
    """Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


Source = ImageSource | FeatureSource
