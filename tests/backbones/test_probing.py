"""Geometry found by running a network, against the layers' formula and against geometries worked out by hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import torchvision
from doubles import random_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchvision.models.squeezenet import Fire

from sppnet import Geometry
from sppnet.backbones.architectures import LocalResponseNorm
from sppnet.backbones.backbone import BACKBONES
from sppnet.backbones.probing import map_side, probe
from sppnet.errors import BackboneError, SppnetError


class Calls(nn.Module):
    """Calls a function on what a module gives."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, images: Tensor) -> object:
        return self.function(self.module(images))


class Residual(nn.Module):
    """Two convolutions and a shortcut beside them; its layers are named out of order."""

    def __init__(self, channels: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.short = nn.Conv2d(channels, channels, 1, stride)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1)
        self.first = nn.Conv2d(channels, channels, 3, stride, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.norm(self.second(F.relu(self.first(x)))))


def stem(stride: int = 4) -> nn.Module:
    return nn.Conv2d(3, 8, 3, stride, 1)


def attention(x: Tensor) -> Tensor:
    cells = x.flatten(2).transpose(1, 2)
    return (torch.softmax(cells @ cells.transpose(1, 2), -1) @ cells).transpose(1, 2).reshape(x.shape)


SLOW = {
    "vgg16",
    "resnet50",
    "resnet18",
    "convnet5",
    "overfeat7",
    "zf5",
    *(f"efficientnet_lite{size}" for size in range(3)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW or "lite" in n else []) for n in BACKBONES]
)
def test_every_backbone_is_found_to_be_what_its_layers_say(name: str) -> None:
    backbone = random_backbone(name)
    grid = probe(backbone)
    assert Geometry(grid.stride, grid.first_centre) == backbone.geometry
    assert grid.channels == backbone.channels
    sides = [map_side(backbone, axis, side, grid.width) for axis in (2, 3) for side in (97, 130)]
    assert sides == [backbone.map_size((side, 400))[0] for _ in (2, 3) for side in (97, 130)]


