"""What few pictures teach in how much time: the joint head beside torchvision's SSD and Faster R-CNN on its backbone.

    python benchmarks/few_pictures.py DATA ... --out DIR [--classes bus car] [--images 5 30 100] [--seeds 0 1 2]
                                      [--peers ssd faster_rcnn] [--times 1 5] [--set KEY=VALUE]

DATA are folders of PASCAL VOC's years, with the sets train and val, or with trainval, of which a fifth is held out. A
seed shuffles the training images; of each class the first N images that show it are taken, so those of a smaller N are
among those of a larger one. One more image is only there for our thresholds, which no figure needs. Ours is what
`sppnet train FOLDER` makes of them, its windows searched anew; the peers are then fine-tuned on the same images for the
same CPU seconds, for the first seed also for the other multiples of --times. All are evaluated on the same held-out
images: area under the curve at IoU 0.5, detections from a score of 0.01 on, each with the suppression of its own
defaults. Reading images and planning are part of the time, importing libraries is not.

The peers (`detector_peers.py`): AdamW, warm-up over a tenth of the time and a cosine, a tenth of the rate for the
backbone, gradients clipped, float32 (faster here than bfloat16). SSD: 320 × 320, batches of 4, crops and mirroring.
Faster R-CNN: shorter side 352, batches of 2, mirroring. Their rates, 4e-3 and 2e-3, are the best of 5e-4, 1e-3, 2e-3
and 4e-3 on a draw that is not measured: --seeds 100 with 5 and 30 images a class of BCCD, 35 and 60 CPU seconds. Rows
are kept in --out, so an interrupted run goes on; a row whose images or --set changed is measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detector_peers import PEERS, cpu_clock, detect, fine_tune
from machine import cores, describe, in_words
from pretraining import spread_of

from sppnet.artifacts import digest_of, read_json, write_json, write_text
from sppnet.data.selection import choose_classes, hold_out, restrict, shown_classes
from sppnet.data.splits import load_splits
from sppnet.errors import SppnetError
from sppnet.evaluation.voc import evaluate_voc
from sppnet.pipeline.folder_training import plan_training
from sppnet.pipeline.stages import windows_folder
from sppnet.proposals.search import propose_images, read_windows
from sppnet.records import Detections, ImageRecord, spread

Finder = Callable[[ImageRecord], Detections]


class Row(NamedTuple):
    """One line of the table: images a class and in all, seconds from the images to the detector."""

    data: str
    count: int
    seed: int
    images: int
    method: str
    map: float
    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"| {' | '.join(map(str, self[:5]))} | {100 * self.map:.1f} | {self.wall:.0f} | {self.cpu:.0f} |"


class Folder(NamedTuple):
    """A data set: what may be drawn for training, and what is evaluated on."""

    name: str
    root: Path
    classes: tuple[str, ...]
    train: list[ImageRecord]
    test: list[ImageRecord]


@in_words
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("sppnet").setLevel(logging.WARNING)
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Print the table, row by row, and the means over the seeds."""
    print(f"{describe()}, {options.threads} threads")
    print("| data | images a class | seed | images | method | mAP | wall s | CPU s |")
    print(f"|{'---|' * 8}")
    rows = list[Row]()
    for root in options.data:
        folder = read_folder(root, options.classes, options.test_images)
        for seed in options.seeds:
            for count, drawn in draw(folder.train, folder.classes, options.images, seed).items():
                for row in rows_of(folder, drawn, count, seed, options):
                    print(row, flush=True)
                    rows.append(row)
    print("\n".join(summary(rows)))
    return 0


def read_folder(root: Path, names: Sequence[str], test_images: int) -> Folder:
    """Training and test images; the classes are those of `names` that the training images show, else all."""
    years = {kind: [f"{p.parents[2].name}/{kind}" for p in sorted(root.glob(f"*/ImageSets/Main/{kind}.txt"))]
             for kind in ("train", "val", "trainval")}  # fmt: skip
    if years["train"] and years["val"]:
        train, test = (load_splits(root, years[kind])[0] for kind in ("train", "val"))
    elif years["trainval"]:
        train, test = hold_out(load_splits(root, years["trainval"])[0], 0.2)
    else:
        raise SppnetError(f"{root}: expected <year>/ImageSets/Main/ with train.txt and val.txt, or trainval.txt")
    shown = choose_classes(train, None)
    classes = tuple(name for name in names if name in shown) or shown
    name = root.resolve().parent.name if root.name == "VOCdevkit" else root.name
    return Folder(name, root, classes, restrict(train, classes), restrict(spread(test, test_images), classes))


def draw(
    records: Sequence[ImageRecord], classes: Sequence[str], counts: Sequence[int], seed: int
) -> dict[int, list[ImageRecord]]:
    """For each of `counts` the images that show every class so often, or as often as there are, as shuffled by `seed`.

    Those of a smaller count are among those of a larger one. The first of each is none of them, but the one for
    thresholds: the first in this order that shows something. The rarest class chooses first.
    """
    order = [records[place] for place in np.random.default_rng(seed).permutation(len(records))]
    shown = {record.id: shown_classes(record) & {*classes} for record in order}
    spare = next(record for record in order if shown[record.id])
    order.remove(spare)
    rarest_first = sorted(classes, key=lambda name: (sum(name in own for own in shown.values()), name))
    chosen, found = list[ImageRecord](), dict[int, list[ImageRecord]]()
    for count in sorted(counts):
        for name in rarest_first:
            missing = count - sum(name in shown[record.id] for record in chosen)
            chosen += [r for r in order if name in shown[r.id] and r not in chosen][: max(0, missing)]
        found[count] = [spare, *chosen]
    return found


