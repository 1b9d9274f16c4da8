"""Which images a run uses, and which stages a changed setting, image or annotation redoes."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import merged, small_settings

from sppnet.artifacts import digest_of, file_digest
from sppnet.config import STAGES, Config
from sppnet.config_files import parse_config
from sppnet.data.voc import write_annotation
from sppnet.errors import SppnetError
from sppnet.pipeline.run_data import RunData, load_run_data, load_test_data
from sppnet.pipeline.stages import GRAPH, StageGraph, windows_folder
from sppnet.pipeline.training import Training

PAPER = tuple(stage for stage in STAGES if stage not in ("embed", "joint"))
USED = tuple(stage for stage in PAPER if stage != "low_rank")
JOINT = ("proposals", "embed", "joint", "thresholds")


def changed(run, **changes) -> Config:
    """The settings of the run with section__key=value changed."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged(small_settings(run.devkit, run.config.proposals.import_from[0]), dotted), "test")


def invalidated(run, config: Config) -> tuple[str, ...]:
    """The stages of which nothing is there yet under these settings."""
    status = Training(config, run.root, torch.device("cpu")).graph.statuses()
    return tuple(stage.name for stage in status if not stage.skipped and stage.done == 0)


def own_devkit(run, folder: Path) -> Path:
    shutil.copytree(run.devkit, folder)
    return folder


# ---- which stages are invalidated ----------------------------------------------------------------------------------


def test_everything_is_reused_under_the_same_settings(small_run):
    assert invalidated(small_run, small_run.config) == ()


@pytest.mark.parametrize(
    ("setting", "value", "stages"),
    [
        ("name", "other", ""),
        ("proposals__workers", 2, ""),
        ("evaluate__metric", "area", ""),
        ("detect__score_threshold", -1.0, "thresholds"),
        ("boxes__enabled", False, "thresholds"),
        ("boxes__ridge", 10.0, "boxes thresholds"),
        ("boxes__layer", "fc7", "boxes thresholds"),
        ("svm__C", 0.01, "svm thresholds"),
        ("svm__layer", "fc6", "svm thresholds"),
        ("svm__norm_images", 3, "svm thresholds"),
        ("maps__runtime", "auto", ""),
        ("precision", "bfloat16", "maps finetune svm boxes thresholds"),
        ("finetune__seed", 1, "finetune svm thresholds"),
        ("finetune__flip", False, "finetune svm thresholds"),
        ("finetune__validate_images", 2, "finetune svm thresholds"),
        ("head__fc7", 8, "finetune svm thresholds"),
        ("head__input_norm", None, "finetune svm thresholds"),
        ("pyramid__levels", [1], "finetune svm boxes thresholds"),
        ("pyramid__projection", "paper", "finetune svm boxes thresholds"),
        ("data__train_on_difficult", False, "finetune svm boxes thresholds"),
        ("data__classes", ["star", "cross"], "finetune svm boxes thresholds"),
        ("proposals__min_side", 30, "proposals finetune svm boxes thresholds"),
        ("proposals__import_from", [], "proposals finetune svm boxes thresholds"),
        ("proposals__method", "edge_boxes", "proposals finetune svm boxes thresholds"),
        ("proposals__edge_model", "model.yml", ""),  # read by edge_boxes alone
        ("train_proposals", [{}], "proposals finetune svm boxes thresholds"),
        ("maps__scales", [96], "maps finetune svm boxes thresholds"),
        ("maps__storage", "float32", "maps finetune svm boxes thresholds"),
        ("maps__budget_gigabytes", 1.0, ""),
        ("maps__scale_choice", "paper", ""),  # of one scale there is no choice
        ("maps__target_side", 100, ""),
        ("backbone__weights__mean", [1, 2, 3], "maps finetune svm boxes thresholds"),
        ("backbone__name", "zf5", "maps finetune svm boxes thresholds"),
        ("low_rank__fc6", 5, "low_rank svm thresholds"),
        ("low_rank__fc7", 5, "low_rank svm thresholds"),
        ("low_rank__steps", [1, 1], ""),  # without ranks there is no such stageed
    ],
)
def test_a_changed_setting_redoes_exactly_the_stages_that_depend_on_it(small_run, setting, value, stages):
    assert invalidated(small_run, changed(small_run, **{setting: value})) == tuple(stages.split())


