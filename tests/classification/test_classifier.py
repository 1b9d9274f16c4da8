"""A trained network and its folder."""

import numpy as np
import torch
from doubles import picture
from small_classifier import CLASSES, config_of

from sppnet.classification.classifier import Classifier, build_network
from sppnet.classification.features import image_features


def test_a_classifier_keeps_its_mean_image_where_the_file_is_gone(tmp_path):
    path, image = tmp_path / "mean.npy", picture(70, 80)
    np.save(path, np.random.default_rng(0).uniform(0, 255, (3, 16, 20)).astype(np.float32))
    found = []
    for weights in ({"source": "random", "mean_image": path}, {"source": "random"}):
        config = config_of(backbone={"name": "tiny5", "weights": weights})
        made = Classifier(build_network(config, 2, start=True).requires_grad_(False).eval(), CLASSES, config)
        found.append(image_features(made, image, side=64))
        made.save(tmp_path / f"run{len(found)}")
    path.unlink()
    loaded = Classifier.load(tmp_path / "run1", torch.device("cpu"))
    np.testing.assert_array_equal(image_features(loaded, image, side=64), found[0])
    assert np.abs(found[0] - found[1]).max() > 0.01
