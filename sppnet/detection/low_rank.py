"""fc6 and fc7 of low rank: two thin layers without a nonlinearity between, in the place of a wide one.

Which directions of a layer are kept is decided by its answers to windows of training images: y = Wx + b becomes
U(UᵀW)x + b', where U spans the directions in which the answers vary most (Zhang, Zou, He, Sun, "Accelerating Very Deep
Convolutional Networks for Classification and Detection", 2016, sec. 3.1). Or by its weights alone: then
W ≈ U_r · (S_r V_rᵀ), the truncated SVD of Fast R-CNN (sec. 3.1 there), which needs no images and keeps much less: a
fine-tuned layer is a random start and a little of what it learned, so that its singular values hardly fall, but its
answers to real windows lie close to a space of few dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sppnet.detection.sampling import class_overlaps
from sppnet.network.sppnet import FullyConnected, SPPHead
from sppnet.records import ImageRecord

LAYERS: tuple[FullyConnected, ...] = ("fc6", "fc7")
NEAR = 0.5  # IoU from which on a window shows an object
HELD_OUT = 5  # every fifth image says what was kept, and has no part in choosing it
BLOCK = 4096  # responses in double precision at once


class CompressionError(ValueError):
    """A compression that cannot be done or would save nothing; the message gives the next step."""


@dataclass(frozen=True)
class Responses:
    """fc6 before its rectification (N, fc6) float32, of windows that choose directions and of others to judge them."""

    chosen: Tensor
    held_out: Tensor

    @classmethod
    def of_images(cls, images: Sequence[Tensor], width: int) -> Responses:
        """From those of the windows of each image (R, `width`); every fifth image is held out."""
        nothing = torch.empty(0, width)
        held = [number % HELD_OUT == HELD_OUT - 1 for number in range(len(images))]
        parts = [[own for own, out in zip(images, held, strict=True) if out is wanted] for wanted in (False, True)]
        return cls(*(torch.cat([nothing, *part]) for part in parts))


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
    check_ranks(head, ranks)
    if responses is not None and len(responses) < max(ranks.values()):
        raise CompressionError(
            f"{len(responses)} windows of training images cannot tell {max(ranks.values())} directions apart; "
            "take more windows or a lower rank"
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


def describe_layers(whole: SPPHead, thin: SPPHead, responses: Responses | None = None) -> dict[FullyConnected, str]:
    """What a compressed head keeps of each layer, in a line: of answers that did not choose it, if there are any."""
    measured = None if responses is None else responses.held_out if len(responses.held_out) else responses.chosen
    kept = None if measured is None else variance_kept(whole, thin, measured)
    lines: dict[FullyConnected, str] = {}
    for name in LAYERS:
        linear, parts = whole.products(name)[0], thin.products(name)
        lines[name] = f"{name} ({linear.in_features} -> {linear.out_features}): whole"
        if len(parts) == 1:
            continue
        if kept is not None and measured is not None:
            what = f"{kept[name]:.2%} of the variance of its answers to {len(measured):,} other windows"
        else:
            energy = energy_kept(linear.weight, parts[0].weight, parts[1].weight)
            what = f"{energy:.2%} of the energy (squared singular values)"
        lines[name] = lines[name].replace("whole", f"rank {parts[0].out_features} keeps {what}")
    return lines


def _explained(answers: Tensor, approximations: Tensor) -> float:
    mean, deviations, lost = _mean(answers), 0.0, 0.0
    for own, other in zip(answers.split(BLOCK), approximations.split(BLOCK), strict=True):
        deviations += float((own.double() - mean).square().sum())
        lost += float((own.double() - other).square().sum())
    return 1 - lost / deviations if deviations > 0 else 1.0


def _mean(rows: Tensor) -> Tensor:
    """(N, F) -> (F,) in double precision, without a copy of all rows in it."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(BLOCK):
        total += block.double().sum(0)
    return total / len(rows)


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
    if wide:
        first, second = basis.T @ matrix, basis
    else:  # directions of the outputs here too: what the thin layer gives then follows from what the layer gives
        second, rest = torch.linalg.qr(matrix @ basis)
        first = rest @ basis.T
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
        mean, directions = principal_directions(responses, rank)
        first = (directions.T @ linear.weight.detach().cpu().double()).to(linear.weight)
        second = directions.to(linear.weight)
        bias = (mean + directions @ (directions.T @ (bias.cpu().double() - mean))).to(linear.weight)
    basis = nn.utils.skip_init(nn.Linear, linear.in_features, rank, bias=False)
    layer = nn.utils.skip_init(nn.Linear, rank, linear.out_features)
    basis.weight, layer.weight = nn.Parameter(first.contiguous()), nn.Parameter(second.contiguous())
    layer.bias = nn.Parameter(bias.clone())
    return basis, layer


