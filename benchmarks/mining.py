"""Hard-negative mining as it is now against an older checkout: seconds, memory, and whether the detectors agree.

    git worktree add /tmp/before 347e631
    python benchmarks/mining.py configs/voc9_mobilenet_v2.yaml --run runs/voc9_mobilenet_v2 --before /tmp/before \
        [--images 100] [--rounds 5] [--set KEY=VALUE ...]

347e631 is the last commit at which fc6 and fc7 were converted anew for every batch of windows. Both sides mine the same
images with the same maps, windows, head and scale, each in a process of its own, in pairs: one after the other, the
order changing from pair to pair; the ratio is taken pair by pair. Seconds are those of mining, from the positives to
the last fit, without the start of the process. The weights of every class must point the same way: exit status 1 where
a cosine is 0.999 or less. The run folder is read only.

With `--set compress.fc6=… compress.fc7=…` mining is now on the thin layers of that stage (which must be complete),
before on the whole ones; then the weights point elsewhere, and what that costs is for `sppnet eval` to say.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

AGREES = 0.999  # cosine; features in bfloat16 are rounded differently on the two sides
BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
NOW = Path(__file__).resolve().parent.parent

# One side: runs against whichever sppnet PYTHONPATH names, so it uses only what both commits have.
DRIVER = """
import inspect, json, sys, time
from pathlib import Path
import torch
import sppnet
from sppnet.config import Config
from sppnet.detection import window_features
from sppnet.detection.hard_negatives import mine_detectors
from sppnet.detection.plan import load_run_data
from sppnet.detection.training_windows import MiningWindows, TrainingWindows
from sppnet.network.sppnet import build_head
from sppnet.network.trunks import build_trunk
from sppnet.store import read_tensors, write_arrays

task = json.loads(Path(sys.argv[1]).read_text())
checkout = Path(task["checkout"]).resolve()
assert checkout in Path(sppnet.__file__).resolve().parents, f"{sppnet.__file__} is not of {checkout}"
torch.set_num_threads(task["threads"])

config = Config.model_validate(task["config"])
data = load_run_data(config)
records = [data.train[i] for i in task["images"]]
trunk = build_trunk(config.trunk)
ranks = {"ranks": task["ranks"]} if task["ranks"] else {}
head = build_head(trunk.channels, config.pyramid.levels, len(data.classes) + 1, config.head, **ranks)
head.load_state_dict(read_tensors(Path(task["head"])))
head.eval()
folders = Path(task["windows"]), Path(task["maps"])
source = TrainingWindows(records, data.classes, *folders, trunk.geometry, config, torch.device("cpu"))
svm, precision = config.svm, config.detect.precision

start = time.monotonic()
if not hasattr(window_features, "FrozenHead"):
    features = lambda pooled: window_features.head_features(head, pooled, svm.layer, precision)
elif "levels" in inspect.signature(window_features.FrozenHead).parameters:  # pools the windows itself
    frozen = window_features.FrozenHead(head, config.pyramid.levels, precision)
    features = lambda maps, where: frozen.features(maps, where, svm.layer)
else:
    frozen = window_features.FrozenHead(head, precision)
    features = lambda pooled: frozen.features(pooled, svm.layer)
mined = mine_detectors(MiningWindows(source, features), data.classes, svm, task["scale"])
seconds = time.monotonic() - start

weight = mined.detectors.weight.numpy()
write_arrays(Path(task["out"]), weight=weight, seconds=[seconds], retrains=list(mined.retrains))
"""


# The names of all settings of a checkout, section by section.
NAMES = """
import json
from sppnet.config import Config

def names(settings):
    kinds = {name: field.annotation for name, field in settings.model_fields.items()}
    return {name: names(kind) if hasattr(kind, "model_fields") else None for name, kind in kinds.items()}

