"""Compression: the nearest layers of a rank, in a detector that is saved, loaded and tested like any other."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import annotated, random_maps
from pipeline import (
    SmallRun,
    copied,
    merged,
    modified,
    random_windows,
    refused,
    run_command,
    small_settings,
)

import sppnet
from sppnet.config import HeadSettings
from sppnet.config_files import ConfigError, dump_config, parse_config
from sppnet.detection import compression, finetuning, training
from sppnet.detection.compression import compress_detector, compress_run, sample_responses
from sppnet.detection.detector import SPPDetector
from sppnet.detection.finetuning import FinetuneError
from sppnet.detection.low_rank import (
    CompressionError,
    Responses,
    compress_head,
    describe_layers,
    draw_windows,
    energy_kept,
    factorise,
    linear_responses,
    principal_directions,
    variance_kept,
)
from sppnet.detection.plan import RunPlan, load_run_data, windows_folder
from sppnet.detection.proposals import read_windows
from sppnet.detection.training import Training, train_detector
from sppnet.detection.window_features import FrozenHead, WindowCells, pool_cells, window_cells
from sppnet.network.sppnet import SPPHead, build_head
from sppnet.records import ImageRecord
from sppnet.store import StoreError

LEVELS = (1, 2, 3)
FC6, FC7 = 12, 7  # ranks of `head()`, below the largest useful ones


def random_matrix(*size: int, seed: int = 0) -> torch.Tensor:
    """Singular values that fall, as those of a trained layer do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator) * 0.8 ** torch.arange(size[1])


