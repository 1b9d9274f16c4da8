"""What mining and box regression read of the training images."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from doubles import NO_WINDOWS, picture, picture_record, random_backbone, random_maps
from hypothesis import given
from hypothesis import strategies as st

from sppnet.backbones.runtime import make_runtime
from sppnet.config import Config, FinetuneSettings, MapSettings, SVMSettings
from sppnet.detection import training_windows
from sppnet.detection.feature_maps import extract_images, read_maps
from sppnet.detection.hard_negatives import mine_detectors
from sppnet.detection.training_windows import (
    FinetuneWindows,
    MiningWindows,
    TrainingWindows,
    class_overlaps,
    draw_rows,
    find_box_examples,
    label_windows,
)
from sppnet.detection.window_features import pool_projected
from sppnet.errors import ArtifactError
from sppnet.records import Annotation, ImageRecord, flip_boxes

OBJECTS = np.array([[20, 20, 100, 100], [110, 30, 170, 90]], np.float32)
NEAR = np.array([[22, 20, 102, 100], [20.5, 20, 100, 100]], np.float32)  # the second on the cells of the object
FAR = np.array([[60, 60, 140, 110], [0, 0, 180, 120]], np.float32)
NAMES, CLASSES = ("dog", "cat"), ("cat", "dog")


@pytest.fixture
def source(tmp_path, monkeypatch):
    backbone = random_backbone()
    sizes = [backbone.map_size(size) for size in ((128, 192), (240, 360))]
    maps = random_maps(*sizes, sides=(128.0, 240.0), image_size=(120, 180))
    monkeypatch.setattr(training_windows, "read_maps", lambda *_: maps)
    monkeypatch.setattr(training_windows, "read_windows", lambda *_: np.concatenate([NEAR, NEAR[:1] + 0.1, FAR]))

    def with_overlap(overlap, boxes=OBJECTS):
        annotation = Annotation(boxes, NAMES, np.zeros(2, bool))
        record = ImageRecord("a", tmp_path / "a.jpg", (120, 180), "0" * 16, annotation)
        settings = {"pyramid": {"levels": [1, 2]}, "maps": {"scales": [128, 240]}, "svm": {"positive_overlap": overlap}}
        config = Config.model_validate(settings)
        return TrainingWindows([record], CLASSES, tmp_path, tmp_path, backbone, config, torch.device("cpu"))

    return with_overlap


def pooled(source, windows):
    maps = source.maps(0)
    return pool_projected(maps, source.project(maps, windows), (1, 2))


def mining(source):
    return MiningWindows(source, lambda maps, projected: pool_projected(maps, projected, (1, 2)))


def test_by_default_the_objects_alone_are_positives(source):
    found = mining(source(1)).positives(0)
    assert found.objects == 2
    assert found.labels.tolist() == [1, 0]
    assert found.windows.tolist() == OBJECTS.tolist()


def test_positives_are_known_without_features(source):
    def no_features(maps, projected):
        raise AssertionError("features were computed")

    for threshold in (0.7, 1):
        assert MiningWindows(source(threshold), no_features).positives(0).objects == 2


@pytest.mark.parametrize("overlap", [1, 0.7])
def test_positives_need_no_maps(source, monkeypatch, overlap):
    own = source(overlap)
    expected = mining(own).positives(0)
    monkeypatch.setattr(training_windows, "read_maps", None)
    assert np.array_equal(mining(own).positives(0).windows, expected.windows)


def test_below_one_the_proposals_that_cover_an_object_are_positives_too_once_for_each_window_of_cells(source):
    own = source(0.7)
    found = mining(own).positives(0)
    assert found.objects == 2
    assert found.labels.tolist()[:2] == [1, 0]
    assert set(found.labels.tolist()[2:]) == {1}
    features = mining(own).features(0, found.windows)
    near = pooled(own, np.concatenate([NEAR, NEAR[:1] + 0.1]))
    assert torch.equal(features, torch.cat([pooled(own, OBJECTS), torch.unique(near, dim=0)[_order(near)]]))


def _order(rows):
    """Rank of the distinct rows by first occurrence, in terms of torch.unique's own order."""
    distinct = torch.unique(rows, dim=0)
    first = [int((rows == row).all(dim=1).nonzero()[0]) for row in distinct]
    return torch.tensor(np.argsort(first))


