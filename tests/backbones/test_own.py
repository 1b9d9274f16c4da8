"""A network of one's own as backbone: found, checked, run, saved."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from own_networks import SmallResidual
from torch import Tensor, nn

from sppnet.backbones.backbone import Backbone, build_backbone, content_digest
from sppnet.backbones.runtime import make_runtime
from sppnet.config import BackboneSettings, WeightsSettings
from sppnet.errors import BackboneError, SppnetError

OBJECT = BackboneSettings(module="object")


def own(path: str = "own_networks:residual", **weights: object) -> Backbone:
    return build_backbone(BackboneSettings(module=path, weights=WeightsSettings(**weights)))


def test_a_function_in_an_importable_module_gives_the_backbone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    backbone = own()
    assert torch.equal(torch.get_rng_state(), before)
    assert (backbone.geometry.stride, backbone.geometry.first_centre, backbone.channels) == (8, 0, 12)
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.rand(2, 3, 70, 45)
    assert backbone(images).shape == (2, 12, *backbone.map_size((70, 45))) == (2, 12, 9, 6)
    assert content_digest(own()) == content_digest(backbone)  # random weights are drawn from the seed
    assert content_digest(build_backbone(BackboneSettings(module="own_networks:residual"), 1)) != content_digest(
        backbone
    )


def test_a_file_in_the_current_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "networks_of_mine.py").write_text(
        "from torch import nn\n\nclass Nets:\n    def stem():\n        return nn.Conv2d(3, 5, 3, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    assert own("networks_of_mine:Nets.stem").channels == 5


def test_an_object_is_copied_and_left_as_it_was() -> None:
    module = SmallResidual().double().train()
    backbone = build_backbone(OBJECT, module=module)
    assert module.training
    assert module.stem.weight.requires_grad
    assert module.stem.weight.dtype == torch.float64
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(backbone(images), module.eval()(images.double()).float(), rtol=1e-4, atol=1e-5)


def test_a_layer_or_a_weight_changes_what_a_network_is_named_by() -> None:
    first, other = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 3, 4, 1)
    other.load_state_dict(first.state_dict())
    assert content_digest(first) != content_digest(other)
    before = content_digest(first)
    first.bias.data[0] += 1
    assert content_digest(first) != before


def test_a_file_of_weights_is_loaded_into_it(tmp_path: Path) -> None:
    saved = SmallResidual()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in saved.state_dict().items()}}, tmp_path / "w.pth")
    backbone = own(source="file", file=tmp_path / "w.pth")
    assert torch.equal(backbone.state_dict()["module.stem.weight"], saved.stem.weight)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package:f", r"cannot import it \(ModuleNotFoundError: .*current folder"),
        ("own_networks:no_such_function", r"cannot import it \(AttributeError"),
        ("own_networks:number", r"expected a torch\.nn\.Module, got int; return the network"),
        ("own_networks:failing", r"calling it without arguments fails \(FileNotFoundError: weights\.pth\)"),
        ("own_networks:SmallResidual.forward", "calling it without arguments fails"),
        ("object", r"given as an object in Python, and has to be again: .*backbone=module"),
    ],
)
def test_a_path_that_gives_no_network_names_the_setting(path: str, message: str) -> None:
    with pytest.raises(BackboneError, match=rf"^backbone\.module={path}: .*{message}"):
        own(path)


def test_a_network_that_is_no_grid_names_the_setting() -> None:
    with pytest.raises(BackboneError, match=r"^backbone\.module=own_networks:classifier: expected a module that maps"):
        _ = own("own_networks:classifier").geometry
    with pytest.raises(BackboneError, match=r"^backbone\.module=object: expected .* got torch\.float32 of shape"):
        _ = build_backbone(OBJECT, module=torchvision.models.squeezenet1_1()).channels


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda x: x

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def test_an_object_that_workers_could_not_receive_is_refused() -> None:
    class Local(nn.Conv2d):
        pass

    for module in (Hidden(), nn.Sequential(Local(3, 4, 3))):
        with pytest.raises(BackboneError, match=r"worker processes cannot receive it .*without lambda"):
            build_backbone(OBJECT, module=module)


@pytest.mark.parametrize("kind", ["torch", "auto"])
def test_an_image_too_small_for_it_is_refused(kind: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 7, 4), nn.Conv2d(8, 8, 5, 2))
    runtime = make_runtime(build_backbone(OBJECT, module=module), kind)
    assert runtime(torch.rand(1, 3, 64, 90)).shape == (1, 8, 6, 9)
    for size in ((20, 90), (90, 5)):
        with pytest.raises(BackboneError, match=rf"{size[0]} × {size[1]} pixels.*; use a larger scale"):
            runtime(torch.rand(1, 3, *size))


class ThroughNumpy(nn.Conv2d):
    """Nothing that can be traced."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(super().forward(images).detach().numpy() * 2)


def test_what_openvino_cannot_convert_runs_in_torch(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino")
    backbone = build_backbone(OBJECT, module=ThroughNumpy(3, 6, 3, 4, 1))
    with caplog.at_level(logging.WARNING, "sppnet"):
        runtime = make_runtime(backbone)
    assert "maps.runtime=auto takes torch" in caplog.text
    assert runtime(torch.rand(1, 3, 64, 32)).shape == (1, 6, 16, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"module": "a:b", "name": "resnet18"}, "name=resnet18 and module=a:b: they name two networks; leave one out"),
        ({"module": "a:b", "layer": "conv5"}, "layer=conv5 and module=a:b: .* no named layers"),
        ({"module": "networks"}, r"expected package\.module:function"),
        ({"module": "networks.py:make"}, None),
        ({"module": "a-b:c"}, r"expected package\.module:function"),
        ({"name": None}, "neither name nor module is given"),
    ],
)
def test_settings_of_two_backbones_or_of_none_are_refused(values: dict[str, object], message: str | None) -> None:
    if message is None:
        assert BackboneSettings(**values).name is None
        return
    with pytest.raises(ValueError, match=message):
        BackboneSettings(**values)


def test_the_settings_of_a_module_can_be_read_back() -> None:
    settings = BackboneSettings(module="a.b:c")
    assert BackboneSettings.model_validate(settings.model_dump(mode="json")) == settings
    with pytest.raises(SppnetError, match="worker processes cannot receive"):
        build_backbone(settings, module=Hidden())
