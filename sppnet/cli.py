"""The command line: each action parses its arguments, calls one library function and prints the result."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from sppnet import __version__, distributed
from sppnet.benchmark import run_benchmark
from sppnet.config import Config
from sppnet.config_files import ConfigError, load_config
from sppnet.data.folder import FolderError
from sppnet.data.proposal_files import ProposalFileError, export_windows
from sppnet.data.voc import read_annotation, read_comp4, read_image_set, stated_size
from sppnet.demo import run_demo
from sppnet.detection.compression import SAMPLE, compress_run
from sppnet.detection.detector import SPPDetector
from sppnet.detection.finetuning import FinetuneError
from sppnet.detection.folder_detection import detect_files
from sppnet.detection.low_rank import CompressionError
from sppnet.detection.proposals import ProposalError, read_windows
from sppnet.detection.stages import STAGES, describe_stage
from sppnet.detection.testing import TestOutput, test_run
from sppnet.detection.training import Training, train_detector
from sppnet.evaluation.voc import VOCEvaluation, evaluate_flat
from sppnet.store import StoreError

EXPECTED = (ValueError, StoreError, ProposalError, FinetuneError, FolderError, ProposalFileError, OSError)
log = logging.getLogger("sppnet")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where only part could be done, 2 for an error, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    distributed.start()
    _start_logging(options.verbose)
    try:
        return int(options.action(options) or 0)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sppnet", description="SPP-net object detection: train, evaluate, detect.")
    parser.set_defaults(verbose=False)
    parser.add_argument("--version", action="version", version=f"sppnet {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(commands, "train", "train a detector; every stage resumes", _train)
    _add_training_options(train)
    train.add_argument("--dry-run", action="store_true", help="print which stages would run, and why; change nothing")
    train.add_argument("--from", dest="start", choices=STAGES, help="do this stage and the later ones again")
    train.add_argument("--only", choices=STAGES, help="run this stage alone")
    train.add_argument("--force", action="store_true", help="do every stage again, whatever is there already")

    for stage in (name for name in STAGES if name != "compress"):  # that name is the action on a trained run
        command = _command(commands, stage, f"run the {stage} stage of training alone", _train_stage)
        _add_training_options(command)
        command.add_argument("--force", action="store_true", help="do it again, whatever is there already")
        if stage == "propose":
            command.add_argument(
                "--import",
                dest="imports",
                nargs="+",
                type=Path,
                metavar="FILE",
                help="take windows from .npz or .mat files (proposals.import_from)",
            )
            command.add_argument("--export", type=Path, metavar="FILE", help="write the windows to a .npz or .mat file")

    for name, text in (
        ("eval", "evaluate on a split: mAP, comp4 files, curves"),
        ("test", "detect over a split: comp4 files"),
    ):
        test = _command(commands, name, text, _evaluate)
        test.add_argument("run", type=Path, metavar="RUN", help="the folder of a trained run")
        test.add_argument(
            "--data", type=Path, metavar="FOLDER", help="another devkit-shaped folder (default: data.root)"
        )
        test.add_argument("--split", nargs="+", default=[], metavar="YEAR/SET", help="default: data.test")
        test.add_argument("--metric", choices=("11point", "area"), help="default: evaluate.metric")
        _add_device(test)

    detect = _command(commands, "detect", "detect in images: pictures, detections.json, detections.csv", _detect)
    detect.add_argument("run", type=Path, metavar="RUN", help="the folder of a trained run")
    detect.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or patterns")
    detect.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    detect.add_argument("--threshold", type=float, default=0.0, help="lowest score shown (default: 0)")
    _add_device(detect)

    compress = _command(commands, "compress", "a faster detector: fc6 and fc7 of low rank", _compress)
    compress.add_argument("run", type=Path, metavar="RUN", help="the folder of a trained run, which stays as it is")
    for layer in ("fc6", "fc7"):
        compress.add_argument(
            f"--{layer}", type=int, default=0, metavar="RANK", help=f"rank of {layer} (default: 0, whole)"
        )
    compress.add_argument(
        "--method",
        choices=("responses", "weights"),
        default="responses",
        help="keep what the layers' answers to training images need (default), or what their weights do (SVD)",
    )
    compress.add_argument(
        "--images",
        type=int,
        default=SAMPLE.images,
        metavar="N",
        help=f"training images to ask (default: {SAMPLE.images})",
    )
    compress.add_argument("--out", type=Path, metavar="DIR", help="the new folder (default: RUN/compressed-…)")
    _add_device(compress)

    score = _command(commands, "score", "evaluate comp4 files against annotations, without a model", _score)
    score.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="folder of VOC .xml files")
    score.add_argument("--image-set", type=Path, required=True, metavar="FILE", help="image ids, one a line")
    score.add_argument("--detections", required=True, metavar="PATTERN", help='comp4 files, "{}" for the class')
    score.add_argument("--classes", required=True, metavar="A,B,C")
    score.add_argument("--metric", choices=("11point", "area"), default="11point")
    score.add_argument("--iou", type=float, default=0.5)
    score.add_argument("--json", action="store_true", help="print JSON instead of a table")

    bench = _command(commands, "benchmark", "how fast it is here: a profile of detection, and peers", _benchmark)
    bench.add_argument("run", type=Path, nargs="?", metavar="RUN", help="a trained run (default: random AlexNet)")
    bench.add_argument("--images", nargs="+", default=[], metavar="IMAGE", help="default: one generated picture")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each image (default: 5)")
    bench.add_argument("--rcnn", type=int, default=0, metavar="N", help="the trunk on N windows too, as in R-CNN")
    bench.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_device(bench)

    demo = _command(commands, "demo", "train, evaluate and detect on generated pictures, in minutes", _demo)
    demo.add_argument("--run", type=Path, default=Path("runs/demo"), metavar="DIR")
    _add_device(demo)
    return parser


def _command(commands, name: str, text: str, action) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(action=action)
    command.add_argument("--verbose", action="store_true", help="debug messages, and tracebacks of errors")
    return command


def _add_training_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, see configs/")
    command.add_argument(
        "--set",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="e.g. maps.scales=[480,688]",
    )
    command.add_argument("--run", type=Path, metavar="DIR", help="where artifacts go (default: runs/NAME)")
    _add_device(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def _train(options: argparse.Namespace) -> int:
    config, root = _config_and_root(options)
    only = (options.only,) if options.only else STAGES
    force = STAGES if options.force else STAGES[STAGES.index(options.start) :] if options.start else ()
    if options.dry_run:
        training = Training(config, root, _device(options))
        redone = training.redone(only, force)
        print("\n".join([str(training.plan.data), *(describe_stage(s, only, redone) for s in training.status())]))
        for setting, path in training.missing_files():
            print(f"missing: {path} ({setting}); training would end there", file=sys.stderr)
        try:
            training.networks.check_ranks()
        except CompressionError as error:
            print(f"{error}; training would end there", file=sys.stderr)
        return 0
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
