import logging
import re
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from reference import svm_objective
from refusals import refused_here

from sppnet.config import SVMSettings
from sppnet.detection import linear_svm
from sppnet.detection.hard_negatives import NEVER, distinct_negatives, mine_detectors
from sppnet.detection.linear_svm import LinearSVM
from sppnet.detection.training_windows import ImageWindows, PositiveWindows
from sppnet.errors import SppnetError
from sppnet.records import pairwise_iou

CLASSES = ("cat", "dog", "cow")
fit_linear_svm = partial(linear_svm.fit_linear_svm, scale=1.0)
QUICK = SVMSettings(C=0.05, retrain_after=60, tolerance=1e-4)


@dataclass(frozen=True)
class MiningImage:
    """What the mining reads of one image; labels are -1 for proposals."""

    features: torch.Tensor
    overlaps: np.ndarray
    labels: np.ndarray
    windows: np.ndarray


class MemoryImages:
    """Random images: rows 0…G-1 are ground truth, the rest proposals; features lean towards the class."""

    def __init__(self, count=12, windows=50, width=8, labels=(0, 1, 2), seed=0):
        rng = np.random.default_rng(seed)
        directions = rng.standard_normal((3, width))
        self.items = []
        for _ in range(count):
            own = rng.choice(labels, 3)
            truth = np.concatenate([own, np.full(windows, -1)])
            overlaps = np.where(rng.random((windows + 3, 3)) < 0.8, 0.1, rng.random((windows + 3, 3)))
            overlaps[np.arange(3), own] = 1
            overlaps[:, [k for k in range(3) if k not in own]] = 0
            features = rng.standard_normal((windows + 3, width)) + 0.5 * overlaps @ directions
            corner = rng.integers(0, 30, (windows + 3, 2))
            boxes = np.concatenate([corner, corner + rng.integers(5, 30, (windows + 3, 2))], axis=1)
            boxes = boxes + np.arange(windows + 3)[:, None] / 1024  # no two windows are the same
            self.items.append(
                MiningImage(torch.from_numpy(features).float(), overlaps, truth, boxes.astype(np.float32))
            )
        self.reads = 0
        self.computed = []  # how many windows, for every call of `features`

    def __len__(self):
        return len(self.items)

    def read(self, index):
        self.reads += 1
        image = self.items[index]
        return ImageWindows(image.windows, image.labels[image.labels >= 0], image.overlaps), image.features

    def positives(self, index):
        image = self.items[index]
        rows = np.flatnonzero(image.labels >= 0)
        return PositiveWindows(image.windows[rows], image.labels[rows], len(rows))

    def features(self, index, windows):
        self.computed.append(len(windows))
        image = self.items[index]
        return image.features[[int(np.flatnonzero((image.windows == window).all(axis=1))[0]) for window in windows]]


def naive_negatives(images, label, settings):
    """(image, row) of every negative of a class, by the definition."""
    return [
        (index, row)
        for index, image in enumerate(images.items)
        for row in range(len(image.labels))
        if image.overlaps[row, label] < settings.negative_overlap and image.labels[row] != label
    ]


def rows_of(images, keys):
    return torch.stack([images.items[i].features[r] for i, r in keys])


def positives_of(images, label):
    return torch.cat([image.features[image.labels == label] for image in images.items])


def naive_mining(images, label, settings, scale=1.0):
    """One class, lists of keys, one window at a time."""
    every = naive_negatives(images, label, settings)
    positives, cache, fresh, svm, counts = positives_of(images, label) * scale, [], 0, None, []

    def fit():
        negatives = rows_of(images, cache) * scale
        model = fit_linear_svm(
            torch.cat([positives, negatives]), [1] * len(positives) + [-1] * len(negatives), settings
        )
        counts.append(len(cache))
        kept = [k for k in cache if model.score(rows_of(images, [k]) * scale)[0] >= settings.evict_below]
        return model, kept

    for index in range(len(images)):
        before = svm
        for key in (k for k in every if k[0] == index):
            if before is None or before.score(rows_of(images, [key]) * scale)[0] > settings.mine_above:
                cache.append(key)
                fresh += 1
        if cache and (before is None or fresh >= settings.retrain_after):
            svm, cache = fit()
            fresh = 0
    svm, cache = fit()
    return svm, cache, counts


