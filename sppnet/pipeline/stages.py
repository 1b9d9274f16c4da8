"""The stages of training as one graph: what each reads, what it writes, and all that follows from that.

A stage is one declaration. Its folder is named by a digest of the settings and files it reads, the data it sees, the
version of its algorithm, and the digests of the stages it reads. So a changed setting invalidates exactly the stages
that depend on it, and an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sppnet.artifacts import digest_of, file_digest
from sppnet.backbones.backbone import Backbone, build_backbone
from sppnet.backbones.windows import TARGET_SIDES
from sppnet.config import STAGES, Config, ProposalSettings
from sppnet.detection.embedding import rows_path
from sppnet.detection.feature_maps import count_cells
from sppnet.pipeline.run_data import RunData
from sppnet.pipeline.stage_status import StageStatus
from sppnet.records import ImageRecord

log = logging.getLogger("sppnet")

# What looks at every window at one scale. Fine-tuning draws scales, and needs it for the mean of head.input_norm alone.
CHOOSES_SCALE = ("low_rank", "embed", "svm", "boxes")
TESTED = "tested"  # in the folder of `embed`: the rows of validation images
CHECKPOINT = "checkpoint.safetensors"  # of a stage with a single output that was interrupted


@dataclass(frozen=True)
class Stage:
    """One step of training whose result is kept.

    `settings` are sections or ``section.key``; `reads` are other stages, of which only those count that are not
    skipped; `data` names the annotated images that it sees ("train", "validation", "objects"). `outputs` gives its
    files, relative to its folder. `version` changes with the algorithm, so that a fix invalidates exactly its results.
    """

    name: str
    settings: Callable[[Config], Sequence[str]]
    outputs: Callable[[StageGraph], Sequence[Path]]
    reads: Callable[[Config], Sequence[str]] = lambda _: ()
    data: Sequence[str] = ()
    version: int = 1
    skipped: Callable[[Config], str] = lambda _: ""  # why it is not run at all


@dataclass(frozen=True)
class StageGraph:
    """The stages of one run in `root`. `config` has its precision resolved: what is computed with, not what was set."""

    root: Path
    config: Config
    data: RunData
    module: str = ""  # digest of the backbone that backbone.module names
    own: nn.Module | None = None  # that backbone, where it was given in Python

    def folder(self, name: str) -> Path:
        """Where the results of a stage lie."""
        return self.root / f"{name}-{self.digests[name]}"

    @property
    def detector(self) -> Path:
        return self.root / "detector"

    def reads(self, name: str) -> tuple[str, ...]:
        """The stages whose results `name` reads, without those that are skipped."""
        return tuple(other for other in GRAPH[name].reads(self.config) if not GRAPH[other].skipped(self.config))

    def status(self, name: str) -> StageStatus:
        """What is there of a stage. Reads no weights and writes nothing."""
        stage, folder = GRAPH[name], self.folder(name)
        done = [(folder / path).exists() for path in stage.outputs(self)]
        saved = folder / CHECKPOINT if (folder / CHECKPOINT).exists() else None
        return StageStatus(name, folder, sum(done), len(done), stage.skipped(self.config), saved)

    def statuses(self) -> list[StageStatus]:
        return [self.status(name) for name in STAGES]

    def invalidated(self, only: Sequence[str], force: Sequence[str]) -> tuple[str, ...]:
        """The stages to delete before `only` run: those in `force` among them, and all that depend on these."""
        found: list[str] = []
        for name in (name for name in STAGES if not GRAPH[name].skipped(self.config)):
            if (name in only and name in force) or set(found) & set(self.reads(name)):
                found.append(name)
        return tuple(found)

    def delete(self, names: Sequence[str]) -> None:
        """Delete these stages, last first: an interruption never leaves a stage whose inputs are gone.

        The detector goes first, unless every stage is complete and stays.
        """
        if names or not all(status.complete for status in self.statuses()):
            description = self.detector / "detector.json"
            if description.exists():
                log.info("%s: of other settings or of re-run stages; deleted until training is complete", description)
                description.unlink()
        folders = [self.folder(name) for name in reversed(STAGES) if name in names]
        for folder in [*folders, *(self.searches if "proposals" in names else ())]:
            if folder.exists():
                shutil.rmtree(folder)

    @property
    def searches(self) -> dict[Path, ProposalSettings]:
        """The searches whose windows train together, by their folders; none where `proposals` gives them."""
        return {windows_folder(self.root, self.config, own): own for own in self.config.train_proposals}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Content key of every stage."""
        digests: dict[str, str] = {}
        for name in STAGES:
            stage = GRAPH[name]
            chooses = name in CHOOSES_SCALE or (name == "finetune" and self.config.head.input_norm is not None)
            choice = ["scale_choice", "target_side"] if chooses and len(self.config.maps.scales) > 1 else []
            keys = sorted([*stage.settings(self.config), *choice])
            settings = {key: reduce(getitem, key.split("."), self._values) for key in keys}
            data = [self.data.digest(split) for split in stage.data if split != "objects" or self.data.objects]
            digests[name] = digest_of(name, stage.version, settings, data, [digests[o] for o in self.reads(name)])
        return digests

    @cached_property
    def _values(self) -> Any:
        """All settings, without those that change no result beyond rounding."""
        values: Any = self.config.model_dump(mode="json")
        for key in ("runtime", "budget_gigabytes"):
            del values["maps"][key]
        values["scale_choice"] = values["maps"].pop("scale_choice")
        values["target_side"] = self.config.maps.target_side or TARGET_SIDES[self.config.maps.scale_choice]
        values["maps"]["target_side"] = TARGET_SIDES["release"]  # of no effect: the maps of earlier versions stay
        if not self.config.detect.vote:
            del values["detect"]["vote"]  # of no effect: the results of earlier versions stay
        weights = values["backbone"]["weights"]
        weights["file"] = _contents(self.config.backbone.weights.file)
        if weights.pop("mean_image") is not None:
            weights["mean_image"] = _contents(self.config.backbone.weights.mean_image)
        values["head"]["checkpoint"] = _contents(self.config.head.checkpoint)
        del values["head"]["training"]  # each kind has stages of its own
        if not self.config.data.train_on_difficult:
            values["data"]["train_on_difficult"] = "windows on difficult objects are left alone"  # before they were not
        values["proposals"] = _search_values(self.config.proposals)
        values["train_proposals"] = [_search_values(own) for own in self.config.train_proposals]
        if values["backbone"].pop("module") is not None:
            values["backbone"]["module"] = self.module
        if self.config.head.input_norm is not None and self.config.head.init != "random":
            values["head"]["input_norm"] = [self.config.head.input_norm, 2]  # 2: a trained fc6 computes what it did
        return values

    @property
    def images(self) -> list[tuple[ImageRecord, bool]]:
        """Those that have maps, (image, mirrored): all, then the mirror images that the head needs."""
        joint = not GRAPH["joint"].skipped(self.config)
        wanted = self.config.joint.flip if joint else not _skip_finetune(self.config) and self.config.finetune.flip
        every = [*self.data.images, *self.data.objects]
        mirrored = [*self.data.train, *self.data.objects] if wanted else []
        return [(record, False) for record in every] + [(record, True) for record in mirrored]

    @property
    def rows(self) -> list[Path]:
        """Of a joint head: where the windows of each of `images` lie as rows, relative to the folder of `embed`."""
        tested = {record.id for record in self.data.validation}
        return [r.path_in(Path(TESTED)) if r.id in tested else rows_path(r, Path(), flip) for r, flip in self.images]

    @cached_property
    def gigabytes(self) -> NDArray[np.floating]:
        """What the maps of each of `images` take on the disk."""
        cells = count_cells([record for record, _ in self.images], self.layers, self.config.maps)
        return cells * self.layers.channels * (2 if self.config.maps.storage == "float16" else 4) / 1e9

    @cached_property
    def stored(self) -> list[tuple[ImageRecord, bool]]:
        """Those of `images` whose maps are stored: as many, from the first on, as maps.budget_gigabytes holds."""
        budget = self.config.maps.budget_gigabytes
        return (
            self.images if budget is None else self.images[: np.searchsorted(self.gigabytes.cumsum(), budget, "right")]
        )

    @cached_property
    def layers(self) -> Backbone:
        """The backbone with random weights, for the shapes of its maps and its times."""
        return build_backbone(self.config.backbone.without_weights(), module=self.own)


