"""A small residual network of one's own, trained, evaluated and loaded again: by import path and as an object."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from own_networks import SmallResidual
from small_run import SmallRun, merged, run_command, small_config, small_settings, write_config
from torch import nn

from sppnet import SPPDetector, read_image
from sppnet.artifacts import write_tensors
from sppnet.errors import BackboneError
from sppnet.models.sppnet import build_head
from sppnet.pipeline.evaluation import evaluate_run
from sppnet.pipeline.training import Training, train_detector

OWN = {"module": "own_networks:residual"}


def windows_of(run: SmallRun) -> Path:
    return run.config.proposals.import_from[0]


def stages(root: Path) -> set[str]:
    return {path.name for path in root.glob("*-*")}


def test_a_network_named_in_a_configuration_is_trained_evaluated_and_loaded(
    small_run: SmallRun, tmp_path: Path
) -> None:
    settings = merged(small_settings(small_run.devkit, windows_of(small_run)), {"backbone": OWN})
    file, root = write_config(tmp_path / "own.yaml", settings), tmp_path / "run"
    plan = run_command("train", file, "--run", root, "--dry-run")
    assert plan.status == 0, plan
    assert not root.exists()
    assert run_command("train", file, "--run", root).status == 0
    assert run_command("eval", root).status == 0
    again = run_command("train", root / "config.yaml", "--run", root, "--dry-run")
    assert again.status == 0
    assert "run " not in again.out.replace("reuse", "")
    detector = SPPDetector.load(root)
    assert (detector.backbone.geometry.stride, detector.backbone.channels) == (8, 12)
    image = read_image(next((small_run.devkit / "SHAPES" / "JPEGImages").glob("test*")))
    assert detector.detect(image).classes == detector.classes


def test_a_network_given_in_python_is_trained_and_must_be_given_again(small_run: SmallRun, tmp_path: Path) -> None:
    config, module, root = small_config(small_run.devkit, windows_of(small_run)), SmallResidual(), tmp_path / "run"
    trained = train_detector(config, root, progress=False, backbone=module)
    assert trained is not None
    assert trained.config.backbone.module == "object"
    evaluation = evaluate_run(root, backbone=module).result.evaluation
    assert evaluation is not None
    loaded = SPPDetector.load(root, backbone=SmallResidual())  # weights come from the folder
    image = read_image(next((small_run.devkit / "SHAPES" / "JPEGImages").glob("test*")))
    windows = trained.proposer(image)
    assert torch.equal(
        torch.from_numpy(loaded.score(loaded.embed(image), windows)),
        torch.from_numpy(trained.score(trained.embed(image), windows)),
    )
    with pytest.raises(BackboneError, match=r"SPPDetector\.load\(run, backbone=module\)"):
        SPPDetector.load(root)
    other = SmallResidual()
    other.stem = nn.Conv2d(3, 12, 7)
    cases = (
        (nn.Conv2d(3, 4, 3), "module.weight, module.bias, module."),
        (other, "module.stem.weight, module.stem.bias;"),
    )
    for wrong, names in cases:
        with pytest.raises(
            BackboneError, match=r"backbone\.safetensors: the weights do not fit this network, at " + names
        ):
            SPPDetector.load(root, backbone=wrong)
    assert run_command("eval", root).status == 2


def test_maps_belong_to_the_weights_of_the_network(small_run: SmallRun, tmp_path: Path) -> None:
    config, module = small_config(small_run.devkit, windows_of(small_run)), SmallResidual()

    def folders() -> dict[str, str]:
        return Training(config, tmp_path, torch.device("cpu"), module=module).graph.digests

    before = folders()
    assert folders() == before
    module.stem.weight.data[0, 0, 0, 0] += 1
    after = folders()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"maps", "finetune", "low_rank", "embed", "svm", "boxes", "thresholds"}


def test_a_network_that_is_another_one_at_every_call_is_refused(small_run: SmallRun, tmp_path: Path) -> None:
    settings = merged(small_settings(small_run.devkit, windows_of(small_run)), {"backbone.name": None})
    settings["backbone"] = {"module": "own_networks:different"}
    result = run_command("train", write_config(tmp_path / "own.yaml", settings), "--run", tmp_path / "run")
    assert result.status == 2
    assert "backbone.module=own_networks:different: expected the same network at every call" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [("own_networks:classifier", "got torch.float32 of shape"), ("nowhere:f", "cannot import it")],
)
def test_a_dry_run_says_what_is_wrong_with_a_network(
    small_run: SmallRun, tmp_path: Path, path: str, message: str
) -> None:
    settings = merged(small_settings(small_run.devkit, windows_of(small_run)), {"backbone": {"module": path}})
    result = run_command("train", write_config(tmp_path / "own.yaml", settings), "--dry-run")
    assert result.status == 2
    assert f"backbone.module={path}: " in result.err
    assert message in result.err


@pytest.mark.parametrize("start", ["random", "checkpoint"])
def test_input_norm_leaves_what_a_trained_fc6_computes(small_run: SmallRun, tmp_path: Path, start: str) -> None:
    """fc6 was trained on features of another scale; scaling these must not change what it gives."""
    changes = {
        "random": {},
        "checkpoint": {"head__init": "checkpoint", "head__checkpoint": str(tmp_path / "head.safetensors")},
    }
    config = small_config(small_run.devkit, windows_of(small_run), **changes[start])
    trained = build_head(128, config.pyramid.levels, 6, config.head, seed=9)
    trained.input_scale.fill_(3.0)
    write_tensors(tmp_path / "head.safetensors", {f"head.{k}": t for k, t in trained.state_dict().items()})
    training = Training(config, tmp_path, torch.device("cpu"), progress=False)
    for stage in ("proposals", "maps"):
        training.perform(training.graph.status(stage))
    started, scaled = training.networks.started_head(), training.networks.initial_head()
    assert float(scaled.input_scale) != pytest.approx(float(started.input_scale), rel=0.1)
    pooled = torch.rand(5, started.fc6.in_features)
    same = torch.allclose(started.features(pooled, "fc6"), scaled.features(pooled, "fc6"), rtol=1e-4, atol=1e-5)
    assert same == (start != "random")
