import numpy as np
import pytest
import torch

from sppnet.detection.negative_cache import NegativeCache

WIDTH, CLASSES = 3, 2
ONE = (4 * WIDTH + 5 * CLASSES + 16) / 1e9  # gigabytes of one slot


def features(count, start=0):
    return torch.arange(start, start + count * WIDTH).reshape(count, WIDTH).float()


def all_of(count, *labels):
    wanted = np.zeros((count, CLASSES), bool)
    wanted[:, list(labels)] = True
    return wanted


def scores(*values):
    return np.array(values, np.float32).reshape(-1, 1).repeat(CLASSES, axis=1)


def held(cache):
    keys = cache.keys()
    return set(zip(keys.images.tolist(), keys.rows.tolist(), strict=True))


def test_a_window_that_two_classes_hold_is_kept_once():
    cache = NegativeCache(WIDTH, CLASSES, 100 * ONE)
    new = cache.add(7, features(2), np.array([[True, True], [False, True]]), scores(0, 0), scale=2.0)
    assert new.tolist() == [1, 2]
    assert (len(cache), cache.counts().tolist()) == (2, [1, 2])
    assert torch.equal(cache.features_of(0), features(1) * 2)
    assert torch.equal(cache.features_of(1), features(2) * 2)


def test_no_window_enters_twice_but_another_class_may_join():
    cache = NegativeCache(WIDTH, CLASSES, 100 * ONE)
    assert cache.add(0, features(2), all_of(2, 0), scores(0, 0)).tolist() == [2, 0]
    assert cache.add(0, features(2), all_of(2, 0), scores(0, 0)).tolist() == [0, 0]
    assert cache.add(0, features(2), all_of(2, 0, 1), scores(0, 0)).tolist() == [0, 2]
    assert cache.add(1, features(2), all_of(2, 0), scores(0, 0)).tolist() == [2, 0]
    assert (len(cache), cache.counts().tolist()) == (4, [4, 2])


def test_what_scores_below_the_limit_leaves_only_its_class():
    cache = NegativeCache(WIDTH, CLASSES, 100 * ONE)
    cache.add(0, features(3), all_of(3, 0, 1), scores(0, 0, 0))
    cache.rescore(0, np.array([-4.0, -1, 2], np.float32))
    assert cache.evict(0, below=-1.0) == 1
    assert cache.counts().tolist() == [2, 3]
    assert cache.evict(1, below=-1.0) == 0
    assert torch.equal(cache.features_of(0), features(3)[1:])


def test_a_slot_that_nobody_holds_is_used_again():
    cache = NegativeCache(WIDTH, CLASSES, 3 * ONE * 1.01)
    assert cache.capacity == 3
    cache.add(0, features(3), all_of(3, 0), scores(0, -5, 0))
    assert cache.evict(0, below=-1) == 1
    cache.add(1, features(1, start=50), all_of(1, 0), scores(0))
    assert held(cache) == {(0, 0), (1, 0), (0, 2)}
    assert torch.equal(cache.features_of(0), torch.stack([features(3)[0], features(1, 50)[0], features(3)[2]]))
    assert cache.displaced == 0


def test_the_negatives_of_a_class_come_after_the_rows_given_first():
    cache = NegativeCache(WIDTH, CLASSES, 6 * ONE * 1.01)
    cache.add(
        0, features(3), np.array([[True, False], [False, True], [True, True]]), np.zeros((3, CLASSES), np.float32)
    )
    positives = features(2, start=50)
    assert torch.equal(cache.features_of(1, first=positives), torch.cat([positives, features(3)[1:]]))
    assert torch.equal(cache.features_of(1, first=positives[:0]), features(3)[1:])


def test_a_full_cache_gives_up_the_lowest_scores_first():
    cache = NegativeCache(WIDTH, CLASSES, 4 * ONE * 1.01)
    cache.add(0, features(3), all_of(3, 0), scores(0.5, -0.5, 0.1))
    cache.add(1, features(3), all_of(3, 0), scores(0.7, -0.9, 0.3))
    assert held(cache) == {(0, 0), (1, 0), (1, 2), (0, 2)}
    assert cache.displaced == 2
    cache.add(2, features(9), all_of(9, 0), scores(*np.arange(9)))
    assert held(cache) == {(2, 5), (2, 6), (2, 7), (2, 8)}
    assert cache.displaced == 11


def test_a_full_cache_leaves_each_class_its_highest_scores_however_low_they_are():
    cache = NegativeCache(WIDTH, CLASSES, 4 * ONE * 1.01)
    cache.add(0, features(3), all_of(3, 0), scores(-0.9, -0.8, -1.0))
    cache.add(1, features(9), all_of(9, 1), scores(*np.arange(9)))
    assert cache.counts().tolist() == [2, 2]
    assert held(cache) == {(0, 1), (0, 0), (1, 8), (1, 7)}


def test_a_window_stands_where_its_best_class_puts_it():
    cache = NegativeCache(WIDTH, CLASSES, 2 * ONE * 1.01)
    wanted = np.array([[True, False], [True, False], [True, True]])
    cache.add(0, features(3), wanted, np.array([[3.0, 9.0], [2.0, 9.0], [1.0, 0.5]], np.float32))
    assert held(cache) == {(0, 0), (0, 2)}  # the last of the first class is the first of the second


def test_a_restored_cache_equals_the_saved_one():
    cache = NegativeCache(WIDTH, CLASSES, 6 * ONE * 1.01)
    cache.add(0, features(3), all_of(3, 0), scores(0, -5, 0))
    cache.evict(0, below=-1)
    cache.add(4, features(2, start=50), all_of(2, 0, 1), scores(1, 2))
    again = NegativeCache(WIDTH, CLASSES, 6 * ONE * 1.01)
    again.restore(cache.keys())
    again.restore_features(0, features(3))
    again.restore_features(4, features(2, start=50))
    for label in range(CLASSES):
        assert torch.equal(again.features_of(label), cache.features_of(label))
    for one in (cache, again):
        one.add(5, features(4, start=90), all_of(4, 1), scores(3, 0, 3, 3))
    np.testing.assert_array_equal(again.keys().slots, cache.keys().slots)
    assert held(cache) == held(again)
    assert torch.equal(again.features_of(1), cache.features_of(1))


def test_no_windows_are_no_change():
    cache = NegativeCache(WIDTH, CLASSES, 6 * ONE)
    assert cache.add(0, features(0), all_of(0), np.zeros((0, CLASSES), np.float32)).tolist() == [0, 0]
    cache.rescore(0, np.zeros(0, np.float32))
    assert cache.evict(0, 0) == len(cache) == 0
    assert cache.features_of(1).shape == (0, WIDTH)
    again = NegativeCache(WIDTH, CLASSES, 6 * ONE)
    again.restore(cache.keys())
    assert len(again) == 0


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="does not hold one window of 38 bytes; raise"):
        NegativeCache(WIDTH, CLASSES, ONE / 2)
    cache = NegativeCache(WIDTH, CLASSES, 6 * ONE)
    cache.add(0, features(3), all_of(3, 0), scores(0, 0, 0))
    with pytest.raises(ValueError, match=r"the checkpoint needs 3 slots but the cache has 2"):
        NegativeCache(WIDTH, CLASSES, 2 * ONE * 1.01).restore(cache.keys())
