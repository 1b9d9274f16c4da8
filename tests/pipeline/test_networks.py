"""What the maps of a run cost: said before they are computed, and bounded by maps.budget_gigabytes."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import copied, merged, small_settings

from sppnet.artifacts import file_digest
from sppnet.config import Config
from sppnet.config_files import parse_config
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.errors import SppnetError
from sppnet.pipeline.stages import STAGES
from sppnet.pipeline.training import Training, train_detector

CPU = torch.device("cpu")


def changed(run, **changes) -> Config:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged(small_settings(run.devkit, run.config.proposals.import_from[0]), dotted), "test")


def graph_of(config: Config, root: Path):
    return Training(config, root, CPU).graph


def map_files(root: Path) -> set[str]:
    return {path.name for path in root.glob("maps-*/SHAPES/*.npz")}


def results(root: Path) -> dict[str, str]:
    """The digests of what training leaves behind maps and windows."""
    wanted = ("finetune", "low_rank", "svm", "boxes", "thresholds")
    paths = [path for stage in wanted for path in root.glob(f"{stage}-*/*") if path.suffix != ".csv"]
    return {str(path.relative_to(root)): file_digest(path) for path in paths}


@pytest.fixture
def half(small_run) -> float:
    """The gigabytes of the maps of the first half of the images, and a little."""
    sizes = graph_of(small_run.config, small_run.root).gigabytes
    return float(sizes[:10].sum() + sizes[10] / 2)


# ---- estimates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"maps__scales": [96, 200], "maps__storage": "float32"},
                                     {"maps__scales": [112, 480], "maps__max_side": 300}])  # fmt: skip
def test_what_maps_take_on_the_disk_is_known_before_they_are_computed(small_run, tmp_path, changes):
    config = changed(small_run, **changes)
    graph = graph_of(config, tmp_path)
    train_detector(config, tmp_path, only=("proposals", "maps"), progress=False)
    paths = [record.path_in(graph.folder("maps"), flip) for record, flip in graph.images]
    assert len(set(paths)) == len(map_files(tmp_path)) == 19
    headers = np.array([path.stat().st_size for path in paths]) - graph.gigabytes * 1e9
    assert (headers > 0).all()
    assert (headers < 300 * (2 + len(config.maps.scales))).all()


def test_costs_are_said_before_the_stage_and_not_when_all_is_there(small_run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    config = changed(small_run, maps__scales=[96, 128])
    train_detector(config, tmp_path, only=("maps",), progress=False)
    lines = [record.getMessage() for record in caplog.records]
    (said,) = [place for place, line in enumerate(lines) if line.startswith("the maps of 19 images")]
    assert "at 2 scales: " in lines[said]
    assert said < next(place for place, line in enumerate(lines) if line.startswith("maps: "))
    graph = graph_of(config, tmp_path)
    gigabytes, megabytes = re.search(r": ([\d.e-]+) GB on disk, ([\d.e-]+) MB of memory", lines[said]).groups()
    assert float(gigabytes) == pytest.approx(graph.gigabytes.sum(), rel=0.01)
    assert float(megabytes) == pytest.approx(2e3 * graph.gigabytes[0], rel=0.01)  # float32, stored in half precision
    assert Training(config, tmp_path, CPU).networks.map_costs == ""


# ---- the budget ----------------------------------------------------------------------------------------------------


def test_a_budget_for_half_of_the_images_changes_no_result(small_run, tmp_path):
    settings = {"maps__scales": [96, 128], "low_rank__fc6": 5, "low_rank__steps": [3],
                "low_rank__learning_rates": [1e-3]}  # fmt: skip
    whole = changed(small_run, **settings)
    sizes = graph_of(whole, tmp_path).gigabytes
    bounded = changed(small_run, **settings, maps__budget_gigabytes=float(sizes[:10].sum() * 1.0001))
    found = {}
    for name, config in (("whole", whole), ("bounded", bounded)):
        assert train_detector(config, tmp_path / name, progress=False) is not None
        found[name] = results(tmp_path / name)
    assert len(found["whole"]) >= 9
    assert found["bounded"] == found["whole"]
    assert len(map_files(tmp_path / "whole")) == 19
    assert len(map_files(tmp_path / "bounded")) == 10
    first, second = (DetectorDescription.read(tmp_path / name) for name in ("whole", "bounded"))
    assert first.digest("cpu") == second.digest("cpu")
    assert SPPDetector.load(tmp_path / "whole").thresholds == SPPDetector.load(tmp_path / "bounded").thresholds


def test_a_changed_budget_repeats_nothing_stores_more_and_deletes_nothing(small_run, tmp_path, half):
    run = copied(small_run, tmp_path / "run")
    before = results(run.root)
    for path in run.root.glob("maps-*/SHAPES/*.npz"):
        path.unlink()
    config = changed(small_run, maps__budget_gigabytes=half)
    graph = graph_of(config, run.root)
    assert [status.done for status in graph.statuses() if status.name == "maps"] == [0]
    assert len(graph.stored) == 10
    train_detector(config, run.root, only=("maps",), progress=False)
    expected = {record.path_in(Path(), flip).name for record, flip in graph.images[:10]}
    assert map_files(run.root) == expected
    assert all(status.complete for status in graph_of(config, run.root).statuses())

    less = changed(small_run, maps__budget_gigabytes=half / 3)
    assert len(graph_of(less, run.root).stored) < 5
    train_detector(less, run.root, progress=False)
    assert map_files(run.root) == expected

    train_detector(small_run.config, run.root, progress=False)
    assert len(map_files(run.root)) == 19
    assert results(run.root) == before


def test_a_budget_for_all_stores_all(small_run, tmp_path):
    graph = graph_of(changed(small_run, maps__budget_gigabytes=1), tmp_path)
    assert graph.stored == graph.images


def test_a_budget_that_is_just_enough_is_enough(small_run, tmp_path):
    sums = graph_of(small_run.config, tmp_path).gigabytes.cumsum()
    for count in (1, 10, 19):
        graph = graph_of(changed(small_run, maps__budget_gigabytes=float(sums[count - 1])), tmp_path)
        assert len(graph.stored) == count


def test_where_maps_are_computed_again_it_is_said_how_often(small_run, tmp_path, half):
    config = changed(small_run, maps__budget_gigabytes=half)
    costs = Training(config, tmp_path, CPU).networks.map_costs
    again = (
        r"; the maps of 9 images are not stored but computed when they are read, in fine-tuning 15 times, 0:00:\d\d$"
    )
    assert re.search(again, costs)  # 8 steps on 4 images each, 9 of 19 not stored
    low = changed(small_run, maps__budget_gigabytes=half, low_rank__fc6=5, low_rank__steps=[92, 100])
    assert "in fine-tuning 379 times" in Training(low, tmp_path, CPU).networks.map_costs
    pool = changed(small_run, maps__budget_gigabytes=half / 2, svm__layer="pool")
    assert "in fine-tuning 0 times" in Training(pool, tmp_path, CPU).networks.map_costs


def test_a_budget_for_no_image_stores_none(small_run, tmp_path):
    config = changed(small_run, maps__budget_gigabytes=1e-9)
    assert graph_of(config, tmp_path).stored == []
    assert "the maps of 19 images are not stored" in Training(config, tmp_path, CPU).networks.map_costs
    train_detector(config, tmp_path, only=("proposals", "maps", "finetune"), progress=False)
    assert map_files(tmp_path) == set()
    assert [status.name for status in graph_of(config, tmp_path).statuses() if status.complete][:3] == [
        *("proposals", "maps", "finetune")
    ]


# ---- the disk ------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_computed(small_run, tmp_path, monkeypatch):
    total = graph_of(small_run.config, tmp_path).gigabytes.sum()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(total / 2 * 1e9)))
    root = tmp_path / "runs" / "own"
    with pytest.raises(
        SppnetError, match=r"at 1 scale: [\d.e-]+ GB, 0 of it there, but the disk of .* GB left"
    ) as raised:
        train_detector(small_run.config, root, progress=False)
    assert not root.exists()
    (reason,) = Training(small_run.config, root, CPU).networks.missing_inputs(STAGES)
    assert reason == str(raised.value)
    budget = float(re.search(r"set maps\.budget_gigabytes=([\d.e-]+) to compute the others", reason)[1])
    assert budget == pytest.approx(0.45 * total, rel=0.01)
    bounded = changed(small_run, maps__budget_gigabytes=budget)
    assert Training(bounded, root, CPU).networks.missing_inputs(STAGES) == []
    assert 0 < len(graph_of(bounded, root).stored) < 19


def test_maps_that_are_there_need_no_room(small_run, tmp_path, monkeypatch):
    run = copied(small_run, tmp_path / "run")
    removed = next(run.root.glob("maps-*/SHAPES/train_00004*flip*"))
    removed.unlink()
    graph = graph_of(run.config, run.root)
    usage, one = shutil.disk_usage(tmp_path), graph.gigabytes.max() * 1e9
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(one * 1.01)))
    assert Training(run.config, run.root, CPU).networks.missing_inputs(STAGES) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(one / 2)))
    (reason,) = Training(run.config, run.root, CPU).networks.missing_inputs(STAGES)
    assert f"{graph.gigabytes.sum():.3g} GB, {graph.gigabytes.sum() - one / 1e9:.3g} of it there" in reason
