"""Truncated SVD of fc6 and fc7: fewer products per window in a trained detector (Fast R-CNN, sec. 3.1).

W ≈ U_r · (S_r V_rᵀ): a layer becomes two thin ones without a nonlinearity between. SVMs and box regressors stay.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sppnet.detection.detector import SPPDetector
from sppnet.network.sppnet import FullyConnected, SPPHead

LAYERS: tuple[FullyConnected, ...] = ("fc6", "fc7")


class CompressionError(ValueError):
    """A compression that cannot be done or would save nothing; the message gives the next step."""


@dataclass(frozen=True)
class Compression:
    """A head before and after, and the folder that holds the compressed detector."""

    whole: SPPHead
    thin: SPPHead
    folder: Path

    def __str__(self) -> str:
        """What was kept of each layer, and what is left to store and to compute; a line each."""
        lines = [self._kept(name) for name in LAYERS]
        (parameters, products), (fewer, left) = _cost(self.whole), _cost(self.thin)
        lines.append(f"fc6 and fc7: {parameters:,} -> {fewer:,} parameters")
        lines.append(f"{products:,} -> {left:,} multiply-adds a window, {products / left:.1f} times fewer")
        return "\n".join(lines)

    def _kept(self, name: FullyConnected) -> str:
        linear, parts = self.whole.products(name)[0], self.thin.products(name)
        layer = f"{name} ({linear.in_features} -> {linear.out_features})"
        if len(parts) == 1:
            return f"{layer}: whole"
        energy = energy_kept(linear.weight, parts[0].weight, parts[1].weight)
        return f"{layer}: rank {parts[0].out_features} keeps {energy:.2%} of the energy (squared singular values)"


def compress_run(
    run: Path,
    fc6: int | None = None,
    fc7: int | None = None,
    out: Path | None = None,
    device: str | torch.device = "cpu",
) -> Compression:
    """Compress the detector of `run` into a folder of its own, which every command takes for a run.

    The folder (default: ``compressed-fc6-1024-fc7-256`` or so, in `run`) appears when it is complete; it shares the
    windows that `run` already has. Raises StoreError without a detector and CompressionError.
    """
    detector = SPPDetector.load(run, device)
    ranks = {name: rank for name, rank in (("fc6", fc6), ("fc7", fc7)) if rank}
    folder = out or run / "-".join(["compressed", *(f"{name}-{rank}" for name, rank in ranks.items())])
    _check_free(folder)
    thin = compress_detector(detector, fc6, fc7)
    partial = folder.resolve().with_name(f".{folder.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    thin.save(partial / "detector")
    _share_windows(run, partial)
    partial.replace(folder)
    return Compression(detector.head, thin.head, folder)


def compress_detector(detector: SPPDetector, fc6: int | None = None, fc7: int | None = None) -> SPPDetector:
    """The detector with a compressed head; the given one stays as it is. Raises CompressionError (`compress_head`),
    also for a layer that the detector does not use."""
    used = {detector.config.svm.layer} | ({detector.config.boxes.layer} if detector.regressors is not None else set())
    needed = {"fc6": bool(used & {"fc6", "fc7"}), "fc7": "fc7" in used}
    for name, rank in (("fc6", fc6), ("fc7", fc7)):
        if rank and not needed[name]:
            raise CompressionError(
                f"{name} is not used by this detector, which takes {' and '.join(sorted(used))} features; "
                f"leave out --{name}"
            )
    return replace(detector, head=compress_head(detector.head, fc6, fc7))


def compress_head(head: SPPHead, fc6: int | None = None, fc7: int | None = None) -> SPPHead:
    """A head with the best approximations of these ranks in the place of fc6 and fc7; `head` stays as it is.

    None or 0 leaves a layer whole. Raises CompressionError where no layer is named, where a rank saves no work and
    where a layer is compressed already.
    """
    ranks: dict[FullyConnected, int] = {"fc6": fc6 or 0, "fc7": fc7 or 0}
    if not any(ranks.values()):
        raise CompressionError("no layer to compress; give --fc6 RANK, --fc7 RANK or both")
    for name, rank in ranks.items():
        if rank:
            _check_rank(name, head.products(name), rank)
    thin = copy.deepcopy(head)
    if ranks["fc6"]:
        thin.basis6, thin.fc6 = _thin_layers(head.fc6, ranks["fc6"])
    if ranks["fc7"]:
        thin.basis7, thin.fc7 = _thin_layers(head.fc7, ranks["fc7"])
    return thin.train(head.training)


def factorise(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Weight (outputs, inputs) -> first (rank, inputs) and second (outputs, rank), whose product second · first is the
    nearest matrix of that rank (Eckart and Young), in the weight's own precision.

    The singular vectors of the smaller side are eigenvectors of its Gram matrix, here in float64: that costs one
    product and an eigenproblem of the smaller side, and squared rounding errors stay below those of float32.
    """
    matrix = weight.detach().double()
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    basis = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # eigenvalues ascend
    first, second = (basis.T @ matrix, basis) if wide else (basis.T, matrix @ basis)
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()


def energy_kept(weight: Tensor, first: Tensor, second: Tensor) -> float:
    """Squared norm of second · first as a share of that of `weight`: the squared singular values that were kept."""
    first, second = first.detach().double(), second.detach().double()
    total = weight.detach().double().square().sum()
    kept = ((second.T @ second) * (first @ first.T)).sum()  # without the product itself
    return float(kept / total) if total > 0 else 1.0


def _thin_layers(linear: nn.Linear, rank: int) -> tuple[nn.Linear, nn.Linear]:
    first, second = factorise(linear.weight, rank)
    basis = nn.utils.skip_init(nn.Linear, linear.in_features, rank, bias=False)
    layer = nn.utils.skip_init(nn.Linear, rank, linear.out_features)
    basis.weight, layer.weight = nn.Parameter(first), nn.Parameter(second)
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    return basis, layer


def _check_rank(name: str, layers: Sequence[nn.Linear], rank: int) -> None:
    if len(layers) > 1:
        raise CompressionError(
            f"{name} is compressed already, to rank {layers[0].out_features}; compress the detector it was made from"
        )
    inputs, outputs = layers[0].in_features, layers[0].out_features
    largest = (inputs * outputs - 1) // (inputs + outputs)  # rank · (inputs + outputs) < inputs · outputs
    if largest < 1:
        raise CompressionError(f"{name} ({inputs} -> {outputs}) is too small to compress; leave out --{name}")
    if not 1 <= rank <= largest:
        raise CompressionError(
            f"--{name} {rank}: expected 1 to {largest}, the largest rank that saves work in a layer of {inputs} inputs "
            f"and {outputs} outputs; 0 leaves it whole"
        )


def _check_free(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CompressionError(f"{folder}: exists already; delete it or choose another --out")


def _share_windows(run: Path, folder: Path) -> None:
    """Links to the windows of `run`, so that no image is searched twice; such files are never changed in place."""
    for path in run.glob("propose-*/**/*.npz"):
        target = folder / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, target)


def _cost(head: SPPHead) -> tuple[int, int]:
    """Parameters of fc6 and fc7, and multiply-adds a window."""
    layers = [layer for name in LAYERS for layer in head.products(name)]
    return sum(p.numel() for layer in layers for p in layer.parameters()), sum(x.weight.numel() for x in layers)
