"""The R-CNN that the benchmark compares with computes what R-CNN computes."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doubles import picture, random_trunk

from sppnet.images import prepare
from sppnet.network import winograd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import rcnn
import rcnn_peer
from rcnn_peer import RCNN, SIDE, Layout, fully_connected, normalised, whole_pixels

WINDOWS = np.array([[0, 0, 60, 40], [10, 5, 11, 6], [3, 7, 40, 39], [0, 0, 1, 40], [59, 39, 60, 40]], np.int64)


def peer(trunk, layout=None, dtype=torch.float32, threads=1):
    torch.manual_seed(0)
    return RCNN(trunk, fully_connected(trunk.channels, 16, 4), dtype, layout or Layout(batch=5), threads)


def direct(trunk, network, image):
    """The whole network on one prepared image (1, 3, 227, 227), by the trunk's own forward."""
    with torch.inference_mode():
        return network.fully_connected(F.max_pool2d(trunk(image), 3, 2).flatten(1)).numpy()


@pytest.fixture(scope="module")
def alexnet():
    return random_trunk("alexnet")


@pytest.mark.parametrize("threads", [1, 3])
def test_a_warped_window_is_the_resized_crop(alexnet, threads):
    pixels = normalised(picture(40, 60), alexnet.weights)
    warped = peer(alexnet, threads=threads).warp(pixels, WINDOWS)
    for row, (x1, y1, x2, y2) in enumerate(WINDOWS.tolist()):
        crop = torch.from_numpy(pixels[y1:y2, x1:x2]).permute(2, 0, 1)[None]
        naive = F.interpolate(crop, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)
        assert torch.allclose(warped[row], naive[0], atol=1e-3), row


@pytest.mark.parametrize(("name", "layout"), [("alexnet", Layout()), ("zf5", Layout(False))])
def test_a_window_of_the_whole_image_scores_as_the_network_does(name, layout):
    trunk, image = random_trunk(name), picture(SIDE, SIDE)
    network = peer(trunk, layout)
    scores, split = network.score(image, np.array([[0, 0, SIDE, SIDE]], np.float64))
    weights = trunk.weights
    expected = direct(trunk, network, prepare(image, (SIDE, SIDE), "rgb", weights.mean, weights.std))
    assert np.allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert split.total == pytest.approx(split.maps + split.windows + split.head)


def test_windows_of_several_batches_score_as_one_by_one(alexnet):
    image, boxes = picture(40, 60), WINDOWS.astype(np.float64)
    network = peer(alexnet, Layout(batch=2))
    alone = np.concatenate([network.score(image, box[None])[0] for box in boxes])
    together = network.score(image, boxes)[0]
    assert np.allclose(together, alone, rtol=1e-3, atol=1e-4 * np.abs(alone).max())
    assert np.ptp(alone, axis=0).min() > 0


