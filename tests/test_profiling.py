"""The profile is one of `detect` itself: it finds the same, sees every step, and leaves nothing behind."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import sppnet
from sppnet.detection import profiling
from sppnet.detection.detector import SPPDetector
from sppnet.detection.profiling import PROBES, STEPS, Clock, Profile, detect_timed, profile_images
from sppnet.detection.proposals import FixedWindows
from sppnet.machine import timed
from sppnet.network.trunks import TrunkError

CPU = torch.device("cpu")
BOTH_LAYERS = {"fc6", "fc7"}


@pytest.fixture(scope="module")
def detector(small_run):
    return SPPDetector.load(small_run.root)


@pytest.fixture(scope="module")
def photo(small_run):
    return small_run.devkit / "SHAPES/JPEGImages/test_00000.jpg"


@pytest.fixture
def seconds_pass(monkeypatch):
    """A clock of its own for `timed`: tick(n) lets n seconds pass, nothing else does."""
    now = [0.0]

    def tick(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("sppnet.machine.time.perf_counter", lambda: now[0])
    return tick


def with_layer(detector: SPPDetector, layer: str, classes: int = 5) -> SPPDetector:
    """The detector with SVMs on another layer."""
    config = detector.config
    width = {"pool": detector.head.fc6.in_features, "fc6": 16, "fc7": 16}[layer]
    svm = config.svm.model_copy(update={"layer": layer})
    linear = replace(detector.detectors, weight=torch.zeros(classes, width))
    return replace(detector, detectors=linear, config=config.model_copy(update={"svm": svm}))


def test_what_is_found_under_the_clock_is_what_detect_finds(detector, photo):
    clock = Clock(CPU)
    found, expected = detect_timed(detector, photo, clock), detector.detect(sppnet.read_image(photo))
    assert len(expected) > 0
    assert found.classes == expected.classes
    for mine, theirs in zip(
        (found.boxes, found.scores, found.labels), (expected.boxes, expected.scores, expected.labels), strict=True
    ):
        assert np.array_equal(mine, theirs)


def test_every_step_of_detect_is_seen(detector, photo):
    clock = Clock(CPU)
    detect_timed(detector, photo, clock)
    assert set(clock.seconds) == (set(STEPS) - BOTH_LAYERS) | {profiling.HEAD}
    profile = profile_images(detector, [photo, photo], rounds=2, progress=False)
    assert list(profile.steps) == [*STEPS, profiling.REST]
    assert sum(map(profile.share, profile.steps)) == pytest.approx(1)
    assert 0 < profile.lowest <= profile.total <= profile.highest
    assert (profile.images, profile.rounds) == (2, 2)
    assert profile.windows == len(detector.proposer(sppnet.read_image(photo)))
    assert 0 < profile.distinct <= profile.windows


def test_maps_of_several_scales_and_other_layers_have_their_steps(detector, photo):
    maps = detector.config.maps.model_copy(update={"scales": (96, 112)})
    several = replace(detector, config=detector.config.model_copy(update={"maps": maps}))
    assert "pooling" in profile_images(several, [photo], rounds=1, progress=False).steps
    for layer, layers in (("pool", set()), ("fc6", {"fc6"}), ("fc7", BOTH_LAYERS)):
        profile = profile_images(with_layer(detector, layer), [photo], rounds=1, progress=False)
        assert set(profile.steps) & BOTH_LAYERS == layers
        assert "pooling" in profile.steps


def test_an_image_without_windows_is_profiled_too(detector, photo):
    blind = replace(detector, proposer=FixedWindows(np.zeros((0, 4))))
    profile = profile_images(blind, [photo], rounds=1, progress=False)
    assert list(profile.steps) == [profiling.READ, profiling.SEARCH, profiling.REST]
    assert (profile.windows, profile.distinct) == (0, 0)


def test_the_functions_are_themselves_again_afterwards_errors_included(detector, photo, monkeypatch):
    def refuse(*_: object) -> None:
        raise TrunkError("an image of 3 × 400 pixels is too narrow: use a larger scale")

    before = [getattr(owner, name) for _, owner, name in PROBES]
    detect_timed(detector, photo, Clock(CPU))
    assert [getattr(owner, name) for _, owner, name in PROBES] == before
    monkeypatch.setattr(profiling.detection, "compute_maps", refuse)
    before = [getattr(owner, name) for _, owner, name in PROBES]
    with pytest.raises(TrunkError, match=r"test_00000\.jpg: an image of 3 × 400 pixels is too narrow"):
        detect_timed(detector, photo, Clock(CPU))
    assert [getattr(owner, name) for _, owner, name in PROBES] == before


def test_probes_of_two_threads_wait_for_each_other_and_leave_nothing_behind():
    before = [getattr(owner, name) for _, owner, name in PROBES]
    inside, leave = threading.Event(), threading.Event()

    def probe() -> None:
        with Clock(CPU).probing():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=probe)
    with Clock(CPU).probing():
        thread.start()
        overlapped = inside.wait(0.2)
    assert inside.wait(10)
    leave.set()
    thread.join()
    assert not overlapped
    assert [getattr(owner, name) for _, owner, name in PROBES] == before


def test_a_call_inside_another_counts_once_and_inside_select_for_select(seconds_pass):
    clock = Clock(CPU)
    pool = clock.wrap("pooling", lambda: seconds_pass(2))

    def head() -> str:
        seconds_pass(1)
        pool()
        pool()
        return "features"

    features = clock.wrap(profiling.HEAD, head)
    select = clock.wrap(profiling.SELECT, lambda: (seconds_pass(10), features()))
    assert features() == "features"
    select()
    features()
    assert clock.seconds == {"pooling": 8, profiling.HEAD: 2, profiling.SELECT: 15}
    assert clock.last[profiling.HEAD] == ((), "features")


def test_a_failed_call_leaves_the_clock_usable(seconds_pass):
    clock = Clock(CPU)
    with pytest.raises(ZeroDivisionError):
        clock.wrap(profiling.SELECT, lambda: 1 // 0)()
    clock.wrap("pooling", lambda: seconds_pass(3))()
    assert clock.seconds == {"pooling": 3}


def test_timing_gives_seconds_and_result(seconds_pass):
    assert timed(lambda: (seconds_pass(4), "result")[1], CPU) == (4, "result")


def test_the_rows_of_a_profile_show_shares_as_bars():
    profile = Profile({"pooling": 0.03, "fc6": 0.09}, 0.12, 0.12, 0.12, 1, 5, 100, 80)
    assert profile.rows() == [
        "pooling                      30.0 ms  25.0 %  ██████",
        "fc6                          90.0 ms  75.0 %  ██████████████████",
        "file to detections          120.0 ms",
    ]
    two = replace(profile, images=2, lowest=0.1, highest=0.2)
    assert two.rows()[-1] == "file to detections          120.0 ms  (100 to 200)"
