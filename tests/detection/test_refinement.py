"""Voting, and the selection with detect.vote, against naive loops."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from sppnet.detection.detector_description import DetectorDescription
from sppnet.detection.nms import nms
from sppnet.detection.refinement import LOOSE, LOWEST, settle, vote
from sppnet.detection.window_features import project_to_maps
from sppnet.errors import SppnetError
from sppnet.pipeline.run_data import RunData
from sppnet.pipeline.stages import StageGraph
from sppnet.records import Detections, pairwise_iou


def with_settings(detector, **values):
    own = detector.config.detect.model_copy(update=values)
    return replace(detector, config=detector.config.model_copy(update={"detect": own}))


def naive_vote(boxes, labels, candidates, candidate_labels, scores, overlap):
    voted = []
    boxes, candidates = (own.astype(np.float64) for own in (boxes, candidates))
    for box, label in zip(boxes.tolist(), labels, strict=True):
        total, corners = 0.0, [0.0] * 4
        for other, of, score in zip(candidates.tolist(), candidate_labels, scores, strict=True):
            if of == label and pairwise_iou(np.array([box]), np.array([other]))[0, 0] >= overlap:
                weight = math.exp(2 * score)
                total += weight
                corners = [own + weight * corner for own, corner in zip(corners, other, strict=True)]
        voted.append([own / total for own in corners] if total else box)
    return np.array(voted)


def cluttered(rng, count):
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(20, 60, (count, 2))], axis=1)


# ---- voting ----------------------------------------------------------------------------------------------------------


def detections(boxes, scores, labels):
    return Detections(boxes, scores, labels, ("a", "b", "c"))


@pytest.mark.parametrize("overlap", [0.3, 0.5, 0.9])
def test_a_box_becomes_the_weighted_mean_of_the_candidates_of_its_class(overlap):
    rng = np.random.default_rng(0)
    found = detections(cluttered(rng, 12), rng.normal(0, 1, 12), rng.integers(0, 3, 12))
    others = detections(cluttered(rng, 60), rng.normal(-0.5, 1, 60), rng.integers(0, 3, 60))
    before = found.boxes.copy()
    voted = vote(found, others, overlap)
    expected = naive_vote(found.boxes, found.labels, others.boxes, others.labels, others.scores, overlap)
    assert np.allclose(voted.boxes, expected, rtol=1e-6)
    assert np.array_equal(found.boxes, before)
    assert np.array_equal(voted.scores, found.scores)
    assert np.array_equal(voted.labels, found.labels)
    assert (voted.boxes == before).all() == (overlap == 0.9)


def test_equal_scores_give_the_plain_mean_however_low_or_high():
    found = detections([[0.0, 0, 10, 10]], [0.0], [0])
    for score in (-1e4, -0.5, 0, 1e4):
        others = detections([[0.0, 0, 10, 10], [2, 0, 12, 10], [50, 50, 60, 60]], [score] * 3, [0, 0, 0])
        assert vote(found, others).boxes.tolist() == [[1, 0, 11, 10]]


def test_a_probability_weighs_what_it_is():
    found, others = (
        detections([[0, 0, 10, 10]], [0.9], [0]),
        detections([[0, 0, 10, 10], [2, 0, 12, 10]], [0.6, 0.2], [0, 0]),
    )
    assert vote(found, others, probabilities=True).boxes[0].tolist() == pytest.approx([0.5, 0, 10.5, 10])


@pytest.mark.parametrize(("limit", "votes"), [(None, True), (2, True), (None, False)])
def test_what_a_joint_head_found_is_suppressed_then_voted_then_softened(limit, votes):
    """By hand, class by class, of boxes crowded into a corner."""
    rng = np.random.default_rng(3)
    corners = rng.uniform(0, 20, (60, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 30, (60, 2))], 1)
    every = detections(boxes, rng.uniform(0, 1, 60).astype(np.float32), rng.integers(0, 3, 60))
    shown = every.scores > 0.3
    found, cut = settle(every, shown, 0.3, limit, votes)
    expected, left_out = list[tuple[float, ...]](), list[str]()
    for label in range(3):
        own, kept = np.flatnonzero(every.labels == label), list[int]()
        for row in own[np.argsort(-every.scores[own])]:
            if shown[row] and all(pairwise_iou(every.boxes[[row]], every.boxes[[k]])[0, 0] <= 0.6 for k in kept):
                kept.append(row)
        left_out += [every.classes[label]] if limit and len(kept) > limit else []
        kept = kept[:limit]
        moved = {row: every.boxes[row].astype(float) for row in kept}
        for row in kept if votes else ():
            near = [
                o
                for o in own
                if every.scores[o] > 0.05 and pairwise_iou(every.boxes[[row]], every.boxes[[o]])[0, 0] >= 0.65
            ]
            moved[row] = np.average(every.boxes[near].astype(float), axis=0, weights=every.scores[near])
        scores = {row: float(every.scores[row]) for row in kept}
        waiting = set(kept)
        while waiting:
            best = max(waiting, key=scores.__getitem__)
            waiting.remove(best)
            for row in waiting:
                iou = pairwise_iou(moved[best][None], moved[row][None])[0, 0]
                scores[row] *= 1 - iou if iou > 0.3 else 1
        expected += [(scores[row], label, *moved[row]) for row in kept]
    rows = [(score, label, *box) for box, score, label, _ in found]
    np.testing.assert_allclose(rows, sorted(expected, reverse=True), rtol=1e-4, atol=1e-5)
    assert list(cut) == left_out
    assert len(rows) < shown.sum()


def test_an_overlap_of_exactly_the_least_is_a_vote():
    found = detections([[0, 0, 10, 10]], [0.0], [0])
    others = detections([[0, 0, 10, 10], [0, 0, 10, 5]], [0.0, 0.0], [0, 0])
    assert vote(found, others, 0.5).boxes.tolist() == [[0, 0, 10, 7.5]]
    assert vote(found, others, 0.51).boxes.tolist() == [[0, 0, 10, 10]]


def test_a_box_alone_in_its_class_and_no_boxes_stay():
    found, none = detections([[1.5, 2, 30.25, 40]], [-0.3], [1]), detections([], [], [])
    assert vote(found, found) == found
    assert vote(found, detections(found.boxes + 1, [9.0], [0])) == found
    assert vote(found, none) == found
    assert vote(none, found) == none


def test_votes_that_cannot_be_are_refused():
    found = detections([[0, 0, 9, 9]], [0.0], [1])
    with pytest.raises(SppnetError, match=r"candidates: expected the classes \('a', 'b', 'c'\), got \('a', 'b'\)"):
        vote(found, Detections([[0, 0, 9, 9]], [0.0], [1], ("a", "b")))
    with pytest.raises(SppnetError, match="overlap must be"):
        vote(found, found, 2)


# ---- the selection ---------------------------------------------------------------------------------------------------


def naive_select(detector, image, windows, votes):
    """Sec. 4.1 class by class and box by box, every box regressed by itself."""
    maps, own, config = detector.embed(image), detector.config.detect, detector.config
    height, width = image.shape[:2]

    def regress(boxes, label):
        moved = []
        for box in boxes:
            projected = project_to_maps(maps, box[None], detector.backbone.geometry, config.pyramid, config.maps)
            features = detector._frozen_head().features(maps, projected, config.boxes.layer)
            box = detector.regressors.single().refine(features, box[None], label)[0]
            moved.append(np.clip(box, 0, [width, height, width, height]))
        return np.reshape(moved, (-1, 4))

    scores, boxes, labels, values = detector.score(maps, windows), [], [], []
    for label in range(len(detector.classes)):
        passing = np.flatnonzero(scores[:, label] > own.score_threshold)
        kept = passing[nms(windows[passing], scores[passing, label], own.nms_overlap)]
        found, score = regress(windows[kept], label), scores[kept, label]
        if votes:
            voters = np.flatnonzero(scores[:, label] > LOWEST)
            voters = voters[nms(windows[voters], scores[voters, label], LOOSE)]
            others, same = regress(windows[voters], label), np.zeros(len(voters), int)
            found = naive_vote(found, [0] * len(found), others, same, scores[voters, label], 0.5).reshape(-1, 4)
        last = nms(found, score, own.nms_overlap)
        boxes, labels, values = [*boxes, *found[last]], [*labels, *[label] * len(last)], [*values, *score[last]]
    return np.array(boxes), np.array(labels), np.array(values)


@pytest.mark.parametrize("votes", [False, True])
def test_the_selection_agrees_with_loops(detector, image, windows, votes):
    own = with_settings(detector, vote=votes, score_threshold=-2.0)
    found = own.detect_for_evaluation(image, windows)[0]
    boxes, labels, scores = naive_select(own, image, windows, votes)
    order = np.argsort(-scores, kind="stable")
    assert len(found) == len(scores) > 3
    assert np.allclose(found.scores, scores[order], atol=1e-5)
    assert np.array_equal(found.labels, labels[order])
    assert np.allclose(found.boxes, boxes[order], atol=1e-3)
    assert (np.diff(found.scores) <= 0).all()
    assert found.boxes.min() >= 0
    assert (found.boxes[:, 2:] <= image.shape[1::-1]).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_maps_and_image_give_the_same(detector, image, windows):
    own = with_settings(detector, vote=True)
    assert own.detect_for_evaluation(own.embed(image), windows) == own.detect_for_evaluation(image, windows)


def test_what_is_shown_does_not_depend_on_what_else_passes(detector, image, windows):
    """Votes are those of all windows."""
    own = with_settings(detector, vote=True, score_threshold=-2.0)
    every = own.detect(image, windows, threshold=-2)
    middle = float(np.median(every.scores))
    assert own.detect(image, windows, threshold=middle) == every.above(middle)
    assert 0 < len(every.above(middle)) < len(every)


def test_votes_move_boxes_no_two_of_which_overlap_too_much_and_one_window_stays(detector, image, windows):
    plain, voted = (with_settings(detector, vote=on).detect(image, windows, threshold=-2) for on in (False, True))
    assert {tuple(box) for box in voted.boxes} - {tuple(box) for box in plain.boxes}
    for label in np.unique(voted.labels):
        own = voted.boxes[voted.labels == label].astype(np.float64)
        assert (pairwise_iou(own, own) - np.eye(len(own))).max() <= detector.config.detect.nms_overlap + 1e-6
    alone = [with_settings(detector, vote=on).detect(image, windows[:1], threshold=-5) for on in (False, True)]
    assert len(alone[0]) > 0
    assert alone[0] == alone[1]


def test_equal_scores_and_no_regressors_are_no_matter(detector, image, windows):
    own = replace(with_settings(detector, vote=True, score_threshold=-9.0), regressors=None)
    flat = replace(own, svms=replace(own.svms, weight=own.svms.weight * 0, bias=own.svms.bias * 0))
    found = flat.detect_for_evaluation(image, windows)[0]
    assert set(found.scores) == {0}
    plain = with_settings(flat, vote=False).detect_for_evaluation(image, windows)[0]
    assert set(found.labels) == set(plain.labels)
    assert not {tuple(box) for box in found.boxes} <= {tuple(box) for box in plain.boxes}


def test_no_digest_knows_voting_while_it_is_off(detector, small_run, tmp_path):
    """Runs and detections of before stay what they are."""
    description = DetectorDescription.read(small_run.root)
    changed = {}, {"vote": True}, {"nms_overlap": 0.31}
    configs = [with_settings(detector, **{"vote": False, **values}).config for values in changed]
    assert len({replace(description, config=config).digest("cpu") for config in configs}) == 3
    graphs = [StageGraph(tmp_path, config, RunData()).digests for config in configs]
    assert len({own["thresholds"] for own in graphs}) == 3
    assert len({own["svm"] for own in graphs}) == 1
    assert "vote" not in StageGraph(tmp_path, configs[0], RunData())._values["detect"]


def test_a_detector_of_a_version_without_voting_finds_what_it_found(detector, tmp_path):
    silent = with_settings(detector, vote=False)
    silent.save(tmp_path)
    expected = DetectorDescription.read(tmp_path).digest("cpu")
    saved = json.loads((tmp_path / "detector.json").read_text())
    for section, name in (("detect", "vote"), ("maps", "scale_choice")):
        del saved["config"][section][name]
    saved["config"]["maps"]["target_side"] = 208
    saved["config"]["detect"]["refine"] = 0  # a setting of before
    (tmp_path / "detector.json").write_text(json.dumps(saved))
    description = DetectorDescription.read(tmp_path)
    assert not description.config.detect.vote
    assert description.digest("cpu") == expected
