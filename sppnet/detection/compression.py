"""fc6 and fc7 of low rank: fewer products per window in a trained detector.

A layer becomes two thin ones without a nonlinearity between; SVMs and box regressors stay. Which directions of it are
kept is decided by its answers to windows of training images: y = Wx + b becomes U(UᵀW)x + b', where U spans the
directions in which the answers vary most (Zhang et al. 2016, sec. 3.1; see `responses`). Or by its weights alone: then
W ≈ U_r · (S_r V_rᵀ), the truncated SVD of Fast R-CNN (sec. 3.1 there), which needs no images and keeps much less.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.data.voc import DatasetError
from sppnet.detection.detector import SPPDetector
from sppnet.detection.responses import IMAGES, principal_directions, sample_responses
from sppnet.network.sppnet import FullyConnected, SPPHead

LAYERS: tuple[FullyConnected, ...] = ("fc6", "fc7")
Method = Literal["responses", "weights"]


class CompressionError(ValueError):
    """A compression that cannot be done or would save nothing; the message gives the next step."""


@dataclass(frozen=True)
class Compression:
    """A head before and after, and the folder that holds the compressed detector."""

    whole: SPPHead
    thin: SPPHead
    folder: Path
    responses: Tensor | None = None  # those that chose the directions, if they did

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
        if self.responses is not None:
            kept = variance_kept(self.whole, self.thin, self.responses)[name]
            sample = f"{len(self.responses):,} windows of training images"
            return f"{layer}: rank {parts[0].out_features} keeps {kept:.2%} of the variance of its answers to {sample}"
        energy = energy_kept(linear.weight, parts[0].weight, parts[1].weight)
        return f"{layer}: rank {parts[0].out_features} keeps {energy:.2%} of the energy (squared singular values)"


def compress_run(
    run: Path,
    fc6: int | None = None,
    fc7: int | None = None,
    out: Path | None = None,
    device: str | torch.device = "cpu",
    method: Method = "responses",
    images: int = IMAGES,
    progress: bool = True,
) -> Compression:
    """Compress the detector of `run` into a folder of its own, which every command takes for a run.

    `method`: "responses" to `images` of the run's training images, or the "weights" alone. The folder (default:
    ``compressed-fc6-256-fc7-64`` or so, in `run`) appears when it is complete; it shares the windows that `run` already
    has. Raises StoreError without a detector and CompressionError, also without training images where they are needed.
    """
    detector = SPPDetector.load(run, device)
    ranks = {name: rank for name, rank in (("fc6", fc6), ("fc7", fc7)) if rank}
    folder = out or run / "-".join(["compressed", *(f"{name}-{rank}" for name, rank in ranks.items())])
    _check_free(folder)
    _check_ranks(detector, fc6 or 0, fc7 or 0)  # before minutes are spent
    responses = None
    if method == "responses":
        try:
            responses = sample_responses(detector, run, images, progress=progress)
        except DatasetError as error:
            raise CompressionError(f"{error}; --method weights needs no images") from None
    thin = compress_detector(detector, fc6, fc7, responses)
    partial = folder.resolve().with_name(f".{folder.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    thin.save(partial / "detector")
    _share_windows(run, partial)
    partial.replace(folder)
    return Compression(detector.head, thin.head, folder, responses)


def compress_detector(
    detector: SPPDetector, fc6: int | None = None, fc7: int | None = None, responses: Tensor | None = None
) -> SPPDetector:
    """The detector with a compressed head; the given one stays as it is. Raises CompressionError (`compress_head`),
    also for a layer that the detector does not use."""
    _check_ranks(detector, fc6 or 0, fc7 or 0)
    return replace(detector, head=compress_head(detector.head, fc6, fc7, responses))


def compress_head(
    head: SPPHead, fc6: int | None = None, fc7: int | None = None, responses: Tensor | None = None
) -> SPPHead:
    """A head with the best approximations of these ranks in the place of fc6 and fc7; `head` stays as it is.

    `responses` (N, fc6), what fc6 answers before its rectification (`sample_responses`): the best for these, fc7's for
    what reaches it; None: the best for the weights. A rank of None or 0 leaves a layer whole. Raises CompressionError
    where no layer is named, where a rank saves no work or exceeds the number of responses, and where a layer is
    compressed already.
    """
    ranks: dict[FullyConnected, int] = {"fc6": fc6 or 0, "fc7": fc7 or 0}
    _check_head(head, ranks)
    if responses is not None and len(responses) < max(ranks.values()):
        raise CompressionError(
            f"{len(responses)} windows of training images cannot tell {max(ranks.values())} directions apart; "
            "take more --images, a lower rank, or --method weights"
        )
    thin = copy.deepcopy(head)
    if ranks["fc6"]:
        thin.basis6, thin.fc6 = _thin_layers(head.fc6, ranks["fc6"], responses)
    if ranks["fc7"]:
        reached = None if responses is None else _fc7_responses(head, responses)
        thin.basis7, thin.fc7 = _thin_layers(head.fc7, ranks["fc7"], reached)
    return thin.train(head.training)


def variance_kept(whole: SPPHead, thin: SPPHead, responses: Tensor) -> dict[FullyConnected, float]:
    """Share of the variance of fc6's and fc7's answers that a head compressed by `responses` still gives: 1 − the
    squared differences as a share of the squared deviations from the mean. fc7's counts what fc6 lost."""
    answers, approximations = both_responses(whole, responses), both_responses(thin, responses, whole)
    return {name: _explained(answers[name], approximations[name]) for name in LAYERS}


