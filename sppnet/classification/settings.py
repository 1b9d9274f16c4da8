"""Settings of a classifier: those of its network are the detector's, those of its training stand here (sec. 3.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from sppnet.config import BackboneSettings, HeadSettings, PyramidSettings
from sppnet.settings import Count, Decay, FilePath, Rate, Seed, Settings, Side


class ClassDataSettings(Settings):
    """Images to train on and to choose by: a folder that holds one folder of images for each class."""

    train: FilePath = Path("data/train")
    val: FilePath | None = None  # None = `holdout` of the images of every class of train, drawn once
    holdout: float = Field(0.2, gt=0, lt=1)  # ours
    seed: Seed = 0


class ClassTrainingSettings(Settings):
    """Training of the whole network, or of the head alone (sec. 2.3, 3.1)."""

    sizes: tuple[Side, ...] = Field((224,), min_length=1)  # sec. 2.3: 180, 224; they share all weights
    # sec. 2.3: one size for an epoch, the next for the next one; range: every batch its own, from least to largest
    size_choice: Literal["epoch", "range"] = "epoch"
    min_side: Side = 256  # sec. 3.1: shorter side of the image that crops of the largest size are cut from
    epochs: Count = 90  # sec. 3.1: 70 for ZF-5
    batch: Count = 128
    learning_rate: Rate = 0.01  # sec. 3.1
    momentum: Decay = 0.9
    weight_decay: Decay = 5e-4
    patience: Count = 5  # ours: epochs without a lower validation loss after which the rate is divided by 10
    colour: bool = True  # sec. 3.1: colour altering
    train_backbone: bool = True  # false: the head alone, on features of full images whose shorter side is a size
    seed: Seed = 0

    @property
    def whole_side(self) -> int:
        """Shorter side of the images that training knows: those crops are cut from, or the largest full ones."""
        return self.min_side if self.train_backbone else max(self.sizes)

    @model_validator(mode="after")
    def _crops_fit(self) -> ClassTrainingSettings:
        if self.train_backbone and max(self.sizes) > self.min_side:
            larger = f"crops of {max(self.sizes)} pixels do not fit in min_side={self.min_side}"
            raise ValueError(f"{larger}; set training.min_side to at least the largest size")
        return self


class ClassifierConfig(Settings):
    """All settings of a classifier."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    data: ClassDataSettings = ClassDataSettings()
    backbone: BackboneSettings = BackboneSettings()
    pyramid: PyramidSettings = PyramidSettings()  # sec. 3.1: [1, 2, 3, 6]; [6] is the network without SPP
    head: HeadSettings = HeadSettings()
    training: ClassTrainingSettings = ClassTrainingSettings()