def head(seed: int = 0) -> SPPHead:
    """42 pooled features -> 20 -> 16, with weights and biases that matter."""
    made = build_head(3, LEVELS, 4, HeadSettings(fc6=20, fc7=16), seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    made.input_scale.fill_(0.5)
    return made


def of_rank(made: SPPHead, fc6: int, fc7: int) -> SPPHead:
    """The same head with weights that have these ranks exactly."""
    with torch.no_grad():
        for layer, rank in ((made.fc6, fc6), (made.fc7, fc7)):
            u, s, vt = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(u[:, :rank] * s[:rank] @ vt[:rank])
    return made


def pooled(count: int = 30) -> torch.Tensor:
    return torch.randn(count, 42, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run(small_run, tmp_path) -> SmallRun:
    return copied(small_run, tmp_path / "run")


# ---- the factors ---------------------------------------------------------------------------------------------------

SIZES = [(8, 30), (30, 8), (12, 12)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_product_of_the_factors_is_that_of_the_truncated_svd(size, rank):
    weight = random_matrix(*size)
    first, second = factorise(weight, rank)
    assert (first.shape, second.shape) == ((rank, size[1]), (size[0], rank))
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank] @ vt[:rank]).float()
    torch.testing.assert_close(second @ first, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_is_the_tail_of_the_singular_values_and_the_energy_their_head(size, rank):
    weight = random_matrix(*size).double()
    first, second = factorise(weight, rank)
    squares = torch.linalg.svdvals(weight).square()
    assert float((weight - second @ first).square().sum()) == pytest.approx(float(squares[rank:].sum()))
    assert energy_kept(weight, first, second) == pytest.approx(float(squares[:rank].sum() / squares.sum()))


@pytest.mark.parametrize("size", SIZES)
def test_the_full_rank_gives_the_matrix_back(size):
    weight = random_matrix(*size)
    first, second = factorise(weight, min(size))
    torch.testing.assert_close(second @ first, weight, rtol=1e-5, atol=1e-6)
    assert energy_kept(weight, first, second) == pytest.approx(1)


def test_singular_values_over_six_decades_lose_nothing_in_float32():
    """Gram matrices square them, to twelve decades; float64 has sixteen."""
    u, v = (torch.linalg.qr(random_matrix(40, 40, seed=seed).double())[0] for seed in (1, 2))
    values = torch.logspace(0, -6, 40, dtype=torch.float64)
    weight = (u * values) @ v.T
    first, second = factorise(weight, 39)
    assert float(torch.linalg.matrix_norm(weight - second @ first)) == pytest.approx(float(values[-1]), rel=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_the_second_factor_is_of_orthonormal_directions_of_the_outputs(size):
    second = factorise(random_matrix(*size).double(), 5)[1]
    torch.testing.assert_close(second.T @ second, torch.eye(5, dtype=torch.float64))


def test_a_layer_of_zeros_keeps_its_zeros():
    first, second = factorise(torch.zeros(5, 9), 2)
    assert torch.equal(second @ first, torch.zeros(5, 9))
    assert energy_kept(torch.zeros(5, 9), first, second) == 1


# ---- by what fc6 answers -------------------------------------------------------------------------------------------


def answers(made: SPPHead, count: int = 200) -> torch.Tensor:
    """fc6 before its rectification, of pooled features that lie near a space of a few dimensions, away from zero."""
    generator = torch.Generator().manual_seed(2)
    space = torch.randn(6, 42, generator=generator)
    features = torch.randn(count, 6, generator=generator) @ space + 0.1 * torch.randn(count, 42, generator=generator)
    return linear_responses(made, features + 3).detach()


def test_answers_in_few_directions_survive_a_rank_at_which_the_weights_do_not():
    whole = head()
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(100, 6, generator=generator) @ torch.randn(6, 42, generator=generator)
    by_answers = compress_head(whole, 6, 0, linear_responses(whole, features).detach())
    with torch.no_grad():
        expected = whole.features(features, "fc7")
        torch.testing.assert_close(by_answers.features(features, "fc7"), expected, rtol=1e-3, atol=1e-3)
        assert float((compress_head(whole, 6, 0).features(features, "fc7") - expected).abs().max()) > 0.1


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_no_other_layer_of_the_rank_comes_closer_to_the_answers(rank):
    """The best approximation of the centred answers is their truncated SVD."""
    whole = head()
    given = answers(whole)
    thin = compress_head(whole, rank, 0, given)
    mean = given.mean(0)
    u, s, vt = torch.linalg.svd((given - mean).double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank] @ vt[:rank]).float() + mean
    found = torch.nn.functional.linear((given - whole.fc6.bias) @ thin.fc6.weight, thin.fc6.weight, thin.fc6.bias)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    kept = float(s[:rank].square().sum() / s.square().sum())
    assert variance_kept(whole, thin, given)["fc6"] == pytest.approx(kept, abs=1e-5)


def test_the_thin_layers_give_the_approximated_answers_to_pooled_features():
    whole, features = head(), pooled(50)
    given = linear_responses(whole, features).detach()
    thin = compress_head(whole, 9, 5, given)
    mean, directions = principal_directions(given, 9)
    with torch.no_grad():
        approximated = ((given.double() - mean) @ directions @ directions.T + mean).float()
        torch.testing.assert_close(linear_responses(thin, features), approximated, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(thin.features(features, "fc6"), approximated.relu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ranks", [(13, 0), (0, 8), (13, 8), (4, 3)])
def test_the_variance_that_is_kept_is_that_of_the_heads_themselves(ranks):
    whole, features = head(), pooled(60)
    given = linear_responses(whole, features).detach()
    thin = compress_head(whole, *ranks, given)
    kept = variance_kept(whole, thin, given)
    with torch.no_grad():
        for name in ("fc6", "fc7"):
            inputs = [features * 0.5 if name == "fc6" else made.features(features, "fc6") for made in (whole, thin)]
            own = [run_layers(made.products(name), x) for made, x in zip((whole, thin), inputs, strict=True)]
            lost = (own[0] - own[1]).square().sum() / (own[0] - own[0].mean(0)).square().sum()
            assert kept[name] == pytest.approx(1 - float(lost), abs=1e-4)


def run_layers(layers, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def test_fc7_can_be_compressed_after_fc6_by_answers_too():
    whole = head()
    given = answers(whole)
    once = compress_head(whole, fc6=9, responses=given)
    again = compress_head(once, fc7=4, responses=given)
    assert again.ranks == {"fc6": 9, "fc7": 4}
    assert variance_kept(once, again, given)["fc6"] == pytest.approx(1)


def test_constant_answers_are_kept_whole():
    whole = head()
    given = torch.ones(30, 20)
    thin = compress_head(whole, 2, 0, given)
    assert variance_kept(whole, thin, given)["fc6"] == 1
    assert torch.isfinite(thin.fc6.weight).all()


def test_fewer_answers_than_directions_are_refused():
    whole = head()
    with pytest.raises(CompressionError, match=r"5 windows of training images cannot tell 6 directions apart; take m"):
        compress_head(whole, 6, 0, answers(whole, 5))
    with pytest.raises(ValueError, match="expected a rank from 1 to 5 for 5 responses of 20 numbers, got 6; sample mo"):
        principal_directions(answers(whole, 5), 6)


def test_windows_are_drawn_half_close_to_objects_and_the_same_again():
    record = ImageRecord("TOY/1", Path("none.jpg"), (200, 200), "0", annotated(("cat", (10, 10, 60, 60))))
    rng = np.random.default_rng(0)
    near = np.array([10, 10, 60, 60]) + rng.integers(-4, 5, (20, 4))
    far = np.array([100, 100, 150, 150]) + rng.integers(-4, 5, (30, 4))
    windows = np.concatenate([near, far]).astype(np.float32)

    def drawn(count: int, classes: tuple[str, ...] = ("cat",)) -> np.ndarray:
        return draw_windows(record, windows, classes, count, np.random.default_rng(1))

    assert len(drawn(16)) == len(np.unique(drawn(16), axis=0)) == 16
    assert (drawn(16)[:, 0] < 80).sum() >= 8
    assert (drawn(16)[:, 0] < 80).sum() < 16  # half of them, and what else is drawn
    assert np.array_equal(drawn(16), drawn(16))
    assert len(drawn(500)) == 50  # all there are
    assert (drawn(48)[:, 0] < 80).sum() in range(18, 21)  # no more objects than there are
    assert len(drawn(16, ("dog",))) == 16  # no object of these classes
    bare = dataclasses.replace(record, annotation=None)
    assert len(draw_windows(bare, windows, ("cat",), 16, np.random.default_rng(1))) == 16
    assert draw_windows(record, windows[:0], ("cat",), 16, np.random.default_rng(1)).shape == (0, 4)


def test_answers_are_those_of_the_runs_own_windows_and_the_same_again(run):
    detector = SPPDetector.load(run.root)
    sampled = sample_responses(detector, run.root, images=5, windows=60, progress=False)
    width = detector.head.fc6.out_features
    assert sampled.chosen.shape == (48, width)
    assert sampled.held_out.shape == (12, width)  # of the fifth image
    again = sample_responses(detector, run.root, images=5, windows=60, progress=False)
    assert torch.equal(again.chosen, sampled.chosen)
    assert torch.equal(again.held_out, sampled.held_out)
    assert len(sample_responses(detector, run.root, images=99, windows=80, progress=False).chosen) == 7 * 10  # 8 images
    record = load_run_data(detector.config).train[0]
    windows = read_windows(windows_folder(run.root, detector.config.proposals), record)
    own = draw_windows(record, windows, detector.classes, 12, np.random.default_rng(0))
    maps = detector.embed(sppnet.read_image(record.path))
    cells = window_cells(maps, own, detector.trunk.geometry, detector.config.pyramid, detector.config.maps)
    with torch.no_grad():
        rectified = detector.head.features(pool_cells(maps, cells, detector.config.pyramid.levels), "fc6")
    torch.testing.assert_close(sampled.chosen[:12].relu(), rectified)


def test_windows_that_are_not_there_are_found_again_and_nothing_is_written(run, tmp_path):
    shutil.copytree(run.root / "detector", tmp_path / "bare/detector")
    detector = SPPDetector.load(run.root)
    expected = sample_responses(detector, run.root, 5, 60, progress=False)
    before = modified(tmp_path / "bare")
    imported = sample_responses(detector, tmp_path / "bare", 5, 60, progress=False)
    assert torch.equal(imported.chosen, expected.chosen)
    proposals = detector.config.proposals.model_copy(update={"import_from": ()})
    config = detector.config.model_copy(update={"proposals": proposals})
    searched = sample_responses(dataclasses.replace(detector, config=config), tmp_path / "bare", 2, 20, progress=False)
    assert searched.chosen.shape == (20, detector.head.fc6.out_features)
    assert modified(tmp_path / "bare") == before


def test_every_fifth_image_is_held_out_and_an_image_without_windows_is_one():
    rows = [torch.full((count, 2), float(number)) for number, count in enumerate((1, 0, 2, 1, 3, 1, 1, 1, 1, 2))]
    made = Responses.of_images(rows, 2)
    assert made.chosen[:, 0].tolist() == [0, 2, 2, 3, 5, 6, 7, 8]
    assert made.held_out[:, 0].tolist() == [4, 4, 4, 9, 9]
    assert Responses.of_images([], 7).chosen.shape == (0, 7)


def test_what_is_kept_is_measured_on_other_windows_where_there_are_any():
    whole = head()
    given, other = answers(whole, 40), linear_responses(whole, pooled(60)).detach()
    thin = compress_head(whole, 6, 0, given)
    kept = {name: f"{share:.2%}" for name, share in variance_kept(whole, thin, other).items()}
    lines = describe_layers(whole, thin, Responses(given, other))
    assert (
        lines["fc6"] == f"fc6 (42 -> 20): rank 6 keeps {kept['fc6']} of the variance of its answers to 60 other windows"
    )
    assert lines["fc7"] == "fc7 (20 -> 16): whole"
    alone = describe_layers(whole, thin, Responses(given, other[:0]))["fc6"]
    assert f"{variance_kept(whole, thin, given)['fc6']:.2%}" in alone


def test_without_training_images_the_weights_can_still_be_compressed(run, tmp_path):
    shutil.copytree(run.root / "detector", tmp_path / "moved")
    path = tmp_path / "moved/detector.json"
    description = json.loads(path.read_text())
    description["config"]["data"]["root"] = str(tmp_path / "gone")
    path.write_text(json.dumps(description))
    message = refused("compress", tmp_path / "moved", "--fc7", 5)
    assert "gone: no such data folder" in message
    assert message.endswith("--method weights needs no images")
    assert run_command("compress", tmp_path / "moved", "--fc7", 5, "--method", "weights").status == 0


# ---- the head ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [{"fc6": FC6}, {"fc7": FC7}, {"fc6": FC6, "fc7": FC7}], ids=str)
def test_layers_that_have_the_rank_already_compute_the_same(ranks):
    whole = of_rank(head(), FC6, FC7)
    thin = compress_head(whole, **ranks)
    assert thin.ranks == ranks
    with torch.no_grad():
        for layer in ("pool", "fc6", "fc7"):
            torch.testing.assert_close(thin.features(pooled(), layer), whole.features(pooled(), layer))
        torch.testing.assert_close(thin(pooled()), whole(pooled()))


def test_lower_ranks_are_two_products_without_a_nonlinearity_between():
    whole = head()
    thin = compress_head(whole, 5, 4)
    with torch.no_grad():
        hidden = 0.5 * pooled()
        for linear, rank in ((whole.fc6, 5), (whole.fc7, 4)):
            u, s, vt = torch.linalg.svd(linear.weight)
            weight = u[:, :rank] * s[:rank] @ vt[:rank]
            hidden = torch.relu(hidden @ weight.T + linear.bias)
        torch.testing.assert_close(thin.features(pooled(), "fc7"), hidden, rtol=1e-4, atol=1e-5)


def test_the_original_head_stays_as_it_is_and_shares_nothing():
    whole = head()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    thin = compress_head(whole, FC6, 0)
    with torch.no_grad():
        for parameter in thin.parameters():
            parameter.add_(1)
    assert whole.ranks == {}
    assert whole.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())


def test_compression_leaves_the_random_numbers_of_others_alone():
    state = torch.random.get_rng_state()
    compress_head(head(), FC6, FC7)
    assert torch.equal(torch.random.get_rng_state(), state)


MAPS = random_maps((8, 9), (15, 14), sides=(96.0, 192.0), image_size=(120, 100))


def cells(count: int) -> WindowCells:
    """Windows on either map, some of them of one cell."""
    rng = np.random.default_rng(count)
    corner = rng.integers(0, 4, (count, 2))
    return WindowCells(np.arange(count) % 2, np.concatenate([corner, corner + rng.integers(1, 5, (count, 2))], axis=1))


@pytest.mark.parametrize("layer", ["pool", "fc6", "fc7"])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_frozen_compressed_head_computes_what_the_head_does(layer, count):
    thin = compress_head(head(), FC6, FC7)
    features = FrozenHead(thin, LEVELS).features(MAPS, cells(count), layer)
    with torch.no_grad():
        expected = thin.features(pool_cells(MAPS, cells(count), LEVELS), layer)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    rough = FrozenHead(thin, LEVELS, "bfloat16").features(MAPS, cells(count), layer)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, features, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("ranks", [{}, {"fc6": FC6, "fc7": FC7}], ids=str)
def test_a_frozen_head_does_not_follow_any_later_change(ranks):
    made = compress_head(head(), **ranks) if ranks else head()
    frozen = FrozenHead(made, LEVELS)
    before = frozen.features(MAPS, cells(9), "fc7")
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.mul_(2)
    assert torch.equal(frozen.features(MAPS, cells(9), "fc7"), before)


def test_ranks_up_to_the_one_that_saves_work_are_taken():
    """fc7 of 20 inputs and 16 outputs: 320 products whole, 36 a rank, so 8 saves work and 9 does not."""
    assert compress_head(head(), fc7=8).ranks == {"fc7": 8}
    for rank in (9, 16, 17, 10**9):
        with pytest.raises(
            CompressionError, match=rf"rank {rank} of fc7: expected 1 to 8, the largest rank that saves work"
        ):
            compress_head(head(), fc7=rank)
    with pytest.raises(
        CompressionError, match=r"rank -1 of fc6: expected 1 to 13, .*42 inputs and 20 outputs; 0 leaves it"
    ):
        compress_head(head(), fc6=-1)


def test_a_square_rank_that_costs_as_much_as_the_layer_is_refused():
    made = build_head(3, LEVELS, 4, HeadSettings(fc6=16, fc7=16))
    with pytest.raises(CompressionError, match="rank 8 of fc7: expected 1 to 7"):  # 8 · (16 + 16) = 16 · 16
        compress_head(made, fc7=8)


def test_a_layer_too_small_for_any_rank_is_named():
    tiny = build_head(3, (1,), 4, HeadSettings(fc6=9, fc7=1))
    with pytest.raises(CompressionError, match=r"fc7 \(9 -> 1\) is too small to compress; leave it whole"):
        compress_head(tiny, fc7=1)


@pytest.mark.parametrize("ranks", [(None, None), (0, 0), (None, 0)])
def test_at_least_one_layer_must_be_named(ranks):
    with pytest.raises(CompressionError, match="no layer to compress; give --fc6 RANK, --fc7 RANK or both"):
        compress_head(head(), *ranks)


def test_a_compressed_layer_is_not_compressed_again():
    once = compress_head(head(), fc6=5)
    with pytest.raises(CompressionError, match="fc6 is compressed already, to rank 5; compress the one it was"):
        compress_head(once, fc6=3)
    assert compress_head(once, fc7=4).ranks == {"fc6": 5, "fc7": 4}


# ---- the detector --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(6, 5), (6, 0), (0, 5)])
@pytest.mark.parametrize("method", ["responses", "weights"])
def test_a_compressed_run_is_loaded_as_it_was_made(run, ranks, method):
    detector = SPPDetector.load(run.root)
    done = compress_run(run.root, *ranks, method=method)
    assert (done.responses is None) == (method == "weights")
    again = SPPDetector.load(done.folder)
    assert again.head.ranks == {name: rank for name, rank in zip(("fc6", "fc7"), ranks, strict=True) if rank}
    assert json.loads((done.folder / "detector/detector.json").read_text())["ranks"] == again.head.ranks
    expected = compress_detector(detector, *ranks, done.responses and done.responses.chosen)
    assert again.digest() == expected.digest() != detector.digest()
    assert again.config == detector.config
    image = sppnet.read_image(run.devkit / "SHAPES/JPEGImages/test_00000.jpg")
    windows = random_windows(image.shape[:2], np.zeros((0, 4)), np.random.default_rng(1), 40)
    maps = detector.embed(image)
    scores = detector.score(maps, windows)
    assert np.array_equal(again.score(maps, windows), expected.score(maps, windows))
    assert not np.array_equal(again.score(maps, windows), scores)
    assert all(map(torch.equal, again.regressors.to_tensors().values(), detector.regressors.to_tensors().values()))


def test_a_detector_with_layers_of_low_rank_scores_the_same_compressed(run):
    detector = SPPDetector.load(run.root)
    of_rank(detector.head, 6, 5)
    image = sppnet.read_image(run.devkit / "SHAPES/JPEGImages/test_00000.jpg")
    windows = random_windows(image.shape[:2], np.zeros((0, 4)), np.random.default_rng(1), 40)
    maps = detector.embed(image)
    thin = compress_detector(detector, 6, 5)
    np.testing.assert_allclose(thin.score(maps, windows), detector.score(maps, windows), rtol=1e-3, atol=1e-4)


def test_whole_detectors_are_described_as_before(run):
    assert "ranks" not in json.loads((run.root / "detector/detector.json").read_text())


@pytest.mark.parametrize("ranks", [7, None, [6], {"fc6": "6"}, {"fc6": 0}, {"fc6": True}, {"fc6": 5}, {}])
def test_damaged_ranks_are_refused(run, ranks):
    folder = compress_run(run.root, fc6=6).folder
    path = folder / "detector/detector.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ranks": ranks}))
    with pytest.raises(StoreError, match=r"detector\.json: damaged, or from another version of sppnet"):
        SPPDetector.load(folder)


def test_layers_that_the_detector_does_not_use_are_not_compressed(run):
    detector = SPPDetector.load(run.root)
    for layer, names, used in (
        ("pool", ("fc6", "fc7"), "pool features"),
        ("fc6", ("fc7",), "fc6 and pool features"),
    ):
        svm = detector.config.svm.model_copy(update={"layer": layer})
        object.__setattr__(detector, "config", detector.config.model_copy(update={"svm": svm}))
        for name in names:
            with pytest.raises(
                CompressionError, match=f"{name} is not used by this detector, which takes {used}; leave out --{name}"
            ):
                compress_detector(detector, **{name: 5})
    assert compress_detector(detector, fc6=5).head.ranks == {"fc6": 5}


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_the_run_stays_as_it_is_and_its_windows_are_not_searched_again(run, tmp_path):
    before = modified(run.root)
    folder = compress_run(run.root, 6, 5, tmp_path / "thin").folder
    assert modified(run.root) == before
    windows = {path for path in before if path.startswith("propose-") and path.endswith(".npz")}
    assert windows
    assert {path for path in modified(folder) if not path.startswith("detector/")} == windows
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_windows_are_copied_where_they_cannot_be_linked(run, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr(compression.os, "link", refuse)
    folder = compress_run(run.root, 6, 5, tmp_path / "thin").folder
    for path in folder.glob("propose-*/**/*.npz"):
        assert path.read_bytes() == (run.root / path.relative_to(folder)).read_bytes()
    assert len(list(folder.glob("propose-*/**/*.npz"))) == len(list(run.root.glob("propose-*/**/*.npz"))) > 0


def test_an_interrupted_compression_leaves_no_folder_and_can_be_repeated(run, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compression, "_share_windows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress_run(run.root, 6, 5, tmp_path / "thin")
    assert not (tmp_path / "thin").exists()
    compress_run(run.root, 6, 5, tmp_path / "thin")
    assert SPPDetector.load(tmp_path / "thin").head.ranks == {"fc6": 6, "fc7": 5}


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_taken(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert compress_run(run.root, 6, 5, tmp_path / "empty").folder == tmp_path / "empty"
    (tmp_path / "file").touch()
    for taken in (tmp_path / "empty", run.root, tmp_path / "file"):
        with pytest.raises(CompressionError, match=rf"{taken.name}: exists already; delete it or choose another --out"):
            compress_run(run.root, 6, 5, taken)


def test_the_detector_folder_alone_can_be_compressed(run, tmp_path):
    shutil.copytree(run.root / "detector", tmp_path / "elsewhere")
    for method in ("weights", "responses"):  # whose windows come from the imported file again
        folder = compress_run(tmp_path / "elsewhere", fc7=5, out=tmp_path / method, method=method).folder
        assert SPPDetector.load(folder).head.ranks == {"fc7": 5}


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        ("responses", r"keeps -?\d+\.\d\d% of the variance of its answers to \d+ other windows"),
        ("weights", r"keeps \d+\.\d\d% of the energy \(squared singular values\)"),
    ],
)
def test_the_command_says_what_was_kept_and_what_is_saved(run, method, kept):
    inputs = SPPDetector.load(run.root).head.fc6.in_features
    options = ("--fc6", 6, "--fc7", 5, "--device", "cpu", "--method", method)
    result = run_command("compress", run.root, *options)
    folder = run.root / "compressed-fc6-6-fc7-5"
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert re.fullmatch(rf"fc6 \({inputs} -> 16\): rank 6 {kept}", lines[0])
    assert re.fullmatch(rf"fc7 \(16 -> 16\): rank 5 {kept}", lines[1])
    whole, thin = 16 * (inputs + 16), 6 * (inputs + 16) + 5 * 32
    assert lines[2] == f"fc6 and fc7: {whole + 32:,} -> {thin + 32:,} parameters"
    assert lines[3] == f"{whole:,} -> {thin:,} multiply-adds a window, {whole / thin:.1f} times fewer"
    assert lines[4] == f"compressed detector in {folder}; next: sppnet eval {folder}"


def test_a_layer_left_out_or_zero_stays_whole(run):
    for options, name in ((["--fc7", 5], "compressed-fc7-5"), (["--fc6", 0, "--fc7", 4], "compressed-fc7-4")):
        result = run_command("compress", run.root, *options)
        assert "-> 16): whole\n" in result.out
        assert set(SPPDetector.load(run.root / name).head.ranks) == {"fc7"}


def test_eval_and_detect_take_the_compressed_folder_for_a_run(run, tmp_path):
    run_command("compress", run.root, "--fc6", 6, "--fc7", 5, "--out", tmp_path / "thin")
    before = modified(run.root)
    result = run_command("eval", tmp_path / "thin")
    assert result.status == 0, result.err
    assert result.out.startswith("windows: 38 an image")  # those that were imported for the run
    assert (tmp_path / "thin/results/SHAPES-test/metrics.json").is_file()
    picture = run.devkit / "SHAPES/JPEGImages/test_00000.jpg"
    assert run_command("detect", tmp_path / "thin", picture, "--out", tmp_path / "found").status == 0
    assert (tmp_path / "found/detections.json").is_file()
    assert modified(run.root) == before


def test_mistakes_on_the_command_line_are_named(run, tmp_path):
    assert refused("compress", run.root) == "no layer to compress; give --fc6 RANK, --fc7 RANK or both"
    assert refused("compress", run.root, "--fc7", 8).startswith("rank 8 of fc7: expected 1 to 7, the largest rank")
    assert refused("compress", run.root, "--fc7", 5, "--images", 0) == "--images 0: expected at least 1"
    assert "none: no such folder" in refused("compress", tmp_path / "none", "--fc7", 5)
    assert refused("compress", run.root, "--fc7", 5, "--out", run.root).endswith("choose another --out")


# ---- as a stage of training ----------------------------------------------------------------------------------------


TUNED = {"compress__steps": [2, 2], "compress__learning_rates": [0.01, 0.001], "finetune__validate_every": 2}


def with_ranks(run, fc6: int = 6, fc7: int = 5, **changes):
    dotted = {"compress.fc6": fc6, "compress.fc7": fc7, "compress.images": 5, "compress.windows": 60}
    dotted |= {"compress.steps": [], "compress.learning_rates": []}  # the thin layers stay as they were chosen
    dotted |= {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged(small_settings(run.devkit, run.config.proposals.import_from[0]), dotted), "test")


def test_svms_are_trained_on_the_features_of_a_head_that_was_compressed_before(run):
    whole = SPPDetector.load(run.root)
    detector = train_detector(with_ranks(run), run.root, progress=False)
    again = SPPDetector.load(run.root)
    assert again.head.ranks == {"fc6": 6, "fc7": 5}
    assert again.digest() == detector.digest()
    assert torch.equal(again.regressors.weight, whole.regressors.weight)  # of pooled features: not fitted again
    responses = sample_responses(whole, run.root, 5, 60, progress=False)
    expected = compress_head(whole.head, 6, 5, responses.chosen)
    for name, tensor in expected.state_dict().items():  # maps were stored in half precision
        torch.testing.assert_close(again.head.state_dict()[name].abs(), tensor.abs(), rtol=0.1, atol=0.05)
    assert not torch.equal(again.detectors.weight, whole.detectors.weight)
    summary = json.loads(next(run.root.glob("compress-*/summary.json")).read_text())
    assert re.fullmatch(
        r"fc6 \(\d+ -> 16\): rank 6 keeps .*% of the variance of its answers to 12 other windows", summary["fc6"]
    )


def test_a_compressed_training_is_resumed_and_undone_without_anything_done_twice(run, caplog):
    train_detector(with_ranks(run), run.root, progress=False)
    before = modified(run.root)
    with caplog.at_level("INFO", logger="sppnet"):
        train_detector(with_ranks(run), run.root, progress=False)
    assert "compress: reused" in caplog.text
    stages = {name: when for name, when in modified(run.root).items() if "-" in name.split("/")[0]}
    assert stages == {name: when for name, when in before.items() if name in stages}
    train_detector(run.config, run.root, progress=False)
    assert SPPDetector.load(run.root).head.ranks == {}


def test_ranks_that_save_no_work_end_training_before_it_begins(run):
    before = modified(run.root)
    with pytest.raises(CompressionError, match="rank 8 of fc7: expected 1 to 7, the largest rank that saves work"):
        train_detector(with_ranks(run, 6, 8), run.root, progress=False)
    assert modified(run.root) == before


def test_ranks_count_only_where_features_of_the_layers_are_wanted(run):
    data = load_run_data(run.config)

    def ranks(**changes) -> dict[str, int]:
        return RunPlan(run.root, with_ranks(run, **changes), data).ranks

    assert ranks() == {"fc6": 6, "fc7": 5}
    assert ranks(fc7=0) == ranks(svm__layer="fc6", fc7=0) == {"fc6": 6}
    assert ranks(svm__layer="fc6") == {"fc6": 6}  # nothing is wanted of fc7
    assert ranks(svm__layer="pool") == {}
    assert ranks(svm__layer="pool", boxes__layer="fc7") == {"fc6": 6, "fc7": 5}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("finetune__seed", 1),
        ("svm__finetuned", False),
        ("maps__scales", [96]),
        ("data__train_on_difficult", False),
        ("proposals__min_side", 30),
        ("pyramid__projection", "paper"),
        ("compress__images", 4),
        ("compress__windows", 50),
        ("compress__seed", 1),
        ("compress__fc6", 4),
    ],
)
def test_whatever_the_thin_layers_rest_on_makes_others_and_other_svms(run, setting, value):
    data = load_run_data(run.config)
    plan, changed = (
        RunPlan(run.root, with_ranks(run), data),
        RunPlan(run.root, with_ranks(run, **{setting: value}), data),
    )
    assert changed.compress != plan.compress
    assert changed.svm != plan.svm
    assert plan.svm != RunPlan(run.root, run.config, data).svm


