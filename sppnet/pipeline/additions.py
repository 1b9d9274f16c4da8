"""More pictures, or a class more, for a run with a joint head: what is there of the others is reused (ours)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from sppnet.config_files import load_config, read_reasons
from sppnet.errors import SppnetError
from sppnet.pipeline.training import Training

log = logging.getLogger("sppnet")


def plan_addition(
    run: Path, folder: Path, overrides: Sequence[str] = (), device: torch.device | str = "cpu"
) -> tuple[Training, dict[str, str]]:
    """The training of `run` on the pictures of `folder` too (data.more), and the reasons of its settings.

    A folder that the run has already adds only what is new in it. Windows and rows of known images, the projection and
    the split stay; the head is trained anew, in as many steps unless `overrides`, as of ``--set``, say otherwise.
    Nothing is written. SppnetError for what is no run with a joint head, and for a folder that is no data set, holds
    the run or shows classes other than those of data.classes alone.
    """
    kept = run / "config.yaml"
    if not kept.is_file():
        raise SppnetError(f"{run}: no run is here, expected its config.yaml; sppnet train FOLDER makes one")
    config, place = load_config(kept, overrides), folder.resolve()
    if config.head.training != "joint":
        again = f"sppnet train {kept} --run {run} --set 'data.more=[{place}]'"
        why = "fc6, fc7 and all SVMs would be trained again"
        raise SppnetError(f"{run}: head.training is {config.head.training}, so {why}; that does {again}")
    if run.resolve().is_relative_to(place):
        raise SppnetError(f"{folder}: holds {run}, whose pictures would become data; name a folder outside")
    more, known = config.data.more, {path.resolve() for path in (config.data.root, *config.data.more)}
    if place in known:
        log.info("%s: the run has this folder already; only what is new in it is added", folder)
    else:
        more = (*more, place)
    data = config.data.model_copy(update={"more": more})
    return Training(config.model_copy(update={"data": data}), run, torch.device(device)), read_reasons(kept)
