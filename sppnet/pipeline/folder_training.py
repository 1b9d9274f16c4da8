"""Plan a training on a folder of pictures: settings chosen, or those of the run, and how long it takes (ours)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sppnet import distributed
from sppnet.config import STAGES, Config
from sppnet.config_files import load_config, load_settings, read_reasons
from sppnet.detection.detector import DetectorDescription
from sppnet.errors import SppnetError
from sppnet.pipeline.choices import BACKBONE, Choice, choose_settings, reduced, shown
from sppnet.pipeline.estimate import Estimate, duration, estimate, measure, remaining_work
from sppnet.pipeline.run_data import RunData, Split, load_run_data
from sppnet.pipeline.training import Training

log = logging.getLogger("sppnet")

LEVELS = 40  # of --minutes, from the choices down to the least
USED = 0.9  # of --minutes; the rest is for what is not estimated


class Plan(NamedTuple):
    """A training that is ready to run, the reasons of its settings, its time, and these in lines of text."""

    training: Training
    reasons: Mapping[str, str]
    expected: Estimate | None
    text: str


def plan_training(
    folder: Path,
    run: Path | None = None,
    overrides: Sequence[str] = (),
    device: torch.device | str = "cpu",
    only: Sequence[str] = STAGES,
    force: Sequence[str] = (),
    minutes: float | None = None,
) -> Plan:
    """Choose the settings of a training on a folder, or take those of the run where there is one and not all is forced.

    `overrides`, as of ``--set``, go before both. `minutes`: reduce steps, sides and windows until the estimate fits.
    Nothing is written. SppnetError for a folder that is no data set or cannot be trained on, one that is a run, a run
    inside the folder or on another one, and what `TrainingNetworks.check_inputs` finds.
    """
    start, root, device = time.monotonic(), run or Path("runs") / _name(folder), torch.device(device)
    _check_places(folder, root)
    kept, notes = root / "config.yaml", list[str]()
    if kept.is_file() and not {*STAGES} <= {*force}:
        before, training = load_config(kept), Training(load_config(kept, overrides), root, device)
        if before.data.root.resolve() != folder.resolve():
            raise SppnetError(f"{root}: a run on {before.data.root}, not on {folder}; choose another --run")
        choices = {key: Choice(_value(before, key), reason) for key, reason in read_reasons(kept).items()}
        notes.append(f"settings of {kept} are kept; --force, or another --run, chooses anew")
        notes += (
            ["--minutes is for a new run, or with --force, and changes nothing here"] if minutes is not None else []
        )
        minutes = None
    else:
        choices, data = _choose(folder, overrides, Split.read(root))
        training = Training(_config(folder, choices, overrides), root, device, data=data)
    log.info("%s", training.graph.data)
    # the disk that rows take, of `embed`, is checked before the training: fewer minutes may need less
    training.networks.check_inputs([name for name in only if minutes is None or name != "embed"])
    left, expected = remaining_work(training.graph, only, force), None
    if left and training.config.head.training == "joint":
        costs = measure(training.networks)
        expected = estimate(costs, left, training.config)
        if minutes is not None:
            spent = torch.tensor(time.monotonic() - start, dtype=torch.float64, device="cpu")
            distributed.take_from_main([spent])  # all processes choose the same
            used = float(spent)
            why, cost = f"to fit in {minutes:g} minutes", partial(estimate, costs, left)
            for level in range(LEVELS, -1, -1):
                less = reduced(choices, level / LEVELS, why)
                expected = cost(config := _config(folder, less, overrides))
                if expected.total <= 60 * USED * minutes - used:
                    break
            else:
                least = f"{duration(expected.total)} beside {duration(used)} so far"
                notes.append(f"even the least does not fit in --minutes {minutes:g}: {least}")
            choices, training = less, Training(config, root, device, data=data)
    config = training.asked
    reasons = {key: why if _value(config, key) == value else "as --set says" for key, (value, why) in choices.items()}
    rows = [f"  {key:<24} {shown(_value(config, key)):<18}  # {why}" for key, why in reasons.items()]
    without = "no estimate: head.training is not joint" if left else "nothing is left to do"
    notes.append(expected.table() if expected else without)
    return Plan(training, reasons, expected, "\n".join([f"settings of {root}", *rows, *notes]))


def plan_addition(run: Path, folder: Path, overrides: Sequence[str] = (), device: torch.device | str = "cpu") -> Plan:
    """The training of `run` on a folder too (data.more); one that the run has already adds what is new in it.

    Windows and rows of known images, their projection and the split stay; the head is trained anew, in as many steps
    unless `overrides` say otherwise. Nothing is written. SppnetError for what is no run with a joint head, or is not
    complete, for a folder that is no data set or holds the run, and for one that shows none of data.classes.
    """
    kept, place = run / "config.yaml", folder.resolve()
    if not kept.is_file():
        raise SppnetError(
            f"{run}: no training is here (no config.yaml), or several combined; name a run of sppnet train"
        )
    DetectorDescription.read(run)
    config = load_config(kept, overrides)
    if config.head.training != "joint":
        again = f"sppnet train {kept} --run {run} --set 'data.more=[{place}]'"
        raise SppnetError(
            f"{run}: not a joint head, so fc6, fc7 and all SVMs would be trained again; that does {again}"
        )
    if run.resolve().is_relative_to(place):
        raise SppnetError(f"{folder}: holds {run}, whose pictures would become data; name a folder outside")
    places = dict.fromkeys(path.resolve() for path in (config.data.root, *config.data.more, place))
    data = config.data.model_copy(update={"more": (*places,)[1:]})
    training = Training(config.model_copy(update={"data": data}), run, torch.device(device))
    log.info("%s", training.graph.data)
    return Plan(training, read_reasons(kept), None, "")


def _choose(folder: Path, overrides: Sequence[str], split: Split | None) -> tuple[dict[str, Choice], RunData]:
    """What the folder says, and its images."""
    choices = {"name": Choice(_name(folder), "the folder's"), "data.root": Choice(folder.resolve(), "the folder")}
    unnamed = {"data.train": Choice((), ""), "data.test": Choice((), "")}
    none = {"val": "none: some of train are held out", "test": "none: val or the held-out images"}
    try:
        own = any(override.startswith("backbone.module=") for override in overrides)
        named = {} if own else {"backbone.name": Choice(BACKBONE, "")}
        asked = _config(folder, choices | unnamed | named, overrides)
        images = load_run_data(asked, split)
        choices["data.format"] = Choice(images.named.format, "found by looking")
        for role in ("train", "val", "test"):
            names = getattr(images.named, role)
            choices[f"data.{role}"] = Choice(names, "by the names of the folder's parts" if names else none[role])
        return choices | choose_settings([*images.train, *images.held_out], asked.backbone.name), images
    except SppnetError as error:
        raise SppnetError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None


def _config(folder: Path, choices: Mapping[str, Choice], overrides: Sequence[str]) -> Config:
    values: dict[str, Any] = {}
    for key, choice in choices.items():
        *sections, name = key.split(".")
        reduce(lambda place, section: place.setdefault(section, {}), sections, values)[name] = choice.value
    return load_settings(Config, folder, overrides, values)


def _check_places(folder: Path, root: Path) -> None:
    if (folder / "config.yaml").is_file() and (folder / "split.json").is_file():
        own = f"sppnet train {folder / 'config.yaml'} --run {folder}"
        raise SppnetError(f"{folder}: a run, not a folder of pictures; go on with it by {own}")
    if root.resolve().is_relative_to(folder.resolve()):
        raise SppnetError(f"--run {root}: inside {folder}, where its pictures would become data; name a place outside")


def _name(folder: Path) -> str:
    return folder.resolve().name or "data"


def _value(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
