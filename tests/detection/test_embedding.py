"""Windows as rows: the projection against an SVD, what is drawn and kept, and labels against naive loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from doubles import annotated, picture, picture_record, random_backbone

from sppnet.artifacts import read_arrays, write_arrays
from sppnet.config import Config
from sppnet.detection import embedding
from sppnet.detection.box_regression import apply_targets
from sppnet.detection.embedding import (
    LabelledRows,
    Projection,
    draw_windows,
    embed_images,
    fit_projection,
    label_rows,
    rows_path,
    sample_pooled,
)
from sppnet.detection.training_windows import ImageWindows, TrainingWindows
from sppnet.detection.window_features import pool_projected
from sppnet.errors import SppnetError
from sppnet.records import flip_boxes, pairwise_iou

CLASSES = ("cat", "dog")
OBJECTS = annotated(("dog", (20, 20, 100, 100)), ("cat", (110, 30, 170, 90)))
WINDOWS = np.array([[24, 20, 104, 100], [114, 36, 174, 90], [60, 60, 140, 110], [0, 0, 180, 120]], np.float32)


@pytest.fixture
def source(tmp_path):
    records = [picture_record(tmp_path, name, picture(120, 180, seed), OBJECTS) for seed, name in enumerate("ab")]
    records[1] = replace(records[1], annotation=annotated(("cat", (30, 10, 90, 70))))
    for record in records:
        write_arrays(record.path_in(tmp_path / "windows"), windows=WINDOWS)
    settings = {
        **{"head": {"training": "joint"}, "precision": "float32", "pyramid": {"levels": [1, 2]}},
        **{"maps": {"scales": [128, 240], "runtime": "torch"}, "joint": {"rank": 4, "windows": 5}},
    }
    config = Config.model_validate(settings)
    folders = tmp_path / "windows", tmp_path / "no maps"
    return TrainingWindows(records, CLASSES, *folders, random_backbone(), config, torch.device("cpu"))


# ---- projection ----------------------------------------------------------------------------------------------------


def low_rank_rows(count=200, width=30, rank=5):
    """Points that vary along a few directions, far more along the first, and a little along all; not about 0."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, rank)) * [9, 7, 5, 3, 2] @ rng.normal(size=(rank, width)) + 4
    return (rows + 1e-3 * rng.normal(size=rows.shape)).astype(np.float32)


def test_rows_are_coordinates_along_the_directions_of_largest_variance():
    points = low_rank_rows()
    found = fit_projection(torch.from_numpy(points), 5)
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.svd(centred, full_matrices=False)[1:]
    expected = centred @ vectors[:5].T
    expected *= np.sqrt(expected.size / (expected**2).sum())
    rows = found.rows(torch.from_numpy(points)).numpy()
    signs = np.sign((rows * expected).sum(axis=0))
    assert np.allclose(rows, expected * signs, atol=1e-3)
    assert np.square(rows).mean() == pytest.approx(1, rel=1e-4)
    assert found.kept == pytest.approx((values[:5] ** 2).sum() / (values**2).sum(), abs=1e-6)


def test_less_is_kept_of_fewer_components_and_there_are_no_more_than_windows():
    points = torch.from_numpy(low_rank_rows())
    centred = points - points.mean(0)
    values = torch.linalg.svdvals(centred)
    found = fit_projection(points, 2)
    assert found.kept == pytest.approx(float((values[:2] ** 2).sum() / (values**2).sum()), abs=1e-3)
    assert fit_projection(points[:3], 768).basis.shape == (3, 30)
    assert fit_projection(torch.ones(4, 6), 2).rows(torch.ones(1, 6)).abs().max() < 1e-5


def test_a_projection_depends_on_its_seed_and_not_on_the_callers_numbers():
    points = torch.from_numpy(low_rank_rows())
    torch.manual_seed(1)
    first, after = fit_projection(points, 3, 5), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(fit_projection(points, 3, 5).basis, first.basis)
    read = Projection.from_tensors(first.to_tensors())
    assert torch.equal(read.rows(points), first.rows(points))
    assert read.kept == first.kept


def test_without_a_window_there_is_no_projection():
    with pytest.raises(SppnetError, match=r"no training image has a window"):
        fit_projection(torch.zeros(0, 4), 2)


