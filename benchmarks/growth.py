"""How time and memory grow with the number of windows, the size of the image and the number of training images.

    python benchmarks/growth.py [--parts windows side images] [--picture docs/pictures/growth.png] [--rounds 5]
        [--config configs/voc9_mobilenet_v2.yaml --run runs/voc9_mobilenet_v2]

windows: detection in one 500 × 375 image with 500 … 8,000 windows given: AlexNet's convolutions with random weights,
    s = 688, fc6 and fc7 of 4,096, 20 classes with box regression.
side: a picture of 4:3 whose longer side has 300 … 2,400 px and equal contrast in every octave: our selective search,
    in a copy shrunk to 640 px (the default) and at full size; the maps at s = 688 and at s = the image's own shorter
    side; detection from the image to its boxes with the defaults.
images: 100 … 2,052 training images of a run with windows, maps and a head: mining and the SVMs (svm), box regression
    (boxes), and the windows of fine-tuning with their overlaps (finetune-setup). The run is read only.

Every point is a process of its own, which repeats the work after one small warm-up; medians, peak memory of the whole
process, and what it held before the work began. Prints Markdown tables with the exponent of a power law through the
points (1 = in proportion), and draws all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing large is imported up here: a child's peak memory counts from the fork, that is from the size of this process.
BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
WINDOWS = (500, 1000, 2000, 4000, 8000)
SIDES = (300, 600, 1200, 2400)
IMAGES = (100, 300, 1000, 2052)
JOBS = {
    "windows": ("detect",),
    "side": ("search, max_side 640", "search, full size", "maps, s = 688", "maps, s = own side", "detect"),
    "images": ("svm", "boxes", "finetune-setup"),
}
TITLES = {"windows": "windows of one image", "side": "longer side of the image, px", "images": "training images"}
COLOURS = ("#1f5fa8", "#d1495b", "#2e933c", "#8a4fb0", "#c77d0a")


@dataclass(frozen=True)
class Point:
    """One process: seconds of its repeats; gigabytes at its peak, and before the work."""

    job: str
    size: int
    seconds: tuple[float, ...]
    gigabytes: float
    before: float
    note: str = ""

    @property
    def middle(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> str:
        spread = f"{min(self.seconds):.3g} – {max(self.seconds):.3g}"
        return (
            f"| {self.job} | {self.size:,} | {self.middle:.3g} ({spread}) | {len(self.seconds)} | {self.gigabytes:.2f} "
            f"| {self.before:.2f} | {self.note} |"
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    parts = [part for part in options.parts if part != "images" or may_measure_images(options)]
    measured = {part: measure_part(part, options) for part in parts}
    for part, points in measured.items():
        print("\n" + table(part, points))
    failed = any(len(points) < len(JOBS[part]) * len(sizes(part, options)) for part, points in measured.items())
    if any(measured.values()):
        draw({part: points for part, points in measured.items() if points}, options.picture)
        print(f"\ndrawn: {options.picture}")
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(JOBS), default=list(JOBS))
    parser.add_argument("--windows", nargs="+", type=int, default=list(WINDOWS))
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES))
    parser.add_argument("--images", nargs="+", type=int, default=list(IMAGES))
    parser.add_argument("--config", type=Path, help="of the run; for part images")
    parser.add_argument("--run", type=Path, help="folder with windows, maps and head; for part images")
    parser.add_argument("--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=5, help="repeats of a point; 3 at least where one takes over 2 s")
    parser.add_argument("--image-rounds", type=int, default=3, help="repeats of a point of part images")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/growth.png"))
    return parser.parse_args(arguments)


def may_measure_images(options: argparse.Namespace) -> bool:
    if options.config is not None and options.run is not None:
        return True
    print(
        "part images is left out: it needs --config CONFIG and --run DIR with windows, maps and a head", file=sys.stderr
    )
    return False


def sizes(part: str, options: argparse.Namespace) -> list[int]:
    return list(dict.fromkeys(getattr(options, {"windows": "windows", "side": "sides", "images": "images"}[part])))


def measure_part(part: str, options: argparse.Namespace) -> list[Point]:
    points = []
    for job in JOBS[part]:
        for size in sizes(part, options):
            point = measure(part, job, size, options)
            if point is not None:
                points.append(point)
                print(f"{part}: {job} at {size}: {point.middle:.3g} s, {point.gigabytes:.2f} GB", file=sys.stderr)
    return points


def measure(part: str, job: str, size: int, options: argparse.Namespace) -> Point | None:
    """One point in a process of its own; None, with a line on stderr, where it fails."""
    task = {"part": part, "job": job, "size": size, "threads": options.threads, "rounds": options.rounds}
    if part == "images":
        task |= {"rounds": options.image_rounds, "config": str(options.config), "run": str(options.run)}
        task |= {"overrides": options.overrides}
    threads = str(options.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    command = [sys.executable, str(Path(__file__).with_name("growth_points.py")), json.dumps(task)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(f"FAILED: {part}: {job} at {size} ended with status {process.returncode}", file=sys.stderr)
        return None
    result = json.loads(output.splitlines()[-1])
    peak = usage.ru_maxrss * BYTES_PER_UNIT / 1e9
    return Point(job, result["size"], tuple(result["seconds"]), peak, result["before"], result["note"])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms: 1 = in proportion; nan for less than two sizes."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    if len(set(x)) < 2:
        return math.nan
    middle_x, middle_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum((a - middle_x) ** 2 for a in x)


def amount(part: str, size: int) -> float:
    """What time may be in proportion to: windows, images, or the pixels of an image of 4:3 in millions."""
    return size * size * 0.75 / 1e6 if part == "side" else size


def table(part: str, points: list[Point]) -> str:
    lines = [
        f"| | {TITLES[part]} | seconds, median (from – to) | repeats | peak memory, GB | before the work, GB | |",
        "|---|---|---|---|---|---|---|",
        *(point.row() for point in points),
        "",
    ]
    for job in dict.fromkeys(point.job for point in points):
        own = [point for point in points if point.job == job]
        x = [amount(part, point.size) for point in own]
        power, unit = exponent(x, [point.middle for point in own]), "pixels" if part == "side" else part
        added = 1e3 * (own[-1].gigabytes - own[0].gigabytes)
        lines.append(
            f"{job}: time grows as {unit}^{power:.2f}; from {own[0].size:,} to {own[-1].size:,}, "
            f"{own[-1].middle / own[0].middle:.1f} × the time and {added:+.0f} MB at the peak"
        )
    return "\n".join(lines)


def draw(measured: dict[str, list[Point]], path: Path) -> None:
    """Time above (both axes logarithmic, with a guide of slope 1), memory below; a column for each part."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(4.3 * len(measured) + 0.3, 7.2), layout="constrained", dpi=100)
    grid = figure.subplots(2, len(measured), squeeze=False, sharex="col")
    for column, (part, points) in enumerate(measured.items()):
        above, below = grid[0][column], grid[1][column]
        for number, job in enumerate(dict.fromkeys(point.job for point in points)):
            own = [point for point in points if point.job == job]
            x, style = [amount(part, point.size) for point in own], {"color": COLOURS[number], "marker": "o", "ms": 4}
            above.plot(x, [point.middle for point in own], label=job, **style)
            below.plot(x, [point.gigabytes for point in own], **style)
            below.plot(x, [point.before for point in own], color=COLOURS[number], linewidth=0.9, linestyle=":")
        _guide(above, part, points)
        _axes(above, below, part, points)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(64).save(path, optimize=True)  # a palette: a third of the bytes


