"""Where the time of one image goes, from its file to the detections.

The profile is one of `SPPDetector.detect` itself: while it runs, the functions that it calls are wrapped by a clock. So
there is no second pipeline that could differ from the first.
"""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sppnet.detection import detector as detection
from sppnet.detection import window_features
from sppnet.detection.detector import SPPDetector
from sppnet.detection.linear_svm import LinearDetectors
from sppnet.detection.window_features import FrozenHead, WindowCells
from sppnet.images import read_image
from sppnet.machine import timed
from sppnet.network.trunks import TrunkError
from sppnet.progress import progress_bar
from sppnet.records import Detections

READ, SEARCH, CELLS, HEAD = "read file", "candidate windows", "windows to cells", "head"
SELECT, REST = "suppression, regression", "between the steps"
# The steps of detect, in order, and where it finds their functions.
PROBES: tuple[tuple[str, Any, str], ...] = (
    ("feature maps", detection, "compute_maps"),
    (CELLS, detection, "window_cells"),
    (CELLS, WindowCells, "merged"),
    ("pooling", window_features, "pool_cells"),
    ("pooling", window_features, "pool_windows_by_bin"),
    (HEAD, FrozenHead, "features"),
    ("SVM scores", LinearDetectors, "score"),
    (SELECT, SPPDetector, "select"),
)
STEPS = (READ, SEARCH, "feature maps", CELLS, "pooling", "fc6", "fc7", "SVM scores", SELECT)
BAR = 24  # characters for 100 %
_PROBED = threading.RLock()  # overlapping probes would restore each other's wrappers and leave them in the library


@dataclass(frozen=True)
class Profile:
    """Median seconds of each step and of the whole, over the rounds of all images; mean numbers of windows."""

    steps: dict[str, float]
    total: float
    lowest: float  # of the images' medians
    highest: float
    images: int
    rounds: int
    windows: float
    distinct: float  # on different cells of the maps: only these are pooled

    def share(self, step: str) -> float:
        return self.steps[step] / max(sum(self.steps.values()), 1e-12)

    def rows(self) -> list[str]:
        """A line for each step, with a bar of its share."""
        shares = {step: self.share(step) for step in self.steps}
        lines = [
            f"{step:<24}{1e3 * self.steps[step]:9.1f} ms {100 * share:5.1f} %  {'█' * round(BAR * share)}".rstrip()
            for step, share in shares.items()
        ]
        spread = f"  ({1e3 * self.lowest:.0f} to {1e3 * self.highest:.0f})" if self.images > 1 else ""
        return [*lines, f"{'file to detections':<24}{1e3 * self.total:9.1f} ms{spread}"]


class Clock:
    """Seconds by step of the calls it wraps. A wrapped call inside another one counts for its own step alone.

    Only what `select` calls counts for `select`: box regression pools windows too.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.last: dict[str, tuple[tuple[Any, ...], Any]] = {}  # arguments and result of a step's latest call
        self._device = device
        self._running: list[str] = []
        self._inside: list[float] = [0.0]  # seconds of the calls that a running one made

    def wrap(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if SELECT in self._running:
                return function(*arguments, **named)
            self._running.append(step)
            self._inside.append(0.0)
            try:
                seconds, result = timed(lambda: function(*arguments, **named), self._device)
            finally:
                self._running.pop()
                inside = self._inside.pop()
            self._inside[-1] += seconds
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds - inside
            self.last[step] = arguments, result
            return result

        return call

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Wrap the functions of PROBES meanwhile; AttributeError where there is one no longer.

        The wrapped functions are the whole process's: no other thread may detect meanwhile, or its calls count here.
        Probes of several threads wait for each other; nested ones of one thread count in both.
        """
        with _PROBED:
            originals = [(step, owner, name, getattr(owner, name)) for step, owner, name in PROBES]
            try:
                for step, owner, name, original in originals:
                    setattr(owner, name, self.wrap(step, original))
                yield
            finally:
                for _, owner, name, original in originals:
                    setattr(owner, name, original)


def detect_timed(detector: SPPDetector, path: Path, clock: Clock) -> Detections:
    """What `detector.detect` finds in the image of a file, with the seconds of every step in `clock`."""
    image = clock.wrap(READ, read_image)(path)
    windows = clock.wrap(SEARCH, detector.proposer)(image)
    with clock.probing():
        try:
            return detector.detect(image, windows)
        except TrunkError as error:
            raise TrunkError(f"{path}: {error}") from None


def profile_images(detector: SPPDetector, images: Sequence[Path], rounds: int, progress: bool = True) -> Profile:
    """Each image goes from file to detections once to warm up, then `rounds` times."""
    steps, totals, counts = defaultdict(list), [], []
    runs = [(path, number) for path in images for number in range(rounds + 1)]
    for path, number in progress_bar(runs, "profile", "run", shown=progress):
        clock = Clock(detector.device)
        total, _ = timed(lambda: detect_timed(detector, path, clock), detector.device)  # noqa: B023 - called at once
        if number == 0:
            counts.append(_count_windows(clock))
            continue
        totals.append(total)
        rest = max(0.0, total - sum(clock.seconds.values()))
        for step, seconds in {**_layers_apart(clock, detector.device), REST: rest}.items():
            steps[step].append(seconds)
    medians = {step: statistics.median(steps[step]) for step in (*STEPS, REST) if step in steps}
    own = [statistics.median(totals[start : start + rounds]) for start in range(0, len(totals), rounds)]
    windows, distinct = (float(mean) for mean in np.mean(counts, axis=0))
    return Profile(medians, statistics.median(totals), min(own), max(own), len(images), rounds, windows, distinct)


def _layers_apart(clock: Clock, device: torch.device) -> dict[str, float]:
    """The clock's seconds with the head as its layers: fc6 is what it takes alone, repeated here, fc7 is the rest."""
    seconds = dict(clock.seconds)
    whole = seconds.pop(HEAD, 0.0)
    head, maps, where, layer = clock.last[HEAD][0] if HEAD in clock.last else (None, None, None, "pool")
    if layer == "fc6":
        seconds["fc6"] = whole
    elif layer == "fc7":
        again = Clock(device)
        with again.probing():
            head.features(maps, where, "fc6")
        seconds["fc6"] = min(whole, again.seconds[HEAD])
        seconds["fc7"] = whole - seconds["fc6"]
    return {step: seconds[step] for step in STEPS if step in seconds}


def _count_windows(clock: Clock) -> tuple[int, int]:
    """Windows of the image, and how many of them are pooled."""
    if CELLS not in clock.last:
        return 0, 0
    merged, rows = clock.last[CELLS][1]
    return len(rows), len(merged.cells)