@torch.inference_mode()
def both_responses(head: SPPHead, responses: Tensor, whole: SPPHead | None = None) -> dict[FullyConnected, Tensor]:
    """fc6 and fc7 before their rectification, from `responses` (N, fc6), those of fc6 in `whole` (default: in `head`).

    What a thin fc6 of it gives follows without the pooled features: W ≈ U(UᵀW), so that Wx is all it takes.
    """
    if whole is not None and "fc6" in head.ranks and "fc6" not in whole.ranks:
        own = head.fc6
        responses = F.linear((responses.to(own.weight) - whole.fc6.bias) @ own.weight, own.weight, own.bias)
    return {"fc6": responses.cpu(), "fc7": _fc7_responses(head, responses)}


def _explained(answers: Tensor, approximations: Tensor) -> float:
    deviations = float((answers - answers.mean(0)).double().square().sum())
    lost = float((answers - approximations).double().square().sum())
    return 1 - lost / deviations if deviations > 0 else 1.0


def _fc7_responses(head: SPPHead, responses: Tensor) -> Tensor:
    """fc7 before its rectification (N, fc7), from the same of fc6."""
    with torch.no_grad():
        hidden = responses.to(head.fc6.weight).relu()
        for layer in head.products("fc7"):
            hidden = F.linear(hidden, layer.weight, layer.bias)
        return hidden.cpu()


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


def _thin_layers(linear: nn.Linear, rank: int, responses: Tensor | None) -> tuple[nn.Linear, nn.Linear]:
    bias = linear.bias.detach()
    if responses is None:
        first, second = factorise(linear.weight, rank)
    else:
        # Wx + b varies around m along U: U(UᵀW)x + m + U Uᵀ(b − m)
        mean, directions, _ = principal_directions(responses, rank)
        first = (directions.T @ linear.weight.detach().cpu().double()).to(linear.weight)
        second = directions.to(linear.weight)
        bias = (mean + directions @ (directions.T @ (bias.cpu().double() - mean))).to(linear.weight)
    basis = nn.utils.skip_init(nn.Linear, linear.in_features, rank, bias=False)
    layer = nn.utils.skip_init(nn.Linear, rank, linear.out_features)
    basis.weight, layer.weight = nn.Parameter(first.contiguous()), nn.Parameter(second.contiguous())
    layer.bias = nn.Parameter(bias.clone())
    return basis, layer


def _check_ranks(detector: SPPDetector, fc6: int, fc7: int) -> None:
    """CompressionError for ranks that `compress_head` would refuse, and for layers that the detector does not use."""
    used = {detector.config.svm.layer} | ({detector.config.boxes.layer} if detector.regressors is not None else set())
    needed = {"fc6": bool(used & {"fc6", "fc7"}), "fc7": "fc7" in used}
    for name, rank in (("fc6", fc6), ("fc7", fc7)):
        if rank and not needed[name]:
            raise CompressionError(
                f"{name} is not used by this detector, which takes {' and '.join(sorted(used))} features; "
                f"leave out --{name}"
            )
    _check_head(detector.head, {"fc6": fc6, "fc7": fc7})


def _check_head(head: SPPHead, ranks: dict[FullyConnected, int]) -> None:
    if not any(ranks.values()):
        raise CompressionError("no layer to compress; give --fc6 RANK, --fc7 RANK or both")
    for name, rank in ranks.items():
        if rank:
            _check_rank(name, head.products(name), rank)


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
