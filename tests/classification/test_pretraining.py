"""Pre-training: crops of objects and background, views of them, and a backbone that learns from them."""

import numpy as np
import pytest
import torch
from doubles import annotated, picture, picture_record, random_backbone

from sppnet import distributed
from sppnet.artifacts import read_tensors
from sppnet.backbones.backbone import build_backbone
from sppnet.classification import pretraining
from sppnet.classification.pretraining import cut_crops, pretrain_network, random_views
from sppnet.config import BackboneSettings, PretrainSettings, WeightsSettings
from sppnet.config_files import parse_config
from sppnet.records import pairwise_iou

CLASSES = ("stripes", "bars")
BOXES = {"stripes": (10, 12, 42, 44), "bars": (60, 30, 92, 62)}
SETTINGS = {"enabled": True, "steps": 30, "batch": 16, "sizes": [32, 48]}


def config_of(**changes):
    values = {"pretrain": {**SETTINGS, **changes}, "pyramid": {"levels": [1, 2]}, "head": {"fc6": 128, "fc7": 128}}
    return parse_config(values, "test")


def striped(seed):
    """Noise with one square of horizontal and one of vertical stripes."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(100, 156, (80, 100, 3), dtype=np.uint8)
    lines = np.where(np.arange(32) // 4 % 2, 230, 20).astype(np.uint8)
    pixels[12:44, 10:42] = lines[:, None, None]
    pixels[30:62, 60:92] = lines[None, :, None]
    return pixels


@pytest.fixture
def records(tmp_path):
    return [picture_record(tmp_path, f"{i}", striped(i), annotated(*BOXES.items())) for i in range(5)]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_object_is_cut_in_the_middle_of_a_square_with_room_around_it(records):
    crops, labels = cut_crops(records[:1], CLASSES, 40, seed=0)
    assert crops.dtype == torch.uint8
    assert crops.shape[1:] == (3, 56, 56)  # 40 × 1.4
    assert labels[:2].tolist() == [0, 1]
    # 32 px and room for 0.4 of them: 45 px on a side, resized to 56
    assert (crops[0, 0, 10:46, 28].float().std(), crops[0, 0, 28, 10:46].float().std())[0] > 60
    assert crops[0, 0, 28, 12:44].float().std() < 10 < 60 < crops[1, 0, 28, 12:44].float().std()


def test_a_crop_beyond_the_border_repeats_the_edge(tmp_path):
    pixels = picture(28, 28)
    record = picture_record(tmp_path, "corner", pixels, annotated(("bars", (-10, -10, 10, 10))))
    crop = cut_crops([record], CLASSES, 20, seed=0)[0][0]  # 20 × 1.4 px around (0, 0)
    padded = np.pad(pixels, ((14, 0), (14, 0), (0, 0)), mode="edge")[:28, :28]
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), padded)


def test_there_is_background_and_it_avoids_every_object(records):
    _, labels = cut_crops(records, CLASSES, 40, seed=0)
    counts = np.bincount(labels)
    assert counts[:2].tolist() == [5, 5]
    assert 3 <= counts[2] <= 10


def test_background_overlaps_no_object_by_much_and_is_as_large_as_objects(tmp_path):
    pixels = np.zeros((80, 100, 3), np.uint8)  # a pixel's colour is its place
    pixels[..., 0], pixels[..., 1] = 2.5 * np.arange(100), 2.5 * np.arange(80)[:, None]
    record = picture_record(tmp_path, "places", pixels, annotated(*BOXES.items()))
    crops = torch.cat([cut_crops([record], CLASSES, 40, seed)[0][2:] for seed in range(50)]).float() / 2.5
    assert len(crops) > 50
    sides = (crops[:, 0, 28, 37] - crops[:, 0, 28, 18]) / 19 * 56 / 1.4
    assert sides.min() > 14  # 0.5 to 1.2 of 32 px
    assert sides.max() < 40
    centres = crops[:, :2, 27:29, 27:29].mean(dim=(2, 3)) + 0.5
    found = torch.cat([centres - sides[:, None] / 2, centres + sides[:, None] / 2], dim=1).numpy()
    assert pairwise_iou(found, np.array(list(BOXES.values()), float)).max() < 0.34  # 0.3, and what is read off


def test_an_image_full_of_one_object_has_no_background(tmp_path):
    record = picture_record(tmp_path, "full", picture(50, 50), annotated(("bars", (0, 0, 50, 50))))
    _, labels = cut_crops([record], CLASSES, 32, seed=0)
    assert labels[0] == 1
    assert pairwise_iou(np.array([[0.0, 0.0, 50.0, 50.0]]), np.array([[0.0, 0.0, 50.0, 50.0]])) == 1
    assert set(labels[1:].tolist()) <= {2}


def test_images_without_objects_of_the_classes_give_no_crops(tmp_path, records):
    others = [
        picture_record(tmp_path, "none", picture(40, 40), annotated()),
        picture_record(tmp_path, "unknown", picture(40, 40), None),
        picture_record(tmp_path, "dog", picture(40, 40), annotated(("dog", (0, 0, 9, 9)))),
    ]
    assert len(cut_crops([*records[:1], *others], CLASSES, 32, 0)[0]) == len(cut_crops(records[:1], CLASSES, 32, 0)[0])
    with pytest.raises(
        ValueError, match=r"pre-training needs annotated objects, .* none of the classes; check data\.classes"
    ):
        cut_crops(others, CLASSES, 32, 0)


def test_the_smallest_object_is_cut_all_the_same(tmp_path):
    record = picture_record(tmp_path, "thin", picture(40, 40), annotated(("bars", (5, 5, 5.01, 5.01))))
    assert cut_crops([record], CLASSES, 32, 0)[0].shape[1:] == (3, 45, 45)


def test_crops_are_the_same_for_the_same_seed(records):
    first, again, other = (cut_crops(records, CLASSES, 32, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


class Whole:
    """A generator that takes the whole crop, does not flip and leaves the channels as they are."""

    def integers(self, low, high, size):
        return np.full(size, high - 1)

    def random(self, size):
        return np.full(size, 0.99)

    def uniform(self, low, high, size):
        return np.ones(size)


def test_a_view_of_the_whole_crop_is_the_resized_crop():
    crops = torch.from_numpy(np.stack([picture(48, 48, seed) for seed in range(3)])).permute(0, 3, 1, 2)
    views = random_views(crops[[2, 0]], 24, 32, Whole())
    halves = crops[[2, 0]].float().unflatten(2, (24, 2)).unflatten(4, (24, 2)).mean(dim=(3, 5))
    assert views.shape == (2, 3, 24, 24)
    assert (views - halves)[:, :, 2:-2, 2:-2].abs().mean() < 3  # antialiased: nearly the mean of each 2 × 2


def test_only_the_resolution_of_a_view_depends_on_the_size():
    crops = torch.from_numpy(np.stack([picture(67, 67, seed) for seed in range(4)])).permute(0, 3, 1, 2)
    small, large = (random_views(crops, s, 48, np.random.default_rng(3)) for s in (24, 48))
    halves = large.unflatten(2, (24, 2)).unflatten(4, (24, 2)).mean(dim=(3, 5))
    assert (small - halves).abs().mean() < 3


def test_views_are_flipped_shifted_and_zoomed_in_bounds():
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64).contiguous() * 3  # grows to the right
    views = random_views(ramp.expand(200, -1, -1, -1), 16, 40, np.random.default_rng(0))
    rising = views[:, 0, 8, -1] > views[:, 0, 8, 0]
    assert 60 < rising.sum() < 140  # about half are mirrored
    spans = (views[:, 0, 8, -1] - views[:, 0, 8, 0]).abs() / 3
    assert spans.min() > 36 * 0.8 - 5  # at least 0.9 of 40 px, the darkest by 0.8
    assert views.min() >= 0
    assert views.max() <= 255


@pytest.mark.usefixtures("one_thread")
def test_twenty_crops_are_learned_and_the_network_is_frozen_afterwards(records):
    backbone = random_backbone()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    network, summary = pretrain_network(backbone, records, CLASSES, config_of(steps=150), progress=False)
    assert summary.startswith("150 steps on ")
    assert float(summary.split("accuracy ")[1]) > 0.8  # 0.33 by chance
    assert network.backbone is backbone
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    changed = [name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {name.split(".")[0] for name in changed} == {"conv1", "conv2", "conv3", "conv4", "conv5"}
    crops, labels = cut_crops(records, CLASSES, 48, seed=5)
    with torch.no_grad():
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.weights.mean, backbone.weights.std))
        found = network((crops[:, :, 8:-8, 8:-8] - mean) / std).argmax(1).numpy()
    assert (found == labels).mean() > 0.8


@pytest.mark.usefixtures("one_thread")
def test_every_class_is_drawn_as_often_as_any_other_and_pixels_come_as_the_backbone_expects_them(tmp_path, monkeypatch):
    """Crops of one colour for each class, one of them rare; the network's input tells which was drawn."""
    pixels = np.zeros((80, 300, 3), np.uint8)
    pixels[:, :100], pixels[:, 100:] = (200, 0, 0), (0, 0, 200)
    objects = [("stripes", (20, 20, 50, 50)), *(("bars", (150 + x, 20, 180 + x, 50)) for x in range(9))]
    record = picture_record(tmp_path, "colours", pixels, annotated(*objects))
    crops, labels = cut_crops([record], CLASSES, 32, seed=0)
    own = torch.from_numpy(labels < 2)
    monkeypatch.setattr(pretraining, "cut_crops", lambda *_, **__: (crops[own], labels[own.numpy()]))
    weights = {"source": "random", "channel_order": "bgr", "mean": (1, 2, 3), "std": (2, 4, 5)}
    backbone = build_backbone(BackboneSettings(name="tiny5", weights=WeightsSettings(**weights)))
    seen = []
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    pretrain_network(backbone, [record], CLASSES, config_of(steps=30, sizes=[32]), progress=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.weights.mean, backbone.weights.std))
    blue, _, red = (torch.cat(seen) * std + mean).mean(dim=(2, 3)).T
    assert ((blue > 150) ^ (red > 150)).all()
    assert (red > 150).float().mean() == pytest.approx(0.5, abs=0.12)


