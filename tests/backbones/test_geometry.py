"""Map sides and cell centres from single layers; whole backbones are probed in test_backbone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from sppnet.backbones.geometry import Geometry, channels_of, geometry_of, limit_stride, map_side, steps_of


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
        assert map_side(steps_of([layer]), side) == expected


def test_an_input_that_vanished_stays_vanished() -> None:
    steps = steps_of([nn.Conv2d(1, 1, 5), nn.Conv2d(1, 1, 1, padding=3)])
    assert map_side(steps, 4) == 0


def test_no_layers_see_single_pixels() -> None:
    assert geometry_of([]) == Geometry(1, 0.0)
    assert map_side([], 7) == 7


def test_a_pool_that_would_pass_the_limit_loses_its_stride_and_dilates_what_follows() -> None:
    layers = [
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.MaxPool2d(3, 3),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.MaxPool2d(2),
    ]
    images = torch.rand(1, 1, 97, 97)
    strided = nn.Sequential(*layers)(images)
    limit_stride(layers, 2)
    dense = nn.Sequential(*layers)(images)
    assert geometry_of(steps_of(layers)).stride == 2
    torch.testing.assert_close(dense[..., ::6, ::6][..., : strided.shape[2], : strided.shape[3]], strided)


def test_channels_are_those_of_the_last_convolution() -> None:
    assert channels_of([nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 7, 1), nn.MaxPool2d(2)]) == 7


class Branches(nn.Sequential):
    """Its layers stand side by side, not one behind the other."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 1, 2), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[0](x) + self[1](x)


def test_layers_of_unknown_geometry_are_refused() -> None:
    for layer in (nn.AvgPool2d(2), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1), nn.PixelUnshuffle(2), Branches()):
        with pytest.raises(TypeError, match=rf"a layer of type {type(layer).__name__} is not known; .*Geometry\.of"):
            steps_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), layer)))
    with pytest.raises(TypeError, match="same number for both axes of a layer, got same"):
        steps_of([nn.Conv2d(1, 1, 3, padding="same")])
    with pytest.raises(TypeError, match="same number for both axes"):
        steps_of([nn.Conv2d(1, 1, (3, 5))])
