"""Views are classified on maps and as crops, runs are averaged, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_run import refused, run_command
from torch import nn

from sppnet.backbones.backbone import build_backbone
from sppnet.backbones.windows import project_windows
from sppnet.classification.classifier import Classifier, build_network
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.testing import classify_image, evaluate_classifiers, load_classifiers, views_of
from sppnet.classification.views import View, list_views
from sppnet.config import BackboneSettings
from sppnet.data.class_folder import read_class_folder
from sppnet.errors import SppnetError
from sppnet.images import scaled_size
from sppnet.models.sppnet import SPPNet, build_head
from sppnet.ops.pyramid import spatial_pyramid_pool

CLASSES = ("cat", "dog", "owl", "pig", "rat", "yak")
SIDES = {"side": 56, "min_side": 64}  # of the small network below


def make_classifier(seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Classifier:
    config = ClassifierConfig.model_validate({
        "precision": "float32",
        "backbone": {"name": "tiny5", "weights": {"source": "random"}},
        "pyramid": {"levels": [1, 2, 3]},
        "head": {"fc6": 16, "fc7": 16},
        "training": {"sizes": [48, 56], "min_side": 64, "seed": seed},
    })  # fmt: skip
    network = build_network(config, len(classes))
    generator = torch.Generator().manual_seed(seed)
    for layer in (network.head.fc6, network.head.fc7, network.head.classifier):  # so that classes differ
        torch.nn.init.normal_(layer.weight, std=0.3, generator=generator)
    return Classifier(network.requires_grad_(False).eval(), classes, config)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier()


def picture(seed: int, size: tuple[int, int] = (70, 100)) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))


def mean_softmax(classifier: Classifier, pooled: list[torch.Tensor]) -> np.ndarray:
    rows = [classifier.network.head(one).double().softmax(1).numpy()[0] for one in pooled]
    return np.mean(rows, axis=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, name in enumerate(CLASSES[:4]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(picture(2 * place + number)).save(tmp_path / f"images/{name}/{number}.png")
    return tmp_path / "images"


# one image


@pytest.mark.parametrize("size", [(70, 100), (100, 70), (64, 64), (20, 31)])
def test_the_whole_image_is_pooled_from_the_whole_map(classifier: Classifier, size: tuple[int, int]) -> None:
    image = picture(1, size)
    views = list_views("full", size, **SIDES)
    pixels = classifier.runtime.prepare(image, scaled_size(size, 64)[0])
    logits = [classifier.network(pixels), classifier.network(pixels.flip(3))]
    expected = np.mean([one.double().softmax(1).numpy()[0] for one in logits], axis=0)
    np.testing.assert_allclose(classify_image(classifier, image, views), expected, atol=1e-5)
    np.testing.assert_allclose(classify_image(classifier, image, views, on_maps=False), expected, atol=1e-5)


def test_cells_that_look_outside_of_the_image_are_of_the_whole_map_too() -> None:
    """Two cells at the left and at the top see padding alone, and the projection of the image leaves them out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.ZeroPad2d((8, 0, 8, 0)), nn.Conv2d(3, 4, 3, 4))
    levels, image, settings = (1, 2), picture(5), BackboneSettings(module="object", weights={"source": "random"})
    config = ClassifierConfig(precision="float32", backbone=settings, head={"fc6": 8, "fc7": 8})
    head = build_head(4, levels, len(CLASSES), config.head)
    for layer in (head.fc6, head.fc7, head.classifier):
        torch.nn.init.normal_(layer.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    network = SPPNet(build_backbone(settings, module=module), levels, head).requires_grad_(False).eval()
    padded = Classifier(network, CLASSES, config)
    pixels = padded.runtime.prepare(image, scaled_size(image.shape[:2], 64)[0])
    maps = [network.backbone(each) for each in (pixels, pixels.flip(3))]
    expected = mean_softmax(padded, [spatial_pyramid_pool(each, levels) for each in maps])
    found = classify_image(padded, image, list_views("full", image.shape[:2], **SIDES))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 0.01


def test_multiview_on_maps_is_a_loop_over_views(classifier: Classifier) -> None:
    image = picture(2)
    views = list_views("multiview", image.shape[:2], **SIDES)
    backbone, levels, pooled = classifier.network.backbone, classifier.network.levels, []
    for view in views:  # each with maps of its own, cropped
        size, _ = scaled_size(image.shape[:2], view.scale)
        pixels = classifier.runtime.prepare(image, size)
        x1, y1, x2, y2 = view.box
        if view.flip:
            pixels, x1, x2 = pixels.flip(3), size[1] - x2, size[1] - x1
        own = backbone(pixels)
        cells, box = own.shape[2:], np.array([[x1, y1, x2, y2]])
        left, top, right, bottom = project_windows(box, size, min(size), backbone.geometry, tuple(cells))[0]
        if view.box == (0, 0, size[1], size[0]):
            left, top, right, bottom = 0, 0, cells[1], cells[0]
        pooled.append(spatial_pyramid_pool(own[..., top:bottom, left:right], levels))
    found = classify_image(classifier, image, views)
    np.testing.assert_allclose(found, mean_softmax(classifier, pooled), atol=1e-5)
    assert np.ptp(found) > 0.01
    assert found.sum() == pytest.approx(1)


def test_crops_are_a_loop_over_views(classifier: Classifier) -> None:
    image = picture(3)
    views = list_views("multiview", image.shape[:2], **SIDES)
    rows = []
    for view in views:
        pixels = classifier.runtime.prepare(image, scaled_size(image.shape[:2], view.scale)[0])
        x1, y1, x2, y2 = view.box
        crop = pixels[..., y1:y2, x1:x2]
        rows.append(classifier.network(crop.flip(3) if view.flip else crop).double().softmax(1).numpy()[0])
    found = classify_image(classifier, image, views, on_maps=False)
    np.testing.assert_allclose(found, np.mean(rows, axis=0), atol=1e-5)
    on_maps = classify_image(classifier, image, views)
    assert np.abs(found - on_maps).max() > 1e-3  # a crop sees padding where the map saw the image


def test_a_mirrored_image_has_the_classes_of_its_mirrored_views(classifier: Classifier) -> None:
    image, view = picture(4), View(64, (3, 5, 59, 61), True)
    mirrored = View(64, (91 - 59, 5, 91 - 3, 61), False)
    for on_maps in (True, False):
        found = classify_image(classifier, image, [view], on_maps)
        expected = classify_image(classifier, np.ascontiguousarray(image[:, ::-1]), [mirrored], on_maps)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("on_maps", [True, False])
def test_a_mean_image_is_warped_to_what_is_shown_and_never_mirrored(tmp_path: Path, on_maps: bool) -> None:
    mean = np.random.default_rng(0).uniform(0, 255, (3, 40, 50)).astype(np.float32)
    np.save(tmp_path / "mean.npy", mean)
    weights = {"source": "random", "mean_image": tmp_path / "mean.npy", "std": (50, 60, 80)}
    config = ClassifierConfig(
        precision="float32",
        backbone={"name": "tiny5", "weights": weights},
        pyramid={"levels": [1, 2]},
        head={"fc6": 16, "fc7": 16},
    )
    backbone = build_backbone(config.backbone)
    head = build_head(backbone.channels, (1, 2), len(CLASSES), config.head)
    for layer in (head.fc6, head.fc7, head.classifier):
        torch.nn.init.normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    network = SPPNet(backbone, (1, 2), head).requires_grad_(False).eval()
    image, std = picture(6, (64, 90)), torch.tensor((50.0, 60, 80))[:, None, None]
    views = list_views("full" if on_maps else "ten", (64, 90), **SIDES)
    expected = []
    for view in views:
        x1, y1, x2, y2 = view.box
        shown = image[y1:y2, x1:x2, ::1][:, :: -1 if view.flip else 1]
        warped = F.interpolate(torch.from_numpy(mean)[None], shown.shape[:2], mode="bilinear", align_corners=False)[0]
        pixels = (torch.tensor(shown.copy()).permute(2, 0, 1).float() - warped) / std
        expected.append(network(pixels[None]).double().softmax(1).numpy()[0])
    found = classify_image(Classifier(network, CLASSES, config), image, views, on_maps)
    np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=1e-5)
    assert np.ptp(found) > 0.01


