"""Training of a classifier, at one size or several, of all of it or of its head."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from class_pictures import write_classes

from sppnet.backbones.backbone import build_backbone
from sppnet.classification.classifier import Classifier
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.training import rate_divisions, start_network, train_classifier
from sppnet.config import BackboneSettings, WeightsSettings
from sppnet.config_files import load_settings
from sppnet.errors import SppnetError
from sppnet.ops.pyramid import spatial_pyramid_pool

CPU = torch.device("cpu")
PAPER = {"zf5": 13, "convnet5": 13, "overfeat5": 18, "overfeat7": 18}  # table 1 at 224


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("classes") / "data", 12)


def config_of(folder, **training):
    settings = {"sizes": [32, 48], "min_side": 48, "batch": 8, "learning_rate": 0.02, "epochs": 2, **training}
    return ClassifierConfig(
        data={"train": folder},
        backbone={"name": "tiny5", "weights": {"source": "random"}},
        pyramid={"levels": [1, 2]},
        head={"fc6": 256, "fc7": 256, "dropout": 0.1, "input_norm": 100},
        training=settings,
    )


def train(config, run, epochs=None):
    return train_classifier(config, run, CPU, epochs, progress=False)


def history(run):
    return list(csv.DictReader((run / "history.csv").read_text().splitlines()))


def equal(first, second):
    own, other = (one.network.state_dict() for one in (first, second))
    return all(torch.equal(own[name], other[name]) for name in own)


def test_every_size_trains_the_same_tensors_and_a_run_goes_on_to_what_it_would_have_been(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    config = config_of(folder)
    before = start_network(config, 3).state_dict()
    first = train(config, tmp_path / "parts", 1)
    after_one = first.network.state_dict()
    second = train(config, tmp_path / "parts", 2)
    after_two = second.network.state_dict()
    names = dict(first.network.named_parameters())
    assert names
    for name in names:
        assert not torch.equal(before[name], after_one[name]), name
        assert not torch.equal(after_one[name], after_two[name]), name
    assert "1 of 2 epochs reused" in caplog.text
    assert [row["size"] for row in history(tmp_path / "parts")] == ["32", "48"]
    assert equal(second, train(config, tmp_path / "whole"))
    caplog.clear()
    assert equal(second, train(config, tmp_path / "parts"))
    assert "2 of 2 epochs reused" in caplog.text


def test_it_learns_and_takes_images_of_any_size(folder, tmp_path):
    classifier = train(config_of(folder, epochs=10), tmp_path)
    rows = history(tmp_path)
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    assert float(rows[-1]["top1_error"]) < 0.4  # 0.67 by chance
    assert equal(classifier, Classifier.load(tmp_path, CPU))
    with torch.inference_mode():
        for size in ((180, 180), (224, 224), (392, 392), (500, 353)):
            assert classifier.network(torch.zeros(1, 3, *size)).shape == (1, 3)


def test_the_head_alone_leaves_the_backbone_and_learns_from_features(folder, tmp_path):
    config = config_of(folder, train_backbone=False, epochs=8)
    classifier = train(config, tmp_path)
    own = build_backbone(config.backbone, config.training.seed).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in classifier.network.backbone.state_dict().items())
    assert float(history(tmp_path)[-1]["top1_error"]) < 0.4
    assert len(list(tmp_path.glob("features-*.npz"))) == 1


def test_other_settings_train_anew_and_the_former_ones_are_still_there(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    config = config_of(folder, epochs=1)
    first = train(config, tmp_path)
    other = train(config_of(folder, epochs=1, seed=1), tmp_path)
    assert not equal(first, other)
    caplog.clear()
    assert equal(first, train(config, tmp_path))
    assert "1 of 1 epochs reused" in caplog.text


def test_an_image_that_is_cut_short_is_named_and_nothing_of_it_trains(tmp_path):
    folder = write_classes(tmp_path / "data", 3)
    path = folder / "disc/01.png"
    path.write_bytes(path.read_bytes()[:500])
    for train_backbone in (True, False):
        with pytest.raises(SppnetError, match=r"disc/01\.png: expected a complete image"):
            train(config_of(folder, train_backbone=train_backbone), tmp_path / "run")
    assert not (tmp_path / "run/classifier").exists()


def test_a_loss_that_is_not_finite_names_the_rate(folder, tmp_path):
    with pytest.raises(SppnetError, match=r"not finite in epoch 1; lower training\.learning_rate"):
        train(config_of(folder, learning_rate=1e20), tmp_path)


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_the_rate_falls_where_torchs_plateau_schedule_lowers_it(patience):
    losses = np.random.default_rng(patience).random(60).round(1).tolist()
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.1, patience=patience - 1, threshold=0, eps=0
    )
    for count, loss in enumerate(losses, 1):
        schedule.step(loss)
        divisions = rate_divisions(losses[:count], patience)
        assert optimiser.param_groups[0]["lr"] == pytest.approx(10.0**-divisions, rel=1e-6)
    assert divisions > 3


def test_training_ends_at_the_third_plateau(folder, tmp_path):
    train(config_of(folder, epochs=200, patience=1, learning_rate=1e-9), tmp_path)
    losses = [float(row["val_loss"]) for row in history(tmp_path)]
    assert rate_divisions(losses, 1) == 3
    assert rate_divisions(losses[:-1], 1) == 2


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_networks_have_the_maps_of_table_1(name):
    weights = WeightsSettings(source="random")
    backbone = build_backbone(BackboneSettings(name=name, weights=weights))
    assert backbone.map_size((224, 224)) == (PAPER[name], PAPER[name])
    if name == "zf5":
        assert backbone.map_size((180, 180)) == (10, 10)


@pytest.mark.parametrize("levels", [(1, 2, 3, 6), (1, 2, 3, 4), (1, 2, 4), (6,)])
def test_the_network_has_the_bins_of_its_levels(levels):
    config = ClassifierConfig(
        backbone={"name": "tiny5", "weights": {"source": "random"}},
        pyramid={"levels": levels},
        head={"fc6": 4, "fc7": 4},
    )
    network = start_network(config, 3)
    assert network.head.fc6.in_features == 128 * {(1, 2, 3, 6): 50, (1, 2, 3, 4): 30, (1, 2, 4): 21, (6,): 36}[levels]
    assert network(torch.zeros(2, 3, 64, 80)).shape == (2, 3)


@pytest.mark.parametrize(("side", "window", "stride"), [(13, 3, 2), (18, 3, 3)])
def test_six_by_six_is_the_last_pooling_of_the_networks_without_spp(side, window, stride):
    maps = torch.randn(2, 5, side, side, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spatial_pyramid_pool(maps, (6,)), F.max_pool2d(maps, window, stride).flatten(1))


@pytest.mark.parametrize("name", ["classify_zf5", "classify_tiny"])
def test_the_configurations_that_ship_can_be_read(name):
    config = load_settings(ClassifierConfig, Path(__file__).parents[2] / f"configs/{name}.yaml")
    assert len(config.training.sizes) == 2
    assert config.backbone.weights.source == "random"
