"""The joint head on a toy problem: its loss by hand, what it learns, an interruption, and the detector's parts."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sppnet.artifacts import read_tensors
from sppnet.config import HeadSettings, JointSettings
from sppnet.detection import joint_head
from sppnet.detection.box_regression import apply_targets
from sppnet.detection.embedding import LabelledRows, Projection
from sppnet.detection.joint_head import JointHead, SoftmaxClassifier, joint_loss, train_joint_head
from sppnet.errors import SppnetError
from sppnet.models.sppnet import SPPHead

CLASSES, RANK = 3, 8
HEAD = HeadSettings(fc6=24, fc7=24, dropout=0.1)
SETTINGS = JointSettings(steps=120, batch=64, learning_rate=1e-2)


def toy_rows(seed, images=4, each=60, noise=0.3):
    """Points around the corner of their class, whose targets are two of their coordinates; background around 0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES + 1, size=images * each)
    points = noise * rng.normal(size=(len(labels), RANK))
    near = np.flatnonzero(labels < CLASSES)
    points[near, labels[near]] += 2
    targets = np.zeros((len(labels), 4), np.float32)
    targets[near] = points[near, 4:8] * [0.2, 0.1, 0.3, 0.1] + [0.1, 0, 0, -0.1]
    return LabelledRows(points.astype(np.float16), labels, targets, np.zeros(len(labels), bool), CLASSES)


def train(folder, settings=SETTINGS, rows=None):
    return train_joint_head(rows or toy_rows(1), HEAD, settings, folder, torch.device("cpu"), progress=False)


def log_of(folder):
    with (folder / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_background_says_nothing_of_a_class_that_is_unknown(tmp_path):
    """Objects of class 1 count as background, with an image in which they are labelled: where that is all, and not."""
    rows = toy_rows(1)
    shown = np.flatnonzero(rows.labels == 1)[10:]
    labels, targets = rows.labels.copy(), rows.targets.copy()
    labels[shown], targets[shown] = CLASSES, 0
    unknown = np.isin(np.arange(len(labels)), shown).astype(int), np.array([[False] * 3, [False, True, False]])
    wrong = replace(rows, labels=labels, targets=targets)
    scores = {}
    for name, own in {"wrong": wrong, "unknown": replace(wrong, unknown=unknown)}.items():
        model, _ = train(tmp_path / name, rows=own)
        with torch.no_grad():
            scores[name] = model(rows.read(shown))[0].softmax(1)[:, 1].mean()
    assert scores["wrong"] < 0.6 < 0.9 < scores["unknown"]


def test_the_loss_is_cross_entropy_and_smooth_l1_of_the_own_class_of_positives():
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(6, 4, generator=generator), torch.randn(6, 3, 4, generator=generator) * 2
    targets, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 3, 2, 3, 1, 2])
    classification, regression = joint_loss(logits, boxes, labels, targets)
    expected = [0.0, 0.0]
    for i, label in enumerate(labels.tolist()):
        expected[0] -= float(logits[i, label] - logits[i].exp().sum().log()) / 6
        if label < 3:
            for difference in (boxes[i, label] - targets[i]).abs().tolist():
                expected[1] += (difference**2 / 2 if difference < 1 else difference - 0.5) / 6
    assert [float(classification), float(regression)] == pytest.approx(expected, rel=1e-5)
    assert float(joint_loss(logits[1:2], boxes[1:2], labels[1:2], targets[1:2])[1]) == 0


def test_classes_and_boxes_are_learned_together(tmp_path):
    model, summary = train(tmp_path)
    rows = toy_rows(3)
    logits, boxes = model(rows.read(np.arange(len(rows.labels))))
    assert (logits.argmax(1).numpy() == rows.labels).mean() > 0.97
    near = np.flatnonzero(rows.labels < CLASSES)
    found = (boxes * model.target_std + model.target_mean).detach().numpy()[near, rows.labels[near]]
    error = np.abs(found - rows.targets[near]).mean()
    assert error < 0.6 * rows.targets[near].std(axis=0).mean()  # 0.8 of always their mean
    assert "120 steps on 240 windows" in summary
    row = log_of(tmp_path)[-1]
    assert row["step"] == 120
    assert row["loss"] < 0.5  # it starts at log 4
    assert summary.endswith(f"; loss {row['loss']:.3f}, of boxes {row['box_loss']:.3f}")