@pytest.mark.parametrize(
    ("setting", "value", "stages"),
    [
        ("finetune__batch", 16, ""),
        ("svm__C", 0.01, ""),
        ("boxes__ridge", 10.0, ""),
        ("head__fc6", 8, "joint thresholds"),
        ("joint__steps", 7, "joint thresholds"),
        ("joint__rank", 7, "embed joint thresholds"),
        ("joint__windows", 7, "embed joint thresholds"),
        ("joint__flip", True, "joint thresholds"),
        ("joint__seed", 7, "embed joint thresholds"),
        ("head__dropout", 0.1, "joint thresholds"),
        ("head__init", "imagenet", ""),  # of the paper's head
        ("head__input_norm", 30, ""),
        ("finetune__validate_images", 2, "thresholds"),
        ("maps__scales", [96], "embed joint thresholds"),
        ("maps__budget_gigabytes", 1e-9, ""),
        ("data__train_on_difficult", False, "embed joint thresholds"),
        ("proposals__min_side", 30, "proposals embed joint thresholds"),
        ("detect__vote", False, "thresholds"),
    ],
)
def test_a_changed_setting_of_a_joint_head_redoes_exactly_the_stages_that_depend_on_it(
    small_run, setting, value, stages
):
    own, configs = {"head__training": "joint"}, ({}, {setting: value})
    before, after = (
        StageGraph(small_run.root, config, load_run_data(config))
        for config in (changed(small_run, **own, **more) for more in configs)
    )
    assert tuple(status.name for status in before.statuses() if not status.skipped) == JOINT
    changes = {name for name in JOINT if before.digests[name] != after.digests[name]}
    assert changes == {*stages.split()}


def test_rows_of_a_joint_head_are_of_windows_at_their_scales(small_run):
    own = {"head__training": "joint", "maps__scales": [96, 128]}
    before, after = (
        StageGraph(small_run.root, changed(small_run, **own, **more), load_run_data(small_run.config)).digests
        for more in ({}, {"maps__target_side": 100})
    )
    assert {name for name in JOINT if before[name] != after[name]} == {*JOINT[1:]}


def test_thresholds_are_of_the_windows_to_test_on_and_so_are_the_rows_of_validation_images(small_run):
    own = {"head__training": "joint", "train_proposals": [{}]}
    before, after = (
        StageGraph(small_run.root, changed(small_run, **own, **more), load_run_data(small_run.config)).digests
        for more in ({}, {"proposals__min_side": 50})
    )
    assert {name for name in JOINT if before[name] != after[name]} == {*JOINT[1:]}


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"maps__scale_choice": "paper"}, "low_rank svm boxes thresholds"),
        ({"maps__target_side": 224}, "low_rank svm boxes thresholds"),
        ({"maps__target_side": 208}, ""),  # the release's own
        ({"maps__scale_choice": "release"}, ""),
    ],
)
@pytest.mark.parametrize("input_norm", [30, None])
def test_the_choice_of_a_scale_matters_where_windows_are_looked_at_in_their_own(small_run, changes, stages, input_norm):
    """Fine-tuning draws scales at random; only the norm that its input is scaled to is of windows at their own."""
    several = {"maps__scales": [96, 128], "low_rank__fc6": 5, "head__input_norm": input_norm}
    data = load_run_data(small_run.config)
    before, after = (
        StageGraph(small_run.root, changed(small_run, **several, **more), data).digests for more in ({}, changes)
    )
    expected = {*stages.split(), *(["finetune"] if stages and input_norm else [])}
    assert {name for name in PAPER if before[name] != after[name]} == expected


def test_the_two_rules_are_told_apart_by_more_than_their_side(small_run):
    data = load_run_data(small_run.config)
    several = {"maps__scales": [96, 128], "maps__target_side": 224}
    paper, own, other = (
        StageGraph(small_run.root, changed(small_run, **several, **more), data).digests["svm"]
        for more in ({"maps__scale_choice": "paper"}, {"maps__scale_choice": "release"}, {})
    )
    assert paper != own == other


def test_the_features_of_svms_that_are_not_fine_tuned_do_not_depend_on_fine_tuning(small_run):
    data = load_run_data(small_run.config)
    own, unlike, tuned = (
        StageGraph(small_run.root, config, data).digests["svm"]
        for config in (
            changed(small_run, svm__finetuned=False),
            changed(small_run, svm__finetuned=False, finetune__batch=16),
            small_run.config,
        )
    )
    assert own == unlike != tuned


