"""What each command of the command line does: it calls the library and prints the result."""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sppnet import distributed
from sppnet.artifacts import read_json
from sppnet.classification.classifier import WEIGHTS
from sppnet.classification.settings import ClassifierConfig
from sppnet.classification.training import train_classifier
from sppnet.classify_commands import classify
from sppnet.config import STAGES, Config
from sppnet.config_files import load_config, parse_config, parse_settings
from sppnet.data.comp4 import read_comp4
from sppnet.data.convert import convert
from sppnet.data.crops import write_crops
from sppnet.data.labels import normalise
from sppnet.data.layouts import find_data
from sppnet.data.selection import choose_classes
from sppnet.data.shapes import generate_shapes
from sppnet.data.splits import files_by_stem, find_annotations, find_part, load_splits, read_image_set
from sppnet.data.voc import read_annotation
from sppnet.detection.detector import DetectorDescription, SPPDetector
from sppnet.distributed import choose_device
from sppnet.errors import SppnetError, counted
from sppnet.evaluation.voc import evaluate_flat
from sppnet.jobs import ran_out_of_memory
from sppnet.pipeline.combination import combine_runs
from sppnet.pipeline.evaluation import evaluate_run
from sppnet.pipeline.folder_training import plan_addition, plan_training
from sppnet.pipeline.prediction import detect_files
from sppnet.pipeline.run_data import named_parts
from sppnet.pipeline.stages import StageGraph
from sppnet.pipeline.suggestions import suggest
from sppnet.pipeline.thresholds import mean_precision
from sppnet.pipeline.training import Training, train_detector
from sppnet.proposals.files import export_windows
from sppnet.proposals.search import read_windows

log = logging.getLogger("sppnet")

# What differs from the paper's settings in the demonstration, to fit in minutes on two cores.
DEMO: dict[str, Any] = {
    "name": "demo",
    "proposals": {"max_windows": 500},
    "backbone": {"name": "tiny5"},
    "maps": {"scales": [320]},
    "head": {"fc6": 256, "fc7": 256},
    "finetune": {"steps": [1500, 500], "learning_rates": [1e-2, 1e-3], "images_per_batch": 16, "validate_every": 250},
    "svm": {"tolerance": 0.01},
    "detect": {"score_threshold": -3},
}
# Its backbone, fc6 and fc7 learn from crops first; dropout of 0.5 would keep a backbone from learning from scratch.
DEMO_CLASSIFIER = {
    "backbone": {"name": "tiny5", "weights": {"source": "random"}},
    "head": {"fc6": 256, "fc7": 256, "dropout": 0.1},
    "training": {"sizes": [64, 96], "min_side": 110, "batch": 64, "learning_rate": 0.05, "epochs": 120, "patience": 30},
}


