"""What a saved detector says of itself: detector.json, and the files of tensors that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sppnet.artifacts import digest_of, file_digest, read_json, read_tensors, tensors_digest
from sppnet.backbones.runtime import resolve_precision
from sppnet.backbones.windows import TARGET_SIDES
from sppnet.checks import check_thresholds
from sppnet.config import Config
from sppnet.config_files import parse_config
from sppnet.errors import ArtifactError, BackboneError, SppnetError

FORMAT = 2  # of the detector folder
_PARTS = ("backbone", "head")  # and svm, unless the head was trained jointly; boxes, where they are regressed
_FIELDS = {"classes": list, "config": dict, "parts": dict, "ranks": dict}
_TRAIN_AGAIN = "run `sppnet train` again, which puts the detector together from its stages, or `sppnet combine`"
OTHER_VERSION = f"damaged, or from another version of sppnet: {_TRAIN_AGAIN}"


@dataclass(frozen=True)
class DetectorDescription:
    """What detector.json says of a saved detector; reads no weights."""

    folder: Path
    config: Config
    classes: tuple[str, ...]
    parts: dict[str, str]  # file stem -> digest of its tensors
    ranks: dict[str, int]  # of the low-rank layers of the head; empty for a whole head
    thresholds: tuple[float, ...]  # by class; 0 for all in a detector of a version that chose none
    others: tuple[DetectorDescription, ...] = ()  # in others/0, 1, …: those combined with it

    @classmethod
    def read(cls, run: Path | str) -> DetectorDescription:
        """Of a run folder, or of the ``detector`` folder in it; ArtifactError where there is none of this version."""
        folder = Path(run)
        folder = folder / "detector" if (folder / "detector").is_dir() else folder
        path = folder / "detector.json"
        if not path.is_file():
            raise ArtifactError(_missing(Path(run), folder))
        values = read_json(path)
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        if found != FORMAT:
            raise ArtifactError(f"{path}: expected format {FORMAT}, got {found!r}; {OTHER_VERSION}")
        missing = [name for name, kind in _FIELDS.items() if not isinstance(values.get(name), kind)]
        if missing:
            raise ArtifactError(f"{path}: {missing[0]} is missing or incomplete; {OTHER_VERSION}")
        ranks = values["ranks"]
        if not all(type(rank) is int and rank > 0 for rank in ranks.values()):
            raise ArtifactError(f"{path}: ranks must be positive numbers by layer, got {ranks!r}; {OTHER_VERSION}")
        try:
            values["config"].pop("pretrain", None)  # of a version whose detectors had a stage more
            config = parse_config(values["config"], "settings")
            if "vote" not in values["config"].get("detect", {}):  # of a version without: it finds what it found
                config = config.model_copy(update={"detect": config.detect.model_copy(update={"vote": False})})
            thresholds = check_thresholds(values.get("thresholds", 0), values["classes"])
        except SppnetError as error:
            raise ArtifactError(f"{path}: {OTHER_VERSION} ({error})") from None
        if not {*_PARTS, "svm" if config.head.training == "paper" else "boxes"} <= set(values["parts"]):
            raise ArtifactError(f"{path}: parts is missing or incomplete; {OTHER_VERSION}")
        digests = values.get("others", [])
        count = len(digests) if isinstance(digests, list) else 0
        files = [folder / "others" / str(place) / "detector.json" for place in range(count)]
        if [file_digest(file) for file in files if file.is_file()] != digests:
            raise ArtifactError(f"{path}: does not name the detectors in {folder / 'others'}; {OTHER_VERSION}")
        others = tuple(cls.read(file.parent) for file in files)
        classes = tuple(values["classes"])
        return cls(folder, config, classes, values["parts"], ranks, tuple(thresholds.tolist()), others)

    def digest(self, device: str | torch.device) -> str:
        """Content key of what decides the detections, given windows: weights, test settings and precision."""
        sections = (self.config.maps, self.config.pyramid, self.config.detect, self.config.svm, self.config.boxes)
        without = {"runtime", "budget_gigabytes", "scale_choice", *([] if self.config.detect.vote else ["vote"])}
        values = [section.model_dump(mode="json", exclude=without) for section in sections]
        side = self.config.maps.target_side or TARGET_SIDES[self.config.maps.scale_choice]
        values[0]["target_side"] = side if self.config.maps.scale_choice == "release" else ["paper", side]
        others = [own.digest(device) for own in self.others]
        others += ["together"] * (
            bool(others) and self.config.head.training == "joint"
        )  # before, each was settled alone
        return digest_of(self.parts, values, resolve_precision(self.config.precision, device), *others)


def _missing(run: Path, folder: Path) -> str:
    """Why there is no detector in a run folder, and what to do."""
    if not run.exists():
        return f"{run}: no such folder; name the run folder of a training, as `sppnet train --run` does"
    if all((folder / f"{part}.safetensors").is_file() for part in _PARTS):
        return (
            f"{run}: its detector is not complete (no detector/detector.json): saving was interrupted or training with "
            "other settings or from scratch has begun; run `sppnet train` to the end, with the settings wanted, or the "
            "same `sppnet combine`"
        )
    return f"{run}: holds no trained detector (detector/detector.json); run `sppnet train` to the end first"


def read_part(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    """The tensors of a part; ArtifactError where they are not those of this digest."""
    path = folder / f"{name}.safetensors"
    try:
        tensors = read_tensors(path)
    except ArtifactError:
        raise ArtifactError(f"{path}: missing or damaged; {_TRAIN_AGAIN}") from None
    if tensors_digest(tensors) != digest:
        raise ArtifactError(f"{path}: is not the file this detector was saved with; {_TRAIN_AGAIN}")
    return tensors


def check_fit(network: nn.Module, saved: dict[str, Tensor], what: str) -> None:
    """BackboneError with the first names where the tensors are not those of the network."""
    own = network.state_dict()
    wrong = [name for name in {**own, **saved} if name not in own or name not in saved]
    wrong += [name for name in own if name in saved and own[name].shape != saved[name].shape]
    if wrong:
        names = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
        raise BackboneError(f"{what} do not fit this network, at {names}; give the one that was trained")
