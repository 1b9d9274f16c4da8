"""A trained SPP-net that classifies images of any size, and its folder (sec. 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sppnet import distributed
from sppnet.artifacts import read_json, read_tensors, write_json, write_tensors
from sppnet.backbones.backbone import build_backbone
from sppnet.backbones.runtime import Runtime, device_of, make_runtime, resolve_precision
from sppnet.classification.settings import ClassifierConfig
from sppnet.config_files import parse_settings
from sppnet.errors import ArtifactError, BackboneError, ImageError, SppnetError
from sppnet.images import normalise, prepare, read_image, scaled_size
from sppnet.models.sppnet import SPPNet, build_head, start_head
from sppnet.paths import as_text

WEIGHTS, DESCRIPTION = Path("classifier/weights.safetensors"), Path("classifier/classifier.json")
MEAN = "mean_image"  # beside the weights, where backbone.weights.mean_image is set


@dataclass(frozen=True, eq=False)
class Classifier:
    """The network, frozen and in eval mode, the names of its outputs and the settings it was made with."""

    network: SPPNet
    classes: tuple[str, ...]
    config: ClassifierConfig

    @property
    def device(self) -> torch.device:
        return device_of(self.network.backbone)

    @cached_property
    def runtime(self) -> Runtime:
        """What runs the backbone: prepared images -> maps, in the precision of the settings."""
        precision = resolve_precision(self.config.precision, self.device)
        return make_runtime(self.network.backbone, precision=precision)

    def pixels(self, image: NDArray[np.uint8], side: float) -> Tensor:
        """Image (H, W, 3) uint8 RGB -> (1, 3, h, w), its shorter side `side` px: for `maps`, cut or mirrored too."""
        backbone, (size, _) = self.network.backbone, scaled_size((image.shape[0], image.shape[1]), side)
        mean = (0.0, 0.0, 0.0) if isinstance(backbone.mean, Tensor) else backbone.mean
        return prepare(image, size, backbone.weights.channel_order, mean, backbone.std, self.device)

    def maps(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, h, w) -> their maps (N, C, h', w'). A mean image is warped to what is shown, never mirrored."""
        backbone = self.network.backbone
        if isinstance(backbone.mean, Tensor):
            pixels = pixels + normalise(torch.zeros_like(pixels[:1]), backbone.mean, backbone.std)
        return self.runtime(pixels)

    @classmethod
    def load(cls, run: Path, device: torch.device) -> Classifier:
        """That of a run; SppnetError for a folder that holds none that is complete."""
        if not (run / DESCRIPTION).exists():
            hint = "train one: sppnet classify train FOLDER --run DIR"
            if (run / "detector").exists():
                hint = "this is the run of a detector: sppnet detect"
            elif next(run.glob("training-*"), None) is not None:
                hint = "its training is not finished; the command that began it goes on"
            raise SppnetError(f"{run}: expected the run of a classifier, with {DESCRIPTION}; {hint}")
        values = read_json(run / DESCRIPTION)
        try:
            config = parse_settings(ClassifierConfig, values["config"], str(run / DESCRIPTION))
            classes = tuple(map(str, values["classes"]))
            network = build_network(config, len(classes))
            tensors = read_tensors(run / WEIGHTS)
            if config.backbone.weights.mean_image is not None:
                network.backbone.mean = tensors.pop(MEAN)
            network.load_state_dict(tensors)
        except (TypeError, KeyError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ArtifactError(f"{run / WEIGHTS.parent}: expected a classifier ({reason}); train it again") from None
        return cls(network.requires_grad_(False).eval().to(device), classes, config)

    def save(self, run: Path, training: str = "") -> None:
        """Write <run>/classifier, with the name of its `training`.

        Its weights also start a detector (backbone.weights.file, head.checkpoint).
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        if self.config.backbone.weights.mean_image is not None:
            tensors[MEAN] = torch.as_tensor(self.network.backbone.mean)
        write_tensors(run / WEIGHTS, tensors)
        config = self.config.model_dump(mode="json")
        write_json(run / DESCRIPTION, {"classes": self.classes, "config": config, "training": training})


def build_network(config: ClassifierConfig, outputs: int, start: bool = False) -> SPPNet:
    """The network of these settings with random weights; `start`: with those it names, as training starts."""
    settings, levels, seed = config.backbone, config.pyramid.levels, config.training.seed
    backbone = build_backbone(settings if start else settings.without_weights(), seed)
    head = build_head(backbone.channels, levels, outputs, config.head, seed)
    if start:
        start_head(head, config.head, settings, backbone.channels, levels)
    return SPPNet(backbone, levels, head)


def of_images(
    paths: Sequence[Path], compute: Callable[[NDArray[np.uint8]], Iterable[Any]]
) -> Iterator[tuple[Path, list[Tensor] | str]]:
    """Every image file and what `compute` gives of it, a few arrays or numbers, or why it cannot be used; in order.

    Processes of torchrun share the files and all must iterate.
    """

    def own(place: int) -> list[Any]:
        found, reason = list[Any](), ""
        try:
            found = [*compute(read_image(paths[place]))]
        except (ImageError, BackboneError) as error:
            reason = f"{paths[place]}: {error}" if isinstance(error, BackboneError) else str(error)
        return [np.array([*as_text(reason).encode()], np.int64), *found]  # numbers, for other processes

    for path, (reason, *found) in zip(paths, distributed.in_order(own, len(paths)), strict=True):
        yield path, bytes(reason.tolist()).decode() or found


def usable(
    results: Iterable[tuple[Path, list[Tensor] | str]],
) -> tuple[dict[int, list[Tensor]], dict[Path, str]]:
    """Results of `of_images` by place, and the files that cannot be used with the reason; SppnetError for no result."""
    every = list(results)
    found = {place: result for place, (_, result) in enumerate(every) if not isinstance(result, str)}
    skipped = {path: result for path, result in every if isinstance(result, str)}
    if not found:
        raise SppnetError(f"expected images, none of {len(every)} can be used: {next(iter(skipped.values()), '')}")
    return found, skipped