print(json.dumps(names(Config)))
"""


@dataclass(frozen=True)
class Mined:
    """One side, once: seconds of mining, peak memory of the process in GB, weights (K, D), fits of each class."""

    seconds: float
    gigabytes: float
    weight: np.ndarray
    retrains: tuple[int, ...]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    checkouts = {"before": options.before.resolve(), "now": NOW}
    for checkout in checkouts.values():
        if not (checkout / "sppnet" / "config.py").is_file():
            sys.exit(f"{checkout}: expected a checkout with the folder sppnet; make one with `git worktree add`")
    if options.prepare is not None:
        prepare(options, options.prepare)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: a child's peak memory counts from the fork, that is from the size of this process.
        again = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments), "--prepare", folder]
        if subprocess.run(again, check=False).returncode:
            return 2
        task = json.loads((Path(folder) / "prepared.json").read_text())
        classes, images = tuple(task["classes"]), len(task["images"])
        task["config"] = shared_settings(task["config"], [setting_names(path) for path in checkouts.values()])
        print(f"{images} images, {len(classes)} classes, {options.threads} threads", file=sys.stderr)
        pairs = [measure_pair(number, task, checkouts, Path(folder)) for number in range(options.rounds)]
    report(pairs, images, {name: revision(path) for name, path in checkouts.items()})
    status = check(pairs, classes)
    return 0 if task["now"]["ranks"] else status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="folder with windows, maps and the fine-tuned head")
    parser.add_argument("--before", type=Path, required=True, help="checkout of an earlier commit")
    parser.add_argument("--images", type=int, default=100, help="training images, spread over all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Write what both sides are told to folder/prepared.json: settings, images, folders, scale; and the head."""
    import torch

    from sppnet.config_files import load_config
    from sppnet.detection.training import Training
    from sppnet.store import write_tensors

    config = load_config(options.config, options.overrides)
    training = Training(config, options.run, torch.device("cpu"), progress=False)
    for status in training.status():
        if status.name in ("propose", "extract", "finetune", "compress") and not (status.complete or status.skipped):
            sys.exit(f"{options.run}: {status.name} is not complete; run `sppnet train --only {status.name}` first")
    write_tensors(folder / "head.safetensors", training.networks.whole_head().state_dict())
    write_tensors(folder / "thin.safetensors", training.head().state_dict())
    images = spread(len(training.plan.data.train), options.images)
    settings = config.model_dump(mode="json", exclude={"name", "proposals", "evaluate", "compress"})
    task = {
        "config": settings,
        "images": images,
        "classes": training.classes,
        "windows": str(training.plan.windows),
        "maps": str(training.plan.maps),
        "head": str(folder / "head.safetensors"),
        "ranks": {},
        "now": {"head": str(folder / "thin.safetensors"), "ranks": training.plan.ranks},
        "scale": feature_scale(training, images),
        "threads": options.threads,
    }
    (folder / "prepared.json").write_text(json.dumps(task))


def feature_scale(training: Any, images: list[int]) -> float:
    """As the svm stage takes it, from these images alone."""
    from sppnet.detection.linear_svm import mean_norm_scale
    from sppnet.detection.training_windows import sample_norms

    settings, everything = training.config.svm, training.networks.windows(train=True)
    source = replace(everything, records=[everything.records[i] for i in images])
    norms = sample_norms(
        source, training.networks.features(settings.layer), settings.norm_images, settings.norm_windows
    )
    return mean_norm_scale(norms, settings.feature_norm)


def setting_names(checkout: Path) -> dict[str, Any]:
    command = [sys.executable, "-P", "-c", NAMES]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        sys.exit(
            f"{checkout}: its settings cannot be read; give a checkout whose sppnet/config.py has the class Config"
        )
    return json.loads(found.stdout)


def shared_settings(values: dict[str, Any], known: list[dict[str, Any]], prefix: str = "") -> dict[str, Any]:
    """Only the settings that every side knows, so that both do the same; the others, named on stderr, are left at their
    defaults. Those are what the older side does, but for svm.solver: before it was a setting, liblinear solved."""
    shared = {}
    for name, value in values.items():
        if not all(name in names for names in known):
            print(f"{prefix}{name}={value} is not known to both sides: left at its default", file=sys.stderr)
        elif isinstance(value, dict):
            shared[name] = shared_settings(value, [names[name] or {} for names in known], f"{prefix}{name}.")
        else:
            shared[name] = value
    return shared


