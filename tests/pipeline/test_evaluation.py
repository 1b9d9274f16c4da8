"""Detecting over a split: files of the devkit, figures, resumption, and other people's folders."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import copied, run_command, write_windows

from sppnet.backbones import backbone as backbones
from sppnet.data.comp4 import read_comp4
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.errors import BackboneError, ImageError, SppnetError
from sppnet.evaluation.errors import find_errors
from sppnet.pipeline import evaluation
from sppnet.pipeline.evaluation import RunEvaluation, detect_split, evaluate_run
from sppnet.pipeline.run_data import load_run_data, load_test_data
from sppnet.report.drawing import contact_sheet

CLASSES = ("cross", "disc", "square", "star", "triangle")


@pytest.fixture
def run(small_run, tmp_path):
    return copied(small_run, tmp_path / "run")


@pytest.fixture
def detector(run):
    return SPPDetector.load(run.root)


def other_devkit(run, folder: Path, year: str = "OTHER", split: str = "all", stem: str = "photo_{}") -> Path:
    """The test images under other names, in a devkit of their own with a two-column image set."""
    source, target = run.devkit / "SHAPES", folder / "VOCdevkit" / year
    for kind in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (target / kind).mkdir(parents=True)
    for number in range(4):
        shutil.copy(source / f"JPEGImages/test_0000{number}.jpg", target / f"JPEGImages/{stem.format(number)}.jpg")
        shutil.copy(source / f"Annotations/test_0000{number}.xml", target / f"Annotations/{stem.format(number)}.xml")
    flags = ("1", "-1", "0", "1")
    lines = [f"{stem.format(number)} {flag:>2}\n" for number, flag in enumerate(flags)]
    (target / f"ImageSets/Main/{split}.txt").write_text("".join(lines))
    return folder / "VOCdevkit"


def unimported(detector: SPPDetector, file: Path) -> SPPDetector:
    """The same detector with windows of other images to import."""
    proposals = detector.config.proposals.model_copy(update={"import_from": (file,)})
    return replace(detector, config=detector.config.model_copy(update={"proposals": proposals}))


def at_home(detector: SPPDetector, devkit: Path, file: Path) -> SPPDetector:
    """The same detector with `devkit` as its own data and windows of these images to import."""
    config = unimported(detector, file).config
    return replace(detector, config=config.model_copy(update={"data": config.data.model_copy(update={"root": devkit})}))


def evaluate(detector, root, data=None, splits=(), **options) -> RunEvaluation:
    """Evaluate the run with this detector in it."""
    detector.save(root / "detector")
    return evaluate_run(root, "cpu", data, splits, **options)


def score(folder: Path, devkit: Path, split: str, name: str, *more: str) -> dict:
    year, image_set = split.split("/")
    files = ["--annotations", devkit / year / "Annotations"]
    files += ["--image-set", devkit / year / f"ImageSets/Main/{image_set}.txt"]
    pattern = folder / f"comp4_det_{name}_{{}}.txt"
    result = run_command("score", *files, "--detections", pattern, "--classes", ",".join(CLASSES), "--json", *more)
    assert result.status == 0, result.err
    return json.loads(result.out)


# ---- the files -----------------------------------------------------------------------------------------------------


def test_a_test_leaves_metrics_curves_pictures_and_the_devkits_files(run, detector):
    output = evaluate(detector, run.root)
    assert output.folder == run.root / "results/SHAPES-test"
    names = {path.name for path in output.folder.iterdir()}
    comp4 = {f"comp4_det_test_{name}.txt" for name in CLASSES}
    assert names == comp4 | {"metrics.json", "curves.json", "precision_recall.png", "examples.jpg"}
    metrics = json.loads((output.folder / "metrics.json").read_text())
    assert metrics["map"] == output.result.evaluation.map
    assert metrics["ap"] == output.result.evaluation.ap
    assert (metrics["metric"], metrics["iou"], metrics["images"]) == ("11point", 0.5, 4)
    assert (metrics["data"], metrics["splits"]) == (str(run.devkit), ["SHAPES/test"])
    assert metrics["seconds_per_image"] > 0
    assert 0 < metrics["proposals"]["recall"] <= 1
    curves = json.loads((output.folder / "curves.json").read_text())
    assert set(curves) == set(CLASSES)
    assert all(path.stat().st_size > 5000 for path in output.folder.glob("*.[pj][np]g"))


def test_scoring_the_written_files_gives_the_same_figures(run, detector):
    output = evaluate(detector, run.root)
    metrics = json.loads((output.folder / "metrics.json").read_text())
    found = score(output.folder, run.devkit, "SHAPES/test", "test")
    assert found["map"] == pytest.approx(metrics["map"], abs=1e-12)
    assert found["ap"] == pytest.approx(metrics["ap"], abs=1e-12)
    assert metrics["map"] > 0


def test_the_written_files_hold_the_detections_themselves(run, detector):
    output = evaluate(detector, run.root)
    stems, scores, boxes = read_comp4(output.folder / "comp4_det_test_star.txt")
    star = CLASSES.index("star")
    found = {image.split("/")[1]: d for image, d in output.result.detections.items()}
    expected = [(stem, d.scores[d.labels == star], d.boxes[d.labels == star]) for stem, d in found.items()]
    assert stems == [stem for stem, own, _ in expected for _ in own]
    np.testing.assert_allclose(scores, np.concatenate([own for _, own, _ in expected]), atol=1e-8)
    np.testing.assert_allclose(boxes, np.concatenate([own for _, _, own in expected]), atol=1e-4)


def test_the_area_rule_is_taken_where_it_is_asked_for(run, detector):
    eleven = evaluate(detector, run.root).result
    area = evaluate(detector, run.root, metric="area").result
    assert (eleven.evaluation.metric, area.evaluation.metric) == ("11point", "area")
    assert eleven.evaluation.map != area.evaluation.map
    assert area.seconds_per_image is None  # nothing was detected again


def test_the_errors_by_kind_are_printed_and_kept(run, detector):
    thresholds = tuple(np.linspace(-0.5, 0.5, len(CLASSES)))
    output = evaluate(replace(detector, thresholds=thresholds), run.root)
    result, errors = output.result, output.result.errors
    truth = {r.id: r.annotation for r in load_test_data(detector.config).records}
    searched = find_errors(result.detections, truth, CLASSES, None, thresholds)
    missed = [sum(errors.counts[kind].values()) for kind in ("missed by proposals", "missed by score")]
    assert sum(missed) == sum(searched.counts["missed by score"].values())
    assert 0 < missed[0] < sum(missed)  # a detector of seconds
    assert errors.counts["background"] == searched.counts["background"]
    assert result.thresholds == pytest.approx(thresholds)
    kept = json.loads((output.folder / "metrics.json").read_text())["errors"]
    assert kept == {**vars(errors), "counts": errors.counts, "map_lost": errors.map_lost}
    assert errors.table() in run_command("eval", run.root).out


def test_the_examples_show_what_detect_would_show(run, detector, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "contact_sheet", lambda pictures: seen.extend(pictures) or contact_sheet(pictures))
    thresholds = (9.0, -9.0, 0.3, -0.2, -9.0)
    result = evaluate(replace(detector, thresholds=thresholds), run.root).result
    assert [len(p.detections) for p in seen] == [len(own.above(thresholds)) for own in result.detections.values()]
    assert 0 < sum(len(p.detections) for p in seen) < sum(map(len, result.detections.values()))


def test_cocos_figures_are_printed_kept_and_those_of_the_written_files(run, detector):
    detector.save(run.root / "detector")
    said = run_command("eval", run.root, "--metric", "coco")
    assert said.status == 0
    folder = run.root / "results/SHAPES-test"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["metric"] == "coco"
    assert metrics["map"] == metrics["mean"]["AP"] > 0
    assert metrics["errors"]["metric"] == "area"
    assert f"mean      {metrics['map']:.4f}" in said.out
    assert "Average Precision" not in said.out + said.err
    assert all(path.stat().st_size > 5000 for path in folder.glob("*.[pj][np]g"))
    found = score(folder, run.devkit, "SHAPES/test", "test", "--metric", "coco")
    assert found["measures"].keys() == set(CLASSES)
    assert found["map"] == pytest.approx(metrics["map"], abs=1e-9)


def test_figures_of_earlier_detections_do_not_stay_beside_new_ones(run, detector):
    evaluate(detector, run.root)
    fewer = detector.config.model_copy(
        update={"detect": detector.config.detect.model_copy(update={"nms_overlap": 0.1})}
    )
    output = evaluate(replace(detector, config=fewer), run.root, evaluate=False)
    assert {path.name for path in output.folder.iterdir()} == {f"comp4_det_test_{name}.txt" for name in CLASSES}


def test_figures_of_the_same_detections_stay_where_these_are_written_again(run, detector):
    before = evaluate(detector, run.root)
    kept = {path.name: path.read_bytes() for path in before.folder.iterdir()}
    evaluate(detector, run.root, evaluate=False)
    assert {path.name: path.read_bytes() for path in before.folder.iterdir()} == kept
    (before.folder / "curves.json").unlink()  # what is not whole goes
    evaluate(detector, run.root, evaluate=False)
    assert {path.name for path in before.folder.iterdir()} == {f"comp4_det_test_{name}.txt" for name in CLASSES}


def test_another_folder_gets_results_and_windows_of_its_own(run, detector, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    devkit = Path(shutil.copytree(run.devkit, tmp_path / "moved"))
    own = evaluate(detector, run.root, run.devkit, ("SHAPES/val",))
    other = evaluate(detector, run.root, devkit, ("SHAPES/val",))
    assert own.folder == run.root / "results/SHAPES-val"
    assert other.folder.parent.name.startswith("moved-")
    assert other.folder.name == own.folder.name
    assert "import_from belongs to" in caplog.text
    assert other.result.proposals.best_overlaps.tolist() != own.result.proposals.best_overlaps.tolist()  # searched


def test_without_evaluation_there_are_only_the_devkits_files(run, detector):
    output = evaluate(detector, run.root, evaluate=False)
    assert output.result.evaluation is None
    assert {path.name for path in output.folder.iterdir()} == {f"comp4_det_test_{name}.txt" for name in CLASSES}


# ---- other splits and folders --------------------------------------------------------------------------------------


def test_another_devkit_is_tested_by_its_own_split_and_two_column_image_set(run, detector, tmp_path):
    own = evaluate(detector, run.root).result.evaluation
    devkit = other_devkit(run, tmp_path / "other")
    file = write_windows(devkit, tmp_path / "other.npz", ("OTHER/all",))
    output = evaluate(at_home(detector, devkit, file), run.root, devkit, ("OTHER/all",))
    assert output.folder.name == "OTHER-all"
    assert len(output.result.detections) == 4
    assert output.result.evaluation.to_dict()["objects"] == own.to_dict()["objects"]
    metrics = json.loads((output.folder / "metrics.json").read_text())
    assert (metrics["data"], metrics["splits"]) == (str(devkit), ["OTHER/all"])
    found = score(output.folder, devkit, "OTHER/all", "all")
    assert found["map"] == pytest.approx(metrics["map"], abs=1e-12)


def test_a_split_without_annotations_is_detected_but_not_evaluated(run, detector, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    devkit = other_devkit(run, tmp_path / "other")
    shutil.rmtree(devkit / "OTHER/Annotations")
    file = write_windows(devkit, tmp_path / "other.npz", ("OTHER/all",))
    own = at_home(detector, devkit, file)
    with pytest.raises(SppnetError, match=r"no image has an annotation, e\.g\. OTHER/photo_0; .* `sppnet test`"):
        evaluate(own, run.root, devkit, ("OTHER/all",))
    assert not list(run.root.glob("detections-*"))
    output = evaluate(own, run.root, devkit, ("OTHER/all",), evaluate=False)
    assert output.result.evaluation is None
    assert "4 × image without annotation, not evaluated" in caplog.text
    assert {path.name for path in output.folder.iterdir()} == {f"comp4_det_all_{name}.txt" for name in CLASSES}
    assert (output.folder / "comp4_det_all_star.txt").stat().st_size > 0


def test_of_a_split_annotated_in_part_that_part_is_evaluated(run, detector, tmp_path):
    devkit = other_devkit(run, tmp_path / "other")
    (devkit / "OTHER/Annotations/photo_1.xml").unlink()
    file = write_windows(devkit, tmp_path / "other.npz", ("OTHER/all",))
    result = evaluate(at_home(detector, devkit, file), run.root, devkit, ("OTHER/all",)).result
    assert len(result.detections) == 4
    whole = evaluate(detector, run.root).result.evaluation
    assert 0 < sum(result.evaluation.to_dict()["objects"].values()) < sum(whole.to_dict()["objects"].values())


def test_several_splits_are_one_result(run, detector):
    output = evaluate(detector, run.root, splits=("SHAPES/val", "SHAPES/test"))
    assert output.folder.name == "SHAPES-val+SHAPES-test"
    assert len(output.result.detections) == 7
    assert (output.folder / "comp4_det_val+test_star.txt").is_file()


def test_images_of_two_years_with_one_name_get_a_folder_per_year(run, detector, tmp_path):
    devkit = other_devkit(run, tmp_path / "other", "A-1", "test", "{}")
    shutil.copytree(devkit / "A-1", devkit / "B")
    file = write_windows(devkit, tmp_path / "other.npz", ("A-1/test", "B/test"))
    output = evaluate(at_home(detector, devkit, file), run.root, devkit, ("A-1/test", "B/test"))
    assert output.folder.name == "A-1-test+B-test"
    assert output.result.evaluation is not None
    assert (output.folder / "metrics.json").is_file()
    for year in ("A-1", "B"):
        stems, _, _ = read_comp4(output.folder / year / "comp4_det_test_star.txt")
        assert set(stems) <= {"0", "1", "2", "3"}
        assert stems


def test_the_held_out_images_are_tested_where_no_split_is_named(run, detector, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    data = detector.config.data.model_copy(update={"val": (), "test": ()})
    held_out = replace(detector, config=detector.config.model_copy(update={"data": data}))
    load_run_data(held_out.config).split.write(run.root / "detector")
    output = evaluate(held_out, run.root)
    assert output.folder.name == "held-out"
    assert len(output.result.detections) == 2  # a fifth of eight
    assert "but they chose the fine-tuned network and the thresholds: 2 of 2 images, e.g. SHAPES/" in caplog.text
    assert (output.folder / "comp4_det_held-out_star.txt").is_file()
    assert json.loads((output.folder / "metrics.json").read_text())["splits"] == ["held-out"]


def test_training_images_among_those_evaluated_are_counted_in_the_metrics(run, detector, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    output = evaluate(detector, run.root, splits=("SHAPES/train",))
    assert "trained on: 8 of 8 images, e.g. SHAPES/train_00000" in caplog.text
    assert json.loads((output.folder / "metrics.json").read_text())["training_images"] == 8
    caplog.clear()
    for splits, validation in (((), 0), (("SHAPES/val",), 3), (("SHAPES/test", "SHAPES/val"), 3)):
        output = evaluate(detector, run.root, splits=splits)
        metrics = json.loads((output.folder / "metrics.json").read_text())
        assert (metrics["training_images"], metrics["validation_images"]) == (0, validation)
        assert ("images, e.g. SHAPES/val_00000; figures look a little too good" in caplog.text) == bool(validation)


def test_a_detector_outlives_the_files_of_its_training_windows(run, detector, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    lost = unimported(detector, tmp_path / "gone.npz")
    result = evaluate(lost, run.root, splits=("SHAPES/val",)).result
    assert "gone; images whose windows they held are searched" in caplog.text
    assert result.proposals.recall > 0.5


def test_missing_data_and_splits_are_named(run, detector, tmp_path):
    with pytest.raises(SppnetError, match=r"none: no such data folder; name the one .* with --data"):
        evaluate(detector, run.root, tmp_path / "none")
    with pytest.raises(SppnetError, match=r"no part 'SHAPES/tset' in these VOC data; parts here: SHAPES/test"):
        evaluate(detector, run.root, splits=("SHAPES/tset",))


# ---- resumption ----------------------------------------------------------------------------------------------------


def test_an_interrupted_test_goes_on_where_it_stopped(run, detector, monkeypatch):
    expected = evaluate(detector, run.root).result.evaluation.ap
    folder = next(run.root.glob("detections-*"))
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    assert len(files) == 4
    removed = sorted(files)[2]
    removed.unlink()
    result = evaluate(detector, run.root).result
    assert result.evaluation.ap == expected
    assert result.seconds_per_image is not None
    assert {path for path, time in files.items() if path.stat().st_mtime_ns != time} == {removed}


def test_another_detector_does_not_take_over_what_was_detected(run, detector):
    evaluate(detector, run.root)
    other = replace(detector, regressors=None)
    assert evaluate(other, run.root).result.seconds_per_image is not None
    assert len(list(run.root.glob("detections-*"))) == 2


def test_a_damaged_image_stops_the_test_with_its_name_and_keeps_the_rest(run, detector, tmp_path):
    devkit = other_devkit(run, tmp_path / "other")
    path = devkit / "OTHER/JPEGImages/photo_2.jpg"
    path.write_bytes(path.read_bytes()[:3000])
    file = write_windows(devkit, tmp_path / "other.npz", ("OTHER/all",))
    with pytest.raises(ImageError, match=r"photo_2\.jpg: expected a complete image"):
        evaluate(at_home(detector, devkit, file), run.root, devkit, ("OTHER/all",))
    assert len(list(run.root.glob("detections-*/OTHER/photo_*"))) == 2
    assert not (run.root / "results").exists()


def test_an_image_too_narrow_for_the_network_is_named(run, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "map_side", lambda steps, side: 0)
    message = r"test_00000\.jpg: an image of \d+ × \d+ pixels has no map: .*; 3 more: SHAPES/test_00001, "
    with pytest.raises(BackboneError, match=message):
        evaluate(unimported(detector, tmp_path / "gone.npz"), run.root)
    assert len(list(run.root.glob("proposals-*"))) == 1  # those of training: nothing was searched


@pytest.mark.parametrize("limit", [1, 2])
def test_an_evaluation_says_that_the_maximum_per_class_left_some_out(run, detector, caplog, limit):
    caplog.set_level(logging.INFO, "sppnet")
    description = DetectorDescription.read(run.root)
    detect_split(run.root, description, load_test_data(detector.config).records)
    assert "max_per_class" not in caplog.text
    settings = detector.config.detect.model_copy(update={"max_per_class": limit})
    config = detector.config.model_copy(update={"detect": settings})
    records = load_test_data(config).records
    for _ in range(2):  # what was kept by the first says so too
        caplog.clear()
        found = detect_split(run.root, replace(description, config=config), records).detections
        assert f"detect.max_per_class={limit} left out detections of " in caplog.text
        assert "images, SHAPES/test_0000" in caplog.text
    assert max(np.bincount(each.labels).max() for each in found.values() if len(each)) == limit


def test_no_images_give_no_detections_and_no_figures(run):
    result = detect_split(run.root, DetectorDescription.read(run.root), [])
    assert (dict(result.detections), result.evaluation, result.seconds_per_image) == ({}, None, None)


def test_images_without_windows_are_tested_too(run, detector, tmp_path):
    with np.load(run.config.proposals.import_from[0]) as archive:
        ids = archive["ids"]
    np.savez(tmp_path / "none.npz", ids=ids, offsets=np.zeros(len(ids) + 1, np.int64), boxes=np.zeros((0, 4), "i2"))
    result = evaluate(unimported(detector, tmp_path / "none.npz"), run.root).result
    assert all(len(found) == 0 for found in result.detections.values())
    assert result.evaluation.map == 0
    assert result.proposals.recall == 0


def test_folders_are_named_by_text_or_path_and_one_split_by_its_name(run):
    output = evaluate_run(str(run.root), data=str(run.devkit), splits="SHAPES/val")
    assert output.folder == run.root / "results/SHAPES-val"
    assert len(output.result.detections) == 3


def one_image_sets(run, folder: Path, names: list[str], year: str) -> Path:
    """Another devkit with a split of one image for each name."""
    devkit = other_devkit(run, folder, year)
    for number, name in enumerate(names):
        (devkit / year / f"ImageSets/Main/{name}.txt").write_text(f"photo_{number}\n")
    return devkit


@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_folder_of_many_splits_has_a_name_that_can_be(run, detector, tmp_path, letter):
    names, year = [f"{i}{letter * (40 // len(letter.encode()))}" for i in range(4)], "y" * 40
    devkit = one_image_sets(run, tmp_path / ("d" * 250), names, year).rename(tmp_path / ("d" * 255))
    evaluated = [evaluate(detector, run.root, devkit, [f"{year}/{n}" for n in names[:count]]) for count in (4, 3, 1)]
    assert len({output.folder for output in evaluated}) == 3
    assert (evaluated[0].folder / f"comp4_det_{'+'.join(names)}_star.txt").is_file()
    assert evaluated[2].folder.name == f"{year}-{names[0]}"


@pytest.mark.parametrize("count", [1, 4])
def test_a_comp4_name_that_cannot_be_is_refused_before_anything_is_detected(run, detector, tmp_path, count):
    names = [f"{i}" + "x" * (240 // count - 2) for i in range(count)]
    devkit, before = one_image_sets(run, tmp_path, names, "OTHER"), sorted(run.root.rglob("*"))
    with pytest.raises(SppnetError, match=r"comp4 file of class 'triangle' would have a name of more than 255 bytes"):
        evaluate(detector, run.root, devkit, [f"OTHER/{name}" for name in names])
    assert sorted(run.root.rglob("*")) == before
