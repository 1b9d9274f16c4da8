"""Training resumes wherever it was stopped, and copes with images that have nothing to teach."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_run import copied, merged, modified, small_settings

from sppnet.config import Config
from sppnet.config_files import load_config, parse_config
from sppnet.data.voc import write_annotation
from sppnet.detection import finetuning
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.errors import ArtifactError, ImageError, SppnetError
from sppnet.images import read_image
from sppnet.pipeline import networks as training_networks
from sppnet.pipeline import training
from sppnet.pipeline.run_data import Split
from sppnet.pipeline.stage_status import StageStatus
from sppnet.pipeline.stages import STAGES, windows_folder
from sppnet.pipeline.training import Training, train_detector
from sppnet.proposals import search as proposals


class Interruption(BaseException):
    """Stands for Ctrl-C or a killed process: nothing in the program may catch it."""


def changed(run, **changes) -> Config:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged(small_settings(run.devkit, run.config.proposals.import_from[0]), dotted), "test")


def train(config: Config, root: Path, *only: str, force: tuple[str, ...] = ()) -> SPPDetector | None:
    return train_detector(config, root, only=only or STAGES, force=force, progress=False)


def digest_in(root: Path) -> str:
    """What the detector of a run is."""
    return DetectorDescription.read(root).digest("cpu")


def trained_digest(config: Config, root: Path, *only: str, force: tuple[str, ...] = ()) -> str:
    assert train(config, root, *only, force=force) is not None
    return digest_in(root)


def stage_files(root: Path) -> dict[str, int]:
    """The files of the stages, without the detector put together from them and the settings."""
    return {name: time for name, time in modified(root).items() if name.split("-")[0] in STAGES}


def interrupt_at(monkeypatch, owner, name: str, call: int) -> None:
    """Let ``owner.name`` raise at its `call`-th call from now on."""
    original, calls = getattr(owner, name), []

    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Interruption
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)


@pytest.fixture(scope="module")
def digest(small_run) -> str:
    return digest_in(small_run.root)


@pytest.fixture
def devkit(small_run, tmp_path) -> Path:
    """A copy of the data, to be changed."""
    return Path(shutil.copytree(small_run.devkit, tmp_path / "own/VOCdevkit"))


# ---- reuse ---------------------------------------------------------------------------------------------------------


def test_a_second_run_changes_no_artifact_and_gives_the_same_detector(small_run, digest, tmp_path):
    run = copied(small_run, tmp_path / "run")
    before = stage_files(run.root)
    assert trained_digest(run.config, run.root) == digest
    assert stage_files(run.root) == before


def test_training_again_elsewhere_gives_the_same_detector(small_run, digest, tmp_path):
    assert trained_digest(small_run.config, tmp_path / "run") == digest
    assert sorted(stage_files(tmp_path / "run")) != []


def test_only_deleted_artifacts_are_computed_again(small_run, digest, tmp_path):
    run = copied(small_run, tmp_path / "run")
    patterns = ["proposals-*/SHAPES/train_00002-*", "maps-*/SHAPES/train_00004-*-flip*", "boxes-*/class-003*",
                "maps-*/SHAPES/val_00001-*"]  # fmt: skip
    deleted = {path for pattern in patterns for path in run.root.glob(pattern)}
    assert len(deleted) == 4
    before = stage_files(run.root)
    for path in deleted:
        path.unlink()
    assert trained_digest(run.config, run.root) == digest
    after = stage_files(run.root)
    assert sorted(after) == sorted(before)
    invalidated = {name for name, time in after.items() if time != before[name]}
    assert invalidated == {str(path.relative_to(run.root)) for path in deleted}


@pytest.mark.parametrize("stage", ["finetune", "svm"])
def test_a_deleted_stage_is_computed_again_alone(small_run, digest, tmp_path, stage):
    run = copied(small_run, tmp_path / "run")
    shutil.rmtree(next(run.root.glob(f"{stage}-*")))
    before = stage_files(run.root)
    assert trained_digest(run.config, run.root) == digest
    after = stage_files(run.root)
    assert {name for name in before if after[name] != before[name]} == set()
    assert {name.split("-")[0] for name in set(after) - set(before)} == {stage}


def test_a_forced_stage_is_computed_again_alone_and_ends_the_same(small_run, digest, tmp_path):
    run = copied(small_run, tmp_path / "run")
    before = stage_files(run.root)
    assert trained_digest(run.config, run.root, "svm", "thresholds", force=("svm",)) == digest
    after = stage_files(run.root)
    assert {name.split("-")[0] for name in after if after[name] != before.get(name)} == {"svm", "thresholds"}


def test_what_rests_on_a_forced_stage_is_gone_before_anything_runs(small_run, digest, tmp_path, monkeypatch):
    run = copied(small_run, tmp_path / "run")
    interrupt_at(monkeypatch, finetuning._Trainer, "train_step", 1)
    with pytest.raises(Interruption):
        train(run.config, run.root, force=("finetune", "svm"))
    monkeypatch.undo()
    assert list(run.root.glob("svm-*")) == []
    assert len(list(run.root.glob("boxes-*/*"))) == 5  # their pooled features need no head
    with pytest.raises(ArtifactError, match="its detector is not complete"):
        SPPDetector.load(run.root)
    assert trained_digest(run.config, run.root) == digest


def test_an_unfinished_training_with_other_settings_leaves_no_detector_of_the_old_ones(small_run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    run = copied(small_run, tmp_path / "run")
    assert train(changed(small_run, svm__C=1.0), run.root, "maps") is None
    assert "detector.json: of other settings or of re-run stages; deleted until training is complete" in caplog.text
    with pytest.raises(ArtifactError, match="its detector is not complete"):
        SPPDetector.load(run.root)


def test_stages_run_alone_one_after_the_other_give_the_same_detector(small_run, digest, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    for stage in ("proposals", "maps", "finetune", "svm"):
        assert train(small_run.config, tmp_path, stage) is None
    assert "no detector yet: boxes, thresholds still to do" in caplog.text
    with pytest.raises(ArtifactError, match="holds no trained detector"):
        SPPDetector.load(tmp_path)
    assert train(small_run.config, tmp_path, "boxes") is None
    assert trained_digest(small_run.config, tmp_path, "thresholds") == digest


def test_a_stage_whose_inputs_are_missing_says_which_stage_comes_first(small_run, tmp_path):
    config = changed(small_run, head__input_norm=None)
    with pytest.raises(ArtifactError, match=r"no windows for image SHAPES/train_00000; run sppnet propose"):
        train(config, tmp_path, "finetune")
    train(config, tmp_path, "proposals")
    with pytest.raises(ArtifactError, match=r"no maps for image SHAPES/\w+; run extract first"):
        train(config, tmp_path, "finetune")
    train(config, tmp_path, "maps")
    with pytest.raises(SppnetError, match=r"the finetune stage is not complete .*; run .* finetune first"):
        train(config, tmp_path, "svm")


def test_a_map_cut_short_by_a_power_cut_is_computed_again(small_run, digest, tmp_path):
    run = copied(small_run, tmp_path / "run")
    path = next(run.root.glob("maps-*/SHAPES/train_00004*flip*"))
    before = stage_files(run.root)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    shutil.rmtree(next(run.root.glob("finetune-*")))
    assert trained_digest(run.config, run.root) == digest
    assert path.read_bytes() == whole
    after = stage_files(run.root)
    assert {name for name in after if after[name] != before.get(name) and name.startswith("maps")} == {
        str(path.relative_to(run.root))
    }


def test_a_damaged_artifact_is_named_and_can_be_deleted(small_run, digest, tmp_path):
    run = copied(small_run, tmp_path / "run")
    path = next(run.root.glob("maps-*/SHAPES/train_00004*flip*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    shutil.rmtree(next(run.root.glob("finetune-*")))
    with pytest.raises(ArtifactError, match=rf"{path.name}: cannot read this artifact .*; delete it and run"):
        train(run.config, run.root)
    path.unlink()
    assert trained_digest(run.config, run.root) == digest


def test_the_settings_are_kept_beside_the_artifacts(small_run):
    assert load_config(small_run.root / "config.yaml") == small_run.config


# ---- interruption --------------------------------------------------------------------------------------------------


def resumed(run, root: Path, digest: str, monkeypatch) -> list[str]:
    """Run until the interruption, then to the end; returns the files that were there in between."""
    with pytest.raises(Interruption):
        train(run.config, root)
    monkeypatch.undo()
    left = stage_files(root)
    assert not any(Path(name).name.startswith(".") for name in modified(root))
    assert trained_digest(run.config, root) == digest
    after = stage_files(root)
    kept = [name for name in left if after.get(name) == left[name]]
    gone = {Path(name).name for name in set(left) - set(kept)}
    assert gone <= {"checkpoint.safetensors", "log.csv"}
    return sorted(left)


@pytest.mark.parametrize(
    ("owner", "name", "stage", "files"),
    [(proposals, "write_arrays", "proposals", 3), (training.extract_images.__globals__, "write_maps", "maps", 3)],
)
def test_an_interruption_keeps_the_images_that_are_done(
    small_run, digest, tmp_path, monkeypatch, owner, name, stage, files
):
    if isinstance(owner, dict):
        from sppnet.detection import feature_maps as owner
    interrupt_at(monkeypatch, owner, name, files + 1)
    left = resumed(small_run, tmp_path, digest, monkeypatch)
    assert len([path for path in left if path.startswith(stage)]) == files


def test_an_interruption_in_the_middle_of_a_file_leaves_nothing_of_it(small_run, digest, tmp_path, monkeypatch):
    original, calls = np.savez, []

    def half(file, **arrays):
        calls.append(1)
        if len(calls) == 4:
            file.write(b"half of a file")
            raise Interruption
        original(file, **arrays)

    monkeypatch.setattr(np, "savez", half)
    assert len(resumed(small_run, tmp_path, digest, monkeypatch)) == 3


def test_interrupted_fine_tuning_goes_on_from_its_checkpoint(small_run, digest, tmp_path, monkeypatch):
    interrupt_at(
        monkeypatch, finetuning._Trainer, "train_step", 7
    )  # validates, and saves, after 4 steps and at the end
    left = resumed(small_run, tmp_path, digest, monkeypatch)
    assert any(name.endswith("checkpoint.safetensors") for name in left)


def test_interrupted_box_regression_keeps_the_classes_that_are_done(small_run, digest, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, training, "fit_box_regressor", 3)
    left = resumed(small_run, tmp_path, digest, monkeypatch)
    assert len([name for name in left if name.startswith("boxes")]) == 2


def test_box_regression_goes_on_with_the_scale_it_began_with(small_run, digest, tmp_path, monkeypatch):
    run = copied(small_run, tmp_path / "run")
    next(run.root.glob("boxes-*/class-003*")).unlink()
    monkeypatch.setattr(training_networks, "sample_norms", lambda *a: pytest.fail("the scale is in the other classes"))
    assert trained_digest(run.config, run.root, "boxes") == digest


def test_an_interruption_while_the_detector_is_saved_leaves_no_detector_that_loads(small_run, tmp_path, monkeypatch):
    from sppnet.detection import detector as module

    run = copied(small_run, tmp_path / "run")
    shutil.rmtree(run.root / "detector")
    interrupt_at(monkeypatch, module, "write_tensors", 3)
    with pytest.raises(Interruption):
        train(run.config, run.root)
    with pytest.raises(ArtifactError, match="holds no trained detector"):
        SPPDetector.load(run.root)


# ---- other ways through the stages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "flips", "tuned"),
    [
        ({"svm__layer": "pool"}, False, False),
        ({"svm__layer": "fc6", "boxes__layer": "fc7", "boxes__enabled": True}, True, True),
        ({"finetune__enabled": False, "boxes__enabled": False}, False, False),
        ({"svm__finetuned": False, "svm__layer": "fc6"}, False, False),
        ({"finetune__flip": False, "maps__scales": [96, 128], "precision": "bfloat16"}, False, True),
    ],
)
def test_every_choice_of_features_gives_a_detector(small_run, tmp_path, changes, flips, tuned):
    config = changed(small_run, **changes)
    trained = train(config, tmp_path)
    assert bool(list(tmp_path.glob("maps-*/*/*-flip.npz"))) == flips
    assert bool(list(tmp_path.glob("finetune-*/head.safetensors"))) == tuned
    image = read_image(small_run.devkit / "SHAPES/JPEGImages/test_00001.jpg")
    windows = np.array([[10, 10, 90, 90], [50, 40, 150, 160], [100, 20, 180, 120]], np.float32)
    found, again = trained.detect(image, windows), SPPDetector.load(tmp_path).detect(image, windows)
    assert len(found) > 0
    assert np.array_equal(found.boxes, again.boxes)
    assert np.array_equal(found.scores, again.scores)
    assert (trained.regressors is None) == (not config.boxes.enabled)


def test_without_validation_images_some_are_held_out(small_run, tmp_path):
    assert train(changed(small_run, data__val=[], data__test=[]), tmp_path) is not None
    assert len(list(tmp_path.glob("proposals-*/SHAPES/train_*"))) == 8


def test_windows_are_searched_where_none_are_imported(small_run, tmp_path):
    config = changed(small_run, proposals__import_from=[], data__train=["SHAPES/val"], data__val=[])
    assert train(config, tmp_path, "proposals") is None
    files = list(tmp_path.glob("proposals-*/SHAPES/*.npz"))
    assert len(files) == 3
    with np.load(files[0]) as archive:
        assert archive["windows"].shape == (60, 4)


# ---- data that have little to teach --------------------------------------------------------------------------------


def test_images_without_objects_or_windows_train_and_detect_fine_and_are_counted(small_run, devkit, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    for stem in ("train_00001", "val_00000"):
        write_annotation(devkit / f"SHAPES/Annotations/{stem}.xml", (10, 10), [], [], [])
    with np.load(small_run.config.proposals.import_from[0]) as archive:
        ids, offsets, boxes = (archive[key] for key in ("ids", "offsets", "boxes"))
    bare = {"SHAPES/train_00002", "SHAPES/val_00001"}
    rows = [boxes[:0] if name in bare else boxes[offsets[i] : offsets[i + 1]] for i, name in enumerate(ids)]
    np.savez(tmp_path / "own.npz", ids=ids, offsets=np.cumsum([0, *map(len, rows)]), boxes=np.concatenate(rows))
    config = changed(small_run, data__root=str(devkit), proposals__import_from=[str(tmp_path / "own.npz")])
    assert train(config, tmp_path / "run") is not None
    path = next((tmp_path / "run").glob("proposals-*/SHAPES/train_00002*"))
    with np.load(path) as archive:
        assert archive["windows"].shape == (0, 4)
    assert "1 × training image without objects (background for the SVMs alone)" in caplog.text
    assert "2 × image without windows (its objects alone are used)" in caplog.text


def test_no_window_in_any_image_is_an_error_that_names_the_setting(small_run, tmp_path):
    with pytest.raises(SppnetError, match=r"no training image has a window; check proposals\.min_side and the images"):
        train(changed(small_run, proposals__min_side=1000, proposals__import_from=[]), tmp_path)


def test_no_object_to_validate_on_is_an_error_before_any_step(small_run, devkit, tmp_path):
    for number in range(3):
        write_annotation(devkit / f"SHAPES/Annotations/val_0000{number}.xml", (10, 10), [], [], [])
    with pytest.raises(SppnetError, match=r"no validation image has an object of the classes, but these choose"):
        train(changed(small_run, data__root=str(devkit)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    pool = changed(small_run, data__root=str(devkit), svm__layer="pool")  # nothing is fine-tuned
    assert train(pool, tmp_path / "run") is not None


@pytest.mark.parametrize("size", [(900, 3), (2, 500)])
def test_a_training_image_too_narrow_for_a_map_is_named_before_anything_is_computed(small_run, devkit, tmp_path, size):
    Image.new("RGB", size).save(devkit / "SHAPES/JPEGImages/train_00003.jpg")
    config = changed(small_run, data__root=str(devkit), maps__max_side=112, backbone__name="alexnet")
    message = rf"train_00003\.jpg: an image of {size[0]} × {size[1]} pixels has no map: .*or leave it out"
    with pytest.raises(SppnetError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (reason,) = Training(config, tmp_path / "run", torch.device("cpu")).networks.missing_inputs(STAGES)
    assert "train_00003.jpg" in reason


def test_training_images_of_difficult_objects_alone_are_an_error_before_anything_is_computed(
    small_run, devkit, tmp_path
):
    for split, count in (("train", 8), ("val", 3)):
        for number in range(count):
            path = devkit / f"SHAPES/Annotations/{split}_0000{number}.xml"
            write_annotation(path, (10, 10), [[20, 20, 90, 90]], ["owl"], [True])
    config = changed(small_run, data__root=str(devkit), data__train_on_difficult=False)
    reasons = Training(config, tmp_path / "run", torch.device("cpu")).networks.missing_inputs(STAGES)
    assert [reason.split(",")[0] for reason in reasons] == [
        f"no {kind} image has an object of the classes" for kind in ("training", "validation")
    ]
    with pytest.raises(SppnetError, match=r"all are difficult and data\.train_on_difficult=false"):
        train(config, tmp_path / "run")


def test_a_run_keeps_its_split_and_so_does_its_detector(small_run, devkit, tmp_path):
    config = changed(small_run, data__root=str(devkit), data__val=[], data__test=[])
    assert train(config, tmp_path / "run") is not None
    kept = Split.read(tmp_path / "run")
    assert kept == Split.read(tmp_path / "run/detector")
    assert (len(kept.train), len(kept.held_out)) == (6, 2)
    listed = devkit / "SHAPES/ImageSets/Main/train.txt"
    listed.write_text(listed.read_text() + (devkit / "SHAPES/ImageSets/Main/val.txt").read_text())
    training = Training(config, tmp_path / "run", torch.device("cpu"))
    assert training.graph.data.split.held_out == kept.held_out
    assert len(training.graph.data.train) == 9
    assert not training.graph.status("svm").complete


def test_a_class_of_difficult_objects_alone_is_reported_and_never_fires(small_run, devkit, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    boxes = [[20, 20, 90, 90], [100, 60, 180, 150]]
    write_annotation(devkit / "SHAPES/Annotations/train_00000.xml", (10, 10), boxes, ["owl", "star"], [True, False])
    config = changed(small_run, data__root=str(devkit), data__train_on_difficult=False)
    trained = train(config, tmp_path / "run")
    owl = trained.classes.index("owl")
    assert "never fires: owl (no positives)" in caplog.text
    assert json.loads(next((tmp_path / "run").glob("svm-*/summary.json")).read_text())["untrained"].keys() == {"owl"}
    image = read_image(devkit / "SHAPES/JPEGImages/train_00000.jpg")
    eager = config.detect.model_copy(update={"score_threshold": -100.0})
    trained = replace(trained, config=config.model_copy(update={"detect": eager}))
    found = trained.detect(image, np.array(boxes))
    assert len(found) > 0
    assert owl not in found.labels


def test_an_image_that_ends_too_early_stops_the_stage_that_decodes_it(small_run, devkit, tmp_path):
    path = devkit / "SHAPES/JPEGImages/train_00005.jpg"
    path.write_bytes(path.read_bytes()[:3000])
    message = (
        r"train_00005\.jpg: expected a complete image, but it cannot be read .*; fetch the file again or remove it"
    )
    with pytest.raises(ImageError, match=message):
        train(changed(small_run, data__root=str(devkit)), tmp_path / "run")
    with pytest.raises(proposals.SppnetError, match=message):
        train(changed(small_run, data__root=str(devkit), proposals__import_from=[]), tmp_path / "run", "proposals")


# ---- weights -------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_an_error_before_the_first_stage(small_run, tmp_path):
    save_file({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    for name, message in (("other", "tensors needed do not fit"), ("none", "no such file")):
        weights = {"source": "file", "file": str(tmp_path / f"{name}.safetensors")}
        with pytest.raises(SppnetError, match=rf"{name}\.safetensors: .*{message}"):
            train(changed(small_run, backbone__weights=weights), tmp_path / "run")
    head = changed(small_run, head__init="checkpoint", head__checkpoint=str(tmp_path / "none.safetensors"))
    with pytest.raises(SppnetError, match=r"none\.safetensors: no such file; check head\.checkpoint"):
        train(head, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_imagenets_fc_layers_come_from_the_file_only_where_the_backbone_does(small_run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("sppnet.models.sppnet.torchvision_state", lambda name: asked.append(name) or {})
    monkeypatch.setattr("sppnet.models.sppnet.load_weight_file", lambda path: asked.append(path) or {})
    monkeypatch.setattr("sppnet.models.sppnet.load_pretrained_fc", lambda *a: None)
    for source in ("random", "file"):
        weights = {"source": source, "file": str(tmp_path / "own.npz")}
        config = changed(small_run, head__init="imagenet", backbone__name="alexnet", backbone__weights=weights)
        networks = Training(config, tmp_path, torch.device("cpu")).networks
        networks.backbone = Training(small_run.config, tmp_path, torch.device("cpu")).networks.backbone
        networks.started_head()
    assert asked == ["alexnet", tmp_path / "own.npz"]


TWO_SEARCHES = [
    {"method": "edge_boxes", "max_windows": 30, "max_side": 96, "workers": 1},
    {"max_windows": 30, "max_side": 96, "workers": 1},
]


def test_a_detector_is_trained_on_windows_of_several_searches_and_thresholds_are_of_the_tests(
    small_run, tmp_path, monkeypatch, caplog
):
    config = changed(small_run, train_proposals=TWO_SEARCHES)
    seen = {}

    def keep(detector, source, kept, rows, progress):
        seen[source.windows_folder] = [record.id for record in source.records]
        return {name: {"threshold": 0.0, "f1": 0.0, "objects": 0} for name in detector.classes}

    monkeypatch.setattr(training, "choose_thresholds", keep)
    with caplog.at_level(logging.INFO, logger="sppnet"):
        detector = train(config, tmp_path / "run")
    assert detector is not None
    assert detector.config.train_proposals == config.train_proposals
    graph = Training(config, tmp_path / "run", torch.device("cpu")).graph
    assert "22 images searched, 0 imported, 0 reused" in caplog.text
    for record in graph.data.images:
        parts = [set(map(tuple, proposals.read_windows(folder, record).tolist())) for folder in graph.searches]
        assert (
            set(map(tuple, proposals.read_windows(graph.folder("proposals"), record).tolist())) == parts[0] | parts[1]
        )
    tests = windows_folder(tmp_path / "run", config)
    assert seen == {tests: [record.id for record in graph.data.validation]}
    stored = np.load(small_run.config.proposals.import_from[0])
    record = graph.data.validation[0]
    row = stored["ids"].tolist().index(record.id)
    own = stored["boxes"][stored["offsets"][row] : stored["offsets"][row + 1]][: config.proposals.max_windows]
    np.testing.assert_array_equal(proposals.read_windows(tests, record), own)
    assert not graph.data.train[0].path_in(tests).exists()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="sppnet"):
        train(config, tmp_path / "run", "proposals", force=("proposals",))  # from scratch: the searches too
    assert "0 reused" in caplog.text


def test_the_windows_of_an_entry_serve_a_run_that_tests_on_them(small_run, tmp_path):
    train(changed(small_run, train_proposals=TWO_SEARCHES), tmp_path, "proposals")
    alone = Training(changed(small_run, proposals=TWO_SEARCHES[0]), tmp_path, torch.device("cpu")).graph
    assert alone.status("proposals").complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"proposals": {"method": "edge_boxes", "edge_model": "gone.yml"}},
            "gone.yml: no such file; check proposals.edge_model",
        ),
        (
            {"train_proposals": [{}, {"method": "edge_boxes", "edge_model": "gone.yml"}]},
            "gone.yml: no such file; check train_proposals.1.edge_model",
        ),
        ({"train_proposals": [{"import_from": ["a.npz"]}]}, "a.npz: no such file; check train_proposals.0.import_from"),
        (
            {"proposals": {"method": "edge_boxes", "edge_model": __file__}},
            "expected a structured forest as OpenCV reads it",
        ),
    ],
)
def test_files_of_searches_that_are_missing_or_wrong_are_an_error_before_anything_is_written(
    small_run, tmp_path, changes, message
):
    with pytest.raises(SppnetError, match=message):
        train(changed(small_run, **changes), tmp_path / "run", "proposals")
    assert not (tmp_path / "run").exists()


def test_an_edge_model_that_the_method_does_not_read_is_not_asked_for_and_counts_for_nothing(small_run, tmp_path):
    config = changed(small_run, proposals__edge_model=str(tmp_path / "gone.yml"))
    training = Training(config, small_run.root, torch.device("cpu"))
    assert training.networks.missing_inputs(STAGES) == []
    assert all(status.complete for status in training.graph.statuses())


def test_files_of_windows_that_are_missing_are_an_error_before_the_first_stage(small_run, tmp_path):
    config = changed(small_run, proposals__import_from=[str(tmp_path / "none.npz")])
    with pytest.raises(SppnetError, match=r"none\.npz: no such file; check proposals\.import_from"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_proposals_need_no_weights(small_run, tmp_path):
    weights = {"source": "file", "file": str(tmp_path / "none.safetensors")}
    assert train(changed(small_run, backbone__weights=weights), tmp_path / "run", "proposals") is None
    assert len(list((tmp_path / "run").glob("proposals-*/SHAPES/*"))) == 11


def test_the_status_reads_no_weights_and_writes_nothing(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(training_networks, "build_backbone", lambda *a: pytest.fail("the status needs no network"))
    status = Training(
        changed(small_run, backbone__name="alexnet"), tmp_path / "run", torch.device("cpu")
    ).graph.statuses()
    assert [stage.done for stage in status] == [0] * len(STAGES)
    assert list(tmp_path.iterdir()) == []


# ---- what is printed -----------------------------------------------------------------------------------------------


def test_the_end_of_training_is_a_table_of_stages_times_and_deeds(small_run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sppnet")
    run = copied(small_run, tmp_path / "run")
    train(run.config, run.root)
    lines = caplog.records[-1].getMessage().splitlines()[1:]
    assert lines[0].split() == ["stage", "time", "done"]
    assert [line.split()[0] for line in lines[1:]] == list(STAGES)
    deeds = {line.split()[0]: line for line in lines[1:]}
    assert "0 imported, 11 reused" in deeds["proposals"]
    assert "skipped: low_rank.fc6 and low_rank.fc7 are 0" in deeds["low_rank"]
    assert "0 maps computed, 19 reused" in deeds["maps"]
    assert deeds["svm"].endswith("reused")
    assert "0 classes fitted" in deeds["boxes"]


def test_a_status_says_what_would_be_done_and_why(tmp_path):
    folder = tmp_path / "svm-1234"

    def line(done: int = 0, total: int = 1, skipped: str = "", checkpoint: Path | None = None, **options) -> str:
        return StageStatus("svm", folder, done, total, skipped, checkpoint).describe(**options)

    assert line() == "svm        run      nothing there yet; 1 to do in svm-1234"
    assert line(1) == "svm        reuse    all 1 in svm-1234"
    assert line(3, 8) == "svm        resume   3 of 8 in svm-1234"
    assert line(skipped="it is disabled", invalidated=STAGES) == "svm        skip     it is disabled"
    assert line(only=("boxes",), invalidated=("svm",)) == "svm        leave    not selected; 0 of 1 in svm-1234"
    assert line(1, invalidated=("svm",)).split(maxsplit=2)[1:] == [
        "run", "from scratch, as asked; 1 of 1 in svm-1234 are there and would be deleted"]  # fmt: skip
    assert (
        line(checkpoint=folder / "checkpoint.safetensors") == "svm        resume   from svm-1234/checkpoint.safetensors"
    )
    assert line(1, only=("finetune",), invalidated=("finetune", "svm")) == (
        "svm        leave    not selected; 1 of 1 in svm-1234; depends on re-run stages and would be deleted"
    )
    (tmp_path / "svm-0000").mkdir()
    assert "settings or inputs are not those of svm-0000" in line()


def test_the_folder_of_a_run_is_named_by_text_or_path(small_run, digest, tmp_path):
    run = copied(small_run, tmp_path / "run")
    assert train_detector(run.config, str(run.root), progress=False) is not None
    assert digest_in(run.root) == digest


@pytest.mark.parametrize("config", ["configs/voc9_study.yaml", {"name": "mine"}, None])
def test_what_is_no_config_is_refused_with_what_reads_one(tmp_path, config):
    with pytest.raises(SppnetError, match=r"config: expected a Config, got .*; read one with load_config"):
        train_detector(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