def test_views_go_with_the_training(classifier: Classifier) -> None:
    assert views_of(classifier, "ten", (70, 100)) == list_views("ten", (70, 100), 56, 64)


# a folder


@pytest.mark.parametrize("views", ["centre", "ten", "full", "multiview"])
def test_several_runs_are_the_mean_of_their_softmaxes(folder: Path, classifier: Classifier, views: str) -> None:
    others = [classifier, make_classifier(1)]
    images = read_class_folder(folder, CLASSES)
    alone = [evaluate_classifiers([each], images, views, progress=False).probabilities for each in others]
    result = evaluate_classifiers(others, images, views, progress=False)
    np.testing.assert_allclose(result.probabilities, np.mean(alone, axis=0))
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    wrong = result.probabilities.argmax(1) != result.labels
    assert result.top1_error == wrong.mean()
    shares = {name: wrong[images.labels == place].mean() for place, name in enumerate(CLASSES[:4])}
    assert result.class_errors == {**shares, "rat": None, "yak": None}


def test_runs_of_other_classes_are_refused(tmp_path: Path, run: Path) -> None:
    orders = {"more": (*CLASSES, "zebra"), "order": CLASSES[::-1]}
    for name, classes in orders.items():
        make_classifier(0, classes).save(tmp_path / name)
    with pytest.raises(SppnetError, match=r"run, .*more: expected runs of the same classes, but 'zebra'"):
        load_classifiers([run, tmp_path / "more"], torch.device("cpu"))
    with pytest.raises(SppnetError, match=r"order: expected runs of the same classes, but their order differs"):
        load_classifiers([run, tmp_path / "order"], torch.device("cpu"))
    with pytest.raises(SppnetError, match=r"expected different runs; name each once"):
        load_classifiers([run, run.parent / "." / run.name], torch.device("cpu"))


