"""How fast the detector is on this machine: its profile, and parts of it next to torchvision, OpenCV and R-CNN."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sppnet import __version__
from sppnet.config_files import parse_config
from sppnet.data.folder import find_images
from sppnet.data.shapes import draw_scene
from sppnet.detection.box_regression import BoxRegressor, BoxRegressors
from sppnet.detection.detector import SPPDetector
from sppnet.detection.linear_svm import LinearDetectors
from sppnet.detection.profiling import Profile, profile_images
from sppnet.detection.proposals import make_proposer, opencv_selective_search
from sppnet.detection.selective_search import selective_search
from sppnet.detection.window_features import window_cells
from sppnet.images import prepare, read_image
from sppnet.machine import Machine, measure_machine, timed
from sppnet.network.pyramid import has_own_loop, pool_windows
from sppnet.network.sppnet import build_head
from sppnet.network.trunks import build_trunk

log = logging.getLogger("sppnet")
SVM_SCALE = 0.05  # of random features: scores of about -1.5 ± 1.5, so that suppression has about as much to do as usual
RCNN_SIDE, RCNN_BATCH = 227, 32  # R-CNN warps every window to 227 × 227 pixels


@dataclass(frozen=True)
class Comparison:
    """Median seconds of ours and of a peer, their ratio pair by pair, and whether the results are the same bits."""

    ours: float
    peer: float
    ratio: float
    lowest: float
    highest: float
    equal: bool | None = None  # None where the results are not meant to be equal

    def row(self, name: str) -> str:
        equal = {None: "", True: "  bit-equal", False: "  RESULTS DIFFER"}[self.equal]
        pair = f"{1e3 * self.ours:9.1f} ms {1e3 * self.peer:9.1f} ms"
        return f"{name:<50}{pair} {self.ratio:8.1f} × ({self.lowest:.1f} to {self.highest:.1f}){equal}"


@dataclass(frozen=True)
class WarpedTrunk:
    """The maps of an image against the trunk alone on every window, as R-CNN does: `timed` of `windows`, scaled up."""

    comparison: Comparison
    timed: int
    windows: int

    def rows(self) -> list[str]:
        note = f"{self.timed:,} of {self.windows:,} timed and scaled up; without a head, so a lower bound"
        row = self.comparison.row("maps; trunk alone on every window, as R-CNN does")
        return [row, f"{'':<8}(windows warped to {RCNN_SIDE} px, {note})"]


@dataclass(frozen=True)
class Benchmark:
    """Everything that `run_benchmark` measured.

    `pooling` is None where `pool_windows` is the peer itself, and where the first image has no windows.
    """

    machine: Machine
    detector: str
    images: str
    profile: Profile
    pooling: Comparison | None
    search: Comparison
    rcnn: WarpedTrunk | None
    device: str  # its type

    def to_dict(self) -> dict[str, Any]:
        """Seconds throughout."""
        return asdict(self)

    def table(self) -> str:
        p = self.profile
        windows = f"rounds: {p.rounds}; windows: {p.windows:,.0f}, on different cells: {p.distinct:,.0f}"
        parts = (self.machine.rows(), [self.detector, f"{self.images}, {windows}"], p.rows(), _peer_rows(self))
        return "\n\n".join("\n".join(part) for part in parts)


def run_benchmark(
    run: Path | None = None,
    images: Sequence[str | Path] = (),
    device: torch.device | str = "cpu",
    rounds: int = 5,
    rcnn: int = 0,
    progress: bool = True,
) -> Benchmark:
    """Measure the detector of a run, or one with random weights, on images, or on a generated picture.

    Raises ValueError for impossible counts, StoreError for a run without a detector, FolderError for a path that
    names no image, and ImageError or TrunkError for an image that cannot be used.
    """
    if rounds < 1 or rcnn < 0:
        raise ValueError(f"expected at least 1 round and no negative number of windows, got {rounds} and {rcnn}")
    detector = random_detector().to(device) if run is None else SPPDetector.load(run, device)
    name = f"{'random weights' if run is None else run}: {describe(detector)}"
    if images:
        paths = find_images(images)
        return measure(
            detector, paths, rounds, rcnn, (name, f"{len(paths)} image{'s' if len(paths) > 1 else ''}"), progress
        )
    with tempfile.TemporaryDirectory() as folder:
        path = write_picture(Path(folder) / "generated.jpg")
        return measure(detector, [path], rounds, rcnn, (name, "a generated picture of 500 × 375 pixels"), progress)


def measure(
    detector: SPPDetector, images: Sequence[Path], rounds: int, rcnn: int, names: tuple[str, str], progress: bool = True
) -> Benchmark:
    """The profile over all images; the peers on the first one, R-CNN's trunk on `rcnn` windows of it."""
    log.info("profile of detection, then pooling, selective search and this machine beside it: about a minute")
    profile = profile_images(detector, images, rounds, progress)
    image = read_image(images[0])
    windows = detector.proposer(image)
    log.info("pooling beside torchvision's, selective search beside OpenCV's")
    pooling = compare_pooling(detector, image, windows, rounds)
    search = compare_search(detector, image, rounds)
    warped = time_warped(detector, image, windows, rcnn, rounds) if rcnn and len(windows) else None
    log.info("rates of this machine")
    machine, device = measure_machine(detector.device, __version__), detector.device.type
    return Benchmark(machine, *names, profile, pooling, search, warped, device)


