"""What a fine-tuning step of the head costs, against what the machine can multiply and move.

    python benchmarks/finetuning.py [--rounds 15] [--batch 128] [--fc 4096] [--threads N] [--precisions float32]

The step is the trainer's own (`sppnet.detection.finetuning`), on synthetic pooled features: 12,800 → 4,096 → 4,096 → 21
at batch 128, in float32 and with bfloat16 products. Beside it, in the same run and the same precision: the largest rate
of torch.matmul over large squares and the very shapes of the step; the products of the step alone, one after the other;
a copy between two large arrays. In every round a step, the products and the copy follow one another, so that a busy
machine slows all; medians of the rounds, fractions round by round.

Exit status 1 where one step gives other weights than plain products and the update written out (float32, no dropout).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sppnet.config import FinetuneSettings, HeadSettings
from sppnet.detection.finetuning import _Trainer
from sppnet.network.sppnet import SPPHead, build_head

CHANNELS, LEVELS, OUTPUTS = 256, (1, 2, 3, 6), 21  # 12,800 inputs; 20 classes and background
SQUARES = (1024, 2048, 3072)
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Shape = tuple[int, int, int]  # (m, k, n): (m, k) times (k, n)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step: all, and its parts; `rest` is the learning rate, the random state and the sums of losses."""

    total: float
    forward: float
    backward: float
    optimiser: float

    @property
    def rest(self) -> float:
        return self.total - self.forward - self.backward - self.optimiser


class Stopwatch:
    """Times the parts of `_Trainer.train_step` from outside, around its gradients and its optimiser."""

    def __init__(self, trainer: _Trainer) -> None:
        self._trainer = trainer
        self._at: dict[str, float] = {}
        gradients = trainer._gradients
        assert gradients is not None  # on a CPU
        gradients._backward = self._marked("backward", gradients._backward)  # type: ignore[method-assign]
        trainer._gradients = self._marked("forward", gradients)
        trainer.optimiser.register_step_pre_hook(lambda *_: self._mark("optimiser"))
        trainer.optimiser.register_step_post_hook(lambda *_: self._mark("end"))

    def step(self, number: int, pooled: Tensor, labels: Tensor) -> StepTimes:
        start = time.perf_counter()
        self._trainer.train_step(number, pooled, labels)
        total, at = time.perf_counter() - start, self._at
        return StepTimes(
            total, at["backward"] - at["forward"], at["optimiser"] - at["backward"], at["end"] - at["optimiser"]
        )

    def _marked(self, name: str, function: Callable[..., Any]) -> Any:
        def marked(*given: Tensor) -> Any:
            self._mark(name)
            return function(*given)

        return marked

    def _mark(self, name: str) -> None:
        self._at[name] = time.perf_counter()


def products(batch: int, widths: Sequence[int]) -> list[tuple[str, Shape]]:
    """The matrix products of a step for layers of these widths (inputs first): forward and gradients.

    The first layer needs no gradient of its input: the trunk is frozen.
    """
    forward, backward = [], []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        forward.append((f"layer {index + 1}", (batch, inputs, outputs)))
        backward.append((f"layer {index + 1}, gradient of the weight", (outputs, batch, inputs)))
        if index:
            backward.append((f"layer {index + 1}, gradient of the input", (batch, outputs, inputs)))
    return forward + backward


def multiply_adds(shapes: Sequence[Shape]) -> int:
    return sum(m * k * n for m, k, n in shapes)