def rows_of(
    folder: Folder, drawn: Sequence[ImageRecord], count: int, seed: int, options: argparse.Namespace
) -> Iterator[Row]:
    """Ours, then every peer in the CPU seconds that ours took and, of the first seed, in multiples of it."""
    place, given = options.out / f"{folder.name}-{count}-{seed}", [(r.id, r.digest) for r in (*drawn, *folder.test)]
    (spare, *images), classes = drawn, folder.classes

    def row(method: str, settings: object, train: Callable[[], Finder]) -> Row:
        path, key = place / f"{method}.json", digest_of(given, classes, settings)
        kept = read_json(path) if path.is_file() else {}
        if kept.get("of") != key:
            start, cpu = time.perf_counter(), cpu_clock()
            find = train()
            seconds = {"wall": time.perf_counter() - start, "cpu": cpu_clock() - cpu}
            found, truth = {r.id: find(r) for r in folder.test}, {r.id: r.annotation for r in folder.test}
            result = evaluate_voc(found, truth, classes, "area")
            kept = {"of": key, "map": result.map, "ap": result.ap, **seconds}
            write_json(path, kept)
        values = (kept[name] for name in ("map", "wall", "cpu"))
        return Row(folder.name, count, seed, len(images), method, *values)

    own = [f"data.classes={json.dumps(classes)}", *options.overrides]
    make_kit(place / "data", folder.root, {"train": images, "val": [spare]})
    yield (first := row("ours", own, lambda: ours(place, own, options.out / "windows")))
    for name in options.peers:
        for times in options.times if seed == options.seeds[0] else options.times[:1]:
            seconds, peer = times * first.cpu, PEERS[name]

            def train(peer: Any = peer, seconds: float = seconds) -> Finder:
                model, _ = fine_tune(peer, images, classes, seconds, seed)
                return lambda record: detect(model, record, classes)

            yield row(name if times == 1 else f"{name} × {times:g}", [seconds, *peer[1:]], train)


def make_kit(kit: Path, root: Path, sets: Mapping[str, Sequence[ImageRecord]]) -> None:
    """A devkit at `kit` with these sets of images of `root`, whose folders it links to."""
    shutil.rmtree(kit, ignore_errors=True)
    for name, records in sets.items():
        for year in {record.id.partition("/")[0] for record in records}:
            stems = [record.id.partition("/")[2] for record in records if record.id.startswith(f"{year}/")]
            write_text(kit / year / f"ImageSets/Main/{name}.txt", "\n".join(stems))
            for own in ("JPEGImages", "Annotations"):
                if not (kit / year / own).exists():
                    (kit / year / own).symlink_to((root / year / own).resolve(), target_is_directory=True)


def ours(place: Path, overrides: Sequence[str], windows: Path) -> Finder:
    """What `sppnet train` makes of the folder; windows of test images are searched once for all runs that can."""
    shutil.rmtree(place / "run", ignore_errors=True)  # of an interrupted run, whose time is not known
    training = plan_training(place / "data", place / "run", overrides).training
    training.progress = False
    detector = training.run()
    assert detector is not None  # no stage was left out
    found_in = windows_folder(windows, detector.config)

    def find(record: ImageRecord) -> Detections:
        propose_images([record], detector.config.proposals, found_in, progress=False)
        return detector.detect_for_evaluation(record.path, read_windows(found_in, record))[0]

    return find


def summary(rows: Sequence[Row]) -> list[str]:
    """A table of the means over the seeds, with standard deviations."""
    groups = defaultdict[tuple[str, int, str], list[Row]](list)
    for row in rows:
        groups[row.data, row.count, row.method].append(row)
    lines = ["", "| data | images a class | method | seeds | mAP | CPU s |", f"|{'---|' * 6}"]
    for (data, count, method), own in groups.items():
        cells = f"{len(own)} | {spread_of([row.map for row in own])} | {statistics.mean(row.cpu for row in own):.0f}"
        lines.append(f"| {data} | {count} | {method} | {cells} |")
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", metavar="DATA")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", nargs="+", default=[], help="those of them that DATA has, else all of DATA")
    parser.add_argument("--images", nargs="+", type=int, default=[5, 30, 100], help="of a class")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS])
    parser.add_argument("--times", nargs="+", type=float, default=[1, 5], help="the CPU time of ours")
    parser.add_argument("--test-images", type=int, default=150, help="at most, at even distances")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE", help="of ours")
    options = parser.parse_args(arguments)
    if min(*options.images, options.test_images, options.threads) < 1 or min(options.times) <= 0:
        parser.error("--images, --test-images and --threads must be at least 1, --times above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