def compare_pooling(
    detector: SPPDetector, image: NDArray[np.uint8], windows: NDArray[np.floating], rounds: int
) -> Comparison | None:
    """`pool_windows` against torchvision's roi_pool, once per level, on the scale of the maps that has most windows.

    None without windows, and on devices where `pool_windows` is roi_pool: a comparison would say nothing.
    """
    if len(windows) == 0 or not has_own_loop(detector.device):
        return None
    config, maps = detector.config, detector.embed(image)
    where = window_cells(maps, windows, detector.trunk.geometry, config.pyramid, config.maps).merged()[0]
    scale = int(np.bincount(where.scale_index).argmax())
    feature_map, cells = maps.maps[scale], where.cells[where.scale_index == scale]
    inclusive = torch.from_numpy(cells - np.array([0, 0, 1, 1])).float()
    exact = feature_map.float()  # roi_pool has no bfloat16
    regions = torch.cat([torch.zeros(len(cells), 1), inclusive], dim=1).to(exact)
    levels = config.pyramid.levels

    def peer() -> Tensor:
        return torch.cat([torchvision.ops.roi_pool(exact[None], regions, n).flatten(1) for n in levels], dim=1)

    def ours() -> Tensor:
        return pool_windows(feature_map, cells, levels)

    return compare(ours, peer, rounds, _wall_seconds(detector.device), torch.equal(ours().float(), peer()))


def compare_search(detector: SPPDetector, image: NDArray[np.uint8], rounds: int) -> Comparison:
    """Our selective search against OpenCV's, both in mode "fast" on one core, in CPU seconds."""
    settings, threads = detector.config.proposals.model_copy(update={"mode": "fast"}), cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return compare(
            lambda: selective_search(image, settings),
            lambda: opencv_selective_search(image, settings),
            rounds,
            _cpu_seconds,
        )
    finally:
        cv2.setNumThreads(threads)


def compare(
    ours: Callable[[], object],
    peer: Callable[[], object],
    rounds: int,
    measure: Callable[[Callable[[], object]], float],
    equal: bool | None = None,
) -> Comparison:
    """Both in pairs after one run to warm up, one after the other in every round: a busy machine slows both."""
    ours(), peer()
    pairs = []
    for _ in range(rounds):
        time.sleep(0.05)  # OpenMP's threads spin for a while after a call and would take a core from the next
        mine = measure(ours)
        time.sleep(0.05)
        pairs.append((mine, measure(peer)))
    ratios = [theirs / mine for mine, theirs in pairs]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Comparison(mine, theirs, statistics.median(ratios), min(ratios), max(ratios), equal)


