"""What the benchmarks compute beside their timings is right; none of them is timed here."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pipeline import SmallRun, modified

from sppnet.config import Config
from sppnet.detection.detector import SPPDetector
from sppnet.store import read_tensors

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def quiet_log() -> Iterator[None]:
    """Puts the level of our logger back."""
    log = logging.getLogger("sppnet")
    level = log.level
    yield
    log.setLevel(level)


def load(name: str) -> ModuleType:
    """A benchmark as a module; they are scripts, not a package."""
    own = f"benchmark_{name}"
    if own not in sys.modules:
        spec = importlib.util.spec_from_file_location(own, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[own] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[own])
    return sys.modules[own]


# growth


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power: float) -> None:
    sizes = [100, 300, 1000]
    assert load("growth").exponent(sizes, [3 * n**power for n in sizes]) == pytest.approx(power)


def test_one_size_has_no_exponent() -> None:
    assert math.isnan(load("growth").exponent([100], [2.0]))


def test_growth_is_drawn_for_every_part_and_told_in_words(tmp_path: Path) -> None:
    growth = load("growth")
    points = {
        part: [growth.Point(job, size, (1.0, 3.0, 2.0), 1.5, 1.0) for job in jobs for size in (100, 200)]
        for part, jobs in growth.JOBS.items()
    }
    growth.draw(points, tmp_path / "new" / "growth.png")
    assert (tmp_path / "new" / "growth.png").read_bytes().startswith(b"\x89PNG")
    text = growth.table("windows", points["windows"])
    assert "| detect | 100 | 2 (1 – 3) | 3 | 1.50 | 1.00 |" in text
    assert "time grows as windows^0.00; from 100 to 200, 1.0 × the time and +0 MB at the peak" in text


def test_without_a_run_the_part_images_is_left_out_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("growth").main(["--parts", "images"]) == 0
    assert "part images is left out: it needs --config CONFIG and --run DIR" in capsys.readouterr().err


def test_the_jobs_of_the_part_images_run_on_a_training(small_run: SmallRun, quiet_log: None) -> None:
    growth, points = load("growth"), load("growth_points")
    run = {"config": str(small_run.root / "config.yaml"), "run": str(small_run.root), "overrides": []}
    before = modified(small_run.root)
    for job, unit in zip(growth.JOBS["images"], ("fits", "windows to train on", "objects"), strict=True):
        result = points.work("images", job, 2, threads=1, rounds=1, **run)
        assert result["size"] == 2
        assert len(result["seconds"]) == 1
        assert int(re.search(rf"([\d,]+) {unit}", result["note"])[1].replace(",", "")) > 0
    assert modified(small_run.root) == before


def test_random_windows_are_distinct_solid_and_inside() -> None:
    windows = load("growth_points").random_windows(300, 120, 90)
    assert len(np.unique(windows, axis=0)) == 300
    assert (windows[:, 2:] - windows[:, :2] >= 20).all()
    assert windows.min() >= 0
    assert (windows.max(axis=0) <= [120, 90, 120, 90]).all()


# finetuning


def test_the_products_of_a_step_leave_out_the_gradient_of_the_pooled_features() -> None:
    finetuning = load("finetuning")
    shapes = dict(finetuning.products(128, (12800, 4096, 4096, 21)))
    assert shapes["layer 1"] == (128, 12800, 4096)
    assert shapes["layer 1, gradient of the weight"] == (4096, 128, 12800)
    assert "layer 1, gradient of the input" not in shapes
    weights = 12800 * 4096 + 4096 * 4096 + 4096 * 21
    expected = 128 * (2 * weights + 4096 * 4096 + 4096 * 21)
    assert finetuning.multiply_adds(list(shapes.values())) == expected


def test_the_products_have_the_shapes_that_they_are_counted_with() -> None:
    finetuning = load("finetuning")
    shapes = finetuning.products(3, (5, 4, 2))
    alone = finetuning.Products(shapes, torch.float32)
    assert [(a.shape[0], a.shape[1], b.shape[1]) for a, b, _ in alone._jobs] == [shape for _, shape in shapes]
    assert len(alone.times()) == len(shapes)


def test_a_step_of_the_trainer_equals_the_one_written_out(tmp_path: Path) -> None:
    finetuning = load("finetuning")
    right, worst = finetuning.step_is_right(argparse.Namespace(batch=8, fc=16), tmp_path)
    assert right
    assert worst < 1e-3


def test_a_step_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetuning = load("finetuning")
    monkeypatch.setattr(finetuning._Trainer, "_rate", lambda *_: 2e-3)
    assert not finetuning.step_is_right(argparse.Namespace(batch=8, fc=16), tmp_path)[0]


def test_the_parts_of_a_step_add_up(tmp_path: Path) -> None:
    finetuning = load("finetuning")
    trainer = finetuning.make_trainer(argparse.Namespace(batch=8, fc=16), "float32", 0.5, tmp_path)
    times = finetuning.Stopwatch(trainer).step(0, *finetuning.batch_of(8, seed=0))
    assert min(times.forward, times.backward, times.optimiser, times.rest) > 0
    assert times.forward + times.backward + times.optimiser + times.rest == pytest.approx(times.total)


# mining


def test_weights_agree_by_class_and_a_class_trained_on_one_side_alone_does_not() -> None:
    before = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    now = np.array([[2.0, 0.0], [1.0, -1.0], [0.0, 0.0], [3.0, 0.0]])
    np.testing.assert_allclose(load("mining").class_cosines(before, now), [1, 0, 1, 0], atol=1e-12)


def test_detectors_that_differ_end_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    mining = load("mining")
    a, b = (mining.Mined(1.0, 1.0, np.array(weight), (1, 1)) for weight in ([[1.0, 0], [0, 1]], [[1.0, 0], [1, 0]]))
    assert mining.check([{"before": a, "now": a}], ("cat", "dog")) == 0
    assert mining.check([{"before": a, "now": a}, {"before": a, "now": b}], ("cat", "dog")) == 1
    assert capsys.readouterr().out.endswith("DIFFERENT: dog\n")


def test_settings_that_one_side_does_not_know_are_left_at_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"svm": {"C": 0.1, "positive_overlap": 0.6}, "proposals": {"mode": "fast"}}
    known = [{"svm": {"C": None}, "data": {}}, {"svm": {"C": None, "positive_overlap": None}, "proposals": {}}]
    assert load("mining").shared_settings(values, known) == {"svm": {"C": 0.1}}
    assert "svm.positive_overlap=0.6 is not known to both sides: left at its default" in capsys.readouterr().err


def test_the_settings_of_a_checkout_are_read_from_it() -> None:
    names = load("mining").setting_names(FOLDER.parent)
    assert set(names["svm"]) == set(Config.model_fields["svm"].annotation.model_fields)


@pytest.fixture(scope="module")
def prepared(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `prepare` tells both sides about all training images of the small run."""
    mining, folder = load("mining"), tmp_path_factory.mktemp("mining")
    options = mining.parse([str(small_run.root / "config.yaml"), "--run", str(small_run.root), "--before", "unused"])
    mining.prepare(options, folder)
    return json.loads((folder / "prepared.json").read_text())


