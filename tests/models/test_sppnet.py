"""The head above the pyramid and the whole network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doubles import random_backbone

from sppnet.artifacts import write_tensors
from sppnet.config import HeadSettings
from sppnet.errors import SppnetError
from sppnet.models import sppnet
from sppnet.models.sppnet import SPPNet, build_head, load_head_checkpoint, load_pretrained_fc, pooled_size
from sppnet.ops.pyramid import spatial_pyramid_pool

SMALL = HeadSettings(fc6=7, fc7=5)
CHANNELS, LEVELS, GRID = 3, (1, 2, 3), 2  # the fake pretrained network was trained on a 2 × 2 grid


def small_head(levels=LEVELS, outputs=4, seed=0, settings=SMALL):
    return build_head(CHANNELS, levels, outputs, settings, seed)


def pooled_vectors(count, levels=LEVELS):
    return torch.randn(count, pooled_size(CHANNELS, levels), generator=torch.Generator().manual_seed(1))


def pretrained_state(grid=GRID, channels=CHANNELS):
    """What torchvision's classifier holds, smaller."""
    generator = torch.Generator().manual_seed(2)
    return {
        "classifier.1.weight": torch.randn(7, channels * grid * grid, generator=generator),
        "classifier.1.bias": torch.randn(7, generator=generator),
        "classifier.4.weight": torch.randn(5, 7, generator=generator),
        "classifier.4.bias": torch.randn(5, generator=generator),
    }


@pytest.fixture
def fake_alexnet(monkeypatch):
    monkeypatch.setattr(sppnet, "PRETRAINED_FC", {"alexnet": ("classifier.1", "classifier.4", GRID)})


def test_the_pooled_size_counts_channels_times_bins():
    assert pooled_size(256, (1, 2, 3, 6)) == 12_800  # sec. 4.1
    assert pooled_size(2, (4,)) == 32


@pytest.mark.parametrize("count", [0, 1, 6])
def test_features_and_logits_of_any_number_of_windows(count):
    head, pooled = small_head(), pooled_vectors(count)
    assert head.features(pooled, "pool") is pooled
    assert head.features(pooled, "fc6").shape == (count, 7)
    assert head.features(pooled, "fc7").shape == (count, 5)
    assert head(pooled).shape == (count, 4)


def test_features_are_rectified_products_one_layer_after_the_other():
    head, pooled = small_head(), pooled_vectors(3)
    head.input_scale.fill_(2.5)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
    fc6, fc7, classifier = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in (head.fc6, head.fc7, head.classifier)
    )
    hidden6 = np.maximum(2.5 * pooled.double().numpy() @ fc6[0].T + fc6[1], 0)
    hidden7 = np.maximum(hidden6 @ fc7[0].T + fc7[1], 0)
    with torch.no_grad():
        np.testing.assert_allclose(head.features(pooled, "fc6"), hidden6, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(head.features(pooled, "fc7"), hidden7, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(head(pooled), hidden7 @ classifier[0].T + classifier[1], rtol=1e-4, atol=1e-3)


def test_dropout_acts_only_while_training():
    head, pooled = small_head(settings=HeadSettings(fc6=64, fc7=64)), pooled_vectors(2)
    assert torch.equal(head(pooled), head(pooled))
    head.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(head(pooled), head(pooled))


def test_a_new_head_is_the_same_for_the_same_seed_and_touches_no_global_generator():
    before = torch.random.get_rng_state()
    first, again, other = small_head(seed=1), small_head(seed=1), small_head(seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.fc6.weight, again.fc6.weight)
    assert not torch.equal(first.fc6.weight, other.fc6.weight)
    assert not first.training


def test_a_new_head_is_drawn_with_deviation_0_01_and_zero_biases():
    head = build_head(32, (6,), 21, HeadSettings(fc6=256, fc7=256))
    for layer in (head.fc6, head.fc7, head.classifier):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert abs(layer.weight.mean().item()) < 0.001
        assert not layer.bias.any()


def test_the_network_is_backbone_then_pyramid_then_head_for_images_of_any_size():
    backbone = random_backbone("tiny5")
    network = SPPNet(backbone, LEVELS, build_head(backbone.channels, LEVELS, 4, SMALL)).eval()
    with torch.no_grad():
        for size in ((64, 64), (96, 80)):
            images = torch.randn(2, 3, *size)
            expected = network.head(spatial_pyramid_pool(backbone(images), LEVELS))
            assert network(images).shape == (2, 4)
            assert torch.equal(network(images), expected)


@pytest.mark.usefixtures("fake_alexnet")
@pytest.mark.parametrize("levels", [(2,), (1, 2, 3), (3, 2), (6, 1, 2)])
def test_a_head_from_imagenet_computes_at_first_what_the_pretrained_one_does(levels):
    state, feature_map = pretrained_state(), torch.randn(1, CHANNELS, 9, 7)
    head = small_head(levels)
    load_pretrained_fc(head, state, "alexnet", CHANNELS, levels)
    grid = F.adaptive_max_pool2d(feature_map, GRID).flatten(1)
    hidden = F.relu(F.linear(grid, state["classifier.1.weight"], state["classifier.1.bias"]))
    expected = F.relu(F.linear(hidden, state["classifier.4.weight"], state["classifier.4.bias"]))
    with torch.no_grad():
        found = head.features(spatial_pyramid_pool(feature_map, levels), "fc7")
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("fake_alexnet")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "zf5"}, r"head\.init=imagenet needs one of alexnet, got backbone zf5; use head\.init=random"),
        ({"levels": (1, 3)}, r"of alexnet needs a 2×2 level, .*, got levels \(1, 3\),"),
        ({"state": {}}, r"the weights of alexnet hold no classifier\.1\.weight; use a file with the classifier"),
        ({"drop": "classifier.4.bias"}, r"the weights of alexnet hold no classifier\.4\.bias"),
        (
            {"settings": HeadSettings(fc6=7, fc7=9)},
            r"head\.fc6=7, head\.fc7=5 and .*\(7, 9\) and 3 channels; set them, or",
        ),
        (
            {"state": pretrained_state(channels=2)},
            r"and 2 channels, those of the default backbone\.layer, .* and 3 channels",
        ),
    ],
)
def test_a_head_that_does_not_fit_the_pretrained_one_is_refused(change, message):
    values = {"backbone": "alexnet", "levels": LEVELS, "state": pretrained_state(), "settings": SMALL, **change}
    values["state"].pop(change.get("drop"), None)
    head = small_head(values["levels"], settings=values["settings"])
    with pytest.raises(SppnetError, match=message):
        load_pretrained_fc(head, values["state"], values["backbone"], CHANNELS, values["levels"])


