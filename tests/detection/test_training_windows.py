"""What mining and box regression read of the training images."""

import numpy as np
import pytest
import torch
from doubles import random_maps

from sppnet.backbones.geometry import Geometry
from sppnet.config import Config
from sppnet.detection import training_windows
from sppnet.detection.training_windows import ImageWindows, MiningWindows, TrainingWindows, positive_rows
from sppnet.detection.window_features import pool_projected
from sppnet.records import Annotation, ImageRecord

OBJECTS = np.array([[20, 20, 100, 100], [110, 30, 170, 90]], np.float32)
NEAR = np.array([[22, 20, 102, 100], [20.5, 20, 100, 100]], np.float32)  # the second on the cells of the object
FAR = np.array([[60, 60, 140, 110], [0, 0, 180, 120]], np.float32)
NAMES, CLASSES = ("dog", "cat"), ("cat", "dog")


@pytest.fixture
def source(tmp_path, monkeypatch):
    maps = random_maps((8, 12), (15, 22), sides=(128.0, 240.0), image_size=(120, 180))
    monkeypatch.setattr(training_windows, "read_maps", lambda *_: maps)
    monkeypatch.setattr(training_windows, "read_windows", lambda *_: np.concatenate([NEAR, NEAR[:1] + 0.1, FAR]))
    record = ImageRecord("a", tmp_path / "a.jpg", (120, 180), "0" * 16, Annotation(OBJECTS, NAMES, np.zeros(2, bool)))

    def with_overlap(overlap):
        config = Config.model_validate({"pyramid": {"levels": [1, 2]}, "svm": {"positive_overlap": overlap}})
        geometry = Geometry(stride=16, first_centre=7.5)
        return TrainingWindows([record], CLASSES, tmp_path, tmp_path, geometry, config, torch.device("cpu"))

    return with_overlap


def pooled(source, windows):
    maps = source.maps(0)
    return pool_projected(maps, source.project(maps, windows), (1, 2))


def mining(source):
    return MiningWindows(source, lambda maps, projected: pool_projected(maps, projected, (1, 2)))


def test_by_default_the_objects_alone_are_positives(source):
    found = mining(source(1)).positives(0)
    assert found.objects == 2
    assert found.labels.tolist() == [1, 0]
    assert found.windows.tolist() == OBJECTS.tolist()


def test_positives_are_known_without_features(source):
    def no_features(maps, projected):
        raise AssertionError("features were computed")

    for threshold in (0.7, 1):
        assert MiningWindows(source(threshold), no_features).positives(0).objects == 2


def test_the_objects_alone_need_no_maps(source, monkeypatch):
    own = source(1)
    monkeypatch.setattr(training_windows, "read_maps", None)
    assert mining(own).positives(0).objects == 2


def test_below_one_the_proposals_that_cover_an_object_are_positives_too_once_for_each_window_of_cells(source):
    own = source(0.7)
    found = mining(own).positives(0)
    assert found.objects == 2
    assert found.labels.tolist()[:2] == [1, 0]
    assert set(found.labels.tolist()[2:]) == {1}
    features = mining(own).features(0, found.windows)
    near = pooled(own, np.concatenate([NEAR, NEAR[:1] + 0.1]))
    assert torch.equal(features, torch.cat([pooled(own, OBJECTS), torch.unique(near, dim=0)[_order(near)]]))


def _order(rows):
    """Rank of the distinct rows by first occurrence, in terms of torch.unique's own order."""
    distinct = torch.unique(rows, dim=0)
    first = [int((rows == row).all(dim=1).nonzero()[0]) for row in distinct]
    return torch.tensor(np.argsort(first))


def test_a_window_may_be_a_positive_of_two_classes():
    overlaps = np.array([[1, 0.2], [0.2, 1], [0.7, 0.6], [0.5, 0.1]], np.float32)
    found = ImageWindows(np.zeros((4, 4), np.float32), np.array([0, 1]), overlaps)
    rows, labels = positive_rows(found, 0.6)
    assert rows.tolist() == [0, 1, 2, 2]
    assert labels.tolist() == [0, 1, 0, 1]


def test_mining_reads_the_objects_and_one_proposal_of_each_window_of_cells(source):
    image = mining(source(1)).read(0)
    assert image.labels.tolist()[:3] == [1, 0, -1]
    assert image.windows[:2].tolist() == OBJECTS.tolist()
    assert torch.equal(image.features, pooled(source(1), image.windows.astype(np.float32)))
    proposals = image.features[2:]
    assert len(torch.unique(proposals, dim=0)) == len(proposals) < 5
    assert image.overlaps.shape == (len(image.features), 2)
