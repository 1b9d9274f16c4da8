"""Maps and windows become features, window by window the same as naively."""

import numpy as np
import pytest
import torch
from doubles import NO_WINDOWS, random_maps
from reference import expected_scale, nearest_area, pyramid_vector, release_window

from sppnet.backbones.geometry import Geometry
from sppnet.config import HeadSettings, MapSettings, PyramidSettings
from sppnet.detection import window_features
from sppnet.detection.feature_maps import FeatureMaps
from sppnet.detection.window_features import FrozenHead, ProjectedWindows, pool_crops, pool_projected, project_to_maps
from sppnet.models.sppnet import build_head

GEOMETRY = Geometry(stride=16, first_centre=7.5)
PYRAMID = PyramidSettings(levels=(1, 2, 3))
SIZE = (120, 180)  # of the image: (height, width)
ONE = random_maps((15, 22), sides=(240.0,), image_size=SIZE)
THREE = random_maps((8, 12), (15, 22), (30, 45), sides=(128.0, 240.0, 480.0), image_size=SIZE)


def random_windows(count, seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 1, (count, 2)) * [SIZE[1] - 20, SIZE[0] - 20]
    windows = np.concatenate([corner, corner + rng.uniform(8, 120, (count, 2))], axis=1).astype(np.float32)
    windows[::7] = [2, 1, 178, 119]  # almost the whole image, for the smallest scale
    return windows


def naive_scale(maps, window):
    wanted = expected_scale(window, maps.image_size, 208)
    return int(np.argmin([abs(side - wanted) for side in maps.sides]))


def naive_vector(maps, window, scale):
    feature_map = maps.maps[scale]
    cells = release_window(window, maps.image_size, maps.sides[scale], GEOMETRY, tuple(feature_map.shape[1:]))
    return pyramid_vector(feature_map.numpy(), cells, PYRAMID.levels)


@pytest.mark.parametrize("maps", [ONE, THREE], ids=["one scale", "three scales"])
def test_every_window_is_pooled_from_its_own_cells_at_its_own_scale(maps):
    windows = random_windows(60)
    where = project_to_maps(maps, windows, GEOMETRY, PYRAMID, MapSettings())
    pooled = pool_projected(maps, where, PYRAMID.levels)
    assert len(set(where.scale_index.tolist())) == len(maps.maps)
    for row, window in enumerate(windows):
        scale = naive_scale(maps, window)
        assert where.scale_index[row] == scale
        np.testing.assert_array_equal(pooled[row], naive_vector(maps, window, scale))


@pytest.mark.parametrize(
    ("chosen", "side"), [({}, 208), ({"target_side": 150}, 150), ({"scale_choice": "paper"}, 224),
                         ({"scale_choice": "paper", "target_side": 100}, 100)]
)  # fmt: skip
def test_the_scale_is_chosen_by_the_rule_of_the_settings_among_the_sides_that_were_used(chosen, side):
    """A bound on the longer side may have shrunk them."""
    maps, windows = FeatureMaps(THREE.maps, (120.5, 230.5, 460.25), SIZE), random_windows(80)
    settings = MapSettings(scales=(128, 240, 480), **chosen)
    where = project_to_maps(maps, windows, GEOMETRY, PYRAMID, settings)
    if settings.scale_choice == "paper":
        expected = [nearest_area(window.tolist(), SIZE, maps.sides, side) for window in windows]
    else:
        wanted = [expected_scale(window, SIZE, side) for window in windows]
        expected = [int(np.argmin([abs(own - one) for own in maps.sides])) for one in wanted]
    assert where.scale_index.tolist() == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("maps", [ONE, THREE], ids=["one scale", "three scales"])
def test_windows_pooled_from_crops_of_stored_maps_are_those_pooled_from_the_maps(maps, dtype):
    stored = maps.to("cpu", dtype)
    where = project_to_maps(maps, random_windows(40), GEOMETRY, PYRAMID, MapSettings())
    pooled = pool_crops(stored, where, PYRAMID.levels)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, pool_projected(stored.to("cpu", torch.float32), where, PYRAMID.levels))
    for row, (scale, cells) in enumerate(zip(where.scale_index, where.cells, strict=True)):
        own = stored.maps[scale].float().numpy()
        np.testing.assert_array_equal(pooled[row], pyramid_vector(own, cells, PYRAMID.levels))
    none = pool_crops(stored, where.rows(np.zeros(0, np.int64)), PYRAMID.levels)
    assert none.shape == (0, pooled.shape[1])


