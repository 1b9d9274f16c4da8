"""Training of a classifier, at one size or several, of all of it or of its head."""

import contextlib
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from class_pictures import write_classes
from doubles import picture
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sppnet.artifacts import write_tensors
from sppnet.backbones.backbone import build_backbone
from sppnet.classification.classifier import Classifier, build_network
from sppnet.classification.dataset import training_view
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.testing import evaluate_classifiers
from sppnet.classification.training import rate_divisions, train_classifier
from sppnet.config import BackboneSettings, WeightsSettings
from sppnet.config_files import load_settings
from sppnet.data.class_folder import read_class_folder
from sppnet.errors import SppnetError
from sppnet.evaluation.classification import top_k_error
from sppnet.images import normalise, read_image
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


@contextlib.contextmanager
def before_steps(call):
    """Calls call(optimiser) before every step of any optimiser."""
    handle = register_optimizer_step_pre_hook(lambda optimiser, *_: call(optimiser))
    try:
        yield
    finally:
        handle.remove()


def interrupt(_):
    raise KeyboardInterrupt


def changed(config, **sections):
    return ClassifierConfig.model_validate({**config.model_dump(), **sections})


def equal(first, second):
    own, other = (one.network.state_dict() for one in (first, second))
    return all(torch.equal(own[name], other[name]) for name in own)