@pytest.mark.usefixtures("one_thread")
def test_pretraining_is_the_same_twice_and_leaves_the_global_generator_alone(records):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, _ = pretrain_network(random_backbone(), records, CLASSES, config_of(steps=4), progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    again, _ = pretrain_network(random_backbone(), records, CLASSES, config_of(steps=4), progress=False)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.usefixtures("one_thread")
def test_pretraining_on_the_cpu_opens_no_context_on_a_gpu(records, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"asked {device} for its state"))
    pretrain_network(random_backbone(), records, CLASSES, config_of(steps=1), progress=False)


class Interruption(BaseException):
    """Stands for Ctrl-C: nothing in the program may catch it."""


@pytest.mark.usefixtures("one_thread")
def test_interrupted_pretraining_goes_on_from_its_checkpoint_to_the_same_weights(records, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "SAVE_EVERY", 3)
    config, checkpoint = config_of(steps=10, dropout=0.5), tmp_path / "pretrain-1/checkpoint.safetensors"
    whole, summary = pretrain_network(random_backbone(), records, CLASSES, config, progress=False)
    original, steps = pretraining._Trainer.train_step, []

    def interrupted(self, step, *batch):
        steps.append(step)
        if len(steps) == 9:
            raise Interruption
        original(self, step, *batch)

    monkeypatch.setattr(pretraining._Trainer, "train_step", interrupted)
    with pytest.raises(Interruption):
        pretrain_network(random_backbone(), records, CLASSES, config, False, checkpoint)
    resumed, again = pretrain_network(random_backbone(), records, CLASSES, config, False, checkpoint)
    assert steps == [*range(9), *range(6, 10)]
    assert again == summary.replace("10 steps", "10 steps, 6 of them from before,")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.usefixtures("one_thread")
