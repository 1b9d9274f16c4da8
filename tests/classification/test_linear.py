"""Linear SVMs on features of whole images, by two protocols."""

import numpy as np
import pytest
from devkit import thing, xml_of
from doubles import picture
from PIL import Image
from scipy.optimize import minimize

from sppnet.classification.features import folder_features
from sppnet.classification.linear import caltech101, compact, decision_values, draw_split, voc07
from sppnet.cli import main
from sppnet.errors import SppnetError

RNG = np.random.default_rng


def clouds(counts, dimensions=6, apart=3.0, seed=0):
    """Features around a point for each class, and the class of each."""
    rng, labels = RNG(seed), np.repeat(np.arange(len(counts)), counts)
    return (apart * np.eye(len(counts), dimensions)[labels] + rng.normal(size=(len(labels), dimensions))), labels


def test_an_svm_has_the_least_squared_hinge_loss():
    features, labels = clouds([12, 9], 3, apart=1.0)
    targets, whole = np.where(labels == 0, 1, -1), np.c_[features, np.ones(len(labels))]

    def loss(weights):
        return 0.5 * weights @ weights + 2.0 * (np.maximum(0, 1 - targets * (whole @ weights)) ** 2).sum()

    expected = whole @ minimize(loss, np.zeros(4), tol=1e-10).x
    found = decision_values(features, targets[:, None], features, ("a",), cost=2.0)[:, 0]
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_compact_features_give_the_same_values():
    features, labels = clouds([9, 8], 40)
    small = compact(features)
    assert small.shape[1] <= 17
    np.testing.assert_allclose(small @ small.T, features @ features.T, atol=1e-9)
    targets = np.where(labels == 0, 1, -1)[:, None]
    first, second = (decision_values(own[::2], targets[::2], own[1::2], ("a",)) for own in (features, small))
    np.testing.assert_allclose(first, second, atol=5e-3)
    assert compact(features[:, :5]).shape == (17, 5)


def test_difficult_images_neither_train_nor_count():
    features, labels = clouds([20, 20], 2, apart=6.0)
    shown = np.where(labels[:, None] == np.arange(2), 1, -1)
    order = RNG(1).permutation(40)
    features, shown = features[order], shown[order]
    features[[0, 30]] = [[90, 0], [-90, 0]]  # would turn the SVM of the first class, and be its worst miss
    shown[[0, 30], 0] = 0
    result = voc07(features, shown, 20, ("a", "b"))
    assert result.classes["a"] == 1
    targets = shown[:20, :1]
    scores = decision_values(features[:20], targets, features, ("a",))
    np.testing.assert_allclose(scores, decision_values(features[1:20], targets[1:], features, ("a",)))
    targets[0] = -1
    assert np.abs(scores - decision_values(features[:20], targets, features, ("a",))).max() > 0.1
    shown[[0, 30], 0] = 0, 1
    assert voc07(features, shown, 20, ("a", "b")).classes["a"] < 1


def test_a_class_without_test_images_is_not_in_the_mean():
    features, labels = clouds([10, 10, 10])
    shown = np.where(labels[:, None] == np.arange(3), 1, -1)
    train, test = draw_split(labels, 5, 5, 0)
    test = test[labels[test] != 2]
    result = voc07(features[np.r_[train, test]], shown[np.r_[train, test]], 15, ("a", "b", "c"))
    assert result.classes["c"] is None
    assert result.mean == pytest.approx(np.mean([result.classes["a"], result.classes["b"]]))
    assert "c      -" in result.table()


@pytest.mark.parametrize("kind", [-1, 1, 0])
def test_a_class_with_one_kind_of_training_images_is_an_error_with_its_name(kind):
    shown = np.full((8, 1), kind)
    with pytest.raises(SppnetError, match="class a: expected training images with it and without"):
        voc07(RNG(0).normal(size=(8, 3)), shown, 4, ("a",))