def test_the_head_before_fine_tuning_decides_where_it_is_not_fine_tuned(small_run):
    data = load_run_data(small_run.config)
    digests = {
        StageGraph(small_run.root, changed(small_run, svm__finetuned=False, **changes), data).digests["svm"]
        for changes in ({}, {"head__fc6": 8}, {"finetune__seed": 1}, {"pyramid__levels": [1]})
    }
    assert len(digests) == 4


def test_layers_of_low_rank_are_not_tuned_again_where_the_head_is_not_fine_tuned(small_run):
    data = load_run_data(small_run.config)

    def digest(**changes):
        config = changed(small_run, low_rank__fc6=5, low_rank__learning_rates=[1e-3], **changes)
        return StageGraph(small_run.root, config, data).digests["low_rank"]

    one, other = ({"low_rank__steps": [count]} for count in (3, 4))
    assert digest(**one) != digest(**other)
    assert digest(finetune__enabled=False, **one) == digest(finetune__enabled=False, **other)


def test_the_head_is_trained_only_where_its_features_are_wanted(small_run):
    def uses(**changes) -> bool:
        return not GRAPH["finetune"].skipped(changed(small_run, **changes))

    assert uses()
    assert uses(svm__layer="pool", boxes__layer="fc6")
    assert not uses(svm__layer="pool")
    assert not uses(svm__layer="pool", boxes__layer="fc6", boxes__enabled=False)
    assert not uses(finetune__enabled=False)
    assert not uses(svm__finetuned=False, boxes__layer="fc6")


def test_a_newer_algorithm_invalidates_its_results_and_what_depends_on_them(small_run, monkeypatch):
    monkeypatch.setitem(GRAPH, "finetune", replace(GRAPH["finetune"], version=GRAPH["finetune"].version + 1))
    assert invalidated(small_run, small_run.config) == ("finetune", "svm", "thresholds")


def test_every_section_with_a_stage_is_in_the_graph_and_reads_only_earlier_ones(small_run):
    assert tuple(GRAPH) == STAGES
    for place, name in enumerate(STAGES):
        assert hasattr(small_run.config, name) or name in ("embed", "thresholds")
        assert set(GRAPH[name].reads(small_run.config)) <= set(STAGES[:place])


def test_settings_without_an_edge_model_or_windows_of_training_have_the_digests_they_had(tmp_path):
    windows = tmp_path / "w.npz"
    windows.write_bytes(b"windows")
    known = {"method": "selective_search", "mode": "fast", "max_windows": 2000, "min_side": 20, "max_side": 640}
    for imports, contents in ((), []), ((windows, tmp_path / "gone.npz"), [file_digest(windows)]):
        values = {"proposals": {**known, "import_from": contents}}
        config = parse_config({"proposals": {"import_from": list(map(str, imports))}}, "test")
        assert windows_folder(tmp_path, config).name == f"proposals-{digest_of('proposals', 1, values, [], [])}"


def test_windows_of_training_are_a_stage_of_their_own_searches_and_those_of_tests_stay(small_run):
    data = load_run_data(small_run.config)
    both = [{"method": "selective_search"}, {"method": "edge_boxes", "min_side": 30}]
    config = changed(small_run, train_proposals=both)
    graph = StageGraph(small_run.root, config, data)
    alone = [changed(small_run, proposals=values).proposals for values in both]
    assert list(graph.searches.values()) == alone
    for values, folder in zip(both, graph.searches, strict=True):
        assert folder == windows_folder(small_run.root, changed(small_run, proposals=values))
    assert windows_folder(small_run.root, config) == windows_folder(small_run.root, small_run.config)
    names = {graph.folder("proposals"), windows_folder(small_run.root, config), *graph.searches}
    assert len(names) == 4

    def digests(**changes):
        return StageGraph(small_run.root, changed(small_run, train_proposals=both, **changes), data).digests

    assert digests() == graph.digests == digests(proposals__workers=7)
    other = digests(proposals__min_side=50)  # of the windows to test on, on which thresholds are chosen
    assert {name for name in STAGES if other[name] != graph.digests[name]} == {"embed", "thresholds"}
    turned = StageGraph(small_run.root, changed(small_run, train_proposals=both[::-1]), data)
    assert turned.digests["proposals"] != graph.digests["proposals"]


