"""How long a training with a joint head takes on this machine, stage by stage, before it starts (ours).

A few images and steps are measured; the rest is arithmetic. No file is written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sppnet import distributed
from sppnet.config import Config
from sppnet.detection.embedding import OVERSAMPLED, SAMPLE_IMAGES, SAMPLE_RATIO, Projection
from sppnet.detection.joint_head import JointHead, joint_loss
from sppnet.detection.training_windows import TrainingWindows
from sppnet.detection.window_features import pool_projected
from sppnet.images import read_image
from sppnet.jobs import available_cores, worker_count
from sppnet.pipeline.networks import TrainingNetworks
from sppnet.pipeline.stages import StageGraph
from sppnet.proposals.search import make_proposer
from sppnet.records import spread

MEASURED = 3  # images; the first only warms up
STEPS = 5
PASSES = 12  # products as large as that of a sample and its components, which finding these takes


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine, of one core: of an image, of a window of it, of the whole; `step` of all cores."""

    search: float
    maps: float  # for each million of the sum of squared sides (maps.scales)
    window: float  # pooled and projected
    components: float
    step: float


@dataclass(frozen=True)
class Work:
    """What is left to do: images to search, to embed (mirrored ones too), to detect in; whether a head to train."""

    searched: int
    embedded: int
    detected: int
    trained: bool

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """Seconds of each stage that has something to do, and of one item of each job, by the name of its progress bar."""

    stages: Mapping[str, float]
    items: Mapping[str, float]
    basis: tuple[Costs, Work]

    @property
    def total(self) -> float:
        return sum(self.stages.values())

    def __str__(self) -> str:
        rows = [*self.stages.items(), ("total", self.total)]
        return "\n".join(["estimate", *(f"  {name:<10} {duration(seconds):>9}" for name, seconds in rows)])


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def estimate(costs: Costs, work: Work, config: Config) -> Estimate:
    """The times of the stages with these settings."""
    maps = costs.maps * sum(side * side for side in config.maps.scales) / 1e6
    together = available_cores() ** 0.7  # threads wait for one another
    sampled = min(SAMPLE_IMAGES, work.embedded)
    first = sampled and costs.components / together + sampled * (maps + 100 * costs.window) / together
    search, embed = (costs.search, maps + config.joint.windows * costs.window)
    searched, embedded = (worker_count(count) for count in (work.searched, work.embedded))
    items = {
        "proposals": search / searched,
        "components": first / max(1, sampled),
        "embed": embed / embedded,
        "joint": costs.step,
        "thresholds": (maps + config.proposals.max_windows * costs.window) / together,
    }
    stages = {
        "proposals": work.searched * items["proposals"],
        "embed": first + work.embedded * items["embed"],
        "joint": work.trained * config.joint.steps * costs.step,
        "thresholds": work.detected * items["thresholds"],
    }
    return Estimate({name: seconds for name, seconds in stages.items() if seconds}, items, (costs, work))


def remaining_work(graph: StageGraph, only: Sequence[str], force: Sequence[str]) -> Work:
    """What the stages `only` of a run have to do, those in `force` from scratch."""
    invalidated = graph.invalidated(only, force)
    left = {s.name: s.total - (s.name not in invalidated) * s.done for s in graph.statuses() if s.name in only}
    detected = len(graph.data.validation) if left.get("thresholds") else 0
    return Work(left.get("proposals", 0), left.get("embed", 0), detected, bool(left.get("joint")))


def measure(networks: TrainingNetworks) -> Costs:
    """The costs of a training whose inputs are all there: of a few images of it, and of a few steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the processes that share the images
    try:
        source = networks.windows(train=True)
        images = [_measure_image(source, index) for index in spread(range(len(source.records)), MEASURED)]
        search, maps, window = np.mean(images[1:] or images, axis=0).tolist()
        components = _measure_components(source)
    finally:
        torch.set_num_threads(threads)
    costs = torch.tensor([search, maps, window, components, _measure_step(source)], device="cpu")
    distributed.take_from_main([costs])  # all processes choose the same
    return Costs(*costs.tolist())


@torch.inference_mode()
def _measure_image(source: TrainingWindows, index: int) -> tuple[float, float, float]:
    """(search, maps, window) of one image."""
    config, times = source.config, [time.monotonic()]
    windows = make_proposer(config.proposals)(read_image(source.records[index].path))[: config.joint.windows]
    times.append(time.monotonic())
    maps = source.maps(index)
    times.append(time.monotonic())
    projection = Projection(torch.zeros(config.joint.rank, _width(source)), torch.zeros(config.joint.rank))
    distinct, _ = source.project(maps, windows).unique()
    projection.rows(pool_projected(maps, distinct, config.pyramid.levels), config.precision)
    times.append(time.monotonic())
    search, embed, pool = np.diff(times).tolist()
    return search, embed * 1e6 / sum(side * side for side in config.maps.scales), pool / max(1, len(windows))


def _measure_components(source: TrainingWindows) -> float:
    rank, part = source.config.joint.rank, 256
    sample, components = torch.rand(part, _width(source)), torch.rand(_width(source), rank + OVERSAMPLED)
    start = time.monotonic()
    sample @ components
    windows = min(SAMPLE_RATIO * rank, len(source.records) * source.config.proposals.max_windows)
    return (time.monotonic() - start) * PASSES * windows / part


def _width(source: TrainingWindows) -> int:
    return source.backbone.channels * sum(level * level for level in source.config.pyramid.levels)


def _measure_step(source: TrainingWindows) -> float:
    config, device, classes = source.config, source.device, len(source.classes)
    own, half = config.joint, config.precision == "bfloat16"
    model = JointHead(own.rank, classes, config.head, np.zeros((2, 4)), own.seed).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    labels, targets = (torch.arange(own.batch) % (classes + 1)).to(device), torch.zeros(own.batch, 4, device=device)
    rows, times = np.zeros((own.batch, own.rank), np.float16), list[float]()
    for _ in range(STEPS):
        times.append(time.monotonic())
        features = torch.from_numpy(np.stack([row.astype(np.float32) for row in rows])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits, boxes = model(features)
        optimiser.zero_grad()
        torch.stack(joint_loss(logits.float(), boxes.float(), labels, targets)).sum().backward()
        optimiser.step()
    return float(np.median(np.diff([*times, time.monotonic()])))