def spread(total: int, count: int) -> list[int]:
    """At most `count` of `total`, evenly spread."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def measure_pair(number: int, task: dict[str, Any], checkouts: dict[str, Path], folder: Path) -> dict[str, Mined]:
    """Both sides, the older first in even pairs."""
    names = list(checkouts) if number % 2 == 0 else list(checkouts)[::-1]
    pair = {name: mine({**task, **task.get(name, {})}, checkouts[name], folder) for name in names}
    seconds = ", ".join(f"{name} {pair[name].seconds:.1f} s" for name in names)
    print(f"pair {number + 1}: {seconds}", file=sys.stderr)
    return pair


def mine(task: dict[str, Any], checkout: Path, folder: Path) -> Mined:
    """Run DRIVER with the sppnet of `checkout`; its output is shown only where it fails."""
    out = folder / "mined.npz"
    (folder / "task.json").write_text(json.dumps({**task, "checkout": str(checkout), "out": str(out)}))
    threads = str(task["threads"])
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    command = [sys.executable, "-P", "-c", DRIVER, str(folder / "task.json")]  # -P: not the sppnet of this folder
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{checkout}: mining failed\n{(folder / 'log.txt').read_text()}")
    with np.load(out, allow_pickle=False) as arrays:
        peak = usage.ru_maxrss * BYTES_PER_UNIT / 1e9
        return Mined(float(arrays["seconds"][0]), peak, arrays["weight"], tuple(arrays["retrains"].tolist()))


def report(pairs: list[dict[str, Mined]], images: int, revisions: dict[str, str]) -> None:
    print("| | commit | mining, s, median (from – to) | ms an image | peak memory, GB | fits |")
    print("|---|---|---|---|---|---|")
    for name, commit in revisions.items():
        own = [pair[name] for pair in pairs]
        seconds = sorted(mined.seconds for mined in own)
        middle = statistics.median(seconds)
        print(
            f"| {name} | {commit} | {middle:.1f} ({seconds[0]:.1f} – {seconds[-1]:.1f}) "
            f"| {1e3 * middle / images:.0f} "
            f"| {max(m.gigabytes for m in own):.2f} | {sum(own[0].retrains)} |"
        )
    ratios = sorted(pair["before"].seconds / pair["now"].seconds for pair in pairs)
    print(
        f"\nratio, {len(pairs)} pairs: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )


def check(pairs: Iterable[dict[str, Mined]], classes: tuple[str, ...]) -> int:
    """Print the least cosine of each class over the pairs; 1 where the detectors differ."""
    cosines = np.min([class_cosines(p["before"].weight, p["now"].weight) for p in pairs], axis=0)
    named = ", ".join(f"{name} {cosine:.5f}" for name, cosine in zip(classes, cosines, strict=True))
    print(f"cosine of the weights before and now, the least of the pairs: {named}")
    differ = [name for name, cosine in zip(classes, cosines, strict=True) if not cosine > AGREES]
    print(f"DIFFERENT: {', '.join(differ)}" if differ else f"every class agrees (above {AGREES})")
    return 1 if differ else 0


def class_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(K, D), (K, D) -> cosine of each class (K,); 1 where neither was trained (all zeros), 0 where only one was."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    both, none = (norms[0] > 0) & (norms[1] > 0), (norms[0] == 0) & (norms[1] == 0)
    product = np.where(both, norms[0] * norms[1], 1.0)
    return np.where(none, 1.0, (a * b).sum(axis=1) / product)


def revision(checkout: Path) -> str:
    """Its commit, with a plus sign where sppnet/ has changes beside it."""
    git = ["git", "-C", str(checkout)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--short", "sppnet"], capture_output=True, text=True, check=False)
    return (found.stdout.strip() or checkout.name) + ("+" if changed.stdout.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