def update_bytes(parameters: int) -> int:
    """Bytes that SGD with momentum must move: weight, gradient and momentum read, weight and momentum written."""
    return 5 * 4 * parameters


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def operands(shape: Shape, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    m, k, n = shape
    return torch.rand(m, k, dtype=kind), torch.rand(k, n, dtype=kind)


def square_rate(kind: torch.dtype, rounds: int) -> float:
    """The largest FLOP/s of torch.matmul on large squares; results go to memory that is there already."""
    best = 0.0
    for side in SQUARES:
        a, b = operands((side, side, side), kind)
        out = torch.empty(side, side, dtype=kind)
        best = max(best, *(2 * side**3 / seconds(lambda: torch.matmul(a, b, out=out)) for _ in range(rounds)))  # noqa: B023
    return best


class Products:
    """The products of a step in one precision, on arrays that stay where they are; as the layers lay them out."""

    def __init__(self, shapes: Sequence[tuple[str, Shape]], kind: torch.dtype) -> None:
        self._jobs = []
        for name, (m, k, n) in shapes:
            if name.endswith("weight"):  # (batch, m)ᵀ times (batch, n)
                left, right = torch.rand(k, m, dtype=kind).t(), torch.rand(k, n, dtype=kind)
            elif name.endswith("input"):
                left, right = operands((m, k, n), kind)
            else:  # a layer's weight is (n, k)
                left, right = torch.rand(m, k, dtype=kind), torch.rand(n, k, dtype=kind).t()
            self._jobs.append((left, right, torch.empty(m, n, dtype=kind)))
        self.shapes = [shape for _, shape in shapes]

    def times(self) -> list[float]:
        return [seconds(lambda: torch.matmul(a, b, out=out)) for a, b, out in self._jobs]  # noqa: B023


def make_trainer(options: argparse.Namespace, precision: str, dropout: float, folder: Path) -> _Trainer:
    widths = HeadSettings(fc6=options.fc, fc7=options.fc, dropout=dropout)
    settings = FinetuneSettings(precision=precision, batch=options.batch)
    return _Trainer(build_head(CHANNELS, LEVELS, OUTPUTS, widths), settings, folder)


def batch_of(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pooled features as a trunk's ReLU leaves them, with a mean norm of 300, and labels: a quarter foreground."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(size, CHANNELS * sum(n * n for n in LEVELS), generator=generator).relu_()
    labels = torch.full((size,), OUTPUTS - 1)
    labels[: size // 4] = torch.randint(OUTPUTS - 1, (size // 4,), generator=generator)
    return pooled * (300 / pooled.norm(dim=1).mean()), labels


def step_is_right(options: argparse.Namespace, folder: Path) -> tuple[bool, float]:
    """One step of the trainer against one written out; and the largest difference, over the largest change."""
    trainer = make_trainer(options, "float32", 0.0, folder)
    before = {name: value.clone() for name, value in trainer.head.state_dict().items()}
    pooled, labels = batch_of(options.batch, seed=9)
    expected = written_out_step(trainer.head, pooled, labels, trainer.settings)
    trainer.train_step(0, pooled, labels)
    after = trainer.head.state_dict()
    change = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    worst = max(float((expected[name] - after[name]).abs().max()) for name in expected) / change
    return worst < 1e-3, worst


def written_out_step(head: SPPHead, pooled: Tensor, labels: Tensor, settings: FinetuneSettings) -> dict[str, Tensor]:
    """The weights after a first SGD step without dropout: no autograd, no optimiser."""
    layers = (head.fc6, head.fc7, head.classifier)
    rate, decay = settings.learning_rates[0], settings.weight_decay
    with torch.no_grad():
        inputs = [pooled * head.input_scale]
        for layer in layers[:-1]:
            inputs.append(torch.relu(inputs[-1] @ layer.weight.t() + layer.bias))
        logits = inputs[-1] @ head.classifier.weight.t() + head.classifier.bias
        gradient = (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / len(labels)
        result = {}
        for name, layer, own in zip(("classifier", "fc7", "fc6"), layers[::-1], inputs[::-1], strict=True):
            weight = gradient.t() @ own + decay * layer.weight
            result[f"{name}.weight"] = layer.weight - rate * weight
            result[f"{name}.bias"] = layer.bias - rate * settings.bias_rate * gradient.sum(0)
            gradient = (gradient @ layer.weight) * (own > 0)
    return result


def measure(options: argparse.Namespace, precision: str, folder: Path) -> None:
    trainer = make_trainer(options, precision, 0.5, folder)
    watch, batches = Stopwatch(trainer), [batch_of(options.batch, seed) for seed in range(4)]
    head = trainer.head
    widths = (head.fc6.in_features, head.fc6.out_features, head.fc7.out_features, head.classifier.out_features)
    alone = Products(products(options.batch, widths), KINDS[precision])
    source = torch.ones(options.copy_megabytes * 2**18)
    target = torch.zeros_like(source)
    for warm_up in range(2):
        watch.step(warm_up, *batches[warm_up])
        alone.times()
    steps, multiplied, copies = [], [], []
    for number in range(options.rounds):
        steps.append(watch.step(number, *batches[number % len(batches)]))
        multiplied.append(alone.times())
        copies.append(seconds(lambda: target.copy_(source)))
    report(options, precision, head, alone, steps, multiplied, [2 * source.nbytes / s for s in copies])


def report(
    options: argparse.Namespace,
    precision: str,
    head: SPPHead,
    alone: Products,
    steps: list[StepTimes],
    multiplied: list[list[float]],
    copies: list[float],
) -> None:
    flops = 2 * multiply_adds(alone.shapes)
    parameters = sum(p.numel() for p in head.parameters())
    shape_rates = [
        2 * multiply_adds([s]) / min(t) for s, t in zip(alone.shapes, zip(*multiplied, strict=True), strict=True)
    ]
    large = square_rate(KINDS[precision], max(3, options.rounds // 3))
    peak = max(large, *shape_rates)
    totals = sorted(step.total for step in steps)
    middle = statistics.median(totals)
    share = sorted(sum(products) / step.total for products, step in zip(multiplied, steps, strict=True))
    print(
        f"\n### {precision}: {flops / 2e9:.2f} billion multiply-adds a step, {parameters / 1e6:.1f} million weights\n"
    )
    print("| | ms, median (from – to) | share of the step |")
    print("|---|---|---|")
    for name in ("total", "forward", "backward", "optimiser", "rest"):
        own = sorted(getattr(step, name) for step in steps)
        part = statistics.median(own)
        print(f"| {name} | {1e3 * part:.1f} ({1e3 * own[0]:.1f} – {1e3 * own[-1]:.1f}) | {part / middle:.2f} |")
    ideal = statistics.median(map(sum, multiplied))
    print(
        f"| products alone | {1e3 * ideal:.1f} | {statistics.median(share):.2f} ({share[0]:.2f} – {share[-1]:.2f}) |\n"
    )
    print(
        f"rate of the step         {flops / middle / 1e9:8.1f} GFLOP/s, {options.batch / middle:.0f} windows a second"
    )
    print(
        f"rate of its products     {flops / ideal / 1e9:8.1f} GFLOP/s, alone; best single {max(shape_rates) / 1e9:.1f}"
    )
    print(f"rate of large squares    {large / 1e9:8.1f} GFLOP/s, best of {SQUARES}")
    print(f"fraction of the machine  {flops / middle / peak:8.2f} (step), {flops / ideal / peak:.2f} (products alone)")
    update = statistics.median(step.optimiser for step in steps)
    moved, bandwidth = update_bytes(parameters), statistics.median(copies)
    print(
        f"update: {moved / 1e9:.2f} GB moved at {moved / update / 1e9:.1f} GB/s, {moved / update / bandwidth:.2f} of "
        f"the copy bandwidth of {bandwidth / 1e9:.1f} GB/s (read + written)"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--fc", type=int, default=4096, help="width of fc6 and fc7")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--precisions", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--copy-megabytes", type=int, default=256)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"batch {options.batch}, {options.threads} threads, {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precisions:
            measure(options, precision, Path(folder))
        right, worst = step_is_right(options, Path(folder))
    print(f"\none step against products and update written out: {worst:.1e} of the largest change; agrees: {right}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
