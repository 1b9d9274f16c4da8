"""A trained SPP-net that classifies images of any size, and its folder (sec. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sppnet.artifacts import read_json, read_tensors, write_json, write_tensors
from sppnet.backbones.backbone import build_backbone
from sppnet.backbones.runtime import Runtime, device_of, make_runtime, resolve_precision
from sppnet.classification.settings import ClassifierConfig
from sppnet.config_files import parse_settings
from sppnet.errors import ArtifactError, SppnetError
from sppnet.models.sppnet import SPPNet, build_head

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
            network = build_network(config, classes)
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


def build_network(config: ClassifierConfig, classes: tuple[str, ...]) -> SPPNet:
    """The network of these settings with random weights, for weights that are loaded into it."""
    backbone = build_backbone(config.backbone.without_weights(), config.training.seed)
    head = build_head(backbone.channels, config.pyramid.levels, len(classes), config.head, config.training.seed)
    return SPPNet(backbone, config.pyramid.levels, head)