def test_a_window_may_be_a_positive_of_two_classes(source, monkeypatch):
    between = np.array([[20, 20, 98, 100]], np.float32)
    monkeypatch.setattr(training_windows, "read_windows", lambda *_: np.concatenate([between, FAR]))
    boxes = np.array([[20, 20, 100, 100], [20, 20, 90, 100]], np.float32)
    found = mining(source(0.7, boxes)).positives(0)
    assert found.windows.tolist() == [*boxes.tolist(), *between.tolist() * 2]
    assert found.labels.tolist() == [1, 0, 0, 1]


def test_mining_reads_the_objects_and_one_proposal_of_each_window_of_cells(source):
    image, features = mining(source(1)).read(0)
    assert image.objects.tolist() == [1, 0]
    assert image.windows[:2].tolist() == OBJECTS.tolist()
    assert torch.equal(features, pooled(source(1), image.windows))
    proposals = features[2:]
    assert len(torch.unique(proposals, dim=0)) == len(proposals) < 5
    assert image.overlaps.shape == (len(features), 2)


# ---- images whose objects alone train ------------------------------------------------------------------------------


MORE = np.array([[30, 10, 90, 70], [5, 60, 60, 118]], np.float32)  # a dog, then a cat


@pytest.fixture
def with_more(source):
    """An image with proposals, then one of whose objects alone are used."""

    def make(overlap=1):
        own = source(overlap)
        annotation = replace(own.records[0].annotation, boxes=MORE)
        return replace(
            own, records=[*own.records, replace(own.records[0], id="b", annotation=annotation)], objects_only=1
        )

    return make


def test_of_an_image_whose_objects_alone_train_no_proposal_is_read(with_more, monkeypatch):
    own = with_more()
    read = training_windows.read_windows
    monkeypatch.setattr(training_windows, "read_windows", lambda folder, record: {"a": read}[record.id](folder, record))
    assert own.windows(1).tolist() == MORE.tolist()
    assert len(own.windows(0)) == 7


@pytest.mark.parametrize("flips", [False, True])
def test_fine_tuning_takes_such_objects_as_positives_and_nothing_as_a_negative(with_more, flips):
    found = FinetuneWindows(with_more(), flips).labelled
    assert [image.objects_only for image in found] == [False, True] * (1 + flips)
    for image in found[1::2]:
        assert (image.positives.tolist(), image.labels.tolist(), image.negatives.tolist()) == ([0, 1], [1, 0], [])
    assert all(len(image.negatives) for image in found[::2])


@pytest.mark.parametrize("overlap", [1, 0.7])
def test_such_objects_are_positives_of_their_classes_and_negatives_of_none(with_more, source, overlap):
    settings = SVMSettings(positive_overlap=overlap, tolerance=1e-8, negative_overlap=0.3)
    images = mining(with_more(overlap))
    assert (len(images), images.mined) == (2, 1)
    assert images.positives(1).labels.tolist() == [1, 0]
    found = mine_detectors(images, CLASSES, settings, scale=1.0, progress=False)
    first, features = mining(source(overlap)).read(0)
    first.overlaps[np.arange(2), first.objects] = 1
    between = np.array([[0.5, 1], [1, 0.5]], np.float32)  # a positive of one class, nothing of the other
    more = images.features(1, MORE)

    def weights_of(*pairs):
        return mine_detectors(pairs, CLASSES, settings, scale=1.0, progress=False).svms.weight

    assert torch.allclose(found.svms.weight, weights_of((features, first.overlaps), (more, between)), atol=1e-5)
    for other in ([], [(more, np.eye(2)[::-1])]):  # without them, or as negatives of the other class
        assert (found.svms.weight - weights_of((features, first.overlaps), *other)).abs().max() > 1e-3


# ---- difficult objects that do not train ---------------------------------------------------------------------------


