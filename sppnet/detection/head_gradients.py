"""The gradients of the head on a CPU, written out: every product into memory that stays from step to step (sec. 4.1).

Autograd would allocate the gradients of fc6 and fc7 anew in every step, and autocast their copies in bfloat16: 280 MB
each for the paper's head. Getting such memory from the system takes as long as the products themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sppnet.network.sppnet import SPPHead


class HeadGradients:
    """Loss of a batch, and its gradients in the ``grad`` of the head's parameters; products in `precision`."""

    def __init__(self, head: SPPHead, precision: str = "float32") -> None:
        if head.ranks:
            raise ValueError(f"a compressed head cannot be trained, got ranks {head.ranks}; train the whole one")
        self._head = head
        self._layers = (head.fc6, head.fc7, head.classifier)
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
        inputs, masks = [(pooled * self._head.input_scale).to(self._kind)], []
        for weight, layer in zip(self._weights[:2], self._layers[:2], strict=True):
            hidden = F.linear(inputs[-1], weight, layer.bias.to(self._kind)).relu_()
            masks.append(self._mask(hidden))
            inputs.append(hidden.mul_(masks[-1]))
        logits = F.linear(inputs[2], self._weights[2], self._layers[2].bias.to(self._kind)).float()
        self._backward(inputs, masks, (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / len(labels))
        return logits

    def _mask(self, hidden: Tensor) -> Tensor:
        """What dropout multiplies with: 0, or the inverse of the share kept. (``bernoulli_`` takes 5 × as long.)"""
        kept = 1 - self._head.dropout
        if kept == 1:
            return torch.ones((), dtype=hidden.dtype)
        return (torch.rand(hidden.shape) < kept).to(hidden.dtype).div_(kept)

    def _backward(self, inputs: list[Tensor], masks: list[Tensor], gradient: Tensor) -> None:
        """From the gradient of the logits (R, K + 1) down to fc6."""
        for k in (2, 1, 0):
            layer = self._layers[k]
            _gradient(layer.bias).copy_(gradient.float().sum(0))
            rows = gradient.to(self._kind)
            torch.mm(rows.t(), inputs[k], out=self._gradients[k])
            if self._gradients[k] is not layer.weight.grad:
                _gradient(layer.weight).copy_(self._gradients[k])
            if k:
                gradient = torch.mm(rows, self._weights[k]).mul_(masks[k - 1]).mul_(inputs[k] > 0)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a gradient of the head is gone; keep the parameters and call no zero_grad while it trains")
    return parameter.grad
