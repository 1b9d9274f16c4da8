"""fc6 and fc7 of low rank: two linear layers without a nonlinearity between them in place of a wide one.

What is kept of a layer are the principal components of its activations on windows of training images: y = Wx + b
becomes U(UᵀW)x + b', where U spans the directions in which the activations vary most (Zhang, Zou, He, Sun,
"Accelerating Very Deep Convolutional Networks for Classification and Detection", 2016, sec. 3.1). The singular values
of the weights alone say little: a fine-tuned layer is a random start and a little of what it learned.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sppnet.errors import SppnetError, counted
from sppnet.models.sppnet import SPPHead


def low_rank_head(head: SPPHead, ranks: Mapping[str, int], activations: Tensor) -> SPPHead:
    """A copy of `head` in which the layers named in `ranks` have these ranks, as `check_rank` allows them.

    `activations` (N, fc6) are those of fc6 before its rectification (`fc6_activations`); fc7's follow from them. Raises
    SppnetError where a rank exceeds the number of activations.
    """
    for name, rank in ranks.items():
        if len(activations) < rank:
            raise SppnetError(
                f"{counted(len(activations), 'window')} of training images cannot tell {rank} principal components of "
                f"{name} apart; use more images or a lower rank"
            )
    reduced = copy.deepcopy(head)
    if "fc6" in ranks:
        reduced.basis6, reduced.fc6 = _low_rank_layers(head.fc6, ranks["fc6"], activations)
    if "fc7" in ranks:
        reduced.basis7, reduced.fc7 = _low_rank_layers(head.fc7, ranks["fc7"], _fc7_activations(head, activations))
    return reduced.train(head.training)


def check_rank(name: str, inputs: int, outputs: int, rank: int) -> None:
    """SppnetError for a rank that saves no work in a layer of this size."""
    largest = (inputs * outputs - 1) // (inputs + outputs)  # rank · (inputs + outputs) < inputs · outputs
    if not 1 <= rank <= largest:
        expected = f"expected 1 to {largest}" if largest else "this layer is too small for any"
        raise SppnetError(
            f"low_rank.{name}={rank}: {expected}, so that it saves work in a layer of {inputs} inputs and {outputs} "
            "outputs; 0 keeps the whole layer"
        )


def fc6_activations(head: SPPHead, pooled: Tensor) -> Tensor:
    """Pooled features (R, D) -> fc6 before its rectification (R, fc6)."""
    return head.fc6(head.basis6(pooled * head.input_scale))


def principal_components(activations: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Activations (N, F) -> their mean (F,) and orthonormal principal components (F, rank), float64, largest first."""
    covariance = torch.cov(activations.T, correction=0).double()
    components = torch.linalg.eigh(covariance).eigenvectors  # variances ascend
    return activations.mean(0, dtype=torch.float64), components[:, -rank:].flip(1).contiguous()


@torch.no_grad()
def _low_rank_layers(linear: nn.Linear, rank: int, activations: Tensor) -> tuple[nn.Linear, nn.Linear]:
    # Wx + b varies around its mean m along U: U(UᵀW)x + m + U Uᵀ(b − m)
    mean, components = principal_components(activations.cpu(), rank)
    bias = linear.bias.cpu().double()
    first = nn.utils.skip_init(nn.Linear, linear.in_features, rank, bias=False)
    second = nn.utils.skip_init(nn.Linear, rank, linear.out_features)
    first.weight.copy_(components.T @ linear.weight.cpu().double())
    second.weight.copy_(components)
    second.bias.copy_(mean + components @ (components.T @ (bias - mean)))
    return first.to(linear.weight), second.to(linear.weight)


@torch.no_grad()
def _fc7_activations(head: SPPHead, activations: Tensor) -> Tensor:
    """fc7 before its rectification (N, fc7), from the same of fc6 (N, fc6)."""
    return head.fc7(head.basis7(activations.to(head.fc6.weight).relu())).cpu()
