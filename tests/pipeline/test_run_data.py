"""Which images train, which are held out, and what is said about them; a split is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from devkit import make_devkit, stated, thing, xml_of
from layouts import coco, coco_of, picture, xml
from PIL import Image

from sppnet.config import Config
from sppnet.config_files import parse_config
from sppnet.data.layouts import find_data
from sppnet.errors import ArtifactError, SppnetError
from sppnet.pipeline.run_data import Split, load_run_data, load_test_data, named_parts

CAT, DOG = thing("cat", 5, 5, 30, 30), thing("dog", 5, 5, 30, 30)
HARD = thing("owl", 5, 5, 30, 30, difficult=1)


def add(root: Path, name: str, *objects: str, copy_of: str = "") -> str:
    """An image of the year MINE, of content of its own or that of another; returns its name."""
    folder = root / "MINE"
    for kind in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    if copy_of:
        shutil.copy(folder / f"JPEGImages/{copy_of}.png", folder / f"JPEGImages/{name}.png")
    else:
        pixels = np.random.default_rng(list(name.encode())).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.png")
    (folder / f"Annotations/{name}.xml").write_text(xml_of(*objects, size=stated(40, 60)))
    return name


def listed(root: Path, image_set: str, *names: str) -> None:
    (root / f"MINE/ImageSets/Main/{image_set}.txt").write_text("\n".join(names))


def settings(root: Path, **data: object) -> Config:
    values = {"root": str(root), "train": ["MINE/train"], "val": [], "test": [], **data}
    return parse_config({"data": values}, "test")


@pytest.fixture
def root(tmp_path):
    """Twelve images of cats and dogs in MINE/train."""
    root = tmp_path / "devkit"
    listed_names = [add(root, f"p{i:02}", (CAT, DOG)[i % 2]) for i in range(12)]
    listed(root, "train", *listed_names)
    return root


def stems(ids) -> list[str]:
    return [name.rpartition("/")[2] for name in ids]


# ---- what is said --------------------------------------------------------------------------------------------------


def test_objects_of_classes_that_are_not_trained_are_counted_by_class(root):
    add(root, "p00", CAT, thing("cow", 1, 1, 9, 9), thing("ox", 1, 1, 9, 9), thing("cow", 2, 2, 9, 9))
    line = "3 training objects of classes that are not trained: cow 2, ox 1, e.g. cow in MINE/p00"
    assert line in str(load_run_data(settings(root, classes=["cat", "dog"])))
    assert "not trained" not in str(load_run_data(settings(root)))


def test_a_class_of_validation_alone_is_named(root):
    listed(root, "val", add(root, "v0", CAT, thing("zebra", 1, 1, 9, 9)))
    data = load_run_data(settings(root, val=["MINE/val"]))
    assert "1 validation object of classes that are not trained: zebra 1, e.g. zebra in MINE/v0" in str(data)
    assert "not measured, since no validation image shows them: dog (in 6 training images)" in str(data)
    with pytest.raises(SppnetError, match="class 'zebra' never occurs; classes found in the training images: cat, dog"):
        load_run_data(settings(root, val=["MINE/val"], classes=["zebra"]))


def test_a_class_in_a_single_image_trains_and_is_said_not_to_be_measured(root):
    add(root, "p03", DOG, thing("zebra", 1, 1, 9, 9))
    for seed in range(5):
        data = load_run_data(settings(root, seed=seed))
        assert "MINE/p03" in {r.id for r in data.train}
        assert "no validation image shows them: zebra (in 1 training image)" in str(data)


def test_a_class_of_difficult_objects_alone_is_said_not_to_train(root):
    add(root, "p01", DOG, HARD)
    message = "class owl has difficult objects alone, which do not train"
    assert message in str(load_run_data(settings(root, train_on_difficult=False)))
    assert message not in str(load_run_data(settings(root)))


def test_a_class_whose_easy_objects_are_of_objects_only_trains(root):
    add(root, "p01", DOG, HARD)
    listed(root, "more", add(root, "m0", thing("owl", 5, 5, 30, 30), thing("cow", 1, 1, 9, 9)), add(root, "m1", HARD))
    data = load_run_data(settings(root, train_on_difficult=False, objects_only=["MINE/more"]))
    assert [r.id for r in data.objects] == ["MINE/m0"]
    assert data.objects[0].annotation.names == ("owl",)  # classes are those of data.train
    assert data.classes == ("cat", "dog", "owl")
    assert "never fires" not in str(data)
    assert "1 × image of data.objects_only without objects to train on, left out, e.g. MINE/m1" in str(data)


def test_classes_are_found_in_either_form_of_unicode(root):
    add(root, "p02", thing("ba\u0308r", 1, 1, 9, 9))
    assert load_run_data(settings(root, classes=["b\u00e4r ", "cat"])).classes == ("b\u00e4r", "cat")


def test_validation_images_are_chosen_among_those_with_objects_that_train(root):
    names = [add(root, f"v{i}", *([CAT] if i in (3, 5) else [HARD] if i == 1 else [])) for i in range(8)]
    listed(root, "val", *names)
    config = settings(root, val=["MINE/val"], train_on_difficult=False, classes=["cat", "owl"])
    add(root, "p01", DOG, HARD)
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"validate_images": 2})})
    assert stems(r.id for r in load_run_data(config).validation) == ["v3", "v5"]


@pytest.mark.parametrize("copies", [("copy",), ("copy", "b", "c")])
def test_copies_within_training_are_counted_with_their_names(root, copies):
    listed(root, "train", *(f"p{i:02}" for i in range(12)), *(add(root, name, CAT, copy_of="p00") for name in copies))
    data = load_run_data(settings(root))
    sides = [{r.id for r in side} for side in (data.train, data.held_out)]
    assert any({"MINE/p00", *(f"MINE/{name}" for name in copies)} <= side for side in sides)
    kind = "training" if "MINE/p00" in sides[0] else "validation"
    assert f"{len(copies)} × {kind} image that is a copy of another, e.g. MINE/copy of MINE/p00" in str(data)


# ---- images in two sets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["val", "test"])
def test_a_set_with_training_images_in_it_is_refused_with_names(root, setting):
    listed(root, "other", "p03", add(root, "copy", CAT, copy_of="p00"), add(root, "new", DOG))
    message = (
        rf"data\.{setting}: training images are in it too, 2 of 3 images, e\.g\. MINE/p03, MINE/copy "
        r"\(a copy of MINE/p00\), so figures would look too good; take them out"
    )
    with pytest.raises(SppnetError, match=message):
        load_run_data(settings(root, **{setting: ["MINE/other"]}))


def test_held_out_images_may_be_those_to_test_on_and_tests_may_come_later(root):
    listed(root, "val", add(root, "v0", CAT))
    both = load_run_data(settings(root, val=["MINE/val"], test=["MINE/val"]))
    assert len(both.held_out) == 1
    assert "validation images are in data.test too, 1 of 1 image of MINE/val, e.g. MINE/v0" in str(both)
    listed(root, "test", add(root, "t0", CAT), add(root, "t1", DOG, copy_of="v0"))
    assert "1 of 2 images of MINE/test, e.g. MINE/t1" in str(
        load_run_data(settings(root, val=["MINE/val"], test=["MINE/test"]))
    )
    listed(root, "test", add(root, "t1", CAT))
    assert "data.test" not in str(load_run_data(settings(root, val=["MINE/val"], test=["MINE/test"])))
    assert len(load_run_data(settings(root, val=["MINE/val"], test=["LATER/test"])).held_out) == 1


# ---- a split is kept -----------------------------------------------------------------------------------------------


def test_a_split_is_written_and_read_back(root, tmp_path):
    data = load_run_data(settings(root, classes=["cat"]))
    data.split.write(tmp_path)
    assert Split.read(tmp_path) == data.split
    assert Split.read(tmp_path / "elsewhere") is None
    values = json.loads((tmp_path / "split.json").read_text())
    assert {*values["train"], *values["held_out"]} == {f"MINE/p{i:02}" for i in range(12)}
    for unknown in (5, None, [["p0"]], {"star": 5}, {"star": "p0"}):
        (tmp_path / "split.json").write_text(json.dumps({**values, "unknown": unknown}))
        with pytest.raises(ArtifactError, match=r"split\.json: .*delete it"):
            Split.read(tmp_path)
    for content in ("[]", "{}", "{", '{"settings": {}, "train": [], "held_out": {}}'):
        (tmp_path / "split.json").write_text(content)
        with pytest.raises(ArtifactError, match=r"split\.json: .*delete it"):
            Split.read(tmp_path)


def test_new_images_train_and_what_was_held_out_stays(root):
    before = load_run_data(settings(root))
    names = [add(root, f"n{i}", CAT) for i in range(20)]
    listed(root, "train", *(f"p{i:02}" for i in range(12)), *names)
    after = load_run_data(settings(root), before.split)
    assert [r.id for r in after.held_out] == [r.id for r in before.held_out]
    assert "20 images new since the split was drawn, trained on, e.g. MINE/n0" in str(after)
    assert len(load_run_data(settings(root)).held_out) == 6  # as it would be drawn now


def test_images_that_go_are_named_and_copies_of_held_out_ones_are_held_out(root):
    before = load_run_data(settings(root))
    held, gone = stems(before.split.held_out), stems(before.split.train)[0]
    add(root, "renamed", CAT, copy_of=held[0])
    listed(root, "train", *(f"p{i:02}" for i in range(12) if f"p{i:02}" not in (gone, held[0])), "renamed")
    after = load_run_data(settings(root), before.split)
    assert {r.id for r in after.held_out} == {f"MINE/{held[1]}", "MINE/renamed"}
    assert f"2 images of the split gone, e.g. MINE/{gone}" in str(after)


@pytest.mark.parametrize(
    "changes", [{"holdout": 0.5}, {"seed": 1}, {"classes": ["cat"]}, {"train_on_difficult": False}]
)
def test_other_settings_draw_anew(root, changes):
    before = load_run_data(settings(root)).split
    other = Split({**before.settings}, before.held_out, before.train)  # one that nothing would draw
    assert load_run_data(settings(root), other).split == other
    assert load_run_data(settings(root, **changes), other).split != other
    assert load_run_data(settings(root, **changes), other).split == load_run_data(settings(root, **changes)).split


def test_a_split_that_loses_a_class_or_a_side_is_drawn_anew_and_that_is_said(root):
    before = load_run_data(settings(root)).split
    for stem in stems(before.held_out):
        add(root, stem, CAT, DOG, thing("zebra", 1, 1, 9, 9))  # in held-out images alone
    data = load_run_data(settings(root), before)
    assert "no longer fits (class zebra would not be trained): drawn anew" in str(data)
    assert "zebra" in {name for r in data.train for name in r.annotation.names}
    listed(root, "train", *stems(before.train))
    assert "no longer fits" in str(load_run_data(settings(root), before))


# ---- images to evaluate on -----------------------------------------------------------------------------------------


def test_held_out_images_are_those_of_the_split_whatever_would_be_drawn_now(root):
    split = load_run_data(settings(root)).split
    listed(root, "train", *(add(root, f"n{i}", CAT) for i in range(20)), *(f"p{i:02}" for i in range(12)))
    found = load_test_data(settings(root), kept=split)
    assert [r.id for r in found.records] == [*split.held_out]
    assert (found.splits, found.trained) == ((), [])


def test_held_out_images_that_are_gone_or_changed_are_named(root):
    split = load_run_data(settings(root)).split
    first, second = stems(split.held_out)
    Image.new("RGB", (60, 40)).save(root / f"MINE/JPEGImages/{first}.png")
    message = rf"held out of training, but gone or changed: 1 of 2 images, e\.g\. MINE/{first}; put them back"
    with pytest.raises(SppnetError, match=message):
        load_test_data(settings(root), kept=split)
    listed(root, "train", *(f"p{i:02}" for i in range(12) if f"p{i:02}" != second))
    with pytest.raises(SppnetError, match=rf"2 of 2 images, e\.g\. MINE/{first}, MINE/{second}"):
        load_test_data(settings(root), kept=split)


def test_without_a_kept_split_images_must_be_named(root):
    with pytest.raises(SppnetError, match=r"keeps no split\.json .*name images with --split, or train again"):
        load_test_data(settings(root))
    assert len(load_test_data(settings(root), splits=("MINE/train",)).records) == 12


def test_training_images_are_evaluated_only_where_they_are_asked_for(root, caplog):
    split = load_run_data(settings(root)).split
    train, held = stems(split.train), stems(split.held_out)
    listed(root, "test", held[0], train[2], add(root, "copy", CAT, copy_of=train[0]))
    message = rf"trained on: 2 of 3 images, e\.g\. MINE/{train[2]}, MINE/copy"
    with pytest.raises(SppnetError, match=message + ".*name it with --split"):
        load_test_data(settings(root, test=["MINE/test"]), kept=split)
    found = load_test_data(settings(root), splits=("MINE/test",), kept=split)
    assert stems(found.trained) == [train[2], "copy"]
    assert "trained on: 2 of 3 images" in caplog.text


def test_of_another_data_set_all_images_are_evaluated_and_of_a_moved_one_those_held_out(root, tmp_path):
    split = load_run_data(settings(root)).split
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    found = load_test_data(settings(root), moved, kept=split)
    assert ([r.id for r in found.records], found.splits) == ([*split.held_out], ())
    other = tmp_path / "other"
    listed(other, "train", *(add(other, f"q{i}", CAT) for i in range(3)), add(other, "p00", thing("owl", 1, 1, 9, 9)))
    Image.new("RGB", (60, 40)).save(other / "MINE/JPEGImages/p00.png")  # the name of a training image, but not it
    found = load_test_data(settings(root), other, kept=split)
    assert (len(found.records), found.splits, found.trained) == (4, ("MINE/train",), [])
    shutil.copy(root / f"MINE/JPEGImages/{stems(split.train)[0]}.png", other / "MINE/JPEGImages/q0.png")
    with pytest.raises(SppnetError, match=r"trained on: 1 of 4 images, e\.g\. MINE/q0"):
        load_test_data(settings(root), other, kept=split)


@pytest.mark.parametrize("splits", [(), ("MINE/train",), ("MINE/part",)])
def test_training_images_saved_anew_in_another_folder_are_known_by_name(root, tmp_path, caplog, splits):
    caplog.set_level("INFO", "sppnet")
    split = load_run_data(settings(root)).split
    other = Path(shutil.copytree(root, tmp_path / "other"))
    for path in (other / "MINE/JPEGImages").iterdir():
        Image.open(path).save(path, optimize=True, compress_level=1)
        path.write_bytes(path.read_bytes() + b"0")
    listed(other, "part", stems(split.train)[3], stems(split.held_out)[0], add(other, "new", CAT))
    found = load_test_data(settings(root), other, splits, kept=split)
    count = 1 if splits == ("MINE/part",) else len(split.train)
    assert len(found.trained) == count
    assert set(found.validation) <= set(split.held_out)
    assert found.validation
    assert f"trained on: {count} of {len(found.records)} images, e.g. {found.trained[0]}" in caplog.text
    assert f"the thresholds: {len(found.validation)} of {len(found.records)} images, e.g." in caplog.text


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_few_names_in_common_are_no_training_images(root, tmp_path, caplog, shared):
    split, other = load_run_data(settings(root)).split, tmp_path / "other"
    listed(other, "train", *(add(other, name, DOG) for name in ("q0", "q1", *stems(split.train)[:shared])))
    for path in (other / "MINE/JPEGImages").iterdir():
        Image.new("RGB", (61, 41)).save(path)
    found = load_test_data(settings(root), other, kept=split)
    assert (found.trained, found.validation) == ([], [])
    assert "look too good" not in caplog.text


# ---- parts found by looking ----------------------------------------------------------------------------------------


def own_folder(root: Path, **parts: int) -> Path:
    """COCO's JSON for each part, with a cat in every image but the last of train."""
    for part, count in parts.items():
        names = [picture(root / part / f"{i}.jpg").name for i in range(count)]
        values = coco_of(*names)
        values["annotations"] = values["annotations"][: -1 if part == "train" else None]
        coco(root / part / "_annotations.coco.json", values)
    return root


