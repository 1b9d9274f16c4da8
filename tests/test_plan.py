"""Which images a run uses, and which stages a changed setting, image or annotation redoes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline import merged, small_settings

from sppnet.config import Config
from sppnet.config_files import parse_config
from sppnet.data.voc import DatasetError, write_annotation
from sppnet.detection.plan import RunPlan, load_run_data, load_test_data, splits_to_test, windows_folder
from sppnet.detection.stages import STAGES
from sppnet.detection.training import Training

USED = tuple(stage for stage in STAGES if stage not in ("pretrain", "compress"))


def changed(run, **changes) -> Config:
    """The settings of the run with section__key=value changed."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged(small_settings(run.devkit, run.config.proposals.import_from[0]), dotted), "test")


def redone(run, config: Config) -> tuple[str, ...]:
    """The stages of which nothing is there yet under these settings."""
    status = Training(config, run.root, torch.device("cpu")).status()
    return tuple(stage.name for stage in status if not stage.skipped and stage.done == 0)


def own_devkit(run, folder: Path) -> Path:
    shutil.copytree(run.devkit, folder)
    return folder


# ---- which stages are redone ---------------------------------------------------------------------------------------


def test_everything_is_reused_under_the_same_settings(small_run):
    assert redone(small_run, small_run.config) == ()


@pytest.mark.parametrize(
    ("setting", "value", "stages"),
    [
        ("name", "other", ""),
        ("proposals__workers", 2, ""),
        ("evaluate__metric", "area", ""),
        ("detect__score_threshold", -1.0, ""),
        ("boxes__enabled", False, ""),
        ("boxes__ridge", 10.0, "boxes"),
        ("boxes__layer", "fc7", "boxes"),
        ("svm__C", 0.01, "svm"),
        ("svm__layer", "fc6", "svm"),
        ("svm__norm_images", 3, "svm"),
        ("detect__precision", "bfloat16", "svm"),
        ("finetune__seed", 1, "finetune svm"),
        ("finetune__flip", False, "finetune svm"),
        ("finetune__validate_images", 2, "finetune svm"),
        ("head__fc7", 8, "finetune svm"),
        ("head__input_norm", None, "finetune svm"),
        ("pyramid__levels", [1], "finetune svm boxes"),
        ("pyramid__projection", "paper", "finetune svm boxes"),
        ("data__train_on_difficult", False, "finetune svm boxes"),
        ("data__classes", ["star", "cross"], "finetune svm boxes"),
        ("proposals__min_side", 30, "propose finetune svm boxes"),
        ("proposals__import_from", [], "propose finetune svm boxes"),
        ("maps__scales", [96], "extract finetune svm boxes"),
        ("maps__storage", "float32", "extract finetune svm boxes"),
        ("trunk__weights__mean", [1, 2, 3], "extract finetune svm boxes"),
        ("trunk__name", "zf5", "extract finetune svm boxes"),
        ("pretrain__enabled", True, "pretrain extract finetune svm boxes"),
        ("compress__fc6", 5, "compress svm"),
        ("compress__fc7", 5, "compress svm"),
        ("compress__images", 3, ""),  # without ranks nothing is compressed
    ],
)
def test_a_changed_setting_redoes_exactly_the_stages_that_depend_on_it(small_run, setting, value, stages):
    assert redone(small_run, changed(small_run, **{setting: value})) == tuple(stages.split())


def test_the_features_of_svms_that_are_not_fine_tuned_do_not_depend_on_fine_tuning(small_run):
    plan = RunPlan(small_run.root, small_run.config, load_run_data(small_run.config))
    start = changed(small_run, svm__finetuned=False)
    other = changed(small_run, svm__finetuned=False, finetune__batch=16)
    own, unlike = (RunPlan(small_run.root, config, plan.data) for config in (start, other))
    assert own.svm == unlike.svm != plan.svm
    assert not own.uses_trained_head
    assert plan.uses_trained_head