def test_the_content_of_an_edge_model_counts_and_that_it_is_gone(small_run, tmp_path):
    def folder(name: str = "", section: str = "proposals") -> str:
        search = {"method": "edge_boxes", **({"edge_model": str(tmp_path / name)} if name else {})}
        config = changed(small_run, **{section: search if section == "proposals" else [search]})
        return StageGraph(small_run.root, config, load_run_data(small_run.config)).folder("proposals").name

    for name, content in {"a.yml": "a", "same.yml": "a", "b.yml": "b"}.items():
        (tmp_path / name).write_text(content)
    for section in ("proposals", "train_proposals"):
        one, same, other, gone, none = (folder(n, section) for n in ("a.yml", "same.yml", "b.yml", "gone.yml", ""))
        assert one == same
        assert len({one, other, gone, none}) == 4


def test_the_content_of_imported_windows_counts_and_not_their_path(small_run, tmp_path):
    file = small_run.config.proposals.import_from[0]
    moved = shutil.copy(file, tmp_path / "moved.npz")
    config = small_run.config
    same = config.model_copy(update={"proposals": config.proposals.model_copy(update={"import_from": (Path(moved),)})})
    assert windows_folder(tmp_path, same) == windows_folder(tmp_path, config)
    with np.load(file) as archive:
        np.savez(tmp_path / "moved.npz", **{**dict(archive), "boxes": archive["boxes"] + 1})
    assert windows_folder(tmp_path, same) != windows_folder(tmp_path, config)


def test_a_changed_annotation_redoes_what_is_trained_on_objects(small_run, tmp_path):
    devkit = own_devkit(small_run, tmp_path / "VOCdevkit")
    config = changed(small_run, data__root=str(devkit))
    assert invalidated(small_run, config) == ()
    write_annotation(devkit / "SHAPES/Annotations/train_00003.xml", (50, 60), [[5, 5, 40, 40]], ["star"], [False])
    assert invalidated(small_run, config) == ("finetune", "svm", "boxes", "thresholds")


def test_a_changed_validation_annotation_redoes_fine_tuning_and_thresholds(small_run, tmp_path):
    devkit = own_devkit(small_run, tmp_path / "VOCdevkit")
    write_annotation(devkit / "SHAPES/Annotations/val_00001.xml", (50, 60), [[5, 5, 40, 40]], ["star"], [False])
    assert invalidated(small_run, changed(small_run, data__root=str(devkit))) == ("finetune", "svm", "thresholds")


def test_a_changed_image_redoes_its_own_windows_and_maps(small_run, tmp_path):
    devkit = own_devkit(small_run, tmp_path / "VOCdevkit")
    Image.new("RGB", (320, 240), "red").save(devkit / "SHAPES/JPEGImages/train_00003.jpg")
    status = Training(changed(small_run, data__root=str(devkit)), small_run.root, torch.device("cpu")).graph.statuses()
    done = {stage.name: (stage.done, stage.total) for stage in status}
    assert done["proposals"] == (10, 11)
    assert done["maps"] == (17, 19)  # the image and its mirror image
    assert done["finetune"] == done["svm"] == (0, 1)


# ---- which images --------------------------------------------------------------------------------------------------


def test_where_no_validation_is_named_a_share_of_the_training_images_is_held_out(small_run):
    config = changed(small_run, data__val=[], data__test=[], data__holdout=0.25)
    data = load_run_data(config)
    assert (len(data.train), len(data.held_out)) == (6, 2)
    assert not {r.id for r in data.train} & {r.id for r in data.held_out}
    records = load_test_data(config, kept=data.split).records
    assert [r.id for r in records] == [r.id for r in data.held_out]


def test_the_images_to_test_are_those_given_then_test_then_val(small_run):
    config = small_run.config
    assert load_test_data(config).splits == ("SHAPES/test",)
    without = changed(small_run, data__test=[])
    assert load_test_data(without).splits == ("SHAPES/val",)
    assert len(load_test_data(without).records) == 3
    assert len(load_test_data(config).records) == 4
    assert len(load_test_data(config, splits=("SHAPES/train", "SHAPES/val")).records) == 11


def test_validation_windows_come_from_images_spread_over_the_split(small_run):
    config = changed(
        small_run, data__val=["SHAPES/train"], data__train=["SHAPES/test"], data__test=[], finetune__validate_images=3
    )
    data = load_run_data(config)
    assert [record.id for record in data.validation] == [data.held_out[i].id for i in (0, 2, 5)]


