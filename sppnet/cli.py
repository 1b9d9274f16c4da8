"""The command line: the commands and their options.

What they do is in `sppnet.commands`, imported once the options are understood: torch and the rest take seconds, which
neither ``--help`` nor a mistyped option should.
"""

from __future__ import annotations

import argparse
import difflib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sppnet import __version__
from sppnet.config import STAGES
from sppnet.errors import SppnetError
from sppnet.paths import expand_path

T = TypeVar("T")
METRICS = ("11point", "area", "ilsvrc", "coco")
FORMATS = ("voc", "coco", "yolo")
VIEWS = ("centre", "ten", "full", "multiview")  # of an image that is classified

# Commands that run one stage alone; the others go with `train`.
VERBS = {"proposals": "propose", "maps": "extract"}
STAGE_COMMANDS = {VERBS.get(stage, stage): stage for stage in STAGES if stage not in ("low_rank", "embed", "joint")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0, 1 where only part could be done (or would be: --dry-run), 2 for an error, 130 for Ctrl-C; 143 and 129
    for `detect` that SIGTERM or SIGHUP ends.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names in any alphabet, on terminals of any encoding
            stream.reconfigure(errors="backslashreplace")
    options = _options(arguments)
    # read when torch is loaded; else, on a busy machine, waiting threads take the cores of those that they wait for
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from sppnet.commands import run

    try:
        status = run(options)
        print(end="", flush=True)
    except OSError as error:  # of standard output: its reader, such as `head`, has seen enough, or a disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left goes nowhere
        if isinstance(error, BrokenPipeError):
            return 141  # as a program that ends by the signal
        print(f"sppnet {options.command}: error: cannot write the output ({error.strerror})", file=sys.stderr)
        return 2
    return status


class Command(argparse.ArgumentParser):
    """A parser whose errors name options that it does not know, and the nearest that it does.

    argparse looks for missing arguments first, and then says nothing of a mistyped one.
    """

    given: Sequence[str] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # argparse's own takes -1e-3 for an option
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf).*", re.IGNORECASE)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        self.given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        known = list(self._option_string_actions)
        hints = []
        for wrong in dict.fromkeys(word.partition("=")[0] for word in self.given if word.startswith("--")):
            if wrong != "--" and not any(name.startswith(wrong) for name in known):
                near = difflib.get_close_matches(wrong, known, n=1)
                hints.append(f"; {wrong} is an unknown option{f', did you mean {near[0]}?' if near else ''}")
        if wrong_choice := re.search(r"invalid choice: '(.*?)'", message):
            known = [str(choice) for action in self._actions for choice in action.choices or ()]
            hints += [f"; did you mean {near}?" for near in difflib.get_close_matches(wrong_choice[1], known, n=1)]
        super().error(message + "".join(hints))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options; one that is not known ends the program with the command's usage and the nearest one."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        command: Command = options.parser
        early = [word for word in unknown if word in command._option_string_actions]  # before the command's name
        hints = [f"; write {word} after {options.command}" for word in early]
        command.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
    return options


def _checked(
    convert: Callable[[str], T], expected: str, holds: Callable[[T], bool] = lambda value: True
) -> Callable[[str], T]:
    """A type of an option whose errors say what is expected; of SppnetError the message does."""

    def checked(text: str) -> T:
        try:
            value = convert(text)
        except SppnetError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return checked


PATH = _checked(expand_path, "a path", bool)
THRESHOLD = _checked(float, "a score, e.g. -0.5", lambda score: score < math.inf)  # nor NaN; -inf shows everything
MINUTES = _checked(float, "a number of minutes above 0", lambda minutes: 0 < minutes < math.inf)
OVERLAP = _checked(float, "an overlap above 0 and at most 1, e.g. 0.5", lambda overlap: 0 < overlap <= 1)
COUNT = _checked(int, "a whole number above 0", lambda count: count > 0)
FILTER = _checked(int, "a whole number from 0 on", lambda number: number >= 0)
CLASSES = _checked(
    lambda text: tuple(name.strip() for name in text.split(",")),
    "class names separated by commas, all different, e.g. cat,dog",
    lambda names: "" not in names and len(set(names)) == len(names),
)