EASY, HARD = [20, 20, 60, 60], [100, 20, 160, 80]  # a cat that trains, one that is difficult; further windows:
ON_HARD, BESIDE_HARD, ON_EASY, NEAR_BOTH = [102, 20, 160, 80], [100, 20, 160, 40], [20, 20, 60, 56], [20, 20, 160, 80]
AWAY, HALF_EASY = [0, 90, 20, 118], [20, 20, 60, 36]


@pytest.fixture
def difficult(source, monkeypatch):
    """Windows of an image with an easy and a difficult cat and an easy dog, where difficult objects do not train."""

    def make(*windows, used=False, names=("cat", "cat", "dog"), boxes=(EASY, HARD, [0, 0, 16, 16]), **svm):
        monkeypatch.setattr(training_windows, "read_windows", lambda *_: np.float32(windows))
        annotation = Annotation(np.float32(boxes), names, np.array([False, True, False]))
        own = source(1)
        config = own.config.model_copy(
            update={
                "data": own.config.data.model_copy(update={"train_on_difficult": used}),
                "svm": own.config.svm.model_copy(update=svm),
            }
        )
        return replace(own, records=[replace(own.records[0], annotation=annotation)], config=config)

    return make


@pytest.mark.parametrize(
    ("used", "negative"), [(False, [False, False, False, True]), (True, [False, False, False, True])]
)
def test_no_window_on_a_difficult_object_is_a_negative_of_its_class(difficult, used, negative):
    found, _ = mining(difficult(ON_HARD, BESIDE_HARD, ON_EASY, AWAY, used=used)).read(0)
    assert len(found.objects) == (3 if used else 2)
    overlaps = found.overlaps[len(found.objects) :]
    assert (overlaps[:, 0] < 0.3).tolist() == negative
    assert (overlaps[:, 1] < 0.3).all()  # of the other class they all are


def test_no_window_on_a_difficult_object_is_a_positive_for_the_svms(difficult):
    own = difficult(ON_HARD, ON_EASY, positive_overlap=0.5)
    found = mining(own).positives(0)
    assert found.windows.tolist() == [EASY, [0, 0, 16, 16], ON_EASY]
    assert found.labels.tolist() == [0, 1, 0]
    used = mining(difficult(ON_HARD, ON_EASY, used=True, positive_overlap=0.5)).positives(0)
    assert used.windows.tolist() == [EASY, HARD, [0, 0, 16, 16], ON_HARD, ON_EASY]


def test_fine_tuning_leaves_windows_on_difficult_objects_alone(difficult):
    windows = (ON_HARD, ON_EASY, HALF_EASY, BESIDE_HARD, AWAY)
    for used, positives, negatives in ((False, [ON_EASY], [HALF_EASY]), (True, [ON_HARD, ON_EASY], [HALF_EASY])):
        own = difficult(*windows, used=used)
        (found,) = FinetuneWindows(own, flips=False).labelled
        rows = own.windows(0)
        assert rows[found.positives].tolist()[3 if used else 2 :] == positives
        assert [row for row in rows[found.negatives].tolist() if row != BESIDE_HARD] == negatives


def test_a_window_that_is_background_of_one_object_and_shows_a_difficult_one_is_neither(difficult):
    overlapped = [100, 20, 160, 68]  # a dog whose overlap with the window below is in the background's range
    own = difficult([104, 44, 160, 90], names=("cat", "cat", "dog"), boxes=(EASY, [104, 44, 160, 88], overlapped))
    overlaps = own.image_windows(0).overlaps[-1]
    assert overlaps[0] > 0.5
    assert 0.1 < overlaps[1] < 0.5
    (found,) = FinetuneWindows(own, flips=False).labelled
    assert len(own.windows(0)) - 1 not in [*found.positives, *found.negatives]


