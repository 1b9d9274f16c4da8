"""A detector in the manner of the paper's for ILSVRC: val trains, and of train the objects alone (sec. 4.5)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from det_tree import EXTRA, SYNSETS, add_image, make_det, square, train_name, val_name, write_list
from PIL import Image
from small_run import SmallRun, copied, merged, refused, run_command, small_settings, write_config, write_windows

from sppnet.artifacts import read_tensors
from sppnet.config import Config
from sppnet.config_files import parse_config
from sppnet.errors import SppnetError
from sppnet.pipeline.run_data import Split, load_run_data, load_test_data
from sppnet.pipeline.training import Training, train_detector

OBJECTS = ["DET/train"]
CAR = "n02958343"


def settings(root: Path, windows: Path, **changes) -> dict:
    data = {"root": str(root), "train": ["DET/val"], "val": [], "test": [], "holdout": 0.34, "objects_only": OBJECTS}
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return merged(small_settings(root, windows), {"data": data, "evaluate.metric": "ilsvrc", **dotted})


def config_of(run: SmallRun, **changes) -> Config:
    return parse_config(settings(run.devkit, run.config.proposals.import_from[0], **changes), "small")


@pytest.fixture(scope="module")
def det_run(tmp_path_factory) -> SmallRun:
    """Nine images of val, three of them held out, and the objects of six of train."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("det")
    root = make_det(folder / "ILSVRC")
    windows = write_windows(root, folder / "windows.npz", ("DET/val", "DET/test"))
    config = parse_config(settings(root, windows), "small")
    assert train_detector(config, folder / "run", progress=False) is not None
    return SmallRun(folder / "run", config, root)


def of_train(root: Path, stage: str) -> list[str]:
    """The files of images of train in the folder of a stage."""
    (folder,) = root.glob(f"{stage}-*")
    return sorted(path.name for path in folder.glob("DET/train/**/*.npz"))


def test_images_whose_objects_train_have_maps_but_no_windows(det_run):
    assert of_train(det_run.root, "proposals") == []
    stems = [f"{synset}_{number}" for synset in SYNSETS for number in range(2)]
    maps = of_train(det_run.root, "maps")
    assert len(maps) == 12
    assert sorted({name.split("-")[0] for name in maps}) == stems
    assert sum(name.endswith("-flip.npz") for name in maps) == 6
    flat = Training(config_of(det_run, finetune__flip=False), det_run.root, torch.device("cpu")).graph
    assert flat.status("maps").total == flat.status("proposals").total + 6


def test_what_is_left_out_and_what_trains_is_said(det_run):
    said = str(load_run_data(det_run.config))
    assert "data: VOC, 6 training and 3 validation images, the objects of 6 more images, " in said
    assert f"1 × image of data.objects_only without objects to train on, left out, e.g. DET/train/{EXTRA}" in said
    few = load_run_data(config_of(det_run, data__classes=["car", "airplane"]))
    assert [r.annotation.names[0] for r in few.objects] == ["airplane"] * 2 + ["car"] * 2
    assert "3 × image of data.objects_only without objects" in str(few)
    assert load_run_data(config_of(det_run, data__objects_only=[])).objects == []


def test_evaluation_by_ilsvrcs_rule(det_run, tmp_path):
    run = copied(det_run, tmp_path / "run")
    result = run_command("eval", run.root)
    assert result.status == 0, result.err
    assert "ilsvrc at IoU 0.5" in result.out
    metrics = json.loads((run.root / "results/held-out/metrics.json").read_text())
    assert (metrics["metric"], metrics["images"], set(metrics["ap"])) == ("ilsvrc", 3, set(SYNSETS.values()))
    assert metrics["training_images"] == 0
    assert "11point at IoU 0.5" in run_command("eval", run.root, "--metric", "11point").out


def test_a_set_without_annotations_is_searched(det_run, tmp_path):
    run = copied(det_run, tmp_path / "run")
    assert "take `sppnet test`" in refused("eval", run.root, "--split", "DET/test")
    result = run_command("test", run.root, "--split", "DET/test")
    assert result.status == 0, result.err
    files = {path.name: path.read_text() for path in (run.root / "results/DET-test").iterdir()}
    assert set(files) == {f"comp4_det_test_{name}.txt" for name in SYNSETS.values()}
    assert {line.split()[0] for text in files.values() for line in text.splitlines()} <= {
        "ILSVRC2012_test_00000000", "ILSVRC2012_test_00000001", "ILSVRC2012_test_00000002"
    }  # fmt: skip


def test_the_detector_knows_whose_objects_it_was_trained_on(det_run, tmp_path):
    kept = Split.read(det_run.root / "detector")
    assert (len(kept.train), len(kept.held_out)) == (6, 3)
    assert sorted(kept.objects) == sorted(f"DET/train/{train_name(s, i)}" for s in SYNSETS for i in range(2))
    with pytest.raises(SppnetError, match=r"trained on: 6 of 7 images, e\.g\. DET/train/.*; take them out of the set"):
        load_test_data(config_of(det_run, data__test=["DET/train"]), kept=kept)
    assert len(load_test_data(det_run.config, splits=["DET/train"], kept=kept).trained) == 6
    data = load_run_data(det_run.config, kept)
    assert not [note for note in data.notes if "split" in note]  # neither new nor gone
    without = load_run_data(config_of(det_run, data__objects_only=[]))
    without.split.write(tmp_path)
    assert sorted(json.loads((tmp_path / "split.json").read_text())) == ["held_out", "settings", "train"]