# ---- what is kept of an image --------------------------------------------------------------------------------------


def test_objects_come_first_then_at_most_half_near_them_then_others():
    overlaps = np.zeros((40, 2), np.float32)
    overlaps[:3, 0], overlaps[3:23, 1] = 1, 0.6
    found = ImageWindows(np.zeros((40, 4), np.float32), np.zeros(3, np.int64), overlaps)
    rows = draw_windows(found, 16, np.random.default_rng(0))
    assert rows[:3].tolist() == [0, 1, 2]
    assert len(set(rows.tolist())) == 16
    assert (overlaps[rows[:8]].max(axis=1) >= 0.5).all()
    assert sorted(draw_windows(found, 100, np.random.default_rng(0)).tolist()) == list(range(40))
    seen = {row for seed in range(60) for row in draw_windows(found, 16, np.random.default_rng(seed)).tolist()}
    assert seen == set(range(40))


def test_the_rows_of_an_image_are_the_projection_of_its_pooled_windows(source, tmp_path):
    pooled = sample_pooled(source, source.config.joint, progress=False)
    assert pooled.shape == (6 + 5, source.backbone.channels * 5)  # all windows: their objects, and four proposals each
    projection = fit_projection(pooled, 4)
    jobs = [(index, flip) for index in range(2) for flip in (False, True)]
    assert embed_images(source, projection, tmp_path / "rows", True, False, False) == 4
    assert embed_images(source, projection, tmp_path / "rows", True, False, False) == 0
    for index, flip in jobs:
        record = source.records[index]
        stored = read_arrays(rows_path(record, tmp_path / "rows", flip))
        assert len(stored["windows"]) == 5
        every = source.windows(index)
        every = flip_boxes(every, 180) if flip else every
        assert np.array_equal(stored["windows"][: len(record.annotation)], every[: len(record.annotation)])
        assert {tuple(row) for row in stored["windows"].tolist()} <= {tuple(row) for row in every.tolist()}
        maps = source.maps(index, flip)
        features = pool_projected(maps, source.project(maps, stored["windows"]), (1, 2))
        assert stored["rows"].dtype == np.float16
        assert np.allclose(stored["rows"], projection.rows(features).numpy(), rtol=2e-3, atol=2e-3)


def test_windows_are_pooled_in_batches_of_any_size_alike(source, tmp_path, monkeypatch):
    projection = Projection(torch.randn(3, 640, generator=torch.Generator().manual_seed(0)), torch.ones(3))
    seen = []
    for size in (1024, 3):
        monkeypatch.setattr(embedding, "BATCH", size)
        embed_images(source, projection, tmp_path / str(size), True, False, False)
        seen.append({path.name: read_arrays(path) for path in sorted((tmp_path / str(size)).rglob("*.npz"))})
    assert seen[0].keys() == seen[1].keys()
    for name, arrays in seen[0].items():
        assert len(arrays["rows"]) > 3
        np.testing.assert_array_equal(arrays["windows"], seen[1][name]["windows"])
        np.testing.assert_allclose(arrays["rows"], seen[1][name]["rows"], rtol=2e-3, atol=1e-3)  # half precision


def test_of_an_image_to_test_on_all_proposals_are_kept_and_no_object(source, tmp_path):
    projection = Projection(torch.ones(4, source.backbone.channels * 5), torch.zeros(4))
    assert embed_images(source, projection, tmp_path / "rows", False, True, False) == 2
    for record in source.records:
        assert np.array_equal(read_arrays(record.path_in(tmp_path / "rows"))["windows"], WINDOWS)


# ---- labels and batches --------------------------------------------------------------------------------------------


def number_rows(source, jobs, folder):
    """Write into the stored rows which image, and which window of it, they are."""
    for place, (index, flip) in enumerate(jobs):
        path = rows_path(source.records[index], folder, flip)
        windows = read_arrays(path)["windows"]
        numbers = np.arange(len(windows))
        rows = np.stack([numbers * 0 + place, numbers, numbers * 0, numbers * 0], axis=1).astype(np.float16)
        write_arrays(path, windows=windows, rows=rows)


