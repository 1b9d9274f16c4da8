"""The scripts in examples/ do what they say."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from doubles import random_backbone
from PIL import Image

from sppnet.artifacts import read_tensors
from sppnet.images import scaled_size

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def run(tmp_path: Path, small_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs an example in a folder with a photo and a trained run; returns what it prints."""
    shutil.copytree(small_run.root / "detector", tmp_path / "runs/demo/detector")
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8))
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "photo.jpg", tmp_path / "photos" / "one.jpg"):
        small.resize((160, 120)).save(path)
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_there_are_eight_and_each_fits_a_screen() -> None:
    names = ["classifier", "detector", "draw_windows", "evaluate", "pretrain", "spp_and_aspp", "svms", "windows"]
    assert names == NAMES
    assert [name for name in NAMES if len((EXAMPLES / f"{name}.py").read_text().splitlines()) > 40] == []


def test_a_classifier_takes_pictures_of_sizes_it_has_not_seen(run: Any) -> None:
    correct = [int(share) for share in re.findall(r"(\d+)% correct", run("classifier"))]
    assert len(correct) == 4
    assert min(correct) >= 90


def test_windows_of_a_network_of_ones_own(run: Any) -> None:
    said = run("windows", "photo.jpg")
    assert "stride 16" in said
    assert re.search(r"a map of \(256, 25, 34\), vectors \(\d+, 12800\)", said)


def test_a_detector_in_a_loop(run: Any) -> None:
    said = run("detector", "runs/demo", "photos")
    assert re.search(r"one\.jpg: \d found", said)
    assert "middle: most like" in said
    assert Path("photos/one.found.png").is_file()


def test_a_detector_starts_from_a_classifier_of_its_own_objects(run: Any, small_run: Any) -> None:
    settings = yaml.safe_load((small_run.root / "config.yaml").read_text())
    Path("own.yaml").write_text(yaml.safe_dump(settings))
    assert "next: sppnet eval runs/own" in run("pretrain", "own.yaml", "runs/own")
    learned, backbone = (
        read_tensors(Path("runs/own") / path)
        for path in ("crops/classifier/weights.safetensors", "detector/backbone.safetensors")
    )
    assert all(
        torch.equal(tensor, learned[f"backbone.{name}"])
        for name, tensor in backbone.items()
        if "num_batches" not in name
    )
    assert not torch.equal(backbone["conv1.conv.weight"], random_backbone().state_dict()["conv1.conv.weight"])


def test_own_features_to_svms(run: Any) -> None:
    said = run("svms")
    label, own, other = re.search(r"is a (\w+), and scores \[(\S+), (\S+)\]", said).groups()  # type: ignore[union-attr]
    scores = {"cat": float(own), "dog": float(other)}
    best = float(re.search(r"best other window scores (\S+)", said).group(1))  # type: ignore[union-attr]
    assert scores[label] == max(scores.values()) > max(best, 0)


def test_the_boxes_of_another_detector(run: Any) -> None:
    said = run("evaluate")
    assert "11point" in said
    assert "over 2 of 2 classes, coco at IoU 0.5 to 0.95" in said
    assert re.search(r"background +1 +0\.0000  cat \(1\)", said)
    assert "cat: recall [1. 1.] precision [1.  0.5]" in said  # the difficult cat is neither


def test_spp_gives_a_vector_of_one_length_and_aspp_a_map_of_the_same_size(run: Any) -> None:
    found = re.findall(r"map \(256, (\d+), (\d+)\), SPP \((\d+),\), ASPP \(64, (\d+), (\d+)\)", run("spp_and_aspp"))
    assert [each[:2] for each in found] == [each[3:] for each in found] == [("14", "14"), ("12", "12"), ("23", "32")]
    assert {each[2] for each in found} == {str(256 * 50)}


def test_windows_of_a_map_drawn(run: Any) -> None:
    assert "windows on a map of 25 × 33 cells" in run("draw_windows", "photo.jpg", "windows.png")
    with Image.open("windows.png") as drawn:
        assert drawn.size == (320, 120)


@pytest.mark.parametrize(("size", "cells"), [((480, 640), "25 × 33"), ((375, 500), "25 × 33"), ((400, 231), "43 × 25")])
def test_the_map_drawn_has_the_size_of_that_of_vgg16(run: Any, size: tuple[int, int], cells: str) -> None:
    scaled = scaled_size(size, 400)[0]
    assert random_backbone("vgg16").map_size(scaled) == tuple(map(int, cells.split(" × ")))
    Image.new("RGB", size[::-1], "grey").save("flat.png")
    assert f"on a map of {cells} cells" in run("draw_windows", "flat.png", "windows.png")


@pytest.mark.parametrize("name", ["detector", "draw_windows", "pretrain", "windows"])
@pytest.mark.parametrize("given", [(), ("one", "two", "three")])
def test_a_script_without_its_arguments_says_which(run: Any, name: str, given: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match=f"python examples/{name}.py "):
        run(name, *given)
