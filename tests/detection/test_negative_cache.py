import numpy as np
import pytest
import torch

from sppnet.detection.negative_cache import NegativeCache
from sppnet.errors import SppnetError

WIDTH, CLASSES = 3, 2
ONE = (4 * WIDTH + 5 * CLASSES) / 1e9  # gigabytes of one slot
NOTHING = torch.zeros(0, WIDTH)


def features(count, image=0):
    """Row r of an image is (image, r, 0)."""
    return torch.tensor([[image, row, 0] for row in range(count)]).reshape(count, WIDTH).float()


def all_of(count, *labels):
    wanted = np.zeros((count, CLASSES), bool)
    wanted[:, list(labels)] = True
    return wanted


def scores(*values):
    return np.array(values, np.float32).reshape(-1, 1).repeat(CLASSES, axis=1)


def held(cache, label=0):
    """(image, row) of the negatives of a class, in the order of the cache."""
    return [(int(image), int(row)) for image, row, _ in cache.features_of(label, NOTHING)]


def test_a_window_that_two_classes_hold_is_kept_once():
    cache = NegativeCache(WIDTH, CLASSES, 2 * ONE * 1.01)
    new = cache.add(features(2, 7), np.array([[True, True], [False, True]]), scores(0, 0), scale=2.0)
    assert new.tolist() == [1, 2]
    assert cache.counts().tolist() == [1, 2]
    assert cache.dropped == 0
    assert torch.equal(cache.features_of(0, NOTHING), features(1, 7) * 2)
    assert torch.equal(cache.features_of(1, NOTHING), features(2, 7) * 2)


def test_what_scores_below_the_limit_leaves_only_its_class():
    cache = NegativeCache(WIDTH, CLASSES, 100 * ONE)
    cache.add(features(3), all_of(3, 0, 1), scores(0, 0, 0))
    assert cache.rescore(0, np.array([-4.0, -1, 2], np.float32), evict_below=-1.0) == 1
    assert cache.counts().tolist() == [2, 3]
    assert held(cache, 0) == [(0, 1), (0, 2)]
    assert cache.rescore(1, np.zeros(3, np.float32), evict_below=-1.0) == 0


@pytest.mark.parametrize("capacity", [3, 9])
def test_a_slot_that_nobody_holds_is_used_again_before_new_ones(capacity):
    cache = NegativeCache(WIDTH, CLASSES, capacity * ONE * 1.01)
    assert cache.capacity == capacity
    cache.add(features(3), all_of(3, 0), scores(0, 0, 0))
    assert cache.rescore(0, np.array([0, -5, 0], np.float32), evict_below=-1) == 1
    cache.add(features(1, 1), all_of(1, 0), scores(0))
    assert held(cache) == [(0, 0), (0, 2), (1, 0)]  # as they came, not as they lie
    assert cache.dropped == 0


def test_the_order_of_a_class_is_the_same_whatever_other_classes_hold():
    """So that a process which holds the negatives of this class alone fits the same SVM."""
    orders = []
    for others in (False, True):
        cache = NegativeCache(WIDTH, CLASSES, 50 * ONE)
        wanted = np.array([[True, others], [True, False], [False, others], [True, others]])
        for image in range(3):
            cache.add(features(4, image), wanted, scores(0, 0, 0, 0))
            low = np.where(np.arange(len(held(cache))) < 2, -5, 0).astype(np.float32)
            cache.rescore(0, low, evict_below=-1)
        orders.append(held(cache))
    assert orders[0] == orders[1] == sorted(orders[0])
    assert len(orders[0]) > 2


def test_the_negatives_of_a_class_come_after_the_rows_given_first():
    cache = NegativeCache(WIDTH, CLASSES, 6 * ONE * 1.01)
    cache.add(features(3), np.array([[True, False], [False, True], [True, True]]), scores(0, 0, 0))
    positives = features(2, image=50)
    assert torch.equal(cache.features_of(1, first=positives), torch.cat([positives, features(3)[1:]]))


def test_a_full_cache_drops_the_lowest_scores_first():
    cache = NegativeCache(WIDTH, CLASSES, 4 * ONE * 1.01)
    cache.add(features(3), all_of(3, 0), scores(0.5, -0.5, 0.1))
    assert cache.add(features(3, 1), all_of(3, 0), scores(0.7, -0.9, 0.3)).tolist() == [2, 0]
    assert set(held(cache)) == {(0, 0), (1, 0), (1, 2), (0, 2)}
    assert cache.dropped == 2
    cache.add(features(9, 2), all_of(9, 0), scores(*np.arange(9)))
    assert set(held(cache)) == {(2, 5), (2, 6), (2, 7), (2, 8)}
    assert cache.dropped == 11


def test_a_full_cache_goes_by_the_scores_of_the_last_fit():
    cache = NegativeCache(WIDTH, CLASSES, 2 * ONE * 1.01)
    cache.add(features(2), all_of(2, 0), scores(5, 4))
    cache.rescore(0, np.array([0, 1], np.float32), evict_below=-1)
    cache.add(features(1, 1), all_of(1, 0), scores(0.5))
    assert set(held(cache)) == {(0, 1), (1, 0)}


