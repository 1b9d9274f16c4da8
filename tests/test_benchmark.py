"""The benchmark command: what it compares, what it says, and what it refuses."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline import refused, run_command

from sppnet import benchmark, machine
from sppnet.benchmark import (
    Comparison,
    compare,
    compare_pooling,
    compare_search,
    generated_picture,
    random_detector,
    run_benchmark,
    time_warped,
    write_picture,
)
from sppnet.detection.detector import SPPDetector
from sppnet.detection.proposals import FixedWindows
from sppnet.detection.window_features import window_cells
from sppnet.images import image_size, read_image
from sppnet.network.pyramid import pool_windows

WINDOWS = np.array([[0, 0, 100, 80], [30.4, 20.2, 90.6, 70.7], [5, 5, 60, 60], [100, 10, 200, 160]], np.float32)


@pytest.fixture(scope="module")
def detector(small_run):
    return SPPDetector.load(small_run.root)


@pytest.fixture(scope="module")
def photo(small_run):
    return small_run.devkit / "SHAPES/JPEGImages/test_00000.jpg"


@pytest.fixture(scope="module")
def image(photo):
    return read_image(photo)


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    monkeypatch.setattr(machine, "ON_CPU", (32, 2**16))
    monkeypatch.setattr(benchmark.time, "sleep", lambda seconds: None)


# ---- comparisons ---------------------------------------------------------------------------------------------------


def test_a_comparison_takes_the_ratio_pair_by_pair():
    seconds = {"ours": iter([1.0, 2.0, 4.0]), "peer": iter([3.0, 20.0, 8.0])}
    calls = []

    def measure(function):
        return next(seconds[function()])

    found = compare(lambda: calls.append("o") or "ours", lambda: calls.append("p") or "peer", 3, measure, equal=True)
    assert found == Comparison(ours=2, peer=8, ratio=3, lowest=2, highest=10, equal=True)
    assert "".join(calls) == "op" * 4  # once to warm up


def test_pooling_equals_the_peer_on_one_scale_and_on_several(detector, image):
    assert compare_pooling(detector, image, WINDOWS, 1).equal is True
    maps = detector.config.maps.model_copy(update={"scales": (96, 200)})
    several = replace(detector, config=detector.config.model_copy(update={"maps": maps}))
    assert compare_pooling(several, image, WINDOWS, 1).equal is True


def test_pooling_is_not_compared_with_itself(image):
    assert compare_pooling(SimpleNamespace(device=torch.device("mps")), image, WINDOWS, 1) is None


def test_pooling_that_differs_is_noticed(detector, image, monkeypatch):
    right = benchmark.pool_windows
    monkeypatch.setattr(benchmark, "pool_windows", lambda *arguments: right(*arguments) + 1)
    found = compare_pooling(detector, image, WINDOWS, 1)
    assert found.equal is False
    assert "RESULTS DIFFER" in found.row("pooling")


def test_the_searches_run_in_the_fast_mode_whatever_the_detector_asks(detector, image, monkeypatch):
    modes = []
    monkeypatch.setattr(benchmark, "selective_search", lambda _, settings: modes.append(settings.mode))
    monkeypatch.setattr(benchmark, "opencv_selective_search", lambda _, settings: modes.append(settings.mode))
    monkeypatch.setattr(benchmark, "_cpu_seconds", lambda function: (function(), 1.0)[1])
    proposals = detector.config.proposals.model_copy(update={"mode": "quality"})
    slow = replace(detector, config=detector.config.model_copy(update={"proposals": proposals}))
    assert compare_search(slow, image, 2).ratio == 1
    assert modes == ["fast"] * 6


def test_the_trunk_sees_every_drawn_window_at_r_cnns_size_and_the_time_is_scaled_up(detector, image, monkeypatch):
    monkeypatch.setattr(benchmark, "RCNN_BATCH", 2)
    monkeypatch.setattr(benchmark, "_wall_seconds", lambda device: lambda function: (function(), 1.5)[1])
    seen = []
    handle = detector.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    try:
        found = time_warped(detector, image, WINDOWS, 3, rounds=1)
    finally:
        handle.remove()
    warped = [shape for shape in seen if shape[2:] == (227, 227)]
    assert warped == [(2, 3, 227, 227), (1, 3, 227, 227)] * 2  # once to warm up
    assert (found.timed, found.windows) == (3, 4)
    assert found.comparison.ours == 1.5
    assert found.comparison.peer == pytest.approx(1.5 * 4 / 3)
    assert found.comparison.ratio == pytest.approx(4 / 3)
    assert time_warped(detector, image, WINDOWS, 100, rounds=1).timed == 4


def test_the_crop_of_a_window_is_all_of_its_pixels():
    pixels = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    assert np.array_equal(benchmark._crop(pixels, np.array([1.4, 0, 3.2, 2])), pixels[0:2, 1:4])


# ---- what is measured without a run and without images -------------------------------------------------------------


def test_the_random_detector_detects_and_has_something_to_suppress(image):
    random = random_detector("tiny5", classes=3, fc=32)
    scores = random.score(random.embed(image), WINDOWS)
    assert scores.shape == (4, 3)
    found = random.detect(image, WINDOWS)
    assert len(random.classes) == 3
    again = random_detector("tiny5", classes=3, fc=32).detect(image, WINDOWS)
    assert np.array_equal(found.scores, again.scores)
    assert random_detector("tiny5", "bfloat16", 3, fc=8).config.maps.compute == "bfloat16"
    refined = random.regressors.refine(torch.zeros(4, random.head.fc6.in_features), WINDOWS, 0)
    assert np.allclose(refined, WINDOWS)


def test_the_generated_picture_has_vocs_usual_size_and_differs_by_seed(tmp_path):
    assert image_size(write_picture(tmp_path / "picture.jpg")) == (375, 500)
    assert np.array_equal(generated_picture(1), generated_picture(1))
    assert not np.array_equal(generated_picture(1), generated_picture(2))


# ---- the whole -----------------------------------------------------------------------------------------------------


def test_the_benchmark_of_a_run_measures_its_detector_on_its_images(small_run, photo):
    result = run_benchmark(small_run.root, [photo, photo.with_name("test_00001.jpg")], rounds=1, rcnn=2, progress=False)
    assert (result.profile.images, result.profile.rounds) == (2, 1)
    assert result.detector.startswith(f"{small_run.root}: tiny5, head 16, 5 classes, scale 112, float32, on cpu")
    assert result.pooling is not None
    assert result.rcnn is not None
    assert result.rcnn.timed == 2
    assert min(result.machine.gflops_float32, result.machine.copy_gigabytes_per_second) > 0
    assert json.loads(json.dumps(result.to_dict()))["profile"]["steps"] == result.profile.steps


def test_an_image_without_windows_has_a_profile_but_no_pooling(detector, photo):
    blind = replace(detector, proposer=FixedWindows(np.zeros((0, 4))))
    result = benchmark.measure(blind, [photo], 1, 5, ("detector", "image"), progress=False)
    assert (result.pooling, result.rcnn) == (None, None)
    assert "selective search; OpenCV's" in result.table()
    assert "roi_pool" not in result.table()
    assert "\npooling: here it is torchvision's roi_pool\n" in replace(result, device="mps").table()


def test_the_command_prints_a_table_or_json(small_run, photo):
    shown = run_command("benchmark", small_run.root, "--images", photo, "--rounds", 1, "--rcnn", 2, "--device", "cpu")
    assert shown.status == 0, shown.err
    for text in (
        "GFLOP/s",
        "feature maps",
        "fc6",
        "file to detections",
        "bit-equal",
        "OpenCV's",
        "as R-CNN",
        "2 of",
        "rounds: 1",
    ):
        assert text in shown.out
    printed = run_command("benchmark", small_run.root, "--images", photo, "--rounds", 1, "--json", "--device", "cpu")
    values = json.loads(printed.out)
    assert values["pooling"]["equal"] is True
    assert values["rcnn"] is None


def test_without_a_run_and_images_the_command_measures_random_weights_on_a_generated_picture(detector, monkeypatch):
    monkeypatch.setattr(benchmark, "random_detector", lambda: detector)
    shown = run_command("benchmark", "--rounds", 1, "--device", "cpu")
    assert shown.status == 0, shown.err
    assert "random weights: tiny5" in shown.out
    assert "a generated picture of 500 × 375 pixels" in shown.out


def test_wrong_runs_images_and_counts_are_refused(small_run, photo, tmp_path):
    assert "holds no trained detector" in refused("benchmark", tmp_path, "--images", photo)
    assert "no such file, folder or match" in refused("benchmark", small_run.root, "--images", tmp_path / "none.jpg")
    shutil.copy(small_run.root / "config.yaml", tmp_path / "text.jpg")
    assert "text.jpg: expected an image" in refused("benchmark", small_run.root, "--images", tmp_path / "text.jpg")
    for option in (("--rounds", 0), ("--rcnn", -1)):
        assert "expected at least 1 round" in refused("benchmark", small_run.root, "--images", photo, *option)


@pytest.mark.gpu
def test_the_benchmark_runs_on_a_gpu(small_run, photo, monkeypatch):
    monkeypatch.setattr(machine, "ON_GPU", (256, 2**20))
    result = run_benchmark(small_run.root, [photo], "cuda", rounds=2, rcnn=2, progress=False)
    assert result.pooling.equal
    assert result.machine.device == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_pooling_on_a_gpu_equals_pooling_on_the_cpu(detector, image):
    config, maps = detector.config, detector.embed(image)
    cells = window_cells(maps, WINDOWS, detector.trunk.geometry, config.pyramid, config.maps).cells
    expected = pool_windows(maps.maps[0], cells, config.pyramid.levels)
    found = pool_windows(maps.maps[0].cuda(), cells, config.pyramid.levels)
    assert found.device.type == "cuda"
    assert torch.equal(found.cpu(), expected)


# ---- benchmarks/image.py -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parent.parent / "benchmarks/image.py"
    spec = importlib.util.spec_from_file_location("benchmark_image", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_image_benchmark_measures_both_precisions_and_notices_other_results(script, small_run, monkeypatch, capsys):
    monkeypatch.delenv("SPPNET_SHARED", raising=False)
    arguments = ["--images", "1", "--rounds", "1", "--threads", "1", "--trunks", "--run", str(small_run.root)]
    assert script.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "scale 112, float32, on cpu" in shown
    assert "scale 112, bfloat16, on cpu" in shown
    assert shown.count("finds the same: True") == 2
    monkeypatch.setattr(script, "same", lambda a, b: False)
    assert script.main(arguments) == 1


def test_low_ranks_make_a_second_detector_of_each_trunk(script, small_run, monkeypatch):
    monkeypatch.setattr(script, "random_detector", lambda trunk: SPPDetector.load(small_run.root))
    options = argparse.Namespace(run=[], trunks=["alexnet"], ranks=[6, 0], device="cpu")
    (name, whole), (other, thin) = script.detectors(options)
    assert (name, whole.head.ranks) == ("alexnet, random weights", {})
    assert (other, thin.head.ranks) == ("alexnet, random weights of ranks 6 and 0", {"fc6": 6})
    options.ranks = [0, 0]
    assert len(list(script.detectors(options))) == 1


def test_scores_that_differ_are_measured_against_their_range(script, detector, photo):
    windows = FixedWindows(WINDOWS)
    exact, moved = replace(detector, proposer=windows), replace(detector, proposer=windows)
    moved = replace(moved, detectors=replace(moved.detectors, bias=moved.detectors.bias + 1))
    scores = exact.score(exact.embed(read_image(photo)), windows(read_image(photo)))
    assert script.score_difference(exact, moved, photo) == pytest.approx(1 / np.ptp(scores), rel=1e-3)
    assert script.score_difference(exact, exact, photo) == 0
    blind = replace(detector, proposer=FixedWindows(np.zeros((0, 4))))
    assert script.score_difference(blind, blind, photo) == 0


def test_images_that_are_not_there_are_an_error_with_a_next_step(script, tmp_path, monkeypatch):
    monkeypatch.setenv("SPPNET_SHARED", str(tmp_path))
    with pytest.raises(SystemExit, match=r"VOCdevkit: expected .* found none among 0 files; correct SPPNET_SHARED"):
        script.main(["--images", "1", "--threads", "1", "--trunks"])


def test_only_images_of_the_papers_size_are_taken(script, tmp_path):
    folder = tmp_path / "VOC2007/JPEGImages"
    folder.mkdir(parents=True)
    for seed in range(3):
        write_picture(folder / f"{seed}.jpg", seed)
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(folder / "small.jpg")
    assert len(script.voc_images(tmp_path, 2)) == 2
    assert {path.name for path in script.voc_images(tmp_path, 9)} == {"0.jpg", "1.jpg", "2.jpg"}