def test_both_sides_are_told_the_images_folders_and_scale_of_the_training(
    prepared: dict[str, Any], small_run: SmallRun
) -> None:
    detector = SPPDetector.load(small_run.root)
    assert prepared["images"] == list(range(8))
    assert tuple(prepared["classes"]) == detector.classes
    assert prepared["scale"] == pytest.approx(detector.detectors.scale)
    assert all(Path(prepared[name]).is_relative_to(small_run.root) for name in ("windows", "maps"))
    assert torch.equal(read_tensors(Path(prepared["head"]))["fc6.weight"], detector.head.fc6.weight)


@pytest.mark.slow
def test_one_side_mines_the_weights_of_the_training(
    prepared: dict[str, Any], small_run: SmallRun, tmp_path: Path
) -> None:
    mining = load("mining")
    settings = mining.shared_settings(prepared["config"], [mining.setting_names(mining.NOW)])
    mined = mining.mine({**prepared, "config": settings, "threads": 1}, mining.NOW, tmp_path)
    expected = SPPDetector.load(small_run.root).detectors.weight.numpy()
    assert mining.class_cosines(expected, mined.weight).min() > mining.AGREES
    assert min(mined.seconds, mined.gigabytes, *mined.retrains) > 0


def test_chosen_images_are_spread_over_all() -> None:
    mining = load("mining")
    assert mining.spread(10, 4) == [0, 2, 5, 7]
    assert mining.spread(3, 100) == [0, 1, 2]


# proposals


