"""The smallest complete pipeline: a dozen small pictures, imported windows, a tiny network; trained in seconds."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sppnet import cli
from sppnet.config import Config
from sppnet.config_files import parse_config
from sppnet.data.shapes import generate_shapes
from sppnet.data.splits import load_splits
from sppnet.pipeline.training import train_detector
from sppnet.proposals.files import export_windows

IMAGES = {"train": 8, "val": 3, "test": 4}
SPLITS = ("SHAPES/train", "SHAPES/val", "SHAPES/test")


@dataclass(frozen=True)
class SmallRun:
    """A trained run, the settings it was trained with, and the devkit it was trained on."""

    root: Path
    config: Config
    devkit: Path


def random_windows(size: tuple[int, int], boxes: np.ndarray, rng: np.random.Generator, count: int = 25) -> np.ndarray:
    """Windows (R, 4) anywhere in an image of (height, width), and three near each of its boxes."""
    height, width = size
    corner = rng.uniform(0, 1, (count, 2)) * [width - 40, height - 40]
    sides = rng.uniform(24, 120, (count, 2))
    near = np.repeat(boxes, 3, axis=0) + rng.uniform(-12, 12, (3 * len(boxes), 4))
    windows = np.concatenate([np.concatenate([corner, corner + sides], axis=1), near])
    windows = np.clip(np.rint(windows), 0, [width, height, width, height])
    return windows[(windows[:, 2:] - windows[:, :2] >= 20).all(axis=1)]


def write_windows(devkit: Path, file: Path, splits: tuple[str, ...] = SPLITS, seed: int = 0) -> Path:
    """A proposal file for all images of the splits, so that no test waits for selective search."""
    records, _ = load_splits(devkit, splits, require_annotations=False)
    rng = np.random.default_rng(seed)
    none = np.zeros((0, 4))
    windows = [random_windows(r.size, none if r.annotation is None else r.annotation.boxes, rng) for r in records]
    export_windows(file, [record.id for record in records], windows)
    return file


def small_settings(devkit: Path, windows: Path | None) -> dict[str, Any]:
    """The settings of the smallest run as nested mappings, ready for `parse_config` or a YAML file."""
    return {
        "name": "small",
        "data": {"root": str(devkit), "train": ["SHAPES/train"], "val": ["SHAPES/val"], "test": ["SHAPES/test"]},
        "proposals": {"import_from": [] if windows is None else [str(windows)], "workers": 1, "max_windows": 60,
                      "max_side": 96},
        "backbone": {"name": "tiny5", "weights": {"source": "random"}},
        "precision": "float32",
        "maps": {"scales": [112], "runtime": "torch"},
        "pyramid": {"levels": [1, 2]},
        "head": {"fc6": 16, "fc7": 16, "input_norm": 30},
        "finetune": {"steps": [6, 2], "learning_rates": [1e-2, 1e-3], "batch": 32, "images_per_batch": 4,
                     "validate_every": 4, "validate_windows": 64},
    }  # fmt: skip


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings with `changes` ("maps.scales": [96]) applied; the originals stay as they are."""
    result = {key: merged(value, {}) if isinstance(value, dict) else value for key, value in settings.items()}
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return result


def small_config(devkit: Path, windows: Path | None, **changes: Any) -> Config:
    """`small_settings` as a Config; changes are written section__key=value."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged(small_settings(devkit, windows), dotted), "small")


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return path


def train_small(folder: Path) -> SmallRun:
    """Generate the data under `folder` and train on them."""
    torch.set_num_threads(1)
    devkit = generate_shapes(folder / "data", IMAGES)
    config = small_config(devkit, write_windows(devkit, folder / "windows.npz"))
    assert train_detector(config, folder / "run", progress=False) is not None
    return SmallRun(folder / "run", config, devkit)


def train_another(run: SmallRun, folder: Path, **changes: Any) -> SmallRun:
    """Another detector of the same data: other windows, scale and weights, the classes in another order."""
    windows = write_windows(run.devkit, folder / "windows.npz", seed=1)
    other = {"data__classes": ["triangle", "star", "square", "disc", "cross"], "maps__scales": [96]}
    config = small_config(run.devkit, windows, **{**other, "finetune__seed": 1, "boxes__ridge": 100.0, **changes})
    assert train_detector(config, folder / "run", progress=False) is not None
    return SmallRun(folder / "run", config, run.devkit)


def copied(run: SmallRun, folder: Path) -> SmallRun:
    """The same run in a folder of its own, for tests that change it; the data are shared."""
    shutil.copytree(run.root, folder)
    return SmallRun(folder, run.config, run.devkit)


def modified(root: Path) -> dict[str, int]:
    """Every file below `root` with the time of its last change, in ns."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class CommandResult:
    """What a command left: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str


def run_command(*arguments: object) -> CommandResult:
    """`sppnet ARGUMENTS` in this process; neither standard stream is a terminal. Logging is put back afterwards."""
    log = logging.getLogger("sppnet")
    before = log.handlers[:], log.level, log.propagate
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse
        status = int(exit.code or 0)
    finally:
        log.handlers[:], log.level, log.propagate = before
    return CommandResult(status, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """The one sentence on standard error of a command that must end with status 2, without its prefix."""
    result = run_command(*arguments)
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert result.status == 2, result
    assert len(lines) == 1, result.err
    assert result.err.splitlines()[-1] == lines[0], result.err
    assert "Traceback" not in result.err
    return lines[0].partition("error: ")[2]
