"""Settings chosen from the number of pictures and the sizes of their objects: known answers, and less for less time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sppnet.backbones.architectures import BACKBONES
from sppnet.backbones.backbone import build_backbone
from sppnet.config import BackboneSettings
from sppnet.errors import SppnetError
from sppnet.pipeline.choices import LAYERS, choose_settings, choose_shapes, choose_sides, choose_steps, reduced
from sppnet.records import Annotation, ImageRecord

BCCD = {"platelets": (0.08, 1), "red": (0.2, 11), "white": (0.4, 1)}  # share of the shorter side, objects in an image
VOC = {"car": (0.2, 1), "cow": (0.3, 1), "person": (0.4, 1), "cat": (0.75, 1), "dog": (0.95, 1)}


def images(count, classes, size=(480, 640)):
    rng, records = np.random.default_rng(0), []
    for number in range(count):
        boxes, names = [], []
        for name, (share, each) in classes.items():
            sides = share * min(size) * rng.uniform(0.9, 1.1, (each, 1)) * [1, 1]
            boxes += [*np.concatenate([np.zeros((each, 2)), sides], axis=1)]
            names += [name] * each
        records.append(ImageRecord(str(number), Path("x"), size, f"{number}", Annotation(np.array(boxes), names)))
    return records


def values(records):
    return {key: choice.value for key, choice in choose_settings(records).items()}


def test_small_cells_get_the_sides_and_steps_that_were_measured_for_them():
    found = values(images(300, BCCD))
    assert found["maps.scales"] in ((481, 961), (513, 961))
    assert (found["joint.steps"], found["joint.windows"], found["head.training"]) == (1000, 512, "joint")
    assert (found["backbone.name"], found["backbone.weights.source"]) == ("efficientnet_lite0", "package")


def test_layers_and_weights_are_those_of_the_backbone_that_is_set():
    found = {name: choose_settings(images(2, BCCD), name) for name in (*LAYERS, "mobilenet_v2", None)}
    assert found["efficientnet_lite0"]["backbone.layer"].value == "blocks.10+blocks.15"
    assert not {"backbone.layer", "backbone.weights.source"} & {*found["mobilenet_v2"], *found[None]}
    for name in LAYERS:
        network = build_backbone(BackboneSettings(name=name, layer=LAYERS[name], weights={"source": "random"}))
        assert network.geometry.stride == 16
        assert LAYERS[name].endswith(BACKBONES[name]().default)


@pytest.mark.parametrize(("count", "flip"), [(400, True), (401, False)])
def test_few_pictures_train_with_their_mirror_images(count, flip):
    assert values(images(count, {"one": (0.4, 1)}))["joint.flip"] is flip


def test_objects_of_many_sizes_get_three_sides():
    found = values(images(2000, VOC, (333, 500)))
    assert (len(found["maps.scales"]), found["maps.scales"][0]) == (3, 353)
    assert 641 <= found["maps.scales"][-1] <= 737
    assert found["joint.steps"] == 2600


@pytest.mark.parametrize(("share", "least", "most"), [(0.005, 961, 961), (1.0, 353, 353), (0.4, 481, 561)])
def test_objects_of_one_size_get_one_side_within_the_bounds(share, least, most):
    (side,) = values(images(4, {"one": (share, 2)}))["maps.scales"]
    assert least <= side <= most


@pytest.mark.parametrize(("small", "large"), np.random.default_rng(1).uniform(0.01, 1.2, (20, 2)).tolist())
def test_sides_are_those_at_which_objects_measure_208_pixels(small, large):
    small, large = sorted((small, large))
    sides = choose_sides(small, large)
    assert list(sides) == sorted(set(sides))
    assert all(side % 32 == 1 and 353 <= side <= 961 for side in sides)
    for share, side in ((small, sides[-1]), (large, sides[0])):
        assert side / np.clip(208 / share, 353, 961) == pytest.approx(1, abs=0.2)


def test_a_class_of_few_objects_counts_as_much_as_one_of_many():
    few = values(images(30, {"small": (0.22, 1), "large": (0.9, 1)}))["maps.scales"]
    assert values(images(30, {"small": (0.22, 20), "large": (0.9, 1)}))["maps.scales"] == few


def test_steps_grow_with_the_root_of_the_images_between_their_bounds():
    assert [choose_steps(n, n) for n in (1, 300, 1200, 1_000_000)] == [200, 1000, 2000, 10_000]
    assert choose_steps(10, 4500) == choose_steps(300, 300)


def test_many_images_keep_fewer_windows_of_each_and_small_objects_are_not_left_out():
    assert values(images(6000, {"one": (0.4, 1)}))["joint.windows"] == 250
    assert values(images(4, {"one": (0.4, 1)}))["proposals.min_side"] == 20
    assert values(images(4, {"one": (0.1, 1)}, (120, 160)))["proposals.min_side"] == 8


def test_every_choice_has_a_reason_of_one_line():
    for choice in choose_settings(images(12, BCCD)).values():
        assert choice.reason
        assert "\n" not in choice.reason


def test_without_objects_there_is_nothing_to_choose_from():
    bare = [ImageRecord("a", Path("a"), (48, 64), "a", Annotation(np.zeros((0, 4)), []))]
    with pytest.raises(SppnetError, match="no object in 1 image; draw boxes"):
        choose_settings(bare)


@pytest.mark.parametrize("of", [images(300, BCCD), images(40, VOC), images(2, {"one": (1.0, 1)})], ids=str)
def test_a_lower_level_is_nowhere_more_work(of):
    choices = choose_settings(of)
    assert reduced(choices, 1, "why") == choices
    keys, before = ("joint.steps", "joint.windows", "maps.scales"), None
    for level in np.linspace(1, 0, 50):
        less = reduced(choices, level, "why")
        steps, windows, sides = (less[key].value for key in keys)
        now = np.array([steps, windows, len(sides), max(sides), sum(side**2 for side in sides)])
        assert before is None or (now <= before).all()
        assert [key for key in less if less[key] != choices[key]] == [k for k in less if less[k].reason[:4] == "why,"]
        before = now
    assert (sides, windows) == ((353,), 64)
    assert steps == 100


def test_sliding_windows_have_the_shapes_of_objects():
    shares = {"small": (0.05, 20), "middle": (0.2, 1), "large": (0.7, 1)}
    shapes = values(images(40, shares))["proposals.shapes"]
    for shape, wanted in zip(np.array(shapes), (0.05, 0.2, 0.7), strict=True):
        np.testing.assert_allclose(shape, wanted, rtol=0.12)
    ((width, height),) = values(images(1, {"one": (0.3, 1)}))["proposals.shapes"]
    assert width == height == pytest.approx(0.3, rel=0.1)


def test_wide_and_high_objects_give_wide_and_high_shapes():
    ratios = np.exp(np.linspace(-1, 1, 999))
    shapes = np.array(choose_shapes(np.full(999, 0.3), ratios, np.ones(999)))
    np.testing.assert_allclose(np.sqrt(shapes.prod(axis=1)), 0.3, rtol=0.01)
    np.testing.assert_allclose(shapes[:, 0] / shapes[:, 1], np.exp([-2 / 3, 0, 2 / 3]), rtol=0.05)
    assert choose_shapes(np.full(3, 1e-4), np.ones(3), np.ones(3)) == ((0.001, 0.001),)