def test_the_line_about_the_data_counts_images_skips_and_leaks(small_run, tmp_path):
    devkit = own_devkit(small_run, tmp_path / "VOCdevkit")
    boxes = [[5, 5, 5, 40], [900, 5, 940, 40], [5, 5, 40, 40]]
    write_annotation(devkit / "SHAPES/Annotations/train_00003.xml", (50, 60), boxes, ["star"] * 3, [False] * 3)
    line = str(load_run_data(changed(small_run, data__root=str(devkit))))
    assert re.match(
        r"data: VOC, 8 training and 3 validation images, \d+ objects of 5 classes \(cross \d+, disc \d+, square",
        line,
    )
    assert "1 × zero-area box, e.g. SHAPES/train_00003" in line
    assert "1 × box outside the image, e.g. SHAPES/train_00003" in line
    assert "without objects" not in line


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
    for note in (
        "2 training objects of classes that are not trained: owl 2, e.g. owl in SHAPES/train_00006",
        "3 × training image without objects (background for the SVMs alone), e.g. SHAPES/train_00001",
        "1 × validation image without objects (no part of the error), e.g. SHAPES/val_00002",
    ):
        assert note in str(data)


def test_missing_data_name_the_script_that_fetches_them(small_run, tmp_path, monkeypatch):
    with pytest.raises(SppnetError, match=r"none: no such data folder; set data.root to your own folder"):
        load_run_data(changed(small_run, data__root=str(tmp_path / "none")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SppnetError, match=r"no such data folder; fetch .* with scripts/fetch_voc, or set"):
        load_run_data(Config())
    with pytest.raises(SppnetError, match=r"none: no such data folder; name the one .* with --data"):
        load_test_data(small_run.config, tmp_path / "none")


def test_the_stages_in_use_are_six_without_low_rank_layers(small_run):
    status = Training(small_run.config, small_run.root, torch.device("cpu")).graph.statuses()
    assert tuple(stage.name for stage in status) == STAGES
    assert tuple(stage.name for stage in status if not stage.skipped) == USED
    assert all(stage.complete for stage in status)


@pytest.mark.parametrize(
    ("setting", "value", "stage", "stages"),
    [
        ("svm__C", 1.0, "proposals", "finetune svm boxes thresholds"),
        ("svm__C", 1.0, "maps", "finetune svm boxes thresholds"),
        ("svm__C", 1.0, "finetune", "svm thresholds"),
        ("boxes__layer", "fc6", "finetune", "svm boxes thresholds"),
        ("svm__layer", "pool", "finetune", ""),
        ("svm__finetuned", False, "finetune", ""),
        ("svm__C", 1.0, "svm", "thresholds"),
        ("low_rank__fc6", 5, "maps", "finetune low_rank svm boxes thresholds"),
        ("low_rank__fc6", 5, "finetune", "low_rank svm thresholds"),
        ("low_rank__fc6", 5, "low_rank", "svm thresholds"),
        ("svm__C", 1.0, "low_rank", ""),
    ],
)
def test_the_stages_that_depend_on_another_are_known(small_run, setting, value, stage, stages):
    graph = Training(changed(small_run, **{setting: value}), small_run.root, torch.device("cpu")).graph
    assert graph.invalidated(STAGES, (stage,))[1:] == tuple(stages.split())


@pytest.mark.parametrize(
    ("setting", "others"),
    [
        ("head__checkpoint", {"head__init": "checkpoint"}),
        ("backbone__weights__file", {"backbone__weights__source": "file"}),
        ("backbone__weights__mean_image", {}),
    ],
)
def test_a_file_counts_by_its_content(small_run, tmp_path, setting, others):
    file, data = tmp_path / "weights.safetensors", load_run_data(small_run.config)
    keys = []
    for content in (b"a", b"b", b"a"):
        file.write_bytes(content)
        keys.append(StageGraph(tmp_path, changed(small_run, **others, **{setting: str(file)}), data).digests["svm"])
    assert keys[0] == keys[2] != keys[1]


def test_maps_and_what_was_trained_on_them_outlive_a_new_version(tmp_path):
    """Hours of work: these keys are those of runs that exist, and change with a version of a stage alone."""
    digests = StageGraph(tmp_path, Config(), RunData()).digests
    assert (digests["maps"], digests["svm"]) == ("569ae43f5d06b960", "a93dc48b4460052c")
    scaled = parse_config({"head": {"input_norm": 30}}, "test")  # of a head that starts untrained
    assert StageGraph(tmp_path, scaled, RunData()).digests["svm"] == "c610190797ddaeb0"
