"""Map sides and cell centres from single layers; whole backbones are probed in test_backbone."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn

from sppnet.backbones.geometry import Geometry, geometry_of, map_side, steps_of


def test_the_shrink_is_the_releases_at_stride_16_and_in_proportion_elsewhere() -> None:
    assert Geometry(16, 20).shrink == 6.5
    assert Geometry(8, 0).shrink == 3.25
    assert Geometry(16, 20, shrink=0.0).shrink == 0.0


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), list(itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1), (1, 2)))
)
def test_the_map_side_of_a_layer_equals_running_it(kernel: int, stride: int, padding: int, dilation: int) -> None:
    layers: list[nn.Module] = [nn.Conv2d(1, 1, kernel, stride, padding, dilation)]
    if padding <= kernel // 2:
        layers += [nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil) for ceil in (False, True)]
    for layer, side in itertools.product(layers, range(1, 24)):
        expected = (
            0 if side + 2 * padding < dilation * (kernel - 1) + 1 else layer(torch.zeros(1, 1, side, side)).shape[2]
        )
        step = (kernel, stride, padding, dilation, getattr(layer, "ceil_mode", False))
        assert map_side([step], side) == expected


def test_an_input_that_vanished_stays_vanished() -> None:
    steps, _ = steps_of(nn.Sequential(nn.Conv2d(3, 1, 5), nn.Conv2d(1, 1, 1, padding=3)))
    assert map_side(steps, 4) == 0


def test_no_layers_see_single_pixels() -> None:
    assert geometry_of([]) == Geometry(1, 0.0)
    assert map_side([], 7) == 7


def test_steps_are_the_layers_own_numbers_in_the_order_in_which_they_run() -> None:
    first, second = nn.Conv2d(3, 5, 7, 3, 2, 2), nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    steps, channels = steps_of(nn.Sequential(OrderedDict(second=first, relu=nn.ReLU(), first=second)))
    assert channels == 5
    assert steps == [(7, 3, 2, 2, False), (3, 2, 1, 1, True)]
    assert geometry_of(steps) == Geometry(6, 4.0)


def test_a_pool_that_would_pass_the_limit_loses_its_stride_and_dilates_what_follows() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.MaxPool2d(3, 3), nn.Conv2d(2, 2, 3, padding=1), nn.MaxPool2d(2)
    ).requires_grad_(False)
    images = torch.rand(1, 3, 97, 97)
    strided = network(images)
    assert geometry_of(steps_of(network, 2)[0]).stride == 2
    dense = network(images)
    torch.testing.assert_close(dense[..., ::6, ::6][..., : strided.shape[2], : strided.shape[3]], strided)


class Shortcuts(nn.Module):
    """Two paths that step alike, and one that steps again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.short = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(3, 8, 1, 4)
        self.last = nn.Conv2d(8, 4, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x)) + self.short(x))


def test_the_stride_of_a_shortcut_follows_that_of_the_path_beside_it() -> None:
    network, images = Shortcuts().requires_grad_(False), torch.rand(1, 3, 65, 65)
    assert geometry_of(steps_of(network)[0]) == Geometry(8, 0.0) == Geometry.of(network)
    strided = network(images)
    assert geometry_of(steps_of(network, 4)[0]) == Geometry(4, 0.0) == Geometry.of(network)
    assert (network.first.stride, network.second.stride, network.short.stride) == ((2, 2), (2, 2), (4, 4))
    torch.testing.assert_close(network(images)[..., ::2, ::2], strided)
