"""Convolutions with fewer multiplications against plain ones, and when they are taken."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fences import fenced
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sppnet.config import TrunkSettings, WeightsSettings
from sppnet.network import tile_kernels, winograd
from sppnet.network.trunks import Trunk, build_trunk
from sppnet.network.winograd import Convolution, convolve, filters_at_points, saves_time, suits

# the result

KERNELS = [(3, 1), (4, 1), (5, 1), (5, 2), (6, 2), (7, 2), (9, 2), (7, 3), (11, 4), (12, 4), (9, 3)]


@settings(max_examples=120, deadline=None)
@example(images=1, size=(61, 47), channels=(264, 16), kernel=(3, 1), padding=(1, 1), bias=True, threads=2, seed=0)
@example(images=5, size=(31, 40), channels=(16, 48), kernel=(5, 1), padding=(2, 2), bias=True, threads=1, seed=1)
@example(images=2, size=(67, 91), channels=(3, 64), kernel=(11, 4), padding=(2, 2), bias=True, threads=3, seed=2)
@given(
    images=st.integers(0, 4),
    size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    channels=st.tuples(st.sampled_from([1, 3, 8, 9, 16, 40]), st.sampled_from([16, 32, 80])),
    kernel=st.sampled_from(KERNELS),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    bias=st.booleans(),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_it_is_a_convolution(
    images: int,
    size: tuple[int, int],
    channels: tuple[int, int],
    kernel: tuple[int, int],
    padding: tuple[int, int],
    bias: bool,
    threads: int,
    seed: int,
) -> None:
    side, stride = kernel
    if min(size[k] + 2 * padding[k] for k in (0, 1)) < side:
        padding = (6, 6)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels[0], *size, generator=generator)
    weight = torch.randn(channels[1], channels[0], side, side, generator=generator)
    offset = torch.randn(channels[1], generator=generator) if bias else None
    with running(threads):
        result = convolve(_sliced(x), filters_at_points(weight, stride), offset, side, stride, padding)
    expected = F.conv2d(x.double(), weight.double(), None if offset is None else offset.double(), stride, padding)
    assert result.shape == expected.shape
    if images:
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert result.is_contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def running(threads: int) -> Iterator[None]:
    """torch, and so we, on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sliced(x: torch.Tensor) -> torch.Tensor:
    """The same images as a part of larger ones, channels last."""
    larger = torch.full((len(x), x.shape[1], x.shape[2] + 2, x.shape[3] + 1), torch.nan, dtype=x.dtype)
    larger = larger.to(memory_format=torch.channels_last)
    larger[:, :, 1:-1, :-1] = x
    return larger[:, :, 1:-1, :-1]


def test_float32_loses_as_little_as_promised() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 40, 52, generator=generator).relu_()
    for side, stride in ((3, 1), (5, 1), (5, 2), (7, 2)):
        weight = torch.randn(192, 256, side, side, generator=generator)
        exact = F.conv2d(x.double(), weight.double(), stride=stride, padding=1)
        result = convolve(x, filters_at_points(weight, stride), None, side, stride)
        error = (result - exact).abs().max() / exact.abs().max()
        assert 0 < float(error) < 1.5e-5


