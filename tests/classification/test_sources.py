"""What the head alone is trained on: features of whole images and of their mirror images."""

import numpy as np
import pytest
import torch
from class_pictures import write_classes
from small_classifier import config_of
from torch.nn.functional import adaptive_max_pool2d

from sppnet.classification.classifier import build_network
from sppnet.classification.dataset import epoch_batches, load_class_data
from sppnet.classification.sources import FeatureSource
from sppnet.images import prepare, read_image, scaled_size

SIZES = (64, 48)  # not in their order


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The source, its network, data and training settings."""
    folder = tmp_path_factory.mktemp("sources")
    data = {"train": write_classes(folder / "data", 6, seed=1)}
    training = {"train_backbone": False, "sizes": SIZES, "batch": 4, "seed": 3}
    config = config_of(data=data, training=training, head={"fc6": 4, "fc7": 4})
    loaded = load_class_data(config.data, folder / "run")
    network = build_network(config, 3, start=True)
    return FeatureSource(network, loaded, config, folder / "run", progress=False), network, loaded, config.training


def naive(network, path, side, mirrored):
    """The pyramid of the whole image, level by level."""
    image, weights = read_image(path), network.backbone.weights
    image = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
    pixels = prepare(image, scaled_size(image.shape[:2], side)[0], weights.channel_order, weights.mean, weights.std)
    with torch.no_grad():
        (cells,) = network.backbone(pixels)
    return torch.cat([adaptive_max_pool2d(cells, n).reshape(-1) for n in network.levels])


def is_equal(row, expected):
    """To the 16 bits of which they are kept."""
    return bool((row - expected).abs().max() <= 1e-3 * expected.abs().max())


def test_an_epoch_is_a_loop_over_images_as_they_are_or_mirrored(made):
    source, network, data, settings = made
    shown = {place: [] for place in range(source.count)}
    for epoch in range(8):
        order = [place for batch in epoch_batches(source.count, epoch, settings) for place in batch.places]
        rows = [(row, label) for rows, labels in source.epoch(epoch) for row, label in zip(rows, labels, strict=True)]
        for place, (row, label) in zip(order, rows, strict=True):
            assert label == data.train.labels[place]
            kinds = [naive(network, data.train.images[place], SIZES[epoch % 2], mirrored) for mirrored in (False, True)]
            assert not is_equal(*kinds)
            equal = [is_equal(row, kind) for kind in kinds]
            assert sum(equal) == 1
            shown[place].append(equal.index(True))
    every = np.concatenate([*shown.values()])
    assert 0.3 < every.mean() < 0.7
    assert sum(len(set(kinds)) == 2 for kinds in shown.values()) > source.count / 2


def test_validation_and_the_norm_of_the_input_are_of_the_largest_size_as_it_is(made):
    source, network, data, _ = made
    (rows, labels), (norms,) = next(source.validation()), [*source.pooled()]
    assert labels.tolist() == data.validation.labels.tolist()
    for row, path in (*zip(rows, data.validation.images, strict=True), *zip(norms, data.train.images, strict=True)):
        assert is_equal(row, naive(network, path, max(SIZES), False))