def test_convolutions_by_tiles_give_the_same_scores(alexnet):
    image, boxes = picture(40, 60), WINDOWS.astype(np.float64)
    with mock.patch.object(winograd, "convolve", wraps=winograd.convolve) as ran:
        exact = peer(alexnet, Layout(batch=5)).score(image, boxes)[0]
        assert not ran.called
        tiles = peer(alexnet, Layout(batch=5, tiles=True)).score(image, boxes)[0]
        assert ran.called
    assert np.allclose(tiles, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("tiles", [False, True])
def test_the_sweep_of_layouts_is_with_tiles_or_without(alexnet, monkeypatch, tiles):
    monkeypatch.setattr(rcnn_peer, "BATCHES", (8,))
    with mock.patch.object(winograd, "convolve", wraps=winograd.convolve) as ran:
        layout, report = rcnn_peer.fastest_layout(alexnet, torch.float32, 8, tiles)
    assert ran.called == tiles
    assert ("tiles" in f"{layout} {report}") == tiles == layout.tiles


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_scores_are_close_to_those_in_float32(alexnet, autocast):
    image, boxes = picture(40, 60), WINDOWS.astype(np.float64)
    exact = peer(alexnet).score(image, boxes)[0]
    reduced = peer(alexnet, Layout(batch=5, autocast=autocast), torch.bfloat16).score(image, boxes)[0]
    assert 0 < rcnn.difference(reduced, exact) < rcnn.TOLERANCE


def test_windows_are_rounded_to_pixels_inside_the_image():
    boxes = np.array([[-3, -2, 70.0, 50], [9.6, 4.4, 9.7, 4.5], [60, 40, 61, 41]])
    assert whole_pixels(boxes, (40, 60)).tolist() == [[0, 0, 60, 40], [10, 4, 11, 5], [59, 39, 60, 40]]


def test_our_scores_are_the_detectors_and_reduced_ones_agree():
    detector = rcnn.random_detector("alexnet", width=16, classes=4)
    image, boxes = picture(40, 60), WINDOWS.astype(np.float64)
    plain, reduced = (rcnn.with_settings(detector, (64, 96), kind) for kind in ("float32", "bfloat16"))
    scores, split = rcnn.score_image(plain, image, boxes)
    assert np.array_equal(scores, plain.score(plain.embed(image), boxes))
    assert min(split) > 0
    assert 0 < rcnn.difference(rcnn.score_image(reduced, image, boxes)[0], scores) < rcnn.TOLERANCE


def test_a_split_that_no_longer_fits_the_detector_is_an_error(monkeypatch):
    detector = rcnn.with_settings(rcnn.random_detector("alexnet", width=16, classes=4), (64,), "float32")
    monkeypatch.setattr(rcnn, "WINDOW_CALLS", (*rcnn.WINDOW_CALLS, (rcnn.window_features, "pool_cells")))
    with pytest.raises(RuntimeError, match="made no call to pool_cells; name in WINDOW_CALLS"):
        rcnn.score_image(detector, picture(40, 60), WINDOWS.astype(np.float64))


def test_a_reduced_variant_that_disagrees_is_noticed(capsys):
    scores = np.arange(6, dtype=np.float32).reshape(3, 2)
    exact = rcnn.Variant("exact", lambda: (scores, rcnn.Split(1, 1, 1)))
    close = replace(exact, name="close", run=lambda: (scores + 0.01, rcnn.Split(1, 1, 1)), like="exact")
    wrong = replace(close, name="wrong", run=lambda: (scores + np.float32(1), rcnn.Split(1, 1, 1)))
    broken = replace(close, name="broken", run=lambda: (scores * np.float32(np.nan), rcnn.Split(1, 1, 1)))
    assert rcnn.check([exact, close])
    assert not rcnn.check([exact, wrong])
    assert not rcnn.check([exact, broken])
    assert "scores of wrong and exact: DISAGREE, largest difference 20.00% of their range" in capsys.readouterr().out


def test_windows_that_are_not_there_are_an_error_with_a_next_step(tmp_path, monkeypatch):
    monkeypatch.setenv("SPPNET_SHARED", str(tmp_path))
    with pytest.raises(SystemExit, match=r"VOC2007\.npz: no such file; correct SPPNET_SHARED, or unset it"):
        rcnn.example(10)
    monkeypatch.delenv("SPPNET_SHARED")
    assert (rcnn.example(10).origin, rcnn.example(10).windows.shape) == ("random boxes", (10, 4))


def test_ratios_are_taken_pair_by_pair(capsys):
    splits = {"a": [rcnn.Split(4, 0, 0), rcnn.Split(0, 9, 0)], "b": [rcnn.Split(1, 1, 0), rcnn.Split(1, 1, 1)]}
    rcnn.print_table(splits, [("a", "b")])
    assert "b than a" in (out := capsys.readouterr().out)
    assert out.rstrip().endswith("2.5   2.0 3.0")


def test_every_variant_has_its_pair(monkeypatch):
    monkeypatch.setattr(rcnn, "fastest_layout", lambda *_: (Layout(), "not swept"))
    options = Namespace(
        rcnn_windows=2, windows=4, scales="both", fc=8, ranks=[2, 2], threads=1, precisions=["float32", "bfloat16"]
    )
    what = rcnn.Example(picture(40, 60), WINDOWS.astype(np.float64), "a test")
    variants, pairs = rcnn.variants_of("alexnet", what, options)
    names = [variant.name for variant in variants]
    assert len(names) == len(set(names)) == 11
    assert {name for pair in pairs for name in pair} == set(names)
    assert {variant.like for variant in variants} - {None} <= set(names)
    assert ("R-CNN bfloat16", "ours reduced, 5 scales") in pairs
    assert ("R-CNN float32, our convolutions", "ours thin float32, 1 scale") in pairs
