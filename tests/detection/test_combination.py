"""Several detectors as one: a naive reference, orders of classes, windows of several searches, the folder on disk."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from small_run import train_another

from sppnet.detection.combination import combine_detectors
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.errors import ArtifactError, SppnetError
from sppnet.proposals.search import make_proposer
from sppnet.records import Detections, pairwise_iou


@pytest.fixture(scope="module")
def another(small_run, tmp_path_factory):
    return SPPDetector.load(train_another(small_run, tmp_path_factory.mktemp("another")).root)


def pooled_by_loops(each: list[Detections], classes: tuple[str, ...], overlap: float, limit: int) -> list[tuple]:
    """(name, score, box) of what stays: class by class, the best first, each unless a better one overlaps it."""
    kept = []
    for name in classes:
        own = [found for detections in each for found in detections if found.name == name]
        chosen: list = []
        for found in sorted(own, key=lambda found: -found.score):
            boxes = np.array([other.box for other in chosen], np.float64).reshape(-1, 4)
            if (pairwise_iou(boxes, np.array([found.box])) <= overlap).all():
                chosen.append(found)
        kept += [(found.name, found.score, found.box) for found in chosen[:limit]]
    return sorted(kept, key=lambda found: (-found[1], classes.index(found[0])))


def rows(found: Detections) -> list[tuple]:
    return [(one.name, one.score, one.box) for one in found]


# ---- detections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_what_all_find_is_pooled_and_suppressed_class_by_class(detector, another, image, windows, first):
    members = [detector, another] if first == 0 else [another, detector]
    both = combine_detectors(members)
    assert both.classes == members[0].classes != members[1].classes
    for threshold, nms in ((-2.0, 0.3), (-1.0, 0.5)):
        each = [own.detect(image, windows, threshold=threshold, nms=nms) for own in members]
        found = both.detect(image, windows, threshold=threshold, nms=nms)
        assert rows(found) == pooled_by_loops(each, both.classes, nms, 1000)
        assert len(found) < sum(map(len, each))
        assert all(set(rows(own)) & set(rows(found)) for own in each)
    assert both.detect(image, windows, threshold=-2, top=3) == both.detect(image, windows, threshold=-2)[:3]
    assert both.detect([image, image], [windows, windows[:9]], threshold=-2)[1] == both.detect(
        image, windows[:9], threshold=-2
    )


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_evaluation_keeps_the_maximum_of_a_class_and_says_where_more_were_found(
    detector, another, image, windows, limit
):
    settings = detector.config.detect.model_copy(update={"max_per_class": limit, "score_threshold": -2})
    members = [replace(own, config=own.config.model_copy(update={"detect": settings})) for own in (detector, another)]
    alone = [own.detect_for_evaluation(image, windows) for own in members]
    found, cut = combine_detectors(members).detect_for_evaluation(image, windows)
    each = [own for own, _ in alone]
    assert rows(found) == pooled_by_loops(each, detector.classes, settings.nms_overlap, limit)
    every = pooled_by_loops(each, detector.classes, settings.nms_overlap, 1000)
    counts = {name: sum(own == name for own, _, _ in every) for name in detector.classes}
    expected = {name for name in detector.classes if counts[name] > limit}.union(*(names for _, names in alone))
    assert set(cut) == expected
    assert bool(cut) == (limit < 100)


def test_each_has_its_own_thresholds(detector, another, image, windows):
    shown = replace(detector, thresholds=(-2.0, -1.5, 9.0, -1.0, -0.5))
    other = replace(another, thresholds=(-1.0, 9.0, -2.0, -1.0, -1.5))
    each = [shown.detect(image, windows), other.detect(image, windows)]
    found = combine_detectors([shown, other]).detect(image, windows)
    assert rows(found) == pooled_by_loops(each, detector.classes, 0.3, 1000)
    assert "star" not in set(other.detect(image, windows).class_names)
    lowest = np.array([-2.0, -1.5, 9.0, -1.0, -0.5], np.float32)
    found = combine_detectors([detector, another]).detect(image, windows, threshold=lowest)
    turned = another.detect(image, windows, threshold=lowest[::-1])
    assert rows(found) == pooled_by_loops([shown.detect(image, windows), turned], detector.classes, 0.3, 1000)


def test_a_detector_with_itself_finds_what_it_finds_alone(detector, image, windows):
    twice = combine_detectors([detector, detector])
    assert twice.detect(image, windows, threshold=-2) == detector.detect(image, windows, threshold=-2)
    assert twice.detect_for_evaluation(image, windows) == detector.detect_for_evaluation(image, windows)


def test_a_combination_of_combinations_is_one_of_their_detectors(detector, another, image, windows):
    first = combine_detectors([detector, another])
    three = combine_detectors([first, replace(detector, regressors=None)])
    assert len(three.others) == 2
    turned = combine_detectors([replace(detector, regressors=None), first])
    for own in (three, turned):
        assert not any(each.others for each in own.others)
    assert len(turned.others) == 2
    each = [own.detect(image, windows, threshold=-2) for own in (replace(three, others=()), *three.others)]
    assert rows(three.detect(image, windows, threshold=-2)) == pooled_by_loops(each, detector.classes, 0.3, 1000)


def test_the_windows_are_those_of_all_searches_each_once(detector, another, image):
    proposals = another.config.proposals.model_copy(update={"max_side": 64, "workers": 1})
    other = replace(another, config=another.config.model_copy(update={"proposals": proposals}))
    other = replace(other, proposer=make_proposer(proposals))
    both = combine_detectors([detector, other])
    found, parts = both.proposer(image), [own.proposer(image) for own in (detector, other)]
    expected = list(dict.fromkeys(tuple(window) for part in parts for window in part.tolist()))
    assert [tuple(window) for window in found.tolist()] == expected
    assert max(map(len, parts)) < len(found)
    assert both.detect(image, threshold=-2) == both.detect(image, found, threshold=-2)
    part = image[:60, :80]
    assert np.array_equal(combine_detectors([both, detector]).proposer(part), both.proposer(part))
    assert len(both.proposer(part)) > len(detector.proposer(part))


def test_one_search_serves_detectors_of_equal_settings(detector, another, image):
    """Where the windows of training came from and who computed them is no difference."""
    assert detector.config.proposals != another.config.proposals
    assert np.array_equal(combine_detectors([detector, another]).proposer(image), detector.proposer(image))
    assert isinstance(combine_detectors([detector, another]).proposer, type(detector.proposer))
    assert combine_detectors([detector, another]).proposer.func is detector.proposer.func


def test_no_windows_give_no_detections(detector, another, image):
    both = combine_detectors([detector, another])
    assert rows(both.detect(image, np.zeros((0, 4)))) == []
    assert rows(both.detect(image, np.array([[0, 0, 40, 40]]), threshold=99)) == []
    assert both.detect_for_evaluation(image, np.zeros((0, 4)))[1] == ()


def test_what_cannot_be_combined_is_refused(detector, another, image, windows):
    svms = replace(another.svms, classes=("cross", "disc", "square", "moon", "triangle"))
    other = replace(another, svms=svms, regressors=None)
    message = r"detector 0 and runs/b: only one of them knows 'moon', 'star'; combine detectors of the same classes"
    with pytest.raises(SppnetError, match=message):
        combine_detectors([detector, other], ["detector 0", "runs/b"])
    with pytest.raises(SppnetError, match=r"detector 0 and detector 2: only one of them knows 'moon', 'star'"):
        combine_detectors([detector, another, other])
    with pytest.raises(SppnetError, match=r"others: expected detectors of the same classes"):
        replace(detector, others=(other,))
    for few in ([], [detector]):
        with pytest.raises(SppnetError, match=rf"two detectors or more to combine, got {len(few)}; give another"):
            combine_detectors(few)
    with pytest.raises(SppnetError, match=r"maps: each of several combined detectors has its own; pass the image"):
        combine_detectors([detector, another]).detect_for_evaluation(detector.embed(image), windows)


# ---- on disk -------------------------------------------------------------------------------------------------------


def test_a_saved_combination_finds_the_same(detector, another, image, windows, tmp_path):
    both = combine_detectors([detector, another])
    both.save(tmp_path)
    loaded = SPPDetector.load(tmp_path)
    expected = both.detect(image, windows)
    for own in (loaded, loaded.to("cpu"), pickle.loads(pickle.dumps(loaded))):
        assert own.detect(image, windows) == expected
        assert np.array_equal(own.proposer(image), both.proposer(image))
    assert loaded.config == detector.config
    assert [own.config for own in loaded.others] == [another.config]
    assert np.array_equal(SPPDetector.load(tmp_path, proposer=lambda image: windows).proposer(image), windows)


def test_the_digest_is_that_of_all_parts_and_settings(detector, another, tmp_path):
    def digest(*members):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        combine_detectors(members).save(folder)
        return DetectorDescription.read(folder).digest("cpu")

    def with_scales(own):
        maps = own.config.maps.model_copy(update={"scales": (80,)})
        return replace(own, config=own.config.model_copy(update={"maps": maps}))

    detector.save(tmp_path / "alone")
    found = [
        DetectorDescription.read(tmp_path / "alone").digest("cpu"), digest(detector, another),
        digest(another, detector), digest(detector, replace(another, regressors=None)),
        digest(detector, with_scales(another)), digest(with_scales(detector), another),
        digest(detector, another, replace(another, regressors=None)),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert digest(detector, another) == found[1]


def test_a_damaged_combination_is_refused(detector, another, tmp_path):
    combine_detectors([detector, another]).save(tmp_path / "good")
    cases = {
        "gone": (
            lambda folder: shutil.rmtree(folder / "others/0"),
            r"does not name the detectors in .*others; damaged",
        ),
        "else": (
            lambda folder: detector.save(folder / "others/0"),
            r"does not name the detectors in .*others; damaged",
        ),
        "none": (lambda folder: described(folder, 5), r"does not name the detectors in .*others; damaged"),
        "part": (
            lambda folder: (folder / "others/0/head.safetensors").unlink(),
            r"others/0/head\.safetensors: missing or damaged; run .* or `sppnet combine`",
        ),
        "half": (lambda folder: (folder / "detector.json").unlink(), r"its detector is not complete .*sppnet combine`"),
    }
    for name, (damage, message) in cases.items():
        folder = shutil.copytree(tmp_path / "good", tmp_path / name)
        damage(folder)
        with pytest.raises(ArtifactError, match=message):
            SPPDetector.load(folder)


def described(folder, others):
    values = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(json.dumps({**values, "others": others}))