def test_splits_are_disjoint_seeded_and_of_the_sizes_that_were_asked_for():
    labels = RNG(0).permutation(np.repeat([0, 1, 2], [40, 90, 31]))
    train, test = draw_split(labels, 30, 50, seed=3)
    assert not set(train) & set(test)
    assert len(set(train)) == len(train)
    assert np.bincount(labels[train]).tolist() == [30, 30, 30]
    assert np.bincount(labels[test]).tolist() == [10, 50, 1]
    again, other = draw_split(labels, 30, 50, 3), draw_split(labels, 30, 50, 4)
    np.testing.assert_array_equal(np.r_[train, test], np.r_[again])
    assert set(other[0]) != set(train)


def test_accuracy_is_the_mean_over_classes_then_over_splits():
    features, labels = clouds([12, 60, 25], apart=1.5)
    result, means = caltech101(features, labels, ("a", "b", "c"), train_images=8, splits=4), []
    for seed in range(4):
        train, test = draw_split(labels, 8, 50, seed)
        values = []
        for label in range(3):
            targets = np.where(labels[train] == label, 1, -1)[:, None]
            values.append(decision_values(features[train], targets, features[test], ("one",))[:, 0])
        right = np.argmax(values, axis=0) == labels[test]
        means.append(np.mean([right[labels[test] == label].mean() for label in range(3)]))
    assert result.mean == pytest.approx(np.mean(means))
    assert result.deviation == pytest.approx(np.std(means, ddof=1))
    assert 0.4 < result.mean < 1
    assert np.mean([*result.classes.values()]) == pytest.approx(result.mean)


def test_a_class_with_too_few_images_is_an_error_with_its_name():
    features, labels = clouds([31, 30])
    with pytest.raises(SppnetError, match=r"class b: expected more than 30 images, got 30; .*--train-images"):
        caltech101(features, labels, ("a", "b"))


def test_the_command_on_vocs_folders(classifier, run, tmp_path, capsys):
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "kit/VOC2007" / name).mkdir(parents=True)
    for number in range(16):
        shows = ("cat", "dog")[number % 2]
        pixels = picture(64, 70, number) if shows == "cat" else np.full((64, 70, 3), 9 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"kit/VOC2007/JPEGImages/{number}.png")
        objects = thing(shows, 1, 1, 9, 9), thing("cow", 1, 1, 9, 9, difficult=1)
        (tmp_path / f"kit/VOC2007/Annotations/{number}.xml").write_text(xml_of(*objects[: 1 + (number % 4 > 1)]))
    for name, numbers in (("train", (0, 1, 4, 5, 8, 9, 12, 13)), ("val", (2, 3, 6, 7, 10, 11, 14, 15))):
        (tmp_path / f"kit/VOC2007/ImageSets/Main/{name}.txt").write_text("".join(f"{n}\n" for n in numbers))
    command = ["classify", "linear", str(run), str(tmp_path / "kit"), "--side", "64"]
    assert main([*command, "--train", "VOC2007/train", "--test", "VOC2007/val"]) == 0
    said = capsys.readouterr().out
    order = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    paths = [tmp_path / f"kit/VOC2007/JPEGImages/{number}.png" for number in order]
    found = folder_features(classifier, paths, side=64, progress=False).features
    shown = np.array([[1, -1], [-1, 1]] * 8)
    assert said.startswith(voc07(found, shown, 8, ("cat", "dog")).table())
    assert said.endswith("VOC07, 11-point AP, 16 images; pool at a shorter side of 64\n")
    assert main(command) == 2
    assert "parts here: VOC2007/train, VOC2007/val" in capsys.readouterr().err
    assert main([*command, "--train", "VOC2007/train", "--test", "VOC2007/train"]) == 2
    assert "name splits that share no image" in capsys.readouterr().err
    out = tmp_path / "f.npz"
    features = ["classify", "features", str(run), str(tmp_path / "kit"), "--side", "64", "--out", str(out)]
    assert main([*features, "--split", "VOC2007/train", "VOC2007/val"]) == 0
    with np.load(out) as written:
        assert written["classes"].tolist() == ["cat", "cow", "dog"]
        assert written["labels"][[0, 9]].tolist() == [[1, -1, -1], [-1, 0, 1]]