def test_box_regressors_learn_from_no_window_that_shows_a_difficult_object_better(difficult):
    cats = ([20, 20, 80, 80], [30, 20, 90, 80], [0, 0, 16, 16])  # the second is difficult
    windows = ([21, 20, 80, 80], [29, 20, 90, 80], [24, 20, 84, 80])
    examples = find_box_examples(difficult(*windows, boxes=cats))
    assert examples[0].windows.tolist() == [windows[0], windows[2]]
    assert examples[0].boxes.tolist() == [cats[0], cats[0]]
    used = find_box_examples(difficult(*windows, boxes=cats, used=True))
    assert used[0].boxes.tolist() == [cats[0], cats[1], cats[0]]


def test_an_easy_object_trains_where_a_difficult_one_of_another_class_has_its_box(difficult):
    own = difficult(ON_EASY, names=("cat", "dog", "dog"), boxes=(EASY, EASY, [0, 0, 16, 16]))
    (found,) = FinetuneWindows(own, flips=False).labelled
    assert own.windows(0)[found.positives].tolist() == [EASY, [0, 0, 16, 16], ON_EASY]
    assert found.labels.tolist() == [0, 1, 0]


@given(st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=12))
def test_windows_are_left_alone_where_what_does_not_train_is_overlapped_most(rows):
    trained, ignored = (np.array([row[i : i + 2] for row in rows], np.float32).reshape(-1, 2) for i in (0, 2))
    found = label_windows(np.maximum(trained, ignored), SETTINGS, ignored)
    for row, (own, other) in enumerate(zip(trained, ignored, strict=True)):
        best, rival = own.max(), other.max()
        if best > rival:
            assert (row in found.positives) == (best >= 0.5)
        if rival >= 0.5 and rival > best:
            assert row not in [*found.positives, *found.negatives]
        assert (row in found.negatives) == (0.1 <= max(best, rival) < 0.5)


# ---- overlaps and labels -------------------------------------------------------------------------------------------


SETTINGS = FinetuneSettings()


def naive_overlap(window, box):
    width = max(0, min(window[2], box[2]) - max(window[0], box[0]))
    height = max(0, min(window[3], box[3]) - max(window[1], box[1]))
    union = (window[2] - window[0]) * (window[3] - window[1]) + (box[2] - box[0]) * (box[3] - box[1]) - width * height
    return width * height / union if union else 0.0


def random_boxes(count, seed):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], axis=1).astype(np.float32)


def test_overlaps_are_the_largest_iou_with_the_objects_of_each_class():
    windows, boxes = random_boxes(50, 0), random_boxes(6, 1)
    names, classes = ("cat", "dog", "cat", "dog", "dog", "bird"), ("cat", "dog", "horse")
    known = [i for i, name in enumerate(names) if name in classes]
    found = class_overlaps(windows, boxes[known], np.array([classes.index(names[i]) for i in known]), 3)
    assert found.dtype == np.float32
    for row, window in enumerate(windows):
        for column, name in enumerate(classes):
            own = [naive_overlap(window, box) for box, other in zip(boxes, names, strict=True) if other == name]
            assert found[row, column] == pytest.approx(max(own, default=0.0), abs=1e-5)


def test_without_objects_or_windows_there_is_no_overlap():
    none = np.zeros(0, np.int64)
    assert class_overlaps(random_boxes(3, 0), NO_WINDOWS, none, 3).tolist() == [[0, 0, 0]] * 3
    assert class_overlaps(NO_WINDOWS, random_boxes(1, 0), np.array([1]), 3).shape == (0, 3)
    assert class_overlaps(NO_WINDOWS, NO_WINDOWS, none, 3).shape == (0, 3)


def test_windows_are_labelled_by_the_class_they_overlap_most():
    overlaps = np.array([[0.5, 0.0], [0.6, 0.7], [0.49, 0.3], [0.1, 0.0], [0.09, 0.0], [0, 0], [1, 0]], np.float32)
    found = label_windows(overlaps, SETTINGS)
    assert found.positives.tolist() == [0, 1, 6]
    assert found.labels.tolist() == [0, 1, 0]
    assert found.negatives.tolist() == [2, 3]


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)), max_size=20))
def test_no_window_is_both_positive_and_negative(values):
    overlaps = np.array(values, np.float32).reshape(-1, 2)
    settings = SETTINGS.model_copy(update={"negative_overlap": (0.1, 0.9)})  # wider than the positives begin
    found = label_windows(overlaps, settings)
    assert found.positives.tolist() == [i for i, own in enumerate(overlaps) if max(own) >= 0.5]
    assert found.negatives.tolist() == [i for i, own in enumerate(overlaps) if 0.1 <= max(own) < 0.5]
    assert len(found.labels) == len(found.positives)