def test_the_real_pretrained_networks_are_known_by_their_own_names_and_grids():
    assert sppnet.PRETRAINED_FC["alexnet"][2] == 6
    assert sppnet.PRETRAINED_FC["vgg16"][2] == 7


def checkpoint_of(head):
    return {f"head.{name}": tensor for name, tensor in head.state_dict().items()}


def test_a_checkpoint_gives_fc6_and_fc7_and_leaves_the_classifier(tmp_path):
    source, head = small_head(seed=1, outputs=10), small_head(seed=2)
    source.input_scale.fill_(3.0)
    old_classifier = head.classifier.weight.clone()
    write_tensors(tmp_path / "head.safetensors", {**checkpoint_of(source), "backbone.conv1.weight": torch.zeros(1)})
    load_head_checkpoint(head, HeadSettings(checkpoint=tmp_path / "head.safetensors"))
    for name in ("fc6.weight", "fc6.bias", "fc7.weight", "fc7.bias", "input_scale"):
        assert torch.equal(head.state_dict()[name], source.state_dict()[name])
    assert torch.equal(head.classifier.weight, old_classifier)


@pytest.mark.parametrize("name", ["head.pth", "head.npz"])
def test_a_checkpoint_may_be_of_any_kind_and_carry_a_prefix(tmp_path, name):
    source, head = small_head(seed=1), small_head(seed=2)
    state = {f"module.{key}": tensor for key, tensor in checkpoint_of(source).items()}
    if name.endswith("pth"):
        torch.save({"model": state}, tmp_path / name)
    else:
        np.savez(tmp_path / name, allow_pickle=False, **{key: tensor.numpy() for key, tensor in state.items()})
    load_head_checkpoint(head, HeadSettings(checkpoint=tmp_path / name))
    assert torch.equal(head.fc6.weight, source.fc6.weight)


def test_a_checkpoint_that_is_not_named_or_not_there_is_reported(tmp_path):
    with pytest.raises(
        SppnetError, match=r"head\.init is 'checkpoint' but no file is named; set head\.checkpoint=PATH"
    ):
        load_head_checkpoint(small_head(), HeadSettings())
    with pytest.raises(
        SppnetError, match=r"none: expected a weight file, but there is no such file; check head\.checkpoint"
    ):
        load_head_checkpoint(small_head(), HeadSettings(checkpoint=tmp_path / "none"))


def test_a_checkpoint_of_another_format_is_reported(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04 something else entirely")
    with pytest.raises(SppnetError, match=r"x\.pth: expected a complete \.pth file of plain tensors"):
        load_head_checkpoint(small_head(), HeadSettings(checkpoint=tmp_path / "x.pth"))


def test_a_checkpoint_of_another_head_is_refused_and_changes_nothing(tmp_path):
    head = small_head()
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    other = checkpoint_of(small_head(settings=HeadSettings(fc6=7, fc7=6)))
    for state, message in (
        (other, r"x\.safetensors: 2 of the 5 tensors .*fc7\.weight has shape \(6, 7\) instead of \(5, 7\)"),
        ({"a": torch.zeros(1)}, r"x\.safetensors: 5 of the 5 tensors .*: input_scale is missing;"),
    ):
        write_tensors(tmp_path / "x.safetensors", state)
        with pytest.raises(SppnetError, match=message):
            load_head_checkpoint(head, HeadSettings(checkpoint=tmp_path / "x.safetensors"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