@pytest.mark.parametrize("changed", [{"compress__steps": [2, 3]}, {"compress__learning_rates": [0.01, 0.1]}], ids=str)
def test_another_schedule_makes_other_thin_layers(run, changed):
    data = load_run_data(run.config)
    plan, other = (RunPlan(run.root, with_ranks(run, **(TUNED | own)), data) for own in ({}, changed))
    assert other.compress != plan.compress
    assert other.svm != plan.svm


def test_every_phase_needs_a_learning_rate(run):
    with pytest.raises(ConfigError, match=r"compress.*steps has 2 phases but learning_rates has 1"):
        with_ranks(run, compress__steps=[1, 2], compress__learning_rates=[0.1])


def test_a_schedule_that_is_not_followed_makes_no_other_thin_layers(run):
    data = load_run_data(run.config)
    own = {"svm__finetuned": False}
    plan, other = (RunPlan(run.root, with_ranks(run, **own, **more), data) for more in ({}, TUNED))
    assert other.compress == plan.compress


def test_svm_settings_leave_the_thin_layers_as_they_are(run):
    data = load_run_data(run.config)
    plan, changed = (RunPlan(run.root, with_ranks(run, **own), data) for own in ({}, {"svm__C": 1.0}))
    assert changed.compress == plan.compress
    assert changed.svm != plan.svm


