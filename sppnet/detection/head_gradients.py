"""The gradients of the head on a CPU, written out: every product into memory that stays from step to step (sec. 4.1).

Autograd would allocate the gradients of fc6 and fc7 anew in every step, and autocast their copies in bfloat16: 280 MB
each for the paper's head. Getting such memory from the system takes as long as the products themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.network.sppnet import SPPHead


class HeadGradients:
    """Loss of a batch, and its gradients in the ``grad`` of the head's parameters; products in `precision`."""

    def __init__(self, head: SPPHead, precision: str = "float32") -> None:
        self._head = head
        self._layers = (*head.products("fc6"), *head.products("fc7"), head.classifier)
        self._kind = torch.bfloat16 if precision == "bfloat16" else head.fc6.weight.dtype
        for parameter in head.parameters():
            parameter.grad = torch.zeros_like(parameter)
        # The parameters and their gradients themselves, unless the products need copies in another precision.
        self._weights = [layer.weight.detach().to(self._kind) for layer in self._layers]
        self._gradients = [_gradient(layer.weight).to(self._kind) for layer in self._layers]

    @torch.no_grad()
    def __call__(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Pyramid vectors (R, D), labels (R,) -> logits (R, K + 1) float32.

        Dropout is as in training, whatever the head's mode. Afterwards every parameter's ``grad`` is that of the mean
        cross-entropy.
        """
        for own, layer in zip(self._weights, self._layers, strict=True):
            if own.data_ptr() != layer.weight.data_ptr():
                own.copy_(layer.weight)
        inputs, masks = [(pooled * self._head.input_scale).to(self._kind)], list[Tensor | None]()
        for weight, layer in zip(self._weights[:-1], self._layers[:-1], strict=True):
            hidden = self._product(inputs[-1], weight, layer)
            rectified = layer is self._head.fc6 or layer is self._head.fc7  # not the thin layers below them
            mask = self._mask(hidden.relu_()) if rectified else None
            masks.append(mask)
            inputs.append(hidden if mask is None else hidden.mul_(mask))
        logits = self._product(inputs[-1], self._weights[-1], self._layers[-1]).float()
        self._backward(inputs, masks, (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / len(labels))
        return logits

    def _product(self, rows: Tensor, weight: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(rows, weight, None if layer.bias is None else layer.bias.to(self._kind))

    def _mask(self, hidden: Tensor) -> Tensor:
        """What dropout multiplies with: 0, or the inverse of the share kept. (``bernoulli_`` takes 5 × as long.)"""
        kept = 1 - self._head.dropout
        if kept == 1:
            return torch.ones((), dtype=hidden.dtype)
        return (torch.rand(hidden.shape) < kept).to(hidden.dtype).div_(kept)

    def _backward(self, inputs: list[Tensor], masks: list[Tensor | None], gradient: Tensor) -> None:
        """From the gradient of the logits (R, K + 1) down to fc6, or what stands below it."""
        for k in reversed(range(len(self._layers))):
            layer = self._layers[k]
            if layer.bias is not None:
                _gradient(layer.bias).copy_(gradient.float().sum(0))
            rows = gradient.to(self._kind)
            torch.mm(rows.t(), inputs[k], out=self._gradients[k])
            if self._gradients[k] is not layer.weight.grad:
                _gradient(layer.weight).copy_(self._gradients[k])
            if k:
                gradient, mask = torch.mm(rows, self._weights[k]), masks[k - 1]
                if mask is not None:
                    gradient.mul_(mask).mul_(inputs[k] > 0)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a gradient of the head is gone; keep the parameters and call no zero_grad while it trains")
    return parameter.grad