def test_a_loss_that_is_not_finite_is_never_saved(records, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "SAVE_EVERY", 1)
    config = config_of(steps=50, learning_rate=1e20)
    with pytest.raises(ValueError, match=r"the loss of pre-training is not finite; lower"):
        pretrain_network(random_backbone(), records, CLASSES, config, False, tmp_path / "checkpoint.safetensors")
    again = tmp_path / "checkpoint.safetensors"
    assert not again.exists() or torch.isfinite(read_tensors(again)["sums"][0])


@pytest.mark.parametrize(("processes", "share"), [(1, 16), (2, 8), (3, 5), (20, 1)])
def test_processes_share_a_batch(records, monkeypatch, processes, share):
    counts = []
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "data_parallel", lambda module: module)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(pretraining, "random_views", lambda crops, *rest: counts.append(len(crops)) or crops.float())
    pretrain_network(random_backbone(), records, CLASSES, config_of(steps=2), progress=False)
    assert counts == [share] * 2


@pytest.mark.usefixtures("one_thread")
def test_sizes_alternate_epoch_by_epoch(records, monkeypatch):
    seen = []

    def watched(crops, size, largest, rng):
        seen.append((size, largest))
        return random_views(crops, size, largest, rng)

    monkeypatch.setattr(pretraining, "random_views", watched)
    crops = len(cut_crops(records, CLASSES, 48, 0)[0])
    pretrain_network(random_backbone(), records, CLASSES, config_of(steps=12, batch=crops // 3), progress=False)
    assert seen == ([(32, 48)] * 3 + [(48, 48)] * 3) * 2


@pytest.mark.usefixtures("one_thread")
def test_the_dropout_of_pretraining_is_its_own(records):
    network, _ = pretrain_network(random_backbone(), records, CLASSES, config_of(steps=1, dropout=0.0), progress=False)
    assert network.head.dropout == 0
    assert PretrainSettings().dropout < config_of().head.dropout


@pytest.mark.usefixtures("one_thread")
def test_a_loss_that_is_not_finite_is_an_error_with_the_setting_to_change(records):
    with pytest.raises(
        ValueError, match=r"the loss of pre-training is not finite; lower pretrain\.learning_rate=1e\+20"
    ):
        pretrain_network(random_backbone(), records, CLASSES, config_of(steps=5, learning_rate=1e20), progress=False)
