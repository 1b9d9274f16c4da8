"""Full-image features: what a naive forward gives, of length 1; the folder that is skipped, written and classified."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import picture
from PIL import Image
from small_classifier import config_of
from torch.nn.functional import adaptive_max_pool2d

from sppnet.classification.classifier import Classifier
from sppnet.classification.features import folder_features, image_features, open_classifier
from sppnet.cli import main
from sppnet.config_files import dump_config
from sppnet.errors import SppnetError
from sppnet.images import prepare, scaled_size
from sppnet.models.sppnet import build_head

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of one colour, and ten of noise."""
    for number in range(10):
        for name, pixels in (("flat", np.full((50, 70, 3), 10 * number)), ("noisy", picture(60, 52, number))):
            path = tmp_path / "data" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "data"


def naive(classifier: Classifier, pixels: torch.Tensor, layer: str) -> np.ndarray:
    """Level by level, layer by layer, then over its length."""
    network, head = classifier.network, classifier.network.head
    with torch.no_grad():
        (cells,) = network.backbone(pixels)
        x = torch.cat([adaptive_max_pool2d(cells, n).reshape(-1) for n in network.levels])
        for name in {"pool": (), "fc6": ("fc6",), "fc7": ("fc6", "fc7")}[layer]:
            linear = getattr(head, name)
            x = (linear.weight @ x + linear.bias).clamp(min=0)
    return (x / x.square().sum().sqrt()).numpy()


@pytest.mark.parametrize("layer", ["pool", "fc6", "fc7"])
@pytest.mark.parametrize(("size", "side", "scaled"), [((60, 91), 80, (80, 121)), ((100, 64), 64, (100, 64))])
def test_features_are_those_of_a_naive_forward_of_the_whole_image(classifier, layer, size, side, scaled):
    image, weights = picture(*size), classifier.network.backbone.weights
    assert scaled_size(size, side)[0] == scaled
    pixels = prepare(image, scaled, weights.channel_order, weights.mean, weights.std)
    found = image_features(classifier, image, layer, side)
    assert found.dtype == np.float32
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found, naive(classifier, pixels, layer), atol=2e-5)


@pytest.mark.parametrize("size", [(64, 101), (102, 64), (64, 64)])
def test_the_crop_is_the_middle_of_the_image(classifier, size):
    image = picture(*size)
    top, left = (size[0] - 64) // 2, (size[1] - 64) // 2
    middle = np.ascontiguousarray(image[top : top + 64, left : left + 64])
    found = image_features(classifier, image, side=64, crop=True)
    np.testing.assert_allclose(found, image_features(classifier, middle, side=64), atol=2e-5)


def test_a_vector_of_zeros_stays_one(classifier):
    torch.nn.init.constant_(classifier.network.head.fc7.bias, -1e6)
    assert (image_features(classifier, picture(64, 64), "fc7", 64) == 0).all()