@torch.inference_mode()
def time_warped(
    detector: SPPDetector, image: NDArray[np.uint8], windows: NDArray[np.floating], count: int, rounds: int
) -> WarpedTrunk:
    """The trunk on `count` windows, drawn evenly and warped beforehand; no head, so a lower bound on R-CNN's time."""
    trunk, device = detector.trunk, detector.device
    chosen = windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]
    weights, size = trunk.weights, (RCNN_SIDE, RCNN_SIDE)
    warped = [prepare(_crop(image, w), size, weights.channel_order, weights.mean, weights.std) for w in chosen]
    batches = [batch.to(device, memory_format=torch.channels_last) for batch in torch.cat(warped).split(RCNN_BATCH)]

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=detector.config.maps.compute == "bfloat16"):
            for batch in batches:
                trunk(batch)

    found = compare(lambda: detector.embed(image), run, rounds, _wall_seconds(device))
    factor = len(windows) / len(chosen)
    scaled = {name: factor * getattr(found, name) for name in ("peer", "ratio", "lowest", "highest")}
    return WarpedTrunk(replace(found, **scaled), len(chosen), len(windows))


def random_detector(
    trunk: str = "alexnet", precision: str = "float32", classes: int = 20, fc: int = 4096
) -> SPPDetector:
    """A detector of the paper's size that has learned nothing: as fast as a trained one, and nothing to download.

    Its SVMs let about a third of the windows pass, and its box regressors predict no change.
    """
    settings = {
        "trunk": {"name": trunk, "weights": {"source": "random"}},
        "maps": {"compute": precision},
        "head": {"fc6": fc, "fc7": fc},
        "detect": {"precision": precision},
    }
    config = parse_config(settings, "benchmark")
    network = build_trunk(config.trunk)
    head = build_head(network.channels, config.pyramid.levels, classes + 1, config.head)
    names = tuple(f"class {number + 1}" for number in range(classes))
    weight = torch.randn(classes, config.head.fc7, generator=torch.Generator().manual_seed(0))
    svms = LinearDetectors(weight, torch.full((classes,), -1.5), SVM_SCALE, names)
    none = torch.zeros(4, dtype=torch.float64)
    still = BoxRegressor(none.new_zeros(4, head.fc6.in_features), none, none, torch.eye(4, dtype=torch.float64))
    regressors = BoxRegressors.stack(dict.fromkeys(names, still))
    return SPPDetector(network, head, svms, regressors, make_proposer(config.proposals), config)


def generated_picture(seed: int = 0) -> NDArray[np.uint8]:
    """Four scenes of shapes in one picture of VOC's usual size, (375, 500, 3)."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng).pixels[:188, :250] for _ in range(4)]
    return np.concatenate([np.concatenate(scenes[:2], axis=1), np.concatenate(scenes[2:], axis=1)])[:375]


def write_picture(path: Path, seed: int = 0) -> Path:
    """`generated_picture` as a JPEG."""
    Image.fromarray(generated_picture(seed)).save(path, quality=90)
    return path


def describe(detector: SPPDetector) -> str:
    """Trunk, head, classes, scales, precision and device in one line."""
    config = detector.config
    scales = "scale " + ", ".join(map(str, config.maps.scales))
    head = "no head" if config.svm.layer == "pool" else f"head {config.head.fc6}"
    maps, fc = config.maps.compute, config.detect.precision
    precision = maps if maps == fc else f"maps {maps}, head {fc}"
    return f"{config.trunk.name}, {head}, {len(detector.classes)} classes, {scales}, {precision}, on {detector.device}"


def _crop(image: NDArray[np.uint8], window: NDArray[np.floating]) -> NDArray[np.uint8]:
    x1, y1 = np.floor(window[:2]).astype(int)
    x2, y2 = np.ceil(window[2:]).astype(int)
    return image[y1:y2, x1:x2]


def _wall_seconds(device: torch.device) -> Callable[[Callable[[], object]], float]:
    return lambda function: timed(function, device)[0]


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _peer_rows(benchmark: Benchmark) -> list[str]:
    """One line for each comparison, on the first image."""
    rows = [f"{'the first image':<50}{'sppnet':>12} {'peer':>12} {'ratio':>10}"]
    if not has_own_loop(torch.device(benchmark.device)):
        rows.append("pooling: here it is torchvision's roi_pool")
    elif benchmark.pooling is not None:
        rows.append(benchmark.pooling.row("pooling; torchvision's roi_pool, once per level"))
    rows.append(benchmark.search.row("selective search; OpenCV's, one core each"))
    if benchmark.rcnn is not None:
        rows += benchmark.rcnn.rows()
    return rows