def svm_of(mined, label):
    return LinearSVM(mined.svms.weight[label].double().numpy(), float(mined.svms.bias[label]))


def objective(svm, examples, signs, settings):
    return svm_objective(svm.weight, svm.bias, examples.numpy(), signs, settings, svm.scale)


def everything(images, label, settings):
    positives = positives_of(images, label)
    negatives = rows_of(images, naive_negatives(images, label, settings))
    return torch.cat([positives, negatives]), np.repeat([1, -1], [len(positives), len(negatives)])


def test_mining_without_thresholds_is_one_fit_on_all_windows():
    settings = QUICK.model_copy(update={"mine_above": -1e9, "evict_below": -1e9, "retrain_after": 10**9})
    images = MemoryImages()
    mined = mine_detectors(images, CLASSES, settings)
    assert mined.retrains == (2, 2, 2)  # after the first image and at the end
    for label in range(3):
        # A tight solution does not depend on the order of the examples.
        examples, signs = everything(images, label, settings)
        full = objective(fit_linear_svm(examples, signs, settings), examples, signs, settings)
        reached = objective(svm_of(mined, label), examples, signs, settings)
        assert reached == pytest.approx(full, rel=1e-3)


def test_mining_equals_the_naive_miner_window_by_window(caplog):
    settings = QUICK.model_copy(update={"tolerance": 1e-6, "max_iterations": 100_000})
    images = MemoryImages()
    with caplog.at_level(logging.INFO, logger="sppnet"):
        mined = mine_detectors(images, CLASSES, settings, scale=0.8)
    for label, name in enumerate(CLASSES):
        svm, cache, counts = naive_mining(images, label, settings, scale=0.8)
        np.testing.assert_allclose(mined.svms.weight[label], svm.weight, atol=2e-3)
        assert float(mined.svms.bias[label]) == pytest.approx(svm.bias, abs=2e-3)
        assert mined.retrains[label] == len(counts) > 2
        lines = re.findall(rf"svm {name} retrain \d+: .* (\d+) neg, evicted (\d+)", caplog.text)
        assert [int(kept) + int(evicted) for kept, evicted in lines] == counts
        assert int(lines[-1][0]) == len(cache)
    assert images.reads == len(images)


def test_mined_svms_come_close_to_the_optimum_over_all_windows():
    settings = QUICK.model_copy(update={"retrain_after": 30})
    images = MemoryImages()
    mined = mine_detectors(images, CLASSES, settings)
    for label in range(3):
        examples, signs = everything(images, label, settings)
        full = objective(fit_linear_svm(examples, signs, settings), examples, signs, settings)
        reached = objective(svm_of(mined, label), examples, signs, settings)
        assert full * 0.999 <= reached <= full * 1.02


def test_a_class_without_positives_never_fires_and_is_reported(caplog):
    mined = mine_detectors(MemoryImages(labels=(0, 2)), CLASSES, QUICK)
    assert mined.untrained == {"dog": "no positives"}
    assert "svm dog has no positives in the training images; it never fires" in caplog.text
    assert mined.retrains[1] == 0
    assert mined.svms.score(torch.randn(5, 8))[:, 1].tolist() == [NEVER] * 5


def test_a_class_without_negatives_never_fires_and_is_reported():
    images = MemoryImages(count=2)
    images.items = [replace(image, overlaps=np.maximum(image.overlaps, [0, 0.5, 0])) for image in images.items]
    mined = mine_detectors(images, CLASSES, QUICK)
    assert mined.untrained == {"dog": "no negatives"}


def test_no_positives_at_all_give_svms_that_never_fire():
    images = MemoryImages(count=2)
    images.items = [
        MiningImage(image.features[3:], image.overlaps[3:], image.labels[3:], image.windows[3:])
        for image in images.items
    ]
    mined = mine_detectors(images, CLASSES, QUICK)
    assert set(mined.untrained) == set(CLASSES)
    assert mined.svms.weight.shape == (3, 8)


def counts_of(text, name, retrain):
    """Positives, and negatives before any left, that the log names for one fit."""
    kept = re.search(rf"svm {name} retrain {retrain}: cache (\d+) pos (\d+) neg, evicted (\d+)", text)
    return int(kept[1]), int(kept[2]) + int(kept[3])