def test_images_that_cannot_be_used_are_skipped_with_their_reason(classifier, tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.fromarray(picture(64, 64)).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    found = folder_features(classifier, paths, side=64, progress=False)
    assert found.features.shape == (2, classifier.network.backbone.channels * 5)
    assert found.places.tolist() == [0, 2]
    assert list(found.skipped) == [paths[1]]
    assert "b.png: expected a complete image" in found.skipped[paths[1]]
    with pytest.raises(SppnetError, match=r"none of 1 can be used: .*b\.png"):
        folder_features(classifier, [paths[1]], progress=False)


def test_a_configuration_gives_the_pool_features_of_its_backbone_alone(classifier, tmp_path):
    path = tmp_path / "backbone.yaml"
    path.write_text(dump_config(config_of()))
    alone, image = open_classifier(path, CPU), picture(70, 80)
    np.testing.assert_array_equal(image_features(alone, image, side=64), image_features(classifier, image, side=64))
    for layer in ("fc6", "fc7"):
        with pytest.raises(SppnetError, match=rf"layer={layer}: .*, got a backbone alone; .*head.init"):
            image_features(alone, image, layer, 64)


def test_a_head_from_a_checkpoint_gives_its_own_features(classifier, run, tmp_path):
    head = {"fc6": 12, "fc7": 8, "init": "checkpoint", "checkpoint": str(run / "classifier/weights.safetensors")}
    path = tmp_path / "headed.yml"
    path.write_text(dump_config(config_of(head=head)))
    opened, image = open_classifier(path, CPU), picture(70, 80)
    np.testing.assert_array_equal(
        image_features(opened, image, "fc7", 64), image_features(classifier, image, "fc7", 64)
    )


def test_the_head_of_imagenet_gives_features_too(tmp_path, monkeypatch):
    own = build_head(4, (6,), 2, config_of().head)  # stands for the file
    monkeypatch.setattr("sppnet.models.sppnet.torchvision_state", lambda name: {"name": name})
    monkeypatch.setattr("sppnet.classification.classifier.build_backbone", lambda *_: _Channels())
    loaded = []
    monkeypatch.setattr("sppnet.models.sppnet.load_pretrained_fc", lambda *given: loaded.append(given[1:]))
    path = tmp_path / "alexnet.yaml"
    head = {"fc6": 12, "fc7": 8, "init": "imagenet"}
    path.write_text(dump_config(config_of(backbone={"name": "alexnet"}, head=head, pyramid={"levels": [6]})))
    head = open_classifier(path, CPU).network.head
    assert loaded == [({"name": "alexnet"}, "alexnet", 4, (6,))]
    assert head.fc6.weight.shape == own.fc6.weight.shape


class _Channels(torch.nn.Module):
    name, channels = "alexnet", 4


def test_the_command_writes_features_paths_labels_and_classes(run, folder, tmp_path, capsys):
    command = ["classify", "features", str(run), str(folder), "--side", "64", "--out", str(tmp_path / "o/f.npz")]
    assert main(command) == 0
    assert "20 features of length" in capsys.readouterr().out
    (folder / "noisy" / "3.png").write_bytes(b"no picture")
    assert main([*command, "--layer", "fc6"]) == 1
    assert "noisy/3.png: expected an image" in capsys.readouterr().err
    with np.load(tmp_path / "o/f.npz", allow_pickle=False) as written:
        assert written["features"].shape == (19, 12)
        assert written["labels"].tolist() == [0] * 10 + [1] * 9
        assert written["classes"].tolist() == ["flat", "noisy"]
        assert [Path(path).parent.name for path in written["paths"]] == ["flat"] * 10 + ["noisy"] * 9


def test_the_command_linear_tells_the_classes_of_a_folder_apart(run, folder, tmp_path, capsys):
    command = ["classify", "linear", str(run), str(folder), "--side", "64", "--json", str(tmp_path / "result.json")]
    assert main([*command, "--train-images", "6"]) == 0
    said = capsys.readouterr().out
    assert "mean   1.0000 ± 0.0000" in said
    assert "6 images a class train, 10 splits, 20 images; pool at a shorter side of 64" in said
    assert json.loads((tmp_path / "result.json").read_text())["mean"] == 1
    assert main(command) == 2
    assert "class flat: expected more than 30 images, got 10; add images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["features", "{run}", "{data}", "--out", "f.npy"], r"f.npy: expected the name of a .npz file"),
        (["features", "{data}", "{data}", "--out", "f.npz"], "expected the run of a classifier"),
        (["features", "{run}", "{run}", "--out", "f.npz"], "no image in this folder"),
        (["features", "{run}", "none", "--out", "f.npz"], "there is no such folder"),
        (["linear", "{run}", "{data}", "--classes", "flat"], "--classes: .* holds a folder for each class"),
        (["linear", "{run}", "{data}", "--train-images", "10"], "class flat: expected more than 10 images"),
        (["linear", "none.yaml", "{data}"], "none.yaml: cannot read the configuration"),
        (["strongest", "{run}", "{data}", "--filter", "9999", "--out", "s.png"], "filter 9999: expected one of"),
        (["strongest", "{run}", "{data}", "--filter", "0", "--out", "s.txt"], "expected the name of a .png file"),
    ],
)
def test_what_cannot_be_done_is_an_error_with_the_next_step(
    run, folder, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["classify", *(word.format(run=run, data=folder) for word in arguments)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not list(tmp_path.glob("*.npz"))
