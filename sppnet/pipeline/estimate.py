"""How long a training with a joint head takes on this machine, before it starts (ours).

A few images and steps are measured; the rest is arithmetic. No file is written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from sppnet import distributed
from sppnet.config import Config
from sppnet.detection.embedding import SAMPLE_IMAGES, SAMPLE_RATIO, Projection
from sppnet.detection.joint_head import JointHead, joint_loss
from sppnet.detection.training_windows import TrainingWindows
from sppnet.detection.window_features import pool_projected
from sppnet.images import read_image
from sppnet.jobs import available_cores, worker_count
from sppnet.pipeline.networks import TrainingNetworks
from sppnet.pipeline.stages import StageGraph
from sppnet.proposals.search import make_proposer, read_windows
from sppnet.records import spread

MEASURED = 3  # images; the first only warms up
STEPS = 5
PASSES = 12  # times that a sample is projected while its principal components are found


class Costs(NamedTuple):
    """Seconds on this machine, on one core; `step` on all; and a count."""

    search: float  # of an image
    maps: float  # of an image, for each million of the sum of squared sides (maps.scales)
    pool: float  # of a window
    project: float  # of a window
    windows: float  # how many an image has
    step: float


class Estimate(NamedTuple):
    """Seconds of each stage, and of an item of each job, by the name of its progress bar."""

    stages: Mapping[str, float]
    items: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.stages.values())

    def table(self) -> str:
        rows = [*self.stages.items(), ("total", self.total)]
        return "\n".join(["estimated time", *(f"  {name:<10} {duration(seconds):>9}" for name, seconds in rows)])


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def remaining_work(graph: StageGraph, only: Sequence[str], force: Sequence[str]) -> dict[str, int]:
    """Stage -> outputs that are missing, of `only`; those in `force` are made anew. Of thresholds: images."""
    anew = graph.invalidated(only, force)
    left = {
        s.name: s.total - (s.name not in anew) * s.done for s in graph.statuses() if not s.skipped and s.name in only
    }
    left["thresholds"] = len(graph.data.validation) * left.get("thresholds", 0)
    return {name: count for name, count in left.items() if count}


def estimate(costs: Costs, left: Mapping[str, int], config: Config) -> Estimate:
    """The time of what is `left` (`remaining_work`) with these settings."""
    maps = costs.maps * sum(side * side for side in config.maps.scales) / 1e6
    window, threads = costs.pool + costs.project, available_cores() ** 0.7  # they wait for one another
    searched, embedded, kept = left.get("proposals", 0), left.get("embed", 0), min(config.joint.windows, costs.windows)
    sampled = min(SAMPLE_IMAGES, embedded)
    sample = min(SAMPLE_RATIO * config.joint.rank, sampled * costs.windows)
    components = (sampled * maps + sample * (costs.pool + PASSES * costs.project)) / threads
    items = {
        "proposals": costs.search / worker_count(searched),
        "components": components / max(1, sampled),
        "embed": (maps + kept * window) / worker_count(embedded),
        "joint": costs.step,
        "thresholds": costs.step * costs.windows / config.joint.batch,  # the way back stands for the selection
    }
    counts = {**left, "joint": config.joint.steps} if "joint" in left else left
    stages = {name: count * items[name] for name, count in counts.items()}
    if embedded:  # validation images have the rows of all windows
        every = left.get("thresholds", 0) * (costs.windows - kept) * window / worker_count(embedded)
        stages["embed"] += components + every
    return Estimate(stages, items)


def measure(networks: TrainingNetworks) -> Costs:
    """The costs of a training whose inputs are all there, by images that are not searched yet, if any."""
    threads, source = torch.get_num_threads(), networks.windows(train=True)
    every = range(len(source.records))
    left = [index for index in every if not source.records[index].path_in(source.windows_folder).exists()]
    torch.set_num_threads(1)  # as each of the processes that share the images
    try:
        images = [_measure_image(source, index) for index in spread(left or every, MEASURED)]
    finally:
        torch.set_num_threads(threads)
    costs = torch.tensor([*np.mean(images[1:] or images, axis=0), _measure_step(source)], device="cpu")
    distributed.take_from_main([costs])  # all processes choose the same
    return Costs(*costs.tolist())


@torch.inference_mode()
def _measure_image(source: TrainingWindows, index: int) -> tuple[float, ...]:
    """(search, maps, pool, project) of one image, and how many windows it has."""
    config, record, times = source.config, source.records[index], [time.monotonic()]
    there, search = record.path_in(source.windows_folder).exists(), make_proposer(config.proposals)
    found = read_windows(source.windows_folder, record) if there else search(read_image(record.path))
    windows = found[: config.joint.windows]
    times.append(time.monotonic())
    maps = source.maps(index)
    times.append(time.monotonic())
    pooled = pool_projected(maps, source.project(maps, windows).unique()[0], config.pyramid.levels)
    times.append(time.monotonic())
    projection = Projection(torch.zeros(config.joint.rank, pooled.shape[1]), torch.zeros(config.joint.rank))
    times[-1], _ = time.monotonic(), projection.rows(pooled)
    times.append(time.monotonic())
    squares, count = sum(side * side for side in config.maps.scales) / 1e6, max(1, len(windows))
    return *np.diff(times) / [1, squares, count, count], len(found)


def _measure_step(source: TrainingWindows) -> float:
    own, device, count = source.config.joint, source.device, len(source.classes)
    model = JointHead(own.rank, count, source.config.head, np.zeros((2, 4)), own.seed).to(device).train()
    optimiser, times = torch.optim.AdamW(model.parameters(), fused=True), list[float]()
    labels, targets = (torch.arange(own.batch) % (count + 1)).to(device), torch.zeros(own.batch, 4, device=device)
    for _ in range(STEPS):
        times.append(time.monotonic())
        with torch.autocast(device.type, torch.bfloat16, enabled=source.config.precision == "bfloat16"):
            logits, boxes = model(torch.rand(own.batch, own.rank, device=device))
        optimiser.zero_grad()
        torch.stack(joint_loss(logits.float(), boxes.float(), labels, targets)).sum().backward()
        optimiser.step()
    return float(np.median(np.diff([*times, time.monotonic()])))