# the commands


def test_the_command_prints_and_writes_the_errors(tmp_path: Path, run: Path, folder: Path) -> None:
    make_classifier(1).save(tmp_path / "other")
    written_to = tmp_path / "a" / "r.json"
    runs = run, tmp_path / "other"
    result = run_command("classify", "test", *runs, folder, "--views", "ten", "--json", written_to)
    assert (result.status, result.err) == (0, "")
    written = json.loads(written_to.read_text())
    classifiers = load_classifiers(runs, torch.device("cpu"))
    own = evaluate_classifiers(classifiers, read_class_folder(folder, CLASSES), "ten", progress=False)
    assert list(written) == ["views", "top1_error", "top5_error", "classes", "images", "seconds", "skipped"]
    assert (written["views"], written["images"], written["skipped"]) == ("ten", 8, [])
    assert (written["top1_error"], written["top5_error"]) == (own.top1_error, own.top5_error)
    assert written["classes"] == own.class_errors
    assert written["seconds"] > 0
    lines = result.out.splitlines()
    assert lines[0].endswith("images: 8 images of 6 classes, 2 runs, views ten (10 an image)")
    assert lines[1] == f"top-1 error {100 * own.top1_error:.2f} %, top-5 error {100 * own.top5_error:.2f} %"
    assert lines[2].startswith("8 images, ")
    assert lines[3] == "classes without images: rat, yak"


def test_images_that_cannot_be_used_are_skipped_and_named(run: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (1, 20_000)).save(folder / "dog" / "thread.png")
    result = run_command("classify", "test", run, folder, "--json", tmp_path / "r.json")
    assert result.status == 1
    first, second, last = result.err.splitlines()
    assert last == "2 images skipped"
    assert first.startswith(f"skipped: {folder / 'cat' / 'broken.jpg'}: expected an image")
    assert second.startswith(f"skipped: {folder / 'dog' / 'thread.png'}: an image of 1 × 20000 pixels would be scaled")
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["images"], len(written["skipped"])) == (8, 2)
    assert "\n8 images, " in result.out


def test_the_command_prints_the_three_best_classes(run: Path, folder: Path, classifier: Classifier) -> None:
    (folder / "cat" / "broken.jpg").write_bytes(b"")
    result = run_command("classify", "predict", run, folder / "cat", "--views", "multiview")
    assert result.status == 1
    assert result.err.startswith(f"skipped: {folder / 'cat' / 'broken.jpg'}: expected an image, got an empty file")
    lines = result.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(folder / "cat" / name) for name in ("0.png", "1.png")]
    found = classify_image(classifier, picture(0), list_views("multiview", (70, 100), **SIDES))
    order = np.argsort(-found)[:3]
    assert lines[0].partition(": ")[2] == ", ".join(f"{CLASSES[place]} {found[place]:.3f}" for place in order)


def test_bad_input_is_refused(run: Path, folder: Path, tmp_path: Path) -> None:
    assert "expected runs and then the folder of classes" in refused("classify", "test", folder)
    assert "expected the run of a classifier" in refused("classify", "test", folder, run)
    assert "expected the run of a classifier" in refused("classify", "predict", folder, folder)
    assert "no such folder" in refused("classify", "test", run, tmp_path / "nothing")
    assert "expected the name of a .json file" in refused("classify", "test", run, folder, "--json", folder)
    assert "no such file" in refused("classify", "predict", run, tmp_path / "nothing.jpg")
    (folder / "zebra").mkdir()
    assert "expected a class that was trained" in refused("classify", "test", run, folder)


def test_a_folder_without_usable_images_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "cat" / "a.png").write_bytes(b"")
    message = refused("classify", "test", run, tmp_path / "bad", "--json", tmp_path / "r.json")
    assert "expected images, none of 1 can be used: " in message
    assert not (tmp_path / "r.json").exists()
