"""The commands: what they print, write and return."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from devkit import thing, xml_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_run import SmallRun, copied, merged, modified, refused, run_command, small_settings, write_config

from sppnet import __version__, cli, commands
from sppnet.config_files import load_config
from sppnet.data.comp4 import read_comp4
from sppnet.data.voc import write_annotation
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.images import read_image
from sppnet.pipeline.stages import STAGES
from sppnet.pipeline.training import Training
from sppnet.proposals.files import import_windows

CONFIGS = [p for p in sorted(Path(__file__).parents[1].glob("configs/*.yaml")) if "classify" not in p.stem]
VOC = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


@pytest.fixture
def config(small_run, tmp_path) -> Path:
    """The settings of the small run as a file."""
    settings = small_settings(small_run.devkit, small_run.config.proposals.import_from[0])
    return write_config(tmp_path / "small.yaml", settings)


@pytest.fixture
def run(small_run, tmp_path):
    return copied(small_run, tmp_path / "run")


def plan_of(out: str) -> dict[str, tuple[str, str]]:
    """Stage -> (action, reason) of a dry run."""
    rows = [line.split(maxsplit=2) for line in out.splitlines()[1:] if line.split()[0] in STAGES]
    return {stage: (action, why) for stage, action, why in rows}


# ---- train ---------------------------------------------------------------------------------------------------------


def test_training_ends_with_a_detector_and_the_next_step(config, tmp_path):
    result = run_command("train", config, "--run", tmp_path / "run", "--device", "cpu")
    assert result.status == 0
    first, following = result.out.splitlines()
    own = re.escape(str(tmp_path / "run"))
    found = r"mAP 0\.\d+ on 3 validation images \(area\), which chose the thresholds too"
    assert re.fullmatch(rf"detector of 5 classes in {own}/detector; {found}", first)
    assert following == f"next: sppnet eval {tmp_path / 'run'}, or sppnet detect {tmp_path / 'run'} PICTURES --out DIR"
    assert len(SPPDetector.load(tmp_path / "run").classes) == 5
    log = result.err
    assert "data: VOC, 8 training and 3 validation images, " in log
    assert (
        log.index("proposals:") < log.index("maps:") < log.index("finetune:") < log.index("svm:") < log.index("boxes:")
    )
    assert re.search(r"thresholds: cross -?[\d.]+ \((F1 [\d.]+ of \d+ objects|no [\w ]+)\), disc ", log)
    table = log[log.index("stage  ") :].splitlines()
    assert [line.split()[0] for line in table] == ["stage", *STAGES]


def test_what_is_no_terminal_sees_no_progress_bars(config, tmp_path):
    few = ["proposals.import_from=[]", "data.train=[SHAPES/val]", "data.val=[]", "data.test=[]"]
    command = ["train", config, "--run", tmp_path / "run", "--set", *few]
    result = subprocess.run([sys.executable, "-m", "sppnet", *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not any(mark in result.stderr for mark in ("\r", "it/s", "%|", "image/s"))
    assert result.stdout.startswith("detector of ")


@pytest.mark.slow
def test_several_processes_share_the_work_and_speak_once(config, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "--", "sppnet"]
    command = [*torchrun, "train", config, "--run", tmp_path / "run", "--device", "cpu"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("detector of 5 classes") == 1
    assert result.stderr.count("Summary") == 1
    alone = copied(SmallRun(tmp_path / "run", load_config(tmp_path / "run/config.yaml"), tmp_path), tmp_path / "alone")
    subprocess.run(list(map(str, [*torchrun, "test", tmp_path / "run"])), capture_output=True, check=True)
    assert run_command("test", alone.root).status == 0
    results = [run / "results/SHAPES-test/comp4_det_test_star.txt" for run in (tmp_path / "run", alone.root)]
    (ids, scores, boxes), (others, other_scores, other_boxes) = map(read_comp4, results)
    assert ids == others != []
    # torchrun gives each process one thread, and sums of other lengths round differently
    np.testing.assert_allclose(scores, other_scores, atol=1e-5)
    np.testing.assert_allclose(boxes, other_boxes, atol=1e-3)


def test_without_a_run_folder_the_name_gives_it(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command("propose", config, "--set", "name=mine").status == 0
    assert load_config(tmp_path / "runs/mine/config.yaml").name == "mine"


def test_settings_on_the_command_line_count_over_the_file(config, tmp_path):
    options = ["--set", "svm.C=0.5", "head.fc6=8", "--set", "maps.scales=[64, 96]"]
    assert run_command("propose", config, "--run", tmp_path / "run", *options).status == 0
    kept = load_config(tmp_path / "run/config.yaml")
    assert (kept.svm.C, kept.head.fc6, kept.maps.scales) == (0.5, 8, (64, 96))


def test_the_stages_are_commands_too(config, small_run, tmp_path):
    for stage in ("propose", "extract", "finetune", "svm", "boxes"):
        result = run_command(stage, config, "--run", tmp_path / "run")
        assert (result.status, result.out) == (0, "")
        assert "no detector yet" in result.err
    assert run_command("thresholds", config, "--run", tmp_path / "run").out.startswith("detector of 5 classes")
    digests = [DetectorDescription.read(root).digest("cpu") for root in (tmp_path / "run", small_run.root)]
    assert digests[0] == digests[1]


def test_a_stage_that_is_switched_off_says_so(config, run):
    result = run_command("boxes", config, "--set", "boxes.enabled=false", "--run", run.root)
    assert result.status == 0
    assert "skipped: boxes.enabled is false" in result.err


def test_windows_are_imported_and_exported(config, small_run, tmp_path):
    file = small_run.config.proposals.import_from[0]
    options = ["--set", "proposals.import_from=[]", "--import", file, "--export", tmp_path / "out.npz"]
    result = run_command("propose", config, "--run", tmp_path / "run", *options)
    assert result.status == 0, result.err
    assert "11 imported" in result.err
    assert f"proposals.import_from=[{file}]" in result.out
    assert "windows of 11 images written to" in result.out
    theirs, ours = import_windows(file), import_windows(tmp_path / "out.npz")
    assert len(ours) == 11
    assert all(np.array_equal(ours[name], theirs[name][:60]) for name in ours)


def test_windows_of_several_searches_are_exported_together_and_not_imported(config, small_run, tmp_path):
    file = small_run.config.proposals.import_from[0]
    both = f"train_proposals=[{{import_from: [{file}], max_windows: 9}}, {{import_from: [{file}], max_windows: 30}}]"
    options = ["propose", config, "--run", tmp_path / "run", "--set", both]
    result = run_command(*options, "--export", tmp_path / "out.npz")
    assert result.status == 0, result.err
    theirs, ours = import_windows(file), import_windows(tmp_path / "out.npz")
    assert all(len(ours[name]) == len(np.unique(theirs[name][:30], axis=0)) for name in ours)
    assert "--import: train_proposals says which windows train; set import_from in its entries" in refused(
        *options, "--import", file
    )


# ---- train: --dry-run, --from, --only, --force ---------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_says_what_would_run_and_why(config, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = modified(tmp_path)
    result = run_command("train", config, "--dry-run")
    assert result.status == 0
    assert result.out.startswith("data: VOC, 8 training and 3 validation images, ")
    plan = plan_of(result.out)
    assert list(plan) == list(STAGES)
    assert {plan[stage][0] for stage in STAGES if stage not in ("low_rank", "embed", "joint")} == {"run"}
    assert plan["maps"][1].startswith("nothing there yet; 19 to do in maps-")
    costs = (
        r"the maps of 19 images, mirrored ones too, at 1 scale: [\d.e-]+ GB on disk, [\d.]+ MB of memory and [\d.]+ s"
    )
    assert re.search(rf"^{costs} an image, 0:00:\d\d for those missing$", result.out, re.MULTILINE)
    assert modified(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "small.yaml"]


def test_a_dry_run_of_a_complete_run_reuses_everything(config, run, tmp_path):
    before = modified(tmp_path)
    plan = plan_of(run_command("train", config, "--run", run.root, "--dry-run").out)
    assert {action for action, _ in plan.values()} == {"reuse", "skip"}
    assert len(run_command("train", config, "--run", run.root, "--dry-run").out.splitlines()) == 1 + len(STAGES)
    changed = plan_of(run_command("train", config, "--run", run.root, "--dry-run", "--set", "svm.C=1").out)
    assert {stage for stage, (action, _) in changed.items() if action == "run"} == {"svm", "thresholds"}
    assert changed["svm"][1].startswith("settings or inputs are not those of svm-")
    next(run.root.glob("maps-*/SHAPES/train_00001-*-flip.npz")).unlink()
    before.pop(next(name for name in before if "train_00001" in name and "-flip" in name))
    assert plan_of(run_command("train", config, "--run", run.root, "--dry-run").out)["maps"][0] == "resume"
    assert modified(tmp_path) == before


def test_a_dry_run_names_the_files_that_training_would_not_find(config, tmp_path):
    overrides = ["backbone.weights.source=file", "backbone.weights.file=no.npz", "proposals.import_from=[gone.npz]"]
    overrides += ["head.init=checkpoint", "head.checkpoint=head.safetensors"]
    overrides += ["train_proposals=[{}, {method: edge_boxes, edge_model: model.yml}]"]
    result = run_command("train", config, "--run", tmp_path / "new", "--dry-run", "--set", *overrides)
    assert result.status == 1
    expected = [
        ("gone.npz", "proposals.import_from"),
        ("model.yml", "train_proposals.1.edge_model"),
        ("no.npz", "backbone.weights.file"),
        ("head.safetensors", "head.checkpoint"),
    ]
    assert result.err.splitlines() == [
        f"missing: {path}: no such file; check {setting}; training would end there" for path, setting in expected
    ]
    whole = run_command("train", config, "--run", tmp_path / "new", "--dry-run")
    assert (whole.status, whole.err) == (0, "")
    wrong = [*overrides[-1:], "proposals.method=edge_boxes", f"proposals.edge_model={config}"]
    result = run_command("train", config, "--run", tmp_path / "new", "--dry-run", "--set", *wrong)
    assert result.status == 1
    assert "expected a structured forest as OpenCV reads it" in result.err


def test_a_dry_run_of_a_stage_names_only_the_files_that_this_stage_needs(config, tmp_path):
    overrides = ["backbone.weights.source=file", "backbone.weights.file=no.npz", "low_rank.fc6=100000"]
    options = ["train", config, "--run", tmp_path / "new", "--dry-run", "--set", *overrides]
    every = run_command(*options)
    assert every.status == 1
    assert [line.split()[0] for line in every.err.splitlines()] == ["missing:", "low_rank.fc6=100000:"]
    assert run_command(*options, "--only", "maps").err == every.err
    propose = run_command(*options, "--only", "proposals")
    assert (propose.status, propose.err) == (0, "")


def test_files_for_what_is_done_already_are_not_missed(config, tmp_path):
    head = ["head.init=checkpoint", "head.checkpoint=head.safetensors"]
    training = Training(load_config(config, head), tmp_path, torch.device("cpu"))
    assert len(training.networks.missing_inputs(STAGES)) == 1
    done = training.graph.folder("finetune") / "head.safetensors"
    done.parent.mkdir(parents=True)
    done.touch()
    assert training.networks.missing_inputs(STAGES) == []


@pytest.mark.parametrize("arguments", [["--help"], ["extract", "--help"], ["detect", "runs/demo"]])
def test_help_and_mistyped_commands_do_not_wait_for_torch(arguments):
    code = f"""