@pytest.mark.parametrize("kernel", [(3, 1), (5, 2), (11, 4)])
def test_an_image_has_the_same_result_to_the_bit_in_any_batch_and_on_any_number_of_threads(
    kernel: tuple[int, int],
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 24, 37, 50, generator=generator)
    filters = filters_at_points(torch.randn(32, 24, kernel[0], kernel[0], generator=generator), kernel[1])
    with running(1):
        together = convolve(x, filters, None, *kernel)
    with running(3):
        assert torch.equal(convolve(x, filters, None, *kernel), together)
        for image, own in zip(x, together, strict=True):
            assert torch.equal(convolve(image[None], filters, None, *kernel)[0], own)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize(
    ("kernel", "size"), [((3, 1), (23, 31)), ((4, 1), (16, 9)), ((5, 2), (40, 31)), ((5, 1), (1, 1))]
)
@pytest.mark.parametrize("padding", [(0, 0), (2, 2)])
def test_no_memory_around_the_arrays_is_touched(
    kernel: tuple[int, int], size: tuple[int, int], padding: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fenced:
        def array(self, shape: tuple[int, ...], kind: type) -> np.ndarray:
            return fenced(np.zeros(shape, kind))

    side, stride = kernel
    if size == (1, 1) and padding == (0, 0):
        size = (side, side)
    monkeypatch.setattr(tile_kernels, "scratch_memory", Fenced())
    monkeypatch.setattr(tile_kernels, "SCRATCH", 0)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 24, *size, generator=generator), torch.randn(32, 24, side, side, generator=generator)
    expected = F.conv2d(x.double(), weight.double(), stride=stride, padding=padding)
    arrays = [x.permute(0, 2, 3, 1).numpy(), filters_at_points(weight, stride).numpy(), np.zeros(32, np.float32)]
    result = fenced(np.zeros(expected.permute(0, 2, 3, 1).shape, np.float32))
    tile = 7 - -(-side // stride)
    tile_kernels.convolve_tiles(*map(fenced, arrays), result, tile, stride, padding, threads=2)
    found = torch.from_numpy(result).permute(0, 3, 1, 2).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


# when it is taken


def layer(**changed: object) -> Convolution:
    arguments = {"in_channels": 60, "out_channels": 64, "kernel_size": 3, "padding": 1, **changed}
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
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"bias": False, "padding": (0, 2)},
        {"padding": 5},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": 5, "stride": 2, "out_channels": 128},
        {"kernel_size": 11, "stride": 4, "in_channels": 12, "out_channels": 128},
    ],
)
def test_layers_on_large_maps_take_it_and_give_torchs_result(changed: dict[str, object]) -> None:
    convolution = layer(**changed)
    assert taken(convolution, torch.randn(1, convolution.in_channels, 130, 134))


@torch.no_grad()
@pytest.mark.parametrize(
    "changed",
    [
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 2},
        {"kernel_size": 6},
        {"kernel_size": (3, 5)},
        {"stride": 2},  # 2 × 2 weights on every second cell
        {"kernel_size": 5, "stride": (1, 2)},
        {"dilation": 2},
        {"padding": "same"},
        {"padding_mode": "reflect"},
        {"out_channels": 72},
        {"groups": 2},
    ],
)
def test_other_layers_do_not(changed: dict[str, object]) -> None:
    convolution = layer(**changed)
    assert not suits(convolution)
    assert not taken(convolution, torch.randn(1, convolution.in_channels, 100, 100))


def test_nor_do_other_calls() -> None:
    convolution, images = layer(), torch.randn(1, 60, 100, 100)
    assert not taken(convolution, images)  # gradients may be wanted
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert not taken(convolution, images)
        torch.set_float32_matmul_precision("medium")
        assert not taken(convolution, images)
        torch.set_float32_matmul_precision("highest")
        assert not taken(convolution, images[0])
        assert not taken(convolution.double(), images.double())
        assert not taken(convolution.float(), torch.randn(1, 60, 24, 28))  # too few cells
    with torch.inference_mode():
        assert taken(convolution, images)
        assert not taken(layer(), images)  # weights without a version
    with torch.no_grad():
        assert taken(convolution, images)  # by filters that were made in inference mode


def test_layers_that_change_their_stride_are_asked_when_they_run() -> None:
    convolution, images = layer(stride=2), torch.randn(1, 60, 100, 100)
    with torch.no_grad():
        assert not taken(convolution, images)
        convolution.stride = (1, 1)
        assert taken(convolution, images)
    convolution, images = layer(kernel_size=5), torch.randn(1, 60, 200, 200)
    with torch.no_grad():
        for stride in (1, 2, 1):
            convolution.stride = (stride, stride)
            assert taken(convolution, images)