def check_ranks(head: SPPHead, ranks: dict[FullyConnected, int]) -> None:
    """CompressionError for ranks that `compress_head` would refuse, whatever the responses."""
    if not any(ranks.values()):
        raise CompressionError("no layer to compress; give --fc6 RANK, --fc7 RANK or both")
    for name in (name for name, rank in ranks.items() if rank):
        layers = head.products(name)
        if len(layers) > 1:
            raise CompressionError(
                f"{name} is compressed already, to rank {layers[0].out_features}; compress the one it was made from, "
                "or change its settings compress.fc6 and compress.fc7"
            )
        check_rank(name, layers[0].in_features, layers[0].out_features, ranks[name])


def check_rank(name: FullyConnected, inputs: int, outputs: int, rank: int) -> None:
    """CompressionError for a rank that saves no work in a layer of this size."""
    largest = (inputs * outputs - 1) // (inputs + outputs)  # rank · (inputs + outputs) < inputs · outputs
    if largest < 1:
        raise CompressionError(f"{name} ({inputs} -> {outputs}) is too small to compress; leave it whole")
    if not 1 <= rank <= largest:
        raise CompressionError(
            f"rank {rank} of {name}: expected 1 to {largest}, the largest rank that saves work in a layer of {inputs} "
            f"inputs and {outputs} outputs; 0 leaves it whole"
        )


def draw_windows(
    record: ImageRecord, windows: NDArray[np.float32], classes: Sequence[str], count: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """At most `count` of the windows (R, 4) of an image, half of them with IoU >= 0.5 with an object if there are."""
    annotation = record.annotation
    best = np.zeros(len(windows)) if annotation is None else class_overlaps(windows, annotation, classes).max(1)
    order = rng.permutation(len(windows))
    near = order[best[order] >= NEAR][: count // 2]
    others = order[~np.isin(order, near)][: count - len(near)]
    return windows[np.concatenate([near, others])]


def ask_images(
    records: Sequence[ImageRecord],
    proposals: Iterable[NDArray[np.float32]],
    answer: Callable[[int, NDArray[np.float32]], Tensor],
    classes: Sequence[str],
    windows: int,
    seed: int,
    width: int,
) -> Responses:
    """The answers to `windows` windows in all, where the images have as many, drawn from the proposals (R, 4) of each.

    `answer` gives those (R, `width`) of windows of image i. Half of the windows are close to objects where there are as
    many, because the detector must tell these apart and few proposals are; the others are any proposals.
    """
    each, rng = -(-windows // max(1, len(records))), np.random.default_rng(seed)
    parts = [
        answer(number, draw_windows(record, own, classes, each, rng))
        for number, (record, own) in enumerate(zip(records, proposals, strict=True))
    ]
    return Responses.of_images(parts, width)


def linear_responses(head: SPPHead, pooled: Tensor) -> Tensor:
    """Pooled features (R, D) -> fc6 of them before its rectification (R, fc6), in a compressed head too."""
    hidden = pooled * head.input_scale
    for layer in head.products("fc6"):
        hidden = F.linear(hidden, layer.weight, layer.bias)
    return hidden


def principal_directions(responses: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Responses (N, F) -> their mean (F,) and the orthonormal directions (F, rank) in which they vary most, in float64.

    Raises ValueError for fewer responses than directions.
    """
    count, width = responses.shape
    if not 1 <= rank <= min(count, width):
        raise ValueError(
            f"expected a rank from 1 to {min(count, width)} for {count} responses of {width} numbers, got {rank}; "
            "sample more windows or choose a lower rank"
        )
    mean = _mean(responses)
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for block in responses.split(BLOCK):  # the whole sample in double precision would be half a gigabyte
        centred = block.double() - mean
        covariance += centred.T @ centred
    directions = torch.linalg.eigh(covariance).eigenvectors  # variances ascend
    return mean, directions[:, -rank:].flip(1).contiguous()
