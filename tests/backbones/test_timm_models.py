"""Models of timm as backbones: maps against torchvision's and timm's own, weights, preprocessing, refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sppnet.backbones.backbone import Backbone, build_backbone
from sppnet.config import BackboneSettings, Config
from sppnet.config_files import dump_config, load_config
from sppnet.errors import BackboneError, SppnetError

timm = pytest.importorskip("timm", reason="the extra [timm] is not installed")


def model(name: str, layer: str | None = None, seed: int = 0, **weights: Any) -> Backbone:
    weights = {"source": "random", **weights}
    return build_backbone(BackboneSettings(name=f"timm/{name}", layer=layer, weights=weights), seed)


@pytest.mark.parametrize("layer", [None, "layer3+layer4", "layer2"])
def test_timms_resnet_is_torchvisions_with_the_same_weights(tmp_path: Path, layer: str | None) -> None:
    public = build_backbone(BackboneSettings(name="resnet18", layer=layer, weights={"source": "random"}), 5)
    torch.save(public.state_dict(), tmp_path / "a.pth")
    backbone = model("resnet18", layer, source="file", file=tmp_path / "a.pth")
    assert backbone.layer == public.layer
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.rand(2, 3, 97, 120)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), public(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layer", "stride", "centre", "channels"),
    [
        ("resnet18", "layer2", 8, 0, 128),
        ("convnext_atto", "stages.1", 8, 3.5, 80),  # nothing is padded where it steps: the middle of 8 pixels
        ("tf_efficientnet_lite0", "blocks.1", 4, 0, 24),  # TensorFlow's padding made the same on both sides
        ("lcnet_035", "blocks.2", 8, 0, 48),
    ],
)
def test_geometry_is_as_worked_out_by_hand(name: str, layer: str, stride: int, centre: float, channels: int) -> None:
    backbone = model(name, layer)
    assert (backbone.geometry.stride, backbone.geometry.first_centre, backbone.channels) == (stride, centre, channels)
    with torch.inference_mode():
        assert backbone(torch.rand(1, 3, 61, 90)).shape == (1, channels, *backbone.map_size((61, 90)))


def test_a_file_with_timms_names_fits_layers_that_timm_renames(tmp_path: Path) -> None:
    whole = timm.create_model("convnext_atto", num_classes=3).eval()
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "a.pth")
    backbone, images = (
        model("convnext_atto", "stages.1", source="file", file=tmp_path / "a.pth"),
        torch.rand(1, 3, 64, 48),
    )
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), whole.stages[1](whole.stages[0](whole.stem(images))))
    torch.save({"stem.0.weight": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(SppnetError, match=r"b\.pth: \d+ of the \d+ tensors .* not fit: stem_0\.weight has shape"):
        model("convnext_atto", "stages.1", source="file", file=tmp_path / "b.pth")


def test_the_last_layer_within_the_limit_is_taken_where_timm_cannot_dilate() -> None:
    assert model("ghostnet_050").layer == "blocks.5"
    assert model("lcnet_035").layer == "blocks.5"  # dilated


def test_pixels_become_input_as_timm_says_unless_it_is_given(tmp_path: Path) -> None:
    assert model("tf_efficientnet_lite0", "blocks.0").mean == (127.5,) * 3
    backbone = model("resnet18", "layer1")
    assert backbone.mean == backbone.weights.mean == pytest.approx((123.675, 116.28, 103.53))
    assert backbone.std == pytest.approx((58.395, 57.12, 57.375))
    given = model("tf_efficientnet_lite0", "blocks.0", mean=(123.675, 116.28, 103.53))  # the defaults, but given
    assert (given.mean, given.std) == ((123.675, 116.28, 103.53), (127.5,) * 3)
    config = Config(backbone={"name": "timm/tf_efficientnet_lite0", "layer": "blocks.0"})
    (tmp_path / "a.yaml").write_text(dump_config(config))
    read = load_config(tmp_path / "a.yaml", ["backbone.weights.source=random"])
    assert config.backbone.weights.source == "timm"
    assert build_backbone(read.backbone).std == (127.5,) * 3


def test_timm_loads_its_own_weights_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    create, wanted = timm.create_model, []

    def without_download(pretrained: bool = False, **options: Any) -> Any:
        wanted.append(pretrained)
        return create(**options)

    monkeypatch.setattr(timm, "create_model", without_download)
    build_backbone(BackboneSettings(name="timm/resnet18", layer="layer1"))
    assert wanted[-1]

    def without_network(pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("no network\nat all")
        return create(**options)

    monkeypatch.setattr(timm, "create_model", without_network)
    with pytest.raises(SppnetError, match=r"timm/resnet18: timm cannot give it \(no network\); .*weights\.source=file"):
        build_backbone(BackboneSettings(name="timm/resnet18", layer="layer1"))


def test_random_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (model("resnet18", "layer1", seed).module.net.conv1.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("timm/resnet_18", None, r"unknown backbone\.name=timm/resnet_18; did you mean timm/resnet18"),
        ("timm/qqqq", None, r"unknown backbone\.name=timm/qqqq; known: zf5, .*, timm/NAME"),
        ("timm/resnet18.no_such", None, r"timm cannot give it \(Invalid pretrained tag \(no_such\).*; take another"),
        ("timm/vit_tiny_patch16_224", None, r"timm/vit_tiny_patch16_224: .* it fails: Input height .* doesn't match"),
        ("timm/resnet18", "layer9", r"timm/resnet18: .*layer=layer9: expected one of act1 \(stride 2\), layer1 "),
        ("timm/resnet18", "layer1+layer2", r"layer=layer1\+layer2: expected one of .*, or several of one stride"),
        ("resnet34", None, r"unknown backbone\.name=resnet34; did you mean timm/resnet34 or .*\? known: .*, timm/NAME"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused(name: str, layer: str | None, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        _ = build_backbone(BackboneSettings(name=name, layer=layer, weights={"source": "random"})).geometry


@pytest.mark.parametrize("weights", [{"source": "timm"}, {"mean": None}, {"std": None}])
def test_what_is_timms_is_for_its_models_alone(weights: dict[str, Any]) -> None:
    with pytest.raises(SppnetError, match=r"weights\.\w+=\w+ is of name=timm/NAME alone; leave it out"):
        BackboneSettings(name="resnet18", weights=weights)


def test_other_sources_do_not_have_timms_weights() -> None:
    with pytest.raises(SppnetError, match=r"torchvision has no weights for 'timm/resnet18'; set .*source=timm, or"):
        model("resnet18", source="torchvision")
    with pytest.raises(SppnetError, match=r"source=package: .* none for 'timm/resnet18'; set .*, timm, file"):
        model("resnet18", source="package")


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SppnetError, match=r"timm/resnet18: timm cannot give it \(.*\); pip install 'sppnet\[timm\]'"):
        model("resnet18")
    with pytest.raises(BackboneError, match=r"name=resnet34; did you mean resnet50 or resnet18\? known"):
        build_backbone(BackboneSettings(name="resnet34"))