def test_a_full_cache_leaves_each_class_its_highest_scores_however_low_they_are():
    cache = NegativeCache(WIDTH, CLASSES, 4 * ONE * 1.01)
    cache.add(features(3), all_of(3, 0), scores(-0.9, -0.8, -1.0))
    cache.add(features(9, 1), all_of(9, 1), scores(*np.arange(9)))
    assert cache.counts().tolist() == [2, 2]
    assert set(held(cache, 0)) == {(0, 1), (0, 0)}
    assert set(held(cache, 1)) == {(1, 8), (1, 7)}


@pytest.mark.parametrize(("large", "small"), [(0, 1), (1, 0)])
def test_a_window_stands_where_its_best_class_puts_it(large, small):
    cache = NegativeCache(WIDTH, CLASSES, 2 * ONE * 1.01)
    wanted, found = all_of(3, large), np.full((3, CLASSES), 9, np.float32)
    wanted[2, small] = True
    found[:, large] = 3, 2, 1
    cache.add(features(3), wanted, found)
    assert held(cache, large) == [(0, 0), (0, 2)]  # the last of one class is the first of the other
    assert held(cache, small) == [(0, 2)]


class NaiveCache:
    """The same by dictionaries: class -> {(image, row): score}."""

    def __init__(self, capacity):
        self.capacity, self.held, self.dropped = capacity, [{} for _ in range(CLASSES)], 0

    def add(self, image, wanted, scores):
        before = [set(own) for own in self.held]
        for label, own in enumerate(self.held):
            for row in np.flatnonzero(wanted[:, label]):
                own.setdefault((image, int(row)), float(scores[row, label]))
        while len(keys := {key for own in self.held for key in own}) > self.capacity:
            worst = max(keys, key=self.places().get)
            self.dropped += 1
            for own in self.held:
                own.pop(worst, None)
        return [len(set(own) - old) for own, old in zip(self.held, before, strict=True)]

    def places(self):
        ranked = [sorted(own, key=own.get, reverse=True) for own in self.held]
        return {key: min(r.index(key) for r in ranked if key in r) for own in ranked for key in own}


@pytest.mark.parametrize("seed", range(10))
def test_a_long_history_of_one_class_equals_the_naive_cache(seed):
    rng = np.random.default_rng(seed)
    cache, naive = NegativeCache(WIDTH, CLASSES, 12 * ONE * 1.01), NaiveCache(12)
    for image in range(30):
        count = 8
        wanted = all_of(count) | (rng.random((count, 1)) < 0.5) & np.array([True, False])
        found = rng.standard_normal((count, CLASSES)).astype(np.float32)
        assert cache.add(features(count, image), wanted, found).tolist() == naive.add(image, wanted, found)
        assert set(held(cache)) == set(naive.held[0])
        assert cache.dropped == naive.dropped
        again = rng.standard_normal(int(cache.counts()[0])).astype(np.float32)
        naive.held[0] = {
            key: float(score) for key, score in zip(held(cache), again, strict=True) if not score < np.float32(-1)
        }
        assert cache.rescore(0, again, evict_below=-1) == (again < -1).sum()
    assert naive.dropped > 0


@pytest.mark.parametrize("seed", range(10))
def test_a_history_of_two_classes_equals_the_naive_cache_while_there_is_room(seed):
    rng = np.random.default_rng(seed)
    cache, naive = NegativeCache(WIDTH, CLASSES, 240 * ONE * 1.01), NaiveCache(240)
    for image in range(30):
        count = 8
        wanted, found = rng.random((count, CLASSES)) < 0.3, rng.standard_normal((count, CLASSES)).astype(np.float32)
        assert cache.add(features(count, image), wanted, found).tolist() == naive.add(image, wanted, found)
        label = int(rng.integers(CLASSES))
        again = rng.standard_normal(int(cache.counts()[label])).astype(np.float32)
        naive.held[label] = {
            key: float(score) for key, score in zip(held(cache, label), again, strict=True) if not score < 0
        }
        cache.rescore(label, again, evict_below=0)
        assert [set(held(cache, k)) for k in range(CLASSES)] == [set(own) for own in naive.held]
    assert cache.dropped == 0


def test_no_windows_are_no_change():
    cache = NegativeCache(WIDTH, CLASSES, 6 * ONE)
    assert cache.add(features(0), all_of(0), np.zeros((0, CLASSES), np.float32)).tolist() == [0, 0]
    assert cache.rescore(0, np.zeros(0, np.float32), evict_below=0) == 0
    assert cache.counts().tolist() == [0, 0]
    assert cache.features_of(1, NOTHING).shape == (0, WIDTH)


def test_errors_say_what_was_expected():
    with pytest.raises(SppnetError, match=r"svm\.cache_gigabytes=.* holds no window of 22 bytes; raise it"):
        NegativeCache(WIDTH, CLASSES, ONE / 2)
