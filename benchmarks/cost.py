"""What each stage of a training costs: wall seconds and peak memory, each stage in a process of its own.

    python benchmarks/cost.py CONFIG --run DIR [--set KEY=VALUE ...] [--no-eval]
    python benchmarks/cost.py CONFIG --run DIR --images 200 --before CHECKOUT [--precision float32]

Prints a Markdown table. Seconds include the start of the process, a few of them. Memory is that of the process and its
workers together, sampled; pages that they share count for each of them. Stages that are there already take no time;
give a new folder for figures of all of them. With `--images` the devkit is a part of `--devkit`: so many training
images, and a quarter as many of val. With `--before` every stage runs in the other checkout first, then here.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from checkouts import HERE, Checkout, existing
from machine import tree_memory

SAMPLE = 0.05  # s between two looks at the memory


@dataclass(frozen=True)
class Cost:
    """One stage: what had to be done ("run", "resume", "reuse", "skip"), and what it took; None where nothing ran."""

    stage: str
    state: str
    seconds: float | None = None
    gigabytes: float | None = None
    status: int = 0


@dataclass(frozen=True)
class Training:
    """One training by the commands of a checkout."""

    code: Checkout
    config: Path
    run: Path
    settings: tuple[str, ...]
    device: str

    def stages(self) -> list[tuple[str, str]]:
        """(stage, state) in order, as the dry run tells them; ends the program where it fails."""
        done = self._start("train", "--dry-run", stdout=subprocess.PIPE)
        lines = done.communicate()[0].splitlines()
        if done.returncode:
            sys.exit(done.returncode)
        words = [line.split() for line in lines if not line.startswith("data:")]
        return [(own[0], own[1]) for own in words if len(own) > 1]

    def measure(self, stage: str, state: str) -> Cost:
        """Run one stage, or "eval"."""
        if state == "skip":
            return Cost(stage, state)
        start, peak = time.monotonic(), 0
        process = self._start(stage) if stage == "eval" else self._start("train", "--only", stage)
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(SAMPLE)
        return Cost(stage, state, time.monotonic() - start, peak / 1e9 or None, abs(process.returncode))

    def _start(self, command: str, *options: str, stdout: int | None = None) -> subprocess.Popen[str]:
        arguments: list[str | Path] = [command, self.run, "--device", self.device]
        if command == "train":
            arguments = [command, self.config, "--run", *arguments[1:], *options]
            arguments += ["--set", *self.settings] if self.settings else []
        output = sys.stderr if stdout is None else stdout
        return subprocess.Popen(
            self.code.command(*arguments), cwd=self.code.root, env=self.code.environment, stdout=output, text=True
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    codes = {"before": options.before, "now": options.now} if options.before else {"now": options.now}
    settings = shared_settings(options)
    trainings = {
        name: Training(
            code, code.root / options.config, options.run / name, own_settings(code, settings, options), device
        )
        for name, code, device in ((name, Checkout(root), options.device) for name, root in codes.items())
    }
    plans = {name: [*training.stages(), *eval_stage(options)] for name, training in trainings.items()}
    costs: dict[str, list[Cost]] = {name: [] for name in trainings}
    for stages in zip(*plans.values(), strict=True):
        for (name, training), (stage, state) in zip(trainings.items(), stages, strict=True):
            costs[name].append(training.measure(stage, state))
        if any(own[-1].status for own in costs.values()):
            break
    print("\n".join(table(costs)))
    return max(cost.status for cost in itertools.chain(*costs.values()))


def table(costs: dict[str, list[Cost]]) -> list[str]:
    """Markdown: a row for each stage, with the columns of every code and, of two, their ratio."""
    columns = [f"{what}, {name}" for what in ("s", "GB") for name in costs]
    ratios = ["s, before / now", "GB, now / before"] if len(costs) == 2 else []
    lines = [f"| stage | | {' | '.join(columns + ratios)} |", "|---" * (2 + len(columns + ratios)) + "|"]
    rows = [list(own) for own in zip(*costs.values(), strict=True)]
    total = [
        Cost("all", "", sum(c.seconds or 0 for c in own), max(c.gigabytes or 0 for c in own)) for own in costs.values()
    ]
    for row in [*rows, total]:
        times, sizes = [c.seconds for c in row], [c.gigabytes for c in row]
        state = "FAILED" if any(c.status for c in row) else row[-1].state
        numbers = [*(number(t, ".1f") for t in times), *(number(size, ".2f") for size in sizes)]
        if ratios:
            numbers += [quotient(times[0], times[1]), quotient(sizes[1], sizes[0])]
        lines.append(f"| {row[-1].stage} | {state} | {' | '.join(numbers)} |")
    return lines


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def quotient(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else ""


def shared_settings(options: argparse.Namespace) -> list[str]:
    """Overrides of all codes: the devkit, cut to `--images`, and what `--set` says."""
    if options.images is None:
        return list(options.settings)
    from examples import subset

    counts = {"train": options.images, "val": max(1, options.images // 4)}
    return [f"data.root={subset(options.devkit, options.run / 'VOCdevkit', counts)}", *options.settings]


def own_settings(code: Checkout, settings: list[str], options: argparse.Namespace) -> tuple[str, ...]:
    """Overrides in the words of a checkout."""
    precision = code.precision(options.precision) if options.precision else []
    weights = code.weights(options.weights) if options.weights else []
    return (*precision, *weights, *settings)


def eval_stage(options: argparse.Namespace) -> list[tuple[str, str]]:
    return [] if options.no_eval else [("eval", "run")]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="in each checkout, or an absolute path")
    parser.add_argument("--run", type=Path, required=True, help="folder of the artifacts, in a folder for each code")
    parser.add_argument("--set", dest="settings", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--weights", type=Path, help="file of the backbone's weights (default: the configuration's)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="default: the configuration's; with --before float32"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-eval", action="store_true", help="training only")
    parser.add_argument("--before", type=Path, help="the root of another checkout, measured beside this one")
    parser.add_argument("--now", type=Path, default=HERE, help="the root of this code (default: where this file lies)")
    parser.add_argument("--images", type=int, help="training images; a quarter as many of val")
    shared = os.environ.get("SPPNET_SHARED")
    devkit = Path(shared) / "voc/VOCdevkit" if shared else None
    parser.add_argument("--devkit", type=Path, default=devkit, help="default: SPPNET_SHARED/voc/VOCdevkit")
    options = parser.parse_args(arguments)
    if options.images is not None and (options.images < 1 or options.devkit is None):
        parser.error("--images must be at least 1, and needs --devkit or SPPNET_SHARED")
    if options.before and options.precision is None:
        options.precision = "float32"
    options.run = options.run.resolve()
    existing([options.now, options.before])
    return options


if __name__ == "__main__":
    sys.exit(main())