@pytest.mark.parametrize("flips", [False, True])
def test_labels_and_targets_are_those_of_the_object_a_window_overlaps_most(source, tmp_path, flips):
    projection = Projection(torch.zeros(4, source.backbone.channels * 5), torch.zeros(4))
    jobs = [(index, flip) for index in range(2) for flip in (False, True)[: 1 + flips]]
    embed_images(source, projection, tmp_path / "rows", flips, False, False)
    number_rows(source, jobs, tmp_path / "rows")
    rows = label_rows(source, tmp_path / "rows", flips)
    images, numbers = rows.features[:, :2].astype(int).T
    seen = 0
    for place, (index, flip) in enumerate(jobs):
        record = source.records[index]
        boxes = flip_boxes(record.annotation.boxes, 180) if flip else record.annotation.boxes
        windows = read_arrays(rows_path(record, tmp_path / "rows", flip))["windows"]
        own = images == place
        assert sorted(numbers[own].tolist()) == list(range(len(windows)))
        for row, label, target in zip(numbers[own], rows.labels[own], rows.targets[own], strict=True):
            iou = pairwise_iou(windows[row : row + 1], boxes)[0]
            assert rows.missed[(numbers == row) & own] == (0.1 <= iou.max() < 0.5)
            if iou.max() < 0.5:
                assert label == 2
                assert not target.any()
                continue
            seen += 1
            best = iou.argmax()
            assert CLASSES[label] == record.annotation.names[best]
            assert np.allclose(apply_targets(windows[row : row + 1], target[None]), boxes[best : best + 1], atol=1e-3)
    assert seen >= 4 * (1 + flips)


def test_difficult_objects_that_do_not_train_are_neither_objects_nor_background(source, tmp_path):
    difficult = replace(source.records[0], annotation=replace(OBJECTS, difficult=np.array([True, False])))
    config = source.config.model_copy(
        update={"data": source.config.data.model_copy(update={"train_on_difficult": False})}
    )
    source = replace(source, records=[difficult], config=config)
    projection = Projection(torch.zeros(4, source.backbone.channels * 5), torch.zeros(4))
    embed_images(source, projection, tmp_path / "rows", False, False, False)
    number_rows(source, [(0, False)], tmp_path / "rows")
    rows = label_rows(source, tmp_path / "rows", False)
    windows = read_arrays(rows_path(difficult, tmp_path / "rows"))["windows"][rows.features[:, 1].astype(int)]
    assert (pairwise_iou(windows, OBJECTS.boxes[:1]) < 0.5).all()
    assert sorted(set(rows.labels.tolist())) == [0, 2]


def test_background_may_be_of_the_classes_that_nobody_labelled_in_its_image(source, tmp_path):
    open_classes = replace(source.records[1].annotation, unknown=("zebra", CLASSES[1]))
    opened = replace(source, records=[source.records[0], replace(source.records[1], annotation=open_classes)])
    embed_images(source, Projection(torch.zeros(4, 640), torch.zeros(4)), tmp_path / "rows", True, False, False)
    number_rows(source, [(0, False), (0, True), (1, False), (1, True)], tmp_path / "rows")
    assert label_rows(source, tmp_path / "rows", True).unknown is None
    rows = label_rows(opened, tmp_path / "rows", True)
    expected = (rows.features[:, 0] >= 2) & (rows.labels == 2)
    assert 0 < expected.sum() < (rows.features[:, 0] >= 2).sum()
    hidden = rows.mask(torch.zeros(len(rows.labels), 3), np.arange(len(rows.labels))).numpy() == -np.inf
    assert np.array_equal(hidden, np.stack([expected & False, expected, expected & False], axis=1))


def test_logits_of_unknown_classes_are_hidden_in_background():
    images = np.array([[False, False, False], [False, True, True], [False, False, True]])
    rows = replace(rows_of([0, 3, 3, 0]), unknown=(np.array([0, 1, 2, 1]), images))
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    masked, hidden = rows.mask(logits, np.array([2, 0, 1, 3])), -torch.inf
    assert masked[0].tolist() == [logits[0, 0], logits[0, 1], hidden, logits[0, 3]]
    assert torch.equal(masked[[1, 3]], logits[[1, 3]])
    assert masked[2].tolist() == [logits[2, 0], hidden, hidden, logits[2, 3]]
    assert torch.equal(rows_of([0, 3, 3, 0]).mask(logits, np.array([2, 0, 1, 3])), logits)