def test_rows_are_drawn_evenly_and_in_their_order_and_all_of_them_where_they_fit():
    rng, rows = np.random.default_rng(0), np.arange(10, 50)
    assert draw_rows(rows, 40, rng).tolist() == rows.tolist()
    assert len(draw_rows(rows, 39, rng)) == 39
    counts = np.zeros(50)
    for _ in range(2000):
        drawn = draw_rows(rows, 10, rng)
        assert len(drawn) == 10
        assert (np.diff(drawn) > 0).all()
        counts[drawn] += 1
    assert counts[:10].sum() == 0
    assert np.abs(counts[10:] - 500).max() < 4.5 * np.sqrt(2000 * 0.25 * 0.75)


# ---- maps that are stored, and maps that are not -------------------------------------------------------------------


@pytest.fixture(params=["torch", "openvino"])
def pictures(request, tmp_path, monkeypatch):
    """Windows of pictures whose maps are stored, and the same where none are."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setattr(training_windows, "read_windows", lambda *_: np.concatenate([NEAR, FAR]))
    annotation = Annotation(OBJECTS, NAMES, np.zeros(2, bool))
    records = [picture_record(tmp_path, f"{i}", picture(120, 180, seed=i), annotation) for i in range(3)]
    backbone, settings = random_backbone(), {"scales": [96, 128], "runtime": request.param}
    jobs = [(record, flip) for record in records for flip in (False, True)]
    runtime = make_runtime(backbone, request.param)
    extract_images(jobs, lambda: runtime, MapSettings(**settings), tmp_path / "maps", progress=False)

    def windows(folder, **more):
        values = {"pyramid": {"levels": [1, 2]}, "precision": "float32", "maps": settings | more}
        folders = tmp_path, tmp_path / folder
        return TrainingWindows(records, CLASSES, *folders, backbone, Config(**values), torch.device("cpu"))

    return windows


def test_fine_tuning_pools_windows_from_stored_maps_at_random_scales(pictures):
    source = pictures("maps")
    own, rows = FinetuneWindows(source, flips=True), np.array([0, 3, 2, 2, 5])
    for image in range(6):
        index, flip = image % 3, image >= 3
        pooled = own.pool(image, rows, np.random.default_rng(image))
        scales = np.random.default_rng(image).integers(2, size=len(rows))
        windows = source.windows(index)[rows]
        maps = read_maps(source.maps_folder, source.records[index], flip).to("cpu", torch.float32)
        projected = source.project(maps, flip_boxes(windows, 180) if flip else windows, scales)
        assert torch.equal(pooled, pool_projected(maps, projected, (1, 2)))


def test_maps_that_are_not_stored_are_computed_the_same_from_several_threads(pictures):
    stored, computed = pictures("maps"), pictures("none", budget_gigabytes=1)
    for index in range(3):
        for flip in (False, True):
            for own, expected in zip(computed.maps(index, flip).maps, stored.maps(index, flip).maps, strict=True):
                assert own.dtype == torch.float32
                assert torch.equal(own, expected)
    one, other, rows = FinetuneWindows(stored, True), FinetuneWindows(computed, True), np.arange(6)
    jobs = list(range(6)) * 3
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda image: other.pool(image, rows, np.random.default_rng(image)), jobs))
    for image, pooled in zip(jobs, found, strict=True):
        assert torch.equal(pooled, one.pool(image, rows, np.random.default_rng(image)))


def test_without_a_budget_maps_that_are_not_there_are_an_error(pictures):
    with pytest.raises(ArtifactError, match=r"0-.*\.npz: no maps for image TOY/0; run extract first"):
        pictures("none").maps(0)