@pytest.mark.parametrize(
    ("module", "stride", "centre"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Residual(), Residual()), 8, 0),
        (nn.Sequential(stem(), nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.Hardswish()), 8, 0),
        (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2)), 2, 1),
        (nn.Sequential(nn.ZeroPad2d((4, 0, 4, 0)), nn.Conv2d(3, 8, 5, 3)), 3, -2),
        (nn.Conv2d(3, 6, 7, 2, 3, padding_mode="reflect", groups=3), 2, 0),
        (nn.Sequential(nn.Conv2d(3, 4, 3, dilation=5), nn.MaxPool2d(2)), 2, 5.5),
        (nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 3, 1, 1), nn.GELU()), 4, 1.5),
        (nn.Sequential(stem(), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.SiLU()), 4, 0),
        (nn.Sequential(stem(), nn.BatchNorm2d(8, track_running_stats=False)), 4, 0),
        (nn.Sequential(stem(), torchvision.ops.SqueezeExcitation(8, 2)), 4, 0),
        (Calls(stem(), lambda x: x + x.mean((2, 3), keepdim=True)), 4, 0),
        (Calls(stem(), lambda x: x[:, :, 2:-2, 2:-2]), 4, 8),
        (nn.Sequential(stem(8), nn.Conv2d(8, 8, 3, 8, 1)), 64, 0),
        (nn.Identity(), 1, 0),
        (stem().double(), 4, 0),
        (stem().bfloat16(), 4, 0),
        (torchvision.models.shufflenet_v2_x0_5().conv1, 2, 0),
    ],
)
def test_networks_of_any_layers_have_the_geometry_worked_out_by_hand(
    module: nn.Module, stride: int, centre: float
) -> None:
    found = Geometry.of(module)
    assert (found.stride, found.first_centre) == (stride, centre)
    assert found.shrink == 6.5 * stride / 16
    assert Geometry.of(module, shrink=0).shrink == 0


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans()),
        min_size=1,
        max_size=3,
    )
)
@settings(deadline=None, max_examples=25)
def test_chains_of_layers_follow_the_formula(layers: list[tuple[int, int, int, int, bool]]) -> None:
    chain, stride, centre = [], 1, 0.0
    for kernel, step, padding, dilation, pools in layers:
        padding = min(padding, kernel // 2) if pools else padding
        own = (
            nn.MaxPool2d(kernel, step, padding, dilation) if pools else nn.Conv2d(3, 3, kernel, step, padding, dilation)
        )
        chain.append(own)
        centre += ((kernel - 1) * dilation / 2 - padding) * stride
        stride *= step
    found = Geometry.of(nn.Sequential(*chain))
    assert (found.stride, found.first_centre) == (stride, centre)


class PaddedBySize(nn.Conv2d):
    """Padded as TensorFlow does: so that there are as many cells as steps, the odd zero behind."""

    def forward(self, x: Tensor) -> Tensor:
        spare = [1 if side % 2 == 0 else 2 for side in x.shape[2:]]  # of a kernel of 3 and a stride of 2
        return super().forward(F.pad(x, (spare[1] // 2, 1, spare[0] // 2, 1)))


class Uncopied(nn.Identity):
    def __deepcopy__(self, _: object) -> nn.Module:
        raise TypeError("of one kind")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torchvision.models.squeezenet1_1(), r"got torch\.float32 of shape \(1, 1000\) .* before it is pooled"),
        (nn.Sequential(stem(), nn.Flatten()), r"got torch\.float32 of shape \(1, 32768\)"),
        (nn.Sequential(stem(), nn.AdaptiveAvgPool2d(1)), "got a map of 1 × 1 cells for 256 × 256 pixels"),
        (
            nn.Sequential(stem(), nn.AdaptiveAvgPool2d(7)),
            "got 7 cells for 64 pixels and 7 for 4096, whatever the image",
        ),
        (Calls(stem(), attention), "each of which sees most of the image; take the map of an earlier layer"),
        (Calls(stem(), torch.zeros_like), "none of which changes with a pixel"),
        (nn.Conv2d(3, 8, 3, (2, 4), 1), r"same in both axes, got stride 2 .* downwards, 4 and 0 to the right"),
        (nn.Conv2d(3, 8, 3, 2, (1, 0)), "got stride 2 and first centre 0 downwards, 2 and 1 to the right"),
        (nn.Sequential(stem(), nn.Upsample(scale_factor=2)), "take a map that was not enlarged"),
        (nn.Sequential(stem(), nn.Upsample(scale_factor=2, mode="bilinear")), "take a map that was not enlarged"),
        (nn.Sequential(stem(), nn.ConvTranspose2d(8, 8, 4, 2, 1)), "take a map that was not enlarged"),
        (Calls(stem(), lambda x: x + F.interpolate(x[:, :, ::2, ::2], size=x.shape[2:])), "was not enlarged"),
        (Calls(nn.Identity(), lambda x: F.interpolate(x, size=(96, 96))), "was not enlarged or resized"),
        (Calls(stem(), lambda x: F.dropout(x, 0.5, training=True)), "two runs on one image differ"),
        (Calls(stem(), lambda x: x / 0 * 0), "its map of finite images holds NaN; check its weights"),
        (Calls(stem(), lambda x: (x,)), "got tuple for"),
        (Calls(stem(), lambda x: x.long()), r"got torch\.int64 of shape"),
        (Calls(stem(), lambda x: x[:, : x.shape[2] % 5 + 1]), "got 5 channels for one size and 2 for 64 × 1"),
        (nn.Conv2d(1, 8, 3, 2, 1), r"it fails: Given groups=1, .* to have 1 channels, but got 3 channels"),
        (torchvision.models.vit_b_16(), r"on \(1, 3, 256, 256\) it fails: Wrong image height"),
        (PaddedBySize(3, 8, 3, 2), "of layers that pad alike on both sides"),
        (Uncopied(), "but it cannot be copied: of one kind"),
        (lambda x: x, r"got function; give a torch\.nn\.Module"),
    ],
)
def test_a_network_that_is_no_grid_is_refused_with_what_was_found(module: nn.Module, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        Geometry.of(module)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tiny5": random_backbone,
    "normalised by neighbours": lambda: nn.Sequential(
        *(nn.Conv2d(3, 4, 7, 2, 1), LocalResponseNorm(3), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 3, dilation=2))
    ),
    "of two branches": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2), Fire(4, 2, 3, 3), nn.AvgPool2d(2, 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_field_holds_every_pixel_that_changes_the_cell_and_no_smaller_one_does(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = NETWORKS[name]().double()
    grid = probe(backbone)
    cell = grid.field // grid.stride // 2 + 2
    low = int(grid.first_centre + cell * grid.stride - (grid.field - 1) / 2)
    side = low + grid.field + 2 * grid.stride
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image.requires_grad_(True)
    backbone(image)[0, :, cell, cell].sum().backward()
    seen = torch.nonzero(image.grad.abs().amax(dim=(0, 1)))
    high = low + grid.field - 1
    assert seen.min() >= low > 0
    assert seen.max() <= high
    for edge in (low, high):  # their pixels count, in either axis
        with torch.no_grad():
            marked = image.detach().clone()
            marked[..., edge] = torch.nan
            assert backbone(marked)[0, :, cell, cell].isnan().any()
            marked = image.detach().clone()
            marked[..., edge, :] = torch.nan
            assert backbone(marked)[0, :, cell, cell].isnan().any()


HIDING = [
    lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    lambda x: torch.nan_to_num(x),
    lambda x: x.masked_fill(~(x > 0), 0),
    lambda x: torch.fmax(x, torch.zeros_like(x)),
]


class Beside(nn.Module):
    """One branch beside another, which hides NaN behind a convolution or two."""

    def __init__(self, hidden: nn.Module, hide: Callable[[Tensor], Tensor], shown: nn.Module) -> None:
        super().__init__()
        self.hidden, self.hide, self.shown = hidden, hide, shown

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hide(self.hidden(images))
        return torch.cat([hidden, self.shown(images)[..., : hidden.shape[2], : hidden.shape[3]]], 1)


@pytest.mark.parametrize("hide", HIDING)
@pytest.mark.parametrize(
    "make",
    [
        lambda hide: Beside(nn.Conv2d(3, 8, 11, 4, 1), hide, stem()),
        lambda hide: Beside(nn.Conv2d(3, 8, 4, 4, 1), hide, stem()),  # one pixel more on one side
        lambda hide: Beside(nn.Sequential(stem(2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 5, 2, 2)), hide, stem()),
        lambda hide: Calls(stem(), hide),
        lambda hide: nn.Sequential(stem(), nn.GroupNorm(2, 8), Calls(nn.ReLU(), hide), nn.Conv2d(8, 8, 3, 2, 1)),
    ],
)
def test_what_hides_nan_is_an_error_and_never_another_geometry(
    make: Callable[[Callable[[Tensor], Tensor]], nn.Module], hide: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(BackboneError, match=r"whose NaN does not reach them; replace what hides NaN, e\.g\. torch\.wh"):
        Geometry.of(make(hide))


@pytest.mark.parametrize("hide", HIDING)
def test_what_hides_nan_inside_of_what_is_seen_anyway_does_not_matter(hide: Callable[[Tensor], Tensor]) -> None:
    assert Geometry.of(Beside(nn.Conv2d(3, 8, 5, 4, 2), hide, nn.Conv2d(3, 8, 11, 4, 5))) == Geometry(4, 0)


def test_padding_alone_is_no_map() -> None:
    """The one cell across a pixel lies in the padding; of two pixels it sees one."""
    assert probe(nn.Conv2d(3, 4, 1, stride=2, padding=1)).width == 2


def test_the_network_is_left_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.norm.num_batches_tracked.add_(1)
            return self.norm(images)

    module = nn.Sequential(Counting(), nn.Dropout(0.5), Residual(3))
    module[0].eval()
    module[2].first.requires_grad_(False)
    module[2].second.weight.grad = torch.ones_like(module[2].second.weight)
    modes, before = [part.training for part in module.modules()], copy.deepcopy(module.state_dict())
    seed = torch.get_rng_state()
    Geometry.of(module)
    assert torch.equal(torch.get_rng_state(), seed)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(module[2].second.weight.grad, torch.ones_like(module[2].second.weight))
    assert module[2].first.weight.grad is None
    assert torch.is_grad_enabled()


@contextlib.contextmanager
def a_default(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    torch.set_default_dtype(dtype or torch.float32)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


class Threads(nn.Conv2d):
    """Counts torch's threads while it runs, and makes a tensor as the defaults say."""

    seen: ClassVar[set[int]] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.add(torch.get_num_threads())
        return super().forward(images) * torch.full((1, 8, 1, 1), 2.0)


@pytest.mark.parametrize(
    "ambient",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        lambda: a_default(torch.float64),
        lambda: a_default(torch.float16),
        lambda: a_default(device="meta"),
    ],
)
def test_what_the_caller_set_in_torch_does_not_count_and_stays(ambient: Callable[[], Any]) -> None:
    def state() -> tuple[object, ...]:
        devices = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
        return *devices, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()

    module = nn.Sequential(Threads(3, 8, 3, 2, 1), nn.BatchNorm2d(8), Residual())
    doubled = nn.Conv2d(3, 8, 5, 3).double()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ambient():
            before = state()
            assert Geometry.of(module) == Geometry(4, 0)
            assert Geometry.of(doubled) == Geometry(3, 2)
            assert state() == before
    finally:
        torch.set_num_threads(threads)
    assert Threads.seen == {1}


def test_a_network_made_in_inference_mode_is_probed_outside_it() -> None:
    with torch.inference_mode():
        module = nn.Sequential(stem(), nn.BatchNorm2d(8))
    assert Geometry.of(module) == Geometry(4, 0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()), "0.weight"),
        (lambda: nn.Sequential(stem(), nn.LazyBatchNorm2d(affine=False)), "1.running_mean"),
        (lambda: stem().to("meta"), "weight"),
    ],
)
def test_a_network_without_values_is_refused_and_left_without(make: Callable[[], nn.Module], name: str) -> None:
    module = make()
    with pytest.raises(BackboneError, match=f"but {name} has no values yet; load weights, or run the network once"):
        Geometry.of(module)
    tensor = dict((*module.named_parameters(), *module.named_buffers()))[name]
    assert tensor.is_meta or is_lazy(tensor)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stride": 0}, "expected stride in pixels > 0, got 0"),
        ({"stride": -16}, "expected stride in pixels > 0, got -16"),
        ({"stride": "16"}, "got '16'"),
        ({"stride": (16, 16)}, r"got \(16, 16\)"),
        ({"stride": 10**400}, "expected stride"),
        ({"first_centre": float("nan")}, "expected first_centre in a pixel, got nan"),
        ({"first_centre": None}, "got None"),
        ({"shrink": -1}, "expected shrink in pixels >= 0 or None, got -1"),
        ({"shrink": float("inf")}, "got inf"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused_when_it_is_made(values: dict[str, object], message: str) -> None:
    with pytest.raises(SppnetError, match=message):
        Geometry(**{"stride": 16, "first_centre": 7.5, **values})


def test_a_network_of_another_type_of_numbers_has_the_same_map() -> None:
    module = nn.Sequential(stem(), Residual()).eval()
    side = map_side(module, 2, 100, 64)
    assert side == 13
    assert map_side(module.to(torch.bfloat16), 2, 100, 64) == side