def test_the_rate_rises_and_falls_once(tmp_path):
    rates = list(joint_head.one_cycle(1e-2, 200))
    top = int(np.argmax(rates))
    assert max(rates) == pytest.approx(1e-2, rel=1e-3)
    assert 0.2 < top / 200 < 0.4
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert rates[-1] < 1e-5


def test_an_interrupted_training_ends_as_the_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(joint_head, "SAVE_EVERY", 50)
    whole, _ = train(tmp_path / "whole")
    steps, step = [], joint_head._Trainer.train_step

    def stop(self, number, *batch):
        steps.append(number)
        if number == 70 and len(steps) == 71:
            raise KeyboardInterrupt
        step(self, number, *batch)

    monkeypatch.setattr(joint_head._Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    again, summary = train(tmp_path / "cut")
    assert steps[71:] == list(range(50, 120))
    assert "50 of them from before" in summary
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_the_seed_decides_and_the_callers_numbers_stay(tmp_path):
    torch.manual_seed(3)
    first, _ = train(tmp_path / "a", SETTINGS.model_copy(update={"steps": 3}))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    second, _ = train(tmp_path / "b", SETTINGS.model_copy(update={"steps": 3}))
    other, _ = train(tmp_path / "c", SETTINGS.model_copy(update={"steps": 3, "seed": 1}))
    assert torch.equal(first.boxes.weight, second.boxes.weight)
    assert not torch.equal(first.boxes.weight, other.boxes.weight)


def test_what_cannot_be_trained_is_refused(tmp_path):
    rows = toy_rows(1)
    bare = replace(rows, labels=np.full(len(rows.labels), CLASSES))
    with pytest.raises(SppnetError, match=r"no training window overlaps an object"):
        train(tmp_path / "a", rows=bare)
    rows.features[:, 0] = np.inf
    with pytest.raises(SppnetError, match=r"the loss is not finite at step 120; lower joint.learning_rate"):
        train(tmp_path / "b", rows=rows)


def test_the_head_on_pooled_features_and_the_regressors_compute_what_was_trained(tmp_path):
    model, _ = train(tmp_path, SETTINGS.model_copy(update={"steps": 20}))
    generator = torch.Generator().manual_seed(0)
    projection = Projection(torch.randn(RANK, 40, generator=generator) / 6, torch.randn(RANK, generator=generator))
    pooled = torch.randn(50, 40, generator=generator) + 1
    head = SPPHead(40, CLASSES + 1, HEAD, {"fc6": RANK}).eval()
    model.whole(projection, head)
    logits, boxes = model(projection.rows(pooled))
    assert torch.allclose(head(pooled), logits, atol=1e-5)
    features = head.features(pooled, "fc7").detach()
    names = ("a", "b", "c")
    scores = SoftmaxClassifier(head.classifier, names).score(features)
    assert torch.allclose(scores, F.softmax(logits, dim=1)[:, :3], atol=1e-6)
    windows = np.tile([10.0, 20.0, 50.0, 90.0], (50, 1))
    targets = (boxes * model.target_std + model.target_mean).detach().double().numpy()
    for label in range(3):
        refined = model.regressors(names).refine(features, windows, label)
        assert np.allclose(refined, apply_targets(windows, targets[:, label]), atol=1e-3)


def test_targets_are_normalised_by_their_mean_and_deviation():
    targets = np.random.default_rng(0).normal(1, [1, 2, 3, 4], (5000, 4))
    model = JointHead(RANK, CLASSES, HEAD, targets, 0)
    assert torch.allclose(model.target_mean, torch.ones(4), atol=0.3)
    assert torch.allclose(model.target_std, torch.tensor([1.0, 2, 3, 4]), rtol=0.05)


def test_the_state_on_disk_holds_no_more_than_tensors(tmp_path):
    train(tmp_path, SETTINGS.model_copy(update={"steps": 2}))
    saved = read_tensors(tmp_path / "checkpoint.safetensors")
    assert int(saved["step"]) == 2
    assert {name.split(".")[0] for name in saved} == {"optimiser", "model", "step", "log"}