def found(root: Path, **data: object) -> Config:
    return parse_config({"data": {"root": str(root), **data}}, "test")


def test_names_of_parts_say_what_trains_validates_and_tests(tmp_path):
    config = found(own_folder(tmp_path, train=6, valid=3, test=2, extra=1))
    data = load_run_data(config)
    assert [r.id for r in data.held_out] == ["valid/0", "valid/1", "valid/2"]
    assert str(data).startswith("data: COCO, 6 training and 3 validation images, 8 objects of 1 class (cat 8); ")
    assert "part extra not used" in str(data)
    assert "1 × training image without objects (background for the SVMs alone), e.g. train/5" in str(data)
    assert load_test_data(config, kept=data.split).splits == ("test",)
    assert load_run_data(found(tmp_path, train=[])).split == data.split
    chosen = load_run_data(found(tmp_path, train=["train", "extra"]))
    assert ({r.id.partition("/")[0] for r in chosen.train}, len(chosen.train)) == ({"train", "extra"}, 7)
    assert [r.id for r in chosen.held_out] == [r.id for r in data.held_out]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("train", "valid", "test")),
        ({"train": ["train"]}, ("train", "valid", "test")),
        ({"train": ["extra"]}, ("extra", "valid", "test")),
        ({"train": ["extra"], "val": ["train"]}, ("extra", "train", "test")),
        ({"train": ["train"], "test": ["extra"]}, ("train", "valid", "extra")),
        ({"test": ["extra"]}, ("train", "valid", "extra")),
        ({"train": ["valid"]}, ("valid", "", "test")),
        ({"objects_only": ["valid", "extra"]}, ("train", "", "test")),
        ({"train": ["train", "valid"]}, ("train valid", "", "test")),
    ],
)
def test_what_is_named_goes_before_the_names_of_parts_and_these_say_the_rest(tmp_path, given, expected):
    config = found(own_folder(tmp_path, train=3, valid=2, test=2, extra=1), **given)
    parts = named_parts(config.data, find_data(tmp_path))
    assert (parts.train, parts.val, parts.test) == tuple(tuple(names.split()) for names in expected)
    assert parts.format == "coco"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train": ["MINE/all"]}, ("MINE/all", "", "VOC2007/test")),
        ({"train": ["MINE/all"], "test": []}, ("MINE/all", "", "")),
        ({"train": []}, ("MINE/train", "MINE/val", "MINE/test")),
        ({}, ("MINE/train", "MINE/val", "MINE/test")),
    ],
)
def test_of_year_folders_names_say_all_or_nothing(tmp_path, given, expected):
    for part in ("all", "train", "val", "test"):
        make_devkit(tmp_path, "MINE", ("a",), part)
    parts = named_parts(found(tmp_path, **given).data, find_data(tmp_path))
    assert (parts.train, parts.val, parts.test) == tuple(tuple(names.split()) for names in expected)


