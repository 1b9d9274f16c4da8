"""The thresholds of a detector: chosen on the validation images, from what training has stored of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from doubles import annotated
from small_run import copied

from sppnet.detection.detector import SPPDetector
from sppnet.evaluation.voc import evaluate_voc
from sppnet.pipeline.networks import TrainingNetworks
from sppnet.pipeline.thresholds import choose_thresholds, describe_thresholds
from sppnet.pipeline.training import Training, train_detector


@pytest.fixture(scope="module")
def graph(small_run):
    return Training(small_run.config, small_run.root, torch.device("cpu")).graph


def chosen_by(detector, graph, records, kept):
    source = replace(TrainingNetworks(graph, torch.device("cpu")).windows(train=False), records=records)
    return choose_thresholds(detector, source, kept, progress=False)


def test_the_detector_has_the_thresholds_of_the_best_f1_on_the_validation_images(small_run, graph):
    detector = SPPDetector.load(small_run.root)
    stored = json.loads((graph.folder("thresholds") / "thresholds.json").read_text())
    assert tuple(stored) == detector.classes
    assert detector.thresholds == pytest.approx([values["threshold"] for values in stored.values()])
    found, truth = {}, {}
    for record in graph.data.validation:
        with np.load(record.path_in(graph.folder("proposals"))) as archive:
            found[record.id] = detector.detect(record.path, archive["windows"], threshold=-1.5)
        truth[record.id] = record.annotation
    for label, (name, values) in enumerate(stored.items()):
        own = {image: each[each.labels == label] for image, each in found.items()}
        scores = sorted({float(score) for each in own.values() for score in each.scores})
        f1 = {}
        for threshold in scores:
            kept = {image: each.above(threshold) for image, each in own.items()}
            result = evaluate_voc(kept, truth, [name]).results[name]
            counted = len(result.curve.recall)
            hits = round(result.curve.recall[-1] * result.objects) if counted else 0
            f1[threshold] = 2 * hits / (counted + result.objects) if result.objects else 0
        assert values["objects"] == sum(each.names.count(name) for each in truth.values())
        assert values["f1"] == pytest.approx(max(f1.values(), default=0))
        if values["f1"]:
            best = max(threshold for threshold, value in f1.items() if value == max(f1.values()))
            lower = [score for score in scores if score < best]
            expected = (best + lower[-1]) / 2 if lower else best
            assert values["threshold"] == pytest.approx(expected, abs=2e-3)  # maps are stored in half precision
        else:
            assert values["threshold"] == 0


def test_a_class_without_an_object_or_a_hit_keeps_the_boundary_and_that_is_said(small_run, graph, tmp_path):
    detector, records = SPPDetector.load(small_run.root), list(graph.data.validation)
    far = annotated(("disc", (0, 0, 1, 1)), ("star", (0, 0, 1, 1)), difficult=(False, True))
    chosen = chosen_by(detector, graph, [replace(record, annotation=far) for record in records], tmp_path)
    assert {values["threshold"] for values in chosen.values()} == {0}
    text = describe_thresholds(chosen)
    assert "disc 0.00 (no object was found)" in text
    assert "star 0.00 (no validation object)" in text  # difficult ones do not count
    assert chosen_by(detector, graph, [], tmp_path) == {
        name: {"threshold": 0, "f1": 0, "objects": 0, "ap": None} for name in detector.classes
    }
    assert (
        describe_thresholds({"a": {"threshold": 0.123, "f1": 0.8, "objects": 35}}) == "a 0.12 (F1 0.80 of 35 objects)"
    )


def test_thresholds_are_reused_and_chosen_again_where_they_are_gone(small_run, tmp_path, graph):
    run = copied(small_run, tmp_path / "run")
    before = SPPDetector.load(run.root).thresholds
    file = run.root / graph.folder("thresholds").name / "thresholds.json"
    values = json.loads(file.read_text())
    values["disc"]["threshold"] = 7.5
    file.write_text(json.dumps(values))
    assert train_detector(run.config, run.root, progress=False).thresholds[1] == 7.5
    file.unlink()
    assert train_detector(run.config, run.root, progress=False).thresholds == before
    assert SPPDetector.load(run.root).thresholds == before


def test_an_interrupted_choice_goes_on_and_leaves_no_detections(small_run, tmp_path, graph, monkeypatch):
    run = copied(small_run, tmp_path / "run")
    folder = run.root / graph.folder("thresholds").name
    before = (folder / "thresholds.json").read_bytes()
    (folder / "thresholds.json").unlink()
    detect, seen = SPPDetector.detect_for_evaluation, []

    def interrupted(*arguments):
        seen.append(0)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return detect(*arguments)

    monkeypatch.setattr(SPPDetector, "detect_for_evaluation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_detector(run.config, run.root, progress=False)
    assert len([path for path in (folder / "detections").rglob("*") if path.is_file()]) == 1
    assert train_detector(run.config, run.root, progress=False) is not None
    assert len(seen) == 1 + len(graph.data.validation)  # the first image was not searched again
    assert (folder / "thresholds.json").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["thresholds.json"]
