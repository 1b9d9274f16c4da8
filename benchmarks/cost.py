"""What each stage of a training costs: wall seconds and peak memory, each stage in a process of its own.

    python benchmarks/cost.py CONFIG --run DIR [--set KEY=VALUE ...] [--device cpu] [--no-eval]

Prints a Markdown table. Seconds include the start of the process, a few of them. Memory is the largest resident set of
one process: `propose` has a worker per core of about the same size beside it. Stages that are there already take no
time; give a new folder for figures of all of them. Images to test on are searched for windows in `eval`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Nothing of sppnet is imported: a child's peak memory counts from the fork, that is from the size of this process.
BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Cost:
    """One stage: what had to be done ("run", "resume", "reuse", "skip"), and what it took; None where nothing ran."""

    stage: str
    state: str
    seconds: float | None = None
    gigabytes: float | None = None
    status: int = 0

    def row(self) -> str:
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        gigabytes = "" if self.gigabytes is None else f"{self.gigabytes:.2f}"
        return f"| {self.stage} | {self.state if self.status == 0 else 'FAILED'} | {seconds} | {gigabytes} |"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    costs: list[Cost] = []
    for stage, state in planned(options):
        costs.append(Cost(stage, state) if state == "skip" else measure(stage, state, command(stage, options)))
        if costs[-1].status:
            break
    print("\n".join(["| stage | | wall, s | peak memory, GB |", "|---|---|---|---|", *(cost.row() for cost in costs)]))
    seconds, peaks = [c.seconds or 0 for c in costs], [c.gigabytes or 0 for c in costs]
    print(f"| all | | {sum(seconds):.1f} | {max(peaks, default=0):.2f} |")
    return max((cost.status for cost in costs), default=0)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="folder of the artifacts")
    parser.add_argument("--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-eval", action="store_true", help="training only")
    return parser.parse_args(arguments)


def planned(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(stage, state) in order, as the dry run tells them; then eval."""
    dry_run = subprocess.run([*command("train", options), "--dry-run"], stdout=subprocess.PIPE, text=True, check=False)
    if dry_run.returncode:
        sys.exit(dry_run.returncode)
    stages = [tuple(line.split()[:2]) for line in dry_run.stdout.splitlines() if not line.startswith("data:")]
    return [(name, state) for name, state in stages] + ([] if options.no_eval else [("eval", "run")])


def command(stage: str, options: argparse.Namespace) -> list[str]:
    sppnet = [sys.executable, "-m", "sppnet", stage]
    if stage == "eval":
        return [*sppnet, str(options.run), "--device", options.device]
    overrides = ["--set", *options.overrides] if options.overrides else []
    if stage == "compress":  # by itself it is an action on a trained run
        sppnet, overrides = [*sppnet[:-1], "train"], [*overrides, "--only", stage]
    return [*sppnet, str(options.config), "--run", str(options.run), "--device", options.device, *overrides]


def measure(stage: str, state: str, arguments: list[str]) -> Cost:
    start = time.monotonic()
    process = subprocess.Popen(arguments, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * BYTES_PER_UNIT / 1e9
    return Cost(stage, state, time.monotonic() - start, peak, abs(process.returncode))


if __name__ == "__main__":
    sys.exit(main())
