"""The windows that the fine-tuning snapshot is chosen on."""

import numpy as np
import torch

from sppnet.config import FinetuneSettings
from sppnet.detection import finetuning
from sppnet.detection.sampling import LabelledWindows


class Recorded:
    """300 images of a positive and a negative; notes which images were pooled and what the generator gave."""

    def __init__(self):
        self.labelled = [LabelledWindows(np.array([0]), np.array([0]), np.array([1]))] * 300
        self.images, self.drawn = set(), []

    def pool(self, image, rows, rng):
        self.images.add(image)
        self.drawn.append(rng.random())
        return torch.zeros(len(rows), 2)


def test_they_come_from_every_image_with_a_positive():
    source = Recorded()
    labels, pooled = finetuning._validation_windows(source, 1, FinetuneSettings(validate_windows=1200))
    assert source.images == set(range(300))
    assert len(labels) == len(pooled) == 1200


def test_they_are_drawn_from_a_stream_that_no_training_step_has(monkeypatch):
    source, streams = Recorded(), []
    default_rng = np.random.default_rng

    def recording(seed):
        streams.append(default_rng(seed).random(4).tolist())
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", recording)
    finetuning._validation_windows(source, 1, FinetuneSettings())
    steps = [default_rng((0, step, rank)).random(4).tolist() for step in range(50) for rank in range(3)]
    assert len(streams) == 1
    assert streams[0] not in steps
