"""Convolutions with fewer multiplications against plain ones, and when they are taken."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sppnet.config import TrunkSettings, WeightsSettings
from sppnet.network import winograd
from sppnet.network.trunks import Trunk, build_trunk
from sppnet.network.winograd import Convolution, convolve, filters_at_points, saves_time, suits


@settings(max_examples=80, deadline=None)
@example(images=5, size=(4, 12), channels=(3, 3), padding=(1, 1), bias=True, block=20_000, seed=0)  # 3 a block, then 2
@given(
    images=st.integers(0, 4),
    size=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
    block=st.sampled_from([1, 5_000, 20_000, 2**23]),
    seed=st.integers(0, 2**16),
)
def test_in_exact_arithmetic_it_is_a_convolution(
    images: int,
    size: tuple[int, int],
    channels: tuple[int, int],
    padding: tuple[int, int],
    bias: bool,
    block: int,
    seed: int,
) -> None:
    if size[0] + 2 * padding[0] < 3 or size[1] + 2 * padding[1] < 3:
        padding = (2, 2)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels[0], *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels[1], channels[0], 3, 3, generator=generator, dtype=torch.float64)
    offset = torch.randn(channels[1], generator=generator, dtype=torch.float64) if bias else None
    with mock.patch.object(winograd, "BLOCK", block):
        result = convolve(_sliced(x), filters_at_points(weight), offset, padding)
    torch.testing.assert_close(result, F.conv2d(x, weight, offset, padding=padding), rtol=1e-11, atol=1e-11)
    assert result.is_contiguous(memory_format=torch.channels_last)


def _sliced(x: torch.Tensor) -> torch.Tensor:
    """The same images as a part of larger ones, channels last."""
    larger = torch.full((len(x), x.shape[1], x.shape[2] + 2, x.shape[3] + 1), torch.nan, dtype=x.dtype)
    larger = larger.to(memory_format=torch.channels_last)
    larger[:, :, 1:-1, :-1] = x
    return larger[:, :, 1:-1, :-1]


def test_float32_loses_as_little_as_promised() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 40, 52, generator=generator).relu_()
    weight = torch.randn(192, 256, 3, 3, generator=generator)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    error = (convolve(x, filters_at_points(weight), None) - exact).abs().max() / exact.abs().max()
    assert 0 < float(error) < 1e-5


# when it is taken


def layer(**changed: object) -> Convolution:
    arguments = {"in_channels": 129, "out_channels": 130, "kernel_size": 3, "padding": 1, **changed}
    torch.manual_seed(0)
    return Convolution(**arguments).requires_grad_(False)  # type: ignore[arg-type]


def taken(convolution: nn.Module, images: torch.Tensor) -> bool:
    """Whether a call goes by `convolve`; and that the result is torch's, whatever it goes by."""
    with mock.patch.object(winograd, "convolve", wraps=convolve) as called:
        result = convolution(images)
    with torch.no_grad():
        expected = nn.Conv2d.forward(convolution, images)  # type: ignore[arg-type]
    torch.testing.assert_close(result.float(), expected.float(), rtol=0, atol=2e-5 * float(expected.abs().max()))
    return called.called


@torch.no_grad()
def test_wide_layers_on_large_maps_take_it_and_give_torchs_result() -> None:
    assert taken(layer(), torch.randn(1, 129, 28, 28))  # 49 tiles
    assert taken(layer(bias=False, padding=(0, 2)), torch.randn(2, 129, 30, 22))


@torch.no_grad()
@pytest.mark.parametrize(
    "changed",
    [
        {"kernel_size": 5, "padding": 2},
        {"stride": 2},
        {"dilation": 2},
        {"padding": 3},
        {"padding": "same"},
        {"padding_mode": "reflect"},
        {"in_channels": 128},
        {"out_channels": 128},
        {"groups": 2, "in_channels": 260},
    ],
)
def test_other_layers_do_not(changed: dict[str, object]) -> None:
    convolution = layer(**changed)
    assert not suits(convolution)
    assert not taken(convolution, torch.randn(1, convolution.in_channels, 40, 40))


def test_nor_do_other_calls() -> None:
    convolution, images = layer(), torch.randn(1, 129, 28, 28)
    assert not taken(convolution, images)  # gradients may be wanted
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert not taken(convolution, images)
        torch.set_float32_matmul_precision("medium")
        assert not taken(convolution, images)
        torch.set_float32_matmul_precision("highest")
        assert not taken(convolution, images[0])
        assert not taken(convolution.double(), images.double())
        assert not taken(convolution.float(), torch.randn(1, 129, 24, 28))  # 42 tiles
    with torch.inference_mode():
        assert taken(convolution, images)
        assert not taken(layer(), images)  # weights without a version
    with torch.no_grad():
        assert taken(convolution, images)  # by filters that were made in inference mode


@torch.no_grad()
def test_a_wrong_number_of_channels_is_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="to have 129 channels, but got 1 channels"):
        layer()(torch.randn(1, 1, 40, 40))


def test_tiles_far_beyond_the_border_do_not_pay() -> None:
    assert saves_time((64, 256, 28, 28), (1, 1))
    assert not saves_time((64, 256, 13, 13), (1, 1))  # 16 × 16 computed
    assert saves_time((64, 256, 15, 15), (0, 0)) is False
    assert not saves_time((0, 256, 28, 28), (1, 1))


@torch.no_grad()
def test_weights_that_change_are_noticed() -> None:
    convolution, images = layer(), torch.randn(1, 129, 28, 28)
    assert taken(convolution, images)
    with mock.patch.object(winograd, "filters_at_points", side_effect=AssertionError):
        assert taken(convolution, images)  # kept from the first call
    convolution.weight.mul_(2)
    assert taken(convolution, images)
    convolution.load_state_dict(layer(out_channels=130).state_dict())
    assert taken(convolution, images)
    convolution.weight = nn.Parameter(torch.randn(130, 129, 3, 3), requires_grad=False)
    assert taken(convolution, images)
    convolution.weight.data = torch.randn(130, 129, 3, 3)
    assert taken(convolution, images)


@torch.no_grad()
def test_copies_hold_no_filters_and_state_names_stay() -> None:
    convolution = layer()
    convolution(torch.randn(1, 129, 28, 28))
    assert convolution._transformed is not None
    filters = convolution._transformed
    assert convolution.double()._transformed is None
    convolution.float()._transformed = filters
    assert copy.deepcopy(convolution)._transformed is None
    assert pickle.loads(pickle.dumps(convolution))._transformed is None
    assert list(convolution.state_dict()) == ["weight", "bias"]


# trunks


def trunk_of(name: str) -> Trunk:
    return build_trunk(TrunkSettings(name=name, weights=WeightsSettings(source="random")))


@pytest.mark.parametrize(
    ("name", "count"),
    [("zf5", 3), ("convnet5", 3), ("overfeat7", 5), ("alexnet", 3), ("vgg16", 8), ("resnet18", 3), ("mobilenet_v2", 0)],
)
def test_trunks_hold_such_layers_and_give_the_same_map(name: str, count: int) -> None:
    trunk = trunk_of(name)
    own = [module for module in trunk.modules() if isinstance(module, Convolution) and suits(module)]
    assert len(own) == count
    images = torch.randn(1, 3, 110, 150, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), mock.patch.object(winograd, "convolve", wraps=convolve) as called:
        with mock.patch.object(winograd, "TILES", 1), mock.patch.object(winograd, "WASTE", float("inf")):
            ours = trunk(images)
        assert called.call_count == count
        with mock.patch.object(winograd, "TILES", float("inf")):
            plain = trunk(images)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
