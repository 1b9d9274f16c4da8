"""What the tests of classification share."""

from pathlib import Path

import pytest
from small_classifier import small_classifier

from sppnet.classification.classifier import Classifier


@pytest.fixture
def classifier() -> Classifier:
    """A small one; a file may have its own instead."""
    return small_classifier()


@pytest.fixture
def run(classifier: Classifier, tmp_path: Path) -> Path:
    """The folder of the `classifier` of a file."""
    classifier.save(tmp_path / "run")
    return tmp_path / "run"