def windows_folder(root: Path, config: Config, search: ProposalSettings | None = None) -> Path:
    """Where the windows of a search lie, by default of config.proposals, of training and test images alike."""
    own = {"proposals": search or config.proposals, "train_proposals": ()}
    return StageGraph(root, config.model_copy(update=own), RunData()).folder("proposals")


def _search_values(settings: ProposalSettings) -> dict[str, Any]:
    unused = {"workers", "edge_model"} if settings.shapes else {"workers", "edge_model", "shapes"}
    values = settings.model_dump(mode="json", exclude=unused)
    values |= {"mode": "fast", "import_from": _contents(*settings.import_from)}  # a key of before: windows stay
    forest = settings.edge_model if settings.method == "edge_boxes" else None
    return values if forest is None else {**values, "edge_model": _contents(forest)}


def _contents(*paths: Path | None) -> list[str]:
    """Files count by their content, not by their names."""
    return [file_digest(path) for path in paths if path is not None and path.is_file()]


def fc_layers(config: Config) -> tuple[str, ...]:
    """The fully connected layers that the features wanted need; a joint head is of its own kind."""
    if config.head.training == "joint":
        return ()
    wanted = {config.svm.layer} | ({config.boxes.layer} if config.boxes.enabled else set())
    return ("fc6", "fc7") if "fc7" in wanted else ("fc6",) if "fc6" in wanted else ()


def ranks(config: Config) -> dict[str, int]:
    """The layers to reduce and their ranks, of those that are needed."""
    wanted = {"fc6": config.low_rank.fc6, "fc7": config.low_rank.fc7}
    return {name: wanted[name] for name in fc_layers(config) if wanted[name]}


