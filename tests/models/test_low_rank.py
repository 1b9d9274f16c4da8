"""fc6 and fc7 of low rank: against the layers they replace and against numpy's own decomposition."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_run import copied, merged, run_command, small_settings
from torch import nn

from sppnet.config import HeadSettings
from sppnet.config_files import parse_config
from sppnet.detection.detector import SPPDetector
from sppnet.errors import SppnetError
from sppnet.images import read_image
from sppnet.models.low_rank import check_rank, fc6_activations, low_rank_head, principal_components
from sppnet.models.sppnet import SPPHead, build_head
from sppnet.pipeline.stages import STAGES
from sppnet.pipeline.training import train_detector

INPUTS, FC6, FC7 = 30, 24, 20  # 6 channels, levels 1 and 2
SETTINGS = HeadSettings(fc6=FC6, fc7=FC7)


def random_head(seed: int = 0) -> SPPHead:
    head = build_head(6, (1, 2), 4, SETTINGS, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in (head.fc6, head.fc7):
        nn.init.normal_(layer.weight, std=0.3, generator=generator)
        nn.init.normal_(layer.bias, std=0.5, generator=generator)
    head.input_scale.fill_(0.7)
    return head


def pooled(count: int = 200, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(seed)).abs()


@torch.no_grad()
def activations(head: SPPHead, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """fc6 and fc7 before their rectification, layer by layer."""
    fc6 = head.fc6(head.basis6(rows * head.input_scale))
    return {"fc6": fc6, "fc7": head.fc7(head.basis7(fc6.relu()))}


# ---- principal components ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_principal_components_are_those_of_the_singular_value_decomposition(rank):
    rows = torch.randn(500, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 10)
    mean, components = principal_components(rows, rank)
    expected = np.linalg.svd(rows.double().numpy() - rows.double().numpy().mean(0), full_matrices=False)[2][:rank]
    np.testing.assert_allclose(mean.numpy(), rows.double().mean(0).numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.abs(components.numpy().T @ expected.T), np.eye(rank), atol=1e-6)


def test_more_rows_than_a_block_give_the_same():
    rows = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 5)
    expected = np.linalg.eigh(np.cov(rows.double().numpy().T))[1][:, ::-1]
    np.testing.assert_allclose(np.abs(principal_components(rows, 4)[1].numpy().T @ expected), np.eye(4), atol=1e-6)


# ---- the head ------------------------------------------------------------------------------------------------------


def test_fc6_activations_are_those_before_the_rectification():
    head, rows = random_head(), pooled()
    torch.testing.assert_close(fc6_activations(head, rows), activations(head, rows)["fc6"])
    reduced = low_rank_head(head, {"fc6": 5}, activations(head, rows)["fc6"])
    torch.testing.assert_close(fc6_activations(reduced, rows), activations(reduced, rows)["fc6"])


@pytest.mark.parametrize("name", ["fc6", "fc7"])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_low_rank_layer_gives_the_projection_of_the_whole_layers_activations(name, rank):
    head, rows = random_head(), pooled()
    whole = activations(head, rows)
    reduced = low_rank_head(head, {name: rank}, whole["fc6"])
    mean, components = principal_components(whole[name], rank)
    expected = mean + (whole[name].double() - mean) @ components @ components.T
    torch.testing.assert_close(activations(reduced, rows)[name].double(), expected, rtol=1e-4, atol=1e-4)
    assert reduced.ranks == {name: rank}
    assert [layer.weight.shape[0] for layer in reduced.products(name)] == [rank, {"fc6": FC6, "fc7": FC7}[name]]


def test_no_other_projection_of_the_rank_comes_closer():
    head, rows = random_head(), pooled()
    whole = activations(head, rows)["fc6"]
    reduced = low_rank_head(head, {"fc6": 4}, whole)
    error = float((activations(reduced, rows)["fc6"] - whole).square().sum())
    mean = whole.double().mean(0)
    for seed in range(20):
        other = torch.linalg.qr(torch.randn(FC6, 4, generator=torch.Generator().manual_seed(seed)).double())[0]
        away = (whole.double() - mean) - (whole.double() - mean) @ other @ other.T
        assert error < float(away.square().sum())


def test_activations_of_few_dimensions_survive_their_rank():
    head, rows = random_head(), pooled()
    rows = rows[:, :3] @ torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(5))
    whole = activations(head, rows)["fc6"]
    reduced = low_rank_head(head, {"fc6": 3}, whole)
    torch.testing.assert_close(head.features(rows, "fc7"), reduced.features(rows, "fc7"), rtol=1e-3, atol=1e-3)


def test_constant_activations_are_kept_whole():
    head, rows = random_head(), pooled(1).repeat(50, 1)
    whole = activations(head, rows)["fc6"]
    reduced = low_rank_head(head, {"fc6": 1}, whole)
    torch.testing.assert_close(activations(reduced, rows)["fc6"], whole)


def test_the_given_head_stays_as_it_is_and_shares_nothing():
    head = random_head()
    before = copy.deepcopy(head.state_dict())
    reduced = low_rank_head(head, {"fc6": 4, "fc7": 3}, activations(head, pooled())["fc6"])
    with torch.no_grad():
        for parameter in reduced.parameters():
            parameter.fill_(7)
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in before.items())
    assert not head.ranks
    assert not reduced.training


def test_ranks_up_to_the_one_that_saves_work_are_taken():
    check_rank("fc6", 100, 50, 33)  # 33 · 150 < 5000
    with pytest.raises(SppnetError, match=r"low_rank\.fc6=34: expected 1 to 33, .* 100 inputs and 50 outputs; 0 keeps"):
        check_rank("fc6", 100, 50, 34)
    with pytest.raises(SppnetError, match=r"low_rank\.fc7=-1: expected 1 to 33"):
        check_rank("fc7", 100, 50, -1)
    with pytest.raises(SppnetError, match="this layer is too small for any"):
        check_rank("fc7", 2, 2, 1)


def test_fewer_windows_than_components_are_refused():
    head = random_head()
    with pytest.raises(SppnetError, match=r"4 windows .* cannot tell 5 principal components of fc6 apart; use more"):
        low_rank_head(head, {"fc6": 5}, activations(head, pooled(4))["fc6"])


# ---- in training ---------------------------------------------------------------------------------------------------


def changed(run, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged(small_settings(run.devkit, run.config.proposals.import_from[0]), dotted), "test")


RANKS = {"low_rank__fc6": 6, "low_rank__fc7": 5, "low_rank__steps": [3, 2], "low_rank__learning_rates": [0.01, 0.001]}


def test_training_with_ranks_gives_a_detector_of_low_rank_that_loads_and_detects_the_same(small_run, tmp_path, caplog):
    caplog.set_level("INFO", "sppnet")
    run = copied(small_run, tmp_path / "run")
    trained = train_detector(changed(run, **RANKS), run.root, progress=False)
    assert trained.head.ranks == {"fc6": 6, "fc7": 5}
    assert "low_rank: fc6 of rank 6, fc7 of rank 5; " in caplog.text
    assert "5 steps" in caplog.text
    again = SPPDetector.load(run.root)
    image = read_image(run.devkit / "SHAPES/JPEGImages/test_00001.jpg")
    windows = np.array([[10, 10, 90, 90], [50, 40, 150, 160], [100, 20, 180, 120]], np.float32)
    assert np.array_equal(trained.detect(image, windows).boxes, again.detect(image, windows).boxes)
    assert {path.name for path in next(run.root.glob("low_rank-*")).iterdir()} == {"head.safetensors", "log.csv"}
    assert run_command("eval", run.root, "--device", "cpu").status == 0


def test_without_a_schedule_the_layers_stay_as_they_were_chosen(small_run, tmp_path):
    run = copied(small_run, tmp_path / "run")
    config = changed(run, low_rank__fc6=6, low_rank__steps=[], low_rank__learning_rates=[])
    head = train_detector(config, run.root, progress=False).head
    assert head.ranks == {"fc6": 6}
    weight = head.fc6.weight.double()
    torch.testing.assert_close(weight.T @ weight, torch.eye(6).double(), rtol=0, atol=1e-5)  # principal components


def test_an_interrupted_tuning_goes_on_and_ends_the_same(small_run, tmp_path, monkeypatch, caplog):
    from sppnet.detection import finetuning

    caplog.set_level("INFO", "sppnet")
    whole, run = copied(small_run, tmp_path / "whole"), copied(small_run, tmp_path / "run")
    config = changed(run, **RANKS, finetune__validate_every=2)
    expected = train_detector(config, whole.root, progress=False).head.state_dict()
    original = finetuning.write_tensors

    def once(path, *rest):
        original(path, *rest)
        if "low_rank" in str(path):
            raise ZeroDivisionError

    monkeypatch.setattr(finetuning, "write_tensors", once)
    with pytest.raises(ZeroDivisionError):
        train_detector(config, run.root, progress=False)
    monkeypatch.undo()
    caplog.clear()
    found = train_detector(config, run.root, progress=False).head.state_dict()
    assert "start.safetensors is reused" in caplog.text
    assert "2 of them from before" in caplog.text
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_ranks_that_save_no_work_end_training_before_it_begins(small_run, tmp_path):
    with pytest.raises(SppnetError, match=r"low_rank\.fc6=1000: expected 1 to 15"):
        train_detector(changed(small_run, low_rank__fc6=1000), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_ranks_count_only_where_features_of_the_layers_are_wanted(small_run, tmp_path):
    config = changed(small_run, low_rank__fc6=1000, low_rank__fc7=1000, svm__layer="pool")
    assert train_detector(config, tmp_path, progress=False).head.ranks == {}


def test_a_head_that_is_not_fine_tuned_can_be_of_low_rank_too(small_run, tmp_path):
    config = changed(small_run, low_rank__fc6=6, finetune__enabled=False)
    assert train_detector(config, tmp_path, progress=False).head.ranks == {"fc6": 6}


@pytest.mark.parametrize("ranks", [{"fc6": "6"}, {"fc6": 0}, {"fc6": True}, {"fc6": 5}])
def test_damaged_ranks_are_refused(small_run, tmp_path, ranks):
    import json

    run = copied(small_run, tmp_path / "run")
    path = run.root / "detector/detector.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ranks": ranks}))
    with pytest.raises(SppnetError, match=r"detector\.json: "):
        SPPDetector.load(run.root)


def test_every_phase_needs_a_learning_rate():
    with pytest.raises(SppnetError, match="give one learning rate per phase"):
        parse_config({"low_rank": {"steps": [1]}}, "test")


def test_the_stage_comes_after_fine_tuning_and_before_the_svms():
    assert STAGES.index("finetune") < STAGES.index("low_rank") < STAGES.index("svm")