def test_a_layer_that_stays_whole_is_not_spoken_of(run):
    train_detector(with_ranks(run, fc7=0), run.root, progress=False)
    (summary,) = run.root.glob("compress-*/summary.json")
    assert list(json.loads(summary.read_text())) == ["fc6"]
    assert SPPDetector.load(run.root).head.ranks == {"fc6": 6}


def test_another_seed_draws_other_windows(run):
    heads = []
    for seed in (0, 1):
        train_detector(with_ranks(run, compress__seed=seed), run.root, progress=False)
        heads.append(SPPDetector.load(run.root).head.fc6.weight)
    assert not torch.equal(*heads)


def test_a_pretrained_trunk_is_compressed_too(run, tmp_path):
    config = with_ranks(run, pretrain__enabled=True, pretrain__steps=2, pretrain__batch=4, pretrain__sizes=[32])
    train_detector(config, tmp_path / "new", progress=False)
    assert SPPDetector.load(tmp_path / "new").head.ranks == {"fc6": 6, "fc7": 5}


def test_too_few_windows_for_a_rank_end_training_before_it_begins(run):
    with pytest.raises(CompressionError, match=r"compress\.windows=10 cannot tell 6 directions apart; raise it"):
        train_detector(with_ranks(run, compress__windows=10), run.root, progress=False)


