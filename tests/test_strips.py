"""Strips of a trunk's finest layers give what the whole maps give."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sppnet.config import TrunkSettings, WeightsSettings
from sppnet.network import strips
from sppnet.network.architectures import TRUNKS
from sppnet.network.normalisation import LocalResponseNorm
from sppnet.network.strips import Reach, fine_layers, largest_map, pays, reach_of, run_in_strips
from sppnet.network.trunks import Trunk, build_trunk


def random_trunk(name: str, layer: str | None = None) -> Trunk:
    return build_trunk(TrunkSettings(name=name, layer=layer, weights=WeightsSettings(source="random")))


@st.composite
def chains(draw: st.DrawFn) -> list[nn.Module]:
    """A convolution, then a few layers of any kind that trunks have."""
    layers: list[nn.Module] = []
    channels = 2
    for _ in range(draw(st.integers(1, 4))):
        kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        kind = draw(st.sampled_from(("conv", "pool", "norm"))) if layers else "conv"
        if kind == "conv":
            padding, dilation = draw(st.integers(0, 3)), draw(st.integers(1, 2))
            layers.append(nn.Conv2d(channels, 3, kernel, stride, padding, dilation).double())
            channels = 3
        elif kind == "pool":
            padding = draw(st.integers(0, kernel // 2))
            layers.append(nn.MaxPool2d(kernel, stride, padding, ceil_mode=draw(st.booleans())))
        else:
            layers.append(LocalResponseNorm(draw(st.sampled_from((1, 3, 5))), alpha=0.5))
    return layers


@given(chains(), st.integers(20, 70), st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_strips_of_any_height_give_the_whole_map(layers: list[nn.Module], height: int, pixels: int, seed: int) -> None:
    images = torch.randn(2, 2, height, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        try:
            whole = nn.Sequential(*layers)(images)
        except RuntimeError:  # the image is too small for these layers
            return
        torch.testing.assert_close(run_in_strips(layers, images, pixels), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(TRUNKS))
def test_every_trunk_gives_the_same_map_in_strips(name: str) -> None:
    trunk = random_trunk(name)
    images = torch.randn(1, 3, 203, 170, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = trunk(images)
        with mock.patch.object(strips, "LARGE", 0), mock.patch.object(strips, "PIXELS", 1):
            in_strips = trunk(images)
    assert in_strips.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(in_strips, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_a_large_image_is_run_in_strips_and_a_small_one_is_not() -> None:
    trunk = random_trunk("tiny5")
    with torch.inference_mode(), mock.patch("sppnet.network.trunks.run_in_strips", wraps=run_in_strips) as called:
        trunk(torch.zeros(1, 3, 320, 320))
        assert not called.called
        trunk(torch.zeros(1, 3, 2500, 2500))
        assert called.called


def test_a_trunk_that_trains_has_whole_maps() -> None:
    """Batch norm takes its statistics from them."""
    trunk = random_trunk("tiny5").requires_grad_(True).train()
    strip = mock.patch("sppnet.network.trunks.run_in_strips", side_effect=AssertionError)
    with strip, mock.patch.object(strips, "LARGE", 0), torch.no_grad():
        trunk(torch.zeros(2, 3, 128, 128))


@pytest.mark.parametrize(
    ("name", "layer"), [("zf5", "pool1"), ("convnet5", "conv1"), ("mobilenet_v2", "features.2+features.3")]
)
def test_a_fine_map_that_is_wanted_itself_is_the_same(name: str, layer: str) -> None:
    trunk = random_trunk(name, layer)
    images = torch.randn(1, 3, 150, 130, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = trunk(images)
        with mock.patch.object(strips, "LARGE", 0), mock.patch.object(strips, "PIXELS", 1):
            torch.testing.assert_close(trunk(images), whole)


def test_what_a_cell_sees_follows_from_the_layers() -> None:
    # conv1 7 / 2, padding 1; norm1 3, padding 1; pool1 3 / 2
    layers = [nn.Conv2d(3, 4, 7, 2, padding=1), LocalResponseNorm(), nn.MaxPool2d(3, 2)]
    assert reach_of(layers) == Reach(field=15, stride=4, before=3)
    assert reach_of([]) == Reach(1, 1, 0)


def test_the_fine_layers_are_those_up_to_a_quarter_of_the_image() -> None:
    layers = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 2)]
    assert fine_layers(layers) == 3
    assert fine_layers(layers[:2]) == 0  # it never gets coarse: the whole map is wanted


def test_the_largest_map_is_found_inside_of_blocks_too() -> None:
    trunk = random_trunk("mobilenet_v2")
    blocks = [trunk.get_submodule(f"features.{k}") for k in range(4)]
    assert largest_map(blocks, (64, 96)) == 96 * 32 * 48  # the second block widens 16 channels to 96 at half the size
    assert largest_map([nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)], (10, 12)) == 8 * 10 * 12


def test_a_batch_counts_as_many_maps_and_half_precision_as_half() -> None:
    layers = [nn.Conv2d(3, 64, 1)]
    with torch.inference_mode():
        side = 400
        assert pays(layers, torch.empty(1, 3, side, side)) == (64 * 4 * side * side > strips.LARGE) is True
        assert not pays(layers, torch.empty(1, 3, side // 2, side // 2))
        assert pays(layers, torch.empty(4, 3, side // 2, side // 2))
        with torch.autocast("cpu", torch.bfloat16):
            assert not pays(layers, torch.empty(1, 3, side, side))
    assert not pays(layers, torch.empty(1, 3, side, side))  # with gradients