def test_without_a_part_to_validate_on_images_are_held_out_and_kept(tmp_path):
    config = found(own_folder(tmp_path, train=10))
    before = load_run_data(config)
    assert len(before.held_out) == 2
    own_folder(tmp_path, train=14)
    assert [*load_run_data(config, before.split).split.held_out] == [*before.split.held_out]
    assert [r.id for r in load_test_data(config, kept=before.split).records] == [*before.split.held_out]


def test_year_folders_other_than_the_default_are_found_too(root):
    listed(root, "test", add(root, "t0", CAT))
    data = load_run_data(found(root))
    assert len(data.train) + len(data.held_out) == 12
    assert load_test_data(found(root), kept=data.split).splits == ("MINE/test",)


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    config, calls = found(own_folder(tmp_path, train=6, valid=3, test=2)), []
    monkeypatch.setattr("sppnet.pipeline.run_data.find_data", lambda *given: calls.append(given) or find_data(*given))
    monkeypatch.setattr("sppnet.data.splits.find_data", lambda *given: 1 / 0)
    split = load_run_data(config).split
    assert load_test_data(config, kept=split).splits == ("test",)
    assert calls == [(tmp_path, "auto")] * 2


def test_a_folder_with_a_test_part_alone_asks_for_names(tmp_path):
    own_folder(tmp_path, test=2)
    with pytest.raises(SppnetError, match=r"no part is called train; name those to train on in data\.train: test"):
        load_run_data(found(tmp_path))


def test_another_folder_is_evaluated_on_its_own_parts(root, tmp_path):
    split = load_run_data(settings(root)).split
    other = own_folder(tmp_path / "other", train=3, test=2)
    assert load_test_data(settings(root), other, kept=split).splits == ("test",)
    assert load_test_data(settings(root), other, ("train",), split).splits == ("train",)


def test_the_line_says_what_was_left_out_and_which_format_was_taken(tmp_path):
    own_folder(tmp_path, train=6)
    picture(tmp_path / "train/more.jpg"), xml(tmp_path / "train/0.xml")
    said = str(load_run_data(found(tmp_path)))
    assert "it has labels of two formats: COCO (5 images) is taken, VOC (1) with data.format=voc" in said
    assert "1 × image in no JSON, left out, e.g. train/more" in said
    with pytest.raises(SppnetError, match="at least 2 images"):
        load_run_data(found(tmp_path, format="voc"))
