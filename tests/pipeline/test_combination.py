"""Runs combined into one: evaluated, tested, detected with, and what cannot be combined."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from own_networks import SmallResidual
from small_run import SmallRun, modified, refused, run_command, small_config, train_another

from sppnet import jobs
from sppnet.data.splits import load_splits
from sppnet.detection.combination import combine_detectors
from sppnet.detection.detector import SPPDetector
from sppnet.errors import SppnetError
from sppnet.images import read_image
from sppnet.pipeline.combination import combine_runs
from sppnet.pipeline.evaluation import evaluate_run
from sppnet.pipeline.prediction import detect_files
from sppnet.pipeline.run_data import Split
from sppnet.pipeline.stages import windows_folder
from sppnet.pipeline.training import train_detector
from sppnet.proposals.search import read_windows, unite_windows


@pytest.fixture(scope="module")
def another(small_run, tmp_path_factory) -> SmallRun:
    return train_another(small_run, tmp_path_factory.mktemp("another"))


@pytest.fixture
def both(small_run, another, tmp_path) -> Path:
    combine_runs([small_run.root, another.root], tmp_path / "both")
    return tmp_path / "both"


def settings_changed(run: Path, target: Path, split: Split | None = None, **data: object) -> Path:
    """The detector of a run under other settings of its data, as a run of its own."""
    own = SPPDetector.load(run)
    config = own.config.model_copy(update={"data": own.config.data.model_copy(update=data)})
    # another threshold too: the same detector is not combined with itself
    detect = config.detect.model_copy(update={"score_threshold": -1.0 - len(str(target)) / 1000})
    replace(own, config=config.model_copy(update={"detect": detect})).save(target / "detector")
    (split or Split.read(run / "detector") or Split({}, {}, {})).write(target / "detector")
    return target


# ---- what a combined run does --------------------------------------------------------------------------------------


def test_the_command_makes_a_run_that_needs_the_others_no_more(small_run, another, tmp_path):
    one, two = (Path(shutil.copytree(run.root, tmp_path / name)) for run, name in ((small_run, "a"), (another, "b")))
    result = run_command("combine", one, two, "--out", tmp_path / "both")
    assert result.status == 0, result.err
    out = tmp_path / "both"
    assert result.out == f"2 detectors combined in {out / 'detector'}; next: sppnet eval {out}\n"
    shutil.rmtree(one)
    shutil.rmtree(two)
    assert run_command("eval", out).status == 0
    assert json.loads((out / "results/SHAPES-test/metrics.json").read_text())["images"] == 4
    assert run_command("test", out).status == 0
    picture = small_run.devkit / "SHAPES/JPEGImages/test_00000.jpg"
    found = run_command("detect", out, picture, "--out", tmp_path / "found")
    assert found.status == 0, found.err
    assert "thresholds -1." in found.out


def test_evaluation_is_on_the_windows_of_all(small_run, another, both):
    result = evaluate_run(both).result
    folders = [windows_folder(both, run.config) for run in (small_run, another)]
    assert len(set(folders)) == 2
    detector = combine_detectors([SPPDetector.load(small_run.root), SPPDetector.load(another.root)])
    records, _ = load_splits(small_run.devkit, ["SHAPES/test"])
    for record in records:
        every = unite_windows([read_windows(folder, record) for folder in folders])
        expected, _ = detector.detect_for_evaluation(read_image(record.path), every)
        assert result.detections[record.id] == expected
        assert len(expected) > 0
    alone = [[len(read_windows(folder, record)) for record in records] for folder in folders]
    assert result.proposals.mean_windows > np.mean(alone, axis=1).max()
    each = [dict(zip(own.classes, own.thresholds, strict=True)) for own in (detector, *detector.others)]
    assert result.thresholds == tuple(min(each[0][name], each[1][name]) for name in detector.classes)
    assert result.thresholds not in [own.thresholds for own in (detector, *detector.others)]
    again = evaluate_run(both, metric="area").result
    assert again.seconds_per_image is None
    assert again.evaluation.metric == "area"


def test_windows_that_the_runs_have_are_not_searched_again(small_run, another, tmp_path, monkeypatch):
    runs = [Path(shutil.copytree(run.root, tmp_path / run.root.parent.name)) for run in (small_run, another)]
    for run in runs:
        evaluate_run(run)
    combine_runs(runs, tmp_path / "both")
    searched = []
    monkeypatch.setattr("sppnet.proposals.search.match_records", lambda *given: searched.append(given) or {})
    evaluate_run(tmp_path / "both")
    assert searched == []


def test_an_interrupted_evaluation_goes_on_where_it_stopped(both):
    expected = evaluate_run(both).result
    (folder,) = both.glob("detections-*")
    files = sorted(folder.rglob("*.npz"))
    times = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    result = evaluate_run(both).result
    assert result.detections == expected.detections
    assert {path for path in files if path.stat().st_mtime_ns != times[path]} == {files[1]}
    assert list(both.glob("detections-*")) == [folder]


@pytest.mark.slow
def test_worker_processes_find_what_this_process_finds(both, monkeypatch):
    expected = evaluate_run(both).result.detections
    shutil.rmtree(next(both.glob("detections-*")))
    monkeypatch.setattr(jobs, "FEW", 1)
    monkeypatch.setattr(jobs, "available_cores", lambda: 2)
    for image, found in evaluate_run(both).result.detections.items():
        assert np.array_equal(found.labels, expected[image].labels)
        np.testing.assert_allclose(found.scores, expected[image].scores, atol=1e-4)


def test_detecting_in_files_takes_it(small_run, both, tmp_path):
    detector, picture = SPPDetector.load(both), small_run.devkit / "SHAPES/JPEGImages/test_00001.jpg"
    result = detect_files(lambda: SPPDetector.load(both), picture, tmp_path / "found", progress=False)
    assert result.detections[picture] == detector.detect(picture)


def test_imported_windows_of_other_data_are_dropped_for_each(small_run, another, both, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    devkit = Path(shutil.copytree(small_run.devkit, tmp_path / "moved"))
    result = evaluate_run(both, data=devkit).result
    assert caplog.text.count("import_from belongs to") == 2
    assert len(list(both.glob("proposals-*"))) == 3  # the two that were copied, and one of both searches
    assert result.proposals.recall > 0


# ---- what they were trained on -------------------------------------------------------------------------------------


def test_what_any_was_trained_on_counts_as_trained_on(small_run, another, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    split = Split.read(another.root / "detector")
    assert split is not None
    image = next(name for name in split.held_out)  # of another, this one trained on it
    train = {**split.train, image: split.held_out[image]}
    other = settings_changed(another.root, tmp_path / "other", Split({}, train, {}))
    combine_runs([small_run.root, other], tmp_path / "both")
    evaluate_run(tmp_path / "both", splits="SHAPES/val", evaluate=False)
    assert f"trained on: 1 of 3 images, e.g. {image}" in caplog.text
    caplog.clear()
    other = settings_changed(another.root, tmp_path / "objects", replace(split, objects={image: split.held_out[image]}))
    combine_runs([small_run.root, other], tmp_path / "of_objects")
    evaluate_run(tmp_path / "of_objects", splits="SHAPES/val", evaluate=False)
    assert f"trained on: 1 of 3 images, e.g. {image}" in caplog.text
    assert "held out of training, but they chose the fine-tuned network and the thresholds: 2 of 3" in caplog.text


def test_without_splits_it_is_evaluated_on_what_was_held_out_of_all(small_run, another, tmp_path):
    records, _ = load_splits(small_run.devkit, ["SHAPES/train"])
    digests, names = {record.id: record.digest for record in records}, [record.id for record in records]

    def run(name: str, source: Path, held_out: list[str]) -> Path:
        sides = [{n: digests[n] for n in names if (n in held_out) == side} for side in (False, True)]
        return settings_changed(source, tmp_path / name, Split({}, *sides), val=(), test=())

    first = run("first", small_run.root, names[:3])
    combine_runs([first, run("second", another.root, names[1:4])], tmp_path / "both")
    output = evaluate_run(tmp_path / "both")
    assert sorted(output.result.detections) == names[1:3]
    combine_runs([first, run("third", another.root, names[4:6])], tmp_path / "none")
    with pytest.raises(SppnetError, match=r"which images were held out is not known: .* name images with --split"):
        evaluate_run(tmp_path / "none")


@pytest.mark.parametrize("named", [(), ("val",), ("test",)])
def test_held_out_is_what_no_other_trained_on_by_id_or_content(small_run, another, tmp_path, named):
    """Where splits are named, of all; else of the first, as another may have held out of other data."""
    splits = [Split({}, {}, {"a": "1", "b": "2", "c": "3", "d": "4"}, unknown={"star": ["d"]})]
    splits += [Split({}, {"a": "9", "x": "2"}, {"e": "5"}, {"y": "3"})]
    data = {"val": (), "test": (), **{name: (f"SHAPES/{name}",) for name in named}}
    runs = [
        settings_changed(run.root, tmp_path / str(place), split, **data)
        for place, (run, split) in enumerate(zip((small_run, another), splits, strict=True))
    ]
    combine_runs(runs, tmp_path / "both")
    found = Split.read(tmp_path / "both/detector")
    held_out = {"d": "4", **({"e": "5"} if named else {})}
    assert found == Split({}, {"a": "9", "x": "2", "y": "3"}, held_out, unknown={"star": ["d"]})


def test_one_detector_with_two_searches_is_two(small_run, tmp_path):
    own = SPPDetector.load(small_run.root)
    search = own.config.proposals.model_copy(update={"min_side": 30})
    replace(own, config=own.config.model_copy(update={"proposals": search})).save(tmp_path / "other/detector")
    both = combine_runs([small_run.root, tmp_path / "other"], tmp_path / "both")
    assert [each.config.proposals.min_side for each in (both, *both.others)] == [own.config.proposals.min_side, 30]


def test_other_data_of_a_run_are_announced(small_run, another, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    other = settings_changed(another.root, tmp_path / "other", test=("SHAPES/val",), val=(), root=tmp_path)
    combine_runs([small_run.root, other], tmp_path / "both")
    assert f"data.root, data.val, data.test of {small_run.root} count; {other} has others" in caplog.text
    assert next(iter(evaluate_run(tmp_path / "both").result.detections)) == "SHAPES/test_00000"


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_combinations_are_combined_as_their_detectors(small_run, another, both, tmp_path):
    third = settings_changed(small_run.root, tmp_path / "third")
    assert run_command("combine", both, third, "--out", tmp_path / "three").out.startswith("3 detectors combined")
    assert len(SPPDetector.load(tmp_path / "three").others) == 2
    assert refused("combine", both, another.root, "--out", tmp_path / "more").startswith(
        f"{both} and {another.root} hold the same detector, which gains nothing; name another run"
    )


def test_what_is_no_complete_run_of_another_detector_is_refused(small_run, another, tmp_path):
    one, two, out = small_run.root, another.root, tmp_path / "out"
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    other = SPPDetector.load(two)
    svms = replace(other.svms, classes=("cross", "disc", "square", "moon", "triangle"))
    replace(other, svms=svms, regressors=None).save(tmp_path / "moon/detector")
    half = Path(shutil.copytree(two, tmp_path / "half"))
    (half / "detector/detector.json").unlink()
    torn = Path(shutil.copytree(two, tmp_path / "torn"))
    (torn / "detector/split.json").write_text("{")
    cases = {
        (one,): "expected two detectors or more to combine, got 1; give another one",
        (one, one): f"{one} and {one} hold the same detector",
        (one, two, copy): f"{one} and {copy} hold the same detector",
        (one, tmp_path / "moon"): f"{one} and {tmp_path / 'moon'}: only one of them knows 'moon', 'star'",
        (one, half): f"{half}: its detector is not complete",
        (one, torn): f"{torn / 'detector/split.json'}: cannot read this artifact",
        (one, tmp_path / "gone"): f"{tmp_path / 'gone'}: no such folder",
        (one, tmp_path): f"{tmp_path}: holds no trained detector",
    }
    for runs, message in cases.items():
        assert refused("combine", *runs, "--out", out).startswith(message)
        assert not out.exists()
    before = modified(one)
    for taken in (one, half, one / "detector", one / "detector/others"):
        message = refused("combine", one, two, "--out", taken)
        assert message == f"{taken}: is a run already, or the detector of one; choose a new folder for --out"
    assert modified(one) == before
    (tmp_path / "file").touch()
    assert "expected a folder with space in it" in refused("combine", one, two, "--out", tmp_path / "file")


def test_a_backbone_given_in_python_is_combined_in_python(small_run, another, tmp_path):
    config = small_config(small_run.devkit, small_run.config.proposals.import_from[0])
    trained = train_detector(config, tmp_path / "own", progress=False, backbone=SmallResidual())
    message = refused("combine", another.root, tmp_path / "own", "--out", tmp_path / "out")
    assert "SPPDetector.load(run, backbone=module); or combine in Python: combine_detectors([detector, …])" in message
    assert not (tmp_path / "out").exists()
    both = combine_detectors([trained, SPPDetector.load(another.root)])
    picture = small_run.devkit / "SHAPES/JPEGImages/test_00001.jpg"
    assert len(both.detect(picture, threshold=-2)) > 0


def test_a_combined_run_is_not_trained(small_run, both):
    before = modified(both)
    config = small_run.root / "config.yaml"
    for command in (["train", config], ["train", config, "--dry-run"], ["svm", config]):
        message = refused(*command, "--run", both)
        assert message == f"{both}: holds several detectors combined, which are not trained; choose another --run"
    assert modified(both) == before


def test_an_interrupted_combination_is_made_by_the_same_call(small_run, another, tmp_path, monkeypatch):
    def stop(self, folder):
        raise KeyboardInterrupt

    runs, out = [small_run.root, another.root], tmp_path / "both"
    with monkeypatch.context() as patch:
        patch.setattr(SPPDetector, "save", stop)
        assert run_command("combine", *runs, "--out", out).status == 130
    assert "holds no trained detector" in refused("eval", out)
    assert run_command("combine", *runs, "--out", out).status == 0
    assert len(SPPDetector.load(out).others) == 1


def test_under_torchrun_the_first_process_combines_alone(small_run, another, tmp_path, monkeypatch):
    monkeypatch.setattr("sppnet.distributed.rank", lambda: 1)
    result = run_command("combine", small_run.root, another.root, "--out", tmp_path / "both")
    assert (result.status, result.out) == (0, "")
    assert not (tmp_path / "both").exists()