def test_a_class_that_meets_its_first_negative_later_is_first_fitted_there(caplog):
    images = MemoryImages(count=4)
    for index in (0, 1):
        images.items[index] = replace(images.items[index], overlaps=np.ones((53, 3)))
    fits, read = [], images.read

    def watched(index):
        fits.append(len(re.findall("retrain 1:", caplog.text)))
        return read(index)

    images.read = watched
    with caplog.at_level(logging.INFO, logger="sppnet"):
        mine_detectors(images, CLASSES, QUICK)
    assert fits == [0, 0, 0, 3]


def test_an_image_without_windows_is_ordinary():
    images = MemoryImages(count=3)
    empty = MiningImage(torch.zeros(0, 8), np.zeros((0, 3)), np.zeros(0, np.int64), np.zeros((0, 4)))
    images.items = [empty, *images.items, empty]
    for duplicates in ("cells", "overlap"):
        mined = mine_detectors(images, CLASSES, QUICK.model_copy(update={"duplicates": duplicates}))
        assert mined.untrained == {}


def test_ground_truth_of_another_class_is_a_negative_and_of_its_own_class_never(caplog):
    images = MemoryImages(count=1, windows=0)
    images.items = [
        replace(
            images.items[0],
            labels=np.array([0, 1, 2]),
            overlaps=np.array([[0.0, 0.0, 0.4], [0.2, 1.0, 0.0], [0.4, 0.0, 1.0]]),
        )
    ]
    settings = QUICK.model_copy(update={"evict_below": -1e9})
    with caplog.at_level(logging.INFO, logger="sppnet"):
        mined = mine_detectors(images, CLASSES, settings)
    features = images.items[0].features
    for label, (name, negatives) in enumerate(zip(CLASSES, ([1], [0, 2], [1]), strict=True)):
        assert counts_of(caplog.text, name, retrain=1) == (1, len(negatives))
        signs = [1] + [-1] * len(negatives)
        expected = fit_linear_svm(features[[label, *negatives]], signs, settings)
        np.testing.assert_array_equal(mined.svms.weight[label], expected.weight.astype(np.float32))


def test_the_cache_stays_within_its_bound_and_says_what_it_dropped(caplog):
    settings = QUICK.model_copy(update={"cache_gigabytes": 40 * 47e-9 * 1.001})  # 4 · 8 + 5 · 3 bytes each
    with caplog.at_level(logging.INFO, logger="sppnet"):
        mined = mine_detectors(MemoryImages(), CLASSES, settings)
    assert "cache for 40 windows" in caplog.text
    fits = re.findall(r"(\d+) neg, evicted (\d+)", caplog.text)
    assert 20 < max(int(kept) + int(evicted) for kept, evicted in fits) <= 40
    assert mined.dropped > 0
    assert (
        f"was full and dropped {mined.dropped} negatives, the lowest scores of the largest classes first; "
        "svm.cache_gigabytes raises it" in caplog.text
    )


def test_positives_beyond_their_bound_are_not_computed(caplog):
    images = MemoryImages()
    with caplog.at_level(logging.INFO, logger="sppnet"):
        mine_detectors(images, CLASSES, QUICK.model_copy(update={"max_positives": 4}))
    assert "positives cat 4, dog 4, cow 4;" in caplog.text
    assert sum(images.computed) == 12


def test_positives_beyond_their_bound_are_drawn_evenly_over_the_images():
    images, counts = MemoryImages(count=6, windows=4), np.zeros(6)
    for seed in range(300):
        images.features = lambda index, windows: _counted(images, counts, index, windows)
        mine_detectors(images, CLASSES, QUICK.model_copy(update={"max_positives": 1, "seed": seed}))
    assert counts.sum() == 900
    expected = np.zeros(6)
    for label in range(3):
        own = np.array([(image.labels == label).sum() for image in images.items])
        expected += 300 * own / own.sum()
    assert np.abs(counts - expected).max() < 4.5 * np.sqrt(900 / 6)


def _counted(images, counts, index, windows):
    counts[index] += len(windows)
    return MemoryImages.features(images, index, windows)


def test_which_positives_are_drawn_depends_on_the_seed_alone():
    def weights(seed):
        settings = QUICK.model_copy(update={"max_positives": 4, "seed": seed})
        return mine_detectors(MemoryImages(), CLASSES, settings).svms.weight

    assert torch.equal(weights(0), weights(0))
    assert (weights(0) - weights(1)).abs().max() > 1e-2