def tunes_low_rank(config: Config) -> bool:
    """Whether the low-rank layers are fine-tuned again."""
    return not GRAPH["finetune"].skipped(config) and bool(config.low_rank.steps)


# --- the declarations -------------------------------------------------------------------------------

HEAD = ("head", "pyramid", "precision", "finetune.seed")  # settings of the head before fine-tuning
EMBED = ("maps", "backbone", "precision", "pyramid", "joint.rank", "joint.windows", "joint.seed")
JOINT = ("joint", "head.fc6", "head.fc7", "head.dropout", "precision", "data.train_on_difficult")
TESTS_OTHERS = ((), ("proposals",))  # the windows to test on, where others train


def _only(training: str) -> Callable[[Config], str]:
    """Skips a stage of the other kind of head."""
    return lambda config: "" if config.head.training == training else f"head.training is {config.head.training}"


def _skip_finetune(config: Config) -> str:
    wanted = config.finetune.enabled and config.svm.finetuned and fc_layers(config)
    return _only("paper")(config) or ("" if wanted else "the features wanted need no fine-tuned head")


def _skip_low_rank(config: Config) -> str:
    if ranks(config) or _only("paper")(config):
        return _only("paper")(config)
    return "low_rank.fc6 and low_rank.fc7 are 0" if fc_layers(config) else "no fc features are wanted"


def _low_rank_settings(config: Config) -> list[str]:
    schedule = ["low_rank.steps", "low_rank.learning_rates", "finetune"] if tunes_low_rank(config) else []
    return [*HEAD, "data.train_on_difficult", *(f"low_rank.{name}" for name in ranks(config)), *schedule]


def _features(layer: str) -> list[str]:
    return ["proposals", "maps"] if layer == "pool" else ["proposals", "maps", "finetune", "low_rank"]


def _settings_on(section: str, layer: str) -> list[str]:
    """Settings of a stage on features of a layer: the head's too, which may be as it was initialised."""
    return [section, "pyramid", "data.train_on_difficult", *(() if layer == "pool" else HEAD)]


GRAPH: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "proposals",
            settings=lambda config: ["train_proposals" if config.train_proposals else "proposals"],
            outputs=lambda graph: [record.path_in(Path()) for record in graph.data.images],
        ),
        Stage(
            "maps",
            settings=lambda _: ["maps", "backbone", "precision"],
            outputs=lambda graph: [record.path_in(Path(), flip) for record, flip in graph.stored],
            skipped=_only("paper"),
        ),
        Stage(
            "finetune",
            version=2,  # 2: scales drawn image by image, gradients by autograd
            settings=lambda config: ["finetune", "data.train_on_difficult", *HEAD],
            reads=lambda _: ["proposals", "maps"],
            outputs=lambda _: [Path("head.safetensors")],
            data=["train", "validation", "objects"],
            skipped=_skip_finetune,
        ),
        Stage(
            "low_rank",
            version=3,  # 2: principal components alone; 3: all objects of an image are in its sample
            settings=_low_rank_settings,
            reads=lambda _: ["proposals", "maps", "finetune"],
            outputs=lambda _: [Path("head.safetensors")],
            data=["train"],
            skipped=_skip_low_rank,
        ),
        Stage(
            "embed",
            version=2,  # 2: all windows that are tested of validation images
            settings=lambda config: [*EMBED, "data.train_on_difficult", *TESTS_OTHERS[bool(config.train_proposals)]],
            reads=lambda _: ["proposals"],
            outputs=lambda graph: graph.rows,
            data=["base", "objects"],  # the sample of the projection
            skipped=_only("joint"),
        ),
        Stage(
            "joint",
            settings=lambda _: JOINT,
            reads=lambda _: ["embed"],
            outputs=lambda _: [Path("boxes.safetensors"), Path("head.safetensors")],
            data=["train", "objects"],
            skipped=_only("joint"),
        ),
        Stage(
            "svm",
            version=2,  # 2: positives are drawn before their features are computed
            settings=lambda config: _settings_on("svm", config.svm.layer),
            reads=lambda config: _features(config.svm.layer),
            outputs=lambda _: [Path("svm.safetensors")],
            data=["train", "objects"],
            skipped=_only("paper"),
        ),
        Stage(
            "boxes",
            settings=lambda config: _settings_on("boxes", config.boxes.layer),
            reads=lambda config: _features(config.boxes.layer),
            outputs=lambda graph: [regressor_path(label) for label in range(len(graph.data.classes))],
            data=["train"],
            skipped=lambda config: _only("paper")(config) or ("" if config.boxes.enabled else "boxes.enabled is false"),
        ),
        Stage(
            "thresholds",
            settings=lambda config: ["detect", *TESTS_OTHERS[bool(config.train_proposals)]],
            reads=lambda config: [*_features(config.svm.layer), "joint", "svm", "boxes"],
            outputs=lambda _: [Path("thresholds.json")],
            data=["validation"],
        ),
    )
}


def regressor_path(label: int) -> Path:
    """Of the box regressor of a class, relative to the folder of its stage."""
    return Path(f"class-{label:03d}.safetensors")