def test_of_two_objects_at_the_same_overlap_the_target_is_that_of_the_label(source, tmp_path):
    """A window midway between a dog, the first, and a cat is one of the first class; its box is the cat's."""
    dog, cat, window = (0, 0, 100, 100), (40, 0, 140, 100), np.array([[20, 0, 120, 100]], np.float32)
    record = replace(source.records[0], annotation=annotated(("dog", dog), ("cat", cat)))
    write_arrays(record.path_in(tmp_path / "windows"), windows=window)
    source = replace(source, records=[record])
    embed_images(source, Projection(torch.zeros(4, 640), torch.zeros(4)), tmp_path / "rows", False, False, False)
    number_rows(source, [(0, False)], tmp_path / "rows")
    rows = label_rows(source, tmp_path / "rows", False)
    place = [tuple(w) for w in read_arrays(rows_path(record, tmp_path / "rows"))["windows"].tolist()].index(
        tuple(window[0])
    )
    (own,) = np.flatnonzero(rows.features[:, 1] == place)
    assert rows.labels[own] == 0
    assert np.allclose(apply_targets(window, rows.targets[own][None]), [cat], atol=1e-3)


def rows_of(labels, width=2, classes=3):
    features = np.random.default_rng(0).normal(size=(len(labels), width)).astype(np.float16)
    nothing = np.zeros((len(labels), 4), "f4")
    return LabelledRows(features, np.asarray(labels), nothing, np.zeros(len(labels), bool), classes)


def test_a_batch_has_its_share_of_positives_as_many_of_every_class_and_draws_all_rows():
    rows = rows_of([0] * 50 + [2] * 3 + [3] * 200)  # no positive of class 1
    drawn = [rows.draw(30, 1 / 3, np.random.default_rng(seed)) for seed in range(300)]
    for chosen in drawn:
        assert sorted(rows.labels[chosen[:10]].tolist()) == [0] * 5 + [2] * 5
        assert (rows.labels[chosen[10:]] == 3).all()
    counts = np.bincount(np.concatenate(drawn), minlength=253)
    for first, last, expected in ((0, 50, 30), (50, 53, 500), (53, 253, 30)):
        assert counts[first:last].min() > 0.3 * expected
        assert counts[first:last].max() < 1.9 * expected


def test_of_more_classes_than_positives_a_batch_has_others_each_time():
    rows = rows_of([0, 1, 2, 3, 4, 5, 5, 5], classes=5)
    drawn = [rows.labels[rows.draw(6, 1 / 3, np.random.default_rng(seed))[:2]] for seed in range(60)]
    assert all(len({*own.tolist()}) == 2 for own in drawn)
    assert np.bincount(np.concatenate(drawn), minlength=5).min() > 8


def test_half_of_the_background_overlaps_an_object_where_some_does():
    rows = rows_of([0] * 5 + [3] * 200)
    near = replace(rows, missed=np.arange(205) >= 195)
    drawn = [near.draw(30, 1 / 3, np.random.default_rng(seed))[10:] for seed in range(100)]
    assert all(near.missed[chosen].sum() == 10 for chosen in drawn)
    assert set(np.concatenate(drawn).tolist()) == set(range(5, 205))
    every = replace(rows, missed=rows.labels == 3).draw(30, 1 / 3, np.random.default_rng(0))
    assert (rows.labels[every[10:]] == 3).all()


def test_features_are_read_in_the_order_of_the_batch():
    rows = rows_of([0, 1, 2, 3, 3, 3])
    chosen = np.array([5, 0, 0, 3])
    assert rows.read(chosen).tolist() == [rows.features[one].tolist() for one in chosen]


def test_a_batch_without_background_is_all_positives_and_without_positives_refused():
    rows = rows_of([0, 1])
    assert set(rows.labels[rows.draw(8, 0.25, np.random.default_rng(0))].tolist()) == {0, 1}
    with pytest.raises(SppnetError, match=r"no training window overlaps an object by half"):
        rows_of([3, 3]).draw(8, 0.25, np.random.default_rng(0))