class WithCloseProposals(MemoryImages):
    """Nine proposals of each image are positives of "dog" besides its objects."""

    def positives(self, index):
        own, image = super().positives(index), self.items[index]
        labels = np.append(own.labels, np.full(9, CLASSES.index("dog")))
        return PositiveWindows(np.concatenate([own.windows, image.windows[-9:]]), labels, own.objects)


def kept_positives(images, settings, caplog):
    with caplog.at_level(logging.INFO, logger="sppnet"):
        mine_detectors(images, CLASSES, settings)
    return {name: int(count) for name, count in re.findall(r"(\w+) (\d+)[,;]", caplog.text.split("positives ")[1])}


def test_proposals_among_the_positives_take_no_more_bytes_than_the_cache_and_no_object_its_place(caplog):
    images, space = WithCloseProposals(), 4 * (4 * 8 * len(CLASSES)) / 1e9  # four rows of eight numbers in every class
    objects = {name: sum(int((image.labels == k).sum()) for image in images.items) for k, name in enumerate(CLASSES)}
    found = kept_positives(images, QUICK.model_copy(update={"cache_gigabytes": space * 1.001}), caplog)
    assert found == objects | {"dog": objects["dog"] + 4}


def test_proposals_among_the_positives_are_used_where_there_is_room(caplog):
    images = WithCloseProposals()
    dogs = sum(int((image.labels == CLASSES.index("dog")).sum()) for image in images.items)
    assert kept_positives(images, QUICK, caplog)["dog"] == dogs + 9 * len(images)


def test_positives_are_objects_and_then_proposals_image_by_image():
    settings = QUICK.model_copy(update={"retrain_after": 10**9, "mine_above": 1e9, "evict_below": -1e9})
    images = WithCloseProposals()
    mined = mine_detectors(images, CLASSES, settings, scale=0.5)
    dog = CLASSES.index("dog")
    first = [(0, row) for i, row in naive_negatives(images, dog, settings) if i == 0]
    close = torch.cat([image.features[-9:] for image in images.items])
    examples = torch.cat([positives_of(images, dog), close, rows_of(images, first)]) * 0.5
    signs = np.repeat([1, -1], [len(examples) - len(first), len(first)])
    svm = fit_linear_svm(examples, signs, settings)
    np.testing.assert_array_equal(mined.svms.weight[dog], svm.weight.astype(np.float32))
    assert float(mined.svms.bias[dog]) == np.float32(svm.bias)


def test_proposals_among_the_positives_are_bounded_by_their_number_too(caplog):
    found = kept_positives(WithCloseProposals(), QUICK.model_copy(update={"max_positives": 4}), caplog)
    assert found == {"cat": 4, "dog": 8, "cow": 4}


def test_positives_that_are_not_finite_name_their_image():
    images = MemoryImages()
    row = int(np.flatnonzero(images.items[2].labels >= 0)[0])
    images.items[2].features[row] = float("nan")
    with pytest.raises(SppnetError, match="positives of image 2: features must be finite"):
        mine_detectors(images, CLASSES, QUICK)


def test_each_fit_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="sppnet"):
        mine_detectors(MemoryImages(), CLASSES, QUICK)
    assert re.search(r"svm dog retrain 2: cache \d+ pos \d+ neg, evicted \d+", caplog.text)


def test_duplicates_by_overlap_keep_fewer_negatives(caplog):
    found = []
    for duplicates in ("cells", "overlap"):
        settings = QUICK.model_copy(update={"duplicates": duplicates, "evict_below": -1e9, "duplicate_overlap": 0.4})
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="sppnet"):
            mine_detectors(MemoryImages(count=1, labels=(0,)), CLASSES, settings)
        found.append(counts_of(caplog.text, "cat", retrain=1)[1])
    by_cells, by_overlap = found
    images = MemoryImages(count=1, labels=(0,))
    assert by_cells == len(naive_negatives(images, 0, QUICK))
    negatives = np.zeros((53, 1), bool)
    negatives[[row for _, row in naive_negatives(images, 0, QUICK)]] = True
    assert by_overlap == distinct_negatives(images.items[0].windows, negatives, 0.4).sum() < by_cells


