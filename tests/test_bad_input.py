"""Bad input to every command: status 2, one sentence that names the file and the next step, nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_run import copied, modified, refused, run_command, small_settings, write_config, write_windows

from sppnet.data.voc import write_annotation

STAR = [[20, 20, 90, 90]]


@pytest.fixture
def devkit(small_run, tmp_path) -> Path:
    """A copy of the data, to be spoilt."""
    return Path(shutil.copytree(small_run.devkit, tmp_path / "VOCdevkit"))


@pytest.fixture
def config(small_run, devkit, tmp_path) -> Path:
    return write_config(tmp_path / "own.yaml", small_settings(devkit, small_run.config.proposals.import_from[0]))


@pytest.fixture
def run(small_run, tmp_path):
    return copied(small_run, tmp_path / "trained")


def training_refused(config: Path, *overrides: str) -> str:
    """The sentence with which `sppnet train` refuses; no run folder is made."""
    root = config.parent / "run"
    message = refused("train", config, "--run", root, *(("--set", *overrides) if overrides else ()))
    assert not root.exists()
    dry = run_command("train", config, "--run", root, "--dry-run", *(("--set", *overrides) if overrides else ()))
    assert dry.status in (0, 1, 2)
    assert (dry.status == 0) == (dry.err == "")
    assert not root.exists()
    return message


def annotation(devkit: Path, stem: str) -> Path:
    return devkit / f"SHAPES/Annotations/{stem}.xml"


def image(devkit: Path, stem: str) -> Path:
    return devkit / f"SHAPES/JPEGImages/{stem}.jpg"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


# ---- configurations ------------------------------------------------------------------------------------------------


def test_a_configuration_that_is_not_there_or_no_yaml(tmp_path):
    assert "none.yaml: cannot read the configuration" in training_refused(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("maps: [1, 2")
    assert "broken.yaml: not valid YAML" in refused("train", tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- maps")
    assert "list.yaml: expected a mapping of settings, got list" in training_refused(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("map.scales=[96]", "unknown setting map; did you mean maps?"),
        ("maps.scale=[96]", "unknown setting maps.scale; did you mean maps.scales?"),
        ("backbone.weights.meen=[1,2,3]", "unknown setting backbone.weights.meen; did you mean backbone.weights.mean?"),
        ("maps.scales", "--set maps.scales: expected key=value, e.g. --set maps.scales=[480,688]"),
        ("maps.scales=[96", "the value is not valid YAML"),
        ("name.first=x", "name is not a section"),
        ("maps.scales=large", "maps.scales: expected a list in square brackets, e.g. [a, b], got 'large'"),
        ("maps.scales=480", "maps.scales: expected a list in square brackets, e.g. [a, b], got 480"),
        ("maps=480", "maps: expected a section of settings, got 480"),
        ("finetune.images_per_batch=many", "finetune.images_per_batch: expected a whole number, got 'many'"),
        ("finetune.images_per_batch=1.5", "finetune.images_per_batch: expected a whole number, got 1.5"),
        ("finetune.flip=perhaps", "finetune.flip: expected true or false, got 'perhaps'"),
        ("backbone.name=[zf5]", "backbone.name: expected text, got ['zf5']"),
        ("data.root=[a]", "data.root: expected a path, got ['a']"),
        ("maps.scales=[]", "maps.scales: expected a list with something in it, got []"),
        ("maps.scales=[0]", "maps.scales.0: Input should be greater than or equal to 16, got 0"),
        ("pyramid.levels=[0]", "pyramid.levels.0: Input should be greater than or equal to 1, got 0"),
        ("pyramid.levels=[]", "pyramid.levels: expected a list with something in it, got []"),
        ("finetune.steps=[1,2,3]", "steps has 3 phases but learning_rates has 2; give one learning rate per phase"),
        ("finetune.learning_rates=[0,1]", "finetune.learning_rates.0: Input should be greater than 0, got 0"),
        ("finetune.momentum=2", "finetune.momentum: Input should be less than 1, got 2"),
        ("finetune.seed=-1", "finetune.seed: Input should be greater than or equal to 0, got -1"),
        ("svm.C=.inf", "svm.C: expected a finite number, got inf"),
        ("svm.norm_images=0", "svm.norm_images: Input should be greater than or equal to 1, got 0"),
        ("svm.layer=fc8", "svm.layer: Input should be 'pool', 'fc6' or 'fc7', got 'fc8'"),
        ("boxes.overlap=1.5", "boxes.overlap: Input should be less than or equal to 1, got 1.5"),
        ("detect.nms_overlap=30", "detect.nms_overlap: Input should be less than or equal to 1, got 30"),
        (
            "pretrain.enabled=true",
            "unknown setting pretrain; known here: name, ",
        ),
        ("backbone.weights.std=[0,1,1]", "backbone.weights.std.0: Input should be greater than 0, got 0"),
        ("name=../elsewhere", "name: expected a name without slashes and control characters"),
    ],
)
def test_settings_that_do_not_exist_or_make_no_sense(config, override, message):
    assert message in training_refused(config, override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.name=zf6"], "unknown backbone.name=zf6; did you mean zf5?"),
        (["backbone.layer=conv9"], "unknown backbone.layer=conv9 of tiny5; known: conv1, conv2, conv3, conv4, conv5"),
        (["backbone.weights.source=file"], "source is 'file' but no file is named; set backbone.weights.file=PATH"),
        (
            ["backbone.weights.source=torchvision"],
            "torchvision has no weights for 'tiny5'; set backbone.weights.source=file",
        ),
        (["head.init=checkpoint"], "head.init is 'checkpoint' but no file is named; set head.checkpoint=PATH"),
        (["proposals.import_from=[none.npz]"], "none.npz: no such file; check proposals.import_from"),
    ],
)
def test_networks_and_files_that_cannot_be_had(config, overrides, message):
    assert message in training_refused(config, *overrides)


def test_weights_of_another_network_or_of_none(config, tmp_path):
    save_file({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    np.savez(tmp_path / "nan.npz", **{"conv1.weight": np.full(3, np.nan)})
    for name, expected in (
        ("none.npz", "no such file; check backbone.weights.file"),
        ("other.safetensors", "tensors needed do not fit: conv1.conv.weight is missing"),
        ("text.pth", "expected a complete .pth file of plain tensors"),
        ("nan.npz", "holds NaN or infinity; fetch it again"),
    ):
        overrides = ("backbone.weights.source=file", f"backbone.weights.file={tmp_path / name}")
        message = training_refused(config, *overrides)
        assert str(tmp_path / name) in message
        assert expected in message


def test_a_run_folder_that_is_a_file(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused("train", config, "--run", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ---- data sets -----------------------------------------------------------------------------------------------------


def test_missing_data_name_what_fetches_them(config):
    message = training_refused(config, "data.root=/nowhere/VOCdevkit")
    assert "/nowhere/VOCdevkit: no such data folder; set data.root to your own folder" in message


def test_the_same_is_said_by_a_dry_run(config, tmp_path):
    message = refused("train", config, "--run", tmp_path / "run", "--dry-run", "--set", "data.root=/nowhere")
    assert "/nowhere: no such data folder; set data.root to your own folder" in message


def test_splits_that_are_not_there_or_overlap(config):
    message = training_refused(config, "data.train=[SHAPES/trian]")
    assert "no part 'SHAPES/trian' in these VOC data; parts here: SHAPES/test, SHAPES/train" in message
    assert "no part 'train' in these VOC data; parts here: SHAPES/test, SHAPES/train" in training_refused(
        config, "data.train=[train]"
    )
    message = training_refused(config, "data.train=[SHAPES/train,SHAPES/trainval]")
    assert "image SHAPES/train_00000 is in SHAPES/train and in SHAPES/trainval" in message


def test_image_sets_that_list_nothing_or_one_image_twice(config, devkit):
    image_set = devkit / "SHAPES/ImageSets/Main/train.txt"
    lines = image_set.read_text().splitlines()
    image_set.write_text("\n")
    assert f"{image_set}: lists no image; write one image id per line" in training_refused(config)
    image_set.write_text("\n".join([*lines, lines[0]]))
    assert f"{image_set}:9: '{lines[0]}' is already on line 1; remove one of them" in training_refused(config)


def test_a_missing_image(config, devkit):
    image(devkit, "train_00003").unlink()
    message = training_refused(config)
    assert "SHAPES/JPEGImages/train_00003: no such image" in message
    assert "1 of 8 images in" in message


def test_an_image_that_is_none(config, devkit):
    image(devkit, "train_00003").write_text("no image")
    message = training_refused(config)
    assert f"{image(devkit, 'train_00003')}: expected an image" in message
    assert "convert or remove it" in message


def test_an_annotation_that_is_missing_no_xml_or_something_else(config, devkit):
    path = annotation(devkit, "train_00003")
    whole = path.read_text()
    for content, expected in (
        (whole[: len(whole) // 2], "cannot read this annotation as XML"),
        ("", "cannot read this annotation as XML"),
        ("<html></html>", "expected <annotation> at the top, got <html>; give a PASCAL VOC annotation"),
        (whole.replace("name>", "title>"), "an <object> has no <name>; name its class or remove the object"),
        (whole.replace("<xmin>", "<xmin>left"), "must be a number, got 'left"),
        (whole.replace("bndbox", "box"), "has no <bndbox>; add its box or remove the object"),
    ):
        path.write_text(content)
        message = training_refused(config)
        assert message.startswith(f"{path}: ")
        assert expected in message
    path.unlink()
    assert f"{path}: no such annotation file; add it or take the image out of the set" in training_refused(config)


def test_entities_of_an_annotation_are_not_expanded(config, devkit):
    path = annotation(devkit, "train_00003")
    path.write_text('<!DOCTYPE a [<!ENTITY e "x">]><annotation><object><name>&e;</name></object></annotation>')
    assert f"{path}: cannot read this annotation as XML (EntitiesForbidden" in training_refused(config)


def test_boxes_without_area_or_outside_the_image_are_left_out_and_counted(config, devkit, tmp_path):
    boxes = [[50, 5, 50, 40], [900, 5, 940, 40], [-10, 20, 60, 90], *STAR]
    write_annotation(annotation(devkit, "train_00003"), (5, 5), boxes, ["star"] * 4, [False] * 4)
    result = run_command("train", config, "--run", tmp_path / "run")
    assert result.status == 0, result.err
    counted = ["1 × zero-area box", "1 × box outside the image", "1 × box clipped to the image"]
    assert all(text in result.err for text in [*counted, "1 × annotation size disagrees with the image"])
    assert all(text in run_command("train", config, "--run", tmp_path / "run", "--dry-run").out for text in counted)


def test_skips_are_counted_by_eval_too(run, devkit):
    write_annotation(annotation(devkit, "test_00001"), (5, 5), [[50, 5, 50, 40], *STAR], ["star"] * 2, [False] * 2)
    result = run_command("eval", run.root, "--data", devkit)
    assert result.status == 0, result.err
    assert "1 × zero-area box" in result.err


def test_a_class_that_never_occurs(config):
    message = training_refused(config, "data.classes=[star,zebra]")
    assert "class 'zebra' never occurs; classes found in the training images: cross, disc, square, star" in message
    message = training_refused(config, "data.classes=[star,star]")
    assert "data.classes names 'star' twice" in message


def test_no_objects_at_all(config, devkit):
    for path in (devkit / "SHAPES/Annotations").iterdir():
        write_annotation(path, (10, 10), [], [], [])
    assert "no class to train; classes found in the training images: none" in training_refused(config)


# ---- images that end too early: noticed where they are decoded, whatever was done before --------------------------


def test_a_truncated_image_in_propose(config, devkit, tmp_path):
    truncate(image(devkit, "train_00003"))
    message = refused("propose", config, "--run", tmp_path / "run", "--set", "proposals.import_from=[]")
    assert f"{image(devkit, 'train_00003')}: expected a complete image" in message
    assert "fetch the file again or remove it" in message
    done = [path.name for path in (tmp_path / "run").rglob("*.npz")]
    assert done
    assert not any(name.startswith(("train_00003", ".")) for name in done)


def test_a_truncated_image_in_extract(small_run, config, devkit, tmp_path):
    truncate(image(devkit, "train_00003"))
    assert run_command("propose", config, "--run", tmp_path / "run").status == 0  # imported, so nothing is decoded
    message = refused("extract", config, "--run", tmp_path / "run")
    assert f"{image(devkit, 'train_00003')}: expected a complete image" in message
    shutil.copy(image(small_run.devkit, "train_00003"), image(devkit, "train_00003"))
    assert run_command("train", config, "--run", tmp_path / "run").status == 0


def test_a_truncated_image_in_eval(run, devkit):
    truncate(image(devkit, "test_00002"))
    message = refused("eval", run.root, "--data", devkit)
    assert f"{image(devkit, 'test_00002')}: expected a complete image" in message
    assert not (run.root / "results").exists()


def test_a_truncated_image_in_detect(run, devkit, tmp_path):
    truncate(image(devkit, "test_00002"))
    result = run_command("detect", run.root, image(devkit, "test_00002"), "--out", tmp_path / "out")
    assert result.status == 1
    assert "0 detections in 0 images" in result.out
    assert f"skipped: {image(devkit, 'test_00002')}: expected a complete image" in result.err


# ---- proposals and detectors ---------------------------------------------------------------------------------------


def test_windows_of_other_images(config, devkit, tmp_path):
    file = write_windows(devkit, tmp_path / "own.npz")
    with np.load(file) as archive:
        values = dict(archive)
    np.savez(file, **{**values, "boxes": values["boxes"] * 3})
    message = refused("train", config, "--run", tmp_path / "run", "--set", f"proposals.import_from=[{file}]")
    assert f"{file}: a window of SHAPES/" in message
    assert "outside the image" in message
    np.savez(file, **{**values, "ids": np.array([f"images/{name}" for name in values["ids"]])})
    message = refused("propose", config, "--run", tmp_path / "run", "--import", file)
    assert f"{file}: windows of none of the images; its first image is images/SHAPES/" in message
    file.write_text("no archive")
    message = refused("propose", config, "--run", tmp_path / "run", "--import", file)
    assert f"{file}: not a readable .npz file" in message
    assert not list((tmp_path / "run").rglob("*.npz"))


def test_no_detector_to_evaluate_or_detect_with(devkit, tmp_path):
    expected = "holds no trained detector (detector/detector.json); run `sppnet train` to the end first"
    for command in (["eval", tmp_path], ["test", tmp_path], ["detect", tmp_path, devkit, "--out", tmp_path / "out"]):
        assert f"{tmp_path}: {expected}" in refused(*command)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "results").exists()


def test_a_damaged_detector(run, devkit):
    path = run.root / "detector/svm.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    before = modified(run.root)
    message = refused("eval", run.root)
    assert f"{path}: missing or damaged; run `sppnet train` again" in message
    assert modified(run.root) == before


def test_no_image_to_detect_in(run, tmp_path):
    for asked, message in (
        (tmp_path / "none.jpg", "no such file, folder or match"),
        (tmp_path / "*.png", "no such file, folder or match"),
        (tmp_path / "trained/detector", "no image in this folder"),
    ):
        assert message in refused("detect", run.root, asked, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_the_default_folder_is_said_to_be_that_of_pascal_voc(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("train", config, "--run", tmp_path / "run", "--dry-run", "--set", "data.root=data/VOCdevkit")
    assert "data/VOCdevkit: no such data folder; fetch PASCAL VOC with scripts/fetch_voc, or set data.root" in message


@pytest.mark.parametrize("split", ["SHAPES/tset", "OTHER/test", "test"])
def test_a_dry_run_names_test_splits_that_are_not_there(config, tmp_path, split):
    result = run_command("train", config, "--run", tmp_path / "run", "--dry-run", "--set", f"data.test=[{split}]")
    assert result.status == 1
    assert split in result.err
    assert "sppnet eval would end there (data.test)" in result.err