def _parser() -> argparse.ArgumentParser:
    parser = Command(prog="sppnet", description="SPP-net object detection: train, evaluate, detect.")
    parser.set_defaults(verbose=False)
    parser.add_argument("--version", action="version", version=f"sppnet {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(commands, "train", "train a detector by settings, or on a folder alone; every stage resumes")
    _add_training_options(train, "CONFIG|FOLDER", "a YAML file, see configs/, or a folder of pictures and their boxes")
    train.add_argument("--minutes", type=MINUTES, metavar="N", help="of a folder: choose what fits in this time")
    train.add_argument("--dry-run", action="store_true", help="print which stages would run, and why; change nothing")
    train.add_argument("--from", dest="start", choices=STAGES, help="run this stage and the later ones again")
    train.add_argument("--only", choices=STAGES, help="run this stage alone")
    train.add_argument("--force", action="store_true", help="run every stage again, whatever is there already")

    add = _command(commands, "add", "train a run on more pictures or classes; known ones are not searched again")
    add.add_argument("run", type=PATH, metavar="RUN", help="the folder of a run with a joint head")
    add.add_argument("folder", type=PATH, metavar="FOLDER", help="pictures and their boxes, of any format")
    _add_set(add, "joint.steps=2000")
    _add_device(add)

    suggest = _command(commands, "suggest", "rank pictures by what labelling them, or correcting labels, would teach")
    suggest.add_argument("run", type=PATH, metavar="RUN", help="the folder of a trained run")
    suggest.add_argument("folder", type=PATH, nargs="?", metavar="FOLDER", help="pictures (default: those of the run)")
    suggest.add_argument("--top", type=COUNT, default=20, metavar="N", help="how many are shown (default: 20)")
    suggest.add_argument("--out", type=PATH, metavar="DIR", help="default: RUN/suggest")
    _add_device(suggest)

    for name, stage in STAGE_COMMANDS.items():
        command = _command(commands, name, f"run the stage {stage} of training alone")
        command.set_defaults(stage=stage)
        _add_training_options(command)
        command.add_argument("--force", action="store_true", help="run it again, whatever is there already")
        if stage == "proposals":
            text = "take windows from .npz or .mat files (proposals.import_from)"
            command.add_argument("--import", dest="imports", nargs="+", type=PATH, metavar="FILE", help=text)
            command.add_argument("--export", type=PATH, metavar="FILE", help="write the windows to a .npz or .mat file")

    for name in ("eval", "test"):
        own = (
            "evaluate on a split: mAP, errors by kind, curves" if name == "eval" else "detect over a split: comp4 files"
        )
        test = _command(commands, name, own)
        test.add_argument("run", type=PATH, metavar="RUN", help="the folder of a trained run")
        test.add_argument("--data", type=PATH, metavar="FOLDER", help="other pictures and boxes (default: data.root)")
        test.add_argument("--split", nargs="+", default=[], metavar="PART", help="default: data.test")
        if name == "eval":
            test.add_argument("--metric", choices=METRICS, help="default: evaluate.metric")
        _add_device(test)

    combine = _command(commands, "combine", "make one run of several: their detections are pooled, class by class")
    combine.add_argument("runs", nargs="+", type=PATH, metavar="RUN", help="the folders of two trained runs or more")
    combine.add_argument("--out", type=PATH, required=True, metavar="DIR", help="the folder of the new run")

    detect = _command(commands, "detect", "detect in images: pictures, detections.json, detections.csv")
    detect.add_argument("run", type=PATH, metavar="RUN", help="the folder of a trained run")
    detect.add_argument("images", nargs="+", type=PATH, metavar="IMAGE", help="files, folders or patterns")
    detect.add_argument("--out", type=PATH, required=True, metavar="DIR", help="where the results go")
    detect.add_argument("--threshold", type=THRESHOLD, help="lowest score shown (default: by class, from training)")
    _add_device(detect)

    score = _command(commands, "score", "evaluate comp4 files against annotations, without a model")
    score.add_argument("--annotations", type=PATH, required=True, metavar="DIR", help="folder of VOC .xml files")
    score.add_argument("--image-set", type=PATH, required=True, metavar="FILE", help="image ids, one a line")
    score.add_argument("--detections", type=PATH, required=True, metavar="PATTERN", help='comp4 files, "{}" the class')
    score.add_argument("--classes", type=CLASSES, required=True, metavar="A,B,C")
    score.add_argument("--metric", choices=METRICS, default="11point")
    score.add_argument("--iou", type=OVERLAP, default=0.5, help="of all metrics but coco (default: 0.5)")
    score.add_argument("--json", action="store_true", help="print JSON instead of a table")

    convert = _command(commands, "convert", "write annotated pictures of any format as VOC, COCO or YOLO")
    convert.add_argument("source", type=PATH, metavar="FOLDER", help="the pictures and their annotations")
    convert.add_argument("--to", choices=FORMATS, required=True, help="the format to write")
    convert.add_argument("--out", type=PATH, required=True, metavar="DIR", help="a new folder")
    convert.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="of FOLDER (default: by looking)")
    convert.add_argument("--split", nargs="+", default=[], metavar="PART", help="default: all that train, val or test")

    _add_classify(commands)

    demo = _command(commands, "demo", "train, evaluate and detect on generated pictures, in minutes")
    demo.add_argument("--run", type=PATH, default=Path("runs/demo"), metavar="DIR")
    _add_device(demo)
    return parser


