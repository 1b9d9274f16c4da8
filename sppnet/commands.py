"""What each command of the command line does: it calls one library function and prints the result."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sppnet import distributed
from sppnet.benchmark import run_benchmark
from sppnet.compiling import announce_compiling
from sppnet.config import Config
from sppnet.config_files import ConfigError, load_config
from sppnet.data.folder import FolderError
from sppnet.data.proposal_files import ProposalFileError, export_windows
from sppnet.data.voc import read_annotation, read_comp4, read_image_set, stated_size
from sppnet.demo import run_demo
from sppnet.detection.compression import compress_run
from sppnet.detection.detector import SPPDetector
from sppnet.detection.finetuning import FinetuneError
from sppnet.detection.folder_detection import detect_files
from sppnet.detection.proposals import ProposalError, read_windows
from sppnet.detection.stages import STAGES, describe_stage
from sppnet.detection.testing import TestOutput, test_run
from sppnet.detection.training import Training, train_detector
from sppnet.evaluation.voc import VOCEvaluation, evaluate_flat
from sppnet.store import StoreError

EXPECTED = (ValueError, StoreError, ProposalError, FinetuneError, FolderError, ProposalFileError, OSError)
log = logging.getLogger("sppnet")


def run(options: argparse.Namespace) -> int:
    """Do what parsed options say; returns the exit status as `sppnet.cli.main` describes it."""
    distributed.start()
    _start_logging(options.verbose)
    announce_compiling()
    try:
        return ACTIONS[options.command](options)
    except EXPECTED as error:
        if options.verbose:
            traceback.print_exc()
        print(f"sppnet {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is complete is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        distributed.stop()


def _train(options: argparse.Namespace) -> int:
    config, root = _config_and_root(options)
    only = (options.only,) if options.only else STAGES
    force = STAGES if options.force else STAGES[STAGES.index(options.start) :] if options.start else ()
    if options.dry_run:
        training = Training(config, root, _device(options))
        redone = training.redone(only, force)
        print("\n".join([str(training.plan.data), *(describe_stage(s, only, redone) for s in training.status())]))
        ends = training.obstacles(only)
        for reason in ends:
            print(f"{reason}; training would end there", file=sys.stderr)
        return 1 if ends else 0
    return _run_training(config, root, options, only, force)


def _train_stage(options: argparse.Namespace) -> int:
    config, root = _config_and_root(options)
    imports, export = getattr(options, "imports", None), getattr(options, "export", None)
    if imports:
        proposals = config.proposals.model_copy(update={"import_from": tuple(imports)})
        config = config.model_copy(update={"proposals": proposals})
    status = _run_training(config, root, options, (options.command,), (options.command,) if options.force else ())
    if imports and distributed.is_main():
        names = ",".join(map(str, imports))
        print(f"the other stages use these windows with the same setting: proposals.import_from=[{names}]")
    if export and distributed.is_main():
        plan = Training(config, root, _device(options)).plan
        records = [*plan.data.train, *plan.validation]
        export_windows(export, [r.id for r in records], [read_windows(plan.windows, r) for r in records])
        print(f"windows of {len(records)} images written to {export}")
    return status


def _run_training(
    config: Config, root: Path, options: argparse.Namespace, only: Sequence[str], force: Sequence[str]
) -> int:
    detector = train_detector(config, root, _device(options), only, force)
    if detector is not None and distributed.is_main():
        print(f"detector of {len(detector.classes)} classes in {root / 'detector'}; next: sppnet eval {root}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    detector = SPPDetector.load(options.run, _device(options))
    output = test_run(
        detector, options.run, options.data, tuple(options.split), options.metric, evaluate=options.command == "eval"
    )
    if distributed.is_main():
        _print_output(output)
    return 0


def _print_output(output: TestOutput) -> None:
    result = output.result
    if result.proposals is not None:
        quality = result.proposals
        print(
            f"windows: {quality.mean_windows:.0f} an image, recall at IoU 0.5 {quality.recall:.3f}, "
            f"mean best overlap {quality.mean_best_overlap:.3f}"
        )
    if result.seconds_per_image is not None:
        print(f"detection: {result.seconds_per_image:.3f} s an image, without proposals")
    if result.evaluation is not None:
        print(result.evaluation.table())
    print(f"results in {output.folder}")


def _detect(options: argparse.Namespace) -> int:
    detector = SPPDetector.load(options.run, _device(options))
    result = detect_files(detector, options.images, options.out, options.threshold)
    count = sum(len(found) for found in result.detections.values())
    print(f"{count} detections in {len(result.detections)} images, written to {options.out}")
    if result.detections and not count:
        print(f"nothing scores above --threshold {options.threshold:g}; a lower one shows less certain detections")
    for reason in result.skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    return 1 if result.skipped else 0


def _compress(options: argparse.Namespace) -> int:
    if distributed.is_main():
        if options.images < 1:
            raise ConfigError(f"--images {options.images}: expected at least 1")
        done = compress_run(
            options.run, options.fc6, options.fc7, options.out, _device(options), options.method, options.images
        )
        print(f"{done}\ncompressed detector in {done.folder}; next: sppnet eval {done.folder}")
    return 0


def _score(options: argparse.Namespace) -> int:
    if "{}" not in options.detections:
        raise ConfigError(
            f"--detections {options.detections}: expected a pattern with {{}} for the class, "
            'e.g. "comp4_det_test_{}.txt"'
        )
    classes = tuple(name.strip() for name in options.classes.split(",") if name.strip())
    if not classes:
        raise ConfigError("--classes: expected class names separated by commas, e.g. cat,dog")
    files = {image: options.annotations / f"{image}.xml" for image in read_image_set(options.image_set)}
    annotations = {image: read_annotation(path, stated_size(path))[0] for image, path in files.items()}
    found = {name: read_comp4(Path(options.detections.replace("{}", name))) for name in classes}
    evaluation: VOCEvaluation = evaluate_flat(found, annotations, classes, options.metric, options.iou)
    values = evaluation.to_dict()
    print(json.dumps({"ap": values["ap"], "map": values["map"]}) if options.json else evaluation.table())
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    result = run_benchmark(options.run, options.images, _device(options), options.rounds, options.rcnn)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result.table())
    return 0


def _demo(options: argparse.Namespace) -> int:
    print("\n".join(run_demo(options.run, _device(options))))
    return 0


def _config_and_root(options: argparse.Namespace) -> tuple[Config, Path]:
    config = load_config(options.config, options.overrides)
    return config, options.run or Path("runs") / config.name


def _device(options: argparse.Namespace) -> torch.device:
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise ConfigError(f"--device {options.device}: expected cpu, cuda or cuda:N")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device}: this machine has no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {options.device}: this machine has {torch.cuda.device_count()}; count from 0")
    return device


def _start_logging(verbose: bool) -> None:
    level = logging.DEBUG if verbose else logging.INFO if distributed.is_main() else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    **dict.fromkeys(STAGES, _train_stage),
    "train": _train,
    "eval": _evaluate,
    "test": _evaluate,
    "detect": _detect,
    "compress": _compress,  # on a trained run; the stage of this name has no command of its own
    "score": _score,
    "benchmark": _benchmark,
    "demo": _demo,
}
