"""Plan a training on a folder of pictures: settings chosen, or those of the run, and how long it takes (ours)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from sppnet.config import STAGES, Config
from sppnet.config_files import load_config, load_settings, read_reasons, read_yaml_texts
from sppnet.data.layouts import find_data
from sppnet.errors import SppnetError
from sppnet.pipeline.choices import Choice, Choices, choose_parts, choose_settings, nested, reduced
from sppnet.pipeline.estimate import Costs, Estimate, Work, duration, estimate, measure, remaining_work
from sppnet.pipeline.run_data import RunData, Split, load_run_data, named_parts
from sppnet.pipeline.training import Training

log = logging.getLogger("sppnet")

LEVELS = 40  # of --minutes, from the choices down to the least
USED = 0.9  # of --minutes; the rest is for what is not estimated
OVERRIDDEN = "as --set says"


@dataclass(frozen=True)
class Plan:
    """A training that is ready to run, the reasons of its settings, its time, and lines about these for people."""

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

    `overrides` as of ``--set`` go before both. `minutes`: reduce steps, sides and windows until the estimate fits.
    Nothing is written. SppnetError for a folder that is no data set or cannot be trained on, one that is a run, a run
    inside the folder or of another one, and what `TrainingNetworks.check_inputs` finds.
    """
    start, place, device = time.monotonic(), folder.resolve(), torch.device(device)
    root = run or Path("runs") / (place.name or "data")
    _check_places(folder, root)
    lines, kept = list[str](), root / "config.yaml"
    if kept.is_file() and not {*STAGES} <= {*force}:
        before, config, reasons = load_config(kept), load_config(kept, overrides), read_reasons(kept)
        if config.data.root.resolve() != place:
            raise SppnetError(f"{root}: a run on {config.data.root}, not on {folder}; choose another --run")
        lines.append(f"settings of {kept} are kept; --force, or another --run, chooses anew")
        if minutes is not None:
            lines.append("--minutes chooses for a new run, or with --force, and changes nothing here")
        training = Training(config, root, device)
        expected = _expect(training, only, force)
        values = {key: _value(before, key) for key in reasons}
    else:
        choices, data = _choose(folder, overrides, Split.read(root))
        training = Training(_config(folder, choices, overrides), root, device, data=data)
        expected = _expect(training, only, force)
        if minutes is not None and expected is not None:
            costs, work = expected.basis
            left = 60 * USED * minutes - (time.monotonic() - start)
            choices, expected, config = fit(folder, choices, overrides, costs, work, left, minutes)
            training = Training(config, root, device, data=data)
            if expected.total > left:
                least = duration(expected.total + time.monotonic() - start)
                lines.append(f"even the least does not fit in --minutes {minutes:g}: it takes about {least}")
        config, values = training.asked, {key: choice.value for key, choice in choices.items()}
        reasons = {key: choice.reason for key, choice in choices.items()}
    reasons = {key: why if _value(config, key) == values[key] else OVERRIDDEN for key, why in reasons.items()}
    rows = [f"  {key:<24} {_shown(_value(config, key))}  # {why}" for key, why in reasons.items()]
    lines[:0] = [f"settings of {root}:", *rows] if rows else []
    lines.append(str(expected) if expected else "no estimate: nothing is left to do, or head.training is not joint")
    return Plan(training, reasons, expected, "\n".join(lines))


def fit(
    folder: Path,
    choices: Choices,
    overrides: Sequence[str],
    costs: Costs,
    work: Work,
    seconds: float,
    minutes: float,
) -> tuple[Choices, Estimate, Config]:
    """The choices reduced as little as fits in `seconds` by the estimate, else the least; fewer never are more work."""
    for level in range(LEVELS, -1, -1):
        less = reduced(choices, level / LEVELS, f"to fit in {minutes:g} minutes")
        config = _config(folder, less, overrides)
        expected = estimate(costs, work, config)
        if expected.total <= seconds:
            break
    return less, expected, config


def _choose(folder: Path, overrides: Sequence[str], split: Split | None) -> tuple[Choices, RunData]:
    """What the folder says, and its images."""
    root = {"data.root": Choice(folder.resolve(), "the folder that was named")}
    first = _config(folder, {**root, "data.train": Choice((), ""), "data.test": Choice((), "")}, overrides)
    found = find_data(folder, first.data.format)
    parts = named_parts(first.data, found)
    choices = root | choose_parts(found, {role: getattr(parts, role) for role in ("train", "val", "test")})
    choices["name"] = Choice(folder.resolve().name or "data", "the folder's")
    try:
        data = load_run_data(_config(folder, choices, overrides), split)
        return choices | choose_settings([*data.train, *data.held_out]), data
    except SppnetError as error:
        raise SppnetError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None


def _config(folder: Path, choices: Choices, overrides: Sequence[str]) -> Config:
    return load_settings(Config, folder, overrides, nested(choices))


def _expect(training: Training, only: Sequence[str], force: Sequence[str]) -> Estimate | None:
    """The estimate of what is left to do; None of nothing, and without a joint head."""
    training.networks.check_inputs(only)
    work = remaining_work(training.graph, only, force)
    if training.config.head.training != "joint" or not work:
        return None
    return estimate(measure(training.networks), work, training.config)


def _check_places(folder: Path, root: Path) -> None:
    if (folder / "config.yaml").is_file() and (folder / "split.json").is_file():
        own = f"sppnet train {folder / 'config.yaml'} --run {folder}"
        raise SppnetError(f"{folder}: a run, not a folder of pictures; go on with it by {own}")
    if root.resolve().is_relative_to(folder.resolve()):
        inside = f"--run {root} lies in the data folder {folder}, where its pictures would become data"
        raise SppnetError(f"{inside}; name a place outside")
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        values = read_yaml_texts(path)
        if isinstance(values, dict) and "backbone" in values and {*values} <= {*Config.model_fields, "base"}:
            log.info("%s is not used; to train by it: sppnet train %s", path, path)


def _value(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