def test_the_head_is_trained_only_where_its_features_are_wanted(small_run):
    data = load_run_data(small_run.config)

    def uses(**changes) -> bool:
        return RunPlan(small_run.root, changed(small_run, **changes), data).uses_trained_head

    assert uses()
    assert uses(svm__layer="pool", boxes__layer="fc6")
    assert not uses(svm__layer="pool")
    assert not uses(svm__layer="pool", boxes__layer="fc6", boxes__enabled=False)
    assert not uses(finetune__enabled=False)
    assert not uses(svm__finetuned=False, boxes__layer="fc6")


def test_the_content_of_imported_windows_counts_and_not_their_path(small_run, tmp_path):
    file = small_run.config.proposals.import_from[0]
    moved = shutil.copy(file, tmp_path / "moved.npz")
    settings = small_run.config.proposals
    same = settings.model_copy(update={"import_from": (Path(moved),)})
    assert windows_folder(tmp_path, same) == windows_folder(tmp_path, settings)
    with np.load(file) as archive:
        np.savez(tmp_path / "moved.npz", **{**dict(archive), "boxes": archive["boxes"] + 1})
    assert windows_folder(tmp_path, same) != windows_folder(tmp_path, settings)


def test_a_changed_annotation_redoes_what_is_trained_on_objects(small_run, tmp_path):
    devkit = own_devkit(small_run, tmp_path / "VOCdevkit")
    config = changed(small_run, data__root=str(devkit))
    assert redone(small_run, config) == ()
    write_annotation(devkit / "SHAPES/Annotations/train_00003.xml", (50, 60), [[5, 5, 40, 40]], ["star"], [False])
    assert redone(small_run, config) == ("finetune", "svm", "boxes")


def test_a_changed_validation_annotation_redoes_fine_tuning_alone(small_run, tmp_path):
    devkit = own_devkit(small_run, tmp_path / "VOCdevkit")
    write_annotation(devkit / "SHAPES/Annotations/val_00001.xml", (50, 60), [[5, 5, 40, 40]], ["star"], [False])
    assert redone(small_run, changed(small_run, data__root=str(devkit))) == ("finetune", "svm")


def test_a_changed_image_redoes_its_own_windows_and_maps(small_run, tmp_path):
    devkit = own_devkit(small_run, tmp_path / "VOCdevkit")
    Image.new("RGB", (320, 240), "red").save(devkit / "SHAPES/JPEGImages/train_00003.jpg")
    status = Training(changed(small_run, data__root=str(devkit)), small_run.root, torch.device("cpu")).status()
    done = {stage.name: (stage.done, stage.total) for stage in status}
    assert done["propose"] == (10, 11)
    assert done["extract"] == (17, 19)  # the image and its mirror image
    assert done["finetune"] == done["svm"] == (0, 1)


# ---- which images --------------------------------------------------------------------------------------------------


def test_where_no_validation_is_named_a_share_of_the_training_images_is_held_out(small_run):
    config = changed(small_run, data__val=[], data__test=[], data__holdout=0.25)
    data = load_run_data(config)
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert not {r.id for r in data.train} & {r.id for r in data.validation}
    assert splits_to_test(config) == ()
    records, _ = load_test_data(config)
    assert [r.id for r in records] == [r.id for r in data.validation]


def test_the_images_to_test_are_those_given_then_test_then_val(small_run):
    config = small_run.config
    assert splits_to_test(config, ("A/b",)) == ("A/b",)
    assert splits_to_test(config) == ("SHAPES/test",)
    without = changed(small_run, data__test=[])
    assert splits_to_test(without) == ("SHAPES/val",)
    assert len(load_test_data(without)[0]) == 3
    assert len(load_test_data(config)[0]) == 4
    assert len(load_test_data(config, splits=("SHAPES/train", "SHAPES/val"))[0]) == 11