def test_errors_say_what_was_expected():
    images = MemoryImages(count=2)
    features = torch.cat([images.items[1].features[:-1], torch.full((1, 8), torch.nan)])
    images.items[1] = replace(images.items[1], features=features)
    with pytest.raises(SppnetError, match="image 1: features must be finite"):
        mine_detectors(images, CLASSES, QUICK)
    images.items = []
    with pytest.raises(SppnetError, match="expected at least one image to mine, got none"):
        mine_detectors(images, CLASSES, QUICK)


@pytest.mark.parametrize("seed", range(5))
def test_distinct_negatives_equal_the_naive_choice(seed):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 6, (40, 2))
    windows = np.concatenate([corner, corner + rng.integers(1, 9, (40, 2))], axis=1).astype(np.float32)
    negatives = rng.random((40, 3)) < 0.7
    iou = pairwise_iou(windows, windows)
    expected = np.zeros_like(negatives)
    for label in range(3):
        chosen = []
        for row in np.flatnonzero(negatives[:, label]):
            if all(iou[row, other] <= 0.5 for other in chosen):
                chosen.append(row)
        expected[chosen, label] = True
    np.testing.assert_array_equal(distinct_negatives(windows, negatives, 0.5), expected)
    assert expected.sum() < negatives.sum()


# images as pairs of arrays


def pairs_of(images):
    return [(image.features, image.overlaps) for image in images.items]


@pytest.mark.parametrize("changes", [{}, {"max_positives": 4}, {"positive_overlap": 0.9}, {"cache_gigabytes": 2e-6}])
def test_pairs_give_what_images_read_one_by_one_give(changes):
    settings = QUICK.model_copy(update=changes)
    images = MemoryImages()
    if "positive_overlap" in changes:  # as `MiningWindows` finds them
        near = [(image.overlaps[3:] >= 0.9).nonzero() for image in images.items]
        assert sum(len(rows) for rows, _ in near) > 10
        images.positives = lambda index: PositiveWindows(
            np.concatenate([images.items[index].windows[:3], images.items[index].windows[3:][near[index][0]]]),
            np.concatenate([images.items[index].labels[:3], near[index][1]]),
            3,
        )
    found, expected = (mine_detectors(given, CLASSES, settings, scale=0.8) for given in (pairs_of(images), images))
    assert torch.equal(found.svms.weight, expected.svms.weight)
    assert torch.equal(found.svms.bias, expected.svms.bias)
    assert (found.retrains, found.dropped) == (expected.retrains, expected.dropped)


@pytest.mark.parametrize("factor", [1, 1e-4, 300])
def test_the_scale_of_pairs_is_measured(factor):
    pairs = [(features * factor, overlaps) for features, overlaps in pairs_of(MemoryImages())]
    mined = mine_detectors(pairs, CLASSES)
    norms = np.linalg.norm(np.concatenate([features for features, _ in pairs]), axis=1)
    assert mined.svms.scale == pytest.approx(20 / np.median(norms), rel=1e-5)
    assert mine_detectors(pairs, CLASSES, scale=2.5).svms.scale == 2.5
    features, overlaps = pairs[0]
    scores = mined.svms.score(features).numpy()
    assert scores[overlaps == 1].mean() > scores[overlaps < 0.3].mean()
    assert (scores[overlaps < 0.3] < 0).mean() > 0.9


def test_arrays_tensors_and_lists_are_pairs_alike():
    pairs = [(np.rint(4 * features.numpy()), overlaps) for features, overlaps in pairs_of(MemoryImages(count=3))]
    before = [features.copy() for features, _ in pairs]
    expected = mine_detectors(pairs, CLASSES, QUICK).svms
    kinds = (
        lambda x: x.tolist(),
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: x.astype(np.float16) if x.shape[1] > 3 else x,
        lambda x: x[::-1][::-1],
    )
    for kind in kinds:
        found = mine_detectors([[kind(features), kind(overlaps)] for features, overlaps in pairs], list(CLASSES), QUICK)
        assert torch.equal(found.svms.weight, expected.weight)
    for features, (own, _) in zip(before, pairs, strict=True):
        np.testing.assert_array_equal(features, own)


