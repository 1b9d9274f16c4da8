"""A run with a joint head: what it learns of shapes, what is kept, reused and resumed, and its detector."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import SmallRun, copied, merged, modified, refused, run_command, small_settings, write_config

from sppnet.config import STAGES, HeadSettings
from sppnet.config_files import parse_config
from sppnet.detection.box_regression import BoxRegressors
from sppnet.detection.combination import combine_detectors
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.detection.embedding import embed_images
from sppnet.detection.training_windows import TrainingWindows
from sppnet.errors import SppnetError
from sppnet.evaluation.voc import evaluate_voc
from sppnet.images import read_image
from sppnet.pipeline import thresholds, training
from sppnet.pipeline.evaluation import evaluate_run
from sppnet.pipeline.training import Training, train_detector
from sppnet.proposals.search import read_windows
from sppnet.records import pairwise_iou

JOINT = {
    "head": {"training": "joint", "fc6": 48, "fc7": 32, "dropout": 0.2},
    "joint": {"rank": 24, "windows": 40, "steps": 150, "batch": 128, "flip": True},
}


def joint_config(run, **changes):
    settings = small_settings(run.devkit, run.config.proposals.import_from[0])
    del settings["head"]
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged({**settings, **JOINT}, dotted), "joint")


@pytest.fixture(scope="module")
def joint_run(small_run, tmp_path_factory) -> SmallRun:
    root, config = tmp_path_factory.mktemp("joint") / "run", joint_config(small_run)
    assert train_detector(config, root, progress=False) is not None
    return SmallRun(root, config, small_run.devkit)


@pytest.fixture(scope="module")
def detector(joint_run) -> SPPDetector:
    return SPPDetector.load(joint_run.root)


def test_it_finds_the_shapes_it_was_trained_on_and_forgets_them_without_its_weights(joint_run, detector, tmp_path):
    learned = evaluate_run(joint_run.root, splits=["SHAPES/train"]).result.evaluation.map
    with torch.no_grad():
        detector = copy.deepcopy(detector)
        detector.head.fc7.weight.copy_(detector.head.fc7.weight.roll(1, 0))
    detector.save(tmp_path / "detector")
    forgotten = evaluate_run(tmp_path, splits=["SHAPES/train"]).result.evaluation.map
    assert learned > 0.5
    assert learned > forgotten + 0.2


def test_scores_are_probabilities_and_boxes_those_of_fc7(joint_run, detector):
    image = read_image(joint_run.devkit / "SHAPES/JPEGImages/test_00000.jpg")
    maps, windows = detector.embed(image), np.array([[5, 5, 60, 70], [20, 30, 90, 100], [0, 0, 200, 150]], float)
    scores = detector.score(maps, windows)
    assert ((scores > 0) & (scores < 1)).all()
    assert (scores.sum(axis=1) < 1).all()
    found = detector.detect(image, windows, threshold=0)
    assert len(found)
    assert found.scores.max() <= 1
    assert detector.regressors.per_class[0].weight.shape == (4, 32)
    loose = replace(detector, config=joint_run.config.model_copy(update={"detect": detector.config.detect}))
    assert loose.detect_for_evaluation(image, windows)[0].scores.min(initial=1) > 0.01


def test_a_saved_detector_equals_the_one_of_the_run(joint_run, detector, tmp_path):
    again = train_detector(joint_run.config, joint_run.root, progress=False)
    image = joint_run.devkit / "SHAPES/JPEGImages/test_00001.jpg"
    assert again.detect(image, threshold=0.1) == detector.detect(image, threshold=0.1)
    detector.save(tmp_path / "detector")
    assert SPPDetector.load(tmp_path).detect(image, threshold=0.1) == detector.detect(image, threshold=0.1)
    names = {path.name for path in (tmp_path / "detector").iterdir()}
    assert names == {"backbone.safetensors", "boxes.safetensors", "detector.json", "head.safetensors"}
    assert DetectorDescription.read(tmp_path).ranks == {"fc6": 24}


def test_no_map_is_stored_and_nothing_is_done_twice(joint_run, monkeypatch):
    assert {path.name.split("-")[0] for path in joint_run.root.iterdir() if path.is_dir()} <= {
        *("proposals", "embed", "joint", "thresholds", "detector", "detections", "results")
    }
    stages = {
        name: time for name, time in modified(joint_run.root).items() if name.startswith(("embed", "joint", "th"))
    }
    assert train_detector(joint_run.config, joint_run.root, progress=False) is not None
    assert {name: modified(joint_run.root)[name] for name in stages} == stages


def test_an_interrupted_embedding_goes_on_where_it_stopped(joint_run, tmp_path, monkeypatch):
    run = copied(joint_run, tmp_path / "run")
    digest = DetectorDescription.read(run.root).digest("cpu")
    folder = next(run.root.glob("embed-*"))
    kept = (folder / "projection.safetensors").stat().st_mtime_ns
    gone = sorted(folder.rglob("*.npz"))[::3]
    for path in gone:
        path.unlink()
    for stage in ("joint", "thresholds"):
        shutil.rmtree(next(run.root.glob(f"{stage}-*")))
    made = []

    def counting(*arguments):
        made.append(embed_images(*arguments))
        return made[-1]

    monkeypatch.setattr(training, "embed_images", counting)
    assert train_detector(run.config, run.root, progress=False) is not None
    assert sum(made) == len(gone)
    assert (folder / "projection.safetensors").stat().st_mtime_ns == kept
    assert DetectorDescription.read(run.root).digest("cpu") == digest


def test_thresholds_are_chosen_on_what_the_detector_finds_without_a_map(joint_run, detector, tmp_path, monkeypatch):
    run = copied(joint_run, tmp_path / "run")
    graph = Training(run.config, run.root, torch.device("cpu")).graph
    kept = graph.folder("thresholds")
    found = {}

    def keep(each, truth, *others):
        found.update(each)
        return evaluate_voc(each, truth, *others)

    shutil.rmtree(kept)
    monkeypatch.setattr(thresholds, "evaluate_voc", keep)
    monkeypatch.setattr(TrainingWindows, "maps", lambda *_: pytest.fail("a map is computed"))
    assert train_detector(run.config, run.root, progress=False).thresholds == pytest.approx(detector.thresholds)
    assert len(found) == len(graph.data.validation) == 3
    for record in graph.data.validation:
        expected = detector.detect_for_evaluation(record.path, read_windows(graph.folder("proposals"), record))[0]
        own = found[record.id]
        assert len(own) == pytest.approx(len(expected), rel=0.05)
        near = pairwise_iou(own.boxes, expected.boxes) * (own.labels[:, None] == expected.labels)
        sure = own.scores > 0.1  # rows lie in half precision
        assert sure.any()
        assert (near.max(axis=1)[sure] > 0.95).all()
        assert np.abs(own.scores - expected.scores[near.argmax(axis=1)])[sure].max() < 0.02


def test_a_head_that_the_paper_starts_elsewhere_and_a_budget_of_maps_are_of_no_effect(small_run, tmp_path):
    config = joint_config(small_run, head__init="imagenet", maps__budget_gigabytes=1e-9)
    run = Training(config, tmp_path, torch.device("cpu"))
    run.networks.check_inputs(STAGES)
    assert {status.name for status in run.graph.statuses() if not status.skipped} == {
        *("proposals", "embed", "joint", "thresholds")
    }


def test_a_class_without_measure_is_shown_from_the_probability_of_either(joint_run, detector):
    assert all(0 < threshold < 1 for threshold in detector.thresholds)


def test_detectors_of_two_kinds_of_scores_are_not_combined(small_run, detector):
    with pytest.raises(SppnetError, match=r"head.training=joint\), others margins of SVMs, which cannot be compared"):
        combine_detectors([SPPDetector.load(small_run.root), detector])


def test_joint_heads_are_pooled_as_one_alone_suppresses_its_own(joint_run, detector):
    """A copy adds nothing, in whatever order its classes are; what two find is settled once, from all their boxes."""
    image = read_image(joint_run.devkit / "SHAPES/JPEGImages/test_00000.jpg")
    windows = detector.proposer(image)
    for vote in (True, False):
        settings = detector.config.detect.model_copy(update={"vote": vote, "max_per_class": 3})
        own = replace(detector, config=detector.config.model_copy(update={"detect": settings}))
        twice = combine_detectors([own, own])
        for alone, both in (
            (own.detect(image, windows), twice.detect(image, windows)),
            (
                own.detect(image, windows, threshold=0.02, nms=0.1),
                twice.detect(image, windows, threshold=0.02, nms=0.1),
            ),
            (own.detect_for_evaluation(image, windows)[0], twice.detect_for_evaluation(image, windows)[0]),
        ):
            assert len(alone) > 1
            assert both.class_names == alone.class_names
            assert np.allclose(both.scores, alone.scores, atol=1e-6)
            assert np.allclose(both.boxes, alone.boxes, atol=1e-3)
        assert twice.detect_for_evaluation(image, windows)[1] == own.detect_for_evaluation(image, windows)[1] != ()


def test_detections_of_combined_joint_heads_from_before_they_were_settled_together_are_not_reused(detector, tmp_path):
    combine_detectors([detector, detector]).save(tmp_path / "detector")
    both = DetectorDescription.read(tmp_path)
    alone_each = replace(both, config=both.config.model_copy(update={"head": HeadSettings(training="paper")}))
    assert both.digest("cpu") != alone_each.digest("cpu")  # which was its digest
    own = replace(both, others=())
    assert own.digest("cpu") == replace(alone_each, others=()).digest("cpu")


def test_of_joint_heads_each_has_its_own_thresholds(joint_run, detector):
    image = read_image(joint_run.devkit / "SHAPES/JPEGImages/test_00000.jpg")
    windows = detector.proposer(image)
    few, more = (replace(detector, thresholds=(own,) * len(detector.classes)) for own in (0.9, 0.05))
    assert len(few.detect(image, windows)) < len(more.detect(image, windows))
    assert len(combine_detectors([few, more]).detect(image, windows)) == len(more.detect(image, windows))
    assert len(combine_detectors([few, few]).detect(image, windows)) == len(few.detect(image, windows))


def test_without_votes_no_box_is_computed_that_is_not_shown(joint_run, detector, monkeypatch):
    image = read_image(joint_run.devkit / "SHAPES/JPEGImages/test_00000.jpg")
    windows, refine, counts = detector.proposer(image), BoxRegressors.refine, []

    def counted(self, features, boxes, *others):
        counts.append(len(boxes))
        return refine(self, features, boxes, *others)

    monkeypatch.setattr(BoxRegressors, "refine", counted)
    scores = detector.score(detector.embed(image), windows)
    middle = np.median(scores[scores > 0.05])
    for vote in (False, True):
        settings = detector.config.detect.model_copy(update={"vote": vote})
        own = replace(detector, config=detector.config.model_copy(update={"detect": settings}))
        own.detect(image, windows, threshold=middle)
    assert counts == [(scores >= middle).sum(), (scores > 0.05).sum()]
    assert 0 < counts[0] < counts[1]


def test_a_detector_without_its_boxes_is_refused(joint_run, tmp_path):
    run = copied(joint_run, tmp_path / "run")
    path = run.root / "detector/detector.json"
    path.write_text(path.read_text().replace('"boxes": "', '"others": "', 1))
    assert "parts is missing or incomplete" in refused("eval", run.root)


def test_a_dry_run_says_what_is_skipped_and_what_embedding_takes(small_run, tmp_path):
    settings = merged({**small_settings(small_run.devkit, small_run.config.proposals.import_from[0]), **JOINT}, {})
    done = run_command("train", write_config(tmp_path / "c.yaml", settings), "--run", tmp_path / "run", "--dry-run")
    assert done.status == 0
    for line in ("maps       skip     head.training is joint", "svm        skip", "embed      run"):
        assert line in done.out
    assert "the rows of 19 images, mirrored ones too, at 1 scale" in done.out


def test_the_stages_of_a_joint_head_say_which_must_be_done_before(joint_run, tmp_path):
    config = write_config(tmp_path / "joint.yaml", joint_run.config.model_dump(mode="json"))
    run_command("train", config, "--run", tmp_path / "run", "--only", "proposals")
    for stage, before in (("joint", "embed"), ("thresholds", "joint")):
        message = refused("train", config, "--run", tmp_path / "run", "--only", stage)
        assert f"the {before} stage is not complete for these settings" in message