def _add_classify(commands) -> None:  # type: ignore[no-untyped-def]
    classify = _command(commands, "classify", "classification of whole images, the paper's section 3")
    actions = classify.add_subparsers(dest="action", required=True, metavar="ACTION")

    train = _command(actions, "train", "train a classifier on a folder of images for each class; it resumes")
    train.add_argument("source", type=PATH, metavar="CONFIG|FOLDER", help="a YAML file, or the folder of the classes")
    _add_set(train, "training.sizes=[180,224]")
    train.add_argument("--run", type=PATH, required=True, metavar="DIR", help="where the classifier goes")
    train.add_argument("--epochs", type=COUNT, help="default: training.epochs")
    _add_device(train)

    test = _command(actions, "test", "top-1 and top-5 error of one run, or of the mean of several")
    test.add_argument("sources", nargs="+", type=PATH, metavar="RUN … FOLDER", help="runs, then the folder of classes")
    test.add_argument("--views", choices=VIEWS, default="full", help="default: full")
    test.add_argument("--json", type=PATH, metavar="FILE", help="write the result to a file too")
    _add_device(test)

    predict = _command(actions, "predict", "print the classes of pictures")
    predict.add_argument("run", type=PATH, metavar="RUN", help="the folder of a trained classifier")
    predict.add_argument("images", nargs="+", type=PATH, metavar="IMAGE", help="files, folders or patterns")
    predict.add_argument("--views", choices=VIEWS, default="full", help="default: full")
    _add_device(predict)

    features = _command(actions, "features", "write full-image features of one length, l2-normalised")
    linear = _command(actions, "linear", "linear SVMs on full-image features: VOC07's or Caltech-101's protocol")
    for command in (features, linear):
        command.add_argument("run", type=PATH, metavar="RUN|CONFIG", help="a classifier, or a backbone's settings")
        command.add_argument("data", type=PATH, metavar="FOLDER", help="one folder a class, or VOC's year folders")
        command.add_argument("--layer", choices=("pool", "fc6", "fc7"), default="pool", help="default: pool")
        command.add_argument("--side", type=COUNT, default=224, metavar="S", help="shorter side of the images")
        _add_device(command)
    splits: dict[str, Any] = {"nargs": "+", "default": ["VOC2007/trainval"], "metavar": "PART"}
    features.add_argument("--split", help="of VOC (default: VOC2007/trainval)", **splits)
    features.add_argument("--out", type=PATH, required=True, metavar="FILE", help="a .npz file")
    linear.add_argument("--train", help="of VOC (default: VOC2007/trainval)", **splits)
    splits |= {"default": ["VOC2007/test"]}
    linear.add_argument("--test", help="of VOC (default: VOC2007/test)", **splits)
    linear.add_argument("--classes", type=CLASSES, metavar="A,B,C", help="of VOC (default: all in training)")
    linear.add_argument("--train-images", type=COUNT, default=30, metavar="N", help="of each class of a folder")
    linear.add_argument("--json", type=PATH, metavar="FILE", help="write the result to a file too")

    strongest = _command(actions, "strongest", "draw where a filter of the last layer responds most (figure 2)")
    strongest.add_argument("run", type=PATH, metavar="RUN|CONFIG", help="a classifier, or a backbone's settings")
    strongest.add_argument("images", type=PATH, metavar="FOLDER", help="a folder of images")
    strongest.add_argument("--filter", type=FILTER, required=True, metavar="K", help="its number, from 0")
    strongest.add_argument("--out", type=PATH, required=True, metavar="FILE", help="the picture, .png")
    _add_device(strongest)


def _command(commands, name: str, text: str) -> Command:  # type: ignore[no-untyped-def]
    command: Command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--verbose", action="store_true", help="debug messages, and tracebacks of errors")
    command.set_defaults(parser=command)
    return command


def _add_training_options(
    command: argparse.ArgumentParser, source: str = "CONFIG", text: str = "a YAML file, see configs/"
) -> None:
    command.add_argument("config", type=PATH, metavar=source, help=text)
    _add_set(command, "maps.scales=[480,688]")
    command.add_argument("--run", type=PATH, metavar="DIR", help="where artifacts go (default: runs/NAME)")
    _add_device(command)


def _add_set(command: argparse.ArgumentParser, example: str) -> None:
    several: dict[str, Any] = {"action": "extend", "nargs": "+", "default": [], "metavar": "KEY=VALUE"}
    command.add_argument("--set", dest="overrides", help=f"e.g. {example}", **several)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda where there is one)")