def test_a_dry_run_says_that_a_rank_would_be_refused(run, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(with_ranks(run, 6, 8)))
    result = run_command("train", path, "--run", run.root, "--dry-run")
    assert result.status == 1
    assert "rank 8 of fc7: expected 1 to 7" in result.err
    assert result.err.rstrip().endswith("training would end there")


def test_a_head_that_is_not_fine_tuned_can_be_compressed_too(run):
    config = with_ranks(run, svm__finetuned=False, compress__steps=[3], compress__learning_rates=[0.01])
    train_detector(config, run.root, progress=False)
    assert SPPDetector.load(run.root).head.ranks == {"fc6": 6, "fc7": 5}
    (folder,) = run.root.glob("compress-*")
    assert {path.name for path in folder.iterdir()} == {"head.safetensors", "summary.json"}  # nor are its thin layers


def test_the_thin_layers_are_fine_tuned_from_where_they_were_chosen(run, caplog):
    train_detector(with_ranks(run, finetune__validate_every=2), run.root, progress=False)
    chosen, before = SPPDetector.load(run.root).head, {*run.root.glob("compress-*")}
    with caplog.at_level("INFO", logger="sppnet"):
        train_detector(with_ranks(run, **TUNED), run.root, progress=False)
    tuned = SPPDetector.load(run.root).head
    assert tuned.ranks == {"fc6": 6, "fc7": 5}
    for name, tensor in tuned.named_parameters():
        start = chosen.state_dict()[name]
        assert not torch.equal(tensor, start)
        assert (tensor - start).norm() < start.norm()
    (folder,) = {*run.root.glob("compress-*")} - before
    rows = (folder / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "2", "4"]
    assert [row.split(",")[-1] for row in rows[1:]] == ["0.01", "0.001"]
    assert {path.name for path in folder.iterdir()} == {"head.safetensors", "summary.json", "log.csv", "tensorboard"}
    assert re.search(r"compress: fc6 .* rank 6 .*; fc7 .* rank 5 .*; 4 steps, 0 of them from before; best", caplog.text)