def test_every_size_trains_the_same_tensors_and_a_run_goes_on_to_what_it_would_have_been(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    config = config_of(folder)
    before = build_network(config, 3, start=True).state_dict()
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


def test_what_is_no_image_is_named_before_anything_is_written(tmp_path):
    folder = write_classes(tmp_path / "data", 3)
    (folder / "disc/01.png").write_bytes(b"no picture")
    with pytest.raises(SppnetError, match=r"disc/01\.png: expected an image"):
        train(config_of(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_input_is_scaled_by_what_batch_norm_gives_in_training(folder, tmp_path):
    """Of random weights the kept statistics are not those of any image; the first step sees those of its batch."""
    config = config_of(folder, epochs=1, batch=24, sizes=[48])
    trained = train(config, tmp_path)
    backbone = build_network(config, 3, start=True).backbone.train()
    views = [training_view(read_image(path), 48, config.training, None) for path in sorted(folder.glob("*/*.png"))]
    with torch.no_grad():
        pooled = spatial_pyramid_pool(
            backbone(normalise(torch.stack(views), backbone.mean, backbone.weights.std)), (1, 2)
        )
    norm = float(pooled.norm(dim=1).mean() * trained.network.head.input_scale)
    assert norm == pytest.approx(100, rel=0.1)


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


@pytest.fixture
def exchanged(tmp_path):
    """Validation images of other classes than their folders': what trains well makes their loss grow."""
    val = write_classes(tmp_path / "val", 3, seed=7)
    for old, new in (("across", "x"), ("disc", "across"), ("down", "disc"), ("x", "down")):
        (val / old).rename(val / new)
    return val


def test_training_ends_at_the_third_plateau(folder, exchanged, tmp_path):
    config = config_of(folder, train_backbone=False, epochs=60, patience=1)
    train(changed(config, data={"train": folder, "val": exchanged}), tmp_path / "run")
    losses = [float(row["val_loss"]) for row in history(tmp_path / "run")]
    assert rate_divisions(losses, 1) == 3
    assert rate_divisions(losses[:-1], 1) == 2


def test_the_rate_is_a_tenth_for_every_plateau_of_the_validation_loss(folder, exchanged, tmp_path):
    config = config_of(folder, train_backbone=False, epochs=9, patience=2, learning_rate=0.01)
    rates = []
    with before_steps(lambda optimiser: rates.append(optimiser.param_groups[0]["lr"])):
        train(changed(config, data={"train": folder, "val": exchanged}), tmp_path / "run")
    rows = history(tmp_path / "run")
    assert rates[::4] == rates[1::4] == rates[2::4] == rates[3::4]  # 36 images are four whole batches
    by_loss, by_val_loss = (
        [rate_divisions([float(row[name]) for row in rows[:epoch]], 2) for epoch in range(len(rows))]
        for name in ("loss", "val_loss")
    )
    assert rates[::4] == [0.01 / 10**divisions for divisions in by_val_loss]
    assert [float(row["learning_rate"]) for row in rows] == rates[::4]
    assert max(by_val_loss) == 2
    assert max(by_loss) < 2


def test_the_last_errors_are_those_of_the_saved_classifier(tmp_path):
    sides = {"train": 4, "val": 3}
    for place, (side, count) in enumerate(sides.items()):
        for label in range(8):
            (tmp_path / side / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = picture(52, 60, 100 * place + 10 * label + number)
                Image.fromarray(pixels).save(tmp_path / side / f"{label}/{number}.png")
    config = changed(
        config_of(tmp_path / "train", epochs=3),
        precision="float32",
        data={name: tmp_path / name for name in sides},
    )
    classifier = train(config, tmp_path / "run")
    held_out = read_class_folder(tmp_path / "val", classifier.classes)
    tested = evaluate_classifiers([classifier], held_out, "centre", progress=False)
    errors = [top_k_error(tested.probabilities, tested.labels, k) for k in (1, 3, 5)]
    last = history(tmp_path / "run")[-1]
    assert float(last["top1_error"]) == pytest.approx(errors[0])
    assert float(last["top5_error"]) == pytest.approx(errors[2])
    assert errors[1] > errors[2] > 0
    own = tested.probabilities[np.arange(len(tested.labels)), tested.labels]
    assert float(last["val_loss"]) == pytest.approx(-np.log(own).mean(), rel=1e-4)


def test_a_head_from_a_checkpoint_goes_on_computing_what_it_did(folder, tmp_path):
    """At a rate that changes nothing, and with pooled features scaled to another norm."""
    config = config_of(folder, train_backbone=False, epochs=1)
    before = train(config, tmp_path / "first").network
    head = {**config.head.model_dump(), "input_norm": 300}
    checkpoint = {"init": "checkpoint", "checkpoint": tmp_path / "first/classifier/weights.safetensors"}
    settings = {**config.training.model_dump(), "learning_rate": 1e-12}
    after = train(changed(config, head={**head, **checkpoint}, training=settings), tmp_path / "second").network
    torch.testing.assert_close(after.head.input_scale, 3 * before.head.input_scale)
    with torch.inference_mode():
        maps = before.backbone(100 * torch.rand(4, 3, 64, 80, generator=torch.Generator().manual_seed(0)))
        pooled = spatial_pyramid_pool(maps, before.levels)
        for layer in ("fc6", "fc7"):
            own, expected = (network.head.features(pooled, layer) for network in (after, before))
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_classifier_does_not_outlive_the_start_of_another_training(folder, tmp_path):
    config = config_of(folder, train_backbone=False, epochs=1)
    first = train(config, tmp_path)
    with before_steps(interrupt), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, 2)  # the same training goes on
    assert equal(first, Classifier.load(tmp_path, CPU))
    with before_steps(interrupt), pytest.raises(KeyboardInterrupt):
        train(config_of(folder, train_backbone=False, epochs=1, seed=1), tmp_path)
    with pytest.raises(SppnetError, match="expected the run of a classifier"):
        Classifier.load(tmp_path, CPU)


def test_other_contents_of_weights_and_images_are_another_training_with_features_of_its_own(tmp_path):
    folder, weights, run = write_classes(tmp_path / "data", 4), tmp_path / "weights.safetensors", tmp_path / "run"
    val = write_classes(tmp_path / "val", 1, seed=1)
    config = changed(
        config_of(folder, train_backbone=False, epochs=1),
        data={"train": folder, "val": val},
        backbone={"name": "tiny5", "weights": {"source": "file", "file": weights}},
    )

    def trained():
        train(config, run)
        return len([*run.glob("training-*")]), len([*run.glob("features-*.npz")])

    random = config_of(folder).backbone
    write_tensors(weights, build_backbone(random, 0).state_dict())
    assert trained() == trained() == (1, 1)
    write_tensors(weights, build_backbone(random, 1).state_dict())
    assert trained() == (2, 2)
    Image.fromarray(picture(60, 60)).save(folder / "disc/01.png")
    assert trained() == (3, 3)
    Image.fromarray(picture(60, 60, 1)).save(val / "disc/00.png")
    assert trained() == (4, 4)


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
    network = build_network(config, 3, start=True)
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