def test_scales_may_be_given_as_fine_tuning_draws_them():
    windows = random_windows(30)
    scales = np.random.default_rng(1).integers(3, size=30)
    where = project_to_maps(THREE, windows, GEOMETRY, PYRAMID, MapSettings(), scales)
    pooled = pool_projected(THREE, where, PYRAMID.levels)
    for row, window in enumerate(windows):
        np.testing.assert_array_equal(pooled[row], naive_vector(THREE, window, scales[row]))


@pytest.mark.parametrize("maps", [ONE, THREE], ids=["one scale", "three scales"])
def test_distinct_windows_have_the_features_of_all(maps):
    windows = np.repeat(random_windows(40), 3, axis=0) + np.tile([[0], [0.5], [1]], (40, 1)).astype(np.float32)
    where = project_to_maps(maps, windows, GEOMETRY, PYRAMID, MapSettings())
    distinct, inverse = where.unique()
    assert len(distinct.cells) < 80
    assert len(
        {(scale, *cells) for scale, cells in zip(distinct.scale_index, map(tuple, distinct.cells), strict=True)}
    ) == len(distinct.cells)
    few = pool_projected(maps, distinct, PYRAMID.levels)
    assert torch.equal(few[torch.from_numpy(inverse)], pool_projected(maps, where, PYRAMID.levels))


def test_the_same_cells_at_two_scales_are_two_windows():
    where = ProjectedWindows(np.array([0, 1, 0]), np.array([[0, 0, 2, 2]] * 3))
    distinct, inverse = where.unique()
    assert distinct.scale_index.tolist() == [0, 1]
    assert inverse.tolist() == [0, 1, 0]


@pytest.mark.parametrize("maps", [ONE, THREE], ids=["one scale", "three scales"])
def test_no_windows_have_no_features(maps):
    where = project_to_maps(maps, NO_WINDOWS, GEOMETRY, PYRAMID, MapSettings())
    assert where.cells.shape == (0, 4)
    assert where.unique()[0].cells.shape == (0, 4)
    assert pool_projected(maps, where, PYRAMID.levels).shape == (0, 3 * 14)


def small_head():
    head = build_head(3, PYRAMID.levels, 4, HeadSettings(fc6=9, fc7=6), seed=3)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    head.input_scale.fill_(0.5)
    return head


def some_windows(maps, count):
    return project_to_maps(maps, random_windows(count), GEOMETRY, PYRAMID, MapSettings())


@pytest.mark.parametrize("maps", [ONE, THREE], ids=["one scale", "three scales"])
@pytest.mark.parametrize("layer", ["pool", "fc6", "fc7"])
@pytest.mark.parametrize("count", [0, 1, 5, 23])
def test_a_frozen_head_computes_in_batches_what_the_head_does(maps, layer, count, monkeypatch):
    monkeypatch.setattr(window_features, "BATCH", 5)
    head, where = small_head(), some_windows(maps, count)
    features = FrozenHead(head, PYRAMID.levels).features(maps, where, layer)
    with torch.no_grad():
        expected = head.features(pool_projected(maps, where, PYRAMID.levels), layer)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert features.shape == (count, {"pool": 42, "fc6": 9, "fc7": 6}[layer])


@pytest.mark.parametrize("layer", ["fc6", "fc7"])
def test_half_precision_gives_float32_features_nearby(layer):
    head, where = small_head(), some_windows(THREE, 50)
    exact = FrozenHead(head, PYRAMID.levels).features(THREE, where, layer)
    rough = FrozenHead(head, PYRAMID.levels, "bfloat16").features(THREE, where, layer)
    assert rough.dtype == torch.float32
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_at_several_scales_one_of_them_without_windows(device):
    everything = some_windows(THREE, 60)
    where = everything.rows(np.flatnonzero(everything.scale_index != 1))
    assert set(where.scale_index.tolist()) == {0, 2}
    found = FrozenHead(small_head().to(device), PYRAMID.levels, "bfloat16").features(THREE.to(device), where, "fc7")
    with torch.no_grad():
        expected = small_head().features(pool_projected(THREE, where, PYRAMID.levels), "fc7")
    assert (found.device.type, found.dtype) == (device, torch.float32)
    assert 1e-4 < (found.cpu() - expected).norm() / expected.norm() < 0.02


def test_a_frozen_head_does_not_follow_later_training():
    head, where = small_head(), some_windows(ONE, 2)
    frozen = FrozenHead(head, PYRAMID.levels)
    before = frozen.features(ONE, where, "fc7")
    with torch.no_grad():
        head.fc6.weight.mul_(2)
        head.input_scale.mul_(3)
    assert torch.equal(frozen.features(ONE, where, "fc7"), before)
