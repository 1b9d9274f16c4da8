"""`sppnet add` and `sppnet suggest` on a run of a folder: what is reused, what is new, what is refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from devkit import thing
from small_run import SmallRun, modified, refused, run_command

from sppnet.artifacts import read_arrays, read_json
from sppnet.config_files import load_config
from sppnet.data.shapes import generate_shapes
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.pipeline.run_data import Split, load_run_data
from sppnet.pipeline.training import train_detector
from sppnet.report.drawing import is_drawn

TINY = (
    "backbone.name=tiny5", "backbone.weights.source=random", "maps.runtime=torch", "precision=float32",
    "joint.rank=16", "head.fc6=16", "head.fc7=16", "pyramid.levels=[1,2]", "proposals.max_side=96",
    "proposals.max_windows=60", "detect.max_per_class=5", "joint.steps=30", "joint.flip=false", "maps.scales=[112]",
)  # fmt: skip
STAR = re.compile(r"<object>\s*<name>star</name>.*?</object>", re.DOTALL)


def photos(folder: Path, count: int, seed: int, stars: bool, first: int = 0) -> Path:
    """Plain VOC: generated pictures and their labels side by side, those of stars too or not."""
    shapes = generate_shapes(folder.with_name(f"{folder.name}-shapes"), {"train": first + count}, seed) / "SHAPES"
    folder.mkdir()
    for path in sorted((shapes / "JPEGImages").iterdir())[first:]:
        shutil.copy(path, folder)
        xml = (shapes / "Annotations" / f"{path.stem}.xml").read_text()
        (folder / f"{path.stem}.xml").write_text(xml if stars else STAR.sub("", xml))
    return folder


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> SmallRun:
    """A run on pictures whose stars have no labels."""
    folder = tmp_path_factory.mktemp("before")
    root, run = photos(folder / "photos", 10, 0, stars=False), folder / "run"
    made = run_command("train", root, "--run", run, "--set", *TINY)
    assert made.status == 0, made
    return SmallRun(run, load_config(run / "config.yaml"), root)


@pytest.fixture(scope="module")
def added(before, tmp_path_factory):
    """(the run after five pictures with stars were added, their folder, what the command said)."""
    folder = tmp_path_factory.mktemp("added")
    shutil.copytree(before.root, folder / "run")
    more = photos(folder / "more", 6, 1, stars=True)
    result = run_command("add", folder / "run", more)
    assert result.status == 0, result
    return SmallRun(folder / "run", load_config(folder / "run/config.yaml"), before.devkit), more, result


def rows(run: Path) -> dict[str, int]:
    return {name: time for name, time in modified(run).items() if name.startswith(("embed-", "proposals-"))}


def test_the_class_of_added_pictures_is_learned_measured_and_said(added):
    run, more, result = added
    assert SPPDetector.load(run.root).classes == ("cross", "disc", "square", "star", "triangle")
    assert f"{more.resolve()} adds 6 images;" in result.err
    assert "not labelled, so that nothing is known of it there: star in 8 training images" in result.err
    assert re.search(r"detector of 5 classes in .*; mAP 0\.\d+ on 3 validation images", result.out)
    assert read_json(next(run.root.glob("thresholds-*/thresholds.json")).with_name("thresholds.json"))
    evaluation = run_command("eval", run.root)
    assert evaluation.status == 0, evaluation
    assert "star" in evaluation.out


def test_pictures_of_before_do_not_count_in_the_figures_of_a_class_that_nobody_labelled_in_them(added):
    run, split = added[0], Split.read(added[0].root)
    assert set(split.unknown["star"]) == {name for name in (*split.train, *split.held_out) if "added" not in name}
    (own,) = (name for name in split.held_out if name.startswith("added-1/"))
    found = read_json(run.root / "results/held-out/metrics.json")["detections"]
    stars = {name: (read_arrays(file)["labels"] == 3).sum() for name in split.held_out
             for file in (run.root / found / name).parent.glob(f"{Path(name).name}-*.npz")}  # fmt: skip
    assert len(stars) == len(split.held_out)
    curves = read_json(run.root / "results/held-out/curves.json")
    assert len(curves["star"]["recall"]) == stars[own] < sum(stars.values())
    assert run_command("eval", run.root, "--split", "all").status == 0
    (folder,) = (run.root / "results").glob("all*")
    assert len(read_json(folder / "curves.json")["star"]["recall"]) == 0


def test_a_star_labelled_in_place_is_known_there_alone(before, tmp_path):
    root, run = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(before.devkit, root)
    shutil.copytree(before.root, run)
    config = load_config(run / "config.yaml")
    data = config.data.model_copy(update={"root": root, "more": (photos(tmp_path / "more", 3, 1, stars=True),)})
    config = config.model_copy(update={"data": data})
    split = load_run_data(config, Split.read(run)).split
    xml = next(root.glob("*.xml"))
    xml.write_text(xml.read_text().replace("</annotation>", f"{thing('star', 5, 5, 40, 40)}</annotation>"))
    again = load_run_data(config, split).split
    assert set(split.unknown["star"]) - set(again.unknown["star"]) == {xml.stem}
    assert (
        load_run_data(config.model_copy(update={"data": data.model_copy(update={"more": ()})}), again).split.unknown
        == {}
    )
    paper = config.model_copy(update={"head": config.head.model_copy(update={"training": "paper"})})
    assert load_run_data(paper, split).split.unknown == {}


def test_only_added_pictures_are_searched_and_embedded_and_the_projection_stays(before, added):
    old, new = rows(before.root), rows(added[0].root)
    assert {name for name in old if new.get(name) is None} == set()
    fresh = [name for name in new if name not in old]
    assert len(fresh) == 2 * 6
    assert all("/added-1/train_" in name for name in fresh)
    assert len([*added[0].root.glob("embed-*/projection.safetensors")]) == 1


def test_ids_and_the_split_of_before_stay_and_new_pictures_are_held_out_for_the_new_class_alone(before, added):
    old, new = Split.read(before.root), Split.read(added[0].root)
    assert old.train.items() <= new.train.items()
    assert old.held_out.items() <= new.held_out.items()
    fresh = new.held_out.keys() - old.held_out.keys()
    data = load_run_data(added[0].config, new)
    assert len(fresh) == 1
    assert all(name.startswith("added-1/") for name in fresh)
    assert any("star" in r.annotation.names for r in data.held_out if r.id in fresh)
    assert any("star" in r.annotation.names for r in data.train)


def test_the_result_is_that_of_training_on_both_folders_at_once(added, tmp_path):
    assert train_detector(added[0].config, tmp_path / "run", progress=False) is not None
    ours, theirs = (DetectorDescription.read(root) for root in (added[0].root, tmp_path / "run"))
    assert ours.parts == theirs.parts
    assert ours.thresholds == theirs.thresholds
    assert Split.read(added[0].root) == Split.read(tmp_path / "run")


def test_the_same_folder_again_adds_nothing(added):
    run, more, _ = added
    before = {name: time for name, time in modified(run.root).items() if "-" in name.split("/")[0]}
    assert run_command("add", run.root, more).status == 0
    after = modified(run.root)
    assert {name: after[name] for name in before} == before
    assert load_config(run.root / "config.yaml") == run.config
    assert run_command("add", run.root, run.devkit).status == 0
    assert load_config(run.root / "config.yaml") == run.config


def test_known_pictures_with_new_labels_are_embedded_again_but_not_searched(before, tmp_path):
    run, stars = tmp_path / "run", photos(tmp_path / "stars", 10, 0, stars=True)
    shutil.copytree(before.root, run)
    result = run_command("add", run, stars)
    assert result.status == 0, result
    labels = "cross, disc, square, star, triangle"
    assert f"{stars.resolve()} adds 0 images, and its objects of {labels} to 10 known" in result.err
    fresh = rows(run).keys() - rows(before.root).keys()
    changed = {p.stem for p in stars.glob("*.xml") if p.read_text() != (before.devkit / p.name).read_text()}
    trained = {Path(name).name for name in Split.read(run).train}  # rows of the others are of proposals alone
    assert {Path(name).name[: len("train_00000")] for name in fresh} == changed & trained != set()
    assert all(name.startswith("embed-") for name in fresh)
    assert {*Split.read(run).train} == {*Split.read(before.root).train}


def test_what_is_no_run_no_data_or_not_of_its_classes_is_refused_and_nothing_is_changed(before, small_run, tmp_path):
    run, kept = tmp_path / "run", before.root
    shutil.copytree(kept, run)
    state = modified(run)
    (tmp_path / "bare").mkdir()
    shutil.copy(next(before.devkit.glob("*.jpg")), tmp_path / "bare")
    assert "no annotated pictures found" in refused("add", run, tmp_path / "bare")
    assert "no such data folder" in refused("add", run, tmp_path / "nowhere")
    assert "holds" in refused("add", run, tmp_path)
    assert "no training is here (no config.yaml)" in refused("add", before.devkit, before.devkit)
    paper = refused("add", small_run.root, before.devkit)
    assert f"sppnet train {small_run.root}/config.yaml --run {small_run.root} --set 'data.more=" in paper
    other = tmp_path / "other"
    shutil.copytree(before.devkit, other)
    for path in other.glob("*.xml"):
        path.write_text(re.sub("<name>.*?</name>", "<name>bird</name>", path.read_text()))
    classes = "data.classes=[cross,disc,square,triangle]"
    assert "classes bird: nothing to train on" in refused("add", run, other, "--set", classes)
    assert modified(run) == state


def test_an_addition_that_fails_leaves_the_run_as_it_was_and_another_folder_can_be_added(before, tmp_path):
    run, more = tmp_path / "run", photos(tmp_path / "more", 2, 1, stars=True)
    shutil.copytree(before.root, run)
    broken = more / "train_00001.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    state = {name: value for name, value in modified(run).items() if name in read_names(run)}
    assert "added-1/train_00001" in refused("add", run, more)
    assert {name: value for name, value in modified(run).items() if name in state} == state
    assert not load_config(run / "config.yaml").data.more
    assert run_command("eval", run).status == 0
    broken.write_bytes(whole)
    assert run_command("add", run, more).status == 0
    assert "star" in SPPDetector.load(run).classes


def test_a_detector_that_cannot_be_saved_leaves_that_of_before(before, tmp_path, monkeypatch):
    run, more = tmp_path / "run", photos(tmp_path / "more", 2, 1, stars=True)
    shutil.copytree(before.root, run)
    state = {name: value for name, value in modified(run).items() if name in read_names(run)}
    with monkeypatch.context() as patched:
        patched.setattr("sppnet.detection.detector.write_json", Mock(side_effect=OSError("No space left on device")))
        assert "No space left" in refused("add", run, more)
    assert {name: value for name, value in modified(run).items() if name in state} == state
    assert run_command("add", run, more).status == 0
    assert "star" in SPPDetector.load(run).classes
    assert "# " in (run / "config.yaml").read_text()  # the reasons of its settings


def read_names(run: Path) -> set[str]:
    """What `eval` and the next `add` go by."""
    return {"config.yaml", "split.json", *(f"detector/{path.name}" for path in (run / "detector").iterdir())}


def test_a_run_that_is_not_complete_is_not_added_to(before, tmp_path):
    shutil.copytree(before.root, tmp_path / "run")
    (tmp_path / "run/detector/detector.json").unlink()
    assert "its detector is not complete" in refused("add", tmp_path / "run", before.devkit)


def test_pictures_without_labels_are_ranked_and_those_of_the_run_left_out(added, tmp_path):
    run, more, _ = added
    pool = photos(tmp_path / "pool", 4, 2, stars=False)
    for path in pool.glob("*.xml"):
        path.unlink()
    shutil.copy(next(more.glob("*.jpg")), pool / "known.jpg")
    shutil.copy(next(pool.glob("train_*.jpg")), pool / "copy.jpg")
    (pool / "broken.jpg").write_bytes(b"no picture")
    state = modified(pool)
    result = run_command("suggest", run.root, pool, "--top", 3, "--out", tmp_path / "out")
    assert result.status == 0, result
    assert "not ranked, being in the run with their labels: 1 picture" in result.out
    assert "left out: " in result.out
    entries = json.loads((tmp_path / "out/suggest.json").read_text())
    assert 1 <= len(entries) <= 3
    assert not any(entry["labelled"] for entry in entries)
    scores = [entry["score"] for entry in entries]
    assert scores == sorted(scores, reverse=True)
    for entry in entries:
        assert entry["score"] == pytest.approx(sum(doubt["value"] for doubt in entry["doubts"]), abs=1e-3)
    with (tmp_path / "out/suggest.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [entry["image"] for entry in entries]
    assert is_drawn(tmp_path / "out/suggest.jpg")
    assert modified(pool) == state
    again = run_command("suggest", run.root, pool, "--top", 3, "--out", tmp_path / "out")
    assert again.out == result.out


def test_of_the_run_itself_the_labels_are_doubted_and_what_was_trained_on_is_said(added):
    run, _, _ = added
    result = run_command("suggest", run.root)
    assert result.status == 0, result
    entries = read_json(run.root / "suggest/suggest.json")
    assert all(entry["labelled"] for entry in entries)
    assert not any(text in entry["reason"] for entry in entries for text in ("uncertain", "nothing found"))
    assert re.search(r"trained on: 13 of 16 pictures", result.out)


def test_files_of_others_are_not_overwritten(added, tmp_path):
    (tmp_path / "suggest.csv").write_text("mine")
    reason = refused("suggest", added[0].root, added[1], "--out", tmp_path)
    assert "holds a file called suggest that is not of an earlier call" in reason
    assert (tmp_path / "suggest.csv").read_text() == "mine"
    assert "holds no trained detector" in refused("suggest", added[1], added[1], "--out", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    assert "no image in this folder" in refused("suggest", added[0].root, tmp_path / "empty")