import sys
from sppnet.cli import main
try:
    main({arguments!r})
finally:
    print(sorted({{"torch", "torchvision", "numpy", "cv2", "numba", "sppnet.commands"}} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == (2 if arguments == ["detect", "runs/demo"] else 0), ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"


def test_every_command_has_its_action():
    choices = set(cli._parser()._subparsers._group_actions[0].choices)
    assert set(commands.ACTIONS) | set(cli.STAGE_COMMANDS) == choices


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"sppnet {__version__}\n"


@pytest.mark.parametrize(
    ("options", "again"),
    [
        (["--from", "finetune"], "finetune svm boxes thresholds"),
        (["--from", "boxes"], "boxes thresholds"),
        (["--only", "svm", "--force"], "svm"),
        (["--from", "maps", "--only", "svm"], "svm"),
        (["--force"], "proposals maps finetune svm boxes thresholds"),
        (["--only", "maps"], ""),
    ],
)
def test_stages_are_done_again_as_asked_and_as_a_dry_run_announces(config, run, options, again):
    before = modified(run.root)
    announced = plan_of(run_command("train", config, "--run", run.root, "--dry-run", *options).out)
    assert [stage for stage, (action, _) in announced.items() if action == "run"] == again.split()
    assert modified(run.root) == before
    assert run_command("train", config, "--run", run.root, *options).status == 0
    after = modified(run.root)
    invalidated = {name.split("-")[0] for name in after if after[name] != before.get(name)}
    assert {stage for stage in STAGES if stage in invalidated} == set(again.split())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_can_be_planned_without_weights_or_network(path, tmp_path, monkeypatch):
    """Before anything is downloaded: a devkit of three tiny images, and a machine that refuses every connection."""
    settings = load_config(path)
    root = tmp_path / "VOCdevkit"
    names = list(settings.data.classes or VOC)
    data = settings.data
    for split in dict.fromkeys([*data.train, *data.val, *data.test, *data.objects_only]):
        year, image_set = split.split("/")
        for stem in (stems := [f"{image_set}_{number}" for number in range(3)]):
            (root / year / "JPEGImages").mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([*f"{year}{stem}".encode()]).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / year / f"JPEGImages/{stem}.jpg")
            boxes = [[5, 5, 40, 40]] * len(names)
            write_annotation(root / year / f"Annotations/{stem}.xml", (48, 64), boxes, names, [False] * len(names))
        (root / year / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / year / f"ImageSets/Main/{image_set}.txt").write_text("\n".join(stems))

    def refuse(*args, **kwargs):
        pytest.fail("a dry run needs no network and no weights")

    for name in ("socket.socket.connect", "urllib.request.urlopen", "sppnet.pipeline.networks.build_backbone"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.chdir(tmp_path)
    result = run_command("train", path, "--set", f"data.root={root}", "--dry-run")
    assert all(line.startswith("missing: data/") for line in result.err.splitlines()), result.err
    assert result.status == bool(result.err)
    assert list(plan_of(result.out)) == list(STAGES)
    assert f"{len(names)} classes" in result.out
    assert [entry.name for entry in tmp_path.iterdir()] == ["VOCdevkit"]


# ---- eval, test, score ---------------------------------------------------------------------------------------------


def test_eval_prints_a_table_and_says_where_the_results_are(run):
    result = run_command("eval", run.root)
    assert result.status == 0, result.err
    metrics = json.loads((run.root / "results/SHAPES-test/metrics.json").read_text())
    assert f"mean      {metrics['map']:.4f}  over 5 of 5 classes, 11point at IoU 0.5" in result.out
    assert "windows: " in result.out
    assert " s an image, without proposals" in result.out
    assert result.out.endswith(f"results in {run.root / 'results/SHAPES-test'}\n")
    again = run_command("eval", run.root, "--metric", "area", "--split", "SHAPES/test")
    assert "area at IoU 0.5" in again.out
    assert "without proposals" not in again.out


def test_eval_on_data_that_moved_needs_only_their_new_place(run, tmp_path):
    devkit = Path(shutil.copytree(run.devkit, tmp_path / "moved"))
    path = run.root / "detector/detector.json"
    description = json.loads(path.read_text())
    description["config"]["data"]["root"] = "nowhere"
    path.write_text(json.dumps(description))
    assert "nowhere: no such data folder; name the one that holds the pictures with --data" in refused("eval", run.root)
    result = run_command("eval", run.root, "--data", devkit, "--split", "SHAPES/val", "SHAPES/test")
    assert result.status == 0, result.err
    assert len(list(run.root.glob("results/moved-*/SHAPES-val+SHAPES-test/metrics.json"))) == 1


def test_test_writes_the_devkits_files_alone(run):
    result = run_command("test", run.root)
    assert result.status == 0, result.err
    assert "over 5 of 5 classes" not in result.out
    assert len(list((run.root / "results/SHAPES-test").iterdir())) == 5
    assert run_command("test", run.root, "--metric", "area").status == 2  # it evaluates nothing


def test_eval_of_another_detector_in_the_same_run_is_refused_until_it_is_complete(run):
    shutil.rmtree(run.root / "detector")
    assert "holds no trained detector" in refused("eval", run.root)
    assert "holds no trained detector" in refused("detect", run.root, run.devkit, "--out", run.root / "out")


def test_score_prints_a_table_or_json(run):
    assert run_command("test", run.root).status == 0
    folder = run.devkit / "SHAPES"
    options = ["--annotations", folder / "Annotations", "--image-set", folder / "ImageSets/Main/test.txt"]
    options += ["--detections", run.root / "results/SHAPES-test/comp4_det_test_{}.txt", "--classes", "star, disc"]
    table = run_command("score", *options).out
    assert [line.split()[0] for line in table.splitlines()] == ["class", "star", "disc", "mean"]
    values = json.loads(run_command("score", *options, "--json").out)
    assert list(values["ap"]) == ["star", "disc"]
    assert values["map"] == pytest.approx(np.mean(list(values["ap"].values())))
    strict = json.loads(run_command("score", *options, "--json", "--iou", "0.9").out)
    assert strict["map"] < values["map"]


def test_score_takes_objects_as_the_devkit_does_whatever_size_is_stated(tmp_path):
    box = "<xmin>11</xmin><ymin>11</ymin><xmax>200</xmax><ymax>60</ymax>"
    found = "<object><name>star</name><bndbox>" + box + "</bndbox></object>"
    (tmp_path / "test.txt").write_text("a\n")
    options = ["--annotations", tmp_path, "--image-set", tmp_path / "test.txt", "--classes", "star", "--json"]
    options += ["--detections", tmp_path / "comp4_{}.txt", "--iou", "0.9"]
    stated = "<size><width>{}</width><height>{}</height></size>"
    for size in ("", *(stated.format(*each) for each in ((100, 80), (80, 200), (20, 6), (0, 0), ("", "")))):
        for detected, expected in ((200, 1), (100, 0)):
            (tmp_path / "comp4_star.txt").write_text(f"a 0.9 11 11 {detected} 60\n")
            (tmp_path / "a.xml").write_text(f"<annotation>{size}{found}</annotation>")
            assert json.loads(run_command("score", *options).out)["map"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["photo 1", "e\u0301 -1", "a.b"])
def test_score_finds_the_images_that_there_are(tmp_path, name):
    write_annotation(tmp_path / "Annotations" / f"{name}.xml", (80, 100), [[10, 10, 90, 60]], ["star"], [False])
    (tmp_path / "Annotations" / f"{name}.xml").rename(tmp_path / "Annotations" / f"{name}.XML")
    (tmp_path / "test.txt").write_text(f"{name}\n")
    (tmp_path / "comp4_star.txt").write_text(f"{name} 0.9 11 11 90 60\n")
    options = ["--annotations", tmp_path / "Annotations", "--image-set", tmp_path / "test.txt", "--classes", "star"]
    result = run_command("score", *options, "--detections", tmp_path / "comp4_{}.txt", "--json")
    assert json.loads(result.out)["map"] == 1, result.err


def test_score_counts_objects_one_pixel_wide_and_names_the_files_of_those_turned_over(tmp_path):
    boxes = ((10, 10, 50, 50), (60, 10, 60, 50), (10, 70, 50, 70), (90, 20, 80, 40))
    corners = (f"<xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>" for a, b, c, d in boxes)
    objects = "".join(f"<object><name>star</name><bndbox>{each}</bndbox></object>" for each in corners)
    (tmp_path / "a.xml").write_text(f"<annotation>{objects}</annotation>")
    (tmp_path / "test.txt").write_text("a\n")
    (tmp_path / "comp4_star.txt").write_text("a 0.9 10 10 50 50\na 0.8 60 10 60 50\n")
    options = ["--annotations", tmp_path, "--image-set", tmp_path / "test.txt", "--classes", "star"]
    result = run_command("score", *options, "--detections", tmp_path / "comp4_{}.txt")
    assert result.out.splitlines()[1].split() == ["star", "0.6364", "3", "2", "0.6667", "1.0000"]
    assert result.err == f"left out: 1 × box with reversed corners in {tmp_path / 'a.xml'}\n"


def test_score_says_what_is_wrong_with_its_files(run, tmp_path):
    folder = run.devkit / "SHAPES"
    base = ["score", "--annotations", folder / "Annotations", "--image-set", folder / "ImageSets/Main/test.txt"]
    file = tmp_path / "comp4_star.txt"
    assert "expected a pattern with {} for the class" in refused(*base, "--detections", file, "--classes", "star")
    pattern = tmp_path / "comp4_{}.txt"
    assert "expected class names separated by commas" in refused(*base, "--detections", pattern, "--classes", ",")
    assert "comp4_star.txt: cannot read this text file" in refused(*base, "--detections", pattern, "--classes", "star")
    file.write_text("test_00000 0.5 1 1 20\n")
    message = refused(*base, "--detections", pattern, "--classes", "star")
    assert "comp4_star.txt:1: expected 'id score xmin ymin xmax ymax'" in message
    file.write_text("test_99999 0.5 1 1 20 20\n")
    message = refused(*base, "--detections", pattern, "--classes", "star")
    assert "test_99999, which has no annotation" in message


# ---- detect --------------------------------------------------------------------------------------------------------


def test_detect_takes_files_folders_and_patterns(run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        shutil.copy(run.devkit / f"SHAPES/JPEGImages/test_0000{number}.jpg", photos / f"{number}.jpg")
    for asked, count in ((photos / "0.jpg", 1), (photos, 3), (photos / "[12].jpg", 2)):
        result = run_command("detect", run.root, asked, "--out", tmp_path / f"out{count}", "--threshold", "-1.5")
        assert result.status == 0, result.err
        entries = json.loads((tmp_path / f"out{count}/detections.json").read_text())
        assert len(entries) == count
        total = sum(len(entry["detections"]) for entry in entries)
        images = "1 image" if count == 1 else f"{count} images"
        expected = f"{total} detections in {images}, threshold -1.50, written to {tmp_path / f'out{count}'}\n"
        assert result.out == expected
        assert len(list((tmp_path / f"out{count}").glob("*.jpg"))) == count
    assert len((tmp_path / "out1/detections.csv").read_text().splitlines()) > 1


def test_detect_shows_scores_from_the_thresholds_of_the_detector_unless_told_otherwise(run, tmp_path):
    description = DetectorDescription.read(run.root)
    lowest = dict(zip(description.classes, description.thresholds, strict=True))
    image = run.devkit / "SHAPES/JPEGImages/test_00000.jpg"
    scores = {}
    for name, options in (("default", []), ("low", ["--threshold", "-1.2"]), ("high", ["--threshold", "1e6"])):
        result = run_command("detect", run.root, image, "--out", tmp_path / name, *options)
        assert result.status == 0
        assert ("nothing scores 1000000.00 or more; a lower --threshold" in result.out) == (name == "high")
        entries = json.loads((tmp_path / name / "detections.json").read_text())
        scores[name] = [found["score"] for found in entries[0]["detections"]]
        if name == "default":
            assert f"thresholds {min(lowest.values()):.2f} to {max(lowest.values()):.2f}, written" in result.out
            assert all(found["score"] >= lowest[found["class"]] - 1e-6 for found in entries[0]["detections"])
    assert scores["high"] == []
    assert len(scores["low"]) > len(scores["default"])
    assert min(scores["low"]) >= -1.2


def test_detect_skips_what_it_cannot_read_and_ends_with_status_1(run, tmp_path):
    image = run.devkit / "SHAPES/JPEGImages/test_00000.jpg"
    (tmp_path / "half.jpg").write_bytes(image.read_bytes()[:3000])
    result = run_command("detect", run.root, tmp_path / "half.jpg", image, "--out", tmp_path / "out")
    assert result.status == 1
    assert "detections in 1 image," in result.out
    assert f"skipped: {tmp_path / 'half.jpg'}: expected a complete image" in result.err
    assert "Traceback" not in result.err
    assert len(json.loads((tmp_path / "out/detections.json").read_text())) == 1


# ---- all commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "cuda0", ""])
def test_a_device_that_is_none_is_refused(config, run, tmp_path, device):
    assert "expected cpu, cuda or cuda:N" in refused("train", config, "--run", tmp_path / "new", "--device", device)
    assert "expected cpu, cuda or cuda:N" in refused("eval", run.root, "--device", device)
    assert not (tmp_path / "new").exists()


def test_a_device_that_is_not_there_is_refused(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "expected cpu, cuda or cuda:N, of 0 GPUs" in refused("eval", run.root, "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "of 2 GPUs that torch sees here, got 'cuda:2'" in refused("eval", run.root, "--device", "cuda:2")


def test_ctrl_c_is_no_error_but_an_interruption(config, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sppnet.pipeline.training.propose_images", interrupt)
    result = run_command("train", config, "--run", tmp_path / "run")
    assert result.status == 130
    assert "the same command goes on from there" in result.err
    assert "Traceback" not in result.err


INTERRUPTED = """
import os, sys
from sppnet import cli
from sppnet.pipeline import prediction

read_image = prediction.read_image

def read(path):
    if path.name == "test_00002.jpg":
        os.kill(os.getpid(), int(sys.argv[1]))
    return read_image(path)

prediction.read_image = read
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_ends_detect_leaves_the_lists_of_what_is_done(run, tmp_path, number, status):
    words = ["detect", run.root, run.devkit / "SHAPES/JPEGImages/test*", "--out", tmp_path / "out"]
    command = [sys.executable, "-c", INTERRUPTED, str(int(number)), *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == status, ended.stderr
    assert "interrupted; what is complete is kept, the same command starts again" in ended.stderr
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert [entry["picture"] for entry in entries] == ["test_00000.jpg", "test_00001.jpg"]


def test_a_signal_that_nohup_ignores_stays_ignored(run, tmp_path, monkeypatch):
    def read(path):
        os.kill(os.getpid(), signal.SIGHUP)
        return read_image(path)

    monkeypatch.setattr("sppnet.pipeline.prediction.read_image", read)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = run_command("detect", run.root, run.devkit / "SHAPES/JPEGImages/test_00000.jpg", "--out", tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.status == 0, result.err


def test_verbose_gives_the_traceback_of_an_error_and_the_same_exit_status(tmp_path):
    result = run_command("train", tmp_path / "none.yaml", "--verbose")
    assert result.status == 2
    assert "Traceback (most recent call last)" in result.err
    assert "cannot read the configuration" in result.err.splitlines()[-1]


def test_a_mistake_in_the_software_is_not_dressed_up_as_bad_input(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sppnet.pipeline.training.propose_images", lambda *a: {}["key"])
    with pytest.raises(KeyError):
        run_command("train", config, "--run", tmp_path / "run")


def test_unknown_commands_and_options_are_refused_by_the_parser(config):
    for arguments in (["trian"], ["train"], ["train", config, "--form", "svm"], ["train", config, "--from", "svn"]):
        result = run_command(*arguments)
        assert result.status == 2
        assert result.err.startswith("usage: sppnet")


def test_every_command_explains_itself():
    listed = run_command("--help").out
    for command in ("train", *cli.STAGE_COMMANDS, "eval", "test", "detect", "score", "demo"):
        assert re.search(rf"\n    {command}\s", listed)
        assert run_command(command, "--help").status == 0


def test_the_demo_runs_every_stage_and_shows_what_it_found(tmp_path, monkeypatch):
    """The demonstration itself in small: the same stages on a few pictures."""
    from sppnet import commands
    from sppnet.data import shapes

    changes = {"maps.scales": [96], "head": {"fc6": 16, "fc7": 16}, "pyramid": {"levels": [1, 2]},
               "finetune.steps": [4], "finetune.learning_rates": [0.01],
               "proposals": {"max_side": 64, "workers": 1}}  # fmt: skip
    classifier = {"head": {"fc6": 16, "fc7": 16}, "pyramid": {"levels": [1, 2]},
                  "training": {"sizes": [32, 48], "min_side": 48, "batch": 8, "epochs": 2}}  # fmt: skip
    monkeypatch.setattr(commands, "DEMO", merged(commands.DEMO, changes))
    monkeypatch.setattr(commands, "DEMO_CLASSIFIER", {**commands.DEMO_CLASSIFIER, **classifier})
    few = {"train": 3, "val": 1, "test": 2}
    monkeypatch.setattr(commands, "generate_shapes", lambda root: shapes.generate_shapes(root, few))
    result = run_command("demo", "--run", tmp_path / "demo", "--device", "cpu")
    assert result.status == 0, result.err
    assert "on 2 test images" in result.out
    assert (tmp_path / "demo/results/SHAPES-test/precision_recall.png").is_file()
    assert len(list((tmp_path / "demo/pictures").glob("*.jpg"))) == 2
    assert load_config(tmp_path / "demo/config.yaml").name == "demo"
    again = run_command("demo", "--run", tmp_path / "demo", "--device", "cpu")
    assert again.status == 0
    assert "2 of 2 epochs reused" in again.err
    assert len(re.findall(r"(finetune|svm): reused", again.err)) == 2
    assert len([*(tmp_path / "demo/crops").glob("crops-*")]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("detect", "RUN", "a.jpg", "--out", "x", "--treshold", "1"),
            "; --treshold is an unknown option, did you mean --threshold?",
        ),
        (
            ("detect", "RUN", "a.jpg", "--treshold=1"),
            "required: --out; --treshold is an unknown option, did you mean --threshold?",
        ),
        (("train", "--dryrun"), "required: CONFIG|FOLDER; --dryrun is an unknown option, did you mean --dry-run?"),
        (("train", "c.yaml", "--forze"), "--forze; --forze is an unknown option, did you mean --force?"),
        (("eval", "RUN", "--zzzzzzzzzzzz"), "--zzzzzzzzzzzz; --zzzzzzzzzzzz is an unknown option"),
        (("eval", "RUN", "another"), "unrecognized arguments: another"),
        (("eval", "--split"), "argument --split: expected at least one argument"),
        (
            ("eval", "RUN", "--met", "other"),
            "invalid choice: 'other' (choose from '11point', 'area', 'ilsvrc', 'coco')",
        ),
    ],
)
def test_a_mistyped_option_is_answered_with_the_commands_usage_and_the_nearest_one(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: sppnet {arguments[0]} [-h]")
    assert error.endswith(f"{said}\n")


def test_an_option_of_a_command_that_stands_before_it_is_sent_behind_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(("--verbose", "eval", "RUN"))
    assert capsys.readouterr().err.endswith("unrecognized arguments: --verbose; write --verbose after eval\n")
    with pytest.raises(SystemExit):
        cli.main(("--versoin",))
    assert capsys.readouterr().err.endswith("; --versoin is an unknown option, did you mean --version?\n")
    with pytest.raises(SystemExit):
        cli.main(("tran", "photos"))
    assert capsys.readouterr().err.endswith("; did you mean train?\n")


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise_which_torch_reads_once(given, expected):
    code = """
import os, sys
from sppnet.cli import main
class Probe:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Probe())
main(["eval", "no such run"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{expected}\n", done.stderr


# ---- options, names and streams of any kind ------------------------------------------------------------------------


def last_line(*words: object) -> str:
    """Of what a refused command says."""
    result = run_command(*words)
    assert result.status == 2
    return result.err.strip().splitlines()[-1]


@pytest.mark.parametrize("number", ["-1e-3", "-.5", "-1_0", "-inf", "-2", "+1", "1E2", "-0.25e+1"])
def test_every_number_that_python_reads_is_understood(number):
    for words in (["--threshold", number], [f"--threshold={number}"]):
        assert "no-run: no such folder" in last_line("detect", "no-run", "no.png", "--out", "no-out", *words)


SCORE = ("score", "--annotations", "a", "--image-set", "b", "--detections", "c_{}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("detect", "r", "i", "--out", "o", "--threshold", "nan"), "argument --threshold: expected a score, e.g. -0.5"),
        (("detect", "r", "i", "--out", "o", "--threshold", "inf"), "argument --threshold: expected a score"),
        (("detect", "r", "i", "--out", "o", "--threshold", "high"), "argument --threshold: expected a score"),
        ((*SCORE, "--classes", "a", "--iou", "50"), "argument --iou: expected an overlap above 0 and at most 1"),
        ((*SCORE, "--classes", "a", "--iou", "nan"), "argument --iou: expected an overlap"),
        ((*SCORE, "--classes", "a", "--iou", "-1e-3"), "argument --iou: expected an overlap"),
        ((*SCORE, "--classes", "a", "--iou", "0"), "argument --iou: expected an overlap"),
        ((*SCORE, "--classes", "a,,b"), "argument --classes: expected class names separated by commas, all different"),
        ((*SCORE, "--classes", "a, a"), "argument --classes: expected class names separated by commas, all different"),
        ((*SCORE, "--classes", "a", "--metric", "mean"), "argument --metric: invalid choice: 'mean'"),
        (("detect", "r", "i", "--out", "o", "--device", "cuda:" + "9" * 30), "expected cpu, cuda or cuda:N"),
    ],
)  # fmt: skip
def test_options_are_checked_as_their_settings_are(words, message):
    assert message in last_line(*words)


WORDS = ["--threshold", "--iou", "--classes", "--out", "--device", "-1", "nan", "", "é\udce9", "a=b"]


@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_any_words_end_with_status_2_and_a_message(words):
    result = run_command("detect", "no such run", "no such image", "--out", "no such folder/out", *words)
    assert result.status == 2
    assert "error: " in result.err


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(run):
    command = [sys.executable, "-m", "sppnet", "train", run.root / "config.yaml", "--run", run.root, "--dry-run"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


def test_a_table_is_printed_where_the_terminal_lacks_the_letters(tmp_path):
    write_annotation(tmp_path / "a.xml", (100, 100), [[10, 10, 50, 50]], ["кот"], [False])
    (tmp_path / "set.txt").write_text("a\n")
    (tmp_path / "det_кот.txt").write_text("a 0.9 11 11 50 50\n")
    words = ["--annotations", ".", "--image-set", "set.txt", "--detections", "det_{}.txt", "--classes", "кот"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "sppnet", "score", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines()[1].split()[:2] == [r"\u043a\u043e\u0442", "1.0000"]


def test_detect_says_what_it_passed_over(run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(run.devkit / "SHAPES/JPEGImages/test_00000.jpg", photos / "a.jpg")
    (photos / "clip.mov").touch()
    for out, note in (
        ("b", "passed over: 1 .mov"),
        ("c", "not searched: a picture that detections are drawn on"),
    ):
        result = run_command("detect", run.root, photos, "--out", photos / out, "--threshold", "-inf")
        assert result.status == 0
        assert note in result.out


def test_the_advice_about_the_threshold_helps_below_the_setting_too(run, tmp_path):
    image = run.devkit / "SHAPES/JPEGImages/test_00000.jpg"
    path = run.root / "detector" / "detector.json"
    values = json.loads(path.read_text())
    values["config"]["detect"]["score_threshold"] = 1e6
    path.write_text(json.dumps(values))
    result = run_command("detect", run.root, image, "--out", tmp_path / "out", "--threshold", "-1.5")
    assert "nothing scores above" not in result.out
    assert json.loads((tmp_path / "out/detections.json").read_text())[0]["detections"]


@pytest.mark.parametrize("lowest", ["-INF", "-Infinity", "-inf", "-1E9"])
def test_a_threshold_may_be_any_negative_number(lowest):
    options = cli._options(["detect", "run", "a.jpg", "--out", "o", "--threshold", lowest])
    assert options.threshold == float(lowest)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_score_finds_files_as_a_shell_and_macos_name_them(tmp_path, monkeypatch, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.xml").write_text(xml_of(thing("é", 1, 1, 50, 50)))
    (tmp_path / "test.txt").write_text("a\n")
    (tmp_path / f"c_{unicodedata.normalize(form, 'é')}.txt").write_text("a 0.9 1 1 50 50\n")
    options = ["score", "--annotations", tmp_path, "--image-set", tmp_path / "test.txt", "--detections", "~/c_{}.txt"]
    for typed in ("NFC", "NFD"):
        result = run_command(*options, "--classes", unicodedata.normalize(typed, "é"), "--json")
        assert json.loads(result.out)["map"] == 1


def test_a_folder_is_converted_and_what_cannot_be_is_said(small_run, tmp_path):
    result = run_command(
        "convert", small_run.devkit, "--to", "yolo", "--out", tmp_path / "yolo", "--split", "SHAPES/val"
    )
    assert result.status == 0
    assert result.out.startswith("VOC to YOLO: 3 images (val 3) of ")
    again = run_command("convert", small_run.devkit, "--to", "yolo", "--out", tmp_path / "yolo")
    assert (again.status, "expected a new or an empty folder" in again.err) == (2, True)


def test_a_folder_that_is_not_there_is_no_configuration(tmp_path):
    message = refused("train", tmp_path / "nosuch", "--run", tmp_path / "run")
    assert "nosuch: no such folder; name one of labelled pictures, or a .yaml configuration" in message