def test_validation_windows_come_from_images_spread_over_the_split(small_run):
    config = changed(small_run, data__val=["SHAPES/train"], data__train=["SHAPES/test"], finetune__validate_images=3)
    data = load_run_data(config)
    chosen = RunPlan(small_run.root, config, data).validation
    assert [record.id for record in chosen] == [data.validation[i].id for i in (0, 2, 5)]


def test_the_line_about_the_data_counts_images_skips_and_leaks(small_run, tmp_path):
    devkit = own_devkit(small_run, tmp_path / "VOCdevkit")
    boxes = [[5, 5, 5, 40], [900, 5, 940, 40], [5, 5, 40, 40]]
    write_annotation(devkit / "SHAPES/Annotations/train_00003.xml", (50, 60), boxes, ["star"] * 3, [False] * 3)
    line = str(load_run_data(changed(small_run, data__root=str(devkit))))
    assert line.startswith("data: 8 training and 3 validation images, 5 classes (cross, disc, square, star, triangle)")
    assert "1 × zero-area box" in line
    assert "1 × box outside the image" in line
    assert "without objects" not in line
    leak = changed(small_run, data__val=["SHAPES/trainval"])
    assert "8 validation images are training images too" in str(load_run_data(leak))


def test_the_line_about_the_data_counts_images_without_objects_of_the_classes(small_run, tmp_path):
    devkit = own_devkit(small_run, tmp_path / "VOCdevkit")
    for split, stars in (("train", 6), ("val", 2)):
        for number in range({"train": 8, "val": 3}[split]):
            names = ["star" if number < stars else "owl"]
            write_annotation(
                devkit / f"SHAPES/Annotations/{split}_{number:05d}.xml", (50, 60), [[5, 5, 40, 40]], names, [False]
            )
    write_annotation(devkit / "SHAPES/Annotations/train_00001.xml", (50, 60), [], [], [])
    data = load_run_data(changed(small_run, data__root=str(devkit), data__classes=["star"]))
    assert str(data).endswith(
        "; 3 × training image without objects (background for the SVMs alone); "
        "1 × validation image without objects (no part of the error)"
    )


def test_missing_data_name_the_script_that_fetches_them(small_run, tmp_path):
    with pytest.raises(DatasetError, match=r"none: no such data folder; fetch .* with scripts/fetch_voc, or set"):
        load_run_data(changed(small_run, data__root=str(tmp_path / "none")))
    with pytest.raises(DatasetError, match=r"none: no such data folder; name the one .* with --data"):
        load_test_data(small_run.config, tmp_path / "none")


def test_the_stages_in_use_are_five_without_pretraining(small_run):
    status = Training(small_run.config, small_run.root, torch.device("cpu")).status()
    assert tuple(stage.name for stage in status) == STAGES
    assert tuple(stage.name for stage in status if not stage.skipped) == USED
    assert all(stage.complete for stage in status)


@pytest.mark.parametrize(
    ("setting", "value", "stage", "stages"),
    [
        ("svm__C", 1.0, "propose", "finetune svm boxes"),
        ("svm__C", 1.0, "pretrain", "extract finetune svm boxes"),
        ("svm__C", 1.0, "extract", "finetune svm boxes"),
        ("svm__C", 1.0, "finetune", "svm"),
        ("boxes__layer", "fc6", "finetune", "svm boxes"),
        ("svm__layer", "pool", "finetune", ""),
        ("svm__finetuned", False, "finetune", ""),
        ("svm__C", 1.0, "svm", ""),
        ("compress__fc6", 5, "extract", "finetune compress svm boxes"),
        ("compress__fc6", 5, "finetune", "compress svm"),
        ("compress__fc6", 5, "compress", "svm"),
        ("svm__C", 1.0, "compress", ""),
    ],
)
def test_the_stages_that_rest_on_another_are_known(small_run, setting, value, stage, stages):
    plan = Training(changed(small_run, **{setting: value}), small_run.root, torch.device("cpu")).plan
    assert plan.dependents(stage) == tuple(stages.split())