def _guide(axes: Any, part: str, points: list[Point]) -> None:
    """A dashed line of slope 1 from below the first point of the first job."""
    x = sorted({amount(part, point.size) for point in points})
    start = min(point.middle for point in points if amount(part, point.size) == x[0]) * 0.6
    label = "in proportion to the pixels" if part == "side" else "in proportion"
    axes.plot([x[0], x[-1]], [start, start * x[-1] / x[0]], color="#9aa3ad", linestyle="--", linewidth=1, label=label)


def _axes(above: Any, below: Any, part: str, points: list[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    shown = sorted({point.size for point in points})
    above.set(xscale="log", yscale="log", title=TITLES[part], ylabel="seconds, median")
    below.set(ylabel="peak memory, GB", ylim=(0, 1.1 * max(point.gigabytes for point in points)))
    for axes in (above, below):
        axes.minorticks_off()
        axes.set_xticks([amount(part, size) for size in shown], [f"{size:,}" for size in shown])
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, length=0)
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    above.tick_params(labelbottom=True)
    below.plot([], [], color="#5a636d", linewidth=0.9, linestyle=":", label="memory before the work")
    keys = [*above.get_legend_handles_labels()[0], *below.get_legend_handles_labels()[0]]
    below.legend(handles=keys, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2)


if __name__ == "__main__":
    sys.exit(main())
