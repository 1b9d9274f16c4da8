"""The time of a training, stage by stage, from what was measured: the arithmetic by hand."""

from __future__ import annotations

import pytest
import torch

from sppnet.config import STAGES
from sppnet.config_files import parse_config
from sppnet.pipeline import estimate as module
from sppnet.pipeline.estimate import Costs, duration, estimate, remaining_work
from sppnet.pipeline.training import Training

COSTS = Costs(search=2.0, maps=0.5, pool=1e-3, project=1e-4, windows=900, step=0.05)
JOINT = {"rank": 10, "windows": 100, "steps": 200, "batch": 300}
CONFIG = parse_config(
    {"head": {"training": "joint"}, "joint": JOINT, "maps": {"scales": [400, 800]}, "proposals": {"max_windows": 1000}},
    "",
)


def test_stages_take_the_sum_of_their_items(monkeypatch):
    monkeypatch.setattr(module, "available_cores", lambda: 1)
    monkeypatch.setattr(module, "worker_count", lambda items: 1 if items < 32 else 2)
    found = estimate(COSTS, {"proposals": 10, "embed": 40, "joint": 2, "thresholds": 3}, CONFIG)
    maps = 0.5 * (0.4**2 + 0.8**2)
    components = 40 * maps + 80 * (1e-3 + 12 * 1e-4)
    assert found.stages == pytest.approx(
        {
            "proposals": 20,
            "embed": components + (40 * (maps + 100 * 1.1e-3) + 3 * 800 * 1.1e-3) / 2,
            "joint": 10,
            "thresholds": 3 * 900 / 300 * 0.05,
        }
    )
    assert found.total == pytest.approx(sum(found.stages.values()))
    assert found.items["components"] == pytest.approx(components / 40)
    assert found.table().splitlines()[1:] == [
        *(f"  {name:<10} {duration(seconds):>9}" for name, seconds in found.stages.items()),
        f"  total      {duration(found.total):>9}",
    ]


def test_images_of_few_windows_take_less():
    few = COSTS._replace(windows=50)
    assert estimate(few, {"embed": 1, "thresholds": 5}, CONFIG).items["embed"] == pytest.approx(0.4 + 50 * 1.1e-3)
    assert estimate(few, {"thresholds": 5}, CONFIG).stages == pytest.approx({"thresholds": 5 * 50 / 300 * 0.05})


def test_work_that_is_done_counts_again_where_it_is_forced(small_run):
    graph = Training(small_run.config, small_run.root, torch.device("cpu")).graph
    assert remaining_work(graph, STAGES, ()) == {}
    assert remaining_work(graph, STAGES, ("svm",)) == {"svm": 1, "thresholds": 3}
    assert remaining_work(graph, ("svm",), ("svm",)) == {"svm": 1}
    assert remaining_work(graph, ("boxes", "thresholds"), ("svm", "boxes")) == {"boxes": 5, "thresholds": 3}


def test_what_is_done_takes_no_time():
    assert estimate(COSTS, {"joint": 1}, CONFIG).stages == {"joint": 10}
    assert estimate(COSTS, {}, CONFIG).total == 0
