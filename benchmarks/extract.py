"""Images a minute of `sppnet extract`: this code beside another checkout, on a quiet and on a busy machine.

    python benchmarks/extract.py --before CHECKOUT [--images 200] [--chunk 40] [--precision float32] [--busy 2]

The command itself runs, on chunks of images in turn, so that whatever else goes on slows both. The rate is that of the
finished files, from the first to the last, without the start of processes; the wall time of the whole command stands
beside it. "busy" is the same while other processes keep every core at work. With SPPNET_SHARED set the images are VOC's
and the weights those of MobileNetV2, otherwise both are random.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkouts import HERE, Checkout, existing
from machine import busy, cores, describe, ratio

from examples import shared, subset
from sppnet.data.shapes import generate_shapes

CONFIG = "configs/voc9_mobilenet_v2.yaml"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    codes = {"now": Checkout(options.now)} | ({"before": Checkout(options.before)} if options.before else {})
    chunks = max(1, options.images // options.chunk)
    print(f"{describe()}; {options.config}, {options.precision}, {chunks} chunks of {options.chunk} images")
    print("| machine | code | images a minute, median | command, s | rate now / before | command before / now |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        devkits = [devkit(Path(folder) / str(number), number, chunks, options.chunk) for number in range(chunks)]
        for machine in ("quiet", "busy") if options.busy else ("quiet",):
            with busy(options.busy) if machine == "busy" else contextlib.nullcontext():
                found = measure(codes, devkits, options)
            rates = {name: [rate for rate, _ in own] for name, own in found.items()}
            walls = {name: [wall for _, wall in own] for name, own in found.items()}
            for name in codes:
                ratios = " | "
                if name == "now" and "before" in codes:
                    ratios = f"{ratio(rates['now'], rates['before'])} | {ratio(walls['before'], walls['now'])}"
                medians = f"{statistics.median(rates[name]):.1f} | {statistics.median(walls[name]):.1f}"
                print(f"| {machine} | {name} | {medians} | {ratios} |", flush=True)
    return 0


def devkit(folder: Path, number: int, chunks: int, count: int) -> tuple[Path, list[str]]:
    """A devkit of `count` images, the `number`-th of so many chunks, and its image sets."""
    source = shared("voc/VOCdevkit")
    if source is None:
        return generate_shapes(folder, {"train": count}, seed=number), ["SHAPES/train"]
    everything = subset(source, folder / "all", {"train": count * chunks})
    for file in everything.glob("VOC*/ImageSets/Main/train.txt"):  # every chunk has images of every year
        own = file.read_text().splitlines()[number::chunks]
        file.write_text("".join(f"{image}\n" for image in own))
    return everything, [f"{year.name}/train" for year in sorted(everything.iterdir())]


def measure(
    codes: dict[str, Checkout], devkits: list[tuple[Path, list[str]]], options: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Images a minute and wall seconds of every chunk, by code; the order changes from chunk to chunk."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
    for number, (root, sets) in enumerate(devkits):
        for name in list(codes)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as run:
                wall = extract(codes[name], root, sets, Path(run), options)
                found[name].append((images_a_minute(Path(run)), wall))
    return found


def extract(code: Checkout, root: Path, sets: list[str], run: Path, options: argparse.Namespace) -> float:
    """Wall seconds of the command; ends the program where it fails."""
    names = f"[{', '.join(sets)}]"
    settings = [
        f"data.root={root.resolve()}",
        *(f"data.{use}={names}" for use in ("train", "test")),
        "data.val=[]",  # the same images, some held out
        "data.classes=null",
        "proposals.import_from=[]",
        "finetune.flip=false",  # one map an image and scale
        *code.precision(options.precision),
        *code.weights(shared("weights/mobilenet_v2_1.0_from_uint8.npz")),
        *options.set,
    ]
    command = code.command("extract", code.root / options.config, "--run", run, "--device", "cpu", "--set", *settings)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=code.root, env=code.environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - start


def images_a_minute(run: Path) -> float:
    """From the times at which the maps of a run were written; those written at once at first count once."""
    folders = [*run.glob("maps-*"), *run.glob("extract-*")]
    times = sorted(file.stat().st_mtime for folder in folders for file in folder.rglob("*.npz"))
    if len(times) < 2 or times[-1] == times[0]:
        sys.exit(f"{run}: {len(times)} maps are too few for a rate; use larger chunks")
    return 60 * (len(times) - 1) / (times[-1] - times[0])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the root of another checkout")
    parser.add_argument("--now", type=Path, default=HERE, help="the root of this code (default: where this file lies)")
    parser.add_argument("--config", default=CONFIG, help="in each checkout")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--chunk", type=int, default=40, help="images that one process takes in a row")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--busy", type=int, default=cores(), help="processes beside it (default: one a core; 0: none)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of both")
    options = parser.parse_args(arguments)
    if options.chunk < 2 or options.images < options.chunk:
        parser.error("--chunk must be at least 2 and --images at least one chunk")
    existing([options.now, options.before])
    return options


if __name__ == "__main__":
    sys.exit(main())
