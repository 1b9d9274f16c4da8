"""A small classifier with random weights, and its settings."""

import torch

from sppnet.classification.classifier import Classifier, build_network
from sppnet.classification.settings import ClassifierConfig
from sppnet.config_files import parse_settings

SETTINGS = {
    "precision": "float32",
    "backbone": {"name": "tiny5", "weights": {"source": "random"}},
    "pyramid": {"levels": [1, 2]},
    "head": {"fc6": 12, "fc7": 8},
}
CLASSES = ("flat", "noisy")


def config_of(**changes) -> ClassifierConfig:
    return parse_settings(ClassifierConfig, SETTINGS | changes, "test")


def small_classifier() -> Classifier:
    config = config_of()
    network = build_network(config, len(CLASSES)).requires_grad_(False).eval()
    for seed, layer in enumerate((network.head.fc6, network.head.fc7)):
        torch.nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    return Classifier(network, CLASSES, config)