def test_filters_are_not_those_of_before_a_step_of_a_fused_optimiser_nor_of_weights_turned_round() -> None:
    convolution, images = layer(in_channels=64).requires_grad_(True), torch.randn(1, 64, 100, 100)
    optimiser = torch.optim.SGD(convolution.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        assert taken(convolution, images)
    convolution(images).square().mean().backward()
    optimiser.step()  # which does not count as a change of the weights
    with torch.no_grad():
        assert taken(convolution, images)
        convolution.weight = nn.Parameter(convolution.weight.detach().transpose(2, 3))
        assert taken(convolution, images)
        convolution.weight = nn.Parameter(convolution.weight.detach().transpose(0, 1))
        assert taken(convolution, images)


@torch.no_grad()
def test_parameters_that_are_not_the_layers_are_left_to_torch() -> None:
    images = torch.randn(1, 60, 100, 100)
    for changed in (
        {"bias": torch.zeros(8)},
        {"bias": torch.zeros(64).double()},
        {"weight": torch.zeros(64, 16, 3, 3)},
    ):
        convolution = layer()
        for name, value in changed.items():
            setattr(convolution, name, nn.Parameter(value, requires_grad=False))
        with pytest.raises(RuntimeError):
            convolution(images)


def test_other_numbers_filters_and_biases_are_errors() -> None:
    images, filters = torch.randn(1, 24, 9, 9), filters_at_points(torch.randn(16, 24, 3, 3))
    with pytest.raises(ValueError, match="must be float32"):
        convolve(images.double(), filters, None)
    with pytest.raises(ValueError, match=r"for 32 channels and stride 1 must have shape \(36, 1, 32, 16\)"):
        convolve(torch.randn(1, 32, 9, 9), filters, None)
    with pytest.raises(ValueError, match="for 24 channels and stride 2"):
        convolve(images, filters, None, 5, 2)
    with pytest.raises(ValueError, match=r"bias must have shape \(16,\), got \(8,\)"):
        convolve(images, filters, torch.zeros(8))
    with pytest.raises(ValueError, match="padding must not be negative"):
        convolve(images, filters, None, padding=(-1, 0))


def test_what_tiles_save_depends_on_channels_cells_and_the_border() -> None:
    wide = layer(in_channels=256, out_channels=384)
    assert saves_time(wide, (1, 256, 74, 99))
    assert not saves_time(wide, (1, 256, 13, 13))  # filters cost too much
    assert saves_time(wide, (8, 256, 13, 13))
    assert not saves_time(wide, (8, 256, 5, 5))  # 8 × 8 cells computed for 5 × 5
    assert not saves_time(wide, (0, 256, 74, 99))
    assert not saves_time(layer(in_channels=3), (1, 3, 600, 800))  # changes cost too much
    assert saves_time(layer(in_channels=3, kernel_size=11, stride=4), (1, 3, 600, 800))


@torch.no_grad()
def test_a_wrong_number_of_channels_is_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="to have 60 channels, but got 1 channels"):
        layer()(torch.randn(1, 1, 40, 40))


@torch.no_grad()
def test_weights_that_change_are_noticed() -> None:
    convolution, images = layer(), torch.randn(1, 60, 100, 100)
    assert taken(convolution, images)
    with mock.patch.object(winograd, "filters_at_points", side_effect=AssertionError):
        assert taken(convolution, images)  # kept from the first call
    convolution.weight.mul_(2)
    assert taken(convolution, images)
    convolution.load_state_dict(layer().state_dict())
    assert taken(convolution, images)
    convolution.weight = nn.Parameter(torch.randn(64, 60, 3, 3), requires_grad=False)
    assert taken(convolution, images)
    convolution.weight.data = torch.randn(64, 60, 3, 3)
    assert taken(convolution, images)


@torch.no_grad()
def test_copies_hold_no_filters_and_state_names_stay() -> None:
    convolution = layer()
    convolution(torch.randn(1, 60, 100, 100))
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
    [
        ("zf5", 5),
        ("convnet5", 5),
        ("overfeat7", 7),
        ("alexnet", 5),
        ("vgg16", 13),
        ("resnet18", 12),
        ("mobilenet_v2", 0),
    ],
)
def test_trunks_hold_such_layers_and_give_the_same_map(name: str, count: int) -> None:
    trunk = trunk_of(name)
    own = [module for module in trunk.modules() if isinstance(module, Convolution) and suits(module)]
    assert len(own) == count
    images = torch.randn(1, 3, 110, 150, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), mock.patch.object(winograd, "convolve", wraps=convolve) as called:
        with mock.patch.object(winograd, "GAIN", 0):
            ours = trunk(images)
        assert called.call_count == count
        with mock.patch.object(winograd, "GAIN", float("inf")):
            plain = trunk(images)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