def test_objects_that_are_added_redo_fine_tuning_and_svms_alone(det_run):
    graph = Training(config_of(det_run, data__objects_only=[]), det_run.root, torch.device("cpu")).graph
    other = Training(det_run.config, det_run.root, torch.device("cpu")).graph
    changed = {name for name in graph.digests if graph.digests[name] != other.digests[name]}
    # no norm and no box regressor depends on them
    assert changed == {"finetune", "low_rank", "embed", "joint", "svm", "thresholds"}
    pool = {"svm__layer": "pool", "data__objects_only": []}
    graph = Training(config_of(det_run, **pool), det_run.root, torch.device("cpu")).graph
    other = Training(config_of(det_run, svm__layer="pool"), det_run.root, torch.device("cpu")).graph
    assert {name for name in graph.digests if graph.digests[name] != other.digests[name]} >= {"svm", "thresholds"}


def test_their_objects_train_the_head_and_the_svms(det_run, tmp_path):
    run, results = copied(det_run, tmp_path / "run"), {"finetune": [], "svm": []}
    for objects in (OBJECTS, []):
        for stage, layer in (("finetune", "fc7"), ("svm", "pool")):
            config = config_of(det_run, data__objects_only=objects, svm__layer=layer)
            train_detector(config, run.root, only=(stage,), progress=False)
            folder = Training(config, run.root, torch.device("cpu")).graph.folder(stage)
            results[stage].append(read_tensors(next(folder.glob("*.safetensors"))))
    assert not torch.equal(*(head["fc6.weight"] for head in results["finetune"]))
    with_objects, without = results["svm"]
    assert torch.equal(with_objects["scale"], without["scale"])  # of windows, which these images have none of
    assert not torch.equal(with_objects["weight"], without["weight"])


def test_an_object_that_moves_redoes_what_trains_on_it(det_run, tmp_path):
    root = Path(shutil.copytree(det_run.devkit, tmp_path / "ILSVRC"))
    before = Training(config_of(det_run, data__root=str(root)), tmp_path / "run", torch.device("cpu")).graph.digests
    xml = root / f"Annotations/DET/train/{train_name(CAR, 0)}.xml"
    xml.write_text(xml.read_text().replace("<xmin>", "<xmin>1"))
    after = Training(config_of(det_run, data__root=str(root)), tmp_path / "run", torch.device("cpu")).graph.digests
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"finetune", "low_rank", "embed", "joint", "svm", "thresholds"}


def test_sets_that_share_images_with_those_whose_objects_train_are_refused(det_run, tmp_path):
    root = Path(shutil.copytree(det_run.devkit, tmp_path / "ILSVRC"))

    def message(**changes) -> str:
        with pytest.raises(SppnetError) as raised:
            load_run_data(config_of(det_run, data__root=str(root), **changes))
        return str(raised.value)

    twice = message(data__objects_only=["DET/val"])
    assert twice.startswith(
        "data.objects_only: images of data.train or data.val are in it too, 8 of 8 images, e.g. DET"
    )
    assert "so objects would count twice or figures would look too good; take them out of one of the sets" in twice
    assert message(data__test=["DET/train_1"]).startswith("data.test: training images are in it too, 5 of 6 images")
    assert "is in DET/train and in DET/train_1; name splits that share" in message(
        data__objects_only=["DET/train", "DET/train_1"]
    )
    copy = root / "Data/DET/train/copy.JPEG"
    shutil.copy(root / f"Data/DET/val/{val_name(2)}.JPEG", copy)
    (root / "Annotations/DET/train/copy.xml").write_text((root / f"Annotations/DET/val/{val_name(2)}.xml").read_text())
    write_list(root, "train_4", "copy 1")
    assert f"1 of 7 images, e.g. DET/train/copy (a copy of DET/val/{val_name(2)})" in message()


def test_the_command_line_trains_and_names_what_is_not_there(det_run, tmp_path):
    values = settings(det_run.devkit, det_run.config.proposals.import_from[0], data__test=["DET/test", "DET/later"])
    result = run_command("train", write_config(tmp_path / "c.yaml", values), "--run", det_run.root, "--dry-run")
    assert result.status == 1
    assert "no part 'DET/later' in these VOC data" in result.err
    assert result.out.count("reuse") == 6
    values["data"]["objects_only"] = ["DET/none"]
    assert "no part 'DET/none' in these VOC data; parts here: DET/train" in refused(
        "train", write_config(tmp_path / "d.yaml", values), "--run", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


def test_a_small_image_whose_objects_train_is_named_before_anything_is_computed(det_run, tmp_path):
    root = Path(shutil.copytree(det_run.devkit, tmp_path / "ILSVRC"))
    name = add_image(root, "train", "narrow", square(CAR, 0))
    pixels = np.zeros((400, 4, 3), np.uint8)
    Image.fromarray(pixels).save(root / f"Data/DET/train/{name}.JPEG", "JPEG")
    xml = root / "Annotations/DET/train/narrow.xml"
    xml.write_text(xml.read_text().replace("<xmin>7", "<xmin>0"))
    write_list(root, "train_4", "narrow 1")
    config = config_of(det_run, data__root=str(root), maps__max_side=112, backbone__name="alexnet")
    with pytest.raises(SppnetError, match=r"narrow\.JPEG: an image of 4 × 400 pixels has no map"):
        train_detector(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