def run(options: argparse.Namespace) -> int:
    """Do what parsed options say; returns the exit status as `sppnet.cli.main` describes it."""
    action = getattr(options, "action", "train")  # of classify, of which training alone resumes
    try:
        distributed.start()
        _start_logging(options.verbose)
        return ACTIONS.get(options.command, _train_stage)(options)
    except BrokenPipeError:
        raise
    except (SppnetError, OSError) as error:  # OSError: a disk that is full, a folder that may not be read
        if options.verbose:
            traceback.print_exc()
        print(f"sppnet {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as ending:
        resumes = options.command not in ("detect", "score", "convert") and action == "train"
        after = "and the same command goes on from there" if resumes else "the same command starts again"
        print(f"interrupted; what is complete is kept, {after}", file=sys.stderr)
        return 128 + (ending.args[0] if ending.args else signal.SIGINT)
    except Exception as error:
        if distributed.lost_another(error):
            why = "another process of this job ended (its message or torchrun's says why)"
            print(f"sppnet {options.command}: error: {why}; the same command goes on from there", file=sys.stderr)
            return 2
        if not ran_out_of_memory(error):
            print("this is a bug of sppnet; please report it with what follows", file=sys.stderr)
            raise
        trains = options.command not in ("eval", "test", "combine", "detect", "score", "suggest") and action == "train"
        smaller = "training.batch" if options.command == "classify" else "maps.scales or finetune.batch"
        hint = f"set smaller {smaller}" if trains else "end other programs"
        reason = f"not enough memory ({error}); {hint}, or take another --device"
        print(f"sppnet {options.command}: error: {reason}", file=sys.stderr)
        return 2
    finally:
        distributed.stop()


def _train(options: argparse.Namespace) -> int:
    only = (options.only,) if options.only else STAGES
    force = STAGES if options.force else STAGES[STAGES.index(options.start) :] if options.start else ()
    device, expected, reasons = choose_device(options.device), None, None
    if options.config.is_dir():
        plan = plan_training(options.config, options.run, options.overrides, device, only, force, options.minutes)
        training, expected, reasons = plan.training, plan.expected, plan.reasons
        if distributed.is_main():
            print(plan.text, flush=True)
    elif not options.config.exists() and options.config.suffix not in (".yaml", ".yml"):
        raise SppnetError(f"{options.config}: no such folder; name one of labelled pictures, or a .yaml configuration")
    elif options.minutes is not None:
        raise SppnetError(
            "--minutes chooses settings on a folder of pictures; a configuration gives them: joint.steps …"
        )
    else:
        training = Training(*_config_and_root(options), device)
    if options.dry_run:
        return _dry_run(training, only, force)
    return _end_training(training.run(only, force, expected, reasons), training.graph)


def _add(options: argparse.Namespace) -> int:
    plan = plan_addition(options.run, options.folder, options.overrides, choose_device(options.device))
    return _end_training(plan.training.run(reasons=plan.reasons, adds=True), plan.training.graph)


def _suggest(options: argparse.Namespace) -> int:
    out = options.out or options.run / "suggest"
    found, notes = suggest(options.run, options.folder, out, options.top, choose_device(options.device))
    if distributed.is_main():
        lines = [f"{entry['score']:7.2f}  {entry['image']}  {entry['reason']}" for entry in found]
        print("\n".join([*lines, *notes, f"written to {out}"]))
    return 0


def _dry_run(training: Training, only: Sequence[str], force: Sequence[str]) -> int:
    graph, data = training.graph, training.asked.data
    invalidated = graph.invalidated(only, force)
    print("\n".join([str(graph.data), *(s.describe(only, invalidated) for s in graph.statuses())]))
    missing = [f"{reason}; training would end there" for reason in training.networks.missing_inputs(only)]
    if not missing and {"maps", "embed"} & {*only} and training.networks.map_costs:
        print(training.networks.map_costs)
    folder = find_data(data.root, data.format)
    for split in named_parts(data, folder).test:
        try:
            find_part(folder, split)
        except SppnetError as error:
            missing.append(f"{error}; sppnet eval would end there (data.test)")
    for reason in missing:
        print(reason, file=sys.stderr)
    return 1 if missing else 0


def _train_stage(options: argparse.Namespace) -> int:
    config, root = _config_and_root(options)
    imports, export = getattr(options, "imports", None), getattr(options, "export", None)
    if imports and config.train_proposals:
        raise SppnetError("--import: train_proposals says which windows train; set import_from in its entries")
    if imports:
        proposals = config.proposals.model_copy(update={"import_from": tuple(imports)})
        config = config.model_copy(update={"proposals": proposals})
    only = (options.stage,)
    training = Training(config, root, choose_device(options.device))
    status = _end_training(training.run(only, only if options.force else ()), training.graph)
    if imports and distributed.is_main():
        names = ",".join(map(str, imports))
        print(f"the other stages use these windows with the same setting: proposals.import_from=[{names}]")
    if export and distributed.is_main():
        records, folder = training.graph.data.images, training.graph.folder("proposals")
        export_windows(export, [r.id for r in records], [read_windows(folder, r) for r in records])
        print(f"windows of {counted(len(records), 'image')} written to {export}")
    return status


def _end_training(detector: SPPDetector | None, graph: StageGraph) -> int:
    if detector is not None and distributed.is_main():
        found = mean_precision(read_json(graph.folder("thresholds") / "thresholds.json"))
        images = counted(len(graph.data.validation), "validation image")
        quality = "" if found is None else f"; mAP {found:.3f} on {images} (area), which chose the thresholds too"
        print(f"detector of {counted(len(detector.classes), 'class')} in {graph.detector}{quality}")
        print(f"next: sppnet eval {graph.root}, or sppnet detect {graph.root} PICTURES --out DIR")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    evaluate = options.command == "eval"
    splits, metric = tuple(options.split), options.metric if evaluate else None
    output = evaluate_run(options.run, choose_device(options.device), options.data, splits, metric, evaluate)
    if not distributed.is_main():
        return 0
    result = output.result
    if (quality := result.proposals) is not None:
        recall = f"recall at IoU 0.5 {quality.recall:.3f}, mean best overlap {quality.mean_best_overlap:.3f}"
        print(f"windows: {quality.mean_windows:.0f} an image, {recall}")
    if result.seconds_per_image is not None:
        print(f"detection: {result.seconds_per_image:.3f} s an image, without proposals")
    for part in (result.evaluation, result.errors):
        if part is not None:
            print(part.table())
    print(f"results in {output.folder}")
    return 0


def _combine(options: argparse.Namespace) -> int:
    if distributed.is_main():
        count = 1 + len(combine_runs(options.runs, options.out).others)
        print(f"{counted(count, 'detector')} combined in {options.out / 'detector'}; next: sppnet eval {options.out}")
    return 0


def _detect(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    description = DetectorDescription.read(options.run)  # before pictures are looked for
    load, workers = partial(SPPDetector.load, options.run, device), 0 if device.type == "cpu" else 1
    with _ended_as_by_ctrl_c():
        result = detect_files(load, options.images, options.out, options.threshold, workers)
    count = sum(map(len, result.detections.values()))
    own = [score for each in (description, *description.others) for score in each.thresholds]
    lowest = own if options.threshold is None else [options.threshold]
    used = " to ".join(f"{round(score, 2) + 0.0:.2f}" for score in sorted({min(lowest), max(lowest)}))  # no -0.00
    found = f"{counted(count, 'detection')} in {counted(len(result.detections), 'image')}"
    print(f"{found}, threshold{'s' if ' to ' in used else ''} {used}, written to {options.out}")
    if result.note:
        print(result.note)
    if result.detections and not count and min(lowest) > -math.inf:
        print(f"nothing scores {used} or more; a lower --threshold shows less certain detections")
    for reason in result.skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    return 1 if result.skipped else 0


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """The signals of a batch system and of a terminal that closes end what is done here as Ctrl-C does."""

    def end(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # no SIGHUP on Windows
    alone = threading.current_thread() is threading.main_thread()  # which alone may set them
    ours = [number for number in numbers if alone and signal.getsignal(number) is signal.SIG_DFL]  # nohup's stays
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _score(options: argparse.Namespace) -> int:
    pattern = str(options.detections)
    if "{}" not in pattern:
        expected = 'expected a pattern with {} for the class, e.g. "comp4_det_test_{}.txt"'
        raise SppnetError(f"--detections {pattern}: {expected}")
    classes = tuple(normalise(name) for name in options.classes)
    known = files_by_stem(options.annotations, (".xml",))
    files = find_annotations(options.annotations, read_image_set(options.image_set, known))
    read = {image: read_annotation(path) for image, path in files.items()}
    annotations = {image: annotation for image, (annotation, _) in read.items()}
    for image, (_, counts) in read.items():
        for reason, count in counts.items():
            print(f"left out: {count} × {reason} in {files[image]}", file=sys.stderr)
    found = {name: read_comp4(_comp4_file(pattern, name)) for name in classes}
    evaluation = evaluate_flat(found, annotations, classes, options.metric, options.iou)
    kept = {key: value for key, value in evaluation.to_dict().items() if key in ("ap", "map", "measures")}
    print(json.dumps(kept) if options.json else evaluation.table())
    return 0


def _convert(options: argparse.Namespace) -> int:
    print(convert(options.source, options.out, options.to, options.format, tuple(options.split)))
    return 0


def _comp4_file(pattern: str, name: str) -> Path:
    """The file of a class, in either form of Unicode: macOS may give a file another one than was typed."""
    forms = [Path(pattern.replace("{}", unicodedata.normalize(form, name))) for form in ("NFC", "NFD")]
    return next((path for path in forms if path.is_file()), forms[0])


def _demo(options: argparse.Namespace) -> int:
    """Generate pictures, train on them, evaluate, detect; without a download. A second call reuses what is there."""
    run, device, start = options.run, choose_device(options.device), time.monotonic()
    devkit = generate_shapes(run / "data")
    splits = {"train": ["SHAPES/train"], "val": ["SHAPES/val"], "test": ["SHAPES/test"]}
    records, _ = load_splits(devkit, splits["train"])
    crops = run / "crops"
    data = {"train": write_crops(records, choose_classes(records, None), crops, 110)}
    train_classifier(parse_settings(ClassifierConfig, {**DEMO_CLASSIFIER, "data": data}, "demo"), crops, device)
    backbone = DEMO["backbone"] | {"weights": {"source": "file", "file": crops / WEIGHTS}}
    own = {"backbone": backbone, "head": DEMO["head"] | {"init": "checkpoint", "checkpoint": crops / WEIGHTS}}
    train_detector(parse_config({**DEMO, **own, "data": {"root": str(devkit), **splits}}, "demo"), run, device)
    output = evaluate_run(run, device)
    assert output.result.evaluation is not None  # generated images are annotated
    pictures = sorted((devkit / "SHAPES" / "JPEGImages").glob("test*"))[:12]
    detect_files(partial(SPPDetector.load, run, device), pictures, run / "pictures")
    print(output.result.evaluation.table())
    print(f"mAP {output.result.evaluation.map:.3f} on {counted(len(output.result.detections), 'test image')}")
    print(f"curves and examples: {output.folder}; pictures with detections: {run / 'pictures'}")
    print(f"in {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


def _config_and_root(options: argparse.Namespace) -> tuple[Config, Path]:
    config = load_config(options.config, options.overrides)
    return config, options.run or Path("runs") / config.name


def _start_logging(verbose: bool) -> None:
    level = logging.DEBUG if verbose else logging.INFO if distributed.is_main() else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "add": _add,
    "suggest": _suggest,
    "eval": _evaluate,
    "test": _evaluate,
    "combine": _combine,
    "detect": _detect,
    "score": _score,
    "convert": _convert,
    "classify": classify,
    "demo": _demo,
}