def test_what_an_interruption_left_beside_complete_thin_layers_is_deleted(run, monkeypatch):
    write = training.write_tensors

    def interrupted(path, tensors):
        write(path, tensors)
        if path.parent.name.startswith("compress") and path.name == "head.safetensors":
            raise KeyboardInterrupt

    train_detector(with_ranks(run, **TUNED), run.root, only=("finetune",), progress=False)
    monkeypatch.setattr(training, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_detector(with_ranks(run, **TUNED), run.root, progress=False)
    (folder,) = run.root.glob("compress-*")
    left = {"checkpoint.safetensors", "chosen.safetensors"}
    assert {path.name for path in folder.iterdir()} >= left
    monkeypatch.setattr(training, "write_tensors", write)
    train_detector(with_ranks(run, **TUNED), run.root, progress=False)
    assert not {path.name for path in folder.iterdir()} & left


def test_a_rate_at_which_the_thin_layers_diverge_is_named(run):
    changes = {**TUNED, "compress__learning_rates": [1e30, 1e30]}
    with pytest.raises(FinetuneError, match=r"lower compress\.learning_rates"):
        train_detector(with_ranks(run, **changes), run.root, progress=False)


def test_an_interrupted_tuning_goes_on_from_where_it_was(run, tmp_path, monkeypatch, caplog):
    other = copied(run, tmp_path / "other")
    train_detector(with_ranks(other, **TUNED), other.root, progress=False)
    validate = finetuning._Trainer.validate

    def interrupted(self, step, *others):
        row = validate(self, step, *others)
        if step == 2:
            raise KeyboardInterrupt
        return row

    train_detector(with_ranks(run, **TUNED), run.root, only=("finetune",), progress=False)
    monkeypatch.setattr(finetuning._Trainer, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_detector(with_ranks(run, **TUNED), run.root, progress=False)
    monkeypatch.setattr(finetuning._Trainer, "validate", validate)
    stages = Training(with_ranks(run, **TUNED), run.root, torch.device("cpu"), progress=False).status()
    (status,) = (status for status in stages if status.name == "compress")
    assert not status.complete
    assert status.checkpoint is not None
    assert status.checkpoint.name == "chosen.safetensors"
    monkeypatch.setattr("sppnet.detection.training.compress_head", None)  # ranks are not chosen again
    with caplog.at_level("INFO", logger="sppnet"):
        train_detector(with_ranks(run, **TUNED), run.root, progress=False)
    assert "compress: the directions chosen before are reused" in caplog.text
    assert "4 steps, 2 of them from before" in caplog.text
    found, expected = (SPPDetector.load(own.root).head.state_dict() for own in (run, other))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