def test_windows_of_small_sides_are_left_out_before_the_first_ones_are_taken() -> None:
    windows = np.array([[0, 0, 16, 40], [0, 0, 20, 20], [5, 5, 45, 25], [0, 0, 99, 99]], np.float32)
    assert load("proposals").selected(windows, 20, 2).tolist() == windows[1:3].tolist()


def test_one_search_of_the_peer_serves_every_least_side() -> None:
    proposals = load("proposals")
    image = proposals.generated_image(60, 80)
    settings = proposals.ProposalSettings(min_side=8, max_windows=10**6)
    everything = proposals.opencv_search(image, settings)
    strict = settings.model_copy(update={"min_side": 16, "max_windows": 20})
    expected = proposals.opencv_search(image, strict)
    assert len(expected) > 5
    np.testing.assert_array_equal(proposals.selected(everything, 16, 20), expected)


# compression


def test_detections_of_all_variants_are_those_of_their_detectors(small_run: SmallRun) -> None:
    compression = load("compression")
    detector = SPPDetector.load(small_run.root)
    config = detector.config
    records = compression.load_test_data(config)[0]
    folder = compression.windows_folder(small_run.root, config.proposals)
    compression.propose_images(records, config.proposals, folder, progress=False)
    responses = compression.sample_responses(detector, small_run.root, 8, 160, progress=False).chosen
    heads = compression.variants(detector.head, responses, [(6, 5)], ["responses", "weights"])
    assert [compression.products(head) for head in heads.values()] == sorted(
        (compression.products(head) for head in heads.values()), reverse=True
    )
    for record in records:
        image, windows = compression.read_image(record.path), compression.read_windows(folder, record)
        for name, found in compression.detect_with_all(detector, heads, record, folder).items():
            expected = dataclasses.replace(detector, head=heads[name]).detect(image, windows)
            np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-3, atol=1e-2)


def test_the_compression_table_starts_with_the_whole_detector(
    small_run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    before = modified(small_run.root)
    compression = load("compression")
    assert compression.main([str(small_run.root), "--ranks", "6,5", "--images", "8", "--limit", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 images, 5 classes, 11point")
    assert [line.split()[0] for line in lines[2:]] == ["whole", "responses", "weights"]
    assert lines[2].split()[-1] == "0.00"
    assert {path: when for path, when in modified(small_run.root).items() if path in before} == before


def test_ranks_that_save_nothing_are_refused_before_images_are_asked(
    small_run: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compression = load("compression")
    monkeypatch.setattr(compression, "sample_responses", None)
    with pytest.raises(SystemExit) as ended:
        compression.main([str(small_run.root), "--ranks", "6,5", "6,8"])
    assert ended.value.code == 2
    assert "rank 8 of fc7: expected 1 to 7" in capsys.readouterr().err


# maps


def test_the_two_ways_of_maps_are_compared_and_a_difference_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = load("maps")
    called: list[str] = []
    real = maps.strips.run_in_strips
    monkeypatch.setattr("sppnet.network.trunks.run_in_strips", lambda *a: called.append("strips") or real(*a))
    monkeypatch.setattr(maps.strips, "LARGE", 0)
    arguments = ["--trunks", "tiny5", "--scales", "150", "--rounds", "3", "--threads", "1"]
    assert maps.main(arguments) == 0
    # Once to compare, once a round, never for whole maps; on both sides of the comparison of convolutions.
    assert len(called) == 4 + 8
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| tiny5", "| 96"))]
    assert [row.split(" | ")[0] for row in rows] == ["| tiny5, 150", "| tiny5, 150", "| 96 × 75 × 100"]
    monkeypatch.setattr("sppnet.network.trunks.run_in_strips", lambda *a: real(*a) + 1)
    assert maps.main(arguments) == 1


def test_convolutions_by_tiles_are_compared_with_torchs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = load("maps")
    called: list[str] = []
    real = maps.winograd.convolve
    monkeypatch.setattr(maps.winograd, "convolve", lambda *a: called.append("tiles") or real(*a))
    monkeypatch.setattr(maps.winograd, "GAIN", 0)
    arguments = ["--trunks", "zf5", "--scales", "100", "--rounds", "2", "--threads", "1"]
    assert maps.main(arguments) == 0
    layers = 5
    assert len(called) == layers * (2 * 3 + 3)  # both sides of the strips, ours of the tiles
    monkeypatch.setattr(maps.winograd, "convolve", lambda *a: real(*a) * 1.001)
    assert maps.main(arguments) == 1
