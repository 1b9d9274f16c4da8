"""Which images train, which are held out, and what an epoch shows of them."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from class_pictures import KINDS, write_classes
from doubles import picture
from PIL import Image

from sppnet.artifacts import read_json
from sppnet.backbones.backbone import build_backbone
from sppnet.classification.dataset import Batch, TrainingViews, epoch_batches, load_class_data, training_view
from sppnet.classification.settings import ClassDataSettings, ClassTrainingSettings
from sppnet.config import BackboneSettings
from sppnet.errors import ArtifactError, SppnetError

SETTINGS = ClassTrainingSettings(sizes=(32, 48), min_side=64, colour=False, batch=4)


@pytest.fixture
def folder(tmp_path):
    return write_classes(tmp_path / "data", 10)


def load(folder, run, **settings):
    data = load_class_data(ClassDataSettings(train=folder, **settings), run)
    data.write(run)
    return data


def test_a_share_of_every_class_is_held_out_once_and_stays_so(folder, tmp_path):
    data = load(folder, tmp_path)
    assert np.bincount(data.train.labels).tolist() == [8, 8, 8]
    assert np.bincount(data.validation.labels).tolist() == [2, 2, 2]
    held = set(data.validation.images)
    assert held.isdisjoint(data.train.images)
    assert set(read_json(tmp_path / "split.json")["held_out"]) == {f"{p.parent.name}/{p.name}" for p in held}

    # a renamed one is known by its content, and so is a copy; a new one trains
    first = data.validation.images[0]
    first.rename(first.with_name("renamed.png"))
    shutil.copy(first.with_name("renamed.png"), first.with_name("copy.png"))
    write_classes(tmp_path / "more", 1, seed=5)
    shutil.copy(tmp_path / "more/disc/00.png", folder / "disc/new.png")
    again = load(folder, tmp_path)
    added = {first.with_name("renamed.png"), first.with_name("copy.png")}
    assert set(again.validation.images) == held - {first} | added
    assert folder / "disc/new.png" in again.train.images

    # another share draws anew
    assert np.bincount(load(folder, tmp_path, holdout=0.5).validation.labels).tolist()[1:] == [6, 5]


def test_a_class_with_one_image_is_trained(folder, tmp_path):
    for path in sorted((folder / "disc").iterdir())[1:]:
        path.unlink()
    data = load(folder, tmp_path)
    assert np.bincount(data.train.labels).tolist() == [8, 1, 8]
    assert np.bincount(data.validation.labels).tolist() == [2, 0, 2]


def test_folders_that_cannot_train_are_refused(folder, tmp_path):
    with pytest.raises(SppnetError, match=r"training images are in it too, 30 of 30 images, e.g. across/00.png"):
        load(folder, tmp_path, val=folder)
    (tmp_path / "split.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"split\.json: expected the names of a split"):
        load(folder, tmp_path)
    (tmp_path / "split.json").unlink()
    for kind in KINDS:
        for path in sorted((folder / kind).iterdir())[1:]:
            path.unlink()
    with pytest.raises(SppnetError, match="expected two different images of a class or more, but no class has two"):
        load(folder, tmp_path)
    shutil.rmtree(folder / "disc")
    shutil.rmtree(folder / "down")
    with pytest.raises(SppnetError, match=r"1 image of 1 class; expected folders of two classes or more"):
        load(folder, tmp_path)


def test_crops_are_the_five_of_the_paper_flipped_or_not():
    """Found by sliding a window of 48 pixels over the scaled image (64, 96)."""
    image = picture(64, 96)
    pixels = torch.tensor(image).permute(2, 0, 1).float()
    seen = set()
    for seed in range(60):
        view = training_view(image, 48, SETTINGS, np.random.default_rng(seed))
        found = {
            (top, left, flipped)
            for top in range(17)
            for left in range(49)
            for flipped, own in ((False, view), (True, view.flip(2)))
            if torch.equal(pixels[:, top : top + 48, left : left + 48], own)
        }
        assert len(found) == 1
        seen |= found
    corners = [(0, 0), (0, 48), (16, 0), (16, 48), (8, 24)]
    assert seen == {(*corner, flipped) for corner in corners for flipped in (False, True)}
    centre = training_view(image, 48, SETTINGS, None)
    assert torch.equal(centre, pixels[:, 8:56, 24:72])


@pytest.mark.parametrize("shape", [(50, 90), (300, 70)])
def test_the_smaller_view_is_the_larger_crop_resized(shape):
    settings = SETTINGS.model_copy(update={"colour": True})
    for seed in range(5):
        large, small = (
            training_view(picture(*shape), size, settings, np.random.default_rng(seed)) for size in (48, 32)
        )
        expected = F.interpolate(large[None], (32, 32), mode="bilinear", antialias=False)[0]
        torch.testing.assert_close(small, expected, rtol=0, atol=1e-3)


def test_colours_change_by_one_shift_along_imagenets_components():
    image = picture(64, 64)
    settings = SETTINGS.model_copy(update={"colour": True})
    plain, altered = (training_view(image, 48, own, np.random.default_rng(3)) for own in (SETTINGS, settings))
    shift = (altered - plain).mean((1, 2))
    torch.testing.assert_close(altered - plain, shift.view(3, 1, 1).expand(3, 48, 48), rtol=0, atol=1e-3)
    assert 0.1 < shift.abs().max() < 120
    shifts = [
        training_view(image, 48, settings, np.random.default_rng(seed)).mean((1, 2))
        - training_view(image, 48, SETTINGS, np.random.default_rng(seed)).mean((1, 2))
        for seed in range(200)
    ]
    # the first component, nearly grey, has a deviation of 0.1 · 0.2175 of 255
    assert 0.7 * 5.5 < torch.stack(shifts).sum(1).std() / 3**0.5 < 1.3 * 5.5


def test_colours_change_as_those_of_imagenet_do():
    """Krizhevsky et al.: an independent normal number for each component, of a tenth of its deviation; in RGB."""
    deviations = 255 * 0.1 * np.array([0.2175, 0.0188, 0.0045])
    components = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    plain = ClassTrainingSettings(sizes=(16,), min_side=16, colour=False)
    image, altered = picture(16, 16), plain.model_copy(update={"colour": True})
    shifts = []
    for seed in range(800):
        views = [training_view(image, 16, own, np.random.default_rng(seed)).double() for own in (altered, plain)]
        shifts.append((views[0] - views[1]).mean((1, 2)).numpy())
    drawn = np.array(shifts) @ np.linalg.inv(components).T / deviations
    np.testing.assert_allclose(np.cov(drawn.T), np.eye(3), atol=0.15)
    assert np.abs(drawn.mean(axis=0)).max() < 0.15


def views_of(tmp_path, image, settings=SETTINGS, **weights):
    """The dataset of an image, for a backbone with these weights."""
    Image.fromarray(image).save(tmp_path / "image.png")
    backbone = build_backbone(BackboneSettings(name="tiny5", weights={"source": "random", **weights}))
    return TrainingViews([tmp_path / "image.png"], [2], settings, backbone)


@pytest.mark.parametrize("epoch", [None, 0])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_views_are_prepared_as_the_weights_say(tmp_path, order, epoch):
    weights = {"mean": (90, 120, 140), "std": (50, 60, 80), "channel_order": order}
    found, labels = views_of(tmp_path, np.full((64, 64, 3), (200, 100, 50), np.uint8), **weights)[
        Batch(np.array([0, 0]), 48, epoch)
    ]
    assert labels.tolist() == [2, 2]
    colours = (200, 100, 50) if order == "rgb" else (50, 100, 200)
    expected = [(value - mean) / std for value, mean, std in zip(colours, (90, 120, 140), (50, 60, 80), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected).view(1, 3, 1, 1).expand(2, 3, 48, 48))


def test_the_mean_image_is_subtracted_from_views(tmp_path):
    image = picture(64, 64)
    mean = np.random.default_rng(0).uniform(0, 255, (3, 48, 48)).astype(np.float32)
    np.save(tmp_path / "mean.npy", mean)
    weights = {"mean_image": tmp_path / "mean.npy", "std": (50, 60, 80), "channel_order": "bgr"}
    found, _ = views_of(tmp_path, image, **weights)[Batch(np.array([0]), 48)]
    pixels = image[8:56, 8:56, ::-1].transpose(2, 0, 1).astype(np.float32)
    expected = (pixels - mean) / np.array([50, 60, 80], np.float32)[:, None, None]
    torch.testing.assert_close(found[0], torch.from_numpy(expected))


def test_an_image_looks_different_in_every_epoch_and_the_same_whenever_that_is_shown(tmp_path):
    settings = SETTINGS.model_copy(update={"colour": True})
    views = views_of(tmp_path, picture(64, 96), settings)
    first, second = ([views[Batch(np.array([0]), 32, epoch)][0] for epoch in range(5)] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    other = views_of(tmp_path, picture(64, 96), settings.model_copy(update={"seed": 1}))
    every = [*first, other[Batch(np.array([0]), 32, 0)][0]]
    assert not any(torch.equal(every[i], every[j]) for i in range(6) for j in range(i))


def test_an_epoch_shows_every_image_once_in_whole_batches_of_one_size():
    for epoch, size in ((0, 32), (1, 48), (2, 32)):
        batches = epoch_batches(12, epoch, SETTINGS)
        assert sorted(np.concatenate([one.places for one in batches])) == list(range(12))
        assert {one.size for one in batches} == {size}
    assert [len(one.places) for one in epoch_batches(11, 0, SETTINGS)] == [4, 4]
    assert [len(one.places) for one in epoch_batches(3, 0, SETTINGS)] == [3]
    assert epoch_batches(12, 0, SETTINGS)[0].places.tolist() != epoch_batches(12, 2, SETTINGS)[0].places.tolist()
    other = SETTINGS.model_copy(update={"seed": 1})
    assert epoch_batches(12, 0, SETTINGS)[0].places.tolist() != epoch_batches(12, 0, other)[0].places.tolist()
    drawn = SETTINGS.model_copy(update={"size_choice": "range"})
    sizes = [one.size for epoch in range(40) for one in epoch_batches(40, epoch, drawn)]
    assert set(sizes) == set(range(32, 49))


def test_crops_larger_than_the_image_are_refused():
    with pytest.raises(SppnetError, match=r"crops of 96 pixels do not fit in min_side=64; set training\.min_side"):
        ClassTrainingSettings(sizes=(96,), min_side=64)
