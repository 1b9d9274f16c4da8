"""What the scripts in this folder share: small data sets, untrained runs, commands of the product."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(tempfile.mkdtemp(prefix="sppnet-"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)


def sppnet(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """Run a command of the product; (exit status, stdout, stderr). In a process of its own where `environment` differs."""
    if environment:
        command = [sys.executable, "-m", "sppnet", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, **environment})
        return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    from sppnet.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as ended:  # argparse
            status = int(ended.code or 0)
        except Exception:  # a bug, which a command shows with its traceback
            traceback.print_exc()
            status = 1
    return status, out.getvalue(), err.getvalue()


def picture(seed: int, size: tuple[int, int] = (120, 160)) -> NDArray[np.uint8]:
    """Smooth noise (H, W, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def add_image(
    devkit: Path,
    stem: str,
    objects: list[Any],
    seed: int = 0,
    size: tuple[int, int] = (120, 160),
    stated: tuple[int, int] | None = None,
) -> None:
    """JPEGImages/<stem> and Annotations/<stem>.xml; objects: (name, (xmin, ymin, xmax, ymax), difficult)."""
    folder = devkit / "MINE"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, size)).save(folder / "JPEGImages" / f"{stem}.jpg")
    height, width = stated or size
    lines = [f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"]
    for name, (x1, y1, x2, y2), difficult in objects:
        lines.append(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        )
    (folder / "Annotations" / f"{stem}.xml").write_text("".join([*lines, "</annotation>\n"]), encoding="utf-8")


def write_set(devkit: Path, name: str, stems: list[str]) -> None:
    (devkit / "MINE/ImageSets/Main" / f"{name}.txt").write_text("\n".join([*stems, ""]), encoding="utf-8")


def tiny_settings(devkit: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The smallest settings that train on a CPU in seconds."""
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {"root": str(devkit), "train": ["MINE/train"], "val": ["MINE/val"], "test": []},
        "proposals": {"max_windows": 60},
        "backbone": {"name": "tiny5", "weights": {"source": "random"}},
        "maps": {"scales": [120]},
        "head": {"fc6": 16, "fc7": 16},
        "finetune": {"steps": [4], "learning_rates": [0.01], "images_per_batch": 2, "batch": 8, "validate_every": 2}
        | {"validate_windows": 16},
        "svm": {"tolerance": 0.1},
        "boxes": {"enabled": False},
        "detect": {"score_threshold": -100.0, "max_per_class": 5},
    }
    for name, own in sections.items():
        values[name] = {**values.get(name, {}), **own}
    return values


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def make_run(
    run: Path, classes: tuple[str, ...] = ("cat", "dog"), devkit: Path | None = None, **sections: dict[str, Any]
) -> Path:
    """A run folder with a detector of random weights: enough to detect, at once."""
    import torch

    from sppnet import SPPDetector
    from sppnet.backbones.backbone import build_backbone
    from sppnet.config_files import parse_config
    from sppnet.detection.linear_svm import LinearSVMs
    from sppnet.models.sppnet import build_head
    from sppnet.proposals.search import make_proposer

    config = parse_config(tiny_settings(devkit or ROOT / "none", **sections), "here")
    backbone = build_backbone(config.backbone)
    head = build_head(backbone.channels, config.pyramid.levels, len(classes) + 1, config.head)
    weight = torch.randn(len(classes), 16, generator=torch.Generator().manual_seed(0))
    svms = LinearSVMs(weight, torch.ones(len(classes)), 1.0, classes)
    SPPDetector(backbone, head, svms, None, make_proposer(config.proposals), config).save(run / "detector")
    return run


def verdict(fault: object, text: str) -> NoReturn:
    print(("FAULT: " if fault else "fine: ") + text)
    sys.exit(1 if fault else 0)