@settings_of_hypothesis(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_any_pairs_that_fit_give_an_svm_for_every_class(sizes, width, classes, seed):
    rng = np.random.default_rng(seed)
    pairs = [(rng.standard_normal((rows, width)), rng.choice([0, 0.2, 0.5, 1], (rows, classes))) for rows in sizes]
    pairs[0] = np.ones((2, width)), np.eye(2, classes)
    names = [f"class {label}" for label in range(classes)]
    mined = mine_detectors(pairs, names, progress=False)
    assert mined.svms.weight.shape == (classes, width)
    assert torch.isfinite(mined.svms.score(rng.standard_normal((5, width)))).all()
    for label, name in enumerate(names):
        column = np.concatenate([overlaps[:, label] for _, overlaps in pairs])
        assert (name in mined.untrained) == (not ((column == 1).any() and (column < 0.3).any()))


def spoiled(place, value):
    """Two good pairs of two classes, but for one thing."""
    pairs = [[np.ones((4, 3)), np.eye(4, 2)], [np.ones((5, 3)), np.eye(5, 2)]]
    pairs[1][place] = value
    return pairs


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (spoiled(0, np.ones((5, 4))), r"features of all images must have one width, got \[3, 4\]"),
        (spoiled(0, np.ones((6, 3))), r"image 1: overlaps must have shape \(6, 2\), .* got \(5, 2\)"),
        (spoiled(0, np.full((5, 3), np.nan)), "image 1: features must be finite"),
        (spoiled(0, np.full((5, 3), 1e200)), "image 1: features must be finite"),
        (spoiled(0, np.ones((5, 3), complex)), "image 1: features must be an array of real numbers"),
        (spoiled(0, np.ones(5)), r"image 1: features must have shape \(R, D\)"),
        (spoiled(0, None), "image 1: features must be an array"),
        (spoiled(1, np.eye(5, 3)), r"image 1: overlaps must have shape \(5, 2\)"),
        (spoiled(1, np.array([0, 1, -1, -1, -1])), r"pass numpy\.eye\(3\)\[labels\]\[:, :-1\]"),
        (spoiled(1, 100 * np.eye(5, 2)), r"image 1: overlaps must lie in 0 … 1, got 0\.0 to 100\.0"),
        (spoiled(1, -np.eye(5, 2)), "overlaps must lie in 0 … 1"),
        (spoiled(1, np.full((5, 2), np.nan)), "overlaps must lie in 0 … 1"),
        (spoiled(1, np.full((5, 2), "dog")), "image 1: overlaps must be an array of real numbers"),
        ([(np.ones((4, 3)), np.eye(4, 2) / 2)], "so there are no positives"),
        ([(np.zeros((4, 3)), np.eye(4, 2))], "must not be all zero"),
        ((np.ones((4, 3)), np.eye(4, 2)), "image 0 must be a pair"),
        ([np.ones((4, 3))], "image 0 must be a pair"),
        ([(np.ones((4, 3)), np.eye(4, 2), None)], "image 0 must be a pair"),
        ({"a": (np.ones((4, 3)), np.eye(4, 2))}, "images must be a list of pairs .* got dict"),
        (iter(spoiled(0, np.ones((5, 3)))), "images must be a list of pairs .* got list_iterator"),
        (None, "images must be a list of pairs"),
        ([], "at least one image to mine, got none"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(images, message):
    refused_here(lambda: mine_detectors(images, ("cat", "dog")), message)


@pytest.mark.parametrize("classes", ["ab", (), ("cat", "cat"), None, 2, (0, 1), ("cat", "dog\n")])
def test_classes_are_distinct_names(classes):
    good = spoiled(0, np.ones((5, 3)))
    refused_here(lambda: mine_detectors(good, classes), "classes must be a list of distinct names of one line")


def test_mining_refuses_settings_and_scales_that_cannot_be():
    good = spoiled(0, np.ones((5, 3)))
    for settings in (0.1, SVMSettings().model_copy(update={"C": -1.0})):
        refused_here(lambda settings=settings: mine_detectors(good, ("cat", "dog"), settings), "settings must|C: ")
    refused_here(lambda: mine_detectors(good, ("cat", "dog"), scale=0), "scale must be a positive number")
    overlap = SVMSettings(duplicates="overlap")
    refused_here(lambda: mine_detectors(good, ("cat", "dog"), overlap), r"svm\.duplicates=overlap needs the windows")
